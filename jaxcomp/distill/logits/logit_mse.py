"""Mean squared difference of logits: regression to the teacher, without a softmax."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import computing_dtype
from jaxcomp.distill.logits.checks import check_logits, check_where


def logit_mse(
    student_logits: Shaped[ArrayLike, "..."],
    teacher_logits: Shaped[ArrayLike, "..."],
    *,
    centered: bool = False,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Mean over the classes of the squared difference of two logits, per example.

    The paper takes half the sum over the classes: multiply by half their number. ``centered=True``
    first takes the mean over the classes from each example's difference, since a constant added to
    all logits of an example changes no probability: half of that is the limit of ``T**2 *
    kl_divergence(student, teacher, T)`` for a high temperature.

    A class whose logit is ``-inf`` in both arrays is not there and does not count; where it is so
    in one of them, the loss is infinite, with finite gradients. The teacher is differentiated too:
    put ``jax.lax.stop_gradient`` around one that is a function of what you train.

    Args:
        student_logits: float array of any shape and float dtype; ``axis`` runs over the classes.
        teacher_logits: float array of the same shape; its dtype may differ.
        centered: compare the logits of an example up to a constant.
        axis: the class axis.
        where: boolean, the elements that count, as in ``kl_divergence``.

    Returns:
        Squared logits, in the logits' shape without ``axis``; float32, or float64 if a logit array
        is.

    Raises:
        TypeError: logits that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.array([[1.0, 0.0, -1.0]]), jnp.array([[3.0, 2.0, -2.0]])
        >>> print(logit_mse(student, teacher), logit_mse(student, teacher, centered=True))
        [3.] [2.]

    Ba and Caruana, "Do Deep Nets Really Need to be Deep?", 2014; centered: Hinton, Vinyals and
    Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.1.
    """
    student, teacher, axis = check_logits(student_logits, teacher_logits, axis)
    keep = check_where(where, student.shape, axis)
    return _logit_mse(student, teacher, keep, centered, axis)


@functools.partial(jax.jit, static_argnames=("centered", "axis"))
def _logit_mse(student: Array, teacher: Array, keep: Array, centered: bool, axis: int) -> Array:
    dtype = computing_dtype(student, teacher)
    student, teacher = student.astype(dtype), teacher.astype(dtype)
    s_there, t_there = keep & (student != -jnp.inf), keep & (teacher != -jnp.inf)
    both = s_there & t_there
    count = jnp.maximum(jnp.sum(both, axis, keepdims=True, dtype=dtype), 1)
    apart = jnp.where(both, student, 0) - jnp.where(both, teacher, 0)
    apart = jnp.where(both & (jnp.maximum(student, teacher) == jnp.inf), jnp.nan, apart)
    if centered:
        mean = jnp.sum(apart, axis, keepdims=True) / count
        apart = jnp.where(both, apart - mean, 0)
    mean_square = jnp.sum(jnp.square(apart), axis) / jnp.squeeze(count, axis)
    return mean_square + jnp.where(jnp.any(s_there != t_there, axis), jnp.inf, 0)
