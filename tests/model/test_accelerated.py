"""Models whose products with compressed or masked weights are computed by kernels."""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from accelerated_steps import check_same_steps

import jaxcomp
from jaxcomp import prune, quantize, share
from jaxcomp.arrays import BlockSparseArray
from jaxcomp.model import accelerate
from jaxcomp.quantize import Format, PerBlock, Percentile, PerGroup, PerTensor, fake_quant


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
    packed = {**params, "embed": share.codebooks(params["embed"], clusters=16)}
    model = accelerate(apply_fn)
    expected = apply_fn(jaxcomp.decode(packed), tokens)
    np.testing.assert_array_equal(jax.jit(model)(packed, tokens), jax.jit(apply_fn)(
        jaxcomp.decode(packed), tokens))  # fmt: skip
    np.testing.assert_allclose(model(packed, tokens), expected, rtol=1e-6)
    told = model.describe(packed, tokens)
    assert "left: embed/embedding, read by gather" in told
    assert "left: embed/embedding, read by dot_general" in told
    assert "its transpose is multiplied, which kernels do of quantized leaves alone" in told


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


@pytest.mark.parametrize(
    "format",
    [
        Format(4),
        Format(2, zero=False, granularity=PerTensor()),
        Format(3, granularity=PerGroup(8)),
        Format(4, granularity=PerBlock((8, 4))),
        Format(8, symmetric=False, granularity=PerTensor()),
        Format(4, range=Percentile(80.0)),
        Format(5, symmetric=False, range=Percentile(80.0)),
        Format(4, scale_dtype="bfloat16"),
    ],
    ids=str,
)
def test_a_weight_rounded_in_the_model_is_rounded_on_its_way_into_the_product(format):
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((32, 16), (4, 32)))
    apply_fn = lambda w, x: jnp.tanh(x @ fake_quant(w, format))
    model = accelerate(apply_fn)
    told = f"fake_quant_matmul  dot_general  rounded to {format.bits} bits, 32 × 16"
    assert model.describe(w, x).splitlines()[1:] == [told]
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(jax.jit(model)(w, x), jax.jit(apply_fn)(w, x), **close)
    gradient = lambda apply_fn: jax.jit(jax.grad(lambda w: (apply_fn(w, x) ** 2).sum()))(w)
    np.testing.assert_allclose(gradient(model), gradient(apply_fn), **close)
    found, expected = (jax.vmap(run, (0, None))(jnp.stack([w, -w]), x) for run in (model, apply_fn))
    np.testing.assert_allclose(found, expected, **close)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_a_kernel_rounded_in_the_model_is_rounded_on_its_way_into_the_convolution(
    strides, scale, dtype
):
    rng = np.random.default_rng(1)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 3, 4, 8), (2, 6, 6, 4)))
    scale = None if scale is None else jnp.full((8,), scale)

    def apply_fn(w, x):
        layout = ("NHWC", "HWIO", "NHWC")
        rounded = fake_quant(w, Format(4), scale).astype(dtype)
        y = jax.lax.conv_general_dilated(
            x.astype(dtype), rounded, strides, "SAME", dimension_numbers=layout
        )
        return y.astype(jnp.float32)

    model = accelerate(apply_fn)
    assert "fake_quant_conv" in model.describe(w, x)
    assert "left" not in model.describe(w, x)
    close = 1e-4 if dtype == jnp.float32 else 0.02
    np.testing.assert_allclose(jax.jit(model)(w, x), apply_fn(w, x), rtol=close, atol=close)
    gradient = lambda apply_fn: jax.grad(lambda w: (apply_fn(w, x) ** 2).sum())(w)
    found, expected = gradient(model), gradient(apply_fn)
    np.testing.assert_allclose(found, expected, atol=close * np.abs(expected).max())


