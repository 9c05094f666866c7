"""What is worth keeping of a residual: its largest weights."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcomp.arrays import SparseArray
from jaxcomp.checks import check_amount, check_count
from jaxcomp.factorize.leaf import Encoder


def largest_weights(density: float, batch_axes: int = 0) -> Encoder:
    """An encoder that keeps the largest magnitudes: a residual for :func:`svd`.

    Args:
        density: the fraction of the weights that is kept, above 0 and below 1; rounded down, at
            least one weight. Of equals the first are kept.
        batch_axes: how many leading axes are stacked layers, each with weights of its own.

    Returns:
        ``encode(array) -> SparseArray``.

    Raises:
        TypeError: the density is no number.
        ValueError: it is out of range.

    Example:
        >>> largest_weights(0.25)(jnp.array([[1.0, -3.0], [2.0, 0.5]])).decode()
        Array([[ 0., -3.],
               [ 0.,  0.]], dtype=float32)

    Source: Zhou and Tao, "GoDec: Randomized Low-rank & Sparse Matrix Decomposition in Noisy Case",
    2011, equation 2.
    """
    check_amount("density", density)
    check_count("batch_axes", batch_axes, least=0)
    if not 0 < density < 1:
        raise ValueError(f"density is {density}: a fraction above 0 and below 1 is needed")

    def encode(array: Any) -> SparseArray:
        values = np.asarray(array)
        rows = np.abs(values.astype(np.float64)).reshape(*values.shape[:batch_axes], -1)
        count = max(1, math.floor(density * rows.shape[-1]))
        order = np.argsort(-rows, axis=-1, kind="stable")[..., :count]
        keep = np.zeros(rows.shape, bool)
        np.put_along_axis(keep, order, True, axis=-1)
        keep = keep.reshape(values.shape)
        kept = np.where(keep, values, np.zeros((), values.dtype))
        return SparseArray.encode(jnp.asarray(kept), jnp.asarray(keep), batch_axes=batch_axes)

    return encode
