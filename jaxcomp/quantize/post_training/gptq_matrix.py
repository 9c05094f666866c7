"""GPTQ of one matrix: a walk over its features, block by block.

Each feature's weights are rounded, and the features still to come make up for the error as far as
the data lets them. Everything is a loop of ``lax``, however many features there are.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt8

from jaxcomp.checks import check_count
from jaxcomp.model.second_moments import check_matrix, dot, inverse_factor
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.rounding import element_codes, element_values


def gptq_matrix(
    weight: Float[Any, "features outputs"],
    second_moment: Float[Any, "_ _"],
    scale: Float[Any, "..."],
    zero_point: Any,
    format: AnyFormat,
    *,
    block_size: int = 128,
    damping: Any = 0.01,
    order: bool = True,
) -> UInt8[Array, "features outputs"]:
    """Round weights feature by feature, each time correcting the features that still follow.

    Args:
        weight: the matrix, any floating dtype; computed in float32.
        second_moment: H, the mean of x xᵀ.
        scale: of each weight; broadcasts to the matrix.
        zero_point: likewise, integers; None unless affine.
        format: what to quantize to; its levels alone are read.
        block_size: features whose corrections are made together. Changes the time only.
        damping: what is added to H, in means of its diagonal. More, where it takes more to invert.
        order: whether features with the largest inputs are rounded first, while there are many
            left to make up for them; or else as they stand.

    Returns:
        Codes.

    Raises:
        TypeError: something is no array or no number.
        ValueError: shapes that do not fit, NaN or infinite values, a damping below 0.

    Example:
        The second feature repeats the first, and takes its error over:

        >>> from jaxcomp.quantize.formats import Format
        >>> weight, moment = jnp.array([[0.4], [2.3]]), jnp.ones((2, 2))
        >>> codes = gptq_matrix(weight, moment, jnp.ones(1), None, Format(4), damping=0.0)
        >>> (codes.astype(int) - 8).tolist()
        [[0], [3]]

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022, Algorithm 1.
    """
    check_matrix(weight, second_moment, damping)
    check_count("block_size", block_size)
    for name, given in (("scale", scale), ("zero_point", zero_point)):
        if given is not None and jnp.broadcast_shapes(given.shape, weight.shape) != weight.shape:
            raise ValueError(f"{name} {given.shape} does not broadcast to weight {weight.shape}")
    return round_matrix(
        weight, second_moment, scale, zero_point, damping, format, bool(order), block_size
    )


@partial(jax.jit, static_argnums=(5, 6, 7))
def round_matrix(
    weight: Float[Any, "features outputs"],
    second_moment: Float[Any, "features features"],
    scale: Float[Any, "..."],
    zero_point: Shaped[Any, "..."] | None,
    damping: Any,
    format: AnyFormat,
    order: bool,
    block_size: int,
) -> UInt8[Array, "features outputs"]:
    """:func:`gptq_matrix` without its checks.

    Args:
        weight: the matrix.
        second_moment: H.
        scale: broadcasts to the matrix.
        zero_point: likewise.
        damping: as there.
        format: as there.
        order: as there.
        block_size: as there.

    Returns:
        Codes.
    """
    features, outputs = weight.shape
    block = min(block_size, features)
    total = features + -features % block
    walk = jnp.arange(features)
    if order:
        walk = jnp.argsort(-jnp.diagonal(second_moment), stable=True)

    def lay_out(x: Array) -> Array:
        """In blocks, in the order of the walk; behind the last feature the first one again."""
        x = jnp.broadcast_to(x, weight.shape)[walk]
        return jnp.concatenate([x, jnp.broadcast_to(x[:1], (total - features, outputs))])

    def in_blocks(x: Array) -> Array:
        return lay_out(x).reshape(-1, block, outputs)

    # What stands behind the last feature corrects nothing, and is dropped.
    factor = jnp.eye(total, dtype=jnp.float32)
    inverse = inverse_factor(second_moment[walk][:, walk], damping)
    factor = factor.at[:features, :features].set(inverse)

    def round_block(rows: Array, block_of: Any) -> tuple[Array, Array]:
        i, scale, zero_point = block_of
        start = i * block
        mine = lax.dynamic_slice(rows, (start, 0), (block, outputs))
        across = lax.dynamic_slice(factor, (start, 0), (block, total))
        within = lax.dynamic_slice(across, (0, start), (block, block))
        codes, errors = _round_block(mine, within, scale, zero_point, format)
        # All errors of the block reach the features after it at once.
        later = jnp.where(jnp.arange(total) >= start + block, across, 0)
        return rows - dot(later.T, errors), codes

    zero_points = None if zero_point is None else in_blocks(zero_point.astype(jnp.int32))
    blocks = (jnp.arange(total // block), in_blocks(scale.astype(jnp.float32)), zero_points)
    _, codes = lax.scan(round_block, lay_out(weight.astype(jnp.float32)), blocks)
    codes = codes.reshape(total, outputs)[:features]
    return jnp.zeros_like(codes).at[walk].set(codes, unique_indices=True)


def _round_block(
    rows: Array, factor: Array, scale: Array, zero_point: Array | None, format: AnyFormat
) -> tuple[Array, Array]:
    """Walk over the features of a block: codes, and each feature's error over U_jj."""
    diagonal = jnp.diagonal(factor)

    def correct(j: Any, carry: Any) -> Any:
        rows, codes, errors = carry
        here = (scale[j], None if zero_point is None else zero_point[j], format)
        code, _ = element_codes(rows[j], *here)
        error = (rows[j] - element_values(code, *here)) / diagonal[j]
        rows = rows - factor[j][:, None] * error
        return rows, codes.at[j].set(code), errors.at[j].set(error)

    start = (rows, jnp.zeros(rows.shape, jnp.uint8), jnp.zeros_like(rows))
    _, codes, errors = lax.fori_loop(0, len(rows), correct, start)
    return codes, errors
