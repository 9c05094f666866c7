"""The product with a block-sparse matrix and its two gradients, for Hopper through Mosaic.

As the Triton form, with what only Hopper has: tiles are copied by the memory engine while the
tensor cores work on those before. Chips before and after it do not run these instructions. On a
CPU, Pallas interprets the gradients from jax 0.12 on.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxcomp.kernels.block_sparse.places import lists, places, stored
from jaxcomp.kernels.forms import Kernel
from jaxcomp.kernels.tiles import largest_divisor, pad_rows, row_tile

# Tiles of a list of few blocks end soon: two or three programs that share a core hide that.
_TILES = (
    {"rows": 128, "columns": 128, "stages": 2},
    {"rows": 128, "columns": 128, "stages": 4},
    {"rows": 64, "columns": 128, "stages": 3},
    {"rows": 64, "columns": 64, "stages": 4},
)
# What one instruction of 64 rows takes of 16-bit floats in a row of shared memory.
_STEP = 64


def forward() -> Kernel:
    """As :func:`jaxcomp.kernels.block_sparse.xla.forward`, without the pattern."""
    return _by_lists(by_column=True)


def to_input() -> Kernel:
    """As :func:`jaxcomp.kernels.block_sparse.xla.to_input`, without the pattern."""
    return _by_lists(by_column=False)


def to_values() -> Kernel:
    """As :func:`jaxcomp.kernels.block_sparse.xla.to_values`, without the pattern."""

    def run(
        x: Any, dy: Any, values: Any, keep: Any, *, rows: int, columns: int, stages: int,
        interpret: bool,
    ) -> jax.Array:  # fmt: skip
        count, k, c = values.shape
        x, dy = pad_rows(x, _STEP), pad_rows(dy, _STEP)
        high, wide = largest_divisor(rows, k), largest_divisor(columns, c)
        at = places(keep, count)
        made = _kernel(
            partial(_to_values, tile=(high, wide), stages=stages),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
            (count, k // high, c // wide),
            interpret,
            "block_sparse_matmul_to_values",
        )(jnp.minimum(at.rows, keep.shape[0] - 1), at.columns, x, dy)
        return jnp.where(stored(keep, count)[:, None, None], made, jnp.zeros((), made.dtype))

    def misfit(x: Any, dy: Any, values: Any, keep: Any) -> str | None:
        return unfit(x, values, keep) or unfit(dy, values, keep)

    return Kernel(run, misfit, _TILES, tuned_only=True)


def unfit(x: Any, values: Any, keep: Any) -> str | None:
    """Why these do not fit the kernels, or None."""
    del keep
    _, k, c = values.shape
    if k % _STEP or c % _STEP:
        return f"blocks of {k} by {c}: a side is no multiple of {_STEP}"
    if x.dtype not in (jnp.bfloat16, jnp.float16) or x.dtype != values.dtype:
        return f"{x.dtype.name} by {values.dtype.name}: give bfloat16 twice, or float16 twice"
    return None


def _by_lists(by_column: bool) -> Kernel:
    name = "block_sparse_matmul" if by_column else "block_sparse_matmul_to_input"

    def run(
        x: Any, values: Any, keep: Any, *, rows: int, columns: int, stages: int, interpret: bool
    ) -> jax.Array:
        along = lists(keep, values.shape[0], by_column=by_column)
        side = values.shape[2 if by_column else 1]
        tile, count = row_tile(rows, x.shape[0], _STEP), x.shape[0]
        x, lines = pad_rows(x, tile), along.starts.shape[0] - 1
        columns = largest_divisor(columns, side)
        y = _kernel(
            partial(_sums, tile=(tile, columns), stages=stages, by_column=by_column),
            jax.ShapeDtypeStruct((x.shape[0], lines * side), x.dtype),
            (x.shape[0] // tile, lines, side // columns),
            interpret,
            name,
        )(*along, x, values)
        return y[:count].reshape(count, lines, side)

    return Kernel(run, unfit, _TILES, tuned_only=True)


def _kernel(
    body: Callable[..., None], shape: Any, grid: tuple[int, ...], interpret: bool, name: str
) -> Callable[..., jax.Array]:
    def narrow(*refs: Any) -> None:
        # Pipelines mix 32 bits with what a plain number is, before jax 0.12.
        with jax.enable_x64(False):
            body(*refs)

    mosaic = _mosaic()
    return mosaic.kernel(
        narrow,
        out_type=shape,
        grid=grid,
        grid_names=("first", "second", "third"),
        compiler_params=mosaic.CompilerParams(
            lowering_semantics=mosaic.LoweringSemantics.Warpgroup
        ),
        # What is interpreted has effects in order, which programs of many GPUs must not have.
        interpret=_interpreter() if interpret and jax.default_backend() == "cpu" else None,
        kernel_name=name,
    )


def _mosaic() -> Any:
    """Imported where it is used: it takes long, and not every jaxlib has it."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def _interpreter() -> Any:
    if hasattr(_mosaic(), "InterpretGPUParams"):
        return _mosaic().InterpretGPUParams()
    # Before jax 0.12 it is there, but not yet public.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def _sums(
    starts: Any, blocks: Any, across: Any, x: Any, values: Any, out: Any, *,
    tile: tuple[int, int], stages: int, by_column: bool,
) -> None:  # fmt: skip
    """One tile of outputs (or of inputs' gradients) from the list of its blocks."""
    i, line, part = (lax.axis_index(name) for name in ("first", "second", "third"))
    (rows, columns), first = tile, starts[line]
    taken, side = values.shape[1:] if by_column else values.shape[:0:-1]
    steps = taken // _STEP

    def split(t: Any) -> tuple[Any, Any]:
        return first + lax.div(t, np.int32(steps)), lax.rem(t, np.int32(steps))

    def of_x(t: Any) -> tuple[Any, Any]:
        n, inner = split(t)
        return i, across[n] * steps + inner

    def of_values(t: Any) -> tuple[Any, Any, Any]:
        n, inner = split(t)
        return (blocks[n], inner, part) if by_column else (blocks[n], part, inner)

    here = (_STEP, columns) if by_column else (columns, _STEP)
    turned = lambda ref: ref if by_column else ref.transpose((1, 0))

    def summed(total: Any) -> jax.Array:
        _mosaic().emit_pipeline(
            lambda _, left, right: _mosaic().wgmma(total, left, turned(right)),
            grid=((starts[line + 1] - first) * steps,),
            in_specs=[_copied((rows, _STEP), of_x), _copied((None, *here), of_values)],
            max_concurrent_steps=stages,
        )(x, values)
        return total[...]

    total = pl.run_scoped(summed, _mosaic().ACC(tile))
    along = (line * (side // columns) + part) * columns
    _store(total, out.at[pl.ds(i * rows, rows), pl.ds(along, columns)])


def _to_values(
    down: Any, along: Any, x: Any, dy: Any, out: Any, *, tile: tuple[int, int], stages: int
) -> None:
    n, i, j = (lax.axis_index(name) for name in ("first", "second", "third"))
    (high, wide), (_, k, c) = tile, out.shape
    left, right = down[n] * (k // high) + i, along[n] * (c // wide) + j

    def summed(total: Any) -> jax.Array:
        _mosaic().emit_pipeline(
            lambda _, x, dy: _mosaic().wgmma(total, x.transpose((1, 0)), dy),
            grid=(x.shape[0] // _STEP,),
            in_specs=[
                _copied((_STEP, high), lambda t: (t, left)),
                _copied((_STEP, wide), lambda t: (t, right)),
            ],
            max_concurrent_steps=stages,
        )(x, dy)
        return total[...]

    total = pl.run_scoped(summed, _mosaic().ACC(tile))
    _store(total, out.at[n, pl.ds(i * high, high), pl.ds(j * wide, wide)])


def _copied(block: tuple[int | None, ...], index: Callable[..., Any]) -> Any:
    # The tensor cores may still read a tile in the step after its own.
    return _mosaic().BlockSpec(block, index, delay_release=1)


def _store(total: jax.Array, there: Any) -> None:
    def through(kept: Any) -> None:
        kept[...] = total.astype(there.dtype)
        mosaic.commit_smem()
        mosaic.copy_smem_to_gmem(kept, there)
        mosaic.wait_smem_to_gmem(0)

    mosaic = _mosaic()
    pl.run_scoped(through, mosaic.SMEM(total.shape, there.dtype))
