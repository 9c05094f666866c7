"""Fake quantization of one array whose step size is learned: LSQ's gradient."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxcomp.arrays.blocks import wide_scale
from jaxcomp.checks import check_count
from jaxcomp.quantize.affine import find_codes, from_codes
from jaxcomp.quantize.checks import check_quantizable, check_scales
from jaxcomp.quantize.formats import Format
from jaxcomp.quantize.scales import Scales, find_scales, spread_scales
from jaxcomp.quantize.training.learned_scale import (
    level_limits,
    magnitude,
    used_step,
    with_slope,
)
from jaxcomp.sharding import automatic, spec_like


def fake_quant_learned(
    x: Float[Array, " *dims"],
    scale: Float[Array, "..."],
    format: Format,
    zero_point: UInt8[Array, "..."] | None = None,
    *,
    count: int | None = None,
) -> Float[Array, " *dims"]:
    """What quantizing does to the values, differentiable in the step size too (LSQ).

    With ``low`` and ``high`` the first and last level in multiples of the step, the gradient
    to the step is ``round(x / scale) - x / scale`` inside the range, ``low`` below it and ``high``
    above it, and that to ``x`` is 1 inside and 0 outside. The former is multiplied by
    ``1 / sqrt(count * high)``, so that a step moves, in proportion, about as fast as the weights.

    For activations: learn one number a layer as a parameter of the model, begun at
    :func:`initial_step` of a first batch. Behind a ReLU the format is affine and the zero point 0,
    so that all codes are for positive values.

    Args:
        x: weights or activations, at least one axis; float16, bfloat16 or float32.
        scale: step sizes as they are learned, float32, broadcastable to ``x`` (to split blocks
            where the format has them). Their magnitude counts: an optimizer that oversteps zero
            finds a small positive step on the other side.
        format: a uniform one. Symmetric codes are as many below zero as above; the paper has one
            more below.
        zero_point: codes of zero; needed exactly when the format is affine. Not learned.
        count: how many elements share a step; those of ``x`` if None. For activations give those
            of one example, or the speed of learning hangs on the batch size.

    Returns:
        Quantized values, of the shape and dtype of ``x``. NaN stays NaN.

    Raises:
        TypeError: as :func:`jaxcomp.quantize.fake_quant`.
        ValueError: likewise; ``count`` is below 1.

    Example:
        >>> x, scale = jnp.array([0.375, 9.0]), jnp.array([0.5])
        >>> fake_quant_learned(x, scale, Format(bits=2))
        Array([0.5, 0.5], dtype=float32)
        >>> loss = lambda scale: fake_quant_learned(x, scale, Format(bits=2), count=4).sum()
        >>> jax.grad(loss)(scale)  # (1 - 0.75 + 1) / sqrt(4 * 1)
        Array([0.625], dtype=float32)

    Source: Esser et al., "Learned step size quantization", ICLR 2020, section 2, (1) to (3), and
    section 2.2.
    """
    _check_uniform(format)
    if not hasattr(scale, "dtype") or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"scale must be a floating array, not {scale!r:.60}: cast it")
    check_scales(x, format, wide_scale(used_step(scale, format, x.dtype)), zero_point)
    if count is not None:
        check_count("count", count)
    share = x.size // scale.size if count is None else count

    run = automatic(lambda *arrays: _fake_quant(*arrays, format, share), spec_like(x, x.shape))
    return run(x, scale, zero_point)


def initial_step(
    x: Float[Array, "..."], format: Format, zero_point: UInt8[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """Where LSQ begins: ``2 * mean(|x|) / sqrt(high)``.

    Args:
        x: weights, or the activations of a first batch.
        format: bits, symmetry and granularity.
        zero_point: codes of zero, of an affine format; None: 0.

    Returns:
        Step sizes, float32, shaped as :func:`jaxcomp.quantize.scales.find_scales` gives them; 1
        where everything is zero.

    Raises:
        TypeError: as :func:`jaxcomp.quantize.fake_quant`.
        ValueError: likewise.

    Example:
        >>> initial_step(jnp.array([[-1.0], [0.5]]), Format(bits=2))  # 2 * 0.75 / sqrt(1)
        Array([[1.5]], dtype=float32)

    Source: Esser et al., ICLR 2020, section 2.1.
    """
    _check_uniform(format)
    check_quantizable("x", x, format)
    return automatic(lambda *arrays: _initial_step(*arrays, format))(x, zero_point)


def _check_uniform(format: Any) -> None:
    if not isinstance(format, Format):
        raise TypeError(f"steps are learned in a uniform quantize.Format, not {format!r}")


# Outside `jit` one program, instead of one for every operation on every shape.
@functools.partial(jax.jit, static_argnums=2)
def _initial_step(x: Array, zero_point: Array | None, format: Format) -> Array:
    shape = jax.eval_shape(lambda x: find_scales(x, format).scale, x).shape
    # Whoever shares a step is whom a step is spread over.
    spread = lambda step: spread_scales(Scales(step), x.shape, format).scale
    add_up = jax.linear_transpose(spread, jnp.zeros(shape))
    (total,) = add_up(jnp.abs(jax.lax.stop_gradient(x).astype(jnp.float32)))
    mean = total / (x.size // math.prod(shape))
    high = jnp.maximum(level_limits(format, zero_point)[1], 1.0)
    # Without zero the levels are odd multiples of half a step.
    step = (2 if format.zero else 1) * mean / jnp.sqrt(high)
    return jnp.where(step > 0, step, 1.0)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _fake_quant(
    x: Array, scale: Array, zero_point: Array | None, format: Format, share: int
) -> Array:
    step = used_step(jax.lax.stop_gradient(scale), format, x.dtype)
    stopped, scales = jax.lax.stop_gradient(x), Scales(step, zero_point)
    codes, _ = find_codes(stopped, scales, format)
    values = from_codes(codes, scales, format, x.dtype)
    level = from_codes(codes, scales._replace(scale=jnp.ones_like(step)), format, jnp.float32)

    def spread(field: Array) -> Array:
        return spread_scales(Scales(field), x.shape, format).scale

    low, high = level_limits(format, zero_point)
    ratio = stopped.astype(jnp.float32) / spread(step)
    inside = (ratio > spread(low)) & (ratio < spread(high))
    slope = level - jnp.where(inside, ratio, 0.0)
    # The last code can be that of zero.
    factor = jax.lax.rsqrt(share * jnp.maximum(high, 1.0))
    # Only the derivative of what carries the scale is used, never its value.
    carrier = spread(magnitude(wide_scale(scale)) * factor)
    return with_slope(x, carrier, jnp.where(jnp.isnan(stopped), stopped, values), inside, slope)
