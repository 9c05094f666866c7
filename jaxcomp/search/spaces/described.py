"""A space as text, as JSON, and as a digest that tells it from others."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from jaxcomp import columns
from jaxcomp.search.spaces.kinds import Choice, Continuous, Integer, Repeat, is_constant, plain
from jaxcomp.search.spaces.listed import count
from jaxcomp.search.spaces.numbers import words
from jaxcomp.search.spaces.points import children, constant, every_part, is_node


def describe(space: Any) -> str:
    """A space as text: what is inside an option or a list is indented under it.

    Args:
        space: to describe.

    Returns:
        A line for each part and constant, then how many points there are.

    Raises:
        TypeError: the space holds what is no part.
        ValueError: two parts have the same path.

    Example:
        >>> print(
        ...     describe(
        ...         {
        ...             "layers": Repeat(Integer(1, 3), {"width": Integer(8, 64, step=8)}),
        ...             "act": Choice({"relu": None, "leaky": {"slope": Choice((0.01, 0.1))}}),
        ...         }
        ...     )
        ... )
        layers     1 to 3 items
          width    8, 16, …, 64
        act        relu or leaky
          leaky
            slope  0.01 or 0.1
        1,752 points
    """
    points = count(space)
    rows = list(_rows("(space)", space, 0))
    if is_node(space):
        rows = [(name.removeprefix("  "), what) for name, what in rows[1:]]
    table = columns.table(rows, left=2) if rows else ""
    return f"{table}\n{_points(points)}".lstrip("\n")


def _points(points: int | float) -> str:
    if points == math.inf:
        return "endless points"
    # Python writes no whole number of over 4,300 digits, and nobody reads one of a hundred.
    number = f"{points:,}" if points < 10**100 else f"about 10^{round(math.log10(points))}"
    return f"{number} point{'s' * (points != 1)}"


def _rows(name: str, space: Any, depth: int) -> list[tuple[str, str]]:
    label = "  " * depth + name
    if isinstance(space, Choice):
        pairs = list(zip(space.names, space.spaces, strict=True))
        shown = [
            i if space.is_named or not is_constant(option) else str(option) for i, option in pairs
        ]
        rows = [(label, " or ".join(shown))]
        inside = [(i, option) for i, option in pairs if _holds(option, space.is_named)]
    elif isinstance(space, (Integer, Continuous)):
        return [(label, words(space))]
    elif isinstance(space, Repeat):
        number = space.count if isinstance(space.count, int) else words(space.count)
        rows = [(label, f"{number} items")]
        item = space.item
        inside = children(item, "") if is_node(item) else [("each", item)]
    elif is_node(space):
        rows, inside = [(label, "")], children(space, "")
    else:
        return [(label, f"always {plain(space)!r}")]
    return rows + [row for i, sub in inside for row in _rows(i, sub, depth + 1)]


def _holds(option: Any, is_named: bool) -> bool:
    """Whether there is more to say of an option than its name."""
    return option is not None if is_named else not is_constant(option)


def as_json(space: Any) -> Any:
    """A space as what JSON keeps, in full: equal for equal spaces alone.

    Args:
        space: to write down.

    Returns:
        Lists, strings and numbers; the order of parts is kept, since strategies go by it.

    Raises:
        TypeError: the space holds what is no part.
        ValueError: two parts have the same path.

    Example:
        >>> as_json({"width": Integer(8, 64, step=8), "act": Choice(("relu", "gelu"))})
        ['dict', ['width', ['integer', 8, 64, 8, False]],
         ['act', ['choice', ['relu', 'gelu']]]]
    """
    every_part(space)
    return _as_json(space)


def _as_json(space: Any) -> Any:
    if isinstance(space, Choice):
        if space.is_named:
            return ["named choice", *([name, _as_json(sub)] for name, sub in space.options.items())]
        return ["choice", [_as_json(option) for option in space.options]]
    if isinstance(space, Integer):
        return ["integer", space.low, space.high, space.step, bool(space.log)]
    if isinstance(space, Continuous):
        return ["continuous", space.low, space.high, bool(space.log)]
    if isinstance(space, Repeat):
        return ["repeat", _as_json(space.count), _as_json(space.item)]
    if is_node(space):
        if isinstance(space, Mapping):  # 1 and "1" are keys of different candidates
            return ["dict", *([key, _as_json(sub)] for key, sub in space.items())]
        kind = "list" if isinstance(space, list) else "tuple"
        return [kind, *([name, _as_json(sub)] for name, sub in children(space, ""))]
    return constant(space, "")


def digest(space: Any) -> str:
    """A fingerprint of a space, by which a study's file refuses another one.

    Args:
        space: to tell from others.

    Returns:
        Sixteen hexadecimal digits, of the SHA-256 of :func:`as_json`; the same in any process.

    Raises:
        TypeError: the space holds what is no part.
        ValueError: two parts have the same path.

    Example:
        >>> digest({"width": Integer(8, 64)}) == digest({"width": Integer(8, 65)})
        False
    """
    text = json.dumps(as_json(space), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
