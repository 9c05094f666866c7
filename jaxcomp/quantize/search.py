"""Ranges that are searched for: by percentile, error or entropy, for each unit on its own."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.quantize.entropy import least_divergence
from jaxcomp.quantize.fitted import half_quadratic, mean_square
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.ranges import Entropy, HalfQuadratic, MeanSquare, Percentile
from jaxcomp.quantize.steps import Scales, scales_of


def search(
    x: Float[Array, "..."],
    axes: tuple[int, ...],
    low: Float[Array, "..."] | None,
    high: Float[Array, "..."],
    format: AnyFormat,
    dtype: Any,
) -> Scales:
    """Scales by the format's range, which is not :class:`AbsMax`.

    Args:
        x: float32, blocks split off.
        axes: over which a scale is shared.
        low: the smallest value of each unit, at most 0; None if symmetric.
        high: the largest value, or magnitude if symmetric.
        format: what to quantize to.
        dtype: of the weights.

    Returns:
        The scales; NaN where ``low`` or ``high`` are not finite.

    Example:
        >>> from jaxcomp.quantize.formats import Format
        >>> x = jnp.array([[0.0], [0.5], [1.0], [50.0]])
        >>> format = Format(8, range=Percentile(75))
        >>> search(x, (0,), None, jnp.array([[50.0]]), format, x.dtype).scale * 127
        Array([[1.]], dtype=float32)
    """
    match format.range:
        case Percentile(percent):
            scales = _percentile(x, axes, low, percent, format, dtype)
        case MeanSquare():
            scales = mean_square(x, axes, low, high, format, dtype)
        case HalfQuadratic():
            scales = half_quadratic(x, axes, low, high, format, dtype)
        case Entropy():
            scales = least_divergence(x, axes, low, high, format, dtype)
        case other:
            raise TypeError(f"{other!r} is no range that is searched for")
    known = jnp.isfinite(high) & (True if low is None else jnp.isfinite(low))
    scale = jnp.where(known, scales.scale.astype(jnp.float32), jnp.nan)
    return scales._replace(scale=scale.astype(scales.scale.dtype))


def _percentile(
    x: jax.Array,
    axes: tuple[int, ...],
    low: jax.Array | None,
    percent: float,
    format: AnyFormat,
    dtype: Any,
) -> Scales:
    if low is None:
        return scales_of(None, rank(jnp.abs(x), axes, percent), format, dtype)
    # As many are lost at the lower end as at the upper one.
    each = 50 + percent / 2
    down, up = rank(jnp.maximum(-x, 0), axes, each), rank(jnp.maximum(x, 0), axes, each)
    return scales_of(-down, up, format, dtype)


def rank(x: Float[Array, "..."], axes: tuple[int, ...], percent: float) -> Float[Array, "..."]:
    """The smallest number that ``percent`` of the numbers do not exceed, without sorting.

    Args:
        x: at least zero, float32.
        axes: to reduce.
        percent: of the numbers, above 0 and at most 100.

    Returns:
        One of the numbers, with the reduced axes of size 1.

    Example:
        >>> rank(jnp.arange(10.0), (0,), 90)
        Array([8.], dtype=float32)
    """
    # A float that is not negative orders like its bits; halved 31 times, one number is left.
    keys = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    size = math.prod(x.shape[axis] for axis in axes)
    wanted = math.ceil(percent / 100 * size - 1e-9 * size)

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        below, reached = bounds
        middle = below + (reached - below) // 2
        count = jnp.sum((keys <= middle).astype(jnp.int32), axis=axes, keepdims=True)
        return (
            jnp.where(count >= wanted, below, middle),
            jnp.where(count >= wanted, middle, reached),
        )

    reached = jnp.max(keys, axis=axes, keepdims=True)
    bounds = (jnp.full_like(reached, -1), reached)
    _, found = jax.lax.fori_loop(0, 32, halve, bounds)
    return jax.lax.bitcast_convert_type(found, jnp.float32)
