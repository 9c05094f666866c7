"""Penalties inside the optimizer: exact zeros instead of small numbers.

Each function makes an optax transformation for the last place of a chain, after the learning rate::

    tx = optax.chain(optax.sgd(0.1), proximal.l1(1e-4, 0.1))

It takes the weights that the rest of the chain would reach to those nearest to them when the
penalty is paid for too: the proximal operator of ``learning_rate * strength * penalty``. Behind
plain SGD this is proximal gradient descent, which converges to a minimum of loss plus penalty;
behind momentum or Adam it is the same step after theirs, and shrinks every weight alike, whatever
its own step size. A zero may grow again; to train on with the zeros as they are, and to ship them
as sparse leaves, wrap the optimizer with ``prune.keep_zeros()`` from then on.

Numbers that change in training: ``optax.inject_hyperparams(proximal.l1, static_args="where")``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int32

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import is_compressed
from jaxcomp.optimizer import Trained
from jaxcomp.prune.masks import Structures
from jaxcomp.prune.penalties import Where, root_mean_squares, unit_structures
from jaxcomp.prune.structures import spread

Number = float | Array
LearningRate = Number | Callable[[Any], Any]
Operator = Callable[[tree_lib.Leaves, Any], dict[str, Array]]


class ProximalState(NamedTuple):
    """State of a proximal transformation.

    Attributes:
        step: updates so far, for a schedule.
    """

    step: Int32[Array, "..."]


def l1(
    strength: Number, learning_rate: LearningRate, where: Where = tree_lib.is_weight
) -> optax.GradientTransformation:
    """Move weights toward zero by ``learning_rate * strength``, and none past it.

    Args:
        strength: factor of :func:`jaxcomp.prune.penalties.l1` in what is minimized.
        learning_rate: that of the optimizer before it, a number or an optax schedule.
        where: which leaves are weights; by default no biases and norms.

    Returns:
        An optax transformation. Its ``update`` needs ``params`` and raises ``ValueError`` without.

    Raises:
        ValueError: strength or learning rate negative or not finite.

    Example:
        >>> tx = optax.chain(optax.sgd(0.1), l1(strength=5.0, learning_rate=0.1))
        >>> params = {"kernel": jnp.array([[2.0, 0.25]])}
        >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        >>> optax.apply_updates(params, updates)
        {'kernel': Array([[1.5, 0. ]], dtype=float32)}

    Source: Daubechies, Defrise & De Mol, "An iterative thresholding algorithm for linear inverse
    problems with a sparsity constraint", 2004, (2.2).
    """

    def operator(leaves: tree_lib.Leaves, step: Any) -> dict[str, Array]:
        return {
            path: jnp.where(w > step, w - step, jnp.where(w < -step, w + step, jnp.zeros_like(w)))
            for path, w in leaves.items()
        }

    return _transformation(operator, strength, learning_rate, where)


def l2(
    strength: Number, learning_rate: LearningRate, where: Where = tree_lib.is_weight
) -> optax.GradientTransformation:
    """Divide weights by ``1 + 2 * learning_rate * strength``; stable at any strength.

    Args:
        strength: factor of :func:`jaxcomp.prune.penalties.l2` (the sum of squares).
        learning_rate: as in :func:`l1`.
        where: as in :func:`l1`.

    Returns:
        An optax transformation, as :func:`l1`. It makes no zeros.

    Raises:
        ValueError: strength or learning rate negative or not finite.

    Example:
        >>> tx = l2(strength=5.0, learning_rate=0.1)
        >>> params = {"kernel": jnp.array([[2.0, 0.25]])}
        >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        >>> optax.apply_updates(params, updates)
        {'kernel': Array([[1.   , 0.125]], dtype=float32)}

    Source: Parikh & Boyd, "Proximal algorithms", 2014, section 6.1.1.
    """
    return _transformation(
        lambda leaves, step: {path: w / (1 + 2 * step) for path, w in leaves.items()},
        strength,
        learning_rate,
        where,
    )


def group_lasso(
    strength: Number,
    learning_rate: LearningRate,
    structure: Structures,
    where: Where = tree_lib.is_weight,
) -> optax.GradientTransformation:
    """Shorten each unit's norm by ``learning_rate * strength * sqrt(size)``, at most to zero.

    Args:
        strength: factor of :func:`jaxcomp.prune.penalties.group_lasso`.
        learning_rate: as in :func:`l1`.
        structure: as in :func:`jaxcomp.prune.penalties.group_lasso`.
        where: as in :func:`l1`.

    Returns:
        An optax transformation, as :func:`l1`. Its ``init`` raises ``ValueError`` or ``TypeError``
        for a structure that does not fit a weight.

    Raises:
        ValueError: strength or learning rate negative or not finite.

    Example:
        >>> from jaxcomp.prune.structures import Channel
        >>> tx = group_lasso(strength=1.0, learning_rate=1.0, structure=Channel(-1))
        >>> params = {"kernel": jnp.array([[2.0, 0.5], [2.0, 0.5]])}
        >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        >>> optax.apply_updates(params, updates)
        {'kernel': Array([[1., 0.],
               [1., 0.]], dtype=float32)}

    Source: Parikh & Boyd, "Proximal algorithms", 2014, section 6.5.4; the group's weight is that of
    Yuan & Lin, 2006.
    """

    def operator(leaves: tree_lib.Leaves, step: Any) -> dict[str, Array]:
        structures = unit_structures(structure, leaves)
        news = {}
        for path, leaf in leaves.items():
            norms = root_mean_squares(structures[path], leaf)
            # Sizes cancel: sqrt(size) * step against a norm of sqrt(size) * root mean square.
            stays = norms > step
            factor = jnp.where(stays, 1 - step / jnp.where(stays, norms, 1), 0)
            factor = spread(structures[path], factor, leaf)
            news[path] = jnp.where(factor > 0, leaf * factor.astype(leaf.dtype), 0)
        return news

    return _transformation(operator, strength, learning_rate, where)


def _transformation(
    operator: Operator, strength: Number, learning_rate: LearningRate, where: Where
) -> optax.GradientTransformation:
    _check_number("strength", strength)
    if not callable(learning_rate):
        _check_number("learning_rate", learning_rate)

    def init(params: Any) -> ProximalState:
        # What does not fit is found now, and nothing is computed.
        jax.eval_shape(lambda leaves: operator(leaves, 0.0), _weights(params, where)[0])
        return ProximalState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: ProximalState, params: Any | None = None
    ) -> tuple[Any, ProximalState]:
        if params is None:
            raise ValueError("a proximal step needs the weights: tx.update(grads, state, params)")
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        stored, places = _weights(params, where)
        moves = tree_lib.take(updates, places.values())
        old, reached = tree_lib.Leaves(), tree_lib.Leaves()
        for path, leaf in stored.items():
            move = moves[places[path]]
            # Wide enough for both and for float32: what a narrow weight is to be is rounded once,
            # when the update is applied to it.
            wide = jnp.promote_types(jnp.promote_types(leaf.dtype, move.dtype), jnp.float32)
            old[path] = leaf.astype(wide)
            reached[path] = old[path] + move.astype(wide)
        target = operator(reached, rate * strength)
        # A target of zero gives minus the weight, and adding that gives zero, exactly.
        news = {places[path]: target[path].astype(leaf.dtype) - leaf for path, leaf in old.items()}
        return tree_lib.replace(updates, news), ProximalState(
            jnp.asarray(optax.safe_increment(state.step))
        )

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _weights(params: Any, where: Where) -> tuple[tree_lib.Leaves, dict[str, str]]:
    """The weights by their own paths, and where in the tree these are.

    Inside :func:`jaxcomp.wrap_optimizer` a weight may stand in a node beside what a method has
    learned about it: the node has the weight's own path, and what is learned is left alone.
    """
    whole = lambda leaf: isinstance(leaf, Trained) or is_compressed(leaf)
    found, places = tree_lib.Leaves(), {}
    for path, node in tree_lib.flatten(params, is_leaf=whole).items():
        leaf = node.weight if isinstance(node, Trained) else node
        if isinstance(params, tree_lib.Leaves) or where(path, leaf):
            found[path] = leaf
            places[path] = f"{path}/weight" if isinstance(node, Trained) else path
    return tree_lib.select(found, check=False), places


def _check_number(name: str, value: Any) -> None:
    # A scalar array is not looked at: under `inject_hyperparams` it is traced.
    if isinstance(value, jax.Array) and value.ndim == 0:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, such as 1e-4, not {value!r}")
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, not {value}")
