"""What the manifest says about a leaf, and how a leaf becomes parts of a file and back.

A dense leaf is ``[where, dtype, shape]``; ``where`` is ``"raw"`` (its bits are a part) or
``"tensor"`` (it is an ordinary safetensors tensor under the leaf's path). A compressed leaf is
``[kind, static, {name: [where, dtype, shape]}, {name: [codec, alphabet, shape, bytes]}]``: arrays
first, so that a codec of symbols may come to read them. What is equal to a part before it, such as
the one codebook of a whole model, is ``["same", n]``: part ``n``, counted from 0 without these.
"""

import math
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxcomp.arrays import (
    CompressedArray,
    LowRankSumArray,
    Parts,
    RescaledArray,
    RotatedArray,
    Symbols,
)
from jaxcomp.arrays.nested import PLAIN_KINDS
from jaxcomp.checkpoint import coder, raw
from jaxcomp.checkpoint.container import NAME, TENSOR_DTYPES
from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.checkpoint.manifest import Path, show
from jaxcomp.checkpoint.packing import symbol_dtype

# A new kind of leaf is a new line here, or among those that may lie within another one; files that
# hold none of it stay readable without it.
KINDS: dict[str, type[CompressedArray]] = {
    **PLAIN_KINDS,
    "rescaled": RescaledArray,
    "rotated": RotatedArray,
    "low_rank_sum": LowRankSumArray,
}

TENSOR_BYTES = 4096
_MAX_AXES = 64
_LARGEST = 1 << 62


class ArraySpec(NamedTuple):
    """Where a raw array is, and what: ``where`` is ``raw`` or ``tensor``."""

    where: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def part_bytes(self) -> int:
        """Bytes among the parts, without checksum."""
        return raw.stored_bytes(self.dtype, self.shape) if self.where == "raw" else 0

    @property
    def tensor_bytes(self) -> int:
        """Bytes as an ordinary tensor."""
        return raw.memory_bytes(self.dtype, self.shape) if self.where == "tensor" else 0

    @property
    def memory_bytes(self) -> int:
        """Bytes once decoded."""
        return raw.memory_bytes(self.dtype, self.shape)


class SymbolsSpec(NamedTuple):
    """A coded stream of symbols."""

    codec: str
    alphabet: int
    shape: tuple[int, ...]
    part_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Bytes once decoded."""
        return math.prod(self.shape) * symbol_dtype(self.alphabet).itemsize


class Same(NamedTuple):
    """What is stored once already.

    Attributes:
        number: of that part among all that are stored.
        part: that part.
    """

    number: int
    part: ArraySpec | SymbolsSpec

    @property
    def part_bytes(self) -> int:
        """None of its own."""
        return 0

    @property
    def tensor_bytes(self) -> int:
        """None of its own."""
        return 0

    @property
    def memory_bytes(self) -> int:
        """Bytes once decoded, again."""
        return self.part.memory_bytes


Part = ArraySpec | SymbolsSpec | Same


class LeafSpec(NamedTuple):
    """A leaf's entry in the manifest, checked.

    ``kind`` is None for a dense array, named ``""``; ``first`` is the number of the first part that
    is stored for it, among those of all leaves.
    """

    path: Path
    first: int
    kind: str | None
    static: dict[str, Any]
    arrays: dict[str, ArraySpec | Same]
    symbols: dict[str, SymbolsSpec | Same]

    def parts(self) -> Iterator[tuple[str, Part]]:
        """All parts by name, in the file's order."""
        yield from self.arrays.items()
        yield from self.symbols.items()


def tensor_name(path: Path, part: str) -> str:
    """The safetensors name of a large array: the leaf's path, and ``.part`` in a compressed leaf.

    Example:
        >>> tensor_name(("params", "Dense_0", "kernel"), "values")
        'params/Dense_0/kernel.values'
    """
    name = "/".join(map(str, path))
    return f"{name}.{part}" if part else name


def take_apart(path: Path, leaf: Any) -> tuple[str | None, Parts]:
    """A checked leaf's kind and parts; a dense array is one array named ``""``.

    Raises:
        ValueError: the fields of a compressed leaf do not fit each other.
    """
    if isinstance(leaf, CompressedArray):
        kind = next(kind for kind, cls in KINDS.items() if cls is type(leaf))
        try:
            return kind, leaf.to_parts()
        except ValueError as error:
            raise ValueError(f"{show(path)}: {error}") from error
    return None, Parts({}, {}, {"": np.asarray(leaf)})


def put_together(spec: LeafSpec, parts: Parts) -> Any:
    """Undo :func:`take_apart`.

    Raises:
        CheckpointError: the parts do not fit each other.
    """
    if spec.kind is None:
        return raw.to_jax(parts.arrays[""])
    for name, array in parts.arrays.items():
        if not raw.in_jax(array.dtype.name):
            raise CheckpointError(
                f"{show(spec.path)}: {name} is {array.dtype}, which JAX would narrow: call "
                "jax.config.update('jax_enable_x64', True) first"
            )
    try:
        leaf = KINDS[spec.kind].from_parts(parts)
        known = np.dtype(leaf.dtype).name in raw.DTYPES
    except Exception as error:
        # Whatever a leaf's class makes of parts that lie, the file is at fault.
        raise CheckpointError(
            f"{show(spec.path)}: the parts do not make a {spec.kind} leaf: {error}"
        ) from error
    if not known:
        raise CheckpointError(f"{show(spec.path)}: no weights have dtype {leaf.dtype}")
    return leaf


