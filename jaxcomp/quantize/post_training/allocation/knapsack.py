"""One option of each group, at the least damage that a budget allows: multiple-choice knapsack.

Options are added group by group to the partial choices that no other one beats in both cost and
damage (Nemhauser and Ullmann, 1969). That is exact. Where there would be too many of them, a bound
helps: what the groups to come cost at least, by the linear relaxation, which for this problem is
solved by the slopes of the convex hulls (Sinha and Zoltners, 1979). A partial choice that cannot
come to less than a known one is dropped, which is exact too. Only where even that leaves too many
are the least promising dropped at a guess, and then the answer says by how much it may miss.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

MOST_STATES = 2**16
_PROBE = 2**10  # partial choices of the quick pass that finds something to measure others against
_SLACK = 1e-12  # of all damages: what rounding may make of a bound


class Options(NamedTuple):
    """The options of one group.

    Attributes:
        costs: whole numbers, at least 0.
        damages: finite numbers, of any sign; infinite or NaN for what may not be chosen.
    """

    costs: Int64[np.ndarray, " options"]
    damages: Float64[np.ndarray, " options"]


class Solution(NamedTuple):
    """One option of each group.

    Attributes:
        choice: its index, for each group.
        cost: the sum.
        damage: the sum.
        bound: no choice within the budget does less damage; equal to ``damage`` if solved exactly.
    """

    choice: tuple[int, ...]
    cost: int
    damage: float
    bound: float

    @property
    def exact(self) -> bool:
        """Whether no choice within the budget does less damage, but for rounding."""
        return self.bound >= self.damage


class Front(NamedTuple):
    """What each cost can buy.

    Attributes:
        costs: rising.
        damages: falling; the least that was found at or below each cost.
        exact: whether all undominated choices are there; else a part of them, evenly over cost.
    """

    costs: Int64[np.ndarray, " points"]
    damages: Float64[np.ndarray, " points"]
    exact: bool


def solve(groups: Sequence[Options], budget: int, most_states: int = MOST_STATES) -> Solution:
    """The choice of least damage whose cost is within a budget.

    Args:
        groups: the options of each.
        budget: the most that the choice may cost.
        most_states: partial choices kept after each group; bounds memory and time.

    Returns:
        The choice; of several with the least damage, one of least cost.

    Raises:
        ValueError: a group has no option that may be chosen, or nothing fits the budget.

    Example:
        >>> groups = [Options(np.array([1, 3]), np.array([9.0, 1.0]))] * 2
        >>> solve(groups, budget=4)
        Solution(choice=(0, 1), cost=4, damage=10.0, bound=10.0)
    """
    _check(groups)
    cheapest = sum(int(options.costs[_allowed(options)].min()) for options in groups)
    if cheapest > budget:
        raise ValueError(f"the cheapest choice costs {cheapest}, above the budget {budget}")
    probe = min(most_states, _PROBE)
    found, bound = _within(groups, budget, probe, math.inf)
    if bound < math.inf and probe < most_states:
        better, bound = _within(groups, budget, most_states, found[2])
        found = min(found, better, key=lambda each: (each[2], each[1]))
    choice, cost, damage = found
    return Solution(choice, cost, damage, min(damage, bound))


def front(groups: Sequence[Options], most_states: int = MOST_STATES) -> Front:
    """The damage that each cost can buy.

    Args:
        groups: the options of each.
        most_states: points kept at most.

    Returns:
        Costs and damages of the choices that no other one beats in both.

    Raises:
        ValueError: a group has no option that may be chosen.

    Example:
        >>> found = front([Options(np.array([1, 3]), np.array([9.0, 1.0]))] * 2)
        >>> found.costs.tolist(), found.damages.tolist()
        ([2, 4, 6], [18.0, 10.0, 2.0])
    """
    _check(groups)
    states, exact = _START, True
    for options in groups:
        states = _undominated(_added(states, options))
        if states.costs.size > most_states:
            states, exact = states.take(_evenly(states.costs, most_states)), False
    return Front(states.costs, states.damages, exact)


class _States(NamedTuple):
    """Partial choices, cost rising and damage falling; which one each came from, and by what."""

    costs: np.ndarray
    damages: np.ndarray
    parent: np.ndarray
    option: np.ndarray

    def take(self, which: np.ndarray) -> "_States":
        return _States(*(field[which] for field in self))


_START = _States(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))
_NOTHING = ((), 0, math.inf)


def _within(
    groups: Sequence[Options], budget: int, most: int, known: float
) -> tuple[tuple[tuple[int, ...], int, float], float]:
    """Choice, cost and damage of the best that comes to less than is known; and a bound.

    Where none does, the damage is infinite. What was dropped at a guess does no less damage than
    the bound says, which is infinite where nothing was.
    """
    slack = _SLACK * sum(np.abs(options.damages[_allowed(options)]).max() for options in groups)
    hulls = [_hull(options) for options in groups]
    states, stages, bound = _START, [], math.inf
    for at, options in enumerate(groups):
        states = _undominated(_added(states, options))
        least = states.damages + _relaxed(hulls[at + 1 :], (budget - states.costs).astype(float))
        keep = np.flatnonzero(np.isfinite(least) & (least <= known + slack))
        if keep.size > most:
            order = keep[np.argsort(least[keep], kind="stable")]
            bound, keep = min(bound, float(least[order[most]])), np.sort(order[:most])
        if not keep.size:
            return _NOTHING, bound
        states = states.take(keep)
        stages.append(states)
    # The last state costs most and does the least damage.
    at, choice = states.costs.size - 1, []
    for stage in reversed(stages):
        choice.append(int(stage.option[at]))
        at = int(stage.parent[at])
    return (tuple(reversed(choice)), int(states.costs[-1]), float(states.damages[-1])), bound


def _added(states: _States, options: Options) -> _States:
    """Every partial choice with every option of one more group."""
    allowed = np.flatnonzero(_allowed(options))
    parent = np.repeat(np.arange(states.costs.size), allowed.size)
    option = np.tile(allowed, states.costs.size)
    costs = states.costs[parent] + options.costs[option]
    return _States(costs, states.damages[parent] + options.damages[option], parent, option)


def _undominated(states: _States) -> _States:
    order = np.lexsort((states.damages, states.costs))
    damages = states.damages[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(damages)[:-1]])
    return states.take(order[damages < before])


def _evenly(costs: np.ndarray, most: int) -> np.ndarray:
    """The last of each of equal ranges of cost: it does the least damage there."""
    cell = (costs - costs[0]).astype(float) * (most / (1 + float(costs[-1] - costs[0])))
    return np.flatnonzero(np.append(np.diff(cell.astype(np.int64)) > 0, True))


def _relaxed(hulls: Sequence[tuple[np.ndarray, np.ndarray]], budgets: np.ndarray) -> np.ndarray:
    """Least damage of fractional choices at each budget; infinite where nothing fits."""
    cost = sum((costs[0] for costs, _ in hulls), 0.0)
    damage = sum((damages[0] for _, damages in hulls), 0.0)
    widths = np.concatenate([np.zeros(0), *(np.diff(costs) for costs, _ in hulls)])
    drops = np.concatenate([np.zeros(0), *(np.diff(damages) for _, damages in hulls)])
    order = np.argsort(drops / widths, kind="stable")
    at = cost + np.concatenate([[0.0], np.cumsum(widths[order])])
    value = damage + np.concatenate([[0.0], np.cumsum(drops[order])])
    return np.where(budgets < cost, np.inf, np.interp(budgets, at, value))


def _hull(options: Options) -> tuple[np.ndarray, np.ndarray]:
    """The lower convex hull of a group's options, cost rising and damage falling."""
    allowed = _allowed(options)
    costs, damages = options.costs[allowed].tolist(), options.damages[allowed].tolist()
    kept: list[tuple[float, float]] = []
    for x, y in sorted(zip(costs, damages, strict=True)):
        if kept and y >= kept[-1][1]:
            continue
        # Damage falls ever more slowly along the hull.
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], (x, y)):
            kept.pop()
        kept.append((x, y))
    hull = np.array(kept, float)
    return hull[:, 0], hull[:, 1]


def _slope(start: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def _allowed(options: Options) -> np.ndarray:
    return np.isfinite(options.damages)


def _check(groups: Sequence[Options]) -> None:
    if not groups:
        raise ValueError("there are no groups to choose from")
    for i, options in enumerate(groups):
        if options.costs.shape != options.damages.shape or not _allowed(options).any():
            raise ValueError(f"group {i} has no option with a cost and a finite damage")
