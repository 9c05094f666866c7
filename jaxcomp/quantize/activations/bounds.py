"""Ranges of activations that are kept: found from values, and rounded into."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.kernels.arithmetic import widen
from jaxcomp.quantize.affine import fake_quant
from jaxcomp.quantize.formats import AnyFormat, Format, PerChannel, PerTensor
from jaxcomp.quantize.steps import scales_of


class Bounds(NamedTuple):
    """The range of one point: values outside are clipped.

    Attributes:
        low: float32, at most 0, of as many axes as the activation (size 1 where the range is
            shared); in front of them one axis for each loop over layers around the point.
        high: float32, at least 0, likewise.
    """

    low: Any
    high: Any


def bounds_shape(shape: tuple[int, ...], format: AnyFormat, name: str = "x") -> tuple[int, ...]:
    """The shape of the bounds of an activation.

    Args:
        shape: of the activation.
        format: of the point.
        name: of the point, for messages.

    Raises:
        ValueError: the format has groups or blocks, whose ranges are found anew in each call.

    Example:
        >>> bounds_shape((8, 4, 16), Format(8, granularity=PerChannel(1)))
        (1, 4, 1)
    """
    if not isinstance(format.granularity, PerTensor | PerChannel):
        raise ValueError(
            f"{name}: {format.granularity} has a range for every few values, which can only be "
            "found anew in each call: use PerTensor() for ranges that are kept"
        )
    reduced = format.reduced_axes(shape, name)
    return tuple(1 if i - len(shape) in reduced else size for i, size in enumerate(shape))


def is_symmetric(format: AnyFormat) -> bool:
    """Whether the range of a format is as wide below zero as above."""
    return not isinstance(format, Format) or format.symmetric


def bounds_of(x: Float[Array, "..."], format: AnyFormat) -> Bounds:
    """The bounds that hold all of ``x``, and zero.

    Args:
        x: activations.
        format: who shares a range, and whether it is symmetric.

    Example:
        >>> bounds_of(jnp.array([[-1.0, 3.0]]), Format(8, granularity=PerTensor()))
        Bounds(low=Array([[-3.]], dtype=float32), high=Array([[3.]], dtype=float32))
    """
    axes = format.reduced_axes(x.shape)
    wide = widen(jax.lax.stop_gradient(x))
    if is_symmetric(format):
        high = jnp.max(jnp.abs(wide), axes, keepdims=True)
        return Bounds(-high, high)
    low = jnp.minimum(jnp.min(wide, axes, keepdims=True), 0)
    return Bounds(low, jnp.maximum(jnp.max(wide, axes, keepdims=True), 0))


def fake_quant_within(
    x: Float[Array, " *dims"], bounds: Bounds, format: AnyFormat
) -> Float[Array, " *dims"]:
    """Fake quantization by bounds that are given; no gradient where ``x`` lies outside.

    Args:
        x: activations.
        bounds: of the shape of :func:`bounds_shape`.
        format: what to quantize to.

    Returns:
        The rounded and clipped values; NaN stays NaN.

    Example:
        >>> bounds = Bounds(jnp.array([0.0]), jnp.array([1.5]))
        >>> fake_quant_within(jnp.array([0.6, -1.0, 9.0]), bounds, Format(2, False, PerTensor()))
        Array([0.5, 0. , 1.5], dtype=float32)
    """
    low, high = map(jax.lax.stop_gradient, bounds)
    if is_symmetric(format):
        low, high = None, jnp.maximum(-low, high)
    scale, zero_point, tensor_scale = scales_of(low, high, format, x.dtype)
    assert tensor_scale is None, "formats of blocks have no bounds"
    rounded = fake_quant(x, format, scale, zero_point)
    # A code cannot hold NaN, and a network that diverges must not look as if it did not. Added, as
    # a choice between two would keep a mask of its own for the gradient.
    return rounded + jax.lax.stop_gradient(jnp.where(jnp.isnan(x), x, jnp.zeros_like(x)))
