"""Rows of the table of products: matrices of packed codes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from product_row import Product, exact

from jaxcomp import quantize
from jaxcomp.kernels.quantized.matmul import quantized_matmul
from jaxcomp.quantize import Format, PerChannel, PerGroup, mxfp4

SMALL = ((1, 1), (3, 5), (257, 130))


def encoded(
    format: Callable[[int], Any], rng: np.random.Generator, inputs: int, outputs: int, dtype: Any
) -> Any:
    del dtype
    weights = jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)
    return quantize.encode(weights, format(inputs))


def dense(weight: Any) -> np.ndarray:
    return exact(weight.decode())


def run(activations: Any, x: Any, weight: Any, implementation: Any = None) -> Any:
    return quantized_matmul(x, weight, activations=activations, implementation=implementation)


def run_transposed(x: Any, weight: Any, implementation: Any = None) -> Any:
    return quantized_matmul(x, weight, transposed=True, implementation=implementation)


def encoded_transposed(format: Any, rng: Any, inputs: int, outputs: int, dtype: Any) -> Any:
    return encoded(format, rng, outputs, inputs, dtype)


def rounded(form: str, x: np.ndarray) -> np.ndarray:
    """Rows in 8 bits, step by step as a program in float32 takes them."""
    x, dtype = x.astype(np.float32), jnp.dtype(form)
    top = np.float32(127 if form == "int8" else jnp.finfo(dtype).max)
    largest = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    scale = np.where(largest == 0, np.float32(1), largest / top)
    codes = np.round(x / scale) if form == "int8" else (x / scale).astype(dtype)
    return codes.astype(np.float64) * scale


def affine(bits: int, size: int) -> Callable[[int], Any]:
    """Groups of ``size``, or of what divides the inputs."""
    return lambda inputs: Format(
        bits, symmetric=False, granularity=PerGroup(math.gcd(size, inputs))
    )


def of(format: Any, activations: Any = None, **how: Any) -> Product:
    format = format if callable(format) else lambda inputs, format=format: format
    if activations is not None:
        how["rounded"] = partial(rounded, activations)
    return Product(
        partial(encoded, format), partial(run, activations), dense, fits=(256, 256), **how
    )


def transposed(format: Any, **how: Any) -> Product:
    return Product(
        partial(encoded_transposed, lambda _: format),
        run_transposed,
        lambda weight: dense(weight).T,
        fits=(256, 256),
        **how,
    )


# Other forms of the kernels are in test_quantized_matmul.py.
QUANTIZED = {
    "int8": of(Format(8), odd=SMALL),
    "int8-groups-affine": of(affine(8, 128), forms=(), odd=((384, 5), (257, 130))),
    "int4": of(Format(4), forms=(), odd=((3, 5),)),
    "int4-groups-affine": of(affine(4, 32), forms=("triton",), odd=((96, 7),)),
    "mxfp4": of(lambda inputs: mxfp4() if inputs % 32 == 0 else Format(4), forms=(), odd=()),
    "fp8": of(quantize.fp8(), forms=(), odd=((3, 5),)),
    "int8-transposed": transposed(Format(8, granularity=PerChannel(0)), odd=SMALL),
    "int4-affine-transposed": transposed(Format(4, symmetric=False), forms=(), odd=((3, 5),)),
    "w8a8": of(Format(8), activations="int8", forms=(), odd=((3, 5),)),
}
