"""Optuna's samplers as strategies, and its storage for several machines with one study."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxcomp.search.ranking import violation
from jaxcomp.search.spaces import frozen, generator, mutate, walk
from jaxcomp.search.spaces.kinds import Choice, Continuous, Integer, Part
from jaxcomp.search.strategies.history import History, begin, noted, unseen, with_points
from jaxcomp.search.trials import Direction, Point, Strategy, Trial

_ID, _TOLD = "jaxcomp", "told"
_TRIES = 4
# These keep notes between trials in Optuna's storage, which telling the trials does not bring back.
_NOTING = ("CmaEs", "NSGAII", "NSGAIII", "QMC", "Grid", "BruteForce")


class _State(NamedTuple):
    history: History
    directions: tuple[Direction, ...]
    trials: tuple[Trial, ...]
    # Optuna's study cannot be copied cheaply. How many trials it held in this state tells whether
    # somebody went on from an earlier one with it; it is then made anew from the trials.
    study: Any
    size: int
    waiting: dict[int, tuple[Point, Any]]  # by number: asked, not yet told


def optuna(
    sampler: Any = None,
    *,
    storage: Any = None,
    study_name: Any = None,
) -> Strategy:
    """A sampler of Optuna, by default its tree-structured Parzen estimator.

    Conditional parts are asked for as the space is walked, which is what Optuna calls
    define-by-run. Where the sampler proposes a point again, it is asked with other seeds, and in
    the end a neighbour is taken. A trial that was stopped is to Optuna a pruned one. Takes one or
    more objectives and constraints as the sampler does; ends when it has asked all points.

    With a ``storage``, all machines that name it and ``study_name`` learn from each other's trials.
    Each needs a key and a file of its own, and what it proposes depends on when the others
    finish. :func:`optuna_trials` gives the trials of all.

    Args:
        sampler: makes a sampler from a seed, ``lambda seed: GPSampler(seed=seed)``; it is called
            for each point, so that a resumed search goes the same way. Samplers that keep notes
            (CMA-ES, NSGA-II and -III, QMC, grid, brute force) need a storage.
        storage: Optuna's URL, ``"sqlite:///study.db"``, or one of its storages.
        study_name: in the storage.

    Returns:
        A strategy.

    Raises:
        ImportError: Optuna is not installed.
        TypeError: ``sampler`` is no function that makes samplers.
        ValueError: there is a storage without a name of the study, or no storage though the sampler
            needs one; when it begins: the stored study has other directions.

    Example:
        >>> import jax
        >>> from jaxcomp.search import Continuous, run
        >>> study = run(
        ...     {"rate": Continuous(1e-4, 1, log=True)},
        ...     lambda found: [abs(each["rate"] - 0.01) for each in found],
        ...     optuna(), objectives="minimize", key=jax.random.key(0), stop=30,
        ... )
        >>> study.best.values[0] < 0.005
        True

    Akiba, Sano, Yanase, Ohta and Koyama 2019, "Optuna: a next-generation hyperparameter
    optimization framework"; the estimator: Bergstra, Bardenet, Bengio and Kégl 2011, "Algorithms
    for hyper-parameter optimization", section 4.
    """
    library = optuna_library("strategies.optuna")
    make = (lambda seed: library.samplers.TPESampler(seed=seed)) if sampler is None else sampler
    kind = _check_sampler(library, make)
    if storage is None and study_name is not None:
        raise ValueError("study_name without storage: name the storage that the study is in")
    if storage is not None and not study_name:
        raise ValueError("storage without study_name: name the study that machines share")
    if storage is None and kind.removesuffix("Sampler") in _NOTING:
        raise ValueError(
            f"sampler: {kind} keeps notes in Optuna's storage, without which it would begin anew "
            "after a kill: give storage='sqlite:///study.db' and study_name"
        )

    def init(space: Any, directions: tuple[Direction, ...], key: Any) -> _State:
        history = begin(space, key)
        study = _study(library, directions, storage, study_name)
        return _State(history, directions, (), study, _size(study), {})

    def fresh(state: _State) -> _State:
        if storage is not None or _size(state.study) == state.size:
            return state
        study = _study(library, state.directions, None, None)
        _add(library, study, state.history, state.trials)
        waiting = {
            n: (point, _enqueue(state, study, point)) for n, (point, _) in state.waiting.items()
        }
        return state._replace(study=study, size=_size(study), waiting=waiting)

    def ask(state: _State, count: int) -> tuple[list[Point], _State]:
        state = fresh(state)
        points: list[Point] = []
        for _ in range(count):
            if len(state.history.seen) >= state.history.points:
                break
            point, trial = _proposed(library, make, state)
            number = state.history.asked
            trial.set_user_attr(_ID, _name(state.history, number))
            points.append(point)
            state = state._replace(
                history=state.history._replace(
                    asked=number + 1, seen=with_points(state.history.seen, [point])
                ),
                waiting={**state.waiting, number: (point, trial)},
                size=_size(state.study),
            )
        return points, state

    def tell(state: _State, trials: list[Trial]) -> _State:
        state = fresh(state)
        waiting = dict(state.waiting)
        strange = []
        for trial in trials:
            point, asked = waiting.pop(trial.number, (None, None))
            if asked is not None and point == trial.point:
                _finish(library, state.study, asked, trial)
            else:
                strange.append(trial)
        _add(library, state.study, state.history, strange, shared=storage is not None)
        return _State(
            noted(state.history, trials),
            state.directions,
            (*state.trials, *trials),
            state.study,
            _size(state.study),
            waiting,
        )

    where = "" if storage is None else f", study_name={study_name!r}"
    return Strategy(init, ask, tell, f"optuna({kind}{where})")


def optuna_trials(space: Any, storage: Any, study_name: str) -> list[Trial]:
    """The trials of all machines that share a study.

    Args:
        space: that they search.
        storage: as in :func:`optuna`.
        study_name: likewise.

    Returns:
        Those that are done, by Optuna's numbers. ``Study(...)._replace(trials=...)`` makes a table,
        a front and a plot of them.

    Raises:
        ImportError: Optuna is not installed.
        KeyError: there is no such study.
        ValueError: a trial is not of the space.
    """
    library = optuna_library("strategies.optuna")
    study = library.load_study(study_name=study_name, storage=storage)
    states = library.trial.TrialState
    status: dict[Any, Any] = {
        states.COMPLETE: "finished",
        states.PRUNED: "stopped",
        states.FAIL: "failed",
    }
    found = []
    for each in study.get_trials(deepcopy=False):
        if each.state not in status or _TOLD not in each.user_attrs:
            continue

        def choose(path: str, part: Part, each=each) -> int | float:
            if _param(path) not in each.params:
                raise ValueError(
                    f"{path}: trial {each.number} of {study_name!r} has no value for it: it is of "
                    "another space"
                )
            return _value(part, each.params[_param(path)])

        values = None if each.values is None else tuple(each.values)
        spent = each.user_attrs.get("seconds", 0.0)
        told = dict(each.user_attrs[_TOLD])
        point = walk(space, choose)[1]
        found.append(Trial(each.number, point, values, status[each.state], spent, told))
    return found


def optuna_library(who: str) -> Any:
    """Optuna, which is imported only where it is wanted."""
    try:
        import optuna as library
    except ImportError as error:
        raise ImportError(f"{who} needs Optuna: pip install 'jaxcomp[search]'") from error
    return library


def _check_sampler(library: Any, make: Any) -> str:
    made = make(0) if callable(make) and not isinstance(make, type) else None
    if not isinstance(made, library.samplers.BaseSampler):
        raise TypeError(
            "sampler must make one of Optuna's from a seed, as lambda seed: TPESampler(seed=seed) "
            f"does, not {make!r:.60}"
        )
    return type(made).__name__


@contextmanager
def quiet(library: Any) -> Iterator[None]:
    """Without the line that Optuna logs for each study it begins."""
    before = library.logging.get_verbosity()
    library.logging.set_verbosity(library.logging.WARNING)
    try:
        yield
    finally:
        library.logging.set_verbosity(before)


def _study(library: Any, directions: tuple[Direction, ...], storage: Any, name: Any) -> Any:
    with quiet(library):
        study = library.create_study(
            directions=list(directions), storage=storage, study_name=name, load_if_exists=True
        )
    stored = tuple(way.name.lower() for way in study.directions)
    if stored != directions:
        raise ValueError(
            f"study_name: {name!r} is there already, with directions {', '.join(stored)}, not "
            f"{', '.join(directions)}: choose another name"
        )
    return study


def _size(study: Any) -> int:
    return len(study.get_trials(deepcopy=False))


def _name(history: History, number: int) -> str:
    return f"{'-'.join(map(str, history.key.tolist()))}/{number}"


def _proposed(library: Any, make: Callable[[int], Any], state: _State) -> tuple[Point, Any]:
    """A new point of the sampler's, and Optuna's trial of it."""
    history, study = state.history, state.study
    seeds = generator(history.key, history.asked, 1).integers(2**31, size=_TRIES).tolist()
    point: Point = {}
    for seed in seeds:
        study.sampler = make(seed)
        trial = study.ask()
        point = walk(history.space, lambda path, part, trial=trial: _suggest(trial, path, part))[1]
        if frozen(point) not in history.seen:
            return point, trial
        study.tell(trial, state=library.trial.TrialState.FAIL)
        if not point:
            break
    near = unseen(history, lambda rng: mutate(history.space, point, rng))
    return near, _enqueue(state, study, near)


def _enqueue(state: _State, study: Any, point: Point) -> Any:
    """Optuna's trial of a point that is known already."""
    params: dict[str, Any] = {}

    def note(path: str, part: Part) -> int | float:
        params[_param(path)] = _stored(part, point[path])
        return point[path]

    walk(state.history.space, note)
    study.enqueue_trial(params)
    trial = study.ask()
    walk(state.history.space, lambda path, part: _suggest(trial, path, part))
    return trial


