"""The product of activations with a matrix of packed codes."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxcomp.arrays.grid import GridArray
from jaxcomp.arrays.quantized import QuantizedArray
from jaxcomp.checks import check_arrays, check_flag
from jaxcomp.kernels.forms import Kernel, choose
from jaxcomp.kernels.placed import Axes, explicit, flat_rows, placed, unflat_rows
from jaxcomp.kernels.quantized import tpu, triton, triton_rounded, xla
from jaxcomp.kernels.quantized.activations import MANY_ROWS, quantize_rows, unfit_codes
from jaxcomp.kernels.quantized.activations import forward as rounded
from jaxcomp.kernels.quantized.packed import Coding, packed_matrix, scales_of_rows
from jaxcomp.sharding import explicit_axes

_FORMS = {"triton": triton, "mosaic_tpu": tpu}
# What a device's part of the inputs and outputs must be a multiple of.
_PARTS = {"triton": (64, triton.COLUMNS), "mosaic_tpu": (128, 256)}
# Each is measured by itself: its name, which axis is summed over and which is kept, XLA's form.
_KINDS = {
    "forward": ("quantized_matmul", ("i", "o"), xla.forward),
    "to_input": ("quantized_matmul, to input", ("o", "i"), xla.to_input),
    "rounded": ("quantized_matmul, rounded", ("i", "o"), rounded),
}


def quantized_matmul(
    x: Shaped[Array, "..."],
    weight: Any,
    *,
    transposed: bool = False,
    activations: str | None = None,
    implementation: Any = None,
) -> Shaped[Array, "..."]:
    """``x @ weight.decode()``, the weight read as the codes that it is kept in.

    Args:
        x: activations, ``(*rows, inputs)``; integers and booleans become the leaf's dtype.
        weight: a quantized leaf of two axes, ``(inputs, outputs)``, of any form and granularity.
        transposed: multiply with ``weight.decode().T``, of a leaf ``(outputs, inputs)``, as tied
            embeddings are kept; not with ``activations``; static.
        activations: None, or what each row of ``x`` is rounded to first, with a scale of its own:
            ``"int8"`` (with integer codes, or ``float4_e2m1fn``), ``"float8_e4m3fn"`` or
            ``"float8_e5m2"`` (with codes of that kind; the first also with 4 bits and fewer).
            The product is then one of 8-bit codes, summed in 32 bits; static.
        implementation: ``"xla"``, ``"triton"``, ``"mosaic_tpu"``, or None for the best on the
            platform; static. Kernels take codes of 4 and 8 bits and, of small floats,
            ``float4_e2m1fn`` (MXFP4 and NVFP4, whose levels are small integers of half a scale).
            Other codes are left to XLA, and so are many rows of rounded activations, unless they
            are ``"int8"`` on a GPU with a scale for each output.

    Returns:
        ``(*rows, outputs)`` in the dtype of ``x``, summed in float32 (float64 for float64). Codes
        are exact in that dtype, and the scale of a channel or group multiplies its sum, except
        where groups are small for the chip or XLA: there it multiplies the codes. Gradients go to
        ``x``, straight through its rounding; not to the weight: scales are trained with
        :func:`jaxcomp.quantize.learned_step`.

    Raises:
        TypeError: the weight is another leaf.
        ValueError: shapes that do not fit, activations that do not go with the codes, or an
            implementation that does not take them.

    Example:
        >>> import jax.numpy as jnp
        >>> leaf = QuantizedArray(jnp.array([[127], [130]], jnp.uint8), jnp.array([[0.5]]), None,
        ...                       8, 1, (), jnp.float32)
        >>> quantized_matmul(jnp.array([[2.0, 3.0]]), leaf)
        Array([[2.]], dtype=float32)
        >>> quantized_matmul(jnp.array([2.0]), leaf, transposed=True)
        Array([-1.,  2.], dtype=float32)
    """
    if not isinstance(weight, QuantizedArray | GridArray):
        kind = type(weight).__name__
        raise TypeError(f"weight must be a QuantizedArray or a GridArray, not {kind}")
    shape = weight.shape
    check_arrays(x=x)
    check_flag("transposed", transposed)
    if x.ndim < 1 or len(shape) != 2 or x.shape[-1] != shape[transposed]:
        of_leaf = "(outputs, inputs)" if transposed else "(inputs, outputs)"
        raise ValueError(f"x {x.shape} and the leaf {shape} must be (*rows, inputs) and {of_leaf}")
    if transposed and activations is not None:
        raise ValueError("activations are not rounded before a transposed leaf: leave one out")
    weight, by_row = scales_of_rows(weight) if transposed else (weight, None)
    coding, arrays = packed_matrix(weight)
    if activations is not None and (reason := unfit_codes(coding, activations)):
        raise ValueError(reason)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(weight.dtype)
    if transposed:
        y: Any = _transposed((coding, implementation), flat_rows(x), *arrays, by_row)
    else:
        y = _product((coding, activations, implementation), flat_rows(x), *arrays)
    return unflat_rows(y, x)


def quantized_matmul_reference(x: Any, weight: Any) -> jax.Array:
    """The same as :func:`quantized_matmul`, written plainly.

    Example:
        >>> import jax.numpy as jnp
        >>> leaf = QuantizedArray(jnp.array([[127], [130]], jnp.uint8), jnp.array([[0.5]]), None,
        ...                       8, 1, (), jnp.float32)
        >>> quantized_matmul_reference(jnp.array([[2.0, 3.0]]), leaf)
        Array([[2.]], dtype=float32)
    """
    return x @ weight.decode().astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: tuple[Coding, Any, Any], x: Any, codes: Any, scale: Any, zero: Any) -> Any:
    coding, activations, implementation = static
    run = partial(_run, coding=coding, implementation=implementation)
    if activations is None:
        return run("forward", x, codes, scale, zero, dtype=x.dtype)
    small, x_scale = quantize_rows(x, activations)
    if x.shape[0] >= MANY_ROWS:
        return run("rounded", small, codes, scale, zero, x_scale, dtype=x.dtype)
    # Codes of 8 bits are exact in any float; their sums are rounded once, when they are scaled.
    y = run("forward", small.astype(x.dtype), codes, scale, zero, dtype=x_scale.dtype)
    return (y * x_scale).astype(x.dtype)


def _product_forward(static: Any, x: Any, codes: Any, scale: Any, zero: Any) -> Any:
    # Only where it lies is of use afterwards.
    like = x if explicit_axes(x, codes, scale) else None
    return _product(static, x, codes, scale, zero), (like, codes, scale, zero)


def _product_backward(static: Any, kept: Any, dy: jax.Array) -> Any:
    (coding, _, implementation), (like, *weight) = static, kept
    how = {"coding": coding, "implementation": implementation}
    dx = _run("to_input", dy, *weight, **how, dtype=dy.dtype, like=like)
    return dx, None, None, None


_product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transposed(
    static: tuple[Coding, Any], x: Any, codes: Any, scale: Any, zero: Any, by_row: Any
) -> Any:
    coding, implementation = static
    run = partial(_run, "to_input", coding=coding, implementation=implementation)
    if by_row is None:
        return run(x, codes, scale, zero, dtype=x.dtype)
    y = run(x, codes, scale, zero, dtype=jnp.promote_types(x.dtype, by_row.dtype))
    return _by_row(y, by_row).astype(x.dtype)


def _transposed_forward(static: Any, x: Any, codes: Any, scale: Any, zero: Any, by_row: Any) -> Any:
    like = x if explicit_axes(x, codes, scale) else None
    return _transposed(static, x, codes, scale, zero, by_row), (like, codes, scale, zero, by_row)


def _transposed_backward(static: Any, kept: Any, dy: jax.Array) -> Any:
    (coding, implementation), (like, *weight, by_row) = static, kept
    scaled = dy if by_row is None else _by_row(dy, by_row).astype(dy.dtype)
    how = {"coding": coding, "implementation": implementation}
    dx = _run("forward", scaled, *weight, **how, dtype=dy.dtype, like=like)
    return dx, None, None, None, None


_transposed.defvjp(_transposed_forward, _transposed_backward)


def _by_row(y: jax.Array, scale: jax.Array) -> jax.Array:
    axes = Axes((("r", "i"), ("i",)), ("r", "i"))
    return explicit(lambda y, scale: y * scale, axes)(y, scale)


def _run(
    kind: str, *arrays: Any, coding: Coding, implementation: Any, dtype: Any, like: Any = None
) -> jax.Array:
    present = tuple(array for array in arrays if array is not None)
    groups, count = present[2].shape[0], len(present)
    size = present[1].shape[0] // groups if groups > 1 else 0
    name, _, plain = _KINDS[kind]
    static = (coding, dtype)
    forms = _kernels(kind, static, size, count)

    def run(*arrays: jax.Array) -> jax.Array:
        return choose(name, partial(plain, *static), forms, arrays, implementation)

    return explicit(run, _axes(kind, size, count), like)(*present)


def _axes(kind: str, size: int, count: int) -> Axes:
    """Of ``count`` arrays, with groups of ``size`` inputs, or 0 without."""
    summed, kept = _KINDS[kind][1]
    by_group = ("i" if size else "u", "o")
    rest = (by_group,) * (count - 2)
    if kind == "rounded":
        rest = (*rest[:-1], ("r", "v"))
    return Axes((("r", summed), ("i", "o"), *rest), ("r", kept))


@functools.cache
def _kernels(kind: str, static: tuple[Any, ...], size: int, count: int) -> dict[str, Kernel]:
    def on_a_mesh(name: str, kernel: Kernel) -> Kernel:
        inputs, outputs = _PARTS[name]
        parts = {"i": max(inputs, size), "o": outputs}
        axes = _axes(kind, size, count)._replace(parts=parts)
        run = lambda *arrays, **how: placed(partial(kernel.run, **how), axes)(*arrays)
        return kernel._replace(run=run)

    if kind == "rounded":
        return {"triton": on_a_mesh("triton", triton_rounded.forward(*static))}
    return {name: on_a_mesh(name, getattr(form, kind)(*static)) for name, form in _FORMS.items()}
