"""Attention transfer: the student is to be active where the teacher is."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.checks import is_number
from jaxcomp.distill.inputs import masked_mean, norm, normalized
from jaxcomp.distill.intermediate.layouts import as_maps, check_same_positions


def attention_transfer_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    power: float = 2.0,
    squared: bool = False,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Distance between where student and teacher are active, per example.

    The activity at a position is the sum over the channels of ``|feature| ** power``; over all
    positions it is scaled to unit length. So neither the numbers of channels nor magnitudes need
    to agree. The loss is the distance of the two unit vectors, which the paper weighs by
    ``beta / 2``; or, as in its authors' code, the mean over positions of the squared differences.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train.

    Args:
        student: float array (batch, positions..., channels), or with the channels on ``axis``.
        teacher: float array of the same batch and positions; its channels may differ in number.
        power: a Python number of at least 1; the higher, the more the strongest positions count.
        squared: the mean of squares, of the authors' code, in place of the paper's distance.
        axis: the channel axis of both.
        where: boolean (batch,) or (batch, positions...): what counts. An example without any has
            a loss of 0.

    Returns:
        (batch,); float32, or float64 if an array is.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a power below 1.

    Example:
        >>> student = jnp.array([[[3.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
        >>> teacher = jnp.array([[[0.0], [2.0]], [[5.0], [5.0]]])
        >>> print(attention_transfer_loss(student, teacher).round(4))
        [1.4142 0.    ]

    Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017, eq. 2.
    """
    (s, t), (keep, _) = as_maps(axis, where, student=student, teacher=teacher)
    check_same_positions(student=s, teacher=t)
    if not is_number(power) or isinstance(power, jax.Array):
        raise TypeError(f"power must be a Python number, not {power!r:.60}: it is compiled with.")
    if not power >= 1:
        raise ValueError(f"power {power} must be at least 1: 2 squares the features.")
    return _loss(s, t, keep, power, squared)


@functools.partial(jax.jit, static_argnames=("power", "squared"))
def _loss(student: Array, teacher: Array, keep: Array, power: float, squared: bool) -> Array:
    difference = _attention(student, power) - _attention(teacher, power)
    if squared:
        return masked_mean(jnp.square(difference), keep.reshape(difference.shape), 1)
    return norm(difference)


def _attention(x: Array, power: float) -> Array:
    """(batch, positions), of unit length."""
    top = jnp.max(jnp.abs(x), range(1, x.ndim), keepdims=True)
    # A derivative in the scale would be zero: it cancels. Powers of what is left do not overflow.
    size = jnp.abs(x / jax.lax.stop_gradient(jnp.where(top == 0, 1, top)))
    return normalized(jnp.sum(size**power, -1).reshape(len(x), -1))