def _suggest(trial: Any, path: str, part: Part) -> int | float:
    name = _param(path)
    if isinstance(part, Choice):
        return _value(part, trial.suggest_categorical(name, part.names))
    if isinstance(part, Continuous):
        return _value(part, trial.suggest_float(name, part.low, part.high, log=part.log))
    low, high, step = _bounds(part)
    return _value(part, trial.suggest_int(name, low, high, step=step, log=part.log))


def _distribution(library: Any, part: Part) -> Any:
    kinds = library.distributions
    if isinstance(part, Choice):
        return kinds.CategoricalDistribution(part.names)
    if isinstance(part, Continuous):
        return kinds.FloatDistribution(part.low, part.high, log=part.log)
    low, high, step = _bounds(part)
    return kinds.IntDistribution(low, high, step=step, log=part.log)


def _param(path: str) -> str:
    return path or "(space)"


def _bounds(part: Integer) -> tuple[int, int, int]:
    """Optuna knows no steps in the logarithm: there steps are counted."""
    if not part.log:
        return part.low, part.high, part.step
    low = max(1, round(part.low / part.step))
    return low, low + (part.high - part.low) // part.step, 1


def _stored(part: Part, value: int | float) -> Any:
    if isinstance(part, Choice):
        return part.names[int(value)]
    if isinstance(part, Continuous) or not part.log:
        return value
    return _bounds(part)[0] + int(value - part.low) // part.step


