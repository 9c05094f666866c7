"""Time of one dense layer in 8-bit integers, beside floats and beside other libraries' integers.

    python benchmarks/integer.py --size 4096

Every row computes the same layer, ``x @ w + b`` with a square weight, in rounds in which each row
has its turn; a ratio is the median over rounds of a row's time by that of float32 in the round. Our
rows are the dot alone (codes to 32-bit sums) and the whole layer as ``quantize.integer_apply`` runs
it: finding the range of x, rounding it, the dot, scales and bias. Other libraries' rows need them
installed (``pip install onnx onnxruntime torch``) and are otherwise said to be missing. They run in
processes of their own: PyTorch and XLA in one process would share, or fight for, the cores.
"""

# pyright: reportMissingImports=false

import argparse
import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

BATCHES = (1, 8, 64, 512)
TARGETS = {1: 0.55, 8: 0.55, 16: 0.55, 512: 0.65}


def inputs(size: int, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, size)).astype(np.float32)
    w = (rng.normal(size=(size, size)) / size**0.5).astype(np.float32)
    return x, w, rng.normal(size=size).astype(np.float32)


def xla(size: int, batch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    import jax
    import jax.numpy as jnp
    from jax import lax

    from jaxcomp.kernels.int8 import int8_matmul
    from jaxcomp.quantize import Format, encode
    from jaxcomp.quantize.integer.applied import integer_apply

    def bound(function: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
        function = jax.jit(function)
        return lambda: jax.block_until_ready(function(*arrays))

    def layer(params: Any, x: Any) -> Any:
        return x @ params["kernel"] + params["bias"]

    def plain(x: Any, codes: Any, axis: int) -> Any:
        dot = (((1,), (axis,)), ((), ()))
        return lax.dot_general(x, codes, dot, preferred_element_type=jnp.int32)

    x, w, b = map(jnp.asarray, inputs(size, batch))
    dense = {"kernel": w, "bias": b}
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (dense, x))
    packed = {"kernel": encode(w, Format(8)), "bias": b}
    model = integer_apply(layer, packed, x)
    codes = model.params.weights["kernel"].codes
    data = jnp.clip(jnp.round(x * 30), -127, 127).astype(jnp.int8)
    yield "float32", bound(layer, dense, x)
    yield "bfloat16", bound(layer, *half)
    yield "jaxcomp int8, the dot", bound(int8_matmul, data, codes)
    yield "jaxcomp int8, the layer", bound(model.apply, model.params, x)
    decoded = functools.partial(layer_decoded, layer)
    yield "packed leaf, decoded in each call", bound(decoded, packed, x)
    yield "XLA's int8 dot, weight (out, in)", bound(functools.partial(plain, axis=1), data, codes)
    yield (
        "XLA's int8 dot, weight (in, out)",
        bound(functools.partial(plain, axis=0), data, jnp.asarray(codes.T.copy())),
    )


def layer_decoded(layer: Callable[..., Any], params: Any, x: Any) -> Any:
    import jaxcomp

    return layer(jaxcomp.decode(params), x)


def onnx(size: int, batch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    import tempfile

    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper, save
    from onnxruntime.quantization import QuantType, quantize_dynamic

    x, w, b = inputs(size, batch)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["y"]),
    ]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, size])
    weights = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")]
    graph = helper.make_graph(nodes, "layer", [value("x")], [value("y")], weights)
    opset = [helper.make_opsetid("", 17)]
    with tempfile.TemporaryDirectory() as folder:
        dense, small = os.path.join(folder, "dense.onnx"), os.path.join(folder, "small.onnx")
        save(helper.make_model(graph, opset_imports=opset, ir_version=9), dense)
        quantize_dynamic(dense, small, weight_type=QuantType.QInt8, per_channel=True)
        for name, path in (("onnxruntime float32", dense), ("onnxruntime dynamic int8", small)):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = os.cpu_count() or 1
            session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
            yield name, functools.partial(session.run, None, {"x": x})


