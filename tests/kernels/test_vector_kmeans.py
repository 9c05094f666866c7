"""K-means of vectors against scikit-learn, float64 references and hostile values."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.cluster import KMeans

from jaxcomp.kernels import vector_kmeans
from jaxcomp.kernels.vector_kmeans import fit_vectors, nearest_vectors

# Compiling takes most of the time: tests share these sizes.
N, D, K = 400, 4, 12
KEY = jax.random.key(0)


def sample(seed=0, n=N, d=D):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) * np.linspace(0.5, 2, d) + 3).astype(np.float32)


def costs(x, book, weight=None):
    """Of each vector and entry, in float64."""
    x, book = np.asarray(x, np.float64), np.asarray(book, np.float64)
    weight = np.ones_like(x) if weight is None else np.asarray(weight, np.float64)
    return (weight[:, None] * (x[:, None] - book) ** 2).sum(-1)


def lloyd(x, book, weight, iterations):
    """The textbook, in float64."""
    x, book, weight = (np.asarray(a, np.float64) for a in (x, book, weight))
    for _ in range(iterations):
        index = costs(x, book, weight).argmin(1)
        for k in set(index):
            mine = index == k
            book[k] = (weight[mine] * x[mine]).sum(0) / weight[mine].sum(0)
    return book


def fit(x, *, start=None, importance=None, clusters=K, iterations=25, **options):
    x, start, importance = (None if a is None else jnp.asarray(a) for a in (x, start, importance))
    found = fit_vectors(
        x,
        clusters,
        key=KEY,
        start=start,
        importance=importance,
        iterations=iterations,
        **options,
    )
    return np.asarray(found)


def test_same_start_gives_the_centroids_of_scikit_learn():
    x = sample()
    book = fit(x, start=x[:K], iterations=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = KMeans(K, init=x[:K].astype(np.float64), n_init=1, max_iter=10, tol=0)
        model.fit(x.astype(np.float64))
    np.testing.assert_allclose(book, model.cluster_centers_, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(costs(x, book).min(1).sum(), model.inertia_, rtol=1e-5)


@pytest.mark.parametrize("init", vector_kmeans.INITS)
def test_inertia_is_within_a_few_percent_of_scikit_learn(init):
    x = sample()
    model = KMeans(K, n_init=1, random_state=0).fit(x)
    assert costs(x, fit(x, init=init)).min(1).sum() < 1.05 * model.inertia_


def test_weighted_fit_is_that_of_a_float64_reference():
    x = sample()
    weight = np.random.default_rng(1).uniform(0.1, 10, x.shape).astype(np.float32)
    book = fit(x, start=x[:K], importance=weight, iterations=10)
    np.testing.assert_allclose(book, lloyd(x, x[:K], weight, 10), rtol=1e-5, atol=1e-5)
    index = nearest_vectors(jnp.asarray(x), jnp.asarray(book), jnp.asarray(weight))
    np.testing.assert_array_equal(index, costs(x, book, weight).argmin(1))


def test_weights_of_one_are_no_weights():
    x = sample()
    plain = fit(x, start=x[:K], iterations=10)
    weighted = fit(x, start=x[:K], importance=np.full_like(x, 7), iterations=10)
    np.testing.assert_allclose(weighted, plain, rtol=1e-6, atol=1e-6)


def test_vectors_without_importance_do_not_count():
    x, weight = sample(), np.ones((N, D), np.float32)
    x[300:], weight[300:] = 1e3, 0
    for init in vector_kmeans.INITS:
        assert fit(x, importance=weight, init=init).max() < 20


def test_problems_along_leading_axes_are_fitted_alone():
    stack = np.stack([sample(0), 100 * sample(1)])
    book = fit(stack, start=stack[:, :K], iterations=10)
    for x, one in zip(stack, book, strict=True):
        alone = fit(x, start=x[:K], iterations=10)
        np.testing.assert_allclose(one, alone, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    x = (sample() * np.float32(scale)).astype(np.float32)
    book = fit(x, start=x[:K], iterations=10)
    want = fit(sample(), start=sample()[:K], iterations=10)
    np.testing.assert_allclose(book / np.float32(scale), want, rtol=1e-4)


def test_empty_clusters_are_seeded_anew():
    x = sample()
    start = np.repeat(x[:1], K, 0)
    book = fit(x, start=start)
    assert len(set(costs(x, book).argmin(1))) == K
    assert costs(x, book).min(1).sum() < 1.1 * costs(x, fit(x)).min(1).sum()


def test_fewer_distinct_vectors_than_clusters_are_kept_exactly():
    few = sample(n=5)
    x = few[np.arange(N) % 5]
    for init in vector_kmeans.INITS:
        assert costs(x, fit(x, init=init)).min(1).max() < 1e-10
    same = np.full_like(x, 0.3)
    np.testing.assert_array_equal(fit(same), np.full((K, D), np.float32(0.3)))


def test_one_cluster_is_the_mean():
    x = sample()
    np.testing.assert_allclose(fit(x, clusters=1)[0], x.astype(np.float64).mean(0), rtol=1e-6)


def test_nan_is_not_hidden():
    x = sample()
    x[3, 1] = np.nan
    assert np.isnan(fit(x)).all()


@pytest.mark.parametrize(
    ("n", "d", "clusters", "weighted"), [(1 << 16, 8, 256, True), (1 << 17, 4, 65536, False)]
)
def test_no_array_of_vectors_times_clusters(n, d, clusters, weighted):
    x = jax.ShapeDtypeStruct((n, d), jnp.float32)
    start = jax.ShapeDtypeStruct((clusters, d), jnp.float32)
    lowered = vector_kmeans._fit.lower(
        x, x if weighted else None, KEY, start, clusters=clusters, iterations=9, init="sample"
    )
    memory = lowered.compile().memory_analysis()
    # Copies of the vectors and of the sums of clusters, and a chunk of scores.
    bound = 16 * (n * d + clusters * (3 * d + 1)) * 4 + (64 << 20)
    assert memory.temp_size_in_bytes < min(bound, n * clusters * 4 / 4)


def test_refuses_what_does_not_fit():
    x = jnp.asarray(sample())
    for options, words in [
        (dict(clusters=N + 1), "clusters for"),
        (dict(clusters=0), "1 to 65536"),
        (dict(clusters=2, iterations=-1), "iterations"),
        (dict(clusters=2, init="best"), "init must be"),
        (dict(clusters=2, start=x), "start of shape"),
        (dict(clusters=2, importance=x[1:]), "importance of shape"),
    ]:
        with pytest.raises(ValueError, match=words):
            fit_vectors(x, key=KEY, **options)
    with pytest.raises(ValueError, match="not empty"):
        fit_vectors(x[:0], 1, key=KEY)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_vectors_give_the_same(kind):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    x = sample()
    placed = jax.device_put(x, NamedSharding(mesh, P("x")))
    want = fit(x, start=x[:K], iterations=10)
    book = fit_vectors(placed, K, key=KEY, start=jnp.asarray(x[:K]), iterations=10)
    np.testing.assert_allclose(book, want, rtol=1e-5)
