"""Finding the layout under which a leaf's codes are shortest, from statistics of one pass.

Only the encoder runs this, so it may be inexact: whatever it picks is written down and decodes.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxcomp.checkpoint.layout import MAX_CELLS, MAX_LAGS, MAX_LEVELS, Cell, Layout, usable

_SAMPLE = 1 << 19
_CERTAIN = 6.0
_MOST_SHIFT, _MANY = 15, 1 << 16
_HEAD_NATS = 4 * 8 * math.log(2)


class View(NamedTuple):
    """A leaf as a matrix, or some of its columns.

    Attributes:
        size: signal matrices: how large magnitudes are (at most some), and signs.
        signs: -1, 0 and 1.
        rows: of the matrix.
        columns: of all of it.
    """

    size: np.ndarray
    signs: np.ndarray
    rows: int
    columns: int


def find(values: np.ndarray, alphabet: int) -> Layout | None:
    """Choose a layout for a leaf's symbols.

    Args:
        values: the symbols, at least one axis and two different ones.
        alphabet: how many symbols there are.

    Returns:
        A layout; None where magnitudes are too many.

    Example:
        >>> rows = np.repeat(np.array([[4], [4], [7], [1]] * 20, np.uint8), 30, axis=1)
        >>> find(rows, 8).centre
        4
    """
    counts = np.bincount(values.reshape(-1), minlength=alphabet)
    present = np.flatnonzero(counts)
    centre, low, high = _centre(counts), int(present[0]), int(present[-1])
    distance = np.abs(np.arange(alphabet) - centre)
    significant = max(1, int(counts.sum() - counts[centre]))
    mean = float((counts * np.maximum(distance - 1, 0)).sum()) / significant
    # Where there are many large ones their low bits are nearly uniform, and levels cost time.
    length = int(mean).bit_length()
    few = length < 4 or significant < _MANY
    shift = max(0, length - 2) if few else min(length, _MOST_SHIFT)
    while True:
        layout = Layout(False, centre, low, high, shift)
        if layout.levels() <= MAX_LEVELS:
            break
        shift += 1
    if shift > _MOST_SHIFT:
        return None
    wide = 2 * counts[centre] < counts.sum()
    layout = layout._replace(wide=bool(wide))
    if values.ndim < 2 or min(values.shape) == 0:
        return layout._replace(wide=False)
    top = 1 if not wide else max(2, 2 * round(mean + 1))
    upright = _structured(layout, values, top)
    # A matrix has the same rows and columns either way; only patches are of rows.
    if values.ndim == 2 and not any(lag % values.shape[1] for lag in upright[1].lags):
        return upright[1]
    transposed = _structured(layout._replace(transposed=True), values, top)
    return max(upright, transposed, key=lambda pair: pair[0])[1]


def _centre(counts: np.ndarray) -> int:
    """The most frequent symbol, unless the middle one is about as frequent."""
    middle, mode = len(counts) // 2, int(np.argmax(counts))
    return middle if counts[middle] * 2 > counts[mode] else mode


def _structured(layout: Layout, values: np.ndarray, top: int) -> tuple[float, Layout]:
    """The layout with lags and cells, and about how many nats its contexts are worth."""
    rows, columns = layout.matrix(values.shape)
    if rows < 3 or columns < 2:
        return 0.0, layout._replace(wide=False)
    matrix = values.reshape(values.shape[0], -1).T if layout.transposed else values
    matrix = matrix.reshape(rows, columns)
    skip = -(-values.size // _SAMPLE)
    part = matrix[:, ::skip].astype(np.int32) - layout.centre
    view = View(np.minimum(np.abs(part), top).astype(np.float64), np.sign(part), rows, columns)
    worth = sum(_gain(view.size - view.size.mean(), key, classes) for key, classes in (
        (np.arange(rows)[:, None], rows), (np.arange(part.shape[1])[None], part.shape[1])
    ))  # fmt: skip
    residual = _residual(view.size)
    scored = _lags(view, residual)
    cells = _cells(values.shape, layout.transposed, scored, residual, rows, columns)
    lags = tuple(lag for _, lag in scored)
    worth += sum(gain for gain, _ in cells) + sum(gain for gain, _ in scored)
    chosen = tuple(cell for _, cell in cells)
    wide = layout.wide and bool(lags)
    return worth * skip, layout._replace(lags=lags, cells=chosen, wide=wide)


def _residual(size: np.ndarray) -> np.ndarray:
    """What rows and columns do not explain."""
    mean = max(float(size.mean()), 1e-12)
    return size - size.mean(1, keepdims=True) * (size.mean(0, keepdims=True) / mean)


def _gain(residual: np.ndarray, key: np.ndarray, classes: int) -> float:
    """Nats saved by telling classes apart, were the residual normal and the classes' means too."""
    full = np.broadcast_to(key, residual.shape).reshape(-1)
    count = np.bincount(full, minlength=classes)
    total = np.bincount(full, residual.reshape(-1), minlength=classes)
    variance = max(float(np.mean(residual * residual)), 1e-12)
    used = count > 0
    surprise, n = total[used] ** 2 / (count[used] * variance), count[used]
    spread = max(float((surprise - 1).sum()) / float(n.sum()), 0.0) * n
    return 0.5 * float((surprise * spread / (1 + spread) - np.log1p(spread)).sum())


