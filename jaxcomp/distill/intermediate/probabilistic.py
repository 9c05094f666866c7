"""Probabilistic knowledge transfer (PKT): how likely each example is to be another's neighbour."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import normalized
from jaxcomp.distill.intermediate.layouts import as_rows, pairs, products
from jaxcomp.distill.logits.hinton import kl_divergence


def probabilistic_transfer_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Divergence of the student's neighbourhoods from the teacher's, per example.

    How likely another example is to be this one's neighbour: ``(1 + cosine) / 2`` over the sum of
    that over all other examples. The loss is ``KL(teacher || student)`` in nats of those
    probabilities. The mean over the examples that count is the paper's loss (a sum) over their
    number. The authors' code takes an example for a neighbour of itself too, adds 1e-7 to
    probabilities, and divides by the number twice. Opposite vectors have a cosine of -1 and no
    logarithm: ``(1 + cosine) / 2`` is held above the dtype's epsilon. That of a zero vector is 1/2.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train. On several devices the relations are those of the whole batch,
    except inside ``shard_map``, where they are the shard's.

    Args:
        student: float array (batch, ...), all of an example's features.
        teacher: float array of the same batch; the rest of its shape may differ.
        where: boolean (batch,), examples that count. The others take part in no relation, and
            their loss is 0.

    Returns:
        (batch,); float32, or float64 if an array is. A batch of one or two has a loss of 0.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit.

    Example:
        >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> teacher = jnp.array([[2.0], [2.0], [2.0]])
        >>> print(probabilistic_transfer_loss(student, teacher).round(4))
        [0.0589 0.     0.0589]

    Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
    2018, section 3.
    """
    return _loss(*as_rows(student, teacher, where))


@jax.jit
def _loss(student: Array, teacher: Array, keep: Array) -> Array:
    logs = [_log_similarities(x) for x in (student, teacher)]
    return kl_divergence(*logs, where=pairs(keep))


def _log_similarities(x: Array) -> Array:
    cosines = products(normalized(x))
    return jnp.log(jnp.maximum((1 + cosines) / 2, jnp.finfo(x.dtype).eps))
