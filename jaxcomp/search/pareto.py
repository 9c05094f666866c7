"""Which of several candidates are best where there are several objectives: fronts and volumes.

Arrays in, arrays out. All costs are minimized; constraints count first, by Deb's rules: what keeps
them is better than what does not, and of two that do not, the one that violates them less.
"""

import math
from typing import Any

import numpy as np


def dominates(costs: Any, violations: Any = None) -> np.ndarray:
    """Which candidate is better than which, whatever the objectives are worth.

    Args:
        costs: (n, objectives), to be minimized.
        violations: (n,), by how much each goes beyond its constraints; None: none does.

    Returns:
        (n, n), bool: at ``[i, j]``, whether ``i`` dominates ``j``.

    Raises:
        ValueError: the shapes do not fit, or a number is NaN.

    Example:
        >>> dominates([[1, 2], [2, 3], [0, 9]]).tolist()
        [[False, True, False], [False, False, False], [False, False, False]]

    Deb, Pratap, Agarwal and Meyarivan 2002, "A fast and elitist multiobjective genetic algorithm:
    NSGA-II", definition 1.
    """
    costs, violations = _arrays(costs, violations)
    no_worse = np.ones((len(costs), len(costs)), bool)
    better = np.zeros_like(no_worse)
    for column in costs.T:
        no_worse &= column[:, None] <= column
        better |= column[:, None] < column
    less = violations[:, None] < violations
    feasible = violations == 0
    return less | (no_worse & better & feasible[:, None] & feasible)


def ranks(costs: Any, violations: Any = None) -> np.ndarray:
    """The front of each candidate: 0 if nothing dominates it, 1 if only front 0 does, and so on.

    Takes time and memory that grow with the square of the number of candidates.

    Args:
        costs: (n, objectives), to be minimized.
        violations: (n,), by how much each goes beyond its constraints; None: none does.

    Returns:
        (n,), int.

    Raises:
        ValueError: the shapes do not fit, or a number is NaN.

    Example:
        >>> ranks([[1, 2], [2, 3], [0, 9], [3, 4]]).tolist()
        [0, 1, 0, 2]

    Deb et al. 2002, section III.A.
    """
    beats = dominates(costs, violations)
    result = np.full(len(beats), -1)
    above = beats.sum(axis=0)
    rank = 0
    while (now := (result < 0) & (above == 0)).any():
        result[now] = rank
        above = above - beats[now].sum(axis=0)
        rank += 1
    return result


def front(costs: Any, violations: Any = None) -> np.ndarray:
    """Which candidates nothing dominates; equal ones stand or fall together.

    Unlike :func:`ranks` it takes hundreds of thousands, as long as the front is short.

    Args:
        costs: (n, objectives), to be minimized.
        violations: (n,), by how much each goes beyond its constraints; None: none does.

    Returns:
        (n,), bool.

    Raises:
        ValueError: the shapes do not fit, or a number is NaN.

    Example:
        >>> front([[1, 2], [2, 3], [0, 9], [1, 2]]).tolist()
        [True, False, True, True]
    """
    costs, violations = _arrays(costs, violations)
    result = np.zeros(len(costs), bool)
    if not len(costs):
        return result
    left = np.flatnonzero(violations == violations.min())
    if violations.min() > 0:
        result[left] = True  # by how little they violate is all that counts
        return result
    left = left[np.lexsort(costs[left].T[::-1])]
    while len(left):
        # The first in lexicographic order is dominated by none; what it dominates goes.
        first = costs[left[0]]
        equal = (costs[left] == first).all(axis=1)
        result[left[equal]] = True
        left = left[(costs[left] < first).any(axis=1)]
    return result


def crowding(costs: Any) -> np.ndarray:
    """How far the candidates of one front are from their neighbours: the lonely ones are kept.

    Args:
        costs: (n, objectives), of candidates none of which dominates another.

    Returns:
        (n,): the sum over objectives of the distance between both neighbours, as a fraction of the
        range; infinite at the ends of an objective.

    Raises:
        ValueError: the shape does not fit, or a number is NaN.

    Example:
        >>> crowding([[0, 4], [1, 2], [4, 0]]).tolist()
        [inf, 2.0, inf]

    Deb et al. 2002, section III.B.
    """
    costs, _ = _arrays(costs, None)
    result = np.zeros(len(costs))
    for column in costs.T if len(costs) else ():
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        result[order[[0, -1]]] = np.inf
        # Infinite costs are those of trials without values, which nothing is between.
        if np.isfinite(ordered[[0, -1]]).all() and ordered[-1] > ordered[0]:
            half = ordered / 2  # the difference of the two largest numbers is none
            result[order[1:-1]] += (half[2:] - half[:-2]) / (half[-1] - half[0])
    return result


def hypervolume(costs: Any, reference: Any) -> float:
    """The volume of what some candidate dominates, up to a point that is worse than all that count.

    Args:
        costs: (n, objectives), to be minimized; those beyond the reference add nothing.
        reference: (objectives,), the worst corner.

    Returns:
        The volume; larger is better, and no set of candidates has more than the whole front. The
        time grows as n to the number of objectives less one.

    Raises:
        ValueError: the shapes do not fit, a number is NaN, or the reference infinite.

    Example:
        >>> hypervolume([[0, 2], [1, 1]], [3, 3])
        5.0

    Zitzler and Thiele 1998, "Multiobjective optimization using evolutionary algorithms"; computed
    slice by slice: While, Hingston, Barone and Huband 2006, "A faster algorithm for calculating
    hypervolume", section III.
    """
    costs, _ = _arrays(costs, None)
    corner = np.asarray(reference, np.float64)
    if corner.shape != costs.shape[1:] or not np.isfinite(corner).all():
        raise ValueError(
            f"reference: must be one finite number for each of {costs.shape[1]} objectives, not "
            f"{reference!r:.60}"
        )
    inside = costs[(costs < corner).all(axis=1)]
    return math.inf if np.isneginf(inside).any() else _volume(inside, corner)


def _volume(costs: np.ndarray, corner: np.ndarray) -> float:
    if not len(costs):
        return 0.0
    if costs.shape[1] == 1:
        return float(corner[0] - costs.min())
    costs = costs[np.argsort(costs[:, -1], kind="stable")]
    thickness = np.diff(np.append(costs[:, -1], corner[-1]))
    if costs.shape[1] == 2:
        return float(thickness @ (corner[0] - np.minimum.accumulate(costs[:, 0])))
    return sum(
        depth * _volume(costs[: i + 1, :-1], corner[:-1])
        for i, depth in enumerate(thickness.tolist())
        if depth
    )


def _arrays(costs: Any, violations: Any) -> tuple[np.ndarray, np.ndarray]:
    costs = np.asarray(costs, np.float64)
    if costs.ndim != 2 or not costs.shape[1]:
        raise ValueError(
            f"costs: must be of shape (candidates, objectives), not {costs.shape}: one row each"
        )
    violations = np.zeros(len(costs)) if violations is None else np.asarray(violations, np.float64)
    if violations.shape != costs.shape[:1]:
        raise ValueError(
            f"violations: must be one number for each of {len(costs)} candidates, not of shape "
            f"{violations.shape}"
        )
    for name, array in (("costs", costs), ("violations", violations)):
        if np.isnan(array).any():
            raise ValueError(
                f"{name}: a number is NaN, which is neither better nor worse: leave it out"
            )
    if (violations < 0).any():
        raise ValueError("violations: one is negative: 0 is no violation")
    return costs, violations
