"""RigL and SET against their definitions in numpy, and what the optimizer forgets."""

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

import jaxcomp
from jaxcomp import prune
from jaxcomp.prune import NM, Block, allocation
from tests import methods


def kernels(seed=0):
    return {
        "one": jax.random.normal(jax.random.key(seed), (12, 10)),
        "two": jax.random.normal(jax.random.key(seed + 1), (10, 6)),
    }


def exchanged(weight, gradient, mask, fraction):
    """Evci et al. 2020: drop the smallest weights there, grow the largest gradients not there."""
    flat, wanted = np.abs(weight).ravel(), np.abs(gradient).ravel()
    there = np.asarray(mask).ravel().copy()
    count = int(np.round(fraction * there.sum()))
    present = np.flatnonzero(there)
    there[present[np.argsort(flat[present], kind="stable")[:count]]] = False
    absent = np.flatnonzero(~there)
    there[absent[np.argsort(wanted[absent], kind="stable")[len(absent) - count :]]] = True
    return there.reshape(weight.shape)


def test_rigl_is_the_published_rule():
    method = prune.rigl(0.8, end=40, every=10, fraction=0.4, key=jax.random.key(0))
    params = kernels()
    state = method.init(params)
    for step in range(45):
        grads = kernels(seed=step + 7)
        before = {path: np.asarray(mask) for path, mask in state.buffers.masks.items()}
        state = method.update(params, state, grads)
        masks = {path: np.asarray(mask) for path, mask in state.buffers.masks.items()}
        for path in params:
            if step == 0:
                continue
            fraction = 0.2 * (1 + np.cos(np.pi * step / 40))
            moves = step % 10 == 0 and step < 40
            expected = (
                exchanged(np.asarray(params[path]), grads[path], before[path], fraction)
                if moves
                else before[path]
            )
            np.testing.assert_array_equal(masks[path], expected)
        removed = sum(int((~mask).sum()) for mask in masks.values())
        assert removed == round(0.8 * 180)
        params = method.apply(jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), state)
    sizes = [part.shape for part in params.values()]
    parts = {str(i): allocation.Part(s, int(np.prod(s))) for i, s in enumerate(sizes)}
    wanted = np.asarray(allocation.erdos_renyi_kernel.counts(parts, 0.8))
    np.testing.assert_array_equal([int((~mask).sum()) for mask in masks.values()], wanted)


def test_set_grows_at_random_and_drops_the_smallest():
    method = prune.sparse_evolution(
        0.5, every=1, fraction=0.3, key=jax.random.key(1), allocation=allocation.uniform
    )
    params = kernels()
    state = method.update(params, method.init(params), None)
    grown = np.zeros((12, 10))
    for _ in range(200):
        old = np.asarray(state.buffers.masks["one"])
        state = method.update(params, state, None)
        new = np.asarray(state.buffers.masks["one"])
        size = np.abs(np.asarray(params["one"]))
        assert new.sum() == old.sum() == 60
        gone = old & ~new
        if gone.any():
            # What has left was among the 18 smallest of those that were there.
            assert size[gone].max() <= np.sort(size[old])[17]
        grown += new & ~old
    # Every weight that keeps being dropped has its chance to come back.
    assert np.corrcoef(grown.ravel(), size.ravel())[0, 1] < -0.3
    small = size < np.quantile(size, 0.3)
    assert grown[small].min() > 0


def by_name(params):
    pick = lambda path, leaf: "slow" if path[0] == "first" else "fast"
    return traverse_util.path_aware_map(pick, params)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.05),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adagrad(0.1)),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
        optax.masked(optax.adam(0.05), lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)),
        optax.multi_transform({"slow": optax.adam(0.01), "fast": optax.adam(0.1)}, by_name),
        optax.MultiSteps(optax.rmsprop(0.05), every_k_schedule=1),
        optax.adafactor(0.05),
    ],
    ids=["adam", "adagrad", "injected", "masked", "split", "multi-steps", "adafactor"],
)
def test_grown_weights_begin_at_zero_with_a_fresh_optimizer(tx):
    """One step after a change, grown weights are zero and their moments are those of `init`."""
    method = prune.rigl(0.5, end=100, every=3, fraction=0.5, key=jax.random.key(0))
    wrapped = jaxcomp.wrap_optimizer(tx, method)
    params, (x, y) = methods.params(), methods.batch()

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda p: methods.loss(jaxcomp.compressed(p, opt_state), x, y))(params)
        updates, opt_state = wrapped.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, grown_ever = wrapped.init(params), 0
    for _ in range(10):
        before = opt_state.compression.buffers.masks
        params, opt_state = step(params, opt_state)
        after = opt_state.compression.buffers.masks
        fresh = jax.tree_util.tree_flatten_with_path(wrapped.init(params).inner)[0]
        now = dict(jax.tree_util.tree_flatten_with_path(opt_state.inner)[0])
        for name in params:
            path = f"{name}/kernel"
            changed = np.asarray(before[path] != after[path])
            grown = np.asarray(after[path] & ~before[path])
            grown_ever += grown.sum()
            assert np.all(np.asarray(params[name]["kernel"])[grown] == 0)
            for keys, leaf in fresh:
                own = f"'{name}'" in str(keys) and "kernel" in str(keys)
                if own and leaf.shape == changed.shape:
                    np.testing.assert_array_equal(
                        np.asarray(now[keys])[changed], np.asarray(leaf)[changed]
                    )
    assert grown_ever > 0


