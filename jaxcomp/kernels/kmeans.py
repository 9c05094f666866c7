"""One-dimensional k-means: a codebook for a tensor's values, and the nearest entry of each.

Lloyd's algorithm runs on sorted, weighted points that stand for the values: a step is the
differences of a few prefix sums, whatever the size of the tensor.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt

from jaxcomp.kernels.weighted_points import (
    TOP,
    WeightedPoints,
    cell,
    materialized,
    ordered,
    power_of_two,
    running,
    weighted_points,
)
from jaxcomp.sharding import automatic, explicit_axes


def fit_codebook(
    x: Float[Array, "..."], clusters: int, *, iterations: int = 50, pin_zero: bool = True
) -> Float32[Array, " clusters"]:
    """Centroids of one-dimensional k-means over all elements of an array.

    Lloyd's algorithm on :func:`jaxcomp.kernels.weighted_points.weighted_points` (exact up to 16,384
    weights, then at most 65,536 bins that follow the values), started from centroids at equal mass
    of density^(1/3) (companding). After each step the two neighbours cheapest to merge give a
    centroid to the cluster that gains most from a second one, if that pays.

    Args:
        x: weights, any floating dtype and shape; computed in float32. May be sharded: counts are
            summed over shards, and above 16,384 weights nothing is gathered. No gradient flows
            through the fit.
        clusters: number of codebook entries K, 1 to 65,536; static.
        iterations: Lloyd steps; static.
        pin_zero: if ``x`` holds exact zeros (pruned weights), leave them out of the fit and give
            them entry 0, exactly 0.0; the other K - 1 entries are fitted to the non-zero weights.
            Without a zero in ``x`` all K entries are fitted, and entry 0 is never exactly 0.0, so
            that a leading 0.0 always means a pinned zero.

    Returns:
        The codebook: entries in ascending order (from entry 1 on, if zero is pinned). Entries
        repeat if ``x`` has fewer distinct values than ``clusters``. With ``clusters=1`` and a
        pinned zero the only entry is 0.0, whatever the other weights are. All NaN if ``x`` has a
        NaN or infinite element. Entries below the normal float32 numbers may be flushed to zero.

    Raises:
        ValueError: if ``clusters`` is out of range or above the number of weights, ``iterations``
            is negative, or ``x`` has 2^31 elements or more.

    Example:
        >>> x = jnp.array([0.0, 0.0, -1.1, -0.9, 2.0, 4.0])
        >>> fit_codebook(x, 4)
        Array([ 0., -1.,  2.,  4.], dtype=float32)
        >>> fit_codebook(x, 3, pin_zero=False)
        Array([-0.5,  2. ,  4. ], dtype=float32)

    Source: Lloyd, "Least squares quantization in PCM", 1982; Panter and Dite, "Quantization
    distortion in pulse-count modulation with nonuniform spacing of levels", 1951.
    """
    if not 1 <= clusters <= 1 << 16:
        raise ValueError(f"clusters={clusters}: a codebook has 1 to 65536 entries")
    if clusters > x.size:
        raise ValueError(
            f"clusters={clusters} is more than the {x.size} weights of x (shape {x.shape}): "
            f"ask for fewer clusters, or fit one codebook to several arrays"
        )
    if iterations < 0:
        raise ValueError(f"iterations={iterations}: must be 0 or more")
    points = weighted_points(x, keep_zeros=not pin_zero)
    return _fit(points, _bounds(x, pin_zero), clusters, iterations, pin_zero)


def nearest(
    x: Float[Array, "*shape"], codebook: Float[Array, " clusters"], *, pin_zero: bool = True
) -> UInt[Array, "*shape"]:
    """The index of the codebook entry nearest to each element.

    A table over the leading bits of a float narrows the search to the few midpoints between entries
    that share them; these are bisected.

    Args:
        x: weights, any floating dtype and shape; compared in float32. May be sharded.
        codebook: K entries as from :func:`fit_codebook`: ascending, from entry 1 on if entry 0 is a
            pinned zero.
        pin_zero: if entry 0 is exactly 0.0, it stands for pruned weights: exact zeros map to it and
            no other value does, however small. With ``pin_zero=False``, or another entry 0, zeros
            are values like any other.

    Returns:
        Indices in the shape and sharding of ``x``: uint8 up to 256 entries, uint16 above. Ties go
        to the lower index, NaN to either end. With one entry everything maps to it.

    Raises:
        ValueError: if the codebook is empty or has more than 65,536 entries.

    Example:
        >>> codebook = jnp.array([0.0, -1.0, 2.0, 4.0])
        >>> nearest(jnp.array([0.0, 1e-3, -5.0, 3.0, 3.1]), codebook)
        Array([0, 1, 1, 2, 3], dtype=uint8)
    """
    clusters = codebook.shape[0]
    if not 1 <= clusters <= 1 << 16:
        raise ValueError(f"codebook has {clusters} entries: 1 to 65536 can be indexed")
    return _nearest(x, codebook, pin_zero)


@partial(jax.jit, static_argnames="pin_zero")
def _bounds(x: Array, pin_zero: bool) -> tuple[Array, Array]:
    """The least and the greatest weight that entries are fitted to."""
    x = x.astype(jnp.float32)
    fitted = (x != 0) if pin_zero else jnp.ones_like(x, bool)
    low = jnp.min(x, initial=jnp.inf, where=fitted)
    return low, jnp.max(x, initial=-jnp.inf, where=fitted)


@partial(jax.jit, static_argnames=("clusters", "iterations", "pin_zero"))
def _fit(
    points: WeightedPoints,
    bounds: tuple[Array, Array],
    clusters: int,
    iterations: int,
    pin_zero: bool,
) -> Array:
    pinned = (points.zeros > 0) & pin_zero
    active = clusters - pinned.astype(jnp.int32)
    centroids = _companded_start(points, clusters, active)

    def step(i: Array, centroids: Array) -> Array:
        bold = (i % 5 == 4) & (i < 2 * iterations // 3)
        return _step(points, centroids, jnp.where(bold, 0.5, 1.0001))

    centroids = lax.fori_loop(0, iterations, step, centroids)
    centroids = jnp.where(points.distinct > 0, centroids, 0.0)
    # One factor could be below the smallest normal float32 where the product is not.
    exponent = points.exponent - 127 - TOP
    half = exponent // 2
    centroids = centroids * power_of_two(half) * power_of_two(exponent - half)
    # Beside a weight 2^126 times as large, a small one was rounded to zero on the way.
    low, high = bounds
    centroids = jnp.where(low <= high, jnp.clip(centroids, low, high), centroids)
    if pin_zero:
        above = jnp.maximum(centroids, jnp.finfo(jnp.float32).tiny)
        unpinned = jnp.where(centroids[0] == 0, above, centroids)
        centroids = jnp.where(pinned, jnp.roll(centroids, 1).at[0].set(0.0), unpinned)
    return jnp.where(points.exponent < 0xFF, centroids, jnp.nan)


def _companded_start(points: WeightedPoints, clusters: int, active: Array) -> Array:
    """Centroids at equal mass of density^(1/3); from ``active`` on they are inf and stay empty."""
    values, entry = points.values, np.arange(clusters, dtype=np.int32)
    pair = (points.counts_before[2:] - points.counts_before[:-2]).astype(jnp.float32)
    gap = values[1:] - values[:-1]
    mass = jnp.where(jnp.isfinite(gap), jnp.cbrt(gap * gap * pair), 0.0)
    # A gap holds no weights, so however wide, it needs no more than one centroid.
    for _ in range(2):
        mass = jnp.minimum(mass, mass.sum() / active)
    mass = running(jnp.add, mass)
    place = jnp.searchsorted(mass, (entry + np.float32(0.5)) / active * mass[-1])
    # With no more distinct values than centroids each value is its own.
    place = jnp.where(points.distinct <= active, entry, place)
    return jnp.where(entry < active, values[jnp.minimum(place, points.distinct - 1)], jnp.inf)


def _step(points: WeightedPoints, centroids: Array, margin: Array) -> Array:
    """One step of Lloyd's algorithm, then move one centroid if that pays."""
    # Clusters are cut at their midpoints and once more at their centroids, which tells what a
    # second centroid would gain. An empty cluster keeps its centroid.
    clusters = centroids.shape[0]
    midpoints = centroids[:-1] / 2 + centroids[1:] / 2
    cuts = jnp.stack([centroids, jnp.pad(midpoints, (0, 1))], 1).ravel()[:-1]
    ends = jnp.searchsorted(points.values, cuts, side="right", method="scan").astype(jnp.int32)
    ends = jnp.minimum(jnp.pad(ends, (1, 1), constant_values=(0, 1 << 30)), points.distinct)
    begin, end = ends[:-1].reshape(clusters, 2), ends[1:].reshape(clusters, 2)
    count = (points.counts_before[end] - points.counts_before[begin]).astype(jnp.float32)
    total = points.sum_before[end] - points.sum_before[begin]
    total += points.sum_before_low[end] - points.sum_before_low[begin]
    first, last = points.values[begin], points.values[jnp.maximum(end - 1, 0)]
    # Clipping makes the mean of a single point that point, whatever the rounding.
    half_mean = jnp.clip(total / jnp.maximum(count, 1), first, last)
    mean = jnp.clip(total.sum(1) / jnp.maximum(count.sum(1), 1), first[:, 0], last[:, 1])
    mean = jnp.where(count.sum(1) > 0, mean, centroids)
    return mean if clusters < 3 else _move_one(mean, half_mean, count, margin)


