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
    read_int,
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
    codebook: Float[Array, "..."], indices: UInt[Array, "..."], axis: int | None = None
) -> Float[Array, "..."]:
    """``codebook[indices]``, where leading axes of the codebook are those of the indices.

    Args:
        codebook: shape ``(*batch, clusters)``, or with ``axis`` ``(*batch, groups, clusters)``.
        indices: integers below ``clusters``, shape ``(*batch, *dims)``.
        axis: negative; its equal parts look into one codebook each. None for one codebook.

    Returns:
        Values in the shape and sharding of ``indices``.

    Example:
        >>> indices = jnp.array([[1, 0]], jnp.uint8)
        >>> lookup(jnp.array([0.0, 0.5]), indices)
        Array([[0.5, 0. ]], dtype=float32)
        >>> lookup(jnp.array([[0.0, 0.5], [7.0, 8.0]]), indices, axis=-1)
        Array([[0.5, 7. ]], dtype=float32)
    """
    out = spec_like(indices, indices.shape)
    return automatic(lambda book, index: _lookup(book, index, axis), out=out)(codebook, indices)


def _lookup(codebook: jax.Array, indices: jax.Array, axis: int | None) -> jax.Array:
    # XLA's partitioner aborts the process on a sharded gather with narrow unsigned indices.
    indices = indices.astype(jnp.int32)
    if axis is not None:
        # All codebooks of a batch entry end to end; a group looks into its own stretch.
        groups, clusters = codebook.shape[-2:]
        group = jnp.arange(indices.shape[axis]) // (indices.shape[axis] // groups)
        indices += (group * clusters).reshape(-1, *(1,) * (-axis - 1))
        codebook = codebook.reshape(*codebook.shape[:-2], groups * clusters)
    take = lambda book, index: jnp.take(book, index, axis=0, mode="clip")
    for _ in range(codebook.ndim - 1):
        take = jax.vmap(take)
    return take(codebook, indices)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class CodebookArray(CompressedArray):
    """Every weight is one of ``clusters`` shared values (Han et al., 2016, Deep Compression).

    Made by :func:`jaxcomp.share.kmeans`. Channels may share a codebook in groups: with ``axis``,
    equal parts of that axis, in order, have one each.

    Attributes:
        indices: ``uint8`` of shape ``(*shape[:-1], ceil(shape[-1] * bits / 8))``, packed at
            ``ceil(log2 clusters)`` bits.
        codebook: centroids, shape ``(*batch, clusters)``, or with ``axis`` ``(*batch, groups,
            clusters)``; ``batch`` are stacked leading axes.
        length: size of the dense last axis.
        dense_dtype: dtype of the dense array.
        axis: which axis, counted from the last (-1), is cut into groups; None for one codebook.
    """

    indices: Any
    codebook: Any
    length: int = dataclasses.field(metadata={"static": True})
    dense_dtype: Any = dataclasses.field(metadata={"static": True})
    axis: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        # One spelling of each dtype, or equal forms would be compiled twice.
        object.__setattr__(self, "dense_dtype", jnp.dtype(self.dense_dtype))

    @classmethod
    def from_indices(
        cls,
        indices: UInt[Array, "..."],
        codebook: Float[Array, "..."],
        dtype: Any,
        axis: int | None = None,
    ) -> "CodebookArray":
        """Pack unpacked indices beside their codebook.

        Args:
            indices: integers below ``clusters``, in the shape of the leaf.
            codebook: centroids, shape ``(*batch, clusters)``, or with ``axis`` ``(*batch, groups,
                clusters)``.
            dtype: dtype of the dense array.
            axis: negative; its equal parts have a codebook each. None for one codebook.

        Raises:
            ValueError: a scalar leaf, more than 65,536 clusters, a codebook whose leading axes are
                not those of the indices, or groups that do not divide the axis.

        Example:
            >>> CodebookArray.from_indices(jnp.array([1, 0], jnp.uint8), jnp.array([0.0, 0.5]),
            ...                            jnp.float32)
            CodebookArray(shape=(2,), dtype=float32, 2 shared values, 9 bytes)
        """
        _check_shapes(indices.shape, codebook.shape, axis)
        packed = pack_bits(indices, index_bits(codebook.shape[-1]))
        return cls(packed, codebook, indices.shape[-1], dtype, axis)

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
        if self.axis is None:
            return f"{self.clusters} shared values"
        return f"{self.clusters} shared values a group, {self.codebook.shape[-2]} groups"

    def to_parts(self) -> Parts:
        """Take the leaf apart; the indices go to the entropy coder."""
        bits = index_bits(self.clusters)
        indices = unpack_bits_host(np.asarray(self.indices), bits, self.length)
        axis = {} if self.axis is None else {"axis": self.axis}
        return Parts(
            {"dtype": self.dense_dtype.name, **axis},
            {"indices": Symbols(indices, self.clusters)},
            {"codebook": np.asarray(self.codebook)},
        )

    @classmethod
    def from_parts(cls, parts: Parts) -> "CodebookArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        # Leaves of one codebook have never had an axis in files.
        grouped = isinstance(parts.static, dict) and "axis" in parts.static
        static = {"dtype", "axis"} if grouped else {"dtype"}
        check_names(parts, static=static, symbols={"indices"}, arrays={"codebook"})
        dtype, codebook = read_dtype(parts.static["dtype"]), read_floats(parts, "codebook")
        clusters = codebook.shape[-1] if codebook.ndim else 0
        indices = read_symbols(parts, "indices", clusters)
        axis = read_int(parts.static["axis"], "axis", -indices.ndim, -1) if grouped else None
        _check_shapes(indices.shape, codebook.shape, axis)
        packed = pack_bits_host(indices, index_bits(clusters))
        return cls(to_device(packed), to_device(codebook), indices.shape[-1], dtype, axis)


@jax.jit
def _decode(leaf: CodebookArray) -> jax.Array:
    indices = unpack_bits(leaf.indices, index_bits(leaf.clusters), leaf.length)
    return lookup(leaf.codebook, indices, leaf.axis).astype(leaf.dense_dtype)


def _check_shapes(indices: tuple[int, ...], codebook: tuple[int, ...], axis: int | None) -> None:
    if not codebook or not 1 <= codebook[-1] <= MAX_CLUSTERS:
        raise ValueError(f"a codebook holds 1 to {MAX_CLUSTERS} values, not shape {codebook}")
    batch = codebook[:-1] if axis is None else codebook[:-2]
    if axis is not None:
        inner = len(indices) - len(batch)
        if len(codebook) < 2 or not -inner <= axis <= -1:
            raise ValueError(
                f"axis {axis} of indices of shape {indices} cannot be cut into the groups of a "
                f"codebook of shape {codebook}: give a negative axis behind the leading ones"
            )
        if codebook[-2] == 0 or indices[axis] % codebook[-2]:
            raise ValueError(
                f"{codebook[-2]} groups do not divide axis {axis} of indices of shape {indices}"
            )
    if len(indices) <= len(batch) or indices[: len(batch)] != batch:
        raise ValueError(
            f"a codebook of shape {codebook} does not fit indices of shape {indices}: its leading "
            "axes must be theirs, and leave them at least one more"
        )
