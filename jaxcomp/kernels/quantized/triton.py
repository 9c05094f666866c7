"""The product with packed codes and its gradient, for NVIDIA's chips through Triton.

Codes are loaded packed and become small integers in registers; the scale of a group is multiplied
with the group's sums. Codes of 4 bits lie two in a byte along the outputs: even and odd outputs
have sums of their own, which are joined when they are stored.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxcomp.kernels.forms import Kernel
from jaxcomp.kernels.quantized.packed import Coding, parts_in_byte
from jaxcomp.kernels.tiles import dot, largest_divisor, pad_rows, row_tile, unfit_dtype

# Outputs of a matrix, and of a device's part of it, are a multiple of this.
COLUMNS = 64
_MANY = {"rows": 128, "columns": 128, "step": 64, "splits": 1, "warps": 8, "stages": 3}
_FEW = {"rows": 16, "columns": 64, "step": 64, "splits": 0, "warps": 4, "stages": 5}
# Without sizes, those for many or few rows; splits of 0 are as many as keep the memory busy.
_TILES = (
    {},
    _MANY,
    _FEW,
    {"rows": 64, "columns": 128, "step": 64, "splits": 1, "warps": 4, "stages": 4},
    {"rows": 128, "columns": 256, "step": 32, "splits": 1, "warps": 8, "stages": 3},
    {"rows": 16, "columns": 128, "step": 64, "splits": 0, "warps": 4, "stages": 5},
    {"rows": 16, "columns": 128, "step": 128, "splits": 0, "warps": 4, "stages": 3},
    {"rows": 16, "columns": 256, "step": 64, "splits": 0, "warps": 8, "stages": 4},
)
_FEW_ROWS = 32
# Some for each of the 132 cores of an H100.
_PROGRAMS = 528


def forward(coding: Coding, dtype: Any) -> Kernel:
    """``x @ w`` in ``dtype``: ``x (rows, inputs)``, codes, scale and, if affine, zero points."""

    def run(x: Any, codes: Any, scale: Any, *zero: Any, interpret: bool, **tile: Any) -> jax.Array:
        # 64 bytes of a row of codes at least, or the memory reads what nobody asked for.
        few = _FEW | {"columns": _FEW["columns"] * parts_in_byte(coding)}
        sizes = tile or (few if x.shape[0] <= _FEW_ROWS else _MANY)
        inputs, outputs, groups = x.shape[1], scale.shape[1], scale.shape[0]
        rows, count = row_tile(sizes["rows"], x.shape[0]), x.shape[0]
        x, columns = pad_rows(x, rows), largest_divisor(sizes["columns"], outputs)
        step = largest_divisor(sizes["step"], inputs // groups)
        grid = (x.shape[0] // rows, outputs // columns)
        # Sums that are added up afterwards are a quarter of the codes' bytes at most.
        most = min(_PROGRAMS // (grid[0] * grid[1]), inputs * coding.bits // (128 * rows))
        splits = sizes["splits"] or _splits(most, inputs, groups, step)
        span, taken = inputs // splits, max(groups // splits, 1)
        at_group = lambda i, j, k: (k if groups > 1 else 0, j)
        by_group = pl.BlockSpec((taken, columns), at_group)
        sums = dtype if splits == 1 else jnp.float32
        out = pl.pallas_call(
            partial(_forward, coding=coding, step=step),
            jax.ShapeDtypeStruct((splits, x.shape[0], outputs), sums),
            grid=(*grid, splits),
            in_specs=[
                pl.BlockSpec((rows, span), lambda i, j, k: (i, k)),
                pl.BlockSpec((span, columns * coding.bits // 8), lambda i, j, k: (k, j)),
                by_group,
                *(by_group for _ in zero),
            ],
            out_specs=pl.BlockSpec((None, rows, columns), lambda i, j, k: (k, i, j)),
            compiler_params=triton.CompilerParams(
                num_warps=sizes["warps"], num_stages=sizes["stages"]
            ),
            interpret=interpret,
            name="quantized_matmul",
        )(x, codes, scale, *zero)
        return (out[0] if splits == 1 else out.sum(axis=0).astype(dtype))[:count]

    return Kernel(run, partial(unfit, coding), _TILES)


def to_input(coding: Coding, dtype: Any) -> Kernel:
    """``dy @ w.T`` in ``dtype``: ``dy (rows, outputs)``, codes, scale and, if affine, zeros."""

    def run(dy: Any, codes: Any, scale: Any, *zero: Any, interpret: bool, **tile: Any) -> jax.Array:
        sizes = tile or _MANY
        rows, count = row_tile(sizes["rows"], dy.shape[0]), dy.shape[0]
        dy, (inputs, width) = pad_rows(dy, rows), codes.shape
        columns = largest_divisor(sizes["columns"], inputs)
        step = largest_divisor(sizes["step"] // parts_in_byte(coding), width)
        whole = pl.BlockSpec(scale.shape, lambda i, j: (0, 0))
        out = pl.pallas_call(
            partial(_to_input, coding=coding, step=step, size=inputs // scale.shape[0]),
            jax.ShapeDtypeStruct((dy.shape[0], inputs), dtype),
            grid=(dy.shape[0] // rows, inputs // columns),
            in_specs=[
                pl.BlockSpec((rows, dy.shape[1]), lambda i, j: (i, 0)),
                pl.BlockSpec((columns, width), lambda i, j: (j, 0)),
                whole,
                *(whole for _ in zero),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
            compiler_params=triton.CompilerParams(
                num_warps=sizes["warps"], num_stages=sizes["stages"]
            ),
            interpret=interpret,
            name="quantized_matmul_to_input",
        )(dy, codes, scale, *zero)
        return out[:count]

    return Kernel(run, partial(unfit, coding), _TILES)


def unfit(coding: Coding, x: Any, codes: Any, scale: Any, *zero: Any) -> str | None:
    """Why these do not fit the kernels, or None."""
    del zero
    inputs, groups = codes.shape[0], scale.shape[0]
    if not coding.is_steps or coding.bits not in (4, 8):
        return f"codes of {coding.bits} bits ({coding.kind}) are unpacked by XLA"
    if inputs // groups % 16:
        return f"{inputs} inputs in {groups} groups are no multiples of 16"
    if coding.outputs % COLUMNS:
        return f"{coding.outputs} outputs are no multiple of {COLUMNS}"
    return unfit_dtype(x.dtype, scale.dtype)


def _splits(most: int, inputs: int, groups: int, step: int) -> int:
    """Into how many parts to cut the inputs: whole groups each, or whole steps of the one."""
    splits, whole = 1, groups if groups > 1 else inputs // step
    while 2 * splits <= most and whole % (2 * splits) == 0:
        splits *= 2
    return splits


def _of_part(array: Any, row: Any, part: int, parts: int) -> jax.Array:
    """A row's numbers of the outputs that lie in one part of each byte."""
    return array[pl.ds(row, 1), pl.ds(part, array.shape[1] // parts, stride=parts)]


class _Power(NamedTuple):
    """A power of two whose last bits, as a float, count integers.

    Attributes:
        floats: the dtype.
        integers: of as many bits.
        bits: of the power.
        number: the power.
    """

    floats: Any
    integers: Any
    bits: int
    number: float

    def plus(self, small: jax.Array) -> jax.Array:
        """The power and a small integer."""
        return lax.bitcast_convert_type(small | self.integers(self.bits), self.floats)


_POWERS = {
    jnp.dtype(jnp.bfloat16): _Power(jnp.bfloat16, jnp.int16, 0x4300, 128.0),
    jnp.dtype(jnp.float16): _Power(jnp.float16, jnp.int16, 0x6400, 1024.0),
    jnp.dtype(jnp.float32): _Power(jnp.float32, jnp.int32, 0x4B000000, 2.0**23),
}


def _counted(coding: Coding, codes: jax.Array, part: int, zero: Any, dtype: Any) -> jax.Array:
    """The weights of one part of each byte in scales, exactly.

    Small integers are laid into the last bits of a power of two, which is taken away again: chips
    convert integers to floats at a fraction of the rate of that.
    """
    # 8 bits are more than bfloat16 counts.
    power = _POWERS[jnp.dtype(jnp.float32 if coding.bits == 8 and dtype == jnp.bfloat16 else dtype)]
    plain = codes.astype(power.integers)
    if coding.bits < 8:
        plain = (plain >> 4 * part) & 15
    if coding.kind == "float4":
        # How many halves each magnitude is, four bits each, the smallest last.
        halves = (jnp.int32(-0x379BCDF0) >> (plain.astype(jnp.int32) & 7) * 4) & 15
        size = power.plus(halves.astype(power.integers)) - power.floats(power.number)
        return jnp.where(plain > 7, -size, size)
    if coding.kind == "odd":
        plain, nothing = 2 * plain, power.floats(power.number + (1 << coding.bits) - 1)
    elif zero is None:
        nothing = power.floats(power.number + (1 << (coding.bits - 1)))
    else:
        nothing = power.plus(zero.astype(power.integers))
    return (power.plus(plain) - nothing).astype(dtype)


def _forward(x: Any, codes: Any, scale: Any, *others: Any, coding: Coding, step: int) -> None:
    *zero, out = others
    parts, groups = parts_in_byte(coding), scale.shape[0]
    size = codes.shape[0] // groups

    def of_step(k: Any, totals: Any) -> Any:
        rows, group = pl.ds(k * step, step), lax.div(k * step, size)
        left, here = x[:, rows], codes[rows, :]

        def of_part(part: int, total: jax.Array) -> jax.Array:
            zeros = _of_part(zero[0], group, part, parts) if zero else None
            sums = dot(left, _counted(coding, here, part, zeros, left.dtype))
            scales = 1 if groups == 1 else _of_part(scale, group, part, parts)
            return total + sums * scales

        return [of_part(part, total) for part, total in enumerate(totals)]

    shape = (out.shape[0], out.shape[1] // parts)
    totals = [jnp.zeros(shape, jnp.float32) for _ in range(parts)]
    totals = lax.fori_loop(0, codes.shape[0] // step, of_step, totals)
    if groups == 1:
        totals = [t * _of_part(scale, 0, part, parts) for part, t in enumerate(totals)]
    whole = totals[0] if parts == 1 else jnp.stack(totals, axis=-1).reshape(out.shape)
    out[...] = (whole * coding.unit).astype(out.dtype)


def _to_input(
    dy: Any, codes: Any, scale: Any, *others: Any, coding: Coding, step: int, size: int
) -> None:
    *zero, out = others
    parts, (columns, width) = parts_in_byte(coding), codes.shape
    first = pl.program_id(1) * columns
    # A row of scales for each input, if these are of several groups.
    group: Any = pl.ds(lax.div(first, jnp.int32(size)), 1)
    if size % columns:
        group = lax.div(first + lax.broadcasted_iota(jnp.int32, (columns,), 0), jnp.int32(size))

    def of_bytes(k: Any, total: jax.Array) -> jax.Array:
        here = codes[:, pl.ds(k * step, step)]
        for part in range(parts):
            outputs = pl.ds(k * (step * parts) + part, step, stride=parts)
            zeros = zero[0][group, outputs] if zero else None
            counted = _counted(coding, here, part, zeros, jnp.float32)
            right = counted * (scale[group, outputs] * coding.unit)
            left = dy[:, outputs]
            total += dot(left, right.astype(left.dtype).T)
        return total

    total = lax.fori_loop(0, width // step, of_bytes, jnp.zeros(out.shape, jnp.float32))
    out[...] = total.astype(out.dtype)
