"""Relational distillation (RKD): the shape of the cloud that a batch's examples form."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import masked_mean, norm, normalized
from jaxcomp.distill.intermediate.layouts import as_rows, gathered, pairs, products, scaled


def relational_distance_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    chunk: int | None = None,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Difference between distances of a batch's examples to student and to teacher, per example.

    Distances are over their mean, of all pairs of two different examples. An example's loss is the
    mean over the other examples of the Huber loss (whose parabola ends at 1) between student and
    teacher. The mean over the examples that count is the paper's loss as a mean over pairs; the
    authors' code also counts each example with itself, which makes it ``(batch - 1) / batch``
    times as large.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train. On several devices the relations are those of the whole batch,
    except inside ``shard_map``, where they are the shard's.

    Args:
        student: float array (batch, ...), all of an example's features.
        teacher: float array of the same batch; the rest of its shape may differ.
        chunk: examples whose distances to all others are taken at once, which bounds the memory to
            ``chunk * batch * features``, for gradients too, and is often
            faster; None takes all.
        where: boolean (batch,), examples that count. The others take part in no relation, and
            their loss is 0.

    Returns:
        (batch,); float32, or float64 if an array is. A batch of one has a loss of 0.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a chunk below 1.

    Example:
        >>> student = jnp.array([[0.0], [1.0], [2.0]])
        >>> teacher = jnp.array([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
        >>> print(64 * relational_distance_loss(student, teacher))
        [10.  5. 13.]

    Park et al., "Relational Knowledge Distillation", 2019, section 3.2.1.
    """
    _check_chunk(chunk)
    return _distance_loss(*as_rows(student, teacher, where), chunk)


def relational_angle_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    chunk: int | None = None,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Difference between angles of a batch's examples to student and to teacher, per example.

    At each example, the cosines of the angles that all pairs of two other examples form with it;
    its loss is the mean over those pairs of the Huber loss (whose parabola ends at 1) between
    student and teacher. The mean over the examples that count is the paper's loss as a mean over
    triplets; the authors' code also counts those that hold an example twice, which makes it
    ``(batch - 1) * (batch - 2) / batch**2`` times as large. Two equal examples form no angle with
    a third: their cosine is 0, and so is its gradient.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train. On several devices the relations are those of the whole batch,
    except inside ``shard_map``, where they are the shard's.

    Args:
        student: float array (batch, ...), all of an example's features.
        teacher: float array of the same batch; the rest of its shape may differ.
        chunk: examples at which angles are taken at once, which bounds the memory to
            ``chunk * (batch * features + batch**2)``, for gradients too, and is often
            faster; None takes all.
        where: boolean (batch,), examples that count. The others take part in no relation, and
            their loss is 0.

    Returns:
        (batch,); float32, or float64 if an array is. A batch of two has a loss of 0.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a chunk below 1.

    Example:
        >>> student = jnp.array([[0.0], [1.0], [2.0]])
        >>> teacher = jnp.array([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
        >>> print(relational_angle_loss(student, teacher).round(2))
        [0.5  1.3  0.08]

    Park et al., "Relational Knowledge Distillation", 2019, section 3.2.2.
    """
    _check_chunk(chunk)
    return _angle_loss(*as_rows(student, teacher, where), chunk)


@functools.partial(jax.jit, static_argnames="chunk")
def _distance_loss(student: Array, teacher: Array, keep: Array, chunk: int | None) -> Array:
    counts = pairs(keep)

    def relative(x: Array) -> Array:
        x = scaled(x)
        others = gathered(x)
        distances = _each(lambda row: norm(row - others), x, chunk)
        mean = masked_mean(distances, counts)
        return distances / jnp.where(mean == 0, 1, mean)

    return masked_mean(_huber(relative(student) - relative(teacher)), counts, 1)


@functools.partial(jax.jit, static_argnames="chunk")
def _angle_loss(student: Array, teacher: Array, keep: Array, chunk: int | None) -> Array:
    student, teacher, counts = scaled(student), scaled(teacher), pairs(keep)
    students, teachers, both = gathered(student), gathered(teacher), gathered(counts)

    def at(example: tuple[Array, Array, Array]) -> Array:
        s, t, others = example
        cosines = [products(normalized(x - y)) for x, y in ((students, s), (teachers, t))]
        angles = both & others[:, None] & others[None, :]
        return masked_mean(_huber(cosines[0] - cosines[1]), angles)

    return _each(at, (student, teacher, counts), chunk)


def _each(function: Callable[[Any], Array], examples: Any, chunk: int | None) -> Array:
    """The function of every example, of so many at once; the backward pass repeats the chunk."""
    if chunk is None:
        return jax.vmap(function)(examples)
    examples = jax.tree.map(gathered, examples)
    return jax.lax.map(jax.checkpoint(function), examples, batch_size=chunk)


def _huber(x: Array) -> Array:
    inside = jnp.clip(x, -1, 1)
    return inside * (x - inside / 2)


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1: None takes all examples at once.")
