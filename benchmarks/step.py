"""What compression adds to a train step: plain, and with each method in the optimizer.

    python benchmarks/step.py --width 2048 --batch 256

An MLP under Adam. "fixed mask" is gradual pruning between two mask updates; the limit is the plain
step itself, for what a method adds can at best be hidden.
"""

import argparse
import os
import platform
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import jaxcomp
from jaxcomp import chain, identity, prune, quantize, share
from jaxcomp.quantize import Format


def make_params(width: int) -> dict[str, Any]:
    sizes = [(784, width), (width, width), (width, 10)]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return {
        f"layer{i}": {
            "kernel": jax.random.normal(key, size) / size[0] ** 0.5,
            "bias": jnp.zeros(size[1]),
        }
        for i, (key, size) in enumerate(zip(keys, sizes, strict=True))
    }


def forward(params: Any, x: Any) -> Any:
    for name in ("layer0", "layer1"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["layer2"]["kernel"] + params["layer2"]["bias"]


def make_step(tx: optax.GradientTransformation, see: Any) -> Any:
    def step(params, opt_state, x, y):
        def loss(p):
            logits = forward(see(p, opt_state), x)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step, donate_argnums=(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    x = jax.random.normal(jax.random.key(1), (arguments.batch, 784))
    y = jnp.arange(arguments.batch) % 10
    pruner = prune.gradual(prune.scores.magnitude, prune.cubic(0.9, 0, 1), every=1)
    methods = {
        "plain": None,
        "identity": identity(),
        "pruned, fixed mask": pruner,
        "RigL, between two changes": prune.rigl(0.9, end=2, every=1, key=jax.random.key(0)),
        "2:4 masks anew each step": prune.straight_through(
            prune.scores.magnitude, prune.constant(0.5), structure=prune.NM(2, 4)
        ),
        "quantized, 8 bits": quantize.train(Format(8)),
        "shared, 16 values": share.train(16),
        "pruned and quantized": chain(pruner, quantize.train(Format(4))),
    }
    runs = {}
    for name, method in methods.items():
        tx, see = optax.adam(1e-3), lambda params, opt_state: params
        if method is not None:
            tx, see = jaxcomp.wrap_optimizer(tx, method), jaxcomp.compressed
        params = make_params(arguments.width)
        state, step = (params, tx.init(params)), make_step(tx, see)
        for _ in range(4):  # compile, and let the masks come to rest
            state = jax.block_until_ready(step(*state, x, y))
        runs[name] = (step, state, [])
    # In turn, so that a drifting machine does not favour one of them.
    for _ in range(arguments.repeats):
        for name, (step, state, times) in runs.items():
            start = time.perf_counter()
            state = jax.block_until_ready(step(*state, x, y))
            times.append(time.perf_counter() - start)
            runs[name] = (step, state, times)
    plain = runs["plain"][2]
    table = Table(
        title=f"Adam step, MLP 784-{arguments.width}-{arguments.width}-10, batch {arguments.batch}"
    )
    for column in ("step", "ms", "× plain"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, (_, _, times) in runs.items():
        ratio = statistics.median(a / b for a, b in zip(times, plain, strict=True))
        table.add_row(name, f"{1000 * statistics.median(times):.1f}", f"{ratio:.2f}")
    console = Console(width=100)
    console.print(table)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}; "
        f"Python {platform.python_version()}, jax {jax.__version__}; "
        f"medians of {arguments.repeats}, ratios paired",
        highlight=False,
    )


if __name__ == "__main__":
    main()
