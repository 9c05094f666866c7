"""Rows of the table of products: weights rounded on the way."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from product_row import Product, exact

from jaxcomp.kernels.fake_quant.matmul import fake_quant_matmul
from jaxcomp.kernels.fake_quant.rounding import Rounding
from jaxcomp.quantize import Format, PerGroup, fake_quant


def _channels(weight: Any) -> tuple[Format, Rounding]:
    return Format(8), Rounding(8)


def _affine_groups(weight: Any) -> tuple[Format, Rounding]:
    size = 32 if weight.shape[0] % 32 == 0 else 1
    groups = PerGroup(size)
    return Format(4, symmetric=False, granularity=groups), Rounding(4, False, blocks=((size, -2),))


def _product(formats: Any) -> Product:
    """A row; the matrix is what :func:`jaxcomp.quantize.fake_quant` says."""

    def make(rng: np.random.Generator, inputs: int, outputs: int, dtype: Any) -> Any:
        return jnp.asarray(rng.normal(size=(inputs, outputs)) + 0.5, dtype)

    return Product(
        make,
        lambda x, weight, implementation=None: fake_quant_matmul(
            x, weight, formats(weight)[1], implementation=implementation
        ),
        lambda weight: exact(fake_quant(weight, formats(weight)[0])),
        lambda weight: weight,
        lambda weight, floats: floats,
    )


FAKE_QUANT = {
    "fake_quant_channels": _product(_channels),
    "fake_quant_affine_groups": _product(_affine_groups),
}
