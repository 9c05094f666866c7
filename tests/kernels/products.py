"""The table of products with a compressed matrix: how to make one, and what it should compute."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from product_row import Product, exact
from products_block_sparse import BLOCK_SPARSE
from products_codebook import CODEBOOKS
from products_fake_quant import FAKE_QUANT
from products_quantized import QUANTIZED

from jaxcomp.kernels.masked.matmul import masked_matmul
from jaxcomp.kernels.packed_mask import pack_mask


def _masked(rng: np.random.Generator, inputs: int, outputs: int, dtype: Any) -> Any:
    w = jnp.asarray(rng.normal(size=(inputs, outputs)), dtype)
    return w, pack_mask(jnp.asarray(rng.random((inputs, outputs)) < 0.3))


PRODUCTS = {
    "masked": Product(
        _masked,
        lambda x, weight, implementation=None: masked_matmul(
            x, *weight, implementation=implementation
        ),
        lambda weight: exact(weight[0]) * np.asarray(weight[1].unpack()),
        lambda weight: weight[0],
        lambda weight, floats: (floats, weight[1]),
    ),
    **BLOCK_SPARSE,
    **CODEBOOKS,
    **QUANTIZED,
    **FAKE_QUANT,
}
