"""Codecs for streams of small unsigned integers, under the names that files record.

A codec turns an array of symbols into bytes and back; it is told the shape, so that one that
conditions on neighbours needs nothing else. :func:`encode` tries every codec of :data:`CODECS` and
keeps the smallest result. A later format of symbols is a new name in that table: files that use
none of it stay readable by what is installed today.
"""

import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxcomp.checkpoint import contexts, entropy
from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.checkpoint.packing import Symbolic, inflate, pack, symbol_dtype, unpack

MAX_ALPHABET = 1 << 16
_SAMPLE = 1 << 16


class Codec(NamedTuple):
    """A pair of inverse functions.

    Attributes:
        encode: ``(values, alphabet) -> bytes``, or None where the codec does not apply or is sure
            not to win.
        decode: ``(data, shape, alphabet) -> values``; raises :class:`CheckpointError` for bytes
            that no encoder writes.
    """

    encode: Callable[[Symbolic, int], bytes | None]
    decode: Callable[[bytes, tuple[int, ...], int], Symbolic]


def encode(values: Symbolic, alphabet: int) -> tuple[str, bytes]:
    r"""Encode symbols with the codec that makes them smallest.

    Args:
        values: non-negative integers below ``alphabet``, any shape and integer dtype.
        alphabet: how many symbols there are, 1 to 65,536.

    Returns:
        The codec's name and the bytes.

    Raises:
        ValueError: the alphabet is out of range, or a value is.

    Example:
        >>> encode(np.array([3, 3, 3], np.uint8), alphabet=4)
        ('constant', b'\x03')
    """
    if not 1 <= alphabet <= MAX_ALPHABET:
        raise ValueError(f"an alphabet has 1 to {MAX_ALPHABET} symbols, not {alphabet}")
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"symbols are integers, not {values.dtype}")
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < alphabet:
        raise ValueError(f"a symbol is outside its alphabet of {alphabet}")
    narrow = np.asarray(values, symbol_dtype(alphabet))
    best: tuple[str, bytes] | None = None
    for name, codec in CODECS.items():
        data = codec.encode(narrow, alphabet)
        if data is not None and (best is None or len(data) < len(best[1])):
            best = (name, data)
        if best is not None and best[0] == "constant":
            break
    assert best is not None
    return best


def decode(name: str, data: bytes, shape: tuple[int, ...], alphabet: int) -> Symbolic:
    r"""Undo :func:`encode`.

    Args:
        name: the codec's name.
        data: its bytes.
        shape: shape of the symbols.
        alphabet: how many symbols there are.

    Returns:
        Symbols of ``shape``, in :func:`symbol_dtype`.

    Raises:
        CheckpointError: the codec is unknown here, or the bytes are damaged.

    Example:
        >>> decode("constant", b"\x03", (3,), alphabet=4)
        array([3, 3, 3], dtype=uint8)
    """
    if name not in CODECS:
        raise CheckpointError(
            f"symbols are coded with {name!r}, which this version does not know: a newer jaxcomp "
            "wrote the file, upgrade to read it"
        )
    return CODECS[name].decode(data, shape, alphabet)


def _constant_encode(values: Symbolic, alphabet: int) -> bytes | None:
    if values.size and values.min() != values.max():
        return None
    value = int(values.max(initial=0))
    return value.to_bytes((value.bit_length() + 7) // 8, "little")


def _constant_decode(data: bytes, shape: tuple[int, ...], alphabet: int) -> Symbolic:
    value = int.from_bytes(data[:4], "little")
    if len(data) > 2 or value >= alphabet:
        raise CheckpointError("a constant stream holds no symbol of its alphabet")
    return np.full(shape, value, symbol_dtype(alphabet))


def _packed_encode(values: Symbolic, alphabet: int) -> bytes | None:
    return pack(values, _bits(alphabet))


def _packed_decode(data: bytes, shape: tuple[int, ...], alphabet: int) -> Symbolic:
    return _checked(unpack(data, _bits(alphabet), math.prod(shape)), shape, alphabet)


def _bits(alphabet: int) -> int:
    return max(1, (alphabet - 1).bit_length())


def _deflate_encode(values: Symbolic, alphabet: int) -> bytes | None:
    # Deflate wins only where symbols repeat in patterns, and is slow: ask a sample first.
    flat = values.reshape(-1)
    if flat.size > _SAMPLE:
        sample = flat[flat.size // 2 :][:_SAMPLE]
        counts = np.bincount(sample)
        used = counts[counts > 0] / sample.size
        entropy_bytes = -float(np.sum(used * np.log2(used))) * sample.size / 8
        if len(_deflate(sample)) > entropy_bytes:
            return None
    return _deflate(flat)


def _deflate(values: Symbolic) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return packer.compress(little.tobytes()) + packer.flush()


def _deflate_decode(data: bytes, shape: tuple[int, ...], alphabet: int) -> Symbolic:
    dtype = symbol_dtype(alphabet).newbyteorder("<")
    text = inflate(data, math.prod(shape) * dtype.itemsize)
    if len(text) != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{len(text)} bytes of symbols do not fill shape {shape}")
    return _checked(np.frombuffer(text, dtype).astype(symbol_dtype(alphabet)), shape, alphabet)


def _checked(values: Symbolic, shape: tuple[int, ...], alphabet: int) -> Symbolic:
    if values.size and int(values.max()) >= alphabet:
        raise CheckpointError(f"a symbol is outside its alphabet of {alphabet}")
    return values.reshape(shape)


CODECS = {
    "constant": Codec(_constant_encode, _constant_decode),
    "range": Codec(entropy.range_encode, entropy.range_decode),
    "ans": Codec(entropy.ans_encode, entropy.ans_decode),
    "context": Codec(contexts.encode, contexts.decode),
    "packed": Codec(_packed_encode, _packed_decode),
    "deflate": Codec(_deflate_encode, _deflate_decode),
}
