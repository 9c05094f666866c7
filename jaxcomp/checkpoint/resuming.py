"""Long work kept in files: which call wrote one, so that another does not go on from it by mistake.

The files are those of :mod:`jaxcomp.checkpoint`: sound or refused, replaced at once, without code.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.dtypes
import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.checkpoint import CheckpointError

SCALARS = (bool, int, float, str)


def file_in(directory: Any, name: str) -> str:
    """A file of a directory, which is made if it is not there.

    Args:
        directory: a path.
        name: of the file.

    Raises:
        TypeError: the directory is no path.
        NotADirectoryError: it is a file.

    Example:
        >>> import tempfile
        >>> os.path.basename(file_in(tempfile.mkdtemp(), "sensitivity.jxc"))
        'sensitivity.jxc'
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory must be a path, not {directory!r:.60}")
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise NotADirectoryError(f"directory: {os.fspath(directory)} is a file: name a directory")
    os.makedirs(directory, exist_ok=True)
    return os.path.join(os.fspath(directory), name)


def check_call(path: str, old: Any, new: Mapping[str, str]) -> None:
    """Raise unless a file was written by the same call.

    Args:
        path: of the file.
        old: what it says of the call that wrote it.
        new: what tells this call from others.

    Raises:
        CheckpointError: it says nothing of the kind.
        ValueError: it was another call; names the first thing that is different.

    Example:
        >>> check_call("w.jxc", {"damping": "0.01"}, {"damping": "0.1"})
        Traceback (most recent call last):
        ...
        ValueError: w.jxc: written by a call with another damping: 0.01, now 0.1: pass another ...
    """
    if not isinstance(old, dict):
        raise CheckpointError(f"{path}: does not say which call wrote it")
    for name in dict.fromkeys([*new, *old]):
        before, now = old.get(name, "absent"), new.get(name, "absent")
        if before != now:
            raise ValueError(
                f"{path}: written by a call with another {name}: {before}, now {now}: pass another "
                "directory, or remove what is in this one to start anew"
            )


def describe(name: str, tree: Any) -> dict[str, str]:
    """What tells one tree from another: kinds, dtypes, shapes and values of its leaves.

    Args:
        name: what the paths begin with.
        tree: a pytree of arrays and Python scalars.

    Returns:
        By path, one line a leaf.

    Raises:
        TypeError: a leaf that a file cannot hold.

    Example:
        >>> describe("params", {"bias": jnp.ones(3)})
        {'params/bias': 'jax float32 (3,) 8a31a40ecac0'}
    """
    lines = {}
    for path, kind, value in take_apart(name, tree):
        if kind == "python":
            lines[path] = repr(value)
            continue
        array = np.asarray(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:12]
        lines[path] = f"{kind} {array.dtype} {array.shape} {digest}"
    return lines


def take_apart(name: str, tree: Any) -> list[list[Any]]:
    """Path, kind and plain value of each leaf, as a file can hold them.

    Args:
        name: what the paths begin with.
        tree: a pytree of arrays and Python scalars.

    Raises:
        TypeError: a leaf is something else.

    Example:
        >>> take_apart("state", {"step": 3})
        [['state/step', 'python', 3]]
    """
    leaves = tree_lib.flatten(tree, is_leaf=lambda _: False).items()
    named = [("/".join(part for part in (name, path) if part), leaf) for path, leaf in leaves]
    return [[path, *_kind_and_value(path, leaf)] for path, leaf in named]


def _kind_and_value(path: str, leaf: Any) -> tuple[str, Any]:
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return f"key {jax.random.key_impl(leaf)}", jax.random.key_data(leaf)
        return ("weak" if leaf.weak_type else "jax"), leaf
    if isinstance(leaf, np.generic):
        return "scalar", np.asarray(leaf)
    if isinstance(leaf, np.ndarray):
        return "numpy", leaf
    if type(leaf) in SCALARS:
        return "python", leaf
    raise TypeError(
        f"{path}: {type(leaf).__name__} cannot be written to a file: keep arrays and Python "
        "scalars in the state, or leave out directory"
    )
