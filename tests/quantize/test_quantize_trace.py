"""Channels from the trace of the model; and states that refuse trees they were not made for."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax import lax

import jaxcomp
from jaxcomp import partition, quantize
from jaxcomp.model.trace import trace
from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor

RNG = np.random.default_rng(0)


def weights(*shape):
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def scale_shape(function, weight, x, path="kernel"):
    """The shape of the scales of a leaf, chosen by the trace."""
    params = {path: weight}
    method = quantize.train(Format(4), trace=trace(lambda p, x: function(p[path], x), params, x))
    state = method.init(params)
    packed = method.pack(params, state)[path]
    np.testing.assert_array_equal(packed.decode(), method.apply(params, state)[path])
    return packed.scale.shape


def convolve(spec):
    return lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=spec)


def scan_layers(w, x):
    return lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0]


@pytest.mark.parametrize(
    ("function", "shape", "inputs", "scales"),
    [
        (lambda w, x: x @ w, (3, 4), (2, 3), (1, 4)),
        (lambda w, x: x @ w.T, (4, 3), (2, 3), (4, 1)),
        (convolve(("NHWC", "HWIO", "NHWC")), (3, 3, 2, 4), (1, 5, 5, 2), (1, 1, 1, 4)),
        (convolve(("NCHW", "OIHW", "NCHW")), (4, 2, 3, 3), (1, 2, 5, 5), (4, 1, 1, 1)),
        (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (6, 2, 3), (4, 6), (1, 2, 3)),
        (lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), (2, 3, 6), (4, 2, 3), (1, 1, 6)),
        (scan_layers, (5, 3, 3), (2, 3), (5, 1, 3)),
        (jax.vmap(lambda w, x: x @ w.T), (5, 4, 3), (5, 2, 3), (5, 4, 1)),
        (lambda w, x: x @ w[1] + x @ w[0], (2, 3, 4), (2, 3), (2, 1, 4)),
        (lambda w, x: x + w, (3, 4), (2, 3, 4), (1, 4)),
    ],
)
def test_a_scale_for_each_output_channel(function, shape, inputs, scales):
    assert scale_shape(function, weights(*shape), weights(*inputs)) == scales


def test_each_output_of_a_transposed_kernel_keeps_its_own_range():
    """Rows of very different size survive, where scales along the last axis would flatten them."""
    rows = weights(4, 6) * jnp.asarray([[1.0], [1e-3], [10.0], [1e3]])
    params, x = {"kernel": rows}, weights(5, 6)

    def model(p, x):
        return x @ p["kernel"].T

    dense = model(params, x)

    def worst(method):
        seen = model(method.apply(params, method.init(params)), x)
        return float(jnp.max(jnp.abs(seen - dense).max(0) / jnp.abs(dense).max(0)))

    assert worst(quantize.train(Format(8), trace=trace(model, params, x))) < 0.02
    assert worst(quantize.train(Format(8))) > 0.5


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, deterministic=True)(x, x)


def test_a_linen_model_under_its_own_paths():
    x = weights(1, 3, 8)
    params = Attention().init(jax.random.key(0), x)["params"]

    def model(params, x):
        return Attention().apply({"params": params}, x)

    method = quantize.train(Format(4), trace=trace(model, params, x))
    packed = method.pack(params, method.init(params))["MultiHeadDotProductAttention_0"]
    assert packed["query"]["kernel"].scale.shape == (1, 2, 4)
    assert packed["out"]["kernel"].scale.shape == (1, 1, 8)
    wrong = quantize.train(Format(4), trace=trace(Attention().apply, {"params": params}, x))
    with pytest.raises(ValueError, match=r"key/kernel: not in the trace .*nearest: params/"):
        wrong.init(params)


def tied(params, tokens):
    return params["embedding"][tokens] @ params["embedding"].T


def test_a_tied_embedding_is_refused_by_path_until_its_axis_is_named():
    params, tokens = {"embedding": weights(9, 4)}, jnp.zeros(3, int)
    found = trace(tied, params, tokens)
    with pytest.raises(ValueError, match="embedding: its uses disagree on the output axes"):
        quantize.train(Format(4), trace=found).init(params)
    method = quantize.train(Format(4, granularity=PerChannel(0)), trace=found)
    assert method.pack(params, method.init(params))["embedding"].scale.shape == (9, 1)


def test_what_the_trace_cannot_answer_is_refused_by_path():
    params = {"used": weights(3, 4), "spare": weights(3, 4)}
    found = trace(lambda p, x: x @ p["used"], params, weights(2, 3))
    with pytest.raises(ValueError, match="spare: the outputs do not depend on it"):
        quantize.train(Format(4), trace=found).init(params)
    with pytest.raises(ValueError, match=r"used: shape \(4, 4\), but \(3, 4\) in the trace"):
        quantize.train(Format(4), trace=found).init({"used": weights(4, 4)})
    found = trace(lambda p, x: jnp.cumsum(p["w"]) * x, {"w": weights(2, 3)}, weights(6))
    with pytest.raises(ValueError, match=r"w: no axis of it is an output channel \(.*cumsum"):
        quantize.train(Format(4), trace=found).init({"w": weights(2, 3)})
    with pytest.raises(TypeError, match="trace"):
        quantize.train(Format(4), trace=tied)  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", [PerTensor(), PerGroup(2), PerChannel(0), PerChannel(1)])
def test_axes_that_the_format_names_stay(granularity):
    params = {"kernel": weights(4, 6)}
    found = trace(lambda p, x: x @ p["kernel"].T, params, weights(2, 6))
    plain = quantize.train(Format(4, granularity=granularity))
    traced = quantize.train(Format(4, granularity=granularity), trace=found)
    for method in (plain, traced):
        state = method.init(params)
        seen = method.apply(params, state)["kernel"]
        np.testing.assert_array_equal(seen, plain.apply(params, plain.init(params))["kernel"])


def test_aimed_by_partition_and_trained():
    params, x = {"a": weights(6, 4), "c": weights(2, 6)}, weights(16, 4)

    def model(p, x):
        return jnp.tanh(x @ p["a"].T) @ p["c"].T

    found = trace(model, params, x)
    method = partition({"a": quantize.train(Format(4), trace=found), "c": None})
    tx = jaxcomp.wrap_optimizer(optax.adam(0.05), method)
    state, target = tx.init(params), weights(16, 2)

    @jax.jit
    def step(params, state):
        def loss(p):
            return jnp.mean((model(jaxcomp.compressed(p, state), x) - target) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    _, _, first = step(params, state)
    value = first
    for _ in range(40):
        params, state, value = step(params, state)
    assert value < 0.8 * first
    assert jaxcomp.pack(params, state)["a"].scale.shape == (6, 1)


# A state is made for one tree.

TREE = {"first": {"kernel": weights(4, 6)}, "second": {"kernel": weights(6, 2)}}
METHODS = [quantize.train(Format(4)), quantize.train(Format(4), begin=3)]


def without(name):
    return {key: value for key, value in TREE.items() if key != name}


@pytest.mark.parametrize("method", METHODS, ids=["now", "later"])
@pytest.mark.parametrize("under", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_tree_that_the_state_was_not_made_for_is_refused_by_path(method, under):
    state = method.init(TREE)
    lacks, other = without("second"), TREE | {"second": {"kernel": weights(2, 6)}}
    for bad, message in (
        (lacks, "'second/kernel', which this tree lacks"),
        (other, r"second/kernel: shape \(2, 6\), but the state was made for \(6, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            under(method.apply)(bad, state)
        with pytest.raises(ValueError, match=message):
            method.pack(bad, state)


def test_what_the_state_remembers_is_no_data_and_survives_every_step():
    method = METHODS[1]
    state = method.init(TREE)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [()]
    shapes = (("first/kernel", (4, 6)), ("second/kernel", (6, 2)))
    stepped = jax.jit(method.update, donate_argnums=1)(TREE, state, TREE)
    scanned, _ = lax.scan(lambda s, _: (method.update(TREE, s, TREE), None), stepped, None, 3)
    template = jax.tree.map(jnp.zeros_like, scanned)
    restored: Any = serialization.from_bytes(template, serialization.to_bytes(scanned))
    for later in (stepped, scanned, restored):
        assert later.buffers.shapes == shapes
    assert int(restored.buffers.step) == 4
    with pytest.raises(ValueError, match="second/kernel"):
        method.apply(without("second"), restored)


def test_members_of_an_ensemble_are_checked_one_by_one():
    method = METHODS[0]
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), TREE)
    states = jax.vmap(method.init)(stack)
    seen = jax.vmap(method.apply)(stack, states)
    alone = method.apply(TREE, method.init(TREE))
    np.testing.assert_array_equal(seen["first"]["kernel"][0], alone["first"]["kernel"])
    with pytest.raises(ValueError, match=r"first/kernel: shape \(2, 4, 6\)"):
        method.apply(stack, states)
