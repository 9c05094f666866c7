"""Regularized evolution."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxcomp import checks
from jaxcomp.search.ranking import is_usable, standing
from jaxcomp.search.spaces import mutate, sample
from jaxcomp.search.spaces.moves import check_spread
from jaxcomp.search.strategies.history import History, begin, noted, propose
from jaxcomp.search.trials import Direction, Point, Strategy, Trial


class _State(NamedTuple):
    history: History
    directions: tuple[Direction, ...]
    population: tuple[Trial, ...]  # the youngest last


def evolution(population: Any = 8, sample_size: Any = 20, spread: Any = 0.2) -> Strategy:
    """Children of the best of a few drawn from the youngest: who is old leaves, however good.

    The first ``population`` points are drawn from the space. Each later one changes one part of the
    best of ``sample_size`` trials, drawn with replacement from the last ``population`` that did not
    fail. No point comes twice. Takes one objective and constraints; ends when it has asked all
    points of a space. The defaults suit tens to hundreds of evaluations: the paper takes 100 and 25
    for 20,000.

    Args:
        population: trials that can be parents.
        sample_size: how many compete to be one; more of them make it greedier.
        spread: of changes to numbers, see :func:`jaxcomp.search.spaces.mutate`; None draws anew.

    Returns:
        A strategy.

    Raises:
        TypeError: a setting is no number.
        ValueError: a setting is out of range; when it begins: there are several objectives.

    Example:
        >>> import jax
        >>> from jaxcomp.search import Integer, run
        >>> study = run(
        ...     Integer(0, 1000), lambda found: [abs(x - 700) for x in found],
        ...     evolution(population=10, sample_size=5, spread=0.1), objectives="minimize",
        ...     key=jax.random.key(0), stop=100,
        ... )
        >>> study.best.values[0] < 10
        True

    Real, Aggarwal, Huang and Le 2019, "Regularized evolution for image classifier architecture
    search", algorithm 1.
    """
    checks.check_count("population", population)
    checks.check_count("sample_size", sample_size)
    check_spread(spread)

    def init(space: Any, directions: tuple[Direction, ...], key: Any) -> _State:
        one_objective("evolution", directions)
        return _State(begin(space, key), directions, ())

    def ask(state: _State, count: int) -> tuple[list[Point], _State]:
        points: list[Point] = []
        history, space = state.history, state.history.space
        scores = [standing(trial, state.directions) for trial in state.population]

        def child(rng: Any) -> Point:
            drawn = rng.integers(len(scores), size=sample_size).tolist()
            parent = state.population[min(drawn, key=lambda i: scores[i])]
            return mutate(space, parent.point, rng, spread=spread)

        while len(points) < count:
            first = history.asked < population or not scores
            draw = (lambda rng: sample(space, rng)) if first else child
            new, history = propose(history, 1, draw)
            if not new:
                break
            points += new
        return points, state._replace(history=history)

    def tell(state: _State, trials: list[Trial]) -> _State:
        alive = (*state.population, *filter(is_usable, trials))[-population:]
        return state._replace(history=noted(state.history, trials), population=alive)

    settings = f"population={population}, sample_size={sample_size}, spread={spread}"
    return Strategy(init, ask, tell, f"evolution({settings})")


def one_objective(name: str, directions: Sequence[Direction]) -> None:
    """Raise where a strategy that takes one objective is given several.

    Raises:
        ValueError: there are several.

    Example:
        >>> one_objective("evolution", ("minimize", "minimize"))
        Traceback (most recent call last):
        ...
        ValueError: evolution takes one objective, not 2: make the others constraints, or use nsga2
    """
    if len(directions) != 1:
        raise ValueError(
            f"{name} takes one objective, not {len(directions)}: make the others constraints, or "
            "use nsga2"
        )
