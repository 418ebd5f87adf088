"""Choice of an operation's form, and what a kernel must show before it runs."""

import logging
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from sam_jax.ops import dispatch
from sam_jax.ops.dispatch import Check, Form, Operation, Target, tracing_for

X = jnp.arange(1.0, 7.0).reshape(2, 3)
TPU = Target(platform="tpu")
DESCRIBED = Target(platform="tpu", described=True)


def reference(x: Any) -> tuple[Any, Any]:
    return jnp.sin(x), 2 * x


def kernel(x: Any, *, interpret: bool) -> tuple[Any, Any]:
    """A right one; that it is no Pallas kernel changes nothing here."""
    del interpret
    return reference(x)


def examples(dtype: Any) -> list[Any]:
    return [((X.astype(dtype),), {}), ((X[:1].astype(dtype),), {})]


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Operation]:
    """Makes operations that are in the table until the test ends, as are checks of them."""
    monkeypatch.setattr(dispatch, "OPERATIONS", {})
    monkeypatch.setattr(dispatch, "_checks", {})

    def made(function: Callable[..., Any] = kernel, **options: Any) -> Operation:
        return Operation(
            "doubling",
            [
                Form("kernel", function, is_kernel=True, **options),
                Form("on_gpu", reference, platforms=("gpu",)),
                Form(
                    "fast", reference, supports=lambda x: x.shape[0] < 4, pays=lambda x: x.ndim > 1
                ),
                Form("reference", reference),
            ],
            examples=examples,
        )

    return made


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target("cpu"), "fast"),
        (Target("gpu"), "on_gpu"),
        (TPU, "kernel"),
        (DESCRIBED, "kernel"),
        (Target("tpu", kernels="none"), "fast"),
        (Target("tpu", kernels="none", described=True), "fast"),
        (Target("tpu", partitioned=True), "fast"),
        (Target("tpu", partitioned=True, described=True), "fast"),
        (Target("cpu", kernels="interpret"), "kernel"),
        (Target("gpu", kernels="interpret"), "kernel"),
        (Target("cpu", kernels="interpret", partitioned=True), "fast"),
    ],
)
def test_what_auto_takes(
    operation: Callable[..., Operation], target: Target, expected: str
) -> None:
    with tracing_for(target):
        assert operation().choose(X).name == expected


def test_the_first_form_that_can_and_pays_is_taken(operation: Callable[..., Operation]) -> None:
    made = operation(supports=lambda x: x.shape[-1] == 3, pays=lambda x: 1 < x.shape[0] < 9)
    with tracing_for(DESCRIBED):
        names = {
            shape: made.choose(jnp.zeros(shape)).name
            for shape in ((2, 3), (1, 3), (2, 4), (5, 4), (1,))
        }
    # It can but does not pay; it cannot; nor can the next; that does not pay.
    assert names == {
        (2, 3): "kernel",
        (1, 3): "fast",
        (2, 4): "fast",
        (5, 4): "reference",
        (1,): "reference",
    }


