"""Cross-entropy with a teacher's softened distribution, its entropy, and Hinton's loss of both."""

import functools

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import computing_dtype
from jaxcomp.distill.logits.checks import (
    check_labels,
    check_logits,
    check_single_logits,
    check_temperature,
    check_weight,
    check_where,
)
from jaxcomp.distill.logits.softmax import cross_entropy, divergence, entropy_of, scale_loss


def entropy(
    logits: Shaped[ArrayLike, "..."],
    temperature: ArrayLike = 1.0,
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Entropy of a softened distribution, per example: how sure a teacher or a student is.

    Near 0 the targets say little more than the labels do, near the log of the number of classes
    they say nothing: a guide when a temperature is chosen. It is what
    :func:`soft_cross_entropy` has more than ``kl_divergence``.

    Args:
        logits: float array of any shape and float dtype; ``axis`` runs over the classes.
        temperature: positive scalar, possibly traced.
        axis: the class axis.
        where: boolean, the elements that count, as in ``kl_divergence``.

    Returns:
        Nats, in the logits' shape without ``axis``; float32, or float64 if the logits are.

    Raises:
        TypeError: logits that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a temperature that is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> teacher = jnp.array([[9.0, 1.0, 0.0], [2.0, 2.0, -jnp.inf]])
        >>> print(entropy(teacher).round(4), entropy(teacher, temperature=4.0).round(4))
        [0.0043 0.6931] [0.625  0.6931]

    Shannon, "A Mathematical Theory of Communication", 1948, section 6.
    """
    array, axis = check_single_logits(logits, axis)
    keep = check_where(where, array.shape, axis)
    temperature = check_temperature(temperature, computing_dtype(array))
    return _entropy(array, temperature, keep, axis)


def soft_cross_entropy(
    student_logits: Shaped[ArrayLike, "..."],
    teacher_logits: Shaped[ArrayLike, "..."],
    temperature: ArrayLike = 1.0,
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Cross-entropy of the student's softened distribution with the teacher's, per example.

    ``-sum(softmax(teacher / T) * log softmax(student / T))`` in nats: the divergence plus the
    teacher's entropy. The student's gradient is that of ``kl_divergence``; the teacher's is not,
    so put ``jax.lax.stop_gradient`` around a teacher that is a function of what you train. It is
    *not* multiplied by ``T**2`` (:func:`additive_hinton_loss` does that).

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
        >>> student, teacher = jnp.array([[1.0, 0.0, -1.0]]), jnp.array([[3.0, 1.0, -2.0]])
        >>> print(soft_cross_entropy(student, teacher, temperature=4.0).round(4))
        [1.0251]

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    student, teacher, axis = check_logits(student_logits, teacher_logits, axis)
    keep = check_where(where, student.shape, axis)
    temperature = check_temperature(temperature, computing_dtype(student, teacher))
    return _soft_cross_entropy(student, teacher, temperature, keep, axis)


def additive_hinton_loss(
    student_logits: Shaped[ArrayLike, "..."],
    teacher_logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    temperature: ArrayLike,
    weight: ArrayLike,
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Cross-entropy with the labels plus a multiple of that with the teacher, per example.

    ``CE(labels, softmax(student)) + weight * T**2 * CE(softmax(teacher / T), softmax(student /
    T))``: the paper's own form, where ``hinton_loss`` is an average and 0 in its soft part when
    student and teacher agree. For given logits of the teacher it moves the student as ``(1 + c) *
    hinton_loss(..., weight=c / (1 + c))`` does with ``c = weight``. Without ``T**2``, as in ``CE +
    c * CE``: pass ``weight=c / T**2``; the two parts then change their proportion with ``T``.

    Args:
        student_logits: float array of any shape and float dtype; ``axis`` runs over the classes.
        teacher_logits: float array of the same shape; its dtype may differ.
        labels: class ids, or target probabilities, as in ``hinton_loss``.
        temperature: positive scalar, possibly traced; it softens the teacher's part only.
        weight: scalar, 0 or more, possibly traced: of the teacher's part.
        axis: the class axis.
        where: boolean, the elements that count, as in ``hinton_loss``.

    Returns:
        Nats, in the logits' shape without ``axis``; float32, or float64 if a logit array is.

    Raises:
        TypeError: logits that are not floating point, labels or ``where`` of an unfit dtype.
        ValueError: shapes that do not fit, a temperature that is not positive and finite, a
            negative weight, class ids that are no class.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.array([[1.0, 0.0, -1.0]]), jnp.array([[3.0, 1.0, -2.0]])
        >>> labels = jnp.array([0])
        >>> print(additive_hinton_loss(student, teacher, labels, 4.0, weight=0.5).round(4))
        [8.6085]

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    student, teacher, axis = check_logits(student_logits, teacher_logits, axis)
    keep = check_where(where, student.shape, axis)
    labels = check_labels(labels, student.shape, keep, axis)
    temperature = check_temperature(temperature, computing_dtype(student, teacher))
    weight = check_weight("weight", weight, temperature.dtype)
    return _additive(student, teacher, labels, temperature, weight, keep, axis)


@functools.partial(jax.jit, static_argnames="axis")
def _entropy(logits: Array, temperature: Array, keep: Array, axis: int) -> Array:
    return entropy_of(logits.astype(temperature.dtype), temperature, keep, axis)


@functools.partial(jax.jit, static_argnames="axis")
def _soft_cross_entropy(
    student: Array, teacher: Array, temperature: Array, keep: Array, axis: int
) -> Array:
    student, teacher = student.astype(temperature.dtype), teacher.astype(temperature.dtype)
    apart = divergence(student, teacher, temperature, keep, axis, False)
    return apart + entropy_of(teacher, temperature, keep, axis)


@functools.partial(jax.jit, static_argnames="axis")
def _additive(
    student: Array,
    teacher: Array,
    labels: Array,
    temperature: Array,
    weight: Array,
    keep: Array,
    axis: int,
) -> Array:
    student, teacher = student.astype(temperature.dtype), teacher.astype(temperature.dtype)
    # In two parts, not one times T**2: that keeps the digits of a divergence at a high temperature.
    soft = divergence(student, teacher, temperature, keep, axis, True)
    soft += temperature * temperature * entropy_of(teacher, temperature, keep, axis)
    return cross_entropy(student, labels, keep, axis) + scale_loss(weight, soft)
