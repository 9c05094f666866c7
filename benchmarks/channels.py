"""Half of the channels removed everywhere: the speed-up, and the same cut by torch-pruning.

    python benchmarks/channels.py
    pip install torch torch-pruning    # for the second table; PyTorch's CPU build will do

First table: an MLP and ResNet-20s of 32×32×3 images, dense and smaller in one run, by turns. Half
of the inputs and half of the outputs of a layer are a quarter of its work: the limit is the ratio
of the multiply-accumulates, nearly 4. A ResNet-20 begins with 16 channels, and XLA's convolutions
on a CPU reach their full rate from 32 on (at 16 half of it, at 8 a quarter), so it is shown four
times as wide too. "written so" is the same Linen module made with half the width, on the same
smaller weights: what the smaller model would take if it had been written by hand.

Second table: the same random weights and the same criterion, the sum of absolute weights over a
group, in both tools. The first of two runs in each pays for imports and compilation. The
multiply-accumulates count the zeros that pad an image, as PyTorch does; XLA and the first table do
not.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import channel_models as models
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.table import Table

from jaxcomp import model as model_lib
from jaxcomp import prune
from jaxcomp import tree as tree_lib
from jaxcomp.model.program import read, walk


class Timing(NamedTuple):
    wall: float  # median seconds of a call
    speedup: float  # median of dense / this, call by call
    processor: float  # the same over all threads: what a busy machine does not distort


def random_variables(module: nn.Module, x: Any) -> Any:
    """Random weights; scales, biases and running statistics too."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    leaves = tree_lib.flatten(shapes)
    rng, values = np.random.default_rng(0), {}
    for path, leaf in leaves.items():
        if path.endswith(("scale", "var")):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = rng.normal(size=leaf.shape) / max(np.prod(leaf.shape[:-1]), 16) ** 0.5
        values[path] = jnp.asarray(value, leaf.dtype)
    return tree_lib.replace(shapes, values)


def by_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Times of calls, taken in turn, so that a machine that drifts does not favour one."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    first = next(iter(times.values()))

    def speedup(own: list[tuple[float, float]], clock: int) -> float:
        return statistics.median(a[clock] / b[clock] for a, b in zip(first, own, strict=True))

    return {
        name: Timing(statistics.median(wall for wall, _ in own), speedup(own, 0), speedup(own, 1))
        for name, own in times.items()
    }


def macs(apply_fn: Callable[..., Any], params: Any, x: Any) -> int:
    """Multiply-accumulates as XLA counts them: a zero of the padding costs nothing."""
    return model_lib.trace(apply_fn, params, x).total.macs


def padded_macs(apply_fn: Callable[..., Any], params: Any, x: Any) -> int:
    """Multiply-accumulates as PyTorch counts them: a zero of the padding costs like any other."""
    total = 0
    for op in walk(read(apply_fn, params, x).block):
        shapes = [value.shape for value in (*op.inputs, *op.outputs)]
        if op.name == "dot_general":
            ((contracted, _), _) = op.params["dimension_numbers"]
            total += math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
        elif op.name == "conv_general_dilated":
            features = shapes[1][op.params["dimension_numbers"].rhs_spec[0]]
            total += math.prod(shapes[-1]) * math.prod(shapes[1]) // features
    return total


