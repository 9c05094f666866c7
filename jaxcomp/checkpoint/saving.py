"""Save a tree: check, encode, write."""

import os
from typing import Any

import numpy as np
from jaxtyping import Shaped

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
    can_be_tensor,
    parse_leaf,
    put_together,
    take_apart,
    tensor_name,
)
from jaxcomp.checkpoint.manifest import Path, check_metadata, dumps, encode_tree, show
from jaxcomp.checkpoint.support import check_leaf


def save(path: str | os.PathLike, tree: Any, metadata: dict[str, Any] | None = None) -> int:
    """Write a tree of arrays and compressed leaves to one small ``.jxc`` file.

    Codes, indices and masks are entropy-coded; all other arrays are stored bit for bit. The file is
    written under a temporary name, synced and renamed, so that a crash leaves the old one.

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
    body: list[tuple[bytes, bytes]] = []
    tensors: dict[str, np.ndarray] = {}
    structure = encode_tree(tree, lambda path, leaf: _store(path, leaf, body, tensors))
    manifest = {"metadata": metadata, "tree": structure} if metadata else {"tree": structure}
    whole = not tensors and sum(len(data) for data, _ in body) <= WHOLE_LIMIT
    kept = b"".join(data if whole else data + check for data, check in body)
    version = SEALED_WHOLE if whole else SEALED_PARTS
    return write_file(target, build(dumps(manifest), kept, tensors, version))


def _store(
    path: Path, leaf: Any, body: list[tuple[bytes, bytes]], tensors: dict[str, np.ndarray]
) -> list[Any]:
    """Append a leaf's parts, with their checksums, to ``body`` and to ``tensors``.

    Returns:
        Its entry in the manifest.
    """
    kind, parts = take_apart(path, leaf)
    arrays, symbols = {}, {}
    for name, array in parts.arrays.items():
        plain = np.asarray(array, array.dtype.newbyteorder("="), order="C")
        arrays[name] = _store_array(plain, tensor_name(path, name), body, tensors)
    if kind is None:
        return arrays[""]
    for name, stream in parts.symbols.items():
        try:
            codec, data = coder.encode(stream.values, stream.alphabet)
        except ValueError as error:
            raise ValueError(f"{show(path)}: {name}: {error}") from error
        body.append((data, checksum(data)))
        symbols[name] = [codec, stream.alphabet, list(stream.values.shape), len(data)]
    entry = [kind, parts.static, arrays, symbols]
    # What cannot be put together again must not be written.
    put_together(parse_leaf(path, entry), parts)
    return entry


def _store_array(
    array: Shaped[np.ndarray, "..."],
    name: str,
    body: list[tuple[bytes, bytes]],
    tensors: dict[str, np.ndarray],
) -> list[Any]:
    if can_be_tensor(array, name, tensors):
        tensors[name] = array
        body.append((b"", checksum(array.reshape(-1).view(np.uint8).data)))
        where = "tensor"
    else:
        data = raw.to_bytes(array)
        body.append((data, checksum(data)))
        where = "raw"
    return [where, array.dtype.name, list(array.shape)]
