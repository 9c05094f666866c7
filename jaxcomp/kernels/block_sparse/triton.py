"""The product with a block-sparse matrix and its two gradients, for NVIDIA's chips through Triton.

A program sums up a tile of one column of blocks: it goes through the list of those that are kept,
and reads the inputs that each of them takes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxcomp.kernels.block_sparse.places import lists, places, stored
from jaxcomp.kernels.forms import Kernel
from jaxcomp.kernels.tiles import dot, pad_rows, row_tile, unfit_dtype

_TILES = (
    {"rows": 128, "columns": 128, "step": 64, "warps": 8, "stages": 3},
    {"rows": 128, "columns": 128, "step": 32, "warps": 8, "stages": 4},
    {"rows": 64, "columns": 128, "step": 64, "warps": 4, "stages": 3},
    {"rows": 64, "columns": 64, "step": 64, "warps": 4, "stages": 4},
)
# Of few rows the weight is what is read, and many programs must read it at once.
_FEW, _NARROW = 16, 32


def forward() -> Kernel:
    """As :func:`jaxcomp.kernels.block_sparse.xla.forward`, without the pattern."""
    return _by_lists(by_column=True)


def to_input() -> Kernel:
    """As :func:`jaxcomp.kernels.block_sparse.xla.to_input`, without the pattern."""
    return _by_lists(by_column=False)


def to_values() -> Kernel:
    """As :func:`jaxcomp.kernels.block_sparse.xla.to_values`, without the pattern."""

    def run(
        x: Any, dy: Any, values: Any, keep: Any, *, rows: int, columns: int, step: int, warps: int,
        stages: int, interpret: bool,
    ) -> jax.Array:  # fmt: skip
        count, k, c = values.shape
        step = row_tile(step, x.shape[0])
        x, dy = pad_rows(x, step), pad_rows(dy, step)
        high, wide = min(rows, k), min(columns, c)
        at = places(keep, count)
        across = c // wide
        whole = lambda array: pl.BlockSpec(array.shape, lambda n, t: (0,) * array.ndim)
        made = pl.pallas_call(
            partial(_to_values, step=step, block=(k, c)),
            jax.ShapeDtypeStruct(values.shape, jnp.result_type(x, dy)),
            grid=(count, (k // high) * across),
            in_specs=[whole(array) for array in (*at, x, dy)],
            out_specs=pl.BlockSpec((1, high, wide), lambda n, t: (n, t // across, t % across)),
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name="block_sparse_matmul_to_values",
        )(jnp.minimum(at.rows, keep.shape[0] - 1), at.columns, x, dy)
        return jnp.where(stored(keep, count)[:, None, None], made, jnp.zeros((), made.dtype))

    def misfit(x: Any, dy: Any, values: Any, keep: Any) -> str | None:
        return unfit(x, values, keep) or unfit(dy, values, keep)

    return Kernel(run, misfit, _TILES)


def unfit(x: Any, values: Any, keep: Any) -> str | None:
    """Why these do not fit the kernels, or None."""
    del keep
    _, k, c = values.shape
    if any(size < 16 or size & (size - 1) for size in (k, c)):
        return f"blocks of {k} by {c}: a side is no power of two from 16 on"
    return unfit_dtype(x.dtype, values.dtype)


def _by_lists(by_column: bool) -> Kernel:
    kernel, name = _forward, "block_sparse_matmul"
    if not by_column:
        kernel, name = _to_input, "block_sparse_matmul_to_input"

    def run(
        x: Any, values: Any, keep: Any, *, rows: int, columns: int, step: int, warps: int,
        stages: int, interpret: bool,
    ) -> jax.Array:  # fmt: skip
        along = lists(keep, values.shape[0], by_column=by_column)
        taken, side = values.shape[1:] if by_column else values.shape[:0:-1]
        return _over(
            kernel, x, values, along, side, rows, columns, min(step, taken), warps, stages,
            interpret, name,
        )  # fmt: skip

    return Kernel(run, unfit, _TILES)


def _over(
    kernel: Any, x: Any, values: Any, along: Any, side: int, rows: int, columns: int, step: int,
    warps: int, stages: int, interpret: bool, name: str,
) -> jax.Array:  # fmt: skip
    """A kernel that sums up one tile of ``side`` columns from the list of its blocks."""
    tile, count = row_tile(rows, x.shape[0]), x.shape[0]
    x, lines = pad_rows(x, tile), along.starts.shape[0] - 1
    columns = min(columns, side, _NARROW if tile <= _FEW else columns)
    parts = side // columns
    whole = lambda array: pl.BlockSpec(array.shape, lambda i, j: (0,) * array.ndim)
    y = pl.pallas_call(
        partial(kernel, step=step, parts=parts),
        jax.ShapeDtypeStruct((x.shape[0], lines * side), jnp.result_type(x, values)),
        grid=(x.shape[0] // tile, lines * parts),
        in_specs=[
            *(whole(array) for array in along),
            pl.BlockSpec((tile, x.shape[1]), lambda i, j: (i, 0)),
            whole(values),
        ],
        out_specs=pl.BlockSpec((tile, columns), lambda i, j: (i, j)),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*along, x, values)
    return y[:count].reshape(count, lines, side)


def _forward(
    starts: Any, blocks: Any, across: Any, x: Any, values: Any, out: Any, *, step: int, parts: int
) -> None:
    k, columns = values.shape[1], out.shape[1]
    line, part = _split(pl.program_id(1), parts)
    steps = k // step

    def of_step(t: Any, total: jax.Array) -> jax.Array:
        n, inner = _split(t, steps)
        inner *= step
        here = values[blocks[n], pl.ds(inner, step), pl.ds(part * columns, columns)]
        return total + dot(x[:, pl.ds(across[n] * k + inner, step)], here)

    total = jnp.zeros(out.shape, jnp.float32)
    first, last = starts[line] * steps, starts[line + 1] * steps
    out[...] = lax.fori_loop(first, last, of_step, total).astype(out.dtype)


def _to_input(
    starts: Any, blocks: Any, across: Any, dy: Any, values: Any, out: Any, *, step: int, parts: int
) -> None:
    c, columns = values.shape[2], out.shape[1]
    line, part = _split(pl.program_id(1), parts)
    steps = c // step

    def of_step(t: Any, total: jax.Array) -> jax.Array:
        n, inner = _split(t, steps)
        inner *= step
        here = values[blocks[n], pl.ds(part * columns, columns), pl.ds(inner, step)]
        return total + dot(dy[:, pl.ds(across[n] * c + inner, step)], here.T)

    total = jnp.zeros(out.shape, jnp.float32)
    first, last = starts[line] * steps, starts[line + 1] * steps
    out[...] = lax.fori_loop(first, last, of_step, total).astype(out.dtype)


def _to_values(
    rows: Any, columns: Any, x: Any, dy: Any, out: Any, *, step: int, block: tuple[int, int]
) -> None:
    (k, c), (_, high, wide) = block, out.shape
    n, across = pl.program_id(0), c // wide
    down, along = _split(pl.program_id(1), across)
    left, right = rows[n] * k + down * high, columns[n] * c + along * wide

    def of_rows(r: Any, total: jax.Array) -> jax.Array:
        here = pl.ds(r * step, step)
        return total + dot(x[here, pl.ds(left, high)].T, dy[here, pl.ds(right, wide)])

    total = jnp.zeros((high, wide), jnp.float32)
    total = lax.fori_loop(0, x.shape[0] // step, of_rows, total)
    out[0, :, :] = total.astype(out.dtype)


def _split(number: Any, size: int) -> tuple[Any, Any]:
    """Quotient and remainder, in the 32 bits that numbers of programs have."""
    return lax.div(number, np.int32(size)), lax.rem(number, np.int32(size))
