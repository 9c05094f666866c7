"""Formats: what they refuse, and which weights share a scale."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantize_reference import GRANULARITIES, name_of

from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor
from jaxcomp.quantize.formats import GridFormat, PerBlock, negative_axis
from jaxcomp.quantize.ranges import AbsMax

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("bits", [-1, 0, 9, 16, 10**30])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"bits must be 1 to 8, not {bits}"):
        Format(bits)


@pytest.mark.parametrize("bits", ["4", 4.0, True, None, (4,), np.float32(4), jnp.int32(4)])
def test_bits_of_another_type(bits):
    with pytest.raises(TypeError, match="bits must be an int from 1 to 8"):
        Format(bits)


def test_one_bit_needs_two_levels():
    with pytest.raises(ValueError, match="1 bit around zero has no level but zero: use zero=False"):
        Format(1)
    assert Format(1, symmetric=False).code_range == (0, 1)
    assert Format(1, zero=False).code_range == (0, 1)


def test_an_affine_format_has_zero():
    with pytest.raises(ValueError, match="zero=False needs symmetric=True"):
        Format(4, symmetric=False, zero=False)


@pytest.mark.parametrize("zero", [0, 1, "no", None])
def test_zero_of_another_type(zero):
    with pytest.raises(TypeError, match="zero must be True or False"):
        Format(4, zero=zero)


@pytest.mark.parametrize("range", ["absmax", None, AbsMax, 0.5])
def test_range_of_another_type(range):
    for make in (lambda: Format(4, range=range), lambda: GridFormat("nf4", range=range)):
        with pytest.raises(TypeError, match=r"range must be AbsMax\(\), Percentile"):
            make()


@pytest.mark.parametrize("dtype", ["float64", "int8", "", None, jnp.float32])
def test_scale_dtypes(dtype):
    for make in (lambda: Format(scale_dtype=dtype), lambda: GridFormat("nf4", scale_dtype=dtype)):
        with pytest.raises(ValueError, match="scale_dtype must be one of float32, bfloat16"):
            make()


@pytest.mark.parametrize("element", ["int4", "", "float8", "power_of_two_8", "power_of_two_1"])
def test_unknown_elements(element):
    with pytest.raises(ValueError, match=r"element must be one of float8_e4m3fn, .*, not"):
        GridFormat(element)


def test_tensor_scales():
    with pytest.raises(ValueError, match="tensor_scale needs scale_dtype='float8_e4m3fn', not"):
        GridFormat("float4_e2m1fn", tensor_scale=True)
    with pytest.raises(TypeError, match="tensor_scale must be True or False"):
        GridFormat("nf4", scale_dtype="float8_e4m3fn", tensor_scale=1)


@pytest.mark.parametrize("shape", [(), (0,), (4, -1)])
def test_block_shapes_out_of_range(shape):
    with pytest.raises(ValueError, match="shape must hold sizes of at least 1"):
        PerBlock(shape)


@pytest.mark.parametrize("shape", [4, [4, 4], (4.0,), (True, 4), None])
def test_block_shapes_of_another_type(shape):
    with pytest.raises(TypeError, match="shape must be a tuple of ints"):
        PerBlock(shape)


@pytest.mark.parametrize("symmetric", [0, 1, "yes", None])
def test_symmetric_of_another_type(symmetric):
    with pytest.raises(TypeError, match="symmetric must be True or False"):
        Format(4, symmetric)


@pytest.mark.parametrize("granularity", ["per-tensor", None, PerTensor, 32, (0, -1)])
def test_granularity_of_another_type(granularity):
    with pytest.raises(TypeError, match=r"granularity must be PerTensor\(\), PerChannel\(axis\)"):
        Format(4, granularity=granularity)


@pytest.mark.parametrize("axis", ["0", 1.0, True, None, [0, 1], (0, "1"), (0, True)])
def test_channel_axis_of_another_type(axis):
    with pytest.raises(TypeError, match="axis must be an int or a tuple of ints"):
        PerChannel(axis)


def test_channels_without_axis():
    with pytest.raises(ValueError, match=r"use PerTensor\(\)"):
        PerChannel(())


@pytest.mark.parametrize("fields", [("32", -2), (3.0, -2), (True, -2), (4, "0"), (4, (0, 1))])
def test_group_of_another_type(fields):
    with pytest.raises(TypeError, match=r"(size|axis) must be an int"):
        PerGroup(*fields)


@pytest.mark.parametrize("size", [0, -1])
def test_group_size_out_of_range(size):
    with pytest.raises(ValueError, match=f"size must be at least 1 weight a group, not {size}"):
        PerGroup(size)


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_range(bits):
    low, high = Format(bits).code_range
    assert (-low, high) == (2 ** (bits - 1) - 1,) * 2
    assert Format(bits, symmetric=False).code_range == (0, 2**bits - 1)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
def test_formats_are_values(granularity):
    format = Format(3, False, granularity)
    assert len({format, Format(3, False, dataclasses.replace(granularity)), Format(3)}) == 2
    assert eval(repr(format)) == format
    with pytest.raises(dataclasses.FrozenInstanceError):
        format.bits = 4  # pyright: ignore[reportAttributeAccessIssue]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_negative_axis_is_the_same_axis(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    found = negative_axis(axis, tuple(shape), "x")
    assert -len(shape) <= found < 0
    assert found % len(shape) == axis % len(shape)


@pytest.mark.parametrize(
    ("granularity", "shape", "axes", "blocks"),
    [
        (PerTensor(), (3,), (-1,), ()),
        (PerTensor(), (2, 3, 4), (-3, -2, -1), ()),
        (PerChannel(), (3, 4), (-2,), ()),
        (PerChannel(), (3, 3, 8, 16), (-4, -3, -2), ()),
        (PerChannel(0), (3, 4), (-1,), ()),
        (PerChannel((0, -1)), (5, 3, 4), (-2,), ()),
        (PerChannel((-1, 0)), (5, 3, 4), (-2,), ()),
        (PerGroup(3), (6, 4), (-2,), ((3, -2),)),
        (PerGroup(3, 0), (6, 4), (-2,), ((3, -2),)),
        (PerGroup(4, -1), (6, 4), (-1,), ((4, -1),)),
        (PerGroup(1, 2), (6, 4, 2), (-1,), ((1, -1),)),
        (PerGroup(2, 1), (6, 4, 2, 2), (-3,), ((2, -3),)),
        (PerBlock((2,)), (6, 4), (-1,), ((2, -1),)),
        (PerBlock((3, 2)), (6, 4), (-3, -1), ((3, -2), (2, -1))),
        (PerBlock((3, 2)), (5, 6, 4), (-3, -1), ((3, -2), (2, -1))),
        (PerBlock((1, 3, 2)), (5, 6, 4), (-5, -3, -1), ((1, -3), (3, -2), (2, -1))),
    ],
    ids=name_of,
)
def test_axes_and_blocks(granularity, shape, axes, blocks):
    format = Format(granularity=granularity)
    assert format.reduced_axes(shape) == axes
    assert format.blocks(shape) == blocks


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (PerTensor(), (), "blocks/0/kernel: a scalar cannot be quantized: leave it out"),
        (PerChannel(), (), "blocks/0/kernel: a scalar"),
        (PerGroup(2), (), "blocks/0/kernel: a scalar"),
        (PerChannel(2), (3, 4), r"blocks/0/kernel: shape \(3, 4\) has no axis 2: aim"),
        (PerChannel(-3), (3, 4), r"blocks/0/kernel: shape \(3, 4\) has no axis -3"),
        (PerChannel((0, 5)), (3, 4), r"blocks/0/kernel: shape \(3, 4\) has no axis 5"),
        (PerGroup(2), (4,), r"blocks/0/kernel: shape \(4,\) has no axis -2"),
        (PerGroup(4), (6, 4), "blocks/0/kernel: groups of 4 do not divide axis -2 .* divisor of 6"),
        (PerGroup(8), (4, 4), "blocks/0/kernel: groups of 8 do not divide axis -2"),
        (PerBlock((4, 2)), (6, 4), "blocks/0/kernel: blocks of 4 do not divide axis -2 of shape"),
        (PerBlock((1, 2, 2)), (6, 4), r"blocks/0/kernel: blocks of \(1, 2, 2\) have more axes"),
        (PerChannel(), (4,), r"blocks/0/kernel: .* every axis .* use PerTensor\(\)"),
        (PerChannel((0, -1)), (3, 4), "blocks/0/kernel: .* a scale for each weight"),
    ],
    ids=name_of,
)
def test_formats_that_do_not_fit(granularity, shape, message):
    with pytest.raises(ValueError, match=message):
        Format(granularity=granularity).reduced_axes(shape, "blocks/0/kernel")
