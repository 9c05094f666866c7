"""Quantizing one array: codes, leaves, and the straight-through estimator."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped, UInt8

from jaxcomp.arrays import CompressedArray, GridArray, QuantizedArray
from jaxcomp.arrays.bits import pack_bits
from jaxcomp.arrays.blocks import merge_blocks, split_blocks
from jaxcomp.arrays.grid import grid_values
from jaxcomp.arrays.quantized import dequantize
from jaxcomp.checks import check_key
from jaxcomp.kernels.fake_quant.rounding import Rounding
from jaxcomp.marks import mark
from jaxcomp.quantize.checks import check_quantizable, check_scales
from jaxcomp.quantize.formats import AnyFormat, Format, PerChannel
from jaxcomp.quantize.ranges import AbsMax
from jaxcomp.quantize.rounding import element_codes
from jaxcomp.quantize.scales import Scales, effective_scale, find_scales
from jaxcomp.sharding import automatic, spec_like
from jaxcomp.tree import check_weight


def find_codes(
    x: Float[Array, " *dims"], scales: Scales, format: AnyFormat, key: Array | None = None
) -> tuple[UInt8[Array, " *dims"], Array]:
    """Codes of ``x`` by rounding, and where no clipping was needed.

    Args:
        x: weights.
        scales: from :func:`find_scales`, or chosen.
        format: what to quantize to.
        key: rounds stochastically; None: to the nearest, as :func:`element_codes` says.

    Returns:
        Unsigned codes in the shape of ``x`` (a symmetric format with zero offsets them by
        ``2**(bits-1)``), and booleans of that shape: True inside the range.

    Example:
        >>> scales = Scales(jnp.array([0.5]))
        >>> codes, inside = find_codes(jnp.array([0.5, -9.0]), scales, Format(4))
        >>> codes.tolist(), inside.tolist()
        ([9, 1], [True, False])
    """
    blocks = format.blocks(x.shape)
    split = split_blocks(x, blocks)
    codes, inside = element_codes(split, effective_scale(scales), scales.zero_point, format, key)
    return merge_blocks(codes, blocks), merge_blocks(inside, blocks)


def from_codes(
    codes: UInt8[Array, " *dims"], scales: Scales, format: AnyFormat, dtype: Any
) -> Float[Array, " *dims"]:
    """The values that codes stand for, the same bits as the leaf made of them decodes to.

    Args:
        codes: from :func:`find_codes`, or chosen.
        scales: that they were found with.
        format: likewise.
        dtype: of the values.

    Example:
        >>> scales = Scales(jnp.array([0.5]))
        >>> from_codes(jnp.array([9, 1], jnp.uint8), scales, Format(4), jnp.float32)
        Array([ 0.5, -3.5], dtype=float32)
    """
    blocks = format.blocks(codes.shape)
    if not isinstance(format, Format):
        return grid_values(
            codes,
            scales.scale,
            scales.tensor_scale,
            element=format.element,
            blocks=blocks,
            dtype=dtype,
        )
    return dequantize(
        codes,
        scales.scale,
        scales.zero_point,
        bits=format.bits,
        blocks=blocks,
        dtype=dtype,
        zero=format.zero,
    )


def leaf_of(
    codes: UInt8[Array, " *dims"], scales: Scales, format: AnyFormat, dtype: Any
) -> CompressedArray:
    """Codes packed into a leaf beside their scales.

    Args:
        codes: from :func:`find_codes`, or chosen.
        scales: that they were found with.
        format: likewise.
        dtype: of the dense array.

    Returns:
        A :class:`QuantizedArray`, or a :class:`GridArray` for a :class:`GridFormat`.

    Example:
        >>> scales = Scales(jnp.array([0.5]))
        >>> leaf_of(jnp.array([9, 1], jnp.uint8), scales, Format(4), jnp.float32)
        QuantizedArray(shape=(2,), dtype=float32, int4 symmetric, 1 scale, 5 bytes)
    """
    packed, length = pack_bits(codes, format.bits), codes.shape[-1]
    blocks = format.blocks(codes.shape)
    if not isinstance(format, Format):
        return GridArray(
            packed, scales.scale, scales.tensor_scale, format.element, length, blocks, dtype
        )
    return QuantizedArray(
        packed,
        scales.scale,
        scales.zero_point,
        format.bits,
        length,
        blocks,
        dtype,
        format.zero,
    )


def encode(
    x: Float[Array, "..."], format: AnyFormat, *, key: Array | None = None
) -> CompressedArray:
    """Quantize an array and pack its codes.

    Args:
        x: weights, at least one axis; float16, bfloat16 or float32.
        format: what to quantize to.
        key: rounds stochastically; None: to the nearest.

    Returns:
        A leaf whose every value is within half a step of ``x`` where the range holds it (Jacob et
        al., 2018, section 2.1), laid out on explicit mesh axes as ``x`` is.

    Raises:
        TypeError: not a floating array of at most 32 bits, or ``key`` is no PRNG key.
        ValueError: NaN or infinite values, no elements, or a format that does not fit the shape.

    Example:
        >>> encode(jnp.array([[-1.0, 0.2], [0.6, 7.0]]), Format(bits=4)).decode()
        Array([[-1.       ,  0.       ],
               [ 0.5714286,  7.       ]], dtype=float32)
    """
    check_quantizable("x", x, format)
    check_weight("x", x)
    if key is not None:
        check_key(key)
    out = (spec_like(x, x.shape), _scales_spec(x, format))
    run = automatic(lambda x, *key: _quantize_jit(x, format, *key), out=out)
    codes, scales = run(x) if key is None else run(x, key)
    return leaf_of(codes, scales, format, x.dtype)


def _quantize(
    x: jax.Array, format: AnyFormat, key: jax.Array | None = None
) -> tuple[jax.Array, Scales]:
    scales = find_scales(x, format)
    codes, _ = find_codes(x, scales, format, key)
    return codes, scales


# Outside `jit` one program, instead of one for every operation on every shape.
_quantize_jit = jax.jit(_quantize, static_argnums=1)


def _scales_spec(x: jax.Array, format: AnyFormat) -> Scales:
    """Where the scales of ``x`` lie on explicit mesh axes."""
    shape, blocks = list(x.shape), format.blocks(x.shape)
    sizes = {axis: size for size, axis in blocks}
    for axis in sizes or format.reduced_axes(x.shape):
        shape[axis] = shape[axis] // sizes[axis] if sizes else 1
    spec = list(spec_like(x, tuple(shape)))
    if spec:
        for _, axis in reversed(blocks):
            spec.insert(x.ndim + axis + 1, None)
    affine = isinstance(format, Format) and not format.symmetric
    whole = not isinstance(format, Format) and format.tensor_scale
    here = PartitionSpec(*spec)
    return Scales(here, here if affine else None, PartitionSpec() if whole else None)


def fake_quant(
    x: Float[Array, " *dims"],
    format: AnyFormat,
    scale: Shaped[Array, "..."] | None = None,
    zero_point: UInt8[Array, "..."] | None = None,
    *,
    key: Array | None = None,
) -> Float[Array, " *dims"]:
    """What quantizing does to the values, with a gradient that training can use.

    The straight-through estimator (Bengio et al., 2013, section 4): the gradient passes unchanged
    where ``x`` is inside the range and is zero where it is clipped, whether the range is given or
    found. With the default range, :class:`AbsMax` and scales in float32, it holds all of ``x``.

    Args:
        x: weights or activations, at least one axis; float16, bfloat16 or float32.
        format: what to quantize to.
        scale: step sizes to use instead of those that the format finds; broadcastable to ``x`` (to
            split blocks where the format has them). No gradient goes to them. A format with a
            tensor scale takes it multiplied in.
        zero_point: codes of zero for ``scale``; needed exactly when the format is affine.
        key: rounds stochastically; None: to the nearest.

    Returns:
        ``encode(x, format, key=key).decode()``, bit for bit, if no ``scale`` is given. NaN or
        infinite values make everything that shares their scale NaN or infinite; with a ``scale``,
        NaN stays NaN, and infinite values are clipped.

    Raises:
        TypeError: ``x`` is not a floating array of at most 32 bits; scale, zero point or
            key are of another type.
        ValueError: no elements; the format does not fit, or scale and zero point do not fit the
            format; a scale that is known is not positive and finite.

    Example:
        >>> x = jnp.array([0.4, 9.0])
        >>> jax.grad(lambda x: fake_quant(x, Format(4), jnp.array([0.5])).sum())(x)
        Array([1., 0.], dtype=float32)
    """
    if scale is None:
        check_quantizable("x", x, format)
        if zero_point is not None:
            raise ValueError("zero_point was given without scale: give both or neither")
    else:
        check_scales(x, format, scale, zero_point)
    if key is not None:
        check_key(key)
    # Keys and scales may be absent; what is there is passed, so that it may be sharded.
    given = {"scale": scale, "zero_point": zero_point, "key": key}
    given = {name: value for name, value in given.items() if value is not None}
    run = automatic(lambda x, given: _fake_quant_jit(x, format, **given), out=spec_like(x, x.shape))
    return run(x, given)


def _fake_quant(
    x: jax.Array,
    format: AnyFormat,
    *,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    stopped = jax.lax.stop_gradient(x)
    if scale is None:
        scales = find_scales(stopped, format)
    else:
        scales = Scales(jax.lax.stop_gradient(scale), zero_point)
    codes, inside = find_codes(stopped, scales, format, key)
    values = from_codes(codes, scales, format, x.dtype)
    rounding = _rounding(format, x.shape) if key is None else None
    if scale is None and _holds_all(format):
        return _with_all(rounding, x, values)
    # Integers have no code for it.
    values = jnp.where(jnp.isnan(stopped), stopped, values)
    return _with_inside(rounding, x, values, inside, scales.scale, scales.zero_point)


def _rounding(format: AnyFormat, shape: tuple[int, ...]) -> Rounding | None:
    """The same rounding to a kernel; None where no kernel knows it."""
    if not isinstance(format, Format):
        return None
    axis = format.granularity.axis if isinstance(format.granularity, PerChannel) else None
    return Rounding(format.bits, format.symmetric, axis, format.blocks(shape), format.zero)


def _holds_all(format: AnyFormat) -> bool:
    """Whether the range that is found clips nothing, so that no gradient need be stopped."""
    return isinstance(format.range, AbsMax) and format.scale_dtype == "float32"


_fake_quant_jit = jax.jit(_fake_quant, static_argnums=1)


# A model's reader finds the mark, so that a kernel may round the array on its way into a product.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_all(rounding: Rounding | None, x: jax.Array, values: jax.Array) -> jax.Array:
    """``values``, with the derivative of ``x``: nothing is kept for the backward pass."""
    del x
    return values if rounding is None else mark(values, "fake_quant", *rounding)


@_with_all.defjvp
def _with_all_jvp(rounding, primals, tangents):
    # Its own function again, not only the values: second derivatives are straight through too.
    return _with_all(rounding, *primals), tangents[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_inside(
    rounding: Rounding | None,
    x: jax.Array,
    values: jax.Array,
    inside: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
) -> jax.Array:
    """``values``, with the derivative of ``x`` where ``inside``."""
    del x, inside, scale, zero_point
    return values if rounding is None else mark(values, "fake_quant", *rounding)


@_with_inside.defjvp
def _with_inside_jvp(rounding, primals, tangents):
    values = _with_inside(rounding, *primals)
    return values, jnp.where(primals[2], tangents[0], jnp.zeros_like(tangents[0]))
