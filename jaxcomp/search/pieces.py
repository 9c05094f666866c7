"""Batches as training takes them: some at a time, up to the next rung."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.model.batches import checked
from jaxcomp.search.stacking import data_of


def calls(rungs: tuple[int, ...], together: int) -> int:
    """How many calls training takes.

    Args:
        rungs: steps after which candidates are scored, rising.
        together: batches of one call, at most; none goes beyond a rung.

    Example:
        >>> calls((2, 5), together=2)
        3
    """
    return sum(-(-(end - start) // together) for start, end in pairwise((0, *rungs)))


def pieces_of(
    again: Callable[[], Any], rungs: tuple[int, ...], together: int
) -> Iterator[tuple[tuple[Any, Any], int | None]]:
    """What training is called with, call by call.

    Args:
        again: returns a new iterator over the batches, which are gone through again and again.
        rungs: as for :func:`calls`.
        together: likewise.

    Yields:
        Batches, stacked, of which there are always as many, and how many of them count; the place
        of the rung that is reached after them, or None.

    Raises:
        TypeError: batches are no iterable.
        ValueError: there are none, or two differ in structure or shapes.

    Example:
        >>> for (batches, count), reached in pieces_of(lambda: iter([1.0, 2.0]), (1, 3), 2):
        ...     print(batches, count, reached)
        [1. 1.] 1 0
        [2. 1.] 2 1
    """
    batches = _endless(again)
    together = min(together, max(end - start for start, end in pairwise((0, *rungs))))
    for reached, (start, end) in enumerate(pairwise((0, *rungs))):
        for first in range(start, end, together):
            count = min(together, end - first)
            held = [next(batches) for _ in range(count)]
            # Always as many, so that it is one program.
            stacked = _stacked(held + held[-1:] * (together - count))
            done = first + count == end
            yield (stacked, np.int32(count)), reached if done else None


def _endless(again: Callable[[], Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in checked(again()):
            empty = False
            yield batch
        if empty:
            raise ValueError("batches is empty: give at least one batch")


def _stacked(held: list[Any]) -> Any:
    rows = [tree_lib.flatten(batch) for batch in held]
    if not rows[0]:
        raise ValueError("batches: a batch holds no array: give at least a number")
    if any(row.keys() != rows[0].keys() for row in rows):
        paths = sorted(set().union(*rows) - set(rows[0]).intersection(*rows))
        raise ValueError(f"batches: {paths[0]} is not in all of them: all need the same arrays")
    for row in rows:
        for path, leaf in row.items():
            if np.shape(leaf) != np.shape(rows[0][path]):
                raise ValueError(
                    f"batches: {path or 'one'} has shape {np.shape(leaf)}, unlike the first's: all "
                    "batches need the same; leave a smaller last one out"
                )
    return jax.tree.map(lambda *leaves: np.stack([data_of(leaf) for leaf in leaves]), *held)
