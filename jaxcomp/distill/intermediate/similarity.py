"""Similarity-preserving distillation: examples that are alike to the teacher are to the student."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import masked_mean, normalized
from jaxcomp.distill.intermediate.layouts import all_pairs, as_rows, gathered, scaled


def similarity_preserving_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Difference between how alike a batch's examples are to student and to teacher, per example.

    The inner products of an example with all examples, itself included, are scaled to unit length;
    its loss is the mean over them of the squared differences between student and teacher. The mean
    over the examples that count is the paper's loss, which it weighs by ``gamma``. (torchdistill
    scales by the sum of the absolute values instead.)

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train. On several devices the relations are those of the whole batch,
    except inside ``shard_map``, where they are the shard's.

    Args:
        student: float array (batch, ...), all of an example's features.
        teacher: float array of the same batch; the rest of its shape may differ.
        where: boolean (batch,), examples that count. The others take part in no relation, and
            their loss is 0.

    Returns:
        (batch,); float32, or float64 if an array is.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit.

    Example:
        >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> teacher = jnp.array([[2.0], [2.0]])
        >>> print(similarity_preserving_loss(student, teacher).round(4))
        [0.2929 0.2929]

    Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019, section 3.
    """
    return _loss(*as_rows(student, teacher, where))


@jax.jit
def _loss(student: Array, teacher: Array, keep: Array) -> Array:
    difference = jnp.square(_similarities(student) - _similarities(teacher))
    return masked_mean(difference, all_pairs(keep), 1)


def _similarities(x: Array) -> Array:
    """(batch, batch), whose rows have unit length."""
    # A row's own length is nothing to it: without it no product under- or overflows.
    others = gathered(scaled(x))
    return normalized(jnp.matmul(normalized(x), others.T, precision=jax.lax.Precision.HIGHEST))
