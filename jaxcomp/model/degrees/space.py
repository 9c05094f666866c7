"""The solutions of the relations between degrees: linear algebra in fractions."""

from collections.abc import Container, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from jaxcomp.model.degrees.walk import Degree, Unknown


class Space:
    """The solutions of some linear relations, as rows in reduced echelon form by their pivot.

    Attributes:
        causes: for each unknown that must be zero, what needs it.
    """

    def __init__(self, relations: Iterable[tuple[Degree, str]] = ()) -> None:
        self.rows: dict[Any, dict[Any, Fraction]] = {}
        self.causes: dict[Any, str] = {}
        for degree, reason in relations:
            self.add(degree, reason)

    def copy(self) -> "Space":
        """A space of its own with the same solutions."""
        other = Space()
        other.rows, other.causes = dict(self.rows), dict(self.causes)
        return other

    def add(self, degree: Degree, reason: str = "", value: int = 0) -> bool:
        """Ask for ``degree == value``; whether that can be had, and if not nothing changes."""
        row = {key: factor for key, factor in degree.items() if factor}
        if value:
            row[None] = Fraction(-value)
        for key in list(row):
            if key in self.rows and key in row:
                # What is zero already passes its cause on.
                reason = self.causes.get(key, reason)
                row = _added(row, self.rows[key], -row[key])
        unknowns = [key for key in row if key is not None]
        if not unknowns:
            return None not in row
        # Unknowns of loops go first, so that rows are about leaves wherever they can be.
        pivot = next((key for key in unknowns if not isinstance(key, Unknown)), unknowns[0])
        row = {key: factor / row[pivot] for key, factor in row.items()}
        touched = [key for key, old in self.rows.items() if pivot in old]
        for key in touched:
            self.rows[key] = _added(self.rows[key], row, -self.rows[key][pivot])
        self.rows[pivot] = row
        for key in (pivot, *touched):
            if set(self.rows[key]) == {key}:
                self.causes.setdefault(key, reason)
        return True

    def value(self, unknown: Any) -> Fraction:
        """An unknown that is determined, or zero."""
        return -self.rows.get(unknown, {}).get(None, Fraction(0))


def solve(
    space: Space,
    wanted: Mapping[Unknown, int],
    leave: Sequence[Unknown],
    only: Container[Unknown] | None = None,
) -> dict[Unknown, Fraction] | None:
    """Degrees with some given, and zero for as many others as can be, the first ones first.

    Args:
        space: the relations.
        wanted: degrees by unknown.
        leave: all unknowns, from those that had best keep their scale on.
        only: the unknowns that may have a degree; all if None.

    Returns:
        The degrees that are not zero, or None if ``wanted`` cannot be had.
    """
    found = space.copy()
    for unknown in leave:
        outside = only is not None and unknown not in only and unknown not in wanted
        if outside and not found.add({unknown: Fraction(1)}):
            return None
    if not all([found.add({u: Fraction(1)}, "", value) for u, value in wanted.items()]):
        return None
    for unknown in leave:
        if unknown not in wanted:
            found.add({unknown: Fraction(1)})
    return {u: found.value(u) for u in leave if found.value(u)}


class Span:
    """What some vectors span; to leave out those that say nothing new."""

    def __init__(self) -> None:
        self.rows: dict[Any, dict[Any, Fraction]] = {}

    def widen(self, vector: Mapping[Any, Fraction]) -> bool:
        """Add a vector; whether it was not in the span."""
        row = dict(vector)
        for pivot, other in self.rows.items():
            if pivot in row:
                row = _added(row, other, -row[pivot])
        if not row:
            return False
        pivot = next(iter(row))
        self.rows[pivot] = {key: value / row[pivot] for key, value in row.items()}
        return True


def _added(
    row: Mapping[Any, Fraction], other: Mapping[Any, Fraction], factor: Fraction
) -> dict[Any, Fraction]:
    new = dict(row)
    for key, value in other.items():
        new[key] = new.get(key, Fraction(0)) + factor * value
    return {key: value for key, value in new.items() if value}
