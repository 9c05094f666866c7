"""Weights of several inputs and outputs, as attention has them: the matrices that kernels read."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.arrays import CodebookArray, GridArray, QuantizedArray
from jaxcomp.arrays.blocks import Blocks, split_shape
from jaxcomp.arrays.codebook import index_bits
from jaxcomp.model.accelerated.stacked import Unfit


def matrix_of(leaf: Any, inputs: int) -> Any:
    """A compressed leaf with its first axes as one, and the others as one.

    Args:
        leaf: of any number of axes.
        inputs: how many of them a product sums over.

    Returns:
        A leaf of two axes, of the same codes; ``leaf`` itself if it has no more.

    Raises:
        Unfit: its codes, scales, codebooks or blocks are not those of a matrix.

    Example:
        >>> leaf = CodebookArray.from_indices(
        ...     jnp.ones((4, 2, 8), jnp.uint8), jnp.array([0.5, 2.0]), jnp.float32)
        >>> matrix_of(leaf, 1).shape
        (4, 16)
    """
    shape = leaf.shape
    if len(shape) == 2:
        return leaf
    if not isinstance(leaf, QuantizedArray | GridArray | CodebookArray):
        raise Unfit(f"blocks of a weight of {len(shape)} axes are those of no matrix")
    bits = index_bits(leaf.clusters) if isinstance(leaf, CodebookArray) else leaf.bits
    if len(shape) - inputs > 1 and leaf.length * bits % 8:
        raise Unfit(f"{leaf.length} codes of {bits} bits do not end with a byte")
    rows, columns = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    if isinstance(leaf, CodebookArray):
        axis = _group_axis(leaf.axis, len(shape), inputs)
        indices = leaf.indices.reshape(rows, -1)
        return dataclasses.replace(leaf, indices=indices, length=columns, axis=axis)
    blocks = matrix_blocks(leaf.blocks, len(shape), inputs)
    flat = lambda array: None if array is None else matrix_scales(array, shape, leaf.blocks, inputs)
    name = "zero_point" if isinstance(leaf, QuantizedArray) else "tensor_scale"
    parts = {"scale": flat(leaf.scale), name: flat(getattr(leaf, name))}
    codes = leaf.codes.reshape(rows, -1)
    return dataclasses.replace(leaf, codes=codes, length=columns, blocks=blocks, **parts)


def matrix_blocks(blocks: Blocks, ndim: int, inputs: int) -> Blocks:
    """Blocks of a weight as those of its matrix.

    Raises:
        Unfit: they are not stretches of its inputs.

    Example:
        >>> matrix_blocks(((32, -2),), 3, 2), matrix_blocks(((32, -3),), 3, 1)
        (((32, -2),), ((32, -2),))
    """
    if not blocks:
        return ()
    (size, axis), *others = blocks
    if others or ndim + axis != inputs - 1:
        raise Unfit(f"blocks {blocks} of a weight of {ndim} axes are not stretches of its inputs")
    return ((size, -2),)


def matrix_scales(array: jax.Array, shape: Any, blocks: Blocks, inputs: int) -> jax.Array:
    """Scales of a weight, or what else has their axes, as those of its matrix.

    Args:
        array: broadcastable to the weight, once it is cut into blocks, with all axes.
        shape: of the weight.
        blocks: as :func:`matrix_blocks` takes them.
        inputs: how many axes are its inputs.

    Example:
        >>> matrix_scales(jnp.array([[[1.0, 2.0]]]), (4, 3, 2), (), 1)
        Array([[1., 2., 1., 2., 1., 2.]], dtype=float32)
    """
    split, cut = split_shape(shape, blocks), len(blocks)
    last = inputs + cut
    wide = (*_full(array.shape[:inputs], split[:inputs]), *array.shape[inputs:last])
    wide = (*wide, *_full(array.shape[last:], split[last:]))
    merged = (math.prod(wide[:inputs]), *wide[inputs:last], math.prod(wide[last:]))
    return jnp.broadcast_to(array, wide).reshape(merged)


def _full(sizes: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, ...]:
    """Axes that are merged: all of size 1, or all as long as those of the weight."""
    return sizes if set(sizes) <= {1} else whole


def _group_axis(axis: int | None, ndim: int, inputs: int) -> int | None:
    """The axis of a matrix whose parts have a codebook each."""
    if axis is None:
        return None
    # Parts of any other axis are not stretches of what it becomes part of.
    first = {0: -2, inputs: -1}
    if ndim + axis not in first:
        raise Unfit(f"groups of axis {axis} of a weight of {ndim} axes are not those of a matrix")
    return first[ndim + axis]
