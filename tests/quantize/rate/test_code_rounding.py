"""Rate-distortion rounding of one matrix, against every choice there is."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.quantize.rate.rounding import CodePrices, rate_round

HIGH = 2
CODES = range(-HIGH, HIGH + 1)
PRICES = CodePrices(jnp.float32(0.4), jnp.float32(2.5), jnp.array([1.2, 2.0], jnp.float32))


def bits(codes, prices=PRICES):
    size = np.abs(codes).astype(int)
    nonzero = np.asarray(prices.nonzero) + np.asarray(prices.magnitudes)[np.maximum(size, 1) - 1]
    return np.where(size == 0, np.asarray(prices.zero), nonzero)


def total(codes, weight, moment, scale, penalty, prices=PRICES):
    error = weight - codes * scale
    return np.einsum("io,ij,jo->", error, moment, error) + penalty * bits(codes, prices).sum()


def drawn(seed, correlated=1.0):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(4, 3)).astype(np.float32)
    inputs = rng.normal(size=(32, 4)) @ (
        np.eye(4) + correlated * np.triu(rng.normal(size=(4, 4)), 1)
    )
    return weight, (inputs.T @ inputs / 32).astype(np.float32)


def rounded(weight, moment, penalty, prices=PRICES, **options):
    arrays = (jnp.asarray(weight), jnp.asarray(moment), jnp.full(1, 0.5))
    return np.asarray(rate_round(*arrays, prices, penalty, **options))


def least(weight, moment, penalty):
    """Each output alone: all codes of its four weights."""
    best = 0.0
    choices = np.array(list(itertools.product(CODES, repeat=4)))
    for column in weight.T:
        error = column - 0.5 * choices
        costs = np.einsum("ci,ij,cj->c", error, moment, error) + penalty * bits(choices).sum(1)
        best += costs.min()
    return best


@pytest.mark.parametrize("penalty", [0.0, 0.05, 0.4])
def test_best_of_all_choices_where_inputs_do_not_correlate(penalty):
    for seed in range(5):
        weight, moment = drawn(seed)
        moment = np.diag(np.diag(moment))
        codes = rounded(weight, moment, penalty, damping=0.0)
        found = total(codes, weight, moment, 0.5, penalty)
        np.testing.assert_allclose(found, least(weight, moment, penalty), rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.05, 0.4])
def test_near_the_best_and_below_nearest_where_they_do(penalty):
    ours, nearests, bests = 0.0, 0.0, 0.0
    for seed in range(20):
        weight, moment = drawn(seed)
        codes = rounded(weight, moment, penalty)
        nearest = np.clip(np.round(weight / 0.5), -HIGH, HIGH)
        ours += total(codes, weight, moment, 0.5, penalty)
        nearests += total(nearest, weight, moment, 0.5, penalty)
        bests += least(weight, moment, penalty)
    assert ours <= 1.1 * bests
    assert ours < 0.9 * nearests


def test_each_sweep_lowers_the_sum_until_no_single_weight_can():
    weight, moment = drawn(3, correlated=2.0)
    sums = [total(rounded(weight, moment, 0.1, sweeps=n), weight, moment, 0.5, 0.1) for n in (0, 1)]
    codes = rounded(weight, moment, 0.1, sweeps=8)
    settled = total(codes, weight, moment, 0.5, 0.1)
    assert settled <= sums[1] + 1e-6 <= sums[0] + 2e-6
    for place in np.ndindex(codes.shape):
        for code in CODES:
            other = codes.copy()
            other[place] = code
            assert total(other, weight, moment, 0.5, 0.1) >= settled - 1e-5


def test_prices_by_place_empty_what_is_dear():
    weight, moment = drawn(1)
    dear = np.zeros((4, 3), np.float32)
    dear[2] = 1e4
    prices = PRICES._replace(nonzero=jnp.asarray(dear))
    assert not rounded(weight, moment, 0.1, prices)[2].any()
    assert rounded(weight, moment, 0.1, prices).any()


def test_an_input_that_is_never_there_costs_no_bits():
    weight, moment = drawn(2)
    moment[1], moment[:, 1] = 0, 0
    codes = rounded(weight, moment, 0.01)
    assert not codes[1].any()
    np.testing.assert_array_equal(rounded(np.zeros_like(weight), moment, 0.0), 0)


def test_what_does_not_fit_is_refused():
    weight, moment = drawn(0)
    with pytest.raises(ValueError, match=r"penalty is -1"):
        rounded(weight, moment, -1.0)
    with pytest.raises(ValueError, match="sweeps is -1"):
        rounded(weight, moment, 0.0, sweeps=-1)
    with pytest.raises(ValueError, match="NaN"):
        rounded(np.full_like(weight, np.nan), moment, 0.0)
    with pytest.raises(ValueError, match=r"zero \(5, 1\) does not broadcast"):
        rounded(weight, moment, 0.0, PRICES._replace(zero=jnp.ones((5, 1))))
