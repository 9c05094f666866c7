"""Decoupled distillation: the teacher's surety of the label, and what it thinks of the rest."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import computing_dtype
from jaxcomp.distill.logits.checks import (
    check_class_ids,
    check_logits,
    check_temperature,
    check_weight,
    check_where,
)
from jaxcomp.distill.logits.softmax import divergence, is_class, scale_loss, softmax


def decoupled_loss(
    student_logits: Shaped[ArrayLike, "..."],
    teacher_logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    temperature: ArrayLike,
    *,
    target_weight: ArrayLike = 1.0,
    other_weight: ArrayLike = 8.0,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Divergences of target against rest, and among the rest, each with its weight, per example.

    ``T**2 * (target_weight * KL(b_t || b_s) + other_weight * KL(o_t || o_s))`` in nats: ``b`` is
    the pair of probabilities (the label's class, all others together) and ``o`` the distribution
    over the other classes alone. In plain distillation the second part has the weight ``1 - p``,
    with ``p`` the teacher's probability of the label: the surer the teacher, the less is heard of
    what it knows about the other classes. Neither part is found by subtracting from 1, so that
    both are right for a teacher that is sure. The label's cross-entropy is not in it: add it. The
    authors let the whole loss rise from 0 in the first epochs: multiply it by a schedule.

    The teacher is differentiated too; put ``jax.lax.stop_gradient`` around one that is a function
    of what you train.

    Args:
        student_logits: float array of any shape and float dtype; ``axis`` runs over the classes.
        teacher_logits: float array of the same shape; its dtype may differ.
        labels: class ids, of an integer dtype and the logits' shape without ``axis``.
        temperature: positive scalar, possibly traced.
        target_weight: scalar, 0 or more, possibly traced: alpha in the paper.
        other_weight: scalar, 0 or more, possibly traced: beta in the paper.
        axis: the class axis.
        where: boolean, the elements that count, as in ``kl_divergence``. An example whose label is
            a class that does not count has no first part. Ids of examples left out whole are not
            read.

    Returns:
        Nats, in the logits' shape without ``axis``; float32, or float64 if a logit array is.

    Raises:
        TypeError: logits that are not floating point, labels or ``where`` of an unfit dtype.
        ValueError: shapes that do not fit, a temperature that is not positive and finite, a
            negative weight, class ids that are no class.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.array([[1.0, 0.0, -1.0]]), jnp.array([[30.0, 2.0, 0.0]])
        >>> print(decoupled_loss(student, teacher, jnp.array([0]), temperature=1.0).round(4))
        [0.9447]

    Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation", 2022, section 3.
    """
    student, teacher, axis = check_logits(student_logits, teacher_logits, axis)
    keep = check_where(where, student.shape, axis)
    labels = check_class_ids(labels, student.shape, keep, axis)
    temperature = check_temperature(temperature, computing_dtype(student, teacher))
    weights = (
        check_weight("target_weight", target_weight, temperature.dtype),
        check_weight("other_weight", other_weight, temperature.dtype),
    )
    return _decoupled(student, teacher, labels, temperature, weights, keep, axis)


@functools.partial(jax.jit, static_argnames="axis")
def _decoupled(
    student: Array,
    teacher: Array,
    labels: Array,
    temperature: Array,
    weights: tuple[Array, Array],
    keep: Array,
    axis: int,
) -> Array:
    student, teacher = student.astype(temperature.dtype), teacher.astype(temperature.dtype)
    target = is_class(labels, student.shape, axis)
    pairs = [_target_and_rest(x, target, keep, temperature, axis) for x in (student, teacher)]
    example = jnp.any(keep, axis, keepdims=True)
    one = jnp.ones_like(temperature)
    first = divergence(*pairs, one, example, axis, False) * temperature * temperature
    second = divergence(student, teacher, temperature, keep & ~target, axis, True)
    loss = scale_loss(weights[0], first) + scale_loss(weights[1], second)
    unknown = (labels < 0) | (labels >= student.shape[axis])
    return jnp.where(unknown & jnp.squeeze(example, axis), jnp.nan, loss)


def _target_and_rest(
    logits: Array, target: Array, keep: Array, temperature: Array, axis: int
) -> Array:
    """Logits, at temperature 1, of two classes: the target, and all others together."""
    temperature = jnp.where(temperature > 0, temperature, jnp.nan)
    t = softmax(logits, keep & target, temperature, axis)
    rest = softmax(logits, keep & ~target, temperature, axis)
    some = [jnp.any(x.possible, axis, keepdims=True) for x in (t, rest)]
    own = jnp.sum(t.half, axis, keepdims=True)
    margin = (own - rest.half_top) / (temperature * 0.5) - jnp.log(rest.total)
    margin = jnp.where(some[0] & some[1], margin, 0)
    # Split by sign: a margin that overflows is then a class of probability zero.
    pair = (jnp.minimum(margin, 0), jnp.minimum(-margin, 0))
    return jnp.concatenate(
        [jnp.where(x, y, -jnp.inf) for x, y in zip(some, pair, strict=True)], axis
    )
