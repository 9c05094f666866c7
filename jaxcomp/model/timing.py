"""How long something takes on this machine."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def milliseconds(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """The time of one run.

    Args:
        run: what to time; it waits for its own results (``jax.block_until_ready``).
        clock: gives seconds.

    Returns:
        Milliseconds.

    Example:
        >>> ticks = iter([1.0, 1.5])
        >>> milliseconds(lambda: None, clock=lambda: next(ticks))
        500.0
    """
    start = clock()
    run()
    return (clock() - start) * 1000


def median_milliseconds(
    run: Callable[[], Any],
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The median time of several runs, after some that do not count.

    Args:
        run: as for :func:`milliseconds`.
        repeats: runs that count.
        warm_up: runs before them.
        clock: gives seconds.

    Returns:
        Milliseconds.

    Example:
        >>> ticks = iter([0, 9, 0, 1, 0, 3, 0, 2.0])
        >>> median_milliseconds(lambda: None, repeats=3, clock=lambda: next(ticks))
        2000.0
    """
    for _ in range(warm_up):
        milliseconds(run, clock)
    return statistics.median(milliseconds(run, clock) for _ in range(repeats))
