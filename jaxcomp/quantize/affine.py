"""Uniform quantization of one array: range, codes, and the straight-through estimator."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, UInt8

from jaxcomp.arrays import QuantizedArray
from jaxcomp.arrays.bits import pack_bits
from jaxcomp.arrays.quantized import dequantize, merge_groups, split_groups
from jaxcomp.quantize.checks import check_quantizable, check_scales
from jaxcomp.quantize.formats import Format
from jaxcomp.sharding import automatic, spec_like
from jaxcomp.tree import check_weight

# Below half of it XLA flushes weights to zero, which is then still within half a step.
_TINY = 2.0**-125


def find_range(
    x: Float[Array, "..."], format: Format
) -> tuple[Float[Array, "..."], UInt8[Array, "..."] | None]:
    """Scale and zero point by which every value of ``x`` is within half a step of a code.

    Symmetric: ``scale = max|x| / (2**(bits-1) - 1)``. Affine: ``scale = (max(x, 0) - min(x, 0)) /
    (2**bits - 1)``, and the zero point is rounded to a code (Jacob et al., 2018, section 3).

    Args:
        x: weights, any floating dtype.
        format: what to quantize to.

    Returns:
        Scale, float32, one axis per axis of ``x`` (size 1 where shared; with groups, one axis
        more), never zero; and the zero point as ``uint8`` codes of the same shape, None if
        symmetric.

    Raises:
        ValueError: the format does not fit the shape of ``x``.

    Example:
        >>> find_range(jnp.array([[-1.0], [3.5]]), Format(bits=4))
        (Array([[0.5]], dtype=float32), None)
    """
    axes = format.reduced_axes(x.shape)
    wide = _split(_widen(x), format)
    steps = format.code_range[1]
    if format.symmetric:
        largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
        return _bounded(largest * (1 / steps), steps, x.dtype), None
    low = jnp.minimum(jnp.min(wide, axis=axes, keepdims=True), 0)
    high = jnp.maximum(jnp.max(wide, axis=axes, keepdims=True), 0)
    # Halves: their difference cannot overflow, nor change when it is compiled to a fused
    # multiply-add, so that the scale is the same to the bit inside and outside `jit`.
    scale = (high * 0.5 - low * 0.5) * (2 / steps)
    zero_point = _round(-low, _bounded(scale, 1, x.dtype))
    scale = _bounded(scale, jnp.maximum(zero_point, steps - zero_point), x.dtype)
    zero_point = jnp.clip(_round(-low, scale), 0, steps)
    return scale, zero_point.astype(jnp.uint8)


def _bounded(scale: jax.Array, reach: jax.Array | int, dtype: jnp.dtype) -> jax.Array:
    """Scales whose first ``reach`` multiples stay finite in ``dtype``; 1 for weights all zero.

    Where they would not, the scale grows until the largest finite number is one of them: then
    nothing finite rounds to more.
    """
    largest = float(jnp.finfo(dtype).max) * (1 - 2**-20)
    scale = jnp.where(scale == 0, 1.0, jnp.maximum(scale, _TINY))
    multiples = jnp.minimum(jnp.floor(largest / scale * (1 + 2**-18)), reach)
    limit = largest / multiples
    return jnp.where(multiples < reach, limit, jnp.minimum(scale, limit)).astype(jnp.float32)


def _widen(x: jax.Array) -> jax.Array:
    """``x`` in float32, and as it is: XLA would take the unrounded result of an earlier operation.

    It does so with bfloat16 inside ``jit``, for excess precision; the codes would not be those of
    the weights that the program returns.
    """
    wide = x.astype(jnp.float32)
    if x.dtype != jnp.bfloat16:
        return wide
    return jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)


def _round(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The multiple of ``scale`` nearest to ``x``, ties to even, as a floating number.

    By the reciprocal, as XLA divides in some programs and not in others: the codes must not depend
    on that. The reciprocal of the largest scales would be subnormal, which XLA flushes to zero.
    """
    large = scale > 2.0**125
    scale = jnp.where(large, scale * 0.25, scale)
    return jnp.round(jnp.where(large, x * 0.25, x) * (1 / scale))


def _split(x: jax.Array, format: Format) -> jax.Array:
    group = format.group(x.shape)
    return x if group is None else split_groups(x, *group)


def find_codes(
    x: Float[Array, " *dims"],
    scale: Float[Array, "..."],
    zero_point: UInt8[Array, "..."] | None,
    format: Format,
) -> tuple[UInt8[Array, " *dims"], Array]:
    """Codes of ``x`` by rounding to the nearest (ties to even), and where no clipping was needed.

    Args:
        x: weights.
        scale: from :func:`find_range`, or chosen.
        zero_point: likewise; None if symmetric.
        format: what to quantize to.

    Returns:
        Unsigned codes in the shape of ``x`` (a symmetric format offsets them by
        ``2**(bits-1)``), and booleans of that shape: True inside the range.

    Example:
        >>> codes, inside = find_codes(jnp.array([0.5, -9.0]), jnp.array([0.5]), None, Format(4))
        >>> codes.tolist(), inside.tolist()
        ([9, 1], [True, False])
    """
    group = format.group(x.shape)
    # Scales may be stored in 16 bits; too few to divide in.
    dtype = jnp.promote_types(scale.dtype, jnp.float32)
    low, high = format.code_range
    rounded = _round(_split(_widen(x).astype(dtype), format), scale.astype(dtype))
    if zero_point is not None:
        rounded = rounded + zero_point.astype(rounded.dtype)
    inside = (rounded >= low) & (rounded <= high)
    offset = 1 << (format.bits - 1) if format.symmetric else 0
    codes = (jnp.clip(rounded, low, high).astype(jnp.int32) + offset).astype(jnp.uint8)
    if group is not None:
        codes, inside = merge_groups(codes, group[1]), merge_groups(inside, group[1])
    return codes, inside


