"""A ResNet-50's train step: plain, with masked or rounded weights, and by kernels that round.

    python benchmarks/resnet_step.py --batch 256                       # on a GPU or TPU
    python benchmarks/resnet_step.py --batch 4 --pixels 64 --repeats 7 # on a CPU

SGD with momentum; parameters in float32, multiplied in bfloat16 (on a CPU in float32). "By kernels"
is the same step through `model.accelerate`. The limit is the plain step itself: what a method adds
can at best be hidden. "Fixed mask" is baked into the weights, between two changes.
"""

import argparse
import functools
import importlib.metadata
import os
import platform
import statistics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxcomp
from jaxcomp import model, prune, quantize
from jaxcomp.model.timing import milliseconds
from jaxcomp.quantize import Format


class Bottleneck(nn.Module):
    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, use_running_average=False, dtype=self.dtype)
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), self.stride)(y)))
        y = norm()(conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.features, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """He et al., 2016, table 1."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), 2, use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = Bottleneck(64 * 2**stage, stride, self.dtype)(x)
        return nn.Dense(1000)(x.mean((1, 2)).astype(jnp.float32))


def make_step(apply_fn: Any, tx: Any, labels: jax.Array, see: Any, kernels: bool) -> Any:
    """A step of (state, images), which gives its state away."""

    def step(state: Any, images: jax.Array) -> Any:
        params, batch_stats, opt_state = state

        def forward(params: Any, images: jax.Array) -> Any:
            return apply_fn(see(params, opt_state), batch_stats, images)

        run = model.accelerate(forward) if kernels else forward

        def loss(params: Any) -> Any:
            logits, moved = run(params, images)
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), moved

        gradients, moved = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), moved, opt_state

    return jax.jit(step, donate_argnums=0)


def begin(options: Any, dtype: Any) -> dict[str, list[Any]]:
    """For each method its step, compiled, a state whose masks have come to rest, and no times."""
    net = ResNet50(dtype)
    images = jax.random.normal(
        jax.random.key(1), (options.batch, options.pixels, options.pixels, 3)
    )
    labels = jnp.arange(options.batch) % 1000

    def apply_fn(params: Any, batch_stats: Any, images: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, moved = net.apply(variables, images, mutable=["batch_stats"])
        return logits, moved["batch_stats"]

    pruner = prune.gradual(prune.scores.magnitude, prune.cubic(0.8, 0, 1), every=1)
    eight = quantize.train(Format(8))
    methods = {
        "plain": (None, False),
        "pruned 80%, fixed mask": (pruner, False),
        "weights rounded to 8 bits": (eight, False),
        "weights rounded to 8 bits, by kernels": (eight, True),
    }
    runs: dict[str, list[Any]] = {}
    for name, (method, kernels) in track(methods.items(), "compiling", transient=True):
        tx, see = optax.sgd(0.01, momentum=0.9), lambda params, opt_state: params
        if method is not None:
            tx, see = jaxcomp.wrap_optimizer(tx, method), jaxcomp.compressed
        variables = jax.jit(net.init)(jax.random.key(0), images[:1])
        params, batch_stats = variables["params"], variables["batch_stats"]
        step = make_step(apply_fn, tx, labels, see, kernels)
        runs[name] = [
            functools.partial(step, images=images),
            (params, batch_stats, tx.init(params)),
            [],
        ]
        for _ in range(3):
            advance(runs[name])
    return runs


def advance(run: list[Any]) -> None:
    step, state, _ = run
    run[1] = jax.block_until_ready(step(state))


def printed(options: Any, dtype: Any, runs: dict[str, list[Any]]) -> Table:
    table = Table(
        title=f"ResNet-50, SGD step, {options.batch} images of {options.pixels}², {dtype.name}"
    )
    for column in ("step", "ms", "images/s", "× plain", "10–90%"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, (_, _, times) in runs.items():
        ratios = sorted(a / b for a, b in zip(times, runs["plain"][2], strict=True))
        edge, middle = len(ratios) // 10, statistics.median(times)
        table.add_row(
            name, f"{middle:.1f}", f"{1000 * options.batch / middle:,.0f}",
            f"{statistics.median(ratios):.2f}", f"{ratios[edge]:.2f}–{ratios[-1 - edge]:.2f}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if min(options.batch, options.repeats) < 1 or options.pixels < 32:
        parser.error("--batch and --repeats are from 1 on, --pixels from 32")
    dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    load, runs = os.getloadavg()[0], begin(options, dtype)
    # In turn, so that a drifting machine does not favour one of them.
    for _ in track(range(options.repeats), "steps", transient=True):
        for run in runs.values():
            run[2].append(milliseconds(functools.partial(advance, run)))
    console = Console(width=100, highlight=False)
    console.print(printed(options, dtype, runs))
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "jaxlib", "flax"))
    console.print(
        f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores, load "
        f"{load:.1f} when it began; Python {platform.python_version()}, {versions}; medians of "
        f"{options.repeats}, ratios paired"
    )


if __name__ == "__main__":
    main()
