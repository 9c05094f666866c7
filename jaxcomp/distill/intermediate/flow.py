"""The flow between two layers (FSP): which channels of the one go with which of the other."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import as_floats, check_same_shape
from jaxcomp.distill.intermediate.layouts import as_maps, check_same_positions


def flow_matrix(
    first: Shaped[ArrayLike, "..."],
    second: Shaped[ArrayLike, "..."],
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch first second"]:
    """Mean over the positions of the products of two layers' channels (FSP matrix), per example.

    Args:
        first: float array (batch, positions..., channels), or with the channels on ``axis``: the
            output of a layer.
        second: of a later layer, of the same positions; its channels may differ in number. Bring
            the larger map to the smaller's resolution first: the paper pools maxima, ``resize``
            averages.
        axis: the channel axis of both.
        where: boolean (batch,) or (batch, positions...): what counts.

    Returns:
        (batch, channels of the first, channels of the second); float32, or float64 if an array
        is. An example without a position that counts has a matrix of 0.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit.

    Example:
        >>> first = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
        >>> second = jnp.array([[[4.0], [6.0]]])
        >>> print(flow_matrix(first, second))
        [[[2.]
          [6.]]]

    Yim et al., "A Gift from Knowledge Distillation", 2017, eq. 1.
    """
    maps, (keep, _) = as_maps(axis, where, first=first, second=second)
    check_same_positions(first=maps[0], second=maps[1])
    a, b = (x.reshape(len(x), -1, x.shape[-1]) for x in maps)
    return _products(a, b, keep.reshape(len(keep), -1))


def flow_loss(
    student: Sequence[Any],
    teacher: Sequence[Any],
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Squared distance of the student's flow between two layers from the teacher's, per example.

    The sum over all pairs of channels of the squared differences of :func:`flow_matrix`. The mean
    over the batch is the paper's loss for one pair of layers; weigh and add several.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train. Products of features above 1e9 overflow float32 here.

    Args:
        student: the features of two layers, float arrays (batch, positions..., channels), or with
            the channels on ``axis``; they share their positions.
        teacher: likewise, with as many channels in each; the number of positions may differ.
        axis: the channel axis of all.
        where: boolean (batch,) or (batch, positions...): what counts. The loss of an example
            without any is 0.

    Returns:
        (batch,); float32, or float64 if an array is.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: not two arrays, shapes that do not fit.

    Example:
        >>> student = jnp.ones((1, 4, 4, 2)), jnp.ones((1, 4, 4, 3))
        >>> teacher = jnp.ones((1, 8, 8, 2)), 2 * jnp.ones((1, 8, 8, 3))
        >>> print(flow_loss(student, teacher))
        [6.]

    Yim et al., "A Gift from Knowledge Distillation", 2017, eq. 2.
    """
    for name, pair in (("student", student), ("teacher", teacher)):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{name} must be a pair of arrays, the features of two layers.")
    # In one dtype, whichever of the four is float64.
    names = [f"{side}[{i}]" for side in ("student", "teacher") for i in (0, 1)]
    a, b, c, d = as_floats(**dict(zip(names, (*student, *teacher), strict=True)))
    s, t = (flow_matrix(*pair, axis=axis, where=where) for pair in ((a, b), (c, d)))
    check_same_shape("project the student's channels.", student=s, teacher=t)
    return jnp.sum(jnp.square(s - t), (1, 2))


@jax.jit
def _products(first: Array, second: Array, keep: Array) -> Array:
    exact = jax.lax.Precision.HIGHEST
    total = jnp.einsum("bpi,bpj->bij", first, second, precision=exact)
    count = jnp.sum(keep, 1, dtype=total.dtype)
    return total / jnp.maximum(count, 1)[:, None, None]