def test_only_described_devices_take_kernels_unchecked(
    operation: Callable[..., Operation], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(dispatch, "is_trusted", lambda *pair: checked.append(pair) or True)
    made = operation()
    for target in (DESCRIBED, Target("tpu", kernels="none"), Target("cpu", kernels="interpret")):
        with tracing_for(target):
            made.choose(X)
    assert not checked
    with tracing_for(TPU):
        made.choose(X)
    assert checked == [(made, made.forms["kernel"])]


@pytest.mark.parametrize(
    ("target", "interpreted"),
    [
        (Target("cpu", kernels="interpret"), True),
        (Target("tpu", kernels="interpret"), True),
        (Target("cpu"), True),
        (DESCRIBED, False),
    ],
)
def test_kernels_are_interpreted_but_for_a_tpu(
    operation: Callable[..., Operation], target: Target, interpreted: bool
) -> None:
    found = []

    def observed(x: Any, *, interpret: bool) -> Any:
        found.append(interpret)
        return reference(x)

    with tracing_for(target):
        operation(observed)(X, implementation="kernel")
    assert found == [interpreted]


def test_a_form_can_be_asked_for_whatever_pays(operation: Callable[..., Operation]) -> None:
    made = operation(pays=lambda x: False)
    for name in ("kernel", "on_gpu", "fast", "reference"):
        assert made.choose(X, implementation=name).name == name
    assert made.choose(X).name == "fast"


@pytest.mark.parametrize(
    ("target", "function", "why"),
    [
        (Target("tpu", kernels="none"), kernel, "kernels are turned off"),
        (Target("tpu", partitioned=True), kernel, "the compiler divides this program"),
        (TPU, lambda x, *, interpret: reference(x + 1), "its check on this device found"),
    ],
)
def test_a_kernel_that_is_asked_for_keeps_to_the_policy(
    operation: Callable[..., Operation], target: Target, function: Callable[..., Any], why: str
) -> None:
    made = operation(function)
    with tracing_for(target), pytest.raises(ValueError, match=f"'kernel' is a kernel, and {why}"):
        made(X, implementation="kernel")


def test_a_form_that_there_is_not_is_named(operation: Callable[..., Operation]) -> None:
    message = (
        "doubling has no implementation 'quick'; there are auto, kernel, on_gpu, fast, reference"
    )
    with pytest.raises(ValueError, match=message):
        operation()(X, implementation="quick")


def test_a_form_that_cannot_says_what_it_cannot(operation: Callable[..., Operation]) -> None:
    message = r"doubling 'fast' cannot do arrays of \[\(5, 3\)\] with \{\}; 'auto' takes what can"
    with pytest.raises(ValueError, match=message):
        operation()(jnp.zeros((5, 3)), implementation="fast")


def test_operations_stand_in_the_table_by_their_name(
    operation: Callable[..., Operation],
) -> None:
    made = operation()
    assert {"doubling": made} == dispatch.OPERATIONS
    assert list(made.forms) == ["kernel", "on_gpu", "fast", "reference"]
    assert made.reference is made.forms["reference"]


# --- The target -----------------------------------------------------------------------------------


def test_without_a_context_the_target_is_the_default_device() -> None:
    found = dispatch.current_target()
    assert found.platform == jax.default_backend()
    assert (found.kernels, found.partitioned, found.described) == ("auto", False, False)
    with tracing_for(Target(kernels="none")):
        assert dispatch.current_target() == Target(
            found.platform, found.compute_capability, kernels="none"
        )
    assert dispatch.current_target() == found


@pytest.mark.parametrize(
    ("platform", "attributes", "expected"),
    [
        ("gpu", {"compute_capability": "9.0"}, (9, 0)),
        ("gpu", {"compute_capability": "12.0"}, (12, 0)),
        ("gpu", {"compute_capability": "gfx942"}, None),  # AMD's
        ("tpu", {}, None),
    ],
)
def test_targets_of_devices(
    platform: str, attributes: dict[str, str], expected: tuple[int, int] | None
) -> None:
    device = mock.Mock(spec=jax.Device, platform=platform, **attributes)
    target = Target.of(device, kernels="none")
    assert (target.platform, target.compute_capability) == (platform, expected)
    assert target.kernels == "none"
    assert target.described == (platform != jax.default_backend())
    assert not Target.of(jax.devices()[0]).described


def test_another_target_is_another_trace(operation: Callable[..., Operation]) -> None:
    """One jitted function, which JAX keeps, never runs for a target it was not made for."""
    made, traces = operation(), []

    @jax.jit
    def run(x: Any) -> Any:
        traces.append(made.choose(x).name)
        return made(x)[1]

    targets = [Target("cpu"), Target("cpu", kernels="interpret"), Target("gpu")]
    for _ in range(2):
        for target in targets:
            with tracing_for(target):
                np.testing.assert_array_equal(run(X), 2 * X)
    assert traces == ["fast", "kernel", "on_gpu"]


# --- Self-checks ----------------------------------------------------------------------------------


def wrong_value(x: Any, *, interpret: bool) -> Any:
    first, second = reference(x)
    return first, second.at[0, 0].add(0.5)


@jax.custom_vjp
def _wrong_sine(x: Any) -> Any:
    return jnp.sin(x)


_wrong_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, d: (d * jnp.cos(x).at[0, 0].set(9.0),))


def wrong_gradient(x: Any, *, interpret: bool) -> Any:
    return _wrong_sine(x), 2 * x


def permuted(x: Any, *, interpret: bool) -> Any:
    first, second = reference(x)
    return first[:, ::-1], second


@jax.custom_vjp
def _not_a_number(x: Any) -> Any:
    return jnp.sin(x).at[0, 1].set(jnp.nan)


_not_a_number.defvjp(lambda x: (_not_a_number(x), x), lambda x, d: (d * jnp.cos(x),))


def not_a_number(x: Any, *, interpret: bool) -> Any:
    """Its gradient is right, as that of a kernel may be."""
    return _not_a_number(x), 2 * x


def does_not_compile(x: Any, *, interpret: bool) -> Any:
    raise NotImplementedError("cannot lower this\nand much more")


def wrong_in_halves(x: Any, *, interpret: bool) -> Any:
    first, second = reference(x)
    return first, second * (1.1 if x.dtype == jnp.bfloat16 else 1.0)


FAULTS = {
    "value": (wrong_value, r"in float32, \['outputs'\]\[1\] is off by 0\.083 .*allowed 0\.0001"),
    "gradient": (wrong_gradient, r"in float32, \['gradients'\]\[0\] is off by .* allowed"),
    "order": (permuted, r"in float32, \['outputs'\]\[0\] is off by"),
    "nan": (not_a_number, r"in float32, \['outputs'\]\[0\] is off by (nan|inf)"),
    "raises": (does_not_compile, r"NotImplementedError: cannot lower this$"),
    "bfloat16": (wrong_in_halves, r"in bfloat16, \['(outputs|gradients)'\].* is off by 0\.\d+"),
}


