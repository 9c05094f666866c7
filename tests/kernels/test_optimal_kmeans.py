"""The optimal 1-D k-means against exact solvers in float64, and the other starts."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.kernels import optimal_kmeans
from jaxcomp.kernels.kmeans import check_start, fit_codebook
from jaxcomp.kernels.weighted_points import weighted_points
from tests.kernels.test_kmeans import SAMPLERS, sample

SIZE = 500


def optimum(x: np.ndarray, weights: np.ndarray, clusters: int) -> float:
    """The least weighted inertia over all partitions into intervals, in O(K n²)."""
    order = np.argsort(x)
    x, w = np.asarray(x, np.float64)[order], np.asarray(weights, np.float64)[order]
    x = x - np.average(x, weights=w)
    mass, sums, squares = (np.append(0, np.cumsum(w * x**power)) for power in (0, 1, 2))
    between = lambda a: a[None, :] - a[:, None]
    with np.errstate(all="ignore"):
        cost = between(squares) - between(sums) ** 2 / between(mass)
    cost = np.where(between(mass) > 0, np.maximum(cost, 0), 0)
    cost[np.tril_indices(x.size + 1, -1)] = np.inf
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(0)
    return float(best[-1])


def inertia(x: np.ndarray, codebook: np.ndarray, weights: np.ndarray) -> float:
    x, entries = np.asarray(x, np.float64), np.sort(np.asarray(codebook, np.float64))
    index = np.searchsorted((entries[1:] + entries[:-1]) / 2, x)
    return float((weights * (x - entries[index]) ** 2).sum())


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_optimum_of_few_points(name):
    x = sample(name)
    found = inertia(x, fit_codebook(jnp.asarray(x), 16), np.ones(SIZE))
    assert found <= optimum(x, np.ones(SIZE), 16) * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["uniform", "heavy", "many zeros", "tiny"])
def test_the_optimum_of_weights_that_matter_unequally(kind):
    x, rng = sample("normal"), np.random.default_rng(5)
    importance = {
        "uniform": lambda: rng.random(SIZE),
        "heavy": lambda: np.exp(3 * rng.normal(size=SIZE)),
        "many zeros": lambda: rng.random(SIZE) * (rng.random(SIZE) < 0.3),
        "tiny": lambda: 1e-30 * rng.random(SIZE),
    }[kind]().astype(np.float32)
    codebook = fit_codebook(jnp.asarray(x), 16, importance=jnp.asarray(importance))
    weights = importance.astype(np.float64)
    weights /= weights.sum()
    assert inertia(x, codebook, weights) <= optimum(x, weights, 16) * (1 + 1e-5)


def test_importance_of_nothing_is_that_of_all_alike():
    x = jnp.asarray(sample("heavy"))
    for worth in (0.0, 7.0):
        codebook = fit_codebook(x, 16, importance=jnp.full(SIZE, worth))
        np.testing.assert_allclose(codebook, fit_codebook(x, 16), rtol=1e-6)


def test_counted_weights_that_matter_unequally():
    x, rng = sample("normal", 20_000), np.random.default_rng(6)
    importance = np.exp(2 * rng.normal(size=x.size)).astype(np.float32)
    importance[x < -1] = 0
    codebook = np.asarray(fit_codebook(jnp.asarray(x), 16, importance=jnp.asarray(importance)))
    assert codebook.min() > -1.01
    # A fifth of the points, drawn by importance, cannot be served better by an exact solver.
    order = np.argsort(x)
    bins = np.array_split(order, 1500)
    w = np.array([importance[part].sum() for part in bins], np.float64)
    kept = w > 0
    mean = [np.average(x[part], weights=importance[part] + 1e-30) for part in bins]
    mean = np.array(mean)[kept]
    found = inertia(mean, codebook, w[kept])
    assert found <= optimum(mean, w[kept], 16) * 1.001


def test_importance_must_fit():
    with pytest.raises(ValueError, match=r"importance of shapes \[\(3,\)\] does not fit"):
        fit_codebook(jnp.ones(4), 2, importance=jnp.ones(3))


def test_several_arrays_share_a_codebook():
    x = jnp.asarray(sample("normal"))
    np.testing.assert_array_equal(fit_codebook([x[:200], x[200:]], 16), fit_codebook(x, 16))


def test_fewer_active_clusters_leave_the_rest_empty():
    points = weighted_points(jnp.asarray(sample("normal")))
    found = np.asarray(optimal_kmeans.optimal_centroids(points, 16, jnp.int32(15)))
    assert np.isfinite(found[:15]).all()
    assert np.isinf(found[15])
    scaled = found[:15] * 2.0 ** (int(points.exponent) - 157)
    best = optimum(sample("normal"), np.ones(SIZE), 15)
    assert inertia(sample("normal"), scaled, np.ones(SIZE)) <= best * (1 + 1e-5)


def test_starts_matter():
    x = jnp.asarray(sample("heavy"))
    first = {
        start: np.asarray(fit_codebook(x, 16, iterations=0, start=start))
        for start in ("optimal", "companded", "linear", "density")
    }
    first["k-means++"] = np.asarray(
        fit_codebook(x, 16, iterations=0, start="k-means++", key=jax.random.key(0))
    )
    errors = {start: inertia(x, book, np.ones(SIZE)) for start, book in first.items()}
    assert len({round(error, 3) for error in errors.values()}) == 5
    assert min(errors, key=errors.__getitem__) == "optimal"
    # Evenly spaced centroids reach out to the large weights, which equal numbers leave out.
    assert np.abs(first["linear"]).max() > 2 * np.abs(first["density"]).max()
    np.testing.assert_allclose(np.diff(first["linear"]), np.diff(first["linear"])[0], rtol=1e-4)
    other = fit_codebook(x, 16, iterations=0, start="k-means++", key=jax.random.key(1))
    assert not np.array_equal(first["k-means++"], other)


def test_bad_starts():
    with pytest.raises(ValueError, match=r"start must be one of optimal, .*not 'random'"):
        check_start("random", 4)
    with pytest.raises(ValueError, match="up to 256 clusters, not 257"):
        check_start("optimal", 257)
    with pytest.raises(TypeError, match="give it a key"):
        check_start("k-means++", 4)
    with pytest.raises(ValueError, match="draws nothing"):
        check_start("linear", 4, jax.random.key(0))
    with pytest.raises(ValueError, match="1 to 256"):
        optimal_kmeans.optimal_centroids(weighted_points(jnp.ones(300)), 257, jnp.int32(1))


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [3, 16, 64, 256])
@pytest.mark.parametrize("name", ["normal", "heavy", "laplace", "skewed", "clumps", "pruned"])
def test_within_a_thousandth_of_another_solver(name, clusters):
    kmeans1d = pytest.importorskip("kmeans1d", reason="pip install kmeans1d")
    x = sample("normal" if name == "pruned" else name, 40_000)
    x = x[np.abs(x) > 1] if name == "pruned" else x
    theirs = np.array(kmeans1d.cluster(x.astype(np.float64), clusters).centroids)
    found = inertia(x, fit_codebook(jnp.asarray(x), clusters), np.ones(x.size))
    best = inertia(x, theirs, np.ones(x.size))
    print(f"{name} {clusters} {found / best:.6f}", file=sys.stderr)
    assert found <= 1.001 * best
