"""What the contract of products does not ask of packed codes: forms, granularities, meshes."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from product_row import exact

from jaxcomp import quantize
from jaxcomp.arrays.quantized import QuantizedArray
from jaxcomp.kernels.quantized.activations import _in_8_bits, quantize_rows
from jaxcomp.kernels.quantized.matmul import quantized_matmul
from jaxcomp.kernels.quantized.packed import packed_matrix
from jaxcomp.quantize import Format, PerBlock, PerChannel, PerGroup, PerTensor

SIZES = (256, 256)
AFFINE = Format(4, symmetric=False, granularity=PerGroup(32))


def made(format, sizes=SIZES, rows=5, dtype=jnp.float32) -> Any:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, sizes[0])), dtype)
    leaf = quantize.encode(jnp.asarray(rng.normal(size=sizes), jnp.float32), format)
    return x, leaf, exact(x) @ exact(leaf.decode())


def assert_close(y, expected, tolerance=2e-6):
    assert np.abs(exact(y) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("sharded", [("model", None), (None, "model")])
@pytest.mark.parametrize(
    ("form", "kind"),
    [("triton", AxisType.Auto), ("triton", AxisType.Explicit), ("xla", AxisType.Explicit)],
)
def test_a_matrix_on_many_devices(form, kind, sharded):
    x, leaf, expected = made(AFFINE)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,), devices=jax.devices()[:2])
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    by_group = lambda a: put(a, sharded[0], None, sharded[1])
    leaf = type(leaf)(
        put(leaf.codes, *sharded), by_group(leaf.scale), by_group(leaf.zero_point),
        leaf.bits, leaf.length, leaf.blocks, leaf.dense_dtype,
    )  # fmt: skip
    x = put(x, None, sharded[0])
    run = jax.jit(lambda x, leaf: quantized_matmul(x, leaf, implementation=form))
    y = run(x, leaf)
    assert_close(y, expected)
    dx = jax.jit(jax.grad(lambda x, leaf: run(x, leaf).sum()))(x, leaf)
    assert_close(dx[0], exact(leaf.decode()).sum(axis=1))
    if form == "triton":
        assert "all-gather" not in str(run.lower(x, leaf).compile().as_text())
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, sharded[1])), 2)


FORMATS = {
    "per tensor": Format(8, granularity=PerTensor()),
    "per input": Format(8, granularity=PerChannel(axis=0)),
    "groups of outputs": Format(8, granularity=PerGroup(32, axis=-1)),
    "blocks": Format(8, symmetric=False, granularity=PerBlock((64, 32))),
    "no zero": Format(4, zero=False),
    "8 bits without zero": Format(8, zero=False),
    "1 bit": quantize.binary(),
    "2 bits": quantize.ternary(),
    "3 bits": Format(3, granularity=PerGroup(16)),
    "6 bits": Format(6, symmetric=False),
    "nvfp4": quantize.nvfp4(),
    "nf4": quantize.nf4(),
    "mxfp8": quantize.mxfp8(),
    "e5m2": quantize.fp8("e5m2"),
    "power of two": quantize.power_of_two(7),
}


@pytest.mark.parametrize("name", FORMATS)
def test_any_form_of_leaf(name):
    x, leaf, expected = made(FORMATS[name])
    assert_close(quantized_matmul(x, leaf), expected)
    if name in ("nf4", "6 bits", "mxfp8"):
        x, leaf, expected = made(FORMATS[name], dtype=jnp.bfloat16)
        assert_close(quantized_matmul(x, leaf), expected, 8e-3)


ROUNDED = {
    "w8a8 affine": (Format(8, symmetric=False, granularity=PerGroup(64)), "int8"),
    "w7a8 without zero": (Format(7, zero=False), "int8"),
    "w4a8": (AFFINE, "int8"),
    "mxfp4 int8": (quantize.mxfp4(), "int8"),
    "fp8": (quantize.fp8(), "float8_e4m3fn"),
    "mxfp8": (quantize.mxfp8(), "float8_e4m3fn"),
    "w4 fp8": (AFFINE, "float8_e4m3fn"),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_activations_in_8_bits_and_in_floats(name):
    format, form = ROUNDED[name]
    x, leaf, _ = made(format, rows=40)
    small, scale = quantize_rows(x, form)
    coding, arrays = packed_matrix(leaf)
    present = [array for array in arrays if array is not None]
    chips = _in_8_bits(coding, small, *present) * scale
    expected = exact(small) * exact(scale) @ exact(leaf.decode())
    assert_close(chips, expected)
    assert_close(quantized_matmul(x, leaf, activations=form), expected)
    assert_close(quantized_matmul(x[:3], leaf, activations=form), expected[:3])


@pytest.mark.parametrize(
    ("format", "form", "message"),
    [
        (Format(8), "int4", "activations must be"),
        (Format(8, zero=False), "int8", "need codes"),
        (quantize.fp8(), "int8", "need codes"),
        (Format(8), "float8_e4m3fn", "need codes"),
        (AFFINE, "float8_e5m2", "need codes"),
    ],
)
def test_activations_that_do_not_go_with_the_codes(format, form, message):
    x, leaf, _ = made(format, (32, 8))
    with pytest.raises(ValueError, match=message):
        quantized_matmul(x, leaf, activations=form)


KERNELS = {
    "int8 groups": Format(8, symmetric=False, granularity=PerGroup(128)),
    "int4 no zero": Format(4, zero=False, granularity=PerGroup(64)),
    "mxfp4": quantize.mxfp4(),
    "nvfp4": quantize.nvfp4(),
}


@pytest.mark.parametrize("form", ["triton", "mosaic_tpu"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_any_coding_and_dtype(name, form):
    """Forward and back, few rows and many; 16 bits are exact but for the result."""
    few = (jnp.float16, 3, 1e-3) if form == "triton" else (jnp.bfloat16, 3, 8e-3)
    for dtype, rows, tolerance in ((jnp.float32, 40, 2e-6), few):
        x, leaf, expected = made(KERNELS[name], rows=rows, dtype=dtype)
        run = lambda x, leaf=leaf: quantized_matmul(x, leaf, implementation=form)
        y, back = jax.vjp(run, x)
        assert_close(y, expected, tolerance)
        assert_close(back(y)[0], exact(y) @ exact(leaf.decode()).T, tolerance)


@pytest.mark.parametrize("format", [Format(8), Format(4)], ids=["w8a8", "w4a8"])
def test_the_kernel_of_rounded_activations(format):
    x, leaf, _ = made(format, rows=40)
    run = lambda form: quantized_matmul(x, leaf, activations="int8", implementation=form)
    assert_close(run("triton"), exact(run("xla")))
    _, leaf, _ = made(AFFINE)
    with pytest.raises(ValueError, match="triton: scales by group"):
        run("triton")


@pytest.mark.parametrize("form", ["xla", "triton", "mosaic_tpu"])
def test_infinities_are_as_in_the_dense_product(form):
    x, leaf, _ = made(AFFINE)
    x = x.at[1, 5].set(jnp.inf).at[2, 7].set(-jnp.inf)
    with np.errstate(invalid="ignore"):
        expected = exact(x) @ exact(leaf.decode())
    y = exact(quantized_matmul(x, leaf, implementation=form))
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(y), kind(expected))


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_whole_numbers_become_floats(dtype, activations):
    _, leaf, _ = made(Format(8), (16, 8))
    x = jnp.asarray(np.random.default_rng(1).integers(0, 2, (3, 16)), dtype)
    y = quantized_matmul(x, leaf, activations=activations)
    assert y.dtype == leaf.dtype
    assert_close(y, exact(x) @ exact(leaf.decode()))
    none = quantized_matmul(x[:0], leaf, activations=activations)
    assert (none.shape, none.dtype) == ((0, 8), leaf.dtype)


@pytest.mark.parametrize("form", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("size", [1e-30, 1e-34, 1e-36, 1e-37])
def test_rows_of_tiny_numbers_stay_finite(form, size):
    x, leaf, _ = made(Format(8) if form == "int8" else quantize.fp8(form[7:11]), (32, 8))
    x = (x * size).at[:, 5].set(0).at[2, 3].set(jnp.nan)
    codes, scale = jax.jit(quantize_rows, static_argnums=1)(x, form)
    found = exact(codes) * exact(scale)
    assert np.isnan(found[2]).any()
    rest = np.array([0, 1, 3, 4])
    assert (found[rest, 5] == 0).all()
    # A scale that is not smaller than the least normal number is a step of int8.
    assert_close(found[rest], exact(x)[rest], 0.13)
    y = exact(quantized_matmul(x, leaf, activations=form))
    assert np.isfinite(y[rest]).all()
    assert np.isnan(y[2]).all()


@pytest.mark.parametrize("rows", [8, 40])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(("dtype", "half"), [(jnp.float16, 2**-11), (jnp.bfloat16, 2**-8)])
def test_rounded_activations_are_rounded_once_more(dtype, half, implementation, rows):
    """The result of few rows is as near as that of many, half a step of its dtype."""
    x, leaf, _ = made(Format(8), rows=rows, dtype=dtype)
    small, scale = quantize_rows(x, "int8")
    expected = exact(small) * exact(scale) @ exact(leaf.decode())
    y = quantized_matmul(x, leaf, activations="int8", implementation=implementation)
    assert y.dtype == dtype
    np.testing.assert_allclose(exact(y), expected, rtol=1.01 * half, atol=1e-4)


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("shape", [(0, 16, 8), (3, 0, 8), (3, 16, 0), (40, 0, 8)])
def test_a_product_of_nothing_is_zeros(shape, activations):
    rows, inputs, outputs = shape
    leaf = QuantizedArray(
        jnp.zeros((inputs, outputs), jnp.uint8), jnp.ones((1, 1)), None, 8, outputs, (), jnp.float32
    )
    x = jnp.ones((2, rows, inputs))
    for form in (None, "xla", "triton"):
        run = partial(quantized_matmul, activations=activations, implementation=form)
        y, back = jax.vjp(lambda x, run=run: run(x, leaf), x)
        np.testing.assert_array_equal(y, np.zeros((2, rows, outputs)))
        np.testing.assert_array_equal(back(y)[0], np.zeros(x.shape))
    with pytest.raises(ValueError, match="has no form 'bogus'"):
        quantized_matmul(x, leaf, activations=activations, implementation="bogus")


PLACES = {
    "rows": ((4, 16), ("d",), None),
    "inputs": ((4, 3, 16), ("d", None, "m"), None),
    "weight's inputs": ((4, 16), ("d",), ("m", None)),
    "weight's outputs": ((4, 16), ("d",), (None, "m")),
}


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("place", PLACES)
def test_gradients_lie_as_the_activations_on_explicit_axes(place, activations):
    shape, spec, of_codes = PLACES[place]
    _, leaf, _ = made(Format(8), (16, 8))
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    loss = lambda x, leaf: jnp.sum(quantized_matmul(x, leaf, activations=activations) ** 2)
    expected = exact(jax.grad(loss)(x, leaf))
    if of_codes is not None:
        codes = jax.device_put(leaf.codes, NamedSharding(mesh, PartitionSpec(*of_codes)))
        leaf = dataclasses.replace(leaf, codes=codes)
    assert_close(jax.jit(jax.grad(loss))(placed, leaf), expected)
    with jax.set_mesh(mesh):
        assert_close(jax.grad(loss)(placed, leaf), expected)
