"""The tables and the plot of lenet.py, beside what was published."""

import importlib
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import coding_peers
import lenet_models as models
import numpy as np
from coding_peers import Codes
from lenet_models import Network
from rich.table import Table
from sparsity import mean_and_spread

import jaxcomp
from jaxcomp import tree as tree_lib
from jaxcomp.arrays import is_compressed
from jaxcomp.checkpoint.coder import encode

# Name, bytes, error in percent.
PUBLISHED: dict[str, list[tuple[str, int, float]]] = {
    "lenet-300-100": [
        ("Deep Compression (Han et al., 2016)", 26_661, 1.58),
        ("Oktay et al., 2020", 8_560, 1.9),
    ],
    "lenet-5": [
        ("Deep Compression (Han et al., 2016)", 44_213, 0.74),
        ("Oktay et al., 2020", 2_840, 1.0),
        ("MIRACLE (Havasi et al., 2019)", 1_553, 0.96),
    ],
}
# How a recipe's name begins, most bytes and highest mean error of a target.
TARGETS: dict[str, list[tuple[str, int, float]]] = {
    "lenet-300-100": [
        ("Deep Compression", 26_661, 1.58),
        ("penalty", 8_560, 1.9),
        ("penalty", 8_560, 1.6),
    ],
    "lenet-5": [
        ("Deep Compression", 43_108, 0.74),
        ("penalty", 2_840, 1.0),
        ("penalty", 1_553, 0.96),
    ],
}
Shipped = Any


def results_table(network: Network, found: dict[str, list[Shipped]]) -> Table:
    """Bytes, ratio and error of each recipe; published rows below."""
    table = Table(title=f"{network.name} on MNIST, {network.float32_bytes:,} bytes in float32")
    headings = ("", "bytes", "min to max", "ratio", "error %", "min to max", "to dense", "minutes")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    dense = {run.seed: run.error for run in found["dense"]}
    for name, of_seeds in found.items():
        sizes, errors = [run.size for run in of_seeds], [run.error for run in of_seeds]
        change = statistics.mean(run.error - dense[run.seed] for run in of_seeds)
        table.add_row(
            name if len(of_seeds) == len(dense) else f"{name} (seeds {seeds_of(of_seeds)})",
            f"{round(statistics.mean(sizes)):,}",
            f"{min(sizes):,} to {max(sizes):,}",
            f"{network.float32_bytes / statistics.mean(sizes):.1f}×",
            spread(errors),
            f"{min(errors):.2f} to {max(errors):.2f}",
            "" if name == "dense" else f"{change:+.2f}",
            f"{statistics.mean(run.seconds for run in of_seeds) / 60:.1f}",
        )
    table.add_section()
    for name, size, error in PUBLISHED[network.name]:
        ratio = network.float32_bytes / size
        table.add_row(name, f"{size:,}", "", f"{ratio:.0f}×", f"{error:.2f}", "", "", "")
    return table


def verdicts(network: Network, found: dict[str, list[Shipped]]) -> str:
    """For each target, the smallest recipe that reaches it, or that none does."""
    lines = []
    for kind, most, highest in TARGETS[network.name]:
        reached = {}
        for name, of_seeds in found.items():
            if not name.startswith(kind):
                continue
            size = statistics.mean(run.size for run in of_seeds)
            error = statistics.mean(run.error for run in of_seeds)
            if size <= most and error <= highest:
                reached[name] = size
        best = min(reached, key=reached.__getitem__, default=None)
        word = f"reached by {best!r}" if best else "MISSED"
        lines.append(f"{kind}: at most {most:,} bytes at {highest}% (means): {word}.")
    return "\n".join(lines)


def curve_table(network: Network, found: dict[str, list[Shipped]]) -> Table:
    """Each file of each seed."""
    table = Table(title=f"{network.name}: bytes and error of each file")
    table.add_column("")
    seeds = sorted({run.seed for of_seeds in found.values() for run in of_seeds})
    for seed in seeds:
        table.add_column(f"seed {seed}", justify="right")
    for name, of_seeds in found.items():
        cells = {run.seed: f"{run.size:,} {run.error:.2f}%" for run in of_seeds}
        table.add_row(name, *(cells.get(seed, "") for seed in seeds))
    return table


