"""Movement pruning against the paper's rules in plain float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp import prune
from jaxcomp.arrays import BlockSparseArray, SparseArray
from jaxcomp.prune.structures import Block, Channel
from jaxcomp.prune.training.movement import movement, soft_movement
from tests import methods


def scored(method, params, scores):
    """A state with these scores and the masks that follow from them."""
    state = method.init(params)._replace(learned=scores)
    return method.update(params, state, params)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_training_follows_the_paper_step_by_step():
    """Linear regression with plain SGD, simulated with nothing of jaxcomp or JAX."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=(20, 4))
    weight, scores = rng.normal(size=(6, 4)), np.zeros((6, 4))
    rate, steps = 0.05, 25
    schedule = prune.cubic(0.5, begin=4, end=20)
    tx = jaxcomp.wrap_optimizer(optax.sgd(rate), movement(schedule, every=3))
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        loss = lambda p: jnp.sum((x @ jaxcomp.compressed(p, opt_state)["kernel"] - y) ** 2) / 20
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    mask, came_back = np.ones((6, 4), bool), 0
    for count in range(steps):
        gradient = 2 * x.T @ (x @ (weight * mask) - y) / 20
        weight, scores = weight - rate * gradient * mask, scores - rate * gradient * weight
        if count % 3 == 0 or count == 20:
            removed = int(float(schedule(count)) * 24 + 0.5)
            before, mask = mask, np.ones(24, bool)
            mask[np.argsort(scores.ravel(), kind="stable")[:removed]] = False
            mask = mask.reshape(6, 4)
            came_back += np.sum(mask & ~before)
        params, opt_state = step(params, opt_state)
        np.testing.assert_array_equal(opt_state.compression.buffers.masks["kernel"], mask)
        np.testing.assert_allclose(params["kernel"], weight, rtol=2e-4, atol=2e-5)
        learned = opt_state.compression.learned["kernel"]
        np.testing.assert_allclose(learned, scores, rtol=2e-4, atol=2e-5)
    assert came_back > 0, "this path should see a weight return, or the test is too tame"
    assert mask.sum() == 12


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_are_learned_everywhere_and_weights_where_kept(dtype):
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.normal(size=(5, 4)), dtype)
    scores = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    upstream = jnp.asarray(rng.normal(size=(5, 4)), dtype)
    method, params = movement(prune.constant(0.5)), {"kernel": weight}
    state = scored(method, params, {"kernel": scores})

    def loss(weight, scores):
        seen = method.apply({"kernel": weight}, state._replace(learned={"kernel": scores}))
        return jnp.sum(seen["kernel"].astype(jnp.float32) * upstream.astype(jnp.float32))

    got_weight, got_scores = jax.grad(loss, argnums=(0, 1))(weight, scores)
    mask = np.asarray(state.buffers.masks["kernel"])
    assert mask.sum() == 10
    np.testing.assert_array_equal(got_weight, np.where(mask, upstream, 0))
    product = np.asarray(upstream, np.float64) * np.asarray(weight, np.float64)
    np.testing.assert_allclose(got_scores, product, rtol=1e-6)
    assert got_scores.dtype == jnp.float32
    assert got_weight.dtype == dtype


def test_the_count_is_exact_also_when_all_scores_are_equal():
    params = {"kernel": jnp.ones((7, 5))}
    for sparsity in (0.0, 0.13, 0.5, 0.9):
        method = movement(prune.constant(sparsity))
        state = scored(method, params, {"kernel": jnp.zeros((7, 5))})
        assert jnp.sum(~state.buffers.masks["kernel"]) == round(sparsity * 35)


def test_structures_and_allocations_reach_the_mask_engine():
    params = methods.params()
    scores = {
        f"{layer}/kernel": jax.random.normal(jax.random.key(i), params[layer]["kernel"].shape)
        for i, layer in enumerate(params)
    }
    blocks = movement(prune.constant(0.5), structure=Block((2, 2)))
    state = scored(blocks, params, scores)
    packed = blocks.pack(params, state)
    assert isinstance(packed["first"]["kernel"], BlockSparseArray)
    seen = blocks.apply(params, state)["first"]["kernel"]
    np.testing.assert_array_equal(packed["first"]["kernel"].decode(), seen)
    mean = np.asarray(scores["first/kernel"], np.float64).reshape(3, 2, 4, 2).mean(axis=(1, 3))
    kept = np.asarray(seen != 0).reshape(3, 2, 4, 2).all(axis=(1, 3))
    assert kept.sum() == 6
    assert mean[kept].min() > mean[~kept].max()

    everywhere = movement(prune.constant(0.5), allocation=prune.allocation.global_threshold)
    scores["second/kernel"] += 1.0
    masks = scored(everywhere, params, scores).buffers.masks
    flat = np.concatenate([np.ravel(scores[path]) for path in masks])
    limit = np.sort(flat)[40]
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, np.asarray(scores[path]) >= limit)


