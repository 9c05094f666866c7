"""Factors that are trained, beyond what the contract asks of every method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import decode
from jaxcomp.arrays import LowRankArray
from jaxcomp.compression import State
from jaxcomp.factorize import LowRank, read_forms, train

RNG = np.random.default_rng(0)
PARAMS = {
    "conv": {"kernel": jnp.asarray(RNG.normal(size=(3, 3, 4, 6)), jnp.float32)},
    "q": {"kernel": jnp.asarray(RNG.normal(size=(6, 2, 4)), jnp.float32)},
    "out": {"kernel": jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32)},
}


def model(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = jnp.asarray(p["conv"]["kernel"])
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    return jnp.einsum("bd,dhk->bhk", x.mean((1, 2)), p["q"]["kernel"])


def test_flax_layouts_and_those_of_the_program():
    with pytest.warns(UserWarning, match="left dense: q/kernel: the axes"):
        state = train(LowRank(1)).init(PARAMS)
    # Three axes do not tell; one column saves nothing at rank 2 and some at rank 1.
    assert sorted(state.learned) == ["conv/kernel", "out/kernel"]
    forms = read_forms(model, PARAMS, jnp.ones((2, 5, 5, 4)))
    method = train(LowRank((2, 3), split="tucker"), forms=forms)
    with pytest.warns(UserWarning, match="left dense: out/kernel: rank 2 saves"):
        state = method.init(PARAMS)
    shapes = {p: [f.shape for f in factors] for p, factors in state.learned.items()}
    assert shapes["conv/kernel"] == [(4, 2), (2, 3, 3, 3), (3, 6)]
    assert shapes["q/kernel"] == [(6, 2), (2, 2, 4)]
    packed = method.pack(PARAMS, state)
    assert isinstance(packed["conv"]["kernel"], LowRankArray)
    assert packed["out"]["kernel"] is PARAMS["out"]["kernel"]
    seen = method.apply(PARAMS, state)
    for path in ("conv", "q"):
        np.testing.assert_array_equal(decode(packed)[path]["kernel"], seen[path]["kernel"])


def test_doubles_become_what_jax_has():
    params = {"kernel": np.asarray(RNG.normal(size=(6, 8)))}
    assert params["kernel"].dtype == np.float64
    method = train(LowRank(2))
    assert method.pack(params, method.init(params))["kernel"].dtype == np.float32


def test_gradients_are_those_of_the_product():
    method = train(LowRank(2))
    params = {"kernel": PARAMS["conv"]["kernel"][0, 0]}
    state = method.init(params)
    target = jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)

    def loss(learned):
        seen = method.apply(params, State(learned, state.buffers))
        return jnp.sum(seen["kernel"] * target)

    left, right = jax.grad(loss)(state.learned)["kernel"]
    u, v = state.learned["kernel"]
    np.testing.assert_allclose(left, target @ v.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(right, u.T @ target, rtol=1e-4, atol=1e-5)


def test_energy_is_measured_once():
    values = jnp.diag(jnp.array([4.0, 2.0, 0.1, 0.1, 0.1, 0.1])) + 1e-3
    state = train(LowRank(energy=0.95)).init({"kernel": values})
    assert state.learned["kernel"][0].shape == (6, 2)
    with pytest.raises(TypeError, match="kernel: its energy is not known"):
        jax.eval_shape(train(LowRank(energy=0.95)).init, {"kernel": values})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: train(2), TypeError, r"LowRank\(rank=8\)"),
        (lambda: train(LowRank(2), begin=-1), ValueError, "begin is -1"),
        (lambda: train(LowRank(energy=0.9), begin=5), ValueError, "not there yet"),
        (lambda: train(LowRank(5)).init({"w": jnp.ones((6, 8))}), ValueError, "w: rank 5 saves"),
        (lambda: train(LowRank(1)).init({"w": jnp.ones((2, 2, 2))}), ValueError, "give forms"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
