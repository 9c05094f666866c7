"""Zeros that are there stay there."""

from typing import NamedTuple

from jaxtyping import Array, Bool

from jaxcomp import tree as tree_lib
from jaxcomp.compression import Compression, Params, State
from jaxcomp.prune.masks import Structures, resolve
from jaxcomp.prune.structures import Element
from jaxcomp.prune.training import masked


class ZerosBuffers(NamedTuple):
    """Buffers of :func:`keep_zeros`.

    Attributes:
        masks: by path; True where a weight was not zero.
    """

    masks: dict[str, Bool[Array, "..."]]


def keep_zeros(structure: Structures = Element()) -> Compression:  # noqa: B008
    """Train what was pruned before: weights that are zero at the start are held at zero.

    For masks found in one shot (SNIP, SynFlow, WANDA, SparseGPT, random): prune with
    :func:`~jaxcomp.prune.masks.apply_masks`, then wrap the optimizer with this method.

    Args:
        structure: how the leaves were pruned, so that they are packed by it.

    Returns:
        A method that lives in the weights; its ``init`` raises ``ValueError`` for a structure that
        does not fit a leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> method = keep_zeros()
        >>> params = {"kernel": jnp.array([[4.0, 0.0]])}
        >>> state = method.init(params)
        >>> method.apply({"kernel": jnp.array([[3.9, 0.1]])}, state)
        {'kernel': Array([[3.9, 0. ]], dtype=float32)}
    """

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        resolve(structure, leaves)
        return State({}, ZerosBuffers({path: leaf != 0 for path, leaf in leaves.items()}))

    def update(params: Params, state: State, grads: Params) -> State:
        del grads
        tree_lib.take_like(params, state.buffers.masks)
        return state

    return masked.masked_method(init, update, structure)
