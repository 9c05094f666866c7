"""A compression method inside the user's optax optimizer: two changed lines of a train step.

:func:`compressed` gives the forward pass the effective weights and is the identity to
differentiation, so the one ``jax.grad`` that the user takes with respect to the stored weights is
the gradient with respect to the effective ones. :func:`wrap_optimizer` pulls it back through the
method's ``apply`` (in the same compiled step, where XLA shares the work with the forward pass) to
the stored weights and to what the method learns, and hands both to the user's transformation in one
call. That call sees the user's own tree; a leaf about which something is learned becomes a
:class:`Trained` node there, so a mask or a label given for the leaf covers the whole node. The
method's buffers are never shown to it.
"""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import is_compressed
from jaxcomp.compression import Compression, Params, State, keep
from jaxcomp.marks import mark


class Trained(NamedTuple):
    """A weight and what is learned about it, as the inner optimizer sees them.

    Attributes:
        weight: the stored weight.
        learned: small pytree of arrays.
    """

    weight: Any
    learned: Any


@struct.dataclass
class WrappedState:
    """Optimizer state of :func:`wrap_optimizer`.

    Attributes:
        inner: state of the user's transformation.
        compression: state of the method.
        method: the method itself (static).
    """

    inner: Any
    compression: State
    method: Compression = struct.field(pytree_node=False)


def wrap_optimizer(
    tx: optax.GradientTransformation | optax.MultiSteps, method: Compression
) -> optax.GradientTransformationExtraArgs:
    """Train weights, and what a compression method learns about them, with one optimizer.

    In the loss, call the model on ``compressed(params, opt_state)`` in place of ``params``; nothing
    else of the loop changes. Weights that the method removes are exactly zero after every update.

    Args:
        tx: the optimizer as it was. Gradient clipping, accumulation and schedules belong inside.
        method: a :class:`Compression`, aimed with ``partition`` or at all weights.

    Returns:
        An optax transformation whose state is a :class:`WrappedState`. Its ``init`` raises
        ``ValueError`` or ``TypeError`` for weights that cannot be compressed; its ``update`` raises
        ``ValueError`` without ``params``.

    Raises:
        TypeError: ``tx`` or ``method`` is something else.

    Example:
        >>> from jaxcomp import identity
        >>> tx = wrap_optimizer(optax.sgd(0.1), identity())
        >>> params = {"kernel": jnp.ones((2, 2))}
        >>> opt_state = tx.init(params)
        >>> loss = lambda p: jnp.sum(compressed(p, opt_state)["kernel"])
        >>> updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        >>> float(updates["kernel"][0, 0])
        -0.10000000149011612
    """
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        raise TypeError(f"tx must be an optax transformation such as optax.adam(1e-3), not {tx!r}")
    if not isinstance(method, Compression):
        raise TypeError(f"{method!r} is not a Compression: call the function that makes one")
    inner_tx = optax.with_extra_args_support(tx)  # type: ignore[arg-type]

    def init(params: Params) -> WrappedState:
        state = method.init(_pure(params))
        return WrappedState(inner_tx.init(_attach(params, state.learned)), state, method)

    def update(grads: Params, state: WrappedState, params: Params | None = None, **extra: Any):
        if params is None:
            raise ValueError("wrap_optimizer needs the weights: tx.update(grads, state, params)")
        old = state.compression
        # A gradient may come in another precision than the weights that it belongs to.
        grads = jax.tree.map(lambda g, w: jnp.asarray(g).astype(w.dtype), grads, params)
        grads_in, grads_learned = _pull_back(method, params, old, grads)
        updates, inner = inner_tx.update(
            _attach(grads_in, grads_learned), state.inner, _attach(params, old.learned), **extra
        )
        updates, learned_updates = _detach(updates, params, old.learned)
        learned: Any = optax.apply_updates(old.learned, learned_updates)
        before = State(learned, old.buffers)
        new = method.update(params, before, grads)
        if method.project is not None:
            updates = _write(method, params, updates, before, new)
        if method.restart is not None:
            marks = method.restart(before, new)
            # Some optimizers begin with the weights themselves: with those that are there now.
            arrived = optax.apply_updates(params, updates)
            inner = _forget(inner_tx, inner, arrived, learned, marks)
        return updates, WrappedState(inner, new, method)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def compressed(params: Params, opt_state: Any, *, projected: bool = True) -> Params:
    """The weights that the forward pass is to see; use them in place of ``params``.

    Differentiation passes through unchanged: the gradient with respect to ``params`` is that with
    respect to what this returns, and the wrapped optimizer does the rest.

    Args:
        params: the weights (any pytree, or an NNX module, whose ``nnx.Param`` are meant).
        opt_state: optimizer state of :func:`wrap_optimizer`, also inside other optax states.
        projected: whether removed weights are already zero in ``params``, as the wrapped optimizer
            leaves them. Pass False for other weights, such as a running average.

    Returns:
        Effective weights of the same structure, shapes and dtypes.

    Raises:
        ValueError: ``opt_state`` holds no compression state, or ``params`` do not belong to it.

    Example:
        >>> from jaxcomp import identity
        >>> params = {"kernel": jnp.ones((2, 2))}
        >>> opt_state = wrap_optimizer(optax.adam(1e-3), identity()).init(params)
        >>> bool(jnp.all(compressed(params, opt_state)["kernel"] == 1))
        True
    """
    state = _find(opt_state)
    apply = state.method.apply
    if projected and state.method.apply_projected is not None:
        apply = state.method.apply_projected

    def effective(weights: Params) -> Params:
        if apply is keep:
            return weights
        stopped = jax.tree.map(jax.lax.stop_gradient, weights)
        seen = tree_lib.flatten(apply(stopped, state.compression))
        stored, before = tree_lib.flatten(weights), tree_lib.flatten(stopped)
        news = {p: _seen(stored[p], leaf) for p, leaf in seen.items() if leaf is not before[p]}
        return tree_lib.replace(weights, news)

    return _on_params(params, effective)


