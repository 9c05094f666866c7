"""Sparse in the forward pass, dense underneath: removed weights are trained on and may return."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int32

from jaxcomp import tree as tree_lib
from jaxcomp.compression import Compression, Params, State
from jaxcomp.prune.allocation import Allocation, uniform
from jaxcomp.prune.masks import Structures, check_ends, renew, resolve, zero_out
from jaxcomp.prune.schedules import Schedule
from jaxcomp.prune.scores import RunningScore, Score
from jaxcomp.prune.structures import Element
from jaxcomp.prune.training import masked


class StraightThroughBuffers(NamedTuple):
    """Buffers of :func:`straight_through`.

    Attributes:
        step: updates so far.
        masks: by path; True where the forward pass sees a weight.
        kept: by path, what the score remembers of earlier steps; empty for most scores.
    """

    step: Int32[Array, "..."]
    masks: dict[str, Bool[Array, "..."]]
    kept: dict[str, Any]


def straight_through(
    score: Score | RunningScore,
    schedule: Schedule,
    allocation: Allocation = uniform,
    structure: Structures = Element(),  # noqa: B008
    every: int = 1,
    end: int | None = None,
    decay: float = 0.0,
) -> Compression:
    """Mask the weights in the forward pass; gradients pass the mask as if it were not there.

    With ``structure=NM(2, 4)`` and a ``decay`` this trains 2:4 networks from scratch (SR-STE). The
    forward pass pays for the mask, which the methods that live in the weights do not.

    Args:
        score: function of a leaf and its gradient, such as ``scores.magnitude``; the lowest go.
        schedule: function of the step to the sparsity.
        allocation: how the sparsity is spread over the leaves.
        structure: what goes together, one for all leaves or by path pattern.
        every: steps between masks.
        end: step from which on the masks stand still; None: they never do.
        decay: what is added to the gradient of a removed weight, times the weight: it draws to zero
            what is not used, so that masks come to rest.

    Returns:
        A method; the stored weights stay dense. Its ``init`` raises ``ValueError`` for a structure
        that does not fit a leaf.

    Raises:
        TypeError: score or schedule is not a function.
        ValueError: ``every`` below 1, or a negative ``decay``.

    Example:
        >>> from jaxcomp.prune import constant, scores
        >>> method = straight_through(scores.magnitude, constant(0.5))
        >>> params = {"kernel": jnp.array([[4.0, 1.0]])}
        >>> state = method.update(params, method.init(params), None)
        >>> total = lambda p: jnp.sum(method.apply(p, state)["kernel"])
        >>> float(total(params)), jax.grad(total)(params)["kernel"]
        (4.0, Array([[1., 1.]], dtype=float32))

    Source: the estimator: Bengio et al., 2013; the decay: Zhou et al., "Learning N:M fine-grained
    structured sparse neural networks from scratch", ICLR 2021, (9).
    """
    masked.check_score(score)
    if not callable(schedule):
        raise TypeError(
            f"schedule must be a function of the step, such as constant(0.5), not {schedule!r}"
        )
    masked.check_every(every)
    if not decay >= 0:
        raise ValueError(f"decay must not be negative: {decay}")

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        check_ends(schedule, leaves, resolve(structure, leaves), allocation)
        everything = masked.keep_all(leaves)
        remembered = masked.begin_keeping(score, leaves)
        return State({}, StraightThroughBuffers(jnp.zeros((), jnp.int32), everything, remembered))

    def apply(params: Params, state: State) -> Params:
        masks = state.buffers.masks
        leaves = tree_lib.take_like(params, masks)
        seen = {path: _through(decay, leaf, masks[path]) for path, leaf in leaves.items()}
        return tree_lib.replace(params, seen)

    def advance(leaves: Any, gradients: Any, buffers: StraightThroughBuffers) -> Any:
        step, masks, kept = buffers
        structures = resolve(structure, leaves)
        kept = masked.go_on_keeping(score, kept, leaves, gradients)

        def again() -> dict[str, Array]:
            scores = masked.evaluate(score, kept, leaves, gradients)
            return renew(scores, schedule(step), structures, allocation)

        due = step % every == 0
        if end is not None:
            due &= step < end
        masks = jax.lax.cond(due, again, lambda: masks)
        return StraightThroughBuffers(jnp.asarray(optax.safe_increment(step)), masks, kept)

    def pack(params: Params, state: State) -> Any:
        return masked.pack_masked(params, apply(params, state), state.buffers.masks, structure)

    return Compression(init, apply, masked.update_of(advance), pack)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(decay: float, leaf: Any, mask: Any) -> Any:
    del decay
    return zero_out(leaf, mask)


def _through_forward(decay: float, leaf: Any, mask: Any) -> Any:
    # Without a decay nothing is kept for the way back.
    return zero_out(leaf, mask), ((leaf, mask) if decay else None)


def _through_backward(decay: float, kept: Any, gradient: Any) -> Any:
    if kept is None:
        return gradient, None
    leaf, mask = kept
    return gradient + zero_out(decay * leaf, ~mask).astype(gradient.dtype), None


_through.defvjp(_through_forward, _through_backward)
