"""Shared-weight leaves: packed indices into a small codebook."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from jaxcomp.arrays.base import CompressedArray
from jaxcomp.arrays.bits import pack_bits, pack_bits_host, unpack_bits, unpack_bits_host
from jaxcomp.arrays.parts import (
    Parts,
    Symbols,
    check_names,
    read_dtype,
    read_floats,
    read_symbols,
    to_device,
)
from jaxcomp.sharding import automatic, spec_like

MAX_CLUSTERS = 1 << 16


def index_bits(clusters: int) -> int:
    """Bits of one index into a codebook: ``ceil(log2(clusters))``, at least 1.

    Example:
        >>> index_bits(16), index_bits(17), index_bits(1)
        (4, 5, 1)
    """
    return max(1, (clusters - 1).bit_length())


def lookup(
    codebook: Float[Array, "*batch clusters"], indices: UInt[Array, " *batch_and_dims"]
) -> Float[Array, " *batch_and_dims"]:
    """``codebook[indices]``, where leading axes of the codebook are those of the indices.

    Example:
        >>> lookup(jnp.array([0.0, 0.5]), jnp.array([[1, 0]], jnp.uint8))
        Array([[0.5, 0. ]], dtype=float32)
    """
    return automatic(_lookup, out=spec_like(indices, indices.shape))(codebook, indices)


def _lookup(codebook: jax.Array, indices: jax.Array) -> jax.Array:
    take = lambda book, index: jnp.take(book, index, axis=0, mode="clip")
    for _ in range(codebook.ndim - 1):
        take = jax.vmap(take)
    # XLA's partitioner aborts the process on a sharded gather with narrow unsigned indices.
    return take(codebook, indices.astype(jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class CodebookArray(CompressedArray):
    """Every weight is one of ``clusters`` shared values (Han et al., 2016, Deep Compression).

    Made by :func:`jaxcomp.share.kmeans`.

    Attributes:
        indices: ``uint8`` of shape ``(*shape[:-1], ceil(shape[-1] * bits / 8))``, packed at
            ``ceil(log2 clusters)`` bits.
        codebook: centroids, shape ``(*batch, clusters)``; ``batch`` are stacked leading axes.
        length: size of the dense last axis.
        dense_dtype: dtype of the dense array.
    """

    indices: Any
    codebook: Any
    length: int = dataclasses.field(metadata={"static": True})
    dense_dtype: Any = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        # One spelling of each dtype, or equal forms would be compiled twice.
        object.__setattr__(self, "dense_dtype", jnp.dtype(self.dense_dtype))

    @classmethod
    def from_indices(
        cls,
        indices: UInt[Array, " *batch_and_dims"],
        codebook: Float[Array, "*batch clusters"],
        dtype: Any,
    ) -> "CodebookArray":
        """Pack unpacked indices beside their codebook.

        Args:
            indices: integers below ``clusters``, in the shape of the leaf.
            codebook: centroids, shape ``(*batch, clusters)``.
            dtype: dtype of the dense array.

        Raises:
            ValueError: a scalar leaf, more than 65,536 clusters, or a codebook whose leading axes
                are not those of the indices.

        Example:
            >>> CodebookArray.from_indices(jnp.array([1, 0], jnp.uint8), jnp.array([0.0, 0.5]),
            ...                            jnp.float32)
            CodebookArray(shape=(2,), dtype=float32, 2 shared values, 9 bytes)
        """
        _check_shapes(indices.shape, codebook.shape)
        packed = pack_bits(indices, index_bits(codebook.shape[-1]))
        return cls(packed, codebook, indices.shape[-1], dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return (*self.indices.shape[:-1], self.length)

    @property
    def clusters(self) -> int:
        """How many shared values there are."""
        return self.codebook.shape[-1]

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dense array."""
        return self.dense_dtype

    def decode(self) -> jax.Array:
        """The dense array, ``codebook[indices]``."""
        return _decode(self)

    def form(self) -> str:
        """Such as ``16 shared values``."""
        return f"{self.clusters} shared values"

    def to_parts(self) -> Parts:
        """Take the leaf apart; the indices go to the entropy coder."""
        bits = index_bits(self.clusters)
        indices = unpack_bits_host(np.asarray(self.indices), bits, self.length)
        return Parts(
            {"dtype": self.dense_dtype.name},
            {"indices": Symbols(indices, self.clusters)},
            {"codebook": np.asarray(self.codebook)},
        )

    @classmethod
    def from_parts(cls, parts: Parts) -> "CodebookArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        check_names(parts, static={"dtype"}, symbols={"indices"}, arrays={"codebook"})
        dtype, codebook = read_dtype(parts.static["dtype"]), read_floats(parts, "codebook")
        clusters = codebook.shape[-1] if codebook.ndim else 0
        indices = read_symbols(parts, "indices", clusters)
        _check_shapes(indices.shape, codebook.shape)
        packed = pack_bits_host(indices, index_bits(clusters))
        return cls(to_device(packed), to_device(codebook), indices.shape[-1], dtype)


@jax.jit
def _decode(leaf: CodebookArray) -> jax.Array:
    indices = unpack_bits(leaf.indices, index_bits(leaf.clusters), leaf.length)
    return lookup(leaf.codebook, indices).astype(leaf.dense_dtype)


def _check_shapes(indices: tuple[int, ...], codebook: tuple[int, ...]) -> None:
    if not codebook or not 1 <= codebook[-1] <= MAX_CLUSTERS:
        raise ValueError(f"a codebook holds 1 to {MAX_CLUSTERS} values, not shape {codebook}")
    batch = codebook[:-1]
    if len(indices) <= len(batch) or indices[: len(batch)] != batch:
        raise ValueError(
            f"a codebook of shape {codebook} does not fit indices of shape {indices}: its leading "
            "axes must be theirs, and leave them at least one more"
        )
