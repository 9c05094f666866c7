"""The outer file: a safetensors file with one tensor for everything that is small or coded.

The tensor ``jxc`` (bytes) holds, in this order::

    3 bytes   b"JXC"
    1 byte    format version
    4 bytes   crc32 of the safetensors header, of the 4 bytes above and of the 3 + n below;
              in version 2, of all that is below
    3 bytes   n, little-endian
    n bytes   the manifest: JSON, deflated with the dictionary of the version
    …         the parts, in the manifest's order; in version 1 each followed by its own crc32

Version 2 is for small files, where a checksum for each part would be a part of what matters: the
one checksum is looked at before anything is decoded.

Large raw arrays are ordinary tensors beside it, so that any safetensors reader sees them; their
checksums stand among the parts. All integers are little-endian.
"""

import json
import struct
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.checkpoint.packing import inflate

MAGIC = b"JXC"
SEALED_PARTS, SEALED_WHOLE = 1, 2
VERSIONS = (SEALED_PARTS, SEALED_WHOLE)
WHOLE_LIMIT = 1 << 16
NAME = "jxc"
MANIFEST_LIMIT = 8 << 20

_PREAMBLE = struct.Struct("<3sBI")
_SIZE_BYTES = 3

# Part of the format, one for each version: what manifests are likely to say, the likeliest last.
# Never change one; a better dictionary is a new format version.
DICTIONARY_1 = (
    b'"accuracy":"version":"name":"model":"batch_stats":{"params":{"mean":["raw","bfloat16",['
    b'"var":["raw","float16",["int32","uint8","int8","bool",'
    b'"Embed_0":{"embedding":["tensor","float32",["LayerNorm_0":{"BatchNorm_0":{"scale":["raw",'
    b'"float32",["attention":{"query":{"key":{"value":{"out":{"layers":{"blocks":{"linear1":{'
    b'"conv1":{"fc1":{"list","tuple","dict","float","MlpBlock_0":{"Conv_0":{"Conv_1":{"Conv_2":{'
    b'"w":["b":["sparse",{},{"values":["raw","float32",[]]},{"mask":["constant",2,["packed",'
    b'"deflate",256,[64,128,512,1024,32,10]]"zero_point":["raw","uint8",[1,1,'
    b'"kernel":["quantized",{"bits":8,"group":null,"dtype":"bfloat16"},{"bits":4,"group":null,'
    b'"dtype":"float32"},{"scale":["raw","float32",[1,1,1,]]},{"codes":["range",16,[3,3,'
    b'"kernel":["codebook",{"dtype":"float32"},{"codebook":["raw","float32",[16]]},'
    b'{"indices":["range",16,[]]}]},"Dense_0":{"Dense_1":{"Dense_2":{"bias":["raw","float32",['
    b'{"metadata":{"tree":{"params":{'
)

DICTIONARY_2 = DICTIONARY_1 + (
    b'"BatchNorm_0":{"mean":"var":"fc3":{"fc2":{"fc1":{"conv2":{"conv1":{"norm":{"scale":'
    b'"head":{"up":{"down":{"embedding":{"codes":["packed",16,[10],5]}]}}}}}'
    b',["raw","float32",[],["raw","float32",[300]]},"Conv_1":{"kernel":[5,5,20,50],[5,5,1,20],'
    b'["sparse",{},{"values":["raw","float32",[]},{"mask":["context",2,[[64,128,256,512,'
    b'["codebook",{"dtype":"float32"},{"codebook":["raw","float32",[16]]},{"indices":["context",16,['
    b'"bias":["quantized",{"bits":8,"blocks":[],"zero":true,"dtype":"float32"},'
    b'{"scale":["raw","float32",[1]]},{"codes":["range",256,[100],'
    b'}]},"Dense_0":{}]},"Dense_1":{}]},"Dense_2":{"kernel":["quantized",{"bits":4,"blocks":[],'
    b'"zero":true,"dtype":"float32"},{"scale":["raw","float32",[1,1,1,1]]},'
    b'{"codes":["context",16,[784,300],[300,100],[800,500],[500,10],'
    b'"bias":["raw","float32",[10]]}}}}{"metadata":{{"tree":{"params":{"Conv_0":{"kernel":'
)
_DICTIONARIES = {SEALED_PARTS: DICTIONARY_1, SEALED_WHOLE: DICTIONARY_2}

_CODES = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "int64": "I64",
    "uint64": "U64",
    "float64": "F64",
}

TENSOR_DTYPES = tuple(_CODES)


