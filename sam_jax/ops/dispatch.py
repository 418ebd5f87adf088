"""Dispatch of operations: a table of forms for each operation, and one policy for all.

An operation has a name in the field and a plain reference that reads like its formula. It may have
other forms, faster on some device or shape, that give the same values and gradients. Models call
the operation and know nothing else; ``implementation=`` names a form where a test or a benchmark
wants that one.

What the program is traced for is a ``Target``, which whoever builds a program sets around its
tracing (``tracing_for``). Kernels, forms written for one chip, are trusted there after a self-check
on that chip alone (``check_kernels``).
"""

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.arrays import Array

_log = logging.getLogger(__name__)

Kernels: TypeAlias = Literal["auto", "none", "interpret"]
AUTO = "auto"
# Largest distance of a kernel's values and gradients from the reference's in float32, by the type
# of its inputs, over the reference's largest magnitude.
CHECK_TOLERANCES = {"float32": 1e-4, "bfloat16": 4e-2}
# Gradients smaller than this part of the largest one are measured by it: that of keys' biases,
# which softmax does not see, is nothing but rounding.
_NEGLIGIBLE = 0.05


@dataclasses.dataclass(frozen=True)
class Target:
    """Device that a program is traced for, and its options.

    Attributes:
      platform: "cpu", "gpu" or "tpu"; None for JAX's default backend.
      compute_capability: of an NVIDIA GPU, as in (9, 0); None for other devices.
      kernels: "auto" uses those of the platform, once they were checked; "none" uses no kernel;
        "interpret" runs TPU kernels without a TPU, slowly, for tests.
      partitioned: whether the compiler divides the program over several devices by itself, which it
        cannot do with a kernel; inside ``shard_map`` it does not.
      described: whether the device is only described, not here: kernels are then taken unchecked.
    """

    platform: str | None = None
    compute_capability: tuple[int, int] | None = None
    kernels: Kernels = "auto"
    partitioned: bool = False
    described: bool = False

    @classmethod
    def of(cls, device: jax.Device, **options: Any) -> "Target":
        """The target that a device is."""
        capability = getattr(device, "compute_capability", None) or ""
        parts = str(capability).split(".")
        is_nvidia = len(parts) == 2 and all(part.isdigit() for part in parts)
        return cls(
            platform=device.platform,
            compute_capability=(int(parts[0]), int(parts[1])) if is_nvidia else None,
            described=device.platform != jax.default_backend(),
            **options,
        )


_context = jax.make_user_context(None)


def tracing_for(target: Target) -> contextlib.AbstractContextManager[Any]:
    """A context in which operations are traced for a target; part of the key of JAX's caches."""
    return _context(target)


def current_target() -> Target:
    """The target that is traced for; without a context, JAX's default device."""
    target = _context.value
    if target is None:
        target = Target()
    if target.platform is None:
        of_device = Target.of(jax.local_devices()[0])
        target = dataclasses.replace(
            target,
            platform=of_device.platform,
            compute_capability=of_device.compute_capability,
        )
    return target


