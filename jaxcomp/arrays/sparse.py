"""Sparse leaves: one bit a weight says whether it is kept, and the kept values follow."""

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
    read_symbols,
    to_device,
    which_kept,
)
from jaxcomp.sharding import automatic, spec_like


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
        if not 0 <= batch_axes < x.ndim:
            raise ValueError(f"shape {x.shape} has no axis left beside {batch_axes} batch axes")
        dense = np.asarray(x)
        keep = which_kept(dense, mask)
        batch = dense.shape[:batch_axes]
        rows = (math.prod(batch), math.prod(dense.shape[batch_axes:]))
        dense_rows, keep_rows = dense.reshape(rows), keep.reshape(rows)
        count = int(keep_rows.sum(axis=1).max(initial=0))
        values = np.zeros((rows[0], count), dense.dtype)
        for row, flags, out in zip(dense_rows, keep_rows, values, strict=True):
            out[: flags.sum()] = row[flags]
        packed = pack_bits_host(keep.view(np.uint8), 1)
        return cls(to_device(packed), to_device(values.reshape(*batch, count)), x.shape[-1])

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
        return unpack_bits(jnp.asarray(self.mask), 1, self.length).astype(bool)

    def decode(self) -> jax.Array:
        """The dense array, zeros where nothing is kept."""
        return _decode(self)

    def form(self) -> str:
        """Such as ``90.0% sparse``; without the figure where there are no values to count."""
        try:
            kept = int(np.bitwise_count(np.asarray(self.mask)).sum(dtype=np.int64))
            return f"{100 * (1 - kept / self.size):.1f}% sparse"
        except Exception:
            # Traced, abstract, donated, on another host, without elements: still a sparse leaf.
            return "sparse"

    def to_parts(self) -> Parts:
        """Take the leaf apart; the mask goes to the entropy coder."""
        keep = unpack_bits_host(np.asarray(self.mask), 1, self.length)
        return Parts({}, {"mask": Symbols(keep, 2)}, {"values": np.asarray(self.values)})

    @classmethod
    def from_parts(cls, parts: Parts) -> "SparseArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        check_names(parts, static=frozenset(), symbols={"mask"}, arrays={"values"})
        keep, values = read_symbols(parts, "mask", 2), read_floats(parts, "values")
        batch = values.shape[:-1]
        if values.ndim == 0 or keep.ndim <= len(batch) or keep.shape[: len(batch)] != batch:
            raise ValueError(f"values of shape {values.shape} do not fit a mask of {keep.shape}")
        counts = keep.sum(axis=tuple(range(len(batch), keep.ndim)), dtype=np.int64)
        if counts.max(initial=0) > values.shape[-1]:
            raise ValueError(f"the mask keeps {counts.max()} values, {values.shape[-1]} are there")
        return cls(to_device(pack_bits_host(keep, 1)), to_device(values), keep.shape[-1])


@jax.jit
def _decode(leaf: SparseArray) -> jax.Array:
    def dense(leaf: SparseArray) -> jax.Array:
        scatter = _scatter
        for _ in range(leaf.values.ndim - 1):
            scatter = jax.vmap(scatter)
        return scatter(
            leaf.keep(), _ranks(leaf.mask, leaf.values.ndim - 1, leaf.length), leaf.values
        )

    return automatic(dense, out=spec_like(leaf.mask, leaf.shape))(leaf)


def _scatter(keep: jax.Array, ranks: jax.Array, values: jax.Array) -> jax.Array:
    """Lay ``values`` down where ``keep`` is set, in row-major order."""
    if values.shape[-1] == 0:
        return jnp.zeros(keep.shape, values.dtype)
    taken = jnp.take(values, ranks, axis=0, mode="clip")
    return jnp.where(keep, taken, jnp.zeros((), values.dtype))


def _ranks(mask: jax.Array, batch: int, length: int) -> jax.Array:
    """How many bits are set before each bit of a packed mask, counted within each batch entry."""
    # A prefix sum over bytes, not over bits: the scan is the costly part.
    before = _exclusive_sum(jax.lax.population_count(mask).astype(jnp.int32), mask.ndim - batch)
    lower = (1 << jnp.arange(8, dtype=jnp.uint8)) - 1
    within = jax.lax.population_count(mask[..., None] & lower.astype(jnp.uint8))
    ranks = before[..., None] + within.astype(jnp.int32)
    return ranks.reshape(*mask.shape[:-1], 8 * mask.shape[-1])[..., :length]


def _exclusive_sum(x: jax.Array, axes: int) -> jax.Array:
    """Sum of what comes before each element in row-major order over the last ``axes`` axes."""
    inside = jnp.cumsum(x, axis=-1) - x
    if axes == 1:
        return inside
    return inside + _exclusive_sum(jnp.sum(x, axis=-1), axes - 1)[..., None]
