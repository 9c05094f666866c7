"""Leaves of shared vectors: packed indices into codebooks, one stage or a sum of several."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped, UInt

from jaxcomp.arrays.base import CompressedArray
from jaxcomp.arrays.bits import pack_bits, pack_bits_host, unpack_bits, unpack_bits_host
from jaxcomp.arrays.blocks import Blocks, merge_blocks, narrow, split_blocks
from jaxcomp.arrays.codebook import MAX_CLUSTERS, index_bits
from jaxcomp.arrays.parts import (
    Parts,
    Symbols,
    check_names,
    read_dtype,
    read_floats,
    read_int,
    read_symbols,
    to_device,
)
from jaxcomp.sharding import automatic, explicit_axes, spec_like


def split_vectors(x: Shaped[Any, "..."], blocks: Blocks) -> Shaped[Array, "..."]:
    """Cut an array into vectors.

    Args:
        x: any array.
        blocks: ``(length, axis)`` of each axis that is cut, ``axis`` from the end and ascending.

    Returns:
        ``(*grid, d)``: the shape of ``x`` with each cut axis divided by its length, and the vectors
        of ``d`` elements, the product of the lengths.

    Example:
        >>> split_vectors(jnp.arange(8).reshape(4, 2), ((2, -2),))[0]
        Array([[0, 2],
               [1, 3]], dtype=int32)
    """
    split = split_blocks(jnp.asarray(x), blocks)
    # Members are behind their axis, and so push what follows by one.
    within = [x.ndim + axis + 1 + count for count, (_, axis) in enumerate(blocks)]
    moved = jnp.moveaxis(split, within, range(-len(blocks), 0))
    return moved.reshape(*moved.shape[: x.ndim], math.prod(size for size, _ in blocks))


def join_vectors(vectors: Shaped[Array, "..."], blocks: Blocks) -> Shaped[Array, "..."]:
    """Undo :func:`split_vectors`.

    Example:
        >>> x = jnp.arange(8).reshape(4, 2)
        >>> bool((join_vectors(split_vectors(x, ((2, -2),)), ((2, -2),)) == x).all())
        True
    """
    grid = vectors.shape[:-1]
    x = vectors.reshape(*grid, *(size for size, _ in blocks))
    within = [len(grid) + axis + 1 + count for count, (_, axis) in enumerate(blocks)]
    return merge_blocks(jnp.moveaxis(x, range(-len(blocks), 0), within), blocks)


def grown(grid: tuple[int, ...], blocks: Blocks) -> tuple[int, ...]:
    """The shape of an array that is cut into a grid of vectors.

    Example:
        >>> grown((2, 3), ((4, -2),))
        (8, 3)
    """
    sizes = {len(grid) + axis: size for size, axis in blocks}
    return tuple(n * sizes.get(axis, 1) for axis, n in enumerate(grid))


def lookup_vectors(
    codebook: Float[Array, "*batch stages spaces clusters d"],
    indices: UInt[Array, " *batch_stages_and_grid"],
    blocks: Blocks,
    out: PartitionSpec | None = None,
) -> Float[Array, " *batch_and_dims"]:
    """The array that indices stand for: the sum over stages of the vectors that they name.

    Args:
        codebook: ``(*batch, stages, spaces, clusters, d)``. ``spaces`` is 1, or how many vectors
            follow each other along the cut axes: each of these places has a codebook of its own.
        indices: ``(*batch, stages, *grid)``, unsigned and below ``clusters``.
        blocks: how the array was cut, see :func:`split_vectors`.
        out: where the result lies on explicit mesh axes; None: as the indices do.

    Returns:
        The array in float32, or wider if the codebook is; stages are added in their order.

    Example:
        >>> book = jnp.array([[0.0, 1.0], [2.0, 3.0]])[None, None]
        >>> lookup_vectors(book, jnp.array([[[1, 0]]], jnp.uint8), ((2, -2),))
        Array([[2., 0.],
               [3., 1.]], dtype=float32)
    """

    def dense(codebook: Array, indices: Array) -> Array:
        take = lambda book, index: _sum_of_stages(book, index, blocks)
        for _ in range(codebook.ndim - 4):
            take = jax.vmap(take)
        # XLA's partitioner aborts the process on a sharded gather with narrow unsigned indices.
        return take(codebook, indices.astype(jnp.int32))

    stage = codebook.ndim - 4
    return automatic(dense, out=_spec(indices, stage, blocks) if out is None else out)(
        codebook, indices
    )


def _sum_of_stages(codebook: Array, indices: Array, blocks: Blocks) -> Array:
    stages, spaces, clusters, d = codebook.shape
    wide = codebook.astype(jnp.promote_types(codebook.dtype, jnp.float32))
    place = space_of(indices.shape[1:], blocks) * clusters if spaces > 1 else 0
    vectors = jnp.zeros((), wide.dtype)
    for stage in range(stages):
        flat = wide[stage].reshape(spaces * clusters, d)
        vectors = vectors + jnp.take(flat, indices[stage] + place, axis=0, mode="clip")
    return join_vectors(vectors, blocks)


def space_of(grid: tuple[int, ...], blocks: Blocks) -> Array:
    """Which sub-space each vector of a grid lies in: its place along the cut axes.

    Example:
        >>> space_of((2, 3), ((4, -2),)).shape
        (2, 1)
    """
    place = jnp.zeros((1,) * len(grid), jnp.int32)
    for _, axis in blocks:
        along = [1] * len(grid)
        along[axis] = grid[axis]
        place = place * grid[axis] + lax.iota(jnp.int32, grid[axis]).reshape(along)
    return place


def _spec(indices: Any, stage: int, blocks: Blocks) -> PartitionSpec:
    if not explicit_axes(indices):
        return PartitionSpec()
    shape = grown(indices.shape, blocks)
    spec = tuple(spec_like(indices, shape))
    return PartitionSpec(*spec[:stage], *spec[stage + 1 :])


def masked(dense: Shaped[Array, "..."], mask: Any) -> Shaped[Array, "..."]:
    """Zero where a packed mask has a 0; ``dense`` itself if the mask is None.

    Example:
        >>> masked(jnp.ones(3), jnp.array([5], jnp.uint8))
        Array([1., 0., 1.], dtype=float32)
    """
    if mask is None:
        return dense
    keep = unpack_bits(mask, 1, dense.shape[-1])
    zero = lambda dense, keep: jnp.where(keep == 0, jnp.zeros((), dense.dtype), dense)
    return automatic(zero, out=spec_like(dense, dense.shape))(dense, keep)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class VectorCodebookArray(CompressedArray):
    """Every run or tile of weights is one of a few shared vectors, or a sum of such.

    With one stage this is product quantization (Jégou et al., 2011), with more an additive codebook
    (Babenko and Lempitsky, 2014). Made by :func:`jaxcomp.share.vector_codebook` and
    :func:`jaxcomp.share.kernel_patterns`.

    Attributes:
        indices: ``uint8``, the packed rows of ``(*batch, stages, *grid)``, ``ceil(log2 clusters)``
            bits an index; ``grid`` is the shape with each cut axis divided by its length.
        codebook: ``(*batch, stages, spaces, clusters, d)``; ``spaces`` is 1 if all vectors share,
            or how many lie behind each other along the cut axes.
        blocks: ``(length, axis)`` of each cut axis, ``axis`` from the end, ascending.
        length: how many indices the last axis of the grid has.
        dense_dtype: dtype of the dense array; stages are added in float32 and rounded once.
        mask: ``uint8``, a bit a weight, 0 where the weight is zero whatever its vector; or None.
    """

    indices: Any
    codebook: Any
    blocks: Blocks = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    dense_dtype: Any = dataclasses.field(metadata={"static": True})
    mask: Any = None

    def __post_init__(self) -> None:
        # One spelling of each dtype, or equal forms would be compiled twice.
        object.__setattr__(self, "dense_dtype", jnp.dtype(self.dense_dtype))

    @classmethod
    def from_indices(
        cls, indices: Any, codebook: Any, blocks: Blocks, dtype: Any, mask: Any = None
    ) -> "VectorCodebookArray":
        """Pack unpacked indices beside their codebooks.

        Args:
            indices: ``(*batch, stages, *grid)``, integers below ``clusters``.
            codebook: ``(*batch, stages, spaces, clusters, d)``.
            blocks: see the class.
            dtype: dtype of the dense array.
            mask: booleans of the dense array's shape, False where it is zero; or None.

        Raises:
            ValueError: shapes that do not fit each other.

        Example:
            >>> indices, codebook = jnp.zeros((1, 4, 8), jnp.uint8), jnp.ones((1, 1, 16, 2))
            >>> VectorCodebookArray.from_indices(indices, codebook, ((2, -2),), jnp.float32)
            VectorCodebookArray(shape=(8, 8), dtype=float32, 16 shared vectors of 2, 144 bytes)
        """
        _check(indices.shape, codebook.shape, blocks)
        packed = pack_bits(indices, index_bits(codebook.shape[-2]))
        leaf = cls(packed, codebook, blocks, indices.shape[-1], dtype)
        if mask is None:
            return leaf
        _check_mask(mask.shape, leaf.shape)
        bits = pack_bits(jnp.asarray(mask).astype(jnp.uint8), 1)
        return dataclasses.replace(leaf, mask=bits)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        stage = self.codebook.ndim - 4
        grid = (*self.indices.shape[:stage], *self.indices.shape[stage + 1 : -1], self.length)
        return grown(grid, self.blocks)

    @property
    def stages(self) -> int:
        """How many vectors are added."""
        return self.codebook.shape[-4]

    @property
    def clusters(self) -> int:
        """How many vectors a codebook has."""
        return self.codebook.shape[-2]

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dense array."""
        return self.dense_dtype

    def decode(self) -> jax.Array:
        """The dense array, the sum of the vectors that the indices name."""
        return _decode(self)

    def form(self) -> str:
        """Such as ``2 stages of 256 shared vectors of 8``."""
        stages = f"{self.stages} stages of " if self.stages > 1 else ""
        spaces = f" in {self.codebook.shape[-3]} spaces" if self.codebook.shape[-3] > 1 else ""
        kept = "" if self.mask is None else ", masked"
        return f"{stages}{self.clusters} shared vectors of {self.codebook.shape[-1]}{spaces}{kept}"

    def to_parts(self) -> Parts:
        """Take the leaf apart; indices and mask go to the entropy coder."""
        indices = unpack_bits_host(np.asarray(self.indices), index_bits(self.clusters), self.length)
        symbols = {"indices": Symbols(indices, self.clusters)}
        if self.mask is not None:
            bits = unpack_bits_host(np.asarray(self.mask), 1, self.shape[-1])
            symbols["mask"] = Symbols(bits, 2)
        blocks = [list(block) for block in self.blocks]
        static = {"dtype": self.dense_dtype.name, "blocks": blocks}
        return Parts(static, symbols, {"codebook": np.asarray(self.codebook)})

    @classmethod
    def from_parts(cls, parts: Parts) -> "VectorCodebookArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        kept = isinstance(parts.symbols, dict) and "mask" in parts.symbols
        names = {"indices", "mask"} if kept else {"indices"}
        check_names(parts, static={"dtype", "blocks"}, symbols=names, arrays={"codebook"})
        dtype, codebook = read_dtype(parts.static["dtype"]), read_floats(parts, "codebook")
        blocks = _read_blocks(parts.static["blocks"])
        clusters = codebook.shape[-2] if codebook.ndim > 1 else 0
        indices = read_symbols(parts, "indices", clusters)
        _check(indices.shape, codebook.shape, blocks)
        packed = pack_bits_host(indices, index_bits(clusters))
        leaf = cls(to_device(packed), to_device(codebook), blocks, indices.shape[-1], dtype)
        if not kept:
            return leaf
        bits = read_symbols(parts, "mask", 2)
        _check_mask(bits.shape, leaf.shape)
        return dataclasses.replace(leaf, mask=to_device(pack_bits_host(bits, 1)))


