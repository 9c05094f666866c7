"""What an exact mask update costs: alone, against sorts, and as a share of training.

    python benchmarks/prune.py
    python benchmarks/prune.py --widths 64 --batch 2 --repeats 3    # a quick look

The weights are those of a decoder-only transformer of 8 layers: 25 million at width 512, 100
million at 1024, in 51 leaves. "gradual" is the update of ``prune.gradual`` by magnitude at step 900
of a cubic schedule to 90% over 1,000 steps, renewed every 100: its masks hold what steps 0 to 800
removed. "every leaf" removes the same fraction of each leaf, "one threshold" the lowest of all
leaves together. The sorts make the same exact masks with a stable ``jnp.argsort``, of each leaf or
of all leaves in one array. The limit is the time to read every weight and its mask and write the
mask once, at the copy bandwidth measured in the same run.

The second table trains the network of 25 million under Adam with the method in the optimizer. A
step with a mask update due and one without are the same compiled function, run by turns on two
states. The update's share of training is given three ways: by the median difference of these two
steps, and by the update alone, in wall and in processor time, each over 100 steps.
"""

import argparse
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table
from sparsity_models import Decoder, mean_loss
from threshold import copy_bandwidth, cpu_model

from jaxcomp import compressed, prune, wrap_optimizer
from jaxcomp import tree as tree_lib
from jaxcomp.kernels.threshold import removal_count_exact

EVERY = 100
SPARSITY = 0.9
DEPTH, LENGTH, SYMBOLS = 8, 128, 128
ALLOCATIONS = {
    "every leaf": prune.allocation.uniform,
    "one threshold": prune.allocation.global_threshold,
}


class Timing(NamedTuple):
    wall: float  # median seconds of a call
    processor: float  # of all threads together: what a busy machine does not distort
    rounds: list[float]  # the wall seconds of each round, to be paired with those of another


def by_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Times of calls taken in turn, so that a drifting machine does not favour one of them."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {
        name: Timing(
            statistics.median(wall for wall, _ in own),
            statistics.median(processor for _, processor in own),
            [wall for wall, _ in own],
        )
        for name, own in times.items()
    }


def ratio(one: Timing, other: Timing) -> float:
    return statistics.median(a / b for a, b in zip(one.rounds, other.rounds, strict=True))


def method_for(allocation: Any) -> Any:
    schedule = prune.cubic(SPARSITY, begin=0, end=10 * EVERY)
    return prune.gradual(prune.scores.magnitude, schedule, allocation=allocation, every=EVERY)


def at_step(state: Any, step: int) -> Any:
    return state._replace(buffers=state.buffers._replace(step=jnp.int32(step)))


def argsort_masks(params: Any, together: bool) -> Any:
    """The same exact masks by stable argsort."""
    leaves = tree_lib.select(params)

    def mask(magnitudes: Any) -> Any:
        count = removal_count_exact(SPARSITY, magnitudes.size)
        order = jnp.argsort(magnitudes, stable=True)
        return jnp.ones(magnitudes.size, bool).at[order[:count]].set(False)

    flat = {path: jnp.abs(leaf).reshape(-1) for path, leaf in leaves.items()}
    if together:
        joined, start = mask(jnp.concatenate(list(flat.values()))), 0
        masks = {}
        for path, leaf in flat.items():
            masks[path] = joined[start : start + leaf.size]
            start += leaf.size
    else:
        masks = {path: mask(leaf) for path, leaf in flat.items()}
    return {path: mask.reshape(leaves[path].shape) for path, mask in masks.items()}


def counted_masks(params: Any, allocation: Any) -> Any:
    scores = jax.tree.map(prune.scores.magnitude, tree_lib.select(params))
    return dict(prune.masks(scores, SPARSITY, allocation=allocation))


