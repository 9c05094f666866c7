"""Ensembles of teachers as one teacher: logits that any loss here takes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import computing_dtype, known
from jaxcomp.distill.logits.checks import check_single_logits, check_temperature, check_where
from jaxcomp.distill.logits.softmax import softmax


def ensemble_logits(
    logits: Shaped[ArrayLike, "..."],
    weights: Shaped[ArrayLike, "..."] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = 0,
    class_axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Logits whose softened probabilities are the mean of those of several teachers.

    ``softmax(result / T)`` is the weighted mean of ``softmax(logits[i] / T)``; at another
    temperature it is not, so give the loss the same one. The mean of the probabilities keeps what
    one teacher alone believes in; :func:`mean_logits` keeps what all can agree on.

    Args:
        logits: float array; ``axis`` runs over the teachers, ``class_axis`` over the classes.
        weights: one for each teacher, shape (teachers,), not negative; only their proportions
            count. 0 leaves a teacher out. All equal if None.
        temperature: positive scalar, possibly traced.
        axis: the axis of the teachers.
        class_axis: the class axis, counted in ``logits``.
        where: boolean, the elements that count: of the logits' shape (the classes that a teacher
            knows) or of that without ``class_axis`` (the examples that it saw), or broadcastable
            to one of them. The mean is over the teachers with a class left in the example.

    Returns:
        The logits' shape without ``axis``; float32, or float64 if the logits are. A class that no
        teacher deems possible is ``-inf``, and so is an example without teachers: every loss here
        takes such a row for padding.

    Raises:
        TypeError: logits that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a temperature that is not positive and finite, weights
            that are negative or all 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> teachers = jnp.array([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> both = ensemble_logits(teachers, temperature=2.0)
        >>> bool(jnp.allclose(jax.nn.softmax(both / 2), jax.nn.softmax(teachers / 2).mean(0)))
        True

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 1.
    """
    array, axis, class_axis, shares, keep = _check(logits, weights, axis, class_axis, where)
    temperature = check_temperature(temperature, shares.dtype)
    return _ensemble(array, shares, temperature, keep, axis, class_axis)


def mean_logits(
    logits: Shaped[ArrayLike, "..."],
    weights: Shaped[ArrayLike, "..."] | None = None,
    *,
    axis: int = 0,
    class_axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Weighted mean of the logits of several teachers: the geometric mean of their probabilities.

    At every temperature ``softmax(result / T)`` is the normalised geometric mean of
    ``softmax(logits[i] / T)``: a class that one teacher rules out is ruled out.

    Args:
        logits: float array; ``axis`` runs over the teachers, ``class_axis`` over the classes.
        weights: one for each teacher, as in :func:`ensemble_logits`.
        axis: the axis of the teachers.
        class_axis: the class axis, counted in ``logits``.
        where: boolean, the elements that count, as in :func:`ensemble_logits`; a class that a
            teacher does not know is one that it rules out.

    Returns:
        The logits' shape without ``axis``; float32, or float64 if the logits are; ``-inf`` for a
        class that is ruled out, or that has no teacher.

    Raises:
        TypeError: logits that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, weights that are negative or all 0.

    Example:
        >>> import jax.numpy as jnp
        >>> teachers = jnp.array([[4.0, 0.0, 0.0], [0.0, 4.0, -jnp.inf]])
        >>> print(mean_logits(teachers, jnp.array([3.0, 1.0])))
        [  3.   1. -inf]

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 1.
    """
    array, axis, class_axis, shares, keep = _check(logits, weights, axis, class_axis, where)
    return _mean(array, shares, keep, axis, class_axis)


def _check(
    logits: Any, weights: Any, axis: int, class_axis: int, where: Any
) -> tuple[Array, int, int, Array, Array]:
    """Logits, both axes from the front, weights that broadcast against the logits, and the mask."""
    array, class_axis = check_single_logits(logits, class_axis)
    shape = array.shape
    if not -len(shape) <= axis < len(shape) or shape[axis] == 0 or axis % len(shape) == class_axis:
        message = f"logits {shape} have no teachers on axis {axis}, with classes on {class_axis}"
        raise ValueError(f"{message}: stack the teachers' logits, and pass that axis=.")
    axis, dtype = axis % len(shape), computing_dtype(array)
    shares = jnp.ones(shape[axis], dtype) if weights is None else jnp.asarray(weights)
    if shares.shape != shape[axis : axis + 1]:
        message = f"weights {shares.shape} must be one for each of {shape[axis]} teachers"
        raise ValueError(f"{message}: for weights by example, use where= or jax.vmap.")
    value = None if weights is None else known(weights)
    if value is not None and not ((value >= 0).all() and 0 < value.sum() < float("inf")):
        raise ValueError(f"weights {value} must be finite, not negative, and not all 0.")
    shares = shares.astype(dtype).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return array, axis, class_axis, shares, check_where(where, shape, class_axis)


def _heard(shares: Array, possible: Array, class_axis: int) -> tuple[Array, Array]:
    """Which teachers say something of an example, and the share of each, 1 in all."""
    heard = jnp.any(possible, class_axis, keepdims=True) & (shares != 0)
    shares = jnp.where(heard, jnp.where(shares < 0, jnp.nan, shares), 0)
    return heard, shares


@functools.partial(jax.jit, static_argnames=("axis", "class_axis"))
def _ensemble(
    logits: Array, shares: Array, temperature: Array, keep: Array, axis: int, class_axis: int
) -> Array:
    temperature = jnp.where(temperature > 0, temperature, jnp.nan)
    s = softmax(logits.astype(shares.dtype), keep, temperature, class_axis)
    heard, shares = _heard(shares, s.possible, class_axis)
    some = heard & (s.scaled != -jnp.inf)
    log_p = jnp.where(some, s.scaled, 0) - jnp.log(s.total) + jnp.log(jnp.where(heard, shares, 1))
    top = jnp.max(jnp.where(some, log_p, -jnp.inf), axis, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    terms = jnp.where(some, jnp.exp(jnp.where(some, log_p - top, 0)), 0)
    any_some = jnp.any(some, axis)
    total = jnp.where(any_some, jnp.sum(terms, axis), 1)
    all_shares = jnp.where(jnp.any(heard, axis), jnp.sum(shares, axis), 1)
    log_mean = jnp.squeeze(top, axis) + jnp.log(total) - jnp.log(all_shares)
    return jnp.where(any_some, temperature * log_mean, -jnp.inf)


@functools.partial(jax.jit, static_argnames=("axis", "class_axis"))
def _mean(logits: Array, shares: Array, keep: Array, axis: int, class_axis: int) -> Array:
    logits = logits.astype(shares.dtype)
    possible = keep & (logits != -jnp.inf)
    heard, shares = _heard(shares, possible, class_axis)
    total = jnp.sum(shares, axis, keepdims=True)
    shares = shares / jnp.where(jnp.any(heard, axis, keepdims=True), total, 1)
    mean = jnp.sum(shares * jnp.where(possible & heard, logits, 0), axis)
    agreed = jnp.all(possible | ~heard, axis) & jnp.any(heard, axis)
    return jnp.where(agreed, mean, -jnp.inf)