def search_table(network: Network, rows: Sequence[tuple[str, int, float]]) -> Table:
    table = Table(
        title=f"{network.name}: settings on {models.HELD_OUT:,} held-out images, one seed"
    )
    for heading in ("settings", "bytes", "held-out error %"):
        table.add_column(heading, justify="left" if heading == "settings" else "right")
    for name, size, error in rows:
        table.add_row(name, f"{size:,}", f"{error:.2f}")
    return table


def codes_of(file: pathlib.Path) -> list[Codes]:
    """The codes or indices of each compressed leaf of a file."""
    found = []
    for leaf in tree_lib.flatten(jaxcomp.load(file)).values():
        if not is_compressed(leaf):
            continue
        for symbols in leaf.to_parts().symbols.values():
            # Zero is the code that most weights have.
            zero = int(np.bincount(symbols.values.ravel()).argmax())
            found.append(Codes(symbols.values, symbols.alphabet, zero))
    return found


def coders_table(network: Network, found: dict[str, list[Shipped]], nncodec: str | None) -> Table:
    """The same codes in our coder and in others: streams alone, mean over the seeds."""
    coder = coding_peers.load_nncodec(nncodec)
    coders = {
        "our streams": lambda codes: sum(len(encode(x.values, x.alphabet)[1]) for x in codes),
        "first-order entropy": coding_peers.entropy_bytes,
        "zlib": coding_peers.zlib_bytes,
        "xz": coding_peers.xz_bytes,
        "nncodec": lambda codes: coding_peers.nncodec_bytes(coder, codes) if coder else None,
    }
    table = Table(title=f"{network.name}: the same codes in other coders, bytes")
    for heading in ("", "whole file", *coders):
        table.add_column(heading, justify="right" if heading else "left")
    for name, of_seeds in found.items():
        codes = [codes_of(run.file) for run in of_seeds]
        if not all(codes):
            continue
        sizes = [[code(each) for each in codes] for code in coders.values()]
        cells = [[run.size for run in of_seeds], *sizes]
        table.add_row(
            name, *("" if None in each else f"{statistics.mean(each):,.0f}" for each in cells)
        )
    return table


def plot(results: dict[str, dict[str, list[Shipped]]], file: pathlib.Path) -> str:
    """Bytes against error, a panel for each network; says where the file is, or what is missing."""
    try:
        drawing: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        return f"No plot: matplotlib draws {file} (pip install matplotlib)."
    figure = drawing.Figure(figsize=(5.5 * len(results), 4.5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(results)))
    for panel, (name, found) in zip(panels, results.items(), strict=True):
        for recipe, of_seeds in found.items():
            if recipe == "dense":
                continue
            sizes, errors = [run.size for run in of_seeds], [run.error for run in of_seeds]
            (line,) = panel.plot(sizes, errors, ".", alpha=0.4)
            middle = statistics.mean(sizes), statistics.mean(errors)
            panel.plot(*middle, "o", color=line.get_color(), label=recipe)
        for source, size, error in PUBLISHED[name]:
            panel.plot(size, error, "x", color="black")
            panel.annotate(
                source, (size, error), fontsize=7, xytext=(4, 4), textcoords="offset points"
            )
        dense = statistics.mean(run.error for run in found["dense"])
        panel.axhline(dense, color="grey", linewidth=0.8, linestyle="--", label="float32")
        panel.set(xscale="log", xlabel="bytes of the file", ylabel="test error, %", title=name)
        panel.legend(fontsize=7)
    figure.savefig(file)
    return f"Bytes against error: {file}."


def seeds_of(of_seeds: Sequence[Shipped]) -> str:
    return ", ".join(str(run.seed) for run in of_seeds)


def spread(values: Sequence[float]) -> str:
    return mean_and_spread(list(values), 2) if len(values) > 1 else f"{values[0]:.2f}"
