"""How many candidates fit into memory at once, by the compiler's own account."""

import os
from collections.abc import Callable, Sequence
from typing import Any

# Of what is free: the rest is for what else the user's program holds or will hold.
FRACTION = 0.5


def default_bytes(devices: Sequence[Any]) -> int | None:
    """Half of the memory that is free on the fullest of some devices.

    A CPU's devices share what is free of the machine's memory, of which they are given equal parts.

    Args:
        devices: as of ``jax.devices()``.

    Returns:
        Bytes; None where it is not known.

    Example:
        >>> class Device:
        ...     platform = "gpu"
        ...     memory_stats = lambda self: {"bytes_limit": 1000, "bytes_in_use": 200}
        >>> default_bytes([Device()])
        400
    """
    free = [_free_on(device) for device in devices]
    known = [amount for amount in free if amount is not None]
    if len(known) == len(free) and known:
        return int(FRACTION * min(known))
    if any(device.platform != "cpu" for device in devices):
        return None
    host = _free_on_host()
    return None if host is None else int(FRACTION * host / len(devices))


def fitting(bytes_at: Callable[[int], int | None], most: int, max_bytes: int | None) -> int:
    """The number of candidates whose program stays within a number of bytes.

    The need grows by as much with each candidate, to begin with: what two small programs tell is
    extrapolated, and the program found is looked at itself.

    Args:
        bytes_at: what a program for so many candidates takes; None where it is not known.
        most: that are wanted at once.
        max_bytes: that it may take; None: any.

    Returns:
        From 1 to ``most``; ``most`` where nothing is known.

    Raises:
        ValueError: a single candidate takes more.

    Example:
        >>> fitting(lambda count: 100 + 30 * count, most=64, max_bytes=1000)
        30
    """
    if max_bytes is None:
        return most
    found = bytes_at(most)
    if found is None or found <= max_bytes:
        return most
    few, more = (bytes_at(n) or 0 for n in (2, 4))
    each = max((more - few) / 2, 1.0)
    count = int(min(max((max_bytes - few) / each + 2, 1), most - 1 if most > 1 else 1))
    while (found := bytes_at(count) or 0) > max_bytes:
        if count == 1:
            raise ValueError(
                f"max_bytes is {max_bytes:,}, but one candidate takes {found:,} bytes at once on "
                "each device: allow that, or evaluate on fewer examples at a time"
            )
        count = max(1, min(count - 1, int(count * max_bytes / found)))
    return count


def _free_on(device: Any) -> int | None:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _free_on_host() -> int | None:
    found = []
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    # A container may be given less than the machine has.
    try:
        with (
            open("/sys/fs/cgroup/memory.max") as limit,
            open("/sys/fs/cgroup/memory.current") as used,
        ):
            found.append(max(int(limit.read()) - int(used.read()), 0))
    except (OSError, ValueError):
        pass
    return min(found) if found else None
