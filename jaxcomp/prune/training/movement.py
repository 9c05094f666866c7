"""Movement pruning: what stays is what training moves away from zero, not what is large.

A score ``S`` is learned for each weight, with the gradient ``dL/dW_eff * W``, as if the mask that
is made from it were the score itself (a straight-through estimator). It grows where a descent step
moves the weight away from zero. Removed weights stay stored, without a gradient, and their scores
go on learning, so that they may come back. Made for fine-tuning, where magnitudes tell of the
task before.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32

from jaxcomp import tree as tree_lib
from jaxcomp.compression import Compression, Params, State
from jaxcomp.prune.allocation import Allocation, uniform
from jaxcomp.prune.masks import Structures, check_ends, renew, resolve, zero_out
from jaxcomp.prune.schedules import Schedule
from jaxcomp.prune.structures import Element, Structure
from jaxcomp.prune.training.learned import nudge
from jaxcomp.prune.training.masked import check_every, keep_all, packed


class MovementBuffers(NamedTuple):
    """Buffers of :func:`movement`.

    Attributes:
        step: updates so far.
        masks: by path; True where a weight is kept.
    """

    step: Int32[Array, "..."]
    masks: dict[str, Bool[Array, "..."]]


def movement(
    schedule: Schedule,
    structure: Structures = Element(),  # noqa: B008
    allocation: Allocation = uniform,
    every: int = 10,
) -> Compression:
    """Keep the weights with the highest learned scores, at the exact counts of a schedule.

    Args:
        schedule: function of the step to the sparsity, such as :func:`jaxcomp.prune.cubic`.
        structure: what goes together; a unit's score is the mean of its weights'.
        allocation: how the sparsity is spread over leaves; ``allocation.global_threshold`` compares
            the scores of all.
        every: steps between mask updates, also when the schedule has come to rest: scores go on
            moving. Masks are brought up to date at the step at which it comes to rest, too.

    Returns:
        A method; it packs to :class:`SparseArray`, or to the form of its structure.
        ``state.learned`` holds the scores, which the user's optimizer trains; they start at 0.

    Raises:
        TypeError: the schedule is not a function.
        ValueError: ``every`` below 1; from ``init``: a structure that does not fit a leaf.

    Example:
        >>> from jaxcomp.prune import cubic
        >>> method = movement(cubic(0.5, begin=0, end=0))
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> state = method.init(params)
        >>> scores = {"kernel": jnp.array([[-0.1, 0.2], [0.3, -0.4]])}
        >>> state = method.update(params, state._replace(learned=scores), params)
        >>> method.apply(params, state)["kernel"]
        Array([[0., 1.],
               [2., 0.]], dtype=float32)

    Source: Sanh, Wolf & Rush, "Movement pruning: adaptive sparsity by fine-tuning", NeurIPS 2020,
    section 3, (3).
    """
    if not callable(schedule):
        raise TypeError("schedule must be a function: movement(prune.cubic(0.9, 0, 1000))")
    check_every(every)

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        check_ends(schedule, leaves, resolve(structure, leaves), allocation)
        kept = keep_all(leaves)
        return State(_scores(leaves, 0.0), MovementBuffers(jnp.zeros((), jnp.int32), kept))

    def apply(params: Params, state: State) -> Params:
        masks = state.buffers.masks
        leaves = tree_lib.take_like(params, masks)
        return tree_lib.replace(
            params, {p: straight_through(w, state.learned[p], masks[p]) for p, w in leaves.items()}
        )

    @jax.jit
    def advance(scores: dict[str, Array], buffers: MovementBuffers) -> MovementBuffers:
        step, kept = buffers
        sparsity = schedule(step)
        came_to_rest = (schedule(step - 1) != sparsity) & (sparsity == schedule(step + 1))
        due = (step % every == 0) | came_to_rest
        structures = resolve(structure, scores)
        renewed = lambda: renew(scores, sparsity, structures, allocation)
        kept = jax.lax.cond(due, renewed, lambda: kept)
        return MovementBuffers(jnp.asarray(optax.safe_increment(step)), kept)

    def update(params: Params, state: State, grads: Params) -> State:
        del grads
        tree_lib.take_like(params, state.buffers.masks)
        return State(state.learned, advance(state.learned, state.buffers))

    def pack(params: Params, state: State) -> Any:
        masks = state.buffers.masks
        return _pack(params, masks, resolve(structure, masks))

    return Compression(init, apply, update, pack)


def soft_movement(threshold: float, penalty: float, initial: float = 0.0) -> Compression:
    """Keep the weights whose learned score passes a threshold; a penalty on scores makes it sparse.

    A weight stays where ``sigmoid(S) > threshold``. How many do is learned, and follows from
    ``penalty`` and the length of training: each leaf finds its own sparsity.

    Args:
        threshold: in (0, 1), such as 0.1.
        penalty: factor of the sum of ``sigmoid(S)`` over all weights in what is minimized; its
            gradient is added to that of ``S``. Not negative.
        initial: ``S`` at the start; weights are all kept where its sigmoid passes the threshold.

    Returns:
        A method; it packs to :class:`SparseArray`. ``state.learned`` holds the scores, which the
        user's optimizer trains.

    Raises:
        ValueError: a threshold outside (0, 1), a penalty negative or not finite, scores that would
            remove every weight at the start.

    Example:
        >>> method = soft_movement(threshold=0.1, penalty=1e-6)
        >>> params = {"kernel": jnp.array([[4.0, 1.0]])}
        >>> state = method.init(params)
        >>> scores = {"kernel": jnp.array([[-3.0, -2.0]])}
        >>> method.apply(params, state._replace(learned=scores))["kernel"]
        Array([[0., 1.]], dtype=float32)

    Source: Sanh, Wolf & Rush, "Movement pruning: adaptive sparsity by fine-tuning", NeurIPS 2020,
    section 4.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is compared with a sigmoid, in (0, 1), not {threshold}")
    if not (math.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"penalty must be finite and not negative, such as 1e-6, not {penalty}")
    # The sigmoid is monotone: compared before it, a mask does not depend on how it is rounded.
    limit = math.log(threshold) - math.log1p(-threshold)
    if not (math.isfinite(initial) and initial > limit):
        raise ValueError(
            f"scores start at {initial}, but sigmoid(S) > {threshold} needs more than {limit:.4g}: "
            "nothing would be kept"
        )

    def masks(learned: dict[str, Array]) -> dict[str, Array]:
        return {path: scores > limit for path, scores in learned.items()}

    def init(params: Params) -> State:
        return State(_scores(tree_lib.select(params), initial), ())

    def apply(params: Params, state: State) -> Params:
        kept, news = masks(state.learned), {}
        for path, leaf in tree_lib.take_like(params, state.learned).items():
            scores = state.learned[path]
            open_ = jax.nn.sigmoid(jax.lax.stop_gradient(scores))
            nudged = nudge(scores, penalty * open_ * (1 - open_))
            news[path] = straight_through(leaf, nudged, kept[path])
        return tree_lib.replace(params, news)

    def update(params: Params, state: State, grads: Params) -> State:
        del grads
        tree_lib.take_like(params, state.learned)
        return state

    def pack(params: Params, state: State) -> Any:
        kept = masks(state.learned)
        return _pack(params, kept, resolve(Element(), kept))

    return Compression(init, apply, update, pack)


