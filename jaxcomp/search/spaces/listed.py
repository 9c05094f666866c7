"""All points of a space: how many there are, and each in turn."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from jaxcomp import checks
from jaxcomp.search.spaces.kinds import Choice, Continuous, Integer, Part, Repeat
from jaxcomp.search.spaces.numbers import named, nth, size
from jaxcomp.search.spaces.points import children, constant, every_part, is_node, walk
from jaxcomp.search.trials import Point


def count(space: Any, levels: int | None = None) -> int | float:
    """How many points a space has, without listing them.

    Args:
        space: to count.
        levels: how many values of each continuous part to count; None counts them as endless.

    Returns:
        An exact int; ``math.inf`` where a part is continuous.

    Raises:
        TypeError: the space holds what is no part.
        ValueError: two parts have the same path.

    Example:
        >>> from jaxcomp.search.spaces import Choice
        >>> count({"layers": Repeat(Integer(1, 3), Choice((16, 32)))})  # 2 + 4 + 8
        14
        >>> count(Continuous(0, 1)), count(Continuous(0, 1), levels=5)
        (inf, 5)
    """
    _check_levels(levels)
    every_part(space)
    return _count(space, "", levels)


def _count(space: Any, path: str, levels: int | None) -> int | float:
    if isinstance(space, Choice):
        return _total([_count(option, path, levels) for option in space.spaces])
    if isinstance(space, (Integer, Continuous)):
        return size(space, levels)
    if isinstance(space, Repeat):
        each = _count(space.item, path, levels)
        if isinstance(space.count, int):
            return _power(each, space.count)
        counts = range(space.count.low, space.count.high + 1, space.count.step)
        return _total([_power(each, n) for n in counts])
    if is_node(space):
        result: int | float = 1
        for _, sub in children(space, path):
            result = _product(result, _count(sub, path, levels))
        return result
    constant(space, path)
    return 1


# Python's int times inf overflows where the int is beyond floats, so inf goes by itself.
def _product(a: int | float, b: int | float) -> int | float:
    return math.inf if math.inf in (a, b) else a * b


def _power(each: int | float, n: int) -> int | float:
    return math.inf if n and each == math.inf else int(each) ** n if n else 1


def _total(counts: list[int | float]) -> int | float:
    return math.inf if math.inf in counts else sum(counts)


def enumerate_points(space: Any, levels: int | None = None) -> Iterator[Point]:
    """Each point of a space, one at a time; the last part changes first.

    Args:
        space: to list.
        levels: how many values of each continuous part to list, evenly spaced from bound to bound.

    Returns:
        An iterator; it keeps nothing of what it gave.

    Raises:
        TypeError: the space holds what is no part.
        ValueError: a part is continuous and there are no ``levels``; two parts have the same path.

    Example:
        >>> from jaxcomp.search.spaces import Choice
        >>> space = {"depth": Integer(1, 2), "act": Choice(("relu", "gelu"))}
        >>> [tuple(point.values()) for point in enumerate_points(space)]
        [(1, 0), (1, 1), (2, 0), (2, 1)]
    """
    _check_levels(levels)
    for path, part in every_part(space).items():
        if size(part, levels) == math.inf:
            raise ValueError(
                f"{named(path)}: a continuous part has no end of values: say how many with levels"
            )
    return _enumerate(space, levels)


def _enumerate(space: Any, levels: int | None) -> Iterator[Point]:
    positions: list[int] = []
    while True:
        taken: list[tuple[int, int | float]] = []
        choose = partial(_in_turn, positions, taken, levels)
        yield walk(space, choose)[1]
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        positions = [index for index, _ in taken]
        positions[-1] += 1


def _in_turn(
    positions: list[int],
    taken: list[tuple[int, int | float]],
    levels: int | None,
    path: str,
    part: Part,
) -> int | float:
    """The value at the given position, the first one beyond them; what was taken is noted."""
    index = positions[len(taken)] if len(taken) < len(positions) else 0
    taken.append((index, size(part, levels)))
    return nth(part, index, levels)


def _check_levels(levels: int | None) -> None:
    if levels is not None:
        checks.check_count("levels", levels)
