"""Leaves of stacked layers, as a loop hands them out to kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.arrays import BlockSparseArray, CodebookArray


class Unfit(Exception):
    """A product that no kernel computes; the message says why."""


def stacked(leaf: Any, loops: int) -> Any:
    """A leaf of stacked layers, of which every part has an axis for each loop that slices it.

    Raises:
        Unfit: the layers share a part that no axis can be given to.
    """
    if not loops:
        return leaf
    lead = leaf.shape[:loops]
    shared = isinstance(leaf, CodebookArray)
    if isinstance(leaf, BlockSparseArray):
        shared = leaf.values.ndim != 1 + len(leaf.block_shape) + loops
    parts = [part.shape[:loops] for part in jax.tree.leaves(leaf)]
    if shared or any(
        len(part) < loops or not all(a in (1, b) for a, b in zip(part, lead, strict=True))
        for part in parts
    ):
        raise Unfit("the layers that are stacked in it share parts of it")
    return jax.tree.map(lambda part: jnp.broadcast_to(part, (*lead, *part.shape[loops:])), leaf)
