"""Load a tree: read the structure, count what it will take, then check and decode part by part."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxcomp.arrays import Parts
from jaxcomp.checkpoint.container import MANIFEST_LIMIT, SEALED_PARTS, Container, checksum, read
from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.checkpoint.files import read_file
from jaxcomp.checkpoint.leaves import (
    ArraySpec,
    LeafSpec,
    Part,
    Same,
    SymbolsSpec,
    parse_leaf,
    put_together,
    read_array,
    read_symbols,
    tensor_name,
)
from jaxcomp.checkpoint.manifest import decode_tree, loads, show

_LEAST_LIMIT = 256 << 20
_GROWTH = 1000
_CHECKSUM_BYTES = 4


class Stored(NamedTuple):
    """A part of the file.

    Attributes:
        leaf: whose it is.
        name: in that leaf.
        part: what it is.
        offset: where it begins among the parts.
    """

    leaf: LeafSpec
    name: str
    part: ArraySpec | SymbolsSpec
    offset: int


class Plan(NamedTuple):
    """A file that has been read and found consistent, no part decoded yet.

    Attributes:
        container: the file taken apart.
        tree: the tree's structure, as JSON values.
        metadata: the user's.
        leaves: every leaf, in the file's order.
        stored: every part that is stored, in the file's order.
        file_bytes: bytes of the file.
        limit: most bytes that decoded arrays may take.
    """

    container: Container
    tree: Any
    metadata: dict[str, Any]
    leaves: list[LeafSpec]
    stored: list[Stored]
    file_bytes: int
    limit: int


def load(path: str | os.PathLike, *, max_bytes: int | None = None) -> Any:
    """Read a tree that :func:`save` wrote; every part is checked before it is decoded.

    Nothing in the file is ever unpickled, evaluated or imported. A file that is damaged or lies is
    refused before it makes the process allocate more than ``max_bytes``.

    Args:
        path: the file.
        max_bytes: most bytes that the decoded arrays may take, with their codes unpacked. By
            default 256 MiB or 1,000 times the file, whichever is more.

    Returns:
        The tree: dicts, lists, tuples, None, Python scalars, compressed leaves, and JAX arrays on
        the default device. Arrays of a dtype that JAX would narrow (64-bit ones without
        ``jax_enable_x64``) come as NumPy arrays.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, hostile, written by a newer jaxcomp, or would take
            more than ``max_bytes``.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> from jaxcomp.checkpoint import save
        >>> path = tempfile.mkdtemp() + "/model.jxc"
        >>> _ = save(path, {"bias": jnp.ones(3)})
        >>> load(path)
        {'bias': Array([1., 1., 1.], dtype=float32)}
    """
    with blame(path):
        plan = make_plan(path, max_bytes)
        leaves = iter(plan.leaves)
        return decode_tree(plan.tree, lambda path, entry: read_leaf(plan, next(leaves)))


@contextlib.contextmanager
def blame(path: str | os.PathLike) -> Iterator[None]:
    """Name the file in every :class:`CheckpointError` raised inside."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
    except (MemoryError, RecursionError) as error:
        raise CheckpointError(
            f"{os.fspath(path)}: {type(error).__name__} while reading: there is not enough memory "
            "or stack for it; lower max_bytes to refuse such files early"
        ) from error


def make_plan(path: str | os.PathLike, max_bytes: int | None) -> Plan:
    """Read a file and check it, its parts by their checksums; nothing is decoded.

    Raises:
        CheckpointError: it is damaged, not sound, or would take more than ``max_bytes`` once
            decoded.
        ValueError: ``max_bytes`` is negative.
    """
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"max_bytes must not be negative: {max_bytes}")
    data = read_file(path, None if max_bytes is None else max_bytes + 2 * MANIFEST_LIMIT)
    limit = max(_LEAST_LIMIT, _GROWTH * len(data)) if max_bytes is None else max_bytes
    container = read(data)
    manifest = loads(container.manifest)
    if not isinstance(manifest, dict) or "tree" not in manifest:
        raise CheckpointError("the manifest holds no tree")
    if not manifest.keys() <= {"tree", "metadata"}:
        raise CheckpointError("the manifest says more than this version knows: upgrade jaxcomp")
    metadata = manifest.get("metadata", {})
    if not isinstance(metadata, dict):
        raise CheckpointError("the metadata is not a dict")
    specs: list[LeafSpec] = []
    parts: list[ArraySpec | SymbolsSpec] = []
    decode_tree(manifest["tree"], lambda path, entry: specs.append(parse_leaf(path, entry, parts)))
    needed = sum(part.memory_bytes for spec in specs for _, part in spec.parts())
    if needed > limit:
        raise CheckpointError(
            f"the decoded arrays would take {needed} bytes, more than max_bytes = {limit}: pass a "
            "larger max_bytes if the file is to be trusted"
        )
    _check_tensors(container, specs)
    stored = _placed(specs, container)
    plan = Plan(container, manifest["tree"], metadata, specs, stored, len(data), limit)
    # All before the first is decoded, which can take minutes.
    for part in stored:
        _check_part(plan, part)
    return plan


