"""Paths, patterns and selections: which leaves of a parameter tree a method works on.

A *path* joins the keys of a leaf by ``/``: ``params/Conv_0/kernel``. The boxes that Flax puts
around an array (``nnx.Param``, ``nn.Partitioned``) do not count. A *selection* (:class:`Leaves`) is
a flat mapping of paths to leaves; it is a pytree like any other, so a method that works on a tree
works on a selection of it.
"""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxcomp.arrays import is_compressed

_NOT_WEIGHTS = frozenset({"bias", "b", "scale", "offset", "beta", "gamma", "mean", "var"})
_STATISTICS = frozenset({"average", "hidden"})


@jax.tree_util.register_pytree_with_keys_class
class Leaves(dict[str, Any]):
    """A selection: leaves by their full path, in the order of the tree that they came from."""

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Pytree protocol."""
        return tuple((jax.tree_util.DictKey(k), v) for k, v in self.items()), tuple(self)

    def tree_flatten(self) -> tuple[Any, Any]:
        """Pytree protocol."""
        return tuple(self.values()), tuple(self)

    @classmethod
    def tree_unflatten(cls, paths: tuple[str, ...], leaves: Iterable[Any]) -> "Leaves":
        """Pytree protocol."""
        return cls(zip(paths, leaves, strict=True))


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _path(keys: tuple[Any, ...]) -> str:
    # Flax's boxes hold their array in an attribute called `value`: not a level of the user's tree.
    boxed = keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value"
    return "/".join(_key_name(key) for key in (keys[:-1] if boxed and len(keys) > 1 else keys))


def flatten(tree: Any, is_leaf: Callable[[Any], bool] = is_compressed) -> Leaves:
    """All leaves of a tree by their paths; compressed leaves stay whole.

    Args:
        tree: any pytree.
        is_leaf: which nodes stay whole.

    Returns:
        Paths and leaves in the order of the tree.

    Raises:
        ValueError: two leaves have the same path.

    Example:
        >>> list(flatten({"params": {"Dense_0": {"kernel": 1.0, "bias": 2.0}}}))
        ['params/Dense_0/bias', 'params/Dense_0/kernel']
    """
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    leaves = Leaves()
    for keys, leaf in pairs:
        path = _path(keys)
        if path in leaves:
            raise ValueError(f"two leaves have the path '{path}': rename one of them")
        leaves[path] = leaf
    return leaves


def replace(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The same tree with some leaves exchanged.

    Args:
        tree: any pytree.
        leaves: new leaves by path.

    Returns:
        A tree of the same structure; leaves that are not named are the very same objects.

    Raises:
        ValueError: a path is not in the tree.

    Example:
        >>> replace({"a": 1, "b": {"c": 2}}, {"b/c": 3})
        {'a': 1, 'b': {'c': 3}}
    """
    old = flatten(tree)
    for path in leaves:
        if path not in old:
            raise ValueError(f"'{path}' is not in the tree; {nearest(path, old)}")
    treedef = jax.tree.structure(tree, is_leaf=is_compressed)
    return jax.tree.unflatten(treedef, [leaves.get(path, leaf) for path, leaf in old.items()])


def take(tree: Any, paths: Iterable[str]) -> Leaves:
    """The leaves at ``paths``; what a method does first with the tree that it is given.

    Args:
        tree: any pytree.
        paths: which leaves, usually the keys of a method's state.

    Returns:
        A selection in the order of ``paths``.

    Raises:
        ValueError: a path is missing, so the tree is not the one that the state was made from.

    Example:
        >>> take({"a": 1, "b": {"c": 2}}, ["b/c"])
        {'b/c': 2}
    """
    leaves = flatten(tree)
    for path in paths:
        if path not in leaves:
            raise ValueError(
                f"the state was made for a tree with a leaf '{path}', which this tree lacks "
                f"({nearest(path, leaves)}): pass the parameters that `init` was called with"
            )
    return Leaves((path, leaves[path]) for path in paths)


def take_like(tree: Any, arrays: Mapping[str, Any]) -> Leaves:
    """The leaves that a state holds an array for, each of that array's shape.

    Args:
        tree: any pytree.
        arrays: the state's arrays by path, such as masks.

    Returns:
        A selection in the order of ``arrays``.

    Raises:
        ValueError: a path is missing, or a leaf has another shape.

    Example:
        >>> take_like({"kernel": jnp.ones((2, 3))}, {"kernel": jnp.ones((3, 2))})
        Traceback (most recent call last):
        ...
        ValueError: kernel: shape (2, 3), but the state was made for (3, 2): pass the parameters ...
    """
    leaves = take(tree, arrays)
    for path, leaf in leaves.items():
        if leaf.shape != arrays[path].shape:
            raise ValueError(
                f"{path}: shape {leaf.shape}, but the state was made for {arrays[path].shape}: "
                "pass the parameters that `init` was called with"
            )
    return leaves


