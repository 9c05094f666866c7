"""Small integers to dense bytes and back, and deflate that cannot explode."""

import zlib
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxcomp.arrays.bits import pack_bits_host, packed_length, unpack_bits_host
from jaxcomp.checkpoint.errors import CheckpointError

CHUNK = 1 << 20

Symbolic = Shaped[np.ndarray, "..."]


def symbol_dtype(alphabet: int) -> np.dtype:
    """The dtype of decoded symbols: ``uint8`` up to 256 symbols, ``uint16`` up to 65,536.

    Example:
        >>> symbol_dtype(256), symbol_dtype(257)
        (dtype('uint8'), dtype('uint16'))
    """
    return np.dtype(np.uint8 if alphabet <= 256 else np.uint16)


def pack(values: Symbolic, bits: int) -> bytes:
    """Pack integers below ``2**bits`` densely, least significant bit first.

    Example:
        >>> pack(np.array([1, 2, 3], np.uint8), bits=2)
        b'9'
    """
    flat = values.reshape(-1)
    # Eight codes fill whole bytes, so chunks that are multiples of eight join without a gap.
    chunks = (flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK))
    return b"".join(pack_bits_host(chunk, bits).tobytes() for chunk in chunks)


def unpack(data: bytes, bits: int, count: int) -> Symbolic:
    """Undo :func:`pack`, into ``uint8`` up to 8 bits and ``uint16`` above.

    Raises:
        CheckpointError: too few or too many bytes, or padding bits that are not zero.

    Example:
        >>> unpack(b"9", bits=2, count=3)
        array([1, 2, 3], dtype=uint8)
    """
    if len(data) != packed_length(count, bits):
        raise CheckpointError(f"{count} codes of {bits} bits do not fill {len(data)} bytes")
    padding = -count * bits % 8
    if padding and data[-1] >> (8 - padding):
        raise CheckpointError("the padding after packed codes is not zero")
    out = np.empty(count, np.uint8 if bits <= 8 else np.uint16)
    for start in range(0, count, CHUNK):
        length = min(CHUNK, count - start)
        packed = np.frombuffer(data, np.uint8, packed_length(length, bits), start * bits // 8)
        out[start : start + length] = unpack_bits_host(packed, bits, length)
    return out


def inflate(data: bytes, limit: int, dictionary: bytes = b"") -> bytes:
    """Decompress raw deflate data that may not grow beyond ``limit`` bytes.

    Raises:
        CheckpointError: the data is damaged, longer than its stream, or grows beyond the limit.

    Example:
        >>> inflate(bytes.fromhex("4b4c4a06"  "00"), limit=3)
        b'abc'
    """
    extra: dict[str, Any] = {"zdict": dictionary} if dictionary else {}
    stream = zlib.decompressobj(-15, **extra)
    try:
        text = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise CheckpointError(f"deflated data is damaged: {error}") from error
    if len(text) > limit:
        raise CheckpointError(f"deflated data grows beyond {limit} bytes")
    if not stream.eof or stream.unused_data:
        raise CheckpointError("deflated data does not end where its part ends")
    return text
