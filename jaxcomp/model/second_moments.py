"""What a second moment says of a matrix: how far its outputs move, and what makes up for what.

A layer computes ``x @ weight``. Over samples x with second moment H = E[x xᵀ], a change D of the
weight changes the outputs by tr(Dᵀ H D) in the mean square, each output by itself.

H may be singular: fewer samples than features, features that repeat or never occur. So its diagonal
grows: by a damping as asked, in means of the diagonal, and by the part of itself that a Cholesky
factor takes in float32: about a millionth for each eight features, tenfold that where it fails.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxcomp.checks import check_amount

_NEVER = 1e-15  # the spread of a feature that never occurs, for one of the others


def output_errors(
    change: Float[Any, "*groups features outputs"],
    second_moment: Float[Any, "*groups features features"],
) -> Float[Array, "*groups outputs"]:
    """How far each output moves, E|x D|².

    Args:
        change: D.
        second_moment: H.

    Returns:
        float32, never below 0; dᵀ H d for each column d.

    Example:
        >>> output_errors(jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.eye(2))
        Array([2., 4.], dtype=float32)
    """
    change = change.astype(jnp.float32)
    return jnp.maximum(jnp.sum(change * dot(second_moment.astype(jnp.float32), change), -2), 0)


def inverse_factor(
    second_moment: Float[Any, "features features"], damping: Any
) -> Float[Array, "features features"]:
    """Upper triangular U with UᵀU = (H + damping)⁻¹, H scaled to a mean diagonal of 1.

    H turned end to end has a lower factor whose turned inverse is U: one factorization, where
    inverting H first would square the condition.

    Args:
        second_moment: H.
        damping: what is added to it, in means of its diagonal.

    Returns:
        float32.

    Example:
        >>> inverse_factor(jnp.diag(jnp.array([1.0, 7.0])), 0.0).round(2)
        Array([[2.  , 0.  ],
               [0.  , 0.76]], dtype=float32)
    """
    _, correlation, spread = normalized(second_moment, damping)
    lower = unit_factor(correlation[::-1, ::-1])
    identity = jnp.eye(len(spread), dtype=jnp.float32)
    inverse = jax.scipy.linalg.solve_triangular(lower[::-1, ::-1], identity, lower=False)
    return jnp.triu(inverse) / spread


def normalized(
    second_moment: Float[Any, "features features"], damping: Any
) -> tuple[Array, Array, Array]:
    """H in a scale of its own, and how its features correlate.

    Args:
        second_moment: H.
        damping: what is added to it, in means of its diagonal.

    Returns:
        H over the mean of its diagonal; that with the damping, each feature over its own spread, so
        that the diagonal is 1; these spreads. float32.

    Example:
        >>> normalized(jnp.diag(jnp.array([1.0, 7.0])), 0.0)[2]
        Array([0.5      , 1.3228756], dtype=float32)
    """
    moment = second_moment.astype(jnp.float32)
    mean = jnp.mean(jnp.diagonal(moment))
    moment = moment / jnp.where(mean > 0, mean, 1)
    goal = moment + jnp.asarray(damping, jnp.float32) * jnp.eye(len(moment), dtype=jnp.float32)
    spread = jnp.sqrt(jnp.diagonal(goal))
    # What never occurs goes first, and takes nothing over.
    spread = jnp.where(spread > _NEVER, spread, _NEVER)
    correlation = goal / spread[:, None] / spread
    return moment, correlation.at[jnp.diag_indices(len(moment))].set(1), spread


def unit_factor(matrix: Float[Any, "features features"]) -> Float[Array, "features features"]:
    """The lower factor of a matrix of unit diagonal, with as much added to that as it takes.

    Args:
        matrix: positive semidefinite, as far as rounding let it be.

    Returns:
        float32, lower triangular; NaN of a matrix that holds NaN.

    Example:
        >>> unit_factor(jnp.ones((2, 2))).round(2)
        Array([[1., 0.],
               [1., 0.]], dtype=float32)
    """
    size = len(matrix)
    least = jnp.float32(size * float(jnp.finfo(jnp.float32).eps))

    def factor(state: tuple[Array, Array]) -> tuple[Array, Array]:
        added = jnp.where(state[0] == 0, least, 10 * state[0])
        return added, jnp.linalg.cholesky(matrix + added * jnp.eye(size, dtype=jnp.float32))

    # No more than the trace is ever needed, whatever rounding did; of NaN nothing would help.
    def failed(state: tuple[Array, Array]) -> Array:
        return ~jnp.all(jnp.isfinite(state[1])) & (state[0] < 10 * size)

    return lax.while_loop(failed, factor, (jnp.float32(0), jnp.full_like(matrix, jnp.nan)))[1]


def dot(a: Array, b: Array) -> Array:
    """A matrix product in full float32, on backends too that would round the factors.

    Example:
        >>> dot(jnp.ones((1, 2)), jnp.ones((2, 1)))
        Array([[2.]], dtype=float32)
    """
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def check_matrix(weight: Any, second_moment: Any, damping: Any = 0.0) -> None:
    """Raise unless a matrix and a second moment fit, and all is in range where it is known.

    Args:
        weight: ``(features, outputs)``.
        second_moment: ``(features, features)``.
        damping: at least 0.

    Raises:
        TypeError: one is no array, or the damping no number.
        ValueError: they do not fit, or are NaN, infinite or negative.

    Example:
        >>> check_matrix(jnp.ones((3, 2)), jnp.ones((2, 2)))
        Traceback (most recent call last):
        ...
        ValueError: weight (3, 2) and second moment (2, 2): (features, outputs) and ...
    """
    for name, array in (("weight", weight), ("second_moment", second_moment)):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"{name} must be an array, not {array!r:.60}")
    if not isinstance(damping, Tracer):
        check_amount("damping", damping)
    if weight.ndim != 2 or second_moment.shape != (weight.shape[0],) * 2:
        raise ValueError(
            f"weight {weight.shape} and second moment {second_moment.shape}: (features, outputs) "
            "and (features, features) are needed"
        )
    for name, array in (("weight", weight), ("second_moment", second_moment)):
        if isinstance(array, Tracer):
            continue
        # What is known may be looked at inside a trace too, where it is closed over.
        with jax.ensure_compile_time_eval():
            finite = bool(jnp.all(jnp.isfinite(array)))
        if not finite:
            raise ValueError(f"{name} has NaN or infinite values: mend the weights or the data")
