"""Rows of the table of products: matrices that keep some of their blocks."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from product_row import Product, exact

from jaxcomp.arrays.block_sparse import BlockSparseArray
from jaxcomp.kernels.block_sparse.matmul import block_sparse_matmul


def _blocks(rng: np.random.Generator, inputs: int, outputs: int, dtype: Any) -> Any:
    """Three blocks of eight at the sizes that fit, one column of them empty now and then."""
    block = (128, 128) if inputs % 128 == 0 == outputs % 128 else (1, outputs)
    grid = inputs // block[0], outputs // block[1]
    keep = np.zeros(grid[0] * grid[1], bool)
    keep[0] = True
    keep[1 + rng.permutation(keep.size - 1)[: 3 * keep.size // 8]] = True
    mask = np.kron(keep.reshape(grid), np.ones(block, bool))
    dense = jnp.asarray(np.where(mask, rng.normal(size=mask.shape), 0), dtype)
    return BlockSparseArray.encode(dense, block, jnp.asarray(mask))


_PRODUCT = Product(
    _blocks,
    lambda x, weight, implementation=None: block_sparse_matmul(
        x, weight, implementation=implementation
    ),
    lambda weight: exact(weight.decode()),
    lambda weight: weight.values,
    lambda weight, floats: dataclasses.replace(weight, values=floats),
)
BLOCK_SPARSE = {
    "block_sparse": _PRODUCT,
    # What Hopper's tensor cores take.
    "block_sparse_half": _PRODUCT._replace(
        forms=("mosaic_gpu",), dtypes=(jnp.bfloat16, jnp.float16)
    ),
}
