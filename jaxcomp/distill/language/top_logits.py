"""A teacher by its largest logits: all that a student needs of it, at a thousandth of the size.

The few tokens that a teacher finds likely hold nearly all of its probability. What is left, the
*rest*, becomes one more class, so that the student is told how likely the others are together, but
not which of them. Without it a student could put any mass on them and not be told.

**Temperature.** The mass of the rest at a temperature is the sum of many powers; from its mass at
another temperature it does not follow. So it is stored for one temperature, chosen when the top is
taken, and a loss at another is refused. The top alone (``rest="drop"``) serves at any temperature.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.checks import check_count
from jaxcomp.distill.inputs import as_mask, check_floating, computing_dtype, known
from jaxcomp.distill.logits.checks import check_temperature
from jaxcomp.distill.logits.softmax import divergence, softmax
from jaxcomp.sharding import automatic, spec_like


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopLogits:
    """The largest logits of each position, a pytree.

    Its arrays share their leading axes: ``jax.tree.map(lambda x: x[3], top)`` is one example.

    Attributes:
        values: ``(..., count)`` float, the largest logits, largest first. A constant may be added
            to those of a position and its rest: only differences count.
        indices: ``(..., count)`` integer, the tokens that they belong to, all different.
        rest: ``(...)`` float, the logit of one class with the mass of all other tokens at
            ``temperature``: ``T * logsumexp(others / T)``; ``-inf`` where there are none. None:
            not known, and only ``rest="drop"`` will do.
        vocabulary: how many tokens there are.
        temperature: that of the rest.
    """

    values: Any
    indices: Any
    rest: Any
    vocabulary: int = dataclasses.field(metadata={"static": True})
    temperature: float = dataclasses.field(default=1.0, metadata={"static": True})


def top_logits(
    logits: Shaped[ArrayLike, "..."], count: int, temperature: ArrayLike = 1.0
) -> TopLogits:
    """The largest logits of each position, and the mass of the rest.

    Args:
        logits: ``(..., vocabulary)``, of any float dtype: the teacher's.
        count: how many to keep.
        temperature: at which a student will learn from the rest; a number, not traced.

    Returns:
        The top, in float32 (float64 if the logits are), with indices in uint16 where they fit,
        else int32.

    Raises:
        TypeError: logits that are not floating point.
        ValueError: a count that is not in 1 to vocabulary, a temperature that is not positive and
            finite, or is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> top = top_logits(jnp.array([[0.0, 3.0, 1.0, 2.0]]), 2)
        >>> print(top.values, top.indices, top.rest.round(4))
        [[3. 2.]] [[1 3]] [1.3133]

    Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", 2025
    (on what a student learns wrong without the rest).
    """
    array = _as_logits("logits", logits)
    check_count("count", count)
    vocabulary = array.shape[-1]
    if count > vocabulary:
        raise ValueError(f"count {count} is above {vocabulary}, the size of the vocabulary.")
    number = _known_temperature(temperature)
    values, indices, rest = _top(array, count, number)
    return TopLogits(values, indices, rest, vocabulary, number)


def top_divergence(
    student_logits: Shaped[ArrayLike, "..."],
    top: TopLogits,
    temperature: ArrayLike | None = None,
    *,
    rest: Literal["class", "drop"] = "class",
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Forward KL of the student from a teacher of which the top is known, per position.

    With ``rest="class"`` all tokens outside the top are one class to both: the result is at most
    :func:`jaxcomp.distill.kl_divergence` of all logits, grows with ``count`` (each finer top
    can tell apart what the coarser one could), and is equal to it when nothing is left out. With
    ``rest="drop"`` both are renormalised over the top: what the student says of the other tokens is
    then without any effect, so that a loss on the labels has to keep their mass down.

    Never negative, and 0 for the logits that the top was taken from. Nothing of the size of the
    vocabulary is made of the teacher; the gradient goes to the top by scatter and to the rest as a
    softmax of its own.

    Args:
        student_logits: ``(..., vocabulary)``, of any float dtype.
        top: of :func:`top_logits`, or read from a file.
        temperature: by default, and with ``rest="class"`` always, that of the top. With
            ``rest="drop"`` any positive scalar, possibly traced.
        rest: ``"class"``, or ``"drop"``.
        where: boolean, the positions that count, of the logits' shape without the last axis, or
            size 1 on some axes.

    Returns:
        Nats, in the logits' shape without the last axis; float32, or float64 if an array is. Not
        multiplied by ``T**2``.

    Raises:
        TypeError: logits that are not floating point, ``where`` that is not boolean.
        ValueError: shapes or vocabularies that do not fit, an unknown rest, a temperature that is
            not that of the rest.

    Example:
        >>> import jax.numpy as jnp
        >>> teacher = jnp.array([[0.0, 3.0, 1.0, 2.0]])
        >>> student = jnp.array([[0.0, 3.0, 2.0, 1.0]])
        >>> for count in (1, 2, 4):
        ...     print(top_divergence(student, top_logits(teacher, count)).round(4))
        [0.]
        [0.1399]
        [0.1497]

    Cover and Thomas, "Elements of Information Theory", 2006, section 2.7 (coarser classes never
    diverge more).
    """
    student = _as_logits("student_logits", student_logits)
    _check_top(top, student.shape, rest)
    _check_indices(top)
    dtype = computing_dtype(student, jnp.asarray(top.values))
    keep = as_mask(where, student.shape[:-1])
    if rest == "class":
        _check_rest(top, temperature)
        temperature = None
    temperature = top.temperature if temperature is None else temperature
    temperature = check_temperature(temperature, dtype)
    return _top_divergence(student, top, temperature, keep, rest == "class")


