"""Lottery tickets: rounds, rewinding of everything, an optimizer that forgets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp import partition, prune
from tests import methods


def run(method, steps, tx=None):
    wrapped = jaxcomp.wrap_optimizer(tx or optax.adam(0.05), method)
    params, (x, y) = methods.params(), methods.batch()

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda p: methods.loss(jaxcomp.compressed(p, opt_state), x, y))(params)
        updates, opt_state = wrapped.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, history = wrapped.init(params), [params]
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
        history.append(params)
    return history, opt_state


@pytest.mark.parametrize("rewind_to", [0, 2])
def test_every_round_goes_back_and_repeats_exactly(rewind_to):
    every = 4
    method = prune.lottery_ticket(0.75, rounds=2, every=every, rewind_to=rewind_to)
    history, opt_state = run(method, rewind_to + 3 * every + 1)
    early = history[rewind_to]
    for number in (1, 2):
        ticket = history[rewind_to + number * every + 1]
        kept = 1 - (1 - 0.75) ** (number / 2)
        for name in early:
            now, then = np.asarray(ticket[name]["kernel"]), np.asarray(early[name]["kernel"])
            mask = now != 0
            assert (~mask).sum() == round(kept * then.size)
            np.testing.assert_allclose(now[mask], then[mask], rtol=0, atol=2e-7)
            np.testing.assert_allclose(ticket[name]["bias"], early[name]["bias"], atol=2e-7)
    del opt_state


def test_masks_come_from_trained_weights_and_the_rest_is_iterated_magnitude_pruning():
    """The same by hand: train dense, prune, put back, train again with zeros held."""
    every = 5
    history, opt_state = run(prune.lottery_ticket(0.5, rounds=1, every=every), 2 * every + 1)
    # The weights that the masks were made from are those before the step that prunes.
    trained = history[every]
    scores = jax.tree.map(prune.scores.magnitude, trained)
    masks = prune.masks(scores, 0.5)
    np.testing.assert_array_equal(
        masks["first"]["kernel"], opt_state.compression.buffers.masks["first/kernel"]
    )
    ticket = prune.apply_masks(history[0], masks)
    wrapped = jaxcomp.wrap_optimizer(optax.adam(0.05), prune.keep_zeros())
    params, state, (x, y) = ticket, wrapped.init(ticket), methods.batch()
    for _ in range(every):
        grads = jax.grad(lambda p, s=state: methods.loss(jaxcomp.compressed(p, s), x, y))(params)
        updates, state = wrapped.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for got, want in zip(jax.tree.leaves(history[-1]), jax.tree.leaves(params), strict=True):
        # Adam's own step count is not a memory of any weight and goes on: its bias correction
        # differs, so the same direction is followed at almost the same pace.
        assert np.corrcoef(np.ravel(got), np.ravel(want))[0, 1] > 0.98
    for name in masks:
        zero = np.asarray(history[-1][name]["kernel"]) == 0
        np.testing.assert_array_equal(zero, ~np.asarray(masks[name]["kernel"]))


def test_with_an_optimizer_without_a_count_the_ticket_trains_as_if_alone():
    every = 4
    tx = optax.sgd(0.1, momentum=0.9)
    history, opt_state = run(prune.lottery_ticket(0.5, rounds=1, every=every), 2 * every + 1, tx)
    masks = opt_state.compression.buffers.masks
    ticket = prune.apply_masks(history[0], jaxcomp.tree.Leaves(masks))
    wrapped = jaxcomp.wrap_optimizer(tx, prune.keep_zeros())
    params, state, (x, y) = ticket, wrapped.init(ticket), methods.batch()
    for _ in range(every):
        grads = jax.grad(lambda p, s=state: methods.loss(jaxcomp.compressed(p, s), x, y))(params)
        updates, state = wrapped.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for got, want in zip(jax.tree.leaves(history[-1]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_an_optimizer_that_begins_with_the_weights_begins_with_the_early_ones():
    """Schedule-free SGD carries a sequence of its own, which `init` starts at the weights."""
    tx = optax.contrib.schedule_free_sgd(0.1)
    history, opt_state = run(prune.lottery_ticket(0.5, rounds=1, every=3), 4, tx)
    assert not np.allclose(history[3]["first"]["bias"], history[0]["first"]["bias"], atol=1e-3)
    for name in ("first", "second"):
        ticket, began = history[-1][name], opt_state.inner.z[name]
        for leaf in ticket:
            np.testing.assert_array_equal(began[leaf], ticket[leaf])


def test_integers_among_the_weights_are_left_alone():
    params = {"kernel": methods.params()["first"]["kernel"], "count": jnp.int32(3)}
    inner = optax.masked(optax.sgd(0.1), {"kernel": True, "count": False})
    tx = jaxcomp.wrap_optimizer(inner, prune.lottery_ticket(0.5, rounds=1, every=1))
    state, grads = tx.init(params), {"kernel": params["kernel"], "count": jnp.int32(0)}
    early = np.asarray(params["kernel"])
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert params["count"] == 3
    assert params["count"].dtype == jnp.int32
    kept = np.asarray(params["kernel"]) != 0
    assert kept.sum() == 24
    np.testing.assert_allclose(np.asarray(params["kernel"])[kept], early[kept], atol=2e-7)


def test_inside_a_partition_only_what_it_aims_at_goes_back():
    method = partition(
        {"*first*": prune.lottery_ticket(0.5, rounds=1, every=3), "*": prune.keep_zeros()}
    )
    history, _ = run(method, 5)
    back = np.asarray(history[4]["first"]["kernel"])
    mask = back != 0
    assert (~mask).sum() == 24
    np.testing.assert_allclose(
        back[mask], np.asarray(history[0]["first"]["kernel"])[mask], atol=2e-7
    )
    moved = np.abs(np.asarray(history[4]["second"]["kernel"] - history[0]["second"]["kernel"]))
    assert moved.min() > 1e-3


def test_bad_arguments():
    with pytest.raises(ValueError, match="rounds and every"):
        prune.lottery_ticket(0.5, rounds=0, every=3)
    with pytest.raises(ValueError, match="begin"):
        prune.lottery_ticket(0.5, rounds=1, every=3, rewind_to=-1)
    with pytest.raises(TypeError, match="score"):
        prune.lottery_ticket(0.5, rounds=1, every=3, score=1.0)
