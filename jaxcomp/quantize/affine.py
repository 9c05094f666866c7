"""Uniform quantization of one array: range, codes, and the straight-through estimator."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxcomp.arrays import QuantizedArray
from jaxcomp.arrays.bits import pack_bits
from jaxcomp.arrays.quantized import dequantize, merge_groups, split_groups
from jaxcomp.kernels.sharding import automatic
from jaxcomp.quantize.formats import Format
from jaxcomp.tree import check_weight

_TINY = float(jnp.finfo(jnp.float32).tiny)
_HUGE = float(jnp.finfo(jnp.float32).max)


def find_range(
    x: Float[Array, "..."], format: Format
) -> tuple[Float[Array, "..."], UInt8[Array, "..."] | None]:
    """Scale and zero point that cover every value of ``x``.

    Symmetric: ``scale = max|x| / (2**(bits-1) - 1)``. Affine: the range from ``min(x, 0)`` to
    ``max(x, 0)``, widened until zero falls on a code and both ends are still inside.

    Args:
        x: weights, any floating dtype.
        format: what to quantize to.

    Returns:
        Scale, float32, one axis per axis of ``x`` (size 1 where shared; with groups, one axis
        more), never zero; and the zero point as ``uint8`` codes of the same shape, None if
        symmetric.

    Raises:
        ValueError: the format does not fit the shape of ``x``.

    Example:
        >>> find_range(jnp.array([[-1.0], [3.5]]), Format(bits=4))
        (Array([[0.5]], dtype=float32), None)
    """
    axes = format.reduced_axes(x.shape)
    group = format.group(x.shape)
    wide = x.astype(jnp.float32) if group is None else split_groups(x.astype(jnp.float32), *group)
    if format.symmetric:
        steps = format.code_range[1]
        largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
        return _safe(largest * (1 / steps), steps), None
    steps = format.code_range[1]
    low = jnp.minimum(jnp.min(wide, axis=axes, keepdims=True), 0)
    high = jnp.maximum(jnp.max(wide, axis=axes, keepdims=True), 0)
    # Two products, not one difference: `high - low` may overflow.
    scale = _safe(high * (1 / steps) - low * (1 / steps), steps)
    zero_point = jnp.clip(jnp.round(-low / scale), 0, steps)
    below = -low / jnp.maximum(zero_point, 1)
    above = high / jnp.maximum(steps - zero_point, 1)
    scale = jnp.maximum(scale, jnp.where(zero_point > 0, below, 0))
    scale = jnp.maximum(scale, jnp.where(zero_point < steps, above, 0))
    return _safe(scale, steps), zero_point.astype(jnp.uint8)


def _safe(scale: jax.Array, steps: int) -> jax.Array:
    """A scale by which division and multiplication stay finite; 1 for weights that are all zero."""
    largest = _HUGE / steps * (1 - 2**-20)
    return jnp.where(scale == 0, 1.0, jnp.clip(scale, _TINY, largest)).astype(jnp.float32)


def find_codes(
    x: Float[Array, " *dims"],
    scale: Float[Array, "..."],
    zero_point: UInt8[Array, "..."] | None,
    format: Format,
) -> tuple[UInt8[Array, " *dims"], Array]:
    """Codes of ``x`` by rounding to the nearest (ties to even), and where no clipping was needed.

    Args:
        x: weights.
        scale: from :func:`find_range`, or chosen.
        zero_point: likewise; None if symmetric.
        format: what to quantize to.

    Returns:
        Unsigned codes in the shape of ``x`` (a symmetric format offsets them by
        ``2**(bits-1)``), and booleans of that shape: True inside the range.

    Example:
        >>> codes, inside = find_codes(jnp.array([0.5, -9.0]), jnp.array([0.5]), None, Format(4))
        >>> codes.tolist(), inside.tolist()
        ([9, 1], [True, False])
    """
    group = format.group(x.shape)
    wide = x.astype(scale.dtype) if group is None else split_groups(x.astype(scale.dtype), *group)
    low, high = format.code_range
    rounded = jnp.round(wide / scale)
    if zero_point is not None:
        rounded = rounded + zero_point.astype(rounded.dtype)
    inside = (rounded >= low) & (rounded <= high)
    offset = 1 << (format.bits - 1) if format.symmetric else 0
    codes = (jnp.clip(rounded, low, high).astype(jnp.int32) + offset).astype(jnp.uint8)
    if group is not None:
        codes, inside = merge_groups(codes, group[1]), merge_groups(inside, group[1])
    return codes, inside


def encode(x: Float[Array, "..."], format: Format) -> QuantizedArray:
    """Quantize an array and pack its codes.

    Args:
        x: weights, at least one axis; float16, bfloat16 or float32.
        format: bits, symmetry and granularity.

    Returns:
        A leaf whose every value is within half a step of ``x`` (Jacob et al., 2018, section 2.1).

    Raises:
        ValueError: NaN or infinite values, no elements, or a format that does not fit the shape.

    Example:
        >>> encode(jnp.array([[-1.0, 0.2], [0.6, 7.0]]), Format(bits=4)).decode()
        Array([[-1.       ,  0.       ],
               [ 0.5714286,  7.       ]], dtype=float32)
    """
    check_weight("x", x)
    scale, zero_point = find_range(x, format)
    codes, _ = find_codes(x, scale, zero_point, format)
    return QuantizedArray(
        codes=pack_bits(codes, format.bits),
        scale=scale,
        zero_point=zero_point,
        bits=format.bits,
        length=x.shape[-1],
        group=format.group(x.shape),
        dense_dtype=jnp.dtype(x.dtype),
    )


def fake_quant(
    x: Float[Array, " *dims"],
    format: Format,
    scale: Float[Array, "..."] | None = None,
    zero_point: UInt8[Array, "..."] | None = None,
) -> Float[Array, " *dims"]:
    """What quantizing does to the values, with a gradient that training can use.

    The straight-through estimator (Bengio et al., 2013, section 4): the gradient passes unchanged
    where ``x`` is inside the range and is zero where it is clipped.

    Args:
        x: weights or activations, at least one axis.
        format: bits, symmetry and granularity.
        scale: step sizes to use instead of those that cover all of ``x``; broadcastable to ``x``
            (to split groups where the format has them). No gradient goes to them.
        zero_point: codes of zero for ``scale``; needed exactly when the format is affine.

    Returns:
        ``encode(x, format).decode()``, bit for bit, where no ``scale`` is given.

    Raises:
        ValueError: the format does not fit, or scale and zero point do not fit the format.

    Example:
        >>> x = jnp.array([0.4, 9.0])
        >>> jax.grad(lambda x: fake_quant(x, Format(4), jnp.array([0.5])).sum())(x)
        Array([1., 0.], dtype=float32)
    """
    if scale is None and zero_point is not None:
        raise ValueError("zero_point was given without scale: give both or neither")
    if scale is not None and (zero_point is None) != format.symmetric:
        wanted = "no zero_point" if format.symmetric else "a zero_point"
        raise ValueError(f"{format} takes {wanted} beside scale")
    format.reduced_axes(x.shape)
    run = automatic(
        lambda x, *given: _fake_quant(x, format, *given),
        out=getattr(getattr(jax.typeof(x), "sharding", None), "spec", None),
    )
    return run(x) if scale is None else run(x, scale, zero_point)


def _fake_quant(
    x: jax.Array,
    format: Format,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
) -> jax.Array:
    stopped = jax.lax.stop_gradient(x)
    if scale is None:
        scale, zero_point = find_range(stopped, format)
    codes, inside = find_codes(stopped, scale, zero_point, format)
    values = dequantize(
        codes,
        jax.lax.stop_gradient(scale),
        zero_point,
        bits=format.bits,
        group=format.group(x.shape),
        dtype=x.dtype,
    )
    return _straight_through(x, values, inside)


@jax.custom_jvp
def _straight_through(x: jax.Array, values: jax.Array, inside: jax.Array) -> jax.Array:
    """``values``, with the derivative of ``x`` where ``inside``."""
    del x, inside
    return values


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    _, values, inside = primals
    return values, jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0]))
