"""A character language model learns from one with four times its parameters.

    python benchmarks/teacher_text.py --text austen.txt

The text, its held-out tenth and the networks are those of sparsity.py (the printed table: the six
novels of the R package janeaustenr, Debian ``r-cran-janeaustenr``, written one after the other into
a plain text file; without ``--text`` the standard library's own source).

One teacher, then for each seed the same student four times, from the same weights, on the same
batches and for as many steps: on the characters alone; with the teacher's distributions (Hinton);
with its hidden states, each block of the student brought to the width of the block that
``layer_map`` gives it by a learned projection; with both. Features are read by
``distill.features`` at the blocks' scopes, so that the network is the one of sparsity.py, and the
projections are trained by the same optimizer and not kept.

What is tested is the network after the last step; no step or seed is chosen. Temperature, weights
and the learning rate are usual values and were not searched for. The training is short: a student
reads less than the text once and could go on learning, alone too, so that what is compared is what
they know after equally many steps, not where they would end. Finished runs are kept in ``--runs``.
"""

import argparse
import pathlib
import statistics
from typing import Any, NamedTuple

import jax
import sparsity_models
import teacher_text_models as models
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sparsity_models import Decoder, Quality, Task
from teacher_runs import conditions, file_of, kept, over_seeds
from teacher_text_models import Lesson

LENGTH, HEADS = 64, 4
LESSONS = {
    "student alone": Lesson(),
    "with Hinton": Lesson(temperature=2.0, weight=0.5),
    "with features": Lesson(features=0.1),
    "with both": Lesson(temperature=2.0, weight=0.5, features=0.1),
}
ALONE = "student alone"


class Size(NamedTuple):
    """Of a network, and how long it is trained."""

    width: int
    depth: int
    steps: int


def task_of(file: str | None, size: Size, batch_size: int) -> Task:
    task = sparsity_models.text_task(file, LENGTH, size.steps)
    symbols = task.module.symbols
    module = Decoder(symbols, size.width, HEADS, size.depth, LENGTH)
    return task._replace(module=module, batch_size=batch_size)


def facts(task: Task) -> tuple[Any, ...]:
    return task.module, task.steps, task.rate, task.batch_size, task.describe


def measure(
    student: Task, teacher: Task, seeds: list[int], runs: pathlib.Path
) -> dict[str, list[Quality]]:
    """By row, what each seed's network is worth on the held-out text."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("teacher", total=teacher.steps)
        file = file_of(runs, "text-teacher", facts(teacher), seeds[0])
        # A teacher learns alone, as the student does: it takes part in neither's loss.
        alone = LESSONS[ALONE]
        teacher_params = kept(
            file,
            lambda: models.fit(
                teacher, teacher, None, alone, seeds[0], lambda: progress.advance(bar)
            ),
        )
        found = {"teacher": [sparsity_models.evaluator(teacher)(teacher_params)]}
        evaluate = sparsity_models.evaluator(student)
        bar = progress.add_task("students", total=student.steps * len(seeds) * len(LESSONS))
        done = 0
        for seed in seeds:
            for name, lesson in LESSONS.items():
                told = (facts(student), facts(teacher), lesson)
                file = file_of(runs, "text-student", told, seed)

                def train(lesson: Lesson = lesson, seed: int = seed, bar: Any = bar) -> Any:
                    tick = lambda: progress.advance(bar)
                    return models.fit(student, teacher, teacher_params, lesson, seed, tick)

                found.setdefault(name, []).append(evaluate(kept(file, train)))
                done += student.steps
                progress.update(bar, completed=done)
    return found


def parameters(task: Task) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(sparsity_models.initial(task, 0)))


def table_of(found: dict[str, list[Quality]], student: Task, teacher: Task) -> Table:
    table = Table("network", title="A character language model with and without a teacher")
    for heading in ("parameters", "bits/character", "of each seed", "to alone", "accuracy %"):
        table.add_column(heading, justify="right")
    alone = statistics.mean(quality.bits for quality in found[ALONE])
    for name, results in found.items():
        bits = [quality.bits for quality in results]
        table.add_row(
            name,
            f"{parameters(teacher if name == 'teacher' else student):,}",
            over_seeds(bits, 3),
            ", ".join(f"{b:.3f}" for b in bits),
            "" if name == ALONE else f"{statistics.mean(bits) - alone:+.3f}",
            over_seeds([100 * quality.accuracy for quality in results], 2),
        )
    return table


def verdict(found: dict[str, list[Quality]], name: str) -> str:
    """What a lesson adds to the student alone, seed by seed."""
    pairs = zip(found[name], found[ALONE], strict=True)
    gains = [alone.bits - taught.bits for taught, alone in pairs]
    word = "helps" if statistics.mean(gains) > 0 else "DOES NOT HELP"
    return (
        f"{name} {word}: {over_seeds(gains, 3)} bits a character fewer than alone, better in "
        f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", help="a plain text file; without it Python's standard library")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--widths", type=int, nargs=2, default=[96, 64], help="teacher, student")
    parser.add_argument("--depths", type=int, nargs=2, default=[4, 2], help="likewise")
    parser.add_argument("--steps", type=int, nargs=2, default=[6000, 3000], help="likewise")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("teacher_runs"))
    options = parser.parse_args()
    sizes = map(Size, options.widths, options.depths, options.steps)
    teacher, student = (task_of(options.text, size, options.batch_size) for size in sizes)
    found = measure(student, teacher, options.seeds, options.runs)
    console = Console(width=110, highlight=False)
    console.print(table_of(found, student, teacher))
    console.print(*(verdict(found, name) for name in LESSONS if name != ALONE), sep="\n")
    own, others = models.paired(student, teacher)
    pairs = ", ".join(f"{a} from {b}" for a, b in zip(own, others, strict=True))
    lesson = LESSONS["with both"]
    console.print(
        f"{student.describe}. Width {options.widths[0]} and depth {options.depths[0]} teach "
        f"{options.widths[1]} and {options.depths[1]} ({pairs}); {teacher.steps:,} and "
        f"{student.steps:,} steps of {options.batch_size} × {LENGTH} characters (a student reads "
        f"{student.steps * options.batch_size * LENGTH:,} in all), AdamW at "
        f"{student.rate}; temperature {lesson.temperature:g}, weight of the teacher's "
        f"distributions {lesson.weight}, of its hidden states {lesson.features}. "
        + conditions(options.seeds)
    )


if __name__ == "__main__":
    main()
