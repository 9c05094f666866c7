"""One product in integers: its data rounded to codes, multiplied, scaled and laid out as before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.kernels.int8 import Int8Weight, int8_linear, signed
from jaxcomp.kernels.int8_conv import Window, int8_conv
from jaxcomp.model.program import Op
from jaxcomp.quantize.activations.bounds import Bounds, is_symmetric
from jaxcomp.quantize.affine import find_codes
from jaxcomp.quantize.formats import AnyFormat, Format, PerChannel, PerTensor
from jaxcomp.quantize.integer.weights import Layout, Unfit
from jaxcomp.quantize.scales import effective_scale, find_scales, scales_of

_SUMS = 1 << 31


class Codes(NamedTuple):
    """Activations as integers: ``(codes - zero_point) * scale``.

    Attributes:
        codes: int8, of the activation's shape.
        scale: float32, of as many axes (size 1 where shared).
        zero_point: int32, likewise; None if symmetric.
    """

    codes: Any
    scale: Any
    zero_point: Any


def check_activations(format: AnyFormat) -> None:
    """Raise :class:`Unfit` unless a format makes integers whose scales leave a sum as one."""
    if not isinstance(format, Format):
        raise Unfit(f"{format} does not make integers: use a Format")
    if not format.zero:
        raise Unfit("a format without zero has no code for padding: use one with zero=True")
    if not isinstance(format.granularity, PerTensor | PerChannel):
        raise Unfit(f"{format.granularity} gives inputs that are added up scales of their own")


def check_sums(inputs: int, format: Format, weight_step: int) -> None:
    """Raise :class:`Unfit` if the sum over so many inputs could exceed 32 bits."""
    low, high = format.code_range
    if inputs * (high if low < 0 else high - low) * weight_step >= _SUMS:
        raise Unfit(f"the sum of its {inputs} products of 8 bits could exceed 32 bits")


def find_integers(x: jax.Array, format: Format, bounds: Bounds | None) -> Codes:
    """Round activations, by the range that they have or by one that is given.

    The codes are those that fake quantization rounds to. Where ``x`` is NaN so is its scale, as no
    code can be.

    Args:
        x: activations, floating.
        format: what to quantize to.
        bounds: as :func:`jaxcomp.quantize.activations.bounds.fake_quant_within` takes them, or
            None: the range of ``x``.

    Example:
        >>> x, format = jnp.array([[-1.0, 1.27]]), Format(8, granularity=PerTensor())
        >>> find_integers(x, format, None).codes.tolist()
        [[-100, 127]]
    """
    if bounds is None:
        scales = find_scales(x, format)
    else:
        low, high = bounds
        if is_symmetric(format):
            low, high = None, jnp.maximum(-low, high)
        scales = scales_of(low, high, format, x.dtype)
    scale = effective_scale(scales)
    codes, _ = find_codes(x, scales, format)
    # Codes of fewer bits begin at 0 too, or at the middle of their own range.
    zero_point, shift = None, 128 - (1 << (format.bits - 1))
    if scales.zero_point is None:
        codes = codes + jnp.uint8(shift)
    else:
        zero_point = scales.zero_point.astype(jnp.int32) - 128
    if bounds is not None:
        axes = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
        broken = jnp.any(jnp.isnan(x), axis=axes, keepdims=True)
        scale = jnp.where(broken, jnp.nan, scale)
    return Codes(signed(codes), scale, zero_point)


def product(op: Op, operand: int, layout: Layout, x: Codes, weight: Int8Weight) -> jax.Array:
    """What an operation makes of activations and a weight, computed in integers.

    Args:
        op: a dot or a convolution.
        operand: which of its inputs the activations are.
        layout: of the weight, which is the other input.
        x: the activations.
        weight: one layer's.

    Returns:
        The result in the layout and dtype of the operation's output.
    """
    values = _conv(op, x, weight) if layout.conv else _dot(op, operand, layout, x, weight)
    return values.astype(op.outputs[0].dtype)


def _dot(op: Op, operand: int, layout: Layout, x: Codes, weight: Int8Weight) -> jax.Array:
    contracted, batch = op.params["dimension_numbers"]
    mine, along = tuple(contracted[operand]), tuple(batch[operand])
    rank = x.codes.ndim
    rows = tuple(axis for axis in range(rank) if axis not in (*mine, *along))

    def rows_first(a: Any) -> Any:
        a = a.transpose(*along, *rows, *mine)
        return a.reshape(*a.shape[: rank - len(mine)], -1)

    def of_rows(a: Any) -> Any:
        return a.reshape(()) if a.size == 1 else rows_first(a)[..., 0]

    zero_point = None if x.zero_point is None else of_rows(x.zero_point)
    grouped = weight.codes.ndim == layout.batch + 3
    values = int8_linear(rows_first(x.codes), of_rows(x.scale), weight, zero_point, grouped=grouped)
    shape = op.inputs[1 - operand].shape
    first = layout.order[layout.batch : layout.batch + layout.outputs]
    values = values.reshape(*values.shape[:-1], *(shape[axis] for axis in first))
    if operand == 1:
        # A dot's result has the free axes of its left operand first: here the weight's.
        lead, count = len(along), len(first)
        at = tuple(range(values.ndim - count, values.ndim))
        values = jnp.moveaxis(values, at, tuple(range(lead, lead + count)))
    return values


def _conv(op: Op, x: Codes, weight: Int8Weight) -> jax.Array:
    numbers = op.params["dimension_numbers"]
    row, channels, *space = numbers.lhs_spec
    order = (row, *space, channels)

    def of_rows(a: Any) -> Any:
        return a.reshape(()) if a.size == 1 else a.transpose(order)[..., 0]

    window = Window(
        tuple(op.params["window_strides"]),
        tuple(tuple(pair) for pair in op.params["padding"]),
        tuple(op.params["lhs_dilation"]),
        tuple(op.params["rhs_dilation"]),
        op.params["feature_group_count"],
    )
    zero_point = None if x.zero_point is None else of_rows(x.zero_point)
    values = int8_conv(x.codes.transpose(order), of_rows(x.scale), weight, window, zero_point)
    rows, outputs, *around = numbers.out_spec
    places = dict(zip((rows, *around, outputs), range(values.ndim), strict=True))
    return values.transpose([places[axis] for axis in range(values.ndim)])
