"""Relational distillation (RKD): the shape of the cloud that a batch's examples form."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.checks import check_count
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
        chunk: examples whose distances to all others are taken at once where some are so near each
            other that the differences of their features have to be taken, which bounds the memory
            to ``chunk * batch * features``, for gradients too; None takes all.
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
        >>> print((64 * relational_distance_loss(student, teacher)).round(4))
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
            ``chunk * (batch * features + batch**2)``, for gradients too; None takes all. A few are
            often faster than all at once.
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
        x, gram, far = _cloud(x, keep)

        def exact() -> Array:
            others = gathered(x)
            return gathered(_each(lambda row: norm(row - others), x, chunk))

        distances = _either(far, lambda: _distances(gram), exact)
        mean = masked_mean(distances, counts)
        return distances / jnp.where(mean == 0, 1, mean)

    return masked_mean(_huber(relative(student) - relative(teacher)), counts, 1)


@functools.partial(jax.jit, static_argnames="chunk")
def _angle_loss(student: Array, teacher: Array, keep: Array, chunk: int | None) -> Array:
    counts = pairs(keep)
    both = gathered(counts)
    clouds = [_cloud(x, keep) for x in (student, teacher)]

    def losses(cosines_at: Callable[[Any], list[Array]], counts: Array, *examples: Array) -> Array:
        def at(example: Any) -> Array:
            others, *own = example
            first, second = cosines_at(own)
            angles = both & others[:, None] & others[None, :]
            return masked_mean(_huber(first - second), angles)

        return gathered(_each(at, (counts, *examples), chunk))

    def from_products() -> Array:
        inner = [(gram, _inverse(_distances(gram))) for _, gram, _ in clouds]

        def cosines_at(own: Any) -> list[Array]:
            (i,) = own
            return [
                (gram - gram[i][:, None] - gram[i][None, :] + gram[i, i])
                * (inverse[i][:, None] * inverse[i][None, :])
                for gram, inverse in inner
            ]

        return losses(cosines_at, both, jnp.arange(len(keep)))

    def exact() -> Array:
        others = [gathered(x) for x, _, _ in clouds]

        def cosines_at(own: Any) -> list[Array]:
            return [products(normalized(x - y)) for x, y in zip(others, own, strict=True)]

        return losses(cosines_at, counts, *(x for x, _, _ in clouds))

    return _either(clouds[0][2] & clouds[1][2], from_products, exact)


def _cloud(x: Array, keep: Array) -> tuple[Array, Array, Array]:
    """Rows around their mean, their inner products, and whether these tell all rows apart.

    Distances and angles from inner products cost a matrix product, not a look at every feature for
    every pair (or three), but lose the digits that two rows have in common. Where rows are near
    each other, the differences themselves have to be taken.
    """
    x = scaled(x)
    x = jnp.where(keep[:, None], x - masked_mean(x, keep[:, None], 0), 0)
    gram = gathered(products(x))
    square = jnp.diagonal(gram)
    far = _squared_distances(gram) > (square[:, None] + square[None, :]) / 32
    return x, gram, jnp.all(far | ~gathered(pairs(keep)))


def _either(first: Array, one: Callable[[], Array], other: Callable[[], Array]) -> Array:
    """One of two; what its backward pass needs it computes again, for it would be kept of both."""
    return jax.lax.cond(first, jax.checkpoint(one), jax.checkpoint(other))


def _squared_distances(gram: Array) -> Array:
    square = jnp.diagonal(gram)
    return square[:, None] + square[None, :] - 2 * gram


def _distances(gram: Array) -> Array:
    """From inner products of rows that are far apart, where they are no row's with itself."""
    square = jnp.maximum(_squared_distances(gram), 0) * ~jnp.eye(len(gram), dtype=bool)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _inverse(distances: Array) -> Array:
    return jnp.where(distances > 0, 1 / jnp.where(distances > 0, distances, 1), 0)


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
    if chunk is not None:
        check_count("chunk", chunk)
