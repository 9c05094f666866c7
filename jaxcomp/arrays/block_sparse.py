"""Block-sparse leaves: one bit a block says whether it is kept, and the kept blocks follow."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomp.arrays.base import CompressedArray
from jaxcomp.arrays.bits import pack_bits_host, unpack_bits, unpack_bits_host
from jaxcomp.arrays.parts import (
    Parts,
    Symbols,
    check_names,
    read_floats,
    read_int,
    read_symbols,
    to_device,
    which_kept,
)
from jaxcomp.sharding import automatic, spec_like

_LARGEST_EMPTY = 1 << 31
_GROWTH = 1000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class BlockSparseArray(CompressedArray):
    """A packed mask of blocks and the values of the blocks that it keeps, block after block.

    Attributes:
        mask: ``uint8``, one bit a block, 1 keeps: the grid of blocks, which has as many axes as
            the leaf, packed along its last axis.
        values: kept blocks in row-major order of the grid, shape ``(*batch, count, *block_shape)``;
            ``batch`` are stacked leading axes, whose rows are padded with zeros to the longest.
        block_shape: of a block, on the trailing axes.
        length: blocks along the last axis.
    """

    mask: Any
    values: Any
    block_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def encode(
        cls,
        x: Float[Array, " *dims"],
        block_shape: tuple[int, ...],
        mask: Bool[Array, " *dims"] | None = None,
        batch_axes: int = 0,
    ) -> "BlockSparseArray":
        """Store the blocks in which ``mask`` keeps a weight, or, without one, that are not zero.

        The number of blocks depends on the data, so this runs outside ``jit``; the result decodes
        anywhere.

        Args:
            x: dense weights.
            block_shape: sizes of a block on the trailing axes of ``x``, which they divide.
            mask: True where a weight is kept; by default where it is not exactly zero. What is not
                kept must be zero. A block is stored whole if the mask keeps any of it.
            batch_axes: leading axes that stack layers, each with blocks of its own.

        Raises:
            ValueError: the blocks do not tile the trailing axes beside the batch axes, or a weight
                outside the mask is not zero.

        Example:
            >>> BlockSparseArray.encode(jnp.eye(4), (2, 2))
            BlockSparseArray(shape=(4, 4), dtype=float32, 50.0% of 2x2 blocks removed, 34 bytes)
        """
        block = _check_blocks(x.shape, block_shape, batch_axes)
        dense = np.asarray(x)
        keep = which_kept(dense, mask)
        blocks = _split(dense, block)
        grid = np.asarray(_split(keep, block).any(axis=tuple(range(-len(block), 0))))
        batch = dense.shape[:batch_axes]
        rows = math.prod(batch)
        block_rows = blocks.reshape(rows, math.prod(grid.shape[batch_axes:]), *block)
        grid_rows = grid.reshape(block_rows.shape[:2])
        count = int(grid_rows.sum(axis=1).max(initial=0))
        values = np.zeros((rows, count, *block), dense.dtype)
        for row, flags, out in zip(block_rows, grid_rows, values, strict=True):
            out[: flags.sum()] = row[flags]
        packed = pack_bits_host(grid.view(np.uint8), 1)
        values = values.reshape(*batch, count, *block)
        return cls(to_device(packed), to_device(values), block, grid.shape[-1])

    @property
    def grid(self) -> tuple[int, ...]:
        """How many blocks there are along each axis of the leaf."""
        return (*self.mask.shape[:-1], self.length)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        sizes = (*(1,) * (len(self.grid) - len(self.block_shape)), *self.block_shape)
        return tuple(count * size for count, size in zip(self.grid, sizes, strict=True))

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dense array."""
        return self.values.dtype

    def keep(self) -> Bool[Array, "..."]:
        """The mask of blocks, unpacked, in the shape of :attr:`grid`: True where one is kept."""
        return unpack_bits(jnp.asarray(self.mask), 1, self.length).astype(bool)

    def decode(self) -> jax.Array:
        """The dense array, zeros where no block is kept."""
        return _decode(self)

    def form(self) -> str:
        """Such as ``90.0% of 4x4 blocks removed``; without the figure if nothing is to count."""
        blocks = "x".join(map(str, self.block_shape)) + " blocks"
        try:
            kept = int(np.bitwise_count(np.asarray(self.mask)).sum(dtype=np.int64))
            return f"{100 * (1 - kept / math.prod(self.grid)):.1f}% of {blocks} removed"
        except Exception:
            # Traced, abstract, donated, on another host, without elements: still block-sparse.
            return f"sparse in {blocks}"

    def to_parts(self) -> Parts:
        """Take the leaf apart; the mask of blocks goes to the entropy coder."""
        keep = unpack_bits_host(np.asarray(self.mask), 1, self.length)
        static = {"block_shape": list(self.block_shape)}
        return Parts(static, {"mask": Symbols(keep, 2)}, {"values": np.asarray(self.values)})

    @classmethod
    def from_parts(cls, parts: Parts) -> "BlockSparseArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        check_names(parts, static={"block_shape"}, symbols={"mask"}, arrays={"values"})
        keep, values = read_symbols(parts, "mask", 2), read_floats(parts, "values")
        block = _read_block(parts.static["block_shape"], keep.ndim)
        batch_axes = values.ndim - len(block) - 1
        batch = values.shape[: max(batch_axes, 0)]
        if (
            not 0 <= batch_axes <= keep.ndim - len(block)
            or values.shape[batch_axes + 1 :] != block
            or values.shape[:batch_axes] != keep.shape[:batch_axes]
        ):
            raise ValueError(
                f"values of shape {values.shape} do not fit blocks of shape {block} and a mask of "
                f"{keep.shape}"
            )
        counts = keep.sum(axis=tuple(range(len(batch), keep.ndim)), dtype=np.int64)
        count = values.shape[batch_axes]
        if counts.max(initial=0) > count:
            raise ValueError(f"the mask keeps {counts.max()} blocks, {count} are there")
        # Removed blocks cost a liar next to nothing, whatever their shape.
        if keep.size * math.prod(block) > max(_LARGEST_EMPTY, _GROWTH * values.size):
            raise ValueError(f"blocks of shape {block} on a mask of {keep.shape} are too many")
        return cls(to_device(pack_bits_host(keep, 1)), to_device(values), block, keep.shape[-1])


