"""Quantization-aware training as a method: when it begins, what it shows, and what it packs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp import partition, quantize
from jaxcomp.compression import State
from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor
from jaxcomp.quantize.training.leafwise import QuantizeBuffers
from tests.quantize.quantize_reference import encode_jit, name_of, same_bits, samples

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)


def make(dtype=jnp.float32):
    return {
        "first": {"kernel": jnp.asarray(RNG.normal(size=(8, 8)), dtype), "bias": jnp.zeros(8)},
        "last": {"kernel": jnp.asarray(RNG.normal(size=(8, 8)), dtype), "scale": jnp.ones((8, 1))},
    }


def loss(params):
    hidden = jnp.tanh(X @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean((hidden @ params["last"]["kernel"] - Y) ** 2)


def kernels(tree):
    return [tree["first"]["kernel"], tree["last"]["kernel"]]


def test_begin_decides_exactly():
    """Dense before, quantized from step 3 on: the same weights as plain Adam and then not."""
    format, traces = Format(4), []
    tx = jaxcomp.wrap_optimizer(optax.adam(1e-3), quantize.train(format, begin=3))
    plain = optax.adam(1e-3)

    @jax.jit
    def step(params, opt_state):
        traces.append(1)

        def seen_loss(params):
            seen = jaxcomp.compressed(params, opt_state)
            return loss(seen), seen

        (_, seen), grads = jax.value_and_grad(seen_loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, seen, grads

    @jax.jit
    def plain_step(params, opt_state):
        grads = jax.grad(loss)(params)
        updates, opt_state = plain.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    gradient = jax.jit(jax.grad(loss))
    params = make()
    opt_state, dense = tx.init(params), (params, plain.init(params))
    for index in range(6):
        before = params
        assert int(opt_state.compression.buffers.step) == index
        packed = jaxcomp.pack(params, opt_state)
        outside = jaxcomp.compressed(params, opt_state)
        params, opt_state, seen, grads = step(params, opt_state)
        for weight, shown, shipped, alone in zip(
            kernels(before), kernels(seen), kernels(packed), kernels(outside), strict=True
        ):
            if index < 3:
                assert same_bits(shown, weight)
                assert shipped is weight
            else:
                assert isinstance(shipped, jaxcomp.QuantizedArray)
                assert same_bits(shipped.decode(), shown)
                assert not same_bits(shown, weight)
            assert same_bits(alone, shown)
        # The gradient is that with respect to what was seen.
        for grad, expected in zip(kernels(grads), kernels(gradient(seen)), strict=True):
            np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)
        if index < 3:
            dense = plain_step(*dense)
        same = [same_bits(a, b) for a, b in zip(kernels(params), kernels(dense[0]), strict=True)]
        assert all(same) if index < 3 else not any(same)
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_only_weights_are_touched():
    params = make()
    method = quantize.train(Format(4))
    state = method.init(params)
    seen, packed = method.apply(params, state), method.pack(params, state)
    for tree in (seen, packed):
        assert tree["first"]["bias"] is params["first"]["bias"]
        assert tree["last"]["scale"] is params["last"]["scale"]
    assert jax.tree.structure(seen) == jax.tree.structure(params)
    assert state.learned == {}


def test_the_counter_saturates():
    top = np.iinfo(np.int32).max
    method = quantize.train(Format(4), begin=5)
    params = make()
    state = State({}, QuantizeBuffers(jnp.asarray(top - 1, jnp.int32)))
    for _ in range(3):
        state = jax.jit(method.update)(params, state, params)
    assert int(state.buffers.step) == top
    assert state.buffers.step.dtype == jnp.int32
    assert isinstance(method.pack(params, state)["first"]["kernel"], jaxcomp.QuantizedArray)


def test_the_last_step_that_can_be_begun_at():
    method = quantize.train(Format(4), begin=2**31 - 1)
    params = make()
    state = method.init(params)
    assert same_bits(method.apply(params, state)["first"]["kernel"], params["first"]["kernel"])
    assert method.pack(params, state) is params
    with pytest.raises(ValueError, match="begin must be a step from 0 to 2147483647"):
        quantize.train(Format(4), begin=2**31)


LAW = [
    Format(2, True, PerTensor()),
    Format(3, False, PerGroup(2)),
    Format(4, True, PerChannel(-1)),
    Format(8, False, PerTensor()),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=name_of)
def test_law_of_the_method(dtype):
    """What training shows is what is packed, to the bit: eager, compiled, and decoded in jit."""
    methods = [quantize.train(format, begin=index % 3) for index, format in enumerate(LAW)]
    kinds = ("huge, lopsided", "mixed")
    params = {kind: {"kernel": samples(dtype)[kind]} for kind in kinds}
    states = [State({}, QuantizeBuffers(jnp.asarray(2, jnp.int32))) for _ in methods]

    @jax.jit
    def compiled(params, states):
        return [m.apply(params, state) for m, state in zip(methods, states, strict=True)]

    shown = compiled(params, states)
    for method, state, seen in zip(methods, states, shown, strict=True):
        packed = method.pack(params, state)
        dense = jax.jit(jaxcomp.decode)(packed)
        for kind in params:
            expected = packed[kind]["kernel"].decode()
            assert same_bits(seen[kind]["kernel"], expected)
            assert same_bits(dense[kind]["kernel"], expected)
    eager = methods[2].apply(params, states[2])
    assert jax.tree.all(jax.tree.map(same_bits, eager, shown[2]))


def test_stacked_layers_in_a_scan():
    """A scanned model is quantized layer by layer, by a method that saw the stack."""
    format = Format(4, False, PerChannel((0, -1)))
    params = {"layers": {"kernel": jnp.asarray(RNG.normal(size=(5, 8, 8)), jnp.float32)}}
    method = quantize.train(format)
    state = method.init(params)
    packed = method.pack(params, state)
    assert packed["layers"]["kernel"].scale.shape == (5, 1, 8)

    @jax.jit
    def run(layers):
        def layer(x, leaves):
            weights = jaxcomp.decode(leaves)["kernel"]
            return jnp.tanh(x @ weights), weights

        return jax.lax.scan(layer, X, layers)

    out, weights = run(packed["layers"])
    seen = method.apply(params, state)
    assert same_bits(weights, seen["layers"]["kernel"])
    assert same_bits(out, run(seen["layers"])[0])
    alone = encode_jit(params["layers"]["kernel"][2], Format(4, False, PerChannel(-1)))
    assert same_bits(weights[2], alone.decode())


def test_steps_inside_scan_and_donated():
    tx = jaxcomp.wrap_optimizer(optax.adam(1e-2), quantize.train(Format(3), begin=4))

    def step(carry, _):
        params, opt_state = carry
        value, grads = jax.value_and_grad(lambda p: loss(jaxcomp.compressed(p, opt_state)))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    params = make()
    start = (params, tx.init(params))
    scanned, losses = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=30))(start)
    donated = jax.jit(step, donate_argnums=0)
    carry = jax.tree.map(jnp.copy, start)
    for _ in range(30):
        carry, _ = donated(carry, None)
    for a, b in zip(kernels(scanned[0]), kernels(carry[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert int(carry[1].compression.buffers.step) == 30
    assert losses[-1] < losses[4]


def test_partition_gives_each_leaf_its_format():
    params = make()
    method = partition(
        {"first/*": quantize.train(Format(8)), "*": quantize.train(Format(2, False))}
    )
    packed = method.pack(params, method.init(params))
    assert (packed["first"]["kernel"].bits, packed["last"]["kernel"].bits) == (8, 2)
    assert packed["last"]["kernel"].zero_point is not None
