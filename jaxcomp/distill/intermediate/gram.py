"""Gram matrices of a layer (its style): which of its channels go together."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import as_floats, check_same_shape
from jaxcomp.distill.intermediate.flow import flow_matrix


def gram_matrix(
    features: Shaped[ArrayLike, "..."],
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch channels channels"]:
    """Mean over the positions of the products of a layer's channels, per example.

    The paper's is the sum over positions; as a mean, maps of different sizes can be compared.

    Args:
        features: float array (batch, positions..., channels), or with the channels on ``axis``.
        axis: the channel axis.
        where: boolean (batch,) or (batch, positions...): what counts.

    Returns:
        (batch, channels, channels); float32, or float64 if the features are. An example without a
        position that counts has a matrix of 0.

    Raises:
        TypeError: features that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit.

    Example:
        >>> print(gram_matrix(jnp.array([[[1.0, 2.0], [1.0, 0.0]]])))
        [[[1. 1.]
          [1. 2.]]]

    Gatys, Ecker and Bethge, "A Neural Algorithm of Artistic Style", 2015, eq. 3.
    """
    return flow_matrix(features, features, axis=axis, where=where)


def gram_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """A quarter of the mean squared difference between two Gram matrices, per example.

    It is the style loss of one layer with the paper's constant, ``1 / (4 channels**2)`` of
    matrices that are means over positions. Weigh and add those of several layers.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train. Features above 1e9 overflow float32 here.

    Args:
        student: float array (batch, positions..., channels), or with the channels on ``axis``.
        teacher: of the same batch, with as many channels; its positions may differ.
        axis: the channel axis of both.
        where: boolean (batch,) or (batch, positions...): what counts. The loss of an example
            without any is 0.

    Returns:
        (batch,); float32, or float64 if an array is.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit.

    Example:
        >>> student, teacher = jnp.ones((1, 4, 4, 2)), 3 * jnp.ones((1, 8, 8, 2))
        >>> print(gram_loss(student, teacher))
        [16.]

    Gatys, Ecker and Bethge, "A Neural Algorithm of Artistic Style", 2015, eq. 4.
    """
    s, t = as_floats(student=student, teacher=teacher)
    s, t = (gram_matrix(x, axis=axis, where=where) for x in (s, t))
    check_same_shape("project the student's channels.", student=s, teacher=t)
    return jnp.mean(jnp.square(s - t), (1, 2)) / 4
