"""Points that stand for an array's values: nothing lost, nothing mixed, nothing drifted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp.kernels import weighted_points as module
from jaxcomp.kernels.weighted_points import WeightedPoints, weighted_points

LARGE = 20_000  # counted in bins; smaller arrays are sorted
SAMPLERS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "offset": lambda rng, n: 100 + rng.normal(size=n),
    "far offset": lambda rng, n: -1e4 + rng.normal(size=n),
    "heavy": lambda rng, n: rng.standard_cauchy(size=n),
    "skewed": lambda rng, n: np.exp(8 * rng.normal(size=n)),
    "tiny": lambda rng, n: 1e-42 * rng.normal(size=n),
    "few": lambda rng, n: rng.choice([-1.5, 0.0, 0.25, 3e8], n),
}


def sample(name: str, n: int = LARGE) -> np.ndarray:
    return SAMPLERS[name](np.random.default_rng(0), n).astype(np.float32)


def unscaled(points: WeightedPoints) -> tuple[np.ndarray, np.ndarray]:
    """The values in float64 and the counts; everything behind them is padding."""
    distinct = int(points.distinct)
    values = np.asarray(points.values, np.float64)
    assert np.isinf(values[distinct:]).all()
    counts = np.diff(np.asarray(points.counts_before, np.int64)[: distinct + 1])
    return values[:distinct] * 2.0 ** (int(points.exponent) - 157), counts


@pytest.mark.parametrize("keep_zeros", [True, False])
@pytest.mark.parametrize("n", [300, LARGE])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_weight_is_in_one_point(name, n, keep_zeros):
    x = sample(name, n)
    x[: n // 10] = 0
    x[0] = -0.0
    points = weighted_points(jnp.asarray(x), keep_zeros=keep_zeros)
    values, counts = unscaled(points)
    kept = np.sort(x if keep_zeros else x[x != 0]).astype(np.float64)
    assert points.zeros == (x == 0).sum()
    assert counts.sum() == kept.size
    assert (counts > 0).all()
    assert (np.diff(values) > 0).all()
    # Each point takes the next of the sorted weights.
    begin = np.cumsum(counts) - counts
    means = np.add.reduceat(kept, begin) / counts
    np.testing.assert_allclose(values, means, rtol=3e-7)
    if keep_zeros:
        assert counts[values == 0] == [(x == 0).sum()]
    if n == 300 or name == "few":
        np.testing.assert_array_equal(values, np.unique(kept))
    else:
        # Bins are narrow: for 16 clusters, what is lost in them is nothing.
        low, high = np.quantile(kept, [0.01, 0.99])
        inside = (values > low) & (values < high)
        assert inside.sum() > 300
    sums = np.diff(np.asarray(points.sum_before, np.float64)[: counts.size + 1])
    sums += np.diff(np.asarray(points.sum_before_low, np.float64)[: counts.size + 1])
    scale = 2.0 ** (int(points.exponent) - 157)
    np.testing.assert_allclose(
        sums * scale, values * counts, rtol=2e-7, atol=1e-12 * x.size * np.abs(x).max()
    )


def test_sums_of_millions_do_not_drift():
    rng = np.random.default_rng(0)
    x = (1000 + rng.normal(size=1 << 22)).astype(np.float32)
    points = weighted_points(jnp.asarray(x))
    scale = 2.0 ** (int(points.exponent) - 157)
    total = sum(float(a[int(points.distinct)]) for a in (points.sum_before, points.sum_before_low))
    np.testing.assert_allclose(total * scale, x.sum(dtype=np.float64), rtol=1e-8)
    values, counts = unscaled(points)
    np.testing.assert_allclose(values @ counts, x.sum(dtype=np.float64), rtol=1e-8)
    # A float32 sum would be off by more than this: the test can fail.
    assert abs(np.cumsum(x)[-1] / x.sum(dtype=np.float64) - 1) > 1e-6


@pytest.mark.parametrize("size", [5, 1 << 14, (1 << 14) + 1, 1 << 20])
def test_integer_sums_cannot_overflow(size):
    # All weights at the edges of their coarse bins.
    x = np.full(size, np.nextafter(np.float32(2), np.float32(0)))
    x[: size // 2] = -1.0
    values, counts = unscaled(weighted_points(jnp.asarray(x)))
    np.testing.assert_array_equal(values, np.unique(x))
    np.testing.assert_array_equal(counts, [size // 2, size - size // 2])


def test_coarser_units_for_billions_of_weights():
    x = jnp.asarray(sample("normal"))
    fine, coarse = (weighted_points(x, drop=drop) for drop in (0, 5))
    np.testing.assert_array_equal(fine.counts_before, coarse.counts_before)
    kept = int(fine.distinct)
    np.testing.assert_allclose(fine.values[:kept], coarse.values[:kept], rtol=3e-6)
    assert (fine.values != coarse.values).any()


@pytest.mark.parametrize("n", [300, LARGE])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_not_finite_shows_in_the_exponent(bad, n):
    x = sample("normal", n)
    assert weighted_points(jnp.asarray(x)).exponent < 255
    x[7] = bad
    assert weighted_points(jnp.asarray(x)).exponent == 255


@pytest.mark.parametrize("n", [300, LARGE])
def test_order_does_not_matter(n):
    x = sample("heavy", n)
    shuffled = np.random.default_rng(1).permutation(x)
    points, others = (weighted_points(jnp.asarray(a)) for a in (x, shuffled.reshape(10, -1)))
    for ours, theirs in zip(points, others, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_errors():
    with pytest.raises(ValueError, match=r"0 elements \(shape \(0, 3\)\)"):
        weighted_points(jnp.zeros((0, 3)))
    huge = jax.ShapeDtypeStruct((1 << 16, 1 << 15), jnp.float32)
    with pytest.raises(ValueError, match="pass blocks of"):
        jax.eval_shape(weighted_points, huge)


floats = st.floats(width=32, allow_nan=False)


@given(hnp.arrays(np.float32, 30, elements=floats))
def test_keys_are_ordered_as_floats(x):
    key = np.asarray(module.ordered(jnp.asarray(x)))
    np.testing.assert_array_equal(key[:, None] < key, x[:, None] < x)
    np.testing.assert_array_equal(key == 0, x == 0)


@given(st.integers(-300, 127))
def test_powers_of_two_are_exact(k):
    expected = np.float32(2.0**k) if k >= -126 else 0
    assert module.power_of_two(jnp.int32(k)) == expected


@pytest.mark.parametrize("n", [257, 512, 1000, 65536])
def test_running_sums(n):
    values = np.random.default_rng(0).integers(0, 100, n).astype(np.int32)
    running = jax.jit(lambda a: (module.running(jnp.add, a), module.running(jnp.maximum, a)))
    sums, maxima = running(jnp.asarray(values))
    np.testing.assert_array_equal(sums, np.cumsum(values))
    np.testing.assert_array_equal(maxima, np.maximum.accumulate(values))