def test_a_weight_with_something_learned_beside_it_is_forgotten_alone():
    method = jaxcomp.chain(
        prune.rigl(0.5, end=100, every=1, fraction=0.5, key=jax.random.key(0)),
        jaxcomp.share.train(3),
    )
    tx = jaxcomp.wrap_optimizer(optax.trace(0.9), method)
    params = kernels()
    state, changes = tx.init(params), 0
    for seed in range(3):
        before = state.compression.buffers[0].masks
        updates, state = tx.update(kernels(seed + 5), state, params)
        params = optax.apply_updates(params, updates)
        for path, node in state.inner.trace.items():
            changed = np.asarray(before[path] != state.compression.buffers[0].masks[path])
            changes += changed.sum()
            assert np.all(np.asarray(node.weight)[changed] == 0)
            assert np.all(np.asarray(node.learned["1"]) != 0)
    assert changes > 0


def test_a_block_comes_and_goes_whole():
    structure = {"one": Block((3, 2)), "two": prune.Channel(0)}
    method = prune.rigl(
        0.5, end=100, every=1, fraction=0.5, key=jax.random.key(0), structure=structure
    )
    params = kernels()
    state, seen = method.init(params), set()
    for step in range(4):
        state = method.update(params, state, kernels(step))
        blocks = np.asarray(state.buffers.masks["one"]).reshape(4, 3, 5, 2)
        np.testing.assert_array_equal(blocks.all(axis=(1, 3)), blocks.any(axis=(1, 3)))
        rows = np.asarray(state.buffers.masks["two"])
        np.testing.assert_array_equal(rows.all(axis=1), rows.any(axis=1))
        assert blocks.any(axis=(1, 3)).sum() + rows.any(axis=1).sum() == 15
        seen.add(blocks.tobytes())
    assert len(seen) == 4


def test_a_state_resumed_otherwise_keeps_its_number_of_weights():
    key, params = jax.random.key(0), kernels()
    first = prune.rigl(0.5, end=100, every=2, key=key)
    state = first.init(params)
    for step in range(5):
        state = first.update(params, state, kernels(step))
    other = prune.rigl(0.8, end=7, every=3, fraction=0.9, key=jax.random.key(1))
    masks, moved = state.buffers.masks, []
    for step in range(5, 13):
        state = other.update(params, state, kernels(step))
        for path, mask in state.buffers.masks.items():
            assert np.sum(mask) == np.sum(masks[path])
        if any(np.any(mask != masks[path]) for path, mask in state.buffers.masks.items()):
            moved.append(step)
        masks = state.buffers.masks
    # Every third step before its own end, and none at 9 and 12.
    assert moved == [6]


def test_what_cannot_be_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="global_threshold ranks scores"):
        prune.rigl(0.5, 10, key=key, allocation=allocation.global_threshold)
    with pytest.raises(ValueError, match="fraction is that of the weights replaced"):
        prune.rigl(0.5, 10, key=key, fraction=1.5)
    with pytest.raises(ValueError, match="end must be at least 1"):
        prune.rigl(0.5, 0, key=key)
    with pytest.raises(ValueError, match="end must be at least 1"):
        prune.sparse_evolution(0.5, end=0, key=key)
    for bad in (0, jax.random.split(key)):
        with pytest.raises(TypeError, match="one PRNG key"):
            prune.rigl(0.5, 10, key=bad)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        prune.sparse_evolution(1.0, key=key)
    method = prune.rigl(0.5, 10, key=key, structure=NM(1, 2))
    with pytest.raises(ValueError, match=r"one: NM.* cannot grow and drop"):
        method.init(kernels())
    method = prune.rigl(0.5, 10, key=key)
    state = method.init(kernels())
    state = method.update(kernels(), state, kernels())
    with pytest.raises(ValueError, match="RigL grows by gradients"):
        method.update(kernels(), state, None)
    with pytest.raises(ValueError, match="one: all 120 units"):
        prune.rigl(0.999, 10, key=key, allocation=allocation.uniform).init(kernels())


def test_methods_that_regrow_must_own_the_weights():
    regrowing = prune.rigl(0.5, 10, key=jax.random.key(0))
    with pytest.raises(ValueError, match="put the one that prunes first"):
        jaxcomp.chain(jaxcomp.quantize.train(jaxcomp.quantize.Format(4)), regrowing)
    with pytest.raises(ValueError, match="put the one that prunes first"):
        jaxcomp.chain(jaxcomp.share.train(4), prune.lottery_ticket(0.5, 2, 2))
