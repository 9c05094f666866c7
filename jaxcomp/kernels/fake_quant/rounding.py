"""Rounding to evenly spaced levels, from plain numbers: scales, codes and values.

The numbers are those of :mod:`jaxcomp.quantize`, to the bit; kernels are below it and cannot ask.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt8

from jaxcomp.arrays.blocks import Blocks, merge_blocks, split_blocks, wide_scale
from jaxcomp.arrays.quantized import dequantize
from jaxcomp.kernels.arithmetic import LARGE, bounded_scale, inverse_scale, quotient, widen


class Rounding(NamedTuple):
    """What levels an array is rounded to, and who shares a scale; static.

    Attributes:
        bits: of a code, 1 to 8.
        symmetric: levels around zero, from ``-(2**(bits-1) - 1)`` to ``2**(bits-1) - 1`` steps;
            otherwise ``2**bits`` of them, with an integer zero point.
        axis: a scale for each index of this axis, or of these axes; None: one for the array.
        blocks: ``(size, negative axis)`` of each axis that is cut into blocks that share a scale,
            in the order of the axes; ``axis`` is not looked at then. ``((32, -2),)`` are groups of
            32 inputs.
        zero: whether zero is a level; without it the levels are the odd multiples of the scale.
    """

    bits: int = 8
    symmetric: bool = True
    axis: int | tuple[int, ...] | None = -1
    blocks: Blocks = ()
    zero: bool = True

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code; of a symmetric one with zero, in steps from zero."""
        if self.symmetric and self.zero:
            return 1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1


