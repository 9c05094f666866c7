"""What methods with a mask on the stored weights have in common: apply it, pack by it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import BlockSparseArray, CompressedArray, NMSparseArray, SparseArray
from jaxcomp.compression import Compression, Params, State, keep
from jaxcomp.prune import scores
from jaxcomp.prune.masks import Structures, resolve, zero_out
from jaxcomp.prune.scores import RunningScore, Score
from jaxcomp.prune.structures import NM, Block, Element, Structure

Masks = dict[str, Bool[Array, "..."]]

# Their second argument would be taken for the gradient.
_FROM_EVIDENCE = (
    scores.fisher,
    scores.fisher_weighted,
    scores.grasp,
    scores.obd,
    scores.synaptic_flow,
    scores.wanda,
)


def masked_method(
    init: Callable[[Params], State],
    update: Callable[[Params, State, Params], State],
    structure: Structures = Element(),  # noqa: B008
) -> Compression:
    """A method whose buffers hold ``masks`` by path, and which lives in the stored weights.

    Args:
        init: as in the protocol.
        update: as in the protocol.
        structure: of the leaves: how they are packed.

    Returns:
        The method, with ``project``.
    """

    def apply(params: Params, state: State) -> Params:
        masks = state.buffers.masks
        leaves = tree_lib.take_like(params, masks)
        zeroed = {path: zero_out(leaf, masks[path]) for path, leaf in leaves.items()}
        return tree_lib.replace(params, zeroed)

    def pack(params: Params, state: State) -> Any:
        return pack_masked(params, apply(params, state), state.buffers.masks, structure)

    return Compression(init, apply, update, pack, project=apply, apply_projected=keep)


def keep_all(leaves: Mapping[str, Any]) -> Masks:
    """Masks that remove nothing, by path.

    Example:
        >>> keep_all({"kernel": jnp.ones(2)})
        {'kernel': Array([ True,  True], dtype=bool)}
    """
    return {path: jnp.ones_like(leaf, bool) for path, leaf in leaves.items()}


def update_of(
    advance: Callable[[Any, Any, Any], Any],
) -> Callable[[Params, State, Params], State]:
    """The ``update`` of a method that learns nothing and whose buffers hold ``masks`` by path.

    Args:
        advance: ``advance(leaves, gradients, buffers) -> buffers``, of the leaves that have masks
            and their gradients (None without); it is compiled.

    Returns:
        As in the protocol.
    """
    compiled = jax.jit(advance)

    def update(params: Params, state: State, grads: Params) -> State:
        leaves = tree_lib.take_like(params, state.buffers.masks)
        gradients = None if grads is None else tree_lib.take(grads, leaves)
        return State({}, compiled(leaves, gradients, state.buffers))

    return update


def pack_masked(params: Params, zeroed: Params, masks: Masks, structure: Structures) -> Any:
    """Pack what masks have removed something of; other leaves are handed on.

    Args:
        params: the weights.
        zeroed: the same, zero where a mask is False.
        masks: by path.
        structure: as in :func:`masked_method`.

    Example:
        >>> params, mask = {"w": jnp.array([[3.0, 0.0]])}, {"w": jnp.array([[True, False]])}
        >>> pack_masked(params, params, mask, Element())
        {'w': SparseArray(shape=(1, 2), dtype=float32, 50.0% sparse, 5 bytes)}
    """
    leaves, structures = tree_lib.take(zeroed, masks), resolve(structure, masks)
    news = {
        path: packed(leaf, masks[path], structures[path])
        for path, leaf in leaves.items()
        if not bool(jnp.all(masks[path]))
    }
    return tree_lib.replace(params, news)


def packed(leaf: Array, mask: Bool[Array, "..."], structure: Structure) -> CompressedArray:
    """A pruned leaf in the form that its structure allows.

    Args:
        leaf: zero where ``mask`` is False.
        mask: True where kept.
        structure: what the mask was made for; a leaf that does not keep to it (yet) is packed as
            single weights.

    Returns:
        The compressed leaf.

    Example:
        >>> packed(jnp.array([[3.0], [0.0]]), jnp.array([[True], [False]]), NM(1, 2))
        NMSparseArray(shape=(2, 1), dtype=float32, 1:2 sparse, 5 bytes)
    """
    if isinstance(structure, NM):
        axis = structure.axis % mask.ndim
        shape = (*mask.shape[:axis], -1, structure.m, *mask.shape[axis + 1 :])
        if int(jnp.max(jnp.sum(mask.reshape(shape), axis + 1))) <= structure.n:
            return NMSparseArray.encode(
                leaf, structure.n, structure.m, axis=axis - mask.ndim, mask=mask
            )
    if isinstance(structure, Block):
        return BlockSparseArray.encode(leaf, structure.shape, mask=mask)
    return SparseArray.encode(leaf, mask)


def begin_keeping(score: Score | RunningScore, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What a score keeps of earlier steps, by path; nothing for a plain function.

    Example:
        >>> from jaxcomp.prune import scores
        >>> begin_keeping(scores.magnitude, {"kernel": jnp.ones(2)})
        {}
    """
    if not isinstance(score, RunningScore):
        return {}
    return {path: score.init(path, leaf) for path, leaf in leaves.items()}


