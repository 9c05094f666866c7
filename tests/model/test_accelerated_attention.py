"""Kernels for weights of more than two axes, as attention has them."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accelerated_steps import check_same_steps
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcomp
from jaxcomp import prune, quantize
from jaxcomp.arrays import BlockSparseArray, CodebookArray
from jaxcomp.model import accelerate
from jaxcomp.model.accelerated.matrices import matrix_of
from jaxcomp.model.accelerated.stacked import Unfit
from jaxcomp.quantize import Format, PerBlock, PerChannel, PerGroup, PerTensor

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


FORMATS = {
    "channels": Format(8),
    "4 bits": Format(4),
    "3 bits": Format(3),
    "7 bits, affine": Format(7, symmetric=False),
    "one scale": Format(2, granularity=PerTensor()),
    "first axis": Format(8, granularity=PerChannel(0)),
    "middle axis": Format(4, symmetric=False, granularity=PerChannel(1)),
    "no zero": Format(1, zero=False),
    "groups": Format(4, symmetric=False, granularity=PerGroup(2)),
    "fp8": quantize.fp8(),
    "mxfp4": quantize.mxfp4(),
    "nvfp4": quantize.nvfp4(),
}
# Blocks of the second axis are stretches of the inputs only where it is the last of them.
GROUPED = ("groups", "mxfp4", "nvfp4")


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_holds_the_numbers_of_its_leaf(name, inputs):
    leaf = quantize.encode(normal(2, 32, 8), FORMATS[name])
    dense = leaf.decode()
    if name in GROUPED and inputs == 1:
        with pytest.raises(Unfit, match="not stretches of its inputs"):
            matrix_of(leaf, inputs)
        return
    matrix = matrix_of(leaf, inputs)
    assert matrix.shape == ((2, 256) if inputs == 1 else (64, 8))
    np.testing.assert_array_equal(matrix.decode(), dense.reshape(matrix.shape))


def test_codes_that_end_inside_a_byte_are_no_matrix():
    leaf = quantize.encode(normal(6, 4, 5), Format(4))
    with pytest.raises(Unfit, match="5 codes of 4 bits do not end with a byte"):
        matrix_of(leaf, 1)
    assert matrix_of(leaf, 2).shape == (24, 5)


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("axis", [None, -1, -2, -3])
def test_groups_of_a_codebook_stay_stretches(axis, inputs):
    indices = jnp.asarray(RNG.integers(0, 4, (6, 4, 8)), jnp.uint8)
    leaf = CodebookArray.from_indices(
        indices, normal(4) if axis is None else normal(2, 4), jnp.float32, axis
    )
    if axis in ((-1,) if inputs == 1 else (-2,)):
        with pytest.raises(Unfit, match="are not those of a matrix"):
            matrix_of(leaf, inputs)
        return
    matrix = matrix_of(leaf, inputs)
    np.testing.assert_array_equal(matrix.decode(), leaf.decode().reshape(matrix.shape))


def encoded(params, format):
    """All kernels packed."""
    leaves = jaxcomp.tree.flatten(params).items()
    news = {path: quantize.encode(leaf, format) for path, leaf in leaves if "kernel" in path}
    return jaxcomp.tree.replace(params, news)


ATTENTION = nn.MultiHeadDotProductAttention(num_heads=4)


@pytest.mark.parametrize("format", [Format(8), Format(4, symmetric=False), quantize.fp8()])
def test_attention_runs_in_kernels_with_the_same_numbers(format):
    x = normal(2, 5, 32)
    packed = encoded(ATTENTION.init(jax.random.key(0), x), format)
    model = accelerate(ATTENTION.apply)
    told = model.describe(packed, x)
    assert told.count("quantized_matmul") == 4
    assert "left" not in told
    dense = jaxcomp.decode(packed)
    close: Any = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(jax.jit(model)(packed, x), ATTENTION.apply(dense, x), **close)
    loss = lambda run, params: lambda x: jnp.sum(run(params, x) ** 2)
    found, expected = (
        jax.grad(loss(*each))(x) for each in ((model, packed), (ATTENTION.apply, dense))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    many = jax.vmap(model, (None, 0))(packed, jnp.stack([x, -x]))
    np.testing.assert_allclose(many[1], ATTENTION.apply(dense, -x), **close)


def test_attention_in_nnx_and_over_stacked_layers():
    graph, params = nnx.split(nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0)))
    x = normal(2, 5, 32)
    packed = encoded(params, Format(8))
    model = accelerate(lambda params, x: nnx.merge(graph, params)(x))
    assert model.describe(packed, x).count("quantized_matmul") == 4
    expected = model.apply_fn(jaxcomp.decode(packed), x)
    np.testing.assert_allclose(model(packed, x), expected, rtol=1e-4, atol=1e-5)

    layers = {"in": normal(3, 32, 4, 8) / 6, "out": normal(3, 4, 8, 32) / 6}
    stacks = jax.tree.map(jax.vmap(lambda w: quantize.encode(w, Format(4))), layers)

    def apply_fn(layers, x):
        def turn(x, layer):
            y = jnp.tanh(jax.lax.dot_general(x, layer["in"], (((2,), (0,)), ((), ()))))
            return jax.lax.dot_general(y, layer["out"], (((2, 3), (0, 1)), ((), ()))), None

        return jax.lax.scan(turn, x, layers)[0]

    run = accelerate(apply_fn)
    assert run.describe(stacks, x).count("quantized_matmul") == 2
    expected = apply_fn(jaxcomp.decode(stacks), x)
    np.testing.assert_allclose(jax.jit(run)(stacks, x), expected, rtol=1e-4, atol=1e-5)


METHODS = {
    "rounded": (quantize.train(Format(4)), "fake_quant_matmul", 4),
    "one scale, later": (
        quantize.train(Format(4, False, PerTensor()), begin=1),
        "fake_quant_matmul",
        4,
    ),
    "clipped": (
        quantize.train(Format(4, range=quantize.Percentile(80.0))),
        "fake_quant_matmul",
        4,
    ),
    "pruned": (
        prune.straight_through(prune.scores.magnitude, prune.constant(0.5)),
        "masked_matmul",
        4,
    ),
    # Groups of the heads are no stretches of what three of the four sum over.
    "groups": (quantize.train(Format(4, granularity=PerGroup(4))), "fake_quant_matmul", 1),
}


@pytest.mark.parametrize("method", METHODS)
def test_training_with_attention_takes_the_same_steps(method):
    compression, kernel, count = METHODS[method]
    x, y = normal(2, 5, 32), normal(2, 5, 32)
    params = ATTENTION.init(jax.random.key(0), x)["params"]
    run = lambda params, x: ATTENTION.apply({"params": params}, x)
    check_same_steps(run, params, (x, y), compression, {kernel: count}, 4 - count, 1e-5)


def test_what_lies_on_explicit_axes_is_decoded():
    """Axes that would have to be merged there have nowhere to lie."""
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    leaf, x = quantize.encode(normal(8, 4, 8), Format(8)), normal(4, 8)
    apply_fn = lambda w, x: jax.lax.dot_general(
        x, w, (((1,), (0,)), ((), ())), out_sharding=PartitionSpec("d", "m", None)
    )
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d", None)))
    with jax.set_mesh(mesh):
        codes = jax.device_put(leaf.codes, NamedSharding(mesh, PartitionSpec(None, "m", None)))
        y = jax.jit(accelerate(apply_fn))(dataclasses.replace(leaf, codes=codes), placed)
    expected = jnp.einsum("ni,iho->nho", x, leaf.decode())
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert y.sharding.spec == PartitionSpec("d", "m", None)


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        (lambda w: BlockSparseArray.encode(w, (2, 4)), "blocks of a weight of 3 axes"),
        (lambda w: quantize.encode(w, Format(8, granularity=PerGroup(2))), "not stretches of its"),
        (lambda w: quantize.encode(w, Format(8, granularity=PerBlock((2, 2)))), "not stretches"),
    ],
)
def test_what_is_no_matrix_is_named(leaf, reason):
    w, x = leaf(normal(6, 4, 8)), normal(3, 6)
    model = accelerate(lambda w, x: jax.lax.dot_general(x, w, (((1,), (0,)), ((), ()))))
    assert reason in model.describe(w, x)
    np.testing.assert_allclose(model(w, x), model.apply_fn(w.decode(), x), rtol=1e-6)


@pytest.mark.parametrize("format", [Format(4), Format(8, granularity=PerGroup(8)), quantize.fp8()])
def test_a_packed_convolution_of_one_position_is_a_product(format):
    w, x = quantize.encode(normal(1, 1, 16, 8), format), normal(2, 5, 4, 16)
    layout = ("NHWC", "HWIO", "NHWC")
    conv = lambda w, x: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)
    model = accelerate(conv)
    assert "quantized_matmul" in model.describe(w, x)
    np.testing.assert_allclose(jax.jit(model)(w, x), conv(w.decode(), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((3, 3, 16, 8), {}),
        ((1, 1, 16, 8), {"window_strides": (2, 2)}),
        ((1, 1, 16, 8), {"padding": [(1, 1), (0, 0)]}),
        ((1, 1, 4, 8), {"feature_group_count": 4}),
        ((16, 8, 1, 1), {"dimension_numbers": ("NHWC", "IOHW", "NHWC")}),
        ((1, 1, 4, 8), {"dimension_numbers": ("NCHW", "HWIO", "NCHW")}),
        ((1, 1, 16, 8), {"dimension_numbers": ("NHWC", "HWIO", "NCHW")}),
    ],
)
def test_any_other_packed_convolution_is_decoded(shape, how):
    w, x = quantize.encode(normal(*shape), Format(8)), normal(2, 4, 6, 16)
    window = {"window_strides": (1, 1), "padding": "VALID", **how}
    window.setdefault("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    if window["dimension_numbers"][0] == "NCHW":
        x = x[..., :4].transpose(0, 3, 1, 2)
    conv = lambda w, x: jax.lax.conv_general_dilated(x, w, **window)
    model = accelerate(conv)
    assert "more than one position, or of another layout" in model.describe(w, x)
    np.testing.assert_allclose(model(w, x), conv(w.decode(), x), rtol=1e-5, atol=1e-5)
