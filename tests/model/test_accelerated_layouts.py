"""Kernels for packed weights that are multiplied from the left, or over their last axis."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcomp
from jaxcomp import quantize, share
from jaxcomp.arrays import BlockSparseArray
from jaxcomp.model import accelerate
from jaxcomp.quantize import Format, PerBlock, PerChannel, PerGroup, PerTensor

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# Of a weight (8, 16) and activations of 8 or of 16.
PRODUCTS = {
    "x @ w": (lambda w, x: x @ w, 8),
    "x @ w.T": (lambda w, x: x @ w.T, 16),
    "over the last": (lambda w, x: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))), 16),
    "w @ x": (lambda w, x: jax.lax.dot_general(w, x, (((1,), (1,)), ((), ()))), 16),
    "w.T @ x": (lambda w, x: jax.lax.dot_general(w.T, x, (((1,), (1,)), ((), ()))), 8),
    "w, first": (lambda w, x: jax.lax.dot_general(w, x, (((0,), (1,)), ((), ()))), 8),
    "einsum": (lambda w, x: jnp.einsum("io,bi->ob", w, x), 8),
    "one vector": (lambda w, x: w @ x[0], 16),
    "vectors": (lambda w, x: jax.vmap(lambda x: w @ x)(x), 16),
}
FORMATS = [
    Format(8),
    Format(8, granularity=PerChannel(0)),
    Format(4, symmetric=False),
    Format(4, granularity=PerGroup(4)),
    Format(4, symmetric=False, granularity=PerBlock((4, 8))),
    Format(3, granularity=PerTensor()),
    quantize.fp8(granularity=PerChannel(0)),
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_whichever_axis_is_summed_over(name, format):
    apply_fn, inputs = PRODUCTS[name]
    leaf, x = quantize.encode(normal(8, 16), format), normal(3, inputs)
    model = accelerate(apply_fn)
    told = model.describe(leaf, x)
    assert "quantized_matmul" in told
    assert "left" not in told
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(jax.jit(model)(leaf, x), apply_fn(leaf.decode(), x), **close)
    loss = lambda run, w: lambda x: jnp.sum(jnp.sin(run(w, x)))
    found, expected = (
        jax.grad(loss(run, w))(x) for run, w in ((model, leaf), (apply_fn, leaf.decode()))
    )
    np.testing.assert_allclose(found, expected, **close)


def test_a_weight_on_the_left_of_what_lies_on_explicit_axes():
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    leaf, x = quantize.encode(normal(8, 16), Format(8)), normal(2, 4, 16)
    apply_fn = lambda w, x: jax.lax.dot_general(w, x, (((1,), (2,)), ((), ())))
    expected = apply_fn(leaf.decode(), x)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d", "m", None)))
    with jax.set_mesh(mesh):
        y = jax.jit(accelerate(apply_fn))(leaf, placed)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert y.sharding.spec == PartitionSpec(None, "d", "m")


def test_layers_of_equinox_and_stacks_of_them():
    net = eqx.nn.MLP(16, 4, 8, 2, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_array)
    leaves = jaxcomp.tree.flatten(params).items()
    news = {path: quantize.encode(leaf, Format(4)) for path, leaf in leaves if leaf.ndim == 2}
    packed, x = jaxcomp.tree.replace(params, news), normal(3, 16)
    model = accelerate(lambda params, x: jax.vmap(eqx.combine(params, static))(x))
    assert model.describe(packed, x).count("quantized_matmul") == 3
    expected = model.apply_fn(jaxcomp.decode(packed), x)
    np.testing.assert_allclose(model(packed, x), expected, rtol=1e-5, atol=1e-5)

    stack = jax.vmap(lambda w: quantize.encode(w, Format(8, granularity=PerChannel(0))))
    layers, x = stack(normal(3, 16, 16) / 4), normal(2, 16)
    run = accelerate(lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, w)[0])
    assert "quantized_matmul" in run.describe(layers, x)
    expected = run.apply_fn(layers.decode(), x)
    np.testing.assert_allclose(jax.jit(run)(layers, x), expected, rtol=1e-5, atol=1e-5)


def test_the_head_of_a_language_model_reads_the_codes_of_its_embedding():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(32, 16)
            return embed.attend(nn.relu(embed(tokens)))

    tokens = jnp.arange(6).reshape(2, 3)
    params = Model().init(jax.random.key(0), tokens)
    leaf = quantize.encode(
        params["params"]["Embed_0"]["embedding"], Format(8, granularity=PerChannel(0))
    )
    packed = {"params": {"Embed_0": {"embedding": leaf}}}
    model = accelerate(Model().apply)
    told = model.describe(packed, tokens)
    assert told.count("quantized_matmul") == 1
    # The rows that tokens choose are no product.
    assert told.count("left: ") == 1
    expected = Model().apply(jaxcomp.decode(packed), tokens)
    np.testing.assert_allclose(model(packed, tokens), expected, rtol=1e-5, atol=1e-5)


OTHERS = {
    "codebook": share.codebooks({"w": normal(8, 16)}, clusters=4)["w"],
    "blocks": BlockSparseArray.encode(normal(8, 16), (4, 4)),
    "groups of the last axis": quantize.encode(normal(8, 16), Format(4, True, PerGroup(4, -1))),
    "affine rows": quantize.encode(normal(8, 16), Format(4, False, PerChannel(0))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_transpose_that_no_kernel_multiplies_is_named(name):
    leaf, x = OTHERS[name], normal(3, 16)
    model = accelerate(lambda w, x: x @ w.T)
    assert "its transpose is multiplied, " in model.describe(leaf, x)
    np.testing.assert_allclose(model(leaf, x), model.apply_fn(leaf.decode(), x), rtol=1e-6)
    left = accelerate(lambda w, x: jnp.einsum("io,bi->ob", w, x))
    assert "left" not in left.describe(leaf, normal(3, 8))
    x = normal(3, 8)
    np.testing.assert_allclose(left(leaf, x), left.apply_fn(leaf.decode(), x), rtol=1e-4, atol=1e-5)
