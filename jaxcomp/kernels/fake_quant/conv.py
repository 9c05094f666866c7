"""The convolution with a kernel that is rounded on the way."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped, UInt8

from jaxcomp.checks import check_arrays
from jaxcomp.kernels.convolution import (
    Convolution,
    axes_of,
    convolution,
    convolve,
    convolve_to_input,
    convolve_to_weight,
)
from jaxcomp.kernels.fake_quant.matmul import fake_quant_matmul
from jaxcomp.kernels.fake_quant.operand import (
    coded,
    differentiated_once,
    nothing_of,
    operands,
    product_dtype,
    scaled,
    straight_through,
    switched,
    values,
)
from jaxcomp.kernels.fake_quant.rounding import (
    Rounding,
    find_codes,
    find_scale,
    values_of,
)
from jaxcomp.kernels.placed import explicit


def fake_quant_conv(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    rounding: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    *,
    scale: Shaped[Array, "..."] | None = None,
    zero_point: UInt8[Array, "..."] | None = None,
    inputs: Rounding | None = None,
    input_scale: Shaped[Array, "..."] | None = None,
    input_zero_point: UInt8[Array, "..."] | None = None,
    keep: str = "weight",
    dtype: Any = None,
    dense_gradient: bool = False,
    active: Bool[Array, ""] | None = None,
    implementation: Any = None,
) -> Float[Array, "..."]:
    """``lax.conv_general_dilated(x, w, …)`` with ``w``, and ``x`` if wanted, rounded.

    Gradients, and what is kept for them, are as for :func:`fake_quant_matmul`, which it is with one
    position, steps of 1, no padding, no groups, channels last and the kernel's outputs last; that
    has kernels of its own. Anything else runs as XLA compiles it.

    Args:
        x: activations, in any layout.
        w: latent kernel, in any layout.
        rounding: of ``w``, whose axes are those of ``w`` as it is; static.
        window_strides: these and the next as for :func:`jax.lax.conv_general_dilated`.
        padding: likewise.
        lhs_dilation: likewise.
        rhs_dilation: likewise.
        dimension_numbers: likewise; without them the layout is NCHW, OIHW.
        feature_group_count: likewise.
        scale: as for :func:`fake_quant_matmul`; so are the next.
        zero_point: likewise.
        inputs: likewise.
        input_scale: likewise.
        input_zero_point: likewise.
        keep: likewise.
        dtype: likewise.
        dense_gradient: likewise.
        active: likewise.
        implementation: ``"xla"``, a form of :func:`fake_quant_matmul` where it is one, or None for
            the best; static.

    Returns:
        Outputs, in ``dtype``.

    Raises:
        TypeError: ``dtype`` is not floating; ``active`` is no boolean.
        ValueError: shapes or arguments that do not fit, or a form that there is not.

    Example:
        >>> import jax.numpy as jnp
        >>> x, w = jnp.ones((1, 4, 1)), jnp.array([0.1, 2.0, 3.0]).reshape(3, 1, 1)
        >>> layout = ("NWC", "WIO", "NWC")
        >>> fake_quant_conv(x, w, Rounding(3), (1,), "SAME", dimension_numbers=layout).ravel()
        Array([5., 5., 5., 2.], dtype=float32)
    """
    check_arrays(x=x, w=w)
    window = (window_strides, padding, lhs_dilation, rhs_dilation)
    how = convolution(x, w, *window, dimension_numbers, feature_group_count)
    of_inputs, of_weight = (inputs, input_scale, input_zero_point), (rounding, scale, zero_point)
    of_x, of_w = operands(x, w, of_inputs, of_weight, keep, dense_gradient, active)
    if _is_product(how, w, rounding):
        last = 2 + len(rounding.blocks)
        matrix = lambda a: None if a is None else a.reshape(a.shape[-last:])
        return fake_quant_matmul(
            x,
            w.reshape(w.shape[-2:]),
            rounding._replace(axis=None if rounding.axis is None else -1),
            scale=matrix(scale),
            zero_point=matrix(zero_point),
            inputs=inputs,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
            keep=keep,
            dtype=dtype,
            dense_gradient=dense_gradient,
            active=active,
            implementation=implementation,
        )
    if implementation not in (None, "xla"):
        raise ValueError(
            f"fake_quant_conv has no form {implementation!r} but of kernels of one position, steps "
            "of 1, no padding, no groups and channels last: take None or 'xla'"
        )
    dtype = product_dtype(x, w, dtype)
    scales = (input_scale, input_zero_point, scale, zero_point)
    return _conv_jit((how, of_x, of_w, dtype), x, w, active, *scales)


def fake_quant_conv_reference(
    x: Any, w: Any, rounding: Rounding, *window: Any, **named: Any
) -> jax.Array:
    """The forward of :func:`fake_quant_conv` with a scale that is found, written plainly.

    Example:
        >>> import jax.numpy as jnp
        >>> x, w = jnp.ones((1, 1, 4)), jnp.array([0.1, 2.0, 3.0]).reshape(1, 1, 3)
        >>> fake_quant_conv_reference(x, w, Rounding(3, axis=None), (1,), "VALID").ravel()
        Array([5., 5.], dtype=float32)
    """
    scale, zero_point = find_scale(w, rounding)
    codes, _ = find_codes(w, scale, zero_point, rounding)
    rounded = values_of(codes, scale, zero_point, rounding, w.dtype)
    return lax.conv_general_dilated(x, rounded, *window, **named)


def _is_product(how: Convolution, w: jax.Array, rounding: Rounding) -> bool:
    """Whether it is a product with a matrix whose rounding is that of a matrix."""
    order = how.matrix_axes()
    columns = rounding.axis is None or rounding.axis in (-1, w.ndim - 1)
    shared = all(axis >= -2 for _, axis in rounding.blocks) if rounding.blocks else columns
    return how.is_product(w.shape) and shared and order == tuple(range(w.ndim))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(static: Any, x: jax.Array, w: jax.Array, *scales: Any) -> Any:
    return _conv_forward(static, x, w, *scales)[0]


def _conv_forward(static: Any, x: Any, w: Any, *scales: Any) -> Any:
    how, of_x, of_w, dtype = static
    left, right = scaled(of_x, x, *scales[:2]), scaled(of_w, w, *scales[2:])
    run = explicit(partial(convolve, how), axes_of(how, "forward"))
    y = run(values(of_x, left, x.dtype).astype(dtype), values(of_w, right, w.dtype).astype(dtype))
    return y, (coded(of_x, left), coded(of_w, right), nothing_of(x), nothing_of(w))


def _conv_backward(static: Any, kept: Any, dy: jax.Array) -> Any:
    how, of_x, of_w, _ = static
    # Or the compiler would find the values made before, and hold them until now.
    (left, right, x_type, w_type), dy = lax.optimization_barrier((kept, dy))
    if of_w.codes or of_x.codes:
        dy, x_type, w_type = differentiated_once((dy, x_type, w_type))
    x, w = values(of_x, left, x_type.dtype), values(of_w, right, w_type.dtype)
    to_input = lambda dy, w: convolve_to_input(how, dy, w, x)
    to_weight = lambda x, dy: convolve_to_weight(how, x, dy, w)
    dx = explicit(to_input, axes_of(how, "to_input"), like=x)(dy, w)
    dw = explicit(to_weight, axes_of(how, "to_weight"), like=w)(x, dy)
    through = straight_through(of_x, left, dx), straight_through(of_w, right, dw)
    return *through, None, None, None, None


_conv.defvjp(_conv_forward, _conv_backward)


# Outside `jit` one program, instead of one for every operation on every shape.
@partial(jax.jit, static_argnums=0)
def _conv_jit(static: Any, x: Any, w: Any, active: Any, *scales: Any) -> Any:
    if active is not None:
        scales = (*scales[:2], *switched(static[2], active, w, *scales[2:]))
    return _conv(static, x, w, *scales)
