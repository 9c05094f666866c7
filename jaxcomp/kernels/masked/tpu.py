"""The product with a masked matrix and its two gradients, for TPUs through Mosaic.

A block of the weight and its bits come into fast memory, the mask is unpacked there, and one
product of the whole block follows: ``w * mask`` never goes back.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from jaxcomp.kernels.forms import Kernel
from jaxcomp.kernels.tiles import dot, largest_divisor, pad_rows, row_tile
from jaxcomp.kernels.tpu_tiles import (
    LEAST_ROWS,
    SUMMED_LAST,
    begin,
    cost,
    finish,
    is_last,
    unfit_dtype,
)

_TILES = (
    {"rows": 256, "columns": 256},
    {"rows": 512, "columns": 512},
    {"rows": 128, "columns": 512},
)


def forward(block: int) -> Kernel:
    """As :func:`jaxcomp.kernels.masked.triton.forward`."""

    def run(x: Any, w: Any, bits: Any, *, rows: int, columns: int, interpret: bool) -> jax.Array:
        tile, count = row_tile(rows, x.shape[0], LEAST_ROWS), x.shape[0]
        x, columns = pad_rows(x, tile), largest_divisor(columns, w.shape[1])
        specs = [
            pl.BlockSpec((tile, block), lambda i, j, k: (i, k)),
            pl.BlockSpec((block, columns), lambda i, j, k: (k, j)),
            pl.BlockSpec((block // 8, columns), lambda i, j, k: (k, j)),
        ]
        grid = (x.shape[0] // tile, w.shape[1] // columns, w.shape[0] // block)
        shape = (x.shape[0], w.shape[1])
        one = (tile, columns)
        made = _summed(_forward, (x, w, bits), specs, grid, shape, one, interpret, "masked_matmul")
        return made[:count]

    return Kernel(run, partial(unfit, block), _TILES)


def to_input(block: int) -> Kernel:
    """As :func:`jaxcomp.kernels.masked.triton.to_input`."""

    def run(dy: Any, w: Any, bits: Any, *, rows: int, columns: int, interpret: bool) -> jax.Array:
        tile, count = row_tile(rows, dy.shape[0], LEAST_ROWS), dy.shape[0]
        dy, columns = pad_rows(dy, tile), largest_divisor(columns, w.shape[1])
        specs = [
            pl.BlockSpec((tile, columns), lambda i, j, k: (i, k)),
            pl.BlockSpec((block, columns), lambda i, j, k: (j, k)),
            pl.BlockSpec((block // 8, columns), lambda i, j, k: (j, k)),
        ]
        grid = (dy.shape[0] // tile, w.shape[0] // block, w.shape[1] // columns)
        shape = (dy.shape[0], w.shape[0])
        one = (tile, block)
        name = "masked_matmul_to_input"
        return _summed(_to_input, (dy, w, bits), specs, grid, shape, one, interpret, name)[:count]

    return Kernel(run, partial(unfit, block), _TILES)


def to_weight(block: int) -> Kernel:
    """As :func:`jaxcomp.kernels.masked.triton.to_weight`."""

    def run(x: Any, dy: Any, bits: Any, *, rows: int, columns: int, interpret: bool) -> jax.Array:
        tile = row_tile(rows, x.shape[0], LEAST_ROWS)
        x, dy = pad_rows(x, tile), pad_rows(dy, tile)
        columns = largest_divisor(columns, dy.shape[1])
        specs = [
            pl.BlockSpec((tile, block), lambda i, j, k: (k, i)),
            pl.BlockSpec((tile, columns), lambda i, j, k: (k, j)),
            pl.BlockSpec((block // 8, columns), lambda i, j, k: (i, j)),
        ]
        grid = (x.shape[1] // block, dy.shape[1] // columns, x.shape[0] // tile)
        shape = (x.shape[1], dy.shape[1])
        one = (block, columns)
        name = "masked_matmul_to_weight"
        return _summed(_to_weight, (x, dy, bits), specs, grid, shape, one, interpret, name)

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
    if block % 256:
        return f"the mask's block of {block} is no multiple of 256"
    if columns % 128:
        return f"{columns} outputs are no multiple of 128"
    return unfit_dtype(*dtypes)


def _summed(
    kernel: Any,
    arrays: Any,
    specs: Any,
    grid: Any,
    shape: Any,
    tile: Any,
    interpret: bool,
    name: str,
) -> jax.Array:
    """A kernel over a grid whose last axis is summed over, in float32."""
    out = jax.ShapeDtypeStruct(shape, jnp.result_type(*arrays[:2]))
    return pl.pallas_call(
        kernel,
        out,
        grid=grid,
        in_specs=specs,
        out_specs=pl.BlockSpec(tile, lambda i, j, k: (i, j)),
        scratch_shapes=[tpu.VMEM(tile, jnp.float32)],
        compiler_params=SUMMED_LAST,
        cost_estimate=cost(arrays[0].size * shape[1], arrays, out),
        interpret=interpret,
        name=name,
    )(*arrays)


def _unpacked(bits: Any) -> jax.Array:
    """The mask of a block: the rows of each bit, one below the other."""
    wide = bits[...].astype(jnp.int32)
    return jnp.concatenate([(wide >> j) & 1 for j in range(8)], axis=0) != 0


def _kept(w: Any, bits: Any) -> jax.Array:
    return jnp.where(_unpacked(bits), w[...], jnp.zeros((), w.dtype))


def _forward(x: Any, w: Any, bits: Any, out: Any, total: Any) -> None:
    begin(total)
    total[...] += dot(x[...], _kept(w, bits))
    finish(out, total)


def _to_input(dy: Any, w: Any, bits: Any, out: Any, total: Any) -> None:
    begin(total)
    total[...] += dot(dy[...], _kept(w, bits).T)
    finish(out, total)


def _to_weight(x: Any, dy: Any, bits: Any, out: Any, total: Any) -> None:
    begin(total)
    total[...] += dot(x[...].T, dy[...])

    @pl.when(is_last())
    def _() -> None:
        kept = jnp.where(_unpacked(bits), total[...], 0.0)
        out[...] = kept.astype(out.dtype)
