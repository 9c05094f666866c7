"""Candidates evaluated and trained per second: batched, mapped, and one call after the other.

    python benchmarks/search.py
    python benchmarks/search.py --quick   # does it run?

Networks on scikit-learn's digits: an MLP with 32 hidden units and a CNN with two convolutions of
stride 2. Evaluating one is its accuracy on the 359 test images; training it, Adam steps at a rate
of its own on batches of 32, in one `lax.scan` (in which XLA's CPU backend is slow at convolutions).
All are one program, but for the loop, where each network is a compiled call. "picks" is what
`search.population` chooses with no form given, among `vmap`, `map` and `loop`.
"""

import argparse
import os
import platform
import statistics
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from threshold import cpu_model

from jaxcomp import search
from jaxcomp.demo.data import load_digits
from jaxcomp.model.timing import milliseconds

BATCH = 32
FORMS = {
    "vmap": ("vmap", None),
    "map": ("map", 1),
    "map, 8 at once": ("map", 8),
    "loop": ("loop", None),
}


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (8, 16):
            x = nn.relu(nn.Conv(features, (3, 3), (2, 2))(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def tasks(model: nn.Module, steps: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """What is done with a candidate, and the data that all share."""
    data = load_digits()
    at = np.random.default_rng(0).integers(0, len(data.train_labels), (steps, BATCH))
    test = jax.device_put((data.test_images, data.test_labels))
    batches = jax.device_put((data.train_images[at], data.train_labels[at]))
    optimizer = optax.scale_by_adam()

    def evaluate(candidate, images, labels):
        return search.objectives.accuracy(model.apply(candidate["params"], images), labels)

    def train(candidate, images, labels):
        def step(carry, batch):
            params, state = carry
            loss = lambda p: search.objectives.cross_entropy(model.apply(p, batch[0]), batch[1])
            found, gradients = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradients, state)
            updates = jax.tree.map(lambda u: -candidate["rate"] * u, updates)
            return (optax.apply_updates(params, updates), state), found

        start = candidate["params"], optimizer.init(candidate["params"])
        (params, _), losses = jax.lax.scan(step, start, (images, labels))
        return {"params": params, "loss": losses[-1]}

    return {"evaluated": (evaluate, test), f"trained, {steps} steps": (train, batches)}


def population_of(model: nn.Module, size: int) -> Any:
    keys = jax.random.split(jax.random.key(0), size)
    image = jnp.zeros((1, 8, 8, 1))
    params = jax.jit(jax.vmap(lambda key: model.init(key, image)))(keys)
    return {"params": params, "rate": jnp.logspace(-4, -1, size)}


def measure(function: Any, shared: Any, candidates: Any, size: int, repeats: int) -> Any:
    """Median candidates a second of each form, median ratios to the loop, and what is picked."""
    runs = {}
    for name, (form, chunk) in FORMS.items():
        if chunk is not None and chunk > 1 and chunk >= size:
            continue  # it would be `vmap`
        # `max_bytes` is out of the way: what is timed is one program of the whole population.
        made = search.population(
            function, candidates, *shared, form=form, chunk=chunk, max_bytes=1 << 62
        )
        runs[name] = lambda program=made.program: jax.block_until_ready(
            program(candidates, *shared)
        )
        runs[name]()  # compiled
    times: dict[str, list[float]] = {name: [] for name in runs}
    # In turn, so that a drifting machine does not favour one of them.
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    rates = {name: 1000 * size / statistics.median(found) for name, found in times.items()}
    ratios = {
        name: statistics.median(b / a for a, b in zip(found, times["loop"], strict=True))
        for name, found in times.items()
    }
    picked = search.population(function, candidates, *shared).form if size > 1 else "any"
    return rates, ratios, picked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one size, one step, two repeats")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.steps, arguments.repeats = [9], 1, 2
    table = Table(title="Candidates a second (× the loop of compiled calls)")
    for column in ("network", "", "population", *FORMS, "picks"):
        table.add_column(column, justify="right" if column in ("population", *FORMS) else "left")
    counts = []
    for model in (Mlp(), Cnn()):
        name = type(model).__name__.upper()
        first = jax.tree.leaves(population_of(model, 1)["params"])
        counts.append(f"{name} {sum(leaf[0].size for leaf in first):,} parameters")
        for task, (function, shared) in tasks(model, arguments.steps).items():
            for size in arguments.sizes:
                candidates = population_of(model, size)
                rates, ratios, picked = measure(
                    function, shared, candidates, size, arguments.repeats
                )
                cells = [
                    f"{rates[form]:,.0f} ({ratios[form]:.2f}×)" if form in rates else "–"
                    for form in FORMS
                ]
                table.add_row(name, task, str(size), *cells, picked)
    console = Console(width=130)
    console.print(table)
    device = jax.devices()[0]
    where = cpu_model() if device.platform == "cpu" else device.device_kind
    console.print(
        f"{', '.join(counts)}; float32, test set 359, batch {BATCH}. {where}, {os.cpu_count()} "
        f"cores, {jax.default_backend()}; Python {platform.python_version()}, jax "
        f"{jax.__version__}, flax {flax.__version__}, optax {optax.__version__}; medians of "
        f"{arguments.repeats}, ratios paired.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
