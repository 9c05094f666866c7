"""The finished part of a walk over a model, in files: where to go on after a kill.

One file says which call wrote the others, see :mod:`jaxcomp.prune.resuming`; each of these holds a
few finished leaves.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxcomp.checkpoint import CheckpointError, load, save
from jaxcomp.prune.resuming import check_call, describe, file_in

Finished = dict[str, tuple[Any, Any, list[float]]]


class WalkFiles(NamedTuple):
    """The files of one call.

    Attributes:
        start: their common path, without number and ending.
        call: a digest of what tells the call from others.
    """

    start: str
    call: str

    @staticmethod
    def open(directory: str | os.PathLike, call: Mapping[str, str], params: Any) -> "WalkFiles":
        """The files of a call in a directory, which is made if it is not there.

        Args:
            directory: the directory.
            call: what tells the call from others, beside the parameters.
            params: that it begins with.

        Returns:
            The files.

        Raises:
            ValueError: another call wrote files there.
            TypeError: a leaf that a file cannot hold.
            CheckpointError: the file of the call is damaged.

        Example:
            >>> import tempfile
            >>> where = tempfile.mkdtemp()
            >>> files = WalkFiles.open(where, {"damping": "0.01"}, {"w": np.ones(2)})
            >>> WalkFiles.open(where, {"damping": "0.1"}, {"w": np.ones(2)})
            Traceback (most recent call last):
            ...
            ValueError: ...written by a call with another damping: 0.01, now 0.1: pass another ...
        """
        path = file_in(directory, "sparsegpt.jxc")
        lines = {**call, **describe("params", params)}
        if os.path.exists(path):
            check_call(path, load(path), lines)
        else:
            save(path, lines)
        text = repr(sorted(lines.items()))
        return WalkFiles(path.removesuffix(".jxc"), hashlib.sha256(text.encode()).hexdigest())

    def path(self, number: int) -> str:
        """The file of a group of leaves."""
        return f"{self.start}-{number:05d}.jxc"

    def write(self, number: int, finished: Finished) -> None:
        """Keep a finished group.

        Args:
            number: of the group.
            finished: weight, mask and numbers by path.

        Raises:
            OSError: the file cannot be written.
        """
        leaves = [[path, *map(_plain, parts)] for path, parts in finished.items()]
        save(self.path(number), {"call": self.call, "leaves": leaves})

    def read(self, number: int, group: Sequence[str], like: Mapping[str, Any]) -> Finished | None:
        """A finished group, or None if it is not there.

        Args:
            number: of the group.
            group: the paths that it must hold.
            like: the leaves before: their shapes, dtypes and placement.

        Returns:
            Weight, mask and numbers by path.

        Raises:
            ValueError: another call wrote the file.
            CheckpointError: it is damaged, or holds something else.
        """
        path = self.path(number)
        if not os.path.exists(path):
            return None
        tree = load(path)
        if not isinstance(tree, dict) or tree.keys() != {"call", "leaves"}:
            raise CheckpointError(f"{path}: not a file of finished leaves")
        if tree["call"] != self.call:
            raise ValueError(
                f"{path}: written by another call: pass another directory, or remove the file"
            )
        try:
            found = {p: (weight, mask, numbers) for p, weight, mask, numbers in tree["leaves"]}
            if list(found) != list(group):
                raise ValueError(f"leaves {list(found)}, not {list(group)}")
            return {p: _placed(p, parts, like[p]) for p, parts in found.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: does not fit this call: {error}") from error


def _plain(part: Any) -> Any:
    return part if isinstance(part, list) else np.asarray(part)


def _placed(path: str, parts: tuple[Any, Any, Any], like: Any) -> tuple[Any, Any, list[float]]:
    weight, mask, numbers = parts
    for array, dtype in ((weight, like.dtype), (mask, bool)):
        if array.shape != like.shape or array.dtype != dtype:
            raise ValueError(f"{path}: {array.dtype} {array.shape}, not {dtype} {like.shape}")
    if len(numbers) != 3 or not all(isinstance(number, float) for number in numbers):
        raise ValueError(f"{path}: {numbers!r:.60} are not three numbers")
    sharding = getattr(like, "sharding", None)
    if isinstance(sharding, NamedSharding):
        weight, mask = jax.device_put((weight, mask), sharding)
    return weight, mask, numbers
