"""Lottery tickets: prune in rounds, and put what is left back to where it was early in training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxcomp import tree as tree_lib
from jaxcomp.compression import Compression, Params, State
from jaxcomp.prune import scores
from jaxcomp.prune.allocation import Allocation, uniform
from jaxcomp.prune.masks import Structures
from jaxcomp.prune.schedules import staircase
from jaxcomp.prune.scores import RunningScore, Score
from jaxcomp.prune.structures import Element
from jaxcomp.prune.training import masked
from jaxcomp.prune.training.gradual import GradualBuffers, gradual
from jaxcomp.sharding import placed_like


class LotteryBuffers(NamedTuple):
    """Buffers of :func:`lottery_ticket`.

    Attributes:
        gradual: those of the pruning.
        early: by path, the weights to go back to, biases and norms among them.
    """

    gradual: GradualBuffers
    early: dict[str, Any]

    @property
    def masks(self) -> dict[str, Bool[Array, "..."]]:
        """By path; True where a weight is kept."""
        return self.gradual.masks


def lottery_ticket(
    sparsity: float,
    rounds: int,
    every: int,
    rewind_to: int = 0,
    score: Score | RunningScore = scores.magnitude,
    allocation: Allocation = uniform,
    structure: Structures = Element(),  # noqa: B008
) -> Compression:
    """Train, prune, go back to early weights, train again; in rounds, inside one train loop.

    A round of ``every`` steps ends with pruning: each takes the same fraction of what is left, and
    after ``rounds`` of them the sparsity is reached. Then every weight that is left, and every bias
    and norm, is what it was at step ``rewind_to`` (to the rounding of one addition, for an update
    brings it there), the optimizer forgets them all, and the next round begins. After the last
    round the ticket trains for as long as the loop goes on.

    The learning rate is the user's: what counts steps goes on counting, so give a schedule that
    repeats, such as ``optax.join_schedules([warm_up] * (rounds + 1), boundaries)``. Inside
    ``partition`` only the leaves that are aimed at go back.

    Args:
        sparsity: fraction removed after the last round, in [0, 1).
        rounds: how many.
        every: steps a round.
        rewind_to: the step whose weights are kept to go back to; 0: the initial ones. The rounds
            are counted from it, so that each trains ``every`` steps from there.
        score: function of a leaf and its gradient, or one that remembers; the lowest go.
        allocation: how the sparsity is spread over the leaves.
        structure: what goes together, one for all leaves or by path pattern.

    Returns:
        A method that lives in the weights, and must come first in a chain.

    Raises:
        TypeError: ``score`` is not a function.
        ValueError: a sparsity outside [0, 1), no rounds, no steps a round, a negative
            ``rewind_to``.

    Example:
        >>> import optax
        >>> from jaxcomp import compressed, wrap_optimizer
        >>> tx = wrap_optimizer(optax.sgd(1.0), lottery_ticket(0.5, rounds=1, every=2))
        >>> params = {"kernel": jnp.array([[4.0, 1.0]])}
        >>> state, path = tx.init(params), []
        >>> for _ in range(4):
        ...     grads = {"kernel": jnp.ones((1, 2))}
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     path.append(params["kernel"].tolist())
        >>> path
        [[[3.0, 0.0]], [[2.0, -1.0]], [[4.0, 0.0]], [[3.0, 0.0]]]

    Source: Frankle & Carbin, "The lottery ticket hypothesis", ICLR 2019, section 1; with
    ``rewind_to`` Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis",
    ICML 2020, section 5.
    """
    schedule = staircase(sparsity, rounds, every, begin=rewind_to)
    pruner = gradual(score, schedule, allocation, structure, every=1)

    def init(params: Params) -> State:
        state = pruner.init(params)
        early = {p: jnp.array(leaf) for p, leaf in tree_lib.flatten(params).items() if _moves(leaf)}
        return State({}, LotteryBuffers(state.buffers, early))

    def update(params: Params, state: State, grads: Params) -> State:
        old, early = state.buffers
        if rewind_to:
            leaves = tree_lib.take_like(params, early)
            early = jax.lax.cond(
                old.step == rewind_to, lambda: dict(leaves), lambda: {p: early[p] for p in leaves}
            )
        new = pruner.update(params, State({}, old), grads)
        return State({}, LotteryBuffers(new.buffers, early))

    def rewound(old: State, new: State) -> Array:
        return new.buffers.gradual.sparsity != old.buffers.gradual.sparsity

    def restart(old: State, new: State) -> dict[str, Array]:
        back = rewound(old, new)
        early = new.buffers.early.items()
        return {p: placed_like(jnp.broadcast_to(back, leaf.shape), leaf) for p, leaf in early}

    def rewind(params: Params, old: State, new: State) -> Params:
        back = rewound(old, new)
        leaves = tree_lib.take_like(params, new.buffers.early)
        news = {p: jnp.where(back, new.buffers.early[p], leaf) for p, leaf in leaves.items()}
        return tree_lib.replace(params, news)

    method = masked.masked_method(init, update, structure)
    return method._replace(restart=restart, rewind=rewind)


def _moves(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.floating))
