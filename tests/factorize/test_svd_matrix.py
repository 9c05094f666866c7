"""Truncated decompositions of one matrix, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.factorize.svd_matrix import (
    largest_saving_rank,
    rank_for_energy,
    singular_values,
    svd_matrix,
    whitened_svd_matrix,
)

RNG = np.random.default_rng(0)
EPS = float(np.finfo(np.float32).eps)
WEIGHT = RNG.normal(size=(12, 8)) @ np.diag(0.6 ** np.arange(8))


def moment_of(samples):
    return samples.T @ samples / len(samples)


MOMENTS = {
    "full": moment_of(RNG.normal(size=(50, 12)) * np.linspace(0.05, 3, 12)),
    "few samples": moment_of(RNG.normal(size=(4, 12))),
    "dead inputs": moment_of(RNG.normal(size=(50, 12)) * (np.arange(12) % 3 > 0)),
}


def product(factors):
    left, right = (np.asarray(factor, np.float64) for factor in factors)
    return left @ right


def moved(change, moment):
    return float(np.trace(change.T @ moment @ change))


@pytest.mark.parametrize("rank", [1, 3])
def test_plain_is_the_truncated_decomposition(rank):
    u, s, vt = np.linalg.svd(WEIGHT, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vt[:rank]
    left, right = svd_matrix(WEIGHT.astype(np.float32), rank)
    assert left.shape == (12, rank)
    assert right.shape == (rank, 8)
    np.testing.assert_allclose(product((left, right)), best, atol=1e-6)
    # Each factor has its share of every singular value.
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.sqrt(s[:rank]), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(right, axis=1), np.sqrt(s[:rank]), rtol=1e-5)


@pytest.mark.parametrize("weight", [WEIGHT, WEIGHT.T, 1e6 * WEIGHT], ids=["tall", "wide", "large"])
def test_full_rank_is_exact_within_the_bound(weight):
    weight = weight.astype(np.float32)
    bound = 4 * EPS * np.sqrt(8) * np.linalg.norm(weight)
    assert np.linalg.norm(product(svd_matrix(weight, 8)) - weight) <= bound
    moment = moment_of(RNG.normal(size=(4, len(weight)))).astype(np.float32)
    assert np.linalg.norm(product(whitened_svd_matrix(weight, moment, 8)) - weight) <= bound


def closed_form(weight, moment, rank):
    """The least that outputs can move: what the singular values of H^½ W leave over."""
    values, vectors = np.linalg.eigh(moment)
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    return np.sum(np.linalg.svd(root @ weight, compute_uv=False)[rank:] ** 2)


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_whitened_reaches_the_closed_form_and_beats_plain(moment):
    weight, seen = WEIGHT.astype(np.float32), moment.astype(np.float32)
    size = moved(WEIGHT, moment)
    for rank in (1, 3):
        error = moved(product(whitened_svd_matrix(weight, seen, rank)) - WEIGHT, moment)
        assert abs(error - closed_form(WEIGHT, moment, rank)) <= 1e-5 * size
        assert error <= moved(product(svd_matrix(weight, rank)) - WEIGHT, moment)


def test_whitened_error_is_never_above_plain_whatever_the_damping():
    moment = MOMENTS["dead inputs"].astype(np.float32)
    weight = WEIGHT.astype(np.float32)
    plain = moved(product(svd_matrix(weight, 3)) - WEIGHT, MOMENTS["dead inputs"])
    for damping in (0.0, 0.01, 1.0, 100.0):
        change = product(whitened_svd_matrix(weight, moment, 3, damping)) - WEIGHT
        assert moved(change, MOMENTS["dead inputs"]) <= plain * (1 + 1e-6)


def test_without_inputs_at_all_it_is_the_plain_one():
    weight = WEIGHT.astype(np.float32)
    zeros = np.zeros((12, 12), np.float32)
    got = product(whitened_svd_matrix(weight, zeros, 3))
    np.testing.assert_allclose(got, product(svd_matrix(weight, 3)), atol=1e-5)


def test_equal_weights_are_of_rank_one_and_zeros_stay_zero():
    equal = np.full((12, 8), 0.3, np.float32)
    assert rank_for_energy(singular_values(jnp.asarray(equal)), 1.0) == 1
    np.testing.assert_allclose(product(svd_matrix(equal, 1)), equal, atol=1e-6)
    left, right = svd_matrix(np.zeros((12, 8), np.float32), 3)
    assert not np.any(np.asarray(left))
    # A gradient still reaches the left factor.
    np.testing.assert_allclose(np.linalg.norm(right, axis=1), 1, rtol=1e-5)
    assert rank_for_energy(np.zeros(4), 0.9) == 1


def test_energy_by_hand():
    values = np.array([3.0, 2.0, 1.0, 0.0])
    ranks = [rank_for_energy(values, e) for e in (0.1, 9 / 14, 0.7, 13 / 14, 0.95, 1.0)]
    assert ranks == [1, 1, 2, 2, 3, 3]
    assert rank_for_energy(np.array([[1.0, 0.0], [1.0, 1.0]]), 0.9) == 2
    seen = singular_values(jnp.asarray(WEIGHT, jnp.float32))
    np.testing.assert_allclose(seen, np.linalg.svd(WEIGHT, compute_uv=False), rtol=1e-5)


def test_a_rank_saves_or_not():
    for m, n in [(12, 8), (1, 5), (64, 64), (2, 2)]:
        rank = largest_saving_rank(m, n)
        assert rank * (m + n) < m * n <= (rank + 1) * (m + n)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: svd_matrix(np.ones((3, 2), np.float32), 0), ValueError, "at least 1"),
        (lambda: svd_matrix(np.ones((3, 2), np.float32), 3), ValueError, "at most rank 2"),
        (lambda: svd_matrix(np.ones((3, 2), np.float32), 1.0), TypeError, "whole number"),
        (lambda: svd_matrix(np.ones((0, 2), np.float32), 1), ValueError, "no elements"),
        (lambda: svd_matrix(np.full((2, 2), np.nan, np.float32), 1), ValueError, "NaN"),
        (lambda: rank_for_energy(np.ones(2), 0.0), ValueError, "energy is 0.0"),
        (lambda: rank_for_energy(np.ones(2), 1.5), ValueError, "energy is 1.5"),
        (lambda: rank_for_energy(np.ones(2), "most"), TypeError, "energy must be a number"),
        (
            lambda: whitened_svd_matrix(
                np.ones((3, 2), np.float32), np.eye(2, dtype=np.float32), 1
            ),
            ValueError,
            "second moment",
        ),
        (
            lambda: whitened_svd_matrix(
                np.ones((2, 2), np.float32), np.eye(2, dtype=np.float32), 1, -1.0
            ),
            ValueError,
            "damping",
        ),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