def pack(params: Params, opt_state: Any) -> Any:
    """The compressed tree to ship; run it outside ``jit``.

    Args:
        params: the weights (any pytree, or an NNX module).
        opt_state: optimizer state of :func:`wrap_optimizer`, also inside other optax states.

    Returns:
        The same tree (or module) with :class:`CompressedArray` leaves. Decoded, it equals what the
        forward pass saw, bit for bit.

    Raises:
        ValueError: as :func:`compressed`; or a weight has become NaN or infinite.

    Example:
        >>> from jaxcomp import identity
        >>> params = {"kernel": jnp.ones((2, 2))}
        >>> opt_state = wrap_optimizer(optax.adam(1e-3), identity()).init(params)
        >>> pack(params, opt_state)["kernel"].shape
        (2, 2)
    """
    state = _find(opt_state)

    def packed(weights: Params) -> Any:
        for path, leaf in tree_lib.flatten(weights).items():
            if tree_lib.is_weight(path, leaf):
                tree_lib.check_weight(path, leaf)
        return state.method.pack(weights, state.compression)

    return _on_params(params, packed, share=False)


@jax.custom_jvp
def _seen(stored: jax.Array, effective: jax.Array) -> jax.Array:
    """``effective`` in value, ``stored`` to differentiation."""
    del stored
    return mark(effective, "straight_through")


@_seen.defjvp
def _seen_jvp(primals: Any, tangents: Any) -> Any:
    # Its own function again, not only the value: second derivatives pass through too.
    return _seen(*primals), tangents[0]


def _pull_back(
    method: Compression, params: Params, state: State, grads: Params
) -> tuple[Params, dict[str, Any]]:
    """Gradients with respect to stored weights and learned things, from those of the effective."""

    def effective(weights: Params, learned: dict[str, Any]) -> Params:
        return method.apply(weights, State(learned, state.buffers))

    _, pull = jax.vjp(effective, params, state.learned)
    pulled, learned = pull(grads)
    # Integers have no gradient to pull back: what was given for them is handed on.
    whole = lambda given, found: given if found.dtype == jax.dtypes.float0 else found
    return jax.tree.map(whole, grads, pulled), learned


def _write(method: Compression, params: Params, updates: Params, old: State, new: State) -> Params:
    """Replace the update of each weight that a method sets by one that lands there exactly."""
    assert method.project is not None
    arrived = optax.apply_updates(params, updates)
    target = method.rewind(arrived, old, new) if method.rewind else arrived
    goals, reached = tree_lib.flatten(method.project(target, new)), tree_lib.flatten(arrived)
    stored, moves = tree_lib.flatten(params), tree_lib.flatten(updates)
    news = {
        path: jnp.where(leaf == reached[path], moves[path], (leaf - stored[path]))
        for path, leaf in goals.items()
        if leaf is not reached[path]
    }
    return tree_lib.replace(updates, news)


