"""Values of one part as numbers from 0 to 1, and back: how they are drawn, stepped and listed."""

import math
from typing import Any

from jaxcomp import checks
from jaxcomp.search.spaces.kinds import Choice, Continuous, Integer, Part


def size(part: Part, levels: int | None = None) -> int | float:
    """How many values a part has.

    Args:
        part: a choice, an integer or a continuous part.
        levels: of a continuous part, evenly spaced (in the logarithm where it is drawn so).

    Returns:
        An int; ``math.inf`` for a continuous part without ``levels``.

    Example:
        >>> size(Integer(8, 64, step=8)), size(Continuous(0, 1)), size(Continuous(0, 1), levels=5)
        (8, inf, 5)
    """
    if isinstance(part, Choice):
        return len(part.spaces)
    if isinstance(part, Integer):
        return (part.high - part.low) // part.step + 1
    if part.low == part.high:
        return 1
    return math.inf if levels is None else levels


def nth(part: Part, index: int, levels: int | None = None) -> int | float:
    """The value at a position among :func:`size`.

    Example:
        >>> nth(Integer(8, 64, step=8), 2), nth(Continuous(0.001, 0.1, log=True), 1, levels=3)
        (24, 0.01)
    """
    if isinstance(part, Choice):
        return index
    if isinstance(part, Integer):
        return part.low + part.step * index
    last = size(part, levels) - 1
    return from_unit(part, index / last if last else 0.5)


def from_unit(part: Part, unit: float) -> int | float:
    """The value of a part for a number from 0 to 1: an even one draws the part as it is declared.

    Args:
        part: a choice, an integer or a continuous part.
        unit: 0 gives the first value, 1 the last.

    Example:
        >>> from_unit(Choice(("a", "b", "c")), 0.5), from_unit(Continuous(1e-4, 1.0, log=True), 0.5)
        (1, 0.01)
    """
    if isinstance(part, Continuous):
        if part.log:
            value = math.exp(_between(math.log(part.low), math.log(part.high), unit))
            # What stands beside exact bounds is told to twelve digits: 0.01, not 0.010000000000002.
            value = float(f"{value:.12g}")
        else:
            value = _between(part.low, part.high, unit)
        return min(max(value, part.low), part.high)
    last = int(size(part)) - 1
    if isinstance(part, Integer) and part.log:
        low, high = (math.log(edge) for edge in _edges(part))
        position = round((math.exp(_between(low, high, unit)) - part.low) / part.step)
        # Of the largest numbers logarithms are a few off: both ends are what they are told to be.
        return nth(part, last if unit >= 1 else min(max(position, 0), last))
    return nth(part, min(int(unit * (last + 1)), last))


def to_unit(part: Part, value: int | float) -> float:
    """The number from 0 to 1 that gives a value back: the middle of those, where there are many.

    Args:
        part: a choice, an integer or a continuous part.
        value: one of its values.

    Example:
        >>> to_unit(Integer(1, 4), 1), to_unit(Continuous(0, 10), 2.5)
        (0.125, 0.25)
    """
    if isinstance(part, Choice):
        return (value + 0.5) / len(part.spaces)
    if isinstance(part, Integer) and not part.log:
        return ((value - part.low) // part.step + 0.5) / size(part)
    if part.low == part.high:
        return 0.5
    if not part.log:
        return (value / 2 - part.low / 2) / (part.high / 2 - part.low / 2)
    low, high = _edges(part) if isinstance(part, Integer) else (part.low, part.high)
    return min(_log_ratio(value, low) / _log_ratio(high, low), 1.0)


def settle(path: str, part: Part, value: Any) -> int | float:
    """A value of a part as a plain number, or an error that names the part's path.

    Raises:
        TypeError: it is not a number of the kind.
        ValueError: it is none of the part's values.

    Example:
        >>> settle("width", Integer(8, 64, step=8), 12)
        Traceback (most recent call last):
        ...
        ValueError: width: 12 is not among 8, 16, …, 64
    """
    if isinstance(part, Continuous):
        if not checks.is_number(value):
            raise TypeError(f"{named(path)}: must be a number, not {value!r:.60}")
        if not part.low <= value <= part.high:
            raise ValueError(f"{named(path)}: {value} is not within {words(part)}")
        return float(value)
    what = "the position of an option" if isinstance(part, Choice) else "a whole number"
    if type(value) is not int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{named(path)}: must be {what}, not {value!r:.60}")
        value = int(value)
    if isinstance(part, Choice):
        if not 0 <= value < len(part.spaces):
            last = len(part.spaces) - 1
            raise ValueError(f"{named(path)}: {value} is {what} that is not there: 0 to {last} are")
    elif not part.low <= value <= part.high or (value - part.low) % part.step:
        raise ValueError(f"{named(path)}: {value} is not among {words(part)}")
    return value


def named(path: str) -> str:
    """A path for messages; the part that is the whole space has an empty one."""
    return path or "the space"


def words(part: Integer | Continuous) -> str:
    """The values of a number in words.

    Example:
        >>> words(Integer(1, 3)), words(Integer(8, 512, 8, log=True)), words(Continuous(0, 0.5))
        ('1 to 3', '8, 16, …, 512 (log)', '0.0 to 0.5')
        >>> words(Integer(32, 64, step=32))
        '32 or 64'
    """
    log = " (log)" if part.log else ""
    if isinstance(part, Integer) and part.high - part.low == part.step > 1:
        return f"{part.low} or {part.high}{log}"
    if isinstance(part, Integer) and part.step > 1 and part.high > part.low:
        return f"{part.low}, {part.low + part.step}, …, {part.high}{log}"
    return f"{part.low} to {part.high}{log}"


def _between(low: float, high: float, unit: float) -> float:
    return low * (1 - unit) + high * unit


def _log_ratio(above: float, below: float) -> float:
    # Of numbers next to each other only the quotient is exact; of far ones it is beyond floats.
    quotient = above / below
    return math.log(quotient) if quotient < math.inf else math.log(above) - math.log(below)


def _edges(part: Integer) -> tuple[float, float]:
    # Each value stands for what is rounded to it; half of the lowest where that would reach 0.
    return max(part.low - part.step / 2, part.low / 2), part.high + part.step / 2
