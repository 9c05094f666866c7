"""Shared-weight leaves: packed indices into a small codebook."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from jaxcomp.arrays.base import CompressedArray, Parts, Symbols
from jaxcomp.arrays.bits import pack_bits, unpack_bits

MAX_CLUSTERS = 1 << 16


def index_bits(clusters: int) -> int:
    """Bits of one index into a codebook: ``ceil(log2(clusters))``, at least 1.

    Example:
        >>> index_bits(16), index_bits(17), index_bits(1)
        (4, 5, 1)
    """
    return max(1, math.ceil(math.log2(clusters)))


def lookup(
    codebook: Float[Array, "*batch clusters"], indices: UInt[Array, " *batch_and_dims"]
) -> Float[Array, " *batch_and_dims"]:
    """``codebook[indices]``, where leading axes of the codebook are those of the indices.

    Example:
        >>> lookup(jnp.array([0.0, 0.5]), jnp.array([[1, 0]], jnp.uint8))
        Array([[0.5, 0. ]], dtype=float32)
    """
    take = lambda book, index: jnp.take(book, index, axis=0, mode="clip")  # noqa: E731
    for _ in range(codebook.ndim - 1):
        take = jax.vmap(take)
    return take(codebook, indices)


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
            ValueError: a scalar leaf, or more than 65,536 clusters.

        Example:
            >>> CodebookArray.from_indices(jnp.array([1, 0], jnp.uint8), jnp.array([0.0, 0.5]),
            ...                            jnp.float32)
            CodebookArray(shape=(2,), dtype=float32, 2 shared values, 9 bytes)
        """
        clusters = codebook.shape[-1]
        if not 1 <= clusters <= MAX_CLUSTERS:
            raise ValueError(f"a codebook holds 1 to {MAX_CLUSTERS} values, not {clusters}")
        packed = pack_bits(indices, index_bits(clusters))
        return cls(packed, codebook, indices.shape[-1], jnp.dtype(dtype))

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
        return jnp.dtype(self.dense_dtype)

    def decode(self) -> jax.Array:
        """The dense array, ``codebook[indices]``."""
        indices = unpack_bits(self.indices, index_bits(self.clusters), self.length)
        return lookup(self.codebook, indices).astype(self.dense_dtype)

    def form(self) -> str:
        """Such as ``16 shared values``."""
        return f"{self.clusters} shared values"

    def to_parts(self) -> Parts:
        """Take the leaf apart; the indices go to the entropy coder."""
        indices = np.asarray(unpack_bits(self.indices, index_bits(self.clusters), self.length))
        return Parts(
            {"dtype": jnp.dtype(self.dense_dtype).name},
            {"indices": Symbols(indices, self.clusters)},
            {"codebook": np.asarray(self.codebook)},
        )

    @classmethod
    def from_parts(cls, parts: Parts) -> "CodebookArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        indices, codebook = parts.symbols["indices"].values, parts.arrays["codebook"]
        batch = codebook.shape[:-1]
        if codebook.ndim == 0 or not 1 <= codebook.shape[-1] <= MAX_CLUSTERS:
            raise ValueError(f"not a codebook: shape {codebook.shape}")
        if indices.ndim <= len(batch) or indices.shape[: len(batch)] != batch:
            raise ValueError(f"codebook {codebook.shape} does not fit indices {indices.shape}")
        if not jnp.issubdtype(codebook.dtype, jnp.floating):
            raise ValueError(f"centroids must be floating, not {codebook.dtype}")
        if indices.size and int(indices.max()) >= codebook.shape[-1]:
            raise ValueError(f"an index is beyond the {codebook.shape[-1]} shared values")
        return cls.from_indices(
            jnp.asarray(indices), jnp.asarray(codebook), jnp.dtype(parts.static["dtype"])
        )
