"""Context-adaptive coding of a leaf's codes: what is known of a weight's surroundings shortens it.

The weights are visited in a fixed order that soon has been everywhere (steps of the golden ratio),
in batches that grow with what is known, so that NumPy predicts a whole batch at once and
constriction's range coder takes it. Each weight is some yes-or-no decisions: is it zero, its sign,
is its magnitude above 1, above 2, ... (low bits of large magnitudes stand alone). Each kind of
decision learns from contexts: the row and the column (dead inputs, per-channel scales), patches of
rows with a column (receptive fields, kernels of a convolution), how many neighbours are zero, as
DeepCABAC has it (Wiedemann et al., 2020), their signs, and the magnitudes met in row and column.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcomp.checkpoint import decisions, entropy, structure
from jaxcomp.checkpoint import layout as layouts
from jaxcomp.checkpoint.decisions import Decision
from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.checkpoint.layout import Layout, usable
from jaxcomp.checkpoint.log_odds import PRECISION, SCALE, log_odds
from jaxcomp.checkpoint.packing import Symbolic, symbol_dtype

MIN_SIZE, MAX_SIZE = 16, 1 << 31
_FIRST_BATCH, _LARGEST_BATCH = 4, 1 << 16
_EARLY, _EARLY_GROWTH, _GROWTH = 1 << 11, 3, 8
_ENERGIES, _ENERGY_STEPS, _MEAN_COUNT = 32, 2.0, 4.0
_GOLDEN = 0.6180339887498949
_SURE, _SAMPLE, _WORTH = 1 << 20, 1 << 17, 0.998

# Codes answers under their probabilities: given the answers it writes them, given None it reads.
Exchange = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


class Sizes(NamedTuple):
    """How many classes there are.

    Attributes:
        places: of row, column and cells, as far as they are told apart.
        lines: how many of these are rows and columns.
        near: of each group of neighbours, by how many are known and how large they are.
        signs: of each group, by the sum of their signs.
    """

    places: list[int]
    lines: int
    near: list[int]
    signs: list[int]

    @property
    def zero(self) -> list[int]:
        """For the decision whether a weight is zero."""
        return [*self.places, *self.near]

    @property
    def sign(self) -> list[int]:
        """For its sign."""
        return [*self.places, *self.signs]

    @property
    def more(self) -> list[int]:
        """For its magnitude."""
        return [*self.places[: self.lines], *self.near, *[_ENERGIES] * bool(self.lines)]


class Surroundings(NamedTuple):
    """A batch's classes, one array for each of :class:`Sizes`."""

    places: list[np.ndarray]
    near: list[np.ndarray]
    signs: list[np.ndarray]


class Energy(NamedTuple):
    """The sum of magnitudes above 1 in each class of a partition, and of how many weights."""

    total: np.ndarray
    weights: np.ndarray


class Learned(NamedTuple):
    """All that coder and decoder learn on their way."""

    zero: Decision
    sign: Decision
    more: tuple[Decision, ...]
    low: tuple[Decision, ...]
    energies: tuple[Energy, ...]


def walk(
    layout: Layout, shape: tuple[int, ...], exchange: Exchange, known: np.ndarray | None
) -> np.ndarray:
    """Visit all weights of a leaf, and code or decode them.

    Args:
        layout: how the leaf is looked at.
        shape: of the leaf.
        exchange: writes or reads answers.
        known: to encode, the signed codes of the matrix, flat; None to decode.

    Returns:
        The signed codes of the matrix, flat.
    """
    rows, columns = layout.matrix(shape)
    size = rows * columns
    out = np.zeros(size, np.int32)
    groups = [group for group in (layout.lags[:2], layout.lags[2:]) if group]
    sizes = _sizes(layout, rows, columns, groups)
    learned = _begin(layout, sizes, columns)
    pad = max(layout.lags, default=0)
    field = np.zeros(size + 2 * pad if groups else 0, np.int32)
    step = _coprime(size)
    for start, stop in _batches(size):
        at = np.arange(start, stop, dtype=np.int64) * step % size
        keys = _surroundings(layout, rows, columns, at, field, pad, groups)
        truth = None if known is None else known[at]
        values, learned = _batch(layout, sizes, learned, keys, stop - start, exchange, truth)
        out[at] = values
        if groups:
            large = np.minimum(np.abs(values), 2 if layout.wide else 1)
            field[at + pad] = 1 + 256 * large + 65536 * np.sign(values)
    return out


