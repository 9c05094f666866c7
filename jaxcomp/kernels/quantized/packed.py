"""A matrix of packed codes as its products take it: codes, and scales by group of inputs."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcomp.arrays.bits import unpack_bits
from jaxcomp.arrays.blocks import split_shape, wide_scale
from jaxcomp.arrays.elements import ELEMENTS, Table, element_levels, levels
from jaxcomp.arrays.grid import GridArray
from jaxcomp.arrays.quantized import QuantizedArray
from jaxcomp.kernels.int8 import signed
from jaxcomp.sharding import automatic, explicit_axes

# Scales that a kernel widens itself; others, of 8 bits, are widened before.
_SCALES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


class Coding(NamedTuple):
    """What codes stand for; static.

    Attributes:
        bits: of a code.
        kind: ``integer``, ``odd`` (odd multiples of the scale, no zero), ``float4`` (e2m1, counted
            in halves), or an element's name.
        outputs: of the matrix, the last axis, along which codes are packed.
    """

    bits: int
    kind: str
    outputs: int

    @property
    def is_steps(self) -> bool:
        """Whether a code is a small integer times the scale, as kernels unpack it."""
        return self.kind in ("integer", "odd", "float4")

    @property
    def unit(self) -> float:
        """What one step is, in scales."""
        return 0.5 if self.kind == "float4" else 1.0


class Packed(NamedTuple):
    """The arrays of a matrix.

    Attributes:
        codes: uint8, ``(inputs, bytes)``.
        scale: ``(groups, outputs)``: equal groups of inputs, in order.
        zero: uint8 codes of zero, likewise; None for symmetric codes.
    """

    codes: Any
    scale: Any
    zero: Any


def packed_matrix(leaf: QuantizedArray | GridArray) -> tuple[Coding, Packed]:
    """A leaf's arrays, its scales spread over outputs (and over inputs, if they differ there).

    Args:
        leaf: of two axes, ``(inputs, outputs)``.

    Example:
        >>> leaf = QuantizedArray(jnp.zeros((4, 3), jnp.uint8), jnp.ones((2, 1, 1)), None, 8, 3,
        ...                       ((2, -2),), jnp.float32)
        >>> packed_matrix(leaf)[1].scale.shape
        (2, 3)
    """
    if isinstance(leaf, QuantizedArray):
        scale, zero = leaf.scale, leaf.zero_point
        kind = "integer" if leaf.zero else "odd"
    else:
        scale, zero = wide_scale(leaf.scale), None
        if leaf.tensor_scale is not None:
            scale = scale * leaf.tensor_scale
        kind = "float4" if leaf.element == "float4_e2m1fn" else leaf.element
    if scale.dtype not in _SCALES:
        scale = wide_scale(scale)
    spread = partial(_by_groups, shape=leaf.shape, blocks=leaf.blocks)
    zero = None if zero is None else spread(zero)
    return Coding(leaf.bits, kind, leaf.length), Packed(leaf.codes, spread(scale), zero)


def scales_of_rows(leaf: Any) -> tuple[Any, jax.Array | None]:
    """A leaf without the scales of its rows, and these, where each row has one and no other.

    Spread over the columns they would take more memory than the codes.

    Example:
        >>> leaf = QuantizedArray(jnp.zeros((2, 3), jnp.uint8), jnp.array([[0.5], [2.0]]), None, 8,
        ...                       3, (), jnp.float32)
        >>> scales_of_rows(leaf)[1]
        Array([0.5, 2. ], dtype=float32)
    """
    affine = isinstance(leaf, QuantizedArray) and leaf.zero_point is not None
    if affine or leaf.blocks or leaf.scale.shape != (leaf.shape[0], 1):
        return leaf, None
    scale = wide_scale(leaf.scale)
    return dataclasses.replace(leaf, scale=jnp.ones((1, 1), scale.dtype)), scale[:, 0]


def scales_are_spread(leaf: Any) -> bool:
    """Whether a transposed product needs a scale for each weight, which is more than the weights.

    Example:
        >>> leaf = QuantizedArray(jnp.zeros((2, 4), jnp.uint8), jnp.ones((2, 2, 1)), None, 8,
        ...                       4, ((2, -1),), jnp.float32)
        >>> scales_are_spread(leaf)
        True
    """
    if any(axis == -2 for _, axis in leaf.blocks):
        return False
    left, _ = scales_of_rows(leaf)
    return left.scale.shape[0] > 1


def _by_groups(array: jax.Array, shape: tuple[int, ...], blocks: Any) -> jax.Array:
    """``(groups, outputs)`` of something that broadcasts to the codes once they are split."""
    cut = any(len(shape) + axis == 0 for _, axis in blocks)
    split, axes = split_shape(shape, blocks), 2 if cut else 1
    inputs = array.shape[:axes]
    if cut and inputs[1] > 1:
        inputs = split[:2]

    def spread(array: jax.Array) -> jax.Array:
        wide = jnp.broadcast_to(array, (*inputs, *split[len(inputs) :]))
        return wide.reshape(math.prod(inputs), shape[1])

    spec = tuple(jax.typeof(array).sharding.spec) if explicit_axes(array) else (None,) * 4
    return automatic(spread, out=PartitionSpec(spec[0], spec[axes]))(array)


def steps(coding: Coding, codes: jax.Array, zero: Any) -> jax.Array:
    """How many steps a code is away from zero; for use in kernels, too.

    Args:
        coding: with ``is_steps``.
        codes: integers wide enough for twice as many numbers.
        zero: the code of zero in the same dtype, broadcastable; None for symmetric codes.

    Example:
        >>> steps(Coding(4, "float4", 2), jnp.array([1, 7, 15]), None)
        Array([  1,  12, -12], dtype=int32)
    """
    if coding.kind == "integer":
        return codes - ((1 << (coding.bits - 1)) if zero is None else zero)
    if coding.kind == "odd":
        return 2 * codes - ((1 << coding.bits) - 1)
    low = codes & 7
    halves = jnp.where(low < 4, low, jnp.where(low < 6, 2 * low - 4, 4 * low - 16))
    return jnp.where(codes > 7, -halves, halves)


def parts_in_byte(coding: Coding) -> int:
    """How many codes lie in a byte; 1 for codes that cross bytes."""
    return 8 // coding.bits if 8 % coding.bits == 0 else 1


def part_of_codes(coding: Coding, codes: jax.Array, part: int) -> jax.Array:
    """Every ``parts_in_byte``-th code from the ``part``-th on, uint8.

    Example:
        >>> part_of_codes(Coding(4, "integer", 2), jnp.array([0x9F], jnp.uint8), 1)
        Array([9], dtype=uint8)
    """
    if coding.bits == 8:
        return codes
    if 8 % coding.bits:
        return unpack_bits(codes, coding.bits, coding.outputs)
    return (codes >> (coding.bits * part)) & ((1 << coding.bits) - 1)


def values(coding: Coding, codes: jax.Array, zero: Any, dtype: Any) -> jax.Array:
    """What codes stand for, in scales, exactly: in ``dtype``, or float32 if that cannot.

    Args:
        coding: of the codes.
        codes: uint8, one a byte.
        zero: uint8 codes of zero, broadcastable; None for symmetric codes.
        dtype: of the activations that they are multiplied with.

    Returns:
        In units of ``coding.unit``.

    Example:
        >>> values(Coding(4, "integer", 2), jnp.array([15, 9], jnp.uint8), None, jnp.bfloat16)
        Array([7, 1], dtype=bfloat16)
    """
    if coding.kind == "integer" and coding.bits == 8 and zero is None:
        return signed(codes).astype(dtype)
    if coding.is_steps:
        # The narrower, the less a compiler writes that does not fuse this with the product.
        wide = jnp.int16 if coding.bits == 8 else jnp.int8
        zero = None if zero is None else zero.astype(wide)
        return steps(coding, codes.astype(wide), zero).astype(dtype)
    element = ELEMENTS[coding.kind]
    dtype = _exact_in(coding.kind, dtype)
    if not isinstance(element, Table) and element.bits == 8:
        return jax.lax.bitcast_convert_type(codes, jnp.dtype(coding.kind)).astype(dtype)
    return element_levels(codes, element).astype(dtype)


def _exact_in(kind: str, dtype: Any) -> Any:
    """``dtype`` if it holds every level, or what it and float32 promote to."""
    exactly = levels(ELEMENTS[kind])
    same = np.array_equal(exactly.astype(dtype).astype(np.float32), exactly, equal_nan=True)
    return dtype if same else jnp.promote_types(dtype, jnp.float32)
