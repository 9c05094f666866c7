"""What was measured to be fastest, on which chip and for which shapes: a table in JSON."""

import json
import os
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("xla", "triton", "mosaic_gpu", "mosaic_tpu")
_VERSION = 1


class Row(NamedTuple):
    """One measurement.

    Attributes:
        operation: such as ``masked_matmul``.
        device: the chip, as JAX names its kind.
        arrays: dtypes and shapes, such as ``bfloat16[16,4096]``.
        implementation: what was fastest.
        tile: its static sizes, as pairs.
        microseconds: of one run.
        xla_microseconds: of XLA's form in the same minutes.
    """

    operation: str
    device: str
    arrays: tuple[str, ...]
    implementation: str
    tile: tuple[tuple[str, int], ...]
    microseconds: float
    xla_microseconds: float


class Table(NamedTuple):
    """Measurements, one for each operation, device and arrays."""

    rows: tuple[Row, ...] = ()

    def find(self, operation: str, arrays: tuple[Any, ...], device: str) -> Row | None:
        """The row of an operation on arrays of these shapes and dtypes, or None.

        Args:
            operation: its name.
            arrays: arrays, or their shapes.
            device: the chip's kind.
        """
        key = (operation, device, described(arrays))
        return next((row for row in self.rows if row[:3] == key), None)

    def updated(self, rows: Iterator[Row] | tuple[Row, ...]) -> "Table":
        """The table with rows added, in the place of older ones of the same key.

        Example:
            >>> old = Row("double", "chip", ("float32[2]",), "xla", (), 5.0, 5.0)
            >>> Table((old,)).updated((old._replace(microseconds=4.0),)).rows[0].microseconds
            4.0
        """
        merged = {row[:3]: row for row in (*self.rows, *rows)}
        return Table(tuple(merged.values()))


# Part of the key by which jit keeps programs: another table is another program.
_TABLE = jax.make_user_context(None)
_WATCHED = jax.make_user_context(None)


@contextmanager
def tuned(table: Any) -> Iterator[Table]:
    """Let operations choose their forms by a table, where they are traced inside.

    Args:
        table: from :func:`load_table` or :func:`jaxcomp.kernels.tune`, or the path of a file.

    Raises:
        ValueError: the file is no such table.

    Example:
        >>> with tuned(Table()) as table:
        ...     len(table.rows)
        0
    """
    table = table if isinstance(table, Table) else load_table(table)
    with _TABLE(table):
        yield table


def row_for(operation: str, arrays: tuple[Any, ...]) -> Row | None:
    """What the table that is in force says of an operation on this machine's chip.

    Args:
        operation: its name.
        arrays: what it takes.
    """
    table = _TABLE.value
    return None if table is None else table.find(operation, arrays, jax.devices()[0].device_kind)


class Seen(NamedTuple):
    """An operation as it was traced: its name, forms, and what to try them with."""

    operation: str
    xla: Callable[..., Any]
    kernels: Any
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    examples: Callable[[Any], tuple[Any, ...]] | None


class _Watch:
    """A list that is compared by what it is, as the key of a cache must be."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []


@contextmanager
def watched_operations() -> Iterator[list[Seen]]:
    """Note every operation that is traced inside, for tuning."""
    watch = _Watch()
    with _WATCHED(watch):
        yield watch.seen


def note(operation: str, xla: Any, kernels: Any, arrays: tuple[Any, ...], examples: Any) -> None:
    """Tell whoever watches that an operation is traced."""
    if _WATCHED.value is not None:
        shapes = tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arrays)
        _WATCHED.value.seen.append(Seen(operation, xla, kernels, shapes, examples))


def described(arrays: tuple[Any, ...]) -> tuple[str, ...]:
    """Dtypes and shapes in words.

    Example:
        >>> described((jnp.zeros((2, 3)), jnp.zeros(4, jnp.uint8)))
        ('float32[2,3]', 'uint8[4]')
    """
    return tuple(
        f"{jnp.dtype(each.dtype).name}[{','.join(map(str, each.shape))}]" for each in arrays
    )


def save_table(table: Table, path: Any) -> None:
    """Write a table as JSON, a row a line, in one step.

    Args:
        table: what to write.
        path: of the file.
    """
    rows = [json.dumps(row._asdict() | {"tile": dict(row.tile)}) for row in table.rows]
    text = f'{{"version": {_VERSION}, "rows": [\n' + ",\n".join(rows) + "\n]}\n"
    beside = pathlib.Path(path).with_name(pathlib.Path(path).name + ".part")
    beside.write_text(text)
    os.replace(beside, path)


def load_table(path: Any) -> Table:
    """Read what :func:`save_table` wrote.

    Args:
        path: of the file.

    Raises:
        ValueError: the file is no such table.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text())
        if found["version"] != _VERSION:
            raise ValueError(f"version {found['version']}, not {_VERSION}")
        if not isinstance(found["rows"], list):
            raise ValueError("its rows are no list")
        return Table(tuple(_row(each) for each in found["rows"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no table of kernels: {error}; tune anew") from error


def _row(found: Any) -> Row:
    if set(found) != set(Row._fields):
        raise ValueError(f"a row has {sorted(found)}")
    if not isinstance(found["arrays"], list):
        raise ValueError(f"arrays of {found['arrays']!r}")
    words = [found[name] for name in ("operation", "device", "implementation")]
    times = [found[name] for name in ("microseconds", "xla_microseconds")]
    tile = tuple((str(name), size) for name, size in found["tile"].items())
    if not all(isinstance(word, str) for word in (*words, *found["arrays"])):
        raise ValueError(f"{words} are no names")
    if found["implementation"] not in IMPLEMENTATIONS:
        raise ValueError(f"no implementation {found['implementation']}")
    if not all(isinstance(size, int) and size > 0 for _, size in tile):
        raise ValueError(f"a tile of {dict(tile)}")
    if not all(isinstance(time, int | float) and time >= 0 for time in times):
        raise ValueError(f"times of {times}")
    return Row(words[0], words[1], tuple(found["arrays"]), words[2], tile, *map(float, times))
