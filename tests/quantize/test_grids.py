"""Formats of small floats and tables: what is seen is what is packed, and the standards' scales."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quantize_reference import DTYPES, name_of, same_bits, samples, wide

import jaxcomp
from jaxcomp.arrays import GridArray
from jaxcomp.quantize.affine import encode, fake_quant, find_codes, from_codes, leaf_of
from jaxcomp.quantize.formats import Format, GridFormat, PerBlock, PerChannel, PerGroup, PerTensor
from jaxcomp.quantize.named import binary, fp8, mxfp4, mxfp8, nf4, nvfp4, power_of_two, ternary
from jaxcomp.quantize.rounding import element_codes, element_values
from jaxcomp.quantize.scales import find_scales, spread_scales

SHAPE = (32, 6)
FORMATS = {
    "fp8": fp8("e4m3"),
    "e5m2": fp8("e5m2", PerBlock((8, 3))),
    "mxfp8": mxfp8("e5m2"),
    "mxfp4": mxfp4(),
    "nvfp4": nvfp4(),
    "nf4": nf4(16),
    "power": power_of_two(4, PerTensor()),
    "binary": binary(),
    "half": Format(2, zero=False, granularity=PerGroup(8)),
    "tiles": Format(4, granularity=PerBlock((8, 3))),
    "affine tiles": Format(3, False, PerBlock((8, 3)), scale_dtype="bfloat16"),
    "e8m0": Format(4, scale_dtype="float8_e8m0fnu"),
    "e4m3": Format(8, scale_dtype="float8_e4m3fn"),
    "float16": Format(5, False, scale_dtype="float16"),
}
each = pytest.mark.parametrize("name", FORMATS)
KINDS = ("normal", "huge, lopsided", "mixed", "zero", "one large")


@functools.cache
def both(name):
    """Encoded, decoded and seen in training, in one program."""
    format = FORMATS[name]

    def run(x):
        leaf = encode(x, format)
        return leaf, leaf.decode(), fake_quant(x, format)

    return jax.jit(run)


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_law(name, dtype):
    """Inside `jit`, outside of it, and of the leaf afterwards: the same bits, all finite."""
    for kind in KINDS:
        x = samples(dtype, SHAPE)[kind]
        leaf, decoded, seen = both(name)(x)
        assert same_bits(decoded, seen)
        assert same_bits(leaf.decode(), seen)
        assert np.all(np.isfinite(wide(seen)))
        assert leaf.scale.dtype == jnp.dtype(FORMATS[name].scale_dtype)
        if kind == "normal":
            assert same_bits(fake_quant(x, FORMATS[name]), seen)
            assert same_bits(encode(x, FORMATS[name]).decode(), seen)


@each
def test_a_file_holds_it(name, tmp_path):
    x = samples(jnp.float32, SHAPE)["normal"]
    leaf = encode(x, FORMATS[name])
    jaxcomp.save(tmp_path / "leaf.jxc", {"w": leaf})
    again = jaxcomp.load(tmp_path / "leaf.jxc")["w"]
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(leaf), strict=True):
        assert same_bits(a, b)


@each
def test_spread_scales_are_for_solvers(name):
    """With scales of every element, codes and values are those of the leaf."""
    format, x = FORMATS[name], samples(jnp.float32, SHAPE)["normal"]
    scales = find_scales(x, format)
    codes, inside = find_codes(x, scales, format)
    spread = spread_scales(scales, SHAPE, format)
    assert spread.scale.shape == SHAPE
    flat_codes, flat_inside = element_codes(x, spread.scale, spread.zero_point, format)
    assert same_bits(flat_codes, codes)
    assert same_bits(flat_inside, inside)
    values = from_codes(codes, scales, format, x.dtype)
    assert same_bits(element_values(codes, spread.scale, spread.zero_point, format), values)
    assert same_bits(leaf_of(codes, scales, format, x.dtype).decode(), values)


@given(st.integers(0, 2**32 - 1), st.integers(-20, 20))
def test_sign_symmetry_scale_equivariance_and_order(seed, power):
    """But in nf4, which has no symmetric levels, the sign."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(np.sort(rng.normal(size=SHAPE), axis=0), jnp.float32)
    for name in ("fp8", "mxfp8", "mxfp4", "nvfp4", "nf4", "power", "e8m0"):
        seen = both(name)(x)[2]
        factor = np.float32(2.0**power)
        np.testing.assert_array_equal(both(name)(x * factor)[2], np.asarray(seen) * factor)
        if name != "nf4":
            np.testing.assert_array_equal(both(name)(-x)[2], -np.asarray(seen))
        if name in ("fp8", "power", "e8m0"):
            assert np.all(np.diff(wide(seen), axis=0) >= 0)


@given(st.integers(0, 2**32 - 1))
def test_twice_is_once(seed):
    """Where scales are powers of two nothing is lost in them; the largest level stays in use."""
    x = jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)
    for name in ("mxfp8", "mxfp4"):
        seen = both(name)(x)[2]
        np.testing.assert_array_equal(both(name)(seen)[2], seen)
    for name in ("fp8", "power", "nf4"):
        seen = both(name)(x)[2]
        np.testing.assert_allclose(both(name)(seen)[2], seen, rtol=1e-6)


