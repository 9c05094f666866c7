"""The structure of a tree as JSON, and back: containers and Python scalars; leaves are passed on.

====================  =============================================
in the tree           in the manifest
====================  =============================================
dict, str keys        an object
dict, other keys      ``["dict", key, value, key, value, …]``
list, tuple           ``["list", …]``, ``["tuple", …]``
None, bool, int, str  themselves
float                 a number; not finite: ``["float", hex of its 8 bytes]``
leaf                  any other array, which begins with a string
====================  =============================================
"""

import json
import math
import struct
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from flax.core import FrozenDict

from jaxcomp.checkpoint.errors import CheckpointError

MAX_DEPTH = 64
METADATA_LIMIT = 1 << 20
_MAX_INT = 1 << 1024
_CONTAINERS = ("list", "tuple", "dict", "float")

Path = tuple[str | int, ...]


def show(path: Path) -> str:
    """A path for people: ``params/Dense_0/kernel``.

    Example:
        >>> show(("params", "layers", 0))
        'params/layers/0'
    """
    return "/".join(map(str, path)) or "the tree itself"


def encode_tree(tree: Any, leaf: Callable[[Path, Any], Any]) -> Any:
    """Turn a tree into JSON values.

    Args:
        tree: nested dicts, lists and tuples; ``FrozenDict``, ``OrderedDict`` and ``nnx.State`` are
            written as dicts, ``nnx.Variable`` as its value.
        leaf: called as ``leaf(path, value)`` for whatever is neither a container nor a Python
            scalar; returns a list that begins with a string.

    Returns:
        JSON values.

    Raises:
        TypeError: a key that is neither string nor int.
        ValueError: deeper than 64 levels, or an int of more than 1,024 bits.

    Example:
        >>> encode_tree({"a": (1, None)}, leaf=lambda path, value: ["?"])
        {'a': ['tuple', 1, None]}
    """
    return _encode(tree, (), leaf)


def decode_tree(node: Any, leaf: Callable[[Path, list[Any]], Any]) -> Any:
    """Undo :func:`encode_tree`.

    Args:
        node: JSON values as :func:`loads` gives them.
        leaf: called as ``leaf(path, entry)`` for each leaf's list.

    Raises:
        CheckpointError: the values are no tree.

    Example:
        >>> decode_tree({"a": ["tuple", 1, None]}, leaf=lambda path, entry: entry)
        {'a': (1, None)}
    """
    return _decode(node, (), leaf)


