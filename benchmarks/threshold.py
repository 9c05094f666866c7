"""Time of an exact pruning mask: our search against sorts, a histogram and the host.

    python benchmarks/threshold.py --size 25000000 --sparsity 0.9

Every row turns the same float32 weights into a mask that removes the smallest magnitudes. The limit
is the time to move the bytes that must be moved, one read of the weights and one write of the
mask, at the copy bandwidth measured in the same run.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from jaxcomp.kernels.threshold import (
    magnitude_bits,
    removal_count_exact,
    smallest_masks,
    sortable_bits,
)


def ours(weights, count):
    return smallest_masks([weights], count, key=magnitude_bits)[0]


def ours_from_keys(weights, count):
    return smallest_masks([sortable_bits(jnp.abs(weights))], count)[0]


def histogram(weights, count):
    """Two passes of scatter-added counts, 16 bits each; ties at the threshold are all kept."""
    keys = magnitude_bits(weights)
    one = jnp.uint32(1)
    high = jnp.cumsum(jnp.zeros(2**16, jnp.uint32).at[keys >> 16].add(one))
    top = jnp.searchsorted(high, count, side="right").astype(jnp.uint32)
    below = jnp.where(top > 0, high[top - 1], 0)
    inside = keys ^ (top << 16)  # Other keys land beyond the bins and are dropped.
    low = jnp.cumsum(jnp.zeros(2**16, jnp.uint32).at[inside].add(one, mode="drop"))
    bottom = jnp.searchsorted(low, count - below, side="right").astype(jnp.uint32)
    return keys >= (top << 16 | bottom)


def sort(weights, count):
    magnitudes = jnp.abs(weights)
    return magnitudes >= jnp.sort(magnitudes.reshape(-1))[count]


def top_k(weights, count):
    magnitudes = jnp.abs(weights)
    kept, _ = lax.top_k(magnitudes.reshape(-1), weights.size - count)
    return magnitudes >= kept[-1]


def argsort(weights, count):
    order = jnp.argsort(jnp.abs(weights).reshape(-1))
    mask = jnp.ones(weights.size, bool).at[order[:count]].set(False)
    return mask.reshape(weights.shape)


def numpy_partition(weights, count):
    magnitudes = np.abs(weights)
    return magnitudes >= np.partition(magnitudes.reshape(-1), count)[count]


def mask_only(weights, threshold):
    return magnitude_bits(weights) >= threshold


def seconds(function: Callable[..., Any], *args: Any, repeats: int) -> tuple[float, float]:
    """Median wall and processor time of a call; the first, which compiles, is not counted.

    The processor time, of all threads together, is what a busy machine does not distort.
    """
    jax.block_until_ready(function(*args))
    wall, processor = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(function(*args))
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return statistics.median(wall), statistics.median(processor)


def copy_bandwidth(repeats: int) -> float:
    """Bytes read and written a second by a copy between warm 200 MB buffers."""
    source, target = np.ones(50_000_000, np.float32), np.zeros(50_000_000, np.float32)
    return 2 * source.nbytes / seconds(np.copyto, target, source, repeats=repeats)[0]


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
        return lines[0].split(":")[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def cases(shape: tuple[int, int], count: int, fast: int, slow: int) -> list[tuple]:
    """Rows of (name, function, weights, its second argument, repeats); ours comes first."""
    gaussian = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    zeros = jnp.where(jax.random.uniform(jax.random.key(1), shape) < 0.8, 0, gaussian)
    constant = jnp.full(shape, 0.5, jnp.float32)
    asked, ours_jitted = jnp.uint32(count), jax.jit(ours)
    removed = jnp.where(ours_jitted(gaussian, asked), 0, gaussian)
    threshold = jnp.max(magnitude_bits(removed))
    return [
        ("jaxcomp, gaussian", ours_jitted, gaussian, asked, fast),
        ("  of which writing the mask", jax.jit(mask_only), gaussian, threshold, fast),
        ("jaxcomp, 80% zeros", ours_jitted, zeros, asked, fast),
        ("jaxcomp, cut within the zeros", ours_jitted, zeros, asked // 2, fast),
        ("jaxcomp, constant", ours_jitted, constant, asked, fast),
        ("jaxcomp, stored keys", jax.jit(ours_from_keys), gaussian, asked, fast),
        ("radix histogram", jax.jit(histogram), gaussian, asked, fast),
        ("numpy.partition on the host", numpy_partition, np.asarray(gaussian), count, slow),
        ("lax.top_k", jax.jit(top_k, static_argnums=1), gaussian, count, slow),
        ("jnp.sort", jax.jit(sort), gaussian, asked, slow),
        ("jnp.argsort", jax.jit(argsort, static_argnums=1), gaussian, count, slow),
    ]


def facts(function, weights, argument, is_mask) -> tuple[str, str]:
    """Scratch memory, and how many weights more than asked for the mask removes."""
    scratch = excess = "-"
    if isinstance(weights, jax.Array):
        memory = function.lower(weights, argument).compile().memory_analysis()
        scratch = f"{memory.temp_size_in_bytes / 1e6:.0f}"
    if is_mask:
        mask = np.asarray(function(weights, argument))
        excess = f"{mask.size - int(mask.sum()) - int(argument):+d}"
    return scratch, excess


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=25_000_000, help="number of weights")
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction removed")
    parser.add_argument("--repeats", type=int, default=11, help="timed calls of the fast rows")
    parser.add_argument("--slow-repeats", type=int, default=3, help="timed calls of the sorts")
    options = parser.parse_args()

    rows = max(1, int(options.size**0.5))
    shape = (rows, options.size // rows)
    size = shape[0] * shape[1]
    count = removal_count_exact(options.sparsity, size)
    load = os.getloadavg()[0]
    bandwidth = copy_bandwidth(options.repeats)
    limit = 5 * size / bandwidth  # Four bytes of weight in, one byte of mask out.

    table = Table(title=f"Exact mask of {size:,} float32 weights, sparsity {options.sparsity}")
    table.add_column("how", no_wrap=True)
    for heading in ("ms", "x jaxcomp", "x limit", "CPU ms", "x", "scratch MB", "removed - asked"):
        table.add_column(heading, justify="right")
    base, cpu_base = None, None
    for name, function, weights, argument, repeats in cases(
        shape, count, options.repeats, options.slow_repeats
    ):
        wall, processor = seconds(function, weights, argument, repeats=repeats)
        base, cpu_base = base or wall, cpu_base or processor
        table.add_row(
            name,
            f"{1000 * wall:,.1f}",
            f"{wall / base:.2f}",
            f"{wall / limit:.1f}",
            f"{1000 * processor:,.1f}",
            f"{processor / cpu_base:.2f}",
            *facts(function, weights, argument, is_mask=not name.startswith(" ")),
        )
    table.add_row("limit: bytes / bandwidth", f"{1000 * limit:,.1f}", "", "1.0")
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{cpu_model()}, {os.cpu_count()} cores, load {load:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after; copy bandwidth {bandwidth / 1e9:.1f} GB/s; "
        f"backend {jax.default_backend()}; Python {platform.python_version()}, "
        f"jax {jax.__version__}, numpy {np.__version__}; "
        f"medians of {options.repeats} calls, {options.slow_repeats} for the host and the sorts."
    )


if __name__ == "__main__":
    main()
