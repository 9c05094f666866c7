"""Composition: chain is associative, identity is neutral, partition aims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp import (
    CodebookArray,
    Compression,
    QuantizedArray,
    SparseArray,
    State,
    chain,
    decode,
    identity,
    partition,
    prune,
    quantize,
    share,
)
from jaxcomp import tree as tree_lib
from jaxcomp.compression import keep
from jaxcomp.quantize import Format
from tests import methods


def scaling(factor: float) -> Compression:
    """Learns a gain per leaf, starting from `factor`: order matters, and gradients are exact."""

    def init(params):
        leaves = tree_lib.select(params)
        return State({p: jnp.float32(factor) for p in leaves}, {p: jnp.int32(0) for p in leaves})

    def apply(params, state):
        leaves = tree_lib.take(params, state.buffers)
        return tree_lib.replace(params, {p: w * state.learned[p] for p, w in leaves.items()})

    def update(params, state, grads):
        counts = {p: n + 1 for p, n in state.buffers.items()}
        # What a method is shown as gradient decides its state, so a wrong one is seen.
        seen = tree_lib.take(grads, counts)
        learned = {p: v - 0.01 * jnp.mean(seen[p]) for p, v in state.learned.items()}
        return State(learned, counts)

    return Compression(init, apply, update, apply)


def halving() -> Compression:
    """Zeroes every second weight from its second update on; lives in the weights."""

    def init(params):
        return State({}, (jnp.int32(0), {p: () for p in tree_lib.select(params)}))

    def apply(params, state):
        step, paths = state.buffers
        news = {}
        for path, leaf in tree_lib.take(params, paths).items():
            odd = jnp.arange(leaf.size).reshape(leaf.shape) % 2 == 1
            news[path] = jnp.where(odd | (step < 2), leaf, 0)
        return tree_lib.replace(params, news)

    def update(params, state, grads):
        return State({}, (state.buffers[0] + 1, state.buffers[1]))

    return Compression(init, apply, update, apply, project=apply, apply_projected=keep)


ATOMS = {
    "identity": identity,
    "scale": lambda: scaling(0.5),
    "scale-up": lambda: scaling(3.0),
    "halve": halving,
    "quantize": lambda: quantize.train(Format(4), begin=1),
}


def run(method, steps=3):
    """Effective weights, decoded pack, projected weights and pulled-back gradients after steps."""
    params = methods.params()
    state = method.init(params)
    for step in range(steps):
        grads = jax.tree.map(lambda w, s=step: jnp.cos(7 * w + s), params)
        state = method.update(params, state, grads)
    grads = jax.grad(
        lambda p: sum(jnp.sum(jnp.sin(w)) for w in jax.tree.leaves(method.apply(p, state)))
    )
    projected = method.project(params, state) if method.project else params
    rest = method.apply_projected or method.apply
    return (
        method.apply(params, state),
        decode(method.pack(params, state)),
        rest(projected, state),
        grads(params),
    )


def assert_equal(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)


atoms = st.sampled_from(sorted(ATOMS))


@settings(max_examples=12)
@given(st.lists(atoms, min_size=3, max_size=4), st.data())
def test_chain_is_associative(names, data):
    cut = data.draw(st.integers(1, len(names) - 1))
    made = [ATOMS[name]() for name in names]
    flat = run(chain(*made))
    assert_equal(flat, run(chain(chain(*made[:cut]), chain(*made[cut:]))))
    # What lives in the weights does so however the chain is grouped.
    grouped = chain(chain(*made[:cut]), chain(*made[cut:]))
    assert (grouped.project is None) == (chain(*made).project is None)


@settings(max_examples=12)
@given(st.lists(atoms, max_size=3), st.integers(0, 3))
def test_identity_is_neutral(names, position):
    made = [ATOMS[name]() for name in names]
    padded = [*made[:position], identity(), *made[position:]]
    assert_equal(run(chain(*made)), run(chain(*padded)))


def test_order_is_the_order_of_application():
    params = methods.params()
    one = chain(halving(), scaling(2.0))
    state = one.init(params)
    assert float(one.apply(params, state)["first"]["kernel"][0, 1]) == pytest.approx(
        2 * float(params["first"]["kernel"][0, 1])
    )
    first = chain(quantize.train(Format(2)), scaling(0.3))
    seen = first.apply(params, first.init(params))["first"]["kernel"]
    rounded = quantize.encode(params["first"]["kernel"], Format(2)).decode()
    np.testing.assert_array_equal(seen, rounded * jnp.float32(0.3))


def test_each_method_is_updated_with_the_gradient_of_its_own_output():
    shown = {}

    def spy(name):
        def update(params, state, grads):
            shown[name] = (params["first"]["kernel"], grads["first"]["kernel"])
            return state

        return identity()._replace(update=update)

    params = methods.params()
    method = chain(spy("before"), scaling(0.5), spy("after"))
    grads = jax.tree.map(jnp.ones_like, params)
    method.update(params, method.init(params), grads)
    np.testing.assert_allclose(shown["after"][1], 1.0)
    np.testing.assert_allclose(shown["before"][1], 0.5)
    np.testing.assert_array_equal(shown["before"][0], params["first"]["kernel"])


def test_last_method_that_packs_a_leaf_decides_its_form():
    prune_now = prune.gradual(prune.scores.magnitude, prune.cubic(0.5, 0, 0))

    def form(method):
        params = methods.params()
        state = method.init(params)
        for _ in range(2):
            state = method.update(params, state, params)
        return type(method.pack(params, state)["first"]["kernel"])

    assert form(prune_now) is SparseArray
    assert form(chain(prune_now, quantize.train(Format(4)))) is QuantizedArray
    assert form(chain(prune_now, share.train(4, begin=1))) is CodebookArray
    assert form(chain(prune_now, identity())) is SparseArray
    # A method that has not begun leaves the packing to the one before it.
    assert form(chain(prune_now, quantize.train(Format(4), begin=9))) is SparseArray
    only_second = partition({"second/*": quantize.train(Format(4))})
    assert form(chain(prune_now, only_second)) is SparseArray


def test_zeros_of_a_pruner_stay_zero_in_what_follows():
    for after in (
        quantize.train(Format(3, symmetric=False)),
        quantize.train(Format(2)),
        share.train(4, begin=2),
        share.train(3),
    ):
        method = chain(
            prune.gradual(prune.scores.magnitude, prune.cubic(0.7, begin=1, end=6), every=1), after
        )
        params = methods.params()
        state = method.init(params)
        for _ in range(8):
            state = method.update(params, state, params)
            mask = state.buffers[0].masks
            seen = tree_lib.flatten(method.apply(params, state))
            for path, kept in mask.items():
                assert jnp.all(jnp.where(kept, 0, seen[path]) == 0), path
        packed = decode(method.pack(params, state))
        assert float(jnp.mean(packed["first"]["kernel"] == 0)) >= 0.7 - 1e-6


def test_partition_first_match_wins_and_unmatched_leaves_are_left_alone():
    method = partition({"first/*": quantize.train(Format(2)), "*": scaling(0.5)})
    params = methods.params()
    seen = method.apply(params, method.init(params))
    expected = quantize.encode(params["first"]["kernel"], Format(2)).decode()
    np.testing.assert_array_equal(seen["first"]["kernel"], expected)
    np.testing.assert_array_equal(seen["second"]["kernel"], params["second"]["kernel"] * 0.5)
    assert seen["first"]["bias"] is params["first"]["bias"]
    none = partition({"first/*": None, "second/*": scaling(0.5)})
    assert none.apply(params, none.init(params))["first"]["kernel"] is params["first"]["kernel"]


def test_partition_reaches_biases_only_when_told_to():
    params = methods.params()
    with pytest.raises(ValueError, match=r"'\*/bias' matches only leaves that are not compressed"):
        partition({"*/bias": scaling(0.5)}).init(params)
    method = partition({"*/bias": scaling(0.5)}, where=lambda path, leaf: True)
    seen = method.apply(params, method.init(params))
    np.testing.assert_allclose(seen["first"]["bias"], 0.05)
    assert seen["first"]["kernel"] is params["first"]["kernel"]


def test_nested_partitions_see_full_paths():
    inner = partition({"first/kernel": scaling(0.5)})
    method = partition({"first/*": inner})
    params = methods.params()
    seen = method.apply(params, method.init(params))
    np.testing.assert_allclose(seen["first"]["kernel"], params["first"]["kernel"] * 0.5)


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({}, ValueError, "at least one rule"),
        ({"*": "int8"}, TypeError, "int8"),
        ({"*": quantize.train}, TypeError, "function"),
    ],
)
def test_bad_rules(rules, error, message):
    with pytest.raises(error, match=message):
        partition(rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"frist/*": identity()}, r"pattern 'frist/\*' matches no leaf; nearest: first/"),
        ({"*": identity(), "first/*": identity()}, "matches only leaves that earlier rules took"),
    ],
)
def test_patterns_that_aim_at_nothing(rules, message):
    with pytest.raises(ValueError, match=message):
        partition(rules).init(methods.params())


def test_chain_refuses_what_is_no_method():
    with pytest.raises(TypeError, match="None"):
        chain(identity(), None)


def test_states_of_other_chains_are_refused():
    params = methods.params()
    two = chain(identity(), identity())
    with pytest.raises(ValueError, match="not that of a chain of 2"):
        two.apply(params, identity().init(params))
