"""Bits that fall in stages: the format of each step, and that it is what is packed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp import quantize
from jaxcomp.quantize import Format, PerGroup, PerTensor
from jaxcomp.quantize.formats import GridFormat
from jaxcomp.quantize.training.learned_step import learned_step
from jaxcomp.quantize.training.step_gradient import initial_step
from tests.quantize.quantize_reference import same_bits

RNG = np.random.default_rng(0)
PARAMS = {
    "first": {"kernel": jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)},
    "last": {"kernel": jnp.asarray(RNG.normal(size=(8, 6)), jnp.bfloat16)},
}
leaves = lambda tree: [tree["first"]["kernel"], tree["last"]["kernel"]]


def steps_of(method, count):
    """The state at each step, and what a function that is compiled once shows there."""
    traces = []

    @jax.jit
    def show(params, state):
        traces.append(1)
        return method.apply(params, state)

    state = method.init(PARAMS)
    for _ in range(count):
        yield state, show(PARAMS, state)
        state = jax.jit(method.update)(PARAMS, state, PARAMS)
    assert len(traces) == 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_stage_is_the_plain_method_at_its_bits(symmetric):
    format = Format(5, symmetric, PerGroup(2))
    method = quantize.train(format, begin=1, bits={2: 8, 3: 4, 5: 2})
    for (state, seen), bits in zip(steps_of(method, 6), (None, 5, 8, 4, 4, 2), strict=True):
        packed = method.pack(PARAMS, state)
        for leaf, shown, shipped, alone in zip(
            *map(leaves, (PARAMS, seen, packed, method.apply(PARAMS, state))), strict=True
        ):
            assert same_bits(shown, alone)
            if bits is None:
                assert shipped is leaf
                assert same_bits(shown, leaf)
                continue
            assert shipped.bits == bits
            assert same_bits(shipped.decode(), shown)
            plain = quantize.encode(leaf, Format(bits, symmetric, PerGroup(2)))
            assert same_bits(plain.decode(), shown)


def test_bits_that_were_due_before_the_begin_are_in_force_at_it():
    method = quantize.train(Format(3), begin=2, bits={0: 8, 1: 6, 4: 4})
    found = [
        getattr(leaves(method.pack(PARAMS, state))[0], "bits", None)
        for state, _ in steps_of(method, 6)
    ]
    assert found == [None, None, 6, 6, 4, 4]


def test_gradients_pass_straight_through_in_every_stage():
    method = quantize.train(Format(8), bits={2: 2})
    ct = {"first": {"kernel": jnp.ones((8, 6))}, "last": {"kernel": jnp.ones((8, 6), jnp.bfloat16)}}
    for state, _ in steps_of(method, 4):
        _, pull = jax.vjp(lambda p, s=state: method.apply(p, s), PARAMS)
        assert jax.tree.all(jax.tree.map(same_bits, pull(ct)[0], ct))


def test_learned_steps_begin_anew_where_bits_change():
    format = Format(8, granularity=PerTensor())
    method = learned_step(format, begin=1, bits={3: 4})
    tx = jaxcomp.wrap_optimizer(optax.sgd(0.1), method)
    params, steps = PARAMS, {}
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(5):
        grads = jax.tree.map(lambda leaf: 0.1 * leaf, params)
        before = params
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        steps[step + 1] = opt_state.compression.learned["first/kernel"]
        if step + 1 in (1, 3):
            bits = {1: 8, 3: 4}[step + 1]
            fresh = initial_step(before["first"]["kernel"], Format(bits, granularity=PerTensor()))
            np.testing.assert_allclose(steps[step + 1], fresh, rtol=1e-6)
    assert not same_bits(steps[1], steps[2])
    assert not same_bits(steps[3], steps[4])


def test_inside_vmap():
    """Members that are at different steps each get their own bits."""
    method = quantize.train(Format(8), bits={1: 2})
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
    states = [state for state, _ in steps_of(method, 2)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    seen = jax.jit(jax.vmap(method.apply))(stack, both)
    for member, state in enumerate(states):
        alone = method.apply(PARAMS, state)
        got = jax.tree.map(lambda leaf, m=member: leaf[m], seen)
        assert jax.tree.all(jax.tree.map(same_bits, got, alone))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": {}}, ValueError, "bits is empty"),
        ({"bits": 4}, TypeError, "bits must map steps to bits"),
        ({"bits": {-1: 4}}, ValueError, "must be a step from 0"),
        ({"bits": {1.5: 4}}, TypeError, "key of bits must be an int"),
        ({"bits": {0: 9}}, ValueError, "bits must be 1 to 8"),
        ({"bits": {0: 1}}, ValueError, "1 bit"),
        ({"bits": {0: 4}, "format": GridFormat("nf4")}, ValueError, "uniform"),
        ({"begin": -1}, ValueError, "begin must be a step"),
        ({"format": 4}, TypeError, "quantize.Format"),
        ({"trace": "no"}, TypeError, "model.trace"),
    ],
)
def test_what_is_refused(options, error, message):
    from jaxcomp.quantize.training.leafwise import stages_of

    options = {"format": Format(8), "begin": 0, "trace": None, "bits": None} | options
    with pytest.raises(Exception, match=message) as caught:
        # Past the type checks of the tests, to what users without them see.
        getattr(stages_of, "__wrapped__", stages_of)(**options)
    assert isinstance(caught.value, error)