class Tensor(NamedTuple):
    """An ordinary safetensors tensor: its dtype by NumPy's name, its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytearray | bytes


class Container(NamedTuple):
    """A file taken apart.

    Attributes:
        version: format version.
        manifest: JSON text.
        body: the parts; in version 1 with their checksums.
        tensors: ordinary tensors by name.
    """

    version: int
    manifest: str
    body: memoryview
    tensors: dict[str, Tensor]


def build(
    manifest: str,
    body: bytes,
    tensors: dict[str, Shaped[np.ndarray, "..."]],
    version: int = SEALED_PARTS,
) -> list[bytes | memoryview]:
    """Lay out a file.

    Args:
        manifest: JSON text, ASCII.
        body: the parts; in version 1 with their checksums.
        tensors: large arrays by name, of :data:`TENSOR_DTYPES`; none in version 2.
        version: of the format.

    Returns:
        The file's bytes, in pieces to be written one after the other.

    Raises:
        ValueError: the manifest is longer than 8 MiB.

    Example:
        >>> pieces = build("{}", b"", {})
        >>> read(b"".join(pieces)).manifest
        '{}'
    """
    from safetensors.numpy import save

    text = manifest.encode("ascii")
    if len(text) > MANIFEST_LIMIT:
        raise ValueError(
            f"the tree's structure takes {len(text)} bytes, more than {MANIFEST_LIMIT}: stack "
            "layers of equal shape into one leaf, or save the tree in several files"
        )
    packer = zlib.compressobj(
        9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _DICTIONARIES[version]
    )
    packed = packer.compress(text) + packer.flush()
    start = MAGIC + bytes([version])
    rest = len(packed).to_bytes(_SIZE_BYTES, "little") + packed
    blob = np.frombuffer(start + bytes(4) + rest + body, np.uint8)
    data = save({**tensors, NAME: blob})
    header = data[: 8 + struct.unpack_from("<Q", data)[0]]
    # The header comes before the checksum of itself, so the checksum is put in afterwards.
    at = len(header) + json.loads(header[8:])[NAME]["data_offsets"][0] + len(start)
    view = memoryview(data)
    return [
        view[:at],
        struct.pack(
            "<I", _crc32(header, start, rest, *([body] if version == SEALED_WHOLE else []))
        ),
        view[at + 4 :],
    ]


def read(data: bytes) -> Container:
    """Take a file apart and check its header and manifest; the parts are not looked at.

    Args:
        data: the whole file.

    Raises:
        CheckpointError: not a sound file, or one in a newer format.
    """
    listed = _outer(data)
    if NAME not in listed:
        raise CheckpointError(f"not a jaxcomp file: a safetensors file without tensor {NAME!r}")
    blob = listed.pop(NAME)
    if blob.dtype != "uint8" or len(blob.shape) != 1 or len(blob.data) < _PREAMBLE.size + 3:
        raise CheckpointError(f"not a jaxcomp file: tensor {NAME!r} is not of its kind")
    magic, version, expected = _PREAMBLE.unpack_from(blob.data)
    if magic != MAGIC:
        raise CheckpointError(f"not a jaxcomp file: tensor {NAME!r} does not begin with {MAGIC}")
    if version not in VERSIONS:
        raise CheckpointError(
            f"format version {version}, this jaxcomp reads versions 1 and 2: a newer jaxcomp "
            "wrote the file (upgrade to read it), or it is damaged"
        )
    view = memoryview(bytes(blob.data))
    first = _PREAMBLE.size
    end = first + _SIZE_BYTES + int.from_bytes(view[first : first + _SIZE_BYTES], "little")
    header = memoryview(data)[: 8 + struct.unpack_from("<Q", data)[0]]
    covered = len(view) if version == SEALED_WHOLE else end
    if end > len(view) or expected != _crc32(header, view[:4], view[first:covered]):
        what = "the file" if version == SEALED_WHOLE else "the header or the manifest"
        raise CheckpointError(f"{what} is damaged: its checksum does not match")
    if version == SEALED_WHOLE and listed:
        raise CheckpointError("tensors that no checksum covers")
    packed = bytes(view[first + _SIZE_BYTES : end])
    text = inflate(packed, MANIFEST_LIMIT, _DICTIONARIES[version])
    try:
        manifest = text.decode("ascii")
    except UnicodeDecodeError as error:
        raise CheckpointError("the manifest is not ASCII") from error
    return Container(version, manifest, view[end:], listed)


def checksum(data: bytes | memoryview) -> bytes:
    """What follows a part: 4 bytes of crc32, or nothing after a part of no bytes.

    Example:
        >>> len(checksum(b"abc")), len(checksum(b""))
        (4, 0)
    """
    return struct.pack("<I", zlib.crc32(data)) if len(data) else b""


def _outer(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, with dtypes that this format has no use for as they are.

    The library has checked that shapes match their bytes and that no byte is left over.
    """
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(data)
    except SafetensorError as error:
        raise CheckpointError(f"not a sound safetensors file: {error}") from error
    names = {code: name for name, code in _CODES.items()}
    return {
        name: Tensor(names.get(e["dtype"], e["dtype"]), tuple(e["shape"]), e["data"])
        for name, e in entries
    }


def _crc32(*pieces: bytes | memoryview) -> int:
    total = 0
    for piece in pieces:
        total = zlib.crc32(piece, total)
    return total
