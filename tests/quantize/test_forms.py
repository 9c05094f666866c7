"""The formulas of the literature against exact rational arithmetic, and against the formats."""

import math
from fractions import Fraction

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.quantize.affine import find_codes, from_codes
from jaxcomp.quantize.formats import Format
from jaxcomp.quantize.forms import FloorForm, RoundForm, floor_form, round_form, scales_of_form
from jaxcomp.quantize.scales import Scales

# Multiples of powers of two: products and sums are exact in float32, so that ties are ties.
NUMBERS = st.lists(st.integers(-4096, 4096), min_size=32, max_size=32)
X = NUMBERS.map(lambda found: np.array(found, np.float32) / 64)
MULTIPLIERS = st.integers(1, 15).map(lambda m: m / 4)
FORMATS = [Format(4), Format(8), Format(4, False), Format(1, zero=False), Format(3, zero=False)]


@given(X, MULTIPLIERS, st.integers(-40, 40))
def test_floor(x, multiplier, offset):
    form = FloorForm(np.float32(multiplier), np.float32(offset / 8))
    w, b = Fraction(multiplier), Fraction(offset, 8)
    expected = [math.floor(Fraction(float(v)) * w + b) for v in x]
    codes = form.codes(jnp.asarray(x))
    assert codes.tolist() == expected
    values = [float((code + Fraction(1, 2) - b) / w) for code in expected]
    np.testing.assert_allclose(form.values(codes), values, rtol=3e-7, atol=1e-7)
    error = np.abs(np.asarray(form.values(codes)) - x)
    assert np.all(error <= 0.5 / multiplier + 1e-6 * (1 + np.abs(x)))
    # What a code stands for has that code: the inverse is one.
    np.testing.assert_array_equal(form.codes(form.values(codes)), codes)


@given(X, MULTIPLIERS)
def test_round(x, multiplier):
    form = RoundForm(np.float32(multiplier))
    expected = [round(Fraction(float(v)) * Fraction(multiplier)) for v in x]  # ties to even
    codes = form.codes(jnp.asarray(x))
    assert codes.tolist() == expected
    values = [float(Fraction(code) / Fraction(multiplier)) for code in expected]
    np.testing.assert_allclose(form.values(codes), values, rtol=3e-7)
    np.testing.assert_array_equal(form.codes(form.values(codes)), codes)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@given(x=X, power=st.integers(-3, 3), zero=st.integers(0, 15))
def test_forms_of_formats(format, x, power, zero):
    """The same codes but at ties, the same values, and back."""
    scales = Scales(
        jnp.full(1, 2.0**power, jnp.float32),
        None if format.symmetric else jnp.full(1, zero, jnp.uint8),
    )
    form = floor_form(scales, format)
    codes, _ = find_codes(jnp.asarray(x), scales, format)
    place = x.astype(np.float64) * np.asarray(form.multiplier) + np.asarray(form.offset)
    top = 2**format.bits - 1
    low = 1 if format.symmetric and format.zero else 0
    tie = (place == np.floor(place)) & format.zero
    found = np.clip(form.codes(jnp.asarray(x)), low, top)
    np.testing.assert_array_equal(found[~tie], np.asarray(codes)[~tie])
    assert np.all(np.abs(found - np.asarray(codes, np.int32))[tie] <= 1)
    values = from_codes(codes, scales, format, jnp.float32)
    np.testing.assert_array_equal(form.values(codes.astype(jnp.int32)), values)
    again = scales_of_form(form, format)
    np.testing.assert_array_equal(again.scale, scales.scale)
    if not format.symmetric:
        np.testing.assert_array_equal(again.zero_point, scales.zero_point)


@given(x=X, power=st.integers(-3, 3))
def test_round_form_of_a_format(x, power):
    format, scales = Format(4), Scales(jnp.full(1, 2.0**power, jnp.float32))
    form = round_form(scales, format)
    codes, _ = find_codes(jnp.asarray(x), scales, format)
    np.testing.assert_array_equal(
        np.clip(form.codes(jnp.asarray(x)), -7, 7), np.asarray(codes, np.int32) - 8
    )
    np.testing.assert_array_equal(scales_of_form(form, format).scale, scales.scale)


def test_forms_that_are_not_of_the_format():
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        for format in (Format(4, False), Format(2, zero=False)):
            with pytest.raises(ValueError, match="use floor_form"):
                round_form(Scales(jnp.ones(1)), format)
            with pytest.raises(ValueError, match="symmetric around zero"):
                scales_of_form(RoundForm(1.0), format)
        with pytest.raises(ValueError, match=r"the offset of .* is 8.5, not 8.0"):
            scales_of_form(FloorForm(1.0, 8.0), Format(4))
        with pytest.raises(ValueError, match=r"the offset of .* is 2, not 2.5"):
            scales_of_form(FloorForm(1.0, 2.5), Format(2, zero=False))
        for offset in (3.0, -0.5, 16.5):
            with pytest.raises(ValueError, match="half above a code from 0 to 15"):
                scales_of_form(FloorForm(1.0, offset), Format(4, False))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
