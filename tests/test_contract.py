"""Every method through the same checks: what the protocol promises, whoever wrote the method."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp import tree as tree_lib
from tests import methods
from tests.methods import CASES, Case

# All checks of a method come one after another, so that its programs are still there.
every_method = pytest.mark.parametrize("case", CASES, ids=str, scope="module")


class Setup(NamedTuple):
    """One method, wrapped; a train step, and it jitted, which notes what it is traced for.

    What is not itself under test is jitted too: outside `jit` each operation is a program.
    """

    method: jaxcomp.Compression
    tx: optax.GradientTransformationExtraArgs
    step: Callable[..., Any]
    jitted: Callable[..., Any]
    traces: list[Any]
    init: Callable[..., Any]


def make(method, tx=None) -> Setup:
    # Slow enough not to throw weights back and forth between the codes of the coarsest formats.
    tx = jaxcomp.wrap_optimizer(tx or optax.adam(0.02), method)
    traces = []

    def step(params, opt_state, x, y):
        loss = lambda p: methods.loss(jaxcomp.compressed(p, opt_state), x, y)
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    @jax.jit
    def jitted(*arguments):
        leaves, structure = jax.tree.flatten(arguments)
        traces.append((structure, tuple(map(jax.typeof, leaves))))
        return step(*arguments)

    return Setup(method, tx, step, jitted, traces, jax.jit(tx.init))


@functools.cache
def setup(case: Case) -> Setup:
    """Compiled once for all checks of a method."""
    return make(case.make())


def train(prepared: Setup, steps=6, seed=0, jit=True):
    params = methods.params(seed)
    opt_state = (prepared.init if jit else prepared.tx.init)(params)
    step = prepared.jitted if jit else prepared.step
    for _ in range(steps):
        params, opt_state, _ = step(params, opt_state, *methods.batch())
    return params, opt_state


compressed = jax.jit(jaxcomp.compressed)
loss = jax.jit(methods.loss)


@functools.cache
def trained(case: Case, seed=0):
    return train(setup(case), seed=seed)


def assert_same(a, b):
    """Bit for bit, same structure."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (keys, left), right in zip(
        jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
    ):
        assert left.dtype == right.dtype, keys
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=str(keys))


def assert_close(a, b, tolerance=2e-5):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


@functools.cache
def run_raw(case: Case, steps=6):
    """The protocol without the optimizer: the state after steps on fixed weights."""
    params = methods.params()
    state = jax.jit(setup(case).method.init)(params)
    for _ in range(steps):
        state = raw_update(case)(params, state, jax.tree.map(np.ones_like, params))
    return params, state


@functools.cache
def raw_update(case: Case):
    return jax.jit(setup(case).method.update)


@every_method
def test_apply_keeps_structure_shapes_and_dtypes(case: Case):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params = methods.params(dtype=dtype)
        method = setup(case).method
        seen = method.apply(params, method.init(params))
        assert jax.tree.structure(seen) == jax.tree.structure(params)
        assert jax.tree.map(jnp.shape, seen) == jax.tree.map(jnp.shape, params)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(seen))


