"""Ranges fitted to the weights: the least mean square error, and the least sum of a lower norm."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.quantize.formats import AnyFormat, Format
from jaxcomp.quantize.ranges import HalfQuadratic, MeanSquare
from jaxcomp.quantize.rounding import element_codes, element_values
from jaxcomp.quantize.steps import Scales, effective_scale, scales_of, stored

# The least that a range is shrunk to: ternary weights keep a quarter of a normal range.
_SHRUNK = 1 / 64
_REFITS = 4

Loss = Callable[[jax.Array], jax.Array]


def mean_square(
    x: Float[Array, "..."],
    axes: tuple[int, ...],
    low: Float[Array, "..."] | None,
    high: Float[Array, "..."],
    format: AnyFormat,
    dtype: Any,
) -> Scales:
    """Scales of the least mean square error, as :class:`MeanSquare` says.

    Args:
        x: float32, blocks split off.
        axes: over which a scale is shared.
        low: the smallest value of each unit, at most 0; None if symmetric.
        high: the largest value, or magnitude if symmetric.
        format: what to quantize to; its range is a :class:`MeanSquare`.
        dtype: of the weights.

    Returns:
        The scales, by which the error is never larger than by those that hold every value.

    Example:
        >>> x = jnp.array([[1.0], [2.0], [6.0]])
        >>> format = Format(1, zero=False, range=MeanSquare())
        >>> mean_square(x, (0,), None, jnp.array([[6.0]]), format, x.dtype).scale
        Array([[3.]], dtype=float32)
    """
    assert isinstance(format.range, MeanSquare)
    held = best = scales_of(low, high, format, dtype)
    wide = _Units(x, axes, high if low is None else jnp.maximum(high, -low), format, jnp.square)
    first = wide.error(best)
    if isinstance(format, Format) and format.symmetric and format.bits == 1 + format.zero:
        exact = (_least_ternary if format.zero else _mean)(jnp.abs(x * wide.down), axes)
        return wide.better((first, best), wide.rescaled(best, exact * wide.up))[1]
    count = format.range.candidates
    # MX rounds its powers down: one more holds every value.
    top = 2.0 if not isinstance(format, Format) and format.is_microscaling else 1.0
    ratio = (_SHRUNK / top) ** (1 / (count - 1))
    ends = [1.0] if low is None else [1.0, 1.0]
    shrink = jnp.ones((len(ends), *high.shape), jnp.float32)

    def at(shrink: jax.Array) -> Scales:
        lower = None if low is None else low * shrink[-1]
        return scales_of(lower, high * shrink[0], format, dtype, held.tensor_scale)

    def trial(factors: jax.Array, state: Any) -> Any:
        """Each unit keeps what is best for it."""
        (error, best, shrunk), tried = state, at(factors)
        new = wide.error(tried)
        better = new < error
        kept = _choose(better, tried, best)
        return jnp.minimum(new, error), kept, jnp.where(better, factors, shrunk)

    state = (first, best, shrink)
    state = jax.lax.fori_loop(0, count, lambda i, s: trial(shrink * top * ratio**i, s), state)
    # Between the neighbours of the best: both ends together, then each end on its own.
    for moved in [[1, 1], [1, 0], [0, 1]][: 1 if low is None else 3]:
        start, width = state[2], jnp.asarray(moved[: len(ends)], jnp.float32)
        width = width.reshape(-1, *(1,) * high.ndim)

        def fine(i: Any, s: Any, start: jax.Array = start, width: jax.Array = width) -> Any:
            power = (2 * i / (count - 1) - 1) * width
            return trial(jnp.minimum(start * ratio**power, top), s)

        state = jax.lax.fori_loop(0, count, fine, state)
    pair = (state[0], state[1])
    return jax.lax.fori_loop(0, _REFITS, lambda _, p: wide.refit(p, x), pair)[1]


def half_quadratic(
    x: Float[Array, "..."],
    axes: tuple[int, ...],
    low: Float[Array, "..."] | None,
    high: Float[Array, "..."],
    format: AnyFormat,
    dtype: Any,
) -> Scales:
    """Scales of the least sum of a norm below 1, as :class:`HalfQuadratic` says.

    Args:
        x: float32, blocks split off.
        axes: over which a scale is shared.
        low: the smallest value of each unit, at most 0; None if symmetric.
        high: the largest value, or magnitude if symmetric.
        format: what to quantize to; its range is a :class:`HalfQuadratic`.
        dtype: of the weights.

    Returns:
        The best scales that the iterations meet.

    Example:
        >>> x = jnp.array([[1.0], [2.0], [3.0], [7.4]])
        >>> format = Format(4, range=HalfQuadratic())
        >>> half_quadratic(x, (0,), None, jnp.array([[7.4]]), format, x.dtype).scale.shape
        (1, 1)
    """
    settings = format.range
    assert isinstance(settings, HalfQuadratic)
    best = scales_of(low, high, format, dtype)
    step = effective_scale(best)
    loss = lambda error: jnp.power(jnp.abs(error), settings.norm)
    wide = _Units(x, axes, high if low is None else jnp.maximum(high, -low), format, loss)

    def iterate(i: Any, state: Any) -> Any:
        pair, current = state
        error = (x - wide.values(current)) / step
        size, beta = jnp.abs(error), settings.beta * settings.growth**i
        # The proximal operator of the norm, near enough: what is left is set aside.
        kept = size - jnp.power(jnp.maximum(size, 1e-6), settings.norm - 1) / beta
        aside = jnp.sign(error) * jnp.maximum(kept, 0) * step
        current = wide.fit(current, x - aside)
        return wide.better(pair, current), current

    state = ((wide.error(best), best), best)
    return jax.lax.fori_loop(0, settings.iterations, iterate, state)[0][1]


class _Units:
    """Weights and their errors by unit, in parts of each unit's largest so that none overflows."""

    def __init__(
        self,
        x: jax.Array,
        axes: tuple[int, ...],
        largest: jax.Array,
        format: AnyFormat,
        loss: Loss,
    ) -> None:
        self.x, self.axes, self.format, self.loss = x, axes, format, loss
        self.up = jnp.where(largest == 0, 1.0, jnp.maximum(largest, 2.0**-100))
        self.down = 1 / jnp.minimum(self.up, 2.0**125)

    def codes(self, scales: Scales) -> jax.Array:
        scale, zero_point = effective_scale(scales), scales.zero_point
        return element_codes(self.x, scale, zero_point, self.format)[0]

    def values(self, scales: Scales) -> jax.Array:
        return element_values(
            self.codes(scales), effective_scale(scales), scales.zero_point, self.format
        )

    def error(self, scales: Scales) -> jax.Array:
        return self.sum(self.loss((self.x - self.values(scales)) * self.down))

    def sum(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=self.axes, keepdims=True)

    def better(self, pair: Any, scales: Scales) -> Any:
        """Of an (error, scales) and other scales what is better, for each unit."""
        error, best = pair
        new = self.error(scales)
        return jnp.minimum(new, error), _choose(new < error, scales, best)

    def rescaled(self, scales: Scales, step: jax.Array, zero_point: Any = None) -> Scales:
        """Other steps, to the nearest that can be stored; as they were where they are none."""
        whole = 1.0 if scales.tensor_scale is None else scales.tensor_scale
        usable = jnp.isfinite(step) & (step > 2.0**-125)
        wanted = jnp.where(usable, step, effective_scale(scales)) / whole
        scale = stored(wanted, self.format.scale_dtype, nearest=True)
        return scales._replace(scale=scale, zero_point=zero_point)

    def refit(self, pair: Any, target: jax.Array) -> Any:
        return self.better(pair, self.fit(pair[1], target))

    def fit(self, scales: Scales, target: jax.Array) -> Scales:
        """Least squares of the scale, and of the zero point, for the codes as they are."""
        target, codes = target * self.down, self.codes(scales)
        if scales.zero_point is None:
            level = element_values(codes, jnp.ones(()), None, self.format)
            step = self.sum(target * level) / self.sum(level * level)
            return self.rescaled(scales, step * self.up)
        count = math.prod(self.x.shape[axis] for axis in self.axes)
        wide = codes.astype(jnp.float32)
        middle, mean = self.sum(wide) / count, self.sum(target) / count
        step = self.sum((wide - middle) * target) / self.sum((wide - middle) ** 2)
        top = self.format.code_range[1] if isinstance(self.format, Format) else 0
        old = scales.zero_point.astype(jnp.float32)
        zero = jnp.clip(jnp.round(middle - mean / step), 0, top)
        zero = jnp.where(jnp.isfinite(zero) & (step > 0), zero, old)
        # The zero point was rounded: the step makes up for it.
        step = self.sum((wide - zero) * target) / self.sum((wide - zero) ** 2)
        return self.rescaled(scales, step * self.up, zero.astype(jnp.uint8))


