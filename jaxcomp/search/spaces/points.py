"""From points to candidates and back, by walking the space."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxcomp.search.spaces.kinds import (
    Choice,
    Continuous,
    Integer,
    Part,
    Repeat,
    is_constant,
    plain,
    same,
)
from jaxcomp.search.spaces.numbers import named, settle
from jaxcomp.search.trials import Point

Choose = Callable[[str, Part], Any]


def walk(space: Any, choose: Choose) -> tuple[Any, Point]:
    """Fill a space, asking for the value of each part that is active, in order.

    Everything else is made of this: a sample is a walk that draws, a decoded point one that looks
    up. What is active depends on the answers so far.

    Args:
        space: to walk.
        choose: ``(path, part) -> value``: an option's position, an int or a float.

    Returns:
        The candidate and its point.

    Raises:
        TypeError: a value is of the wrong kind; a leaf of the space is neither part nor constant.
        ValueError: a value is none of the part's; two parts have the same path.

    Example:
        >>> space = {"depth": Integer(1, 3), "act": Choice(("relu", "gelu"))}
        >>> walk(space, lambda path, part: 1)
        ({'depth': 1, 'act': 'gelu'}, {'depth': 1, 'act': 1})
    """
    point: Point = {}
    return _fill(space, "", choose, point), point


def _ask(path: str, part: Part, choose: Choose, point: Point) -> Any:
    if path in point:
        raise _clash(path)
    point[path] = settle(path, part, choose(path, part))
    return point[path]


def _fill(space: Any, path: str, choose: Choose, point: Point) -> Any:
    if isinstance(space, Choice):
        chosen = _ask(path, space, choose, point)
        option, name = space.spaces[chosen], space.names[chosen]
        if space.is_named and option is None:
            return name
        value = _fill(option, join(path, name), choose, point)
        return {name: value} if space.is_named else value
    if isinstance(space, (Integer, Continuous)):
        return _ask(path, space, choose, point)
    if isinstance(space, Repeat):
        count = space.count
        if isinstance(count, Integer):
            count = _ask(count_path(path), count, choose, point)
        return [_fill(space.item, join(path, str(i)), choose, point) for i in range(count)]
    if is_node(space):
        pairs = children(space, path)
        return rebuild(space, [_fill(sub, join(path, i), choose, point) for i, sub in pairs])
    return constant(space, path)


def decode(space: Any, point: Any) -> Any:
    """The candidate that a point stands for.

    Args:
        space: that the point is of.
        point: values by path, of all active parts and no others.

    Returns:
        The space with values in the place of parts.

    Raises:
        TypeError: the point is no dict, or a value is of the wrong kind.
        ValueError: a value is none of the part's, an active part has none, or one is not active.

    Example:
        >>> space = {"optimizer": Choice({"sgd": {"momentum": Continuous(0, 1)}, "adam": None})}
        >>> decode(space, {"optimizer": 0, "optimizer/sgd/momentum": 0.9})
        {'optimizer': {'sgd': {'momentum': 0.9}}}
        >>> decode(space, {"optimizer": 1})
        {'optimizer': 'adam'}
    """
    return _read(space, point)[0]


def settled(space: Any, point: Any) -> Point:
    """A point with plain numbers, in the order of the space.

    Raises:
        TypeError: as :func:`decode`.
        ValueError: likewise.

    Example:
        >>> settled(Repeat(2, Continuous(0, 1)), {"1": 1, "0": 0.5})
        {'0': 0.5, '1': 1.0}
    """
    return _read(space, point)[1]


def _read(space: Any, point: Any) -> tuple[Any, Point]:
    _check_mapping(point)
    candidate, used = walk(space, lambda path, part: _value(point, path, part))
    if len(used) != len(point):
        spare = next(path for path in point if path not in used)
        raise ValueError(f"{named(spare)}: the point has a value for it, but it is not active")
    return candidate, used


def parts(space: Any, point: Any) -> dict[str, Part]:
    """The active parts of a point, in order, and what each may be.

    Args:
        space: that the point is of.
        point: values by path; those of parts that are not active are passed over.

    Returns:
        By path, a :class:`Choice`, an :class:`Integer` or a :class:`Continuous`.

    Raises:
        TypeError: the point is no dict, or a value is of the wrong kind.
        ValueError: a value is none of the part's, or an active part has none.

    Example:
        >>> space = Repeat(Integer(0, 3), Choice((16, 32)))
        >>> list(parts(space, {"#count": 2, "0": 1, "1": 0}))
        ['#count', '0', '1']
    """
    _check_mapping(point)
    active: dict[str, Part] = {}
    walk(space, lambda path, part: _value(point, path, active.setdefault(path, part)))
    return active


def encode(space: Any, candidate: Any) -> Point:
    """The point that stands for a candidate; where several do, the first.

    Args:
        space: that the candidate is of.
        candidate: the space with values in the place of parts, as :func:`decode` gives it.

    Returns:
        The point: ``decode(space, encode(space, candidate)) == candidate``.

    Raises:
        TypeError: a value is of the wrong kind.
        ValueError: the candidate does not fit the space; the message names the path where.

    Example:
        >>> space = {"width": Integer(8, 64, step=8), "act": Choice(("relu", "gelu"))}
        >>> encode(space, {"width": 16, "act": "gelu"})
        {'width': 16, 'act': 1}
        >>> encode(space, {"width": 16, "act": "selu"})
        Traceback (most recent call last):
        ...
        ValueError: act: 'selu' is none of the options 'relu', 'gelu'
    """
    every_part(space)
    point: Point = {}
    _fit(space, candidate, "", point)
    # In the order of walking, which is that of fitting but for dicts written in another order.
    return walk(space, lambda path, part: _value(point, path, part))[1]


def _fit(space: Any, value: Any, path: str, point: Point) -> None:
    """Put into ``point`` what makes ``space`` the value; raise where nothing does."""
    if isinstance(space, Choice):
        _fit_choice(space, value, path, point)
    elif isinstance(space, (Integer, Continuous)):
        point[path] = settle(path, space, plain(value))
    elif isinstance(space, Repeat):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{named(path)}: must be a list of items, not {value!r:.60}")
        if isinstance(space.count, Integer):
            point[count_path(path)] = settle(count_path(path), space.count, len(value))
        elif len(value) != space.count:
            raise ValueError(f"{named(path)}: {len(value)} items, where there are {space.count}")
        for i, item in enumerate(value):
            _fit(space.item, item, join(path, str(i)), point)
    elif is_node(space):
        for (name, sub), inside in zip(
            children(space, path), _opened(space, value, path), strict=True
        ):
            _fit(sub, inside, join(path, name), point)
    elif not same(constant(space, path), plain(value)):
        raise ValueError(f"{named(path)}: must be {space!r}, not {value!r:.60}")


def _fit_choice(space: Choice, value: Any, path: str, point: Point) -> None:
    options = list(zip(space.names, space.spaces, strict=True))
    errors = []
    for index, (name, option) in enumerate(options):
        if space.is_named:
            if option is None:
                if isinstance(value, str) and value == name:
                    point[path] = index
                    return
                continue
            if not (isinstance(value, Mapping) and list(value) == [name]):
                continue
            inside: Point = {}
            _fit(option, value[name], join(path, name), inside)
        else:
            inside = {}
            try:
                _fit(option, value, join(path, name), inside)
            except (TypeError, ValueError) as error:
                errors += [] if is_constant(option) else [error]
                continue
        point[path] = index
        point.update(inside)
        return
    if space.is_named:
        known = [f"{name!r}" if sub is None else f"{{{name!r}: …}}" for name, sub in options]
    else:
        known = [f"{option!r:.40}" for option in space.spaces]
    why = f"; {errors[0]}" if len(errors) == 1 else ""
    raise ValueError(f"{named(path)}: {value!r:.60} is none of the options {', '.join(known)}{why}")


def _opened(space: Any, value: Any, path: str) -> list[Any]:
    """What a candidate has for the children of a node, in the node's order."""
    if isinstance(space, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError(f"{named(path)}: must be a dict, not {value!r:.60}")
        for key in [*space, *value]:
            if (key in space) is not (key in value):
                lacks = "the candidate lacks it" if key in space else "the space lacks it"
                raise ValueError(f"{join(path, str(key))}: {lacks}")
        return [value[key] for key in space]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{named(path)}: must be a {type(space).__name__}, not {value!r:.60}")
    if len(value) != len(space):
        raise ValueError(f"{named(path)}: {len(value)} items, where there are {len(space)}")
    return list(value)


def every_part(space: Any) -> dict[str, Part]:
    """All parts that may be active in some point, in order.

    Args:
        space: to look through.

    Returns:
        By path, a :class:`Choice`, an :class:`Integer` or a :class:`Continuous`.

    Raises:
        TypeError: a leaf is neither part nor constant, or a key neither string nor whole number.
        ValueError: two parts have the same path, a key is empty, or a constant is NaN.

    Example:
        >>> list(every_part({"layers": Repeat(Integer(1, 2), Choice((16, 32)))}))
        ['layers#count', 'layers/0', 'layers/1']
    """
    found: dict[str, Part] = {}
    for path, part in _every(space, ""):
        if path in found:
            raise _clash(path)
        found[path] = part
    return found


def _every(space: Any, path: str) -> Iterator[tuple[str, Part]]:
    if isinstance(space, Choice):
        yield path, space
        inside = list(zip(space.names, space.spaces, strict=True))
    elif isinstance(space, (Integer, Continuous)):
        yield path, space
        return
    elif isinstance(space, Repeat):
        most = space.count
        if isinstance(most, Integer):
            yield count_path(path), most
            most = most.high
        inside = [(str(i), space.item) for i in range(most)]
    elif is_node(space):
        inside = children(space, path)
    else:
        constant(space, path)
        return
    for name, sub in inside:
        yield from _every(sub, join(path, name))


def frozen(point: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A point as something that can be a dict's key: equal points are equal.

    Example:
        >>> frozen({"width": 8, "act": 1})
        (('act', 1), ('width', 8))
    """
    return tuple(sorted(point.items()))


def join(path: str, name: str) -> str:
    """The path of what is inside.

    Example:
        >>> join("", "layers"), join("layers", "0")
        ('layers', 'layers/0')
    """
    return f"{path}/{name}" if path else name


def count_path(path: str) -> str:
    """The path of a repeat's count."""
    return f"{path}#count"


def is_node(space: Any) -> bool:
    """Whether a space is a dict, a list or a tuple."""
    return isinstance(space, (Mapping, list, tuple))


def children(space: Any, path: str) -> list[tuple[str, Any]]:
    """What is inside a dict, a list or a tuple, by name.

    Raises:
        TypeError: a key is neither a string nor a whole number.
        ValueError: a key is empty.
    """
    if not isinstance(space, Mapping):
        fields = getattr(space, "_fields", None) or map(str, range(len(space)))
        return list(zip(fields, space, strict=True))
    for key in space:
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise TypeError(f"{named(path)}: the key {key!r:.60} must be a string")
        if key == "":
            raise ValueError(f"{named(path)}: a key is empty: name it")
    return [(str(key), sub) for key, sub in space.items()]


def rebuild(space: Any, inside: list[Any]) -> Any:
    """A dict, a list or a tuple of the same kind around other children."""
    if isinstance(space, Mapping):
        return dict(zip(space, inside, strict=True))
    if isinstance(space, list):
        return inside
    return type(space)(*inside) if hasattr(space, "_fields") else tuple(inside)


def constant(value: Any, path: str) -> Any:
    """A constant as a plain value.

    Raises:
        TypeError: it is none.
        ValueError: it is NaN, which equals nothing.
    """
    value = plain(value)
    if not is_constant(value):
        raise TypeError(
            f"{named(path)}: {value!r:.60} is neither a part nor a number, string, bool or None: "
            "put a name there and look up what it means where candidates are evaluated"
        )
    if value != value:
        raise ValueError(f"{named(path)}: NaN cannot be a constant: it does not equal itself")
    return value


def _value(point: Mapping[str, Any], path: str, part: Part) -> Any:
    if path not in point:
        raise ValueError(f"{named(path)}: active, but the point has no value for it")
    return point[path]


def _check_mapping(point: Any) -> None:
    if not isinstance(point, Mapping):
        raise TypeError(f"a point must be a dict of values by path, not {point!r:.60}")


def _clash(path: str) -> ValueError:
    return ValueError(f"{named(path)}: two parts of the space have this path: rename one of them")
