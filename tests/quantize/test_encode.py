"""Encoding: error, zero, symmetry, order and range, against float64 and for hostile weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from quantize_reference import (
    BITS,
    DTYPES,
    FEW_FORMATS,
    FORMATS,
    SHAPE,
    codes_of,
    grouped,
    half_step,
    name_of,
    reference_range,
    round_trip,
    same_bits,
    samples,
    wide,
)

from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor, encode
from jaxcomp.quantize.affine import find_codes
from jaxcomp.quantize.scales import Scales, find_scales

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
KINDS = list(samples(jnp.float32))


@functools.cache
def encode_all(formats=FEW_FORMATS):
    """All formats in one compiled program."""
    return jax.jit(lambda x: [encode(x, format) for format in formats])


@st.composite
def weights(draw, dtype, limit=1.0):
    """Any finite weights, up to a part of the largest number."""
    top = float(jnp.finfo(dtype).max) * limit
    sizes = draw(st.sampled_from([top, 1e3, 1.0, 1e-6]))
    elements = st.floats(-min(top, sizes), min(top, sizes), width=64)
    x = draw(hnp.arrays(np.float64, SHAPE, elements=elements))
    return jnp.asarray(x.astype(jnp.dtype(dtype)))


def check_values(leaf, x, format):
    """What holds for every leaf: the range of the codes, the error, no NaN, and zero for zero."""
    codes = codes_of(leaf)
    low, high = format.code_range
    assert low <= codes.min()
    assert codes.max() <= high
    values = wide(leaf.decode())
    assert np.all(np.isfinite(values))
    assert np.all(wide(leaf.scale) > 0)
    assert np.all(np.isfinite(wide(leaf.scale)))
    assert np.all(values[wide(x) == 0] == 0)
    error = np.abs(grouped(values, format) - grouped(wide(x), format))
    assert np.all(error <= half_step(leaf, x.dtype))


@every_dtype
@given(st.data())
def test_any_weights(dtype, data):
    x = data.draw(weights(dtype))
    for format, leaf in zip(FEW_FORMATS, encode_all()(x), strict=True):
        assert (leaf.shape, leaf.dtype) == (x.shape, x.dtype)
        check_values(leaf, x, format)


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_weights(kind, dtype):
    x = samples(dtype)[kind]
    for format, leaf in zip(FEW_FORMATS, encode_all()(x), strict=True):
        check_values(leaf, x, format)


# Two granularities with every bits and symmetry.
@pytest.mark.parametrize(
    "format", [format for i, format in enumerate(FORMATS) if (i + i // 8) % 2 == 0], ids=name_of
)
def test_formats_against_float64(format):
    x = samples(jnp.float32)["normal"]
    leaf = encode(x, format)
    scale, zero_point = reference_range(x, format)
    np.testing.assert_allclose(wide(leaf.scale), scale, rtol=1e-6)
    quotient = grouped(wide(x), format) / scale
    if zero_point is None:
        assert leaf.zero_point is None
        expected = quotient
    else:
        np.testing.assert_array_equal(wide(leaf.zero_point), zero_point)
        expected = quotient + zero_point
    # Half a code of leave, and as much again as float32 can err.
    assert np.all(np.abs(grouped(codes_of(leaf), format) - expected) <= 0.5 + 1e-4)
    assert leaf.codes.shape == (2, 8, -(-6 * format.bits // 8))
    check_values(leaf, x, format)


def test_zero_is_a_code():
    formats = tuple(Format(bits, False, PerTensor()) for bits in BITS)
    for shift in (-1.0, -0.3, 0.0, 0.7, 5.0):
        x = np.linspace(shift - 0.5, shift + 0.5, 96, dtype=np.float32).reshape(SHAPE)
        x[1, 1, 1] = 0
        for leaf in encode_all(formats)(jnp.asarray(x)):
            zero = np.asarray(leaf.decode())[1, 1, 1]
            assert zero == 0.0
            assert not np.signbit(zero)


@given(st.data())
def test_one_sided_weights_use_every_code(data):
    x = jnp.abs(data.draw(weights(jnp.float32, 0.5)))
    formats = tuple(Format(bits, False, PerTensor()) for bits in BITS)
    for leaf, flipped in zip(encode_all(formats)(x), encode_all(formats)(-x), strict=True):
        assert np.all(np.asarray(leaf.zero_point) == 0)
        if float(x.max()) > 1e-30:
            assert np.all(np.asarray(flipped.zero_point) == 2**leaf.bits - 1)
            assert codes_of(leaf).max() == 2**leaf.bits - 1
            assert codes_of(flipped).min() == 0


@pytest.mark.parametrize("shape", [(1,), (4, 2)])
def test_constant_weights(shape):
    formats = tuple(Format(bits, s, PerTensor()) for bits in (2, 8) for s in (True, False))
    for value in (0.0, -0.0, 1.0, -0.37, 3.4e38, -3.4e38, 1e-30, 1e-45, -65504.0):
        x = jnp.asarray(np.full(shape, value, np.float32))
        for leaf in encode_all(formats)(x):
            np.testing.assert_allclose(wide(leaf.decode()), wide(x), rtol=2e-6, atol=1e-37)


def test_one_weight_in_each_channel_or_group():
    x = jnp.array([[3.0, -0.1, 0.0]])
    formats = tuple(
        Format(3, symmetric, granularity)
        for granularity in (PerChannel(-1), PerGroup(1, 0), PerGroup(1, -1))
        for symmetric in (True, False)
    )
    for leaf in encode_all(formats)(x):
        np.testing.assert_allclose(wide(leaf.decode()), wide(x), rtol=1e-6)


@given(weights(jnp.float32, limit=0.2))
def test_encoding_twice_symmetric(x):
    """The codes stay, so that the values do, to the rounding of the scale."""
    formats = [format for format in FEW_FORMATS if format.symmetric]
    for format, leaf in zip(FEW_FORMATS, encode_all()(x), strict=True):
        if format not in formats:
            continue
        again = encode_all()(leaf.decode())[FEW_FORMATS.index(format)]
        np.testing.assert_array_equal(codes_of(again), codes_of(leaf))
        np.testing.assert_allclose(wide(again.decode()), wide(leaf.decode()), rtol=3e-7)


@example(jnp.linspace(-1, 2, 96, dtype=jnp.float32).reshape(SHAPE))
@given(weights(jnp.float32, limit=0.2))
def test_encoding_twice_affine(x):
    """The codes stay where the first encoding used both ends; otherwise within half a step."""
    for index, format in enumerate(FEW_FORMATS):
        if format.symmetric:
            continue
        leaf = encode_all()(x)[index]
        again = encode_all()(leaf.decode())[index]
        codes, new = grouped(codes_of(leaf), format), grouped(codes_of(again), format)
        axes = tuple(a for a in range(codes.ndim) if leaf.scale.shape[a] == 1)
        full = (np.min(codes, axis=axes, keepdims=True) == 0) & (
            np.max(codes, axis=axes, keepdims=True) == 2**format.bits - 1
        )
        full = np.broadcast_to(full, codes.shape)
        np.testing.assert_array_equal(new[full], codes[full])
        values, renewed = (
            grouped(wide(leaf.decode()), format),
            grouped(wide(again.decode()), format),
        )
        np.testing.assert_allclose(renewed[full], values[full], rtol=3e-7)
        check_values(again, leaf.decode(), format)


def test_affine_codes_use_both_ends():
    """The range is no wider than it must be, so that encoding twice is encoding once."""
    formats = tuple(Format(bits, False, PerTensor()) for bits in BITS)
    for seed in range(10):
        x = np.random.default_rng(seed).normal(0.5, 1, SHAPE)
        for leaf in encode_all(formats)(jnp.asarray(x, jnp.float32)):
            assert codes_of(leaf).min() == 0
            assert codes_of(leaf).max() == 2**leaf.bits - 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=name_of)
@given(st.data())
def test_encoding_twice_in_16_bits(dtype, data):
    """Rounding to 16 bits moves values: codes up to 63 stay for either dtype if symmetric."""
    x = data.draw(weights(dtype, limit=0.2))
    assume(np.max(np.abs(wide(x))) > 1e-3)
    formats = (Format(7, True, PerTensor()),)
    (leaf,) = encode_all(formats)(x)
    (again,) = encode_all(formats)(leaf.decode())
    np.testing.assert_array_equal(codes_of(again), codes_of(leaf))


@every_dtype
@given(st.data())
def test_order_is_kept(dtype, data):
    x = np.sort(np.asarray(data.draw(weights(dtype))), axis=None).reshape(SHAPE)
    for format, leaf in zip(FEW_FORMATS, encode_all()(jnp.asarray(x)), strict=True):
        if format.granularity == PerTensor():
            assert np.all(np.diff(wide(leaf.decode()).ravel()) >= 0)


@every_dtype
@given(st.data())
def test_sign_symmetry(dtype, data):
    x = data.draw(weights(dtype))
    there, back = encode_all()(x), encode_all()(-x)
    for format, a, b in zip(FEW_FORMATS, there, back, strict=True):
        if format.symmetric:
            np.testing.assert_array_equal(codes_of(a), -codes_of(b))
            assert same_bits(a.scale, b.scale)


@every_dtype
@given(st.data(), st.integers(-12, 12))
def test_powers_of_two_move_only_the_scale(dtype, data, power):
    x = wide(data.draw(weights(dtype)))
    # In the middle of the range nothing is rounded by the factor.
    x = np.where(np.abs(x) > 1e-2, np.clip(x, -8, 8), 0)
    x = jnp.asarray(x.astype(jnp.dtype(dtype)))
    scaled = x * jnp.asarray(2.0**power, dtype)
    assume(bool(jnp.any(x != 0)) and same_bits(scaled * jnp.asarray(2.0**-power, dtype), x))
    for a, b in zip(encode_all()(x), encode_all()(scaled), strict=True):
        np.testing.assert_array_equal(codes_of(a), codes_of(b))
        unmoved = np.all(codes_of(a) == 0) or np.any(wide(a.scale) == 1)  # all zeros: scale 1
        assert unmoved or same_bits(np.asarray(a.scale) * np.float32(2.0**power), b.scale)


def test_a_coarse_scale_is_divided_by_in_float32():
    """Scales stored in 16 bits are exact numbers: the codes are those of the exact quotient."""
    x = jnp.linspace(-20, 20, 301)
    for dtype in (jnp.bfloat16, jnp.float16):
        scale = jnp.array([0.1575], dtype)
        codes, _ = find_codes(x, Scales(scale), Format(8))
        exact = np.clip(np.rint(wide(x) / wide(scale)), -127, 127)
        np.testing.assert_array_equal(np.asarray(codes, np.int64) - 128, exact)


@every_dtype
def test_nan_and_infinity_are_not_hidden_inside_jit(dtype):
    """There nothing can be raised; whoever shares the scale shows it, nobody else changes."""
    formats = tuple(Format(4, symmetric, PerChannel(-1)) for symmetric in (True, False))
    x = np.array(samples(dtype)["normal"])
    clean = [np.asarray(leaf.decode()) for leaf in encode_all(formats)(jnp.asarray(x))]
    for bad in (np.nan, np.inf, -np.inf):
        x[1, 2, 3] = bad
        for leaf, before in zip(encode_all(formats)(jnp.asarray(x)), clean, strict=True):
            values = np.asarray(leaf.decode())
            assert not np.isfinite(wide(values)[1, 2, 3])
            assert same_bits(np.delete(values, 3, axis=-1), np.delete(before, 3, axis=-1))


def test_the_range_of_other_floats():
    x = jnp.asarray(np.linspace(-448, 448, 96).reshape(SHAPE), jnp.float8_e4m3fn)
    for symmetric in (True, False):
        scale = find_scales(x, Format(4, symmetric, PerTensor())).scale
        values = round_trip(x, Format(4, symmetric, PerTensor()))
        assert values.dtype == jnp.float8_e4m3fn
        assert np.all(np.abs(wide(values) - wide(x)) <= wide(scale) / 2 + 32)
