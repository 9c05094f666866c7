"""The product with a masked matrix and its two gradients, for NVIDIA's chips through Triton.

A program unpacks the bits of the weights that it has loaded, in registers: ``w * mask`` is nowhere
in memory. The rows of one bit lie together, so that a bit is one test of a whole tile.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxcomp.kernels.forms import Kernel
from jaxcomp.kernels.tiles import dot, largest_divisor, pad_rows, row_tile, unfit_dtype

_TILES = (
    {"rows": 128, "columns": 128, "step": 16, "warps": 8, "stages": 3},
    {"rows": 128, "columns": 256, "step": 16, "warps": 8, "stages": 2},
    {"rows": 64, "columns": 128, "step": 16, "warps": 4, "stages": 4},
    {"rows": 16, "columns": 64, "step": 32, "warps": 4, "stages": 4},
)
_STEP = 64


def forward(block: int) -> Kernel:
    """``x @ (w * mask)`` of ``x (rows, in)``, ``w (in, out)`` and the bits of the mask."""

    def run(
        x: Any, w: Any, bits: Any, *, rows: int, columns: int, step: int, warps: int,
        stages: int, interpret: bool,
    ) -> jax.Array:  # fmt: skip
        tile, count = row_tile(rows, x.shape[0]), x.shape[0]
        # The rows of a step are of one bit.
        x, step = pad_rows(x, tile), min(step, block // 8)
        columns = largest_divisor(columns, w.shape[1])
        out = pl.pallas_call(
            partial(_forward, block=block, step=step),
            jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.result_type(x, w)),
            grid=(x.shape[0] // tile, w.shape[1] // columns),
            in_specs=[
                pl.BlockSpec((tile, x.shape[1]), lambda i, j: (i, 0)),
                pl.BlockSpec((w.shape[0], columns), lambda i, j: (0, j)),
                pl.BlockSpec((bits.shape[0], columns), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((tile, columns), lambda i, j: (i, j)),
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name="masked_matmul",
        )(x, w, bits)
        return out[:count]

    return Kernel(run, partial(unfit, block), _TILES)


def to_input(block: int) -> Kernel:
    """``dy @ (w * mask).T`` of ``dy (rows, out)``, ``w (in, out)`` and the bits."""

    def run(
        dy: Any, w: Any, bits: Any, *, rows: int, columns: int, step: int, warps: int,
        stages: int, interpret: bool,
    ) -> jax.Array:  # fmt: skip
        del columns, step
        tile, count = row_tile(rows, dy.shape[0]), dy.shape[0]
        dy, plane = pad_rows(dy, tile), block // 8
        out = pl.pallas_call(
            partial(_to_input, step=_STEP),
            jax.ShapeDtypeStruct((dy.shape[0], w.shape[0]), jnp.result_type(dy, w)),
            grid=(dy.shape[0] // tile, w.shape[0] // plane),
            in_specs=[
                pl.BlockSpec((tile, dy.shape[1]), lambda i, p: (i, 0)),
                pl.BlockSpec((plane, w.shape[1]), lambda i, p: (p, 0)),
                pl.BlockSpec((plane, w.shape[1]), lambda i, p: (p // 8, 0)),
            ],
            out_specs=pl.BlockSpec((tile, plane), lambda i, p: (i, p)),
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name="masked_matmul_to_input",
        )(dy, w, bits)
        return out[:count]

    return Kernel(run, partial(unfit, block), _TILES)


def to_weight(block: int) -> Kernel:
    """``(x.T @ dy) * mask`` of ``x (rows, in)``, ``dy (rows, out)`` and the bits."""

    def run(
        x: Any, dy: Any, bits: Any, *, rows: int, columns: int, step: int, warps: int,
        stages: int, interpret: bool,
    ) -> jax.Array:  # fmt: skip
        del rows, step
        x, dy, plane = pad_rows(x, _STEP), pad_rows(dy, _STEP), block // 8
        columns = largest_divisor(columns, dy.shape[1])
        return pl.pallas_call(
            partial(_to_weight, step=_STEP),
            jax.ShapeDtypeStruct((x.shape[1], dy.shape[1]), jnp.result_type(x, dy)),
            grid=(x.shape[1] // plane, dy.shape[1] // columns),
            in_specs=[
                pl.BlockSpec((x.shape[0], plane), lambda p, j: (0, p)),
                pl.BlockSpec((dy.shape[0], columns), lambda p, j: (0, j)),
                pl.BlockSpec((plane, columns), lambda p, j: (p // 8, j)),
            ],
            out_specs=pl.BlockSpec((plane, columns), lambda p, j: (p, j)),
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name="masked_matmul_to_weight",
        )(x, dy, bits)

    return Kernel(run, partial(_unfit_pair, block), _TILES)


def unfit(block: int, x: Any, w: Any, bits: Any) -> str | None:
    """Why these do not fit the kernels, or None."""
    return _unfit(block, w.shape, (x.dtype, w.dtype), bits)


def _unfit_pair(block: int, x: Any, dy: Any, bits: Any) -> str | None:
    return _unfit(block, (x.shape[1], dy.shape[1]), (x.dtype, dy.dtype), bits)


def _unfit(block: int, shape: tuple[int, ...], dtypes: tuple[Any, ...], bits: Any) -> str | None:
    rows, columns = shape
    if rows % block or bits.shape[0] * 8 != rows:
        return f"{rows} inputs are no multiple of the mask's block of {block}"
    if block // 8 < 16 or block & (block - 1):
        return f"the mask's block of {block} is no power of two from 128 on"
    if columns % _STEP:
        return f"{columns} outputs are no multiple of {_STEP}"
    return unfit_dtype(*dtypes)


def _kept(bits: jax.Array, plane: Any, values: jax.Array) -> jax.Array:
    """Values where a bit is set, 0 elsewhere."""
    set_ = ((bits.astype(jnp.int32) >> plane) & 1) != 0
    return jnp.where(set_, values, jnp.zeros((), values.dtype))


def _forward(x: Any, w: Any, bits: Any, out: Any, *, block: int, step: int) -> None:
    plane = block // 8

    def of_bytes(k: Any, total: jax.Array) -> jax.Array:
        here = bits[pl.ds(k * step, step), :]
        first = lax.div(k * step, plane) * block + lax.rem(k * step, plane)
        for j in range(8):
            rows = pl.ds(first + j * plane, step)
            total += dot(x[:, rows], _kept(here, j, w[rows, :]))
        return total

    total = jnp.zeros(out.shape, jnp.float32)
    out[...] = lax.fori_loop(0, bits.shape[0] // step, of_bytes, total).astype(out.dtype)


def _to_input(dy: Any, w: Any, bits: Any, out: Any, *, step: int) -> None:
    bit = lax.rem(pl.program_id(1), np.int32(8))

    def of_columns(k: Any, total: jax.Array) -> jax.Array:
        columns = pl.ds(k * step, step)
        return total + dot(dy[:, columns], _kept(bits[:, columns], bit, w[:, columns]).T)

    total = lax.fori_loop(0, w.shape[1] // step, of_columns, jnp.zeros(out.shape, jnp.float32))
    out[...] = total.astype(out.dtype)


def _to_weight(x: Any, dy: Any, bits: Any, out: Any, *, step: int) -> None:
    def of_rows(k: Any, total: jax.Array) -> jax.Array:
        rows = pl.ds(k * step, step)
        return total + dot(x[rows, :].T, dy[rows, :])

    total = lax.fori_loop(0, x.shape[0] // step, of_rows, jnp.zeros(out.shape, jnp.float32))
    out[...] = _kept(bits[...], lax.rem(pl.program_id(0), np.int32(8)), total).astype(out.dtype)
