"""The range that loses the least information, by histograms of the values and of the levels."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.ranges import Entropy
from jaxcomp.quantize.rounding import element_codes
from jaxcomp.quantize.steps import Scales, effective_scale, scales_of

# Histograms of this many bins in all are made at once.
_BINS_AT_ONCE = 1 << 20


def least_divergence(
    x: Float[Array, "..."],
    axes: tuple[int, ...],
    low: Float[Array, "..."] | None,
    high: Float[Array, "..."],
    format: AnyFormat,
    dtype: Any,
) -> Scales:
    """Scales of the least divergence, as :class:`Entropy` says.

    Args:
        x: float32, blocks split off.
        axes: over which a scale is shared, negative.
        low: the smallest value of each unit, at most 0; None if symmetric.
        high: the largest value, or magnitude if symmetric.
        format: what to quantize to; its range is an :class:`Entropy`.
        dtype: of the weights.

    Returns:
        The scales; units are looked at a few at a time, in bounded memory.

    Example:
        >>> from jaxcomp.quantize.formats import Format
        >>> x = jnp.linspace(-1, 1, 4096)[:, None]
        >>> format = Format(4, range=Entropy(256))
        >>> least_divergence(x, (-2,), None, jnp.ones((1, 1)), format, x.dtype).scale.shape
        (1, 1)
    """
    settings = format.range
    assert isinstance(settings, Entropy)
    kept = [axis for axis in range(-x.ndim, 0) if axis not in axes]
    order = [axis % x.ndim for axis in (*kept, *axes)]
    units = math.prod(x.shape[axis] for axis in kept)
    rows = jnp.transpose(x if low is not None else jnp.abs(x), order).reshape(units, -1)
    bottom = jnp.zeros(units) if low is None else low.reshape(units)

    def shrink(unit: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return _best_part(*unit, format, low is not None)

    at_once = max(1, _BINS_AT_ONCE // settings.bins)
    part = jax.lax.map(shrink, (rows, bottom, high.reshape(units)), batch_size=at_once)
    part = part.reshape(high.shape)
    return scales_of(None if low is None else low * part, high * part, format, dtype)


def _best_part(
    row: jax.Array, low: jax.Array, high: jax.Array, format: AnyFormat, affine: bool
) -> jax.Array:
    """The part of the range of one unit by which the divergence is least."""
    settings = format.range
    assert isinstance(settings, Entropy)
    bins, count = settings.bins, settings.candidates
    # In parts of the range, which has a length of 1 then.
    length = jnp.where(high * 0.5 - low * 0.5 > 0, high * 0.5 - low * 0.5, 1.0)
    places = (row * 0.5 - low * 0.5) / length
    index = jnp.clip((places * bins).astype(jnp.int32), 0, bins - 1)
    histogram = jnp.zeros(bins).at[index].add(1.0)
    first, last = low * 0.5 / length, high * 0.5 / length
    centres = (jnp.arange(bins) + 0.5) / bins + first
    least = min(1.0, 2 ** (format.bits if affine else format.bits - 1) / bins)

    def divergence(part: jax.Array) -> jax.Array:
        inside = (centres >= first * part) & (centres <= last * part)
        ends = (first * part)[None] if affine else None
        scales = scales_of(ends, (last * part)[None], format, jnp.float32)
        zero_point = scales.zero_point
        codes, _ = element_codes(centres, effective_scale(scales), zero_point, format)
        codes = codes.astype(jnp.int32)
        seen = jnp.where(inside, histogram, 0)
        filled = (seen > 0).astype(jnp.float32)
        sums = jnp.zeros((2, 1 << format.bits)).at[:, codes].add(jnp.stack([seen, filled]))
        spread = filled * (sums[0] / jnp.maximum(sums[1], 1))[codes]
        # What is clipped lies in the last bins.
        kept = jnp.where(inside, jnp.arange(bins), bins)
        bottom = jnp.minimum(jnp.min(kept), bins - 1)
        top = jnp.max(jnp.where(inside, jnp.arange(bins), 0))
        below = jnp.sum(jnp.where(centres < first * part, histogram, 0))
        above = jnp.sum(jnp.where(centres > last * part, histogram, 0))
        clipped = seen.at[bottom].add(below).at[top].add(above)
        p = clipped / jnp.sum(clipped)
        q = spread / jnp.maximum(jnp.sum(spread), 1)
        return jnp.sum(jnp.where(p > 0, p * jnp.log(p / jnp.maximum(q, 1e-9)), 0))

    def trial(i: Any, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        part = 1 - (1 - least) * i / (count - 1)
        found = divergence(part)
        better = found < best[0]
        return jnp.where(better, found, best[0]), jnp.where(better, part, best[1])

    return jax.lax.fori_loop(0, count, trial, (jnp.asarray(jnp.inf), jnp.ones(())))[1]