@jax.custom_jvp
def straight_through(
    weight: Float[Array, "..."], scores: Float[Array, "..."], mask: Bool[Array, "..."]
) -> Float[Array, "..."]:
    """The weights that a mask keeps; to differentiation, ``scores`` are the mask.

    Args:
        weight: one leaf.
        scores: the scores that the mask was made from, float32 or wider.
        mask: True where a weight is kept.

    Returns:
        The weight where kept and 0 elsewhere. Its derivative is that of ``weight * mask`` in the
        weight, and of ``weight * scores`` in the scores.

    Example:
        >>> weight, scores = jnp.array([4.0, 3.0]), jnp.array([0.5, -0.5])
        >>> jax.grad(lambda s: straight_through(weight, s, scores > 0).sum())(scores)
        Array([4., 3.], dtype=float32)
    """
    del scores
    return zero_out(weight, mask)


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    weight, scores, mask = primals
    weight_dot, scores_dot, _ = tangents
    moved = (weight.astype(scores.dtype) * scores_dot).astype(weight.dtype)
    return straight_through(weight, scores, mask), zero_out(weight_dot, mask) + moved


def _scores(leaves: tree_lib.Leaves, initial: float) -> dict[str, Array]:
    return {path: jnp.full_like(leaf, initial, jnp.float32) for path, leaf in leaves.items()}


def _pack(params: Params, masks: dict[str, Array], structures: dict[str, Structure]) -> Any:
    leaves = tree_lib.take_like(params, masks)
    news = {
        path: packed(zero_out(leaf, masks[path]), masks[path], structures[path])
        for path, leaf in leaves.items()
        if not bool(jnp.all(masks[path]))
    }
    return tree_lib.replace(params, news)
