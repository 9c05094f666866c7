"""Tables for the terminal: what a file holds, and what each stage of a compression came to."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxcomp.checkpoint import Inspection


class Row(NamedTuple):
    """A stage, over its seeds.

    Attributes:
        name: of the stage.
        accuracies: percent, one a seed.
        file_bytes: bytes, one a seed.
        parameters: weights and biases of the model.
        sparsity: mean fraction of zeros.
    """

    name: str
    accuracies: Sequence[float]
    file_bytes: Sequence[int]
    parameters: int
    sparsity: float


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean.

    Example:
        >>> mean([1.0, 2.0])
        1.5
    """
    return sum(values) / len(values)


def stage_table(rows: Sequence[Row], title: str) -> Any:
    """One row a stage: accuracy, its change against the first row, bytes, ratio to float32.

    Args:
        rows: stages; the first is what the others are compared with.
        title: above the table.

    Returns:
        A ``rich.table.Table``.

    Example:
        >>> table = stage_table([Row("dense", [97.0, 98.0], [4000, 4010], 1000, 0.0)], "Demo")
        >>> table.row_count
        1
    """
    from rich.table import Table

    table = Table(title=title)
    table.add_column("stage", no_wrap=True)
    for name in ("test %", "min–max", "change", "bytes", "ratio", "zeros", "bits/w"):
        table.add_column(name, justify="right", no_wrap=True)
    base = mean(rows[0].accuracies)
    for row in rows:
        accuracy, size = mean(row.accuracies), mean(row.file_bytes)
        table.add_row(
            row.name,
            f"{accuracy:.2f}",
            f"{min(row.accuracies):.1f}–{max(row.accuracies):.1f}",
            f"{accuracy - base:+.2f}",
            f"{size:,.0f}",
            f"{4 * row.parameters / size:.1f}×",
            f"{100 * row.sparsity:.1f}%",
            f"{8 * size / row.parameters:.2f}",
        )
    return table


def leaf_table(inspection: Inspection) -> Any:
    """One row a leaf of a file: path, form, shape, bits per weight, sparsity, bytes.

    Args:
        inspection: from :func:`jaxcomp.inspect`.

    Returns:
        A ``rich.table.Table``.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{inspection.path} (format {inspection.version})"))
    # Paths come from the file: shown as text, never read as markup.
    for name in ("path", "form", "shape"):
        table.add_column(name, overflow="fold")
    for name in ("bits/weight", "sparsity", "bytes"):
        table.add_column(name, justify="right")
    for leaf in inspection.leaves:
        table.add_row(
            Text(leaf.path),
            Text(f"{leaf.dtype} {leaf.form}"),
            " × ".join(map(str, leaf.shape)) or "scalar",
            f"{leaf.bits_per_weight:.2f}",
            f"{100 * leaf.sparsity:.1f}%",
            f"{leaf.bytes:,}",
        )
    parameters = sum(leaf.parameters for leaf in inspection.leaves)
    table.add_row("header and manifest", "", "", "", "", f"{inspection.overhead_bytes:,}")
    table.add_section()
    bits = 8 * inspection.file_bytes / parameters if parameters else 0.0
    zeros = sum(leaf.sparsity * leaf.parameters for leaf in inspection.leaves)
    table.add_row(
        "total",
        "",
        f"{parameters:,}",
        f"{bits:.2f}",
        f"{100 * zeros / max(parameters, 1):.1f}%",
        f"{inspection.file_bytes:,}",
    )
    return table
