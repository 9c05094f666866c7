"""The axes of every array of a program, and the few things that rules do with them."""

from collections.abc import Sequence

from jaxcomp.model.dims import Dim, Dims
from jaxcomp.model.program import Value

Axes = tuple[Dim, ...]


class Flow:
    """The axes of every array of a program.

    Attributes:
        dims: maker and keeper of the dims.
        axes: the axes of each value.
    """

    def __init__(self) -> None:
        self.dims = Dims()
        self.axes: dict[Value, Axes] = {}

    def of(self, value: Value) -> Axes:
        """The axes of a value; new ones for a constant that was not met before."""
        if value not in self.axes:
            self.axes[value] = self.fresh(value)
        return self.axes[value]

    def fresh(self, value: Value, fixed: str | None = None) -> Axes:
        """New axes for a value."""
        return tuple(self.dims.atom(size, fixed) for size in value.shape)

    def fix(self, axes: Sequence[Dim], reason: str) -> None:
        """Nothing may be cut from these axes."""
        for dim in axes:
            self.dims.fix(dim, reason)

    def unite(self, first: Sequence[Dim], second: Sequence[Dim], reason: str) -> None:
        """Two arrays' axes are the same, one by one; an axis of size 1 is broadcast."""
        for a, b in zip(first, second, strict=True):
            if a.size == b.size:
                self.dims.unite(a, b, reason)
