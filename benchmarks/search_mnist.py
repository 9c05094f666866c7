"""Networks that were searched on MNIST beside ones that were written by hand, at equal FLOPs.

    python benchmarks/search_mnist.py --data-dir package

The space is that of search_table.py: one to three hidden layers of 4 to 32 units, four activations,
four rates of Adam, with or without what goes around a layer. A network by hand is ReLU at the best
of the four rates; the search may use as many parameters, each one multiplication an image. Both
choose by 5,000 training images that are held out, at last in the mean of three seeds, and are then
trained anew with five.
"""

import argparse
import statistics
from typing import Any

import jax
import numpy as np
import search_table
from lenet_models import held_out
from rich.console import Console
from rich.progress import track
from rich.table import Table
from search_table import RATES, SPACE, as_arrays, parameters
from teacher_runs import conditions

from jaxcomp import search
from jaxcomp.demo.data import Dataset, load
from jaxcomp.search import strategies

INPUTS, SEEDS, FINALISTS = 784, 5, 10
BY_HAND = ([8], [16], [32], [16, 16], [32, 32])


def arrays_of(found: Dataset) -> tuple[Any, ...]:
    """Images in rows and labels to train on, held out and to test on."""
    rows = lambda images: np.asarray(images, np.float32).reshape(len(images), -1)
    chosen_by = held_out(found)
    return jax.device_put((
        rows(chosen_by.train_images), chosen_by.train_labels,
        (rows(chosen_by.test_images), chosen_by.test_labels),
        (rows(found.test_images), found.test_labels),
    ))  # fmt: skip


def trainer(shared: tuple[Any, ...], steps: int) -> Any:
    """A function of (candidate, seed): its accuracies on both sets of images; one program."""
    run = jax.jit(lambda arrays, key: search_table.train(arrays, key, *shared, steps=steps))
    return lambda candidate, seed: jax.tree.map(
        float, run(as_arrays(candidate), jax.random.key(seed))
    )


def by_hand(layers: list[int], trained: Any) -> dict[str, Any]:
    """ReLU at the rate that is best on the held-out images."""
    fixed = {"layers": layers, "activation": "relu", "skip": False}
    of_rates = [fixed | {"rate": rate} for rate in RATES]
    return best_of(of_rates, trained)


def best_of(candidates: list[Any], trained: Any) -> dict[str, Any]:
    """The best on the held-out images in the mean of three seeds, or a lucky one would be taken."""
    mean = lambda each: statistics.mean(trained(each, seed)["held_out"] for seed in (1, 2, 3))
    return max(candidates, key=mean)


def searched(most: int, trained: Any, evaluations: int) -> dict[str, Any]:
    """The best of an evolution whose networks have at most ``most`` parameters.

    It trains each with one seed; its ten best are trained with three others, and one is chosen.
    """

    def evaluate(candidates: list[Any]) -> list[dict[str, float]]:
        sizes = [parameters(each, INPUTS) for each in candidates]
        # Who is too large is known before any training, and ranked by size alone.
        return [
            {"size": n, "accuracy": trained(each, 0)["held_out"] if n <= most else 0.0}
            for each, n in zip(candidates, sizes, strict=True)
        ]

    study = search.run(
        SPACE, evaluate, strategies.evolution(population=10, sample_size=10, spread=0.2),
        objectives={"accuracy": "maximize"}, constraints={"size": most},
        stop=evaluations, key=jax.random.key(7),
    )  # fmt: skip
    fitting = [trial for trial in study.trials if trial.values and trial.told["size"] <= most]
    ranked = sorted(fitting, key=lambda trial: -(trial.values or (0.0,))[0])
    return best_of([study.candidate(trial) for trial in ranked[:FINALISTS]], trained)


def tested(candidate: dict[str, Any], trained: Any) -> str:
    found = [100 * trained(candidate, 100 + seed)["test"] for seed in range(SEEDS)]
    return f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", required=True, help="MNIST's IDX files")
    parser.add_argument("--steps", type=int, default=4000, help="of 32 images, for each network")
    parser.add_argument(
        "--evaluations", type=int, default=200, help="of each search, too large ones too"
    )
    options = parser.parse_args()
    trained = trainer(arrays_of(load("mnist", options.data_dir)), options.steps)
    table = Table(
        title=f"MNIST, {options.steps:,} steps, {options.evaluations} evaluations: "
        "at most as many parameters and FLOPs"
    )
    for head in ("by hand", "parameters", "test %", "searched", "parameters", "test %"):
        table.add_column(head, justify="left" if head in ("by hand", "searched") else "right")
    for layers in track(BY_HAND, "sizes"):
        hand = by_hand(layers, trained)
        most = parameters(hand, INPUTS)
        best = searched(most, trained, options.evaluations)
        table.add_row(
            search_table.shown(hand), str(most), tested(hand, trained),
            search_table.shown(best), str(parameters(best, INPUTS)), tested(best, trained),
        )  # fmt: skip
    console = Console(width=110, highlight=False)
    console.print(table, conditions(list(range(100, 100 + SEEDS))), sep="\n")


if __name__ == "__main__":
    main()
