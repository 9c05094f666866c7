"""From what an evaluation returns to a trial; what goes wrong in it is kept too."""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

from jaxcomp import checks
from jaxcomp.search.spaces.kinds import is_finite, plain
from jaxcomp.search.trials import Direction, Point, Trial

_RESERVED = ("violation", "stopped", "error")
_NONE = object()


class Goal(NamedTuple):
    """What a search is for.

    Attributes:
        objectives: directions of measures, by name.
        constraints: the most that a measure may be, by name.
    """

    objectives: dict[str, Direction]
    constraints: dict[str, float]


def as_goal(objectives: Any, constraints: Any) -> Goal:
    """Check objectives and constraints; a direction alone is that of the one number returned.

    Raises:
        TypeError: they are no mappings of names.
        ValueError: there are no objectives, a direction is unknown, a name reserved, or a limit no
            finite number.

    Example:
        >>> as_goal({"accuracy": "maximize"}, {"bytes": 100_000})
        Goal(objectives={'accuracy': 'maximize'}, constraints={'bytes': 100000.0})
        >>> as_goal("minimize", None).objectives
        {'value': 'minimize'}
    """
    if isinstance(objectives, str):
        objectives = {"value": objectives}
    constraints = {} if constraints is None else constraints
    for argument, given in (("objectives", objectives), ("constraints", constraints)):
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise TypeError(f"{argument} must be a mapping of measures' names, not {given!r:.60}")
        for name in _RESERVED:
            if name in given:
                raise ValueError(
                    f"{argument}: {name!r} means something else in a result: rename it"
                )
    if not objectives:
        raise ValueError("objectives is empty: say what to maximize or minimize")
    for name, direction in objectives.items():
        if direction not in ("minimize", "maximize"):
            raise ValueError(
                f"objectives: {name} is to be 'maximize' or 'minimize', not {direction!r:.40}"
            )
    for name, limit in constraints.items():
        if not checks.is_number(limit) or not is_finite(limit):
            raise ValueError(f"constraints: {name} is at most {limit!r:.40}: give a finite number")
    return Goal(dict(objectives), {name: float(limit) for name, limit in constraints.items()})


def results(
    evaluate: Callable[[list[Any]], Any], candidates: Sequence[Any]
) -> Iterator[tuple[Any, float]]:
    """What each candidate comes to, as soon as it is known, and the seconds it took.

    Args:
        evaluate: takes a list of candidates; returns a result for each, or yields them.
        candidates: to evaluate.

    Yields:
        The result, or the ``Exception`` that the candidate raises when evaluated alone.

    Raises:
        TypeError: ``evaluate`` returns nothing to go through.
        ValueError: as many results are not returned as there are candidates.

    Example:
        >>> [result for result, _ in results(lambda found: [1 / x for x in found], [0.5, 0.0])]
        [2.0, ZeroDivisionError('float division by zero')]
    """
    done = 0
    found = _attempt(evaluate, candidates)
    for result, seconds in found:
        if isinstance(result, _Raised):
            if len(candidates) == 1:
                yield result.error, seconds
                return
            break
        yield result, seconds
        done += 1
    else:
        return
    # One of those that are left raised it: which one is seen when each is evaluated by itself.
    for candidate in candidates[done:]:
        yield from results(evaluate, [candidate])


class _Raised(NamedTuple):
    error: Exception


def _attempt(
    evaluate: Callable[[list[Any]], Any], candidates: Sequence[Any]
) -> Iterator[tuple[Any, float]]:
    start = time.monotonic()
    try:
        given = evaluate(list(candidates))
    except Exception as error:
        yield _Raised(error), time.monotonic() - start
        return
    if isinstance(given, (str, Mapping)) or not hasattr(given, "__iter__"):
        raise TypeError(
            "evaluate takes a list of candidates and must return a list of as many results, not "
            f"{given!r:.60}"
        )
    at_once = isinstance(given, Sized)
    if at_once and len(given) != len(candidates):
        raise _miscounted(len(given), len(candidates))
    # A list was made all at once, so its time is shared; what yields takes its own.
    each = (time.monotonic() - start) / len(candidates)
    coming: Iterator[Any] = iter(given)  # pyright: ignore[reportCallIssue, reportArgumentType]
    last = len(candidates) - 1
    for done in range(len(candidates)):
        try:
            result = next(coming)
            # Asked once more before the last is kept: one too many shows that they do not match.
            too_many = done == last and next(coming, _NONE) is not _NONE
        except StopIteration:
            raise _miscounted(done, len(candidates)) from None
        except Exception as error:
            yield _Raised(error), time.monotonic() - start
            return
        if too_many:
            raise _miscounted(f"more than {len(candidates)}", len(candidates))
        yield result, each if at_once else time.monotonic() - start
        start = time.monotonic()


def _miscounted(found: Any, wanted: int) -> ValueError:
    return ValueError(
        f"evaluate returned {found} results for {wanted} candidates: return one for each, in their "
        'order; {"error": "why"} for one that failed'
    )


