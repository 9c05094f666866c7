"""The table of strategies that every contract test runs through, and what they search."""

import dataclasses
from collections.abc import Callable

import jax

from jaxcomp.search import Choice, Integer, Repeat, Strategy, Trial, spaces, strategies

KEY = jax.random.key(7)
CONDITIONAL = {
    "width": Integer(8, 64, step=8, log=True),
    "act": Choice({"relu": None, "leaky": {"slope": Choice((0.01, 0.1, 0.3))}}),
    "layers": Repeat(Integer(1, 3), Choice((16, 32))),
    "seed": 3,
}
TINY = {
    "act": Choice({"relu": None, "leaky": {"slope": Choice((0.01, 0.1))}}),
    "depth": Integer(1, 2),
}
LARGEST = {"width": 64, "act": {"leaky": {"slope": 0.3}}, "layers": [32, 32, 32], "seed": 3}


def cost(candidate) -> float:
    """The sum of all numbers in a candidate: what grows with every part."""
    if isinstance(candidate, dict):
        return sum(map(cost, candidate.values()))
    if isinstance(candidate, list):
        return sum(map(cost, candidate))
    return 0.0 if isinstance(candidate, str) else float(candidate)


def tpe() -> Strategy:
    import optuna

    return strategies.optuna(lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=3))


@dataclasses.dataclass(frozen=True)
class Case:
    """A strategy and what is known about it beforehand."""

    name: str
    make: Callable[[], Strategy]
    several: bool = True  # objectives
    random: bool = True  # another key goes another way
    complete: bool = True  # asks all points of a space
    needs: str = "jax"

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("random", strategies.random),
    Case("grid", lambda: strategies.grid(levels=3), random=False),
    Case("greedy", strategies.greedy, several=False, complete=False),
    Case(
        "greedy-from",
        lambda: strategies.greedy(start=LARGEST, levels=3),
        several=False,
        random=False,
        complete=False,
    ),
    Case(
        "netadapt",
        lambda: strategies.netadapt(cost, 40, start=LARGEST, step=0.15),
        several=False,
        random=False,
        complete=False,
    ),
    Case("evolution", lambda: strategies.evolution(5, 3), several=False),
    Case("evolution-near", lambda: strategies.evolution(4, 2, spread=0.1), several=False),
    Case("nsga2", lambda: strategies.nsga2(5)),
    Case("nsga2-anew", lambda: strategies.nsga2(4, crossover=0.5, index=None)),
    Case("optuna", tpe, needs="optuna"),
]


def measured(candidate) -> dict[str, float]:
    """Two objectives that disagree, of a candidate of CONDITIONAL or TINY."""
    size = cost(candidate)
    return {"loss": abs(size - 61.5), "size": size, "kept": 1.0}


def trial(number: int, point, values, status="finished", **told) -> Trial:
    return Trial(number, point, values, status, 0.0, told)


def driven(strategy, space, directions, total, batch=1, known=()) -> list[Trial]:
    """Trials of a search without a file; ``known``: those that were told before it begins."""
    state = strategy.init(space, directions, KEY)
    trials = list(known)
    if trials:
        state = strategy.tell(state, trials)
    while len(trials) < total:
        points, state = strategy.ask(state, batch)
        if not points:
            break
        news = []
        for point in points:
            number = len(trials) + len(news)
            found = measured(spaces.decode(space, point))
            values = (found["loss"], found["size"])[: len(directions)]
            broken = number % 6 == 4
            news.append(
                trial(number, point, None, "failed", error="x")
                if broken
                else trial(number, point, values, violation=max(0.0, found["size"] - 70))
            )
        state = strategy.tell(state, news)
        trials += news
    return trials
