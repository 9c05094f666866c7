"""Casts against ml_dtypes over every code and every 16-bit number; stochastic rounding."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.arrays.elements import ELEMENTS, element_levels, largest, levels
from jaxcomp.quantize.affine import encode, fake_quant
from jaxcomp.quantize.formats import Format, GridFormat, PerTensor
from jaxcomp.quantize.rounding import element_codes, element_values
from jaxcomp.quantize.steps import stored

FLOATS = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
SOURCES = (ml_dtypes.bfloat16, np.float16)
UNIFORM = (Format(4), Format(3, False), Format(1, zero=False), Format(3, zero=False))


def bits_of(x) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))


@functools.cache
def cast(element: str):
    """With a scale of 1, nothing but the cast."""
    return jax.jit(lambda x: element_codes(x, jnp.ones(()), None, GridFormat(element)))


@pytest.mark.parametrize("element", FLOATS)
def test_every_code_stands_for_what_ml_dtypes_says(element):
    codes = np.arange(1 << ELEMENTS[element].bits, dtype=np.uint8)
    expected = codes.view(getattr(ml_dtypes, element)).astype(np.float32)
    one = ELEMENTS[element]
    compiled = jax.jit(lambda codes: element_levels(codes, one))
    for found in (levels(one), element_levels(jnp.asarray(codes), one), compiled(codes)):
        np.testing.assert_array_equal(bits_of(found), bits_of(expected))
    assert largest(one) == float(ml_dtypes.finfo(getattr(ml_dtypes, element)).max)


@pytest.mark.parametrize("source", SOURCES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("element", FLOATS)
def test_every_16_bit_number(element, source):
    """All 65,536 bit patterns: zeros, subnormal numbers, ties, infinities and NaNs."""
    x = np.arange(1 << 16, dtype=np.uint16).view(source)
    wide = x.astype(np.float32)
    codes, inside = map(np.asarray, cast(element)(jnp.asarray(x)))
    top = largest(ELEMENTS[element])
    # ml_dtypes has its own ways beyond the largest; we give the largest, infinities too.
    known = ~np.isnan(wide) if element == "float4_e2m1fn" else np.ones(x.shape, bool)
    with np.errstate(invalid="ignore"):
        expected = np.clip(wide, -top, top).astype(getattr(ml_dtypes, element))
    found = codes.view(getattr(ml_dtypes, element)) if element != "float4_e2m1fn" else None
    if found is None:
        np.testing.assert_array_equal(codes[known], expected.view(np.uint8)[known] & 15)
    else:
        np.testing.assert_array_equal(bits_of(found.astype("f4")), bits_of(expected.astype("f4")))
    # Inside is what the cast to a wider range would not take beyond the largest.
    gap = float(np.sort(levels(ELEMENTS[element])[np.isfinite(levels(ELEMENTS[element]))])[-2])
    half = top + (top - gap) / 2
    # At a tie the even mantissa decides: that of 448 is even, of 57,344 and 6 odd.
    ends = np.abs(wide) <= half if element == "float8_e4m3fn" else np.abs(wide) < half
    np.testing.assert_array_equal(inside, ends)


@pytest.mark.parametrize("element", FLOATS)
@given(st.data())
def test_float32_numbers_near_ties(element, data):
    """Half way between two neighbours, and one unit in the last place to either side."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    known = np.unique(levels(ELEMENTS[element])[np.isfinite(levels(ELEMENTS[element]))])
    at = rng.integers(0, len(known) - 1, 64)
    ties = ((known[at].astype(np.float64) + known[at + 1]) / 2).astype(np.float32)
    x = np.concatenate([ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    x = np.concatenate([x, (10.0 ** rng.uniform(-9, 6, 64)).astype(np.float32)])
    top = largest(ELEMENTS[element])
    # XLA flushes subnormal float32 numbers to zero; no level is that small.
    x = np.where(np.abs(x) < 1e-37, 0, x)
    expected = np.clip(x, -top, top).astype(getattr(ml_dtypes, element)).view(np.uint8)
    expected = expected & ((1 << ELEMENTS[element].bits) - 1)
    np.testing.assert_array_equal(cast(element)(jnp.asarray(x))[0], expected)


@pytest.mark.parametrize("element", ["nf4", *(f"power_of_two_{bits}" for bits in range(2, 8))])
def test_the_nearest_of_all_levels(element):
    """By trying each, in float64; ties as documented."""
    table = levels(ELEMENTS[element]).astype(np.float64)
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-1.3, 1.3, 500), np.exp2(rng.uniform(-70, 0.4, 500))])
    x = np.concatenate([x, table, -table]).astype(np.float32)
    codes, inside = map(np.asarray, cast(element)(jnp.asarray(x)))
    distance = np.abs(x.astype(np.float64)[:, None] - table)
    np.testing.assert_array_equal(distance[np.arange(len(x)), codes], distance.min(axis=1))
    # Half way to 2, or to what would come next in the table.
    ends = (-1.1519035, 1.1385215) if element == "nf4" else (-1.5, 1.5)
    np.testing.assert_array_equal(inside, (x > ends[0]) & (x < ends[1]))


def test_ties_of_powers_of_two():
    """To the larger; half of the smallest to zero."""
    x = jnp.array([0.75, 0.375, 0.125, 0.1250001, -0.75])
    codes, _ = cast("power_of_two_3")(x)
    found = element_values(codes, jnp.ones(()), None, GridFormat("power_of_two_3"))
    assert found.tolist() == [1.0, 0.5, 0.25, 0.25, -1.0]


def test_nf4_is_made_of_normal_quantiles():
    """QLoRA, appendix E: normal quantiles, 8 below and 9 above, zero in both."""
    norm = pytest.importorskip("scipy.stats").norm
    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([above, [0.0], below])) / above.max()
    np.testing.assert_allclose(levels(ELEMENTS["nf4"]), expected, atol=1e-6)