@jax.jit
def _decode(leaf: BlockSparseArray) -> jax.Array:
    def dense(leaf: BlockSparseArray) -> jax.Array:
        batch_axes = leaf.values.ndim - len(leaf.block_shape) - 1
        take = _take
        for _ in range(batch_axes):
            take = jax.vmap(take)
        return _merge(take(leaf.keep(), leaf.values), leaf.block_shape)

    return automatic(dense, out=spec_like(leaf.mask, leaf.shape))(leaf)


def _take(keep: jax.Array, values: jax.Array) -> jax.Array:
    """The block of every place of the grid: the next of ``values`` where ``keep`` is set."""
    block = values.shape[1:]
    if values.shape[0] == 0:
        return jnp.zeros((*keep.shape, *block), values.dtype)
    flags = keep.reshape(-1).astype(jnp.int32)
    ranks = (jnp.cumsum(flags) - flags).reshape(keep.shape)
    taken = jnp.take(values, ranks, axis=0, mode="clip")
    return jnp.where(
        keep.reshape(*keep.shape, *(1,) * len(block)), taken, jnp.zeros((), taken.dtype)
    )


def _split(x: np.ndarray, block: tuple[int, ...]) -> np.ndarray:
    """Cut the trailing axes into blocks: ``(*lead, *grid, *block)``."""
    at, n = x.ndim - len(block), len(block)
    cut = [size for pair in zip(_tiles(x.shape, block), block, strict=True) for size in pair]
    order = (*range(at), *range(at, at + 2 * n, 2), *range(at + 1, at + 2 * n, 2))
    return x.reshape(*x.shape[:at], *cut).transpose(order)


def _merge(blocks: jax.Array, block: tuple[int, ...]) -> jax.Array:
    """Undo :func:`_split`."""
    n = len(block)
    at = blocks.ndim - 2 * n
    order = [axis for i in range(n) for axis in (at + i, at + n + i)]
    tiles = blocks.shape[at : at + n]
    merged = [count * size for count, size in zip(tiles, block, strict=True)]
    return blocks.transpose(*range(at), *order).reshape(*blocks.shape[:at], *merged)


def _tiles(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    trailing = shape[len(shape) - len(block) :]
    return tuple(size // part for size, part in zip(trailing, block, strict=True))


def _check_blocks(
    shape: tuple[int, ...], block_shape: tuple[int, ...], batch_axes: int
) -> tuple[int, ...]:
    block = tuple(int(size) for size in block_shape)
    if not 0 <= batch_axes <= len(shape) - len(block) or not block:
        raise ValueError(
            f"blocks of shape {block} need as many axes beside {batch_axes} batch axes, and at "
            f"least one: shape {shape} has {len(shape)}"
        )
    for axis, size in enumerate(block, -len(block)):
        if size < 1 or shape[axis] % size:
            raise ValueError(
                f"blocks of shape {block} do not tile shape {shape}: axis {axis} has "
                f"{shape[axis]} entries, no multiple of {size}; choose sizes that divide"
            )
    return block


def _read_block(block: Any, axes: int) -> tuple[int, ...]:
    if not isinstance(block, list | tuple) or not 1 <= len(block) <= axes:
        raise ValueError(f"block_shape must be a list of 1 to {axes} sizes, not {block!r:.60}")
    return tuple(read_int(size, "a size of a block", 1, 1 << 31) for size in block)
