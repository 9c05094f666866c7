"""How small is small enough: a budget, and the least removal that meets it.

Removals come as levels, each a little smaller than the one before
(:func:`~jaxcomp.prune.channels.selection.removal_order`). What is counted is bisected to the exact
level; what is timed is measured at few levels, each by the median of repeated runs.
"""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from jaxcomp.model.timing import milliseconds

_WORDS = {
    "flops": "FLOPs",
    "macs": "MACs",
    "parameters": "parameters",
    "bytes": "bytes",
    "milliseconds": "ms",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What the smaller model may cost at most: exactly one of these.

    Attributes:
        flops: floating-point operations of one call: an integer, or a float in (0, 1], the fraction
            of what the dense model takes.
        macs: multiply-accumulates, likewise.
        parameters: numbers in the parameter tree, likewise.
        bytes: bytes of the parameter tree, likewise.
        milliseconds: time of one call on this machine, measured; never a fraction.

    Raises:
        TypeError: not a number.
        ValueError: not exactly one field, or a number outside its range.

    Example:
        >>> Budget(flops=0.5).limit(dense=1001)
        500
        >>> Budget(parameters=0)
        Traceback (most recent call last):
        ...
        ValueError: Budget(parameters=0): give an integer of at least 1, or a fraction in (0, 1]
    """

    flops: int | float | np.integer | None = None
    macs: int | float | np.integer | None = None
    parameters: int | float | np.integer | None = None
    bytes: int | float | np.integer | None = None
    milliseconds: int | float | np.integer | None = None

    def __post_init__(self) -> None:
        given = [name for name in _WORDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a budget is exactly one of {', '.join(_WORDS)}, such as Budget(flops=0.5); "
                f"not {' and '.join(given) or 'none'}"
            )
        (name,) = given
        value = getattr(self, name)
        if isinstance(value, (bool, np.bool_)) or not isinstance(
            value, (int, float, np.integer, np.floating)
        ):
            raise TypeError(f"Budget({name}={value!r}): give a number")
        whole = isinstance(value, (int, np.integer))
        if name == "milliseconds":
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Budget(milliseconds={value}): give a time above 0")
        elif value < 1 if whole else not 0 < value <= 1:
            raise ValueError(
                f"Budget({name}={value}): give an integer of at least 1, or a fraction in (0, 1]"
            )

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(name for name in _WORDS if getattr(self, name) is not None)

    def limit(self, dense: int | float) -> int | float:
        """What the budget comes to for a model.

        Args:
            dense: what the dense model costs, in the budget's unit.

        Returns:
            The greatest cost that is within the budget; of a fraction, rounded down, with the
            fraction taken as the decimal that was written.

        Example:
            >>> Budget(macs=0.29).limit(dense=100), Budget(macs=7).limit(dense=100)
            (29, 7)
        """
        value = getattr(self, self.kind)
        if self.kind == "milliseconds":
            return float(value)
        if isinstance(value, (int, np.integer)):
            return int(value)
        return math.floor(Fraction(repr(float(value))) * Fraction(dense))


class Met(NamedTuple):
    """The least removal that meets a budget.

    Attributes:
        level: its level.
        selection: what is removed there.
        cost: what it costs.
        dense: what level 0 costs.
        limit: what it may cost.
        measured: every cost looked at, by level.
    """

    level: int
    selection: Any
    cost: int | float
    dense: int | float
    limit: int | float
    measured: dict[int, int | float]


def meet(
    budget: Budget, cost: Callable[[Any], int | float], select: Callable[[int], Any], levels: int
) -> Met:
    """The first level that is within a budget of FLOPs, MACs, parameters or bytes.

    Args:
        budget: the budget.
        cost: what a selection costs, in the budget's unit; falls, or stays, from level to level.
        select: the selection at a level.
        levels: the last level; level 0 removes nothing.

    Returns:
        The level; its cost is within the budget, that of the level before is not. Level 0 if the
        dense model fits. About ``log2(levels)`` costs are computed.

    Raises:
        ValueError: not even the last level is within the budget, or the budget is one of time.

    Example:
        >>> met = meet(Budget(parameters=0.5), lambda width: width**2, lambda n: 8 - n, levels=7)
        >>> met.level, met.selection, met.cost, met.limit
        (3, 5, 25, 32)
    """
    if budget.kind == "milliseconds":
        raise ValueError("a budget of milliseconds is measured, not counted: use meet_time")
    measured: dict[int, int | float] = {0: cost(select(0))}
    dense = measured[0]
    limit = budget.limit(dense)
    if dense <= limit:
        return Met(0, select(0), dense, dense, limit, measured)
    measured[levels] = cost(select(levels))
    if measured[levels] > limit:
        raise ValueError(_unmet(budget, limit, measured[levels], dense))
    dear, cheap = 0, levels
    while cheap - dear > 1:
        middle = (dear + cheap) // 2
        measured[middle] = cost(select(middle))
        dear, cheap = (dear, middle) if measured[middle] <= limit else (middle, cheap)
    return Met(cheap, select(cheap), measured[cheap], dense, limit, measured)


def meet_time(
    budget: Budget,
    prepare: Callable[[Any], Callable[[], Any]],
    select: Callable[[int], Any],
    levels: int,
    *,
    evaluations: int = 8,
    repeats: int = 9,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = True,
) -> Met:
    """The least removal among those tried that runs within a budget of milliseconds.

    Each level tried is compiled, run once unmeasured, and timed by the median of ``repeats`` runs;
    the level that is returned has been timed twice, and the median over both is within the budget.
    Time is noisy and does not fall evenly, so this halves the range of levels ``evaluations`` times
    at most and makes no claim about the levels between.

    Args:
        budget: a budget of milliseconds.
        prepare: makes a selection's model ready: returns a function that runs it once, to the end
            (``jax.block_until_ready``).
        select: the selection at a level.
        levels: the last level; level 0 removes nothing.
        evaluations: how many levels to try, with the dense model and the smallest.
        repeats: timed runs a try.
        clock: seconds that only rise.
        progress: whether to draw a progress bar on the terminal.

    Returns:
        The level; ``cost`` and ``dense`` are medians in milliseconds of this machine.

    Raises:
        ValueError: the smallest model is not within the budget, the budget is not one of time, or
            fewer than two levels or one run are to be tried.

    Example:
        >>> ticks = iter(range(1_000_000))
        >>> work = lambda width: lambda: [next(ticks) for _ in range(width)]
        >>> clock = lambda: next(ticks) / 1000
        >>> meet_time(Budget(milliseconds=6.5), work, lambda n: 8 - n, 7, clock=clock).selection
        5
    """
    if budget.kind != "milliseconds":
        raise ValueError(f"a budget of {_WORDS[budget.kind]} is counted, not measured: use meet")
    if evaluations < 2 or repeats < 1:
        raise ValueError(f"{evaluations} evaluations of {repeats} runs: try at least 2 of 1")
    limit = budget.limit(0)
    samples: dict[int, list[float]] = {}

    def medians() -> dict[int, int | float]:
        return {level: statistics.median(times) for level, times in samples.items()}

    def fits(level: int) -> bool:
        run = prepare(select(level))
        run()
        samples.setdefault(level, []).extend(milliseconds(run, clock) for _ in range(repeats))
        tick(f"level {level} of {levels}: {medians()[level]:.3g} ms")
        return medians()[level] <= limit

    with _bar(evaluations + 1, progress) as tick:
        fits(0)
        if levels and medians()[0] > limit:
            dear, cheap = 0, levels
            fits(levels)
            while cheap - dear > 1 and len(samples) < evaluations:
                middle = (dear + cheap) // 2
                dear, cheap = (dear, middle) if fits(middle) else (middle, cheap)
        # One median may be luck: what is returned is within the budget over two rounds.
        for level in sorted(samples):
            if (medians()[level] <= limit or level == levels) and fits(level):
                found = medians()
                return Met(level, select(level), found[level], found[0], limit, found)
    found = medians()
    raise ValueError(_unmet(budget, limit, min(found.values()), found[0]))


def _unmet(budget: Budget, limit: int | float, least: int | float, dense: int | float) -> str:
    unit = _WORDS[budget.kind]
    show = (lambda cost: f"{cost:.3g}") if budget.kind == "milliseconds" else "{:,}".format
    return (
        f"the budget of {show(limit)} {unit} cannot be met: the least that keep, limits and "
        f"round_to allow is {show(least)} {unit}, of the dense model's {show(dense)}: "
        "ask for that, or loosen them"
    )


@contextlib.contextmanager
def _bar(total: int, visible: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar as a function of what was just done."""
    # Imported where it is drawn: `import jaxcomp` stays quick.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<32}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not visible) as progress:
        task = progress.add_task("timing the dense model", total=total)
        yield lambda words: progress.update(task, advance=1, description=words)
