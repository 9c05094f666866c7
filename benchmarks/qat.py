"""What quantization adds to a train step: ResNet-20, weights alone and with activations, int8.

    python benchmarks/qat.py --batch 64

SGD with momentum on CIFAR shapes, BatchNorm in training mode. Beside jaxcomp run qwix and aqtp
where they are installed, on the same model from the same weights. Each is asked for the same work:
kernels of every convolution and of the head in int8 with a scale an output channel, and what they
read in int8, by the largest magnitude of each batch, nothing quantized in the backward pass. Both
peers give each example a scale of its own; that is measured for jaxcomp too, beside one scale a
tensor. The limit is the plain step itself.
"""

import argparse
import functools
import importlib
import importlib.metadata
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from qat_models import ResNet20, make
from rich.console import Console
from rich.table import Table

from jaxcomp.quantize import Format, PerChannel, PerTensor, train
from jaxcomp.quantize.activations.dynamic import activations
from jaxcomp.quantize.activations.tracked import track_ranges


class Way(NamedTuple):
    """One way to take the step.

    Attributes:
        name: as in the table.
        loss: ``loss(params, stats, extra, x, y) -> (loss, (stats, extra))``.
        extra: first state of what it carries besides.
        scales: who shares a scale of the activations.
    """

    name: str
    loss: Callable[..., Any]
    extra: Any = ()
    scales: str = "-"


def forward(model: Any, params: Any, stats: Any, x: Any) -> Any:
    """Logits and new statistics."""
    variables = {"params": params, "batch_stats": stats}
    logits, new = model.apply(variables, x, mutable=["batch_stats"])
    return logits, new["batch_stats"]


def loss_of(run: Callable[..., Any], see: Callable[[Any], Any] = lambda params: params) -> Any:
    """The loss of a forward pass that carries something, on weights as they are seen."""

    def loss(params: Any, stats: Any, extra: Any, x: Any, y: Any) -> Any:
        (logits, stats), extra = run(see(params), stats, extra, x)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), (stats, extra)

    return loss


def plain(function: Callable[..., Any]) -> Any:
    """A forward pass that carries nothing."""
    return lambda params, stats, extra, x: (function(params, stats, x), extra)


def our_ways(params: Any, stats: Any, x: Any) -> list[Way]:
    """The plain step, and jaxcomp's."""
    float_forward = functools.partial(forward, ResNet20())
    method = train(Format(8))
    state = method.init(params)

    def see(params: Any) -> Any:
        return method.apply(params, state)

    ways = [
        Way("plain", loss_of(plain(float_forward))),
        Way("jaxcomp, weights", loss_of(plain(float_forward), see)),
    ]
    for scales, granularity in (("tensor", PerTensor()), ("example", PerChannel(0))):
        format = Format(8, granularity=granularity)
        rounded = activations(float_forward, params, stats, x, format=format)
        ways.append(Way("jaxcomp, both", loss_of(plain(rounded), see), (), scales))
    tracked = track_ranges(float_forward, params, stats, x)

    def run(params: Any, stats: Any, ranges: Any, x: Any) -> Any:
        return tracked(params, ranges, stats, x)

    ways.append(Way("jaxcomp, both, tracked", loss_of(run, see), tracked.init(), "tensor"))
    return ways


def qwix_ways() -> list[Way]:
    """The other: it intercepts the functions that modules call."""
    try:
        qwix: Any = importlib.import_module("qwix")
    except ImportError:
        return []
    ways = []
    for name, act in (("weights", None), ("both", "int8")):
        rule = qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype=act)
        model: Any = qwix.quantize_model(ResNet20(), qwix.QtProvider([rule]))
        run = plain(functools.partial(forward, model))
        ways.append(Way(f"qwix, {name}", loss_of(run), (), "example" if act else "-"))
    return ways


def aqt_ways() -> list[Way]:
    """The third: modules that are given other products."""
    try:
        convolutions: Any = importlib.import_module("aqt.jax.v2.aqt_conv_general")
        config: Any = importlib.import_module("aqt.jax.v2.config")
        modules: Any = importlib.import_module("aqt.jax.v2.flax.aqt_flax")
    except ImportError:
        return []
    ways = []
    for name, bits in (("weights", None), ("both", 8)):

        def conv(*args: Any, bits: int | None = bits, **kwargs: Any) -> Any:
            made = convolutions.conv_general_dilated_make(2, bits, 8)
            product = convolutions.make_conv_general_dilated(made)
            return nn.Conv(*args, conv_general_dilated=product, **kwargs)

        def dense(*args: Any, bits: int | None = bits, **kwargs: Any) -> Any:
            made = config.dot_general_make(bits, 8, use_fwd_quant=False)
            product = functools.partial(modules.AqtDotGeneral, made, prng_name=None)
            return nn.Dense(*args, dot_general_cls=product, **kwargs)

        run = plain(functools.partial(forward, ResNet20(conv=conv, dense=dense)))
        ways.append(Way(f"aqtp, {name}", loss_of(run), (), "example" if bits else "-"))
    return ways


