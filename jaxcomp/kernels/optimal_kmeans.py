"""The optimal 1-D k-means of weighted points, by dynamic programming from coarse to fine.

Clusters of the best codebook are intervals. Over at most 1,024 bins all ways to cut are compared,
a cluster after the other, by one dense minimum each. Many clusters are then cut into 16 bins each,
and all ways compared in which a cut moves by less than 4 clusters. Where bins hold several points
the cuts are at last moved within ever narrower windows, again by dynamic programming over all cuts
together, until every cut has been compared with its neighbours, point by point.

Costs are merged from means (Chan et al.), not taken from differences of sums of squares, so that
float32 keeps the digits of a small cluster: all terms are positive.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from jaxcomp.kernels.weighted_points import WeightedPoints, running

MOST_CLUSTERS = 256
BINS = 1 << 10
_PARTS = 16  # Bins a cluster where clusters are too many for the dense table;
_REACH = 4  # there, a cut moves by less than 4 clusters, and a cluster holds 4 at most.
_HALF = 12  # A window offers this many cuts on either side of the one there is.
_WINDOWS = 5  # Each narrows them by _HALF: 2^16 points are told apart in the last.
# Values come in [2^30, 2^31): raised, squares of the small ones underflow later, sums stay finite.
_RAISE = np.float32(2.0**14)


def optimal_centroids(
    points: WeightedPoints, clusters: int, active: Int32[Array, ""]
) -> Float32[Array, " clusters"]:
    """Centroids of the best partition of weighted points into intervals.

    Args:
        points: from :func:`jaxcomp.kernels.weighted_points.weighted_points`.
        clusters: size of the result, 1 to 256; static.
        active: how many clusters there are, at most ``clusters``; may be traced.

    Returns:
        Ascending centroids, scaled as the points; inf from ``active`` on. The optimum, up to the
        rounding of float32, where there are no more than 1,024 distinct points; else an optimum
        over bins whose cuts no window improves. With no more points than clusters each is its own.

    Raises:
        ValueError: ``clusters`` is out of range.

    Example:
        >>> from jaxcomp.kernels.weighted_points import weighted_points
        >>> points = weighted_points(jnp.array([0.0, 1.0, 3.0, 4.0]))
        >>> optimal_centroids(points, 2, jnp.int32(2)) * 2.0**-28
        Array([0.5, 3.5], dtype=float32)

    Source: Wang and Song, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by dynamic
    programming", R Journal 3/2, 2011; merged costs: Chan, Golub and LeVeque, "Updating formulae and
    a pairwise algorithm for computing sample variances", 1979, eq. 2.1.
    """
    if not 1 <= clusters <= MOST_CLUSTERS:
        raise ValueError(f"clusters={clusters}: the optimum is found for 1 to {MOST_CLUSTERS}")
    # The last cuts coincide at the end if fewer clusters are active.
    starts = _coarse_cuts(points, clusters, active)
    if points.values.shape[0] > BINS:
        if clusters * _PARTS > BINS // 2:
            starts = _reallocated(points, starts, active)
        starts = _narrowed(points, starts, active)
    means = _mean(points, starts[:-1], starts[1:])
    entry = np.arange(clusters, dtype=np.int32)
    own = points.values[jnp.minimum(entry, points.distinct - 1)]
    means = jnp.where(points.distinct <= active, own, means)
    return jnp.where(entry < active, means, jnp.inf)


def _mass(points: WeightedPoints, begin: Array, end: Array) -> Array:
    return (points.counts_before[end] - points.counts_before[begin]).astype(jnp.float32)


def _mean(points: WeightedPoints, begin: Array, end: Array) -> Array:
    """The mean of the points in [begin, end), within their range; of none, the one at begin."""
    total = points.sum_before[end] - points.sum_before[begin]
    total += points.sum_before_low[end] - points.sum_before_low[begin]
    first = points.values[jnp.clip(begin, 0, points.distinct - 1)]
    last = points.values[jnp.clip(end - 1, 0, points.distinct - 1)]
    mean = total / jnp.maximum(_mass(points, begin, end), 1)
    return jnp.clip(mean, first, jnp.maximum(first, last))


def _coarse_cuts(points: WeightedPoints, clusters: int, active: Array) -> Array:
    """Where each of the clusters begins, and the end: the best cuts between bins."""
    begin, count = _bins(points)
    bins = begin.shape[0] - 1
    mass, mean = _mass(points, begin[:-1], begin[1:]), _mean(points, begin[:-1], begin[1:])
    costs = _all_costs(mean * _RAISE, mass)

    def layer(best: Array, _: None) -> tuple[Array, Array]:
        # The whole table is reduced along its major axis: what vectors are made for.
        before = jnp.pad(best, (1, 0), constant_values=jnp.inf)[:-1]
        best = jnp.min(before[:, None] + costs, 0)
        return best, best

    layers = lax.scan(layer, costs[0], None, length=clusters - 1)[1]
    layers = jnp.concatenate([costs[:1], layers])

    def back(last: Array, k: Array) -> tuple[Array, Array]:
        before = jnp.pad(layers[k - 1], (1, 0), constant_values=jnp.inf)[:-1]
        before = jnp.where(k > 0, before, jnp.where(jnp.arange(bins) == 0, 0.0, jnp.inf))
        first = jnp.argmin(before + costs[:, last]).astype(jnp.int32)
        inside = k < active
        return jnp.where(inside, first - 1, last), jnp.where(inside, first, count)

    order = jnp.arange(clusters - 1, -1, -1, dtype=jnp.int32)
    _, first = lax.scan(back, count - 1, order)
    return jnp.append(begin[first[::-1]], points.distinct)


def _bins(points: WeightedPoints) -> tuple[Array, Array]:
    """Where each bin begins, and the end of all from the last on; how many bins there are."""
    size = points.values.shape[0]
    bins, entry = min(BINS, size), np.arange(size, dtype=np.int32)
    pair = (points.counts_before[2:] - points.counts_before[:-2]).astype(jnp.float32)
    gap = points.values[1:] - points.values[:-1]
    part = jnp.where(jnp.isfinite(gap), jnp.cbrt(gap * gap * pair), 0.0)
    # What is capped is a whole bin, so that a wide gap always parts two bins.
    for _ in range(2):
        part = jnp.minimum(part, part.sum() / (0.75 * bins))
    # Three quarters of the bins have equal shares of density^(1/3), where clusters will be equally
    # many; the others have equal numbers of points, so that there always are more than clusters.
    part = jnp.pad(running(jnp.add, part), (1, 0))
    part = 0.75 * part / jnp.maximum(part[-1], 1e-30) + 0.25 * entry / points.distinct
    owner = jnp.minimum((part * bins).astype(jnp.int32), bins - 1)
    owner = jnp.where(points.distinct <= bins, entry, owner)
    fresh = jnp.append(True, owner[1:] > owner[:-1]) & (entry < points.distinct)
    rank = running(jnp.add, fresh.astype(jnp.int32))
    begin = jnp.full(bins + 1, points.distinct, jnp.int32)
    begin = begin.at[jnp.where(fresh, rank - 1, bins + 1)].set(entry, mode="drop")
    return begin, rank[-1]


def _all_costs(values: Array, mass: Array) -> Array:
    """The inertia of bins i to j about their mean in row i, column j; inf below the diagonal."""
    entry = jnp.arange(values.shape[0])

    def add(carry: Any, j: Array) -> tuple[Any, Array]:
        # The mean is kept relative to bin i.
        held, mean, cost = carry
        share = mass[j] / jnp.maximum(held + mass[j], 1e-30)
        off = values[j] - values - mean
        open_ = entry <= j
        cost = jnp.where(open_, cost + held * share * off * off, 0.0)
        mean = jnp.where(open_, mean + share * off, 0.0)
        held = jnp.where(open_, held + mass[j], 0.0)
        return (held, mean, cost), jnp.where(open_, cost, jnp.inf)

    nothing = jnp.zeros_like(values)
    return lax.scan(add, (nothing, nothing, nothing), entry)[1].T


def _reallocated(points: WeightedPoints, starts: Array, active: Array) -> Array:
    """The best cuts near those there are, between more bins: clusters move to where they pay."""
    clusters, reach = starts.shape[0] - 1, _REACH * _PARTS
    part = np.arange(_PARTS, dtype=np.int32)
    begin = starts[:-1, None] + jnp.diff(starts)[:, None] * part // _PARTS
    begin = jnp.append(begin.ravel(), starts[-1])
    costs = _near_costs(points, begin, reach)
    costs = jnp.pad(costs, ((0, 0), (reach, reach)), constant_values=jnp.inf)

    # A window holds the cuts at up to `reach` bins before the one there is, and as many from it on.
    # Where window and length are known, so is where the cluster began, in the window before.
    length, width = np.arange(1, reach + 1)[:, None], np.arange(2 * reach)
    origin = width + _PARTS - length + reach

    def options(before: Array, k: Array) -> Array:
        padded = jnp.pad(before, (reach, _PARTS), constant_values=jnp.inf)
        own = lax.dynamic_slice(costs, (0, (k + 1) * _PARTS - 1), (reach, 2 * reach))
        return padded[origin] + own

    def layer(before: Array, k: Array) -> tuple[Array, Array]:
        return options(before, k).min(0), before

    def back(place: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        before, k = step
        best = jnp.argmin(options(before, k)[:, place]).astype(jnp.int32) + 1
        inside = k < active
        came = jnp.where(inside, place + _PARTS - best, place)
        return came, jnp.where(inside, (k + 1) * _PARTS + place - reach, clusters * _PARTS)

    order = jnp.arange(clusters, dtype=jnp.int32)
    nothing = jnp.full(2 * reach, jnp.inf).at[reach].set(0.0)
    layers = lax.scan(layer, nothing, order)[1]
    ends = lax.scan(back, jnp.int32(reach), (layers, order), reverse=True)[1]
    return jnp.append(0, begin[ends])


def _near_costs(points: WeightedPoints, begin: Array, reach: int) -> Array:
    """The inertia of the 1 to ``reach`` bins up to each, a row for each number of them."""
    mass, mean = _mass(points, begin[:-1], begin[1:]), _mean(points, begin[:-1], begin[1:])
    size = mass.shape[0]
    ahead = jnp.pad(mass, (reach, 0)), jnp.pad(mean * _RAISE, (reach, 0))

    def add(held: Any, back: Array) -> tuple[Any, Array]:
        piece = tuple(lax.dynamic_slice(part, (reach - back,), (size,)) for part in ahead)
        cost = _merged(held, (*piece, jnp.zeros(size)))
        share = piece[0] / jnp.maximum(held[0] + piece[0], 1e-30)
        held = held[0] + piece[0], held[1] + share * (piece[1] - held[1]), cost
        # Before the first bin there is nothing.
        return held, jnp.where(np.arange(size) >= back, cost, jnp.inf)

    nothing = jnp.zeros(size)
    return lax.scan(add, (nothing, nothing, nothing), jnp.arange(reach, dtype=jnp.int32))[1]


def _narrowed(points: WeightedPoints, starts: Array, active: Array) -> Array:
    """Cuts moved to the best places in windows that narrow down to single points."""
    middle = (starts[:-1] + starts[1:]) // 2

    def narrow(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        starts, reach = carry
        # Windows end amid clusters, so that they do not overlap.
        middle = (starts[:-1] + starts[1:]) // 2
        room = starts[1:-1] - middle[:-1], middle[1:] - starts[1:-1]
        places = _offered(starts[1:-1], *(jnp.minimum(reach, way) for way in room))
        chosen = _best_places(points, places, middle)
        return starts.at[1:-1].set(chosen), -(-reach // _HALF)

    if starts.shape[0] < 3:
        return starts
    inner = np.arange(1, starts.shape[0] - 1) < active
    reach = jnp.where(inner, jnp.maximum(jnp.diff(middle), 1), 0)
    return lax.fori_loop(0, _WINDOWS, narrow, (starts, reach))[0]


def _offered(cut: Array, left: Array, right: Array) -> Array:
    """Places from ``left`` below to ``right`` above each cut, which is among them; ascending."""
    step = np.arange(_HALF + 1, dtype=np.int32)
    below = cut[:, None] - left[:, None] * step[:0:-1] // _HALF
    above = cut[:, None] + right[:, None] * step // _HALF
    return jnp.concatenate([below, above], 1)


def _best_places(points: WeightedPoints, places: Array, middle: Array) -> Array:
    """For each cut the place, of those offered, that is best for all together."""
    # A cluster is what is right of its left cut, up to its middle, and what is left of its right.
    right = _grown(points, jnp.flip(places, 1), middle[1:, None])
    right = tuple(jnp.flip(part, 1) for part in right)
    left = _grown(points, places, middle[:-1, None])
    inner = tuple(part[:-1, :, None] for part in right), tuple(part[1:, None, :] for part in left)

    # The first cluster begins, and the last ends, where the points do.
    outer_first = _grown(points, jnp.zeros((1, 1), jnp.int32), middle[:1, None])
    outer_last = _grown(points, points.distinct[None, None], middle[-1:, None])
    start = _merged(tuple(part[0] for part in outer_first), tuple(part[0] for part in left))
    finish = _merged(tuple(part[-1] for part in right), tuple(part[0] for part in outer_last))

    def forward(best: Array, cost: Array) -> tuple[Array, Array]:
        total = best[:, None] + cost
        return total.min(0), total.argmin(0).astype(jnp.int32)

    best, origin = lax.scan(forward, start, _merged(*inner))
    end = jnp.argmin(best + finish).astype(jnp.int32)

    def back(place: Array, origin: Array) -> tuple[Array, Array]:
        return origin[place], place

    begin, chosen = lax.scan(back, end, origin, reverse=True)
    chosen = jnp.append(begin, chosen)
    return jnp.take_along_axis(places, chosen[:, None], 1)[:, 0]


def _grown(points: WeightedPoints, places: Array, anchor: Array) -> tuple[Array, Array, Array]:
    """Mass, mean and inertia of the points between an anchor and each place, the far ones last."""
    near = jnp.concatenate([anchor, places[:, :-1]], 1)
    begin, end = jnp.minimum(near, places), jnp.maximum(near, places)
    pieces = _mass(points, begin, end), _mean(points, begin, end) * _RAISE

    def grow(held: Any, piece: Any) -> tuple[Any, Any]:
        mass, mean = piece
        cost = _merged(held, (mass, mean, jnp.zeros_like(mass)))
        share = mass / jnp.maximum(held[0] + mass, 1e-30)
        held = held[0] + mass, held[1] + share * (mean - held[1]), cost
        return held, held

    nothing = jnp.zeros(places.shape[0])
    held = lax.scan(grow, (nothing, pieces[1][:, 0], nothing), tuple(part.T for part in pieces))[1]
    return tuple(part.T for part in held)


def _merged(a: tuple[Array, ...], b: tuple[Array, ...]) -> Array:
    """The inertia of two sets of points together, from mass, mean and inertia of each."""
    share = b[0] / jnp.maximum(a[0] + b[0], 1e-30)
    off = a[1] - b[1]
    return a[2] + b[2] + a[0] * share * off * off
