"""What there is to choose from: spaces, the candidates in them, and points.

A *space* is plain Python: dicts, lists and tuples (named ones too), whose leaves are *parts*
(:class:`Choice`, :class:`Integer`, :class:`Continuous`, :class:`Repeat`) or constants (numbers,
strings, bools, None). A *candidate* is the same structure with a value in the place of each part.
An option of a choice may be a space itself; what is inside it exists only where it is chosen.

A *point* is a candidate as strategies see it: a flat dict of paths and numbers, which JSON keeps
as it is. The *path* of a part joins by ``/`` the keys, field names and positions that lead to it;
inside a choice comes the option's name (its position where it has none), inside a repeat the
item's position. The part that is the whole space has the path ``""``. A point has, in this order
of walking the space:

* for a :class:`Choice`, at its path: the position of the option, an int;
* for an :class:`Integer` or a :class:`Continuous`, at its path: the value, an int or a float;
* for a :class:`Repeat` whose count is chosen, at its path and ``#count``: the count, an int;

and nothing for parts that are not active: those in options that were not chosen and in items
beyond the count. ``{"layers": Repeat(Integer(1, 2), {"width": Integer(8, 64)})}`` has the point
``{"layers#count": 2, "layers/0/width": 16, "layers/1/width": 8}`` for the candidate
``{"layers": [{"width": 16}, {"width": 8}]}``. Names may hold a ``/``: paths are compared, never
taken apart, and two parts that would share one are refused.
"""

from jaxcomp.search.spaces.described import as_json, describe, digest
from jaxcomp.search.spaces.kinds import Choice, Continuous, Integer, Part, Repeat
from jaxcomp.search.spaces.listed import count, enumerate_points
from jaxcomp.search.spaces.moves import cross, generator, mutate, sample
from jaxcomp.search.spaces.numbers import from_unit, nth, size, to_unit
from jaxcomp.search.spaces.points import decode, encode, every_part, frozen, parts, walk

__all__ = [
    "Choice",
    "Continuous",
    "Integer",
    "Part",
    "Repeat",
    "as_json",
    "count",
    "cross",
    "decode",
    "describe",
    "digest",
    "encode",
    "enumerate_points",
    "every_part",
    "from_unit",
    "frozen",
    "generator",
    "mutate",
    "nth",
    "parts",
    "sample",
    "size",
    "to_unit",
    "walk",
]