def encode(x: Float[Array, "..."], format: Format) -> QuantizedArray:
    """Quantize an array and pack its codes.

    Args:
        x: weights, at least one axis; float16, bfloat16 or float32.
        format: bits, symmetry and granularity.

    Returns:
        A leaf whose every value is within half a step of ``x`` (Jacob et al., 2018, section 2.1),
        laid out on explicit mesh axes as ``x`` is.

    Raises:
        TypeError: not a floating array of at most 32 bits.
        ValueError: NaN or infinite values, no elements, or a format that does not fit the shape.

    Example:
        >>> encode(jnp.array([[-1.0, 0.2], [0.6, 7.0]]), Format(bits=4)).decode()
        Array([[-1.       ,  0.       ],
               [ 0.5714286,  7.       ]], dtype=float32)
    """
    check_quantizable("x", x, format)
    check_weight("x", x)
    spec = _scale_spec(x, format)
    run = automatic(
        lambda x: _quantize_jit(x, format),
        out=(spec_like(x, x.shape), spec, None if format.symmetric else spec),
    )
    codes, scale, zero_point = run(x)
    return QuantizedArray(
        codes=pack_bits(codes, format.bits),
        scale=scale,
        zero_point=zero_point,
        bits=format.bits,
        length=x.shape[-1],
        group=format.group(x.shape),
        dense_dtype=jnp.dtype(x.dtype),
    )


def _quantize(x: jax.Array, format: Format) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    scale, zero_point = find_range(x, format)
    codes, _ = find_codes(x, scale, zero_point, format)
    return codes, scale, zero_point


# Outside `jit` one program, instead of one for every operation on every shape.
_quantize_jit = jax.jit(_quantize, static_argnums=1)


def _scale_spec(x: jax.Array, format: Format) -> PartitionSpec:
    """Where the scales of ``x`` lie on explicit mesh axes."""
    shape, group = list(x.shape), format.group(x.shape)
    for axis in format.reduced_axes(x.shape):
        shape[axis] = 1 if group is None else shape[axis] // group[0]
    spec = list(spec_like(x, tuple(shape)))
    if group is not None and spec:
        spec.insert(x.ndim + group[1] + 1, None)
    return PartitionSpec(*spec)


def fake_quant(
    x: Float[Array, " *dims"],
    format: Format,
    scale: Float[Array, "..."] | None = None,
    zero_point: UInt8[Array, "..."] | None = None,
) -> Float[Array, " *dims"]:
    """What quantizing does to the values, with a gradient that training can use.

    The straight-through estimator (Bengio et al., 2013, section 4): the gradient passes unchanged
    where ``x`` is inside the range and is zero where it is clipped. The range that is found when
    no ``scale`` is given holds all of ``x``.

    Args:
        x: weights or activations, at least one axis; float16, bfloat16 or float32.
        format: bits, symmetry and granularity.
        scale: step sizes to use instead of those that cover all of ``x``; broadcastable to ``x``
            (to split groups where the format has them). No gradient goes to them.
        zero_point: codes of zero for ``scale``; needed exactly when the format is affine.

    Returns:
        ``encode(x, format).decode()``, bit for bit, where no ``scale`` is given. NaN or infinite
        values make everything that shares their scale NaN or infinite.

    Raises:
        TypeError: ``x`` is not a floating array of at most 32 bits; scale or zero point are of
            another type.
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
    run = automatic(lambda x, *given: _fake_quant_jit(x, format, *given), out=spec_like(x, x.shape))
    return run(x) if scale is None else run(x, scale, zero_point)


def _fake_quant(
    x: jax.Array,
    format: Format,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
) -> jax.Array:
    stopped = jax.lax.stop_gradient(x)
    if scale is None:
        codes, scale, zero_point = _quantize(stopped, format)
        inside = jnp.ones((), bool)
    else:
        scale = jax.lax.stop_gradient(scale)
        codes, inside = find_codes(stopped, scale, zero_point, format)
    values = dequantize(
        codes,
        scale,
        zero_point,
        bits=format.bits,
        group=format.group(x.shape),
        dtype=x.dtype,
    )
    return _straight_through(x, values, inside)


_fake_quant_jit = jax.jit(_fake_quant, static_argnums=1)


@jax.custom_jvp
def _straight_through(x: jax.Array, values: jax.Array, inside: jax.Array) -> jax.Array:
    """``values``, with the derivative of ``x`` where ``inside``."""
    del x, inside
    return values


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    # Its own function again, not only the values: second derivatives are straight through too.
    values = _straight_through(*primals)
    return values, jnp.where(primals[2], tangents[0], jnp.zeros_like(tangents[0]))
