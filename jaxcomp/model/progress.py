"""A progress bar over an iterable, where somebody looks on and it takes long."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

_PATIENCE = 2.0  # seconds before a bar appears by itself


def watched(items: Iterable[Any], words: str, progress: bool | None) -> Iterator[Any]:
    """The items, taken one at a time, with a progress bar on stderr where it is wanted.

    Args:
        items: any iterable; with a length, the bar has an end.
        words: what the bar says.
        progress: whether to show it; None: only on a terminal, and only after two seconds.

    Returns:
        An iterator over the same items.

    Example:
        >>> list(watched("abc", "reading", progress=False))
        ['a', 'b', 'c']
    """
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    console = Console(stderr=True)
    # In a log, where no bar can move, the last line stays.
    bar = Progress(*columns, console=console, transient=console.is_terminal)
    task = bar.add_task(words, total=len(items) if isinstance(items, Sized) else None)
    start = time.monotonic()
    shown = False
    try:
        for item in items:
            if not shown and (progress or time.monotonic() - start > _PATIENCE):
                bar.start()
                shown = True
            yield item
            bar.advance(task)
    finally:
        if shown:
            bar.stop()
