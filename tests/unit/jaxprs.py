"""Jaxprs, walked: sums that are kept in half precision, and products by their precision."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

HALF = (jnp.bfloat16, jnp.float16)
_ADDS = ("add", "add_any", "sub")


@dataclasses.dataclass(frozen=True)
class HalfSum:
    """A sum that is kept in half precision.

    Attributes:
      kind: the primitive; "chain" for sums of sums, "loop" for what each step adds to.
      count: numbers that are summed.
      shape: of what is summed.
      place: line of the package and scopes that made it.
    """

    kind: str
    count: int
    shape: tuple[int, ...]
    place: str


def jaxprs(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """The jaxpr, and those of its loops, branches, calls and kernels."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for leaf in jax.tree.leaves(list(equation.params.values())):
            if isinstance(leaf, ClosedJaxpr):
                yield from jaxprs(leaf.jaxpr)
            elif isinstance(leaf, Jaxpr):
                yield from jaxprs(leaf)


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations of ``jaxprs``."""
    for inner in jaxprs(jaxpr):
        yield from inner.eqns


def half_sums(jaxpr: Jaxpr, most: int, axis_sizes: Mapping[str, int] = {}) -> list[HalfSum]:
    """Sums of more than ``most`` numbers in half precision.

    Products and convolutions are none: their operands may be halves, but processors sum them in
    float32 and round once.
    """
    found = []
    for inner in jaxprs(jaxpr):
        found += _chains(inner)
        for equation in inner.eqns:
            if equation.outvars and _is_half(equation.outvars[0]):
                count = _num_summed(equation, axis_sizes)
                found.append(_half_sum(equation.primitive.name, count, equation))
            if equation.primitive.name in ("scan", "while"):
                found += _carried(equation)
    return [half for half in found if half.count > most]


def _half_sum(kind: str, count: int, equation: JaxprEqn) -> HalfSum:
    frames = getattr(equation.source_info.traceback, "frames", [])
    ours = [f for f in frames if "/sam_jax/" in f.file_name]
    line = f"{ours[0].file_name.rpartition('/sam_jax/')[2]}:{ours[0].line_num} " if ours else ""
    shape = tuple(getattr(equation.invars[0].aval, "shape", ()))
    return HalfSum(kind, count, shape, f"{line}[{equation.source_info.name_stack}]")


def _is_half(variable: Any) -> bool:
    return getattr(variable.aval, "dtype", None) in HALF


def _num_summed(equation: JaxprEqn, axis_sizes: Mapping[str, int]) -> int:
    """Numbers that make one of the result, at most."""
    name, params = equation.primitive.name, equation.params
    shape = getattr(equation.invars[0].aval, "shape", ())
    if name in ("reduce_sum", "reduce_prod"):
        return math.prod(shape[axis] for axis in params["axes"])
    if name == "reduce":
        return math.prod(shape[axis] for axis in params["dimensions"])
    if name in ("cumsum", "cumprod", "cumlogsumexp"):
        return shape[params["axis"]]
    if name in ("reduce_window_sum", "reduce_window"):
        return math.prod(params["window_dimensions"])
    if name.startswith(("scatter-", "scatter_")):
        # How many land on one place is not known.
        inside = params["dimension_numbers"].update_window_dims
        updates = equation.invars[2].aval.shape
        return math.prod(size for axis, size in enumerate(updates) if axis not in inside)
    if name.startswith(("psum", "reduce_scatter", "all_reduce")):
        axes = params.get("axes", params.get("axis_name"))
        axes = axes if isinstance(axes, tuple) else (axes,)
        return math.prod(axis_sizes.get(axis, 1) for axis in axes)
    return 0


def _carried(equation: JaxprEqn) -> list[HalfSum]:
    """Sums that each step of a loop adds to; endless for one whose length is not known."""
    params = equation.params
    if equation.primitive.name == "scan":
        body, first, length = params["jaxpr"].jaxpr, params["num_consts"], params["length"]
        carried = body.invars[first : first + params["num_carry"]]
    else:
        body, length = params["body_jaxpr"].jaxpr, 2**31
        carried = body.invars[params["body_nconsts"] :]
    made_by = {variable: made for made in body.eqns for variable in made.outvars}
    found = []
    for before, after in zip(carried, body.outvars, strict=False):
        # Through sums, back to what came in.
        waiting = [after] if _is_half(before) else []
        while waiting:
            variable = waiting.pop()
            made = None if isinstance(variable, Literal) else made_by.get(variable)
            if made is None or made.primitive.name not in _ADDS:
                continue
            if before in made.invars:
                found.append(_half_sum("loop", length, made))
                break
            waiting += made.invars
    return found


def _chains(jaxpr: Jaxpr) -> list[HalfSum]:
    """Sums of sums, with the number of their terms."""
    terms: dict[Any, tuple[int, JaxprEqn]] = {}
    summed_again = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in _ADDS and _is_half(equation.outvars[0]):
            variables = [v for v in equation.invars if not isinstance(v, Literal)]
            count = sum(terms[v][0] if v in terms else 1 for v in variables)
            summed_again.update(variables)
            terms[equation.outvars[0]] = count, equation
    return [
        _half_sum("chain", count, equation)
        for variable, (count, equation) in terms.items()
        if variable not in summed_again
    ]


def inexact_products(jaxpr: Jaxpr) -> list[HalfSum]:
    """Products of float32 numbers that do not ask for all their digits."""
    return [
        _half_sum("dot_general", 0, equation)
        for equation in equations(jaxpr)
        if equation.primitive.name == "dot_general"
        and all(v.aval.dtype == jnp.float32 for v in equation.invars)
        and not _is_exact(equation)
    ]


def _is_exact(equation: JaxprEqn) -> bool:
    precision = equation.params["precision"]
    precisions = precision if isinstance(precision, tuple) else (precision,)
    return set(precisions) == {jax.lax.Precision.HIGHEST}


def on_one_pass(jaxpr: ClosedJaxpr, *arguments: Any) -> list[Any]:
    """Results on a processor that by default rounds what it multiplies to bfloat16, as TPUs do."""
    values = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    values |= zip(jaxpr.jaxpr.invars, arguments, strict=True)

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if isinstance(inner, ClosedJaxpr):
            outputs = on_one_pass(inner, *inputs)
        else:
            if equation.primitive.name == "dot_general" and not _is_exact(equation):
                inputs = [x.astype(jnp.bfloat16).astype(x.dtype) for x in inputs]
            outputs = equation.primitive.bind(*inputs, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(variable) for variable in jaxpr.jaxpr.outvars]
