"""Sparse leaves: one bit a weight says whether it is kept, and the kept values follow."""

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomp.arrays.base import CompressedArray, Parts, Symbols
from jaxcomp.arrays.bits import pack_bits, unpack_bits


def _scatter(keep: jax.Array, values: jax.Array) -> jax.Array:
    """Lay ``values`` down where ``keep`` is set, in row-major order."""
    if values.shape[-1] == 0:
        return jnp.zeros(keep.shape, values.dtype)
    order = jnp.cumsum(keep.reshape(-1).astype(jnp.int32)).reshape(keep.shape) - 1
    taken = jnp.take(values, jnp.maximum(order, 0), axis=0, mode="clip")
    return jnp.where(keep, taken, jnp.zeros((), values.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SparseArray(CompressedArray):
    """A packed mask and the values that it keeps.

    Decoding takes a prefix sum over the leaf: where the dense weights fit in memory, decode once
    (:func:`jaxcomp.decode`) rather than in every step.

    Attributes:
        mask: ``uint8`` of shape ``(*shape[:-1], ceil(shape[-1] / 8))``, one bit a weight, 1 keeps.
        values: kept values in row-major order, shape ``(*batch, count)``; ``batch`` are stacked
            leading axes, whose rows are padded with zeros to the longest.
        length: size of the dense last axis.
    """

    mask: Any
    values: Any
    length: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def encode(
        cls,
        x: Float[Array, " *dims"],
        mask: Bool[Array, " *dims"] | None = None,
        batch_axes: int = 0,
    ) -> "SparseArray":
        """Store the weights that ``mask`` keeps, or, without one, those that are not zero.

        The number of values depends on the data, so this runs outside ``jit``; the result decodes
        anywhere.

        Args:
            x: dense weights, at least one axis.
            mask: True where a weight is kept; by default where it is not exactly zero. What is not
                kept must be zero, or it would be lost.
            batch_axes: leading axes that stack layers, each with values of its own.

        Raises:
            ValueError: a scalar, too many batch axes, or a non-zero weight outside the mask.

        Example:
            >>> SparseArray.encode(jnp.array([0.0, 2.0, 0.0, 3.0]))
            SparseArray(shape=(4,), dtype=float32, 50.0% sparse, 9 bytes)
        """
        if x.ndim <= batch_axes:
            raise ValueError(f"shape {x.shape} has no axis left beside {batch_axes} batch axes")
        dense = np.asarray(x)
        keep = dense != 0 if mask is None else np.asarray(mask)
        if np.any((dense != 0) & ~keep):
            raise ValueError("a weight outside the mask is not zero: multiply by the mask first")
        batch = dense.shape[:batch_axes]
        rows = dense.reshape(*batch, -1).reshape(int(np.prod(batch, dtype=int)), -1)
        kept = keep.reshape(rows.shape)
        values = np.zeros((len(rows), int(kept.sum(axis=1).max(initial=0))), dense.dtype)
        for row, flags, out in zip(rows, kept, values, strict=True):
            out[: flags.sum()] = row[flags]
        packed = pack_bits(jnp.asarray(keep, jnp.uint8), 1)
        return cls(packed, jnp.asarray(values.reshape(*batch, -1)), dense.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return (*self.mask.shape[:-1], self.length)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dense array."""
        return self.values.dtype

    def keep(self) -> Bool[Array, "..."]:
        """The mask, unpacked: True where a weight is kept."""
        return unpack_bits(self.mask, 1, self.length).astype(bool)

    def decode(self) -> jax.Array:
        """The dense array, zeros where nothing is kept."""
        scatter = _scatter
        for _ in range(self.values.ndim - 1):
            scatter = jax.vmap(scatter)
        return scatter(self.keep(), self.values)

    def form(self) -> str:
        """Such as ``90.0% sparse``; without the figure while traced."""
        if isinstance(self.mask, jax.core.Tracer) or self.size == 0:
            return "sparse"
        return f"{100 * (1 - np.mean(np.asarray(self.keep()))):.1f}% sparse"

    def to_parts(self) -> Parts:
        """Take the leaf apart; the mask goes to the entropy coder."""
        keep = np.asarray(unpack_bits(self.mask, 1, self.length))
        return Parts({}, {"mask": Symbols(keep, 2)}, {"values": np.asarray(self.values)})

    @classmethod
    def from_parts(cls, parts: Parts) -> "SparseArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        keep, values = parts.symbols["mask"].values, parts.arrays["values"]
        batch = values.shape[:-1]
        if values.ndim == 0 or keep.ndim <= len(batch) or keep.shape[: len(batch)] != batch:
            raise ValueError(f"values of shape {values.shape} do not fit a mask of {keep.shape}")
        counts = keep.reshape(*batch, -1).sum(axis=-1, dtype=np.int64)
        if counts.max(initial=0) > values.shape[-1]:
            raise ValueError(f"the mask keeps {counts.max()} values, {values.shape[-1]} are there")
        return cls(pack_bits(jnp.asarray(keep), 1), jnp.asarray(values), keep.shape[-1])
