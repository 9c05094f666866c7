"""What the logit losses compute: softmax of student and teacher, and how far they are apart.

For arrays that :mod:`jaxcomp.distill.logits.checks` has checked, all of one float dtype. ``keep``
is a boolean array that broadcasts against the logits: the classes that count.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array


class Softmax(NamedTuple):
    """The pieces of a softmax over the classes that are possible."""

    possible: Array  # counts, and its logit is not -inf
    half: Array  # logits / 2, zero where impossible
    half_top: Array  # their maximum
    scaled: Array  # (logits - maximum) / temperature, -inf where impossible
    exponential: Array
    total: Array  # at least 1

    @property
    def probabilities(self) -> Array:
        """Zero for a class that is not possible."""
        return self.exponential / self.total


def softmax(logits: Array, keep: Array, temperature: Any, axis: int) -> Softmax:
    """Over the classes that count, at a temperature; a row without any is all zero."""
    possible = keep & (logits != -jnp.inf)
    # Halved, so that no difference of two finite logits overflows: masks of finfo.min are common.
    half = jnp.where(possible, logits, 0) * 0.5
    top = jnp.max(jnp.where(possible, half, -jnp.inf), axis, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    # The maximum goes before the division: a tiny temperature then sends logits to -inf only.
    scaled = jnp.where(possible, (half - top) / (temperature * 0.5), -jnp.inf)
    exponential = jnp.exp(scaled)
    total = jnp.sum(exponential, axis, keepdims=True)
    return Softmax(possible, half, top, scaled, exponential, jnp.where(total == 0, 1, total))


def entropy_of(logits: Array, temperature: Array, keep: Array, axis: int) -> Array:
    """Nats; relative accuracy also where one class has nearly all. NaN for a temperature <= 0."""
    s = softmax(logits, keep, jnp.where(temperature > 0, temperature, jnp.nan), axis)
    # log(total) through what the first maximum adds to: near one its digits would be gone.
    first = jnp.argmax(s.scaled, axis, keepdims=True)
    first = (jax.lax.broadcasted_iota(first.dtype, logits.shape, axis) == first) & s.possible
    rest = jnp.sum(s.exponential - first, axis)
    # Of what has no probability left the fall may be so large that its derivative overflows.
    fall = jnp.where(s.exponential == 0, 0, -s.scaled)
    return jnp.log1p(rest) + jnp.sum(s.probabilities * fall, axis)


def is_class(labels: Array, shape: tuple[int, ...], axis: int) -> Array:
    """One-hot of class ids. Compared, not gathered: the same on every sharding, and fused."""
    ids = jnp.expand_dims(labels, axis)
    return ids == jax.lax.broadcasted_iota(labels.dtype, shape, axis)


def compare(
    student: Array, teacher: Array, temperature: Array, keep: Array, axis: int
) -> tuple[Softmax, Softmax, Array]:
    """Student q, teacher p, and log p/q: inf where only p is possible, -inf where only q is."""
    temperature = jnp.where(temperature > 0, temperature, jnp.nan)
    t = softmax(teacher, keep, temperature, axis)
    s = softmax(student, keep & jnp.any(t.possible, axis, keepdims=True), temperature, axis)
    both = t.possible & s.possible
    # log p/q up to a constant of the row, in the order of subtractions that rounds less: rows that
    # nearly agree keep their digits, and so does a row beside one with a huge offset.
    apart, p_fall, q_fall = t.half - s.half, t.half - t.half_top, s.half - s.half_top
    direct = jnp.abs(apart) < jnp.abs(p_fall) + jnp.abs(q_fall)
    gap = jnp.where(direct, apart - (t.half_top - s.half_top), p_fall - q_fall)
    gap = jnp.where(both, gap / (temperature * 0.5), 0)
    # The constant, log(t.total / s.total): through the change of the sum when that is small, since
    # near-equal rows (and high temperatures) would lose every digit in the difference of two logs.
    close = both & (jnp.abs(gap) < 0.5)
    x = jnp.where(close, gap, 0)
    grown = s.exponential * x * (1 + x * second_order(-x))
    change = jnp.where(close, grown, t.exponential - s.exponential)
    relative = jnp.sum(change, axis, keepdims=True) / s.total
    near = jnp.abs(relative) < 0.5
    logs = jnp.log(t.total) - jnp.log(s.total)
    shift = jnp.where(near, jnp.log1p(jnp.where(near, relative, 0)), logs)
    one_sided = jnp.where(t.possible, jnp.inf, jnp.where(s.possible, -jnp.inf, 0))
    return s, t, jnp.where(both, gap - shift, one_sided)


def second_order(x: Array) -> Array:
    """``(exp(-x) - 1 + x) / x**2`` for ``abs(x) < 1/2``: its Taylor series, to below rounding.

    Through it ``exp(-x) - 1 = x * (x * series - 1)``, at a fraction of the cost of ``expm1``.
    """
    series = jnp.zeros_like(x)
    for k in reversed(range(8 if x.dtype == jnp.float32 else 15)):
        series = (1 - x * series) * (1 / (k + 2))
    return series


def divergence_value(p: Array, q: Array, log_ratio: Array, scale: Any, axis: int) -> Array:
    """``scale**2 * KL`` as the sum of ``p * (exp(-r) - 1 + r)``, ``r = log p/q``: no term below 0.

    The sum is stationary in the common constant of all ``r``, whose error enters only squared.
    The scale multiplies in steps: neither may ``T**2`` overflow nor ``1/T**2`` vanish.
    """
    small = jnp.abs(log_ratio) < 0.5
    x = jnp.where(small, log_ratio, 0)
    near = p * second_order(x) * jnp.square(scale * x)
    surprise = jnp.where(p > 0, p * jnp.where(p > 0, log_ratio, 0), 0)
    far = jnp.maximum(q - p + surprise, 0) * scale * scale
    return jnp.sum(jnp.where(small, near, far), axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def divergence(
    student: Array, teacher: Array, temperature: Array, keep: Array, axis: int, times_square: bool
) -> Array:
    """KL, or ``T**2 * KL`` if ``times_square``; NaN for a temperature that is not positive."""
    s, t, log_ratio = compare(student, teacher, temperature, keep, axis)
    scale = temperature if times_square else 1.0
    return divergence_value(t.probabilities, s.probabilities, log_ratio, scale, axis)


# The derivative is written out: q - p and p * (r - KL) need nothing that can be NaN, keep their
# digits when p and q are close, and leave the backward pass one coefficient to multiply with.
@functools.partial(divergence.defjvp, symbolic_zeros=True)
def _divergence_jvp(axis: int, times_square: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    student, teacher, temperature, keep = primals
    student_dot, teacher_dot, temperature_dot, _ = tangents
    scale, rate = (temperature, 1.0) if times_square else (1.0, 1 / temperature)
    s, t, log_ratio = compare(student, teacher, temperature, keep, axis)
    p, q = t.probabilities, s.probabilities
    value = divergence_value(p, q, log_ratio, scale, axis)
    small = jnp.abs(log_ratio) < 0.5
    x = jnp.where(small, log_ratio, 0)
    to_student = jnp.where(small, p * x * (x * second_order(x) - 1), q - p) * scale * rate
    total = jnp.expand_dims(value, axis)
    unmoved = (p == 0) | jnp.isinf(total)
    excess = jnp.where(unmoved, 0, scale * jnp.where(unmoved, 0, log_ratio) - total / scale)
    to_teacher = p * excess * rate

    tangent = jnp.zeros_like(value)
    for coefficient, dot, scaled in (
        (to_student, student_dot, s.scaled),
        (to_teacher, teacher_dot, t.scaled),
    ):
        possible = scaled != -jnp.inf
        coefficient = jnp.where(possible, coefficient, 0)
        if not isinstance(dot, SymbolicZero):
            tangent += jnp.sum(coefficient * jnp.where(possible, dot, 0), axis)
        if not isinstance(temperature_dot, SymbolicZero):
            moment = jnp.sum(coefficient * jnp.where(possible, scaled, 0), axis)
            tangent -= moment * temperature_dot
    if times_square and not isinstance(temperature_dot, SymbolicZero):
        tangent += 2 * value / temperature * temperature_dot
    return value, tangent


def cross_entropy(logits: Array, labels: Array, keep: Array, axis: int) -> Array:
    """From class ids or target probabilities; NaN where an id that is read is no class."""
    targets, unknown = labels, False
    if labels.ndim < logits.ndim:
        targets = is_class(labels, logits.shape, axis)
        unknown = ((labels < 0) | (labels >= logits.shape[axis])) & jnp.any(keep, axis)
    targets = jnp.where(keep, targets.astype(logits.dtype), 0)
    s = softmax(logits, keep, 1.0, axis)
    possible = s.scaled != -jnp.inf  # Not s.possible: a huge difference may have overflowed.
    terms = targets * (jnp.log(s.total) - jnp.where(possible, s.scaled, 0))
    # Added, not multiplied in: the infinity is then a constant and the gradients stay finite.
    terms += jnp.where(possible | (targets == 0), 0, jnp.inf)
    return jnp.where(unknown, jnp.nan, jnp.sum(terms, axis))


def scale_loss(weight: Array, loss: Array) -> Array:
    """``weight * loss`` with ``0 * inf = 0``, so that a part switched off spoils nothing."""
    return weight * jnp.where((weight == 0) & jnp.isinf(loss), 0, loss)
