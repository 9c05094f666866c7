"""Divergences between the token distributions of a student and of a teacher, other than forward KL.

The forward one is :func:`jaxcomp.distill.kl_divergence`: it makes the student cover all that the
teacher may say. The reverse one makes it say only what the teacher would; the generalised
Jensen-Shannon divergence lies between them. All hold to the rules of
:mod:`jaxcomp.distill.logits`; for language models the logits are ``(batch, length,
vocabulary)`` and ``where`` is ``(batch, length)``, false at padding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import check_scalar, computing_dtype
from jaxcomp.distill.logits.checks import check_logits, check_temperature, check_where
from jaxcomp.distill.logits.softmax import (
    Softmax,
    compare,
    divergence,
    divergence_value,
    second_order,
)


def reverse_kl_divergence(
    student_logits: Shaped[ArrayLike, "..."],
    teacher_logits: Shaped[ArrayLike, "..."],
    temperature: ArrayLike = 1.0,
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Divergence of the teacher's softened distribution from the student's, per position.

    ``KL(softmax(student / T) || softmax(teacher / T))`` in nats. It is never negative, exactly 0
    for equal logits, and keeps its relative accuracy however close the two are. It is infinite
    where the student says what the teacher gives probability zero; no finite change of the student
    helps there, so that its gradient is 0: leave such classes out by ``where``.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train. MiniLLM samples the positions from the student
    (:func:`jaxcomp.distill.sample_tokens`) and differentiates the sampling too, by policy
    gradient; this is its single-step part, as GKD uses it.

    Args:
        student_logits: float array of any shape and float dtype; ``axis`` runs over the tokens
            of the vocabulary.
        teacher_logits: float array of the same shape; its dtype may differ.
        temperature: positive scalar, possibly traced.
        axis: the axis of the vocabulary.
        where: boolean, what counts: of the logits' shape (classes) or of the logits' shape without
            ``axis`` (positions), or broadcastable to one of them.

    Returns:
        Nats, in the logits' shape without ``axis``; float32, or float64 if a logit array is.

    Raises:
        TypeError: logits that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a temperature that is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> teacher = jnp.array([[2.0, 0.0, 1.0], [1.0, 2.0, 3.0]])
        >>> student = jnp.array([[0.0, 0.0, -jnp.inf], [1.0, 2.0, 3.0]])
        >>> print(reverse_kl_divergence(student, teacher).round(4))
        [0.7145 0.    ]

    Gu, Dong, Wei and Huang, "MiniLLM: Knowledge Distillation of Large Language Models", 2024,
    section 2.1.
    """
    student, teacher, axis = check_logits(student_logits, teacher_logits, axis)
    keep = check_where(where, student.shape, axis)
    temperature = check_temperature(temperature, computing_dtype(student, teacher))
    return _reverse(student, teacher, temperature, keep=keep, axis=axis)


