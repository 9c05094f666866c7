"""Hinton's losses: the divergence from a teacher, alone and together with the labels' loss."""

import functools

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import check_scalar, computing_dtype
from jaxcomp.distill.logits.checks import (
    check_labels,
    check_logits,
    check_temperature,
    check_where,
)
from jaxcomp.distill.logits.softmax import cross_entropy, divergence, scale_loss


def kl_divergence(
    student_logits: Shaped[ArrayLike, "..."],
    teacher_logits: Shaped[ArrayLike, "..."],
    temperature: ArrayLike = 1.0,
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Divergence of the student's softened distribution from the teacher's, per example.

    ``KL(softmax(teacher / T) || softmax(student / T))`` in nats. It is *not* multiplied by ``T**2``
    (:func:`hinton_loss` does that). It is never negative, exactly 0 for equal logits, and keeps its
    relative accuracy however close the two distributions are or however high the temperature.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train. The temperature may be learned or follow a schedule.

    Args:
        student_logits: float array of any shape and float dtype; ``axis`` runs over the classes.
        teacher_logits: float array of the same shape; its dtype may differ.
        temperature: positive scalar, possibly traced.
        axis: the class axis.
        where: boolean, the elements that count: of the logits' shape (classes) or of the logits'
            shape without ``axis`` (whole examples, e.g. padding), or broadcastable to one of them;
            the number of axes tells which.

    Returns:
        Nats, in the logits' shape without ``axis``; float32, or float64 if a logit array is.

    Raises:
        TypeError: logits that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a temperature that is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> teacher = jnp.array([[2.0, 0.0, -jnp.inf], [1.0, 2.0, 3.0]])
        >>> student = jnp.array([[0.0, 0.0, 5.0], [1.0, 2.0, 3.0]])
        >>> print(kl_divergence(student, teacher, temperature=2.0).round(4))
        [2.0698 0.    ]
        >>> counts = jnp.array([[True, True, False]])
        >>> print(kl_divergence(student, teacher, where=counts).round(4))
        [0.3278 0.    ]

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    student, teacher, axis = check_logits(student_logits, teacher_logits, axis)
    keep = check_where(where, student.shape, axis)
    temperature = check_temperature(temperature, computing_dtype(student, teacher))
    return _loss(student, teacher, temperature, keep=keep, axis=axis)


def hinton_loss(
    student_logits: Shaped[ArrayLike, "..."],
    teacher_logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    temperature: ArrayLike,
    weight: ArrayLike,
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Weighted average of the labels' loss and the teacher's, per example.

    ``(1 - weight) * CE(labels, softmax(student)) + weight * T**2 * KL(teacher || student at T)``,
    in nats. ``weight = 0`` is plain cross-entropy, ``weight = 1`` the teacher alone. ``T**2`` keeps
    the two parts in proportion when the temperature changes. The paper's soft part is a
    cross-entropy; the divergence here is that less the teacher's entropy: the student's gradient
    is the same, and zero means that student and teacher agree. The form ``CE + c * T**2 * KL`` is
    ``(1 + c) * hinton_loss(..., weight=c / (1 + c))``.

    Smoothed labels are target probabilities: ``optax.smooth_labels(jax.nn.one_hot(labels, classes),
    0.1)``. The teacher had better not be trained on such: they let it forget which of the wrong
    classes an example resembles, which is what it has to teach (Müller, Kornblith and Hinton, "When
    Does Label Smoothing Help?", 2019, section 4).

    Args:
        student_logits: float array of any shape and float dtype; ``axis`` runs over the classes.
        teacher_logits: float array of the same shape; its dtype may differ.
        labels: class ids, of an integer dtype and the logits' shape without ``axis``; or target
            probabilities (one-hot, smoothed, mixed) of any real dtype and the logits' shape.
        temperature: positive scalar, possibly traced; it softens the teacher's part only.
        weight: scalar in [0, 1], possibly traced: the share of the teacher's part.
        axis: the class axis.
        where: boolean, the elements that count, as in :func:`kl_divergence`. As in optax, target
            probabilities of other classes are left out of the sum: an example whose label is such
            a class has no hard part. Ids of examples left out whole are not read (-100 is fine).

    Returns:
        Nats, in the logits' shape without ``axis``; float32, or float64 if a logit array is.

    Raises:
        TypeError: logits that are not floating point, labels or ``where`` of an unfit dtype.
        ValueError: shapes that do not fit, a temperature that is not positive and finite, a weight
            outside [0, 1], class ids that are no class.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> student = jnp.array([[1.0, 0.0, -1.0], [0.5, 0.0, 0.0]])
        >>> teacher = jnp.array([[3.0, 1.0, -2.0], [0.0, 4.0, 1.0]])
        >>> labels = jnp.array([0, 1])
        >>> def loss(logits):
        ...     return hinton_loss(logits, teacher, labels, temperature=4.0, weight=0.9).mean()
        >>> print(loss(student).round(4))
        1.1815
        >>> print((1000 * jax.grad(loss)(student)).round())
        [[-213.   23.  190.]
         [ 314. -440.  126.]]

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, sections 2, 2.1.
    """
    student, teacher, axis = check_logits(student_logits, teacher_logits, axis)
    keep = check_where(where, student.shape, axis)
    labels = check_labels(labels, student.shape, keep, axis)
    temperature = check_temperature(temperature, computing_dtype(student, teacher))
    remedy = "must be in [0, 1]: for CE + c * KL take (1 + c) times the loss at c / (1 + c)"
    weight = check_scalar("weight", weight, 0, 1, remedy).astype(temperature.dtype)
    return _loss(student, teacher, temperature, (labels, weight), keep=keep, axis=axis)


# Compiled as a whole: called outside jit it is one program instead of sixty.
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
    student, teacher = student.astype(temperature.dtype), teacher.astype(temperature.dtype)
    if labels_and_weight is None:
        return divergence(student, teacher, temperature, keep, axis, False)
    labels, weight = labels_and_weight
    soft = divergence(student, teacher, temperature, keep, axis, True)
    hard = cross_entropy(student, labels, keep, axis)
    return scale_loss(1 - weight, hard) + scale_loss(weight, soft)