@jax.jit
def _decode(leaf: VectorCodebookArray) -> jax.Array:
    indices = unpack_bits(leaf.indices, index_bits(leaf.clusters), leaf.length)
    dense = lookup_vectors(leaf.codebook, indices, leaf.blocks)
    return masked(narrow(dense, leaf.dense_dtype, clipped=True), leaf.mask)


def _read_blocks(value: Any) -> Blocks:
    if not isinstance(value, list) or not all(
        isinstance(block, list) and len(block) == 2 for block in value
    ):
        raise ValueError(f"blocks must be a list of [length, axis], not {value!r:.60}")
    return tuple(
        (read_int(size, "a length", 1, 1 << 31), read_int(axis, "an axis", -60, -1))
        for size, axis in value
    )


def _check(indices: tuple[int, ...], codebook: tuple[int, ...], blocks: Blocks) -> None:
    """Raise ``ValueError`` unless indices and codebooks of these shapes make a dense array."""
    if len(codebook) < 4 or 0 in codebook[-4:] or codebook[-2] > MAX_CLUSTERS:
        raise ValueError(
            f"codebooks are (..., stages, spaces, 1 to {MAX_CLUSTERS} clusters, d), not {codebook}"
        )
    batch, (stages, spaces, _, d) = codebook[:-4], codebook[-4:]
    axes = [axis for _, axis in blocks]
    inner = len(indices) - len(batch) - 1
    if inner < 1 or indices[: len(batch) + 1] != (*batch, stages):
        raise ValueError(
            f"codebooks of shape {codebook} do not fit indices of shape {indices}: leading axes "
            "and stages must be theirs, and leave them at least one more"
        )
    if not axes or axes != sorted(set(axes)) or not -inner <= axes[0] <= axes[-1] < 0:
        raise ValueError(f"blocks {blocks} do not fit the {inner} axes of a grid: from its end")
    if math.prod(size for size, _ in blocks) != d:
        raise ValueError(f"blocks {blocks} do not make vectors of {d}")
    if spaces not in (1, math.prod(indices[axis] for axis in axes)):
        raise ValueError(f"{spaces} sub-spaces do not fit indices of {indices} along {axes}")


def _check_mask(mask: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if tuple(mask) != shape:
        raise ValueError(f"a mask of shape {mask} does not fit weights of {shape}")
