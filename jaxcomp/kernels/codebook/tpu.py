"""The product with shared values, for TPUs through Mosaic.

A block of indices comes into fast memory packed and becomes values there, chosen bit by bit from
scalars. The outputs of a byte have sums of their own, and are put in order by XLA.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from jaxcomp.kernels.codebook.lookup import choose_by_bits, part_of_indices
from jaxcomp.kernels.forms import Kernel
from jaxcomp.kernels.tiles import dot, largest_divisor, pad_rows, row_tile
from jaxcomp.kernels.tpu_tiles import LEAST_ROWS, SUMMED_LAST, begin, cost, finish, unfit_dtype

# Bytes of a row of the matrix, and of a device's part of it, are a multiple of this.
WIDTH = 128
_TILES = (
    {"rows": 512, "width": 256, "depth": 512},
    {"rows": 256, "width": 256, "depth": 1024},
    {"rows": 1024, "width": 256, "depth": 256},
)
# Codebooks lie in scalar memory, a row of 512 bytes each.
_MOST_GROUPS = 512


def forward(bits: int) -> Kernel:
    """As :func:`jaxcomp.kernels.codebook.xla.forward`."""

    def run(
        x: Any, packed: Any, codebook: Any, shifts: Any, *, rows: int, width: int, depth: int,
        interpret: bool,
    ) -> jax.Array:  # fmt: skip
        (inputs, whole), groups, parts = packed.shape, codebook.shape[0], shifts.shape[0]
        tile, count = row_tile(rows, x.shape[0], LEAST_ROWS), x.shape[0]
        x, depth = pad_rows(x, tile), largest_divisor(depth, inputs)
        # As many outputs for indices of any size.
        width = largest_divisor(max(WIDTH, width * 2 // parts), whole // groups)
        shape = jax.ShapeDtypeStruct((parts, x.shape[0], whole), jnp.result_type(x, codebook))
        out = pl.pallas_call(
            partial(_forward, bits=bits, each=whole // groups // width),
            shape,
            grid=(x.shape[0] // tile, whole // width, inputs // depth),
            in_specs=[
                pl.BlockSpec((tile, depth), lambda i, j, k: (i, k)),
                pl.BlockSpec((depth, width), lambda i, j, k: (k, j)),
                pl.BlockSpec(memory_space=tpu.SMEM),
            ],
            out_specs=pl.BlockSpec((parts, tile, width), lambda i, j, k: (0, i, j)),
            scratch_shapes=[tpu.VMEM((parts, tile, width), jnp.float32)],
            compiler_params=SUMMED_LAST,
            cost_estimate=cost(x.size * whole * parts, (x, packed, codebook), shape),
            interpret=interpret,
            name="codebook_matmul",
        )(x, packed, codebook.astype(jnp.float32))
        return jnp.moveaxis(out, 0, -1)[:count]

    return Kernel(run, unfit, _TILES)


def unfit(x: Any, packed: Any, codebook: Any, shifts: Any) -> str | None:
    """Why these do not fit the kernel, or None."""
    (inputs, width), groups = packed.shape, codebook.shape[0]
    if inputs % 128:
        return f"{inputs} inputs are no multiple of 128"
    if width // groups % WIDTH:
        outputs = f"{width * shifts.shape[0]} outputs in {groups} groups"
        return f"{outputs} are no multiples of {WIDTH * shifts.shape[0]}"
    if groups > _MOST_GROUPS:
        return f"{groups} groups are more than {_MOST_GROUPS}"
    return unfit_dtype(x.dtype, codebook.dtype)


def _forward(
    x: Any, packed: Any, codebook: Any, out: Any, total: Any, *, bits: int, each: int
) -> None:
    group = lax.div(pl.program_id(1), np.int32(each))
    begin(total)
    entries = [codebook[group, entry] for entry in range(codebook.shape[1])]
    dtype = jnp.result_type(x.dtype, out.dtype)
    for part in range(out.shape[0]):
        right = choose_by_bits(part_of_indices(packed[...], part, bits), entries)
        total[part] += dot(x[...], right.astype(dtype))
    finish(out, total)