def _move_one(mean: Array, half_mean: Array, half_count: Array, margin: Array) -> Array:
    """Merge the cheapest two neighbours and split another cluster in two, if that pays."""
    # Merging clusters of n and m points at distance d raises the inertia by n m / (n + m) d^2, and
    # splitting lowers it likewise. Square roots are compared, as squares could overflow. A margin
    # above 1 keeps rounding from moving a centroid to and fro. Below 1 it makes moves that pay only
    # once the neighbours have followed: merging two clusters of inertia D costs 6 D at first and
    # splitting one saves 3/4 D, but where inertias differ twofold, Lloyd's next steps save more.
    entry, count = jnp.arange(mean.shape[0]), half_count.sum(1)
    product = half_count[:, 0] * (half_count[:, 1] / jnp.maximum(count, 1))
    gain = jnp.sqrt(product) * (half_mean[:, 1] - half_mean[:, 0])
    gain = jnp.where(product > 0, gain, 0.0)
    weight = count[1:] / jnp.maximum(count[:-1] + count[1:], 1)
    loss = jnp.sqrt(count[:-1] * weight) * (mean[1:] - mean[:-1])
    loss = jnp.where(jnp.isfinite(mean[1:]), loss, jnp.inf)
    merge = jnp.argmin(loss)
    gain = jnp.where((entry == merge) | (entry == merge + 1), 0.0, gain)
    split = jnp.argmax(gain)
    merged = mean[merge] + (mean[merge + 1] - mean[merge]) * weight[merge]

    # The entries between the two places move over by one, so that the order stays ascending.
    upward = split < merge
    between = (entry >= jnp.minimum(split, merge)) & (entry <= jnp.maximum(split, merge + 1))
    moved = jnp.where(between, jnp.where(upward, jnp.roll(mean, 1), jnp.roll(mean, -1)), mean)
    place = jnp.where(upward, split, split - 1) + np.arange(2)
    moved = moved.at[place].set(half_mean[split])
    moved = moved.at[jnp.where(upward, merge + 1, merge)].set(merged)
    return jnp.where(gain[split] > loss[merge] * margin, moved, mean)


