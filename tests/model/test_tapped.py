"""Operations done otherwise: swaps in every kind of body, with and without a state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.model import tapped
from jaxcomp.model.program import read, walk

X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
W = jnp.linspace(0.5, 1.5, 9).reshape(3, 3)


def doubled(inputs, bind):
    """Twice what the operation makes: easy to count in a result."""
    return [2 * result for result in bind(*inputs)]


def swapped(function, params, *inputs, swap=doubled, name="dot_general"):
    """The function with every operation of a name swapped."""
    program = read(function, params, *inputs)
    swaps = {op: swap for op in walk(program.block) if op.name == name}
    assert swaps

    def run(params, *inputs):
        values = jax.tree.leaves((params, inputs))
        outputs, state = tapped.run(program, values, {}, {}, swaps)
        assert state == {}
        return jax.tree.unflatten(program.out_tree, outputs)

    return run


def plain(w, x):
    return jnp.tanh(x @ w)


def scanned(w, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), h.sum()), x, length=3)


def scanned_layers(w, x):
    return jax.lax.scan(lambda h, v: (jnp.tanh(h @ v), None), x, jnp.stack([w, 2 * w]))[0]


def looped(w, x):
    return jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ w), x)


def branched(w, x):
    return jax.lax.cond(x[0, 0] < 0, lambda h: jnp.tanh(h @ w), lambda h: h, x)


def remembered(w, x):
    return jax.checkpoint(lambda h: jnp.tanh(h @ w))(x)


MODELS = [plain, scanned, scanned_layers, looped, branched, remembered]


@pytest.mark.parametrize("model", MODELS)
def test_a_swap_of_the_same_operation_changes_nothing(model):
    same = swapped(model, W, X, swap=lambda inputs, bind: bind(*inputs))
    for got, wanted in zip(
        jax.tree.leaves(jax.jit(same)(W, X)), jax.tree.leaves(jax.jit(model)(W, X)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("model", MODELS)
def test_a_swap_counts_wherever_the_operation_lies(model):
    # Twice each product is the product with twice the weight: the model itself is the oracle.
    twice = swapped(model, W, X)
    got, tangents = jax.jvp(lambda w: twice(w, X), (W,), (jnp.ones_like(W),))
    wanted, wanted_tangents = jax.jvp(lambda w: model(2 * w, X), (W,), (jnp.ones_like(W),))
    for a, b in zip(
        jax.tree.leaves((got, tangents)), jax.tree.leaves((wanted, wanted_tangents)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [plain, scanned, branched, remembered])
def test_gradients_flow_through_a_swap(model):
    def loss(function, w):
        return sum(jnp.sum(out**2) for out in jax.tree.leaves(function(w, X)))

    got = jax.grad(functools.partial(loss, swapped(model, W, X)))(W)
    wanted = jax.grad(lambda w: loss(model, 2 * w))(W)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_remat_stays_around_what_is_swapped():
    policy = jax.checkpoint_policies.nothing_saveable
    model = jax.checkpoint(lambda w, x: jnp.tanh(x @ w) @ w, policy=policy, prevent_cse=False)
    jaxpr = jax.make_jaxpr(swapped(model, W, X))(W, X)
    (eqn,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in ("checkpoint", "remat2")]
    assert eqn.params["policy"] is policy
    assert eqn.params["prevent_cse"] is False


@jax.custom_jvp
def _odd(x, w):
    return jnp.sin(x) @ w


_odd.defjvp(lambda primals, tangents: (_odd(*primals), 7.0 * tangents[0]))


def test_a_rule_stays_where_no_swap_lies_inside_and_goes_where_one_does():
    def model(w, x):
        return _odd(x, w) * w.sum()

    beside = swapped(model, W, X, name="mul", swap=lambda inputs, bind: bind(*inputs))
    inside = swapped(model, W, X, swap=lambda inputs, bind: bind(*inputs))
    one = jnp.ones_like(X)
    tangent = jax.jvp(lambda x: beside(W, x), (X,), (one,))[1]
    np.testing.assert_allclose(tangent, 7.0 * W.sum() * one, rtol=1e-6)
    own = jax.jvp(lambda x: (jnp.sin(x) @ W) * W.sum(), (X,), (one,))[1]
    np.testing.assert_allclose(jax.jvp(lambda x: inside(W, x), (X,), (one,))[1], own, rtol=1e-6)


def _remembering(model, own_turns):
    """A run in which each product adds its number of calls and its greatest input to a state."""
    program = read(model, W, X)
    (product,) = [op for op in walk(program.block) if op.name == "dot_general"]
    outside = dict(tapped.around(program))[product]
    loops = tuple(op for op, _ in outside if op.name == "scan") if own_turns else ()

    def perform(entries, inputs, bind):
        times, most = entries["seen"]
        entries = {"seen": (times + 1, jnp.maximum(most, jnp.max(jnp.abs(inputs[0]))))}
        return bind(inputs[0], 2 * inputs[1]), entries

    swaps = {product: tapped.Swap(("seen",), loops, perform)}

    def run(state, w, x):
        outputs, state = tapped.run(program, (w, x), {}, state, swaps)
        return jax.tree.unflatten(program.out_tree, outputs), state

    return run


@pytest.mark.parametrize(
    ("model", "times"), [(plain, 1), (scanned, 3), (looped, 3), (branched, 1), (remembered, 1)]
)
def test_a_swap_folds_a_state_through_every_body(model, times):
    run = _remembering(model, own_turns=False)
    outputs, state = jax.jit(run)({"seen": (0, 0.0), "other": 5}, W, X)
    assert state["other"] == 5
    assert state["seen"][0] == times
    assert state["seen"][1] >= jnp.max(jnp.abs(X))
    for got, wanted in zip(jax.tree.leaves(outputs), jax.tree.leaves(model(2 * W, X)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_turns_of_a_loop_own_entries_where_it_is_named():
    run = _remembering(scanned_layers, own_turns=True)
    _, state = run({"seen": (jnp.zeros(2, int), jnp.zeros(2))}, W, X)
    np.testing.assert_array_equal(state["seen"][0], [1, 1])
    second = jnp.max(jnp.abs(jnp.tanh(X @ (2 * W))))
    np.testing.assert_allclose(state["seen"][1], [1.0, second], rtol=1e-6)


def test_a_tap_sees_what_the_program_gives_to_a_swapped_operation():
    program = read(plain, W, X)
    (product,) = [op for op in program.block.ops if op.name == "dot_general"]
    tap = tapped.Tap("first", (), lambda entry, inputs: inputs[0].sum())
    swap = tapped.Swap(
        ("calls",),
        (),
        lambda entries, inputs, bind: (bind(0 * inputs[0], inputs[1]), {"calls": 1}),
    )
    state = {"first": 0.0, "calls": 0}
    outputs, state = tapped.run(program, (W, X + 1), {product: [tap]}, state, {product: swap})
    assert state["calls"] == 1
    np.testing.assert_allclose(state["first"], (X + 1).sum())
    np.testing.assert_array_equal(outputs[0], 0 * X)


@pytest.mark.parametrize("model", MODELS)
def test_a_swap_that_works_on_no_entry_counts_too(model):
    swap = tapped.Swap((), (), lambda entries, inputs, bind: (doubled(inputs, bind), entries))
    got = jax.tree.leaves(swapped(model, W, X, swap=swap)(W, X))
    for a, b in zip(got, jax.tree.leaves(model(2 * W, X)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("results", [[X[:, :2]], [X.astype(jnp.bfloat16)], []])
def test_a_swap_must_make_what_its_operation_makes(results):
    wrong = swapped(plain, W, X, swap=lambda inputs, bind: results)
    with pytest.raises(ValueError, match=r"the swap of dot_general makes .*must make"):
        wrong(W, X)
