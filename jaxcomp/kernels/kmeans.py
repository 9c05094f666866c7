"""One-dimensional k-means: a codebook for a tensor's values, and the nearest entry of each.

Lloyd's algorithm runs on sorted, weighted points that stand for the values: a step is the
differences of a few prefix sums, whatever the size of the tensor.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt

from jaxcomp.kernels.kmeans_starts import STARTS
from jaxcomp.kernels.optimal_kmeans import MOST_CLUSTERS
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
    x: Float[Array, "..."] | Sequence[Float[Array, "..."]],
    clusters: int,
    *,
    iterations: int = 50,
    pin_zero: bool = True,
    start: str | None = None,
    importance: Any = None,
    key: Any = None,
) -> Float32[Array, " clusters"]:
    """Centroids of one-dimensional k-means over all elements of an array, or of several.

    The optimum by dynamic programming, or Lloyd's algorithm from another start, on
    :func:`jaxcomp.kernels.weighted_points.weighted_points` (exact up to 16,384 weights, then at
    most 65,536 bins that follow the values). After each step of Lloyd's the two neighbours cheapest
    to merge give a centroid to the cluster that gains most from a second one, if that pays.

    Args:
        x: weights, any floating dtype and shape, or several such arrays that share the codebook;
            computed in float32. May be sharded: counts are summed over shards, and above 16,384
            weights nothing is gathered. No gradient flows through the fit.
        clusters: number of codebook entries K, 1 to 65,536; static.
        iterations: Lloyd steps, at most; static. After ``"optimal"`` ten settle it.
        pin_zero: if ``x`` holds exact zeros (pruned weights), leave them out of the fit and give
            them entry 0, exactly 0.0; the other K - 1 entries are fitted to the non-zero weights.
            Without a zero in ``x`` all K entries are fitted, and entry 0 is never exactly 0.0, so
            that a leading 0.0 always means a pinned zero.
        start: ``"optimal"`` (up to 256 clusters), ``"companded"`` (equal mass of density^(1/3)),
            ``"linear"``, ``"density"`` or ``"k-means++"``; None for the optimum where it is found
            and companding beyond; static.
        importance: what an error of each weight costs, from 0 on, in the shapes of ``x``; None for
            1 each. See :func:`jaxcomp.kernels.weighted_points.weighted_points`.
        key: for ``"k-means++"``, which draws; else None.

    Returns:
        The codebook: entries in ascending order (from entry 1 on, if zero is pinned). Entries
        repeat if ``x`` has fewer distinct values than ``clusters``. With ``clusters=1`` and a
        pinned zero the only entry is 0.0, whatever the other weights are. All NaN if ``x`` has a
        NaN or infinite element. Entries below the normal float32 numbers may be flushed to zero.

    Raises:
        TypeError: ``key`` is missing where one is needed.
        ValueError: ``clusters`` is out of range or above the number of weights, ``iterations``
            is negative, ``start`` is unknown or not for so many clusters, ``key`` is given to a
            start that draws nothing, ``importance`` has other shapes, or ``x`` has 2^31 elements or
            more.

    Example:
        >>> x = jnp.array([0.0, 0.0, -1.1, -0.9, 2.0, 4.0])
        >>> fit_codebook(x, 4)
        Array([ 0., -1.,  2.,  4.], dtype=float32)
        >>> fit_codebook(x, 3, pin_zero=False)
        Array([-0.5,  2. ,  4. ], dtype=float32)

    Source: Lloyd, "Least squares quantization in PCM", 1982; Panter and Dite, "Quantization
    distortion in pulse-count modulation with nonuniform spacing of levels", 1951; of the optimum,
    :mod:`jaxcomp.kernels.optimal_kmeans`.
    """
    arrays = tuple(x) if isinstance(x, Sequence) else (x,)
    size = sum(array.size for array in arrays)
    if not 1 <= clusters <= 1 << 16:
        raise ValueError(f"clusters={clusters}: a codebook has 1 to 65536 entries")
    if clusters > size:
        raise ValueError(
            f"clusters={clusters} is more than the {size} weights of x (shape "
            f"{', '.join(str(array.shape) for array in arrays)}): "
            f"ask for fewer clusters, or fit one codebook to several arrays"
        )
    if iterations < 0:
        raise ValueError(f"iterations={iterations}: must be 0 or more")
    start = check_start(start, clusters, key)
    if importance is not None:
        importance = tuple(importance) if isinstance(importance, Sequence) else (importance,)
    points = weighted_points(arrays, keep_zeros=not pin_zero, importance=importance)
    if start == "optimal":
        iterations = min(iterations, 10)
    return _fit(points, _bounds(arrays, pin_zero), key, clusters, iterations, pin_zero, start)


def check_start(start: str | None, clusters: int, key: Any = None) -> str:
    """The name of a start, chosen by the number of clusters if it is None; see `fit_codebook`.

    Raises:
        TypeError: a key is needed and not given.
        ValueError: there is no such start, not for so many clusters, or it needs no key.

    Example:
        >>> check_start(None, 16), check_start(None, 1000)
        ('optimal', 'companded')
    """
    if start is None:
        start = "optimal" if clusters <= MOST_CLUSTERS else "companded"
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, not {start!r:.60}")
    if start == "optimal" and clusters > MOST_CLUSTERS:
        raise ValueError(
            f"start='optimal' is for up to {MOST_CLUSTERS} clusters, not {clusters}: "
            "use 'companded'"
        )
    if start == "k-means++" and key is None:
        raise TypeError("start='k-means++' draws: give it a key, such as jax.random.key(0)")
    if start != "k-means++" and key is not None:
        raise ValueError(f"start='{start}' draws nothing: leave key out, or use 'k-means++'")
    return start


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
def _bounds(arrays: tuple[Array, ...], pin_zero: bool) -> tuple[Array, Array]:
    """The least and the greatest weight that entries are fitted to."""

    def bounds(*arrays: Array) -> tuple[Array, Array]:
        low, high = jnp.float32(jnp.inf), jnp.float32(-jnp.inf)
        for x in arrays:
            x = x.astype(jnp.float32)
            fitted = (x != 0) if pin_zero else jnp.ones_like(x, bool)
            low = jnp.minimum(low, jnp.min(x, initial=jnp.inf, where=fitted))
            high = jnp.maximum(high, jnp.max(x, initial=-jnp.inf, where=fitted))
        return low, high

    return automatic(bounds)(*arrays)


@partial(jax.jit, static_argnames=("clusters", "iterations", "pin_zero", "start"))
def _fit(
    points: WeightedPoints,
    bounds: tuple[Array, Array],
    key: Any,
    clusters: int,
    iterations: int,
    pin_zero: bool,
    start: str,
) -> Array:
    pinned = (points.zeros > 0) & pin_zero
    active = clusters - pinned.astype(jnp.int32)
    centroids = STARTS[start](points, clusters, active, key)

    def step(i: Array, centroids: Array) -> Array:
        # The optimum has nothing to gain from moves that do not pay at once.
        bold = (i % 5 == 4) & (i < 2 * iterations // 3) & (start != "optimal")
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