def jensen_shannon_divergence(
    student_logits: Shaped[ArrayLike, "..."],
    teacher_logits: Shaped[ArrayLike, "..."],
    temperature: ArrayLike = 1.0,
    *,
    interpolation: ArrayLike = 0.5,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Generalised Jensen-Shannon divergence of student and teacher, per position.

    With ``p`` the teacher's softened distribution, ``q`` the student's, ``b`` the interpolation
    and ``m = b * p + (1 - b) * q``::

        b * KL(p || m) + (1 - b) * KL(q || m)

    in nats; at ``b = 1/2`` the Jensen-Shannon divergence. Inside (0, 1) it is finite, whatever the
    classes that either excludes: at most ``-b log b - (1 - b) log(1 - b)``.

    **The ends.** The formula itself is 0 at 0 and 1; what GKD means there is its limit after
    division by ``b`` or by ``1 - b``. So ``b = 0`` is the forward ``KL(p || q)`` and ``b = 1`` the
    reverse ``KL(q || p)``, and the value jumps there: close to an end it is about ``b`` or
    ``1 - b`` times that. Divide by ``b * (1 - b)`` inside where a schedule is to come near an end.

    It is never negative, exactly 0 for equal logits, and keeps its relative accuracy however close
    the two are. Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher
    that is also a function of what you train.

    Args:
        student_logits: float array of any shape and float dtype; ``axis`` runs over the tokens
            of the vocabulary.
        teacher_logits: float array of the same shape; its dtype may differ.
        temperature: positive scalar, possibly traced.
        interpolation: the teacher's share of the mixture, a scalar in [0, 1], possibly traced.
        axis: the axis of the vocabulary.
        where: boolean, what counts: of the logits' shape (classes) or of the logits' shape without
            ``axis`` (positions), or broadcastable to one of them.

    Returns:
        Nats, in the logits' shape without ``axis``; float32, or float64 if a logit array is.

    Raises:
        TypeError: logits that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a temperature that is not positive and finite, an
            interpolation outside [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> teacher = jnp.array([[2.0, 0.0, -jnp.inf], [1.0, 2.0, 3.0]])
        >>> student = jnp.array([[0.0, 0.0, 5.0], [1.0, 2.0, 3.0]])
        >>> print(jensen_shannon_divergence(student, teacher).round(4))
        [0.6606 0.    ]
        >>> print(jensen_shannon_divergence(student, teacher, interpolation=0.0).round(4))
        [4.6481 0.    ]

    Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
    Mistakes", 2024, section 2, equation 1.
    """
    student, teacher, axis = check_logits(student_logits, teacher_logits, axis)
    keep = check_where(where, student.shape, axis)
    dtype = computing_dtype(student, teacher)
    temperature = check_temperature(temperature, dtype)
    mixing = check_scalar("interpolation", interpolation, 0, 1, "must be in [0, 1]").astype(dtype)
    return _jensen_shannon(student, teacher, temperature, mixing, keep=keep, axis=axis)


# Compiled as a whole: called outside jit each is one program.
@functools.partial(jax.jit, static_argnames="axis")
def _reverse(student: Array, teacher: Array, temperature: Array, *, keep: Array, axis: int) -> Any:
    student, teacher = student.astype(temperature.dtype), teacher.astype(temperature.dtype)
    # The roles change, but a row without a teacher is padding still.
    taught = jnp.any(keep & (teacher != -jnp.inf), axis, keepdims=True)
    speaks = jnp.any(keep & (student != -jnp.inf), axis, keepdims=True)
    value = divergence(teacher, student, temperature, keep & taught, axis, False)
    return value + jnp.squeeze(jnp.where(taught & ~speaks, jnp.inf, 0), axis)


@functools.partial(jax.jit, static_argnames="axis")
def _jensen_shannon(
    student: Array, teacher: Array, temperature: Array, mixing: Array, *, keep: Array, axis: int
) -> Array:
    student, teacher = student.astype(temperature.dtype), teacher.astype(temperature.dtype)
    return _mixed(student, teacher, temperature, mixing, keep, axis)


def _shares(mixing: Array) -> tuple[Array, Array, Array]:
    """The interpolation, NaN outside [0, 1], and the weights of the teacher's and student's KL."""
    mixing = jnp.where((mixing >= 0) & (mixing <= 1), mixing, jnp.nan)
    end = (mixing == 0) | (mixing == 1)
    return mixing, jnp.where(end, 1 - mixing, mixing), jnp.where(end, mixing, 1 - mixing)


def _against_mixture(log_ratio: Array, own: Array) -> Array:
    """``log(p / mixture)`` from ``log p/q``, where the mixture is ``own * p + (1 - own) * q``."""
    small = jnp.abs(log_ratio) < 0.5
    x = jnp.where(small, log_ratio, 0)
    near = -jnp.log1p((1 - own) * (x * (x * second_order(x) - 1)))
    # From the ratio, not from p over the mixture: a share of the smallest p is flushed to zero.
    above = jnp.where(log_ratio > 0, log_ratio, 1)
    rest = own + (1 - own) * jnp.exp(-above)
    far_above = jnp.where(own > 0.5, jnp.log1p((1 - own) * jnp.expm1(-above)), jnp.log(rest))
    far_above = jnp.where(own == 0, above, -far_above)
    below = jnp.clip(log_ratio, -80, 0)
    far_below = -jnp.log1p((1 - own) * jnp.expm1(-below))
    least = jnp.where(log_ratio < -80, log_ratio, -81)
    vanishing = jnp.where(own == 1, 0, least - jnp.log1p(-jnp.where(own == 1, 0, own)))
    far = jnp.where(log_ratio > 0, far_above, jnp.where(log_ratio < -80, vanishing, far_below))
    return jnp.where(small, near, far)


def _parts(
    student: Array, teacher: Array, temperature: Array, mixing: Array, keep: Array, axis: int
) -> tuple[Softmax, Softmax, Array, tuple[Array, Array], tuple[Array, Array]]:
    """Both softmaxes, log p/q, then of teacher and student log-ratio and KL to the mixture."""
    s, t, log_ratio = compare(student, teacher, temperature, keep, axis)
    p, q = t.probabilities, s.probabilities
    mixture = mixing * p + (1 - mixing) * q
    to_p = _against_mixture(log_ratio, mixing)
    to_q = _against_mixture(-log_ratio, 1 - mixing)
    # A student without any class left is no distribution: it is infinitely far, not a mixture.
    silent = jnp.any(t.possible, axis) & ~jnp.any(s.possible, axis)
    kl_p, kl_q = (
        jnp.where(silent, jnp.inf, divergence_value(each, mixture, ratio, 1.0, axis))
        for each, ratio in ((p, to_p), (q, to_q))
    )
    return s, t, log_ratio, (to_p, kl_p), (to_q, kl_q)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _mixed(
    student: Array, teacher: Array, temperature: Array, mixing: Array, keep: Array, axis: int
) -> Array:
    mixing, share_p, share_q = _shares(mixing)
    *_, (_, kl_p), (_, kl_q) = _parts(student, teacher, temperature, mixing, keep, axis)
    return _share_of(share_p, kl_p) + _share_of(share_q, kl_q)


def _share_of(share: Array, value: Array) -> Array:
    return share * jnp.where(share == 0, 0, value)


# Written out for the same reasons as that of the KL: nothing here can be NaN, and nearly equal
# distributions keep their digits.
@functools.partial(_mixed.defjvp, symbolic_zeros=True)
def _mixed_jvp(axis: int, primals: Any, tangents: Any) -> tuple[Any, Any]:
    student, teacher, temperature, mixing, keep = primals
    student_dot, teacher_dot, temperature_dot, mixing_dot, _ = tangents
    mixing, share_p, share_q = _shares(mixing)
    s, t, log_ratio, (to_p, kl_p), (to_q, kl_q) = _parts(
        student, teacher, temperature, mixing, keep, axis
    )
    value = _share_of(share_p, kl_p) + _share_of(share_q, kl_q)
    p, q = t.probabilities, s.probabilities
    small = jnp.abs(log_ratio) < 0.5
    x = jnp.where(small, log_ratio, 0)
    difference = jnp.where(small, p * x * (x * second_order(x) - 1), q - p)
    # Of a KL, its first argument moves by the ratio, its second, the ends' other one, by q - p.
    to_student = jnp.where(mixing == 0, difference, _excess(q, to_q, kl_q, share_q, axis))
    to_teacher = jnp.where(mixing == 1, -difference, _excess(p, to_p, kl_p, share_p, axis))

    tangent = jnp.zeros_like(value)
    for coefficient, dot, scaled in (
        (to_student, student_dot, s.scaled),
        (to_teacher, teacher_dot, t.scaled),
    ):
        possible = scaled != -jnp.inf
        coefficient = jnp.where(possible, coefficient, 0) / temperature
        if not isinstance(dot, SymbolicZero):
            tangent += jnp.sum(coefficient * jnp.where(possible, dot, 0), axis)
        if not isinstance(temperature_dot, SymbolicZero):
            moment = jnp.sum(coefficient * jnp.where(possible, scaled, 0), axis)
            tangent -= moment * temperature_dot
    if not isinstance(mixing_dot, SymbolicZero):
        inside = (mixing > 0) & (mixing < 1)  # At the ends the value jumps.
        slope = jnp.where(inside & jnp.isfinite(kl_p), kl_p, 0) - jnp.where(
            inside & jnp.isfinite(kl_q), kl_q, 0
        )
        tangent += slope * mixing_dot
    return value, tangent


def _excess(p: Array, log_ratio: Array, kl: Array, share: Array, axis: int) -> Array:
    """``share * p * (log_ratio - KL)``, 0 where p is, or where no finite change helps."""
    total = jnp.expand_dims(kl, axis)
    unmoved = (p == 0) | jnp.isinf(total)
    ratio, total = jnp.where(unmoved, 0, log_ratio), jnp.where(unmoved, 0, total)
    return share * p * (ratio - total)
