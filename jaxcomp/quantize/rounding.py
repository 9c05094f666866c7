"""From numbers to codes and back, once the scale is known: to the nearest level, or by chance."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8

from jaxcomp.arrays.blocks import wide_scale
from jaxcomp.arrays.elements import ELEMENTS, SmallFloat, Table, element_levels, levels
from jaxcomp.arrays.quantized import uniform_steps
from jaxcomp.kernels.arithmetic import magnitude_codes, quotient, widen
from jaxcomp.quantize.formats import AnyFormat, Format


def element_codes(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    zero_point: Shaped[Array, "..."] | None,
    format: AnyFormat,
    key: Array | None = None,
) -> tuple[UInt8[Array, "..."], Array]:
    """Codes of ``x``, and where no clipping was needed; scales broadcast against ``x`` as it is.

    To the nearest level, ties to even: to the even multiple of the step, for floats to the even
    mantissa. Ties go to the larger level where the levels have no zero or are powers of two (there
    the larger magnitude, but half of the smallest to zero), and to the even code in a table.

    Args:
        x: numbers, any floating dtype.
        scale: what the levels are multiplied by, positive.
        zero_point: codes of zero; None unless affine.
        format: what to quantize to.
        key: rounds stochastically, up with a probability that grows evenly from one level to the
            next, so that the mean is ``x`` inside the range (Gupta et al., 2015, section 3.1).
            None: to the nearest.

    Returns:
        Unsigned codes (a symmetric format with zero offsets them by ``2**(bits-1)``), and booleans:
        True inside the range, which ends half a step beyond the last levels, whatever the rounding
        (for floats half way to the number that would come next).
        What is beyond gets the last level, infinities too. NaN gets the code for it in float8, and
        any code in formats that have none.

    Example:
        >>> codes, inside = element_codes(
        ...     jnp.array([0.5, -9.0]), jnp.array(0.5), None, Format(4))
        >>> codes.tolist(), inside.tolist()
        ([9, 1], [True, False])
    """
    wide = wide_scale(scale)
    position = quotient(widen(x).astype(wide.dtype), wide)
    if not isinstance(format, Format):
        return _grid_codes(position, format.element, key)
    low, high = format.code_range
    if not format.zero:
        # The middle of the cell of code c is (2c + 1 - 2**bits) scales from zero.
        position = position * 0.5 + (0.0 if key is None else -0.5)
        low, high = -(1 << (format.bits - 1)), (1 << (format.bits - 1)) - 1
        nearest = jnp.floor(position if key is None else position + 0.5)
    else:
        nearest = jnp.round(position)
    rounded = nearest
    if key is not None:
        rounded = jnp.floor(position + jax.random.uniform(key, x.shape, position.dtype))
    if zero_point is not None:
        zero = zero_point.astype(position.dtype)
        rounded, nearest = rounded + zero, nearest + zero
    if key is None:
        nearest = rounded
    inside = (nearest >= low) & (nearest <= high)
    offset = 1 << (format.bits - 1) if format.symmetric else 0
    return (jnp.clip(rounded, low, high).astype(jnp.int32) + offset).astype(jnp.uint8), inside


def element_values(
    codes: UInt8[Array, "..."],
    scale: Float[Array, "..."],
    zero_point: Shaped[Array, "..."] | None,
    format: AnyFormat,
) -> Float[Array, "..."]:
    """What codes stand for, float32; scales broadcast against them as they are.

    Example:
        >>> element_values(jnp.array([9, 1], jnp.uint8), jnp.array(0.5), None, Format(4))
        Array([ 0.5, -3.5], dtype=float32)
    """
    wide = wide_scale(scale)
    if not isinstance(format, Format):
        return element_levels(codes, ELEMENTS[format.element]) * wide
    steps = uniform_steps(codes, zero_point, bits=format.bits, zero=format.zero)
    return steps.astype(wide.dtype) * wide


def _grid_codes(x: jax.Array, name: str, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    element = ELEMENTS[name]
    if isinstance(element, Table):
        return _table_codes(x, element, key)
    return _float_codes(x.astype(jnp.float32), element, key)


def _float_codes(
    x: jax.Array, element: SmallFloat, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    nearest = magnitude_codes(x, element)
    # NaN is not inside: past the top, or past the largest integer.
    inside = (nearest >= 0) & (nearest <= element.top)
    found = nearest
    if key is not None:
        found = magnitude_codes(x, element, jax.random.bits(key, x.shape, jnp.uint32))
    # NaN may have any sign by now.
    found = jnp.clip(found, 0, element.top)
    if element.nan is not None:
        found = jnp.where(jnp.isnan(x), element.nan, found)
    negative = jax.lax.bitcast_convert_type(x, jnp.int32) < 0
    found = found | (negative.astype(jnp.int32) << (element.bits - 1))
    return found.astype(jnp.uint8), inside


def _table_codes(
    x: jax.Array, element: Table, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    table = levels(element)
    # Half a step beyond the ends, as everywhere.
    low, high = 1.5 * table[0] - 0.5 * table[1], 1.5 * table[-1] - 0.5 * table[-2]
    inside = (x >= low) & (x <= high)
    found = jnp.zeros(x.shape, jnp.uint8)
    noise = None if key is None else jax.random.uniform(key, x.shape, x.dtype)
    for code in range(1, len(table)):
        below, above = float(table[code - 1]), float(table[code])
        if noise is not None:
            reached = (x - below) * (1 / (above - below)) > noise
        elif code % 2:
            reached = x > (below + above) / 2
        else:
            reached = x >= (below + above) / 2
        found = found + reached.astype(jnp.uint8)
    return found, inside
