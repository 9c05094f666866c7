"""Shared values by their indices, without a gather: bits choose between two of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def choose_by_bits(indices: jax.Array, entries: Sequence[Any]) -> jax.Array:
    """``entries[indices]``; of 16 entries with 15 choices a weight, for use in kernels.

    Args:
        indices: integers from 0 to the number of entries - 1.
        entries: scalars or arrays that broadcast to the indices; their number is a power of two.

    Example:
        >>> choose_by_bits(jnp.array([2, 0]), [jnp.float32(v) for v in (5, 6, 7, 8)])
        Array([7., 5.], dtype=float32)
    """
    while len(entries) > 1:
        bit = (indices & 1) != 0
        pairs = zip(entries[::2], entries[1::2], strict=True)
        entries = [jnp.where(bit, one, zero) for zero, one in pairs]
        indices = indices >> 1
    return jnp.broadcast_to(entries[0], indices.shape)


def part_of_indices(packed: jax.Array, part: int, bits: int) -> jax.Array:
    """Of each byte the index that lies in one part of it, int32.

    Example:
        >>> part_of_indices(jnp.array([0x42], jnp.uint8), 1, 4)
        Array([4], dtype=int32)
    """
    return (packed.astype(jnp.int32) >> bits * part) & ((1 << bits) - 1)