def is_weight(path: str, leaf: Any) -> bool:
    """Whether a leaf is compressed by default: matrices, kernels, embeddings; no bias, no norm.

    Args:
        path: the leaf's path; its last name decides about stacked biases and norms.
        leaf: an array (or anything with ``ndim`` and ``dtype``).

    Returns:
        True for floating arrays of two or more axes that are not called ``bias``, ``scale``,
        ``mean``, ``var``, ….

    Example:
        >>> is_weight("Dense_0/kernel", jnp.ones((2, 3))), is_weight("Dense_0/bias", jnp.ones(3))
        (True, False)
    """
    if is_compressed(leaf) or getattr(leaf, "ndim", 0) < 2:
        return False
    name = path.rsplit("/", 1)[-1]
    # Haiku's running statistics are vectors with axes of one position around them.
    if name in _STATISTICS and leaf.size == max(leaf.shape):
        return False
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating)) and name not in _NOT_WEIGHTS


def select(
    tree: Any, where: Callable[[str, Any], bool] = is_weight, *, check: bool = True
) -> Leaves:
    """The leaves that a method works on: what ``where`` admits, or all of a selection.

    Args:
        tree: a parameter tree, or :class:`Leaves` that somebody has already chosen.
        where: predicate of path and leaf.
        check: whether to look at the leaves: floating, not empty and, if concrete, finite.

    Returns:
        The selection.

    Raises:
        ValueError: nothing is left to work on, a leaf has no elements, NaN or infinite values.
        TypeError: a chosen leaf is not a floating array.

    Example:
        >>> list(select({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}))
        ['kernel']
    """
    leaves = tree if isinstance(tree, Leaves) else flatten(tree)
    if not isinstance(tree, Leaves):
        leaves = Leaves((path, leaf) for path, leaf in leaves.items() if where(path, leaf))
    if not leaves:
        packed = [path for path, leaf in flatten(tree).items() if is_compressed(leaf)]
        if packed:
            raise ValueError(
                f"there is no weight to compress: {packed[0]} and {len(packed) - 1} other leaves "
                "are compressed already: give the dense tree, or jaxcomp.decode this one"
            )
        raise ValueError(
            "there is no weight to compress: the tree has no floating leaf of two or more axes; "
            "name the leaves that are meant with partition({...}, where=...)"
        )
    for path, leaf in leaves.items() if check else ():
        check_weight(path, leaf)
    return leaves


def check_weight(path: str, leaf: Any) -> None:
    """Raise unless a leaf is a floating array with elements and, if concrete, finite.

    Args:
        path: for the message.
        leaf: the leaf.

    Raises:
        TypeError: it is not a floating array.
        ValueError: it has no elements, or holds NaN or infinite values.

    Example:
        >>> check_weight("kernel", jnp.array([1.0, jnp.nan]))
        Traceback (most recent call last):
        ...
        ValueError: kernel: 1 of 2 values are NaN or infinite: mend the weights before compressing
    """
    if is_compressed(leaf):
        raise TypeError(f"{path}: already compressed ({leaf!r}): decode it first")
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        raise TypeError(f"{path}: {kind} is not a floating array: leave it out with a None rule")
    if 0 in leaf.shape:
        raise ValueError(
            f"{path}: shape {tuple(leaf.shape)} has no elements: leave it out with a None rule"
        )
    if isinstance(leaf, (np.ndarray, jax.Array)) and not isinstance(leaf, jax.core.Tracer):
        # Known weights may be looked at inside a trace too, where they are closed over.
        with jax.ensure_compile_time_eval():
            bad = int(_broken(leaf))
        if bad:
            raise ValueError(
                f"{path}: {bad} of {leaf.size} values are NaN or infinite: "
                "mend the weights before compressing"
            )


@jax.jit
def _broken(leaf: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(leaf))


def nearest(name: str, paths: Iterable[str], count: int = 3) -> str:
    """The paths most like a name, for messages.

    Example:
        >>> nearest("Dense_0/kernle", ["Dense_0/kernel", "Conv_0/kernel"], count=1)
        'nearest: Dense_0/kernel'
    """
    paths = list(paths)
    if not paths:
        return "the tree has no leaves"
    found = difflib.get_close_matches(name, paths, n=count, cutoff=0.0)
    return "nearest: " + ", ".join(found)


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that a pattern matches.

    Args:
        pattern: shell-style, over the whole path; ``*`` matches any characters, ``/`` too.
        paths: paths of leaves.

    Example:
        >>> matching("Conv_*", ["Conv_0/kernel", "Dense_0/kernel"])
        ['Conv_0/kernel']
    """
    return [path for path in paths if fnmatch.fnmatchcase(path, pattern)]


def assign(patterns: Iterable[str], paths: Iterable[str]) -> dict[str, str]:
    """Give each path the first pattern that matches it.

    Args:
        patterns: see :func:`matching`; the first that matches a path has it.
        paths: paths of leaves.

    Returns:
        The pattern of each matched path; paths that match none are left out.

    Raises:
        ValueError: a pattern matches no path; the message names the nearest.

    Example:
        >>> assign(["Conv_*", "*/kernel"], ["Conv_0/kernel", "Dense_0/kernel", "Dense_0/bias"])
        {'Conv_0/kernel': 'Conv_*', 'Dense_0/kernel': '*/kernel'}
    """
    paths = list(paths)
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = matching(pattern, paths)
        if not matched:
            raise ValueError(f"pattern '{pattern}' matches no leaf; {nearest(pattern, paths)}")
        for path in matched:
            found.setdefault(path, pattern)
    return found
