"""AdaRound on matrices: up or down for each weight, learned by the error of the outputs.

Which of its two neighbouring levels each weight takes is a quadratic binary problem: for weights
``W`` that become ``V``, the mean square ``tr((W - V)ᵀ H (W - V))`` with ``H`` the mean of
``x xᵀ``, each output for itself. It is solved by descent on positions between the levels, which a
regularizer drives to the ends; then single weights move where that alone helps, which takes off as
much again. No step reads data.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped, UInt8

from jaxcomp.arrays.elements import ELEMENTS, levels
from jaxcomp.model.second_moments import output_errors
from jaxcomp.quantize.formats import AnyFormat, Format
from jaxcomp.quantize.rounding import element_codes, element_values

# Of the rectified sigmoid (Nagel et al., 2020, equation 23), from Louizos et al., 2018.
_STRETCH = (-0.1, 1.1)
_WARM_START = 0.2
_BETA = (20.0, 2.0)


class Neighbours(NamedTuple):
    """The two levels that each weight may become.

    Attributes:
        low: codes of the level below, or of the nearest where the range ends.
        high: codes of the level above; the same as ``low`` where the range ends.
        base: value of ``low``.
        step: value of ``high``, less ``base``.
    """

    low: Array
    high: Array
    base: Array
    step: Array


def neighbours(
    weights: Float[Array, "..."],
    scale: Float[Array, "..."],
    zero_point: Shaped[Array, "..."] | None,
    format: AnyFormat,
) -> Neighbours:
    """The levels between which each weight lies.

    Args:
        weights: float32.
        scale: broadcastable to the weights, as :func:`element_codes` takes it.
        zero_point: likewise; None unless affine.
        format: what to quantize to.

    Example:
        >>> found = neighbours(jnp.array([0.7, -9.0]), jnp.array(0.5), None, Format(4))
        >>> found.base, found.step
        (Array([ 0.5, -3.5], dtype=float32), Array([0.5, 0. ], dtype=float32))
    """
    ladder = _ladder(format)
    rank = np.zeros(256, np.int32)
    rank[ladder] = np.arange(len(ladder))
    if not isinstance(format, Format):
        # Zero may have two codes.
        table = levels(ELEMENTS[format.element])
        rank[: len(table)][table == 0] = rank[ladder[table[ladder] == 0][0]]
    nearest, _ = element_codes(weights, scale, zero_point, format)
    place = jnp.take(jnp.asarray(rank), nearest.astype(jnp.int32))
    value = element_values(nearest, scale, zero_point, format)

    def code(place: Array) -> Array:
        place = jnp.clip(place, 0, len(ladder) - 1)
        return jnp.take(jnp.asarray(ladder), place).astype(jnp.uint8)

    low = code(place - (value > weights))
    high = code(place + (value < weights))
    # Beyond the last level there is one only.
    beyond = (value > weights) & (low == nearest) | (value < weights) & (high == nearest)
    low, high = jnp.where(beyond, nearest, low), jnp.where(beyond, nearest, high)
    base = element_values(low, scale, zero_point, format)
    step = element_values(high, scale, zero_point, format) - base
    # A compiler may round the product and the difference as one, which leaves a rest of the same.
    return Neighbours(low, high, base, jnp.where(low == high, 0, step))


def _ladder(format: AnyFormat) -> np.ndarray:
    """Codes by rising value, each value once."""
    if isinstance(format, Format):
        low, high = format.code_range
        offset = 1 << (format.bits - 1) if format.symmetric and format.zero else 0
        return np.arange(low, high + 1) + offset
    values = levels(ELEMENTS[format.element])
    finite = np.flatnonzero(np.isfinite(values))
    # Of two zeros the first, which is the positive one.
    _, first = np.unique(values[finite], return_index=True)
    return finite[first]


def relaxed(v: Float[Array, "..."]) -> Float[Array, "..."]:
    """The rectified sigmoid: from a number to learn to a position between two levels.

    Example:
        >>> relaxed(jnp.array([-9.0, 0.0, 9.0]))
        Array([0. , 0.5, 1. ], dtype=float32)

    Source: Nagel et al., 2020, equation 23.
    """
    low, high = _STRETCH
    return jnp.clip(jax.nn.sigmoid(v) * (high - low) + low, 0, 1)


def relaxed_gradient(
    v: Float[Array, "features outputs"],
    residual: Float[Array, "features outputs"],
    step: Float[Array, "features outputs"],
    moment: Float[Array, "features features"],
    penalty: Any,
    beta: Any,
) -> Float[Array, "features outputs"]:
    """Gradient by ``v`` of what is minimized, with one product by the moment.

    It is ``sum(output_errors(residual - h * step, moment)) + sum(penalty * (1 - |2 h - 1|**beta))``
    with ``h = relaxed(v)``.

    Args:
        v: positions, before the rectified sigmoid.
        residual: the weights less the level below.
        step: from the level below to the one above.
        moment: mean of ``x xᵀ``.
        penalty: weight of the regularizer, broadcastable to ``v``.
        beta: its power.

    Example:
        >>> one = jnp.ones((1, 1))
        >>> relaxed_gradient(0 * one, 0.25 * one, one, one, 0.0, 2.0).round(3)
        Array([[0.15]], dtype=float32)

    Source: Nagel et al., 2020, equations 21 and 24.
    """
    low, high = _STRETCH
    h = relaxed(v)
    error = jnp.matmul(moment, residual - h * step, precision=lax.Precision.HIGHEST)
    middle = 2 * h - 1
    pull = penalty * 2 * beta * jnp.abs(middle) ** (beta - 1) * jnp.sign(middle)
    slope = jax.nn.sigmoid(v) * jax.nn.sigmoid(-v) * (high - low)
    return jnp.where((h > 0) & (h < 1), (-2 * step * error - pull) * slope, 0)


def adaround_matrix(
    weights: Float[Array, "features outputs"],
    moment: Float[Array, "features features"],
    scale: Float[Array, "features outputs"],
    zero_point: Shaped[Array, "features outputs"] | None,
    format: AnyFormat,
    steps: int = 500,
    learning_rate: Any = 0.03,
    penalty: Any = 0.3,
) -> UInt8[Array, "features outputs"]:
    """Codes of a matrix, each the level below or above its weight, by the error of the outputs.

    Args:
        weights: float32.
        moment: mean of ``x xᵀ``.
        scale: of each weight; stays as it is.
        zero_point: likewise; None unless affine.
        format: what to quantize to.
        steps: of Adam, without noise: each sees the whole problem.
        learning_rate: of Adam.
        penalty: weight of the regularizer, for each weight in units of what a step of it alone does
            to its output (the paper has one for all, so that small inputs decide nothing).

    Returns:
        Codes. An output that did not gain is rounded to nearest.

    Example:
        >>> moment = jnp.array([[1.0, 0.9], [0.9, 1.0]])
        >>> weights, scale = jnp.array([[0.4], [0.4]]), jnp.ones((2, 1))
        >>> adaround_matrix(weights, moment, scale, None, Format(4)).sum() - 2 * 8
        Array(1, dtype=uint32)

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
    section 3.2.
    """
    found = neighbours(weights, scale, zero_point, format)
    nearest, _ = element_codes(weights, scale, zero_point, format)
    residual = weights - found.base
    alone = penalty * jnp.diagonal(moment)[:, None] * found.step**2
    # Adam's steps know no units, but its epsilon does.
    unit = jnp.maximum(jnp.max(alone, axis=0), jnp.finfo(jnp.float32).tiny)

    def turn(carry: Any, count: Array) -> Any:
        v, state = carry
        done = (count / max(steps, 1) - _WARM_START) / (1 - _WARM_START)
        beta = _BETA[1] + (_BETA[0] - _BETA[1]) * jnp.clip(1 - done, 0, 1)
        force = jnp.where(done >= 0, alone, 0)
        slope = relaxed_gradient(v, residual, found.step, moment, force, beta)
        moved, state = optimizer.update(slope / unit, state)
        return (optax.apply_updates(v, moved), state), None

    optimizer = optax.adam(learning_rate)
    v = _unrelaxed(jnp.clip(_part(residual, found.step), 0, 1))
    (v, _), _ = lax.scan(turn, (v, optimizer.init(v)), jnp.arange(steps, dtype=jnp.float32))
    up = move_alone(relaxed(v) >= 0.5, residual, found.step, moment)
    learned = jnp.where(up, found.high, found.low)

    def errors(codes: Array) -> Array:
        values = element_values(codes, scale, zero_point, format)
        return output_errors(weights - values, moment)

    return jnp.where(errors(learned) < errors(nearest), learned, nearest)


def move_alone(
    up: Bool[Array, "features outputs"],
    residual: Float[Array, "features outputs"],
    step: Float[Array, "features outputs"],
    moment: Float[Array, "features features"],
    sweeps: int = 20,
) -> Bool[Array, "features outputs"]:
    """Move weights to their other level, one of each output at a time, while the error falls.

    Args:
        up: whether each weight is at its upper level.
        residual: the weights less the level below.
        step: from the level below to the one above.
        moment: mean of ``x xᵀ``.
        sweeps: over all features, at most.

    Returns:
        Where the weights are then; no single move would lower the error, unless sweeps ran out.

    Example:
        >>> ones = jnp.ones((2, 1))
        >>> move_alone(ones > 0, 0.4 * ones, ones, jnp.ones((2, 2))).ravel()
        Array([False,  True], dtype=bool)
    """
    diagonal = jnp.diagonal(moment)

    def turn(row: Any, carry: Any) -> Any:
        up, error, moved = carry
        # By how much the error vector's entry would change.
        change = jnp.where(up[row], step[row], -step[row])
        pull = jnp.matmul(moment[row], error, precision=lax.Precision.HIGHEST)
        gain = -change * (2 * pull + change * diagonal[row])
        # More than rounding errors, or two moves could undo each other for ever.
        better = gain > 1e-5 * change * change * diagonal[row]
        error = error.at[row].add(jnp.where(better, change, 0))
        return up.at[row].set(up[row] ^ better), error, moved + jnp.sum(better)

    def sweep(carry: Any) -> Any:
        up, error, _, count = carry
        up, error, moved = lax.fori_loop(0, len(up), turn, (up, error, jnp.int32(0)))
        return up, error, moved, count + 1

    def goes_on(carry: Any) -> Array:
        return (carry[2] > 0) & (carry[3] < sweeps)

    begin = up, residual - jnp.where(up, step, 0), jnp.int32(1), jnp.int32(0)
    return lax.while_loop(goes_on, sweep, begin)[0]


def _part(x: Array, whole: Array) -> Array:
    return jnp.where(whole > 0, x / jnp.where(whole > 0, whole, 1), 0)


def _unrelaxed(h: Array) -> Array:
    """Undoes :func:`relaxed`."""
    low, high = _STRETCH
    return -jnp.log((high - low) / (h - low) - 1)
