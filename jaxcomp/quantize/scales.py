"""Scales of a leaf: found by the format's range, and spread over every element."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.arrays.blocks import merge_blocks, split_blocks, split_shape
from jaxcomp.kernels.arithmetic import widen
from jaxcomp.quantize.formats import AnyFormat, Format
from jaxcomp.quantize.ranges import AbsMax
from jaxcomp.quantize.search import search
from jaxcomp.quantize.steps import Scales, effective_scale, scales_of


def find_scales(x: Float[Array, "..."], format: AnyFormat) -> Scales:
    """Scales and zero points by the format's range.

    With :class:`AbsMax`, every value of ``x`` is within half a step of a level. Symmetric:
    ``scale = max|x| / (2**(bits-1) - 1)``. Affine: ``scale = (max(x, 0) - min(x, 0)) / (2**bits -
    1)``, and the zero point is rounded to a code (Jacob et al., 2018, section 3).

    Args:
        x: weights or activations, any floating dtype.
        format: what to quantize to.

    Returns:
        The scales; 1 for weights all zero, and NaN or infinite for weights that hold such values.
        What a range leaves out is clipped.

    Raises:
        ValueError: the format does not fit the shape of ``x``.

    Example:
        >>> find_scales(jnp.array([[-1.0], [3.5]]), Format(bits=4)).scale
        Array([[0.5]], dtype=float32)
    """
    axes = format.reduced_axes(x.shape)
    wide = split_blocks(widen(x), format.blocks(x.shape))
    if not isinstance(format, Format) or format.symmetric:
        low, high = None, jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    else:
        low = jnp.minimum(jnp.min(wide, axis=axes, keepdims=True), 0)
        high = jnp.maximum(jnp.max(wide, axis=axes, keepdims=True), 0)
    if isinstance(format.range, AbsMax):
        return scales_of(low, high, format, x.dtype)
    return search(wide, axes, low, high, format, x.dtype)


def spread_scales(scales: Scales, shape: tuple[int, ...], format: AnyFormat) -> Scales:
    """Scales for every element of a leaf, for solvers that walk it in another order.

    Args:
        scales: of the leaf.
        shape: of the leaf.
        format: what to quantize to.

    Returns:
        The scale in float32 with the tensor scale multiplied in, and the zero point as ``int32``,
        both of ``shape``; what :func:`element_codes` takes.

    Example:
        >>> from jaxcomp.quantize import PerGroup
        >>> format = Format(4, granularity=PerGroup(2))
        >>> scales = find_scales(jnp.array([[7.0], [0], [14], [0]]), format)
        >>> spread_scales(scales, (4, 1), format).scale.ravel()
        Array([1., 1., 2., 2.], dtype=float32)
    """
    blocks = format.blocks(shape)

    def spread(field: Array) -> Array:
        return merge_blocks(jnp.broadcast_to(field, split_shape(shape, blocks)), blocks)

    zero_point = scales.zero_point
    if zero_point is not None:
        zero_point = spread(zero_point.astype(jnp.int32))
    return Scales(spread(effective_scale(scales)), zero_point)
