"""What a walk through a program holds of the degrees of its arrays, and what all rules do with it.

See :mod:`~jaxcomp.model.degrees.relate` for what degrees are.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer

from jaxcomp.model.axes import Flow
from jaxcomp.model.dims import Dim, find
from jaxcomp.model.program import Op, Value

# For each atom of the channels: the axis, and which of the axis' atoms (in order) it is.
Slot = tuple[tuple[int, int], ...]
# A linear expression: the coefficient of each unknown.
Degree = Mapping[Any, Fraction]
Moves = Callable[[Any, int], "tuple[int, int] | None"]

ONE = Fraction(1)


class Unknown(NamedTuple):
    """The degree of a slot of a leaf."""

    path: str
    slot: Slot


class Relation(NamedTuple):
    """A linear expression that must be zero, and the operation that needs it."""

    degree: Degree
    reason: str


def places(dim: Dim) -> list[tuple[Dim, np.ndarray]]:
    """The atoms of an axis in order, each with ``(units, k)``: the positions of each unit.

    Unlike :func:`jaxcomp.model.dims.positions`, an atom that is met twice comes twice.
    """
    dim = find(dim)
    if not dim.factors and not dim.parts:
        return [(dim, np.arange(dim.size)[:, None])]
    found, offset, stride = [], 0, dim.size
    for part in dim.parts:
        found += [(atom, where + offset) for atom, where in places(part)]
        offset += part.size
    for factor in dim.factors:
        outer = np.arange(0, dim.size, stride)
        stride //= factor.size
        for atom, where in places(factor):
            here = outer[None, :, None, None] + (where * stride)[:, None, :, None]
            spread = (here + np.arange(stride)).reshape(len(where), -1)
            found.append((atom, np.sort(spread, axis=1)))
    return found


class Walk:
    """One walk; ``degrees`` holds the slots of every value, None where it is zero everywhere."""

    def __init__(self, flow: Flow, channels: tuple[Dim, ...]) -> None:
        self.flow = flow
        self.channels = channels
        # Stacked axes that the loops around walk: each turn is at one position of them.
        self.walked: set[Dim] = set()
        self.degrees: dict[Value, dict[Slot, Degree] | None] = {}
        self.relations: list[Relation] = []
        self._places: dict[Dim, list[tuple[Dim, np.ndarray]]] = {}

    def places(self, dim: Dim) -> list[tuple[Dim, np.ndarray]]:
        """The atoms of an axis and where they are, kept."""
        dim = find(dim)
        if dim not in self._places:
            self._places[dim] = places(dim)
        return self._places[dim]

    def slots(self, value: Value) -> list[Slot]:
        """Where a value holds the channels; none where it lacks an atom of them."""
        wanted = [atom for atom in self.channels if atom not in self.walked]
        axes = self.flow.of(value)
        found = [
            [
                (axis, i)
                for axis, dim in enumerate(axes)
                for i, (other, _) in enumerate(self.places(dim))
                if other is atom
            ]
            for atom in wanted
        ]
        if not wanted:
            return []
        return [slot for slot in product(*found) if self._meet(axes, slot)]

    def _meet(self, axes: Sequence[Dim], slot: Slot) -> bool:
        """Whether the places of a slot that are on one axis have positions in common."""
        for (axis, i), (other, j) in combinations(slot, 2):
            if axis == other:
                here = self.places(axes[axis])
                if not np.intersect1d(here[i][1], here[j][1]).size:
                    return False
        return True

    def of(self, value: Value) -> dict[Slot, Degree] | None:
        """The degrees of a value; of a constant, zero; None for one of zeros and infinities."""
        if value not in self.degrees:
            self.degrees[value] = None if _scale_free(value.constant) else {}
        return self.degrees[value]

    def need(self, degree: Degree, reason: Any) -> None:
        """A degree must be zero."""
        degree = {key: factor for key, factor in degree.items() if factor}
        if degree:
            self.relations.append(Relation(degree, str(reason)))

    def need_none(self, value: Value, reason: Any) -> None:
        """All degrees of a value must be zero."""
        for degree in (self.of(value) or {}).values():
            self.need(degree, reason)

    def put(self, value: Value, degrees: Iterable[tuple[Slot | None, Degree]], reason: Any) -> None:
        """Set the degrees of a result; a slot that it does not have needs degree zero."""
        have: dict[Slot, Degree] = {slot: {} for slot in self.slots(value)}
        refused = False
        for slot, degree in degrees:
            if slot in have:
                have[slot] = degree
            else:
                self.need(degree, reason)
                refused |= any(degree.values())
        self.degrees[value] = have
        if refused:
            self.cut(value, reason)

    def cut(self, value: Value, reason: Any) -> None:
        """What has degree zero in a result has it for a reason, which those after it may name."""
        have = self.degrees[value] or {}
        for slot in self.slots(value):
            if not have.get(slot):
                have[slot] = {("cut", id(value), slot): ONE}
                self.need(have[slot], reason)
        self.degrees[value] = have

    def alike(self, op: Any, values: Sequence[Value]) -> dict[Slot, Degree] | None:
        """The degrees that several values of one shape share; None if all are zeros."""
        known = [d for d in map(self.of, values) if d is not None]
        if not known:
            return None
        first = known[0]
        for other in known[1:]:
            for slot in dict.fromkeys((*first, *other)):
                self.need(
                    minus(first.get(slot, {}), other.get(slot, {})),
                    f"{op} mixes them with what scales otherwise",
                )
        merged = dict(first)
        for other in known[1:]:
            merged.update({slot: degree for slot, degree in other.items() if slot not in merged})
        return merged

    def move(self, op: Op, value: Value, result: Value, moves: Moves, reason: Any = None) -> None:
        """Hand the slots on; ``moves`` says where a place goes, or None where it does not."""
        degrees = self.of(value)
        if degrees is None:
            self.degrees[result] = None
        else:
            rows = ((moved(slot, moves), d) for slot, d in degrees.items())
            self.put(result, rows, reason or op)

    def same_places(
        self, value: Value, result: Value, axis: Any, shift: Any, step: Any = 1
    ) -> Moves:
        """Places on one axis go where the same positions are, ``step`` apart from ``shift`` on."""
        have, new = (self.places(self.flow.of(each)[axis]) for each in (value, result))

        def moves(at: int, i: int) -> tuple[int, int] | None:
            if at != axis:
                return at, i
            atom, where = have[i]
            for j, (other, there) in enumerate(new):
                if other is atom and np.array_equal(there * step + shift, where):
                    return at, j
            return None

        return moves

    def contract(self, op: Op, name: Callable[[int, int, int], tuple[Any, int | None]]) -> None:
        """A sum of products.

        ``name(operand, axis, i)`` gives a word for a place, the same for those of both operands
        that go together, and the axis of the result that it is on, if it stays.
        """
        sides = [self.of(value) for value in op.inputs]
        (result,) = op.outputs
        if sides[0] is None or sides[1] is None:
            self.degrees[result] = None
            return
        total: dict[Any, tuple[Slot | None, Degree]] = {}
        for operand, degrees in enumerate(sides):
            for slot, degree in (degrees or {}).items():
                named = [name(operand, axis, i) for axis, i in slot]
                stays = all(to is not None for _, to in named)
                goes = tuple((to, word[-1]) for word, to in named if to is not None)
                key = tuple(word for word, _ in named)
                _, before = total.get(key, (None, {}))
                total[key] = (goes if stays else None, plus(before, degree))
        self.put(result, total.values(), f"{op} multiplies them by what keeps its scale")


def moved(slot: Slot, moves: Moves) -> Slot | None:
    """Where a slot goes; None where one of its places does not."""
    new = [moves(axis, i) for axis, i in slot]
    return None if None in new else tuple((int(place[0]), place[1]) for place in new if place)


def plus(first: Degree, second: Degree) -> Degree:
    """The sum of two expressions."""
    zero = Fraction(0)
    return {key: first.get(key, zero) + second.get(key, zero) for key in {**first, **second}}


def times(degree: Degree, factor: Fraction) -> Degree:
    """A multiple of an expression."""
    return {key: value * factor for key, value in degree.items()}


def minus(first: Degree, second: Degree) -> Degree:
    """The difference of two expressions."""
    return plus(first, times(second, -ONE))


def _scale_free(constant: Any) -> bool:
    """Whether a positive scale leaves a constant as it is."""
    if constant is None or isinstance(constant, Tracer):
        return False
    if not hasattr(constant, "dtype") or np.dtype(constant.dtype).kind not in "fiub":
        return isinstance(constant, (int, float)) and constant in (0, np.inf, -np.inf)
    array = np.asarray(constant)
    return bool(np.all((array == 0) | np.isinf(array)))