def torch(size: int, batch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch as library
    from torch import _int_mm as int_mm  # pyright: ignore

    x, w, b = map(library.from_numpy, inputs(size, batch))
    yield "torch float32", functools.partial(library.nn.functional.linear, x, w.T.contiguous(), b)
    data = library.clamp(library.round(x * 30), -127, 127).to(library.int8)
    codes = library.clamp(library.round(w.T.contiguous() * 2000), -127, 127).to(library.int8)
    yield (
        "torch._int_mm, the dot, weight (out, in)",
        functools.partial(int_mm, data, codes.T),
    )
    yield (
        "torch._int_mm, the dot, weight (in, out)",
        functools.partial(int_mm, data, codes.T.contiguous()),
    )


WORKERS = {"jax": xla, "onnxruntime": onnx, "torch": torch}


def serve(connection: Any, library: str, size: int, batch: int) -> None:
    """Make a library's rows, and time one of them whenever its number is received."""
    rows: list[tuple[str, Callable[[], Any] | None, str]] = []
    for name, call in WORKERS[library](size, batch):
        try:
            call()
            call()
        except (RuntimeError, NotImplementedError) as error:
            rows.append((name, None, str(error).splitlines()[0][:60]))
        else:
            rows.append((name, call, ""))
    connection.send([(name, call is not None, reason) for name, call, reason in rows])
    while (number := connection.recv()) is not None:
        call = rows[number][1]
        assert call is not None
        start = time.perf_counter()
        call()
        connection.send(time.perf_counter() - start)


def measure(size: int, batch: int, repeats: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each row in each round, and why a row has none."""
    context = multiprocessing.get_context("spawn")
    times: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    turns: list[tuple[Any, int, str]] = []
    workers = []
    for library in WORKERS:
        if importlib.util.find_spec(library) is None:
            refused[library] = "not installed"
            continue
        here, there = context.Pipe()
        worker = context.Process(target=serve, args=(there, library, size, batch), daemon=True)
        worker.start()
        # So that a worker that fails ends the reading of what it never sends.
        there.close()
        workers.append((worker, here))
        for number, (name, works, reason) in enumerate(here.recv()):
            if works:
                times[name] = []
                turns.append((here, number, name))
            else:
                refused[name] = reason
    for _ in range(repeats):
        for connection, number, name in turns:
            # The first call after another library's turn finds cold caches and sleeping threads.
            connection.send(number)
            connection.recv()
            connection.send(number)
            times[name].append(connection.recv())
    for worker, connection in workers:
        connection.send(None)
        worker.join()
    return times, refused


def copy_bandwidth() -> float:
    """Bytes read a second by a sum over 200 MB that lie in memory, at its best of five."""
    source = np.ones(25_000_000)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        source.sum()
        seconds.append(time.perf_counter() - start)
    return source.nbytes / min(seconds)


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
        return lines[0].split(":")[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def versions() -> str:
    found = []
    for name in ("jax", "jaxlib", "numpy", "onnxruntime", "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    console, load = Console(width=110), os.getloadavg()[0]
    bandwidth = copy_bandwidth()
    for batch in options.batches:
        times, refused = measure(options.size, batch, options.repeats)
        base = times["float32"]
        table = Table(title=f"A layer {options.size} × {options.size}, batch {batch}")
        table.add_column("how", no_wrap=True)
        for heading in (
            "ms",
            "× float32",
            "10–90%",
            "10⁹ products/s",
            "weight bytes / bandwidth, ms",
        ):
            table.add_column(heading, justify="right")
        for name, seconds in times.items():
            ratios = sorted(a / b for a, b in zip(seconds, base, strict=True))
            middle, edge = statistics.median(seconds), len(ratios) // 10
            size = 4 if "float32" in name or "decoded" in name else 2 if "bfloat16" in name else 1
            table.add_row(
                name,
                f"{1000 * middle:.2f}",
                f"{statistics.median(ratios):.2f}",
                f"{ratios[edge]:.2f}–{ratios[-1 - edge]:.2f}",
                f"{batch * options.size**2 / middle / 1e9:.0f}",
                f"{1000 * size * options.size**2 / bandwidth:.2f}",
            )
        for name, reason in refused.items():
            table.add_row(name, "-", reason)
        console.print(table)
        if batch in TARGETS:
            console.print(f"target: int8 at most {TARGETS[batch]} × float32", highlight=False)
    console.print(
        f"{cpu_model()}, {os.cpu_count()} cores, load {load:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after; one core reads {bandwidth / 1e9:.1f} GB/s from memory, "
        "of which the last column is made (what fits the cache is read faster); "
        f"Python {platform.python_version()}, {versions()}; medians of {options.repeats} rounds, "
        "ratios to XLA's float32 in the same round.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
