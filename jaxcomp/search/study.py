"""A search from its first trial to its last, kept in a file as it goes."""

import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import checks
from jaxcomp.model.progress import watched
from jaxcomp.search import pareto, plots, records, shown, spaces
from jaxcomp.search.measures import Goal, as_goal, as_trial, results
from jaxcomp.search.ranking import Leaders, costs_of, follow, violation
from jaxcomp.search.spaces.points import settled
from jaxcomp.search.stop import Stop, as_stop, reason_to_stop
from jaxcomp.search.trials import Direction, Point, Strategy, Trial


class Study(NamedTuple):
    """What a search has found.

    Attributes:
        space: that was searched.
        objectives: directions of measures, by name.
        constraints: the most that a measure may be, by name.
        trials: in the order of their numbers.
        reason: why it ended: ``"evaluations"``, ``"seconds"`` or ``"patience"``, see
            :class:`jaxcomp.search.Stop`; ``"exhausted"``: the strategy has nothing left;
            ``"read"``: the study was read from its file.
    """

    space: Any
    objectives: dict[str, Direction]
    constraints: dict[str, float]
    trials: tuple[Trial, ...]
    reason: str

    @property
    def front(self) -> tuple[Trial, ...]:
        """Trials within the constraints than which none is better in everything.

        In the order of their numbers; of equal ones the first; empty if there are none.
        """
        able = [t for t in self.trials if t.status == "finished" and not violation(t)]
        costs, _ = costs_of(able, tuple(self.objectives.values()))
        first: dict[Any, Trial] = {}
        for trial, leads in zip(able, pareto.front(costs), strict=True):
            if leads:
                first.setdefault(trial.values, trial)
        return tuple(first.values())

    @property
    def best(self) -> Trial | None:
        """The best trial within the constraints; None if there is none.

        Raises:
            ValueError: there are several objectives.
        """
        if len(self.objectives) > 1:
            names = " and ".join(self.objectives)
            raise ValueError(f"best: {names} have no common order: take one of study.front")
        return next(iter(self.front), None)

    def candidate(self, trial: Any) -> Any:
        """What was evaluated: the space with values in the place of parts.

        Raises:
            TypeError: it is no trial, as ``study.best`` is none where none keeps the constraints.
        """
        if not isinstance(trial, Trial):
            raise TypeError(f"candidate: {trial!r:.60} is no trial: take one of study.trials")
        return spaces.decode(self.space, trial.point)

    def table(self) -> Any:
        """The front as a ``rich.table.Table``, see :func:`jaxcomp.search.shown.table`."""
        return shown.table(self)

    def plot(self, file: str | os.PathLike, *names: str) -> None:
        """The trials as an SVG file, see :func:`jaxcomp.search.plots.plot`."""
        plots.plot(self, file, *names)

    def __str__(self) -> str:
        counts = [
            f"{n} {status}"
            for status in ("finished", "stopped", "failed")
            if (n := sum(trial.status == status for trial in self.trials))
        ]
        head = f"{len(self.trials)} trials ({', '.join(counts) or 'none'}), ended by {self.reason}"
        rows = shown.rows(self)
        lines = [head, shown.text(self)] if len(rows) > 1 else [head]
        beyond = [violation(trial) for trial in self.trials if trial.status == "finished"]
        if len(rows) == 1 and beyond:
            least = f"{min(beyond):.3g}"
            lines.append(f"none within the constraints; the least violation is {least}")
        errors = [trial for trial in self.trials if trial.status == "failed"]
        lines += [f"first failure: trial {t.number}: {t.told.get('error')}" for t in errors[:1]]
        return "\n".join(lines)