def _always(*_: Any, **__: Any) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to compute an operation.

    Attributes:
      name: for ``implementation=``.
      function: takes the operation's arguments; a TPU kernel takes ``interpret=`` as well.
      supports: of the same arguments, whether it can compute them at all.
      pays: of the same arguments, whether "auto" takes it if it can.
      platforms: where "auto" takes it; None for everywhere.
      is_kernel: whether it is a TPU kernel.
    """

    name: str
    function: Callable[..., Any]
    supports: Callable[..., bool] = _always
    pays: Callable[..., bool] = _always
    platforms: tuple[str, ...] | None = None
    is_kernel: bool = False


class Operation:
    """An operation with its forms, the first of which that fits is taken.

    Args:
      name: in the field.
      forms: in the order of preference; the last one must fit everything.
      reference: name of the form that defines the values.
      examples: small inputs, by type of their numbers, that every kernel supports, as
        ``(positional, keywords)``; for tests and self-checks.
      describe: what arguments are, for messages; by default their shapes.
    """

    def __init__(
        self,
        name: str,
        forms: Sequence[Form],
        *,
        reference: str = "reference",
        examples: Callable[[Any], Sequence[tuple[tuple[Any, ...], dict[str, Any]]]] | None = None,
        describe: Callable[..., str] | None = None,
    ):
        self.name = name
        self.forms: Mapping[str, Form] = {form.name: form for form in forms}
        self.reference = self.forms[reference]
        self.examples = examples
        self._describe = describe or _describe_shapes
        OPERATIONS[name] = self

    def __call__(self, *args: Any, implementation: str = AUTO, **kwargs: Any) -> Any:
        """The operation's result.

        Raises:
          ValueError: if a form is named that there is not, or that cannot do these shapes.
        """
        target = current_target()
        form = self.choose(*args, implementation=implementation, **kwargs)
        if form.is_kernel:
            kwargs["interpret"] = target.platform != "tpu" or target.kernels == "interpret"
        return form.function(*args, **kwargs)

    def choose(self, *args: Any, implementation: str = AUTO, **kwargs: Any) -> Form:
        """The form that takes these arguments on the current target."""
        if implementation != AUTO:
            if implementation not in self.forms:
                raise ValueError(
                    f"{self.name} has no implementation {implementation!r}; there are "
                    f"{', '.join((AUTO, *self.forms))}"
                )
            form = self.forms[implementation]
            if not form.supports(*args, **kwargs):
                raise ValueError(
                    f"{self.name} {implementation!r} cannot do {self._describe(*args, **kwargs)}; "
                    f"{AUTO!r} takes what can"
                )
            self._check_named(form, current_target())
            return form
        target = current_target()
        return next(
            form
            for form in self.forms.values()
            if self._fits(form, target)
            and form.supports(*args, **kwargs)
            and form.pays(*args, **kwargs)
        )

    def _fits(self, form: Form, target: Target) -> bool:
        if not form.is_kernel:
            return form.platforms is None or target.platform in form.platforms
        if target.kernels == "interpret":
            return not target.partitioned
        if target.kernels == "none" or target.partitioned or target.platform != "tpu":
            return False
        return target.described or is_trusted(self, form)

    def _check_named(self, form: Form, target: Target) -> None:
        """Refuses a kernel on a TPU, where "auto" would not take it either.

        Elsewhere kernels that are named are interpreted.
        """
        if not form.is_kernel or target.platform != "tpu" or self._fits(form, target):
            return
        if target.kernels == "none":
            why = "kernels are turned off (model.kernels = 'none')"
        elif target.partitioned:
            why = "the compiler divides this program over devices, which it cannot do with a kernel"
        else:
            why = f"its check on this device found: {_checks[self.name, form.name].fault}"
        raise ValueError(
            f"{self.name} {form.name!r} is a kernel, and {why}; {AUTO!r} takes another"
        )


def _describe_shapes(*args: Any, **kwargs: Any) -> str:
    shapes = [tuple(x.shape) for x in jax.tree.leaves(args) if hasattr(x, "shape")]
    return f"arrays of {shapes} with {kwargs}"


OPERATIONS: dict[str, Operation] = {}


@dataclasses.dataclass(frozen=True)
class Check:
    """Result of a kernel's self-check.

    Attributes:
      operation, form: names.
      seconds: how long the check took.
      fault: what is wrong; None if nothing is.
    """

    operation: str
    form: str
    seconds: float
    fault: str | None

    def __str__(self) -> str:
        name = f"{self.operation}'s {self.form}"
        if self.fault is None:
            return f"{name} agrees with the reference"
        return f"{name} is passed over for the next form: {self.fault}"


_checks: dict[tuple[str, str], Check] = {}


def is_trusted(operation: Operation, form: Form) -> bool:
    """True if a kernel agrees with the reference on this process's device; checked once."""
    key = (operation.name, form.name)
    if key not in _checks:
        check = _outside_of_any_trace(
            functools.partial(check_form, operation, form, interpret=False)
        )
        # Another thread may have been as fast, and found the same.
        if _checks.setdefault(key, check) is check:
            _report(check)
    return _checks[key].fault is None


def check_kernels(target: Target) -> list[Check]:
    """Checks every kernel that "auto" could take for a target, so that all hosts agree on it.

    A kernel that fails on one host is used on none.
    """
    if target.platform != "tpu" or target.kernels != "auto" or target.described:
        return []
    pairs = [
        (operation, form)
        for operation in OPERATIONS.values()
        for form in operation.forms.values()
        if form.is_kernel
    ]
    passed = np.array([is_trusted(*pair) for pair in pairs])
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        everywhere = np.all(multihost_utils.process_allgather(passed), axis=0)
        for (operation, form), here, agreed in zip(pairs, passed, everywhere, strict=True):
            if here and not agreed:
                key = (operation.name, form.name)
                _checks[key] = dataclasses.replace(_checks[key], fault="it failed on another host")
                _report(_checks[key])
    return [_checks[operation.name, form.name] for operation, form in pairs]


