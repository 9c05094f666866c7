"""GPTQ of one matrix: a walk over its features, block by block.

Each feature's weights are rounded, and the features still to come make up for the error as far as
the data lets them. Everything is a loop of ``lax``, however many features there are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, UInt8

from jaxcomp.checks import check_amount, check_count
from jaxcomp.model.second_moments import dot, inverse_factor
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.rounding import element_codes, element_values


class Rounded(NamedTuple):
    """Codes of a matrix and what they were rounded with, each ``(features, outputs)``.

    Attributes:
        codes: ``uint8``.
        scale: float32.
        zero_point: ``int32``; None unless affine.
    """

    codes: UInt8[Array, "features outputs"]
    scale: Float[Array, "features outputs"]
    zero_point: Int[Array, "features outputs"] | None


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
    _check(weight, second_moment, damping)
    check_count("block_size", block_size)
    for name, given in (("scale", scale), ("zero_point", zero_point)):
        if given is not None and jnp.broadcast_shapes(given.shape, weight.shape) != weight.shape:
            raise ValueError(f"{name} {given.shape} does not broadcast to weight {weight.shape}")
    return _with_scales(
        weight, second_moment, scale, zero_point, damping, format, block_size, bool(order)
    )


def _check(weight: Any, second_moment: Any, damping: Any) -> None:
    for name, array in (("weight", weight), ("second_moment", second_moment)):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"{name} must be an array, not {array!r:.60}")
    if not isinstance(damping, Tracer):
        check_amount("damping", damping)
    if weight.ndim != 2 or second_moment.shape != (weight.shape[0],) * 2:
        raise ValueError(
            f"weight {weight.shape} and second moment {second_moment.shape}: (features, outputs) "
            "and (features, features) are needed"
        )
    for name, array in (("weight", weight), ("second_moment", second_moment)):
        if not isinstance(array, Tracer) and not bool(jnp.all(jnp.isfinite(array))):
            raise ValueError(f"{name} has NaN or infinite values: mend the weights or the data")


@partial(jax.jit, static_argnums=(5, 6, 7))
def _with_scales(
    weight: Array,
    moment: Array,
    scale: Array,
    zero_point: Array | None,
    damping: Any,
    format: AnyFormat,
    block_size: int,
    order: bool,
) -> Array:
    scale = jnp.broadcast_to(scale, weight.shape).astype(jnp.float32)
    if zero_point is not None:
        zero_point = jnp.broadcast_to(zero_point, weight.shape).astype(jnp.int32)
    walk = falling(jnp.diagonal(moment)) if order else jnp.arange(len(weight))
    found = round_in_order(
        weight, moment, walk, given_scales(scale, zero_point), format, 1, block_size, damping
    )
    return found.codes


def falling(numbers: Float[Array, " n"]) -> Int[Array, " n"]:
    """The places of numbers from the largest down; equals as they stand.

    Example:
        >>> falling(jnp.array([1.0, 3.0, 1.0])).tolist()
        [1, 0, 2]
    """
    return jnp.argsort(-numbers, stable=True)


# Scale and zero point of some features: of their places in the matrix and their present weights.
ScalesAt = Callable[[Array, Array], tuple[Array, Array | None]]


def given_scales(scale: Array, zero_point: Array | None) -> ScalesAt:
    """Scales that are known beforehand, each ``(features, outputs)``."""

    def at(places: Array, rows: Array) -> tuple[Array, Array | None]:
        del rows
        return scale[places], None if zero_point is None else zero_point[places]

    return at


def round_in_order(
    weight: Float[Array, "features outputs"],
    second_moment: Float[Array, "features features"],
    walk: Int[Array, " features"],
    scales_at: ScalesAt,
    format: AnyFormat,
    group: int,
    block_size: int,
    damping: Any,
) -> Rounded:
    """The walk itself, inside ``jit``.

    Args:
        weight: the matrix.
        second_moment: H.
        walk: the features in the order in which they are rounded.
        scales_at: gives the scales of ``group`` neighbours in that order, when it comes there.
        format: of the codes.
        group: how many; divides the features.
        block_size: features whose corrections are made together; rounded to groups.
        damping: what is added to H, in means of its diagonal.

    Returns:
        Codes and scales, features in the order of the matrix.
    """
    features, outputs = weight.shape
    block = min(max(block_size // group, 1) * group, features)
    total = features + -features % block
    rows = jnp.pad(weight.astype(jnp.float32)[walk], ((0, total - features), (0, 0)))
    factor = inverse_factor(second_moment[walk][:, walk], damping)
    factor = jnp.eye(total, dtype=jnp.float32).at[:features, :features].set(factor)
    # What is behind the last feature has the scales of some other, and corrects nothing.
    places = jnp.pad(walk, (0, total - features))

    def round_block(rows: Array, i: Array) -> tuple[Array, Any]:
        start = i * block
        mine = lax.dynamic_slice(rows, (start, 0), (block, outputs))
        across = lax.dynamic_slice(factor, (start, 0), (block, total))
        within = lax.dynamic_slice(across, (0, start), (block, block))
        here = lax.dynamic_slice(places, (start,), (block,))
        found, errors = _round_block(mine, within, here, scales_at, format, group)
        # All errors of the block reach the features after it at once.
        later = jnp.where(jnp.arange(total) >= start + block, across, 0)
        return rows - dot(later.T, errors), found

    _, found = lax.scan(round_block, rows, jnp.arange(total // block))
    back = jnp.argsort(walk)
    return jax.tree.map(lambda x: x.reshape(total, outputs)[:features][back], found)


def _round_block(
    rows: Array, factor: Array, places: Array, scales_at: ScalesAt, format: AnyFormat, group: int
) -> tuple[Rounded, Array]:
    """Walk over the features of a block; what they became, and each one's error over U_jj."""
    block, outputs = rows.shape
    # Scales that nothing refreshes are all known at once.
    step = block if group == 1 else group
    diagonal = jnp.diagonal(factor)

    def enter(k: Any, carry: Any) -> Any:
        rows, found, errors = carry
        start = k * step
        mine = lax.dynamic_slice(rows, (start, 0), (step, outputs))
        scale, zero_point = scales_at(lax.dynamic_slice(places, (start,), (step,)), mine)
        update = partial(lax.dynamic_update_slice, start_indices=(start, 0))
        found = found._replace(scale=update(found.scale, scale))
        if zero_point is not None:
            found = found._replace(zero_point=update(found.zero_point, zero_point))
        return lax.fori_loop(start, start + step, correct, (rows, found, errors))

    def correct(j: Any, carry: Any) -> Any:
        rows, found, errors = carry
        zero_point = None if found.zero_point is None else found.zero_point[j]
        codes, _ = element_codes(rows[j], found.scale[j], zero_point, format)
        value = element_values(codes, found.scale[j], zero_point, format)
        error = (rows[j] - value) / diagonal[j]
        rows = rows - factor[j][:, None] * error
        return rows, found._replace(codes=found.codes.at[j].set(codes)), errors.at[j].set(error)

    affine = jax.eval_shape(scales_at, places[:step], rows[:step])[1] is not None
    start = Rounded(
        jnp.zeros(rows.shape, jnp.uint8),
        jnp.ones(rows.shape, jnp.float32),
        jnp.zeros(rows.shape, jnp.int32) if affine else None,
    )
    steps = (rows, start, jnp.zeros_like(rows))
    _, found, errors = lax.fori_loop(0, block // step, enter, steps)
    return found, errors
