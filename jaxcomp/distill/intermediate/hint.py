"""FitNets' hints: a layer of the student's is to equal one of the teacher's."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import as_floats, as_mask, check_axis, check_same_shape, masked_shapes


def hint_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Mean over the channels of the squared differences, per position.

    Bring the student's features to the teacher's channels by a learned projection first, and to
    its resolution by ``resize`` where that differs:
    ``hint_loss(project(projection, student), teacher)``. The paper's loss is the sum of half the
    squares, ``channels / 2`` times this, summed over positions; as a mean it needs no other weight
    for other sizes.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train. Differences above 1e19 overflow float32 here.

    Args:
        student: float array of any shape and float dtype; ``axis`` runs over the channels.
        teacher: float array of the same shape; its dtype may differ.
        axis: the channel axis.
        where: boolean, what counts: positions, of the arrays' shape without ``axis`` or with size
            1 on axes that it spans; or whole examples, (batch,). The loss of the others is 0.

    Returns:
        The arrays' shape without ``axis``; float32, or float64 if an array is.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit.

    Example:
        >>> student = jnp.array([[3.0, 1.0], [0.0, 0.0]])
        >>> teacher = jnp.array([[1.0, 1.0], [0.0, 1.0]])
        >>> print(hint_loss(student, teacher))
        [2.  0.5]

    Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, eq. 3.
    """
    s, t = as_floats(student=student, teacher=teacher)
    check_same_shape("project or resize the student.", student=s, teacher=t)
    axis = check_axis("student", s, axis)
    keep = jnp.expand_dims(as_mask(where, *masked_shapes(s.shape, axis)), axis)
    return jnp.mean(jnp.square(jnp.where(keep, s, 0) - jnp.where(keep, t, 0)), axis)
