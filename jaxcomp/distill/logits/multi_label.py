"""Losses for classes that do not exclude each other: each is a yes or no of its own."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import check_scalar, computing_dtype
from jaxcomp.distill.logits.checks import check_logits, check_temperature, check_where
from jaxcomp.distill.logits.softmax import cross_entropy, divergence, scale_loss


def binary_kl_divergence(
    student_logits: Shaped[ArrayLike, "..."],
    teacher_logits: Shaped[ArrayLike, "..."],
    temperature: ArrayLike = 1.0,
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Sum over the classes of the divergences of yes against no, per example.

    For each class ``KL(sigmoid(teacher / T) || sigmoid(student / T))`` in nats, of the pair (p, 1 -
    p): the divergence of the teacher's distribution over sets of classes, taken as independent. It
    is *not* multiplied by ``T**2`` (:func:`multi_label_loss` does that) and keeps its relative
    accuracy as ``kl_divergence`` does. Divide by the number of classes for their mean.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is a
    function of what you train.

    Args:
        student_logits: float array of any shape and float dtype; ``axis`` runs over the classes.
        teacher_logits: float array of the same shape; its dtype may differ.
        temperature: positive scalar, possibly traced.
        axis: the class axis.
        where: boolean, the elements that count, as in ``kl_divergence``.

    Returns:
        Nats, in the logits' shape without ``axis``; float32, or float64 if a logit array is.

    Raises:
        TypeError: logits that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a temperature that is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.array([[1.0, 0.0, -1.0]]), jnp.array([[3.0, 2.0, -jnp.inf]])
        >>> print(binary_kl_divergence(student, teacher).round(4))
        [0.8109]

    Yang, Xie, Zong, Feng, Niu, Sugiyama and Huang, "Multi-Label Knowledge Distillation",
    2023; with a temperature as in Hinton, Vinyals and Dean, 2015.
    """
    student, teacher, axis = check_logits(student_logits, teacher_logits, axis)
    keep = check_where(where, student.shape, axis)
    temperature = check_temperature(temperature, computing_dtype(student, teacher))
    return _loss(student, teacher, temperature, keep=keep, axis=axis)


def multi_label_loss(
    student_logits: Shaped[ArrayLike, "..."],
    teacher_logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    temperature: ArrayLike,
    weight: ArrayLike,
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Weighted average of the labels' binary loss and the teacher's, per example.

    The sum over the classes of ``(1 - weight) * BCE(labels, sigmoid(student)) + weight * T**2 *
    KL(teacher || student at T)``: ``hinton_loss`` for classes that do not exclude each other.

    Args:
        student_logits: float array of any shape and float dtype; ``axis`` runs over the classes.
        teacher_logits: float array of the same shape; its dtype may differ.
        labels: whether a class applies, of the logits' shape: boolean, 0 and 1, or probabilities.
        temperature: positive scalar, possibly traced; it softens the teacher's part only.
        weight: scalar in [0, 1], possibly traced: the share of the teacher's part.
        axis: the class axis.
        where: boolean, the elements that count, as in ``kl_divergence``; use it for labels that are
            not known.

    Returns:
        Nats, in the logits' shape without ``axis``; float32, or float64 if a logit array is.

    Raises:
        TypeError: logits that are not floating point, ``where`` that is not boolean, labels that
            are not real.
        ValueError: shapes that do not fit, a temperature that is not positive and finite, a weight
            outside [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.array([[1.0, 0.0, -1.0]]), jnp.array([[3.0, 2.0, -4.0]])
        >>> print(multi_label_loss(student, teacher, jnp.array([[1, 1, 0]]), 2.0, 0.5).round(2))
        [1.4]

    Yang, Xie, Zong, Feng, Niu, Sugiyama and Huang, "Multi-Label Knowledge Distillation",
    2023; with a temperature as in Hinton, Vinyals and Dean, 2015.
    """
    student, teacher, axis = check_logits(student_logits, teacher_logits, axis)
    keep = check_where(where, student.shape, axis)
    targets = jnp.asarray(labels)
    if targets.shape != student.shape:
        message = f"labels {targets.shape} must have the logits' shape {student.shape}"
        raise ValueError(f"{message}: one yes or no for each class; see jax.nn.one_hot for ids.")
    if jnp.issubdtype(targets.dtype, jnp.complexfloating):
        raise TypeError(f"labels must be real, got {targets.dtype}: cast them.")
    temperature = check_temperature(temperature, computing_dtype(student, teacher))
    weight = check_scalar("weight", weight, 0, 1, "must be in [0, 1]").astype(temperature.dtype)
    return _loss(student, teacher, temperature, (targets, weight), keep=keep, axis=axis)


@functools.partial(jax.jit, static_argnames="axis")
def _loss(
    student: Array,
    teacher: Array,
    temperature: Array,
    labels_and_weight: tuple[Array, Array] | None = None,
    *,
    keep: Array,
    axis: int,
) -> Array:
    student, teacher = (_yes_and_no(x.astype(temperature.dtype)) for x in (student, teacher))
    keep = keep[..., None]
    if labels_and_weight is None:
        return jnp.sum(divergence(student, teacher, temperature, keep, -1, False), axis)
    yes, weight = labels_and_weight
    yes = yes.astype(temperature.dtype)
    soft = divergence(student, teacher, temperature, keep, -1, True)
    hard = cross_entropy(student, jnp.stack([yes, 1 - yes], -1), keep, -1)
    return jnp.sum(scale_loss(1 - weight, hard) + scale_loss(weight, soft), axis)


def _yes_and_no(logits: Array) -> Array:
    """Logits of two classes on a new last axis, whose softmax is the sigmoid."""
    return jnp.stack([logits, jnp.zeros_like(logits)], -1)
