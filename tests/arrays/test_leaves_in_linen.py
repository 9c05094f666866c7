"""Unmodified Linen models on compressed parameters."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from leaf_samples import FORMS, block_sparse, compress, fit_nm, quantized, shared, weights

from jaxcomp.arrays import decode, is_compressed, nbytes

KEY = jax.random.key(0)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(12, 8)
        return embed.attend(embed(tokens))


class Recurrent(nn.Module):
    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x):
        return nn.RNN(self.cell(8))(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.relu(nn.Dense(8)(carry)), None


class Scanned(nn.Module):
    metadata: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        extra = {"metadata_params": {nn.PARTITION_NAME: "layers"}} if self.metadata else {}
        scanned = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4, **extra
        )
        return scanned()(x, None)[0]


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "members"},
        )
        return dense(8)(x)


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(8)(x)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.relu(nn.ConvTranspose(4, (3, 3), strides=2)(x))
        return nn.LayerNorm()(nn.Dense(6)(x.mean((1, 2))))


def normal(*shape):
    return jax.random.normal(KEY, shape)


# Model, input, and how many leading axes stack layers.
MODELS = {
    "dense": (nn.Dense(8), normal(2, 8), 0),
    "convnet": (ConvNet(), normal(2, 4, 4, 4), 0),
    "embed": (Tied(), jnp.array([1, 11, 5]), 0),
    "attention": (nn.MultiHeadDotProductAttention(2, qkv_features=8), normal(2, 5, 8), 0),
    "dense_general": (nn.DenseGeneral((2, 4), axis=(-2, -1)), normal(3, 2, 4), 0),
    "einsum": (nn.Einsum((8, 4), "...i,io->...o"), normal(2, 8), 0),
    "lstm": (Recurrent(nn.OptimizedLSTMCell), normal(2, 5, 8), 0),
    "gru": (Recurrent(nn.GRUCell), normal(2, 5, 8), 0),
    "scan": (Scanned(), normal(2, 8), 1),
    "scan_metadata": (Scanned(metadata=True), normal(2, 8), 1),
    "scan_remat": (Scanned(remat=True), normal(2, 8), 1),
    "vmap": (Ensemble(), normal(4, 2, 8), 1),
    "remat": (Remat(), normal(2, 8), 0),
}
# Compiling is slow: every form in two models, and the classes in turn in the others.
PAIRS = list(zip(MODELS, itertools.cycle(["codebook16", "sparse", "int4", "2:4", "blocks"])))
PAIRS += [("attention", "sparse")]
PAIRS += [(model, form) for form in FORMS for model in ("dense", "scan")]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@functools.cache
def initial(name):
    model, x, _ = MODELS[name]
    # Any values will do: compiling each initializer is slow.
    shapes = jax.eval_shape(model.init, KEY, x)
    return jax.tree.map(lambda leaf: jnp.asarray(weights(leaf.shape, seed=leaf.size)), shapes)


def setup(name, form):
    model, x, batch_axes = MODELS[name]
    dense = initial(name)
    if "batch_stats" in dense:
        dense = {**dense, "batch_stats": jax.tree.map(jnp.abs, dense["batch_stats"])}
    small = {**dense, "params": compress(dense["params"], form, batch_axes)}
    return model, x, dense, small


def count(tree):
    return sum(map(is_compressed, jax.tree.leaves(tree, is_leaf=is_compressed)))


@pytest.mark.parametrize(("name", "form"), sorted(set(PAIRS)))
def test_output_is_that_of_decoded_parameters(name, form):
    model, x, dense, small = setup(name, form)
    assert count(small) >= 1
    assert nbytes(small) < nbytes(dense)
    decoded = decode(small)
    assert count(decoded) == 0
    assert jax.tree.map(jnp.shape, decoded) == jax.tree.map(jnp.shape, dense)
    want = jax.jit(model.apply)(decoded, x)
    close(jax.jit(model.apply)(small, x), want)


@pytest.mark.parametrize("name", MODELS)
def test_without_jit(name):
    model, x, _, small = setup(name, "int4")
    close(model.apply(small, x), model.apply(decode(small), x))


def test_under_grad_to_the_input_and_the_other_parameters():
    model, x, _, small = setup("lstm", "int4")
    (cell,) = small["params"].values()
    biases = {k: v for k, v in cell.items() if "bias" in v}
    kernels = {k: v for k, v in cell.items() if k not in biases}
    assert biases
    assert count(kernels) >= 1

    def loss(x, biases, kernels):
        params = {name: {**kernels, **biases} for name in small["params"]}
        return (model.apply({"params": params}, x) ** 2).sum()

    got = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(x, biases, kernels)
    want = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, decode(biases), decode(kernels))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    for name, grads in want[1].items():
        np.testing.assert_allclose(got[1][name]["bias"], grads["bias"], rtol=1e-5, atol=1e-5)


def test_batch_norm_updates_its_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))

    model, x = Net(), normal(16, 8)
    dense = model.init(KEY, x)
    small = {**dense, "params": compress(dense["params"], "codebook5")}
    y, state = model.apply(small, x, mutable=["batch_stats"])
    want, wanted = model.apply(decode(small), x, mutable=["batch_stats"])
    close(y, want)
    jax.tree.map(close, state, wanted)


def test_norm_scales_and_biases_may_be_compressed_too():
    model, x, dense, _ = setup("convnet", "int4")
    small = jax.tree.map(
        lambda leaf: quantized(leaf + 0.5, 8, affine=True) if leaf.ndim == 1 else leaf, dense
    )
    assert count(small) >= 9  # norm scales, biases and running statistics
    close(model.apply(small, x), model.apply(decode(small), x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parameters_of_half_precision(dtype):
    model, x = nn.Dense(8, dtype=dtype, param_dtype=dtype), normal(2, 8)
    dense = model.init(KEY, x)
    for form in ("int8-groups-first", "codebook16", "sparse"):
        small = compress(dense, form)
        assert small["params"]["kernel"].dtype == jnp.dtype(dtype)
        got = jax.jit(model.apply)(small, x)
        assert got.dtype == jnp.dtype(dtype)
        want = jax.jit(model.apply)(decode(small), x)
        np.testing.assert_allclose(
            got.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-2, atol=1e-2
        )


def test_leaves_of_different_forms_in_one_tree():
    model, x, dense, _ = setup("attention", "int4")
    params = dense["params"]
    forms = iter([quantized, shared, fit_nm, block_sparse])
    small = {
        name: {"kernel": next(forms)(layer["kernel"]), "bias": layer["bias"]}
        for name, layer in params.items()
    }
    assert count(small) == 4
    close(
        jax.jit(model.apply)({"params": small}, x),
        jax.jit(model.apply)({"params": decode(small)}, x),
    )


def test_a_model_may_write_its_parameter():
    class Writes(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.variable("params", "kernel", lambda: jnp.zeros((8, 8)))
            kernel.value = kernel.value + 1
            return x @ kernel.value

    leaf = quantized(normal(8, 8))
    x = normal(2, 8)
    y, state = Writes().apply({"params": {"kernel": leaf}}, x, mutable=True)
    close(y, x @ (leaf.decode() + 1))
    assert isinstance(state["params"]["kernel"], jax.Array)


def test_partition_spec_and_unbox():
    _, _, dense, small = setup("dense", "int4")
    unboxed = nn.meta.unbox(small)
    close(unboxed["params"]["kernel"], decode(small)["params"]["kernel"])
    specs = nn.get_partition_spec(small)
    assert specs["params"]["bias"] == nn.get_partition_spec(dense)["params"]["bias"]


def test_wrong_shapes_are_told_by_flax():
    model, x, _, _ = setup("dense", "int4")
    wrong = {"params": {"kernel": quantized(normal(8, 6)), "bias": jnp.zeros(8)}}
    with pytest.raises(Exception, match="shape"):
        model.apply(wrong, x)


def test_a_stack_without_its_layer_axis_raises():
    model, x, dense, _ = setup("scan", "int4")
    kernel = dense["params"]["ScanBlock_0"]["Dense_0"]["kernel"]
    flat = quantized(kernel)  # one scale a channel for all layers: shape (1, 1, 8)
    broken = jax.tree.map(lambda leaf: flat if leaf.ndim == 3 else leaf, dense)
    with pytest.raises(ValueError, match="scan"):
        model.apply(broken, x)


def test_modules_that_walk_their_own_parameters_take_the_decoded_tree():
    model, x = nn.WeightNorm(nn.Dense(8)), normal(2, 8)
    dense = model.init(KEY, x)
    small = compress(dense, "int4")
    with pytest.raises(Exception, match="Could not find parameter"):
        model.apply(small, x)
    assert np.isfinite(model.apply(decode(small), x)).all()
