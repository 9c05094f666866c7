"""Greedy search: one part after the other, the best value of each is kept."""

from typing import Any, NamedTuple

from jaxcomp import checks
from jaxcomp.search.ranking import is_usable, standing
from jaxcomp.search.spaces import encode, frozen, generator, parts, sample
from jaxcomp.search.strategies.evolution import one_objective
from jaxcomp.search.strategies.history import History, begin, noted, propose
from jaxcomp.search.strategies.steps import stepwise, values, with_value
from jaxcomp.search.trials import Direction, Point, Strategy, Trial


class _Context(NamedTuple):
    history: History
    directions: tuple[Direction, ...]
    best: Trial | None
    path: str | None  # of the part that the step changes; None: the step looks for a start
    waiting: tuple[str, ...]  # parts to change before the search has come round


def greedy(start: Any = None, levels: Any = 8) -> Strategy:
    """All values of one part, the others as they are; the best stays, then comes the next part.

    Goes through the parts in the order of the space, as often as something gets better, and ends
    when a whole round has bettered nothing: at a candidate that no change of one part betters. What
    becomes active by a change is drawn. Takes one objective and constraints.

    Args:
        start: the candidate to begin with; None draws one, and another one if it fails.
        levels: how many values of a number to try, evenly spaced, where it has more; of a choice
            all options are tried.

    Returns:
        A strategy.

    Raises:
        TypeError: ``levels`` is no whole number.
        ValueError: it is below 2; when it begins: there are several objectives, or the start is not
            in the space.

    Example:
        >>> import jax
        >>> from jaxcomp.search import Choice, Integer, run
        >>> space = {"depth": Integer(1, 4), "act": Choice(("relu", "gelu", "silu"))}
        >>> study = run(
        ...     space, lambda found: [each["depth"] - (each["act"] == "gelu") for each in found],
        ...     greedy(start={"depth": 3, "act": "relu"}), objectives="minimize",
        ...     key=jax.random.key(0), stop=100,
        ... )
        >>> study.candidate(study.best), len(study.trials), study.reason
        ({'depth': 1, 'act': 'gelu'}, 9, 'exhausted')

    Coordinate descent: Wright 2015, "Coordinate descent algorithms", section 1.
    """
    checks.check_count("levels", levels, 2)

    def begin_at(
        space: Any, directions: tuple[Direction, ...], key: Any
    ) -> tuple[Any, list[Point]]:
        one_objective("greedy", directions)
        context = _Context(begin(space, key), directions, None, None, ())
        return _start(context) if start is None else (context, [encode(space, start)])

    def proceed(context: _Context, results: tuple[Trial, ...]) -> tuple[Any, list[Point]]:
        context = context._replace(history=noted(context.history, results))
        usable = [trial for trial in results if is_usable(trial)]
        usable = usable if context.best is None else [context.best, *usable]
        if not usable:
            return _start(context)
        best = min(usable, key=lambda trial: standing(trial, context.directions))
        if best is not context.best:
            active = list(parts(context.history.space, best.point))
            # All values of the part just changed are known: the round ends before it.
            after = active.index(context.path) + 1 if context.path in active else 0
            waiting = active[after:] + active[: max(after - 1, 0)]
            context = context._replace(best=best, waiting=tuple(waiting))
        return _next_part(context, levels)

    return stepwise(f"greedy(start={start!r}, levels={levels})", begin_at, proceed)


def _start(context: _Context) -> tuple[_Context, list[Point]]:
    space = context.history.space
    points, history = propose(context.history, 1, lambda rng: sample(space, rng))
    return context._replace(history=history), points


def _next_part(context: _Context, levels: int) -> tuple[_Context, list[Point]]:
    history, best = context.history, context.best
    assert best is not None
    active = parts(history.space, best.point)
    rng = generator(history.key, history.asked)
    while context.waiting:
        path, *waiting = context.waiting
        context = context._replace(path=path, waiting=tuple(waiting))
        others = [value for value in values(active[path], levels) if value != best.point[path]]
        points = [with_value(history.space, best.point, path, value, rng) for value in others]
        points = [point for point in points if frozen(point) not in history.seen]
        if points:
            return context, points
    return context, []
