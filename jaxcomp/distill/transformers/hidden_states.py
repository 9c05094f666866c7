"""Losses between the hidden states, or the embeddings, of a student and of a teacher."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import (
    as_floats,
    as_mask,
    check_axis,
    check_same_shape,
    masked_shapes,
    normalized,
)
from jaxcomp.distill.intermediate.hint import hint_loss


def hidden_state_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    kind: str = "squared",
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Distance of the student's hidden states from the teacher's, per token.

    The same function serves the embedding layer (TinyBERT, eq. 9). Bring a student of another
    width to the teacher's by a learned projection first:
    ``hidden_state_loss(project(projection, student), teacher)``.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train.

    Args:
        student: float array of any shape and float dtype; ``axis`` runs over the features.
        teacher: float array of the same shape; its dtype may differ.
        kind: ``"squared"``, the mean over the features of the squared differences, in which
            magnitudes matter (TinyBERT); ``"cosine"``, 1 less the cosine of the angle, in which
            directions do (DistilBERT). A zero vector has no direction: its cosine is 0, and so is
            its gradient.
        axis: the feature axis.
        where: boolean, what counts: tokens, of the arrays' shape without ``axis`` or with size 1
            on axes that it spans; or whole examples, (batch,). The loss of the others is 0.

    Returns:
        The arrays' shape without ``axis``; float32, or float64 if an array is.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, an unknown kind.

    Example:
        >>> teacher = jnp.array([[3.0, 4.0], [1.0, 1.0]])
        >>> student = jnp.array([[6.0, 8.0], [1.0, -1.0]])
        >>> print(hidden_state_loss(student, teacher))
        [12.5  2. ]
        >>> print(hidden_state_loss(student, teacher, kind="cosine").round(4))
        [0. 1.]

    Jiao et al., "TinyBERT", 2020, eqs. 8, 9; Sanh et al., "DistilBERT", 2019, section 3.
    """
    if kind == "squared":
        return hint_loss(student, teacher, axis=axis, where=where)
    if kind != "cosine":
        raise ValueError(f'kind {kind!r} must be "squared" or "cosine".')
    s, t = as_floats(student=student, teacher=teacher)
    check_same_shape("project the student, or slice both.", student=s, teacher=t)
    axis = check_axis("student", s, axis)
    keep = as_mask(where, *masked_shapes(s.shape, axis))
    wide = jnp.expand_dims(keep, axis)
    s, t = jnp.where(wide, s, 0), jnp.where(wide, t, 0)
    # Half the squared chord between unit vectors: never below 0, and small angles keep digits.
    s_unit, t_unit = normalized(s, axis), normalized(t, axis)
    loss = 0.5 * jnp.sum(jnp.square(s_unit - t_unit), axis)
    directed = jnp.any(s != 0, axis) & jnp.any(t != 0, axis)
    return jnp.where(keep, jnp.where(directed, loss, 1), 0)
