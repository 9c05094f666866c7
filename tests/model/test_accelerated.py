"""Models whose products with compressed or masked weights are computed by kernels."""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp
from jaxcomp import quantize, share
from jaxcomp.arrays import BlockSparseArray
from jaxcomp.model import accelerate
from jaxcomp.quantize import Format


class Net(nn.Module):
    """Two dense layers and a tied embedding."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(16, 32, name="embed")
        x = nn.relu(nn.Dense(64, name="up")(embed(tokens)))
        return embed.attend(nn.Dense(32, name="down")(x))


def setup():
    net, tokens = Net(), jnp.arange(6).reshape(2, 3)
    params = net.init(jax.random.key(0), tokens)["params"]
    return lambda params, tokens: net.apply({"params": params}, tokens), params, tokens


def packed_by(params, encode, name):
    return {**params, name: {**params[name], "kernel": encode(params[name]["kernel"])}}


def blocks(kernel):
    mask = np.zeros(kernel.shape, bool)
    mask[:16, :32] = True
    return BlockSparseArray.encode(kernel * mask, (16, 32), jnp.asarray(mask))


@pytest.mark.parametrize(
    ("encode", "kernel"),
    [
        (lambda w: quantize.encode(w, Format(4)), "quantized_matmul"),
        (lambda w: share.codebooks({"w": w}, clusters=16)["w"], "codebook_matmul"),
        (blocks, "block_sparse_matmul"),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_a_packed_layer_runs_in_its_kernel_with_the_same_numbers(encode, kernel, jit):
    apply_fn, params, tokens = setup()
    packed = packed_by(params, encode, "up")
    model = accelerate(apply_fn)
    run = jax.jit(model) if jit else model
    expected = apply_fn(jaxcomp.decode(packed), tokens)
    np.testing.assert_allclose(run(packed, tokens), expected, rtol=1e-5, atol=1e-5)
    table = model.describe(packed, tokens)
    assert f"{kernel}" in table
    assert "up/kernel" in table
    assert "left" not in table


def test_what_no_kernel_computes_is_named_and_decoded():
    apply_fn, params, tokens = setup()
    embedding = quantize.encode(params["embed"]["embedding"], Format(8))
    packed = {**params, "embed": {"embedding": embedding}}
    model = accelerate(apply_fn)
    expected = apply_fn(jaxcomp.decode(packed), tokens)
    np.testing.assert_array_equal(jax.jit(model)(packed, tokens), jax.jit(apply_fn)(
        jaxcomp.decode(packed), tokens))  # fmt: skip
    np.testing.assert_allclose(model(packed, tokens), expected, rtol=1e-6)
    told = model.describe(packed, tokens)
    assert "left: embed/embedding, read by gather" in told
    assert "left: embed/embedding, read by dot_general" in told
    assert "its layout is changed" in told or "not the right operand" in told


def test_a_dense_tree_runs_as_it_was():
    apply_fn, params, tokens = setup()
    model = accelerate(apply_fn)
    np.testing.assert_array_equal(model(params, tokens), apply_fn(params, tokens))
    assert model.describe(params, tokens).splitlines() == ["kernel  operation  weight"]


@pytest.mark.parametrize("how", ["where", "times"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_mask_in_the_model_becomes_a_masked_product(how, dtype):
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((32, 16), (4, 32)))
    mask = jnp.asarray(rng.random((32, 16)) < 0.5)

    def apply_fn(params, x):
        kept = jnp.where(mask, params, 0.0) if how == "where" else params * mask
        return jnp.tanh(x.astype(dtype) @ kept.astype(dtype))

    model = accelerate(apply_fn)
    assert "masked_matmul  dot_general  masked, 32 × 16" in model.describe(w, x)
    close = 1e-5 if dtype == jnp.float32 else 2e-2
    loss = lambda apply_fn: jax.jit(jax.grad(lambda w: apply_fn(w, x).astype(jnp.float32).sum()))
    np.testing.assert_allclose(
        np.asarray(jax.jit(model)(w, x), np.float32), np.asarray(apply_fn(w, x), np.float32),
        rtol=close, atol=close,
    )  # fmt: skip
    np.testing.assert_allclose(loss(model)(w), loss(apply_fn)(w), rtol=close, atol=close)


def test_a_masked_convolution_becomes_one():
    rng = np.random.default_rng(1)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 3, 4, 8), (2, 6, 6, 4)))
    mask = jnp.asarray(rng.random(w.shape) < 0.5)

    def apply_fn(w, x):
        kept = jnp.where(mask, w, 0.0)
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kept, (2, 2), "SAME", dimension_numbers=numbers)

    model = accelerate(apply_fn)
    assert "masked_conv" in model.describe(w, x)
    np.testing.assert_allclose(jax.jit(model)(w, x), apply_fn(w, x), rtol=1e-5, atol=1e-5)


def test_stacked_layers_in_a_loop_are_read_slice_by_slice():
    rng = np.random.default_rng(2)
    stack = jnp.asarray(rng.normal(size=(3, 16, 16)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)
    packed = {"layers": jax.vmap(lambda w: quantize.encode(w, Format(8)))(stack)}

    def apply_fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]

    model = accelerate(apply_fn)
    assert "quantized_matmul" in model.describe(packed, x)
    expected = apply_fn(jaxcomp.decode(packed), x)
    np.testing.assert_allclose(jax.jit(model)(packed, x), expected, rtol=1e-5, atol=1e-5)


def test_no_dense_weight_is_decoded_where_a_kernel_reads_it():
    """Of the decoded leaf nothing is left in the compiled program but the kernel's own reading."""
    w = jnp.asarray(np.random.default_rng(3).normal(size=(64, 48)), jnp.float32)
    packed = quantize.encode(w, Format(8))
    model = accelerate(lambda w, x: x @ w)
    text = str(jax.jit(model).lower(packed, jnp.ones((2, 64))).compile().as_text())
    assert "nan" not in text


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="apply_fn"):
        accelerate(cast("Any", 3))
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        accelerate(lambda p: p, "cuda")
    w = quantize.encode(jnp.ones((3, 5)), Format(8))
    with pytest.raises(ValueError, match="quantized_matmul, triton: "):
        accelerate(lambda w, x: x @ w, "triton")(w, jnp.ones((2, 3)))
