"""What a sub-network has not, and trees of the largest network's shapes without it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.dtypes
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomp import tree as tree_lib
from jaxcomp.model.placement import take
from jaxcomp.model.removed import Kept
from jaxcomp.optimizer import WrappedState


class Removal(NamedTuple):
    """What a sub-network has not.

    Attributes:
        channels: by path, for each axis the positions of the channels that stay; None for all.
        kept: the same with those of kernels' centres.
        sizes: by path of the kernels that are cut, their new height and width.
        zeros: paths of the leaves that branches without them name.
        gone: paths of all leaves that went with those branches, these included.
    """

    channels: Kept
    kept: Kept
    sizes: dict[str, int]
    zeros: tuple[str, ...]
    gone: tuple[str, ...]


def smaller(params: Any, removal: Removal) -> Any:
    """Cut a tree of parameters.

    Args:
        params: the largest model's; arrays or ``jax.ShapeDtypeStruct``.
        removal: what goes.

    Returns:
        The tree with smaller leaves, and None for those that are gone.

    Example:
        >>> kept = {"kernel": (None, np.array([0, 2])), "bias": (None,)}
        >>> removal = Removal(kept, kept, {}, ("bias",), ("bias",))
        >>> smaller({"kernel": np.eye(3), "bias": np.zeros(3)}, removal)["kernel"].shape
        (3, 2)
    """
    return cut(params, removal.kept, removal.gone)


def cut(params: Any, kept: Mapping[str, Any], gone: tuple[str, ...]) -> Any:
    """The leaves of a tree with the positions that stay, and None for those that are gone.

    Args:
        params: arrays or ``jax.ShapeDtypeStruct``.
        kept: by path, for each axis the positions that stay, or None for all.
        gone: paths.
    """
    leaves = tree_lib.flatten(params, is_leaf=lambda _: False)
    news = [
        None if path in gone else take(leaf, kept[path]) if path in kept else leaf
        for path, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), news)


def shrunk(tree: Any, full: Any, removal: Removal) -> Any:
    """Cut a tree that belongs to the parameters as they are cut.

    What belongs to which parameter is told by paths: those of the tree end in the parameter's own,
    or in what is left of it without the first name (the optimizer of ``variables["params"]``).
    Optimizers' masks are to be functions: a tree of them would name leaves that are gone.

    Args:
        tree: arrays of the shapes of the parameters that their paths end in, such as momenta.
            Single numbers and PRNG keys belong to none and are handed on.
        full: shapes and dtypes of the largest model's parameters.
        removal: what goes.

    Returns:
        The same tree with smaller arrays, and None in the place of those that are gone.

    Raises:
        ValueError: an array belongs to no parameter, to several that are cut differently, or is of
            another shape than the one that is cut; a state of :func:`jaxcomp.wrap_optimizer`.

    Example:
        >>> params = {"kernel": np.eye(3), "bias": np.zeros(3)}
        >>> kept = {"kernel": (None, np.array([0, 2])), "bias": (None,)}
        >>> state = optax.trace(0.9).init(params)
        >>> state = shrunk(state, params, Removal(kept, kept, {}, ("bias",), ("bias",)))
        >>> state.trace["kernel"].shape, state.trace["bias"]
        ((3, 2), None)
    """
    if any(map(_is_wrapped, jax.tree.leaves(tree, is_leaf=_is_wrapped))):
        raise ValueError(
            "a state of wrap_optimizer is learned by a method that began with other shapes: make a "
            "new one with tx.init of the smaller parameters"
        )
    parameters = tree_lib.flatten(full, is_leaf=lambda _: False)
    by_ending: dict[str, list[str]] = {path: [path] for path in parameters}
    for path in parameters:
        rest = path.partition("/")[2]
        if rest and rest not in parameters:
            by_ending.setdefault(rest, []).append(path)
    leaves = tree_lib.flatten(tree, is_leaf=_is_masked)
    news = []
    for path, leaf in leaves.items():
        names = path.split("/")
        endings = ("/".join(names[i:]) for i in range(len(names) + 1))
        owners = next((by_ending[each] for each in endings if each in by_ending), [])
        shape = None if _is_masked(leaf) else np.shape(leaf)
        alike = [owner for owner in owners if parameters[owner].shape == shape]
        news.append(_cut_like(leaf, path, alike or owners, parameters, removal))
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_is_masked), news)


def _cut_like(
    leaf: Any, path: str, owners: list[str], parameters: Mapping[str, Any], removal: Removal
) -> Any:
    """An array of one of some parameters, cut as that is; or of none."""
    advice = "make a new state of the smaller parameters, or take this array out of the tree before"
    cuts = {
        None if owner in removal.gone else _positions(removal.kept.get(owner)) for owner in owners
    }
    if len(cuts) > 1:
        raise ValueError(
            f"{path}: {' and '.join(owners)} fit alike and are cut differently: {advice}"
        )
    if owners and cuts == {None}:
        return None
    if _is_masked(leaf) or _is_key(leaf) or np.size(leaf) == 1:
        return leaf
    shape = np.shape(leaf)
    if not owners:
        raise ValueError(f"{path}: shape {shape} mirrors no parameter: {advice}")
    kept = removal.kept.get(owners[0], ())
    if all(positions is None for positions in kept):
        return leaf
    if shape != parameters[owners[0]].shape:
        raise ValueError(
            f"{path}: shape {shape}, but {owners[0]} is {parameters[owners[0]].shape} and is cut: "
            f"{advice}"
        )
    return take(leaf, kept)


def _positions(kept: Any) -> Any:
    """What stays on each axis, to be compared; a parameter that is not named loses nothing."""
    return tuple(None if each is None else tuple(each.tolist()) for each in kept or ())


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_wrapped(node: Any) -> bool:
    return isinstance(node, WrappedState)


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    if dtype == np.uint32:
        return np.ndim(leaf) == 1
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
