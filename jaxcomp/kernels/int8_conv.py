"""Convolutions of 8-bit integers, summed in 32 bits and scaled afterwards.

A TPU has them. A GPU's library has none with 32-bit results, and XLA's CPU form is up to nine times
slower than a float32 convolution where there are few channels: both run the product of patches
with the weight as a matrix, and depthwise convolutions as a sum of shifted products.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Int32

from jaxcomp.kernels.int8 import Int8Weight, int8_linear

_FORMS = ("native", "patches")


class Window(NamedTuple):
    """How a convolution moves; static. One number, or pair, for each spatial axis.

    Attributes:
        strides: steps between outputs.
        padding: zeros before and after; negative numbers crop.
        input_dilation: 1, or steps between inputs (a transposed convolution).
        kernel_dilation: 1, or steps between the kernel's positions.
        groups: groups of channels that do not see each other.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int = 1


def int8_conv(
    x: Int8[Array, "rows *space channels"],
    x_scale: Float[Array, "..."],
    weight: Int8Weight,
    window: Window,
    x_zero_point: Int32[Array, "..."] | None = None,
    *,
    implementation: str | None = None,
) -> Float32[Array, "rows *out_space out"]:
    """The convolution of what integers stand for, computed on the integers.

    The padding holds the code of zero, so that zeros in the padding are zeros.

    Args:
        x: activations, channels last.
        x_scale: their step: a scalar, or one for each row, ``(rows, 1, …, 1)`` with an axis for
            each spatial one.
        weight: codes of shape ``(out, *kernel, channels / groups)``; the rest ``(out,)``, with sums
            over all of the kernel.
        window: how it moves.
        x_zero_point: the code of zero, shaped like ``x_scale``; None for symmetric activations.
        implementation: ``"native"`` (the platform's own), ``"patches"``, or None: native on a TPU.

    Returns:
        Outputs, channels last.

    Raises:
        ValueError: shapes that do not fit, or another implementation.

    Example:
        >>> from jaxcomp.kernels.int8 import int8_weight
        >>> row = int8_weight(jnp.array([[1, 2, 3]], jnp.int8), jnp.array(0.5))
        >>> weight = row._replace(codes=row.codes.reshape(1, 3, 1))
        >>> window = Window((1,), ((1, 1),), (1,), (1,))
        >>> x = jnp.array([1, 0, 0, 1], jnp.int8).reshape(1, 4, 1)
        >>> int8_conv(x, jnp.array(1.0), weight, window).ravel()
        Array([1. , 0.5, 1.5, 1. ], dtype=float32)
    """
    if x.ndim != weight.codes.ndim or x.shape[-1] != weight.codes.shape[-1] * window.groups:
        raise ValueError(
            f"x of shape {x.shape} must be (rows, *space, channels) for codes (out, *kernel, "
            f"channels / {window.groups}), which are {weight.codes.shape}"
        )
    if implementation not in (None, *_FORMS):
        raise ValueError(f"implementation must be None or of {_FORMS}, not {implementation!r}")

    def form(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *arrays: run(*arrays, window)

    arrays = (_padded(x, window, x_zero_point), x_scale, weight, x_zero_point)
    if implementation is not None:
        return form(_native if implementation == "native" else _patches)(*arrays)
    return lax.platform_dependent(*arrays, tpu=form(_native), default=form(_patches))


def _padded(x: jax.Array, window: Window, zero_point: jax.Array | None) -> jax.Array:
    """The padding and the gaps of a dilated input, filled with the code of zero."""
    gaps = [step - 1 for step in window.input_dilation]
    space = [(*pair, gap) for pair, gap in zip(window.padding, gaps, strict=True)]
    config = [(0, 0, 0), *space, (0, 0, 0)]
    if not any(map(any, config)):
        return x
    if zero_point is None or zero_point.ndim == 0:
        fill = jnp.int8(0) if zero_point is None else zero_point.astype(jnp.int8)
        return lax.pad(x, fill, config)
    # Each row has its own code of zero.
    inside = lax.pad(jnp.ones((*x.shape[:-1], 1), bool), False, [*config[:-1], (0, 0, 0)])
    fill = zero_point[..., None].astype(jnp.int8)
    return jnp.where(inside, lax.pad(x, jnp.int8(0), config), fill)


def _scaled(
    sums: jax.Array, inputs: Any, x_scale: jax.Array, weight: Int8Weight, x_zero: Any
) -> jax.Array:
    row = lambda a: a if a.ndim == 0 else a[..., None]
    if weight.zero_point is not None:
        sums = sums - weight.zero_point * inputs()
    if x_zero is not None:
        sums = sums - weight.sums * row(x_zero)
    return sums.astype(jnp.float32) * (weight.scale * row(x_scale))


def _native(
    x: jax.Array, x_scale: jax.Array, weight: Int8Weight, x_zero: Any, window: Window
) -> jax.Array:
    out, space = weight.codes.shape[0], "0123"[: x.ndim - 2]
    sums = lax.conv_general_dilated(
        x,
        weight.codes,
        window.strides,
        "VALID",
        rhs_dilation=window.kernel_dilation,
        dimension_numbers=("N" + space + "C", "O" + space + "I", "N" + space + "C"),
        feature_group_count=window.groups,
        preferred_element_type=jnp.int32,
    )

    def inputs() -> jax.Array:
        """For each output, the sum of the inputs in its window."""
        grouped = x.reshape(*x.shape[:-1], window.groups, -1)
        pixels = jnp.sum(grouped, axis=-1, dtype=jnp.int32)
        found = sum(part for _, part in _shifts(pixels, weight.codes.shape[1:-1], window))
        return jnp.repeat(found, out // window.groups, axis=-1)

    return _scaled(sums, inputs, x_scale, weight, x_zero)


def _patches(
    x: jax.Array, x_scale: jax.Array, weight: Int8Weight, x_zero: Any, window: Window
) -> jax.Array:
    out, *kernel, channels = weight.codes.shape
    if channels == 1 and window.groups > 1:
        return _depthwise(x, x_scale, weight, x_zero, window)
    groups = window.groups
    x = x.reshape(*x.shape[:-1], groups, channels)
    parts = [part for _, part in _shifts(x, kernel, window)]
    patches = jnp.concatenate(parts, axis=-1)
    matrix = jax.tree.map(lambda a: a.reshape(groups, -1), weight._replace(codes=None))
    matrix = matrix._replace(codes=weight.codes.reshape(groups, out // groups, -1))
    if groups == 1:
        matrix = jax.tree.map(lambda a: a[0], matrix)
        return int8_linear(patches[..., 0, :], x_scale, matrix, x_zero)
    x_scale = x_scale if x_scale.ndim == 0 else x_scale[None]
    x_zero = x_zero if x_zero is None or x_zero.ndim == 0 else x_zero[None]
    values = int8_linear(jnp.moveaxis(patches, -2, 0), x_scale, matrix, x_zero)
    values = jnp.moveaxis(values, 0, -2)
    return values.reshape(*values.shape[:-2], out)


def _depthwise(
    x: jax.Array, x_scale: jax.Array, weight: Int8Weight, x_zero: Any, window: Window
) -> jax.Array:
    out, *kernel, _ = weight.codes.shape
    repeat = lambda a: jnp.repeat(a, out // window.groups, axis=-1) if out > window.groups else a
    parts = list(_shifts(x, kernel, window))
    sums = sum(
        repeat(part.astype(jnp.int32)) * weight.codes[(slice(None), *at, 0)].astype(jnp.int32)
        for at, part in parts
    )
    inputs = lambda: repeat(sum(part.astype(jnp.int32) for _, part in parts))
    return _scaled(jnp.asarray(sums), inputs, x_scale, weight, x_zero)


def _shifts(x: jax.Array, kernel: Sequence[int], window: Window) -> Any:
    """What each position of the kernel sees, by position; rows first, then space."""
    steps = list(zip(kernel, window.strides, window.kernel_dilation, strict=True))
    sizes = [
        max(0, (length - (n - 1) * dilation - 1) // stride + 1)
        for length, (n, stride, dilation) in zip(x.shape[1:], steps, strict=False)
    ]
    for at in itertools.product(*map(range, kernel)):
        cut = [
            slice(i * dilation, i * dilation + (size - 1) * stride + 1, stride)
            if size
            else slice(0, 0)
            for i, size, (_, stride, dilation) in zip(at, sizes, steps, strict=True)
        ]
        yield at, x[(slice(None), *cut)]