def _forget(
    inner_tx: optax.GradientTransformation,
    inner: Any,
    params: Params,
    learned: dict[str, Any],
    marks: dict[str, Any],
) -> Any:
    """The optimizer's state, as it would begin at ``params`` for the weights that are marked.

    What belongs to a weight is what lies under the weight's own path, of its shape: optimizers keep
    trees like that of the parameters, also masked and split ones, and no class of state is named
    here. What is not of the weight's shape (factored, flattened) stays.
    """
    whole = _attach(params, learned)
    named = {f"{path}/weight" if path in learned else path: mark for path, mark in marks.items()}
    keys_of = jax.tree_util.tree_flatten_with_path(whole, is_leaf=is_compressed)[0]
    places = zip((keys for keys, _ in keys_of), tree_lib.flatten(whole), strict=True)
    flags = {keys: named[path] for keys, path in places if path in named}
    known = {keys for keys, _ in keys_of}

    def mix(keys: tuple[Any, ...], leaf: Any, fresh: Any) -> Any:
        # The longest one: 'kernel' is a path, and 'Dense_0/kernel' is another.
        own = next((keys[i:] for i in range(len(keys) + 1) if keys[i:] in known), None)
        if own not in flags or jnp.shape(flags[own]) != jnp.shape(leaf):
            return leaf
        return jnp.where(flags[own], jnp.asarray(fresh).astype(leaf.dtype), leaf)

    return jax.tree_util.tree_map_with_path(mix, inner, inner_tx.init(whole))


def _attach(params: Params, learned: dict[str, Any]) -> Params:
    """The tree that the inner optimizer sees."""
    if not learned:
        return params
    nnx = _nnx()
    if nnx is not None and isinstance(params, nnx.State):
        # NNX would take a node inside its own mapping for one of its own.
        params = nnx.to_pure_dict(params)
    leaves = tree_lib.take(params, learned)
    return tree_lib.replace(params, {p: Trained(leaves[p], value) for p, value in learned.items()})


def _detach(updates: Params, params: Params, learned: dict[str, Any]) -> tuple[Params, Any]:
    """Undo :func:`_attach`: updates in the structure of ``params``, and those of ``learned``."""
    if not learned:
        return updates, {}
    leaves = tree_lib.flatten(updates, is_leaf=lambda leaf: isinstance(leaf, Trained))
    weights = {path: leaves[path].weight if path in learned else leaves[path] for path in leaves}
    return tree_lib.replace(params, weights), {path: leaves[path].learned for path in learned}


def _find(opt_state: Any) -> WrappedState:
    """The one compression state inside an optimizer state."""
    is_ours = lambda leaf: isinstance(leaf, WrappedState)
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} compression states, not one: pass the optimizer state "
            "(state.opt_state, or optimizer.opt_state of NNX) of an optimizer made by "
            "wrap_optimizer(tx, method); compose methods with chain, not by wrapping twice"
        )
    return _pure(found[0])


def _nnx() -> Any:
    """``flax.nnx`` where the user has imported it; it is slow to import and often not needed."""
    return sys.modules.get("flax.nnx")


def _pure(tree: Any) -> Any:
    """A tree whose NNX variables are replaced by what they hold."""
    nnx = _nnx()
    if nnx is None:
        return tree
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
    return jax.tree.map(
        lambda leaf: leaf.get_value() if is_variable(leaf) else leaf, tree, is_leaf=is_variable
    )


def _on_params(params: Params, function: Any, *, share: bool = True) -> Any:
    """Call ``function`` on a tree, or on the parameters of an NNX module.

    The module that comes back shares its other variables with the one given (a batch norm updates
    both), unless ``share`` is False.
    """
    nnx = _nnx()
    if nnx is None or not isinstance(params, nnx.Module):
        return function(params)
    graph, weights, rest = nnx.split(params, nnx.Param, ...)
    return nnx.merge(graph, function(weights), rest if share else nnx.clone(rest))
