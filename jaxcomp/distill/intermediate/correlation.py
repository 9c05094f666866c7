"""Correlation congruence: a kernel between a batch's examples is to be the teacher's."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.checks import check_count
from jaxcomp.distill.inputs import check_positive, masked_mean, normalized
from jaxcomp.distill.intermediate.layouts import all_pairs, as_rows, products


def correlation_congruence_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    kernel: str = "gaussian",
    gamma: ArrayLike | None = None,
    order: int | None = None,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Squared difference between a kernel of student's and of teacher's examples, per example.

    An example's loss is the mean over all examples, itself included, of the squared differences.
    The mean over the examples that count is the paper's loss. Examples are scaled to unit length
    first, which the expansion of the Gaussian assumes.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train. On several devices the relations are those of the whole batch,
    except inside ``shard_map``, where they are the shard's.

    Args:
        student: float array (batch, ...), all of an example's features.
        teacher: float array of the same batch; the rest of its shape may differ.
        kernel: of two examples ``x`` and ``y``: ``"gaussian"``, ``exp(-gamma * |x - y|**2)`` by
            its Taylor series in ``x·y``; or ``"linear"``, ``x·y`` (the bilinear pool).
        gamma: positive scalar, possibly traced, of the Gaussian; 0.4, the paper's, if not given.
        order: at least 1, of the last term of the Gaussian's series; 2, the paper's, if not given.
        where: boolean (batch,), examples that count. The others take part in no relation, and
            their loss is 0.

    Returns:
        (batch,); float32, or float64 if an array is.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, an unknown kernel, a gamma that is not positive and
            finite, an order below 1, either of them for the linear kernel.

    Example:
        >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> teacher = jnp.array([[2.0], [2.0]])
        >>> print(correlation_congruence_loss(student, teacher, kernel="linear"))
        [0.5 0.5]
        >>> print(correlation_congruence_loss(student, teacher).round(4))
        [0.1266 0.1266]

    Peng et al., "Correlation Congruence for Knowledge Distillation", 2019, sections 3.2,
    3.3.
    """
    if kernel not in ("gaussian", "linear"):
        raise ValueError(f'kernel {kernel!r} must be "gaussian" or "linear".')
    if kernel == "linear" and not (gamma is None and order is None):
        raise ValueError('gamma and order are of kernel="gaussian": leave them out.')
    if order is not None:
        check_count("order", order)
    rows = as_rows(student, teacher, where)
    if kernel == "linear":
        return _loss(*rows)
    gamma = check_positive("gamma", 0.4 if gamma is None else gamma, jnp.float32)
    return _loss(*rows, gamma.astype(rows[0].dtype), 2 if order is None else order)


@functools.partial(jax.jit, static_argnames="order")
def _loss(
    student: Array, teacher: Array, keep: Array, gamma: Array | None = None, order: int = 0
) -> Array:
    kernels = [products(normalized(x)) for x in (student, teacher)]
    if gamma is not None:
        kernels = [_gaussian(x, gamma, order) for x in kernels]
    difference = jnp.square(kernels[0] - kernels[1])
    return masked_mean(difference, all_pairs(keep), 1)


def _gaussian(cosines: Array, gamma: Array, order: int) -> Array:
    """``exp(-2 gamma)`` times the sum of ``(2 gamma cosine)**p / p!``, by Horner's rule."""
    series = jnp.ones_like(cosines)
    for p in range(order, 0, -1):
        series = 1 + series * (2 * gamma * cosines / p)
    return jnp.exp(-2 * gamma) * series