def _choose(better: jax.Array, new: Scales, old: Scales) -> Scales:
    """Where ``better``; a tensor scale, which all units share, is the same in both."""
    pick = lambda a, b: None if a is None else jnp.where(better, a, b)
    scale, zero_point = pick(new.scale, old.scale), pick(new.zero_point, old.zero_point)
    return Scales(scale, zero_point, old.tensor_scale)


def _mean(sizes: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The scale of one bit without zero."""
    return jnp.mean(sizes, axis=axes, keepdims=True)


def _least_ternary(sizes: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean of the k largest magnitudes, where k makes their sum squared over k largest."""
    kept = [axis for axis in range(-sizes.ndim, 0) if axis not in axes]
    lead = [sizes.shape[axis] for axis in kept]
    rows = jnp.transpose(sizes, [axis % sizes.ndim for axis in (*kept, *axes)])
    rows = -jnp.sort(-rows.reshape(*lead, -1), axis=-1)
    sums = jnp.cumsum(rows, axis=-1)
    counts = jnp.arange(1, rows.shape[-1] + 1, dtype=jnp.float32)
    best = jnp.argmax(sums * sums / counts, axis=-1, keepdims=True)
    found = jnp.take_along_axis(sums, best, axis=-1) / (best + 1).astype(jnp.float32)
    return found.reshape(
        [1 if axis in axes else sizes.shape[axis] for axis in range(-sizes.ndim, 0)]
    )