def check_rounding(name: str, rounding: Any, shape: tuple[int, ...]) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless an array of a shape can be rounded so.

    Example:
        >>> check_rounding("w", Rounding(9), (2, 3))
        Traceback (most recent call last):
        ...
        ValueError: w: bits must be 1 to 8, not 9
    """
    if not isinstance(rounding, Rounding):
        raise TypeError(
            f"{name}: rounding must be a Rounding, such as Rounding(4), not {rounding!r}"
        )
    bits, symmetric, _, blocks, zero = rounding
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"{name}: bits must be 1 to 8, not {bits!r}")
    if not symmetric and not zero:
        raise ValueError(f"{name}: zero=False needs symmetric=True")
    if symmetric and zero and bits == 1:
        raise ValueError(f"{name}: 1 bit around zero has no level but zero: take zero=False")
    pairs = isinstance(blocks, tuple) and all(_whole(pair) and len(pair) == 2 for pair in blocks)
    if not pairs:
        raise TypeError(
            f"{name}: blocks must be pairs (size, negative axis), such as ((32, -2),), not {blocks}"
        )
    if not (rounding.axis is None or _whole(_axes(rounding))):
        raise TypeError(f"{name}: axis must be an int, ints or None, not {rounding.axis!r}")
    for size, axis in blocks:
        if not -len(shape) <= axis < 0 or size < 1 or shape[axis] % size:
            raise ValueError(f"{name}: blocks of {size} do not divide axis {axis} of {shape}")
    wrong = [axis for axis in _axes(rounding) if not -len(shape) <= axis < len(shape)]
    if wrong and not blocks:
        raise ValueError(f"{name}: shape {shape} has no axis {wrong[0]}")


def find_scale(
    x: Float[Array, "..."], rounding: Rounding
) -> tuple[Float[Array, "..."], UInt8[Array, "..."] | None]:
    """The scale whose range holds all of ``x``, and the codes of zero.

    Args:
        x: any floating dtype.
        rounding: to what.

    Returns:
        The scale in float32, an axis for each of ``x`` (and one more behind each that is cut into
        blocks), size 1 where shared; and zero points of its shape, None if symmetric. 1 for zeros
        only; NaN or infinite for such numbers.

    Example:
        >>> find_scale(jnp.array([[-1.0], [3.5]]), Rounding(4))
        (Array([[0.5]], dtype=float32), None)

    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-
    Only Inference", 2018, section 3.
    """
    steps, shared = rounding.code_range[1], _shared(rounding, x.ndim)
    split = split_blocks(x, rounding.blocks)
    # The largest, widened, is the largest of what is widened. No magnitudes: some compilers would
    # write them to memory before they look for the largest in a block.
    low, high = (
        widen(end(split, axis=shared, keepdims=True, initial=0 if not x.size else None))
        for end in (jnp.min, jnp.max)
    )
    # The ends that a CPU's compiler finds pass a NaN by; elsewhere a NaN is their minimum.
    missed = lambda split, low: jnp.where(jnp.isnan(split).any(shared, keepdims=True), jnp.nan, low)
    low = lax.platform_dependent(split, low, cpu=missed, default=lambda _, low: low)
    if rounding.symmetric:
        return bounded_scale(jnp.maximum(high, -low) * (1 / steps), steps, x.dtype), None
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    # Halves: their difference cannot overflow, nor change when it becomes a fused multiply-add.
    scale = (high * 0.5 - low * 0.5) * (2 / steps)
    zero_point = jnp.round(quotient(-low, bounded_scale(scale, 1, x.dtype)))
    scale = bounded_scale(scale, jnp.maximum(zero_point, steps - zero_point), x.dtype)
    zero_point = jnp.clip(jnp.round(quotient(-low, scale)), 0, steps)
    return scale, zero_point.astype(jnp.uint8)


def find_codes(
    x: Float[Array, "..."],
    scale: Shaped[Array, "..."],
    zero_point: Shaped[Array, "..."] | None,
    rounding: Rounding,
) -> tuple[UInt8[Array, "..."], Array]:
    """Codes of the nearest levels, ties to even, and where nothing was clipped.

    Args:
        x: any floating dtype.
        scale: positive, broadcastable to ``x`` (once it is cut into blocks); where it is 0, codes
            mean nothing, and nothing is clipped.
        zero_point: codes of zero; None if symmetric.
        rounding: to what.

    Returns:
        Unsigned codes, of a symmetric rounding offset by ``2**(bits-1)``; and booleans.

    Example:
        >>> codes, inside = find_codes(
        ...     jnp.array([0.5, -9.0]), jnp.array(0.5), None, Rounding(4, axis=None))
        >>> codes.tolist(), inside.tolist()
        ([9, 1], [True, False])
    """
    wide = wide_scale(scale)
    split = widen(split_blocks(x, rounding.blocks)).astype(wide.dtype)
    nearest = nearest_code(quotient(split, wide), zero_point, rounding, jnp.round)
    low, high = _limits(rounding)
    inside = (nearest >= low) & (nearest <= high) | (wide == 0)
    offset = 1 << (rounding.bits - 1) if rounding.symmetric else 0
    codes = (jnp.clip(nearest, low, high).astype(jnp.int32) + offset).astype(jnp.uint8)
    return merge_blocks(codes, rounding.blocks), merge_blocks(inside, rounding.blocks)


def values_of(
    codes: UInt8[Array, "..."],
    scale: Shaped[Array, "..."],
    zero_point: Shaped[Array, "..."] | None,
    rounding: Rounding,
    dtype: Any,
) -> Float[Array, "..."]:
    """What codes stand for, rounded once to a dtype.

    Example:
        >>> values_of(jnp.array([9, 1], jnp.uint8), jnp.array(0.5), None, Rounding(4), jnp.float32)
        Array([ 0.5, -3.5], dtype=float32)
    """
    bits, blocks, zero = rounding.bits, rounding.blocks, rounding.zero
    return dequantize(codes, scale, zero_point, bits=bits, blocks=blocks, dtype=dtype, zero=zero)


def nearest_code(position: Any, zero_point: Any, rounding: Rounding, to_even: Any) -> Any:
    """The nearest code as a float, not yet clipped; for use in kernels, too.

    Args:
        position: ``x / scale``.
        zero_point: codes of zero; None if symmetric.
        rounding: to what.
        to_even: rounds to the nearest integer.

    Example:
        >>> nearest_code(jnp.array([2.5]), None, Rounding(), jnp.round)
        Array([2.], dtype=float32)
    """
    if not rounding.zero:
        # The middle of the cell of code c is (2c + 1 - 2**bits) scales from zero.
        return jnp.floor(position * 0.5)
    nearest = to_even(position)
    return nearest if zero_point is None else nearest + zero_point.astype(nearest.dtype)


def nearest_values(
    x: Any, scale: Any, inverse: Any, zero_point: Any, rounding: Rounding, to_even: Any
) -> Any:
    """Rounded values in float32; for use in kernels: no integers, and nothing is divided.

    Args:
        x: float32.
        scale: float32; 0 where nothing is rounded.
        inverse: from :func:`jaxcomp.kernels.arithmetic.inverse_scale`.
        zero_point: float32; None if symmetric.
        rounding: to what.
        to_even: rounds to the nearest integer.

    Example:
        >>> scale = jnp.array([0.5])
        >>> nearest_values(
        ...     jnp.array([0.6]), scale, inverse_scale(scale), None, Rounding(4), jnp.round)
        Array([0.5], dtype=float32)
    """
    part = jnp.where(scale > LARGE, 0.25, 1.0)
    low, high = _limits(rounding)
    nearest = nearest_code(x * part * inverse, zero_point, rounding, to_even)
    code = jnp.minimum(jnp.maximum(nearest, low), high)
    if zero_point is not None:
        code = code - zero_point
    return jnp.where(scale == 0, x, (code if rounding.zero else 2 * code + 1) * scale)


def nearest_of(
    x: Float[Array, "..."],
    scale: Shaped[Array, "..."],
    zero_point: Shaped[Array, "..."] | None,
    rounding: Rounding,
    dtype: Any,
) -> Float[Array, "..."]:
    """Rounded values, in a dtype; what is NaN, or has a scale of 0, stays as it is.

    Example:
        >>> x, scale = jnp.array([0.6, -9.0, jnp.nan, 0.6]), jnp.array([0.5, 0.5, 0.5, 0.0])
        >>> nearest_of(x, scale, None, Rounding(4), jnp.float32)
        Array([ 0.5, -3.5,  nan,  0.6], dtype=float32)
    """
    codes, _ = find_codes(x, scale, zero_point, rounding)
    found = values_of(codes, scale, zero_point, rounding, dtype)
    split = split_blocks(x, rounding.blocks)
    kept = merge_blocks(jnp.isnan(split) | (scale == 0), rounding.blocks)
    return jnp.where(kept, x.astype(dtype), found)


def group_size(rounding: Rounding, w: Any) -> int:
    """Inputs of a matrix that share their scales; for kernels.

    Example:
        >>> group_size(Rounding(blocks=((32, -2),)), jnp.ones((64, 8)))
        32
    """
    return rounding.blocks[0][0] if rounding.blocks else w.shape[0]


def group_scales(
    rounding: Rounding,
    w: Float[Array, "inputs outputs"],
    scale: Shaped[Array, "..."],
    zero_point: Shaped[Array, "..."] | None = None,
) -> tuple[tuple[jax.Array, ...], bool]:
    """Scales as kernels take them: a row for each group of inputs, a column for each output.

    Args:
        rounding: of the matrix.
        w: the matrix.
        scale: ``(1, 1 or outputs)``, or ``(1 or groups, 1, 1 or outputs)``.
        zero_point: of the same shape; None if symmetric.

    Returns:
        Scales, their inverses and zero points, if any, ``(groups, outputs)`` in float32; and
        whether values are limited to the dtype of the matrix, as scales of 16 bits and fewer were
        rounded.

    Example:
        >>> scales, _ = group_scales(Rounding(), jnp.ones((64, 8)), jnp.ones((1, 1)))
        >>> [each.shape for each in scales]
        [(1, 8), (1, 8)]
    """
    shape = (w.shape[0] // group_size(rounding, w), w.shape[1])
    row = lambda a: jnp.broadcast_to(a.reshape(a.shape[0], -1), shape)
    wide = row(wide_scale(scale))
    zeros = () if zero_point is None else (row(zero_point).astype(jnp.float32),)
    return (wide, inverse_scale(wide), *zeros), jnp.finfo(scale.dtype).bits < 32


def why_not_grouped(rounding: Rounding, scale: Any) -> str | None:
    """Why scales are not of groups of inputs as kernels take them, or None.

    Example:
        >>> why_not_grouped(Rounding(blocks=((48, -2),)), jnp.ones((2, 1, 8)))
        'groups of 48 inputs are no power of two from 16 on'
    """
    if jnp.finfo(scale.dtype).bits > 32:
        return f"scales are {scale.dtype}"
    if not rounding.blocks:
        return "each input has a scale of its own" if scale.shape[0] > 1 else None
    (size, axis), *others = rounding.blocks
    if others or axis != -2:
        return f"blocks {rounding.blocks} are not groups of inputs, ((size, -2),)"
    if size < 16 or size & (size - 1):
        return f"groups of {size} inputs are no power of two from 16 on"
    return None


def _limits(rounding: Rounding) -> tuple[int, int]:
    if rounding.zero:
        return rounding.code_range
    return -(1 << (rounding.bits - 1)), (1 << (rounding.bits - 1)) - 1


def _axes(rounding: Rounding) -> tuple[int, ...]:
    axis = rounding.axis
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, tuple) and all(isinstance(each, int) for each in numbers)


def _shared(rounding: Rounding, ndim: int) -> tuple[int, ...]:
    """Axes (negative) over which a scale is shared, after blocks have been split off."""
    if rounding.blocks:
        # The members lie right behind their axis, and each later split moves them by one.
        later = range(len(rounding.blocks) - 1, -1, -1)
        return tuple(axis - n for (_, axis), n in zip(rounding.blocks, later, strict=True))
    kept = {axis % ndim for axis in _axes(rounding)}
    return tuple(axis - ndim for axis in range(ndim) if axis not in kept)