def test_a_kernel_that_is_rounded_from_some_step_on():
    """Rounded and not, with its gradients; a boolean an array wide is another thing."""
    rng = np.random.default_rng(1)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 3, 4, 8), (2, 6, 6, 4)))

    def apply_fn(w, x, step):
        seen = jnp.where(step >= 10, fake_quant(w, Format(4)), w)
        return jax.lax.conv_general_dilated(
            x, seen, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    model = accelerate(apply_fn)
    told = model.describe(w, x, jnp.int32(0))
    assert "fake_quant_conv" in told
    assert "left" not in told
    gradient = lambda run: jax.jit(jax.grad(lambda w, step: (run(w, x, step) ** 2).sum()))
    for step in (jnp.int32(9), jnp.int32(10)):
        np.testing.assert_allclose(model(w, x, step), apply_fn(w, x, step), atol=1e-4)
        found, expected = gradient(model)(w, step), gradient(apply_fn)(w, step)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    wide = accelerate(lambda w, x: x @ jnp.where(w > 0, fake_quant(w, Format(4)), w))
    assert "matmul" not in wide.describe(jnp.ones((4, 8)), jnp.ones((2, 4)))
    other = accelerate(lambda w, x: x @ jnp.where(x[0, 0] > 0, fake_quant(w, Format(4)), w + 1))
    assert "matmul" not in other.describe(jnp.ones((4, 8)), jnp.ones((2, 4)))


METHODS = {
    "rounded": (quantize.train(Format(4)), "fake_quant_matmul"),
    "clipped": (quantize.train(Format(4, range=Percentile(80.0))), "fake_quant_matmul"),
    "pruned": (
        prune.straight_through(prune.scores.magnitude, prune.constant(0.5)),
        "masked_matmul",
    ),
    "both": (
        jaxcomp.chain(
            prune.straight_through(prune.scores.magnitude, prune.constant(0.5)),
            quantize.train(Format(4)),
        ),
        "fake_quant_matmul",
    ),
    "later": (quantize.train(Format(4), begin=2), "fake_quant_matmul"),
    "later, clipped": (
        quantize.train(Format(4, range=Percentile(80.0)), begin=2),
        "fake_quant_matmul",
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_training_with_the_compression_inside_the_model_takes_the_same_steps(method, dtype):
    compression, kernel = METHODS[method]
    net = nn.Sequential([nn.Dense(64, dtype=dtype), nn.relu, nn.Dense(16, dtype=dtype)])
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(8, n)), jnp.float32) for n in (32, 16))
    params = net.init(jax.random.key(0), x)["params"]
    run = lambda params, x: net.apply({"params": params}, x)
    close = 1e-5 if dtype == jnp.float32 else 1e-2
    check_same_steps(run, params, (x, y), compression, {kernel: 2}, 0, close)


def test_what_is_rounded_otherwise_than_a_kernel_can_is_left_as_it_is():
    w, x = jnp.ones((32, 16)), jnp.ones((4, 32), jnp.bfloat16)
    first = accelerate(lambda w, x: x @ fake_quant(w.astype(jnp.bfloat16), Format(4)))
    assert "fake_quant_matmul" in first.describe(w, x)
    assert first(w, x).dtype == jnp.bfloat16
    chance = lambda w, x: x @ fake_quant(w, Format(4), key=jax.random.key(0))
    for other in (chance, lambda w, x: x @ fake_quant(w, quantize.mxfp4())):
        run = accelerate(other)
        assert run.describe(w, x) == "kernel  operation  weight"
        np.testing.assert_array_equal(jax.jit(run)(w, x), jax.jit(other)(w, x))


@pytest.mark.parametrize(
    ("method", "product", "reason"),
    [
        (quantize.train(Format(4), bits={0: 8, 5: 4}), jnp.matmul, "a Format of fixed bits"),
        (quantize.learned_step(Format(4)), jnp.matmul, "a Format of fixed bits"),
        (quantize.train(quantize.mxfp4()), jnp.matmul, "round them to a Format"),
        (quantize.train(Format(4)), lambda x, w: x @ w.reshape(32, 64).T, "before reshape"),
        (quantize.train(Format(4)), lambda x, w: jnp.einsum("io,bi->ob", w, x), "left operand"),
    ],
    ids=["ever fewer bits", "learned steps", "another grid", "turned", "on the left"],
)
def test_a_weight_that_is_compressed_otherwise_is_left_with_the_reason(method, product, reason):
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)}
    opt_state = jaxcomp.wrap_optimizer(optax.sgd(0.1), method).init(params)

    def apply_fn(params, x):
        return product(x, jaxcomp.compressed(params, opt_state)["kernel"])

    model, x = accelerate(apply_fn), jnp.ones((4, 64))
    told = model.describe(params, x)
    assert reason in told
    assert "_matmul" not in told
    np.testing.assert_array_equal(model(params, x), apply_fn(params, x))


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


def square(seed=0, shape=(16, 16), dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 4, dtype)


def test_a_leaf_is_read_as_often_as_the_model_reads_it():
    leaf, x = quantize.encode(square(), Format(8)), square(1)
    model = accelerate(lambda params, x: ((x @ params["w"]) @ params["w"]) @ params["w"])
    expected = model.apply_fn({"w": leaf.decode()}, x)
    np.testing.assert_allclose(model({"w": leaf}, x), expected, atol=1e-5)
    assert model.describe({"w": leaf}, x).count("quantized_matmul") == 3
    shared = share.codebooks({"w": square()}, clusters=4)
    twice = accelerate(lambda params, x: x @ params["w"].T + (x + 1) @ params["w"].T)
    assert twice.describe(shared, x).count("left: ") == 2


def test_a_tree_that_is_one_leaf_is_described():
    leaf = quantize.encode(square(), Format(8))
    told = accelerate(lambda w, x: x @ w).describe(leaf, square(1))
    assert "the only leaf" in told


