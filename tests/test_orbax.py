"""State saved in the middle of a schedule, restored, and trained on bit for bit."""

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import jaxcomp
from tests import methods
from tests.methods import CASES, Case


def loop(tx):
    x, y = methods.batch()

    @jax.jit
    def step(params, opt_state):
        loss = lambda p: methods.loss(jaxcomp.compressed(p, opt_state), x, y)
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_goes_on_bit_for_bit(case: Case, tmp_path):
    tx = jaxcomp.wrap_optimizer(optax.adamw(0.05), case.make())
    step, params = loop(tx), methods.params()
    state = (params, tx.init(params))
    for _ in range(2):
        state = step(*state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "middle", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, tx.init(params)))
        restored = checkpointer.restore(tmp_path / "middle", abstract)
    assert_identical(restored, state)
    for _ in range(4):
        state, restored = step(*state), step(*restored)
    assert_identical(restored, state)
    assert_identical(jaxcomp.pack(*restored), jaxcomp.pack(*state))


@pytest.mark.parametrize("case", CASES[-3:], ids=str)
def test_flax_serialization_round_trip(case: Case):
    tx = jaxcomp.wrap_optimizer(optax.adam(0.05), case.make())
    step, params = loop(tx), methods.params()
    state = (params, tx.init(params))
    for _ in range(3):
        state = step(*state)
    data = serialization.to_bytes(state)
    restored = serialization.from_bytes((params, tx.init(params)), data)
    assert_identical(step(*restored), step(*state))
