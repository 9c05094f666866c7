"""Train a whole grid of activations and learning-rate schedules side by side, in one program.

python examples/tune_schedule_and_activation.py
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from jaxcomp import search
from jaxcomp.search import ready

STEPS, BATCH, WIDTH = 300, 64, 32
ACTIVATIONS = ["relu", {"relu": {"leak": 0.1}}, "tanh", "sigmoid", "gelu", {"silu": {"slope": 2.0}}]
DECAYS = ["constant", "cosine", {"exponential": {"final": 0.01}}]
RATES = [1e-3, 3e-3, 1e-2]


def make_data() -> dict[str, jax.Array]:
    """Real digits: images and labels to train on, to choose by, and to test the choice on."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = jnp.asarray(digits.data[order] / 16, jnp.float32)
    labels = jnp.asarray(digits.target[order])
    parts = {"train": slice(1000), "held_out": slice(1000, 1400), "test": slice(1400, None)}
    kinds = {"images": images, "labels": labels}
    return {f"{part}_{name}": x[at] for part, at in parts.items() for name, x in kinds.items()}


def train(candidate: Any, key: jax.Array, data: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The user's training, of one candidate; nothing in it knows of the others."""
    activation = ready.activation_of(candidate["activation"])
    rate = ready.schedule_of(candidate["schedule"], steps=STEPS)
    first, second, order = jax.random.split(key, 3)
    params = {
        "hidden": jax.random.normal(first, (64, WIDTH)) * np.float32((2 / 64) ** 0.5),
        "bias": jnp.zeros(WIDTH),
        "out": jax.random.normal(second, (WIDTH, 10)) * np.float32((1 / WIDTH) ** 0.5),
    }
    tx = optax.adam(rate)

    def logits(params: Any, x: Any) -> Any:
        return activation(x @ params["hidden"] + params["bias"]) @ params["out"]

    def step(state: Any, index: Any) -> tuple[Any, None]:
        params, opt_state = state
        x, y = data["train_images"][index], data["train_labels"][index]
        loss = lambda params: optax.losses.softmax_cross_entropy_with_integer_labels(
            logits(params, x), y
        ).mean()
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    batches = jax.random.randint(order, (STEPS, BATCH), 0, len(data["train_labels"]))
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
    return {
        part: search.objectives.accuracy(
            logits(params, data[f"{part}_images"]), data[f"{part}_labels"]
        )
        for part in ("held_out", "test")
    }


def main() -> list[tuple[Any, float, float]]:
    """Train all; every candidate with its accuracies, the best on held-out images first."""
    grid = list(itertools.product(ACTIVATIONS, DECAYS, RATES))
    numbers = ready.stack(
        [
            {
                "activation": ready.activation_numbers(activation),
                "schedule": ready.schedule_numbers({"rate": rate, "warmup": 0.05, "decay": decay}),
            }
            for activation, decay, rate in grid
        ]
    )
    # One program; with another form it would be one candidate after the other.
    run = search.population(train, numbers, jax.random.key(0), make_data(), form="vmap")
    found = run(numbers, jax.random.key(0), make_data())
    rows = [
        (each, float(held_out), float(test))
        for each, held_out, test in zip(grid, found["held_out"], found["test"], strict=True)
    ]
    rows.sort(key=lambda row: -row[1])
    table = Table(title=f"{len(grid)} candidates, the best ten and the last")
    for heading in ("activation", "schedule", "rate", "held out %", "test %"):
        table.add_column(heading)
    for (activation, decay, rate), held_out, test in [*rows[:10], rows[-1]]:
        shown = (
            str(activation),
            str(decay),
            f"{rate:g}",
            f"{100 * held_out:.1f}",
            f"{100 * test:.1f}",
        )
        table.add_row(*shown)
    Console(width=100).print(table)
    return rows


if __name__ == "__main__":
    main()