@partial(jax.jit, static_argnames=("pin_zero",))
def _nearest(x: Array, codebook: Array, pin_zero: bool) -> Array:
    clusters = codebook.shape[0]
    dtype = jnp.uint8 if clusters <= 256 else jnp.uint16
    low = 32 - min(max(x.size.bit_length() - 2, 10), 16)

    def search(x: Array, codebook: Array) -> Array:
        if clusters == 1:
            return jnp.zeros_like(x, dtype)
        codebook = codebook.astype(jnp.float32)
        key = ordered(x)
        midpoint = ordered(codebook[:-1] / 2 + codebook[1:] / 2)
        pinned = (ordered(codebook[0]) == 0) & pin_zero
        # Every value is above the first midpoint then, and so never takes entry 0.
        lowest = jnp.where(pinned, jnp.iinfo(jnp.int32).min, midpoint[0])
        midpoint = midpoint.at[0].set(lowest)
        cells = jnp.zeros(1 << (32 - low), jnp.int32)
        counts = cells.at[cell(midpoint, low)].add(1, mode="promise_in_bounds")
        below = materialized(running(jnp.add, counts) - counts)
        index = below.at[cell(key, low)].get(mode="promise_in_bounds")
        # How many of the midpoints with the same leading bits are below is found bit by bit.
        bits = 32 - lax.clz(counts.max())
        padded = jnp.pad(midpoint, (0, clusters), constant_values=jnp.iinfo(jnp.int32).max)

        def bisect(i: Array, index: Array) -> Array:
            step = 1 << (bits - 1 - i)
            below = padded.at[index + step - 1].get(mode="promise_in_bounds") < key
            return index + jnp.where(below, step, 0)

        index = lax.fori_loop(0, bits, bisect, index)
        return jnp.where((key == 0) & pinned, 0, index).astype(dtype)

    out = jax.typeof(x).sharding.spec if explicit_axes(x) else None
    return automatic(search, out)(x, codebook)
