"""Rows of the table of products: matrices of shared values."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from product_row import Product, exact

from jaxcomp.arrays.codebook import CodebookArray
from jaxcomp.kernels.codebook.matmul import codebook_matmul


def _shared(rng: np.random.Generator, inputs: int, outputs: int, dtype: Any) -> CodebookArray:
    """13 values: indices of 4 bits, of which some stand for nothing."""
    indices = jnp.asarray(rng.integers(0, 13, (inputs, outputs)), jnp.uint8)
    codebook = jnp.asarray(rng.normal(size=13), jnp.float32)
    return CodebookArray.from_indices(indices, codebook, dtype)


CODEBOOKS = {
    "codebook": Product(
        _shared,
        lambda x, weight, implementation=None: codebook_matmul(
            x, weight, implementation=implementation
        ),
        lambda weight: exact(weight.decode()),
        lambda weight: weight.codebook,
        lambda weight, floats: dataclasses.replace(weight, codebook=floats),
    ),
}
