"""The product with shared values, for NVIDIA's chips through Triton.

Indices are loaded packed and become values in registers, by a lookup in a table that lies in the
cache of each core, or bit by bit; which is faster, tuning tells. The outputs of a byte have sums of
their own, which are joined when they are stored.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxcomp.kernels.codebook.lookup import choose_by_bits, part_of_indices
from jaxcomp.kernels.forms import Kernel
from jaxcomp.kernels.tiles import dot, largest_divisor, pad_rows, row_tile, unfit_dtype

# Bytes of a row of the matrix, and of a device's part of it, are a multiple of this.
WIDTH = 16
# The first is for many rows; few rows take the second, unless tuning chose.
_MANY = {
    "rows": 128, "width": 64, "step": 64, "splits": 1, "table": 1, "warps": 8, "stages": 3,
}  # fmt: skip
_FEW = {
    "rows": 16, "width": 32, "step": 128, "splits": 0, "table": 1, "warps": 4, "stages": 4,
}  # fmt: skip
_TILES = ({}, _MANY, _FEW, {**_MANY, "table": 0}, {**_FEW, "table": 0}, {**_MANY, "width": 32})
_FEW_ROWS = 32
# Programs that keep the memory busy: some for each of the 132 cores of an H100.
_PROGRAMS = 528


def forward(bits: int) -> Kernel:
    """As :func:`jaxcomp.kernels.codebook.xla.forward`."""

    def run(
        x: Any, packed: Any, codebook: Any, shifts: Any, *, interpret: bool, **tile: Any
    ) -> jax.Array:
        sizes = tile or (_FEW if x.shape[0] <= _FEW_ROWS else _MANY)
        (inputs, whole), (groups, entries), parts = packed.shape, codebook.shape, shifts.shape[0]
        rows, count = row_tile(sizes["rows"], x.shape[0]), x.shape[0]
        x, step = pad_rows(x, rows), largest_divisor(sizes["step"], inputs)
        # As many outputs for indices of any size.
        width = largest_divisor(max(WIDTH, sizes["width"] * 2 // parts), whole // groups)
        each = whole // groups // width
        grid = (x.shape[0] // rows, whole // width)
        splits = sizes["splits"] or _splits(_PROGRAMS // (grid[0] * grid[1]), inputs // step)
        dtype = jnp.result_type(x, codebook)
        out = pl.pallas_call(
            partial(_forward, bits=bits, parts=parts, step=step, table=sizes["table"]),
            jax.ShapeDtypeStruct(
                (splits, x.shape[0], whole * parts), dtype if splits == 1 else jnp.float32
            ),
            grid=(*grid, splits),
            in_specs=[
                pl.BlockSpec((rows, inputs // splits), lambda i, j, k: (i, k)),
                pl.BlockSpec((inputs // splits, width), lambda i, j, k: (k, j)),
                pl.BlockSpec((None, entries), lambda i, j, k: (lax.div(j, np.int32(each)), 0)),
            ],
            out_specs=pl.BlockSpec((None, rows, width * parts), lambda i, j, k: (k, i, j)),
            compiler_params=triton.CompilerParams(
                num_warps=sizes["warps"], num_stages=sizes["stages"]
            ),
            interpret=interpret,
            name="codebook_matmul",
        )(x, packed, codebook.astype(dtype))
        y = out[0] if splits == 1 else out.sum(axis=0).astype(dtype)
        return y[:count].reshape(count, whole, parts)

    return Kernel(run, unfit, _TILES)


def unfit(x: Any, packed: Any, codebook: Any, shifts: Any) -> str | None:
    """Why these do not fit the kernel, or None."""
    (inputs, width), groups = packed.shape, codebook.shape[0]
    if inputs % 16:
        return f"{inputs} inputs are no multiple of 16"
    if width // groups % WIDTH:
        outputs = f"{width * shifts.shape[0]} outputs in {groups} groups"
        return f"{outputs} are no multiples of {WIDTH * shifts.shape[0]}"
    return unfit_dtype(x.dtype, codebook.dtype)


def _splits(most: int, steps: int) -> int:
    """Into how many parts to cut the inputs."""
    splits = 1
    while 2 * splits <= most and steps % (2 * splits) == 0:
        splits *= 2
    return splits


def _forward(
    x: Any, packed: Any, codebook: Any, out: Any, *, bits: int, parts: int, step: int, table: int
) -> None:
    entries = [] if table else [codebook[entry] for entry in range(codebook.shape[0])]

    def of_step(k: Any, totals: Any) -> Any:
        rows = pl.ds(k * step, step)
        left, here = x[:, rows], packed[rows, :]

        def of_part(part: int, total: jax.Array) -> jax.Array:
            indices = part_of_indices(here, part, bits)
            right = codebook[indices] if table else choose_by_bits(indices, entries)
            return total + dot(left, right)

        return [of_part(part, total) for part, total in enumerate(totals)]

    zeros = jnp.zeros((out.shape[0], out.shape[1] // parts), jnp.float32)
    totals = lax.fori_loop(0, packed.shape[0] // step, of_step, [zeros] * parts)
    out[...] = _joined(totals).reshape(out.shape).astype(out.dtype)


def _joined(totals: list[jax.Array]) -> jax.Array:
    """One part of each byte behind the other, on a last axis; two are joined at a time."""
    while len(totals) > 1:
        half = len(totals) // 2
        totals = [
            jnp.stack([a, b], axis=-1) for a, b in zip(totals[:half], totals[half:], strict=True)
        ]
    return totals[0]
