"""Measure the forms of every operation that a program holds, on the chip at hand."""

import itertools
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.checks import check_count, check_function
from jaxcomp.kernels.forms import PLATFORMS, Choice, run_choice
from jaxcomp.kernels.tables import (
    Row,
    Seen,
    Table,
    described,
    load_table,
    save_table,
    watched_operations,
)
from jaxcomp.model.progress import watched
from jaxcomp.model.timing import median_milliseconds


def tune(
    function: Callable[..., Any],
    *arguments: Any,
    file: Any = None,
    repeats: int = 10,
    progress: bool | None = None,
) -> Table:
    """Find the fastest form and tile of each operation in a function, on this machine's device.

    The function is traced, not run; each operation of :mod:`jaxcomp.kernels` in it is then run in
    each form that takes its shapes, with random numbers. A form whose numbers are not XLA's, to
    within 2% of the largest, is told of in a warning and not taken. On a CPU there is one form,
    XLA's.

    Args:
        function: a model, a loss, a gradient: anything that ``jax.eval_shape`` takes.
        *arguments: for it; ``jax.ShapeDtypeStruct`` will do.
        file: where to keep the table: rows that are there already are not measured again, and each
            new one is written as soon as it is known.
        repeats: timed runs of each form.
        progress: whether to show a bar; None: on a terminal.

    Returns:
        The table, for :func:`jaxcomp.kernels.tuned`.

    Raises:
        TypeError: ``function`` is no function.
        ValueError: nothing to tune, or the file is no table.

    Example:
        >>> from jaxcomp.kernels.masked.matmul import masked_matmul
        >>> mask = jnp.ones((8, 4), bool)
        >>> table = tune(lambda x, w: masked_matmul(x, w, mask), jnp.ones((2, 8)), jnp.ones((8, 4)))
        >>> table.rows[0].operation, table.rows[0].implementation
        ('masked_matmul', 'xla')
    """
    check_function("function", function, "(*arguments) -> anything")
    check_count("repeats", repeats)
    with watched_operations() as seen:
        # A new function: what jit has traced before would not be traced again.
        jax.eval_shape(lambda *arguments: function(*arguments), *arguments)
    if not seen:
        raise ValueError("the function holds no operation of jaxcomp.kernels: nothing to tune")
    table = load_table(file) if file is not None and pathlib.Path(file).exists() else Table()
    device = jax.devices()[0].device_kind
    new = {
        (each.operation, described(each.arrays)): each
        for each in seen
        if table.find(each.operation, each.arrays, device) is None
    }
    for each in watched(list(new.values()), "tuning", progress):
        table = table.updated((_fastest(each, device, repeats),))
        if file is not None:
            save_table(table, file)
    return table


def _fastest(seen: Seen, device: str, repeats: int) -> Row:
    rng = np.random.default_rng(0)
    examples = seen.examples or (lambda rng: tuple(_random(rng, shape) for shape in seen.arrays))
    arrays = examples(rng)
    plain = Choice("xla")
    expected, xla_time = _measure(seen, arrays, plain, repeats)
    best, time = plain, xla_time
    failed: dict[str, Exception] = {}
    ran = set()
    for choice in _choices(seen):
        name = choice.implementation
        try:
            found, taken = _measure(seen, arrays, choice, repeats)
        # A tile that does not fit this chip is no choice.
        except Exception as error:
            failed[name] = error
            continue
        ran.add(name)
        if not _agree(found, expected):
            warnings.warn(
                f"{seen.operation}, {name} {dict(choice.tile)} computes other numbers than XLA's "
                "form on this chip: not taken; please report it",
                stacklevel=2,
            )
        elif taken < time:
            best, time = choice, taken
    for name in failed.keys() - ran:
        warnings.warn(
            f"{seen.operation}, {name}: no tile of it runs on this chip: {failed[name]}",
            stacklevel=2,
        )
    tile = tuple(sorted(best.tile.items()))
    shapes = described(seen.arrays)
    return Row(seen.operation, device, shapes, best.implementation, tile, time, xla_time)


def _agree(found: Any, expected: Any) -> bool:
    """Whether floats are the same but for the order of sums and roundings at ties."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(other.dtype, jnp.floating):
            continue
        one, other = (np.asarray(each, np.float64) for each in (one, other))
        known = np.isfinite(other)
        error = np.abs(one - other, where=known, out=np.zeros(other.shape))
        # What is no number anywhere else is as far off as can be.
        if not error.max(initial=0) <= 0.02 * np.abs(other[known]).max(initial=0):
            return False
    return True


def _choices(seen: Seen) -> Iterator[Choice]:
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    for name in PLATFORMS.get(platform, ()):
        if name in seen.kernels and seen.kernels[name].unfit(*seen.arrays) is None:
            yield from (Choice(name, tile) for tile in seen.kernels[name].tiles)


def _measure(
    seen: Seen, arrays: tuple[Any, ...], choice: Choice, repeats: int
) -> tuple[Any, float]:
    """Results, and microseconds of one of several runs in a row: starting them is not counted."""
    run = jax.jit(lambda *arrays: run_choice(seen.xla, seen.kernels, arrays, choice))
    results = jax.block_until_ready(run(*arrays))
    inside = 10

    def several() -> None:
        jax.block_until_ready([run(*arrays) for _ in itertools.repeat(None, inside)])

    return results, 1000 * median_milliseconds(several, repeats) / inside


def _random(rng: np.random.Generator, shape: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return jnp.asarray(rng.normal(size=shape.shape), shape.dtype)
    info = jnp.iinfo(shape.dtype)
    most = min(int(info.max), 1 << 31)
    return jnp.asarray(rng.integers(max(int(info.min), -most), most, shape.shape), shape.dtype)
