"""Every kernel beside the dense product of the same run, and beside what the chip allows.

    python benchmarks/kernels.py                     # on whatever device JAX finds
    python benchmarks/kernels.py --roofline H100     # predicted from a chip's data sheet

Times are medians of interleaved runs. Enough weights are taken in turn to leave a chip's caches.
The floor is what must be moved over the bandwidth of a copy measured here, or the operations over
the rate of the largest product measured here, whichever is longer.
"""

import argparse
import functools
import importlib.metadata
import math
import os
import platform
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from kernels_cases import CASES, Case, dense
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxcomp.kernels.tables import IMPLEMENTATIONS
from jaxcomp.model.timing import milliseconds

ROWS, SHAPES = (1, 16, 256, 4096), ((4096, 4096), (4096, 14336))
SMALL_ROWS, SMALL_SHAPES = (1, 16, 256), ((1024, 1024), (1024, 3584))


class Chip(NamedTuple):
    """Bytes and operations a second, also of 8-bit numbers."""

    name: str
    bandwidth: float
    rate: float
    int8: float
    float8: float


# From the makers' data sheets: dense products of bfloat16, int8 and float8, for which these TPUs
# name no rate of its own.
SHEETS = {
    "H100": Chip("H100 SXM", 3.35e12, 989e12, 1979e12, 1979e12),
    "v5e": Chip("TPU v5e", 819e9, 197e12, 394e12, 197e12),
    "v6e": Chip("TPU v6e", 1640e9, 918e12, 1836e12, 918e12),
}


