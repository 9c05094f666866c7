"""How far an amount of compression can go while a model stays as good as it has to be."""

import math
from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal, NamedTuple

from jaxcomp.checkpoint.records import Record, Records
from jaxcomp.checks import check_amount, check_count, is_number
from jaxcomp.model.progress import watched

Reason = Literal["tolerance", "highest", "lowest", "max_evaluations", "max_seconds", "interrupted"]
# What an amount comes to: parameters, and counts that tell it from what other amounts come to.
Candidate = Callable[[float], tuple[Callable[[], Any], tuple[int, ...]]]


class Trial(NamedTuple):
    """One amount that was tried.

    Attributes:
        asked: the amount.
        counts: what it came to.
        value: what ``evaluate`` returned; NaN where it failed.
        within: whether the value is within ``max_drop`` of the first.
        seconds: what it took.
    """

    asked: float
    counts: tuple[int, ...]
    value: float
    within: bool
    seconds: float


class Limits(NamedTuple):
    """Where and how long to look.

    Attributes:
        max_drop: by how much the value may fall.
        lowest: amounts below are not tried.
        highest: nor are those above.
        tolerance: where to stop halving.
        max_evaluations: how often to evaluate at most; None: as often as it takes.
        max_seconds: no evaluation begins after this much time in them; None: likewise.
    """

    max_drop: float
    lowest: float
    highest: float
    tolerance: float
    max_evaluations: int | None = None
    max_seconds: float | None = None


def check_limits(limits: Limits) -> None:
    """Raise unless limits are in range.

    Args:
        limits: amounts are from 0 to below 1.

    Raises:
        TypeError: one is no number.
        ValueError: one is out of range.

    Example:
        >>> check_limits(Limits(0.01, 0.5, 0.2, 0.01))
        Traceback (most recent call last):
        ...
        ValueError: lowest is 0.5, above highest, 0.2: exchange them
    """
    check_amount("max_drop", limits.max_drop)
    for name in ("lowest", "highest"):
        check_amount(name, getattr(limits, name))
        if getattr(limits, name) >= 1:
            raise ValueError(f"{name} is {getattr(limits, name)}: an amount is below 1")
    if not (is_number(limits.tolerance) and 1e-6 <= limits.tolerance < 1):
        raise ValueError(f"tolerance is in [1e-6, 1), not {limits.tolerance!r:.60}")
    if limits.lowest > limits.highest:
        raise ValueError(
            f"lowest is {limits.lowest}, above highest, {limits.highest}: exchange them"
        )
    if limits.max_evaluations is not None:
        check_count("max_evaluations", limits.max_evaluations)
    if limits.max_seconds is not None and limits.max_seconds != math.inf:
        check_amount("max_seconds", limits.max_seconds)


def find_highest(
    dense: Any,
    candidate: Candidate,
    evaluate: Callable[[Any], Any],
    limits: Limits,
    records: Records,
    *,
    clock: Callable[[], float],
    words: str = "looking for the highest amount",
    progress: bool | None = None,
) -> tuple[tuple[Trial, ...], Reason]:
    """The trials of a search for the highest amount whose value stays within bounds.

    Begins in the middle and goes up, halving what is left, as long as the drop is within bounds, or
    down until it is; then halves the interval between the highest amount that is and the lowest
    that is not. What comes to the same counts is evaluated once.

    Args:
        dense: what is evaluated first, and compared with.
        candidate: ``candidate(amount)`` returns a function that makes what is evaluated, and the
            counts that name it.
        evaluate: returns a number, higher is better; NaN and infinities count as failed.
        limits: see there.
        records: where finished evaluations are kept.
        clock: seconds that only rise.
        words: for the progress bar.
        progress: whether to show it on stderr; None: on a terminal, if it takes long.

    Returns:
        The trials in order, the dense one first, and why the search ended.

    Raises:
        TypeError: ``evaluate`` returns no real number.
        ValueError: it is not finite for the dense model.

    Example:
        >>> limits = Limits(0.1, 0.0, 0.9, 0.01)
        >>> candidate = lambda amount: (lambda: amount, (round(100 * amount),))
        >>> trials, reason = find_highest(
        ...     0.0, candidate, lambda amount: 1 - amount**2, limits, Records(None, {}, {}),
        ...     clock=lambda: 0.0,
        ... )
        >>> max(trial.asked for trial in trials if trial.within), reason
        (0.3125, 'tolerance')
    """

    def evaluated(make: Callable[[], Any], counts: tuple[int, ...]) -> Record:
        name = " ".join(map(str, counts)) or "dense"
        if name not in records.found:
            start = clock()
            value = _number(evaluate(make()))
            records.add({name: Record(counts, value, clock() - start)})
        return records.found[name]

    def trials() -> Iterator[Trial | Reason]:
        first = evaluated(lambda: dense, ())
        if not math.isfinite(first.value):
            raise ValueError(
                f"evaluate gave {first.value} for the dense parameters: there is nothing to compare"
            )
        seen: dict[tuple[int, ...], Trial] = {}
        yield Trial(0.0, (), first.value, True, first.seconds)
        spent, calls = first.seconds, 1
        proposals = _bisection(limits)
        asked = next(proposals)
        while True:
            make, counts = candidate(asked)
            if counts not in seen:
                if limits.max_evaluations is not None and calls >= limits.max_evaluations:
                    yield "max_evaluations"
                    return
                if limits.max_seconds is not None and spent >= limits.max_seconds:
                    yield "max_seconds"
                    return
                _, value, seconds = evaluated(make, counts)
                spent, calls = spent + seconds, calls + 1
                within = math.isfinite(value) and first.value - value <= limits.max_drop
                seen[counts] = Trial(asked, counts, value, within, seconds)
                yield seen[counts]
            try:
                asked = proposals.send(seen[counts].within)
            except StopIteration as end:
                yield end.value
                return

    history: list[Trial] = []
    reason: Reason = "interrupted"
    try:
        for found in watched(trials(), words, progress):
            if isinstance(found, Trial):
                history.append(found)
            else:
                reason = found
    except KeyboardInterrupt:
        if not history:
            raise
    return tuple(history), reason


def _bisection(limits: Limits) -> Generator[float, bool, Reason]:
    """Amounts to try; is sent whether each is within bounds, and returns why it ends."""
    now = min(max(0.5, limits.lowest), limits.highest)
    if (yield now):
        while True:
            good = now
            if good == limits.highest:
                return "highest"
            now = min(1 - (1 - good) / 2, limits.highest)
            if not (yield now):
                bad = now
                break
    else:
        while True:
            bad = now
            if bad == limits.lowest:
                return "lowest"
            now = bad / 2 if bad / 2 > max(limits.lowest, limits.tolerance) else limits.lowest
            if (yield now):
                good = now
                break
    while bad - good > limits.tolerance:
        now = (good + bad) / 2
        if (yield now):
            good = now
        else:
            bad = now
    return "tolerance"


def _number(value: Any) -> float:
    if not is_number(value):
        raise TypeError(
            f"evaluate must return one real number, higher is better, not {value!r:.60}: for a "
            "loss, lambda params: -loss(params)"
        )
    return float(value)