def make_step(way: Way, tx: optax.GradientTransformation) -> Any:
    """A compiled step: ``step(state, x, y) -> state``."""

    def step(state: Any, x: Any, y: Any) -> Any:
        params, stats, extra, opt_state = state
        grads, (stats, extra) = jax.grad(way.loss, has_aux=True)(params, stats, extra, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, extra, opt_state

    return jax.jit(step, donate_argnums=0)


class Checked(NamedTuple):
    """What a way does: its loss less the float model's, and which kernels get no gradient."""

    difference: float
    dead: str


def check(way: Way, reference: float, params: Any, stats: Any, x: Any, y: Any) -> Checked:
    """That a way rounds at all, and trains every kernel."""
    value = jax.jit(jax.value_and_grad(way.loss, has_aux=True))
    (loss, _), grads = value(params, stats, way.extra, x, y)
    kernels = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), grad)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads)
        if grad.ndim > 1
    ]
    dead = [name for name, grad in kernels if not jnp.any(grad)]
    return Checked(float(loss) - reference, f"{len(dead)} of {len(kernels)}" if dead else "none")


class Run(NamedTuple):
    """A way being timed."""

    step: Any
    state: list[Any]
    wall: list[float]
    cpu: list[float]


def measure(runs: dict[str, Run], x: Any, y: Any, rounds: int) -> None:
    """Take steps in turn, so that a drifting machine does not favour one of them."""
    for _ in range(rounds):
        for run in runs.values():
            before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            run.state[0] = jax.block_until_ready(run.step(run.state[0], x, y))
            run.wall.append(time.perf_counter() - start)
            after = resource.getrusage(resource.RUSAGE_SELF)
            run.cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def version(name: str) -> str:
    """Of a package, or that it is missing."""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} not installed"


def ratio(times: list[float], plain: list[float]) -> str:
    """The median of paired ratios."""
    return f"{statistics.median(a / b for a, b in zip(times, plain, strict=True)):.2f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    variables, x, y = make(ResNet20(), arguments.batch)
    params, stats = variables["params"], variables["batch_stats"]
    tx = optax.sgd(0.01, momentum=0.9)
    ways = [*our_ways(params, stats, x), *qwix_ways(), *aqt_ways()]
    reference = float(jax.jit(ways[0].loss)(params, stats, (), x, y)[0])
    table = Table(title=f"ResNet-20, batch {arguments.batch}, one SGD step")
    for column in ("step", "scales", "ms", "× plain", "CPU × plain", "Δ loss", "no gradient"):
        table.add_column(column, justify="left" if column in ("step", "scales") else "right")
    runs, checks = {}, {}
    for way in ways:
        key = f"{way.name}, {way.scales}"
        checks[key] = check(way, reference, params, stats, x, y)
        state = jax.tree.map(jnp.copy, (params, stats, way.extra, tx.init(params)))
        runs[key] = Run(make_step(way, tx), [state], [], [])
    measure(runs, x, y, 2)  # compile
    for run in runs.values():
        run.wall.clear()
        run.cpu.clear()
    measure(runs, x, y, arguments.rounds)
    first = next(iter(runs.values()))
    for way, run, checked in zip(ways, runs.values(), checks.values(), strict=True):
        table.add_row(
            way.name,
            way.scales,
            f"{1000 * statistics.median(run.wall):.0f}",
            ratio(run.wall, first.wall),
            ratio(run.cpu, first.cpu),
            f"{checked.difference:+.1e}",
            checked.dead,
        )
    console = Console(width=110)
    console.print(table)
    console.print(
        "Each rounds the kernels of all convolutions and of the head; 'both' what they read too. "
        "Δ loss: less the float model's on the same weights. no gradient: kernels whose gradient "
        "is zero everywhere: such a step does less than the others, and trains nothing there.",
        highlight=False,
    )
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}; Python "
        f"{platform.python_version()}, jax {jax.__version__}, {version('flax')}, "
        f"{version('qwix')}, {version('aqtp')}; medians of {arguments.rounds}, ratios paired",
        highlight=False,
    )


if __name__ == "__main__":
    main()