def can_be_tensor(array: Shaped[np.ndarray, "..."], name: str, taken: Container[str]) -> bool:
    """Whether a raw array is large enough, and nameable, to be an ordinary tensor."""
    if array.nbytes < TENSOR_BYTES or array.dtype.name not in TENSOR_DTYPES:
        return False
    if name in taken or name in (NAME, "__metadata__"):
        return False
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def parse_leaf(path: Path, entry: list[Any], stored: list[ArraySpec | SymbolsSpec]) -> LeafSpec:
    """Check a leaf's entry in the manifest.

    Args:
        path: the leaf's path.
        entry: the JSON list, which begins with a string.
        stored: the parts of the leaves before it, in the file's order; its own are appended.

    Raises:
        CheckpointError: it is no entry of a leaf, or of a kind that is unknown here.

    Example:
        >>> stored = []
        >>> parse_leaf(("bias",), ["raw", "float32", [3]], stored).arrays[""].memory_bytes
        12
        >>> parse_leaf(("tied",), ["same", 0], stored).arrays[""].part.shape
        (3,)
    """
    first = len(stored)
    if entry[0] in ("raw", "tensor", "same"):
        return LeafSpec(path, first, None, {}, {"": _parse_array(path, entry, stored)}, {})
    if entry[0] not in KINDS:
        raise CheckpointError(
            f"{show(path)}: a leaf of kind {entry[0]!r:.60}, which this version does not know: a "
            "newer jaxcomp wrote the file, upgrade to read it"
        )
    if len(entry) != 4 or not all(isinstance(item, dict) for item in entry[1:]):
        raise CheckpointError(f"{show(path)}: not the entry of a compressed leaf")
    kind, static, arrays, symbols = entry
    return LeafSpec(
        path,
        first,
        kind,
        static,
        {name: _parse_array(path, item, stored) for name, item in arrays.items()},
        {name: _parse_symbols(path, item, stored) for name, item in symbols.items()},
    )


def _parse_same(path: Path, item: Any, stored: list[Any], kind: type) -> Same | None:
    """The part before that an entry names; None where it is an entry of its own."""
    if not isinstance(item, list) or item[:1] != ["same"]:
        return None
    number = item[1] if len(item) == 2 else None
    if type(number) is not int or not 0 <= number < len(stored):
        raise CheckpointError(f"{show(path)}: the same as a part that does not stand before it")
    if not isinstance(stored[number], kind):
        raise CheckpointError(f"{show(path)}: the same as part {number}, which is of another kind")
    return Same(number, stored[number])


def _parse_array(path: Path, item: Any, stored: list[Any]) -> ArraySpec | Same:
    same = _parse_same(path, item, stored, ArraySpec)
    if same is not None:
        return same
    if not isinstance(item, list) or len(item) != 3 or item[0] not in ("raw", "tensor"):
        raise CheckpointError(f"{show(path)}: not the entry of an array")
    where, dtype, shape = item
    if not isinstance(dtype, str) or dtype not in raw.DTYPES:
        raise CheckpointError(f"{show(path)}: unknown dtype {dtype!r:.60}")
    if where == "tensor" and dtype not in TENSOR_DTYPES:
        raise CheckpointError(f"{show(path)}: {dtype} is never stored as a tensor")
    stored.append(ArraySpec(where, dtype, _parse_shape(path, shape)))
    return stored[-1]


def _parse_symbols(path: Path, item: Any, stored: list[Any]) -> SymbolsSpec | Same:
    same = _parse_same(path, item, stored, SymbolsSpec)
    if same is not None:
        return same
    if not isinstance(item, list) or len(item) != 4 or not isinstance(item[0], str):
        raise CheckpointError(f"{show(path)}: not the entry of coded symbols")
    codec, alphabet, shape, size = item
    if type(alphabet) is not int or not 1 <= alphabet <= coder.MAX_ALPHABET:
        raise CheckpointError(f"{show(path)}: {alphabet!r:.60} is no size of an alphabet")
    if type(size) is not int or not 0 <= size < _LARGEST:
        raise CheckpointError(f"{show(path)}: {size!r:.60} is no number of bytes")
    stored.append(SymbolsSpec(codec, alphabet, _parse_shape(path, shape), size))
    return stored[-1]


def _parse_shape(path: Path, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > _MAX_AXES:
        raise CheckpointError(f"{show(path)}: {shape!r:.60} is no shape")
    if any(type(n) is not int or n < 0 for n in shape):
        raise CheckpointError(f"{show(path)}: a shape with a size that is no natural number")
    # NumPy multiplies the other sizes also where one is zero.
    if math.prod(n for n in shape if n) >= _LARGEST:
        raise CheckpointError(f"{show(path)}: an impossible shape {shape!r:.60}")
    return tuple(shape)


def read_array(spec: ArraySpec, data: bytes | memoryview) -> Shaped[np.ndarray, "..."]:
    """An array from its part or tensor; the checksum has been checked.

    Raises:
        CheckpointError: the bytes are no such array.
    """
    if spec.where == "raw":
        return raw.from_bytes(data, spec.dtype, spec.shape)
    # The tensor's bytes are a bytearray of its own, so that the array may keep them.
    array = np.frombuffer(data, np.uint8)
    if spec.dtype == "bool" and array.size and int(array.max()) > 1:
        raise CheckpointError("a boolean is neither 0 nor 1")
    return array.view(raw.dtype_of(spec.dtype)).reshape(spec.shape)


def read_symbols(spec: SymbolsSpec, data: bytes | memoryview) -> Symbols:
    """Symbols from their part; the checksum has been checked."""
    return Symbols(coder.decode(spec.codec, bytes(data), spec.shape, spec.alphabet), spec.alphabet)
