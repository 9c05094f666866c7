"""Weights that share a scale lie together: axes split into blocks, and merged again."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxcomp.arrays.parts import read_int

# (size, negative axis) of each axis that is cut, from the first axis to the last.
Blocks = tuple[tuple[int, int], ...]

_LARGEST = 1 << 31


def split_shape(shape: Sequence[int], blocks: Blocks) -> tuple[int, ...]:
    """The shape once axes are split into blocks, members right behind their axis.

    Example:
        >>> split_shape((6, 4), ((3, -2), (2, -1)))
        (2, 3, 2, 2)
    """
    sizes = {len(shape) + axis: size for size, axis in blocks}
    split = [(n // sizes[at], sizes[at]) if at in sizes else (n,) for at, n in enumerate(shape)]
    return sum(split, ())


def split_blocks(x: Shaped[Array, "..."], blocks: Blocks) -> Shaped[Array, "..."]:
    """Split each axis of ``blocks`` into (blocks, members).

    Args:
        x: an array whose axes the sizes divide.
        blocks: ``(size, negative axis)`` of each axis that is cut, in the order of the axes.

    Returns:
        The same numbers, an axis more for each that is cut.

    Example:
        >>> split_blocks(jnp.zeros((6, 4)), ((3, -2),)).shape
        (2, 3, 4)
    """
    return x.reshape(split_shape(x.shape, blocks)) if blocks else x


def merge_blocks(x: Shaped[Array, "..."], blocks: Blocks) -> Shaped[Array, "..."]:
    """Undo :func:`split_blocks`.

    Example:
        >>> merge_blocks(jnp.zeros((2, 3, 4)), ((3, -2),)).shape
        (6, 4)
    """
    if not blocks:
        return x
    shape = list(x.shape)
    # From the last axis to the first, so that those before keep their places from the end.
    for _, axis in reversed(blocks):
        at = len(shape) + axis
        shape[at - 1 : at + 1] = [shape[at - 1] * shape[at]]
    return x.reshape(shape)


def describe_blocks(blocks: Blocks) -> str:
    """Such as ``groups of 32`` or ``blocks of 16x16``.

    Example:
        >>> describe_blocks(((16, -2), (16, -1)))
        'blocks of 16x16'
    """
    kind = "groups" if len(blocks) == 1 else "blocks"
    return f"{kind} of {'x'.join(str(size) for size, _ in blocks)}"


def read_blocks(blocks: Any, shape: tuple[int, ...]) -> Blocks:
    """What a file says of the blocks of codes of a shape, checked.

    Args:
        blocks: ``[[size, negative axis], ...]``.
        shape: of the codes.

    Returns:
        The blocks, as :func:`split_blocks` takes them.

    Raises:
        ValueError: they are no blocks, or do not fit the shape.

    Example:
        >>> read_blocks([[3, -2]], (6, 4))
        ((3, -2),)
    """
    if not isinstance(blocks, list | tuple):
        raise ValueError(f"blocks must be a list of [size, axis], not {blocks!r:.60}")
    found = []
    for block in blocks:
        if not isinstance(block, list | tuple) or len(block) != 2:
            raise ValueError(f"blocks must be a list of [size, axis], not {blocks!r:.60}")
        axis = read_int(block[1], "the axis of blocks", -len(shape), -1)
        size = read_int(block[0], "the size of blocks", 1, _LARGEST)
        if shape[axis] % size:
            raise ValueError(f"blocks of {size} on axis {axis} do not fit codes of shape {shape}")
        found.append((size, axis))
    if any(a >= b for (_, a), (_, b) in itertools.pairwise(found)):
        raise ValueError(f"blocks must name each axis once and in order, not {blocks!r:.60}")
    return tuple(found)


def check_fit(scale: tuple[int, ...], shape: tuple[int, ...], blocks: Blocks) -> None:
    """Raise ``ValueError`` unless scales have an axis for each of the codes', of size 1 or theirs.

    Args:
        scale: shape of the scales.
        shape: of the codes.
        blocks: of the codes.

    Example:
        >>> check_fit((1, 3), (2, 4), ())
        Traceback (most recent call last):
        ...
        ValueError: scales of shape (1, 3) do not fit codes of shape (2, 4)
    """
    split = split_shape(shape, blocks)
    if len(scale) != len(split) or any(a not in (1, b) for a, b in zip(scale, split, strict=True)):
        raise ValueError(f"scales of shape {scale} do not fit codes of shape {split}")


def wide_scale(scale: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Scales in float32, or in float64 if they are: 16 bits and fewer are too few to compute in.

    Example:
        >>> wide_scale(jnp.ones(1, jnp.float8_e4m3fn)).dtype
        dtype('float32')
    """
    return scale if jnp.finfo(scale.dtype).bits > 32 else scale.astype(jnp.float32)


def narrow(values: Shaped[Array, "..."], dtype: Any, *, clipped: bool) -> Shaped[Array, "..."]:
    """Values in the dtype of the weights, rounded once.

    Args:
        values: products with a wide scale.
        dtype: of the weights.
        clipped: whether numbers beyond the largest of ``dtype`` become it: a scale that was
            rounded up may reach beyond what it was found for.

    Example:
        >>> narrow(jnp.array([1e5]), jnp.float16, clipped=True)
        Array([6.55e+04], dtype=float16)
    """
    if clipped:
        largest = float(jnp.finfo(dtype).max)
        values = jax.lax.clamp(
            jnp.asarray(-largest, values.dtype), values, jnp.asarray(largest, values.dtype)
        )
    return values.astype(dtype)
