"""The product with packed codes and its gradient, for TPUs through Mosaic.

A block of codes comes into fast memory packed and becomes small integers there. Groups of 128
inputs and more have a product each, whose sums are scaled; smaller ones would leave the matrix
unit idle, and their integers are scaled in fast memory. Codes of 4 bits lie two in a byte along
the outputs: even and odd outputs have sums of their own, and are put in order by XLA.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from jaxcomp.kernels.forms import Kernel
from jaxcomp.kernels.quantized.packed import Coding, parts_in_byte, steps
from jaxcomp.kernels.tiles import dot, largest_divisor, pad_rows, row_tile
from jaxcomp.kernels.tpu_tiles import LEAST_ROWS, SUMMED_LAST, begin, cost, is_last, unfit_dtype

_TILES = (
    {"rows": 256, "columns": 256, "depth": 1024},
    {"rows": 512, "columns": 512, "depth": 512},
    {"rows": 16, "columns": 512, "depth": 2048},
    {"rows": 256, "columns": 512, "depth": 1024},
)
_LANES = 128


def forward(coding: Coding, dtype: Any) -> Kernel:
    """As :func:`jaxcomp.kernels.quantized.triton.forward`."""

    def run(
        x: Any, codes: Any, scale: Any, *zero: Any, rows: int, columns: int, depth: int,
        interpret: bool,
    ) -> jax.Array:  # fmt: skip
        parts, (inputs, width) = parts_in_byte(coding), codes.shape
        tile, count = row_tile(rows, x.shape[0], LEAST_ROWS), x.shape[0]
        x, columns = pad_rows(x, tile), largest_divisor(columns, width)
        depth = largest_divisor(depth, inputs)
        by_group = pl.BlockSpec((parts, scale.shape[0], columns), lambda i, j, k: (0, 0, j))
        shape = jax.ShapeDtypeStruct((parts, x.shape[0], width), dtype)
        out = pl.pallas_call(
            partial(_forward, coding=coding, inputs=inputs),
            shape,
            grid=(x.shape[0] // tile, width // columns, inputs // depth),
            in_specs=[
                pl.BlockSpec((tile, depth), lambda i, j, k: (i, k)),
                pl.BlockSpec((depth, columns), lambda i, j, k: (k, j)),
                by_group,
                *(by_group for _ in zero),
            ],
            out_specs=pl.BlockSpec((parts, tile, columns), lambda i, j, k: (0, i, j)),
            scratch_shapes=[tpu.VMEM((parts, tile, columns), jnp.float32)],
            compiler_params=SUMMED_LAST,
            cost_estimate=cost(shape.size * inputs, (x, codes, scale, *zero), shape),
            interpret=interpret,
            name="quantized_matmul",
        )(x, codes, *(_parted(each, parts) for each in (scale, *zero)))
        return jnp.moveaxis(out, 0, -1).reshape(x.shape[0], -1)[:count]

    return Kernel(run, partial(unfit, coding), _TILES)


def to_input(coding: Coding, dtype: Any) -> Kernel:
    """As :func:`jaxcomp.kernels.quantized.triton.to_input`."""

    def run(
        dy: Any, codes: Any, scale: Any, *zero: Any, rows: int, columns: int, depth: int,
        interpret: bool,
    ) -> jax.Array:  # fmt: skip
        parts, (inputs, width) = parts_in_byte(coding), codes.shape
        tile, count = row_tile(rows, dy.shape[0], LEAST_ROWS), dy.shape[0]
        left = jnp.moveaxis(pad_rows(dy, tile).reshape(-1, width, parts), -1, 0)
        columns, depth = largest_divisor(columns, width), largest_divisor(depth, inputs)
        by_group = pl.BlockSpec((parts, scale.shape[0], columns), lambda i, j, k: (0, 0, k))
        shape = jax.ShapeDtypeStruct((left.shape[1], inputs), dtype)
        out = pl.pallas_call(
            partial(_to_input, coding=coding, inputs=inputs),
            shape,
            grid=(left.shape[1] // tile, inputs // depth, width // columns),
            in_specs=[
                pl.BlockSpec((parts, tile, columns), lambda i, j, k: (0, i, k)),
                pl.BlockSpec((depth, columns), lambda i, j, k: (j, k)),
                by_group,
                *(by_group for _ in zero),
            ],
            out_specs=pl.BlockSpec((tile, depth), lambda i, j, k: (i, j)),
            scratch_shapes=[tpu.VMEM((tile, depth), jnp.float32)],
            compiler_params=SUMMED_LAST,
            cost_estimate=cost(left.size * inputs, (left, codes, scale, *zero), shape),
            interpret=interpret,
            name="quantized_matmul_to_input",
        )(left, codes, *(_parted(each, parts) for each in (scale, *zero)))
        return out[:count]

    return Kernel(run, partial(unfit, coding), _TILES)


def unfit(coding: Coding, x: Any, codes: Any, scale: Any, *zero: Any) -> str | None:
    """Why these do not fit the kernels, or None."""
    del zero
    inputs, size = codes.shape[0], codes.shape[0] // scale.shape[0]
    columns = _LANES * parts_in_byte(coding)
    if not coding.is_steps or coding.bits not in (4, 8):
        return f"codes of {coding.bits} bits ({coding.kind}) are unpacked by XLA"
    if inputs % _LANES:
        return f"{inputs} inputs are no multiple of {_LANES}"
    if (size != inputs and size % _LANES and _LANES % size) or size % 8:
        return f"groups of {size} inputs are neither a multiple nor a part of {_LANES}"
    if coding.outputs % columns:
        return f"{coding.outputs} outputs are no multiple of {columns}"
    return unfit_dtype(x.dtype, scale.dtype)


def _parted(array: jax.Array, parts: int) -> jax.Array:
    """``(parts, groups, width)``, in 32 bits: rows of fewer bits do not lie apart in memory."""
    wide = array.astype(jnp.int32 if array.dtype == jnp.uint8 else jnp.float32)
    return jnp.moveaxis(wide.reshape(array.shape[0], -1, parts), -1, 0)


def _forward(x: Any, codes: Any, scale: Any, *others: Any, coding: Coding, inputs: int) -> None:
    *zero, out, total = others
    k, depth, groups = pl.program_id(2), codes.shape[0], scale.shape[1]
    size = inputs // groups
    begin(total)
    if size < _LANES:
        for part in range(out.shape[0]):
            right = _scaled(coding, codes[...], scale, zero, part, k * (depth // size), size)
            total[part] += dot(x[...], right.astype(x.dtype))
    else:
        for rows, group in _runs(k * depth, depth, size):
            left, here = x[:, rows], codes[rows, :]
            for part in range(out.shape[0]):
                right = _counted(coding, here, part, [z[part, group, :] for z in zero])
                sums = dot(left, right.astype(left.dtype))
                total[part] += sums if groups == 1 else sums * scale[part, group, :]

    @pl.when(is_last())
    def _() -> None:
        whole = total[...] if groups > 1 else total[...] * scale[...]
        out[...] = (whole * coding.unit).astype(out.dtype)


def _to_input(dy: Any, codes: Any, scale: Any, *others: Any, coding: Coding, inputs: int) -> None:
    *zero, out, total = others
    j, depth, size = pl.program_id(1), codes.shape[0], inputs // scale.shape[1]
    begin(total)
    for part in range(dy.shape[0]):
        left = dy[part]
        if size < _LANES:
            right = _scaled(coding, codes[...], scale, zero, part, j * (depth // size), size)
            total[...] += dot(left, right.astype(left.dtype).T)
            continue
        for rows, group in _runs(j * depth, depth, size):
            counted = _counted(coding, codes[rows, :], part, [z[part, group, :] for z in zero])
            right = counted * scale[part, group, :]
            total[:, rows] += dot(left, right.astype(left.dtype).T)

    @pl.when(is_last())
    def _() -> None:
        out[...] = (total[...] * coding.unit).astype(out.dtype)


def _runs(first: Any, depth: int, size: int) -> Iterator[tuple[slice, Any]]:
    """The rows of a block that are of one group, and which row of scales is theirs."""
    run = min(size, depth)
    for at in range(0, depth, run):
        yield slice(at, at + run), pl.ds(lax.div(first + at, jnp.int32(size)), 1)


def _counted(coding: Coding, codes: jax.Array, part: int, zeros: list[Any]) -> jax.Array:
    """The weights of one part of each byte in scales, float32."""
    wide = codes.astype(jnp.int32)
    plain = wide if coding.bits == 8 else (wide >> 4 * part) & 15
    return steps(coding, plain, *(zeros or [None])).astype(jnp.float32)


def _scaled(
    coding: Coding, codes: jax.Array, scale: Any, zero: Any, part: int, first: Any, size: int
) -> jax.Array:
    """The weights of a block whose groups are small, float32."""
    groups, columns = codes.shape[0] // size, codes.shape[1]
    spread = lambda a: a[part, pl.ds(first, groups), :].reshape(groups, 1, columns)
    by_group = codes.astype(jnp.int32).reshape(groups, size, columns)
    counted = _counted(coding, by_group, part, [spread(z) for z in zero])
    return (counted * spread(scale)).reshape(codes.shape)