def _sizes(layout: Layout, rows: int, columns: int, groups: Sequence[Sequence[int]]) -> Sizes:
    lines = [n for n in (rows, columns) if usable(n, rows * columns)]
    cells = [cell.classes(rows, columns) for cell in layout.cells]
    most = 2 if layout.wide else 1
    near = [(2 * len(group) + 1) * (2 * len(group) * most + 1) for group in groups]
    return Sizes([*lines, *cells], len(lines), near, [4 * len(group) + 1 for group in groups])


def _begin(layout: Layout, sizes: Sizes, columns: int) -> Learned:
    lags = [lag // columns for lag in layout.lags if lag % columns == 0]
    by_row = sizes.lines == 2 and all(lag < sizes.places[0] for lag in lags)
    return Learned(
        decisions.begin(sizes.zero, 0.4, 1.4, lags if by_row else ()),
        decisions.begin(sizes.sign),
        tuple(decisions.begin(sizes.more) for _ in range(layout.levels() - 1)),
        tuple(decisions.begin([64]) for _ in range(layout.shift)),
        tuple(
            Energy(np.zeros(n, np.int64), np.zeros(n, np.int64))
            for n in sizes.places[: sizes.lines]
        ),
    )


def _promising(layout: Layout, values: np.ndarray) -> bool:
    """Whether a large leaf's rows and columns tell anything: some rows are coded to find out."""
    if values.size <= _SURE or layout.lags or layout.cells:
        return True
    matrix = values.reshape(values.shape[0], -1).T if layout.transposed else values
    matrix = matrix.reshape(layout.matrix(values.shape))
    count = max(16, _SAMPLE // matrix.shape[1])
    start = max(0, (len(matrix) - count) // 2)
    some = matrix[start : start + count].astype(np.int32) - layout.centre
    bits = 0.0

    def exchange(yes: np.ndarray, truth: np.ndarray | None) -> np.ndarray:
        nonlocal bits
        assert truth is not None
        chance = yes * 2.0**-PRECISION
        bits -= float(np.log2(np.where(truth, chance, 1.0 - chance)).sum())
        return truth.astype(np.int32)

    walk(layout._replace(transposed=False), some.shape, exchange, some.reshape(-1))
    counts = np.bincount(some.reshape(-1) + layout.centre)
    used = counts[counts > 0]
    return bits < -_WORTH * float((used * np.log2(used / some.size)).sum())


def _surroundings(
    layout: Layout,
    rows: int,
    columns: int,
    at: np.ndarray,
    field: np.ndarray,
    pad: int,
    groups: Sequence[Sequence[int]],
) -> Surroundings:
    row = at // columns
    column = at - row * columns
    size = rows * columns
    places = [key for key, n in ((row, rows), (column, columns)) if usable(n, size)]
    places += [cell.keys(row, column, columns) for cell in layout.cells]
    near, signs = [], []
    for group in groups:
        total = np.zeros(len(at), np.int32)
        for lag in group:
            total += field[at + (pad - lag)]
            total += field[at + (pad + lag)]
        reach = 2 * len(group)
        sums = 2 * reach + 1 if layout.wide else reach + 1
        near.append(((total & 255) * sums + (total >> 8 & 255)).astype(np.int64))
        signs.append(((total >> 16) + reach).astype(np.int64))
    return Surroundings(places, near, signs)


def _batch(
    layout: Layout,
    sizes: Sizes,
    learned: Learned,
    keys: Surroundings,
    count: int,
    exchange: Exchange,
    known: np.ndarray | None,
) -> tuple[np.ndarray, Learned]:
    """Code one batch; what is asked next depends on what was answered."""
    ask = functools.partial(_ask, exchange)
    values = np.zeros(count, np.int32)
    truth = None if known is None else known != 0
    joined = decisions.join([*keys.places, *keys.near], sizes.zero, count)
    answers, zero = ask(learned.zero, joined, count, truth)
    at = np.flatnonzero(answers)
    learned = learned._replace(zero=zero)
    if not len(at):
        return values, learned
    keys = Surroundings(*([key[at] for key in field] for field in keys))
    known = None if known is None else known[at]
    above, below = layout.high - layout.centre, layout.centre - layout.low
    positive = np.full(len(at), above > 0)
    if above and below:
        truth = None if known is None else known > 0
        joined = decisions.join([*keys.places, *keys.signs], sizes.sign, len(at))
        answers, sign = ask(learned.sign, joined, len(at), truth)
        positive, learned = answers.astype(bool), learned._replace(sign=sign)
    excess = None if known is None else np.abs(known) - 1
    levels, more = _levels(layout, sizes, learned, keys, positive, ask, excess)
    energies = tuple(
        _warmer(energy, key, levels)
        for energy, key in zip(learned.energies, keys.places, strict=False)
    )
    learned = learned._replace(more=more, energies=energies)
    rest, low = _low_bits(layout, learned.low, levels, ask, excess)
    magnitudes = 1 + (levels << layout.shift) + rest
    values[at] = np.where(positive, magnitudes, -magnitudes)
    return values, learned._replace(low=low)


def _ask(
    exchange: Exchange, decision: Decision, keys: np.ndarray, count: int, truth: np.ndarray | None
) -> tuple[np.ndarray, Decision]:
    made = decisions.forecast(decision, keys, count)
    answers = exchange(made.yes, truth)
    return answers, decisions.learn(decision, keys, made, answers)


def _levels(
    layout: Layout,
    sizes: Sizes,
    learned: Learned,
    keys: Surroundings,
    positive: np.ndarray,
    ask: Callable[..., Any],
    excess: np.ndarray | None,
) -> tuple[np.ndarray, tuple[Decision, ...]]:
    """Magnitudes less one, without their low bits: is it above 0, above 1, ...?"""
    levels = np.zeros(len(positive), np.int64)
    most = np.where(
        positive,
        layout.high - layout.centre - 1 >> layout.shift,
        layout.centre - layout.low - 1 >> layout.shift,
    )
    lines = keys.places[: sizes.lines]
    classes = [*lines, *keys.near, *_energy_keys(learned, lines)]
    joined = decisions.join(classes, sizes.more, len(positive))
    alive, more = np.arange(len(positive)), list(learned.more)
    for level in range(len(more)):
        alive = alive[most[alive] > level]
        if not len(alive):
            break
        truth = None if excess is None else excess[alive] >> layout.shift > level
        here = joined[:, alive] if len(alive) < len(positive) else joined
        answers, more[level] = ask(more[level], here, len(alive), truth)
        alive = alive[np.flatnonzero(answers)]
        levels[alive] += 1
    return levels, tuple(more)


def _low_bits(
    layout: Layout,
    known: tuple[Decision, ...],
    levels: np.ndarray,
    ask: Callable[..., Any],
    excess: np.ndarray | None,
) -> tuple[np.ndarray, tuple[Decision, ...]]:
    """The low bits, highest first; the first two know each other and the level."""
    rest = np.zeros(len(levels), np.int64)
    out = []
    for i, decision in enumerate(known):
        node = (
            np.zeros_like(rest) if i == 0 else 1 + (rest & 1) if i == 1 else np.full_like(rest, 3)
        )
        keys = (4 * np.minimum(levels, 15) + node)[None]
        truth = None if excess is None else excess >> (layout.shift - 1 - i) & 1
        answers, decision = ask(decision, keys, len(levels), truth)
        rest = 2 * rest + answers
        out.append(decision)
    return rest, tuple(out)


def _warmer(energy: Energy, key: np.ndarray, levels: np.ndarray) -> Energy:
    classes = len(energy.total)
    total = np.bincount(key, levels, minlength=classes).astype(np.int64)
    return Energy(energy.total + total, energy.weights + np.bincount(key, minlength=classes))


def _energy_keys(learned: Learned, lines: Sequence[np.ndarray]) -> list[np.ndarray]:
    """How large magnitudes are in a weight's row and column together, on a logarithmic scale."""
    if not lines:
        return []
    first = learned.energies[0]
    mean = (float(int(first.total.sum())) + 1.0) / (float(int(first.weights.sum())) + 1.0)
    odds = np.zeros(len(lines[0]))
    for energy, key in zip(learned.energies, lines, strict=True):
        ratio = (energy.total + _MEAN_COUNT * mean) / ((energy.weights + _MEAN_COUNT) * mean)
        odds += log_odds(ratio)[key]
    steps = np.rint(odds * (_ENERGY_STEPS / SCALE)).astype(np.int64)
    return [np.minimum(np.maximum(steps + _ENERGIES // 2, 0), _ENERGIES - 1)]


def _batches(size: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < size:
        share = start // (_EARLY_GROWTH if start < _EARLY else _GROWTH)
        length = min(max(_FIRST_BATCH, share), _LARGEST_BATCH, size - start)
        yield start, start + length
        start += length


def _coprime(size: int) -> int:
    """A step near the golden ratio that visits every place once."""
    step = max(1, int(size * _GOLDEN))
    while math.gcd(step, size) != 1:
        step += 1
    return step


def encode(values: np.ndarray, alphabet: int) -> bytes | None:
    """Code symbols from their surroundings; None for a stream that is short, huge or all the same.

    Example:
        >>> rows = np.repeat(np.array([[4], [4], [7], [1]] * 20, np.uint8), 30, axis=1)
        >>> data = encode(rows, 8)
        >>> len(data) < 200, bool((decode(data, rows.shape, 8) == rows).all())
        (True, True)
    """
    if not MIN_SIZE <= values.size < MAX_SIZE or values.ndim == 0 or values.min() == values.max():
        return None
    if values.ndim == 1 and values.size > entropy.SHORT:
        return None  # No rows and columns: the static model is as good, and fast.
    layout = structure.find(values, alphabet)
    if layout is None or not _promising(layout, values):
        return None
    matrix = values.reshape(values.shape[0], -1).T if layout.transposed else values
    known = matrix.reshape(-1).astype(np.int32) - layout.centre
    write, finish = entropy.answer_writer()

    def exchange(yes: np.ndarray, truth: np.ndarray | None) -> np.ndarray:
        assert truth is not None
        answers = truth.astype(np.int32)
        write(answers, yes)
        return answers

    walk(layout, values.shape, exchange, known)
    head = layouts.write(layout, alphabet, layout.matrix(values.shape)[1])
    return head + finish()


def decode(data: bytes, shape: tuple[int, ...], alphabet: int) -> Symbolic:
    """Undo :func:`encode`.

    Raises:
        CheckpointError: the bytes are damaged.
    """
    if not MIN_SIZE <= math.prod(shape) < MAX_SIZE or not shape:
        raise CheckpointError(f"no context-coded stream fills shape {shape}")
    layout, start = layouts.read(data, shape, alphabet)
    reader = entropy.answer_reader(data[start:])
    signed = walk(layout, shape, lambda yes, truth: reader(yes), None)
    if not layout.low <= int(signed.min()) + layout.centre:
        raise CheckpointError("a context-coded symbol is below the lowest")
    if not int(signed.max()) + layout.centre <= layout.high:
        raise CheckpointError("a context-coded symbol is above the highest")
    values = (signed + layout.centre).astype(symbol_dtype(alphabet))
    if layout.transposed:
        values = values.reshape(layout.matrix(shape)).T
    return values.reshape(shape)
