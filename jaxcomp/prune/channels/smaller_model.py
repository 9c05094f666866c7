"""A model that lost channels: its parameters, how to run it, and what it lost."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.model.couple import Coupling
from jaxcomp.model.rewrite import rewrite, smaller_shapes
from jaxcomp.model.tally import Tally
from jaxcomp.prune.channels.shrink import at_once, shrink
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


@dataclass(frozen=True, eq=False)
class SmallerModel:
    """A model without some of its channels; ``print`` it to see which.

    Attributes:
        params: the smaller parameters, a tree of the same structure.
        masked: the full-size parameters with the same channels zeroed: the same outputs.
        kept: by path, for each axis the positions that stayed, or None for all.
        shapes: by path of the leaves that were cut, the shape before and after.
        before: the size of the full model.
        after: the size of this one.
        fixed: why groups of channels were kept whole, by their name.
        notes: where masked and smaller differ, and where less was removed than asked for.
        apply: the model as a pure function of ``(params, *inputs)``, of any batch size.
        full_params: shapes and dtypes of the full-size parameters.
        renormalize: whether means over channels are taken over those that remain.
    """

    params: Any = field(repr=False)
    masked: Any = field(repr=False)
    kept: Kept = field(repr=False)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    before: Size
    after: Size
    fixed: dict[str, str] = field(repr=False)
    notes: tuple[str, ...]
    apply: Callable[..., Any] = field(repr=False)
    full_params: Any = field(repr=False)
    renormalize: bool = False

    def rewrite(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Another function of the same parameters, for the smaller ones.

        For a training step's forward pass with batch statistics and dropout, for instance. What it
        returns shrinks where it has the channels that were cut.

        Args:
            function: a function of ``(params, *inputs)``, with ``params`` a tree of the same
                structure as those that were cut.

        Returns:
            The function of smaller parameters; see :func:`jaxcomp.model.rewrite`.
        """
        return rewrite(function, self.full_params, self.kept, self.renormalize)

    def shrink(self, tree: Any) -> Any:
        """Cut the same channels from a tree that mirrors the parameters.

        Args:
            tree: an optimizer state, a collection such as ``params["batch_stats"]``, gradients, an
                average of the weights, or any tree that holds such trees.

        Returns:
            The tree with smaller leaves; see :func:`jaxcomp.prune.channels.shrink`.
        """
        return shrink(tree, self.full_params, self.kept)

    def __str__(self) -> str:
        lines = [f"{path} {a} → {b}" for path, (a, b) in self.shapes.items()]
        pairs = zip(Size._fields, self.before, self.after, strict=True)
        names = {"macs": "MACs", "flops": "FLOPs"}
        lines += [
            f"{names.get(name, name)}: {a:,} → {b:,} ({b / a if a else 1:.1%})"
            for name, a, b in pairs
        ]
        lines += [f"kept {name}: {reason}" for name, reason in self.fixed.items()]
        return "\n".join([*lines, *self.notes])


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
