"""Where the kept blocks of a matrix stand, in the orders in which kernels want them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


class Places(NamedTuple):
    """The kept blocks as they are stored, row after row of the grid.

    Attributes:
        rows: of the grid, int32; as many as the grid has where a block is only padding.
        columns: of the grid, int32; 0 where it is only padding.
    """

    rows: jax.Array
    columns: jax.Array


class Lists(NamedTuple):
    """For each row (or column) of the grid the kept blocks in it, one list after the other.

    Attributes:
        starts: int32, where each list begins, and where the last one ends.
        blocks: int32, numbers of blocks.
        across: int32, the column (or row) in which each of them stands.
    """

    starts: jax.Array
    blocks: jax.Array
    across: jax.Array


class Steps(NamedTuple):
    """What a kernel does one after the other that writes each column (or row) once, int32 each.

    Attributes:
        blocks: number of the block that is read.
        across: the row (or column) in which it stands.
        along: the column (or row) that is summed up.
        flags: :data:`FIRST` and :data:`LAST` of its column, :data:`KEPT` if there is a block.
    """

    blocks: jax.Array
    across: jax.Array
    along: jax.Array
    flags: jax.Array


FIRST, LAST, KEPT = 1, 2, 4


def places(keep: Bool[Array, "rows columns"], count: int) -> Places:
    """Rows and columns of kept blocks.

    Args:
        keep: which blocks of the grid are kept.
        count: how many blocks are stored: at least as many as are kept.

    Example:
        >>> places(jnp.array([[False, True], [False, False]]), 2)
        Places(rows=Array([0, 2], dtype=int32), columns=Array([1, 0], dtype=int32))
    """
    at = _which(keep, count, keep.size)
    return Places(at // keep.shape[1], at % keep.shape[1])


def lists(keep: Bool[Array, "rows columns"], count: int, by_column: bool) -> Lists:
    """The kept blocks of each row, or of each column.

    Example:
        >>> lists(jnp.array([[True, True], [False, True]]), 3, by_column=True)
        ... # doctest: +NORMALIZE_WHITESPACE
        Lists(starts=Array([0, 1, 3], dtype=int32), blocks=Array([0, 1, 2], dtype=int32),
              across=Array([0, 0, 1], dtype=int32))
    """
    turned = keep.T if by_column else keep
    at = _which(turned, count, 0)
    ends = jnp.cumsum(jnp.sum(turned, 1, dtype=jnp.int32), dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    return Lists(starts, _numbers(keep, by_column)[at], at % turned.shape[1])


def steps(keep: Bool[Array, "rows columns"], count: int, by_column: bool) -> Steps:
    """The kept blocks column by column (or row by row), and a step for each column without any.

    There are as many as the worst pattern of ``count`` blocks needs; where there are too many, the
    last one is followed by such that do nothing.

    Example:
        >>> one = steps(jnp.array([[True, False]]), 1, by_column=True)
        >>> one.along.tolist(), one.flags.tolist()
        ([0, 1], [7, 3])
    """
    turned = keep.T if by_column else keep
    lines, length = turned.shape
    visited = turned.at[:, 0].set(turned[:, 0] | ~turned.any(1))
    at = _which(visited, min(count + lines, keep.size), -1)
    # What is read again from the same place is not read from memory again.
    real = at >= 0
    at = jnp.where(real, at, jnp.max(at))
    along = at // length
    changed = along[1:] != along[:-1]
    ends = jnp.ones(1, bool)
    first, last = jnp.concatenate([ends, changed]), jnp.concatenate([changed, ends])
    kept = turned.reshape(-1)[at] & real
    flags = FIRST * first + LAST * last + KEPT * kept
    blocks = jnp.clip(_numbers(keep, by_column)[at], 0, count - 1)
    return Steps(blocks, at % length, along, flags.astype(jnp.int32))


def _which(keep: jax.Array, count: int, fill: int) -> jax.Array:
    """The first ``count`` places that are set, and ``fill`` where there are fewer."""
    (at,) = jnp.nonzero(keep.reshape(-1), size=count, fill_value=fill)
    return at.astype(jnp.int32)


def _numbers(keep: jax.Array, by_column: bool) -> jax.Array:
    """The number of the block at each place of the grid, or of a neighbour where there is none."""
    numbers = jnp.cumsum(keep.reshape(-1), dtype=jnp.int32).reshape(keep.shape) - 1
    return (numbers.T if by_column else numbers).reshape(-1)


def stored(keep: Bool[Array, "rows columns"], count: int) -> Bool[Array, " count"]:
    """Which of the stored blocks are not padding.

    Example:
        >>> stored(jnp.array([[False, True]]), 2)
        Array([ True, False], dtype=bool)
    """
    return jnp.arange(count) < jnp.sum(keep, dtype=jnp.int32)
