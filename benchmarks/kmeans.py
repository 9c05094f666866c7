# pyright: reportMissingImports=false
"""Time and inertia of 1-D k-means: our codebooks against kmeans1d's and scikit-learn's.

    python benchmarks/kmeans.py --size 1000000 --clusters 256 16

Every row clusters the same float32 Gaussian weights. The inertia, the sum of squared distances to
the nearest entry, is computed in float64 for every codebook alike. kmeans1d finds the optimum of
all weights, in C++; ours that of a weighted histogram. scikit-learn starts once, from k-means++,
its default; the `fit` of both assigns the weights too, as "fit and assign" does. The limit is the
time to read the weights once at the copy bandwidth measured in the same run.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import kmeans1d
import numpy as np
import sklearn
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans, MiniBatchKMeans

from jaxcomp.kernels.kmeans import fit_codebook, nearest


class Timing(NamedTuple):
    first: float  # wall seconds of the first call, which compiles
    wall: float  # median of the others
    processor: float  # the same, over all threads: what a busy machine does not distort


def seconds(function: Callable[[], Any], repeats: int, warm: bool = True) -> tuple[Timing, Any]:
    """The times of a call, and what it returned."""
    walls, processors, result = [], [], None
    for _ in range(repeats + warm):
        start = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(function())
        walls.append(time.perf_counter() - start[0])
        processors.append(time.process_time() - start[1])
    medians = (statistics.median(times[warm:]) for times in (walls, processors))
    return Timing(walls[0], *medians), result


def copy_bandwidth(repeats: int) -> float:
    """Bytes read and written a second by a copy between warm 200 MB buffers."""
    source, target = np.ones(50_000_000, np.float32), np.zeros(50_000_000, np.float32)
    return 2 * source.nbytes / seconds(lambda: np.copyto(target, source), repeats)[0].wall


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
        return lines[0].split(":")[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def inertia(weights: np.ndarray, codebook: np.ndarray) -> float:
    entries, exact = np.sort(codebook.astype(np.float64).ravel()), weights.astype(np.float64)
    index = np.searchsorted((entries[1:] + entries[:-1]) / 2, exact)
    return float(((exact - entries[index]) ** 2).sum())


def rows(weights: np.ndarray, clusters: int, fast: int, slow: int) -> list[tuple]:
    """Of (name, timing, inertia) for one number of clusters; ours, fit and assign, comes first."""
    ours = jax.device_put(weights)
    codebook = fit_codebook(ours, clusters)

    def both() -> tuple[jax.Array, jax.Array]:
        codebook = fit_codebook(ours, clusters)
        return nearest(ours, codebook), codebook

    jitted = jax.jit(lambda x: nearest(x, fit_codebook(x, clusters)))

    def theirs(model: Callable[..., Any]) -> np.ndarray:
        fitted = model(clusters, n_init=1, random_state=0).fit(weights[:, None])
        return fitted.cluster_centers_

    # Of the same number of steps; the optimum takes at most ten of them.
    lloyd = lambda: fit_codebook(ours, clusters, start="companded")
    own = inertia(weights, np.asarray(codebook))
    jax.clear_caches()
    result = [
        ("jaxcomp, fit and assign", seconds(both, fast)[0], own),
        ("  the same, in one jit", seconds(lambda: jitted(ours), fast)[0], own),
        ("  fit", seconds(lambda: fit_codebook(ours, clusters), fast)[0], own),
        ("  assign", seconds(lambda: nearest(ours, codebook), fast)[0], None),
        ("  fit by Lloyd alone", seconds(lloyd, fast)[0], inertia(weights, np.asarray(lloyd()))),
    ]
    optimal: Any = kmeans1d.cluster
    timing, (_, centers) = seconds(lambda: optimal(weights, clusters), slow, warm=False)
    result.append(("kmeans1d, the optimum", timing, inertia(weights, np.asarray(centers))))
    for model in (KMeans, MiniBatchKMeans):
        timing, centers = seconds(partial(theirs, model), slow, warm=False)
        result.append((f"sklearn {model.__name__}", timing, inertia(weights, centers)))
    return result


def table(size: int, clusters: int, results: list[tuple], limit: float) -> Table:
    title = f"{size:,} Gaussian float32 weights, {clusters} clusters"
    out = Table("how", title=title)
    heads = ("ms", "x jaxcomp", "x limit", "CPU ms", "x", "first call ms", "inertia", "x")
    for head in heads:
        out.add_column(head, justify="right")
    _, base, own = results[0]
    for name, timing, value in results:
        out.add_row(
            name,
            f"{timing.wall * 1e3:,.1f}",
            f"{timing.wall / base.wall:,.2f}",
            f"{timing.wall / limit:,.0f}",
            f"{timing.processor * 1e3:,.1f}",
            f"{timing.processor / base.processor:,.2f}",
            f"{timing.first * 1e3:,.0f}",
            "-" if value is None else f"{value:,.2f}",
            "-" if value is None else f"{value / own:.6f}",
        )
    out.add_row("limit: one read / bandwidth", f"{limit * 1e3:.2f}", "", "1")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=1_000_000, help="number of weights")
    parser.add_argument("--clusters", type=int, nargs="+", default=[256, 16])
    parser.add_argument("--repeats", type=int, default=31, help="timed calls of ours")
    parser.add_argument("--slow-repeats", type=int, default=3, help="timed calls of scikit-learn")
    options = parser.parse_args()

    # A copy reads and writes; the weights need only be read.
    bandwidth = copy_bandwidth(11)
    limit = 4 * options.size / bandwidth
    weights = np.asarray(jax.random.normal(jax.random.key(0), (options.size,), jnp.float32))
    before = os.getloadavg()[0]
    console = Console(width=130)
    for clusters in options.clusters:
        results = rows(weights, clusters, options.repeats, options.slow_repeats)
        console.print(table(options.size, clusters, results, limit))
    console.print(
        f"{cpu_model()}, {os.cpu_count()} cores, load {before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after; copy bandwidth {bandwidth / 1e9:.1f} GB/s; backend "
        f"{jax.default_backend()}; Python {platform.python_version()}, jax {jax.__version__}, "
        f"numpy {np.__version__}, scikit-learn {sklearn.__version__}, kmeans1d "
        f"{version('kmeans1d')}; medians of {options.repeats} calls, "
        f"{options.slow_repeats} of the others.",
    )


if __name__ == "__main__":
    main()
