"""Masks from scores, at once or gradually, at an exact count and without sorting."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int32, UInt32

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import SparseArray
from jaxcomp.compression import Compression, Params, State, keep
from jaxcomp.kernels.threshold import (
    removal_count,
    removal_count_exact,
    smallest_masks,
    sortable_bits,
)
from jaxcomp.prune.schedules import Schedule, check_sparsity
from jaxcomp.prune.scores import Score

Scope = Literal["layer", "global"]


def masks(scores: Any, sparsity: float, scope: Scope = "layer") -> Any:
    """Masks that remove the weights with the lowest scores, exactly as many as asked.

    Of equal scores those that come first in the array go first. The threshold is found by counting
    (a radix select over the bits of the scores), not by sorting.

    Args:
        scores: tree of floating arrays, such as ``jax.tree.map(scores.magnitude, params)``.
        sparsity: fraction removed, in [0, 1), resolved to 1e-7; of ``n`` weights
            ``round(sparsity * n)`` go.
        scope: ``"layer"`` removes the fraction in each leaf, ``"global"`` over all leaves together.

    Returns:
        A tree of booleans, True where a weight is kept. Leaves that are not weights (biases, norms)
        are kept whole.

    Raises:
        ValueError: sparsity outside [0, 1), unknown scope, no weights, NaN or infinite scores.

    Example:
        >>> masks({"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}, sparsity=0.5)
        {'kernel': Array([[ True, False],
               [False,  True]], dtype=bool)}
    """
    check_sparsity("sparsity", sparsity)
    _check_scope(scope)
    leaves = tree_lib.select(scores)
    sizes = _sizes(leaves, scope)
    counts = [jnp.uint32(removal_count_exact(sparsity, size)) for size in sizes]
    keys = {path: sortable_bits(leaf) for path, leaf in leaves.items()}
    kept = _scoped_masks(keys, counts, scope)
    everything = {
        path: jnp.ones_like(leaf, bool) for path, leaf in tree_lib.flatten(scores).items()
    }
    return tree_lib.replace(scores, everything | kept)


class GradualBuffers(NamedTuple):
    """Buffers of :func:`gradual`.

    Attributes:
        step: updates so far.
        removed: how many weights are removed, one number a leaf, or one in all if global.
        masks: by path; True where a weight is kept.
    """

    step: Int32[Array, "..."]
    removed: UInt32[Array, "..."]
    masks: dict[str, Bool[Array, "..."]]


def gradual(
    score: Score, schedule: Schedule, scope: Scope = "layer", every: int = 10
) -> Compression:
    """Remove weights step by step as a schedule says, and hold them at zero.

    Lives in the weights: what is removed is written into them as zero by the wrapped optimizer, so
    the forward pass costs nothing. What is removed stays removed; a falling schedule brings nothing
    back.

    Args:
        score: function of a leaf and its gradient (``scores.magnitude``); the lowest go first.
        schedule: function of the step to the sparsity, such as :func:`cubic` or an optax schedule.
        scope: ``"layer"`` reaches the sparsity in each leaf, ``"global"`` over all together.
        every: steps between mask updates while the schedule moves. Where it stands still the masks
            are brought up to it at once, and nothing is computed after that.

    Returns:
        A method; it packs to :class:`SparseArray`. Under ``vmap`` every step pays for a mask
        update.

    Raises:
        TypeError: score or schedule is not a function.
        ValueError: unknown scope, or ``every`` below 1.

    Example:
        >>> from jaxcomp.prune import cubic, scores
        >>> method = gradual(scores.magnitude, cubic(0.5, begin=0, end=0))
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> state = method.update(params, method.init(params), params)
        >>> method.apply(params, state)["kernel"]
        Array([[4., 0.],
               [0., 3.]], dtype=float32)
    """
    if not callable(score) or not callable(schedule):
        raise TypeError(
            "score and schedule must be functions: gradual(scores.magnitude, cubic(0.9, 0, 1000))"
        )
    _check_scope(scope)
    if every < 1:
        raise ValueError(f"every must be at least 1 step, not {every}")

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        removed = jnp.zeros(len(_sizes(leaves, scope)), jnp.uint32)
        kept = {path: jnp.ones_like(leaf, bool) for path, leaf in leaves.items()}
        return State({}, GradualBuffers(jnp.zeros((), jnp.int32), removed, kept))

    def apply(params: Params, state: State) -> Params:
        leaves = tree_lib.take_like(params, state.buffers.masks)
        zeroed = {
            path: jnp.where(state.buffers.masks[path], leaf, jnp.zeros((), leaf.dtype))
            for path, leaf in leaves.items()
        }
        return tree_lib.replace(params, zeroed)

    @jax.jit
    def advance(leaves: Any, gradients: Any, buffers: GradualBuffers) -> GradualBuffers:
        step, removed, kept = buffers
        targets = removal_count(schedule(step), _sizes(leaves, scope))
        targets = jnp.maximum(targets, removed)
        standing = schedule(step) == schedule(step + 1)
        due = jnp.any(targets > removed) & ((step % every == 0) | standing)

        def renew() -> tuple[Array, dict[str, Array]]:
            keys = {}
            for path, leaf in leaves.items():
                scored = score(leaf, None if gradients is None else gradients[path])
                # Zero is below the key of every score: what is removed goes first, so it stays.
                keys[path] = jnp.where(kept[path], sortable_bits(scored), jnp.uint32(0))
            return targets, _scoped_masks(keys, list(targets), scope)

        removed, kept = jax.lax.cond(due, renew, lambda: (removed, kept))
        return GradualBuffers(jnp.asarray(optax.safe_increment(step)), removed, kept)

    def update(params: Params, state: State, grads: Params) -> State:
        leaves = tree_lib.take_like(params, state.buffers.masks)
        gradients = None if grads is None else tree_lib.take(grads, leaves)
        return State({}, advance(leaves, gradients, state.buffers))

    def pack(params: Params, state: State) -> Any:
        zeroed = tree_lib.take(apply(params, state), state.buffers.masks)
        news = {
            path: SparseArray.encode(leaf, state.buffers.masks[path])
            for path, leaf in zeroed.items()
            if not bool(jnp.all(state.buffers.masks[path]))
        }
        return tree_lib.replace(params, news)

    return Compression(init, apply, update, pack, project=apply, apply_projected=keep)


def _sizes(leaves: tree_lib.Leaves, scope: Scope) -> tuple[int, ...]:
    sizes = tuple(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in leaves.values())
    return sizes if scope == "layer" else (sum(sizes),)


def _scoped_masks(keys: dict[str, Array], counts: list[Any], scope: Scope) -> dict[str, Array]:
    if scope == "global":
        return dict(zip(keys, smallest_masks(tuple(keys.values()), counts[0]), strict=True))
    return {
        path: smallest_masks((key,), count)[0]
        for (path, key), count in zip(keys.items(), counts, strict=True)
    }


def _check_scope(scope: str) -> None:
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be 'layer' or 'global', not {scope!r}")
