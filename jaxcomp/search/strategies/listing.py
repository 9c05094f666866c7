"""The points of a space in their order, one from the other, so that no list of them is kept."""

from typing import Any

from jaxcomp.search.spaces import Continuous, Integer, parts, size, to_unit, walk
from jaxcomp.search.spaces.kinds import Part
from jaxcomp.search.spaces.numbers import nth
from jaxcomp.search.trials import Point


def first(space: Any, levels: int | None = None) -> Point:
    """The point that :func:`jaxcomp.search.spaces.enumerate_points` gives first.

    Args:
        space: any; without ``levels``, without continuous parts.
        levels: how many values of each continuous part count.

    Example:
        >>> from jaxcomp.search.spaces import Choice
        >>> first({"depth": Integer(1, 2), "act": Choice(("relu", "gelu"))})
        {'depth': 1, 'act': 0}
    """
    return walk(space, lambda path, part: nth(part, 0, levels))[1]


def following(space: Any, point: Point, levels: int | None = None) -> Point | None:
    """The point that comes next, where the last part changes first.

    Args:
        space: that the point is of.
        point: one that :func:`first` or this function gave.
        levels: how many values of each continuous part count.

    Returns:
        The point; None after the last.

    Example:
        >>> from jaxcomp.search.spaces import Choice
        >>> space = {"depth": Integer(1, 2), "act": Choice(("relu", "gelu"))}
        >>> following(space, {"depth": 1, "act": 1}), following(space, {"depth": 2, "act": 1})
        ({'depth': 2, 'act': 0}, None)
    """
    active = list(parts(space, point).items())
    while active:
        path, part = active.pop()
        index = position(part, point[path], levels) + 1
        if index < size(part, levels):
            kept = {earlier for earlier, _ in active}

            def choose(at: str, each: Part, path=path, index=index, kept=kept) -> int | float:
                if at in kept:
                    return point[at]
                return nth(each, index if at == path else 0, levels)

            return walk(space, choose)[1]
    return None


def position(part: Part, value: int | float, levels: int | None = None) -> int:
    """Where a value stands among those of its part.

    Example:
        >>> position(Integer(8, 64, step=8), 24), position(Continuous(0, 1), 0.5, levels=5)
        (2, 2)
    """
    if isinstance(part, Integer):
        return int((value - part.low) // part.step)
    if isinstance(part, Continuous):
        return round(to_unit(part, value) * (size(part, levels) - 1))
    return int(value)