@every_method
def test_update_keeps_the_state_structure(case: Case):
    method = setup(case).method
    params = methods.params()
    state = method.init(params)
    new = method.update(params, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for old_leaf, new_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert (old_leaf.shape, old_leaf.dtype) == (new_leaf.shape, new_leaf.dtype)


@every_method
def test_packed_decodes_to_what_the_forward_pass_saw(case: Case):
    method = setup(case).method
    for steps in (0, 2, 6):
        params, state = run_raw(case, steps)
        assert_same(jaxcomp.decode(method.pack(params, state)), method.apply(params, state))


@every_method
def test_packed_decodes_to_what_the_jitted_forward_pass_saw(case: Case):
    method = setup(case).method
    params, state = run_raw(case)
    assert_same(jaxcomp.decode(method.pack(params, state)), jax.jit(method.apply)(params, state))


@every_method
def test_packed_model_computes_what_training_computed(case: Case):
    params, opt_state = trained(case)
    x, _ = methods.batch(5)
    packed = jaxcomp.pack(params, opt_state)
    seen = jaxcomp.compressed(params, opt_state)
    assert_same(jaxcomp.decode(packed), seen)
    np.testing.assert_array_equal(methods.model(jaxcomp.decode(packed), x), methods.model(seen, x))


@every_method
def test_apply_is_the_rest_after_project(case: Case):
    method = setup(case).method
    assert (method.project is None) == (method.apply_projected is None)
    if method.project is None:
        return
    fresh = methods.params()
    assert_same(method.project(fresh, method.init(fresh)), fresh)
    params, state = run_raw(case)
    once = method.project(params, state)
    assert_same(method.project(once, state), once)
    assert_same(method.apply_projected(once, state), method.apply(params, state))


@every_method
def test_removed_weights_are_exactly_zero_after_every_step(case: Case):
    if not case.removes:
        pytest.skip("removes nothing")
    # Momentum, weight decay and noise all try to move a removed weight.
    tx = optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adamw(0.1, weight_decay=0.3))
    prepared = make(case.make(), tx)
    params, (x, y), step = methods.params(), methods.batch(), prepared.jitted
    opt_state = prepared.init(params)
    gone = jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), params)
    for count in range(8):
        params, opt_state, _ = step(params, opt_state, x, y)
        seen = compressed(params, opt_state)
        zero = jax.tree.map(lambda leaf: np.asarray(leaf) == 0, seen)
        for path, before in tree_lib.flatten(gone).items():
            if tree_lib.is_weight(path, before.astype(np.float32)):
                assert np.all(tree_lib.flatten(zero)[path] | ~before), (path, count)
        gone = zero
    removed = sum(int(np.sum(gone[layer]["kernel"])) for layer in gone)
    assert removed >= round(0.6 * 80) - 1


@every_method
def test_jit_equals_eager(case: Case):
    eager, jitted = train(setup(case), 3, jit=False), train(setup(case), 3)
    assert_close(eager[0], jitted[0])
    assert_close(jaxcomp.compressed(*eager), compressed(*jitted))


@every_method
def test_compiles_once(case: Case):
    train(setup(case), steps=6)
    # Between two tests the caches may have been cleared: the same is then traced again.
    assert len(set(setup(case).traces)) == 1


@every_method
def test_scan_over_steps_equals_the_loop(case: Case):
    step, init = setup(case).step, setup(case).init
    params, (x, y) = methods.params(), methods.batch()

    @jax.jit
    def run(params, opt_state):
        body = lambda carry, _: (step(*carry, x, y)[:2], None)
        return jax.lax.scan(body, (params, opt_state), None, length=6)[0]

    scanned = run(params, init(params))
    looped = trained(case)
    assert_close(scanned[0], looped[0])
    assert_close(compressed(*scanned), compressed(*looped))


@every_method
def test_vmap_over_an_ensemble_equals_members_alone(case: Case):
    tx, step = setup(case).tx, setup(case).step
    x, y = methods.batch()
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *(methods.params(s) for s in range(3)))
    opt_states = jax.jit(jax.vmap(tx.init))(stack)
    run = jax.jit(jax.vmap(step, in_axes=(0, 0, None, None)))
    for _ in range(6):
        stack, opt_states, _ = run(stack, opt_states, x, y)
    seen = jax.jit(jax.vmap(jaxcomp.compressed))(stack, opt_states)
    for member in range(3):
        alone, alone_state = trained(case, member)
        mine = lambda leaf, member=member: np.asarray(leaf)[member]
        assert_close(jax.tree.map(mine, stack), alone)
        assert_close(jax.tree.map(mine, seen), compressed(alone, alone_state))


@every_method
def test_donated_buffers(case: Case):
    step = jax.jit(setup(case).step, donate_argnums=(0, 1))
    params, (x, y) = methods.params(), methods.batch()
    opt_state = setup(case).init(params)
    for _ in range(6):
        params, opt_state, _ = step(params, opt_state, x, y)
    plain, plain_state = trained(case)
    assert_same(compressed(params, opt_state), compressed(plain, plain_state))


