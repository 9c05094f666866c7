"""L0 regularization: gates that are learned by sampling them, and that can close for good.

Each unit of weights is multiplied by a gate ``z`` in [0, 1]: a sigmoid of noise and the learned
``log_alpha``, stretched to (-0.1, 1.1) and clipped, so that it is exactly 0 and exactly 1 with
positive probability. The expected number of weights whose gate is not 0 has a closed form, which is
what the penalty charges for.
"""

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_key
from jaxcomp.compression import Compression, Params, State
from jaxcomp.prune.masks import Structures
from jaxcomp.prune.penalties import unit_size, unit_structures
from jaxcomp.prune.structures import Element, Structure, pool, spread
from jaxcomp.prune.training.learned import LeafShapes, nudge
from jaxcomp.prune.training.masked import packed

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
# What is added to log_alpha gives the logit of the probability that a gate is not 0.
_SHIFT = -BETA * math.log(-GAMMA / ZETA)


class HardConcreteBuffers(NamedTuple):
    """Buffers of :func:`hard_concrete`.

    Attributes:
        step: updates so far.
        noisy: whether gates are sampled; :func:`without_noise` turns it off.
        key: the key's data, from which each step derives its noise.
        leaves: the shapes of the leaves (static).
    """

    step: Int32[Array, "..."]
    noisy: Bool[Array, "..."]
    key: UInt32[Array, "..."]
    leaves: LeafShapes


def hard_concrete(
    penalty: float,
    key: Any,
    structure: Structures = Element(),  # noqa: B008
    droprate_init: float = 0.05,
    end: int | None = None,
) -> Compression:
    """Learn which units to remove by gating each, and charging for every gate that is open.

    Training samples the gates anew in every step; evaluate and ship without noise, from step
    ``end`` on or through :func:`without_noise`. Weights and gates are trained by one optimizer:
    where gates move too slowly, give ``log_alpha`` a higher rate there.

    Args:
        penalty: what each expected weight adds to the loss that is minimized. For a loss that is a
            mean over examples, Louizos et al. use about 0.1 to 1 over the number of examples.
        key: random key (``jax.random.key(0)``). Every leaf and every step has noise of its own.
        structure: what shares a gate: single weights, ``Channel``, ``Block``, ``Kernel``; one for
            all, or one by path pattern.
        droprate_init: in (0, 1): sampled gates start around ``1 - droprate_init``. At 0.05 all
            gates without noise are 1 at the start, which suits trained weights; from scratch use
            0.2 to 0.5.
        end: the step from which on gates are not sampled any more; None samples always.

    Returns:
        A method; it packs to :class:`SparseArray` (for ``Block`` to :class:`BlockSparseArray`) of
        the gated weights as the forward pass sees them in the same state, noise included.
        ``state.learned`` holds each leaf's ``log_alpha``, one a unit.

    Raises:
        TypeError: the key is no random key.
        ValueError: a penalty negative or not finite, a droprate outside (0, 1), a negative ``end``;
            from ``init``: a structure that does not fit a leaf, or ``NM``.

    Example:
        >>> method = hard_concrete(1e-4, key=jax.random.key(0), end=0)
        >>> params = {"kernel": jnp.array([[4.0, 1.0]])}
        >>> state = method.init(params)
        >>> log_alpha = {"kernel": jnp.array([[0.0, -3.0]])}
        >>> method.apply(params, state._replace(learned=log_alpha))["kernel"]
        Array([[2., 0.]], dtype=float32)

    Source: Louizos, Welling & Kingma, "Learning sparse neural networks through L0 regularization",
    ICLR 2018, (10) to (13) and section 3.1 for groups.
    """
    _check(penalty, droprate_init, end)
    typed = _typed(key)
    implementation = jax.random.key_impl(typed)

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        start = math.log1p(-droprate_init) - math.log(droprate_init)
        learned = {
            path: pool(each, jnp.zeros_like(leaves[path])) + jnp.float32(start)
            for path, each in unit_structures(structure, leaves).items()
        }
        noisy = jnp.asarray(end is None or end > 0)
        # A copy: a train step may donate its state, and every `init` needs the key again.
        data = jnp.array(jax.random.key_data(typed), copy=True)
        step = jnp.zeros((), jnp.int32)
        return State(learned, HardConcreteBuffers(step, noisy, data, LeafShapes.of(leaves)))

    def gates(state: State, structures: dict[str, Structure]) -> dict[str, Array]:
        buffers = state.buffers
        base = jax.random.wrap_key_data(buffers.key, impl=implementation)
        base = jax.random.fold_in(base, buffers.step)
        news = {}
        for path, log_alpha in state.learned.items():
            shape = log_alpha.shape
            own = jax.random.fold_in(base, zlib.crc32(path.encode()))
            noise = jax.lax.cond(
                buffers.noisy,
                lambda own=own, shape=shape: jax.random.logistic(own, shape, jnp.float32),
                lambda shape=shape: jnp.zeros(shape, jnp.float32),
            )
            size = unit_size(structures[path], dict(buffers.leaves.shapes)[path])
            charged = nudge(log_alpha, penalty * size * _open_slope(log_alpha))
            news[path] = gate(charged, noise, buffers.noisy)
        return news

    def apply(params: Params, state: State) -> Params:
        leaves = state.buffers.leaves.take(params)
        structures = unit_structures(structure, leaves)
        opened = gates(state, structures)
        return tree_lib.replace(
            params, {p: _gated(w, opened[p], structures[p]) for p, w in leaves.items()}
        )

    def update(params: Params, state: State, grads: Params) -> State:
        del params, grads
        buffers = state.buffers
        step = jnp.asarray(optax.safe_increment(buffers.step))
        noisy = jnp.ones_like(buffers.noisy) if end is None else step < end
        return State(state.learned, buffers._replace(step=step, noisy=noisy))

    def pack(params: Params, state: State) -> Any:
        leaves = state.buffers.leaves.take(params)
        structures = unit_structures(structure, leaves)
        news = {}
        for path, opened in gates(state, structures).items():
            leaf = leaves[path]
            kept, gated = (
                spread(structures[path], opened > 0, leaf),
                _gated(leaf, opened, structures[path]),
            )
            news[path] = gated if bool(jnp.all(kept)) else packed(gated, kept, structures[path])
        return tree_lib.replace(params, news)

    return Compression(init, apply, update, pack)