def _report(check: Check) -> None:
    level = logging.INFO if check.fault is None else logging.WARNING
    _log.log(level, "%s (%.1f s)", check, check.seconds)


def check_form(operation: Operation, form: Form, *, interpret: Any) -> Check:
    """Compares values and gradients of a form with the reference's in float32, on its examples."""
    start = time.perf_counter()
    fault = None
    try:
        for dtype, tolerance in CHECK_TOLERANCES.items():
            errors = form_errors(operation, form, jnp.dtype(dtype), interpret=interpret)
            worst = max(errors, key=lambda name: _nan_is_largest(errors[name]))
            # Not written with ">", which is False for NaN.
            if not errors[worst] <= tolerance:
                fault = (
                    f"in {dtype}, {worst} is off by {errors[worst]:.2g} of its largest magnitude, "
                    f"allowed {tolerance}"
                )
                break
    # Compilers raise errors of every kind.
    except Exception as error:
        fault = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
    return Check(operation.name, form.name, time.perf_counter() - start, fault)


def form_errors(
    operation: Operation, form: Form, dtype: Any, *, interpret: Any
) -> dict[str, float]:
    """Largest distance of each value and gradient from the reference's in float32.

    Over the reference's largest magnitude, by a name that says which output or input it is of; the
    largest of all examples.
    """
    assert operation.examples is not None, f"{operation.name} has no examples"
    errors: dict[str, float] = {}
    options = {"interpret": interpret} if form.is_kernel else {}
    for args, kwargs in operation.examples(dtype):
        if not form.supports(*args, **kwargs):
            continue
        exact_args = jax.tree.map(_to_float32, args)
        with jax.default_matmul_precision("highest"):
            exact = values_and_gradients(operation.reference.function, exact_args, **kwargs)
        found = values_and_gradients(form.function, args, **kwargs, **options)
        least = _NEGLIGIBLE * max(_largest(x) for x in jax.tree.leaves(exact["gradients"]))
        for (path, ours), (_, theirs) in zip(
            jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(exact), strict=True
        ):
            name = jax.tree_util.keystr(path)
            difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
            error = _largest(difference) / (max(_largest(theirs), least) or 1.0)
            if not jnp.issubdtype(theirs.dtype, jnp.floating) and error:
                error = np.inf  # Bits are right or wrong.
            errors[name] = max(errors.get(name, 0.0), error, key=_nan_is_largest)
    return errors


def _largest(x: Any) -> float:
    return float(np.abs(np.asarray(x, np.float64)).max(initial=0.0))


def _nan_is_largest(x: float) -> float:
    return np.inf if np.isnan(x) else x


def _to_float32(x: Any) -> Any:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def values_and_gradients(
    function: Callable[..., Any], args: tuple[Any, ...], **options: Any
) -> dict[str, Any]:
    """Outputs, and gradients of a weighted sum of them by all arguments that have one."""
    return _values_and_gradients(function, tuple(sorted(options.items())), args)


# By function and options: what every form is compared with is traced once for all of them.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _values_and_gradients(
    function: Callable[..., Any], options: tuple[tuple[str, Any], ...], args: tuple[Any, ...]
) -> dict[str, Any]:
    leaves, tree = jax.tree.flatten(args)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def total(floats: list[Array]) -> Any:
        rest = iter(floats)
        given = [
            next(rest) if varies else leaf for leaf, varies in zip(leaves, is_float, strict=True)
        ]
        outputs = function(*jax.tree.unflatten(tree, given), **dict(options))
        # Weights that no two outputs or places share, so that a permutation shows.
        terms = [
            jnp.vdot(1.0 + jnp.cos(jnp.arange(x.size, dtype=jnp.float32)), x.ravel()) / x.size**0.5
            for x in (y.astype(jnp.float32) for y in jax.tree.leaves(outputs))
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return sum(terms), outputs

    floats = [leaf for leaf, varies in zip(leaves, is_float, strict=True) if varies]
    (_, outputs), gradients = jax.value_and_grad(total, has_aux=True)(floats)
    return {"outputs": outputs, "gradients": gradients}


def _outside_of_any_trace(function: Callable[[], Any]) -> Any:
    """The function's result from a thread of its own, as tracing is a thread's."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]
