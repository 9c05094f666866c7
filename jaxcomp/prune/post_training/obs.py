"""Second-order pruning of one matrix: which weights go, and what the others become for it.

A layer computes ``x @ weight``. Over samples x with second moment H = E[x xᵀ], a change D of the
weight changes the outputs by tr(Dᵀ H D) in the mean square. All here is about that number, and
needs H only. Every output is a problem of its own, with the same H.

H may be singular: fewer samples than features, features that repeat or never occur. So its diagonal
grows: by ``damping`` as asked, in means of the diagonal, and by the part of itself that a Cholesky
factor takes in float32: about a millionth for each eight features, tenfold that where it fails.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxcomp.checks import check_count
from jaxcomp.model.second_moments import (
    check_matrix,
    dot,
    inverse_factor,
    normalized,
    output_errors,
    unit_factor,
)
from jaxcomp.prune.structures import Element

# Ways to say that the weights of each output compete among themselves.
PER_OUTPUT = tuple(Element(within) for within in (-1, 1, (-1,), (1,)))
_REFINEMENTS = 3
_BATCH_ELEMENTS = 1 << 24  # of the systems that are solved at once


class PrunedMatrix(NamedTuple):
    """A matrix with zeros, and where they are.

    Attributes:
        weight: ``(features, outputs)`` float32, zero where removed.
        mask: booleans of the same shape, True where kept.
    """

    weight: Float[Array, "features outputs"]
    mask: Bool[Array, "features outputs"]


def repair(
    weight: Float[Any, "features outputs"],
    second_moment: Float[Any, "features features"],
    mask: Bool[Any, "features outputs"],
    damping: Any = 0.0,
) -> Float[Array, "features outputs"]:
    """The best values of the weights that a mask keeps: least squares, for each output.

    Args:
        weight: the matrix before anything was removed.
        second_moment: H.
        mask: True where kept.
        damping: what a change of the kept weights costs besides, in means of the diagonal of H.
            Without, of several best changes (H is singular) about the smallest is
            taken, each weight's in the unit of its feature's spread.

    Returns:
        float32, zero where removed. An output that loses nothing is returned as it is.

    Raises:
        TypeError: the mask is not of booleans.
        ValueError: shapes that do not fit, NaN or infinite values, a known damping below 0.

    Example:
        >>> moment = jnp.array([[1.0, 0.5], [0.5, 1.0]])
        >>> mask = jnp.array([[True], [False]])
        >>> repair(jnp.array([[1.0], [2.0]]), moment, mask).round(3)
        Array([[2.],
               [0.]], dtype=float32)

    Source: Hassibi & Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon",
    1993, for all removed weights of an output at once.
    """
    check_matrix(weight, second_moment, damping)
    if mask.dtype != bool:
        raise TypeError(f"mask must be booleans, True where kept, not {mask.dtype}")
    if mask.shape != weight.shape:
        raise ValueError(f"a mask of shape {mask.shape} does not fit a weight of {weight.shape}")
    return _repair(weight, second_moment, mask, damping)


@jax.jit
def _repair(weight: Array, second_moment: Array, mask: Array, damping: Any) -> Array:
    features, outputs = weight.shape
    moment, correlation, spread = normalized(second_moment, damping)

    def solve(column: Any) -> Array:
        values, kept = column
        kept = kept.astype(jnp.float32)
        system = kept[:, None] * correlation * kept + jnp.diag(1 - kept)
        factor = unit_factor(system)
        wanted = kept * dot(moment, (1 - kept) * values) / spread
        change = jnp.zeros_like(values)
        # The factor is that of a matrix with a little more on its diagonal; each refinement takes
        # out of the solution what that has done, first where H weighs most.
        for _ in range(1 + _REFINEMENTS):
            rest = wanted - kept * dot(correlation, change)
            change = change + kept * jax.scipy.linalg.cho_solve((factor, True), rest)
        return kept * (values + change / spread)

    columns = (weight.astype(jnp.float32).T, mask.T)
    batch = max(1, min(outputs, _BATCH_ELEMENTS // features**2))
    return lax.map(solve, columns, batch_size=batch).T


def optimal_brain_surgeon(
    weight: Float[Any, "features outputs"],
    second_moment: Float[Any, "_ _"],
    count: Any,
    structure: Element = Element(),  # noqa: B008
    damping: float = 0.0,
) -> PrunedMatrix:
    """Remove one weight after the other, each time the one that costs least, and correct all.

    The cost of a weight is w² / [H⁻¹]_jj, with H of the weights that its output still has. This is
    greedy, not the best mask; of the mask that it finds, the values are the best. It holds an
    inverse of H for every output and takes a step for every weight: for small matrices.

    Args:
        weight: the matrix.
        second_moment: H.
        count: weights to remove; with ``Element(within=-1)``, of each output. May be traced.
        structure: ``Element()`` or ``Element(within=-1)``.
        damping: what is added to H, in means of its diagonal.

    Returns:
        The new matrix and its mask.

    Raises:
        TypeError: a known count is no whole number.
        ValueError: shapes that do not fit, NaN or infinite values, another structure, a known count
            below 0 or above what there is, a damping below 0.

    Example:
        >>> moment = jnp.array([[1.0, 0.9], [0.9, 1.0]])
        >>> weight, mask = optimal_brain_surgeon(jnp.array([[1.0], [2.0]]), moment, 1)
        >>> weight.round(3)
        Array([[0. ],
               [2.9]], dtype=float32)

    Source: Hassibi & Stork 1993; Frantar, Singh & Alistarh, "Optimal Brain Compression", 2022,
    section 4 (ExactOBS), for the outputs apart.
    """
    check_matrix(weight, second_moment, damping)
    if structure != Element() and structure not in PER_OUTPUT:
        raise ValueError(f"{structure}: give Element() or Element(within=-1)")
    most = weight.shape[0] if structure in PER_OUTPUT else weight.size
    if not isinstance(count, Tracer):
        known = count.item() if hasattr(count, "item") and np.shape(count) == () else count
        check_count("count", known, least=0)
        if known > most:
            raise ValueError(f"count is {count}, but there are {most} weights to remove from")
    return _one_by_one(weight, second_moment, count, damping, structure)


@partial(jax.jit, static_argnames="structure")
def _one_by_one(
    weight: Array, moment: Array, count: Any, damping: Any, structure: Element
) -> PrunedMatrix:
    features = len(weight)
    factor = inverse_factor(moment, damping)
    inverse = dot(factor.T, factor)

    def remove(state: Any) -> Any:
        """The cheapest weight of some outputs: ``(outputs, features)`` each."""
        values, inverses, kept = state
        pivots = jnp.maximum(jnp.diagonal(inverses, axis1=1, axis2=2), jnp.finfo(jnp.float32).tiny)
        costs = jnp.where(kept, jnp.abs(values) * lax.rsqrt(pivots), jnp.inf)
        # The first of equals in the order of the matrix, which lists its features first.
        feature, output = jnp.unravel_index(jnp.argmin(costs.T), costs.T.shape)
        column = inverses[output, :, feature] / pivots[output, feature]
        new = values[output] - values[output, feature] * column
        less = inverses[output] - jnp.outer(column, inverses[output, feature])
        less = less.at[feature].set(0).at[:, feature].set(0)
        return (
            values.at[output].set(new.at[feature].set(0)),
            inverses.at[output].set(less),
            kept.at[output, feature].set(False),
        )

    def run(values: Array) -> Array:
        everything = jnp.ones(values.shape, bool)
        inverses = jnp.broadcast_to(inverse, (len(values), features, features))
        state = (values, inverses, everything)
        return lax.fori_loop(0, count, lambda _, state: remove(state), state)[2]

    values = weight.astype(jnp.float32).T
    kept = run(values) if structure == Element() else lax.map(lambda v: run(v[None])[0], values)
    # Many small corrections gather rounding; the values of the mask are found anew.
    return PrunedMatrix(_repair(weight, moment, kept.T, damping), kept.T)


@jax.jit
def output_error(
    weight: Float[Any, "*groups features outputs"],
    new_weight: Float[Any, "*groups features outputs"],
    second_moment: Float[Any, "*groups features features"],
) -> Float[Array, ""]:
    """How far the outputs move: E|x W - x Ŵ|², summed over outputs (and groups).

    Args:
        weight: the matrix, or a stack of them.
        new_weight: the changed one.
        second_moment: H.

    Returns:
        float32 scalar, tr((W - Ŵ)ᵀ H (W - Ŵ)).

    Example:
        >>> output_error(jnp.ones((2, 1)), jnp.zeros((2, 1)), jnp.eye(2))
        Array(2., dtype=float32)
    """
    change = weight.astype(jnp.float32) - new_weight.astype(jnp.float32)
    return jnp.sum(output_errors(change, second_moment))
