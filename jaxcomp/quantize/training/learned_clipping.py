"""Quantization whose range is learned: what lies beyond it is clipped (PACT)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxcomp.arrays.blocks import wide_scale
from jaxcomp.checks import check_amount
from jaxcomp.compression import Compression
from jaxcomp.model.trace import ModelTrace
from jaxcomp.quantize.affine import find_codes, from_codes
from jaxcomp.quantize.checks import check_scales
from jaxcomp.quantize.formats import Format
from jaxcomp.quantize.scales import Scales, find_scales, spread_scales
from jaxcomp.quantize.training.leafwise import (
    LeafRule,
    check_uniform,
    encode_given,
    leafwise,
    stages_of,
)
from jaxcomp.quantize.training.learned_scale import (
    level_limits,
    magnitude,
    used_step,
    with_slope,
)
from jaxcomp.sharding import automatic, spec_like


def learned_clipping(
    format: Format,
    begin: int = 0,
    trace: ModelTrace | None = None,
    bits: Mapping[int, int] | None = None,
    *,
    decay: float = 0.0,
) -> Compression:
    """Train weights and the ranges that they are clipped to (PACT, on weights).

    Each tensor, channel, group or block is clipped to ``[-a, a]`` and rounded to the levels in it.
    ``a`` begins as the largest magnitude at step ``begin`` and is trained by the user's optimizer:
    its gradient is the sum of those of the weights that are clipped, with their signs, and what
    rounding does is left out of it. A weight that is clipped gets no gradient.

    Args:
        format: a uniform one, symmetric.
        begin: the step from which on the forward pass is quantized; dense before.
        trace: of the model; says what the channels of ``PerChannel()`` are, as for :func:`train`.
        bits: by step, how many bits there are from then on, as for :func:`train`. The ranges stay.
        decay: gradient of ``decay / 2 * a**2`` that is added to that of each ``a``. Without it, and
            without a weight decay of the optimizer, only weights that outgrow their range move it.

    Returns:
        A method; it packs to :class:`QuantizedArray` from step ``begin`` on. ``state.learned``
        holds the ranges of each leaf; their magnitude counts. Its functions raise as those of
        :func:`train`.

    Raises:
        TypeError: as :func:`train`; ``decay`` is no number.
        ValueError: likewise; the format is affine, or says how to find its range; ``decay`` is
            negative or not finite.

    Example:
        >>> from jaxcomp.quantize import PerTensor
        >>> method = learned_clipping(Format(bits=2, granularity=PerTensor()))
        >>> params = {"kernel": jnp.array([[-1.0, 0.25], [0.5, 0.75]])}
        >>> state = method.init(params)
        >>> state.learned["kernel"]
        Array([[1.]], dtype=float32)
        >>> method.apply(params, state)["kernel"]
        Array([[-1.,  0.],
               [ 0.,  1.]], dtype=float32)

    Source: Choi et al., "PACT: parameterized clipping activation for quantized neural networks",
    2018, section 3, (1) to (3).
    """
    check_uniform(format)
    check_amount("decay", decay)
    stages = stages_of(format, begin, trace, bits)

    def apply(leaf: Any, clip: Any, format: Format) -> Any:
        if decay:
            clip = _nudge(clip, decay * jax.lax.stop_gradient(clip))
        return fake_quant_clipped(leaf, clip, format)

    def encode(leaf: Any, clip: Any, format: Format) -> Any:
        return encode_given(leaf, _step(clip, None, format, leaf.dtype), format)

    rule = LeafRule(apply, encode, _largest, relearn=False)
    return leafwise(rule, stages, trace)


def fake_quant_clipped(
    x: Float[Array, " *dims"],
    clip: Float[Array, "..."],
    format: Format,
    zero_point: UInt8[Array, "..."] | None = None,
) -> Float[Array, " *dims"]:
    """What clipping and quantizing do to the values, differentiable in the end of the range (PACT).

    The levels end at ``clip``. The gradient to it is 1 for each element at or above it, -1 (of an
    affine format: the ratio of the ends) for each at or below the other end, and 0 between; that
    to ``x`` is 1 between and 0 beyond.

    For activations behind a ReLU, as in the paper: an affine format, a zero point of 0 and one
    number a layer as a parameter of the model, decayed in the loss or by the optimizer.

    Args:
        x: weights or activations, at least one axis; float16, bfloat16 or float32.
        clip: ends of the ranges as they are learned, float32, broadcastable to ``x`` (to split
            blocks where the format has them). Their magnitude counts.
        format: a uniform one.
        zero_point: codes of zero; needed exactly when the format is affine.

    Returns:
        Quantized values, of the shape and dtype of ``x``. NaN stays NaN.

    Raises:
        TypeError: as :func:`jaxcomp.quantize.fake_quant`; the format is not uniform.
        ValueError: as :func:`jaxcomp.quantize.fake_quant`.

    Example:
        >>> x, clip = jnp.array([-1.0, 0.4, 9.0]), jnp.array(1.5)
        >>> run = lambda clip: fake_quant_clipped(x, clip, Format(2, False), jnp.uint8(0))
        >>> run(clip)
        Array([0. , 0.5, 1.5], dtype=float32)
        >>> float(jax.grad(lambda clip: run(clip).sum())(clip))
        1.0

    Source: Choi et al., 2018, section 3, (1) to (3).
    """
    if not isinstance(format, Format):
        raise TypeError(f"ranges are learned in a uniform quantize.Format, not {format!r}")
    if not hasattr(clip, "dtype") or not jnp.issubdtype(clip.dtype, jnp.floating):
        raise TypeError(f"clip must be a floating array, not {clip!r:.60}: cast it")
    if not format.symmetric and zero_point is None:
        raise ValueError(f"{format} takes a zero_point beside clip")
    check_scales(x, format, wide_scale(_step(clip, zero_point, format, x.dtype)), zero_point)
    run = automatic(lambda *arrays: _fake_quant(*arrays, format), spec_like(x, x.shape))
    return run(x, clip, zero_point)


@jax.custom_vjp
def _nudge(x: Array, gradient: Array) -> Array:
    """The identity, whose backward pass adds a gradient: the user's loss never sees what decays."""
    del gradient
    return x


