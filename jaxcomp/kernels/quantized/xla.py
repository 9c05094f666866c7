"""The product with packed codes and its gradient, as XLA compiles it: anywhere, any sizes.

XLA's compiler for CPUs writes what an operand is made of: there a block of inputs at a time is
unpacked, small enough to stay in the cache. Codes that share a byte have products of their own,
whose outputs are put in order at last: there are fewer of them than of the codes.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.kernels.quantized.packed import Coding, part_of_codes, parts_in_byte, values

# Weights that are unpacked at a time on a CPU: 4 MiB in float32.
_BLOCK = 1 << 20


def forward(
    coding: Coding, dtype: Any, x: jax.Array, codes: jax.Array, scale: jax.Array, *zero: Any
) -> jax.Array:
    """``x @ w`` in ``dtype``: ``x (rows, inputs)``, codes, scale and, if affine, zero points."""
    (rows, inputs), groups, sums = x.shape, scale.shape[0], sums_dtype(x)
    if 0 in (rows, inputs, coding.outputs):
        return jnp.zeros((rows, coding.outputs), dtype)
    # Where the groups' sums take more memory than the matrix does, weights are scaled instead.
    apart = 2 * rows * groups <= inputs

    def whole(x: jax.Array, *packed: jax.Array) -> jax.Array:
        return _products(coding, groups, apart, x, *packed)

    def in_blocks(x: jax.Array, *packed: jax.Array) -> jax.Array:
        def block(first: Any, length: int) -> jax.Array:
            left = lax.dynamic_slice_in_dim(x, first, length, 1).astype(sums)
            return _products(coding, groups, False, left, *_cut(first, length, groups, *packed))

        length, count, rest = _blocks(inputs, groups, coding.outputs)
        total = block(0, length)
        if count > 1:
            add = lambda k, total: total + block(k * length, length)
            total = lax.fori_loop(1, count, add, total)
        return total + block(count * length, rest) if rest else total

    totals = lax.platform_dependent(x, codes, scale, *zero, cpu=in_blocks, default=whole)
    parts, _, width = totals.shape
    y = jnp.moveaxis(totals, 0, -1).reshape(rows, width * parts)[:, : coding.outputs]
    return (y * _scale_of_all(coding, scale, sums)).astype(dtype)


def to_input(
    coding: Coding, dtype: Any, dy: jax.Array, codes: jax.Array, scale: jax.Array, *zero: Any
) -> jax.Array:
    """``dy @ w.T`` in ``dtype``: ``dy (rows, outputs)``, codes, scale and, if affine, zeros."""
    groups, inputs, sums = scale.shape[0], codes.shape[0], sums_dtype(dy)
    if 0 in (*dy.shape, inputs):
        return jnp.zeros((dy.shape[0], inputs), dtype)

    def whole(dy: jax.Array, *packed: jax.Array) -> jax.Array:
        return _products_back(coding, groups, dy, *packed)

    def in_blocks(dy: jax.Array, *packed: jax.Array) -> jax.Array:
        def block(first: Any, length: int) -> jax.Array:
            cut = _cut(first, length, groups, *packed)
            return _products_back(coding, groups, dy.astype(sums), *cut)

        length, count, rest = _blocks(inputs, groups, coding.outputs)
        made = lax.map(lambda k: block(k * length, length), jnp.arange(count))
        dx = jnp.moveaxis(made, 0, 1).reshape(dy.shape[0], count * length)
        return jnp.concatenate([dx, block(count * length, rest)], axis=1) if rest else dx

    scaled = (dy.astype(sums) * _scale_of_all(coding, scale, sums)).astype(dy.dtype)
    totals = lax.platform_dependent(scaled, codes, scale, *zero, cpu=in_blocks, default=whole)
    return totals.astype(dtype)


def sums_dtype(*arrays: Any) -> Any:
    """What products are summed in.

    Example:
        >>> sums_dtype(jnp.ones(1, jnp.bfloat16))
        dtype('float32')
    """
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def _scale_of_all(coding: Coding, scale: jax.Array, dtype: Any) -> Any:
    """What multiplies outputs once: groups have been multiplied with their scales."""
    return scale.astype(dtype) * coding.unit if scale.shape[0] == 1 else coding.unit


def _blocks(inputs: int, groups: int, outputs: int) -> tuple[int, int, int]:
    """Inputs of a block, whole groups if there are several; how many blocks; what is left."""
    size = inputs // groups if groups > 1 else 1
    length = min(max(_BLOCK // (outputs * size), 1) * size, inputs)
    return length, inputs // length, inputs % length


def _cut(first: Any, length: int, groups: int, codes: Any, *by_group: Any) -> tuple[Any, ...]:
    """The packed arrays of some inputs."""
    here = lax.dynamic_slice_in_dim(codes, first, length, 0)
    if groups == 1:
        return here, *by_group
    size = codes.shape[0] // groups
    at = lax.div(jnp.asarray(first, jnp.int32), jnp.int32(size))
    return here, *(lax.dynamic_slice_in_dim(a, at, length // size, 0) for a in by_group)


class _Part(NamedTuple):
    """The outputs whose codes lie in one part of each byte, or all outputs.

    Attributes:
        outputs: which of them.
        counted: ``(groups, members, width)``: the weights in scales.
        scale: ``(groups, 1, width)``.
    """

    outputs: slice
    counted: jax.Array
    scale: jax.Array

    def weights(self, groups: int, dtype: Any) -> jax.Array:
        """``(inputs, width)``, scaled where there are several groups in all."""
        weights = self.counted
        if groups > 1:
            weights = (weights.astype(self.scale.dtype) * self.scale).astype(dtype)
        return weights.reshape(-1, weights.shape[-1])


def _parted(coding: Coding, dtype: Any, codes: Any, *by_group: Any) -> Iterator[_Part]:
    parts, sums = parts_in_byte(coding), jnp.promote_types(dtype, jnp.float32)
    groups = by_group[0].shape[0]
    codes = codes.reshape(groups, codes.shape[0] // groups, codes.shape[1])
    whole = [_padded(array, parts)[:, None, :] for array in by_group]
    for part in range(parts):
        outputs = slice(part, None, parts)
        scale, *zero = (array[..., outputs] for array in whole)
        plain = part_of_codes(coding, codes, part)
        counted = values(coding, plain, zero[0] if zero else None, dtype)
        yield _Part(outputs, counted, scale.astype(sums))


def _padded(array: jax.Array, multiple: int) -> jax.Array:
    """Zeros behind the last axis, where the last byte is not full."""
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % multiple)))


def _products(coding: Coding, groups: int, apart: bool, x: Any, *packed: Any) -> jax.Array:
    """``(parts, rows, width)``, sums that are scaled where there are several groups in all."""
    found = []
    for part in _parted(coding, x.dtype, *packed):
        if groups == 1 or not apart:
            found.append(_dot(x, part.weights(groups, x.dtype)))
            continue
        members = part.counted.shape[:2]
        left = x.astype(part.counted.dtype).reshape(x.shape[0], *members)
        sums = jnp.einsum(
            "rgi,gio->gro", left, part.counted, preferred_element_type=part.scale.dtype
        )
        found.append(jnp.sum(sums * part.scale, axis=0))
    return jnp.stack(found)


def _products_back(coding: Coding, groups: int, dy: Any, *packed: Any) -> jax.Array:
    """``(rows, inputs)`` of gradients that are scaled where all inputs are one group."""
    dy = _padded(dy, parts_in_byte(coding))
    parts = _parted(coding, dy.dtype, *packed)
    sums = (_dot(dy[:, part.outputs], part.weights(groups, dy.dtype).T) for part in parts)
    return functools.reduce(jnp.add, sums)


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    sums = sums_dtype(left, right)
    return jnp.matmul(left.astype(right.dtype), right, preferred_element_type=sums)