@functools.partial(jax.jit, static_argnames=("count", "temperature"))
def _top(logits: Array, count: int, temperature: float) -> tuple[Array, Array, Array]:
    logits = logits.astype(computing_dtype(logits))
    narrow = jnp.uint16 if logits.shape[-1] <= 1 << 16 else jnp.int32

    def take(logits: Array) -> tuple[Array, Array, Array]:
        values, indices = jax.lax.top_k(logits, count)
        rest = _rest(logits, indices, jnp.asarray(temperature, logits.dtype))
        return values, indices.astype(narrow), rest

    rows = _rows(logits)
    return automatic(take, out=(rows, rows, PartitionSpec(*rows[:-1])))(logits)


def _rest(logits: Array, indices: Array, temperature: Array) -> Array:
    """The logit of one class with the mass of all tokens that are not among the indices."""
    if indices.shape[-1] == logits.shape[-1]:
        return jnp.full(logits.shape[:-1], -jnp.inf, logits.dtype)
    # Taken out, not subtracted: of a top that holds nearly everything nothing would remain.
    others = jnp.put_along_axis(logits, indices, -jnp.inf, -1, inplace=False)
    s = softmax(others, jnp.ones((1,) * logits.ndim, bool), temperature, -1)
    logit = 2 * s.half_top + temperature * jnp.log(s.total)
    return jnp.squeeze(jnp.where(jnp.any(s.possible, -1, keepdims=True), logit, -jnp.inf), -1)


@functools.partial(jax.jit, static_argnames="as_class")
def _top_divergence(
    student: Array, top: TopLogits, temperature: Array, keep: Array, as_class: bool
) -> Array:
    dtype, keep = temperature.dtype, keep[..., None]

    def choose(student: Array, indices: Array, temperature: Array) -> Array:
        chosen = jnp.take_along_axis(student, indices, -1)
        if not as_class:
            return chosen
        return jnp.append(chosen, _rest(student, indices, temperature)[..., None], -1)

    student = jnp.where(keep, student.astype(dtype), 0)
    indices, teacher = jnp.asarray(top.indices).astype(jnp.int32), jnp.asarray(top.values, dtype)
    chosen = automatic(choose, out=_rows(student))(student, indices, temperature)
    if as_class:
        teacher = jnp.append(teacher, jnp.asarray(top.rest, dtype)[..., None], -1)
    return divergence(chosen, teacher, temperature, keep, -1, False)


def _rows(logits: Array) -> PartitionSpec:
    """Where a few numbers of each position lie: as the logits do, with all of a row together."""
    return spec_like(logits, (*logits.shape[:-1], 1))


def _as_logits(name: str, logits: Any) -> Array:
    array = jnp.asarray(logits)
    check_floating(**{name: array})
    if not array.ndim or not array.shape[-1]:
        raise ValueError(f"{name} {array.shape} must have the vocabulary on its last axis.")
    return array


def _known_temperature(temperature: Any) -> float:
    value = known(temperature)
    if value is None:
        message = "temperature must be a number here, not traced: the rest is stored for one"
        raise ValueError(f"{message}; take the top outside jit, or close over a Python float.")
    check_temperature(temperature, jnp.float32)
    return float(value)


def _check_top(top: TopLogits, shape: tuple[int, ...], rest: str) -> None:
    if rest not in ("class", "drop"):
        raise ValueError(f'rest {rest!r} must be "class" or "drop".')
    if not isinstance(top, TopLogits):
        raise TypeError(f"top must be TopLogits, not {type(top).__name__}: take it by top_logits.")
    indices, values = jnp.shape(top.indices), jnp.shape(top.values)
    if indices != values or not values or values[:-1] != shape[:-1]:
        raise ValueError(
            f"student_logits {shape} and top, with values {values} and indices {indices}, must be "
            "of the same positions: (..., vocabulary), and (..., count) twice."
        )
    if top.vocabulary != shape[-1]:
        raise ValueError(
            f"student_logits {shape} have {shape[-1]} tokens, the teacher {top.vocabulary}: leave "
            "out the tokens that only the student has, or take the top of the same ones."
        )


def _check_indices(top: TopLogits) -> None:
    if not jnp.issubdtype(jnp.asarray(top.indices).dtype, jnp.integer):
        raise TypeError(f"indices of top must be integers, got {jnp.asarray(top.indices).dtype}.")
    indices = known(top.indices)
    if indices is None or not indices.size:
        return
    ordered = np.sort(indices.astype(np.int64), -1)
    if ordered.min() < 0 or ordered.max() >= top.vocabulary:
        wrong = ordered.min() if ordered.min() < 0 else ordered.max()
        raise ValueError(f"indices of top hold {wrong}: tokens are 0 to {top.vocabulary - 1}.")
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(
            "indices of top name a token twice at one position: take it by top_logits."
        )


def _check_rest(top: TopLogits, temperature: Any) -> None:
    if top.rest is None:
        raise ValueError('top has no rest: pass rest="drop", or take it by top_logits.')
    if jnp.shape(top.rest) != jnp.shape(top.values)[:-1]:
        message = f"top has a rest {jnp.shape(top.rest)} for values {jnp.shape(top.values)}"
        raise ValueError(f"{message}: it must be one number for each position.")
    if temperature is None:
        return
    value = known(temperature)
    if value is None or value.ndim or np.float32(value) != np.float32(top.temperature):
        raise ValueError(
            f"temperature {temperature} is not {top.temperature}, at which the rest of the "
            'teacher was measured: leave it out, take the top anew, or pass rest="drop".'
        )
