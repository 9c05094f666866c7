"""One-dimensional k-means against float64 references, a dynamic program, and hostile values."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.kernels import kmeans
from jaxcomp.kernels.kmeans import fit_codebook, nearest

# Compiling takes most of the time, and depends on the next power of two: tests share these.
SIZE, CLUSTERS = 500, 16
SAMPLERS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "offset": lambda rng, n: 100 + rng.normal(size=n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, size=n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "heavy": lambda rng, n: rng.standard_t(2, size=n),
    "skewed": lambda rng, n: np.exp(2 * rng.normal(size=n)),
    "bimodal": lambda rng, n: rng.choice([-10.0, 10.0], n) + rng.normal(size=n),
    "clumps": lambda rng, n: rng.choice(rng.normal(size=12), n) + 1e-3 * rng.normal(size=n),
}


def sample(name: str, n: int = SIZE, seed: int = 0) -> np.ndarray:
    return SAMPLERS[name](np.random.default_rng(seed), n).astype(np.float32)


def inertia(x: np.ndarray, codebook: np.ndarray) -> float:
    x, entries = np.asarray(x, np.float64).ravel(), np.sort(np.asarray(codebook, np.float64))
    index = np.searchsorted((entries[1:] + entries[:-1]) / 2, x)
    return float(((x - entries[index]) ** 2).sum())


def lloyd(x: np.ndarray, entries: np.ndarray, iterations: int) -> np.ndarray:
    """The textbook, in float64."""
    x, entries = np.asarray(x, np.float64), np.asarray(entries, np.float64)
    for _ in range(iterations):
        index = np.searchsorted((entries[1:] + entries[:-1]) / 2, x)
        counts = np.bincount(index, minlength=entries.size)
        sums = np.bincount(index, x, minlength=entries.size)
        entries = np.where(counts > 0, sums / np.maximum(counts, 1), entries)
    return entries


def optimum(x: np.ndarray, clusters: int) -> float:
    """The lowest inertia, by dynamic programming over all contiguous partitions."""
    x = np.sort(np.asarray(x, np.float64))
    x = x - x.mean()
    sums, squares = (np.concatenate([[0.0], np.cumsum(a)]) for a in (x, x * x))
    index = np.arange(x.size + 1)
    length = index[None, :] - index[:, None]
    spread = (sums[None, :] - sums[:, None]) ** 2 / np.maximum(length, 1)
    cost = np.where(length >= 0, squares[None, :] - squares[:, None] - spread, np.inf)
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(0)
    return float(best[-1])


@pytest.mark.parametrize("name", ["normal", "offset", "uniform"])
def test_steps_are_lloyds(name):
    x = sample(name)
    start = fit_codebook(jnp.asarray(x), CLUSTERS, iterations=0, start="companded")
    ours = fit_codebook(jnp.asarray(x), CLUSTERS, iterations=4, start="companded")
    np.testing.assert_allclose(ours, lloyd(x, start, 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_near_the_optimum(name):
    x = sample(name)
    codebook = fit_codebook(jnp.asarray(x), CLUSTERS)
    assert inertia(x, codebook) <= 1.08 * optimum(x, CLUSTERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_better_than_a_uniform_quantizer_and_with_more_clusters(name):
    x = sample(name)
    inertias = []
    for clusters in (4, CLUSTERS, 64):
        codebook = np.asarray(fit_codebook(jnp.asarray(x), clusters), np.float64)
        step = (x.max() - x.min()) / clusters
        uniform = x.min() + step * (np.arange(clusters) + 0.5)
        assert inertia(x, codebook) <= inertia(x, uniform)
        assert (np.diff(codebook) > 0).all()
        assert x.min() <= codebook[0]
        assert codebook[-1] <= x.max()
        inertias.append(inertia(x, codebook))
    assert inertias == sorted(inertias, reverse=True)


@pytest.mark.parametrize("name", SAMPLERS)
def test_better_than_the_textbook_from_the_same_start(name):
    x = sample(name)
    start = fit_codebook(jnp.asarray(x), CLUSTERS, iterations=0, start="companded")
    ours = fit_codebook(jnp.asarray(x), CLUSTERS, start="companded")
    assert inertia(x, ours) <= 1.02 * inertia(x, lloyd(x, start, 50))
    assert inertia(x, ours) < inertia(x, start)


def test_means_of_millions_of_weights_far_from_zero():
    rng = np.random.default_rng(0)
    clump = rng.integers(0, 4, 1 << 22)
    x = (np.array([1000.0, 1001.0, 1010.0, 1500.0])[clump]).astype(np.float32)
    x += (0.01 * rng.normal(size=x.size)).astype(np.float32)
    means = np.bincount(clump, x.astype(np.float64)) / np.bincount(clump)
    np.testing.assert_allclose(fit_codebook(jnp.asarray(x), 4), means, rtol=2e-7)


# Max, "Quantizing for minimum distortion", 1960, table I: the least mean squared error.
@pytest.mark.parametrize(("clusters", "error"), [(4, 0.1175), (16, 0.009497)])
def test_the_published_optimum_on_a_normal_density(clusters, error):
    x = sample("normal", 1 << 20)
    codebook = fit_codebook(jnp.asarray(x), clusters)
    assert inertia(x, codebook) / (x.size * x.var(dtype=np.float64)) == pytest.approx(
        error, rel=0.005
    )


def test_many_clusters_against_the_textbook():
    x = sample("normal", 1 << 18)
    start = fit_codebook(jnp.asarray(x), 256, iterations=0, start="companded")
    ours = fit_codebook(jnp.asarray(x), 256, start="companded")
    assert inertia(x, ours) <= 1.005 * inertia(x, lloyd(x, start, 50))
    # The asymptotic best on a normal density, Panter and Dite, 1951.
    assert inertia(x, ours) <= np.sqrt(3) * np.pi / 2 * x.size / 256**2


@pytest.mark.parametrize("outlier", [1e3, -1e3, 1e12, 1e30])
def test_one_outlier_takes_one_entry(outlier):
    x = sample("normal")
    spoilt = np.append(x[:-1], np.float32(outlier))
    codebook = np.asarray(fit_codebook(jnp.asarray(spoilt), CLUSTERS))
    assert np.float32(outlier) in codebook
    without = inertia(x[:-1], fit_codebook(jnp.asarray(x), CLUSTERS - 1))
    assert inertia(x[:-1], codebook[codebook != np.float32(outlier)]) <= 1.1 * without


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.9, 0.995])
def test_zeros_are_pinned_and_left_out(fraction):
    rng = np.random.default_rng(3)
    x = sample("normal")
    x[rng.random(SIZE) < fraction] = 0
    x[0], x[1] = 0.0, -0.0
    codebook = np.asarray(fit_codebook(jnp.asarray(x), CLUSTERS))
    assert codebook[0] == 0
    assert (np.diff(codebook[1:]) >= 0).all()
    kept = x[x != 0]
    others = fit_codebook(jnp.asarray(kept), min(CLUSTERS - 1, kept.size))
    assert inertia(kept, codebook[1:]) <= 1.05 * inertia(kept, others) + 1e-9
    index = np.asarray(nearest(jnp.asarray(x), jnp.asarray(codebook)))
    np.testing.assert_array_equal(index == 0, x == 0)


def test_zeros_are_values_like_any_other_without_pinning():
    x = np.append(np.zeros(30, np.float32), sample("normal", SIZE - 30))
    codebook = fit_codebook(jnp.asarray(x), CLUSTERS, pin_zero=False)
    assert (np.diff(np.asarray(codebook)) > 0).all()
    assert inertia(x, codebook) <= 1.10 * optimum(x, CLUSTERS)


def test_one_entry_is_zero_if_zero_is_pinned():
    x = jnp.array([0.0, 1.0, 2.0])
    np.testing.assert_array_equal(fit_codebook(x, 1), [0.0])
    np.testing.assert_array_equal(fit_codebook(x, 1, pin_zero=False), [1.0])
    np.testing.assert_array_equal(nearest(x, jnp.zeros(1)), [0, 0, 0])


def test_a_leading_zero_always_means_pinned():
    x = jnp.array([-1.0, 1.0, 10.0, 10.0])
    codebook = fit_codebook(x, 2)
    assert 0 < codebook[0] < 1e-30
    np.testing.assert_array_equal(nearest(x, codebook), [0, 0, 1, 1])
    np.testing.assert_array_equal(fit_codebook(x, 2, pin_zero=False), [0.0, 10.0])


def test_fewer_distinct_values_than_clusters():
    values = np.array([-3.0, -0.1, 0.3, 7.0, 7.5], np.float32)
    x = jnp.asarray(np.random.default_rng(0).choice(values, SIZE))
    codebook = fit_codebook(x, CLUSTERS)
    np.testing.assert_array_equal(np.unique(codebook), values)
    np.testing.assert_array_equal(codebook[nearest(x, codebook)], x)
    pinned = fit_codebook(x.at[0].set(0.0), CLUSTERS)
    assert pinned[0] == 0
    np.testing.assert_array_equal(np.unique(pinned[1:]), values)


def test_a_shared_tensor_keeps_its_codebook():
    x = jnp.asarray(sample("heavy"))
    codebook = fit_codebook(x, CLUSTERS)
    shared = codebook[nearest(x, codebook)]
    np.testing.assert_array_equal(fit_codebook(shared, CLUSTERS), codebook)


@pytest.mark.parametrize("size", [7, SIZE, 3_000_000])
@pytest.mark.parametrize("value", [0.1, -33.3, 1e-37, 3.4e38])
def test_all_equal(size, value):
    value = np.float32(value)
    np.testing.assert_array_equal(fit_codebook(jnp.full(size, value), 4), np.full(4, value))


def test_all_zero():
    for pin_zero in (True, False):
        codebook = fit_codebook(jnp.zeros((3, 5)), 4, pin_zero=pin_zero)
        np.testing.assert_array_equal(codebook, np.zeros(4))
    assert (nearest(jnp.zeros((3, 5)), jnp.zeros(4)) == 0).all()


def test_extreme_magnitudes():
    huge = np.array([-3.4e38, -3.2e38, 3.3e38, 1e38, 1.0, 2.0], np.float32)
    codebook = fit_codebook(jnp.asarray(huge), 4)
    np.testing.assert_allclose(codebook, [-3.3e38, 1.5, 1e38, 3.3e38], rtol=1e-6)
    # Subnormal weights are weights: not zeros, though their entries may be flushed.
    tiny = jnp.array([0.0, 1e-42, -1e-42, 1e-40, 1.0])
    codebook = fit_codebook(tiny, 4)
    assert np.isfinite(codebook).all()
    np.testing.assert_array_equal(np.asarray(nearest(tiny, codebook)) == 0, [1, 0, 0, 0, 0])
    codebook = fit_codebook(tiny[1:4], 2)
    assert np.abs(codebook).max() < 1.2e-38
    smallest = jnp.array([2e-38, -2e-38, 1e-45, -1e-45])
    np.testing.assert_array_equal(nearest(smallest, jnp.array([-3e-38, 3e-38])), [1, 0, 1, 0])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_not_finite_makes_the_codebook_nan(bad):
    x = jnp.asarray(np.append(sample("normal", SIZE - 1), np.float32(bad)))
    assert np.isnan(fit_codebook(x, CLUSTERS)).all()


def test_errors():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"clusters=7 is more than the 6 weights .*fewer clusters"):
        fit_codebook(x, 7)
    with pytest.raises(ValueError, match="more than the 0 weights"):
        fit_codebook(jnp.ones((0, 3)), 1)
    for clusters in (0, -1, 65537):
        with pytest.raises(ValueError, match="1 to 65536"):
            fit_codebook(x, clusters)
    with pytest.raises(ValueError, match="iterations=-1"):
        fit_codebook(x, 2, iterations=-1)
    with pytest.raises(ValueError, match="1 to 65536"):
        nearest(x, jnp.zeros(0))
    huge = jax.ShapeDtypeStruct((1 << 16, 1 << 15), jnp.float32)
    with pytest.raises(ValueError, match="pass blocks"):
        jax.eval_shape(lambda x: fit_codebook(x, 2), huge)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


def test_entries_lie_among_the_weights_however_far_apart_these_are():
    x = np.full(40, 1.9069884e-28, np.float32)
    x[0] = 2.1990233e12
    codebook = np.asarray(fit_codebook(jnp.asarray(x), CLUSTERS))
    assert codebook.min() == x[1]
    assert codebook.max() == x[0]


@given(hnp.arrays(np.float32, 40, elements=finite))
def test_any_finite_values_give_a_sound_codebook(x):
    codebook = np.asarray(fit_codebook(jnp.asarray(x), CLUSTERS))
    assert np.isfinite(codebook).all()
    pinned = (x == 0).any()
    assert (codebook[0] == 0) == pinned
    entries, kept = (codebook[1:], x[x != 0]) if pinned else (codebook, x)
    assert (np.diff(entries) >= 0).all()
    if kept.size:
        assert entries.min() >= kept.min() - 2e-38
        assert entries.max() <= kept.max() + 2e-38
    index = np.asarray(nearest(jnp.asarray(x), jnp.asarray(codebook)))
    np.testing.assert_array_equal((index == 0) & pinned, (x == 0) & pinned)


@given(hnp.arrays(np.float32, 40, elements=moderate), st.randoms(use_true_random=False))
def test_order_does_not_matter(x, random):
    shuffled = x.copy()
    random.shuffle(shuffled)
    fit = lambda x: np.asarray(fit_codebook(jnp.asarray(x), CLUSTERS))
    np.testing.assert_array_equal(fit(shuffled.reshape(40)), fit(x))


@given(st.integers(-40, 40))
def test_scales_with_powers_of_two(k):
    x = sample("normal")
    codebook = np.asarray(fit_codebook(jnp.asarray(x), CLUSTERS))
    scaled = fit_codebook(jnp.asarray(x * np.float32(2.0**k)), CLUSTERS)
    np.testing.assert_allclose(scaled, codebook * np.float32(2.0**k), rtol=1e-6)


@given(
    hnp.arrays(np.float32, 40, elements=finite),
    hnp.arrays(np.float32, 6, elements=finite),
    st.booleans(),
    st.booleans(),
)
def test_nearest_is_nearest(x, codebook, zero_entry, pin_zero):
    codebook.sort()
    if zero_entry:
        codebook[0] = 0.0
        codebook[1:].sort()
    pinned = codebook[0] == 0 and pin_zero
    if not pinned:
        codebook.sort()
        pinned = codebook[0] == 0 and pin_zero
    index = np.asarray(nearest(jnp.asarray(x), jnp.asarray(codebook), pin_zero=pin_zero))
    assert index.dtype == np.uint8
    distance = np.abs(x[:, None].astype(np.float64) - codebook.astype(np.float64))
    if pinned:
        distance[x != 0, 0] = np.inf
        distance[x == 0, 1:] = np.inf
    chosen = np.take_along_axis(distance, index[:, None].astype(int), 1)[:, 0]
    # A midpoint is rounded to a float32.
    slack = 1e-6 * np.maximum(np.abs(x), np.abs(codebook[index])).astype(np.float64) + 2e-38
    assert (chosen <= distance.min(1) + slack).all()


def test_ties_go_to_the_lower_index():
    codebook = jnp.array([-2.0, 0.0, 1.0, 3.0])
    x = jnp.array([-1.0, 0.5, 2.0, -0.0, 0.0])
    np.testing.assert_array_equal(nearest(x, codebook), [0, 1, 2, 1, 1])
    np.testing.assert_array_equal(nearest(x, jnp.array([-1.0, 1.0])), [0, 1, 1, 0, 0])


@pytest.mark.parametrize(
    ("clusters", "dtype"), [(256, np.uint8), (257, np.uint16), (5000, np.uint16)]
)
def test_large_codebooks_match_a_binary_search(clusters, dtype):
    x = jnp.asarray(sample("heavy", 200_000).reshape(400, 500))
    codebook = jnp.sort(jnp.asarray(sample("heavy", clusters, seed=1)))
    middle = np.asarray(codebook[:-1] / 2 + codebook[1:] / 2)
    index = nearest(x, codebook)
    assert index.dtype == dtype
    np.testing.assert_array_equal(index, np.searchsorted(middle, np.asarray(x)))
    close = jnp.asarray(100 + np.arange(clusters, dtype=np.float32) * 1e-4)  # few leading bits
    y = 100 + x * 0.1
    middle = np.asarray(close[:-1] / 2 + close[1:] / 2)
    np.testing.assert_array_equal(nearest(y, close), np.searchsorted(middle, np.asarray(y)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_computed_in_float32(dtype):
    x = jnp.asarray(sample("normal"), dtype)
    codebook = fit_codebook(x, CLUSTERS)
    assert codebook.dtype == jnp.float32
    np.testing.assert_array_equal(codebook, fit_codebook(x.astype(jnp.float32), CLUSTERS))
    np.testing.assert_array_equal(nearest(x, codebook), nearest(x.astype(jnp.float32), codebook))


def test_wide_dtypes():
    with jax.enable_x64(True):
        x = jnp.asarray(sample("normal"))
        codebook = fit_codebook(x.astype(jnp.float64), CLUSTERS)
        index = nearest(x.astype(jnp.float64), codebook)
        assert codebook.dtype == jnp.float32
        assert index.dtype == jnp.uint8
    np.testing.assert_array_equal(codebook, fit_codebook(jnp.asarray(sample("normal")), CLUSTERS))


def test_jit_vmap_scan_and_no_recompilation():
    x = jnp.asarray(np.stack([sample(name, 300) for name in ("normal", "offset", "heavy")]))
    x = x.at[1, :150].set(0.0)
    loop = [fit_codebook(row, CLUSTERS) for row in x]
    indices = [nearest(row, codebook) for row, codebook in zip(x, loop, strict=True)]
    compiled = kmeans._fit._cache_size(), kmeans._nearest._cache_size()
    nearest(x[0] + 1, fit_codebook(x[0] + 1, CLUSTERS))
    assert (kmeans._fit._cache_size(), kmeans._nearest._cache_size()) == compiled

    def both(row):
        codebook = fit_codebook(row, CLUSTERS)
        return codebook, nearest(row, codebook)

    for batched in (jax.vmap(both)(x), jax.lax.scan(lambda _, row: (0, both(row)), 0, x)[1]):
        np.testing.assert_array_equal(batched[0], np.stack(loop))
        np.testing.assert_array_equal(batched[1], np.stack(indices))


def test_no_gradient_flows_through_the_fit():
    x = jnp.asarray(sample("normal", 300))

    def loss(x, scale):
        codebook = scale * fit_codebook(x, CLUSTERS)
        return jnp.sum((x - codebook[nearest(x, codebook)]) ** 2)

    codebook = fit_codebook(x, CLUSTERS)
    direct = 2 * (x - codebook[nearest(x, codebook)])
    gradient, by_scale = jax.grad(loss, (0, 1))(x, 1.0)
    np.testing.assert_allclose(gradient, direct, rtol=1e-6)
    assert abs(by_scale) < 1e-3  # the scale is already the best


@pytest.mark.parametrize(
    ("kind", "spec"),
    [(AxisType.Auto, P("a", "b")), (AxisType.Explicit, P(None, ("b", "a")))],
)
def test_sharded_is_bit_identical_and_gathers_nothing(kind, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    x = sample("heavy", 1 << 15).reshape(128, 256)
    x[:, ::3] = 0
    codebook = fit_codebook(jnp.asarray(x), CLUSTERS)
    index = nearest(jnp.asarray(x), codebook)

    def both(x):
        codebook = fit_codebook(x, CLUSTERS)
        return codebook, nearest(x, codebook)

    placed = jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        program = jax.jit(both).lower(placed).compile()
        results = [program(placed)]
        if kind == AxisType.Explicit:
            results.append(both(placed))
    for sharded, sharded_index in results:
        np.testing.assert_array_equal(sharded, codebook)
        np.testing.assert_array_equal(sharded_index, index)
        assert sharded_index.sharding.is_equivalent_to(placed.sharding, 2)
    collective = r"\b(all-[a-z]+|collective-[a-z]+|reduce-scatter|ragged-[a-z-]+)\("
    assert set(re.findall(collective, program.as_text())) == {"all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [16, 256])
def test_lower_inertia_than_scikit_learn(clusters):
    cluster = pytest.importorskip("sklearn.cluster")
    x = sample("normal", 1_000_000)
    theirs = cluster.KMeans(clusters, n_init=1, random_state=0).fit(x[:, None]).cluster_centers_
    assert inertia(x, fit_codebook(jnp.asarray(x), clusters)) < inertia(x, theirs.ravel())