def make_params(width: int) -> tuple[Decoder, Any]:
    module = Decoder(SYMBOLS, width, heads=max(1, width // 64), depth=DEPTH, length=LENGTH)
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    return module, jax.jit(module.init)(jax.random.key(0), tokens)["params"]


def mask_section(
    table: Table, params: Any, sorts: bool, options: Any, bandwidth: float
) -> dict[str, Timing]:
    """Rows of the first table for one size; returns the times of the updates."""
    size = sum(leaf.size for leaf in tree_lib.select(params).values())
    limit = 6 * size / bandwidth  # Four bytes of weight and one of mask in, one of mask out.
    calls, slow = {}, {}
    for name, allocation in ALLOCATIONS.items():
        method = method_for(allocation)
        update = jax.jit(lambda params, state, method=method: method.update(params, state, None))
        # The masks of step 800, and then an update that is due and one that is not.
        earlier = update(params, at_step(method.init(params), 8 * EVERY))
        due, idle = at_step(earlier, 9 * EVERY), at_step(earlier, 9 * EVERY + 1)
        once = jax.jit(functools.partial(counted_masks, allocation=allocation))
        calls[f"gradual, {name}"] = functools.partial(update, params, due)
        calls[f"  no update due, {name}"] = functools.partial(update, params, idle)
        calls[f"masks, {name}"] = functools.partial(once, params)
        sort = jax.jit(functools.partial(argsort_masks, together=name == "one threshold"))
        slow[f"argsort, {name}"] = functools.partial(sort, params)
    timings = by_turns(calls, options.repeats)
    for name in ALLOCATIONS:
        if sorts:
            same = jax.tree.map(
                lambda a, b: bool((a == b).all()),
                calls[f"masks, {name}"](),
                slow[f"argsort, {name}"](),
            )
            assert all(same.values()), f"masks, {name}: the sort's masks differ"
    if sorts:
        timings |= by_turns(slow, options.slow_repeats)
    table.add_section()
    for name, timing in timings.items():
        own = timings[f"gradual, {name.partition(', ')[2]}"]
        table.add_row(
            f"{size / 1e6:.1f}M",
            name,
            f"{1000 * timing.wall:,.1f}",
            f"{1000 * timing.processor:,.1f}",
            f"{1e9 * timing.wall / size:.2f}",
            f"{timing.wall / limit:.1f}",
            f"{timing.wall / own.wall:.2f}",
            f"{timing.processor / own.processor:.2f}",
        )
    row = f"{1000 * limit:,.1f}", "", f"{1e9 * limit / size:.2f}", "1.0", "", ""
    table.add_row(f"{size / 1e6:.1f}M", "limit: bytes / bandwidth", *row)
    return {name: timings[f"gradual, {name}"] for name in ALLOCATIONS}


def train_section(
    table: Table, module: Decoder, params: Any, options: Any, alone: dict[str, Timing]
) -> None:
    """Rows of the second table."""
    size = sum(leaf.size for leaf in tree_lib.select(params).values())
    keys = jax.random.split(jax.random.key(1))
    tokens, labels = (jax.random.randint(k, (options.batch, LENGTH), 0, SYMBOLS) for k in keys)

    def stepper(tx: Any, see: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
        @jax.jit
        def step(params: Any, opt_state: Any) -> tuple[Any, Any]:
            def loss(p: Any) -> Any:
                return mean_loss(module, see(p, opt_state), tokens, labels)

            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return step

    def at(params: Any, opt_state: Any, number: int) -> tuple[Any, Any]:
        state = at_step(opt_state.compression, number)
        return params, opt_state.replace(compression=state)

    adam = optax.adam(1e-4)
    plain = stepper(adam, lambda params, _: params)
    calls = {"plain": functools.partial(plain, params, adam.init(params))}
    for name, allocation in ALLOCATIONS.items():
        tx = wrap_optimizer(adam, method_for(allocation))
        step = stepper(tx, compressed)
        begin = step(*at(params, tx.init(params), 8 * EVERY))
        calls[f"idle, {name}"] = functools.partial(step, *at(*begin, 9 * EVERY + 1))
        calls[f"due, {name}"] = functools.partial(step, *at(*begin, 9 * EVERY))
    timings = by_turns(calls, options.step_repeats)
    for name in ALLOCATIONS:
        idle, due, update = timings[f"idle, {name}"], timings[f"due, {name}"], alone[name]
        more = statistics.median(b - a for a, b in zip(idle.rounds, due.rounds, strict=True))
        table.add_row(
            f"{size / 1e6:.1f}M",
            name,
            f"{1000 * timings['plain'].wall:,.0f}",
            f"{1000 * idle.wall:,.0f}",
            f"{ratio(idle, timings['plain']):.3f}",
            f"{1000 * due.wall:,.0f}",
            f"{1000 * more:,.0f}",
            f"{more / (EVERY * idle.wall):.3%}",
            f"{1000 * update.wall:,.0f}",
            f"{update.wall / (EVERY * idle.wall):.3%}",
            f"{update.processor / (EVERY * idle.processor):.3%}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[512, 1024], help="sorted and trained: the first"
    )
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {LENGTH} a step")
    parser.add_argument("--repeats", type=int, default=21, help="timed mask updates")
    parser.add_argument("--step-repeats", type=int, default=9, help="timed train steps")
    parser.add_argument("--slow-repeats", type=int, default=2, help="timed calls of the sorts")
    options = parser.parse_args()
    load, bandwidth = os.getloadavg()[0], copy_bandwidth(options.repeats)

    masks = Table(title=f"An exact mask update, {SPARSITY:.0%} of the weights removed")
    steps = Table(title=f"An Adam step of {options.batch * LENGTH:,} tokens, updates every {EVERY}")
    for heading in ("weights", "how"):
        masks.add_column(heading, no_wrap=True)
        steps.add_column(heading if heading == "weights" else "mask", no_wrap=True)
    for heading in ("ms", "CPU ms", "ns/weight", "x limit", "x gradual", "in CPU time"):
        masks.add_column(heading, justify="right")
    columns = ("plain ms", "pruned ms", "x plain", "with an update", "so the update", "share")
    for heading in (*columns, "update alone", "share", "in CPU time"):
        steps.add_column(heading, justify="right")
    for index, width in enumerate(options.widths):
        module, params = make_params(width)
        alone = mask_section(masks, params, index == 0, options, bandwidth)
        if index == 0:
            train_section(steps, module, params, options, alone)
    console = Console(width=120)
    console.print(masks)
    console.print(steps)
    console.print(
        f"{cpu_model()}, {os.cpu_count()} cores, load {load:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after; copy bandwidth {bandwidth / 1e9:.1f} GB/s; "
        f"backend {jax.default_backend()}; Python {platform.python_version()}, "
        f"jax {jax.__version__}, optax {optax.__version__}; medians of {options.repeats} updates, "
        f"{options.slow_repeats} sorts and {options.step_repeats} train steps, by turns; "
        "the sorts' masks are equal to those of prune.masks, bit for bit."
    )


if __name__ == "__main__":
    main()
