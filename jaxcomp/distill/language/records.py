"""A file of batches that grows at its end: a header, then one record a batch.

::

    8 bytes   b"JXTEACH" and the format version
    4 bytes   n, the length of the JSON that follows
    4 bytes   crc32 of the 12 bytes above and of the JSON
    n bytes   JSON: the layout of the rows, and what the file is about

and of each record::

    4 bytes   b"BTCH"
    4 bytes   crc32 of the 48 bytes that follow
    4 bytes   crc32 of the payload
    4 bytes   how many axes its positions have, 1 to 8
    8 bytes   its number, from 0
    32 bytes  the sizes of these axes, then zeros
    …         the payload, as :mod:`jaxcomp.distill.language.rows` has it

All integers are little-endian. A record that a kill has cut short can only be the last one: it is
known by the end of the file (or, after a power cut, by zeros up to the end) and counts as torn.
Anything else that does not fit is damage. Neither a safetensors nor an ``.npy`` file can grow and
be whole at every moment.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.distill.language.rows import DTYPES, LARGEST_VOCABULARY, Layout, bytes_for

MAGIC = b"JXTEACH"
VERSION = 1
AXES = 8
HEADER_LIMIT = 1 << 16

_PREAMBLE = struct.Struct("<7sBI")
_CRC = struct.Struct("<I")
_HEAD = struct.Struct(f"<IIQ{AXES}I")
_MARK = b"BTCH"
HEAD_BYTES = len(_MARK) + _CRC.size + _HEAD.size


class Head(NamedTuple):
    """What stands before a payload: its checksum, its number and the shape of its positions."""

    crc: int
    number: int
    shape: tuple[int, ...]


class Scan(NamedTuple):
    """Where the records of a file begin, and where the last whole one ends."""

    starts: tuple[int, ...]
    end: int


def header_bytes(layout: Layout, about: Mapping[str, str]) -> bytes:
    """The header of a file.

    Raises:
        ValueError: it is about too much.
    """
    text = json.dumps({"layout": layout._asdict(), "about": dict(about)}).encode("ascii")
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"about takes {len(text)} bytes, more than {HEADER_LIMIT}: say less")
    start = _PREAMBLE.pack(MAGIC, VERSION, len(text))
    return start + _CRC.pack(zlib.crc32(text, zlib.crc32(start))) + text


def read_header(data: Any) -> tuple[Layout, dict[str, str], int]:
    """The layout, what the file is about, and where the records begin.

    Args:
        data: the bytes of the file, sliceable.

    Raises:
        CheckpointError: not such a file, one in a newer format, or damaged.
    """
    first = _PREAMBLE.size + _CRC.size
    start = bytes(data[: _PREAMBLE.size])
    if len(data) < first or start[: len(MAGIC)] != MAGIC:
        raise CheckpointError("not a file of teacher outputs: it does not begin like one")
    _, version, length = _PREAMBLE.unpack(start)
    if version != VERSION:
        raise CheckpointError(
            f"format version {version}, this jaxcomp reads version {VERSION}: a newer jaxcomp "
            "wrote the file (upgrade to read it), or it is damaged"
        )
    (expected,) = _CRC.unpack(bytes(data[_PREAMBLE.size : first]))
    text = bytes(data[first : first + min(length, HEADER_LIMIT + 1)])
    if length != len(text) or zlib.crc32(text, zlib.crc32(start)) != expected:
        raise CheckpointError("the header is damaged: its checksum does not match")
    try:
        said = json.loads(text)
        layout, about = Layout(**said["layout"]), said["about"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"the header cannot be read: {error}") from error
    _check(layout, about)
    return layout, about, first + length


def record_head(payload: bytes, number: int, shape: tuple[int, ...]) -> bytes:
    """What stands before a payload."""
    sizes = shape + (0,) * (AXES - len(shape))
    rest = _HEAD.pack(zlib.crc32(payload), len(shape), number, *sizes)
    return _MARK + _CRC.pack(zlib.crc32(rest)) + rest


def read_head(data: Any, at: int) -> Head | None:
    """The head of the record that begins at a place; None if there is no sound one."""
    head = bytes(data[at : at + HEAD_BYTES])
    if len(head) < HEAD_BYTES or head[: len(_MARK)] != _MARK:
        return None
    rest = head[len(_MARK) + _CRC.size :]
    if zlib.crc32(rest) != _CRC.unpack_from(head, len(_MARK))[0]:
        return None
    crc, axes, number, *sizes = _HEAD.unpack(rest)
    if not 1 <= axes <= AXES or 0 in sizes[:axes] or any(sizes[axes:]):
        return None
    return Head(crc, number, tuple(sizes[:axes]))


def scan(data: Any, begin: int, layout: Layout) -> Scan:
    """Find the records by going from head to head; payloads are not looked at.

    Args:
        data: the bytes of the file, sliceable.
        begin: where the records begin.
        layout: of the rows.

    Raises:
        CheckpointError: there is damage before the end.
    """
    starts, at = [], begin
    while at < len(data):
        head = read_head(data, at)
        if head is None:
            if len(data) - at < HEAD_BYTES or _only_zeros(data, at):
                break
            raise CheckpointError(f"record {len(starts)} at byte {at} is damaged")
        if head.number != len(starts):
            raise CheckpointError(
                f"record {head.number} at byte {at} stands where {len(starts)} should: two "
                "processes have written at once, or pieces of files were put together"
            )
        end = at + HEAD_BYTES + bytes_for(layout, math.prod(head.shape))
        if end > len(data):
            break
        starts.append(at)
        at = end
    return Scan(tuple(starts), at)


def read_payload(data: Any, at: int, layout: Layout) -> tuple[bytes, tuple[int, ...]]:
    """The payload of a record that :func:`scan` found, and the shape of its positions.

    Raises:
        CheckpointError: its checksum does not match.
    """
    head = read_head(data, at)
    if head is None:
        raise CheckpointError(f"the record at byte {at} was changed while the file was open")
    first = at + HEAD_BYTES
    payload = bytes(data[first : first + bytes_for(layout, math.prod(head.shape))])
    if zlib.crc32(payload) != head.crc:
        raise CheckpointError(f"record {head.number} is damaged: its checksum does not match")
    return payload, head.shape


def map_file(path: str | os.PathLike) -> Any:
    """The bytes of a file, in memory only where they are read.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is empty, or not a regular file.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(f"{name}: there is no such file of teacher outputs")
    if not os.path.isfile(name) or not os.path.getsize(name):
        raise CheckpointError("an empty file, or not a regular one")
    return np.memmap(name, np.uint8, "r")


def _only_zeros(data: Any, at: int) -> bool:
    return not any(np.any(data[i : i + (1 << 20)]) for i in range(at, len(data), 1 << 20))


def _check(layout: Layout, about: Any) -> None:
    numbers = (layout.vocabulary, layout.kept)
    sound = (
        all(type(n) is int for n in numbers)
        and 1 <= layout.kept <= layout.vocabulary <= LARGEST_VOCABULARY
        and layout.dtype in DTYPES
        and type(layout.rest) is bool
        and type(layout.temperature) is float
        and 0 < layout.temperature < math.inf
        and isinstance(about, dict)
        and all(isinstance(word, str) for word in about.values())
    )
    if not sound:
        raise CheckpointError(f"the header does not make sense: {layout}, about {about!r:.80}")
