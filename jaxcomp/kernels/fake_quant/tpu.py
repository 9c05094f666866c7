"""The product with a weight that is rounded in fast memory, for TPUs through Mosaic.

The scales have been found before; the rounded weight never goes back to slow memory.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from jaxcomp.kernels.fake_quant.rounding import (
    Rounding,
    group_scales,
    group_size,
    nearest_values,
    why_not_grouped,
)
from jaxcomp.kernels.forms import Kernel
from jaxcomp.kernels.tiles import dot, largest_divisor, pad_rows, row_tile
from jaxcomp.kernels.tpu_tiles import LEAST_ROWS, SUMMED_LAST, begin, cost, finish, unfit_dtype

_TILES = (
    {"rows": 256, "block": 512, "columns": 256},
    {"rows": 512, "block": 512, "columns": 512},
    {"rows": 128, "block": 1024, "columns": 512},
)
# Of a tile.
_WIDE = 128


def forward(rounding: Rounding) -> Kernel:
    """As :func:`jaxcomp.kernels.fake_quant.triton.forward`."""

    def run(
        x: Any, w: Any, *scales: Any, rows: int, block: int, columns: int, interpret: bool
    ) -> jax.Array:
        tile, count = row_tile(rows, x.shape[0], LEAST_ROWS), x.shape[0]
        block, columns = (
            largest_divisor(*each) for each in ((block, w.shape[0]), (columns, w.shape[1]))
        )
        here = ((block, columns), lambda i, j, k: (k, j))
        made = _summed(
            False,
            rounding,
            (pad_rows(x, tile), w, *scales),
            [pl.BlockSpec((tile, block), lambda i, j, k: (i, k)), pl.BlockSpec(*here)],
            here,
            (w.shape[1] // columns, w.shape[0] // block),
            (tile, columns),
            interpret,
        )
        return made[:count]

    return Kernel(run, partial(unfit, rounding), _TILES)


def to_input(rounding: Rounding) -> Kernel:
    """As :func:`jaxcomp.kernels.fake_quant.triton.to_input`."""

    def run(
        dy: Any, w: Any, *scales: Any, rows: int, block: int, columns: int, interpret: bool
    ) -> jax.Array:
        tile, count = row_tile(rows, dy.shape[0], LEAST_ROWS), dy.shape[0]
        block, columns = (
            largest_divisor(*each) for each in ((block, w.shape[0]), (columns, w.shape[1]))
        )
        here = ((block, columns), lambda i, j, k: (j, k))
        made = _summed(
            True,
            rounding,
            (pad_rows(dy, tile), w, *scales),
            [pl.BlockSpec((tile, columns), lambda i, j, k: (i, k)), pl.BlockSpec(*here)],
            here,
            (w.shape[0] // block, w.shape[1] // columns),
            (tile, block),
            interpret,
        )
        return made[:count]

    return Kernel(run, partial(unfit, rounding), _TILES)


def unfit(rounding: Rounding, x: Any, w: Any, scale: Any, *zero_point: Any) -> str | None:
    """Why these do not fit the kernels, or None."""
    del zero_point
    inputs, outputs = w.shape
    if inputs % _WIDE or outputs % _WIDE:
        return f"{inputs} inputs and {outputs} outputs are not both multiples of {_WIDE}"
    return unfit_dtype(x.dtype, w.dtype) or why_not_grouped(rounding, scale)


def _summed(
    transposed: bool,
    rounding: Rounding,
    arrays: Any,
    specs: Any,
    of_weight: Any,
    steps: tuple[int, int],
    tile: tuple[int, int],
    interpret: bool,
) -> jax.Array:
    """A kernel over a grid whose last axis is summed over, in float32."""
    x, w, *scales = arrays
    ((block, columns), where), group = of_weight, group_size(rounding, w)
    grouped, clipped = group_scales(rounding, w, *scales)

    def of_group(i: Any, j: Any, k: Any) -> Any:
        down, across = where(i, j, k)
        return (down if group <= block else lax.div(down * block, np.int32(group))), 0, across

    groups = max(1, block // group)
    scale_spec = pl.BlockSpec((groups, 1, columns), of_group)
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[0] if transposed else w.shape[1]), x.dtype)
    return pl.pallas_call(
        partial(_kernel, transposed, rounding, clipped),
        out,
        grid=(x.shape[0] // tile[0], *steps),
        in_specs=[*specs, *[scale_spec] * len(grouped)],
        out_specs=pl.BlockSpec(tile, lambda i, j, k: (i, j)),
        scratch_shapes=[tpu.VMEM(tile, jnp.float32)],
        compiler_params=SUMMED_LAST,
        cost_estimate=cost(x.shape[0] * w.size, (x, w, *grouped), out),
        interpret=interpret,
        name="fake_quant_matmul_to_input" if transposed else "fake_quant_matmul",
    )(x, w, *(each[:, None] for each in grouped))


def _kernel(
    transposed: bool, rounding: Rounding, clipped: bool, x: Any, w: Any, *rest: Any
) -> None:
    *scales, out, total = rest
    begin(total)
    matrix = _rounded(w, [each[...] for each in scales], rounding, clipped).astype(x.dtype)
    total[...] += dot(x[...], matrix.T if transposed else matrix)
    finish(out, total)


def _rounded(w: Any, scales: Any, rounding: Rounding, clipped: bool) -> jax.Array:
    scale, inverse, *zero = scales
    # The members of a group lie one below the other.
    grouped = w[...].astype(jnp.float32).reshape(scale.shape[0], -1, w.shape[1])
    found = nearest_values(
        grouped, scale, inverse, zero[0] if zero else None, rounding, jnp.round
    ).reshape(w.shape)
    if clipped:
        largest = float(jnp.finfo(w.dtype).max)
        found = jnp.minimum(jnp.maximum(found, -largest), largest)
    return found.astype(w.dtype)