@pytest.mark.parametrize("format", [quantize.fp8(), quantize.mxfp4(), quantize.nvfp4()])
def test_leaves_on_other_grids_are_read_as_they_are(format):
    leaf, x = quantize.encode(square(shape=(64, 32)), format), square(1, (4, 64))
    model = accelerate(lambda params, x: x @ params["w"])
    assert "quantized_matmul" in model.describe({"w": leaf}, x)
    np.testing.assert_allclose(model({"w": leaf}, x), x @ leaf.decode(), atol=1e-5)


@pytest.mark.parametrize(
    ("encode", "is_read"),
    [
        (lambda w: quantize.encode(w, Format(8)), True),
        (lambda w: quantize.encode(w, Format(4, symmetric=False, granularity=PerTensor())), True),
        (lambda w: quantize.encode(w, quantize.mxfp4()), True),
        (lambda w: share.codebooks({"w": w}, clusters=4)["w"], False),
        (lambda w: BlockSparseArray.encode(w * (w > 0), (16, 16)), False),
        (lambda w: BlockSparseArray.encode(w * (w > 0), (16, 16), batch_axes=1), True),
    ],
    ids=["channels", "one scale", "mxfp4", "shared", "blocks", "blocks of each"],
)
def test_layers_in_a_loop_may_share_their_scales(encode, is_read):
    leaf, x = encode(square(shape=(3, 32, 32))), square(1, (4, 32))
    model = accelerate(
        lambda params, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]
    )
    told = model.describe({"w": leaf}, x)
    assert ("_matmul" in told) == is_read
    assert ("left: w, read by dot_general" in told) == (not is_read)
    expected = model.apply_fn({"w": leaf.decode()}, x)
    np.testing.assert_allclose(jax.jit(model)({"w": leaf}, x), expected, atol=1e-5)


def test_a_derivative_that_the_user_wrote_is_kept():
    @jax.custom_vjp
    def layer(w, x):
        return x @ w

    layer.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, dy: (kept[0], 1000 * (dy @ kept[0].T)))
    leaf, x = quantize.encode(square(), Format(8)), square(1)
    model = accelerate(lambda params, x: layer(params["w"], x))
    assert "a derivative of its own" in model.describe({"w": leaf}, x)
    found = jax.grad(lambda x: model({"w": leaf}, x).sum())(x)
    np.testing.assert_allclose(found, 1000 * jnp.ones_like(x) @ leaf.decode().T, rtol=1e-5)


def test_sums_are_kept_as_wide_as_the_model_asks():
    w, x = square(shape=(512, 32), dtype=jnp.bfloat16), square(1, (4, 512), jnp.bfloat16)
    wide = lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32)
    leaf = quantize.encode(w, Format(8))
    model = accelerate(lambda params, x: wide(x, params["w"]))
    assert "quantized_matmul" in model.describe({"w": leaf}, x)
    found = model({"w": leaf}, x)
    exact = np.asarray(x, np.float64) @ np.asarray(leaf.decode(), np.float64)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, atol=0.02)
    masked = accelerate(lambda params, x: wide(x, jnp.where(params["w"] > 0, params["w"], 0)))
    assert "its sums are kept in float32" in masked.describe({"w": w}, x)
    np.testing.assert_array_equal(masked({"w": w}, x), masked.apply_fn({"w": w}, x))
    # Other activations than the leaf's are promoted as in the model.
    whole = accelerate(lambda params, x: x @ params["w"])
    ids = jnp.eye(4, 512, dtype=jnp.int32)
    np.testing.assert_array_equal(whole({"w": leaf}, ids), leaf.decode()[:4])


def test_a_convolution_that_asks_for_precision_is_left():
    w, x = square(shape=(3, 8, 8)), square(1, (2, 16, 8))
    model = accelerate(
        lambda params, x: jax.lax.conv_general_dilated(
            x, jnp.where(params["w"] > 0, params["w"], 0), (1,), "SAME", precision="highest",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
    )  # fmt: skip
    assert "asks for the precision" in model.describe({"w": w}, x)


@pytest.mark.parametrize(
    ("product", "before"),
    [
        (lambda x, w: jax.checkpoint(jnp.matmul)(x, w), "checkpoint"),
        (lambda x, w: x @ w.T, "transpose"),
        (lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w[None])[0], "broadcast"),
    ],
    ids=["again", "turned", "in a loop"],
)
def test_a_weight_that_is_masked_outside_is_left_with_the_reason(product, before):
    w, x = square(), square(1)
    model = accelerate(lambda params, x: product(x, jnp.where(params["w"] > 0, params["w"], 0)))
    told = model.describe({"w": w}, x)
    assert "left: dot_general: its weight is compressed before" in told
    assert before in told.replace("remat2", "checkpoint")
