"""The product with a weight that is rounded in registers, for NVIDIA's chips through Triton.

The scales have been found before; the rounded weight is nowhere in memory.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxcomp.kernels.fake_quant.rounding import (
    Rounding,
    group_scales,
    group_size,
    nearest_values,
    why_not_grouped,
)
from jaxcomp.kernels.forms import Kernel
from jaxcomp.kernels.tiles import dot, largest_divisor, pad_rows, row_tile, unfit_dtype

_TILES = (
    {"rows": 128, "columns": 128, "step": 32, "warps": 8, "stages": 3},
    {"rows": 128, "columns": 256, "step": 32, "warps": 8, "stages": 3},
    {"rows": 64, "columns": 128, "step": 64, "warps": 4, "stages": 3},
    {"rows": 16, "columns": 64, "step": 64, "warps": 4, "stages": 4},
)
_LEAST = 64


def forward(rounding: Rounding) -> Kernel:
    """``x @ w`` of ``x (rows, in)``, ``w (in, out)``, its scales and, if affine, zero points.

    The rounded weight is cast to the dtype of ``x``, which is the result's.
    """

    def run(
        x: Any, w: Any, *scales: Any, rows: int, columns: int, step: int, warps: int,
        stages: int, interpret: bool,
    ) -> jax.Array:  # fmt: skip
        tile, count = row_tile(rows, x.shape[0]), x.shape[0]
        x, columns = pad_rows(x, tile), largest_divisor(columns, w.shape[1])
        group = group_size(rounding, w)
        grouped, clipped = group_scales(rounding, w, *scales)
        of_scale = pl.BlockSpec((grouped[0].shape[0], columns), lambda i, j: (0, j))
        made = pl.pallas_call(
            partial(
                _forward,
                rounding=rounding,
                group=group,
                step=min(group, largest_divisor(step, w.shape[0])),
                clipped=clipped,
            ),
            jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype),
            grid=(x.shape[0] // tile, w.shape[1] // columns),
            in_specs=[
                pl.BlockSpec((tile, x.shape[1]), lambda i, j: (i, 0)),
                pl.BlockSpec((w.shape[0], columns), lambda i, j: (0, j)),
                *[of_scale] * len(grouped),
            ],
            out_specs=pl.BlockSpec((tile, columns), lambda i, j: (i, j)),
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name="fake_quant_matmul",
        )(x, w, *grouped)
        return made[:count]

    return Kernel(run, partial(unfit, rounding), _TILES)


def to_input(rounding: Rounding) -> Kernel:
    """``dy @ w.T`` of ``dy (rows, out)`` and the same weight."""

    def run(
        dy: Any, w: Any, *scales: Any, rows: int, columns: int, step: int, warps: int,
        stages: int, interpret: bool,
    ) -> jax.Array:  # fmt: skip
        tile, count = row_tile(rows, dy.shape[0]), dy.shape[0]
        dy, group = pad_rows(dy, tile), group_size(rounding, w)
        part = min(group, largest_divisor(columns, w.shape[0]))
        grouped, clipped = group_scales(rounding, w, *scales)
        of_scale = pl.BlockSpec(
            (1, w.shape[1]), lambda i, p: (lax.div(p * part, np.int32(group)), 0)
        )
        made = pl.pallas_call(
            partial(
                _to_input,
                rounding=rounding,
                step=largest_divisor(step, w.shape[1]),
                clipped=clipped,
            ),
            jax.ShapeDtypeStruct((dy.shape[0], w.shape[0]), dy.dtype),
            grid=(dy.shape[0] // tile, w.shape[0] // part),
            in_specs=[
                pl.BlockSpec((tile, dy.shape[1]), lambda i, p: (i, 0)),
                pl.BlockSpec((part, w.shape[1]), lambda i, p: (p, 0)),
                *[of_scale] * len(grouped),
            ],
            out_specs=pl.BlockSpec((tile, part), lambda i, p: (i, p)),
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name="fake_quant_matmul_to_input",
        )(dy, w, *grouped)
        return made[:count]

    return Kernel(run, partial(unfit, rounding), _TILES)


def unfit(rounding: Rounding, x: Any, w: Any, scale: Any, *zero_point: Any) -> str | None:
    """Why these do not fit the kernels, or None."""
    del zero_point
    inputs, outputs = w.shape
    if inputs % _LEAST or outputs % _LEAST:
        return f"{inputs} inputs and {outputs} outputs are not both multiples of {_LEAST}"
    return unfit_dtype(x.dtype, w.dtype) or why_not_grouped(rounding, scale)


def to_even(x: jax.Array) -> jax.Array:
    """The nearest integer, ties to even: Triton's Pallas has no rounding but down."""
    below = jnp.floor(x)
    beyond = x - below
    odd = below - 2 * jnp.floor(below * 0.5)
    return below + jnp.where((beyond > 0.5) | ((beyond == 0.5) & (odd == 1)), 1.0, 0.0)


def _rounded(w: jax.Array, scales: Any, rounding: Rounding, clipped: bool) -> jax.Array:
    scale, inverse, *zero = scales
    found = nearest_values(
        w.astype(jnp.float32), scale, inverse, zero[0] if zero else None, rounding, to_even
    )
    if clipped:
        largest = float(jnp.finfo(w.dtype).max)
        found = jnp.minimum(jnp.maximum(found, -largest), largest)
    return found.astype(w.dtype)


def _forward(
    x: Any, w: Any, *rest: Any, rounding: Rounding, group: int, step: int, clipped: bool
) -> None:
    *scales, out = rest

    def of_inputs(k: Any, total: jax.Array) -> jax.Array:
        rows = pl.ds(k * step, step)
        here = [each[pl.ds(lax.div(k * step, group), 1), :] for each in scales]
        matrix = _rounded(w[rows, :], here, rounding, clipped).astype(x.dtype)
        return total + dot(x[:, rows], matrix)

    total = lax.fori_loop(0, w.shape[0] // step, of_inputs, jnp.zeros(out.shape, jnp.float32))
    out[...] = total.astype(out.dtype)


def _to_input(dy: Any, w: Any, *rest: Any, rounding: Rounding, step: int, clipped: bool) -> None:
    *scales, out = rest

    def of_columns(k: Any, total: jax.Array) -> jax.Array:
        columns = pl.ds(k * step, step)
        here = [each[:, columns] for each in scales]
        matrix = _rounded(w[:, columns], here, rounding, clipped).astype(dy.dtype)
        return total + dot(dy[:, columns], matrix.T)

    total = lax.fori_loop(0, w.shape[1] // step, of_columns, jnp.zeros(out.shape, jnp.float32))
    out[...] = total.astype(out.dtype)