@pytest.mark.parametrize(
    ("format", "element", "largest_exponent"),
    [(mxfp8("e4m3"), "float8_e4m3fn", 8), (mxfp8("e5m2"), "float8_e5m2", 15),
     (mxfp4(), "float4_e2m1fn", 2)],
)  # fmt: skip
def test_microscaling_by_the_words_of_the_standard(format, element, largest_exponent):
    """OCP MX 1.0, 6.3: X = 2**(floor(log2 max|V|) - emax), P = V / X in the element, saturating."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)) * 10.0 ** rng.integers(-20, 20, (2, 8)).repeat(32, 0)
    x = x.astype(np.float32)
    leaf = jax.jit(lambda x: encode(x, format))(x)
    blocks = x.astype(np.float64).reshape(2, 32, 8)
    power = np.floor(np.log2(np.abs(blocks).max(axis=1, keepdims=True))) - largest_exponent
    np.testing.assert_array_equal(wide(leaf.scale), 2.0**power)
    top = float(ml_dtypes.finfo(getattr(ml_dtypes, element)).max)
    quotient = np.clip(blocks / 2.0**power, -top, top).astype(np.float32)
    expected = quotient.astype(getattr(ml_dtypes, element)).astype(np.float64) * 2.0**power
    np.testing.assert_array_equal(wide(leaf.decode()), expected.reshape(x.shape))
    # What saturates has no gradient, the rest has.
    grad = np.asarray(jax.grad(lambda x: jnp.sum(fake_quant(x, format)))(jnp.asarray(x)))
    far = np.abs(blocks / 2.0**power).reshape(x.shape) > top * 1.2
    assert np.all(grad[np.abs(x) < np.abs(expected.reshape(x.shape)) * 1.01] == 1)
    assert np.all(grad[far] == 0)


def test_nvfp4_by_its_definition():
    """A float32 scale amax / (448 * 6), block scales amax_b / 6 / scale in e4m3, then e2m1."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 8)) * np.exp(rng.normal(size=(4, 8))).repeat(16, 0)).astype("f4")
    leaf = jax.jit(lambda x: encode(x, nvfp4()))(x)
    blocks = x.astype(np.float64).reshape(4, 16, 8)
    whole = np.abs(blocks).max() / (448 * 6)
    np.testing.assert_allclose(wide(leaf.tensor_scale).item(), whole, rtol=1e-6)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 6 / whole).astype(np.float32)
    np.testing.assert_array_equal(wide(leaf.scale), wide(scale.astype(ml_dtypes.float8_e4m3fn)))
    step = wide(leaf.scale) * wide(leaf.tensor_scale)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = np.concatenate([levels, -levels])
    error = np.abs(blocks[..., None] / step[..., None] - levels).min(axis=-1)
    found = np.abs(blocks - wide(leaf.decode()).reshape(blocks.shape)) / step
    np.testing.assert_allclose(found, error, atol=1e-5)
    assert wide(leaf.scale).max() == 448


def test_nothing_is_clipped_by_a_scale_that_was_rounded():
    x = samples(jnp.float32, SHAPE)["normal"]
    for dtype in ("bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu"):
        for format in (Format(4, scale_dtype=dtype), GridFormat("nf4", scale_dtype=dtype)):
            scales = find_scales(x, format)
            assert np.all(np.asarray(find_codes(x, scales, format)[1]))
            exact = find_scales(x, GridFormat("nf4") if "nf4" in str(format) else Format(4))
            assert np.all(wide(scales.scale) >= wide(exact.scale))
            assert np.all(wide(scales.scale) <= wide(exact.scale) * 2)


def test_bad_values_stay_in_their_unit():
    for name in ("fp8", "mxfp4", "nf4", "e8m0", "power"):
        x = np.array(samples(jnp.float32, SHAPE)["normal"])
        clean = np.asarray(both(name)(jnp.asarray(x))[2])
        for bad in (np.nan, np.inf, -np.inf):
            x[1, 2] = bad
            seen = np.asarray(both(name)(jnp.asarray(x))[2])
            assert not np.isfinite(seen[1, 2])
            if name != "power":
                assert same_bits(np.delete(seen, 2, axis=1), np.delete(clean, 2, axis=1))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["nvfp4", "tiles", "nf4"])
def test_sharded(name, kind):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 12)), jnp.float32)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    there = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
    leaf = encode(there, FORMATS[name])
    assert same_bits(leaf.decode(), encode(x, FORMATS[name]).decode())
    seen = jax.jit(lambda x: fake_quant(x, FORMATS[name]))(there)
    assert same_bits(seen, leaf.decode())
    if kind == AxisType.Explicit:
        assert seen.sharding.is_equivalent_to(there.sharding, 2)


def test_stacked_layers():
    """Blocks of a stack are sliced by scan; a tensor scale is each layer's own under vmap."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32, 6)), jnp.float32)
    for format in (mxfp4(), Format(4, granularity=PerBlock((8, 3)))):
        leaf = encode(x, format)
        assert same_bits(jax.lax.scan(lambda c, w: (c, w.decode()), 0, leaf)[1], leaf.decode())
    leaf: Any = jax.vmap(lambda x: encode(x, nvfp4()))(x)
    assert leaf.tensor_scale.shape == (3, 1, 1, 1)
    alone = np.stack([encode(layer, nvfp4()).decode() for layer in x])
    assert same_bits(leaf.decode(), alone)
    assert same_bits(jax.lax.scan(lambda c, w: (c, w.decode()), 0, leaf)[1], alone)


def test_sizes_and_names():
    x = jnp.ones((64, 32))
    bits = {"mxfp8": 8.25, "mxfp4": 4.25, "nvfp4": 4.5 + 32 / 2048}
    for format, name in ((mxfp8(), "mxfp8"), (mxfp4(), "mxfp4"), (nvfp4(), "nvfp4")):
        leaf = encode(x, format)
        assert isinstance(leaf, GridArray)
        assert jaxcomp.nbytes(leaf) * 8 / x.size == bits[name]
    assert ternary().code_range == (-1, 1)
    assert power_of_two(3).granularity == PerChannel()
    with pytest.raises(ValueError, match="kind must be e4m3 or e5m2, not 'e3m4'"):
        fp8("e3m4")