def go_on_keeping(
    score: Score | RunningScore, kept: Mapping[str, Any], leaves: Mapping[str, Any], gradients: Any
) -> dict[str, Any]:
    """:func:`begin_keeping` after one more step; ``gradients`` by path, or None."""
    if not isinstance(score, RunningScore):
        return {}
    given = dict.fromkeys(leaves) if gradients is None else gradients
    return {path: score.accumulate(kept[path], leaf, given[path]) for path, leaf in leaves.items()}


def evaluate(
    score: Score | RunningScore, kept: Mapping[str, Any], leaves: Mapping[str, Any], gradients: Any
) -> dict[str, Array]:
    """Scores by path.

    Args:
        score: a plain function of a weight and its gradient, or one that remembers.
        kept: what it remembers.
        leaves: the weights.
        gradients: by path, or None.

    Raises:
        ValueError: a score is not of its leaf's shape.
    """
    found = {}
    for path, leaf in leaves.items():
        if isinstance(score, RunningScore):
            found[path] = score.score(leaf, kept[path])
        else:
            found[path] = score(leaf, None if gradients is None else gradients[path])
        if found[path].shape != leaf.shape:
            raise ValueError(
                f"{path}: the score has shape {found[path].shape}, its leaf {leaf.shape}: a score "
                "gives one number a weight"
            )
    return found


def check_score(score: Any) -> None:
    """Raise unless ``score`` is one that can be read while training.

    Raises:
        TypeError: it is no score.
        ValueError: it reads what training does not give.

    Example:
        >>> from jaxcomp.prune import scores
        >>> check_score(scores.obd)
        Traceback (most recent call last):
        ...
        ValueError: scores.obd reads evidence that a train step does not have: use a score that ...
    """
    if not isinstance(score, RunningScore) and not callable(score):
        raise TypeError(
            "score must be a function of a weight and its gradient, such as scores.magnitude, or a "
            f"RunningScore, not {score!r}"
        )
    if score in _FROM_EVIDENCE:
        raise ValueError(
            f"scores.{getattr(score, '__name__', score)} reads evidence that a train step does not "
            "have: use a score that reads gradients or remembers them (scores.taylor, "
            "scores.running_fisher()), or make masks in one shot (prune.evidence, prune.masks) and "
            "hold them (prune.keep_zeros)"
        )


def check_every(every: int) -> None:
    """Raise ``ValueError`` unless ``every`` is a number of steps."""
    if every < 1:
        raise ValueError(f"every must be at least 1 step, not {every}")


def changed(old: State, new: State) -> dict[str, Array]:
    """The ``restart`` of methods that bring weights back: where the masks differ.

    Example:
        >>> from jaxcomp.prune.training.zeros import ZerosBuffers
        >>> masks = [ZerosBuffers({"kernel": jnp.array(mask)}) for mask in ([True], [False])]
        >>> changed(*(State({}, buffers) for buffers in masks))
        {'kernel': Array([ True], dtype=bool)}
    """
    return {path: old.buffers.masks[path] != mask for path, mask in new.buffers.masks.items()}
