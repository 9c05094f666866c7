"""Save a tree: check, encode, write."""

import hashlib
import os
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxcomp.arrays import Symbols
from jaxcomp.checkpoint import coder, raw
from jaxcomp.checkpoint.container import (
    SEALED_PARTS,
    SEALED_WHOLE,
    WHOLE_LIMIT,
    build,
    checksum,
)
from jaxcomp.checkpoint.files import resolve_target, write_file
from jaxcomp.checkpoint.leaves import (
    ArraySpec,
    SymbolsSpec,
    can_be_tensor,
    parse_leaf,
    put_together,
    take_apart,
    tensor_name,
)
from jaxcomp.checkpoint.manifest import Path, check_metadata, dumps, encode_tree, show
from jaxcomp.checkpoint.support import check_leaf

# Below, saying where it is stored may take more bytes than storing it again.
_LEAST_SHARED = 16


class Written(NamedTuple):
    """What a file will hold.

    Attributes:
        body: parts and their checksums, in order.
        tensors: large arrays by name.
        numbers: of parts that may come again, by a digest of what is in them.
        stored: what stands in the manifest of each part.
    """

    body: list[tuple[bytes, bytes]]
    tensors: dict[str, np.ndarray]
    numbers: dict[bytes, int]
    stored: list[ArraySpec | SymbolsSpec]


def save(path: str | os.PathLike, tree: Any, metadata: dict[str, Any] | None = None) -> int:
    """Write a tree of arrays and compressed leaves to one small ``.jxc`` file.

    Codes, indices and masks are entropy-coded; all other arrays are stored bit for bit. Equal ones,
    such as tied weights or a codebook of all leaves, are stored once, and come back as arrays of
    their own. The file is written under a temporary name, synced and renamed, so that a crash
    leaves the old one.

    Args:
        path: the file; its directory must exist.
        tree: nested dicts (with string or int keys), lists and tuples, of arrays of any numeric
            dtype, compressed leaves, None, and Python bools, ints, floats and strings.
            ``FrozenDict``, ``OrderedDict`` and ``nnx.State`` load as dicts, ``nnx.Variable`` as its
            value, NumPy scalars as arrays. Arrays that are sharded over this process's devices
            are gathered.
        metadata: what JSON can say, for :func:`inspect`.

    Returns:
        Bytes of the file.

    Raises:
        TypeError: a leaf, key or metadata value that a file cannot hold; the message names its
            path and the remedy, and no file is touched.
        ValueError: an array without values here, a compressed leaf whose fields do not fit each
            other, or a tree more than 64 levels deep.
        OSError: the file cannot be written.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> path = tempfile.mkdtemp() + "/model.jxc"
        >>> save(path, {"bias": jnp.ones(3)}, metadata={"accuracy": 0.5}) < 150
        True
    """
    target = resolve_target(path)
    metadata = check_metadata(metadata)
    encode_tree(tree, check_leaf)
    written = Written([], {}, {}, [])
    structure = encode_tree(tree, lambda path, leaf: _store(path, leaf, written))
    body, tensors = written.body, written.tensors
    manifest = {"metadata": metadata, "tree": structure} if metadata else {"tree": structure}
    whole = not tensors and sum(len(data) for data, _ in body) <= WHOLE_LIMIT
    kept = b"".join(data if whole else data + check for data, check in body)
    version = SEALED_WHOLE if whole else SEALED_PARTS
    return write_file(target, build(dumps(manifest), kept, tensors, version))


def _store(path: Path, leaf: Any, written: Written) -> list[Any]:
    """Append a leaf's parts, with their checksums; its entry in the manifest."""
    kind, parts = take_apart(path, leaf)
    arrays, symbols = {}, {}
    # Parts are numbered in the order of storing.
    for name, array in parts.arrays.items():
        plain = np.asarray(array, array.dtype.newbyteorder("="), order="C")
        arrays[name] = _store_array(plain, tensor_name(path, name), written)
    if kind is None:
        parse_leaf(path, arrays[""], written.stored)
        return arrays[""]
    for name, stream in parts.symbols.items():
        try:
            symbols[name] = _store_symbols(stream, written)
        except ValueError as error:
            raise ValueError(f"{show(path)}: {name}: {error}") from error
    entry = [kind, parts.static, arrays, symbols]
    # What cannot be put together again must not be written.
    put_together(parse_leaf(path, entry, written.stored), parts)
    return entry


def _store_array(array: Shaped[np.ndarray, "..."], name: str, written: Written) -> list[Any]:
    digest = _digest(array, array.dtype.name)
    if digest in written.numbers:
        return ["same", written.numbers[digest]]
    if array.nbytes >= _LEAST_SHARED:
        written.numbers[digest] = len(written.body)
    if can_be_tensor(array, name, written.tensors):
        written.tensors[name] = array
        written.body.append((b"", checksum(array.reshape(-1).view(np.uint8).data)))
        where = "tensor"
    else:
        data = raw.to_bytes(array)
        written.body.append((data, checksum(data)))
        where = "raw"
    return [where, array.dtype.name, list(array.shape)]


def _store_symbols(stream: Symbols, written: Written) -> list[Any]:
    digest = _digest(np.ascontiguousarray(stream.values), f"symbols {stream.alphabet}")
    if digest in written.numbers:
        return ["same", written.numbers[digest]]
    codec, data = coder.encode(stream.values, stream.alphabet)
    if len(data) >= _LEAST_SHARED:
        written.numbers[digest] = len(written.body)
    written.body.append((data, checksum(data)))
    return [codec, stream.alphabet, list(stream.values.shape), len(data)]


def _digest(array: Shaped[np.ndarray, "..."], kind: str) -> bytes:
    told = hashlib.blake2b(f"{kind} {array.shape} ".encode(), digest_size=16)
    told.update(array.reshape(-1).view(np.uint8).data)
    return told.digest()
