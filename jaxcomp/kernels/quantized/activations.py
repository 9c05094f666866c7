"""The product of codes with activations that are rounded to 8 bits on the way.

Chips have units for it. On a GPU they want the inputs of a weight side by side in memory, where
these codes have the outputs: the codes are written anew in each call. Few rows are not worth that;
they are multiplied by the kernels for weights alone, which gives the same.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from jaxcomp.arrays.bits import unpack_bits
from jaxcomp.kernels.quantized import xla
from jaxcomp.kernels.quantized.packed import Coding, values

ACTIVATIONS = ("int8", "float8_e4m3fn", "float8_e5m2")
# From these rows on, a product of 8 bits pays.
MANY_ROWS = 33
# Groups are multiplied together as long as their sums, float32, stay within 32 MiB.
_GROUP_SUMS = 1 << 23


def quantize_rows(
    x: Float[Array, "*rows inputs"], form: str
) -> tuple[Shaped[Array, "*rows inputs"], Float[Array, "*rows 1"]]:
    """Each row in 8 bits with a scale of its own, so that its largest is the largest code.

    Args:
        x: activations.
        form: ``int8``, ``float8_e4m3fn`` or ``float8_e5m2``.

    Returns:
        Codes in that dtype, and the scales, in float32 or float64.

    Example:
        >>> codes, scale = quantize_rows(jnp.array([[-254.0, 3.0, 100.0]]), "int8")
        >>> codes, scale
        (Array([[-127,    2,   50]], dtype=int8), Array([[2.]], dtype=float32))
    """
    dtype, wide = jnp.dtype(form), x.astype(jnp.promote_types(x.dtype, jnp.float32))
    top = 127.0 if form == "int8" else float(jnp.finfo(dtype).max)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True, initial=0)
    # XLA flushes smaller scales to zero.
    least = float(jnp.finfo(wide.dtype).smallest_normal)
    scale = jnp.where(largest == 0, 1, jnp.maximum(largest / top, least))
    # XLA's maximum on a CPU may pass a NaN by.
    scale = jnp.where(jnp.isnan(wide).any(axis=-1, keepdims=True), jnp.nan, scale)
    ratio = jnp.clip(wide / scale, -top, top)
    return (jnp.round(ratio) if form == "int8" else ratio).astype(dtype), scale


def unfit_codes(coding: Coding, form: str) -> str | None:
    """Why codes are not multiplied with activations of a form, or None."""
    if form not in ACTIVATIONS:
        return f"activations must be None or one of {list(ACTIVATIONS)}, not {form!r}"
    if form == "int8":
        fits = coding.is_steps and not (coding.kind == "odd" and coding.bits == 8)
        needed = "integers of 8 bits or float4_e2m1fn"
    else:
        small = coding.is_steps and coding.bits <= 4 and form == "float8_e4m3fn"
        fits, needed = coding.kind == form or small, f"{form} or, for e4m3fn, of 4 bits and fewer"
    return None if fits else f"{form} activations need codes that are {needed}, not {coding.kind}"


def forward(
    coding: Coding, dtype: Any, x: jax.Array, codes: jax.Array, *by_group: jax.Array
) -> jax.Array:
    """``x @ w`` of 8-bit ``x (rows, inputs)`` and codes, in ``dtype``.

    XLA's compiler for CPUs is faster with the same numbers in float32.

    Args:
        coding: of the codes.
        dtype: of the result.
        x: from :func:`quantize_rows`.
        codes: packed.
        by_group: scale, zero points if affine, and the scales of rows.
    """
    *packed, x_scale = by_group
    if 0 in (*x.shape, coding.outputs):
        return jnp.zeros((x.shape[0], coding.outputs), dtype)

    def in_floats(x: jax.Array, *packed: jax.Array) -> jax.Array:
        return xla.forward(coding, jnp.float32, x.astype(jnp.float32), *packed)

    in_8_bits = partial(_in_8_bits, coding)
    sums = lax.platform_dependent(x, codes, *packed, cpu=in_floats, default=in_8_bits)
    return (sums * x_scale).astype(dtype)


def _in_8_bits(
    coding: Coding, x: jax.Array, codes: jax.Array, scale: jax.Array, *zero: jax.Array
) -> jax.Array:
    (rows, inputs), groups = x.shape, scale.shape[0]
    plain = unpack_bits(codes, coding.bits, coding.outputs)
    right = plain.reshape(groups, inputs // groups, coding.outputs)
    left = jnp.moveaxis(x.reshape(rows, groups, inputs // groups), 1, 0)
    by_group = [array[:, None, :] for array in (scale, *zero)]
    if groups == 1:
        return _sums(coding, left, right, *by_group)[0]

    def part(first: Any, count: int) -> jax.Array:
        cut = lambda array: lax.dynamic_slice_in_dim(array, first, count, 0)
        return jnp.sum(_sums(coding, *map(cut, (left, right, *by_group))), axis=0)

    if groups * rows * coding.outputs <= _GROUP_SUMS:
        return part(0, groups)
    return lax.fori_loop(1, groups, lambda k, total: total + part(k, 1), part(0, 1))


def _sums(coding: Coding, x: jax.Array, codes: jax.Array, scale: jax.Array, *zero: Any) -> Any:
    """``(groups, rows, outputs)``, scaled, of ``(groups, rows | members | 1, …)``."""
    whole = x.dtype == jnp.int8
    # What 8 bits cannot hold is taken away from the sums.
    later = whole and zero and coding.bits == 8
    counted = values(coding, codes, zero[0] if zero and not later else None, x.dtype)
    wide = jnp.int32 if whole else jnp.float32
    sums = jnp.einsum("gri,gio->gro", x, counted, preferred_element_type=wide)
    if later:
        inputs = jnp.sum(x, axis=-1, keepdims=True, dtype=jnp.int32)
        sums = sums - (zero[0].astype(jnp.int32) - 128) * inputs
    return sums.astype(jnp.float32) * (scale.astype(jnp.float32) * coding.unit)
