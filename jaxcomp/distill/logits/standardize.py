"""Standardised logits: student and teacher are compared in units of their own spread."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import computing_dtype, normalized
from jaxcomp.distill.logits.checks import check_single_logits, check_temperature, check_where


def standardize_logits(
    logits: Shaped[ArrayLike, "..."],
    temperature: ArrayLike = 1.0,
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Logits less their mean, over their standard deviation times a base temperature.

    Given to a loss for student and teacher alike, it lets a small student copy the order and the
    relative distances of the teacher's logits without their range. The labels' part of a loss must
    keep the logits as they are; the paper's loss is ``CE(labels, student) + weight * T**2 *
    kl_divergence(standardize_logits(student, T), standardize_logits(teacher, T))``.

    The deviation is the population's, as in the paper; torchdistill divides by one class less.
    Logits that are all equal become 0, with gradient zero.

    Args:
        logits: float array of any shape and float dtype; ``axis`` runs over the classes.
        temperature: positive scalar, possibly traced.
        axis: the class axis.
        where: boolean, the elements that count, as in ``kl_divergence``; give it to the loss too.

    Returns:
        The logits' shape; float32, or float64 if the logits are. Elements that do not count are 0.
        A logit of ``-inf`` is a class that is not there: it stays, and the rest is standardised.

    Raises:
        TypeError: logits that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a temperature that is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> print(standardize_logits(jnp.array([[10.0, 20.0, 30.0, -jnp.inf]])).round(4))
        [[-1.2247  0.      1.2247    -inf]]

    Sun, Ren, Li, Wang and Cao, "Logit Standardization in Knowledge Distillation", 2024.
    """
    array, axis = check_single_logits(logits, axis)
    keep = check_where(where, array.shape, axis)
    temperature = check_temperature(temperature, computing_dtype(array))
    return _standardize(array, temperature, keep, axis)


@functools.partial(jax.jit, static_argnames="axis")
def _standardize(logits: Array, temperature: Array, keep: Array, axis: int) -> Array:
    logits = logits.astype(temperature.dtype)
    temperature = jnp.where(temperature > 0, temperature, jnp.nan)
    there = keep & (logits != -jnp.inf)
    # Halves below the maximum: no difference overflows, and equal logits give exactly zero.
    half = jnp.where(there, logits, 0) * 0.5
    top = jnp.max(jnp.where(there, half, -jnp.inf), axis, keepdims=True)
    fall = jnp.where(there, half - jax.lax.stop_gradient(jnp.where(there, top, 0)), 0)
    count = jnp.maximum(jnp.sum(there, axis, keepdims=True, dtype=logits.dtype), 1)
    mean = jnp.sum(fall / count, axis, keepdims=True)
    unit = normalized(jnp.where(there, fall - mean, 0), axis)
    return jnp.where(keep & ~there, -jnp.inf, unit * (jnp.sqrt(count) / temperature))
