"""K-means of vectors: a codebook for the rows of a matrix, and the nearest entry of each.

Distances are taken a few rows at a time, so that no array of vectors times clusters is ever in
memory, whatever the number of either.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt

from jaxcomp.sharding import automatic

INITS = ("k-means++", "sample")

# Scores in flight, in all problems together: what a core's cache holds.
_SCORES = 1 << 18
_LEAST_ROWS = 64
# k-means++ looks at all its vectors for each cluster.
_PLUS_SAMPLE = 64
_PLUS_CLUSTERS = 1024
# Of the largest weight: what rounding alone moves a centroid by.
_STILL = 2.0**-22


def fit_vectors(
    x: Float[Array, "*batch n d"],
    clusters: int,
    *,
    key: Any,
    importance: Any = None,
    iterations: int = 25,
    init: str | None = None,
    start: Float[Array, "*batch clusters d"] | None = None,
) -> Float32[Array, "*batch clusters d"]:
    """Centroids of k-means over vectors, one problem for each position of the leading axes.

    Lloyd's algorithm, for the sum of ``importance * (x - centroid)^2``. A cluster that has lost all
    its members splits the one that costs most, along its widest axis. Stops early where no
    centroid moves by more than rounding.

    Args:
        x: vectors in rows, any floating dtype; computed in float32.
        clusters: entries of a codebook, 1 to 65,536, at most ``n``; static.
        key: one PRNG key, for the start alone; each problem draws its own.
        importance: what an error of each element costs, at least 0, such as a diagonal Hessian;
            every element the same if None. Vectors of none belong to no cluster.
        iterations: Lloyd steps at most; static.
        init: ``"k-means++"`` (on 64 vectors a cluster, if there are more), or ``"sample"``, vectors
            drawn at random; None: the first up to 1,024 clusters.
        start: centroids to begin from, instead of ``init``.

    Returns:
        The codebooks. An element that no importance decides stays as it began; all NaN where a
        problem has a NaN or infinite element. Entries repeat where there are fewer distinct vectors
        than clusters. On sharded vectors the codebook is replicated; rows are gathered a chunk at a
        time.

    Raises:
        ValueError: sizes or ``init`` out of range, shapes that do not fit.

    Example:
        >>> x = jnp.array([[0.0, 1.0], [0.0, 3.0], [9.0, 9.0]])
        >>> fit_vectors(x, 2, key=jax.random.key(0), start=x[1:]).round(3)
        Array([[0., 2.],
               [9., 9.]], dtype=float32)

    Source: Lloyd, "Least squares quantization in PCM", 1982; Linde, Buzo and Gray, "An algorithm
    for vector quantizer design", 1980 (splitting); Arthur and Vassilvitskii, "k-means++", 2007.
    """
    _check(x, clusters, importance)
    if clusters > x.shape[-2]:
        raise ValueError(f"{clusters} clusters for {x.shape[-2]} vectors: ask for fewer clusters")
    if iterations < 0:
        raise ValueError(f"iterations={iterations}: must be 0 or more")
    init = init or INITS[clusters > _PLUS_CLUSTERS]
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, not {init!r:.60}")
    if start is not None and start.shape != (*x.shape[:-2], clusters, x.shape[-1]):
        raise ValueError(
            f"start of shape {start.shape} does not fit {clusters} clusters of vectors {x.shape}"
        )
    fit = partial(_fit, clusters=clusters, iterations=iterations, init=init)
    return automatic(fit)(x, importance, key, start)


def nearest_vectors(
    x: Float[Array, "*batch n d"],
    codebook: Float[Array, "*batch clusters d"],
    importance: Float[Array, "*batch n d"] | None = None,
) -> UInt[Array, "*batch n"]:
    """The index of the codebook entry nearest to each vector.

    Args:
        x: vectors in rows, any floating dtype; compared in float32.
        codebook: as from :func:`fit_vectors`, one for each position of the leading axes.
        importance: what an error of each element costs, as there.

    Returns:
        Indices: uint8 up to 256 entries, uint16 above; the lowest of those equally near. Where mesh
        axes are explicit they are replicated.

    Raises:
        ValueError: shapes that do not fit, or no codebook of 1 to 65,536 entries.

    Example:
        >>> codebook = jnp.array([[0.0, 2.0], [9.0, 9.0]])
        >>> nearest_vectors(jnp.array([[1.0, 1.0], [8.0, 8.0]]), codebook)
        Array([0, 1], dtype=uint8)
    """
    _check(x, codebook.shape[-2], importance)
    if (*x.shape[:-2], x.shape[-1]) != (*codebook.shape[:-2], codebook.shape[-1]):
        raise ValueError(f"a codebook of shape {codebook.shape} does not fit vectors of {x.shape}")
    return automatic(_nearest)(x, codebook, importance)


@partial(jax.jit, static_argnames=("clusters", "iterations", "init"))
def _fit(
    x: Array, importance: Any, key: Array, start: Any, clusters: int, iterations: int, init: str
) -> Array:
    batch, (n, d) = x.shape[:-2], x.shape[-2:]
    flat = x.reshape(-1, n, d)
    weight = _weights(flat, importance)
    rows = _rows(n, clusters, len(flat))

    def one(x: Array, weight: Array, key: Array, start: Any) -> Array:
        x, center, exponent = _normalized(x.astype(jnp.float32))
        if start is None:
            begin = _start(x, weight, key, clusters, init)
        else:
            begin = jnp.ldexp(start.astype(jnp.float32), -exponent) - center
        found = _lloyd(x, weight, begin, rows, iterations)
        found = jnp.ldexp(found + center, exponent)
        return jnp.where(jnp.all(jnp.isfinite(x)), found, jnp.nan)

    start = None if start is None else start.reshape(-1, clusters, d)
    keys = jax.random.split(key, len(flat)) if len(flat) > 1 else key[None]
    return jax.vmap(one)(flat, weight, keys, start).reshape(*batch, clusters, d)


@jax.jit
def _nearest(x: Array, codebook: Array, importance: Any) -> Array:
    batch, (n, d) = x.shape[:-2], x.shape[-2:]
    clusters = codebook.shape[-2]
    flat = x.reshape(-1, n, d)
    weight = _weights(flat, importance)
    rows = _rows(n, clusters, len(flat))

    def one(x: Array, weight: Array, codebook: Array) -> Array:
        x, center, exponent = _normalized(x.astype(jnp.float32))
        codebook = jnp.ldexp(codebook.astype(jnp.float32), -exponent) - center
        search = lambda chunk: _assign(chunk[0], chunk[1], codebook)
        return lax.map(search, _chunks(rows, x, weight)).reshape(-1)[:n]

    dtype = jnp.uint8 if clusters <= 256 else jnp.uint16
    found = jax.vmap(one)(flat, weight, codebook.reshape(-1, clusters, d))
    return found.reshape(*batch, n).astype(dtype)


def _rows(n: int, clusters: int, problems: int) -> int:
    """Rows of a chunk: as many as keep the scores of all problems small."""
    return min(max(_SCORES // (clusters * problems), _LEAST_ROWS), n)


def _weights(flat: Array, importance: Any) -> Array:
    """``(problems, n, d)``, at most 1; ``(problems, n, 1)`` where every element counts the same."""
    if importance is None:
        return jnp.ones((*flat.shape[:2], 1), jnp.float32)
    weight = importance.reshape(flat.shape).astype(jnp.float32)
    top = weight.max((1, 2), keepdims=True)
    return weight / jnp.where(top > 0, top, 1)


def _normalized(x: Array) -> tuple[Array, Array, Array]:
    """Vectors around zero, of magnitude 2 at most: squares then cancel and overflow least."""
    _, exponent = jnp.frexp(jnp.abs(x).max())
    x = jnp.ldexp(x, -exponent)
    center = x.mean(0)
    return x - center, center, exponent


def _chunks(rows: int, x: Array, weight: Array) -> tuple[Array, Array]:
    """Both as ``(chunks, rows, ...)``; what fills up the last chunk weighs nothing."""
    pad = [(0, -len(x) % rows), (0, 0)]
    cut = lambda a: jnp.pad(a, pad).reshape(-1, rows, a.shape[-1])
    return cut(x), cut(weight)


def _assign(x: Array, weight: Array, codebook: Array) -> Array:
    """The nearest entry of each row of a chunk."""
    # Up to what does not depend on the entry, the distance is w c^2 - 2 w x c. Entries go along
    # rows, and the least is found before its place: several times faster than an argmin.
    product = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    squares = codebook * codebook
    if weight.shape[-1] == 1:
        scores = squares.sum(1)[:, None] - 2 * product(codebook, x.T)
    else:
        scores = product(squares, weight.T) - 2 * product(codebook, (weight * x).T)
    entry = np.arange(len(codebook), dtype=np.int32)[:, None]
    found = jnp.where(scores == scores.min(0), entry, len(codebook) - 1)
    return found.min(0)


def _lloyd(x: Array, weight: Array, start: Array, rows: int, iterations: int) -> Array:
    chunks = _chunks(rows, x, weight)

    def improve(carry: Any) -> Any:
        step, centroids, _ = carry
        mass, residual, spread = _sums(chunks, centroids)
        moved = centroids + residual / jnp.where(mass > 0, mass, 1)
        new = _split_costliest(moved, mass, residual, spread)
        return step + 1, new, jnp.abs(new - centroids).max() > _STILL

    def goes_on(carry: Any) -> Array:
        step, _, moved = carry
        return moved & (step < iterations)

    return lax.while_loop(goes_on, improve, (jnp.int32(0), start, jnp.array(True)))[1]


def _sums(chunks: tuple[Array, Array], centroids: Array) -> tuple[Array, Array, Array]:
    """Of each cluster: the weight of its members, and their residuals and these squared."""
    clusters, d = centroids.shape
    width = chunks[1].shape[-1]

    def add(sums: Any, chunk: Any) -> tuple[Any, None]:
        x, weight = chunk
        index = _assign(x, weight, centroids)
        # Residuals are small where the vectors are not: their sums lose next to nothing.
        residual = x - centroids.at[index].get(mode="promise_in_bounds")
        columns = [weight, weight * residual, weight * residual * residual]
        part = jax.ops.segment_sum(jnp.concatenate(columns, 1), index, clusters)
        return _compensated(sums[0], sums[1], part), None

    zeros = jnp.zeros((clusters, width + 2 * d), jnp.float32)
    (total, low), _ = lax.scan(add, (zeros, zeros), chunks)
    total = total + low
    return total[:, :width], total[:, width : width + d], total[:, width + d :]


def _compensated(total: Array, low: Array, part: Array) -> tuple[Array, Array]:
    """Add, and keep what rounding would lose (Knuth's two-sum)."""
    new = total + part
    back = new - total
    return new, low + ((total - (new - back)) + (part - back))


def _split_costliest(centroids: Array, mass: Array, residual: Array, spread: Array) -> Array:
    """Each empty cluster takes a place beside one of those that cost most."""
    clusters = len(centroids)
    if clusters == 1:
        return centroids
    spread = jnp.maximum(spread - residual * residual / jnp.where(mass > 0, mass, 1), 0)
    cost = spread.sum(1)
    floor = jnp.square(_STILL) * mass.sum(1)
    empty = mass.sum(1) == 0
    order = jnp.argsort(-jnp.where(empty, -1.0, cost))
    donor = order[jnp.minimum(jnp.cumsum(empty) - 1, clusters - 1)]
    axis = jnp.argmax(spread[donor], 1)
    along = np.arange(centroids.shape[1]) == axis[:, None]
    own = jnp.broadcast_to(mass, spread.shape)
    width = jnp.sqrt(spread / jnp.where(own > 0, own, 1))[donor]
    beside = centroids[donor] + jnp.where(along, width, 0)
    take = empty & (cost[donor] > floor[donor])
    return jnp.where(take[:, None], beside, centroids)


def _start(x: Array, weight: Array, key: Array, clusters: int, init: str) -> Array:
    """Vectors to begin from; those without weight come last."""
    n = len(x)
    draw, choose = jax.random.split(key)
    counts = weight.max(1) > 0
    if init == "sample" or n > _PLUS_SAMPLE * clusters:
        size = clusters if init == "sample" else _PLUS_SAMPLE * clusters
        order = jnp.argsort(jnp.where(counts, jax.random.uniform(draw, (n,)), 2.0))
        x, weight = x[order[:size]], weight[order[:size]]
    return x if init == "sample" else _plus_plus(x, weight, choose, clusters)


def _plus_plus(x: Array, weight: Array, key: Array, clusters: int) -> Array:
    """Vectors drawn one after another, by what those before them leave."""
    first, rest = jax.random.split(key)
    last = len(x) - 1

    def pick(chance: Array, uniform: Array) -> Array:
        below = jnp.cumsum(chance)
        # Up to 1 excluded: nothing without a chance is picked.
        return jnp.minimum(jnp.searchsorted(below, uniform * below[-1], side="right"), last)

    def distance(place: Array) -> Array:
        return (weight * jnp.square(x - x[place])).sum(1)

    def add(carry: Any, uniform: Array) -> tuple[Any, Array]:
        closest = carry
        place = pick(closest, uniform)
        return jnp.minimum(closest, distance(place)), place

    place = pick(weight.max(1), jax.random.uniform(first))
    uniforms = jax.random.uniform(rest, (clusters - 1,))
    _, places = lax.scan(add, distance(place), uniforms)
    return x[jnp.concatenate([place[None], places])]


def _check(x: Any, clusters: int, importance: Any) -> None:
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"x must be vectors in rows, (..., n, d), and not empty: {x.shape}")
    if not 1 <= clusters <= 1 << 16:
        raise ValueError(f"clusters={clusters}: a codebook has 1 to 65536 entries")
    if importance is not None and importance.shape != x.shape:
        raise ValueError(f"importance of shape {importance.shape} does not fit x of {x.shape}")
