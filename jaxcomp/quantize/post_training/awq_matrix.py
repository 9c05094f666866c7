"""AWQ on matrices: scales that make the inputs that matter finer, and ranges that clip outliers.

What a candidate costs is measured in the outputs, by the second moment of the inputs: for weights
``W`` that become ``V``, the mean square ``tr((W - V)ᵀ H (W - V))`` with ``H`` the mean of
``x xᵀ``. So no search reads data. Both searches try a fixed grid and keep the best.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxcomp.model.second_moments import output_errors
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.post_training.layout import ScaleLayout
from jaxcomp.quantize.rounding import element_codes, element_values

# In this dtype multipliers are stored: as wide as float32, and whatever it rounds away is in the
# codes, which are of the weights divided by what is stored.
MULTIPLIER_DTYPE = "bfloat16"


class Exponents(NamedTuple):
    """What the search for scales found.

    Attributes:
        exponent: ``(matrices,)`` that was best; 0: no scales.
        multiplier: ``(matrices, features)`` float32, exact in :data:`MULTIPLIER_DTYPE`: by what the
            codes of ``weights / multiplier`` are to be multiplied.
        errors: ``(tried, matrices)`` sums of the outputs' mean squares.
    """

    exponent: Array
    multiplier: Array
    errors: Array


def search_exponents(
    weights: Float[Array, "matrices features outputs"],
    moments: Float[Array, "matrices features features"],
    rounded: Callable[[Array], Array],
    channels: np.ndarray,
    count: int,
) -> Exponents:
    """Find the power of the inputs' sizes by which scaling the weights loses least.

    Features ``i`` are multiplied by ``s_i = r_i**exponent`` before they are rounded and divided by
    it after, with ``r_i`` the root mean square of the inputs of the channel (the paper takes the
    mean magnitude), divided by the geometric mean of its extremes.

    Args:
        weights: float32.
        moments: mean of ``x xᵀ``.
        rounded: what matrices of the same shape become when they are quantized.
        channels: ``(features,)`` the number of each feature's channel, from 0; a channel has one
            scale.
        count: exponents to try: ``0, 1 / count, ...``.

    Returns:
        The best for each matrix; among equals, the smallest exponent.

    Example:
        >>> weights = jnp.array([[[0.9], [7.0]]])
        >>> moments = jnp.diag(jnp.array([100.0, 0.1]))[None]
        >>> found = search_exponents(weights, moments, jnp.round, np.arange(2), 4)
        >>> found.exponent, found.multiplier
        (Array([0.5], dtype=float32), Array([[0.421875, 2.375   ]], dtype=float32))

    Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration", 2023, section 3.2, equations 4 and 5.
    """
    size = _channel_size(moments, channels)

    def multiplier(exponent: Any) -> Array:
        scales = size**exponent
        middle = jnp.sqrt(jnp.max(scales, -1, keepdims=True) * jnp.min(scales, -1, keepdims=True))
        stored = (middle / scales).astype(MULTIPLIER_DTYPE).astype(jnp.float32)
        return stored[:, channels]

    def error(exponent: Any) -> Array:
        by = multiplier(exponent)[:, :, None]
        return jnp.sum(output_errors(weights - rounded(weights / by) * by, moments), axis=-1)

    exponents = jnp.arange(count, dtype=jnp.float32) / count
    errors = lax.map(error, exponents)
    best = exponents[jnp.argmin(errors, axis=0)]
    return Exponents(best, multiplier(best[:, None]), errors)


def _channel_size(moments: jax.Array, channels: np.ndarray) -> jax.Array:
    """Root mean squares ``(matrices, channels)``, none further than 1e4 from the largest."""
    squares = jnp.diagonal(moments, axis1=-2, axis2=-1)
    counts = np.bincount(channels)
    sums = jnp.zeros((len(squares), len(counts)), jnp.float32).at[:, channels].add(squares)
    size = jnp.sqrt(jnp.maximum(sums / counts, 0))
    largest = jnp.max(size, axis=-1, keepdims=True)
    return jnp.where(largest > 0, jnp.maximum(size / jnp.where(largest > 0, largest, 1), 1e-4), 1)


def parts(count: int, bits: int) -> Float[Array, " count"]:
    """The parts of a range that are tried: from 1 down, evenly.

    Args:
        count: how many.
        bits: of the format. With 1 or 2 the best range is often far below the largest weight, so
            that they go down to a tenth; with more to one half, as in the paper's program.

    Example:
        >>> parts(4, bits=4)
        Array([1.   , 0.875, 0.75 , 0.625], dtype=float32)
    """
    smallest = 0.1 if bits < 3 else 0.5
    return 1 - jnp.arange(count, dtype=jnp.float32) * ((1 - smallest) / count)


def search_clipping(
    weights: Float[Array, "matrices features outputs"],
    moments: Float[Array, "matrices features features"],
    scales: Float[Array, "tried matrices groups outputs"],
    zero_point: Int[Array, "matrices groups outputs"] | None,
    layout: ScaleLayout,
    format: AnyFormat,
) -> Int[Array, "matrices groups outputs"]:
    """Choose among scales, for all weights that share one, by the error of the outputs.

    Group after group of features, each choice given those of all others, so that the error never
    grows; with one group (a scale for each output) the best of all choices.

    Args:
        weights: float32.
        moments: mean of ``x xᵀ``.
        scales: candidates for each group of features and each output; the first is the scale that
            all groups begin with.
        zero_point: of all candidates; None unless affine.
        layout: who shares a scale.
        format: what to quantize to.

    Returns:
        Numbers of candidates, the same for all that share a scale.

    Example:
        >>> from jaxcomp.model.matrices import MatrixForm
        >>> from jaxcomp.quantize import Format
        >>> from jaxcomp.quantize.post_training.layout import scale_layout
        >>> layout = scale_layout(MatrixForm((3, 1), (0,), (1,)), Format(2))
        >>> weights, moments = jnp.array([[[1.0], [1.0], [2.0]]]), jnp.eye(3)[None]
        >>> scales = jnp.array([2.0, 1.0]).reshape(2, 1, 1, 1)
        >>> search_clipping(weights, moments, scales, None, layout, Format(2)).ravel()
        Array([1], dtype=int32)

    Source: Lin et al., 2023, who search the range of each group by its own part of the outputs;
    here the other groups' errors count as well.
    """
    matrices, features, outputs = weights.shape
    size = features // layout.groups
    weights = weights[:, layout.order]
    moments = moments[:, layout.order][:, :, layout.order]

    def quantized(weights: Array, scale: Array, zero_point: Array | None) -> Array:
        codes, _ = element_codes(weights, scale, zero_point, format)
        return element_values(codes, scale, zero_point, format)

    def turn(group: Any, carry: Any) -> Any:
        values, pull, chosen = carry
        rows, at = group * size, (slice(None), group, None)
        mine = lax.dynamic_slice_in_dim(weights, rows, size, 1)
        now = lax.dynamic_slice_in_dim(values, rows, size, 1)
        columns = lax.dynamic_slice_in_dim(moments, rows, size, 2)
        block = lax.dynamic_slice_in_dim(columns, rows, size, 1)
        here = lax.dynamic_slice_in_dim(pull, rows, size, 1)
        zero = None if zero_point is None else zero_point[at]

        def change(scale: Array) -> Array:
            moved = now - quantized(mine, scale[at], zero)
            gain = output_errors(moved, block) + 2 * jnp.sum(moved * here, axis=1)
            return _by_mates(gain, layout)

        best = jnp.argmin(lax.map(change, scales), axis=0)
        scale = jnp.take_along_axis(scales[:, :, group], best[None], axis=0)[0]
        new = quantized(mine, scale[:, None], zero)
        pull = pull + jnp.matmul(columns, now - new, precision=lax.Precision.HIGHEST)
        values = lax.dynamic_update_slice_in_dim(values, new, rows, 1)
        return values, pull, chosen.at[:, group].set(best)

    begin = jnp.repeat(scales[0], size, axis=1)
    zero = None if zero_point is None else jnp.repeat(zero_point, size, axis=1)
    values = quantized(weights, begin, zero)
    pull = jnp.matmul(moments, weights - values, precision=lax.Precision.HIGHEST)
    chosen = jnp.zeros((matrices, layout.groups, outputs), jnp.int32)
    return lax.fori_loop(0, layout.groups, turn, (values, pull, chosen))[2]


def _by_mates(x: Float[Array, "matrices outputs"], layout: ScaleLayout) -> Array:
    """Sums over the columns that share a scale, for each of them."""
    if layout.sharing == layout.mates.size:
        return x
    return jnp.zeros(layout.sharing, x.dtype).at[layout.mates].add(x)[layout.mates]
