"""NetAdapt: down to a budget step by step, each step where it costs the least."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcomp import checks
from jaxcomp.search.ranking import is_usable, standing
from jaxcomp.search.spaces import decode, encode, frozen, generator, parts
from jaxcomp.search.strategies.evolution import one_objective
from jaxcomp.search.strategies.history import begin
from jaxcomp.search.strategies.steps import stepwise, values, with_value
from jaxcomp.search.trials import Direction, Point, Strategy, Trial


class _Context(NamedTuple):
    space: Any
    key: np.ndarray
    directions: tuple[Direction, ...]
    reduction: float  # of the cost, in each step
    cost: float  # of where the search is
    steps: int
    wanted: tuple[Point, ...]  # all of this step, those that earlier steps evaluated too
    known: Mapping[Any, Trial]


def netadapt(cost: Any, budget: Any, *, start: Any, step: Any = 0.1, levels: Any = 16) -> Strategy:
    """From a large candidate to a budget: each step takes from the part where it does least harm.

    Each step lowers the cost by a fraction of the start's. For each part by itself, the costliest
    value that meets the step's budget is evaluated; the best of these candidates is where the next
    step begins. Where no part alone meets it, the cheapest value of each is evaluated instead. Ends
    within the budget, or when nothing can become cheaper. Takes one objective and constraints.

    Args:
        cost: what a candidate costs, such as FLOPs, bytes or milliseconds of a table; it is called
            for many more candidates than are evaluated.
        budget: the most that the last candidate may cost.
        start: the candidate to begin with, commonly the largest.
        step: what each step takes away, as a fraction of the start's cost, above 0 and at most 1.
        levels: how many values of a number to look at, evenly spaced, where it has more.

    Returns:
        A strategy.

    Raises:
        TypeError: an argument is of the wrong kind, or a cost is no number.
        ValueError: an argument is out of range; when it begins: there are several objectives, or
            the start is not in the space.

    Example:
        >>> import jax
        >>> from jaxcomp.search import Integer, Repeat, run
        >>> space = Repeat(2, Integer(8, 64, step=8))
        >>> study = run(  # the first layer matters more
        ...     space, lambda found: [3 * first + last for first, last in found],
        ...     netadapt(sum, 64, start=[64, 64], step=0.125), objectives="maximize",
        ...     key=jax.random.key(0), stop=100,
        ... )
        >>> [study.candidate(study.trials[i]) for i in (1, 2, 3, 4, -1)]
        [[48, 64], [64, 48], [48, 48], [64, 32], [48, 16]]

    Yang, Howard, Chen, Zhang, Go, Sandler, Sze and Adam 2018, "NetAdapt: platform-aware neural
    network adaptation for mobile applications", algorithm 1.
    """
    checks.check_function("cost", cost, "a candidate that returns a number")
    checks.check_amount("budget", budget)
    checks.check_amount("step", step)
    if not 0 < step <= 1:
        raise ValueError(f"step is {step}, but must be above 0 and at most 1")
    checks.check_count("levels", levels, 2)

    def begin_at(
        space: Any, directions: tuple[Direction, ...], key: Any
    ) -> tuple[Any, list[Point]]:
        one_objective("netadapt", directions)
        point = encode(space, start)
        first = _cost(cost, space, point)
        key = begin(space, key).key
        context = _Context(space, key, directions, step * first, first, 0, (point,), {})
        return context, [point]

    def proceed(context: _Context, results: tuple[Trial, ...]) -> tuple[Any, list[Point]]:
        known = {**context.known, **{frozen(trial.point): trial for trial in results}}
        context = context._replace(known=known)
        while True:
            found = [known[frozen(point)] for point in context.wanted]
            usable = [trial for trial in found if is_usable(trial)]
            if not usable:
                return context, []
            best = min(usable, key=lambda trial: standing(trial, context.directions))
            now = _cost(cost, context.space, best.point)
            context = context._replace(cost=now, steps=context.steps + 1)
            wanted = _cheaper(cost, context, best.point, budget, levels) if now > budget else []
            context = context._replace(wanted=tuple(wanted))
            new = [point for point in wanted if frozen(point) not in known]
            if new or not wanted:
                return context, new

    settings = f"budget={budget}, start={start!r}, step={step}, levels={levels}"
    named = getattr(cost, "__name__", type(cost).__name__)
    return stepwise(f"netadapt({named}, {settings})", begin_at, proceed)


def _cheaper(
    cost: Callable[[Any], Any], context: _Context, point: Point, budget: float, levels: int
) -> list[Point]:
    """For each part the costliest change within the step's budget, else the cheapest of each."""
    goal = max(budget, context.cost - context.reduction)
    rng = generator(context.key, context.steps)
    within, beyond = [], []
    for path, part in parts(context.space, point).items():
        others = [value for value in values(part, levels) if value != point[path]]
        changed = [with_value(context.space, point, path, value, rng) for value in others]
        costs = [_cost(cost, context.space, each) for each in changed]
        pairs = list(zip(costs, changed, strict=True))
        if meets := [pair for pair in pairs if pair[0] <= goal]:
            within.append(max(meets, key=lambda pair: pair[0])[1])
        elif less := [pair for pair in pairs if pair[0] < context.cost]:
            beyond.append(min(less, key=lambda pair: pair[0])[1])
    return within or beyond


def _cost(cost: Callable[[Any], Any], space: Any, point: Point) -> float:
    candidate = decode(space, point)
    value = cost(candidate)
    if not checks.is_number(value) or not math.isfinite(value):
        raise TypeError(
            f"cost must return a finite number, not {value!r:.40}, for {candidate!r:.60}"
        )
    return float(value)