_nudge.defvjp(lambda x, gradient: (x, gradient), lambda gradient, ct: (ct + gradient, None))


def _step(clip: Array, zero_point: Array | None, format: Format, dtype: Any) -> Array:
    """The scales whose last level is the end of the range."""
    _, high = level_limits(format, zero_point)
    return used_step(wide_scale(clip) * (1 / jnp.maximum(high, 1.0)), format, dtype)


def _largest(x: Array, format: Format) -> Array:
    """The largest magnitude of those that share a scale; the largest level where all are zero."""
    wide = dataclasses.replace(format, scale_dtype="float32")
    scale = automatic(lambda x: find_scales(jax.lax.stop_gradient(x), wide).scale)(x)
    return scale * level_limits(format)[1]


# Outside `jit` one program, instead of one for every operation on every shape.
@functools.partial(jax.jit, static_argnums=3)
def _fake_quant(x: Array, clip: Array, zero_point: Array | None, format: Format) -> Array:
    stopped, end = jax.lax.stop_gradient(x), jax.lax.stop_gradient(clip)
    scales = Scales(_step(end, zero_point, format, x.dtype), zero_point)
    codes, _ = find_codes(stopped, scales, format)
    values = from_codes(codes, scales, format, x.dtype)

    def spread(field: Array) -> Array:
        return spread_scales(Scales(field), x.shape, format).scale

    low, high = level_limits(format, zero_point)
    ratio = low / jnp.maximum(high, 1.0)
    end, wide = magnitude(wide_scale(end)), stopped.astype(jnp.float32)
    above, below = wide >= spread(end), wide <= spread(end * ratio)
    slope = jnp.where(above, 1.0, jnp.where(below, spread(ratio), 0.0))
    carrier = spread(magnitude(wide_scale(clip)))
    values = jnp.where(jnp.isnan(stopped), stopped, values)
    return with_slope(x, carrier, values, ~(above | below), slope)