def gate(
    log_alpha: Float[Array, "..."], noise: Float[Array, "..."], noisy: Bool[Array, "..."]
) -> Float[Array, "..."]:
    """The gates, sampled with logistic noise or, where ``noisy`` is False, without.

    Args:
        log_alpha: what is learned.
        noise: samples of the logistic distribution, ``log(u) - log(1 - u)``.
        noisy: scalar.

    Returns:
        Gates in [0, 1].

    Example:
        >>> gate(jnp.array([0.0, 3.0, -3.0]), jnp.zeros(3), jnp.array(False))
        Array([0.5, 1. , 0. ], dtype=float32)
    """
    logits = jnp.where(noisy, (noise + log_alpha) * (1 / BETA), log_alpha)
    # Subtracted before it is scaled: nothing to fuse into other bits in one compilation or another.
    stretched = (jax.nn.sigmoid(logits) + GAMMA / (ZETA - GAMMA)) * (ZETA - GAMMA)
    return jnp.clip(stretched, 0, 1)


def open_probability(log_alpha: Float[Array, "..."]) -> Float[Array, "..."]:
    """The probability that a sampled gate is not 0 (Louizos et al., 2018, (12)).

    Args:
        log_alpha: what is learned, one a unit.

    Returns:
        Probabilities, of the same shape.

    Example:
        >>> open_probability(jnp.float32(0.0)).round(4)
        Array(0.8318, dtype=float32)
    """
    return jax.nn.sigmoid(log_alpha + _SHIFT)


def expected_density(learned: Any) -> Any:
    """The expected fraction of weights whose gate is open, of each leaf.

    Args:
        learned: ``state.learned`` of :func:`hard_concrete` (``opt_state.compression.learned``), or
            any tree of ``log_alpha``.

    Returns:
        The same tree with a scalar a leaf: units of a leaf are all of one size.

    Example:
        >>> expected_density({"kernel": jnp.array([[30.0, -30.0]])})
        {'kernel': Array(0.5, dtype=float32)}
    """
    return jax.tree.map(lambda log_alpha: jnp.mean(open_probability(log_alpha)), learned)


def without_noise(state: Any) -> Any:
    """The same state with gates that are not sampled: for evaluation, and for ``pack``.

    Args:
        state: a method's state, an optimizer state of :func:`jaxcomp.wrap_optimizer`, or any tree
            that holds one, also inside chains and partitions.

    Returns:
        A state of the same structure. Trained on, it samples again until ``end``.

    Raises:
        ValueError: there is no state of :func:`hard_concrete` in it.

    Example:
        >>> method = hard_concrete(1e-4, key=jax.random.key(0))
        >>> state = method.init({"kernel": jnp.ones((2, 2))})
        >>> bool(state.buffers.noisy), bool(without_noise(state).buffers.noisy)
        (True, False)
    """
    ours = lambda node: isinstance(node, HardConcreteBuffers)
    if not any(ours(node) for node in jax.tree.leaves(state, is_leaf=ours)):
        raise ValueError(
            "no state of hard_concrete in here: pass state.opt_state, or its own state"
        )
    quiet = lambda node: node._replace(noisy=jax.tree.map(jnp.zeros_like, node.noisy))
    return jax.tree.map(lambda node: quiet(node) if ours(node) else node, state, is_leaf=ours)


def _open_slope(log_alpha: Array) -> Array:
    """The derivative of :func:`open_probability`."""
    probability = open_probability(jax.lax.stop_gradient(log_alpha))
    return probability * (1 - probability)


def _gated(leaf: Array, gates: Array, structure: Structure) -> Array:
    # One rounding, from float32 to the leaf's dtype; and a closed gate leaves no minus zero.
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    spread_gates = spread(structure, gates, leaf)
    product = jnp.where(spread_gates > 0, wide * spread_gates, jnp.zeros_like(wide))
    return product.astype(leaf.dtype)


def _typed(key: Any) -> Array:
    check_key(key)
    new = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if new else jax.random.wrap_key_data(key)


def _check(penalty: float, droprate_init: float, end: int | None) -> None:
    if not (math.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"penalty must be finite and not negative, such as 1e-5, not {penalty}")
    if not 0 < droprate_init < 1:
        raise ValueError(f"droprate_init must be in (0, 1), such as 0.05, not {droprate_init}")
    if end is not None and end < 0:
        raise ValueError(f"end is a step, 0 or later, not {end}")
