"""How probable codes are, learned: the bits that an entropy coder needs for them, differentiable.

A code is taken as the coder of a file takes it: is it zero; its sign; is its magnitude above 1,
above 2, and so on. Whether it is zero depends on where it stands: each index of each axis (a dead
input, a busy channel) adds a logit of its own.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_LN2 = math.log(2)
# The deviation of a logit of the prior, in natural units.
_DEVIATION = 2.0


class CodeDensity(NamedTuple):
    """The probabilities of signed codes around zero, in logits, float32.

    Attributes:
        nonzero: scalar; of a code not being zero.
        axes: for each axis of the leaf, what each index adds to ``nonzero``, of size 1 along all
            others, so that it is cut with the leaf; an axis of size 1, and the axis of a vector,
            has a single 0 that is not used.
        more: at ``k - 1``, of a magnitude being above ``k`` where it is at least ``k``.
    """

    nonzero: Float[Array, "*stack"]
    axes: tuple[Float[Array, "..."], ...]
    more: Float[Array, "..."]


def initial_density(shape: tuple[int, ...], high: int) -> CodeDensity:
    """Half of all codes are not zero, and half of those above any magnitude are above the next.

    Args:
        shape: of the leaf.
        high: the largest code, at least 1.

    Returns:
        All logits 0.

    Example:
        >>> initial_density((1, 3), 3)
        CodeDensity(nonzero=Array(0., dtype=float32), axes=(Array([[0.]], dtype=float32),
        Array([[0., 0., 0.]], dtype=float32)), more=Array([0., 0.], dtype=float32))
    """
    axes = tuple(jnp.zeros(along, jnp.float32) for along in _along_each(shape))
    return CodeDensity(jnp.zeros((), jnp.float32), axes, jnp.zeros(high - 1, jnp.float32))


def code_bits(levels: Float[Array, "*dims"], density: CodeDensity) -> Float[Array, "*dims"]:
    """The bits of each code, ``-log2`` of its probability; differentiable.

    Args:
        levels: weights in steps, before they are rounded to codes.
        density: of the codes, for a leaf of this shape.

    Returns:
        The bits of ``round(levels)``, limited to the largest code. With respect to ``density`` the
        derivative is exact. With respect to ``levels`` it is that of the straight line between the
        bits of the two codes around a level (beyond the largest code, that of the last such line).

    Example:
        >>> density = initial_density((3,), 3)
        >>> code_bits(jnp.array([0.2, -1.2, 2.2]), density)  # 1; 1 + 1 + 1; 1 + 1 + 1 + 1
        Array([1., 3., 4.], dtype=float32)
        >>> jax.grad(lambda x: code_bits(x, density).sum())(jnp.array([0.2, -1.2, 2.2]))
        Array([ 2., -1.,  0.], dtype=float32)
    """
    high = density.more.shape[-1] + 1
    size = jnp.minimum(jnp.abs(jax.lax.stop_gradient(levels)), high)
    code = jnp.round(size).astype(jnp.int32)
    logit = nonzero_logits(density, levels.ndim)
    table = magnitude_bits(density)
    zero, nonzero = nonzero_bits(density, levels.ndim)
    bits = jnp.where(code == 0, zero, nonzero + table[jnp.maximum(code, 1) - 1])
    # ln(p / (1 - p)) is the logit itself.
    table = jax.lax.stop_gradient(table)
    first = table[0] - jax.lax.stop_gradient(logit) / _LN2
    below = jnp.minimum(size.astype(jnp.int32), high - 1)
    if high > 1:
        slope = jnp.where(below == 0, first, jnp.diff(table)[jnp.maximum(below, 1) - 1])
    else:
        slope = jnp.broadcast_to(first, levels.shape)
    return bits + _only_derivative(levels, jnp.sign(levels) * slope)


def nonzero_logits(density: CodeDensity, rank: int) -> Float[Array, "..."]:
    """The logit of each place of not being zero.

    Args:
        density: of the codes.
        rank: axes of the leaf.

    Returns:
        Broadcasts to the leaf.

    Example:
        >>> density = initial_density((2, 2), 1)._replace(nonzero=jnp.float32(-1.0))
        >>> nonzero_logits(density, 2)
        Array([[-1., -1.],
               [-1., -1.]], dtype=float32)
    """
    total = jnp.reshape(density.nonzero, (1,) * rank)
    if rank > 1:
        for logits in density.axes:
            if logits.size > 1:
                total = total + logits
    return total


def nonzero_bits(
    density: CodeDensity, rank: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The bits of being zero, and those of not being zero, at each place.

    Args:
        density: of the codes.
        rank: axes of the leaf.

    Returns:
        Both broadcast to the leaf.

    Example:
        >>> nonzero_bits(initial_density((3,), 1), 1)
        (Array([1.], dtype=float32), Array([1.], dtype=float32))
    """
    logit = nonzero_logits(density, rank)
    return jax.nn.softplus(logit) / _LN2, jax.nn.softplus(-logit) / _LN2


