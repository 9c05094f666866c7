"""The convolution with a kernel of which a mask keeps a part."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxcomp.checks import check_arrays, check_flag
from jaxcomp.kernels.convolution import (
    axes_of,
    convolution,
    convolve,
    convolve_to_input,
    convolve_to_weight,
)
from jaxcomp.kernels.masked.matmul import masked_matmul
from jaxcomp.kernels.packed_mask import PackedMask, check_mask, pack_mask
from jaxcomp.kernels.placed import explicit


def masked_conv(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    mask: PackedMask | Bool[Array, "..."],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    *,
    dense_gradient: bool = False,
    implementation: Any = None,
) -> Float[Array, "..."]:
    """``lax.conv_general_dilated(x, w * mask, …)``, both gradients from the bits of the mask.

    What the mask removes does not count at all: infinities and NaN there change nothing. The masked
    kernel is made again for the gradients, not kept. With one position, steps of 1, no padding,
    no groups and channels last it is :func:`masked_matmul`, which has kernels of its own; anything
    else runs as XLA compiles it.

    Args:
        x: activations, in any layout.
        w: latent kernel, dense, in any layout.
        mask: booleans in the shape of ``w``, which are packed in each call; or what
            :func:`pack_kernel_mask` made of them.
        window_strides: these and the next as for :func:`jax.lax.conv_general_dilated`.
        padding: likewise.
        lhs_dilation: likewise.
        rhs_dilation: likewise.
        dimension_numbers: likewise; without them the layout is NCHW, OIHW.
        feature_group_count: likewise.
        dense_gradient: give ``w`` its gradient as if nothing were removed; static.
        implementation: ``"xla"``, a form of :func:`masked_matmul` where it is one, or None for the
            best; static.

    Returns:
        Outputs, in the dtype that ``x`` and ``w`` promote to.

    Raises:
        TypeError: the mask is neither packed nor boolean.
        ValueError: shapes or arguments that do not fit, or a form that there is not.

    Example:
        >>> x, w = jnp.ones((1, 4, 1)), jnp.array([1.0, 2.0, 4.0]).reshape(3, 1, 1)
        >>> mask, layout = w != 2, ("NWC", "WIO", "NWC")
        >>> masked_conv(x, w, mask, (1,), "SAME", dimension_numbers=layout).ravel()
        Array([4., 5., 5., 1.], dtype=float32)
    """
    check_arrays(x=x, w=w)
    check_flag("dense_gradient", dense_gradient)
    window = (window_strides, padding, lhs_dilation, rhs_dilation)
    how = convolution(x, w, *window, dimension_numbers, feature_group_count)
    order = how.matrix_axes()
    inputs, outputs = (w.shape[axis] for axis in order[-2:])
    if not isinstance(mask, PackedMask):
        check_mask(mask)
        if mask.shape != w.shape:
            raise ValueError(f"mask {mask.shape} must be of the shape of w, {w.shape}")
        mask = _pack(mask, order)
    size = w.size // max(outputs, 1)
    if mask.shape != (size, outputs):
        raise ValueError(
            f"a packed mask of shape {mask.shape} does not fit w {w.shape}: it must be "
            f"{(size, outputs)}, (positions * inputs, outputs), as pack_kernel_mask makes it"
        )
    if how.is_product(w.shape):
        matrix = w.transpose(order).reshape(inputs, outputs)
        return masked_matmul(
            x, matrix, mask, dense_gradient=dense_gradient, implementation=implementation
        )
    if implementation not in (None, "xla"):
        raise ValueError(
            f"masked_conv has no form {implementation!r} but of kernels of one position, steps of "
            "1, no padding, no groups and channels last: take None or 'xla'"
        )
    return _conv_jit((how, mask.rows, mask.block, dense_gradient), x, w, mask.bits)


def pack_kernel_mask(
    mask: Bool[Array, "..."], dimension_numbers: Any = None, block: Any = None
) -> PackedMask:
    """Pack the mask of a convolution's kernel.

    Args:
        mask: True keeps; in the kernel's layout.
        dimension_numbers: of the convolution; without them the layout is OIHW.
        block: as for :func:`pack_mask`.

    Returns:
        The mask of the matrix ``(positions * inputs, outputs)``.

    Example:
        >>> mask = jnp.ones((3, 3, 16, 8), bool)
        >>> pack_kernel_mask(mask, ("NHWC", "HWIO", "NHWC")).shape
        (144, 8)
    """
    numbers = lax.conv_dimension_numbers(mask.shape, mask.shape, dimension_numbers)
    outputs, inputs, *space = numbers.rhs_spec
    return _pack(mask, (*space, inputs, outputs), block)


def masked_conv_reference(x: Any, w: Any, mask: Any, *window: Any, **named: Any) -> jax.Array:
    """The same as :func:`masked_conv`, of booleans, written plainly.

    Example:
        >>> x, w = jnp.ones((1, 1, 4)), jnp.ones((1, 1, 3))
        >>> masked_conv_reference(x, w, w > 0, (1,), "VALID").ravel()
        Array([3., 3.], dtype=float32)
    """
    kept = jnp.where(mask, w, jnp.zeros((), w.dtype))
    return lax.conv_general_dilated(x, kept, *window, **named)


def _pack(mask: jax.Array, order: tuple[int, ...], block: Any = None) -> PackedMask:
    shape = [mask.shape[axis] for axis in order]
    return pack_mask(mask.transpose(order).reshape(math.prod(shape[:-1]), shape[-1]), block)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(static: tuple[Any, ...], x: jax.Array, w: jax.Array, bits: jax.Array) -> Any:
    how = static[0]
    run = lambda x, w, bits: convolve(how, x, _masked(static, w, bits))
    return explicit(run, axes_of(how, "forward", _BITS))(x, w, bits)


def _conv_forward(static: Any, x: Any, w: Any, bits: Any) -> Any:
    return _conv(static, x, w, bits), (x, w, bits)


def _conv_backward(static: Any, kept: Any, dy: jax.Array) -> Any:
    # Or the compiler would find the masked kernel made before, and hold it until now.
    (x, w, bits), dy = lax.optimization_barrier((kept, dy))
    how, _, _, dense_gradient = static

    def to_input(dy: jax.Array, w: jax.Array, bits: jax.Array) -> jax.Array:
        return convolve_to_input(how, dy, _masked(static, w, bits), x)

    def to_weight(x: jax.Array, dy: jax.Array, bits: jax.Array) -> jax.Array:
        dw = convolve_to_weight(how, x, dy, w)
        return dw if dense_gradient else _masked(static, dw, bits)

    dx = explicit(to_input, axes_of(how, "to_input", _BITS), like=x)(dy, w, bits)
    dw = explicit(to_weight, axes_of(how, "to_weight", _BITS), like=w)(x, dy, bits)
    return dx, dw, None


_conv.defvjp(_conv_forward, _conv_backward)
# Outside `jit` one program, instead of one for every operation on every shape.
_conv_jit = jax.jit(_conv, static_argnums=0)
# Positions and inputs share an axis of the bits.
_BITS = ("b", "o")


def _masked(static: tuple[Any, ...], w: jax.Array, bits: jax.Array) -> jax.Array:
    how, rows, block, _ = static
    order = how.matrix_axes()
    mask = PackedMask(bits, rows, block).unpack().reshape([w.shape[axis] for axis in order])
    mask = mask.transpose(sorted(range(len(order)), key=order.__getitem__))
    return jnp.where(mask, w, jnp.zeros((), w.dtype))