def leaf_bytes(plan: Plan, spec: LeafSpec) -> int:
    """Bytes of a leaf in the file: its parts, with checksums of their own, and its tensors.

    What the file has stored for a leaf before it takes none.
    """
    version = plan.container.version
    parts = sum(part.part_bytes + _checksum_bytes(part, version) for _, part in spec.parts())
    return parts + sum(array.tensor_bytes for array in spec.arrays.values())


def read_leaf(plan: Plan, spec: LeafSpec) -> Any:
    """Decode the parts of one leaf, and put it together.

    Raises:
        CheckpointError: the parts do not fit.
    """
    number = spec.first
    arrays: dict[str, Any] = {}
    symbols: dict[str, Any] = {}
    for parts, found in ((spec.arrays, arrays), (spec.symbols, symbols)):
        for name, part in parts.items():
            same = isinstance(part, Same)
            found[name] = _read_part(plan, plan.stored[part.number if same else number])
            number += 0 if same else 1
    return put_together(spec, Parts(spec.static, symbols, arrays))


def _check_part(plan: Plan, stored: Stored) -> None:
    data, end = _data_of(plan, stored)
    kept = plan.container.body[end : end + _checksum_bytes(stored.part, plan.container.version)]
    if len(kept) and kept != checksum(data):
        raise CheckpointError(f"{_label(stored)} is damaged: its checksum does not match")


def _read_part(plan: Plan, stored: Stored) -> Any:
    part, (data, _) = stored.part, _data_of(plan, stored)
    try:
        return read_array(part, data) if isinstance(part, ArraySpec) else read_symbols(part, data)
    except CheckpointError as error:
        raise CheckpointError(f"{_label(stored)}: {error}") from error


def _data_of(plan: Plan, stored: Stored) -> tuple[memoryview, int]:
    """The bytes of a part, and where its checksum begins."""
    spec, name, part, offset = stored
    end = offset + part.part_bytes
    if isinstance(part, ArraySpec) and part.where == "tensor":
        return memoryview(plan.container.tensors[tensor_name(spec.path, name)].data), end
    return plan.container.body[offset:end], end


def _label(stored: Stored) -> str:
    return f"{show(stored.leaf.path)}{'.' if stored.name else ''}{stored.name}"


def _placed(specs: list[LeafSpec], container: Container) -> list[Stored]:
    """Each part and its offset: they follow one another without gaps, to the last byte."""
    offset, found = 0, []
    for spec in specs:
        for name, part in spec.parts():
            if isinstance(part, Same):
                continue
            found.append(Stored(spec, name, part, offset))
            offset += part.part_bytes + _checksum_bytes(part, container.version)
    there = len(container.body)
    if offset != there:
        raise CheckpointError(f"the parts take {offset} bytes, the file has {there} for them")
    return found


def _checksum_bytes(part: Part, version: int) -> int:
    if version != SEALED_PARTS or isinstance(part, Same):
        return 0
    tensor_bytes = part.tensor_bytes if isinstance(part, ArraySpec) else 0
    return _CHECKSUM_BYTES if part.part_bytes or tensor_bytes else 0


def _check_tensors(container: Container, specs: list[LeafSpec]) -> None:
    """Every ordinary tensor is used once, with the dtype and shape that the manifest gives."""
    unused = dict(container.tensors)
    for spec in specs:
        for part, array in spec.arrays.items():
            if isinstance(array, Same) or array.where != "tensor":
                continue
            name = tensor_name(spec.path, part)
            tensor = unused.pop(name, None)
            if tensor is None:
                raise CheckpointError(f"tensor {name!r:.80} is missing, or used twice")
            if (tensor.dtype, tensor.shape) != (array.dtype, array.shape):
                raise CheckpointError(
                    f"tensor {name!r:.80} is {tensor.dtype} of shape {tensor.shape}, the manifest "
                    f"says {array.dtype} of shape {array.shape}"
                )
    if unused:
        raise CheckpointError(f"tensor {next(iter(unused))!r:.80} belongs to no leaf")
