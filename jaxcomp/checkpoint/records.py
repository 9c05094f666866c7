"""Evaluations kept in a file as they finish.

A search is a function of the values that it has seen. What a killed one has seen is in the file, so
that the same call reads it back, goes the same way and comes to the same result bit for bit.
"""

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.checkpoint.loading import load
from jaxcomp.checkpoint.resuming import check_call, file_in
from jaxcomp.checkpoint.saving import save

_FORMAT = 1


class Record(NamedTuple):
    """One finished evaluation.

    Attributes:
        counts: what was evaluated: weights removed, or bits, one number a leaf that is looked at.
        value: what ``evaluate`` returned; NaN where that failed.
        seconds: what it took.
    """

    counts: tuple[int, ...]
    value: float
    seconds: float


class Records(NamedTuple):
    """Finished evaluations of one call, in memory and in a file.

    Attributes:
        path: the file; None: nothing is kept.
        call: what tells the call from others.
        found: by name; those of earlier runs of the call, and what :meth:`add` was given.
    """

    path: str | None
    call: Mapping[str, str]
    found: dict[str, Record]

    @staticmethod
    def open(
        directory: str | os.PathLike | None, name: str, call: Callable[[], Mapping[str, str]]
    ) -> "Records":
        """What earlier runs of a call have finished.

        Args:
            directory: made if it is not there; None: nothing is kept.
            name: of the file.
            call: gives what tells the call from others.

        Returns:
            Records; none if there is no file.

        Raises:
            TypeError: the directory is no path, or a leaf is nothing that can be told apart.
            ValueError: another call wrote the file.
            CheckpointError: the file is damaged, or holds something else.

        Example:
            >>> Records.open(None, "to_accuracy.jxc", dict).found
            {}
        """
        if directory is None:
            return Records(None, {}, {})
        path, lines = file_in(directory, name), call()
        return Records(path, lines, _read(path, lines) if os.path.exists(path) else {})

    def add(self, news: Mapping[str, Record]) -> None:
        """Keep more of them; the file is replaced at once, so it is never half written.

        Args:
            news: by name.

        Raises:
            OSError: the file cannot be written.
        """
        self.found.update(news)
        if self.path is not None:
            write_records(self.path, self.call, self.found)


def _read(path: str, call: Mapping[str, str]) -> dict[str, Record]:
    tree = load(path)
    if not isinstance(tree, dict) or tree.keys() != {"format", "call", "records"}:
        raise CheckpointError(f"{path}: not a file of finished evaluations")
    if tree["format"] != _FORMAT:
        raise CheckpointError(f"{path}: not a file that this version wrote")
    check_call(path, tree["call"], call)
    try:
        return {
            name: Record(tuple(map(int, counts)), float(value), float(seconds))
            for name, (counts, value, seconds) in tree["records"].items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a record cannot be read: {error}") from error


def write_records(path: str, call: Mapping[str, str], records: Mapping[str, Record]) -> None:
    """Replace the file by one with these records.

    Args:
        path: the file.
        call: what tells the call from others.
        records: by name.

    Raises:
        OSError: the file cannot be written.
    """
    plain = {name: [list(each.counts), *each[1:]] for name, each in records.items()}
    save(path, {"format": _FORMAT, "call": dict(call), "records": plain})
