"""Where Lloyd's algorithm may begin: centroids for weighted points, before its first step.

Each start takes ``(points, clusters, active, key)`` and gives ascending centroids, scaled as the
points; from ``active`` on, of which there are at most ``clusters`` and which may be traced, they
are inf and stay empty.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxcomp.kernels.optimal_kmeans import optimal_centroids
from jaxcomp.kernels.weighted_points import WeightedPoints, running

Start = Callable[[WeightedPoints, int, Array, Any], Array]


def optimal(points: WeightedPoints, clusters: int, active: Array, key: Any) -> Array:
    """The optimum itself: see :func:`jaxcomp.kernels.optimal_kmeans.optimal_centroids`."""
    del key
    return optimal_centroids(points, clusters, active)


def companded(points: WeightedPoints, clusters: int, active: Array, key: Any) -> Array:
    """Centroids at equal mass of density^(1/3) (Panter and Dite, 1951)."""
    del key
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
    return _ended(values[jnp.minimum(place, points.distinct - 1)], active)


def linear(points: WeightedPoints, clusters: int, active: Array, key: Any) -> Array:
    """Centroids evenly spaced over the range of the values (Han et al., 2016, section 3.2)."""
    del key
    entry = np.arange(clusters, dtype=np.int32)
    low, high = points.values[0], points.values[points.distinct - 1]
    return _ended(low + (high - low) * ((entry + np.float32(0.5)) / active), active)


def density(points: WeightedPoints, clusters: int, active: Array, key: Any) -> Array:
    """Centroids at equal numbers of weights (Han et al., 2016, section 3.2)."""
    del key
    entry = np.arange(clusters, dtype=np.int32)
    total = points.counts_before[points.distinct].astype(jnp.float32)
    before = jnp.minimum(points.counts_before[1:].astype(jnp.float32), total)
    place = jnp.searchsorted(before, (entry + np.float32(0.5)) / active * total)
    return _ended(points.values[jnp.minimum(place, points.distinct - 1)], active)


def plus_plus(points: WeightedPoints, clusters: int, active: Array, key: Any) -> Array:
    """Points drawn one after the other, by their squared distance to those drawn before.

    Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007.
    """
    inside = np.arange(points.values.shape[0]) < points.distinct
    # Relative to the range, so that squares neither overflow nor vanish.
    spread = jnp.maximum(points.values[points.distinct - 1] - points.values[0], 1e-30)
    values = jnp.where(inside, (points.values - points.values[0]) / spread, 0.0)
    mass = jnp.where(inside, jnp.diff(points.counts_before).astype(jnp.float32), 0.0)

    def draw(squared: Array, key: Array) -> tuple[Array, Array]:
        reached = running(jnp.add, mass * squared)
        mark = jax.random.uniform(key) * reached[-1]
        place = jnp.minimum(jnp.searchsorted(reached, mark, side="right"), points.distinct - 1)
        return jnp.minimum(squared, (values - values[place]) ** 2), points.values[place]

    _, drawn = lax.scan(draw, jnp.ones_like(values), jax.random.split(key, clusters))
    return jnp.sort(_ended(drawn, active))


def _ended(centroids: Array, active: Array) -> Array:
    return jnp.where(np.arange(centroids.shape[0]) < active, centroids, jnp.inf)


STARTS: dict[str, Start] = {
    "optimal": optimal,
    "companded": companded,
    "linear": linear,
    "density": density,
    "k-means++": plus_plus,
}
