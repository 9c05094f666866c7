"""What a teacher adds to a jitted train step: each loss, and where the teacher's outputs come from.

    python benchmarks/distill.py
    python benchmarks/distill.py --rounds 30 --batch 64

Three tables. (1) The step of a student with cross-entropy alone, and with one more loss: time and
the memory that XLA sets aside; the teacher's outputs are given as arrays, so that nothing but the
loss (and the reading of features) is added. The limit is the plain step. (2) The losses alone,
value and gradient in the student, beside PyTorch's and torchdistill's where they are installed; the
limit is the time to read student and teacher and to write one gradient. (3) A language model whose
teacher runs in every step, against cached top-k logits read from a file in every step.
"""

import argparse
import os
import pathlib
import platform
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import optax
from distill_alone import alone
from distill_cached import cached
from distill_losses import Guide, Wisdom, image_guides, logit_guides, text_guides
from distill_models import Setting, images, text
from integer import copy_bandwidth, cpu_model
from prune import Timing, by_turns, ratio
from rich.console import Console
from rich.table import Table

import jaxcomp


def plain_loss(setting: Setting) -> Callable[..., Any]:
    """Cross-entropy of the model as it is."""

    def loss(trained: Any, x: Any, wise: Wisdom) -> Any:
        logits: Any = setting.plain(trained["student"], x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, wise.labels).mean()

    return loss


def guided_loss(setting: Setting, guide: Guide) -> Callable[..., Any]:
    """Cross-entropy and one loss more."""

    def loss(trained: Any, x: Any, wise: Wisdom) -> Any:
        logits, own = setting.run(trained["student"], x)
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, wise.labels).mean()
        return hard + guide.loss(trained["learned"], logits, own, wise)

    return loss


def compiled_step(loss: Callable[..., Any], trained: Any, x: Any, wise: Wisdom) -> Any:
    """A compiled step of SGD, and the bytes that XLA sets aside for it."""
    tx = optax.sgd(1e-3, momentum=0.9)

    @jax.jit
    def step(trained: Any, opt_state: Any, x: Any, wise: Wisdom) -> Any:
        grads = jax.grad(loss)(trained, x, wise)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    opt_state = tx.init(trained)
    made = step.lower(trained, opt_state, x, wise).compile()
    analysis: Any = made.memory_analysis()
    return lambda: made(trained, opt_state, x, wise), analysis.temp_size_in_bytes


def step_table(setting: Setting, guides: list[Guide], rounds: int) -> Table:
    """The first table, for one student."""
    wise = Wisdom(setting.teacher_logits, setting.teacher, setting.y)
    ways = {"cross-entropy alone": (plain_loss(setting), (), "-")}
    reading = Guide("the features, no loss", lambda learned, logits, own, wise: 0.0, (), "-")
    for guide in (reading, *guides):
        ways[guide.name] = (guided_loss(setting, guide), guide.learned, guide.reads)
    calls, sizes, reads = {}, {}, {}
    for name, (loss, learned, what) in ways.items():
        trained = {"student": setting.params, "learned": learned}
        calls[name], sizes[name] = compiled_step(loss, trained, setting.x, wise)
        reads[name] = what
    # The teacher itself, run in the step, for what it costs to have no cache.
    teach = jax.jit(setting.teach)
    calls["the teacher, forward"] = lambda: teach(setting.x)
    analysis: Any = teach.lower(setting.x).compile().memory_analysis()
    sizes["the teacher, forward"] = analysis.temp_size_in_bytes
    times = by_turns(calls, rounds)
    return _table(setting, times, sizes, reads)


def _table(
    setting: Setting, times: dict[str, Timing], sizes: dict[str, int], reads: dict[str, str]
) -> Table:
    shape = " × ".join(map(str, setting.x.shape))
    table = Table(title=f"A step of {setting.name}, inputs {shape}")
    for heading in ("loss beside cross-entropy", "reads", "ms", "× plain", "MB", "× plain"):
        table.add_column(heading, justify="left" if len(table.columns) < 2 else "right")
    plain, least = times["cross-entropy alone"], sizes["cross-entropy alone"]
    for name, timing in times.items():
        table.add_row(
            name,
            reads.get(name, "-"),
            f"{1e3 * timing.wall:.1f}",
            f"{ratio(timing, plain):.2f}",
            f"{sizes[name] / 1e6:.1f}",
            f"{sizes[name] / least:.2f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=64, help="of images; a quarter of it of text")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--symbols", type=int, default=8192, help="the vocabulary")
    parser.add_argument("--parts", nargs="+", default=["step", "alone", "cached"])
    options = parser.parse_args()
    console = Console(width=110, highlight=False)
    load = os.getloadavg()[0]
    if "step" in options.parts:
        vision = images(options.batch)
        _, own = jax.eval_shape(vision.run, vision.params, vision.x)
        guides = [*logit_guides(), *image_guides(vision, own)]
        console.print(step_table(vision, guides, options.rounds))
        language = text(options.batch // 4, options.length, options.symbols)
        _, own = jax.eval_shape(language.run, language.params, language.x)
        guides = [*logit_guides()[:2], *text_guides(language, own)]
        console.print(step_table(language, guides, options.rounds))
    bandwidth = copy_bandwidth()
    if "alone" in options.parts:
        console.print(alone(options.rounds, bandwidth))
    if "cached" in options.parts:
        with tempfile.TemporaryDirectory() as directory:
            language = text(options.batch // 4, options.length, options.symbols)
            console.print(cached(language, options.rounds, pathlib.Path(directory)))
    console.print(
        f"{cpu_model()}, {os.cpu_count()} cores, backend {jax.default_backend()}, load "
        f"{load:.1f} before and {os.getloadavg()[0]:.1f} after; one core reads "
        f"{bandwidth / 1e9:.1f} GB/s; Python {platform.python_version()}, jax {jax.__version__}, "
        f"jaxcomp {jaxcomp.__version__}; medians of {options.rounds} rounds, ratios in each round."
    )


if __name__ == "__main__":
    main()
