"""The product with a block-sparse matrix and its two gradients, for TPUs through Mosaic.

The grid goes through the kept blocks, column after column; which one a step takes, and of which
inputs, is read ahead from lists, so that it is on its way while the step before is computed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from jaxcomp.kernels.block_sparse.places import FIRST, KEPT, LAST, Steps, places, steps, stored
from jaxcomp.kernels.forms import Kernel
from jaxcomp.kernels.tiles import dot, pad_rows, row_tile
from jaxcomp.kernels.tpu_tiles import LEAST_ROWS, begin, cost, is_last, unfit_dtype

_TILES = ({"rows": 512}, {"rows": 1024}, {"rows": 256})
# Lists lie in scalar memory, blocks in fast memory.
_MOST_STEPS, _MOST_BYTES = 1 << 15, 1 << 21
_IN_ORDER = tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))


def forward() -> Kernel:
    """As :func:`jaxcomp.kernels.block_sparse.xla.forward`, without the pattern."""
    return _by_steps(by_column=True)


def to_input() -> Kernel:
    """As :func:`jaxcomp.kernels.block_sparse.xla.to_input`, without the pattern."""
    return _by_steps(by_column=False)


def to_values() -> Kernel:
    """As :func:`jaxcomp.kernels.block_sparse.xla.to_values`, without the pattern."""

    def run(x: Any, dy: Any, values: Any, keep: Any, *, rows: int, interpret: bool) -> jax.Array:
        count, k, c = values.shape
        tile = row_tile(rows, x.shape[0], LEAST_ROWS)
        x, dy = pad_rows(x, tile), pad_rows(dy, tile)
        at = places(keep, count)
        specs = tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(count, x.shape[0] // tile),
            in_specs=[
                pl.BlockSpec((tile, k), lambda n, r, rows, columns: (r, rows[n])),
                pl.BlockSpec((tile, c), lambda n, r, rows, columns: (r, columns[n])),
            ],
            out_specs=pl.BlockSpec((1, k, c), lambda n, r, rows, columns: (n, 0, 0)),
            scratch_shapes=[tpu.VMEM((k, c), jnp.float32)],
        )
        shape = jax.ShapeDtypeStruct(values.shape, jnp.result_type(x, dy))
        made = pl.pallas_call(
            _to_values,
            shape,
            grid_spec=specs,
            compiler_params=_IN_ORDER,
            cost_estimate=cost(x.shape[0] * values.size, (x, dy), shape),
            interpret=interpret,
            name="block_sparse_matmul_to_values",
        )(jnp.minimum(at.rows, keep.shape[0] - 1), at.columns, x, dy)
        return jnp.where(stored(keep, count)[:, None, None], made, jnp.zeros((), made.dtype))

    def misfit(x: Any, dy: Any, values: Any, keep: Any) -> str | None:
        return unfit(x, values, keep) or unfit(dy, values, keep)

    return Kernel(run, misfit, _TILES)


def unfit(x: Any, values: Any, keep: Any) -> str | None:
    """Why these do not fit the kernels, or None."""
    count, k, c = values.shape
    if k % 128 or c % 128:
        return f"blocks of {k} by {c}: a side is no multiple of 128"
    if k * c * values.dtype.itemsize > _MOST_BYTES:
        return f"blocks of {k} by {c} are larger than {_MOST_BYTES >> 20} MB"
    if count + max(keep.shape) > _MOST_STEPS:
        return f"{count} blocks are more than {_MOST_STEPS}"
    return unfit_dtype(x.dtype, values.dtype)


def _by_steps(by_column: bool) -> Kernel:
    product, name = _forward, "block_sparse_matmul"
    if not by_column:
        product, name = _to_input, "block_sparse_matmul_to_input"

    def run(x: Any, values: Any, keep: Any, *, rows: int, interpret: bool) -> jax.Array:
        along = steps(keep, values.shape[0], by_column=by_column)
        sides = values.shape[1:] if by_column else values.shape[:0:-1]
        lines = keep.shape[1 if by_column else 0]
        return _over(product, x, values, along, sides, lines, rows, interpret, name)

    return Kernel(run, unfit, _TILES)


def _over(
    product: Any, x: Any, values: Any, along: Steps, sides: tuple[int, ...], lines: int, rows: int,
    interpret: bool, name: str,
) -> jax.Array:  # fmt: skip
    """A kernel over the steps of :func:`steps`; ``sides``: of a block, that of x and the other."""
    taken, side = sides
    tile, count = row_tile(rows, x.shape[0], LEAST_ROWS), x.shape[0]
    x = pad_rows(x, tile)
    specs = tpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(along),
        grid=(x.shape[0] // tile, along.blocks.shape[0]),
        in_specs=[
            pl.BlockSpec((tile, taken), lambda i, t, blocks, across, along, flags: (i, across[t])),
            pl.BlockSpec(
                (1, *values.shape[1:]),
                lambda i, t, blocks, across, along, flags: (blocks[t], 0, 0),
            ),
        ],
        out_specs=pl.BlockSpec(
            (tile, side), lambda i, t, blocks, across, along, flags: (i, along[t])
        ),
        scratch_shapes=[tpu.VMEM((tile, side), jnp.float32)],
    )
    shape = jax.ShapeDtypeStruct((x.shape[0], lines * side), jnp.result_type(x, values))
    y = pl.pallas_call(
        partial(_summed, product),
        shape,
        grid_spec=specs,
        compiler_params=_IN_ORDER,
        cost_estimate=cost(x.shape[0] * values.size, (x, values), shape),
        interpret=interpret,
        name=name,
    )(*along, x, values)
    return y[:count].reshape(count, lines, side)


def _summed(
    product: Any, blocks: Any, across: Any, along: Any, flags: Any, x: Any, values: Any, out: Any,
    total: Any,
) -> None:  # fmt: skip
    del blocks, across, along
    flag = flags[pl.program_id(1)]

    @pl.when(flag & FIRST != 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)

    @pl.when(flag & KEPT != 0)
    def _() -> None:
        total[...] += product(x[...], values[0])

    @pl.when(flag & LAST != 0)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _forward(x: jax.Array, block: jax.Array) -> jax.Array:
    return dot(x, block)


def _to_input(dy: jax.Array, block: jax.Array) -> jax.Array:
    return dot(dy, block.T)


def _to_values(rows: Any, columns: Any, x: Any, dy: Any, out: Any, total: Any) -> None:
    del rows, columns
    begin(total, axis=1)
    total[...] += dot(x[...].T, dy[...])

    @pl.when(is_last(axis=1))
    def _() -> None:
        out[0] = total[...].astype(out.dtype)
