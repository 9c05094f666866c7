"""NSGA-II: evolution towards several objectives at once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcomp import checks
from jaxcomp.search import pareto
from jaxcomp.search.ranking import costs_of, is_usable
from jaxcomp.search.spaces import cross, mutate, sample
from jaxcomp.search.spaces.moves import check_index
from jaxcomp.search.strategies.history import History, begin, noted, propose
from jaxcomp.search.trials import Direction, Point, Strategy, Trial


class _State(NamedTuple):
    history: History
    directions: tuple[Direction, ...]
    parents: tuple[Trial, ...]  # the best first
    children: tuple[Trial, ...]  # of the generation that is not yet full
    told: int


def nsga2(population: Any = 50, crossover: Any = 0.9, index: Any = 20) -> Strategy:
    """Generations of which the fronts survive, and of a front that is too long the least crowded.

    The first generation is drawn from the space. Each later point has as parents the winners of two
    tournaments of two among the survivors (front first, then crowding); it takes each part from
    either with probability ``crossover``, else all from the first; then one part is changed,
    numbers by polynomial mutation. When ``population`` trials were told since the last time, those
    that did not fail compete with the survivors for their places. No point comes twice. Takes one
    or more objectives and constraints; ends when it has asked all points of a space. A batch that
    reaches into the next generation has the survivors of the last one as parents; let it divide the
    population if that matters.

    Args:
        population: trials of a generation, and survivors of each.
        crossover: probability that a point has two parents.
        index: of polynomial mutation: the step of a number is 1 / (index + 2) of its range on
            average; None draws it anew.

    Returns:
        A strategy.

    Raises:
        TypeError: a setting is no number.
        ValueError: a setting is out of range.

    Example:
        >>> import jax
        >>> from jaxcomp.search import Continuous, run
        >>> study = run(
        ...     Continuous(-10, 10),
        ...     lambda found: [{"near": x**2, "far": (x - 2) ** 2} for x in found],
        ...     nsga2(population=10), objectives={"near": "minimize", "far": "minimize"},
        ...     key=jax.random.key(0), stop=100,
        ... )
        >>> all(-0.1 < trial.point[""] < 2.1 for trial in study.front), len(study.front) > 10
        (True, True)

    Deb, Pratap, Agarwal and Meyarivan 2002, "A fast and elitist multiobjective genetic algorithm:
    NSGA-II", section III; constraints as in section VI. Instead of their simulated binary crossover
    numbers come from either parent: on ZDT1 to 3 and with an optimum within the bounds that found
    no less.
    """
    checks.check_count("population", population, 2)
    checks.check_amount("crossover", crossover)
    if crossover > 1:
        raise ValueError(f"crossover is {crossover}, but must be a probability: at most 1")
    check_index(index)

    def init(space: Any, directions: tuple[Direction, ...], key: Any) -> _State:
        return _State(begin(space, key), directions, (), (), 0)

    def ask(state: _State, count: int) -> tuple[list[Point], _State]:
        space, parents = state.history.space, state.parents

        def winner(rng: Any) -> Point:
            return parents[rng.integers(len(parents), size=2).min()].point

        def child(rng: Any) -> Point:
            point = winner(rng)
            if rng.random() < crossover:
                point = cross(space, point, winner(rng), rng)
            return mutate(space, point, rng, index=index)

        draw = child if parents else lambda rng: sample(space, rng)
        points, history = propose(state.history, count, draw)
        return points, state._replace(history=history)

    def tell(state: _State, trials: list[Trial]) -> _State:
        state = state._replace(history=noted(state.history, trials))
        for trial in trials:
            children = (*state.children, trial) if is_usable(trial) else state.children
            state = state._replace(children=children, told=state.told + 1)
            if state.told % population == 0:
                every = (*state.parents, *state.children)
                parents = survivors(every, state.directions, population)
                state = state._replace(parents=parents, children=())
        return state

    settings = f"population={population}, crossover={crossover}, index={index}"
    return Strategy(init, ask, tell, f"nsga2({settings})")


def survivors(
    trials: Sequence[Trial], directions: Sequence[Direction], most: int
) -> tuple[Trial, ...]:
    """The trials that make the next generation, the best first.

    Args:
        trials: any that did not fail.
        directions: of the objectives.
        most: how many survive.

    Returns:
        Ordered by front, inside each by crowding, of equal ones as they came.

    Example:
        >>> found = [(0, 4), (1, 2), (1.2, 1.9), (4, 0), (5, 5)]
        >>> trials = [Trial(i, {}, values, "finished", 1.0, {}) for i, values in enumerate(found)]
        >>> [trial.number for trial in survivors(trials, ("minimize", "minimize"), 3)]
        [0, 3, 2]

    Deb et al. 2002, section III.C.
    """
    if not trials:
        return ()
    costs, violations = costs_of(trials, directions)
    rank = pareto.ranks(costs, violations)
    distance = np.zeros(len(rank))
    for each in range(rank.max() + 1):
        distance[rank == each] = pareto.crowding(costs[rank == each])
    order = np.lexsort((-distance, rank))[:most]
    return tuple(trials[i] for i in order.tolist())
