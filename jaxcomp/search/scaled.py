"""Run a program on numbers beyond the range of floats: arrays with a common power of two.

Deep networks of positive weights grow by a factor at each layer: float32 ends at the 25th of a
thousand channels, and bfloat16 with it. Here each array is ``mantissa * 2**exponent`` with one
integer exponent; what is linear, bilinear, a sum or a maximum rounds no more than floats do, for
powers of two are exact. Other functions (``tanh``, loops) are computed on the true values, where
these are within the range.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomp.model import tapped
from jaxcomp.model.program import Block, Op, Program

# Linear in the first input; indices and the like follow it.
_LINEAR = frozenset(
    """
    broadcast_in_dim copy cumsum dynamic_slice expand_dims gather name neg real reduce_max
    reduce_min reduce_sum reduce_window_max reduce_window_min reduce_window_sum reshape rev slice
    squeeze split stop_gradient transpose unstack
    """.split()  # noqa: SIM905 (a table reads better)
)
_BILINEAR = frozenset({"mul", "dot_general", "conv_general_dilated"})
# All floating inputs in the same unit, which is that of the result.
_ADDITIVE = frozenset(
    {"add", "add_any", "sub", "max", "min", "concatenate", "pad", "select_n", "stack", "clamp"}
)
_COMPARED = frozenset({"eq", "ne", "gt", "ge", "lt", "le"})
_BODIES = tapped.RULES | {"remat2", "checkpoint"}


class Scaled(NamedTuple):
    """``mantissa * 2**exponent``; the exponent is an int32 scalar, and 0 where nothing floats."""

    mantissa: Any
    exponent: Any


def run(program: Program, values: Sequence[Any]) -> list[Scaled]:
    """A program's outputs, however large.

    Differentiable with respect to the values: the derivative of a mantissa is that of the output in
    the output's own unit.

    Args:
        program: from :func:`jaxcomp.model.program.read`.
        values: arrays for the inputs of ``program.block``.

    Returns:
        The outputs, flat.

    Example:
        >>> import jax
        >>> from jaxcomp.model.program import read
        >>> program = read(lambda p, x: x * p * p * p * p, jnp.ones(()), jnp.ones(()))
        >>> (found,) = jax.jit(lambda *values: run(program, values))(2.0**50, 3.0)
        >>> float(found.mantissa), int(found.exponent)  # 3 * 2**200
        (1.5, 201)
    """
    return _block(program.block, _with(values, jnp.int32(0)))


def logarithm(value: Scaled) -> Any:
    """The natural logarithm of the magnitude.

    Example:
        >>> round(float(logarithm(Scaled(jnp.float32(1.0), jnp.int32(200)))), 3)  # 200 ln 2
        138.629
    """
    size = jnp.log(jnp.abs(jnp.asarray(value.mantissa, jnp.float32)))
    return size + value.exponent * np.float32(np.log(2))


def _block(block: Block, values: Sequence[Scaled]) -> list[Scaled]:
    held = dict(zip(block.inputs, values, strict=True))

    def value(of: Any) -> Scaled:
        return Scaled(of.constant, jnp.int32(0)) if of.constant is not None else held[of]

    for op in block.ops:
        held.update(zip(op.outputs, _perform(op, [value(one) for one in op.inputs]), strict=True))
    return [value(output) for output in block.outputs]


def _perform(op: Op, inputs: list[Scaled]) -> list[Scaled]:
    if op.name in _BODIES:
        return _block(op.blocks[0], inputs)
    if not any(_floats(one.mantissa) for one in inputs):
        return _with(tapped.bind(op, *(one.mantissa for one in inputs)), jnp.int32(0))
    if op.name in _LINEAR or (op.name == "convert_element_type" and _floats_only(op)):
        return _with(tapped.bind(op, *(one.mantissa for one in inputs)), inputs[0].exponent)
    if op.name in _BILINEAR:
        exponent = inputs[0].exponent + inputs[1].exponent
        return _with(tapped.bind(op, *(one.mantissa for one in inputs)), exponent)
    if op.name == "div":
        exponent = inputs[0].exponent - inputs[1].exponent
        return _with(tapped.bind(op, *(one.mantissa for one in inputs)), exponent)
    if op.name in ("square", "integer_pow"):
        power = op.params.get("y", 2)
        return _with(tapped.bind(op, inputs[0].mantissa), inputs[0].exponent * power)
    if op.name in _ADDITIVE | _COMPARED:
        mantissas, exponent = _aligned(inputs)
        return _with(tapped.bind(op, *mantissas), exponent)
    return _with(tapped.bind(op, *map(_true, inputs)), jnp.int32(0))


def _floats(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def _floats_only(op: Op) -> bool:
    return all(jnp.issubdtype(one.dtype, jnp.floating) for one in (*op.inputs, *op.outputs))


def _with(results: Sequence[Any], exponent: Any) -> list[Scaled]:
    """Results in a unit in which the largest of each is between 1 and 2."""
    found = []
    for result in results:
        if not _floats(result) or not np.size(result):
            found.append(Scaled(result, jnp.int32(0)))
            continue
        largest = lax.stop_gradient(jnp.max(jnp.abs(result))).astype(jnp.float32)
        fine = jnp.isfinite(largest) & (largest > 0)
        shift = jnp.where(fine, jnp.frexp(jnp.where(fine, largest, 1.0))[1] - 1, 0)
        found.append(Scaled(_times_power(result, -shift), exponent + shift))
    return found


def _aligned(inputs: Sequence[Scaled]) -> tuple[list[Any], Any]:
    """Mantissas in the unit of the largest; zeros and the like have no say in it."""
    least = jnp.int32(-(2**30))
    says = [
        jnp.where(jnp.any(lax.stop_gradient(one.mantissa) != 0), one.exponent, least)
        if _floats(one.mantissa)
        else least
        for one in inputs
    ]
    exponent = says[0]
    for one in says[1:]:
        exponent = jnp.maximum(exponent, one)
    exponent = jnp.where(exponent == least, 0, exponent)
    mantissas = [
        _times_power(one.mantissa, jnp.minimum(one.exponent - exponent, 0))
        if _floats(one.mantissa)
        else one.mantissa
        for one in inputs
    ]
    return mantissas, exponent


def _true(one: Scaled) -> Any:
    return _times_power(one.mantissa, one.exponent) if _floats(one.mantissa) else one.mantissa


def _times_power(x: Any, power: Any) -> Any:
    """``x * 2**power``, exactly; in two steps, for a float's own powers reach half as far."""
    kind = jnp.result_type(x)
    x = x.astype(jnp.promote_types(kind, jnp.float32)) if hasattr(x, "astype") else x
    power = jnp.clip(power, -252, 252)
    half = power // 2
    for part in (half, power - half):
        bits = (part + 127).astype(jnp.int32) << 23
        x = x * lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.asarray(x, kind)
