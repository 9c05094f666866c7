"""SparseGPT of one matrix: a walk over its features, block by block.

Each feature's weights that go leave an error, which the features still to come make up for as far
as the data lets them. Everything is a loop of ``lax``, however many features there are.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, UInt32

from jaxcomp.checks import check_count
from jaxcomp.kernels.threshold import (
    magnitude_bits,
    removal_count,
    removal_count_exact,
    smallest_masks,
    sortable_bits,
)
from jaxcomp.model.second_moments import check_matrix, dot, inverse_factor
from jaxcomp.prune.post_training.obs import PER_OUTPUT, PrunedMatrix
from jaxcomp.prune.schedules import check_sparsity
from jaxcomp.prune.structures import NM, Element, Structure, check_structure, local_masks


def sparsegpt_matrix(
    weight: Float[Any, "features outputs"],
    second_moment: Float[Any, "_ _"],
    sparsity: Any = None,
    structure: Structure = Element(),  # noqa: B008
    block_size: int = 128,
    damping: float = 0.01,
) -> PrunedMatrix:
    """Remove weights feature by feature, each time correcting the features that still follow.

    The mask of a block of features is chosen when the walk comes there, from the weights as
    corrected so far: those with the least |w| / U_jj go, where UᵀU is the inverse of H. Every block
    loses its share of the count, so that exactly as many go as of a mask by magnitude.

    Args:
        weight: the matrix, any floating dtype; computed in float32.
        second_moment: H, the mean of x xᵀ.
        sparsity: fraction removed, in [0, 1), possibly traced; None for :class:`NM`.
        structure: ``Element()``: all weights of a block compete; ``Element(within=-1)``: those of
            an output do; ``NM(n, m)``: ``n`` of ``m`` neighbouring features are kept.
        block_size: features that share a choice; for :class:`NM` rounded to a multiple of m.
        damping: what is added to H, in means of its diagonal.

    Returns:
        The new matrix and its mask.

    Raises:
        TypeError: something is no array or no number.
        ValueError: shapes that do not fit, NaN or infinite values, a sparsity outside [0, 1) or
            missing, another structure, N:M that does not divide the features, a damping below 0.

    Example:
        The second feature repeats the first, which can take its weight over:

        >>> moment = jnp.array([[1.0, 1.0], [1.0, 1.0]])
        >>> weight, mask = sparsegpt_matrix(jnp.array([[1.0], [2.0]]), moment, 0.5, damping=0.0)
        >>> weight.round(2).tolist(), mask.tolist()
        ([[0.0], [3.0]], [[False], [True]])

    Source: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot", 2023, Algorithm 1.
    """
    check_matrix(weight, second_moment, damping)
    known = check_matrix_structure("weight", structure, weight.shape)
    features, outputs = weight.shape
    counts = block_counts(sparsity, known, features, outputs, block_size)[0]
    return prune_in_blocks(weight, second_moment, counts, known, block_size, damping)


def check_matrix_structure(path: str, structure: Any, shape: tuple[int, ...]) -> Element | NM:
    """A structure in the one form that :func:`prune_in_blocks` takes.

    Args:
        path: of the leaf, for messages.
        structure: the structure.
        shape: ``(features, outputs)``.

    Returns:
        ``Element()``, ``Element(within=-1)`` or ``NM(n, m, axis=0)``.

    Raises:
        TypeError: it is no structure.
        ValueError: it does not fit, or is none of these.

    Example:
        >>> check_matrix_structure("kernel", NM(2, 4), (8, 3))
        NM(n=2, m=4, axis=0)
    """
    check_structure(path, structure, shape)
    if isinstance(structure, NM) and structure.axis % 2 == 0:
        return structure._replace(axis=0)
    if structure == Element():
        return Element()
    if isinstance(structure, Element) and structure in PER_OUTPUT:
        return PER_OUTPUT[0]
    raise ValueError(
        f"{path}: {structure} of a matrix (features, outputs) is not for a walk over features: "
        "give Element(), Element(within=-1) or NM(n, m)"
    )


def block_counts(
    sparsity: Any,
    structure: Element | NM,
    features: int,
    outputs: int,
    block_size: int = 128,
    matrices: int = 1,
) -> UInt32[Array, "matrices blocks"]:
    """How many weights each block of each matrix loses; for local structures, each group in it.

    Args:
        sparsity: as in :func:`sparsegpt_matrix`.
        structure: from :func:`check_matrix_structure`.
        features: of a matrix.
        outputs: of a matrix.
        block_size: as in :func:`sparsegpt_matrix`.
        matrices: how many there are in the leaf; the sparsity is that of all together.

    Returns:
        Counts; with ``Element()`` they add up to what the sparsity makes of the leaf's size.

    Raises:
        ValueError: a known sparsity outside [0, 1), or missing, or more than N:M removes.

    Example:
        >>> block_counts(0.5, Element(), features=5, outputs=3, block_size=2)
        Array([[3, 3, 2]], dtype=uint32)
    """
    size = _block_of(structure, features, block_size)
    blocks = -(-features // size)
    ends = np.minimum(np.arange(1, blocks + 1) * size, features)
    if isinstance(structure, NM):
        lost = lost_of_run(sparsity, structure)
        return jnp.broadcast_to(jnp.asarray(lost, jnp.uint32), (matrices, blocks))
    if sparsity is None:
        raise ValueError(f"{structure} needs a sparsity: pass a fraction removed, in [0, 1)")
    if not isinstance(sparsity, Tracer):
        check_sparsity("sparsity", sparsity)
    if structure == PER_OUTPUT[0]:
        # As the mask engine has it: from the whole leaf to a fraction, from that to each output.
        units = matrices * features * outputs
        fraction = removal_count(sparsity, (units,))[0].astype(jnp.float32) / units
        (count,) = removal_count(jnp.minimum(fraction, jnp.float32(0.9999999)), (features,))
        totals = (count * ends.astype(np.uint32) + np.uint32(features // 2)) // np.uint32(features)
        counts = jnp.diff(totals, prepend=jnp.zeros(1, jnp.uint32))
        return jnp.broadcast_to(counts, (matrices, blocks))
    before = np.arange(matrices)[:, None] * features
    totals = removal_count(sparsity, tuple(((before + ends) * outputs).ravel().tolist()))
    return jnp.diff(totals, prepend=jnp.zeros(1, jnp.uint32)).reshape(matrices, blocks)


def lost_of_run(sparsity: Any, structure: NM) -> int:
    """How many of a run of m go at a sparsity; all but n at None.

    Raises:
        ValueError: fewer than n would stay.

    Example:
        >>> lost_of_run(None, NM(2, 4)), lost_of_run(0.25, NM(2, 4))
        (2, 1)
    """
    lost = structure.m - structure.n
    if sparsity is None:
        return lost
    asked = removal_count_exact(float(sparsity), structure.m)
    if asked > lost:
        raise ValueError(
            f"{structure} removes at most {lost / structure.m:.3g}, and sparsity is {sparsity}: "
            "leave sparsity out, or keep fewer"
        )
    return asked


def _block_of(structure: Element | NM, features: int, block_size: int) -> int:
    check_count("block_size", block_size)
    size = min(block_size, features)
    return max(size // structure.m, 1) * structure.m if isinstance(structure, NM) else size


@partial(jax.jit, static_argnames=("structure", "block_size"))
def prune_in_blocks(
    weight: Float[Any, "features outputs"],
    second_moment: Float[Any, "features features"],
    counts: UInt32[Any, "blocks"],
    structure: Element | NM = Element(),  # noqa: B008
    block_size: int = 128,
    damping: Any = 0.01,
) -> PrunedMatrix:
    """:func:`sparsegpt_matrix` with the counts of the blocks given, and without its checks.

    Args:
        weight: the matrix.
        second_moment: H.
        counts: a row of :func:`block_counts`.
        structure: from :func:`check_matrix_structure`.
        block_size: the one that the counts were made for.
        damping: as in :func:`sparsegpt_matrix`.

    Returns:
        The new matrix and its mask.
    """
    features, outputs = weight.shape
    block = _block_of(structure, features, block_size)
    padding = -features % block
    total = features + padding
    rows = jnp.pad(weight.astype(jnp.float32), ((0, padding), (0, 0)))
    factor = (
        jnp.eye(total, dtype=jnp.float32)
        .at[:features, :features]
        .set(inverse_factor(second_moment, damping))
    )

    def prune_block(i: Any, carry: Any) -> Any:
        rows, mask = carry
        start = i * block
        mine = lax.dynamic_slice(rows, (start, 0), (block, outputs))
        across = lax.dynamic_slice(factor, (start, 0), (block, total))
        within = lax.dynamic_slice(across, (0, start), (block, block))
        real = start + jnp.arange(block) < features
        mine, kept, errors = _prune_block(mine, within, counts[i], real, structure)
        # All errors of the block reach the features after it at once.
        later = jnp.where(jnp.arange(total) >= start + block, across, 0)
        rows = rows - dot(later.T, errors)
        return (
            lax.dynamic_update_slice(rows, mine, (start, 0)),
            lax.dynamic_update_slice(mask, kept, (start, 0)),
        )

    everything = jnp.ones(rows.shape, bool)
    rows, mask = lax.fori_loop(0, total // block, prune_block, (rows, everything))
    return PrunedMatrix(rows[:features], mask[:features])


def _prune_block(
    rows: Array, factor: Array, count: Array, real: Array, structure: Element | NM
) -> tuple[Array, Array, Array]:
    """Walk over the features of a block; new rows, mask, and each feature's error over U_jj."""
    block, outputs = rows.shape
    step = structure.m if isinstance(structure, NM) else block
    diagonal = jnp.diagonal(factor)[:, None]

    def choose(i: Any, carry: Any) -> Any:
        rows, mask, errors = carry
        start = i * step
        scores = lax.dynamic_slice(jnp.abs(rows) / diagonal, (start, 0), (step, outputs))
        scores = jnp.where(lax.dynamic_slice(real, (start,), (step,))[:, None], scores, jnp.inf)
        mask = lax.dynamic_update_slice(mask, _kept(scores, count, structure), (start, 0))
        return lax.fori_loop(start, start + step, correct, (rows, mask, errors))

    def correct(j: Any, carry: Any) -> Any:
        rows, mask, errors = carry
        row = jnp.where(mask[j], rows[j], 0)
        error = (rows[j] - row) / diagonal[j]
        rows = rows - factor[j][:, None] * error
        return rows.at[j].set(row), mask, errors.at[j].set(error)

    start = (rows, jnp.ones(rows.shape, bool), jnp.zeros_like(rows))
    return lax.fori_loop(0, block // step, choose, start)


def _kept(scores: Array, count: Array, structure: Element | NM) -> Array:
    if structure == Element():
        return smallest_masks((scores,), count, key=magnitude_bits)[0]
    return local_masks(structure, sortable_bits(scores), count)