def test_masks_are_renewed_every_so_often_and_where_the_schedule_comes_to_rest():
    method, params = movement(prune.cubic(0.5, 0, 7), every=5), {"kernel": jnp.ones((4, 4))}
    state, renewed = method.init(params), []
    for step in range(14):
        scores = {"kernel": jax.random.normal(jax.random.key(step), (4, 4))}
        new = method.update(params, state._replace(learned=scores), params)
        if jnp.any(new.buffers.masks["kernel"] != state.buffers.masks["kernel"]):
            renewed.append(step)
        state = new
    # At step 0 the sparsity is still 0.
    assert renewed == [5, 7, 10]


def test_soft_masks_and_the_gradient_of_their_penalty():
    rng = np.random.default_rng(2)
    weight, scores = rng.normal(size=(6, 5)), rng.normal(size=(6, 5)) * 2
    upstream, threshold, penalty = rng.normal(size=(6, 5)), 0.3, 0.25
    method = soft_movement(threshold, penalty)
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state = method.init(params)

    def seen(weight, scores):
        return method.apply({"kernel": weight}, state._replace(learned={"kernel": scores}))

    def loss(weight, scores):
        return jnp.sum(seen(weight, scores)["kernel"] * upstream)

    arguments = params["kernel"], jnp.asarray(scores, jnp.float32)
    mask = sigmoid(scores) > threshold
    assert 0 < mask.sum() < 30
    np.testing.assert_array_equal(seen(*arguments)["kernel"], np.where(mask, params["kernel"], 0))
    got_weight, got_scores = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arguments)
    np.testing.assert_allclose(got_weight, upstream * mask, rtol=1e-6)
    # The slope of the penalty by central differences of its own definition.
    eps = 1e-6
    slope = penalty * (sigmoid(scores + eps) - sigmoid(scores - eps)) / (2 * eps)
    np.testing.assert_allclose(got_scores, upstream * weight + slope, rtol=1e-5, atol=1e-6)


def test_a_penalty_makes_soft_movement_sparse_and_what_is_packed_is_what_is_seen():
    x, y = methods.batch()
    kept = []
    for penalty in (0.0, 0.02, 0.2):
        tx = jaxcomp.wrap_optimizer(optax.sgd(0.2), soft_movement(0.45, penalty))

        @jax.jit
        def train(params, opt_state, tx=tx):
            def body(carry, _):
                params, opt_state = carry
                loss = lambda p: methods.loss(jaxcomp.compressed(p, opt_state), x, y)
                updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), None

            return jax.lax.scan(body, (params, opt_state), None, length=100)[0]

        params, opt_state = train(methods.params(), tx.init(methods.params()))
        seen = jaxcomp.compressed(params, opt_state)
        packed = jaxcomp.pack(params, opt_state)
        for layer in seen:
            np.testing.assert_array_equal(
                jaxcomp.decode(packed)[layer]["kernel"], seen[layer]["kernel"]
            )
        kept.append(sum(int(jnp.sum(seen[layer]["kernel"] != 0)) for layer in seen))
    assert kept[0] > kept[1] > kept[2]
    assert isinstance(packed["first"]["kernel"], SparseArray)


def test_bad_arguments_and_leaves_are_refused():
    with pytest.raises(ValueError, match="every"):
        movement(prune.constant(0.5), every=0)
    for bad in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            soft_movement(bad, 0.1)
    with pytest.raises(ValueError, match="penalty"):
        soft_movement(0.1, -1.0)
    with pytest.raises(ValueError, match="nothing would be kept"):
        soft_movement(0.6, 0.1, initial=0.0)
    with pytest.raises(ValueError, match=r"kernel.*does not tile"):
        movement(prune.constant(0.5), structure=Block((3, 3))).init({"kernel": jnp.ones((4, 4))})
    with pytest.raises(ValueError, match="kernel"):
        movement(prune.constant(0.9), structure=Channel(-1)).init({"kernel": jnp.ones((4, 2))})
