"""From the ends of a range to scales, rounded to the dtype that stores them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.arrays.blocks import wide_scale
from jaxcomp.arrays.elements import ELEMENTS, largest
from jaxcomp.kernels.arithmetic import TINY, bounded_scale, quotient
from jaxcomp.quantize.formats import AnyFormat, GridFormat


class Scales(NamedTuple):
    """What turns codes into values, besides the format.

    Attributes:
        scale: step sizes in the format's ``scale_dtype``, one axis per axis of the leaf (size 1
            where shared), and one more behind each axis that is cut into blocks; never zero.
        zero_point: ``uint8`` codes of zero, shaped like ``scale``; None unless affine.
        tensor_scale: float32, one number with as many axes as ``scale``; None without.
    """

    scale: Any
    zero_point: Any = None
    tensor_scale: Any = None


def scales_of(
    low: Float[Array, "..."] | None,
    high: Float[Array, "..."],
    format: AnyFormat,
    dtype: Any,
    tensor_scale: Array | None = None,
) -> Scales:
    """Scales of a format whose range is from ``low`` to ``high``.

    Args:
        low: at most 0, of one number a unit; None for a range symmetric around zero.
        high: at least 0, likewise.
        format: what to quantize to.
        dtype: of the weights, in which the levels must be finite.
        tensor_scale: to keep, of a format that has one; None: found.

    Example:
        >>> from jaxcomp.quantize.formats import Format
        >>> scales_of(None, jnp.array([[12.0]]), Format(4, scale_dtype="float8_e8m0fnu"), "float32")
        Scales(scale=Array([[2]], dtype=float8_e8m0fnu), zero_point=None, tensor_scale=None)
    """
    if isinstance(format, GridFormat):
        return _grid_scales(high, format, dtype, tensor_scale)
    steps = format.code_range[1]
    if low is None:
        return Scales(stored(bounded_scale(high * (1 / steps), steps, dtype), format.scale_dtype))
    # Halves: their difference cannot overflow, nor change when it is compiled to a fused
    # multiply-add, so that the scale is the same to the bit inside and outside `jit`.
    scale = (high * 0.5 - low * 0.5) * (2 / steps)
    zero_point = jnp.round(quotient(-low, bounded_scale(scale, 1, dtype)))
    scale = bounded_scale(scale, jnp.maximum(zero_point, steps - zero_point), dtype)
    scale = stored(scale, format.scale_dtype)
    zero_point = jnp.clip(jnp.round(quotient(-low, wide_scale(scale))), 0, steps)
    return Scales(scale, zero_point.astype(jnp.uint8))


# Times the least scale in float8_e4m3fn it is TINY.
_LEAST_TENSOR_SCALE = TINY * 2.0**9

# Positive floats by mantissa bits, smallest normal exponent and largest value.
_STORED = {
    "bfloat16": (7, -126, 3.3895313892515355e38),
    "float16": (10, -14, 65504.0),
    "float8_e4m3fn": (3, -6, 448.0),
    "float8_e8m0fnu": (0, -126, 2.0**127),
}


def stored(scale: Float[Array, "..."], dtype: str, *, nearest: bool = False) -> Array:
    """Positive scales in the dtype that stores them: rounded up, or to the nearest.

    The rounding is arithmetic on float32, after which the cast is exact: XLA would leave a cast to
    a narrow dtype and back out, for excess precision. What is not finite becomes NaN.

    Example:
        >>> stored(jnp.array([3.0]), "float8_e8m0fnu")
        Array([4], dtype=float8_e8m0fnu)
    """
    if dtype == "float32":
        return scale
    size, exponent, top = _STORED[dtype]
    drop = 23 - size
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    steps = scale * 2.0 ** min(size - exponent, 126)
    if nearest:
        added, small = (1 << (drop - 1)) - 1 + ((bits >> drop) & 1), jnp.round(steps)
    else:
        added, small = (1 << drop) - 1, jnp.ceil(steps)
    normal = jax.lax.bitcast_convert_type(((bits + added) >> drop) << drop, jnp.float32)
    small = jnp.maximum(small, 1) * 2.0 ** -min(size - exponent, 126)
    rounded = jnp.minimum(jnp.where(scale < 2.0**exponent, small, normal), top)
    return jnp.where(jnp.isfinite(scale), rounded, jnp.nan).astype(dtype)


def _grid_scales(
    high: jax.Array, format: GridFormat, dtype: Any, whole: jax.Array | None
) -> Scales:
    """Scales by which ``high`` becomes the largest level, or what the standards say."""
    element = ELEMENTS[format.element]
    top = largest(element)
    if format.is_microscaling:
        # OCP Microscaling Formats (MX) specification 1.0, section 6.3: it may clip.
        power = _power_below(high) * 2.0 ** (1 - math.frexp(top)[1])
        power = jnp.where(high == 0, 1.0, jnp.maximum(power, 2.0**-126))
        return Scales(stored(power, format.scale_dtype))
    finite = float(jnp.finfo(dtype).max) * (1 - 2**-20)
    high = jnp.minimum(high, finite) + 0 * high
    if not format.tensor_scale:
        scale = jnp.where(high == 0, 1.0, jnp.maximum(high * (1 / top), TINY))
        return Scales(stored(scale, format.scale_dtype))
    # So that the largest of the blocks gets the largest scale.
    if whole is None:
        whole = jnp.max(high, keepdims=True) * (1 / (top * _STORED[format.scale_dtype][2]))
        whole = jnp.where(whole == 0, 1.0, jnp.maximum(whole, _LEAST_TENSOR_SCALE))
    scale = jnp.where(high == 0, 1.0, quotient(high * (1 / top), whole))
    return Scales(stored(scale, format.scale_dtype, nearest=True), None, whole)


def _power_below(x: jax.Array) -> jax.Array:
    """The largest power of two that is at most ``x``; infinite or NaN where ``x`` is."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type((bits >> 23) << 23, jnp.float32) + 0 * x


def effective_scale(scales: Scales) -> Array:
    """The steps that values are multiples of: the scale in float32, times the tensor scale.

    Example:
        >>> effective_scale(Scales(jnp.ones(2, jnp.float8_e4m3fn), None, jnp.array([0.5])))
        Array([0.5, 0.5], dtype=float32)
    """
    scale = wide_scale(scales.scale)
    return scale if scales.tensor_scale is None else scale * scales.tensor_scale