def magnitude_bits(density: CodeDensity) -> Float[Array, " high"]:
    """The bits of a sign and of each magnitude from 1 on, of a code that is not zero.

    Example:
        >>> magnitude_bits(initial_density((1,), 3))
        Array([2., 3., 3.], dtype=float32)
    """
    above = jax.nn.softplus(-density.more) / _LN2
    stop = jax.nn.softplus(density.more) / _LN2
    nothing = jnp.zeros(1, jnp.float32)
    return 1 + jnp.concatenate([nothing, jnp.cumsum(above)]) + jnp.concatenate([stop, nothing])


def prior_bits(density: CodeDensity) -> Float[Array, ""]:
    """What a coder pays to learn where zeros are: a normal prior on the logits of the axes.

    Args:
        density: of the codes.

    Returns:
        ``-log2`` of the prior's density relative to its largest; keeps the logits of an axis on
        which there is nothing but zeros finite.

    Example:
        >>> density = initial_density((2, 2), 1)
        >>> prior_bits(density._replace(axes=(jnp.array([[2.0], [0.0]]),))).round(4)
        Array(0.7213, dtype=float32)
    """
    squares = sum(jnp.sum(logits**2) for logits in density.axes)
    return jnp.asarray(squares, jnp.float32) / (2 * _DEVIATION**2 * _LN2)


def fitted_density(codes: np.ndarray, high: int, rounds: int = 20) -> CodeDensity:
    """The density of codes that are known, by Newton steps: maximum likelihood under the prior.

    Args:
        codes: signed integers of the leaf's shape.
        high: the largest code that may occur.
        rounds: passes over the axes.

    Returns:
        The density. Magnitudes are counted with half an occurrence added to each.

    Example:
        >>> density = fitted_density(np.array([1, 0, 0, -2]), 3)
        >>> jnp.round(density.nonzero, 2), jnp.round(density.more, 2)
        (Array(0., dtype=float32), Array([ 0. , -1.1], dtype=float32))
    """
    sizes = np.abs(codes)
    reached = np.array([(sizes >= k).sum() for k in range(1, high + 1)], np.float64)
    more = np.log(reached[1:] + 0.5) - np.log(reached[:-1] - reached[1:] + 0.5)
    some = (sizes > 0).astype(np.float64)
    count = some.sum()
    base = math.log(count + 0.5) - math.log(some.size - count + 0.5)
    axes = [np.zeros(along) for along in _along_each(codes.shape)]
    used = [i for i, n in enumerate(codes.shape) if codes.ndim > 1 and n > 1]
    for _ in range(rounds if used and codes.size else 0):
        for axis in used:
            others = tuple(i for i in range(codes.ndim) if i != axis)
            p = _sigmoid(base + _total(axes, used))
            curve = np.broadcast_to(p * (1 - p), codes.shape)
            slope = (some - p).sum(others, keepdims=True) - axes[axis] / _DEVIATION**2
            bend = curve.sum(others, keepdims=True) + 1 / _DEVIATION**2
            moved = axes[axis] + np.clip(slope / bend, -2, 2)
            # At the optimum they add up to 0: else they would crawl there.
            axes[axis], base = moved - moved.mean(), base + float(moved.mean())
        p = _sigmoid(base + _total(axes, used))
        bend = max(float(np.broadcast_to(p * (1 - p), codes.shape).sum()), 1e-6)
        base += float(np.clip((some - p).sum() / bend, -2, 2))
    return CodeDensity(
        jnp.asarray(base, jnp.float32),
        tuple(jnp.asarray(axis, jnp.float32) for axis in axes),
        jnp.asarray(more, jnp.float32),
    )


def _along_each(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """For each axis the shape that lies along it; of a vector, which has no other axis, one."""
    ones = [1] * len(shape)
    rows = [(*ones[:axis], size, *ones[axis + 1 :]) for axis, size in enumerate(shape)]
    return rows if len(shape) > 1 else [(1,)] * len(shape)


def _total(axes: list[np.ndarray], used: list[int]) -> np.ndarray:
    return np.asarray(sum(axes[axis] for axis in used))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


@jax.custom_jvp
def _only_derivative(x: Array, slope: Array) -> Array:
    """Zero, whose derivative with respect to ``x`` is ``slope``."""
    del slope
    return jnp.zeros_like(x)


@_only_derivative.defjvp
def _only_derivative_jvp(primals, tangents):
    return _only_derivative(*primals), primals[1] * tangents[0]