def measured_chip(dtype: Any) -> Chip:
    """The rates of this device: a copy of 256 MB, and products of 4096 (on a CPU 2048) cubed."""
    small = jax.default_backend() == "cpu"
    large = jnp.ones((64 << 20,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    side = 2048 if small else 4096
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda x: x @ x)
    integers, floats = (jnp.ones((side, side), kind) for kind in (jnp.int8, jnp.float8_e4m3fn))
    wide = jax.jit(lambda x: jnp.matmul(x, x.T, preferred_element_type=jnp.int32))
    wide_floats = jax.jit(lambda x: jnp.matmul(x, x.T, preferred_element_type=jnp.float32))
    copied = best(lambda: jax.block_until_ready(copy(large)))
    multiplied = best(lambda: jax.block_until_ready(product(square)))
    in_int8 = best(lambda: jax.block_until_ready(wide(integers)))
    # A CPU multiplies them as floats.
    in_float8 = multiplied if small else best(lambda: jax.block_until_ready(wide_floats(floats)))
    rates = (2 * side**3 / seconds for seconds in (multiplied, in_int8, in_float8))
    return Chip(jax.devices()[0].device_kind, 2 * large.nbytes / copied, *rates)


def best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of ten runs: a rate is what a device can do."""
    run()
    return min(milliseconds(run) for _ in range(10)) / 1000


def program(function: Callable[..., Any], trained: bool) -> Callable[..., Any]:
    """A function of (x, weights) that multiplies with each weight in turn."""

    def loss(x: Any, weight: Any) -> Any:
        return jnp.sum(function(x, weight).astype(jnp.float32) ** 2)

    each = jax.grad(loss, (0, 1), allow_int=True) if trained else function
    return jax.jit(lambda x, weights: [each(x, weight) for weight in weights])


def paired(case: Case, rows: int, shape: tuple[int, int], dtype: Any, options: Any) -> Any:
    """Seconds of one product, and its ratio to the dense one's, in each of several runs."""
    copies = 1
    if jax.default_backend() != "cpu":
        copies = max(1, math.ceil(options.rotate * 1e6 / (math.prod(shape) * 2)))
    keys = jax.random.split(jax.random.key(0), copies + 1)
    x = jax.random.normal(keys[-1], (rows, shape[0]), dtype)
    run = functools.partial(case.run, implementation=options.implementation)
    programs = (
        (program(run, case.trained), [case.make(key, shape, dtype) for key in keys[:-1]]),
        (
            program(dense, case.trained),
            [jax.random.normal(key, shape, dtype) for key in keys[:-1]],
        ),
    )
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(options.repeats + 1):
        for found, (function, weights) in zip(times, programs, strict=True):
            took = milliseconds(lambda f=function, w=weights: jax.block_until_ready(f(x, w)))
            if repeat:
                found.append(took / 1000 / copies)
    return times


def floor(case: Case, rows: int, shape: tuple[int, int], dtype: Any, chip: Chip) -> float:
    """Seconds that no program can do without."""
    weight = jax.eval_shape(lambda key: case.make(key, shape, dtype), jax.random.key(0))
    moved = case.moved(rows, shape, weight, dtype)
    return max(moved / chip.bandwidth, case.flops(rows, shape) / getattr(chip, case.rate))


def dense_floor(case: Case, rows: int, shape: tuple[int, int], dtype: Any, chip: Chip) -> float:
    """The same for the dense product."""
    weight = jax.ShapeDtypeStruct(shape, dtype)
    plain = case._replace(density=1.0)
    moved = plain.moved(rows, shape, weight, dtype)
    return max(moved / chip.bandwidth, plain.flops(rows, shape) / chip.rate)


def predicted(options: Any) -> Table:
    chip = SHEETS[options.roofline]
    table = Table(title=f"PREDICTED for {chip.name}, not measured: floors by its data sheet")
    for head in ("operation", "rows", "matrix", "floor, µs", "dense floor, µs", "ratio at best"):
        table.add_column(head, justify="left" if head == "operation" else "right")
    for name, case in selected(options).items():
        for shape in options.shapes or SHAPES:
            for rows in options.rows or ROWS:
                ours, plain = (
                    f(case, rows, shape, jnp.dtype("bfloat16"), chip) for f in (floor, dense_floor)
                )
                table.add_row(
                    name, str(rows), "×".join(map(str, shape)), f"{1e6 * ours:.1f}",
                    f"{1e6 * plain:.1f}", f"{ours / plain:.2f}",
                )  # fmt: skip
    return table


def timed(options: Any, dtype: Any) -> Table:
    small = jax.default_backend() == "cpu"
    chip = measured_chip(dtype)
    rates = [f"{rate / 1e12:.2f}" for rate in (chip.rate, chip.int8, chip.float8)]
    title = (
        f"{chip.name}, {dtype.name}: a copy {chip.bandwidth / 1e9:.0f} GB/s, TFLOP/s of a product "
        f"{rates[0]}, of int8 {rates[1]}, of float8 {rates[2]}"
    )
    table = Table(title=title)
    for head in ("operation", "rows", "matrix", "µs", "× dense", "10–90%", "× floor"):
        table.add_column(head, justify="left" if head == "operation" else "right")
    grid = [
        (name, case, shape, rows)
        for name, case in selected(options).items()
        for shape in options.shapes or (SMALL_SHAPES if small else SHAPES)
        for rows in options.rows or (SMALL_ROWS if small else ROWS)
    ]
    for name, case, shape, rows in track(grid, "kernels", transient=True):
        ours, plain = paired(case, rows, shape, dtype, options)
        ratios = sorted(a / b for a, b in zip(ours, plain, strict=True))
        edge = len(ratios) // 10
        middle = statistics.median(ours)
        table.add_row(
            name, str(rows), "×".join(map(str, shape)), f"{1e6 * middle:.0f}",
            f"{statistics.median(ratios):.2f}", f"{ratios[edge]:.2f}–{ratios[-1 - edge]:.2f}",
            f"{middle / floor(case, rows, shape, dtype, chip):.1f}",
        )  # fmt: skip
    return table


def selected(options: Any) -> dict[str, Case]:
    return {name: case for name, case in CASES.items() if options.only in name}


def shape_of(text: str) -> tuple[int, int]:
    inputs, outputs = map(int, text.split("x"))
    return inputs, outputs


def check(parser: argparse.ArgumentParser, options: Any) -> None:
    """Say what makes no sense before anything is measured."""
    if not selected(options):
        parser.error(f"--only {options.only}: no such operation among {', '.join(CASES)}")
    sizes = [*(options.rows or ()), *(size for shape in options.shapes or () for size in shape)]
    if options.repeats < 1 or min(sizes, default=1) < 1:
        parser.error("--repeats, --rows and --shapes are from 1 on")
    if options.roofline and (options.dtype or options.implementation):
        parser.error("--roofline predicts for bfloat16 by no implementation: leave both out")


def conditions() -> str:
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "jaxlib"))
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f} when it began; Python {platform.python_version()}, {versions}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--roofline", choices=SHEETS, help="predict for this chip, measure nothing")
    parser.add_argument("--only", default="", help="operations whose name holds this")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="INxOUT")
    kinds = ("float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", nargs="+", choices=kinds, help="of activations and of the dense weight"
    )
    parser.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        help="of the kernels, for all of them; on a CPU Pallas interprets all but xla",
    )
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--rotate", type=float, default=250, help="MB of weights taken in turn")
    options = parser.parse_args()
    check(parser, options)
    began = conditions()
    console = Console(width=110, highlight=False)
    if options.roofline:
        console.print(predicted(options))
    else:
        small = jax.default_backend() == "cpu"
        for name in options.dtype or ["float32" if small else "bfloat16"]:
            console.print(timed(options, jnp.dtype(name)))
    console.print(began)


if __name__ == "__main__":
    main()
