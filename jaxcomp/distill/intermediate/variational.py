"""Variational information distillation: the teacher's features as a Gaussian of the student's."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import (
    as_floats,
    as_mask,
    check_axis,
    check_positive,
    check_same_shape,
    masked_shapes,
)
from jaxcomp.distill.intermediate.projection import init_projection, project


def init_variational(
    key: Any, student: Any, teacher: Any, *, axis: int = -1, variance: float = 5.0
) -> dict[str, Any]:
    """Parameters of a Gaussian whose mean is a linear map of the student's features.

    Train them by your optimizer next to the student, and leave them out of what you ship.

    Args:
        key: PRNG key.
        student: the student's features, array or ``jax.ShapeDtypeStruct``: only the size of
            ``axis`` is read.
        teacher: the teacher's, likewise.
        axis: the channel axis of both.
        variance: of each channel, to begin with; 5 is that of the paper's code.

    Returns:
        ``{"projection": {"kernel", "bias"}, "raw_variance": (teacher channels,)}`` in float32.

    Raises:
        ValueError: an array lacks the axis, a variance that is not positive and finite.

    Example:
        >>> student, teacher = jnp.ones((2, 8, 8, 16)), jnp.ones((2, 8, 8, 64))
        >>> made = init_variational(jax.random.key(0), student, teacher)
        >>> jax.tree.map(jnp.shape, made)
        {'projection': {'bias': (64,), 'kernel': (16, 64)}, 'raw_variance': (64,)}

    Ahn et al., "Variational Information Distillation for Knowledge Transfer", 2019, section 2.
    """
    if not 0 < variance < math.inf:
        raise ValueError(f"variance {variance} must be positive and finite: 5 is usual.")
    projection = init_projection(key, student, teacher, axis=axis)
    raw = variance + math.log(-math.expm1(-variance))  # softplus(raw) is the variance
    return {"projection": projection, "raw_variance": jnp.full_like(projection["bias"], raw)}


def variational_loss(
    params: dict[str, Any],
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    axis: int = -1,
    minimum: ArrayLike = 1e-5,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Surprise at the teacher's features given the student's, per position.

    ``((teacher - mean)**2 / variance + log(variance)) / 2``, averaged over the channels: the
    negative logarithm of a Gaussian density, less its constant. The mean is the student's
    features projected; the variance, learned for each channel, takes weight from channels that
    the student cannot foretell. The loss may be negative. The paper sums over channels and
    positions where this takes the mean, and has a mean of several layers where this has one.

    The teacher is differentiated too; put ``jax.lax.stop_gradient`` around one that is a function
    of what you train, which would otherwise shrink its features.

    Args:
        params: of :func:`init_variational`.
        student: float array of any shape and float dtype; ``axis`` runs over the channels.
        teacher: float array with the student's shape but for ``axis``; its dtype may differ.
        axis: the channel axis of both.
        minimum: positive scalar, possibly traced, added to each variance.
        where: boolean, what counts: positions, of the arrays' shape without ``axis`` or with size
            1 on axes that it spans; or whole examples, (batch,). The loss of the others is 0.

    Returns:
        The arrays' shape without ``axis``; float32, or float64 if an array is.

    Raises:
        TypeError: features that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a minimum that is not positive and finite.

    Example:
        >>> student, teacher = jnp.ones((2, 5, 3)), jnp.zeros((2, 5, 4))
        >>> params = init_variational(jax.random.key(0), student, teacher, variance=1.0)
        >>> print(variational_loss(params, 0 * student, teacher + 2.0)[0].round(3))
        [2. 2. 2. 2. 2.]

    Ahn et al., "Variational Information Distillation for Knowledge Transfer", 2019, section 2.
    """
    s, t, raw = as_floats(student=student, teacher=teacher, raw_variance=params["raw_variance"])
    axis = check_axis("teacher", t, axis)
    positions = t.shape[:axis] + t.shape[axis + 1 :]
    keep = as_mask(where, *masked_shapes(t.shape, axis))
    wide = jnp.expand_dims(keep, axis)
    if s.ndim != t.ndim or s.shape[:axis] + s.shape[axis + 1 :] != positions:
        message = f"student {s.shape} and teacher {t.shape} must agree on all axes but {axis}"
        raise ValueError(f"{message}: resize the student.")
    mean = project(params["projection"], jnp.where(wide, s, 0), axis=axis)
    check_same_shape("make params for these.", projected=mean, teacher=t)
    floor = check_positive("minimum", minimum, t.dtype, "1e-5 is usual")
    shape = [1] * t.ndim
    shape[axis] = t.shape[axis]
    variance = (jax.nn.softplus(raw) + floor.astype(t.dtype)).reshape(shape)
    surprise = jnp.square(jnp.where(wide, t, 0) - mean) / variance + jnp.log(variance)
    return jnp.where(keep, 0.5 * jnp.mean(surprise, axis), 0)
