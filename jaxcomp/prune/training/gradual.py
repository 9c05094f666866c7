"""Masks from scores, at once or gradually, at exact counts; what is removed stays removed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int32

from jaxcomp import tree as tree_lib
from jaxcomp.compression import Compression, Params, State
from jaxcomp.prune.allocation import Allocation, uniform
from jaxcomp.prune.masks import Structures, check_ends, renew, resolve
from jaxcomp.prune.schedules import Schedule
from jaxcomp.prune.scores import RunningScore, Score
from jaxcomp.prune.structures import Element
from jaxcomp.prune.training import masked


class GradualBuffers(NamedTuple):
    """Buffers of :func:`gradual`.

    Attributes:
        step: updates so far.
        sparsity: what the schedule asked for when the masks were made last.
        masks: by path; True where a weight is kept.
        kept: by path, what the score remembers of earlier steps; empty for most scores.
    """

    step: Int32[Array, "..."]
    sparsity: Float32[Array, "..."]
    masks: dict[str, Bool[Array, "..."]]
    kept: dict[str, Any]


def gradual(
    score: Score | RunningScore,
    schedule: Schedule,
    allocation: Allocation = uniform,
    structure: Structures = Element(),  # noqa: B008
    every: int = 10,
) -> Compression:
    """Remove weights step by step as a schedule says, and hold them at zero.

    Lives in the weights: what is removed is written into them as zero by the wrapped optimizer, so
    the forward pass costs nothing. What is removed stays removed; a falling schedule brings nothing
    back.

    Args:
        score: function of a leaf and its gradient (``scores.magnitude``); the lowest go first. One
            that remembers (``scores.movement``) sees the gradient of every step.
        schedule: function of the step to the sparsity, such as :func:`cubic` or an optax schedule.
            A state that is resumed under another schedule goes on from its masks: it removes more
            where that asks for more.
        allocation: how the sparsity is spread over the leaves.
        structure: what goes together, one for all leaves or by path pattern.
        every: steps between mask updates while the schedule moves. Where it stands still the masks
            are brought up to it at once, and nothing is computed after that.

    Returns:
        A method; it packs to :class:`SparseArray`, or :class:`NMSparseArray` and
        :class:`BlockSparseArray` where the structure is such. Under ``vmap`` every step pays for a
        mask update. Its ``init`` raises ``ValueError`` for a structure that does not fit a leaf,
        and for a final sparsity that is more than :class:`NM` removes or would leave a leaf empty
        (a global threshold or ``lamp`` cannot be foreseen: look at the masks).

    Raises:
        TypeError: score or schedule is not a function, ``allocation`` no :class:`Allocation`.
        ValueError: ``every`` below 1.

    Example:
        >>> from jaxcomp.prune import cubic, scores
        >>> method = gradual(scores.magnitude, cubic(0.5, begin=0, end=0))
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> state = method.update(params, method.init(params), params)
        >>> method.apply(params, state)["kernel"]
        Array([[4., 0.],
               [0., 3.]], dtype=float32)

    Source: Zhu & Gupta, "To prune, or not to prune", 2018.
    """
    masked.check_score(score)
    if not callable(schedule):
        raise TypeError(
            "schedule must be a function of the step, such as cubic(0.9, 0, 1000), not "
            f"{schedule!r:.60}"
        )
    masked.check_every(every)

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        structures = resolve(structure, leaves)
        check_ends(schedule, leaves, structures, allocation)
        kept = masked.keep_all(leaves)
        zero = jnp.zeros((), jnp.int32)
        remembered = masked.begin_keeping(score, leaves)
        return State({}, GradualBuffers(zero, zero.astype(jnp.float32), kept, remembered))

    def advance(leaves: Any, gradients: Any, buffers: GradualBuffers) -> GradualBuffers:
        step, reached, masks, kept = buffers
        structures = resolve(structure, leaves)
        kept = masked.go_on_keeping(score, kept, leaves, gradients)
        target = jnp.asarray(schedule(step), jnp.float32)
        standing = target == jnp.asarray(schedule(step + 1), jnp.float32)
        due = (target > reached) & ((step % every == 0) | standing)

        def again() -> tuple[Array, dict[str, Array]]:
            scores = masked.evaluate(score, kept, leaves, gradients)
            return target, renew(scores, target, structures, allocation, masks)

        reached, masks = jax.lax.cond(due, again, lambda: (reached, masks))
        step = jnp.asarray(optax.safe_increment(step))
        return GradualBuffers(step, reached, masks, kept)

    return masked.masked_method(init, masked.update_of(advance), structure)