@pytest.mark.parametrize(("form", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_kernel_is_found_named_and_replaced(
    operation: Callable[..., Operation],
    form: Callable[..., Any],
    fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = operation(form)
    with tracing_for(TPU), caplog.at_level(logging.INFO, logger=dispatch.__name__):
        assert made.choose(X).name == "fast"
        np.testing.assert_array_equal(made(X)[1], 2 * X)
        (check,) = dispatch.check_kernels(TPU)
    assert (check.operation, check.form) == ("doubling", "kernel")
    assert check.seconds > 0
    assert check.fault is not None
    assert re.search(fault, check.fault), check.fault
    # Once, although it was asked for three times.
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"doubling's kernel is passed over for the next form: {check.fault} ({check.seconds:.1f} s)"
    )


def test_a_right_kernel_is_trusted_and_checked_once(
    operation: Callable[..., Operation], caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def counted(x: Any, *, interpret: bool) -> Any:
        calls.append((x.dtype, interpret))
        return reference(x)

    made = operation(counted)
    with tracing_for(TPU), caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(3):
            assert made.choose(X).name == "kernel"
        (check,) = dispatch.check_kernels(TPU)
    assert check.fault is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "doubling's kernel agrees with the reference" in record.getMessage()
    # Both examples in both types, compiled as on a TPU.
    assert {dtype for dtype, _ in calls} == {jnp.dtype("float32"), jnp.dtype("bfloat16")}
    assert len(calls) == 4
    assert not any(interpret for _, interpret in calls)


@pytest.mark.parametrize(("form", "taken"), [(kernel, "kernel"), (wrong_value, "fast")])
def test_kernels_are_checked_while_a_program_is_traced(
    operation: Callable[..., Operation], form: Callable[..., Any], taken: str
) -> None:
    made, names = operation(form), []

    @jax.jit
    def run(x: Any) -> Any:
        names.append(made.choose(x).name)
        return jax.lax.map(lambda row: made(row[None])[1], x)

    with tracing_for(TPU):
        found = jax.vmap(jax.grad(lambda x: run(x).sum()))(jnp.stack([X, X]))
    np.testing.assert_array_equal(found, 2.0)
    assert set(names) == {taken}


def test_a_check_sees_every_example(operation: Callable[..., Operation]) -> None:
    """The second one alone has a single row; what a kernel does not take is not asked of it."""

    def wrong_for_one_row(x: Any, *, interpret: bool) -> Any:
        first, second = reference(x)
        return first, second + (1.0 if x.shape[0] == 1 else 0.0)

    made = operation(wrong_for_one_row)
    assert dispatch.check_form(made, made.forms["kernel"], interpret=True).fault is not None
    made = operation(wrong_for_one_row, supports=lambda x: x.shape[0] > 1)
    assert dispatch.check_form(made, made.forms["kernel"], interpret=True).fault is None


def test_a_gradient_that_is_rounding_is_measured_by_the_largest(
    operation: Callable[..., Operation],
) -> None:
    """The gradient of what changes nothing, such as the bias of keys before a softmax."""

    def softmax(x: Any, bias: Any) -> Any:
        return jax.nn.softmax(x + bias)

    made = Operation(
        "softmax",
        [
            Form("without", lambda x, bias: jax.nn.softmax(x) + 0 * bias),
            Form("reference", softmax),
        ],
        examples=lambda dtype: [((X.astype(dtype), jnp.ones((2, 1), dtype)), {})],
    )
    errors = dispatch.form_errors(made, made.forms["without"], jnp.float32, interpret=True)
    assert set(errors) == {"['outputs']", "['gradients'][0]", "['gradients'][1]"}
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize(
    "target",
    [
        Target("cpu"),
        Target("gpu"),
        Target("tpu", kernels="none"),
        Target("tpu", kernels="interpret"),
        DESCRIBED,
    ],
)
def test_nothing_is_checked_that_auto_would_not_take(
    operation: Callable[..., Operation], target: Target
) -> None:
    operation(does_not_compile)
    assert dispatch.check_kernels(target) == []


def test_hosts_use_only_what_passed_on_all(
    operation: Callable[..., Operation],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Otherwise they would run different programs and wait for each other for ever."""
    made = operation()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda here: np.stack([here, ~np.asarray(here)])
    )
    with caplog.at_level(logging.WARNING, logger=dispatch.__name__):
        (check,) = dispatch.check_kernels(TPU)
    assert check == Check("doubling", "kernel", check.seconds, "it failed on another host")
    with tracing_for(TPU):
        assert made.choose(X).name == "fast"
    assert (
        "doubling's kernel is passed over for the next form: it failed on another host"
        in caplog.text
    )