def as_trial(number: int, point: Point, result: Any, seconds: float, goal: Goal) -> Trial:
    """A trial from the result of its evaluation.

    Args:
        number: of the trial.
        point: that was evaluated.
        result: an exception; a number, where there is one objective; or measures by name, among
            them every objective and constraint. ``"error"``: it failed, in words; ``"stopped"``:
            True if it was given up early; ``"violation"``: added to that of the constraints.
            One that violates constraints may leave objectives out: it is then stopped.
        seconds: it took.
        goal: what is looked at.

    Returns:
        The trial; failed where an objective or a constraint is not finite.

    Raises:
        TypeError: the result or a measure is of a kind that cannot be kept.
        ValueError: an objective or a constraint is missing.

    Example:
        >>> goal = as_goal({"accuracy": "maximize"}, {"bytes": 100})
        >>> as_trial(0, {}, {"accuracy": 0.9, "bytes": 150}, 1.0, goal)
        Trial(number=0, point={}, values=(0.9,), status='finished', seconds=1.0,
              told={'bytes': 150, 'violation': 0.5})
        >>> as_trial(0, {}, {"accuracy": float("nan"), "bytes": 50}, 1.0, goal).told
        {'bytes': 50, 'error': 'accuracy is nan'}
    """
    if isinstance(result, Exception):
        return Trial(number, point, None, "failed", seconds, {"error": _words(result)})
    measures = _measures(result, goal)
    stopped, error = measures.pop("stopped", False), measures.pop("error", None)
    if not isinstance(stopped, bool):
        raise TypeError(f"evaluate: 'stopped' must be True or False, not {stopped!r:.40}")
    if not isinstance(error, (str, type(None))):
        raise TypeError(
            f"evaluate: 'error' says in words why a candidate failed; {error!r:.40} is a measure "
            "that needs another name"
        )
    told = {name: value for name, value in measures.items() if name not in goal.objectives}
    if error is not None:
        return Trial(number, point, None, "failed", seconds, {**told, "error": error})
    problem = next(
        (
            f"{name} is {measures[name]}"
            for name in (*goal.objectives, *goal.constraints, "violation")
            if name in measures and not _is_finite(name, measures[name])
        ),
        None,
    )
    if problem is not None:
        told.pop("violation", None)
        return Trial(number, point, None, "failed", seconds, {**told, "error": problem})
    violation = _violation(measures, goal.constraints)
    if violation:
        told["violation"] = violation
    missing = [name for name in goal.objectives if name not in measures]
    if missing and not violation:
        raise ValueError(
            f"evaluate: a result lacks {missing[0]!r}, which is an objective: return it"
        )
    values = None if missing else tuple(float(measures[name]) for name in goal.objectives)
    status = "stopped" if stopped or missing else "finished"
    return Trial(number, point, values, status, seconds, told)


def _measures(result: Any, goal: Goal) -> dict[str, Any]:
    result = plain(result)
    if checks.is_number(result):
        if len(goal.objectives) > 1 or goal.constraints:
            names = ", ".join((*goal.objectives, *goal.constraints))
            raise TypeError(f"evaluate: must return a dict of {names} each, not a number")
        return {next(iter(goal.objectives)): _plain("", result)}
    if not isinstance(result, Mapping) or not all(isinstance(name, str) for name in result):
        raise TypeError(
            f"evaluate: a result must be a number or a dict of measures by name, not {result!r:.60}"
        )
    return {name: _plain(name, value) for name, value in result.items()}


def _plain(name: str, value: Any) -> Any:
    """A measure as JSON can hold it; what is not finite in words, as JSON has no number for it."""
    value = plain(value)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        if is_finite(value):
            return value
        # A whole number beyond floats is no measure either, and Python may refuse to write it.
        return str(value) if isinstance(value, float) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}/{key}", sub) for key, sub in value.items()}
    if isinstance(value, (list, tuple)) or (hasattr(value, "tolist") and hasattr(value, "shape")):
        items = value if isinstance(value, (list, tuple)) else value.tolist()
        return [_plain(f"{name}/{i}", sub) for i, sub in enumerate(items)]
    raise TypeError(
        f"evaluate: the measure {name!r} is {type(value).__name__}, which a study's file cannot "
        "hold: return numbers, strings, bools, None, and lists and dicts of these"
    )


def _is_finite(name: str, value: Any) -> bool:
    if value in ("nan", "inf", "-inf"):
        return False
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"evaluate: {name!r} must be a number, not {value!r:.60}")
    if name == "violation" and value < 0:
        raise ValueError(f"evaluate: violation is {value}: 0 is no violation")
    return True


def _violation(measures: Mapping[str, Any], constraints: Mapping[str, float]) -> float:
    total = float(measures.get("violation", 0.0))
    for name, limit in constraints.items():
        if name not in measures:
            raise ValueError(f"evaluate: a result lacks {name!r}, which has a limit: return it")
        beyond = max(0.0, float(measures[name]) - limit)
        # As a fraction, so that bytes do not outweigh milliseconds: Deb et al. 2002, section VI.
        total += beyond / abs(limit) if limit else beyond
    return total


def _words(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error!s:.400}{place}"
