"""Soft thresholds that training finds itself: how sparse a leaf becomes is learned (STR)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import SparseArray
from jaxcomp.compression import Compression, Params, State
from jaxcomp.prune.training.learned import LeafShapes, nudge


def soft_threshold(decay: float, initial: float = -10.0) -> Compression:
    """Shrink every weight by a threshold that is learned for its leaf; what is below it is zero.

    The forward pass sees ``sign(w) * max(|w| - t, 0)`` with ``t = sigmoid(s)`` and one ``s`` a
    leaf, which the user's optimizer trains. It is ``decay`` that raises thresholds, from below,
    toward ``sigmoid(0) = 0.5``: the larger, the sparser. A weight below the threshold gets no
    gradient and stays as it is (under the optimizer's own weight decay it fades), until the
    threshold falls below it.

    Kusupati et al. give the weight decay of their SGD here too; an optimizer that decays all it is
    shown (``optax.adamw`` without a mask) decays ``s`` once more. Adam moves ``s`` by about the
    learning rate a step, however large its gradient: start higher or train longer there.

    Args:
        decay: gradient of ``decay / 2 * s**2`` that is added to that of ``s``; not negative.
        initial: ``s`` at the start. -10 is a threshold of 4.5e-5; the lower, the longer weights
            stay dense.

    Returns:
        A method; it packs to :class:`SparseArray` of the shrunk weights, and a leaf of which
        nothing is zero to a dense array of them. ``state.learned`` holds each leaf's ``s``.

    Raises:
        ValueError: ``decay`` negative or not finite, ``initial`` not finite.

    Example:
        >>> method = soft_threshold(decay=1e-4, initial=0.0)
        >>> params = {"kernel": jnp.array([[2.0, -1.0], [0.25, -0.5]])}
        >>> method.apply(params, method.init(params))["kernel"]
        Array([[ 1.5, -0.5],
               [ 0. ,  0. ]], dtype=float32)

    Source: Kusupati et al., "Soft threshold weight reparameterization for learnable sparsity", ICML
    2020, (2) to (6).
    """
    if not (math.isfinite(decay) and decay >= 0):
        raise ValueError(f"decay must be finite and not negative, such as 1e-4, not {decay}")
    if not math.isfinite(initial):
        raise ValueError(f"initial must be finite, such as -10.0, not {initial}")

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        learned = {path: jnp.asarray(initial, jnp.float32) for path in leaves}
        return State(learned, LeafShapes.of(leaves))

    def apply(params: Params, state: State) -> Params:
        news = {}
        for path, leaf in state.buffers.take(params).items():
            s = state.learned[path]
            news[path] = shrink(leaf, nudge(s, decay * jax.lax.stop_gradient(s)))
        return tree_lib.replace(params, news)

    def update(params: Params, state: State, grads: Params) -> State:
        del params, grads
        return state

    def pack(params: Params, state: State) -> Params:
        news = {}
        for path, leaf in state.buffers.take(params).items():
            shrunk, kept = shrink(leaf, state.learned[path]), above(leaf, state.learned[path])
            whole = bool(jnp.all(kept))
            news[path] = shrunk if whole else SparseArray.encode(shrunk, kept)
        return tree_lib.replace(params, news)

    return Compression(init, apply, update, pack)


def shrink(weight: Float[Array, "..."], s: Float[Array, ""]) -> Float[Array, "..."]:
    """``sign(weight) * max(|weight| - sigmoid(s), 0)``, in float32 or wider, in the weight's dtype.

    Args:
        weight: one leaf.
        s: the threshold before its sigmoid.

    Returns:
        An array of the weight's shape and dtype; differentiable in both.

    Example:
        >>> shrink(jnp.array([2.0, -1.0, 0.25]), jnp.float32(0.0))
        Array([ 1.5, -0.5,  0. ], dtype=float32)
    """
    wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    threshold = jax.nn.sigmoid(s)
    # Two subtractions instead of a product with the sign: nothing that a compiler could fuse to
    # other bits, and no minus zero.
    positive = jnp.where(wide > threshold, wide - threshold, jnp.zeros_like(wide))
    both = jnp.where(wide < -threshold, wide + threshold, positive)
    return both.astype(weight.dtype)


def above(weight: Float[Array, "..."], s: Float[Array, ""]) -> Array:
    """Where :func:`shrink` leaves something.

    Example:
        >>> above(jnp.array([2.0, -1.0, 0.25]), jnp.float32(0.0))
        Array([ True,  True, False], dtype=bool)
    """
    wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    return jnp.abs(wide) > jax.nn.sigmoid(s)
