"""Ready optimizers against optax's own; several kinds side by side; half precision."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp.search import ready, spaces

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.1, 0.2])}
TARGET = {"kernel": jnp.array([[0.0, -1.0], [1.5, 3.0]]), "bias": jnp.array([0.0, -0.2])}


def coupled(decay, tx):
    return optax.chain(optax.add_decayed_weights(decay), tx)


PAIRS = [
    ("sgd", optax.sgd(0.1)),
    (
        {"sgd": {"rate": 0.05, "momentum": 0.8, "decay": 0.01}},
        coupled(0.01, optax.sgd(0.05, momentum=0.8)),
    ),
    ({"nesterov": {"rate": 0.02}}, optax.sgd(0.02, momentum=0.9, nesterov=True)),
    ({"adam": {"rate": 0.1, "b1": 0.85}}, optax.adam(0.1, b1=0.85)),
    ("adamw", optax.adamw(1e-3)),
    ({"adamw": {"b2": 0.95, "decay": 0.1}}, optax.adamw(1e-3, b2=0.95, weight_decay=0.1)),
    ({"lion": {"rate": 0.01}}, optax.lion(0.01)),
]
NUMBERS = ready.stack([ready.optimizer_numbers(candidate) for candidate, _ in PAIRS])


def train(tx, params=PARAMS, steps=6) -> Any:
    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda w, t: (w - t).astype(w.dtype) ** 3, params, TARGET)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]


def halving(step):
    return 0.5 ** jnp.asarray(step, jnp.float32)


def test_optimizers_are_those_of_optax():
    wanted = jax.jit(lambda: [train(tx) for _, tx in PAIRS])()
    one_by_one = jax.jit(lambda: [train(ready.optimizer(candidate)) for candidate, _ in PAIRS])()
    together = jax.jit(jax.vmap(lambda one: train(ready.optimizer_of(one))))(NUMBERS)
    # 1 - 0.999 is a number in float32 where optax has one in float64: a relative error of 2e-5.
    for i, of_optax in enumerate(wanted):
        for name in PARAMS:
            np.testing.assert_allclose(one_by_one[i][name], of_optax[name], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(together[name][i], of_optax[name], rtol=1e-4, atol=1e-5)


def test_settings_may_be_traced_and_a_schedule_multiplies_the_rate():
    def by_rate(rate):
        return train(ready.optimizer({"nesterov": {"rate": rate}}, halving))["kernel"]

    rates = jnp.array([0.01, 0.02])
    traced = jax.jit(jax.vmap(by_rate))(rates)
    reference = optax.sgd(lambda step: 0.02 * halving(step), momentum=0.9, nesterov=True)
    wanted = jax.jit(lambda: train(reference))()["kernel"]
    np.testing.assert_allclose(traced[1], wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(traced[0]) - np.asarray(wanted)).max() > 1e-3
    one = ready.optimizer_numbers({"nesterov": {"rate": 0.02}})
    by_number = jax.jit(lambda one: train(ready.optimizer_of(one, halving)))(one)["kernel"]
    np.testing.assert_allclose(by_number, wanted, rtol=1e-5, atol=1e-6)


def test_half_precision_stays():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)

    def both(rate, one):
        plain = ready.optimizer({"adamw": {"rate": rate, "decay": rate}}, halving)
        return train(plain, half), train(ready.optimizer_of(one, halving), half)

    # The scan in `train` would refuse a state that changed its types.
    shapes = jax.eval_shape(both, jnp.float32(0.1), ready.optimizer_numbers("lion"))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


def test_candidates_of_the_space_make_optimizers():
    space = ready.optimizers()
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(30):
        candidate = spaces.decode(space, spaces.sample(space, rng))
        ready.optimizer(candidate)
        kinds.add(int(ready.optimizer_numbers(candidate).kind))
    assert kinds == set(range(5))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ready.optimizers(["adamx"]), ValueError, "^optimizers: there is no 'adamx'"),
        (lambda: ready.optimizer({"adam": {"decay": 1}}), ValueError, "^optimizer/adam: there is"),
        (
            lambda: ready.optimizer({"sgd": {"rate": None}}),
            TypeError,
            "^optimizer/sgd/rate: must be",
        ),
        (lambda: ready.optimizer_numbers(None), TypeError, "^optimizer: must be a name or"),
    ],
)
def test_optimizers_that_will_not_do_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
