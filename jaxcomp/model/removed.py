"""Parameters that lose channels: what stays of each leaf, masked or gone, and what that costs."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.model.couple import Coupling
from jaxcomp.model.placement import at_once
from jaxcomp.model.rewrite import smaller_shapes
from jaxcomp.model.tally import Tally
from jaxcomp.sharding import automatic, explicit_axes, spec_like

Kept = dict[str, tuple[np.ndarray | None, ...]]


class Size(NamedTuple):
    """What a model is and costs.

    Attributes:
        macs: multiply-accumulates of one call, at the batch size that was traced.
        flops: floating-point operations of one call.
        parameters: numbers in the tree.
        bytes: of the tree.
    """

    macs: int
    flops: int
    parameters: int
    bytes: int


def size_of(coupling: Coupling, keep: Mapping[Any, np.ndarray]) -> Size:
    """What a model is and costs once some channels are gone.

    Args:
        coupling: the analysed model.
        keep: which units stay, by atom.

    Returns:
        The size.
    """
    shape = smaller_shapes(coupling, keep)
    cost = Tally(shape).block(coupling.program.block)
    leaves = coupling.program.leaves.values()
    counts = [math.prod(shape(value)) for value in leaves]
    sizes = [getattr(value.dtype, "itemsize", 0) for value in leaves]
    nbytes = sum(count * size for count, size in zip(counts, sizes, strict=True))
    return Size(cost.macs, cost.flops, sum(counts), nbytes)


def kept_positions(coupling: Coupling, units: Mapping[str, np.ndarray]) -> Kept:
    """Which positions of each leaf stay, from the units that each group keeps.

    Args:
        coupling: the analysed model.
        units: by name of the group, (units,) booleans.

    Returns:
        By path, for each axis ascending positions, or None where all stay.
    """
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    for group in coupling.groups:
        removed = ~units.get(group.name, np.ones(group.size, bool))
        for part in group.slices if removed.any() else ():
            positions = part.positions[removed].ravel()
            gone.setdefault((part.path, part.axis), []).append(positions)
    kept = {}
    for path, value in coupling.program.leaves.items():
        axes = (gone.get((path, axis)) for axis in range(len(value.shape)))
        kept[path] = tuple(
            None if lost is None else np.setdiff1d(np.arange(size), np.concatenate(lost))
            for size, lost in zip(value.shape, axes, strict=True)
        )
    return kept


def masked(params: Any, kept: Kept) -> Any:
    """The full-size parameters with all that was cut set to zero.

    Args:
        params: the full-size parameters.
        kept: by path, for each axis the positions that stay, or None for all.

    Returns:
        A tree of the same structure and shapes.
    """

    def zeroed(array: Any, stays: tuple[np.ndarray | None, ...]) -> Any:
        library = np if isinstance(array, np.ndarray) else jnp
        for axis, positions in enumerate(stays):
            if positions is not None:
                mask = np.isin(np.arange(array.shape[axis]), positions)
                mask = mask.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
                array = library.where(mask, array, library.zeros((), array.dtype))
        return array

    def mask(leaf: Any, stays: tuple[np.ndarray | None, ...]) -> Any:
        function = lambda array: zeroed(array, stays)
        if explicit_axes(leaf):
            return automatic(function, out=spec_like(leaf, leaf.shape))(leaf)
        return at_once(function, leaf)

    news = {
        path: mask(leaf, kept[path])
        for path, leaf in tree_lib.flatten(params, is_leaf=lambda _: False).items()
        if any(positions is not None for positions in kept[path])
    }
    return tree_lib.replace(params, news)
