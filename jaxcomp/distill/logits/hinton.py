"""Losses between the logits of a student and of a teacher.

Pure functions on arrays in the manner of ``optax.losses``: the class axis is reduced, all other
axes stay, and the caller takes the mean. They hold to four rules.

* **Dtype.** Everything is computed, and returned, in float32, or in float64 if one of the logit
  arrays is. optax returns the dtype of the logits; a loss in bfloat16 has three digits, and a mean
  over a batch of such losses stands still long before the student does. Gradients come back in
  the dtype of the argument they belong to.
* **Classes that do not count.** A class whose ``where`` is false is not read in any argument: NaN
  and infinity there reach neither the loss nor a gradient. The rest is renormalised. A logit of
  ``-inf`` is a class of probability zero, with ``0 log 0 = 0``; its own gradient is zero. A row in
  which the teacher has no class left is padding: its divergence is 0.
* **Infinity.** A student that gives probability zero to what the teacher (or the label) deems
  possible has an infinite loss. Its gradients stay finite: the student's is the limit
  ``softmax(student) - softmax(teacher)``, the teacher's is 0, as no finite change helps.
  A ``+inf`` or NaN logit in a class that counts makes the loss of its example NaN, and of no
  other: an overflow is shown, not hidden.
* **Checks.** Shapes and dtypes are always checked. Values (temperature, weight, labels) are checked
  when they are known; inside ``jit`` a temperature that is not positive, or a label that is no
  class, makes the loss NaN.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped


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
    student, teacher, axis = _check_logits(student_logits, teacher_logits, axis)
    keep = _check_where(where, student.shape, axis)
    temperature = _check_temperature(temperature, _computing_dtype(student, teacher))
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
    student, teacher, axis = _check_logits(student_logits, teacher_logits, axis)
    keep = _check_where(where, student.shape, axis)
    labels = _check_labels(labels, student.shape, keep, axis)
    temperature = _check_temperature(temperature, _computing_dtype(student, teacher))
    remedy = "must be in [0, 1]: for CE + c * KL take (1 + c) times the loss at c / (1 + c)"
    weight = _check_scalar("weight", weight, 0, 1, remedy).astype(temperature.dtype)
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
        return _divergence(student, teacher, temperature, keep, axis, False)
    labels, weight = labels_and_weight
    soft = _divergence(student, teacher, temperature, keep, axis, True)
    hard = _cross_entropy(student, labels, keep, axis)
    return _scale_loss(1 - weight, hard) + _scale_loss(weight, soft)


class _Softmax(NamedTuple):
    """The pieces of a softmax over the classes that are possible."""

    possible: Array  # counts, and its logit is not -inf
    half: Array  # logits / 2, zero where impossible
    half_top: Array  # their maximum
    scaled: Array  # (logits - maximum) / temperature, -inf where impossible
    exponential: Array
    total: Array  # at least 1

    @property
    def probabilities(self) -> Array:
        return self.exponential / self.total


def _softmax(logits: Array, keep: Array, temperature: Any, axis: int) -> _Softmax:
    possible = keep & (logits != -jnp.inf)
    # Halved, so that no difference of two finite logits overflows: masks of finfo.min are common.
    half = jnp.where(possible, logits, 0) * 0.5
    top = jnp.max(jnp.where(possible, half, -jnp.inf), axis, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    # The maximum goes before the division: a tiny temperature then sends logits to -inf only.
    scaled = jnp.where(possible, (half - top) / (temperature * 0.5), -jnp.inf)
    exponential = jnp.exp(scaled)
    total = jnp.sum(exponential, axis, keepdims=True)
    return _Softmax(possible, half, top, scaled, exponential, jnp.where(total == 0, 1, total))


def _compare(
    student: Array, teacher: Array, temperature: Array, keep: Array, axis: int
) -> tuple[_Softmax, _Softmax, Array]:
    """Student q, teacher p, and log p/q: inf where only p is possible, -inf where only q is."""
    temperature = jnp.where(temperature > 0, temperature, jnp.nan)
    t = _softmax(teacher, keep, temperature, axis)
    s = _softmax(student, keep & jnp.any(t.possible, axis, keepdims=True), temperature, axis)
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
    grown = s.exponential * x * (1 + x * _second_order(-x))
    change = jnp.where(close, grown, t.exponential - s.exponential)
    relative = jnp.sum(change, axis, keepdims=True) / s.total
    near = jnp.abs(relative) < 0.5
    logs = jnp.log(t.total) - jnp.log(s.total)
    shift = jnp.where(near, jnp.log1p(jnp.where(near, relative, 0)), logs)
    one_sided = jnp.where(t.possible, jnp.inf, jnp.where(s.possible, -jnp.inf, 0))
    return s, t, jnp.where(both, gap - shift, one_sided)


def _second_order(x: Array) -> Array:
    """``(exp(-x) - 1 + x) / x**2`` for ``abs(x) < 1/2``: its Taylor series, to below rounding.

    Through it ``exp(-x) - 1 = x * (x * series - 1)``, at a fraction of the cost of ``expm1``.
    """
    series = jnp.zeros_like(x)
    for k in reversed(range(8 if x.dtype == jnp.float32 else 15)):
        series = (1 - x * series) * (1 / (k + 2))
    return series


def _value(p: Array, q: Array, log_ratio: Array, scale: Any, axis: int) -> Array:
    """``scale**2 * KL`` as the sum of ``p * (exp(-r) - 1 + r)``, ``r = log p/q``: no term below 0.

    The sum is stationary in the common constant of all ``r``, whose error enters only squared.
    The scale multiplies in steps: neither may ``T**2`` overflow nor ``1/T**2`` vanish.
    """
    small = jnp.abs(log_ratio) < 0.5
    x = jnp.where(small, log_ratio, 0)
    near = p * _second_order(x) * jnp.square(scale * x)
    surprise = jnp.where(p > 0, p * jnp.where(p > 0, log_ratio, 0), 0)
    far = jnp.maximum(q - p + surprise, 0) * scale * scale
    return jnp.sum(jnp.where(small, near, far), axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _divergence(
    student: Array, teacher: Array, temperature: Array, keep: Array, axis: int, times_square: bool
) -> Array:
    """KL, or ``T**2 * KL`` if ``times_square``; NaN for a temperature that is not positive."""
    s, t, log_ratio = _compare(student, teacher, temperature, keep, axis)
    scale = temperature if times_square else 1.0
    return _value(t.probabilities, s.probabilities, log_ratio, scale, axis)


# The derivative is written out: q - p and p * (r - KL) need nothing that can be NaN, keep their
# digits when p and q are close, and leave the backward pass one coefficient to multiply with.
@functools.partial(_divergence.defjvp, symbolic_zeros=True)
def _divergence_jvp(axis: int, times_square: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    student, teacher, temperature, keep = primals
    student_dot, teacher_dot, temperature_dot, _ = tangents
    scale, rate = (temperature, 1.0) if times_square else (1.0, 1 / temperature)
    s, t, log_ratio = _compare(student, teacher, temperature, keep, axis)
    p, q = t.probabilities, s.probabilities
    value = _value(p, q, log_ratio, scale, axis)
    small = jnp.abs(log_ratio) < 0.5
    x = jnp.where(small, log_ratio, 0)
    to_student = jnp.where(small, p * x * (x * _second_order(x) - 1), q - p) * scale * rate
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


def _cross_entropy(logits: Array, labels: Array, keep: Array, axis: int) -> Array:
    """From class ids or target probabilities; NaN where an id that is read is no class."""
    targets, unknown = labels, False
    if labels.ndim < logits.ndim:
        # Compared, not gathered: the same on every sharding, and fused into the sum.
        ids = jnp.expand_dims(labels, axis)
        targets = ids == jax.lax.broadcasted_iota(labels.dtype, logits.shape, axis)
        unknown = ((labels < 0) | (labels >= logits.shape[axis])) & jnp.any(keep, axis)
    targets = jnp.where(keep, targets.astype(logits.dtype), 0)
    s = _softmax(logits, keep, 1.0, axis)
    possible = s.scaled != -jnp.inf  # Not s.possible: a huge difference may have overflowed.
    terms = targets * (jnp.log(s.total) - jnp.where(possible, s.scaled, 0))
    # Added, not multiplied in: the infinity is then a constant and the gradients stay finite.
    terms += jnp.where(possible | (targets == 0), 0, jnp.inf)
    return jnp.where(unknown, jnp.nan, jnp.sum(terms, axis))


def _scale_loss(weight: Array, loss: Array) -> Array:
    """``weight * loss`` with ``0 * inf = 0``, so that a part switched off spoils nothing."""
    return weight * jnp.where((weight == 0) & jnp.isinf(loss), 0, loss)


def _known(value: Any) -> np.ndarray | None:
    """The value as a NumPy array; None if it is traced or lies on other hosts."""
    if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
        return None
    return np.asarray(value)


def _computing_dtype(*arrays: Array) -> Any:
    return jnp.float64 if jnp.float64 in [array.dtype for array in arrays] else jnp.float32


def _check_logits(student_logits: Any, teacher_logits: Any, axis: int) -> tuple[Array, Array, int]:
    """Both as arrays, and ``axis`` from the front."""
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    for name, array in (("student_logits", student), ("teacher_logits", teacher)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {array.dtype}: cast it.")
    shape = student.shape
    if shape != teacher.shape:
        message = f"student_logits {shape} and teacher_logits {teacher.shape} must have one shape"
        raise ValueError(f"{message}: use jnp.broadcast_to, or slice both to the same classes.")
    if not -len(shape) <= axis < len(shape) or shape[axis] == 0:
        raise ValueError(f"logits {shape} have no class on axis {axis}: pass the classes' axis=.")
    return student, teacher, axis % len(shape)


def _check_where(where: Any, shape: tuple[int, ...], axis: int) -> Array:
    if where is None:
        return jnp.ones((1,) * len(shape), bool)
    keep = jnp.asarray(where)
    if keep.dtype != bool:
        raise TypeError(f"where must be boolean, got {keep.dtype}: pass where != 0.")
    examples = shape[:axis] + shape[axis + 1 :]
    for wanted in (shape, examples):
        fits = all(a in (1, b) for a, b in zip(keep.shape, wanted, strict=False))
        if keep.ndim == len(wanted) and fits:
            return keep if wanted == shape else jnp.expand_dims(keep, axis)
    raise ValueError(
        f"where {keep.shape} fits neither the logits {shape} (classes that count) nor {examples} "
        "(examples that count): give it one of these shapes, or size 1 on the axes it spans."
    )


def _check_labels(labels: Any, shape: tuple[int, ...], keep: Array, axis: int) -> Array:
    """Class ids, wide enough to be compared with any class, or target probabilities."""
    array = jnp.asarray(labels)
    examples, classes = shape[:axis] + shape[axis + 1 :], shape[axis]
    if array.shape == shape and not jnp.issubdtype(array.dtype, jnp.complexfloating):
        return array
    if array.shape != examples:
        raise ValueError(
            f"labels {array.shape} {array.dtype} must be class ids of shape {examples} or real "
            f"target probabilities of shape {shape}, as logits {shape} have classes on axis {axis}."
        )
    if not jnp.issubdtype(array.dtype, jnp.integer):
        message = f"labels {array.shape} are class ids and must be integers, got {array.dtype}"
        raise TypeError(f"{message}: cast them, or pass target probabilities of shape {shape}.")
    known, known_keep = _known(labels), _known(keep)
    if known is not None and known_keep is not None:
        read = np.broadcast_to(known_keep.any(axis), examples)
        unknown = known[read & ((known < 0) | (known >= classes))]
        if unknown.size:
            message = f"labels hold {unknown[0]}, but logits have classes 0 to {classes - 1}"
            raise ValueError(f"{message}: map labels to these, or leave examples out with where=.")
    return array.astype(jnp.int32) if array.dtype.itemsize < 4 else array


def _check_temperature(temperature: Any, dtype: Any) -> Array:
    low, high = 2 * jnp.finfo(dtype).tiny, jnp.finfo(dtype).max
    remedy = "must be positive and finite: 1 to 20 is usual"
    return _check_scalar("temperature", temperature, low, high, remedy).astype(dtype)


def _check_scalar(name: str, value: Any, low: Any, high: Any, remedy: str) -> Array:
    array, known = jnp.asarray(value), _known(value)
    if array.ndim:
        raise ValueError(f"{name} {array.shape} must be a scalar: use jax.vmap for one an example.")
    if known is not None and not float(low) <= float(known) <= float(high):
        raise ValueError(f"{name} {known} {remedy}.")
    return array
