"""The top of a teacher's logits to bytes and back.

Of each position its *row* is kept, the values and the rest, less the largest of them: only
differences count, and close to zero, where the probability is, floats are finest. Then come the
indices, in as many bits as the vocabulary needs.

``uint8`` spaces its codes by their squares, from 0 to the lowest number of the row (float16): fine
where the probability is. On rows of 8 to 128 of 50,257 tokens, at spreads from one sure token to a
flat top, the KL between a row and its bytes was, in nats:

========= ==================== ============ ============
dtype     bytes for a value    mean, worst  largest
========= ==================== ============ ============
float32   4                    1e-15        5e-15
float16   2                    1e-7         2e-7
bfloat16  2                    8e-6         1e-5
uint8     1, and 2 for a row   2e-5         9e-5
 linear   1, and 2 for a row   5e-5         3e-3
========= ==================== ============ ============

so bfloat16 and linear codes are not offered; without taking the largest off, float16 loses 6e-6 on
average and 2e-4 at most.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.checkpoint.packing import pack, unpack
from jaxcomp.checkpoint.raw import from_bytes, stored_bytes, to_bytes
from jaxcomp.distill.language.top_logits import TopLogits

Dtype = Literal["float32", "float16", "uint8"]
DTYPES = ("float32", "float16", "uint8")
LARGEST_VOCABULARY = 1 << 31

# The last code of a uint8 row is a token of probability zero.
_STEPS, _NEVER = 254, 255


class Layout(NamedTuple):
    """What all positions of a file have in common.

    Attributes:
        vocabulary: how many tokens there are.
        kept: how many are kept of each position.
        dtype: of the values, in :data:`DTYPES`.
        rest: whether the rest is kept.
        temperature: that of the rest.
    """

    vocabulary: int
    kept: int
    dtype: str
    rest: bool
    temperature: float

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.kept + self.rest

    @property
    def index_bits(self) -> tuple[int, int]:
        """Bits of an index that are packed together: its 16 low ones, and those above."""
        bits = max((self.vocabulary - 1).bit_length(), 1)
        return min(bits, 16), max(bits - 16, 0)


def bytes_for(layout: Layout, positions: int) -> int:
    """Bytes that :func:`encode` makes of some positions.

    Example:
        >>> bytes_for(Layout(50257, 32, "uint8", True, 1.0), 1)
        99
    """
    row = stored_bytes(layout.dtype, (positions, layout.width))
    scale = stored_bytes("float16", (positions,)) if layout.dtype == "uint8" else 0
    return scale + row + sum(_packed(positions * layout.kept, b) for b in layout.index_bits)


def encode(top: TopLogits, layout: Layout) -> bytes:
    """The bytes of a batch.

    Args:
        top: arrays of this layout, on the host or not.
        layout: of the file.

    Raises:
        TypeError: indices that are not integers.
        ValueError: values that are NaN or ``+inf``, indices outside the vocabulary.

    Example:
        >>> layout = Layout(vocabulary=9, kept=2, dtype="uint8", rest=True, temperature=1.0)
        >>> top = TopLogits(np.array([[3.0, 1.0]]), np.array([[8, 2]]), np.array([2.0]), 9)
        >>> read = decode(encode(top, layout), (1,), layout)
        >>> print(read.values.round(2), read.indices, read.rest.round(2))
        [[ 0. -2.]] [[8 2]] [-1.]
    """
    row = np.asarray(top.values)
    if layout.rest:
        row = np.append(row, np.asarray(top.rest)[..., None].astype(row.dtype), -1)
    row = row.astype(np.float64 if row.dtype == np.float64 else np.float32)
    if np.isnan(row).any() or np.isposinf(row).any():
        raise ValueError(
            "the teacher's logits hold NaN or +inf: find where it overflows, or, where that is "
            "padding, put zeros there"
        )
    with np.errstate(over="ignore"):  # What is so far below the largest has no probability.
        row = row - np.maximum(row.max(-1, keepdims=True), np.finfo(np.float32).min)
        row = row.astype(np.float32)
    return _encode_row(row, layout.dtype) + _encode_indices(np.asarray(top.indices), layout)


def decode(
    data: bytes | bytearray | memoryview, shape: tuple[int, ...], layout: Layout
) -> TopLogits:
    """Undo :func:`encode`: NumPy arrays, float32 and uint16 or int32.

    Args:
        data: :func:`bytes_for` bytes.
        shape: of the positions.
        layout: of the file.

    Raises:
        CheckpointError: an index is outside the vocabulary, or a value is not one.
    """
    row_shape, count = (*shape, layout.width), int(np.prod(shape, dtype=np.int64))
    indices = _decode_indices(data, count, layout).reshape(*shape, layout.kept)
    if layout.dtype == "uint8":
        at = stored_bytes("float16", shape)
        scale = from_bytes(data[:at], "float16", (*shape, 1)).astype(np.float32)
        codes = from_bytes(data[at : at + stored_bytes("uint8", row_shape)], "uint8", row_shape)
        row = 0 - scale * np.square(codes.astype(np.float32) / _STEPS)
        row[codes == _NEVER] = -np.inf
    else:
        size = stored_bytes(layout.dtype, row_shape)
        row = from_bytes(data[:size], layout.dtype, row_shape).astype(np.float32)
    if not (row <= 0).all():
        raise CheckpointError("a value that is NaN, or above the largest of its row")
    rest = row[..., -1] if layout.rest else None
    values = row[..., : layout.kept]
    return TopLogits(values, indices, rest, layout.vocabulary, layout.temperature)


def _encode_row(row: Shaped[np.ndarray, "..."], dtype: str) -> bytes:
    """Of numbers that are at most 0."""
    if dtype != "uint8":
        with np.errstate(over="ignore"):  # Below -65504 nothing is left of a probability.
            return to_bytes(row.astype(dtype))
    possible = row != -np.inf
    fall = np.where(possible, -row, 0)
    largest = np.minimum(fall.max(-1, keepdims=True), np.finfo(np.float16).max)
    scale = largest.astype(np.float16)
    share = fall / np.where(scale == 0, 1, scale).astype(np.float32)
    codes = np.minimum(np.rint(np.sqrt(share) * _STEPS), _STEPS)
    return to_bytes(scale) + to_bytes(np.where(possible, codes, _NEVER).astype(np.uint8))


def _encode_indices(indices: Shaped[np.ndarray, "..."], layout: Layout) -> bytes:
    if indices.dtype.kind not in "iu":
        raise TypeError(f"indices must be integers, got {indices.dtype}: cast them.")
    if indices.min() < 0 or indices.max() >= layout.vocabulary:
        wrong = indices.min() if indices.min() < 0 else indices.max()
        raise ValueError(
            f"indices hold {wrong}, but tokens are 0 to {layout.vocabulary - 1}: pass the size of "
            "the vocabulary that they belong to"
        )
    low, high = layout.index_bits
    wide = indices.astype(np.uint32)
    first = _pack_low((wide & 0xFFFF).astype(np.uint16), low)
    return first + (pack((wide >> 16).astype(np.uint16), high) if high else b"")


def _decode_indices(
    data: bytes | bytearray | memoryview, positions: int, layout: Layout
) -> Shaped[np.ndarray, "n"]:
    low, high = layout.index_bits
    count = positions * layout.kept
    end = bytes_for(layout, positions)
    middle = end - _packed(count, high)
    indices = _unpack_low(bytes(data[middle - _packed(count, low) : middle]), low, count)
    if high:
        above = unpack(bytes(data[middle:end]), high, count).astype(np.int32)
        indices = (above << 16) | indices
    if indices.max() >= layout.vocabulary:
        raise CheckpointError(f"an index {indices.max()} in a vocabulary of {layout.vocabulary}")
    return indices


def _pack_low(codes: Shaped[np.ndarray, "..."], bits: int) -> bytes:
    """As :func:`pack`, which takes its time where nothing is to be done."""
    return to_bytes(codes) if bits == 16 else pack(codes, bits)


def _unpack_low(data: bytes, bits: int, count: int) -> Shaped[np.ndarray, "n"]:
    if bits == 16:
        return from_bytes(data, "uint16", (count,))
    return unpack(data, bits, count).astype(np.uint16)


def _packed(count: int, bits: int) -> int:
    return -(-count * bits // 8)
