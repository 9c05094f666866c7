"""Unmodified NNX models on compressed parameters."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from leaf_samples import FORMS, compress, weights

from jaxcomp.arrays import decode, is_compressed, nbytes


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.linear(x))


class Scanned(nnx.Module):
    def __init__(self, rngs, **metadata):
        @nnx.split_rngs(splits=4)
        @nnx.vmap(in_axes=(0,), out_axes=0, **metadata)
        def make(rngs):
            return Block(rngs)

        self.blocks = make(rngs)
        self.metadata = metadata

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, **self.metadata)
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


class Ensemble(Scanned):
    def __call__(self, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, 0))(self.blocks, x)


class Remat(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return nnx.remat(lambda linear, x: linear(x))(self.linear, x)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.embed(tokens))


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 4, (3, 3), rngs=rngs)
        self.layer_norm = nnx.LayerNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.layer_norm(self.up(self.batch_norm(self.conv(x))))


def normal(*shape):
    return jax.random.normal(jax.random.key(0), shape)


LAYERS = {"transform_metadata": {nnx.PARTITION_NAME: "layers"}}
# Model, input, and how many leading axes stack layers.
MODELS = {
    "linear": (lambda r: nnx.Linear(8, 6, rngs=r), normal(2, 8), 0),
    "convnet": (ConvNet, normal(2, 4, 4, 4), 0),
    "embed": (Tied, jnp.array([1, 11, 5]), 0),
    "attention": (
        lambda r: nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=r),
        normal(2, 5, 8),
        0,
    ),
    "linear_general": (
        lambda r: nnx.LinearGeneral((2, 4), (2, 4), axis=(-2, -1), rngs=r),
        normal(3, 2, 4),
        0,
    ),
    "einsum": (lambda r: nnx.Einsum("ab,bc->ac", (8, 6), (6,), rngs=r), normal(2, 8), 0),
    "lstm": (
        lambda r: nnx.RNN(nnx.OptimizedLSTMCell(8, 8, rngs=r), rngs=r),
        normal(2, 5, 8),
        0,
    ),
    "gru": (lambda r: nnx.RNN(nnx.GRUCell(8, 8, rngs=r), rngs=r), normal(2, 5, 8), 0),
    "lora": (lambda r: nnx.LoRALinear(8, 6, lora_rank=2, rngs=r), normal(2, 8), 0),
    "scan": (Scanned, normal(2, 8), 1),
    "scan_metadata": (lambda r: Scanned(r, **LAYERS), normal(2, 8), 1),
    "vmap": (Ensemble, normal(4, 2, 8), 1),
    "remat": (Remat, normal(2, 8), 0),
}
# Compiling is slow: every form in two models, and the classes in turn in the others.
PAIRS = list(zip(MODELS, itertools.cycle(["codebook16", "sparse", "int4", "2:4", "blocks"])))
PAIRS += [("attention", "sparse")]
PAIRS += [(model, form) for form in FORMS for model in ("linear", "scan")]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@functools.cache
def initial(name):
    # Any values will do: compiling each initializer is slow.
    make = MODELS[name][0]
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    if any(not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(shapes)):
        return nnx.split(make(nnx.Rngs(0)))  # an RNN keeps random keys
    return graph, jax.tree.map(lambda leaf: jnp.abs(weights(leaf.shape, seed=leaf.size)), shapes)


def setup(name, form):
    _, x, batch_axes = MODELS[name]
    graph, dense = initial(name)
    return graph, dense, compress(dense, form, batch_axes), x


def count(tree):
    return sum(map(is_compressed, jax.tree.leaves(tree, is_leaf=is_compressed)))


@pytest.mark.parametrize(("name", "form"), sorted(set(PAIRS)))
def test_output_is_that_of_decoded_parameters(name, form):
    graph, dense, small, x = setup(name, form)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    assert count(small) >= 1
    assert nbytes(small) < nbytes(dense)
    decoded = decode(small)
    assert count(decoded) == 0
    assert jax.tree.structure(decoded) == jax.tree.structure(dense)
    want = run(decoded, x)
    close(run(small, x), want)


@pytest.mark.parametrize("name", MODELS)
def test_without_jit_and_with_nnx_jit(name):
    graph, _, small, x = setup(name, "int4")
    model, dense = nnx.merge(graph, small), nnx.merge(graph, decode(small))
    close(model(x), dense(x))
    run = nnx.jit(lambda model, x: model(x))
    close(run(model, x), run(dense, x))


@pytest.mark.parametrize("form", ["int3-affine", "codebook5", "sparse", "2:4", "blocks"])
def test_merge_and_split_keep_the_leaf(form):
    graph, _, small, _ = setup("convnet", form)
    _, again = nnx.split(nnx.merge(graph, small))
    assert jax.tree.structure(again) == jax.tree.structure(small)
    jax.tree.map(np.testing.assert_array_equal, again, small)


def test_update_puts_leaves_into_a_model():
    make, x, _ = MODELS["linear"]
    model = make(nnx.Rngs(0))
    small = compress(nnx.state(model), "int4")
    nnx.update(model, small)
    assert is_compressed(model.kernel.get_value())
    close(model(x), x @ decode(small)["kernel"][...] + model.bias[...])


def test_gradients_of_what_stays_dense():
    make, x, _ = MODELS["linear"]
    model = make(nnx.Rngs(0))
    nnx.update(model, compress(nnx.state(model, nnx.Param), "int4"))
    graph, bias, rest = nnx.split(model, nnx.filterlib.PathContains("bias"), ...)
    assert count(rest) == 1

    def loss(bias, rest):
        return (nnx.merge(graph, bias, rest)(x) ** 2).sum()

    got = jax.jit(jax.grad(loss))(bias, rest)
    want = jax.jit(jax.grad(loss))(bias, decode(rest))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_repr_of_a_model_with_leaves():
    graph, _, small, _ = setup("linear", "int4")
    assert "value=QuantizedArray(shape=(8, 6), dtype=float32, int4" in repr(small)
    assert "QuantizedArray" in repr(nnx.merge(graph, small).kernel)
