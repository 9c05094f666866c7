"""Sparse and dense phases in turn: AC/DC."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int32

from jaxcomp import tree as tree_lib
from jaxcomp.compression import Compression, Params, State
from jaxcomp.prune import scores
from jaxcomp.prune.allocation import Allocation, uniform
from jaxcomp.prune.masks import Structures, check_ends, renew, resolve
from jaxcomp.prune.schedules import constant
from jaxcomp.prune.scores import RunningScore, Score
from jaxcomp.prune.structures import Element
from jaxcomp.prune.training import masked


class AlternatingBuffers(NamedTuple):
    """Buffers of :func:`alternating`.

    Attributes:
        step: updates so far.
        sparse: whether the last update was in a sparse phase.
        masks: by path; True where a weight is kept.
    """

    step: Int32[Array, "..."]
    sparse: Bool[Array, "..."]
    masks: dict[str, Bool[Array, "..."]]


def alternating(
    sparsity: float,
    begin: int,
    end: int,
    sparse_steps: int,
    dense_steps: int,
    score: Score = scores.magnitude,
    allocation: Allocation = uniform,
    structure: Structures = Element(),  # noqa: B008
) -> Compression:
    """Train sparse and dense in turn, and sparse at the end (AC/DC).

    Dense until ``begin``; then ``sparse_steps`` with the lowest weights held at zero and
    ``dense_steps`` with all, in turn; from ``end`` on sparse for good. A weight that comes back
    begins at zero, and the optimizer has forgotten it.

    Args:
        sparsity: fraction removed in sparse phases, in [0, 1).
        begin: step of the first sparse phase.
        end: step from which on training stays sparse, with the masks of the phase that it meets, or
            with new ones where that phase is dense.
        sparse_steps: length of a sparse phase.
        dense_steps: length of a dense phase.
        score: function of a leaf and its gradient; the lowest go at the start of a sparse phase.
        allocation: how the sparsity is spread over the leaves.
        structure: what goes together, one for all leaves or by path pattern.

    Returns:
        A method that lives in the weights.

    Raises:
        TypeError: ``score`` is not a function, or remembers earlier steps.
        ValueError: a sparsity outside [0, 1), phases without steps, ``end`` before ``begin``.

    Example:
        >>> method = alternating(0.5, begin=0, end=6, sparse_steps=2, dense_steps=1)
        >>> params = {"kernel": jnp.array([[4.0, 1.0]])}
        >>> state, zeros = method.init(params), []
        >>> for _ in range(8):
        ...     state = method.update(params, state, None)
        ...     zeros.append(int(jnp.sum(method.apply(params, state)["kernel"] == 0)))
        >>> zeros
        [1, 1, 0, 1, 1, 0, 1, 1]

    Source: Peste et al., "AC/DC: alternating compressed/decompressed training of deep neural
    networks", NeurIPS 2021, algorithm 1.
    """
    masked.check_score(score)
    if isinstance(score, RunningScore):
        raise TypeError("score must not remember: in a dense phase it would have nothing to rank")
    schedule = constant(sparsity)
    if not 0 <= begin <= end or min(sparse_steps, dense_steps) < 1:
        raise ValueError(
            "steps must satisfy 0 <= begin <= end, and phases last at least 1 step, not "
            f"begin={begin}, end={end}, sparse_steps={sparse_steps}, dense_steps={dense_steps}"
        )

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        check_ends(schedule, leaves, resolve(structure, leaves), allocation)
        everything = masked.keep_all(leaves)
        step = jnp.zeros((), jnp.int32)
        return State({}, AlternatingBuffers(step, step > 0, everything))

    def advance(leaves: Any, gradients: Any, buffers: AlternatingBuffers) -> AlternatingBuffers:
        step, was_sparse, masks = buffers
        in_turn = (step - begin) % (sparse_steps + dense_steps) < sparse_steps
        sparse = (step >= end) | ((step >= begin) & in_turn)

        def begin_sparse() -> dict[str, Array]:
            found = masked.evaluate(score, {}, leaves, gradients)
            return renew(found, sparsity, resolve(structure, leaves), allocation)

        def dense() -> dict[str, Array]:
            return jax.tree.map(jnp.ones_like, masks)

        branch = jnp.where(sparse, jnp.where(was_sparse, 1, 0), 2)
        masks = jax.lax.switch(branch, [begin_sparse, lambda: masks, dense])
        return AlternatingBuffers(jnp.asarray(optax.safe_increment(step)), sparse, masks)

    method = masked.masked_method(init, masked.update_of(advance), structure)
    return method._replace(restart=masked.changed)