@pytest.mark.parametrize("nearest", [False, True], ids=["up", "nearest"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu"])
def test_stored_scales(dtype, nearest):
    """The least number of the dtype that is not below, or the nearest; never zero."""
    rng = np.random.default_rng(0)
    x = np.exp2(rng.uniform(-120, 120, 4000)).astype(np.float32)
    x = np.concatenate([x, np.exp2(np.arange(-120, 120)), rng.uniform(1e-3, 448, 2000)])
    x = x.astype(np.float32)
    found = np.asarray(jax.jit(lambda x: stored(x, dtype, nearest=nearest))(x))
    assert found.dtype == jnp.dtype(dtype)
    size = 8 * found.dtype.itemsize
    with np.errstate(invalid="ignore"):
        known = np.arange(1 << size, dtype=f"uint{size}").view(found.dtype).astype(np.float64)
    known = np.sort(known[np.isfinite(known) & (known > 0)])
    above = np.clip(np.searchsorted(known, x), 0, len(known) - 1)
    wide = found.astype(np.float64)
    if not nearest:
        np.testing.assert_array_equal(wide, known[above])
        return
    below = np.maximum(above - 1, 0)
    best = np.minimum(np.abs(known[above] - x), np.abs(known[below] - x))
    np.testing.assert_array_equal(np.abs(wide - x), best)
    bad = stored(jnp.array([jnp.nan, jnp.inf]), dtype, nearest=nearest)
    assert np.all(np.isnan(np.asarray(bad).astype(np.float32)))


def test_levels_without_zero():
    """Odd multiples of the scale, ties to the larger; the range ends half a step further."""
    scale = jnp.array(0.5)
    x = jnp.array([0.0, -0.0, 0.1, -0.1, 1.0, -1.0, 1.99, 2.0, -2.0, -2.01, 99.0])
    codes, inside = element_codes(x, scale, None, Format(2, zero=False))
    values = element_values(codes, scale, None, Format(2, zero=False))
    assert values.tolist() == [0.5, 0.5, 0.5, -0.5, 1.5, -0.5, 1.5, 1.5, -1.5, -1.5, 1.5]
    assert inside.tolist() == [True] * 7 + [False, True, False, False]


STOCHASTIC = [
    *((format, 0.25) for format in UNIFORM),
    *((GridFormat(element), 0.25) for element in ("float4_e2m1fn", "float8_e4m3fn")),
    *((GridFormat(element), 1.0) for element in ("nf4", "power_of_two_4")),
]


@pytest.mark.parametrize(("format", "scale"), STOCHASTIC, ids=str)
def test_stochastic_rounding_is_unbiased(format, scale):
    """The mean of 4,000 roundings, against its own standard error; neighbours only."""
    zero_point = jnp.array(3, jnp.uint8) if not getattr(format, "symmetric", True) else None
    codes = jnp.arange(1 << format.bits, dtype=jnp.uint8)
    if getattr(format, "zero", True) and getattr(format, "symmetric", False):
        codes = codes[1:]
    known = np.asarray(element_values(codes, jnp.array(scale), zero_point, format))
    known = np.unique(known[np.isfinite(known)])
    x = np.random.default_rng(0).uniform(known[0], known[-1], 40).astype(np.float32)
    x = np.concatenate([x, known]).astype(np.float32)

    @jax.jit
    def draw(key):
        codes, inside = element_codes(
            jnp.broadcast_to(x, (4000, x.size)), jnp.array(scale), zero_point, format, key
        )
        return element_values(codes, jnp.array(scale), zero_point, format), inside

    values, inside = map(np.asarray, draw(jax.random.key(0)))
    assert inside.all()
    above = np.searchsorted(known, x, side="left").clip(0, len(known) - 1)
    below = (np.searchsorted(known, x, side="right") - 1).clip(0)
    assert np.all((values == known[above]) | (values == known[below]))
    deviation = np.sqrt((known[above] - x) * (x - known[below]) / 4000)
    assert np.all(np.abs(values.astype(np.float64).mean(axis=0) - x) <= 5 * deviation + 1e-6)
    same, _ = draw(jax.random.key(0))
    np.testing.assert_array_equal(same, values)
    other, _ = draw(jax.random.key(1))
    assert not np.array_equal(other, values)


@pytest.mark.parametrize(
    "format", [*UNIFORM, GridFormat("nf4"), GridFormat("float8_e5m2")], ids=str
)
def test_stochastic_law(format):
    """What is seen in training with a key is what is packed with it; outside nothing moves."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    key = jax.random.key(3)
    leaf = encode(x, format, key=key)
    seen = jax.jit(lambda x, key: fake_quant(x, format, key=key))(x, key)
    np.testing.assert_array_equal(bits_of(seen), bits_of(leaf.decode()))
    assert not np.array_equal(seen, fake_quant(x, format))
    grad = jax.grad(lambda x: jnp.sum(fake_quant(x, format, key=key)))(x)
    assert np.all(np.asarray(grad) == 1)


def test_the_gradient_does_not_depend_on_chance():
    """Where the range ends is where it ends for rounding to the nearest."""
    x = jnp.array([3.4, 3.6, 3.74, 3.76, 4.1, -3.76])
    scale, format = jnp.array([0.5]), Format(4, granularity=PerTensor())
    for seed in range(8):
        key = jax.random.key(seed)
        grad = jax.grad(lambda x, k=key: jnp.sum(fake_quant(x, format, scale, key=k)))(x)
        assert grad.tolist() == [1, 1, 1, 0, 0, 0]
        assert float(jnp.max(jnp.abs(fake_quant(x, format, scale, key=key)))) <= 3.5
