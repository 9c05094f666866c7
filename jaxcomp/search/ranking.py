"""Trials in order: their costs, which of them lead, and since when."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxcomp.search import pareto
from jaxcomp.search.trials import Direction, Trial


def is_usable(trial: Trial) -> bool:
    """Whether a trial can be compared with others: one that failed cannot.

    One that was stopped without values can if it is known to violate its constraints, since those
    that do are compared by that alone.

    Example:
        >>> is_usable(Trial(0, {}, None, "failed", 1.0, {"error": "NaN"}))
        False
    """
    if trial.status == "failed":
        return False
    return trial.values is not None or violation(trial) > 0


def violation(trial: Trial) -> float:
    """By how much a trial goes beyond its constraints.

    Example:
        >>> violation(Trial(0, {}, (0.9,), "finished", 1.0, {"violation": 0.5}))
        0.5
    """
    return float(trial.told.get("violation", 0.0))


def costs_of(
    trials: Sequence[Trial], directions: Sequence[Direction]
) -> tuple[np.ndarray, np.ndarray]:
    """Costs and violations of trials, as :mod:`jaxcomp.search.pareto` takes them.

    Args:
        trials: any.
        directions: of the objectives.

    Returns:
        (trials, objectives), all to be minimized, and (trials,); infinite where a trial failed.

    Example:
        >>> trial = Trial(0, {}, (0.9, 20.0), "finished", 1.0, {})
        >>> costs_of([trial], ("maximize", "minimize"))[0].tolist()
        [[-0.9, 20.0]]
    """
    rows = [standing(trial, directions) for trial in trials]
    costs = np.array([row[1] for row in rows], np.float64).reshape(len(rows), len(directions))
    return costs, np.array([row[0] for row in rows], np.float64)


def standing(trial: Trial, directions: Sequence[Direction]) -> tuple[float, tuple[float, ...]]:
    """Violation and costs of a trial; with one objective, the order of trials from best to worst.

    Example:
        >>> trials = [
        ...     Trial(0, {}, (0.9,), "finished", 1.0, {"violation": 0.5}),
        ...     Trial(1, {}, (0.7,), "finished", 1.0, {}),
        ...     Trial(2, {}, (0.8,), "finished", 1.0, {}),
        ...     Trial(3, {}, None, "failed", 1.0, {"error": "NaN"}),
        ... ]
        >>> [t.number for t in sorted(trials, key=lambda t: standing(t, ("maximize",)))]
        [2, 1, 0, 3]
    """
    worst = (np.inf,) * len(directions)
    if not is_usable(trial):
        return np.inf, worst
    if trial.values is None:
        return violation(trial), worst
    pairs = zip(trial.values, directions, strict=True)
    return violation(trial), tuple(-v if way == "maximize" else v for v, way in pairs)


class Leaders(NamedTuple):
    """The best trials so far, each better than any other in something.

    Attributes:
        trials: in the order of their numbers; one where there is one objective. Of equal ones the
            first; while none keeps the constraints, the one that violates them least.
        seen: trials looked at.
        since: of these, those since the leaders last changed.
    """

    trials: tuple[Trial, ...] = ()
    seen: int = 0
    since: int = 0


def follow(leaders: Leaders, trial: Trial, directions: Sequence[Direction]) -> Leaders:
    """The leaders after one more trial.

    Args:
        leaders: before it.
        trial: the next; only one that finished can lead.
        directions: of the objectives.

    Returns:
        The leaders.

    Example:
        >>> first = Trial(0, {}, (3.0,), "finished", 1.0, {})
        >>> leaders = follow(Leaders(), first, ("minimize",))
        >>> leaders = follow(leaders, Trial(1, {}, (4.0,), "finished", 1.0, {}), ("minimize",))
        >>> [trial.number for trial in leaders.trials], leaders.since
        ([0], 1)
    """
    same = Leaders(leaders.trials, leaders.seen + 1, leaders.since + 1)
    if trial.status != "finished":
        return same
    new = standing(trial, directions)
    if len(directions) == 1:
        old = standing(leaders.trials[0], directions) if leaders.trials else None
        # Of those that violate constraints equally, the first leads, whatever their costs.
        if old is not None and (old <= new or old[0] == new[0] > 0):
            return same
        return Leaders((trial,), leaders.seen + 1, 0)
    costs, violations = costs_of((*leaders.trials, trial), directions)
    others, own = slice(0, -1), -1
    equal = (costs[others] == costs[own]).all(axis=1) & (violations[others] == violations[own])
    on_front = pareto.front(costs, violations)
    # Here too the first of those that violate constraints equally leads, and alone.
    if equal.any() or not on_front[own] or (new[0] > 0 and on_front[others].any()):
        return same
    kept = [old for old, stays in zip(leaders.trials, on_front[others], strict=True) if stays]
    return Leaders((*kept, trial), leaders.seen + 1, 0)
