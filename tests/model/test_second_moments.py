"""What a second moment says of a matrix, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.model.second_moments import dot, inverse_factor, output_errors

RNG = np.random.default_rng(0)


def samples(count, features):
    return RNG.normal(size=(count, features)) @ RNG.normal(size=(features, features))


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_the_factor_inverts_the_moment(damping):
    x = samples(60, 7)
    h = x.T @ x / 60
    factor = np.asarray(inverse_factor(jnp.asarray(h, jnp.float32), damping), np.float64)
    np.testing.assert_array_equal(factor, np.triu(factor))
    goal = h / np.mean(np.diag(h)) + damping * np.eye(7)
    np.testing.assert_allclose(factor.T @ factor @ goal, np.eye(7), atol=1e-3)


def test_a_moment_that_cannot_be_inverted_is_damped_until_it_can():
    x = samples(3, 7)
    x[:, 2] = 0
    moment = jnp.asarray(x.T @ x / 3, jnp.float32)
    factor = np.asarray(inverse_factor(moment, 0.0), np.float64)
    assert np.all(np.isfinite(factor))
    assert np.all(np.diag(factor) > 0)
    # What never occurs makes up for nothing.
    assert np.all(factor[2, 3:] == 0)
    assert np.all(factor[:2, 2] == 0)
    assert np.all(np.isfinite(inverse_factor(0 * moment, 0.0)))


def test_it_does_not_matter_in_what_unit_inputs_are():
    x = samples(60, 7)
    moment = jnp.asarray(x.T @ x / 60, jnp.float32)
    whole = inverse_factor(moment, 0.01)
    np.testing.assert_allclose(inverse_factor(moment * 2.0**60, 0.01), whole, rtol=1e-6)


def test_errors_of_outputs_are_those_of_samples():
    x, change = samples(50, 6), RNG.normal(size=(2, 6, 3))
    moments = np.stack([x.T @ x / 50, np.eye(6)])
    expected = [np.mean((x @ change[0]) ** 2, 0), np.sum(change[1] ** 2, 0)]
    found = jax.jit(output_errors)(jnp.asarray(change, jnp.bfloat16), jnp.asarray(moments))
    np.testing.assert_allclose(found, expected, rtol=0.02)
    found = output_errors(jnp.asarray(change, jnp.float32), jnp.asarray(moments, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_products_are_in_full_float32():
    a = jnp.asarray(RNG.normal(size=(5, 40)), jnp.float32)
    np.testing.assert_allclose(dot(a, a.T), np.asarray(a, np.float64) @ np.asarray(a.T), rtol=1e-5)
