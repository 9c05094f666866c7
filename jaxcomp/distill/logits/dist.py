"""DIST: the student need only rank and space as the teacher does, by Pearson correlations."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import computing_dtype, count_kept, normalized
from jaxcomp.distill.logits.checks import (
    check_logits,
    check_temperature,
    check_weight,
    check_where,
)
from jaxcomp.distill.logits.softmax import softmax


def dist_loss(
    student_logits: Shaped[ArrayLike, "..."],
    teacher_logits: Shaped[ArrayLike, "..."],
    temperature: ArrayLike = 1.0,
    *,
    inter_weight: ArrayLike = 1.0,
    intra_weight: ArrayLike = 1.0,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Distance in correlation of two sets of probabilities, each example's share.

    The mean over the examples that count is ``inter_weight * mean(1 - r(example)) + intra_weight *
    mean(1 - r(class))``. ``r(example)`` is Pearson's correlation of student and teacher over the
    classes of an example, ``r(class)`` over the examples of a class: all axes but ``axis`` run over
    examples, and the second part depends on which are in the batch. A share may be negative. What
    does not vary (a batch of one, equal logits) has no correlation: it counts as ``r = 0``, with
    gradient zero.

    As in the paper nothing is multiplied by ``T**2``; the authors' code and torchdistill do. The
    label's cross-entropy is not in it: add it. The teacher is differentiated too; put
    ``jax.lax.stop_gradient`` around one that is a function of what you train.

    Args:
        student_logits: float array of any shape and float dtype; ``axis`` runs over the classes.
        teacher_logits: float array of the same shape; its dtype may differ.
        temperature: positive scalar, possibly traced.
        inter_weight: scalar, 0 or more, possibly traced: beta in the paper.
        intra_weight: scalar, 0 or more, possibly traced: gamma in the paper.
        axis: the class axis.
        where: boolean, the elements that count, as in ``kl_divergence``. A correlation is over the
            elements that count, a mean over the examples and classes that have any.

    Returns:
        Shares, in the logits' shape without ``axis``; float32, or float64 if a logit array is. A
        NaN or ``+inf`` logit that counts makes all shares NaN, as all are compared.

    Raises:
        TypeError: logits that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a temperature that is not positive and finite, a
            negative weight.

    Example:
        >>> import jax.numpy as jnp
        >>> student = jnp.array([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> teacher = jnp.array([[3.0, 1.0, -2.0], [0.0, 0.0, 1.0]])
        >>> print(f"{dist_loss(student, teacher).mean():.3f}")
        0.755

    Huang, You, Wang, Qian and Xu, "Knowledge Distillation from A Stronger Teacher", 2022.
    """
    student, teacher, axis = check_logits(student_logits, teacher_logits, axis)
    keep = check_where(where, student.shape, axis)
    temperature = check_temperature(temperature, computing_dtype(student, teacher))
    weights = (
        check_weight("inter_weight", inter_weight, temperature.dtype),
        check_weight("intra_weight", intra_weight, temperature.dtype),
    )
    if 0 in student.shape:
        return jnp.zeros(student.shape[:axis] + student.shape[axis + 1 :], temperature.dtype)
    return _dist(student, teacher, temperature, weights, keep, axis)


@functools.partial(jax.jit, static_argnames="axis")
def _dist(
    student: Array,
    teacher: Array,
    temperature: Array,
    weights: tuple[Array, Array],
    keep: Array,
    axis: int,
) -> Array:
    temperature = jnp.where(temperature > 0, temperature, jnp.nan)
    examples = [i for i in range(student.ndim) if i != axis]
    log_s, log_t = (
        _log_probabilities(x.astype(temperature.dtype), keep, temperature, axis)
        for x in (student, teacher)
    )
    inter = 1 - jnp.sum(_correlation_terms(log_s, log_t, keep, [axis]), axis)

    shape, dtype = student.shape, temperature.dtype
    counts = jnp.any(keep, axis, keepdims=True)
    filled = count_kept(keep, shape, examples, dtype)
    shares = jnp.where(keep, 1 / jnp.maximum(filled, 1), 0)
    shares -= _correlation_terms(log_s, log_t, keep, examples)
    taught = count_kept(counts, shape, examples, dtype)
    classes = jnp.maximum(count_kept(filled > 0, shape, [axis], dtype), 1)
    intra = jnp.sum(shares, axis) * (taught / classes).reshape(())
    return jnp.where(jnp.squeeze(counts, axis), weights[0] * inter + weights[1] * intra, 0)


def _log_probabilities(logits: Array, keep: Array, temperature: Array, axis: int) -> Array:
    s = softmax(logits, keep, temperature, axis)
    some = s.scaled != -jnp.inf
    return jnp.where(some, jnp.where(some, s.scaled, 0) - jnp.log(s.total), -jnp.inf)


def _correlation_terms(log_s: Array, log_t: Array, keep: Array, axes: Sequence[int]) -> Array:
    """What each element adds to Pearson's correlation, along axes, of two exponentials."""
    return jnp.multiply(*(_standard_rise(x, keep, axes) for x in (log_s, log_t)))


def _standard_rise(log_p: Array, keep: Array, axes: Sequence[int]) -> Array:
    """``exp(log_p)`` less its mean, over the norm of that.

    A correlation knows neither scale nor offset, so it is taken of ``p / max(p) - 1``: that
    underflows for no class, however rare, and is exactly 0 for probabilities that are all equal.
    """
    possible = keep & (log_p != -jnp.inf)
    top = jnp.max(jnp.where(possible, log_p, -jnp.inf), axes, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    rise = jnp.where(possible, jnp.expm1(jnp.where(possible, log_p, top) - top), -1)
    rise = jnp.where(keep, rise, 0)
    count = jnp.maximum(count_kept(keep, log_p.shape, axes, log_p.dtype), 1)
    mean = jnp.sum(rise, axes, keepdims=True) / count
    return normalized(jnp.where(keep, rise - mean, 0), axes)
