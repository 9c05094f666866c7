"""An allocation from measured sensitivities: whoever loses least by it is pruned most."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcomp import tree as tree_lib
from jaxcomp.kernels.threshold import removal_count
from jaxcomp.prune.allocation import Allocation, Part
from jaxcomp.prune.post_training.sensitivity import Sensitivity

_SLICES = 64


class Step(NamedTuple):
    """A run of units that one leaf loses before the next step begins.

    Attributes:
        leaf: its position.
        units: how many.
    """

    leaf: int
    units: int


def allocation_from_sensitivity(found: Sensitivity) -> Allocation:
    """Spread a sparsity so that the sum of the measured drops is least.

    Each leaf's curve of drop by units removed is replaced by its lower convex hull, from (0, 0) to
    the highest sparsity measured; units are then taken where the next one costs least, leaves of
    equal cost side by side. At any overall sparsity up to the highest measured, this is the least
    possible sum of drops on the hulls, which ignores that drops of several leaves together are not
    the sum of theirs alone. Past it, what is left is taken evenly, the last unit of a leaf last. A
    failed evaluation counts as a drop greater than all others.

    Args:
        found: what :func:`sensitivity` measured, of at least the leaves that are to be pruned.

    Returns:
        An allocation for any overall sparsity, traced or not, whose total is exact and under which
        no leaf gets weights back as sparsity rises. Local structures round a leaf's share to their
        groups, as with every allocation. It raises ValueError for a leaf that was not measured, or
        that has another size than it had.

    Raises:
        TypeError: ``found`` is something else.

    Example:
        >>> from jaxcomp.prune.masks import masks
        >>> from jaxcomp.prune.post_training.sensitivity import sensitivity
        >>> params = {"dear": jnp.ones((2, 2)), "cheap": jnp.ones((2, 2))}
        >>> evaluate = lambda params: 5 * jnp.sum(params["dear"]) + jnp.sum(params["cheap"])
        >>> found = sensitivity(params, evaluate, (0.5, 0.75))
        >>> kept = masks(params, 0.5, allocation=allocation_from_sensitivity(found))
        >>> int(jnp.sum(~kept["dear"])), int(jnp.sum(~kept["cheap"]))
        (1, 3)

    Source:
        Shoham & Gersho 1988, *Efficient bit allocation for an arbitrary set of quantizers*: the
        greedy walk along the hulls, there for bits.
    """
    if not isinstance(found, Sensitivity):
        raise TypeError(f"found must be what sensitivity returned, not {found!r:.60}")

    def counts(parts: Mapping[str, Part], sparsity: Any) -> Array:
        _check(found, parts)
        curves = {path: _curve(found, path, part.units) for path, part in parts.items()}
        steps = walk(list(curves.values()), [part.units for part in parts.values()])
        lengths = np.array([step.units for step in steps], np.uint64)
        starts = (np.cumsum(lengths) - lengths).astype(np.uint32)
        (total,) = removal_count(sparsity, (sum(part.units for part in parts.values()),))
        beyond = jnp.where(total > starts, total - starts, jnp.uint32(0))
        taken = jnp.minimum(beyond, jnp.asarray(lengths.astype(np.uint32)))
        owners = np.array([step.leaf for step in steps], np.int32)
        return jnp.zeros(len(parts), jnp.uint32).at[owners].add(taken)

    return Allocation("allocation_from_sensitivity", counts)


def walk(curves: Sequence[np.ndarray], sizes: Sequence[int]) -> list[Step]:
    """The order in which leaves lose their units, cheapest first.

    Args:
        curves: for each leaf, rows of units removed (whole numbers, rising) and drop, from (0, 0).
        sizes: units of each leaf.

    Returns:
        Steps that add up to all units of all leaves.

    Example:
        >>> line = lambda drop: np.array([[0.0, 0.0], [4.0, drop]])
        >>> walk([line(2.0), line(1.0)], [4, 4])
        [Step(leaf=1, units=4), Step(leaf=0, units=4)]
    """
    runs = []
    for leaf, curve in enumerate(curves):
        hull = lower_hull(curve)
        for (begin, low), (end, high) in itertools.pairwise(hull):
            runs.append(((high - low) / (end - begin), Step(leaf, int(end - begin))))
    runs.sort(key=lambda run: run[0])
    steps: list[Step] = []
    for _, equal in itertools.groupby(runs, key=lambda run: run[0]):
        steps += _side_by_side([step for _, step in equal])
    left = [size - int(curve[-1, 0]) for curve, size in zip(curves, sizes, strict=True)]
    steps += _side_by_side([Step(leaf, units - 1) for leaf, units in enumerate(left)])
    return steps + [Step(leaf, 1) for leaf, units in enumerate(left) if units]


def lower_hull(curve: np.ndarray) -> np.ndarray:
    """The corners of the greatest convex function below the points of a curve.

    Args:
        curve: (points, 2): places that rise, and values.

    Returns:
        Some of its rows, the first and the last among them.

    Example:
        >>> lower_hull(np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 2.0]])).tolist()
        [[0.0, 0.0], [2.0, 2.0]]
    """
    corners: list[Any] = []
    for x, y in curve:
        while len(corners) > 1:
            (a, low), (b, high) = corners[-2:]
            if (high - low) * (x - b) < (y - high) * (b - a):
                break
            corners.pop()
        corners.append((x, y))
    return np.array(corners)


def _side_by_side(runs: Sequence[Step]) -> list[Step]:
    """Runs of several leaves in slices, a slice of each in turn."""
    if len(runs) == 1:
        return [run for run in runs if run.units > 0]
    steps = []
    for at in range(_SLICES):
        for leaf, units in runs:
            begin, end = (units * part // _SLICES for part in (at, at + 1))
            if end > begin:
                steps.append(Step(leaf, end - begin))
    return steps


def _curve(found: Sensitivity, path: str, units: int) -> np.ndarray:
    """Rows of units removed and drop, each number of units once."""
    at = found.paths.index(path)
    finite = np.abs(found.drops[np.isfinite(found.drops)])
    failed = 1e6 * float(finite.max(initial=0.0) + 1)
    drops = np.where(np.isfinite(found.drops[at]), found.drops[at], failed)
    places = np.rint(found.removed[at] * (units / found.sizes[at]))
    points = dict(zip(places.tolist(), drops.tolist(), strict=True))
    return np.array(sorted((points | {0.0: 0.0}).items()))


def _check(found: Sensitivity, parts: Mapping[str, Part]) -> None:
    sizes = dict(zip(found.paths, found.sizes, strict=True))
    missing = [path for path in parts if path not in sizes]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: not measured ({tree_lib.nearest(missing[0], found.paths)}): "
            "call sensitivity with paths that cover these leaves, or leave them out"
        )
    for path, part in parts.items():
        size = int(np.prod(part.shape, dtype=np.int64))
        if size != sizes[path]:
            raise ValueError(
                f"{path}: {size} weights, but {sizes[path]} when the sensitivity was measured: "
                "measure it for these parameters"
            )
