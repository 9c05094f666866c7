"""A teacher that runs in every step, against top-k logits of it that are read from a file."""

import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from distill_models import Setting
from prune import by_turns, ratio
from rich.table import Table

from jaxcomp import distill

BATCHES = 4
COUNTS = (8, 32, 128)


def cached(setting: Setting, rounds: int, directory: pathlib.Path) -> Table:
    """Time of a step, bytes a token on disk, and how much of the divergence the top knows."""
    tx = optax.sgd(1e-3, momentum=0.9)
    opt_state = tx.init(setting.params)
    inputs = [jnp.roll(setting.x, i, 1) for i in range(BATCHES)]

    def step_of(loss: Any) -> Any:
        @jax.jit
        def step(params: Any, opt_state: Any, x: Any, wise: Any) -> Any:
            grads = jax.grad(lambda params: loss(setting.plain(params, x), wise, x).mean())(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return step

    def with_labels(logits: Any) -> Any:
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, setting.y)

    teach = jax.jit(lambda x: setting.teach(x).outputs)
    vocabulary = setting.teacher_logits.shape[-1]
    calls: dict[str, Any] = {}
    sizes: dict[str, str] = {}
    numbers: dict[str, float] = {}

    def add(name: str, loss: Any, wisdom: Any, size: str, known: Any) -> None:
        step, turn = step_of(loss), itertools.cycle(range(BATCHES))

        def call() -> Any:
            i = next(turn)
            return step(setting.params, opt_state, inputs[i], wisdom(i))

        calls[name], sizes[name] = call, size
        numbers[name] = known

    def divergence(logits: Any, wise: Any, x: Any) -> Any:
        return with_labels(logits) + distill.kl_divergence(logits, wise)

    student_logits = setting.plain(setting.params, setting.x)
    full = float(distill.kl_divergence(student_logits, setting.teacher_logits).mean())
    add("labels alone", lambda s, _, x: with_labels(s), lambda i: None, "-", float("nan"))

    def with_teacher(logits: Any, _: Any, x: Any) -> Any:
        return divergence(logits, setting.teach(x).outputs, x)

    add("the teacher in the step", with_teacher, lambda i: None, "-", 1.0)
    kept = [np.asarray(teach(x)) for x in inputs]
    add("all logits, in memory", divergence, lambda i: kept[i], f"{4 * vocabulary:,}", 1.0)
    for count in COUNTS:
        path = directory / f"teacher-{count}.jxt"

        def batches(done: int, count: int = count) -> Iterator[Any]:
            return (distill.top_logits(teach(x), count) for x in inputs[done:])

        distill.write_teacher(path, batches)
        file = distill.open_teacher(path)
        size = path.stat().st_size / (BATCHES * setting.x.size)
        known = float(distill.top_divergence(student_logits, file[0]).mean())
        add(
            f"the top {count}, from a file",
            lambda s, top, x: with_labels(s) + distill.top_divergence(s, top),
            lambda i, file=file: file[i],
            f"{size:,.0f}",
            known / full,
        )
    times = by_turns(calls, rounds)
    table = Table(
        title=f"Where the teacher's outputs come from: a teacher of "
        f"{setting.teacher_size / 1e6:.1f}M parameters, a student of "
        f"{sum(leaf.size for leaf in jax.tree.leaves(setting.params)) / 1e6:.1f}M, "
        f"{vocabulary:,} tokens"
    )
    for heading in ("teacher", "ms", "× labels", "× teacher", "bytes a token", "of the divergence"):
        table.add_column(heading, justify="left" if heading == "teacher" else "right")
    for name, timing in times.items():
        table.add_row(
            name,
            f"{1e3 * timing.wall:.1f}",
            f"{ratio(timing, times['labels alone']):.2f}",
            f"{ratio(timing, times['the teacher in the step']):.2f}",
            sizes[name],
            "-" if np.isnan(numbers[name]) else f"{numbers[name]:.0%}",
        )
    return table