def speed_table(repeats: int) -> Table:
    table = Table("network", "batch", title="Half of the channels removed everywhere")
    heads = ("dense ms", "smaller ms", "speed-up", "in CPU time", "limit")
    for head in (*heads, "written so, ms", "speed-up", "in CPU time"):
        table.add_column(head, justify="right")
    networks = {
        "MLP of 4 × 2048": (models.Mlp(2048), models.Mlp(1024), (256,)),
        "ResNet-20": (models.ResNet(16, 3, 3, True), models.ResNet(8, 3, 3, True), (32, 32, 3)),
        "4 times as wide": (
            models.ResNet(64, 3, 3, True),
            models.ResNet(32, 3, 3, True),
            (32, 32, 3),
        ),
    }
    for name, (dense, narrow, shape) in networks.items():
        variables = random_variables(dense, jnp.ones((1, *shape)))
        smaller = prune.channels(dense.apply, variables, jnp.ones((1, *shape)), sparsity=0.5)
        # Weights of its own, for else it would find them in the cache where the other left them.
        copy = jax.tree.map(jnp.copy, smaller.params)
        for batch in (1, 64):
            x = jnp.asarray(np.random.default_rng(1).normal(size=(batch, *shape)), jnp.float32)
            run_dense, run_smaller = jax.jit(dense.apply), jax.jit(smaller.apply)
            run_narrow = jax.jit(narrow.apply)
            np.testing.assert_allclose(
                run_smaller(smaller.params, x), run_narrow(smaller.params, x), rtol=1e-4, atol=1e-4
            )
            calls = {
                "dense": lambda run=run_dense, x=x, v=variables: run(v, x),
                "smaller": lambda run=run_smaller, x=x, v=smaller.params: run(v, x),
                "narrow": lambda run=run_narrow, x=x, v=copy: run(v, x),
            }
            large = batch > 1 and name == "4 times as wide"
            times = by_turns(calls, repeats // 10 + 1 if large else repeats)
            before, after = macs(dense.apply, variables, x), macs(smaller.apply, smaller.params, x)
            dense_time, smaller_time, narrow_time = times.values()
            table.add_row(
                name,
                str(batch),
                f"{dense_time.wall * 1e3:.2f}",
                f"{smaller_time.wall * 1e3:.2f}",
                f"{smaller_time.speedup:.2f}×",
                f"{smaller_time.processor:.2f}×",
                f"{before / after:.2f}×",
                f"{narrow_time.wall * 1e3:.2f}",
                f"{narrow_time.speedup:.2f}×",
                f"{narrow_time.processor:.2f}×",
            )
    return table


class Ours(NamedTuple):
    """What jaxcomp did; the fields are those of the peer's ``Outcome``."""

    trace: float
    total: float
    parameters: tuple[int, int]
    macs: tuple[int, int]
    weights: dict[str, Any]
    outputs: tuple[Any, Any]


def cut_half(module: nn.Module, variables: Any, images: Any) -> Ours:
    """Cut half of the channels; in attention whole heads, not the size of each."""
    one = images[:1]
    keep = (
        ("*/query/kernel[2]", "*/value/kernel[2]")
        if isinstance(module, models.VisionTransformer)
        else ()
    )
    start = time.perf_counter()
    model_lib.couple(module.apply, variables, one)
    traced = time.perf_counter()
    smaller = prune.channels(module.apply, variables, one, sparsity=0.5, keep=keep)
    jax.block_until_ready(smaller.params)
    done = time.perf_counter()
    return Ours(
        traced - start,
        done - traced,
        (_parameters(variables), _parameters(smaller.params)),
        (
            padded_macs(module.apply, variables, one),
            padded_macs(smaller.apply, smaller.params, one),
        ),
        tree_lib.flatten(smaller.params),
        (module.apply(variables, images), smaller.apply(smaller.params, images)),
    )


def _parameters(variables: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def peer_table() -> Table:
    import torch_twins as twins

    table = Table("network", "", title="The same weights and criterion, half cut by two tools")
    for head in ("jaxcomp", "torch-pruning"):
        table.add_column(head, justify="right")
    images = np.random.default_rng(2).normal(size=(4, 32, 32, 3)).astype(np.float32)
    networks = {
        "ResNet-18": (models.ResNet(64, 4, 2, False), lambda: twins.ResNet18(64), None),
        "ViT, 6 heads of 32, 4 layers": (
            models.VisionTransformer(192, 6, 4),
            lambda: twins.VisionTransformer(192, 6, 4),
            6,
        ),
    }
    for name, (module, make_twin, heads) in networks.items():
        variables = random_variables(module, images)
        leaves = tree_lib.flatten(variables)
        runs = [
            (
                cut_half(module, variables, images),
                twins.cut_half(twins.load(make_twin(), leaves), images, heads),
            )
            for _ in range(2)
        ]
        for title, row in _rows(runs, twins.as_torch):
            table.add_row(name, title, *row)
            name = ""
        table.add_section()
    return table


def _rows(runs: list[Any], as_torch: Callable[..., Any]) -> list[tuple[str, list[str]]]:
    last = runs[-1]

    def times(field: str, run: Any) -> list[str]:
        return [f"{getattr(tool, field) * 1e3:,.0f} ms" for tool in run]

    def change(field: str) -> list[str]:
        pairs = (getattr(tool, field) for tool in last)
        return [f"{before:,} → {after:,}" for before, after in pairs]

    ours, theirs = last
    weights = [as_torch(path, leaf) for path, leaf in ours.weights.items()]
    same = sum(np.array_equal(theirs.weights[name], array) for name, array in weights)
    apart = [
        float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())
        for a, b in zip(ours.outputs, theirs.outputs, strict=True)
    ]
    return [
        ("parameters", change("parameters")),
        ("MACs of one image", change("macs")),
        ("weights left that are equal", [f"{same} of {len(weights)}"] * 2),
        ("outputs apart, dense; cut", [f"{apart[0]:.0e}; {apart[1]:.0e}"] * 2),
        ("trace, first", times("trace", runs[0])),
        ("trace, again", times("trace", runs[1])),
        ("trace, score and cut, first", times("total", runs[0])),
        ("trace, score and cut, again", times("total", runs[1])),
    ]


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
        return lines[0].split(":")[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=101, help="timed calls of each model")
    options = parser.parse_args()
    console, before = Console(width=130), os.getloadavg()[0]
    console.print(speed_table(options.repeats))
    peers = ["torch", "torch-pruning"]
    if all(importlib.util.find_spec(name.replace("-", "_")) for name in peers):
        console.print(peer_table())
    else:
        peers = []
        console.print("No second table: pip install torch torch-pruning (PyTorch's CPU build).")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", *peers)]
    console.print(
        f"{cpu_model()}, {os.cpu_count()} cores, load {before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after; backend {jax.default_backend()}; Python "
        f"{platform.python_version()}, {', '.join(versions)}; medians of {options.repeats} calls, "
        "speed-ups call by call."
    )


if __name__ == "__main__":
    main()
