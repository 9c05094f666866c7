"""What is left of each array of a program once some channels are gone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.model.axes import Flow
from jaxcomp.model.dims import Dim, atoms, find, kept
from jaxcomp.model.program import Op, Value

# For each axis the positions that stay, ascending; None where all do.
Positions = Sequence[np.ndarray | None]


class Cut(NamedTuple):
    """Channels that were cut from a program.

    Attributes:
        flow: the axes of its arrays.
        means: operations that take a mean over channels, with the axes that it is taken over.
        keep: which units stay, by atom; only of those that lose some.
        masks: what was computed already of :func:`masks_of`.
    """

    flow: Flow
    means: Mapping[Op, tuple[Dim, ...]]
    keep: dict[Dim, np.ndarray]
    masks: dict[Value, tuple[np.ndarray | None, ...]]


def resolve(
    flow: Flow,
    means: Mapping[Op, tuple[Dim, ...]],
    values: Mapping[str, Value],
    staying: Mapping[str, Positions],
) -> Cut:
    """Say for every atom which units stay, from what stays of some arrays.

    Args:
        flow: the axes of a program.
        means: operations that take a mean over channels.
        values: arrays of the program by a name for messages.
        staying: for each name and axis, what stays; all of those that are not named.

    Returns:
        The cut.

    Raises:
        ValueError: the positions are not whole units, two arrays that are tied keep different
            channels, or an operation does not allow the cut.
    """
    keep: dict[Dim, np.ndarray] = {}
    owners: dict[Dim, str] = {}
    for name, value in values.items():
        positions = staying.get(name, (None,) * len(value.shape))
        for axis, (dim, stay) in enumerate(zip(flow.of(value), positions, strict=True)):
            mask = np.full((dim.size,), stay is None)
            if stay is not None:
                mask[stay] = True
            _assign(dim, mask, keep, owners, f"{name} axis {axis}")
    keep = {atom: mask for atom, mask in keep.items() if not mask.all()}
    for atom in keep:
        if atom.fixed is not None:
            raise ValueError(f"{owners[atom]} cannot be cut in this function: {atom.fixed}")
    return Cut(flow, means, keep, {})


def _assign(
    dim: Dim, mask: np.ndarray, keep: dict[Dim, np.ndarray], owners: dict[Dim, str], where: str
) -> None:
    """Take an axis' kept positions apart into those of its atoms."""
    dim = find(dim)
    if dim.parts:
        offset = 0
        for part in dim.parts:
            _assign(part, mask[offset : offset + part.size], keep, owners, where)
            offset += part.size
    elif dim.factors:
        grid = mask.reshape([find(factor).size for factor in dim.factors])
        for i, factor in enumerate(dim.factors):
            others = tuple(j for j in range(grid.ndim) if j != i)
            _assign(factor, np.asarray(grid.any(others)), keep, owners, where)
        if (kept(dim, keep) != mask).any():
            raise ValueError(f"{where}: the kept positions are not whole units of {dim}")
    elif dim.size > 1 and (keep.setdefault(dim, mask) != mask).any():
        raise ValueError(
            f"{where} keeps other channels than {owners[dim]}, but this function ties the two"
        )
    else:
        owners.setdefault(dim, where)


def masks_of(cut: Cut, value: Value) -> tuple[np.ndarray | None, ...]:
    """What stays of each axis of a value: booleans, or None for all."""
    if value not in cut.masks:
        cut.masks[value] = tuple(
            kept(dim, cut.keep) if any(atom in cut.keep for atom in atoms(dim)) else None
            for dim in cut.flow.of(value)
        )
    return cut.masks[value]


def positions_of(cut: Cut, value: Value) -> tuple[np.ndarray | None, ...]:
    """The same as ascending positions."""
    return tuple(None if mask is None else np.flatnonzero(mask) for mask in masks_of(cut, value))


def is_cut(cut: Cut, value: Value) -> bool:
    """Whether a value loses anything."""
    return any(mask is not None for mask in masks_of(cut, value))


def shape_of(cut: Cut, value: Value) -> tuple[int, ...]:
    """The shape of a value that lost channels."""
    masks = zip(value.shape, masks_of(cut, value), strict=True)
    return tuple(size if mask is None else int(mask.sum()) for size, mask in masks)


def shrunk(cut: Cut, value: Value, array: Any) -> Any:
    """What stays of a full-size array."""
    for axis, positions in enumerate(positions_of(cut, value)):
        if positions is not None:
            array = take(array, positions, axis)
    return array


def take(array: Any, positions: np.ndarray, axis: int) -> Any:
    """Ascending positions of an axis; a slice where they are evenly spaced."""
    if isinstance(array, np.ndarray):
        return np.take(array, positions, axis)
    steps = np.diff(positions)
    if not len(positions) or (steps != steps[:1]).any():
        return jnp.take(
            array, positions, axis, mode="clip", unique_indices=True, indices_are_sorted=True
        )
    first, last = (int(positions[0]), int(positions[-1]))
    return jax.lax.slice_in_dim(array, first, last + 1, int(steps[0]) if len(steps) else 1, axis)
