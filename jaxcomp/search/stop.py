"""When a search ends."""

import math
from typing import Any, Literal, NamedTuple

from jaxcomp import checks
from jaxcomp.search.ranking import Leaders

Reason = Literal["evaluations", "seconds", "patience", "exhausted"]


class Stop(NamedTuple):
    """Limits of a search; the first that is reached ends it. None: no limit.

    Attributes:
        evaluations: trials in all, those that an earlier run kept included.
        seconds: no round of evaluations begins after this much time in them, earlier runs included.
        patience: trials in a row that do not better the best; with several objectives, none of
            which joins the front.
    """

    evaluations: Any = None
    seconds: Any = None
    patience: Any = None


def as_stop(stop: Any) -> Stop:
    """Limits, of which evaluations alone may be given as a number.

    Raises:
        TypeError: they are neither, or a limit is no number.
        ValueError: a limit is out of range.

    Example:
        >>> as_stop(100)
        Stop(evaluations=100, seconds=None, patience=None)
    """
    if not isinstance(stop, Stop):
        if isinstance(stop, bool) or not checks.is_number(stop):
            raise TypeError(
                f"stop must be a number of evaluations or a Stop, not {stop!r:.60}: Stop() goes on "
                "until the strategy has nothing left"
            )
        stop = Stop(evaluations=stop)
    if stop.evaluations is not None:
        checks.check_count("stop.evaluations", stop.evaluations, 0)
    if stop.patience is not None:
        checks.check_count("stop.patience", stop.patience)
    if stop.seconds is not None and stop.seconds != math.inf:
        checks.check_amount("stop.seconds", stop.seconds)
    return stop


def reason_to_stop(stop: Stop, leaders: Leaders, seconds: float) -> Reason | None:
    """Which limit is reached.

    Args:
        stop: the limits.
        leaders: after all trials so far.
        seconds: spent so far.

    Returns:
        Its name; None if there is none.

    Example:
        >>> reason_to_stop(Stop(evaluations=8, patience=3), Leaders((), 5, 3), 0.0)
        'patience'
    """
    if stop.evaluations is not None and leaders.seen >= stop.evaluations:
        return "evaluations"
    if stop.seconds is not None and seconds >= stop.seconds:
        return "seconds"
    if stop.patience is not None and leaders.since >= stop.patience:
        return "patience"
    return None
