"""How the context coder looks at a leaf, and the few bytes that say so.

A leaf is a matrix: its last axis are the columns and all others the rows, or, transposed, its first
axis are the columns. In the bytes, integers are little-endian in groups of 7 bits (LEB128)::

    1 byte    1: transposed; 2: centre follows; 4: lowest and highest follow; 8: structure follows;
              the upper half is the shift
    centre    the symbol that stands for zero; else the middle of the alphabet
    lowest, highest    as distances from the centre; else all of the alphabet
    structure 1 byte (lags + 8 * cells + 32 * wide), the lags, three numbers for each cell
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from jaxcomp.checkpoint.errors import CheckpointError

MAX_LAGS = 6
MAX_CELLS = 3
MAX_LEVELS = 24
MAX_CLASSES = 1 << 18
_MAX_SHIFT = 15


class Cell(NamedTuple):
    """A partition of the rows, or of all weights, into patches.

    Row ``r`` is in patch ``(r // stride // tall, r % stride // wide)``.

    Attributes:
        stride: rows are seen as a grid this wide.
        tall: of a patch, in rows of that grid.
        wide: of a patch, in columns of that grid.
        by_column: whether the matrix's columns are told apart too.
    """

    stride: int
    tall: int
    wide: int
    by_column: bool

    def classes(self, rows: int, columns: int) -> int:
        """How many patches there are."""
        down = (rows - 1) // self.stride // self.tall + 1
        across = -(-self.stride // self.wide)
        return down * across * (columns if self.by_column else 1)

    def keys(
        self, row: Int64[np.ndarray, "..."], column: Int64[np.ndarray, "..."], columns: int
    ) -> Int64[np.ndarray, "..."]:
        """The patch of each weight."""
        down, across = row // self.stride // self.tall, row % self.stride // self.wide
        patch = down * -(-self.stride // self.wide) + across
        return patch * columns + column if self.by_column else patch


class Layout(NamedTuple):
    """How a leaf is looked at.

    Attributes:
        transposed: whether the first axis are the columns.
        centre: the symbol that stands for zero.
        low: the lowest symbol.
        high: the highest.
        shift: magnitudes less one have so many low bits that stand alone.
        wide: whether neighbours count by their magnitude (to 2), or only whether they are zero.
        lags: distances, in weights, at which neighbours lie; the first two are the nearest.
        cells: further partitions.
    """

    transposed: bool
    centre: int
    low: int
    high: int
    shift: int
    wide: bool = False
    lags: tuple[int, ...] = ()
    cells: tuple[Cell, ...] = ()

    def matrix(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a leaf of this shape."""
        size = math.prod(shape)
        columns = 1 if len(shape) < 2 else shape[0] if self.transposed else shape[-1]
        return (size // columns, columns) if columns else (0, 0)

    def levels(self) -> int:
        """How many magnitudes there are, counted in units of ``2**shift``."""
        reach = max(self.high - self.centre, self.centre - self.low)
        return (reach - 1 >> self.shift) + 1 if reach else 0


def usable(classes: int, size: int) -> bool:
    """Whether a partition is told apart at all: neither trivial nor finer than its counts bear."""
    return 2 <= classes <= min(size // 4, MAX_CLASSES)


def write(layout: Layout, alphabet: int, columns: int) -> bytes:
    r"""A layout's bytes.

    Example:
        >>> write(Layout(False, 8, 0, 15, 0), 16, 300)
        b'\x00'
    """
    centred = layout.centre == alphabet // 2
    whole = (layout.low, layout.high) == (0, alphabet - 1)
    structured = bool(layout.lags or layout.cells)
    flags = layout.transposed | (not centred) << 1 | (not whole) << 2 | structured << 3
    out = [flags | layout.shift << 4]
    if not centred:
        out += _number(layout.centre)
    if not whole:
        out += _number(layout.centre - layout.low) + _number(layout.high - layout.centre)
    if structured:
        out.append(len(layout.lags) | len(layout.cells) << 3 | layout.wide << 5)
        for lag in layout.lags:
            out += _number(2 * lag + 1 if lag % columns else 2 * (lag // columns))
        for cell in layout.cells:
            out += _number(cell.stride) + _number(cell.tall)
            out += _number(2 * cell.wide + cell.by_column)
    return bytes(out)


def read(data: bytes, shape: tuple[int, ...], alphabet: int) -> tuple[Layout, int]:
    """Undo :func:`write`.

    Returns:
        The layout, and how many bytes it took.

    Raises:
        CheckpointError: the bytes are damaged, or describe no view of such a leaf.
    """
    numbers = _Numbers(data)
    flags = numbers.byte()
    centre = numbers.next() if flags & 2 else alphabet // 2
    low, high = (centre - numbers.next(), centre + numbers.next()) if flags & 4 else (0, None)
    high = alphabet - 1 if high is None else high
    layout = Layout(bool(flags & 1), centre, low, high, flags >> 4)
    if not 0 <= low <= centre <= high < alphabet or layout.levels() > MAX_LEVELS:
        raise CheckpointError("the symbols of a context-coded stream are out of range")
    if flags & 8:
        layout = _structure(layout, numbers, *layout.matrix(shape))
    return layout, numbers.at


def _structure(layout: Layout, numbers: "_Numbers", rows: int, columns: int) -> Layout:
    counts = numbers.byte()
    if counts & 7 > MAX_LAGS or counts >> 6:
        raise CheckpointError("a context-coded stream has more lags than there can be")
    lags = []
    for _ in range(counts & 7):
        number = numbers.next()
        lags.append(number >> 1 if number & 1 else (number >> 1) * columns)
    if not all(1 <= lag < rows * columns for lag in lags):
        raise CheckpointError("a context-coded stream has a lag that is out of range")
    cells = []
    for _ in range(counts >> 3 & 3):
        stride, tall, wide = numbers.next(), numbers.next(), numbers.next()
        cell = Cell(stride, tall, wide >> 1, bool(wide & 1))
        fits = 1 <= stride <= rows and 1 <= tall <= rows and 1 <= cell.wide <= rows
        if not fits or not usable(cell.classes(rows, columns), rows * columns):
            raise CheckpointError("a context-coded stream has a partition that is out of range")
        cells.append(cell)
    return layout._replace(wide=bool(counts & 32), lags=tuple(lags), cells=tuple(cells))


def _number(value: int) -> list[int]:
    return [*_groups(value)]


def _groups(value: int) -> Iterator[int]:
    while value > 127:
        yield value & 127 | 128
        value >>= 7
    yield value


class _Numbers:
    """Reads integers from bytes."""

    def __init__(self, data: bytes):
        self._data = data
        self.at = 0

    def byte(self) -> int:
        if self.at >= len(self._data):
            raise CheckpointError("the head of a context-coded stream is cut short")
        self.at += 1
        return self._data[self.at - 1]

    def next(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            group = self.byte()
            value |= (group & 127) << shift
            if group < 128:
                return value
        raise CheckpointError("a number in a context-coded stream is too large")