def run(
    space: Any,
    evaluate: Any,
    strategy: Any,
    *,
    objectives: Any,
    key: Any,
    stop: Any,
    constraints: Any = None,
    file: Any = None,
    batch: Any = 1,
    progress: bool | None = None,
) -> Study:
    """Search a space.

    With a file nothing that finished is lost: each trial is on the disk before the next begins, and
    the same call reads them back and goes on as if it had not been killed. What was under way is
    evaluated again. What stops a search may be changed between runs, and so may ``batch``.

    Args:
        space: see :mod:`jaxcomp.search.spaces`.
        evaluate: takes a list of candidates and returns a result for each, in their order: a number
            where there is one objective and no constraint, else a dict of measures, which may hold
            more than is asked for: numbers, strings, lists. One that yields results instead has
            each kept as it comes. A candidate whose evaluation raises an error, or gives a NaN or
            an infinite objective, is recorded as failed; if it was one of a batch, those without
            a result are evaluated again one by one, to find out which. What
            ``"error"``, ``"stopped"`` and ``"violation"`` mean in a result, see
            :func:`jaxcomp.search.measures.as_trial`.
        strategy: what proposes candidates, see :mod:`jaxcomp.search.strategies`.
        objectives: ``{"accuracy": "maximize", "flops": "minimize"}``: measures and directions; or
            a direction alone, where ``evaluate`` returns numbers.
        key: a JAX key; the same one goes the same way.
        stop: a number of evaluations, or a :class:`jaxcomp.search.Stop`.
        constraints: ``{"bytes": 100_000}``: the most that a measure may be. What keeps them is
            better than what does not, and of two that do not, the one that is less beyond them.
        file: where to keep the study, or to go on with it; None: nowhere.
        batch: how many candidates ``evaluate`` gets at once, at most.
        progress: whether to show a bar on stderr; None: on a terminal, if it takes long.

    Returns:
        A study; with all trials of earlier runs too.

    Raises:
        TypeError: an argument is of the wrong kind; ``evaluate`` returns what is no result.
        ValueError: an argument is out of range; the file is of another study, or damaged; a result
            lacks an objective.
        BlockingIOError: another process is writing the file.
        KeyboardInterrupt: as it came; what is finished is in the file.

    Example:
        >>> from jaxcomp.search import Choice, Integer, run, strategies
        >>> space = {"width": Integer(8, 64, step=8), "act": Choice(("relu", "gelu"))}
        >>> def evaluate(candidates):
        ...     return [(each["width"] - 40) ** 2 + (each["act"] == "relu") for each in candidates]
        >>> study = run(
        ...     space, evaluate, strategies.evolution(population=8, sample_size=4),
        ...     objectives="minimize", key=jax.random.key(0), stop=16,
        ... )
        >>> study.candidate(study.best), study.reason
        ({'width': 40, 'act': 'gelu'}, 'evaluations')
    """
    goal, stop = as_goal(objectives, constraints), as_stop(stop)
    _check(space, evaluate, strategy, key, batch)
    search = _Search(space, evaluate, strategy, goal, stop, key, batch)
    check = lambda point: spaces.decode(space, point)
    # Before there is a file: a strategy may refuse the space or the objectives.
    state = strategy.init(space, tuple(goal.objectives.values()), key)
    with records.opened(file, _header(search), check) as log:
        trials, reasons = list(log.kept.trials), []
        items: Any = _noting(_rounds(search, state, log), reasons)
        if stop.evaluations is not None:
            items = _Counted(items, max(stop.evaluations - len(trials), 0))
        trials += watched(items, "searching", progress)
    return Study(space, goal.objectives, goal.constraints, tuple(trials), *reasons)


def load(file: Any, space: Any) -> Study:
    """A study from its file, which is left as it is; also while a search is writing it.

    Args:
        file: that :func:`run` wrote.
        space: that it was of.

    Returns:
        The study; without what was under way.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another space, damaged, or no study's.

    Example:
        >>> import tempfile
        >>> from jaxcomp.search import Integer, run, strategies
        >>> file = os.path.join(tempfile.mkdtemp(), "study.jsonl")
        >>> study = run(
        ...     Integer(1, 3), lambda found: found, strategies.grid(),
        ...     objectives="maximize", key=jax.random.key(0), stop=2, file=file,
        ... )
        >>> load(file, Integer(1, 3)).trials == study.trials
        True
    """

    def check_header(header: dict[str, Any]) -> None:
        if header.get("digest") != spaces.digest(space):
            raise ValueError(f"{os.fspath(file)}: of another space than this one: pass its own")

    header, kept = records.read(file, check_header, lambda point: spaces.decode(space, point))
    goal = as_goal(header.get("objectives"), header.get("constraints"))
    return Study(space, goal.objectives, goal.constraints, kept.trials, "read")


