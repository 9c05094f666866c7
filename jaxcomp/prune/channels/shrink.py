"""Cut what goes with the parameters: optimizer states, running statistics, masks, averages."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import is_compressed
from jaxcomp.compression import Compression, State
from jaxcomp.model.placement import smaller_shape, take
from jaxcomp.optimizer import Trained, WrappedState
from jaxcomp.prune.channels.mirrors import Entry, Index, Parameter, Parts, candidates, index, split
from jaxcomp.prune.training.gradual import GradualBuffers

Kept = Mapping[str, tuple[Any, ...]]
Positions = tuple[Any, ...] | None
# The shape of an array that is learned, and how it is cut.
_Plan = tuple[tuple[int, ...], tuple[Any, ...]]

_NEW_STATE = (
    "make a new state with tx.init(smaller_params), or take this leaf out of the tree before"
)


def shrink(tree: Any, like_params: Any, kept: Kept) -> Any:
    """Cut a tree that belongs to the parameters as the parameters were cut.

    Momenta, second moments, gradients, accumulated gradients, averages of the weights, masks, and
    a whole ``TrainState`` are found by structure and by path, also where they mirror a part of the
    parameters (``optax.masked``, ``optax.multi_transform``, an optimizer made for
    ``params["params"]`` alone, a state of :func:`jaxcomp.wrap_optimizer`). Scalars, and what
    belongs to parameters that keep their shape, are handed on as they are. Functions inside the
    tree (``TrainState.apply_fn``) are not exchanged.

    Args:
        tree: any pytree.
        like_params: the parameters before the cut, with every collection that ``tree`` mirrors;
            arrays or ``jax.ShapeDtypeStruct``.
        kept: by path of a parameter, for each of its axes the positions that stay, (kept,)
            integers, or None for all. Parameters that are not named keep their shape.

    Returns:
        The same structure. Arrays stay on their devices; a sharded axis whose new size no longer
        divides is replicated.

    Raises:
        ValueError: an array belongs to a parameter that is cut, or may, and how is not known
            (factored second moments); two parameters fit and are cut differently; ``kept`` does not
            fit the parameters.
        TypeError: an array that would be cut is compressed.

    Example:
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> kept = {"kernel": (None, np.array([0, 2])), "bias": (np.array([0, 2]),)}
        >>> state = shrink(optax.adam(1e-3).init(params), params, kept)
        >>> jax.tree.map(jnp.shape, state[0].mu)
        {'bias': (2,), 'kernel': (2, 2)}
    """
    leaves = tree_lib.flatten(like_params, is_leaf=lambda _: False)
    _check_kept(kept, leaves)
    parameters = [
        Parameter(path, tuple(leaf.shape), kept.get(path, (None,) * len(leaf.shape)), leaf.dtype)
        for path, leaf in leaves.items()
        if hasattr(leaf, "shape")
    ]
    return _shrink(tree, _Context(index(parameters), {}), "")


class _Context(NamedTuple):
    """What is known on the way down.

    Attributes:
        found: the parameters.
        learned: by parameter, how each array that a method learns about it is cut.
    """

    found: Index
    learned: dict[str, list[_Plan]]


def _shrink(tree: Any, context: _Context, prefix: str) -> Any:
    leaves = tree_lib.flatten(tree, is_leaf=_is_whole)
    paths = [_join(prefix, path) for path in leaves]
    entries = [
        Entry(split(path), _shape(leaf), optional=leaf is None)
        for path, leaf in zip(paths, leaves.values(), strict=True)
    ]
    matched = candidates(context.found, entries)
    news = [
        _node(leaf, path, parameters, context)
        for leaf, path, parameters in zip(leaves.values(), paths, matched, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_is_whole), news)


def _is_whole(node: Any) -> bool:
    ours = (Trained, WrappedState, GradualBuffers, optax.MaskedNode)
    return node is None or isinstance(node, ours) or is_compressed(node)


def _shape(leaf: Any) -> tuple[int, ...] | None:
    if leaf is None or isinstance(leaf, optax.MaskedNode):
        return None
    if isinstance(leaf, Trained):
        leaf = leaf.weight
    return tuple(getattr(leaf, "shape", ()))


def _node(leaf: Any, path: str, parameters: list[Parameter], context: _Context) -> Any:
    """One leaf, or one of the nodes whose meaning is known here."""
    if leaf is None or isinstance(leaf, optax.MaskedNode):
        return leaf
    if isinstance(leaf, WrappedState):
        return _wrapped(leaf, path, context)
    if isinstance(leaf, GradualBuffers):
        masks = _shrink(leaf.masks, context, _join(path, "masks"))
        kept = _shrink(leaf.kept, context, _join(path, "kept"))
        # What was removed with a channel no longer counts: the masks are made anew at the next
        # chance, and what they removed stays removed.
        return GradualBuffers(leaf.step, jnp.zeros_like(leaf.sparsity), masks, kept)
    if isinstance(leaf, Trained):
        weight = _array(leaf.weight, path, parameters, context)
        plan = context.learned.get(parameters[0].path) if parameters else None
        if plan is None:
            raise ValueError(f"{path}: pass the whole state of wrap_optimizer, not a part of it")
        return Trained(weight, _cut_learned(leaf.learned, plan, f"{path}/learned"))
    return _array(leaf, path, parameters, context)


def _array(leaf: Any, path: str, parameters: list[Parameter], context: _Context) -> Any:
    """An array that belongs to one of some parameters, or to none."""
    shape = _shape(leaf)
    if not shape or np.prod(shape, dtype=np.int64) == 1:
        return leaf
    if not parameters:
        return _foreign(leaf, path, context.found)
    _check_agreement(path, parameters)
    parameter = parameters[0]
    if not parameter.is_cut:
        return leaf
    positions = _aligned(shape, parameter)
    if positions is None:
        raise ValueError(
            f"{path}: shape {shape} seems to be a statistic of {parameter.path} "
            f"{parameter.shape}, which is cut: {_NEW_STATE}"
        )
    if is_compressed(leaf):
        raise TypeError(f"{path}: compressed ({leaf!r}): decode it before it is cut")
    return take(leaf, positions)


def _foreign(leaf: Any, path: str, found: Index) -> Any:
    """An array that mirrors nothing: handed on unless a size of it may be one that was cut."""
    random_key = leaf.dtype == jnp.uint32 and leaf.ndim == 1 and leaf.size in (2, 4)
    for parameter in found.subtrees.get((), {}).values():
        for size, positions in zip(parameter.shape, parameter.kept, strict=True):
            if positions is not None and size in leaf.shape and not random_key:
                raise ValueError(
                    f"{path}: shape {tuple(leaf.shape)} belongs to no parameter that is known, but "
                    f"{size} is the size of an axis of {parameter.path} that is cut: pass "
                    f"parameters with what it mirrors, or {_NEW_STATE}"
                )
    return leaf


def _aligned(shape: tuple[int, ...], parameter: Parameter) -> Positions:
    """How an array is cut that lies along a parameter: as large as it, or one, on each axis."""
    if len(shape) != len(parameter.shape):
        return None
    if any(a not in (1, b) for a, b in zip(shape, parameter.shape, strict=True)):
        return None
    triples = zip(shape, parameter.shape, parameter.kept, strict=True)
    return tuple(kept if size == full else None for size, full, kept in triples)


def _wrapped(state: WrappedState, path: str, context: _Context) -> WrappedState:
    """The state of :func:`jaxcomp.wrap_optimizer`: the optimizer's, and the method's.

    Only the method knows what its arrays are. It is asked: the state that it would start with on
    the smaller parameters has the structure and the shapes to come to.
    """
    old, where = state.compression, _join(path, "compression")
    possible = [leaves for leaves in context.found.subtrees.values() if _starts(state, leaves)]
    if not possible:
        raise ValueError(
            f"{where}: no part of the parameters given is what this was made for: pass those that "
            f"the optimizer was made for, or {_NEW_STATE}"
        )
    if len(possible) > 1 and any(np.ndim(leaf) for leaf in jax.tree.leaves(old)):
        for rest in possible[0]:
            _check_agreement(where, [leaves[rest] for leaves in possible if rest in leaves])
    leaves = possible[0]
    try:
        goal = _started(state.method, leaves, smaller=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: the method refuses the smaller parameters: {error}") from error
    if len(possible) == 1:
        # From here on paths are those that the method knows.
        own = [parameter._replace(path="/".join(rest)) for rest, parameter in leaves.items()]
        context = context._replace(found=index(own))
    learned, plans = {}, {}
    for key, value in old.learned.items():
        plan = _plan(value, goal.learned[key], leaves[split(key)], f"{where}/learned/{key}")
        learned[key] = _cut_learned(value, plan, f"{where}/learned/{key}")
        plans[key] = plan
    context = context._replace(learned=plans)
    buffers = _shrink(old.buffers, context, _join(where, "buffers"))
    new = _arrive(State(learned, buffers), goal, where)
    return WrappedState(_shrink(state.inner, context, _join(path, "inner")), new, state.method)


def _arrive(state: State, goal: Any, path: str) -> State:
    """A state in the structure of the goal, whose static parts may name shapes too."""
    arrays, goals = tree_lib.flatten(state), jax.tree.leaves(goal)
    for (name, array), struct in zip(arrays.items(), goals, strict=True):
        if jnp.shape(array) != struct.shape:
            raise ValueError(
                f"{path}/{name}: shape {jnp.shape(array)} is to become {struct.shape}, and only "
                f"the method knows how: {_NEW_STATE}"
            )
    return jax.tree.unflatten(jax.tree.structure(goal), list(arrays.values()))


def _plan(value: Any, goal: Any, parameter: Parameter, path: str) -> list[_Plan]:
    """How each array that is learned about a parameter is cut."""
    plan = []
    for array, struct in zip(jax.tree.leaves(value), jax.tree.leaves(goal), strict=True):
        positions = (None,) * array.ndim
        if array.shape != struct.shape:
            positions = _aligned(array.shape, parameter)
        if positions is None or smaller_shape(array.shape, positions) != struct.shape:
            raise ValueError(
                f"{path}: shape {array.shape} is to become {struct.shape}, and only the method "
                f"knows how: {_NEW_STATE}"
            )
        plan.append((tuple(array.shape), positions))
    return plan


def _started(method: Compression, leaves: Mapping[Parts, Parameter], *, smaller: bool) -> Any:
    """The state, as shapes, that a method starts with on some parameters, or on them cut."""
    # Ordered as the tree that the parameters came from, which plain dicts would sort by path.
    structs = collections.OrderedDict()
    for rest, parameter in leaves.items():
        shape = smaller_shape(parameter.shape, parameter.kept) if smaller else parameter.shape
        structs["/".join(rest)] = jax.ShapeDtypeStruct(shape, parameter.dtype)
    return jax.eval_shape(method.init, structs)


def _starts(state: WrappedState, leaves: Mapping[Parts, Parameter]) -> bool:
    """Whether a method starts on some parameters with a state like the one there is."""
    old = state.compression
    if not all(split(key) in leaves for key in old.learned):
        return False
    try:
        started = _started(state.method, leaves, smaller=False)
    except (TypeError, ValueError):
        return False  # It refuses them, so the state is not of them.
    return jax.tree.structure(started) == jax.tree.structure(old) and all(
        a.shape == jnp.shape(b)
        for a, b in zip(jax.tree.leaves(started), jax.tree.leaves(old), strict=True)
    )


def _cut_learned(value: Any, plan: list[_Plan], path: str) -> Any:
    arrays, structure = jax.tree.flatten(value)
    news = []
    for array, (shape, positions) in zip(arrays, plan, strict=True):
        if array.size > 1 and array.shape != shape and any(p is not None for p in positions):
            raise ValueError(f"{path}: shape {array.shape}, not {shape}: {_NEW_STATE}")
        news.append(take(array, positions) if array.shape == shape else array)
    return jax.tree.unflatten(structure, news)


def _check_agreement(path: str, parameters: Sequence[Parameter]) -> None:
    """Raise if the parameters that an array may belong to are cut differently."""

    def cuts(parameter: Parameter) -> tuple[Any, ...]:
        return tuple(None if p is None else tuple(np.asarray(p).tolist()) for p in parameter.kept)

    if len({cuts(parameter) for parameter in parameters}) > 1:
        names = ", ".join(parameter.path for parameter in parameters)
        raise ValueError(
            f"{path}: {names} fit alike and are cut differently: shrink the part of the tree that "
            f"belongs to each by itself, or {_NEW_STATE}"
        )


def _check_kept(kept: Kept, leaves: Mapping[str, Any]) -> None:
    for path, axes in kept.items():
        if path not in leaves:
            raise ValueError(f"'{path}' is not a parameter; {tree_lib.nearest(path, leaves)}")
        shape = tuple(leaves[path].shape)
        if len(axes) != len(shape):
            raise ValueError(f"{path}: {len(axes)} axes in `kept`, but the shape is {shape}")
        for axis, (size, positions) in enumerate(zip(shape, axes, strict=True)):
            if positions is None:
                continue
            found = np.asarray(positions)
            if (
                found.ndim != 1
                or not found.size
                or not np.issubdtype(found.dtype, np.integer)
                or len(np.unique(found)) != len(found)
                or not 0 <= found.min() <= found.max() < size
            ):
                raise ValueError(
                    f"{path}: axis {axis} of size {size} cannot keep {positions!r}: give at least "
                    "one position, each once, as integers"
                )


def _join(prefix: str, path: str) -> str:
    return "/".join(part for part in (prefix, path) if part)