def dumps(value: Any) -> str:
    """Compact ASCII JSON; refuses what JSON cannot say."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def loads(text: str) -> Any:
    """Parse JSON from a file that may be hostile.

    Raises:
        CheckpointError: not JSON, nested too deeply, a key twice in an object, or a number out of
            range.

    Example:
        >>> loads('{"a":1,"a":2}')
        Traceback (most recent call last):
        ...
        jaxcomp.checkpoint.errors.CheckpointError: the manifest names 'a' twice
    """
    try:
        return json.loads(
            text, object_pairs_hook=_no_twins, parse_constant=_no_constant, parse_float=_finite
        )
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError("the manifest is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"the manifest is not sound JSON: {error}") from error


def check_metadata(metadata: Any) -> dict[str, Any]:
    """Return the metadata if JSON can say it so that it comes back the same.

    Args:
        metadata: dict with string keys of dicts, lists, strings, ints, finite floats, booleans and
            None; None for an empty one.

    Raises:
        TypeError: something else is in it.
        ValueError: it takes more than 1 MiB, or is nested more than 64 levels deep.

    Example:
        >>> check_metadata({"accuracy": 0.98})
        {'accuracy': 0.98}
    """
    if metadata is None:
        return {}
    if type(metadata) is not dict:
        raise TypeError(f"metadata must be a dict, not {type(metadata).__name__}")
    _check_json(metadata, ())
    size = len(dumps(metadata))
    if size > METADATA_LIMIT:
        raise ValueError(f"metadata takes {size} bytes of JSON, more than {METADATA_LIMIT}")
    return metadata


def _encode(node: Any, path: Path, leaf: Callable[[Path, Any], Any]) -> Any:
    if len(path) > MAX_DEPTH:
        raise ValueError(f"{show(path[:5])}/…: a tree may be {MAX_DEPTH} levels deep, not more")
    if node is None or type(node) in (bool, str):
        return node
    if type(node) is int:
        if abs(node) >= _MAX_INT:
            raise ValueError(f"{show(path)}: an int of more than 1024 bits; store it as a string")
        return node
    if type(node) is float:
        return node if math.isfinite(node) else ["float", struct.pack(">d", node).hex()]
    if type(node) in (list, tuple):
        children = [_encode(child, (*path, i), leaf) for i, child in enumerate(node)]
        return [type(node).__name__, *children]
    if isinstance(node, _nnx("Variable")):
        return _encode(node.get_raw_value(), path, leaf)
    if type(node) in (dict, FrozenDict, OrderedDict) or isinstance(node, _nnx("State")):
        return _encode_mapping(node, path, leaf)
    return leaf(path, node)


def _encode_mapping(node: Mapping[Any, Any], path: Path, leaf: Callable[[Path, Any], Any]) -> Any:
    for key in node:
        if type(key) not in (str, int):
            raise TypeError(
                f"{show(path)}: key {key!r:.60} is {type(key).__name__}; keys must be str or int, "
                "rename it"
            )
        if type(key) is int and abs(key) >= _MAX_INT:
            raise ValueError(f"{show(path)}: a key of more than 1024 bits; rename it")
    children = {key: _encode(child, (*path, key), leaf) for key, child in node.items()}
    if all(type(key) is str for key in children):
        return children
    return ["dict", *(item for pair in children.items() for item in pair)]


def _nnx(name: str) -> tuple[type, ...]:
    """A class of Flax NNX, or nothing where NNX was never imported and so cannot be in a tree."""
    module = sys.modules.get("flax.nnx")
    return () if module is None else (getattr(module, name),)


def _decode(node: Any, path: Path, leaf: Callable[[Path, list[Any]], Any]) -> Any:
    if len(path) > MAX_DEPTH:
        raise CheckpointError(f"the tree is more than {MAX_DEPTH} levels deep")
    if node is None or isinstance(node, bool | int | float | str):
        if type(node) is int and abs(node) >= _MAX_INT:
            raise CheckpointError(f"{show(path)}: an int of more than 1024 bits")
        return node
    if isinstance(node, dict):
        return {key: _decode(child, (*path, key), leaf) for key, child in node.items()}
    if not isinstance(node, list) or not node or not isinstance(node[0], str):
        raise CheckpointError(f"{show(path)}: the manifest has an entry without a kind")
    if node[0] not in _CONTAINERS:
        return leaf(path, node)
    if node[0] == "float":
        return _decode_float(node, path)
    if node[0] == "dict":
        return _decode_pairs(node[1:], path, leaf)
    children = [_decode(child, (*path, i), leaf) for i, child in enumerate(node[1:])]
    return children if node[0] == "list" else tuple(children)


def _decode_float(node: list[Any], path: Path) -> float:
    text = node[1] if len(node) == 2 else None
    if not isinstance(text, str) or len(text) != 16 or not set(text) <= set("0123456789abcdef"):
        raise CheckpointError(f"{show(path)}: not the bytes of a float")
    return struct.unpack(">d", bytes.fromhex(text))[0]


def _decode_pairs(items: list[Any], path: Path, leaf: Callable[[Path, list[Any]], Any]) -> Any:
    keys = items[::2]
    if len(items) % 2 or any(type(key) not in (str, int) for key in keys):
        raise CheckpointError(f"{show(path)}: not a dict's keys and values")
    if len(set(keys)) != len(keys):
        raise CheckpointError(f"{show(path)}: a key stands twice in a dict")
    children = zip(keys, items[1::2], strict=True)
    return {key: _decode(child, (*path, key), leaf) for key, child in children}


def _check_json(value: Any, path: Path) -> None:
    if len(path) > MAX_DEPTH:
        raise ValueError(f"metadata may be {MAX_DEPTH} levels deep, not more")
    if value is None or type(value) in (bool, str):
        return
    if type(value) is int and abs(value) < _MAX_INT:
        return
    if type(value) is float and math.isfinite(value):
        return
    if type(value) is list:
        for i, child in enumerate(value):
            _check_json(child, (*path, i))
    elif type(value) is dict and all(type(key) is str for key in value):
        for key, child in value.items():
            _check_json(child, (*path, key))
    else:
        raise TypeError(
            f"metadata {show(path)}: {type(value).__name__} {value!r:.60} is not JSON; use dicts "
            "with string keys, lists, strings, ints, finite floats, booleans and None"
        )


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twin = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise CheckpointError(f"the manifest names {twin!r:.60} twice")
    return found


def _no_constant(text: str) -> float:
    raise CheckpointError(f"the manifest has a number that JSON has not: {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise CheckpointError(f"the manifest has a number that is out of range: {text:.60}")
    return value