class _Search(NamedTuple):
    space: Any
    evaluate: Callable[[list[Any]], Any]
    strategy: Strategy
    goal: Goal
    stop: Stop
    key: Any
    batch: int


@dataclass(frozen=True)
class _Counted:
    """Items of which it is known how many come at most, for the progress bar."""

    items: Iterator[Any]
    most: int

    def __len__(self) -> int:
        return self.most

    def __iter__(self) -> Iterator[Any]:
        return self.items


def _noting(rounds: Generator[Trial, None, str], reasons: list[str]) -> Iterator[Trial]:
    """The trials; why they end is added to the list, and is none of what the bar counts."""
    reasons.append((yield from rounds))


def _rounds(search: _Search, state: Any, log: records.Log) -> Generator[Trial, None, str]:
    """Ask, evaluate, keep and tell, round by round; yields trials, returns why it ends."""
    start = time.monotonic()
    directions = tuple(search.goal.objectives.values())
    trials, pending, told = list(log.kept.trials), list(log.kept.pending), log.kept.told
    before = sum(trial.seconds for trial in trials)
    leaders = Leaders()
    for trial in trials:
        leaders = follow(leaders, trial, directions)
    state = search.strategy.tell(state, trials[:told]) if told else state
    limit = search.stop.evaluations
    while True:
        reason = reason_to_stop(search.stop, leaders, before + time.monotonic() - start)
        # What was asked for at once is evaluated before patience ends: also if a kill came between.
        if reason is not None and not (reason == "patience" and pending):
            return reason
        left = search.batch if limit is None else min(search.batch, limit - len(trials))
        if not pending:
            asked, state = search.strategy.ask(state, left)
            if not asked:
                return "exhausted"
            pending = _proper(search, asked)
            log.asked(pending)
        now, pending = pending[:left], pending[left:]
        candidates = [spaces.decode(search.space, point) for point in now]
        for point, (result, seconds) in zip(now, results(search.evaluate, candidates), strict=True):
            trial = as_trial(len(trials), point, result, seconds, search.goal)
            log.finished(trial)
            trials.append(trial)
            leaders = follow(leaders, trial, directions)
            yield trial
        if not pending:
            state = search.strategy.tell(state, trials[told:])
            told = len(trials)


def _proper(search: _Search, points: Any) -> list[Point]:
    """Points as the file keeps them; an error before it does where a strategy went astray."""
    try:
        return [settled(search.space, point) for point in points]
    except (TypeError, ValueError) as error:
        name = search.strategy.name
        raise type(error)(f"strategy {name}: asked for {points!r:.80}: {error}") from None


def _check(space: Any, evaluate: Any, strategy: Any, key: Any, batch: Any) -> None:
    spaces.every_part(space)
    checks.check_function("evaluate", evaluate, "a list of candidates, with a result for each")
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"strategy must be one, such as strategies.evolution(), not {strategy!r:.60}"
        )
    if not isinstance(strategy.name, str):
        raise TypeError(f"strategy: its name must be a string, not {strategy.name!r:.60}")
    checks.check_key(key)
    checks.check_count("batch", batch)


def _header(search: _Search) -> dict[str, Any]:
    key = search.key
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    return records.header_of(
        space=spaces.describe(search.space).split("\n"),
        digest=spaces.digest(search.space),
        objectives=search.goal.objectives,
        constraints=search.goal.constraints,
        strategy=search.strategy.name,
        key=np.asarray(key).tolist(),
    )
