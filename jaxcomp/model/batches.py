"""Batches of a model's inputs: an iterable, of which a plain tuple is several arguments."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np


def spread(batch: Any) -> tuple[Any, ...]:
    """A batch as arguments: a plain tuple is several, anything else is one.

    Example:
        >>> spread((1, 2)), spread([1, 2])
        ((1, 2), ([1, 2],))
    """
    return batch if type(batch) is tuple else (batch,)


def peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and all batches, the first one included.

    Raises:
        ValueError: there are none.
        TypeError: ``batches`` is one array, or no iterable.

    Example:
        >>> first, batches = peek(iter("abc"))
        >>> first, list(batches)
        ('a', ['a', 'b', 'c'])
    """
    start = iter(checked(batches))
    try:
        first = next(start)
    except StopIteration:
        raise ValueError("batches is empty: give at least one batch") from None
    if start is not batches:
        return first, batches

    def again() -> Any:
        yield first
        yield from start

    return first, again()


def checked(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches themselves.

    Raises:
        TypeError: they are one array, or no iterable.

    Example:
        >>> checked(np.ones((2, 3)))
        Traceback (most recent call last):
        ...
        TypeError: batches is one array: give an iterable of batches, such as [array]
    """
    if isinstance(batches, (np.ndarray, jax.Array)):
        raise TypeError("batches is one array: give an iterable of batches, such as [array]")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, not {type(batches).__name__}")
    return batches


def rereadable(batches: Any) -> Callable[[], Any]:
    """A function that returns the batches from their beginning, as often as it is called.

    Args:
        batches: an iterable that starts over (a list), or a function that returns one.

    Returns:
        The function; it raises ``TypeError`` if an iterator comes back a second time.

    Raises:
        TypeError: the batches can be read only once.

    Example:
        >>> rereadable(iter([1, 2]))
        Traceback (most recent call last):
        ...
        TypeError: batches: list_iterator can be read only once, and every pass reads it: pass ...
    """
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches: {type(batches).__name__} can be read only once, and every pass reads it: "
            "pass a list, or a function that returns a new iterator"
        )
    if not callable(batches):
        return lambda: batches
    last = None

    def again() -> Any:
        nonlocal last
        before, last = last, batches()
        if isinstance(last, Iterator) and last is before:
            raise TypeError(
                f"batches returns the same {type(last).__name__} again, which can be read only "
                "once: return a new iterator each time"
            )
        return last

    return again