def _value(part: Part, stored: Any) -> int | float:
    if isinstance(part, Choice):
        return part.names.index(stored)
    if isinstance(part, Continuous):
        return min(max(float(stored), part.low), part.high)
    if not part.log:
        return int(stored)
    return part.low + (int(stored) - _bounds(part)[0]) * part.step


def _finish(library: Any, study: Any, asked: Any, trial: Trial) -> None:
    """Tell Optuna what a trial that it proposed came to."""
    states = library.trial.TrialState
    asked.set_user_attr(_TOLD, trial.told)
    asked.set_user_attr("seconds", trial.seconds)
    # To Optuna a constraint is kept at 0 and below.
    asked.set_constraint("violation", violation(trial))
    if trial.status == "finished":
        study.tell(asked, list(trial.values or ()))
    elif trial.status == "stopped" and trial.values is not None and len(trial.values) == 1:
        asked.report(trial.values[0], step=0)
        study.tell(asked, state=states.PRUNED)
    else:
        study.tell(asked, state=states.FAIL)


def _add(library: Any, study: Any, history: History, trials: Any, shared: bool = False) -> None:
    """Give Optuna trials that it did not propose, or in a process that is no more."""
    states = library.trial.TrialState
    stored = {}
    if shared and trials:
        for each in study.get_trials(deepcopy=False):
            if each.user_attrs.get(_ID):
                stored[each.user_attrs[_ID]] = each
    for trial in trials:
        params, distributions = {}, {}

        def note(path: str, part: Part, trial=trial, params=params, distributions=distributions):
            params[_param(path)] = _stored(part, trial.point[path])
            distributions[_param(path)] = _distribution(library, part)
            return trial.point[path]

        walk(history.space, note)
        name = _name(history, trial.number)
        old = stored.get(name)
        if old is not None and old.params == params:
            if old.state.is_finished() and _TOLD in old.user_attrs:
                continue
            if not old.state.is_finished():
                study.tell(old.number, state=states.FAIL)  # of a process that was killed
        one = trial.values is not None and len(trial.values) == 1
        pruned = trial.status == "stopped" and one
        state = {"finished": states.COMPLETE}.get(
            trial.status, states.PRUNED if pruned else states.FAIL
        )
        study.add_trial(
            library.trial.create_trial(
                state=state,
                values=None if state == states.FAIL else list(trial.values or ()),
                params=params,
                distributions=distributions,
                user_attrs={_ID: name, _TOLD: trial.told, "seconds": trial.seconds},
                intermediate_values={0: trial.values[0]} if pruned and trial.values else None,
                constraints={"violation": violation(trial)},
            )
        )
