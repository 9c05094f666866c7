"""Streaming statistics against float64 sums over all samples at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from jaxcomp.model import statistics
from jaxcomp.model.statistics import absmax, histogram, mean_square, minmax, second_moment

LEDGER = {
    "absmax": absmax(),
    "minmax": minmax(),
    "mean_square": mean_square(),
    "second_moment": second_moment(),
    "histogram": histogram(-4, 4, steps=4),
}
WIDTH = 3
values = st.floats(-(2.0**20), 2.0**20, width=32)
rows = npst.arrays(np.float32, st.tuples(st.sampled_from([1, 4]), st.just(WIDTH)), elements=values)


def reference(name, x):
    """From the definition, in float64."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    if name == "absmax":
        return np.abs(x).max(0)
    if name == "minmax":
        return np.stack([x.min(0), x.max(0)])
    if name == "mean_square":
        return np.mean(x**2, 0)
    if name == "second_moment":
        return np.mean([np.outer(row, row) for row in x], 0)
    counts = [np.sum(np.abs(x) < 2.0**-4)]
    for octave in range(-4, 4):
        for step in range(4):
            low, high = (2.0**octave * (1 + s / 4) for s in (step, step + 1))
            counts.append(np.sum((np.abs(x) >= low) & (np.abs(x) < high)))
    return np.array([*counts, np.sum(np.abs(x) >= 2.0**4)])


def value(name, state):
    found = LEDGER[name].finish(state)
    if name == "histogram":
        return np.asarray(found.counts)
    return np.stack(found) if name == "minmax" else np.asarray(found)


def close(a, b, scale):
    # A product below the normal float32 numbers is zero, and so is its share of a mean.
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * scale + np.finfo(np.float32).tiny)


def test_squares_below_float32_are_zero():
    tiny = jnp.full((1, WIDTH), 1e-30, jnp.float32)
    for name in ("mean_square", "second_moment"):
        assert not value(name, LEDGER[name].measure(tiny)).any()


@pytest.mark.parametrize("name", LEDGER)
@given(batches=st.lists(rows, min_size=1, max_size=4))
def test_batches_merge_to_the_statistic_of_all_samples(name, batches):
    statistic = LEDGER[name]
    state = statistic.init(WIDTH)
    for batch in batches:
        state = statistic.merge(state, statistic.measure(jnp.asarray(batch)))
    everything = np.concatenate(batches)
    scale = float(np.abs(everything).max()) ** 2
    close(value(name, state), reference(name, everything), scale)


@pytest.mark.parametrize("name", LEDGER)
@given(a=rows, b=rows, c=rows)
def test_merge_is_associative_and_init_is_neutral(name, a, b, c):
    statistic = LEDGER[name]
    merge = statistic.merge
    first, second, third = (statistic.measure(jnp.asarray(x)) for x in (a, b, c))
    left = value(name, merge(merge(first, second), third))
    right = value(name, merge(first, merge(second, third)))
    np.testing.assert_allclose(left, right, rtol=3e-7, atol=1e-30)
    for alone in (merge(statistic.init(WIDTH), first), merge(first, statistic.init(WIDTH))):
        np.testing.assert_array_equal(value(name, alone), value(name, first))


@pytest.mark.parametrize("name", LEDGER)
def test_leading_axes_are_all_samples(name):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, WIDTH)).astype(np.float32)
    apart = LEDGER[name].measure(jnp.asarray(x))
    joined = LEDGER[name].measure(jnp.asarray(x.reshape(-1, WIDTH)))
    close(value(name, apart), value(name, joined), 1)


@pytest.mark.parametrize("name", ["mean_square", "second_moment"])
def test_many_batches_do_not_drift(name):
    statistic, steps = LEDGER[name], 200_000
    batch = jnp.asarray([[0.1, 0.7, 1.3]], jnp.float32)
    once = statistic.measure(batch)

    def turn(carry, _):
        state, naive = carry
        return (statistic.merge(state, once), naive + batch[0] ** 2), None

    start = (statistic.init(WIDTH), jnp.zeros(WIDTH))
    (state, naive), _ = jax.jit(lambda: jax.lax.scan(turn, start, length=steps))()
    expected = reference(name, batch)
    np.testing.assert_allclose(value(name, state), expected, rtol=3e-7)
    # What the second float is for: one alone is a hundred times worse.
    assert np.max(np.abs(np.asarray(naive) / steps / reference("mean_square", batch) - 1)) > 3e-5


def test_counts_do_not_stop_growing():
    statistic = LEDGER["histogram"]
    once = statistic.measure(jnp.ones((1000, 1)))
    many = statistics.Total(once.high + 2.0**30, once.low)
    for _ in range(100):
        many = statistic.merge(many, statistic.measure(jnp.ones((1, 1))))
    total = np.asarray(many.high, np.float64) + np.asarray(many.low, np.float64)
    assert total.max() == 2.0**30 + 1000 + 100


def test_diagonal_of_the_second_moment_is_the_mean_square():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(50, 7)), jnp.float32)
    moment, square = second_moment(), mean_square()
    diagonal = jnp.diagonal(moment.finish(moment.measure(x)))
    np.testing.assert_allclose(diagonal, square.finish(square.measure(x)), rtol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "steps"), [(-126, 127, 1), (-3, 2, 1), (0, 1, 1024), (-24, 8, 8)]
)
def test_histogram_agrees_with_numpy_on_its_own_edges(low, high, steps):
    statistic = histogram(low, high, steps)
    rng = np.random.default_rng(2)
    x = np.exp(rng.uniform(-100, 88, 3000)).astype(np.float32)
    edges = np.asarray(statistic.finish(statistic.init(1)).edges)
    near = np.concatenate([np.nextafter(edges[1:-1], 0), np.nextafter(edges[1:-1], 9e37)])
    special = np.float32([0, -0.0, 1e-45, 3.4e38, -3.4e38])
    x = np.concatenate([x, edges[1:-1], near.astype(np.float32), special])
    counts = statistic.finish(statistic.measure(jnp.asarray(-x)[:, None])).counts
    # Numpy closes the last bin on the right, which infinity makes harmless.
    np.testing.assert_array_equal(counts, np.histogram(np.abs(x), edges)[0])
    assert len(counts) == (high - low) * steps + 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3, 3), "low < high"),
        ((-127, 3), "-126"),
        ((0, 128), "127"),
        ((0, 1, 3), "power of two"),
        ((0, 1, 0), "power of two"),
    ],
)
def test_histogram_refuses_bins_that_are_none(arguments, words):
    with pytest.raises(ValueError, match=words):
        histogram(*arguments)


@given(ids=npst.arrays(np.int32, (2, 4), elements=st.integers(-3, 8)))
def test_rows_measure_as_one_hot_samples(ids):
    statistic = mean_square()
    one_hot = (ids[..., None] == np.arange(5)).astype(np.float32)
    by_number = statistic.finish(statistic.measure_rows(jnp.asarray(ids), 5))
    np.testing.assert_array_equal(
        by_number, statistic.finish(statistic.measure(jnp.asarray(one_hot)))
    )