@every_method
def test_learned_reaches_the_optimizer_and_buffers_do_not(case: Case):
    shown = []

    def record(updates, state, params=None):
        shown.append(params)
        return updates, state

    spy = optax.GradientTransformation(lambda params: optax.EmptyState(), record)
    method = setup(case).method
    prepared = make(method, optax.chain(spy, optax.sgd(0.1)))
    params, opt_state = train(prepared, steps=1)
    state = opt_state.compression
    assert bool(jax.tree.leaves(state.learned)) == case.learns
    inside = [leaf.size for leaf in jax.tree.leaves(shown[0])]
    expected = [leaf.size for leaf in jax.tree.leaves((params, state.learned))]
    assert sorted(inside) == sorted(expected)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(shown[0]))


@every_method
def test_the_one_gradient_is_that_of_apply(case: Case):
    """What the optimizer is handed equals differentiating through `apply` directly."""
    method = setup(case).method
    params, state = run_raw(case)
    x, y = methods.batch()
    handed = []

    def record(updates, inner, params=None):
        handed.append(updates)
        return updates, inner

    tx = jaxcomp.wrap_optimizer(
        optax.GradientTransformation(lambda params: optax.EmptyState(), record), method
    )
    opt_state = jax.jit(tx.init)(params).replace(compression=state)

    def training(params, opt_state):
        grads = jax.grad(
            lambda p: methods.loss(jaxcomp.compressed(p, opt_state, projected=False), x, y)
        )(params)
        tx.update(grads, opt_state, params)
        return handed.pop()

    def direct(params, learned):
        return methods.loss(method.apply(params, state._replace(learned=learned)), x, y)

    weights, learned = jax.jit(jax.grad(direct, argnums=(0, 1)))(params, state.learned)
    flat = tree_lib.flatten(
        jax.jit(training)(params, opt_state), is_leaf=lambda leaf: hasattr(leaf, "learned")
    )
    for path, leaf in tree_lib.flatten(weights).items():
        node = flat[path]
        np.testing.assert_allclose(getattr(node, "weight", node), leaf, rtol=1e-5, atol=1e-7)
        if path in learned:
            for got, want in zip(
                jax.tree.leaves(node.learned), jax.tree.leaves(learned[path]), strict=True
            ):
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@every_method
def test_loss_falls(case: Case):
    x, y = methods.batch()
    params, opt_state = train(setup(case), steps=60)
    before = loss(methods.params(), x, y)
    assert loss(compressed(params, opt_state), x, y) < 0.8 * before


@every_method
def test_bad_trees_are_refused_by_path(case: Case):
    if case.name == "identity":
        pytest.skip("takes anything")
    method = setup(case).method
    with pytest.raises(ValueError, match=r"no (weight|leaf)|matches no leaf"):
        method.init({})
    for bad, message in (
        (jnp.full((6, 8), jnp.nan), "NaN"),
        (jnp.full((6, 8), -jnp.inf), "infinite"),
        (jnp.zeros((0, 8)), "no elements"),
    ):
        tree = methods.params()
        tree["second"]["kernel"] = bad
        with pytest.raises(ValueError, match=f"second/kernel.*{message}"):
            method.init(tree)
    tree = methods.params()
    tree["third"] = tree.pop("second")
    params, state = methods.params(), jax.jit(method.init)(methods.params())
    if jax.tree.leaves(state.buffers) and any(
        "second/kernel" in jax.tree_util.keystr(keys)
        for keys, _ in jax.tree_util.tree_flatten_with_path(state)[0]
    ):
        with pytest.raises(ValueError, match="second/kernel"):
            method.apply(tree, state)
        params["second"]["kernel"] = jnp.ones((3, 4))
        with pytest.raises(ValueError, match="second/kernel"):
            method.apply(params, state)
