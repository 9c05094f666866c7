"""The static frequency model of a symbol stream, and the few bytes that describe it.

Counts are rounded to small floating-point numbers (``mantissa`` bits after the leading one), so
that a handful of bits a symbol describes them; the encoder tries every mantissa and keeps the one
for which model and data together are smallest. The most frequent symbol's count is not stored: it
is what the others leave of the total. Everything a decoder computes is integer arithmetic, and the
frequencies sum to ``2**24`` exactly, so that every platform decodes the same symbols.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from jaxcomp.checkpoint.errors import CheckpointError

PRECISION = 24
MAX_SYMBOLS = 1 << 38
_MANTISSAS = range(13)
_ORDERS = range(8)
_RUN_ORDER = 2


class Model(NamedTuple):
    """Which symbols occur, and how often.

    Attributes:
        present: the symbols that occur, ascending; at least two.
        frequencies: one positive integer per present symbol, ``2**PRECISION`` in total.
    """

    present: Int64[np.ndarray, " present"]
    frequencies: Int64[np.ndarray, " present"]


def fit(counts: Int64[np.ndarray, " alphabet"]) -> tuple[Model, bytes]:
    """Choose the model for which description and data are smallest together.

    Args:
        counts: how often each symbol of the alphabet occurs; at least two must occur, and at most
            ``2**38`` symbols in all.

    Returns:
        The model as a decoder will see it, and the bytes that describe it.

    Example:
        >>> model, description = fit(np.array([900, 0, 100]))
        >>> model.present, model.frequencies, len(description)
        (array([0, 2]), array([15166603,  1610613]), 4)
    """
    present = np.flatnonzero(counts)
    total = int(counts.sum())
    mode = int(np.argmax(counts[present]))
    others = np.delete(counts[present], mode)
    guess = max(1, total // len(present))
    best: tuple[float, int, int, np.ndarray] | None = None
    for mantissa in _MANTISSAS:
        levels = _level(others, mantissa)
        frequencies = _frequencies(_value(levels, mantissa), mode, total)
        data_bits = float(np.sum(counts[present] * (PRECISION - np.log2(frequencies))))
        deltas = _zigzag(np.diff(levels, prepend=_level(np.array([guess]), mantissa)))
        costs = [int(_widths(deltas, order).sum()) for order in _ORDERS]
        order = int(np.argmin(costs))
        if best is None or data_bits + costs[order] < best[0]:
            best = (data_bits + costs[order], mantissa, order, frequencies)
    assert best is not None
    _, mantissa, order, frequencies = best
    deltas = _zigzag(np.diff(_level(others, mantissa), prepend=_level(np.array([guess]), mantissa)))
    bits = f"{mantissa:04b}{order:03b}{_presence(present, len(counts))}"
    bits += _fixed(mode, len(present)) + _golomb(deltas, order)
    bits += "0" * (-len(bits) % 8)
    return Model(present, frequencies), int(bits, 2).to_bytes(len(bits) // 8, "big")


def parse(data: bytes | memoryview, alphabet: int, total: int) -> tuple[Model, int]:
    """Read a model back.

    Args:
        data: bytes that begin with a description made by :func:`fit`.
        alphabet: how many symbols there are.
        total: how many symbols the stream holds.

    Returns:
        The model, and how many bytes described it.

    Raises:
        CheckpointError: the description is damaged.
    """
    if not 2 <= total <= MAX_SYMBOLS:
        raise CheckpointError(f"no frequency model describes {total} symbols")
    # A symbol takes at most two runs and a delta, none of them longer than 128 bits.
    reader = _Bits(bytes(data[: 64 + 48 * alphabet]))
    mantissa, order = reader.fixed(4), reader.fixed(3)
    if mantissa not in _MANTISSAS:
        raise CheckpointError(f"a frequency model has {mantissa} mantissa bits")
    present = _read_presence(reader, alphabet)
    mode = reader.fixed((len(present) - 1).bit_length())
    if mode >= len(present):
        raise CheckpointError("a frequency model's most frequent symbol does not occur")
    level = int(_level(np.array([max(1, total // len(present))]), mantissa)[0])
    highest = int(_level(np.array([MAX_SYMBOLS]), mantissa)[0])
    levels = np.empty(len(present) - 1, np.int64)
    for i in range(len(levels)):
        delta = reader.golomb(order)
        level += (delta >> 1) ^ -(delta & 1)
        if not 1 <= level <= highest:
            raise CheckpointError("a frequency model's count is out of range")
        levels[i] = level
    counts = _value(levels, mantissa)
    if int(counts.sum()) > MAX_SYMBOLS:
        raise CheckpointError("a frequency model's counts are out of range")
    return Model(present, _frequencies(counts, mode, total)), reader.bytes_read()


def _frequencies(others: np.ndarray, mode: int, total: int) -> np.ndarray:
    """Scale counts to sum to ``2**PRECISION``; the most frequent symbol takes what is left."""
    counts = np.insert(others, mode, max(1, total - int(others.sum())))
    room = (1 << PRECISION) - len(counts)
    frequencies = 1 + counts * room // int(counts.sum())
    frequencies[mode] += (1 << PRECISION) - int(frequencies.sum())
    return frequencies


def _value(levels: np.ndarray, mantissa: int) -> np.ndarray:
    """The count that a level stands for: exact below ``2**(mantissa + 1)``, then geometric."""
    exponent = np.maximum((levels >> mantissa) - 1, 0)
    fraction = levels - (exponent << mantissa)
    return fraction << exponent


def _level(counts: np.ndarray, mantissa: int) -> np.ndarray:
    """The nearest level of each positive count."""
    # The exponent of a float64 is the exact bit length of an integer below 2**53.
    lengths = np.frexp(counts.astype(np.float64))[1].astype(np.int64)
    exponent = np.maximum(lengths - 1 - mantissa, 0)
    half = (1 << exponent) >> 1
    return (exponent << mantissa) + ((counts + half) >> exponent)


def _zigzag(deltas: np.ndarray) -> np.ndarray:
    return np.where(deltas < 0, -2 * deltas - 1, 2 * deltas)


def _widths(values: np.ndarray, order: int) -> np.ndarray:
    """Bits of each value as an Exp-Golomb code."""
    prefix = (values >> order) + 1
    return 2 * np.frexp(prefix.astype(np.float64))[1].astype(np.int64) - 1 + order


def _golomb(values: np.ndarray, order: int) -> str:
    """Exp-Golomb codes of non-negative integers, as a string of bits."""
    widths = _widths(values, order)
    codes = (((values >> order) + 1) << order) | (values & ((1 << order) - 1))
    return "".join(f"{c:0{w}b}" for c, w in zip(codes.tolist(), widths.tolist(), strict=True))


def _fixed(value: int, alphabet: int) -> str:
    width = (alphabet - 1).bit_length()
    return f"{value:0{width}b}" if width else ""


def _presence(present: np.ndarray, alphabet: int) -> str:
    """One bit if every symbol occurs; else lengths of alternating absent and present runs."""
    if len(present) == alphabet:
        return "1"
    flags = np.zeros(alphabet + 1, bool)
    flags[1:][present] = True
    edges = np.flatnonzero(np.diff(flags))
    runs = np.diff(edges, prepend=0, append=alphabet)
    return "0" + _golomb(runs, _RUN_ORDER)


def _read_presence(reader: "_Bits", alphabet: int) -> np.ndarray:
    if reader.fixed(1):
        present = np.arange(alphabet)
    else:
        flags = np.zeros(alphabet, bool)
        position, keep, first = 0, False, True
        while position < alphabet:
            run = reader.golomb(_RUN_ORDER)
            if run > alphabet - position or (run == 0 and not first):
                raise CheckpointError("a frequency model's runs do not fit its alphabet")
            flags[position : position + run] = keep
            position, keep, first = position + run, not keep, False
        present = np.flatnonzero(flags)
    if len(present) < 2:
        raise CheckpointError("a frequency model has fewer than two symbols")
    return present


class _Bits:
    """Reads numbers from a string of bits."""

    def __init__(self, data: bytes):
        self._text = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}" if data else ""
        self._at = 0

    def fixed(self, width: int) -> int:
        end = self._at + width
        if end > len(self._text):
            raise CheckpointError("a frequency model is cut short")
        value = int(self._text[self._at : end] or "0", 2)
        self._at = end
        return value

    def golomb(self, order: int) -> int:
        one = self._text.find("1", self._at, self._at + 64)
        if one < 0:
            raise CheckpointError("a frequency model is cut short")
        width = one - self._at + 1
        self._at = one
        return ((self.fixed(width) - 1) << order) | self.fixed(order)

    def bytes_read(self) -> int:
        return -(-self._at // 8)