def _lags(view: View, residual: np.ndarray) -> list[tuple[float, int]]:
    """Distances at which weights resemble each other, best first, with their worth."""
    found: dict[int, float] = {}
    signs = view.signs.astype(np.float64)
    signs -= signs.mean(1, keepdims=True) + signs.mean(0, keepdims=True) - signs.mean()
    for signal in (residual, signs):
        # Columns of a sample are not neighbours of each other.
        axes = (0, 1) if residual.shape[1] == view.columns else (0,)
        for axis in axes:
            for lag, worth in _alike(signal, axis):
                distance = lag * view.columns if axis == 0 else lag
                found[distance] = found.get(distance, 0.0) + worth
    size = view.rows * view.columns
    best = sorted(((worth, lag) for lag, worth in found.items() if lag < size), reverse=True)
    return best[:MAX_LAGS]


def _alike(signal: np.ndarray, axis: int) -> Iterator[tuple[int, float]]:
    length = signal.shape[axis]
    if length < 3:
        return
    # Zeros behind the end keep it from meeting the beginning; a size of small factors is fast.
    padded = 1 << (2 * length - 1).bit_length()
    spectrum = np.fft.rfft(signal, padded, axis=axis)
    power = (spectrum.real**2 + spectrum.imag**2).sum(1 - axis)
    products = np.fft.irfft(power, padded)[:length]
    pairs = (length - np.arange(length)) * (signal.size // length)
    deviation = products / np.sqrt(pairs * max(products[0] / signal.size, 1e-12) ** 2)
    half = deviation[1 : length // 2 + 1]
    for at in np.argsort(-half)[:MAX_LAGS]:
        if half[at] > _CERTAIN:
            yield int(at) + 1, 0.5 * float(half[at]) ** 2


def _cells(
    shape: tuple[int, ...],
    transposed: bool,
    scored: list[tuple[float, int]],
    residual: np.ndarray,
    rows: int,
    columns: int,
) -> list[tuple[float, Cell]]:
    """The most worthwhile partition by column, and those of the rows alone."""
    inner = shape[1:] if transposed else shape[:-1]
    strides = {math.prod(inner[i:]) for i in range(1, len(inner))}
    strides |= {lag // columns for _, lag in scored[:4] if lag % columns == 0}
    sampled = residual.shape[1]
    found: dict[bool, list[tuple[float, Cell]]] = {False: [], True: []}
    for stride in sorted(strides):
        if not 1 < stride < rows:
            continue
        grid = [(1, stride, True), (rows, 1, True), (1, stride, False), (rows, 1, False)]
        grid += [(4, 4, True)] if stride >= 8 and rows // stride >= 8 else []
        for tall, wide, by_column in grid:
            cell = Cell(stride, tall, wide, by_column)
            if not usable(cell.classes(rows, columns), rows * columns):
                continue
            key = cell.keys(np.arange(rows)[:, None], np.arange(sampled)[None], sampled)
            gain = _gain(residual, key, cell.classes(rows, sampled))
            if gain > _HEAD_NATS:
                found[by_column].append((gain, cell))
    best = {kind: sorted(some, key=lambda pair: -pair[0]) for kind, some in found.items()}
    return [*best[True][:1], *best[False]][:MAX_CELLS]
