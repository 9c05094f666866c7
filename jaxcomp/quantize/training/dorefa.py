"""Quantization of weights squashed by a hyperbolic tangent (DoReFa)."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxcomp.arrays import CompressedArray
from jaxcomp.arrays.blocks import merge_blocks, split_blocks
from jaxcomp.compression import Compression
from jaxcomp.kernels.arithmetic import quotient, widen
from jaxcomp.model.trace import ModelTrace
from jaxcomp.quantize.affine import find_codes, from_codes, leaf_of
from jaxcomp.quantize.formats import Format
from jaxcomp.quantize.scales import Scales, find_scales
from jaxcomp.quantize.training.leafwise import (
    LeafRule,
    check_uniform,
    leafwise,
    stages_of,
)
from jaxcomp.quantize.training.learned_scale import used_step, with_slope
from jaxcomp.sharding import automatic, spec_like


def dorefa(
    format: Format,
    begin: int = 0,
    trace: ModelTrace | None = None,
    bits: Mapping[int, int] | None = None,
) -> Compression:
    """Train weights whose tangent is rounded to evenly spaced levels in [-1, 1] (DoReFa).

    With two bits and more the forward pass sees ``tanh(w) / max|tanh(w)|``, rounded to the nearest
    of ``2**bits`` levels from -1 to 1, none of them zero, and the gradient passes through the
    rounding and on by the chain rule. With one bit it sees ``sign(w) * mean|w|``, and the gradient
    passes as it is.

    The largest effective weight of all that share a scale is 1, however small those stored: this is
    for networks that normalize what their layers make, or that are trained so from the start.

    Args:
        format: symmetric, with ``zero=False``. The paper has one scale a tensor, ``PerTensor()``.
        begin: the step from which on the forward pass is quantized; dense before.
        trace: of the model; says what the channels of ``PerChannel()`` are, as for :func:`train`.
        bits: by step, how many bits there are from then on, as for :func:`train`.

    Returns:
        A method; it packs to :class:`QuantizedArray` from step ``begin`` on. Its functions raise as
        those of :func:`train`.

    Raises:
        TypeError: as :func:`train`.
        ValueError: likewise; the format has a level zero, or says how to find its range.

    Example:
        >>> from jaxcomp.quantize import PerTensor
        >>> method = dorefa(Format(bits=1, zero=False, granularity=PerTensor()))
        >>> params = {"kernel": jnp.array([[-1.0, 0.25], [0.5, 0.25]])}
        >>> method.apply(params, method.init(params))["kernel"]
        Array([[-0.5,  0.5],
               [ 0.5,  0.5]], dtype=float32)

    Source: Zhou et al., "DoReFa-Net: training low bitwidth convolutional neural networks with low
    bitwidth gradients", 2016, section 2.2 to 2.3, (5), (7) and (9).
    """
    check_uniform(format)
    if format.zero:
        raise ValueError("DoReFa has no level zero: give a format with zero=False")
    stages = stages_of(format, begin, trace, bits)
    return leafwise(LeafRule(_apply, _encode), stages, trace)


def _apply(leaf: Any, learned: None, format: Format) -> Any:
    del learned
    return automatic(lambda x: _fake_quant(x, format), out=spec_like(leaf, leaf.shape))(leaf)


def _encode(leaf: Any, learned: None, format: Format) -> CompressedArray:
    del learned
    here = spec_like(leaf, leaf.shape)
    run = automatic(lambda x: _codes_jit(x, format), out=(here, PartitionSpec()))
    codes, scales = run(leaf)
    return leaf_of(codes, scales, format, leaf.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _fake_quant(x: Array, format: Format) -> Array:
    squashed = widen(x) if format.bits == 1 else _squash(x, format)
    codes, scales = _codes(jax.lax.stop_gradient(x), format)
    values = from_codes(codes, scales, format, jnp.float32)
    nothing = jnp.zeros_like(values)
    values = with_slope(squashed, nothing, values, jnp.ones(x.shape, bool), nothing)
    # Codes hide a NaN.
    return jnp.where(jnp.isnan(x), jnp.nan, values).astype(x.dtype)


def _squash(x: Array, format: Format) -> Array:
    """``tanh(x) / max|tanh(x)|`` in float32, the maximum over all who share a scale."""
    blocks = format.blocks(x.shape)
    wide = split_blocks(widen(x), blocks)
    # The largest tangent is that of the largest: one reduction that no order of adding can change.
    top = jnp.max(jnp.abs(wide), axis=format.reduced_axes(x.shape), keepdims=True)
    return merge_blocks(quotient(jnp.tanh(wide), jnp.where(top == 0, 1.0, jnp.tanh(top))), blocks)


def _codes(x: Array, format: Format) -> tuple[Array, Scales]:
    if format.bits == 1:
        rounded, scale = widen(x), exact_mean(x, format)
    else:
        rounded = _squash(x, format)
        shape = jax.eval_shape(lambda x: find_scales(x, format).scale, x).shape
        scale = jnp.full(shape, 1 / format.code_range[1], jnp.float32)
    scales = Scales(used_step(scale, format, x.dtype))
    return find_codes(rounded, scales, format)[0], scales


# Outside `jit` one program, instead of one for every operation on every shape.
_codes_jit = jax.jit(_codes, static_argnums=1)


def exact_mean(x: Float[Array, "..."], format: Format) -> Float[Array, "..."]:
    """The mean magnitude of all who share a scale, the same bits in whatever order they are added.

    What training shows and what is packed are sums in different programs, on a mesh over different
    parts. Whole numbers add up alike in all of them: magnitudes are rounded to the multiples of a
    fraction of the largest that is so small that the sum is as good as one in float32.

    Args:
        x: weights.
        format: says who shares a scale.

    Returns:
        Means in float32, shaped as the scales; 1 where everything is zero.

    Example:
        >>> from jaxcomp.quantize import PerTensor
        >>> exact_mean(jnp.array([[-1.0, 0.5]]), Format(1, granularity=PerTensor(), zero=False))
        Array([[0.75]], dtype=float32)
    """
    axes = format.reduced_axes(x.shape)
    size = jnp.abs(split_blocks(widen(x), format.blocks(x.shape)))
    top = jnp.max(size, axis=axes, keepdims=True)
    count = size.size // top.size
    steps = 1 << max(0, min(23, 30 - math.ceil(math.log2(count))))
    parts = jnp.round(quotient(size, jnp.where(top == 0, 1.0, top)) * steps)
    total = jnp.sum(parts.astype(jnp.int32), axis=axes, keepdims=True)
    mean = total.astype(jnp.float32) * (1 / (steps * count)) * top
    return jnp.where(top == 0, 1.0, mean)
