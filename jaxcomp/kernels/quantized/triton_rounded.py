"""The product of 8-bit integers with both scales behind it, for NVIDIA's chips through Triton.

The chips' units for 8 bits want inputs side by side: codes are turned before, a byte each. XLA's
own product writes its sums in 32 bits and scales them in a kernel of their own; this one does not.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxcomp.arrays.bits import unpack_bits
from jaxcomp.kernels.forms import Kernel
from jaxcomp.kernels.quantized.packed import Coding, values
from jaxcomp.kernels.tiles import largest_divisor, pad_rows, row_tile, unfit_dtype

_TILES = (
    {"rows": 128, "columns": 128, "step": 128, "warps": 8, "stages": 3},
    {"rows": 128, "columns": 256, "step": 128, "warps": 8, "stages": 3},
    {"rows": 64, "columns": 128, "step": 128, "warps": 4, "stages": 4},
    {"rows": 128, "columns": 128, "step": 64, "warps": 4, "stages": 4},
)
# Inputs and outputs are multiples of this.
MULTIPLE = 64


def forward(coding: Coding, dtype: Any) -> Kernel:
    """``x @ w`` of int8 ``x (rows, inputs)``, codes, scale and the rows' scales, in ``dtype``."""

    def run(
        x: Any, codes: Any, scale: Any, x_scale: Any, *, rows: int, columns: int, step: int,
        warps: int, stages: int, interpret: bool,
    ) -> jax.Array:  # fmt: skip
        count, rows = x.shape[0], row_tile(rows, x.shape[0])
        x, x_scale = pad_rows(x, rows), pad_rows(x_scale.astype(jnp.float32), rows)
        turned = values(coding, unpack_bits(codes, coding.bits, coding.outputs), None, jnp.int8).T
        outputs, inputs = turned.shape
        columns, step = largest_divisor(columns, outputs), largest_divisor(step, inputs)
        out = pl.pallas_call(
            partial(_forward, step=step, unit=coding.unit),
            jax.ShapeDtypeStruct((x.shape[0], outputs), dtype),
            grid=(x.shape[0] // rows, outputs // columns),
            in_specs=[
                pl.BlockSpec((rows, inputs), lambda i, j: (i, 0)),
                pl.BlockSpec((columns, inputs), lambda i, j: (j, 0)),
                pl.BlockSpec((1, columns), lambda i, j: (0, j)),
                pl.BlockSpec((rows, 1), lambda i, j: (i, 0)),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name="quantized_matmul_rounded",
        )(x, turned, scale, x_scale)
        return out[:count]

    return Kernel(run, partial(unfit, coding, dtype), _TILES)


def unfit(coding: Coding, dtype: Any, x: Any, codes: Any, scale: Any, *others: Any) -> str | None:
    """Why these do not fit the kernel, or None."""
    if x.dtype != jnp.int8:
        return f"{x.dtype} activations are multiplied by XLA"
    if scale.shape[0] > 1 or len(others) > 1:
        return "scales by group and zero points are left to XLA"
    for name, size in (("inputs", codes.shape[0]), ("outputs", coding.outputs)):
        if size % MULTIPLE:
            return f"{size} {name} are no multiple of {MULTIPLE}"
    return unfit_dtype(dtype, scale.dtype)


def _forward(
    x: Any, turned: Any, scale: Any, x_scale: Any, out: Any, *, step: int, unit: float
) -> None:
    def of_inputs(k: Any, total: jax.Array) -> jax.Array:
        inputs = pl.ds(k * step, step)
        return total + jnp.dot(x[:, inputs], turned[:, inputs].T, preferred_element_type=jnp.int32)

    total = lax.fori_loop(0, x.shape[1] // step, of_inputs, jnp.zeros(out.shape, jnp.int32))
    scaled = total.astype(jnp.float32) * (scale[...].astype(jnp.float32) * unit) * x_scale[...]
    out[...] = scaled.astype(out.dtype)
