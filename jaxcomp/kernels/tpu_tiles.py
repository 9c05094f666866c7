"""What kernels for TPUs share: sums over the last axis of a grid, and what tiles may be made of."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

FLOATS = (jnp.float32, jnp.bfloat16)
# Rows of a tile, where there are few: bfloat16 lies in memory in sixteens.
LEAST_ROWS = 16
# A grid of rows, columns, and what is summed over.
SUMMED_LAST = tpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def begin(total: Any, axis: int = 2) -> None:
    """Empty a sum at the first step of an axis of the grid."""

    @pl.when(pl.program_id(axis) == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)


def is_last(axis: int = 2) -> jax.Array:
    """Whether this is the last step of an axis of the grid."""
    return pl.program_id(axis) == pl.num_programs(axis) - 1


def finish(out: Any, total: Any) -> None:
    """Write a sum at the last step of the grid's third axis."""

    @pl.when(is_last())
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def cost(products: int, arrays: Sequence[Any], out: Any) -> pl.CostEstimate:
    """What XLA should count of a kernel, of which it sees nothing, when it plans around it.

    Args:
        products: how many pairs of numbers are multiplied and added up.
        arrays: what is read, each once.
        out: what is written.

    Example:
        >>> one = jnp.ones((2, 2), jnp.bfloat16)
        >>> told = cost(8, (one, one), one)
        >>> told.flops, told.bytes_accessed
        (16, 24)
    """
    moved = sum(each.size * each.dtype.itemsize for each in (*arrays, out))
    return pl.CostEstimate(flops=2 * products, transcendentals=0, bytes_accessed=moved)


def unfit_dtype(*dtypes: Any) -> str | None:
    """Why there is no tile of one of these dtypes, or None.

    Example:
        >>> unfit_dtype(jnp.bfloat16, jnp.float16)
        'float16 is neither float32 nor bfloat16'
    """
    wrong = [jnp.dtype(dtype).name for dtype in dtypes if dtype not in FLOATS]
    return f"{wrong[0]} is neither float32 nor bfloat16" if wrong else None
