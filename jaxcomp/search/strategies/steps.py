"""Strategies that go step by step: what the points of one come to decides those of the next."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcomp.search.spaces import from_unit, frozen, parts, size, walk
from jaxcomp.search.spaces.kinds import Part
from jaxcomp.search.spaces.numbers import nth
from jaxcomp.search.trials import Point, Strategy, Trial


class Step(NamedTuple):
    """A step under way.

    Attributes:
        context: what the strategy knows from the steps before.
        points: of this step; none: there is no further one.
        asked: how many of them were asked.
        results: trials of them that were told.
    """

    context: Any
    points: tuple[Point, ...]
    asked: int = 0
    results: tuple[Trial, ...] = ()


def stepwise(
    name: str,
    begin: Callable[[Any, Any, Any], tuple[Any, Sequence[Point]]],
    proceed: Callable[[Any, tuple[Trial, ...]], tuple[Any, Sequence[Point]]],
) -> Strategy:
    """A strategy from how it begins and how it proceeds.

    Args:
        name: with all settings.
        begin: ``(space, directions, key) -> context, points``.
        proceed: ``(context, results) -> context, points``: after all points of a step were told.

    Returns:
        A strategy. While a step waits for its trials, it has nothing to ask.
    """

    def init(space: Any, directions: Any, key: Any) -> Step:
        context, points = begin(space, directions, key)
        return Step(context, tuple(points))

    def ask(state: Step, count: int) -> tuple[list[Point], Step]:
        points = list(state.points[state.asked : state.asked + count])
        return points, state._replace(asked=state.asked + len(points))

    def tell(state: Step, trials: list[Trial]) -> Step:
        for trial in trials:
            done = len(state.results)
            # Others than those asked for, in this order, are none of its business.
            if done == len(state.points) or frozen(trial.point) != frozen(state.points[done]):
                continue
            results = (*state.results, trial)
            if len(results) < len(state.points):
                state = state._replace(results=results, asked=max(state.asked, len(results)))
            else:
                context, points = proceed(state.context, results)
                state = Step(context, tuple(points))
        return state

    return Strategy(init, ask, tell, name)


def values(part: Part, levels: int) -> list[int | float]:
    """The values of a part; of many, some that are evenly spaced from the first to the last.

    Args:
        part: a choice, of which all options count, an integer or a continuous part.
        levels: how many values of a number at most.

    Example:
        >>> from jaxcomp.search import Continuous, Integer
        >>> values(Integer(1, 3), levels=5), values(Integer(0, 100), levels=5)
        ([1, 2, 3], [0, 25, 50, 75, 100])
        >>> values(Continuous(0, 1), levels=3)
        [0.0, 0.5, 1.0]
    """
    every = size(part, levels)
    if every <= levels or hasattr(part, "spaces"):
        return [nth(part, i, levels) for i in range(int(every))]
    if getattr(part, "log", False):
        spread = [from_unit(part, unit) for unit in np.linspace(0, 1, levels).tolist()]
        return list(dict.fromkeys(spread))
    places = np.linspace(0, int(every) - 1, levels).round().astype(int)
    return [nth(part, i) for i in dict.fromkeys(places.tolist())]


def with_value(
    space: Any, point: Point, path: str, value: int | float, rng: np.random.Generator
) -> Point:
    """A point with another value of one part; what becomes active by it is drawn.

    Example:
        >>> from jaxcomp.search import Choice, Integer
        >>> space = {"act": Choice({"relu": None, "leaky": {"steps": Integer(3, 3)}})}
        >>> with_value(space, {"act": 0}, "act", 1, np.random.default_rng(0))
        {'act': 1, 'act/leaky/steps': 3}
    """
    active = parts(space, point)

    def choose(at: str, part: Part) -> int | float:
        if at == path:
            return value
        return point[at] if at in active else from_unit(part, rng.random())

    return walk(space, choose)[1]
