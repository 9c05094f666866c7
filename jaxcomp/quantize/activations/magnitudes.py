"""How often each magnitude of an activation came, streamed, and the ranges that clip by that."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import sharding as sharding_lib
from jaxcomp.kernels.arithmetic import widen
from jaxcomp.model.statistics import Total, histogram
from jaxcomp.quantize.activations.bounds import Bounds, is_symmetric
from jaxcomp.quantize.entropy import least_divergence
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.ranges import Entropy, MeanSquare, Percentile
from jaxcomp.quantize.rounding import element_codes, element_values
from jaxcomp.quantize.steps import effective_scale, scales_of

# From 6e-8 to 65536; what is beyond still counts, with the least and the greatest value.
_HISTOGRAM = histogram(-24, 16, 64)
# As many values stand for all of them where a histogram with even bins is made.
_STAND_INS = 1 << 16
# The least part of the whole range that is tried.
_LEAST = 1 / 64


class Magnitudes(NamedTuple):
    """Histograms of the values below zero and from zero on, with the axes of bounds in front."""

    negative: Total
    positive: Total


def check_range(name: str, format: AnyFormat) -> None:
    """Raise unless the range of a format can be found from a histogram.

    Args:
        name: of the point, for the message.
        format: of the point; :class:`AbsMax` needs none and is not for this.

    Raises:
        ValueError: it needs the values themselves.

    Example:
        >>> from jaxcomp.quantize import Format, HalfQuadratic
        >>> check_range("kernel", Format(8, range=HalfQuadratic()))
        Traceback (most recent call last):
        ...
        ValueError: kernel: HalfQuadratic(...) cannot be found from a histogram of activations: ...
    """
    if not isinstance(format.range, Percentile | MeanSquare | Entropy):
        raise ValueError(
            f"{name}: {format.range} cannot be found from a histogram of activations: use "
            "AbsMax(), Percentile(), MeanSquare() or Entropy()"
        )


def no_magnitudes(shape: tuple[int, ...]) -> Magnitudes:
    """The histograms of no values, for bounds of some shape."""
    empty = _HISTOGRAM.init(1)
    zeros = [jnp.zeros((*shape, *part.shape), part.dtype) for _ in range(2) for part in empty]
    return Magnitudes(Total(*zeros[:2]), Total(*zeros[2:]))


def add_magnitudes(counts: Magnitudes, x: jax.Array, format: AnyFormat) -> Magnitudes:
    """The histograms with the values of an activation in them.

    Args:
        counts: of the shape of the activation's bounds.
        x: the activation.
        format: which axes have histograms of their own.
    """
    reduced = format.reduced_axes(x.shape)
    own = [axis for axis in range(-x.ndim, 0) if axis not in reduced]
    measure = _HISTOGRAM.measure
    for _ in own:
        measure = jax.vmap(measure)

    def add(counts: Magnitudes, x: jax.Array) -> Magnitudes:
        x = jnp.moveaxis(widen(x), own, range(len(own)))
        new = [measure(jnp.maximum(side, 0)) for side in (-x, x)]
        new = jax.tree.map(lambda new, old: new.reshape(old.shape), Magnitudes(*new), counts)
        return Magnitudes(*map(_HISTOGRAM.merge, counts, new))

    return sharding_lib.automatic(add)(counts, jax.lax.stop_gradient(x))


def clipped(bounds: Bounds, counts: Magnitudes, format: AnyFormat) -> Bounds:
    """Bounds that leave out what the format's range leaves out.

    Args:
        bounds: that hold every value.
        counts: of these values.
        format: its range is one that clips.

    Returns:
        Bounds of the same shape, inside the given ones.
    """
    shape = bounds.high.shape
    low, high = (np.asarray(edge, np.float64).reshape(-1) for edge in bounds)
    sides = [np.asarray(side.high + side.low, np.float64) for side in counts]
    sides = [side.reshape(low.size, -1) for side in sides]
    found = [_clip(_Unit(*unit), format) for unit in zip(low, high, *sides, strict=True)]
    ends = np.asarray(found, np.float32).reshape(*shape, 2)
    return Bounds(jnp.asarray(ends[..., 0]), jnp.asarray(ends[..., 1]))


class _Unit(NamedTuple):
    """Values that share a range: the least and the greatest, and how often each magnitude came.

    The first count of either side holds the values of the other side too.
    """

    low: float
    high: float
    negative: np.ndarray
    positive: np.ndarray

    @property
    def size(self) -> float:
        return self.positive.sum()

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """A value for each bin, ascending, and how often it came."""
        edges = _edges()
        middles = (edges[1:-1] + edges[2:]) / 2
        most = max(self.high, -self.low)
        middles = np.minimum(np.where(np.isfinite(middles), middles, most), most)
        zeros = self.negative[0] + self.positive[0] - self.size
        values = np.concatenate([-middles[::-1], [0.0], middles])
        return values, np.concatenate([self.negative[:0:-1], [zeros], self.positive[1:]])


def _edges() -> np.ndarray:
    return np.asarray(_HISTOGRAM.finish(_HISTOGRAM.init(1)).edges, np.float64)


def _clip(unit: _Unit, format: AnyFormat) -> tuple[float, float]:
    if unit.low == unit.high:
        return unit.low, unit.high
    match format.range:
        case Percentile(percent):
            return _percentile(unit, percent, is_symmetric(format))
        case MeanSquare():
            return _mean_square(unit, format)
        case Entropy():
            return _entropy(unit, format)
        case other:
            raise AssertionError(f"{other} was not refused by check_range")


def _percentile(unit: _Unit, percent: float, symmetric: bool) -> tuple[float, float]:
    if symmetric:
        both = unit.negative + unit.positive
        both[0] -= unit.size
        high = min(_rank(both, percent), unit.high)
        return -high, high
    # As many are lost at the lower end as at the upper one.
    each = 50 + percent / 2
    low = max(-_rank(unit.negative, each), unit.low)
    return low, min(_rank(unit.positive, each), unit.high)


def _rank(counts: np.ndarray, percent: float) -> float:
    """The end of the bin in which the value of a rank lies."""
    wanted = math.ceil(percent / 100 * counts.sum() - 1e-9 * counts.sum())
    place = int(np.searchsorted(np.cumsum(counts), wanted))
    return 0.0 if place == 0 else float(_edges()[place + 1])


def _mean_square(unit: _Unit, format: AnyFormat) -> tuple[float, float]:
    """The best of ranges that shrink by equal factors, then of those between its neighbours."""
    assert isinstance(format.range, MeanSquare)
    values, counts = unit.values()
    count = format.range.candidates
    ratio = _LEAST ** (1 / (count - 1))
    parts = ratio ** np.arange(count)
    best = np.array([1.0, 1.0])
    # Both ends together; then finer: together, and where they differ each on its own.
    moves = [(1, 1)] if is_symmetric(format) else [(1, 1), (1, 0), (0, 1)]
    for move in [(1, 1), *moves]:
        tried = np.minimum(best * parts[:, None] ** np.asarray(move), 1.0)
        low, high = unit.low * tried[:, 0], unit.high * tried[:, 1]
        best = tried[np.argmin(_square_errors(values, counts, low, high, format))]
        parts = ratio ** np.linspace(-1, 1, count)
    return float(unit.low * best[0]), float(unit.high * best[1])


def _square_errors(
    values: np.ndarray, counts: np.ndarray, low: np.ndarray, high: np.ndarray, format: AnyFormat
) -> np.ndarray:
    """The sum of squares that each of several ranges costs."""
    ends = [jnp.asarray(end, jnp.float32)[:, None] for end in (low, high)]
    scales = scales_of(None if is_symmetric(format) else ends[0], ends[1], format, jnp.float32)
    x = jnp.asarray(values, jnp.float32)[None]
    scale = effective_scale(scales)
    codes, _ = element_codes(x, scale, scales.zero_point, format)
    errors = element_values(codes, scale, scales.zero_point, format) - x
    return np.asarray(errors, np.float64) ** 2 @ counts


def _entropy(unit: _Unit, format: AnyFormat) -> tuple[float, float]:
    values, counts = unit.values()
    places = (np.arange(_STAND_INS) + 0.5) / _STAND_INS * counts.sum()
    rows = jnp.asarray(values[np.searchsorted(np.cumsum(counts), places)], jnp.float32)[None]
    low = None if is_symmetric(format) else jnp.full((1, 1), unit.low, jnp.float32)
    high = jnp.full((1, 1), unit.high, jnp.float32)
    whole = scales_of(low, high, format, jnp.float32)
    best = least_divergence(rows, (-1,), low, high, format, jnp.float32)
    part = float(np.squeeze(effective_scale(best) / effective_scale(whole)))
    return unit.low * part, unit.high * part
