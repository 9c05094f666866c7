"""AC/DC phases, straight-through masks, and zeros that stay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp import prune
from jaxcomp.prune import NM, Block, allocation, constant, scores
from tests import methods
from tests.prune.test_masks import reference_mask


def phase(step, begin, end, sparse, dense):
    return step >= end or (step >= begin and (step - begin) % (sparse + dense) < sparse)


def test_phases_take_their_turns_and_masks_are_made_where_one_begins():
    numbers = {"begin": 2, "end": 14, "sparse_steps": 3, "dense_steps": 2}
    method = prune.alternating(0.5, **numbers)
    params = methods.params()
    state, made = method.init(params), None
    for step in range(18):
        params = jax.tree.map(lambda w, s=step: w + 0.3 * jnp.sin(9 * w + s), params)
        was = phase(step - 1, 2, 14, 3, 2) if step else False
        state = method.update(params, state, None)
        for name in params:
            mask = np.asarray(state.buffers.masks[f"{name}/kernel"])
            kernel = params[name]["kernel"]
            if not phase(step, 2, 14, 3, 2):
                assert mask.all()
            elif not was:
                np.testing.assert_array_equal(mask, reference_mask(abs(kernel), mask.size // 2))
            else:
                np.testing.assert_array_equal(mask, made[f"{name}/kernel"])
        made = {path: np.asarray(mask) for path, mask in state.buffers.masks.items()}


def test_weights_come_back_at_zero_to_an_optimizer_that_forgot_them():
    method = prune.alternating(0.5, begin=1, end=50, sparse_steps=2, dense_steps=3)
    tx = jaxcomp.wrap_optimizer(optax.adam(0.05), method)
    params, (x, y) = methods.params(), methods.batch()
    opt_state, back = tx.init(params), 0
    for _ in range(9):
        before = opt_state.compression.buffers.masks["first/kernel"]
        grads = jax.grad(lambda p, s=opt_state: methods.loss(jaxcomp.compressed(p, s), x, y))(
            params
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        after = opt_state.compression.buffers.masks["first/kernel"]
        changed = np.asarray(before != after)
        back += int(np.sum(after & ~before))
        assert np.all(np.asarray(params["first"]["kernel"])[changed] == 0)
        assert np.all(np.asarray(opt_state.inner[0].mu["first"]["kernel"])[changed] == 0)
    assert back > 0


def test_a_state_resumed_past_the_end_in_a_dense_phase_becomes_sparse_at_once():
    params, sizes = methods.params(), []
    first = prune.alternating(0.5, begin=0, end=100, sparse_steps=1, dense_steps=4)
    state = first.init(params)
    for _ in range(3):
        state = first.update(params, state, None)
    assert bool(jnp.all(state.buffers.masks["first/kernel"]))
    other = prune.alternating(0.75, begin=0, end=2, sparse_steps=1, dense_steps=4)
    for _ in range(3):
        state = other.update(params, state, None)
        sizes.append(int(jnp.sum(state.buffers.masks["first/kernel"])))
    assert sizes == [12, 12, 12]


def test_alternating_refuses_phases_without_steps():
    for bad in ({"sparse_steps": 0}, {"dense_steps": 0}, {"end": 1}, {"begin": -1}):
        numbers = {"begin": 2, "end": 9, "sparse_steps": 2, "dense_steps": 2} | bad
        with pytest.raises(ValueError, match="steps must satisfy"):
            prune.alternating(0.5, **numbers)


def test_straight_through_masks_follow_the_weights_and_gradients_pass():
    method = prune.straight_through(scores.magnitude, constant(0.5), structure=NM(1, 2), decay=0.25)
    params = methods.params()
    state = method.update(params, method.init(params), None)
    kernel = np.asarray(params["first"]["kernel"])
    mask = np.asarray(state.buffers.masks["first/kernel"])
    assert np.all(mask.reshape(3, 2, 8).sum(axis=1) == 1)
    seen, pull = jax.vjp(lambda p: method.apply(p, state), params)
    np.testing.assert_array_equal(seen["first"]["kernel"], np.where(mask, kernel, 0))
    cotangent = jax.tree.map(jnp.cos, params)
    (gradient,) = pull(cotangent)
    # Zhou et al. 2021, (9): the plain gradient, and decay times the weight where it is masked.
    expected = np.cos(kernel) + 0.25 * np.where(mask, 0, kernel)
    np.testing.assert_allclose(gradient["first"]["kernel"], expected, rtol=1e-6)
    swapped = jax.tree.map(lambda w: w[::-1] if w.ndim == 2 else w, params)
    state = method.update(swapped, state, None)
    assert not np.array_equal(mask, state.buffers.masks["first/kernel"])


def test_straight_through_stands_still_from_its_end_on():
    method = prune.straight_through(scores.magnitude, constant(0.5), every=2, end=3)
    params = methods.params()
    state, made = method.init(params), []
    for step in range(6):
        state = method.update(
            jax.tree.map(lambda w, s=step: jnp.sin((s + 1) * w), params), state, None
        )
        made.append(np.asarray(state.buffers.masks["first/kernel"]))
    assert not np.array_equal(made[0], made[2])
    for quiet, before in ((1, 0), (3, 2), (4, 2), (5, 2)):
        np.testing.assert_array_equal(made[quiet], made[before])
    with pytest.raises(ValueError, match="decay"):
        prune.straight_through(scores.magnitude, constant(0.5), decay=-1.0)


def test_zeros_stay_and_nothing_else_is_held():
    params = methods.params()
    noise = jax.tree.map(lambda w: scores.magnitude(jnp.sin(100 * w)), params)
    masks = prune.masks(noise, 0.5, Block((2, 2)), allocation.global_threshold)
    params = prune.apply_masks(params, masks)
    tx = jaxcomp.wrap_optimizer(optax.adamw(0.1), prune.keep_zeros(Block((2, 2))))
    opt_state, (x, y) = tx.init(params), methods.batch()
    for _ in range(5):
        grads = jax.grad(lambda p, s=opt_state: methods.loss(jaxcomp.compressed(p, s), x, y))(
            params
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    for name, leaf in masks.items():
        np.testing.assert_array_equal(params[name]["kernel"] != 0, leaf["kernel"])
    packed = jaxcomp.pack(params, opt_state)
    assert isinstance(packed["first"]["kernel"], jaxcomp.BlockSparseArray)
    with pytest.raises(ValueError, match=r"second/kernel: Block.* does not tile"):
        prune.keep_zeros(Block((1, 8))).init(methods.params())
