"""Sub-networks as masks over the largest model's parameters; whole ones, and mixtures of them.

Every mask is one comparison: a position is there from some value of a part on. Channels are there
from their rank on, kernel positions from their distance to the centre on, branches from their place
in the stage on. So a candidate is plain numbers to a compiled program, which need not know them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib


class Part(NamedTuple):
    """What can be chosen: its kind, its name within that, and the values to choose from."""

    kind: str
    name: str
    options: tuple[int, ...]

    def of(self, tree: Any) -> Any:
        """Its entry of a candidate, or of anything of that structure."""
        return tree[self.kind][self.name]


class Mask(NamedTuple):
    """From which value of a part on the positions of a leaf are there.

    Attributes:
        part: the part.
        path: the leaf.
        least: int32, broadcasts to the leaf: a position is there where ``least <= value``.
    """

    part: Part
    path: str
    least: np.ndarray


def along(axis: int, rank: int, least: np.ndarray) -> np.ndarray:
    """What is said of the positions of one axis, for an array of some rank.

    Example:
        >>> along(1, 3, np.array([1, 2])).shape
        (1, 2, 1)
    """
    return least.astype(np.int32).reshape([-1 if i == axis else 1 for i in range(rank)])


def centred(shape: tuple[int, ...], axes: Sequence[int]) -> np.ndarray:
    """From which size on the positions of a kernel are in its centre.

    Args:
        shape: of the leaf.
        axes: its height and width.

    Returns:
        int32, of size one on the other axes.

    Example:
        >>> centred((3, 3, 8), (0, 1))[..., 0]
        array([[3, 3, 3],
               [3, 1, 3],
               [3, 3, 3]], dtype=int32)
    """
    least = np.ones([1] * len(shape), np.int32)
    for axis in axes:
        size = shape[axis]
        # The smallest sizes of the same parity: an even kernel has no middle but of two.
        away = np.abs(2 * np.arange(size) - (size - 1)) + 1
        least = np.maximum(least, along(axis, len(shape), away))
    return least


def apply(params: Any, masks: Sequence[Mask], candidate: Any) -> Any:
    """The parameters with zeros where a candidate has nothing.

    Args:
        params: the largest model's.
        masks: of its leaves.
        candidate: by kind and name, numbers or scalar arrays.

    Returns:
        The same tree.

    Example:
        >>> part = Part("width", "kernel", (1, 2))
        >>> mask = Mask(part, "kernel", along(1, 2, np.array([1, 2])))
        >>> apply({"kernel": jnp.ones((1, 2))}, [mask], {"width": {"kernel": 1}})
        {'kernel': Array([[1., 0.]], dtype=float32)}
    """

    def zeroed(leaf: Any, own: Sequence[Mask]) -> Any:
        live = [mask.least <= jnp.asarray(mask.part.of(candidate), jnp.int32) for mask in own]
        there = live[0]
        for each in live[1:]:
            there = there & each
        return jnp.where(there, leaf, jnp.zeros((), jnp.result_type(leaf)))

    return _each(params, masks, zeroed)


def mix(params: Any, masks: Sequence[Mask], weights: Any) -> Any:
    """The parameters under a mixture of masks.

    Args:
        params: the largest model's.
        masks: of its leaves.
        weights: by kind and name, (options,): how much of each option; a candidate's where one is 1
            and the others 0.

    Returns:
        The same tree; differentiable in both. A leaf of integers stays as it is.

    Example:
        >>> part = Part("width", "kernel", (1, 2))
        >>> mask = Mask(part, "kernel", along(1, 2, np.array([1, 2])))
        >>> half = {"width": {"kernel": jnp.array([0.5, 0.5])}}
        >>> mix({"kernel": jnp.ones((1, 2))}, [mask], half)
        {'kernel': Array([[1. , 0.5]], dtype=float32)}
    """

    def scaled(leaf: Any, own: Sequence[Mask]) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        for mask in own:
            table = np.stack([mask.least <= option for option in mask.part.options])
            share = jnp.asarray(mask.part.of(weights))
            leaf = leaf * jnp.tensordot(share, table.astype(share.dtype), 1).astype(leaf.dtype)
        return leaf

    return _each(params, masks, scaled)


def _each(params: Any, masks: Sequence[Mask], function: Any) -> Any:
    leaves = tree_lib.flatten(params, is_leaf=lambda _: False)
    own: dict[str, list[Mask]] = {}
    for mask in masks:
        if mask.path not in leaves:
            raise ValueError(
                f"'{mask.path}' is not in these parameters; {tree_lib.nearest(mask.path, leaves)}"
            )
        own.setdefault(mask.path, []).append(mask)
    news = {path: function(leaves[path], each) for path, each in own.items()}
    return tree_lib.replace(params, news)


def by_kind(parts: Sequence[Part], values: Mapping[Part, Any]) -> dict[str, dict[str, Any]]:
    """Values of parts as a candidate holds them."""
    tree: dict[str, dict[str, Any]] = {}
    for part in parts:
        tree.setdefault(part.kind, {})[part.name] = values[part]
    return tree
