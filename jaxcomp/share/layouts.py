"""Which weights share a codebook, and how it is fitted, looked up and packed for them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import CodebookArray
from jaxcomp.arrays.codebook import MAX_CLUSTERS, lookup
from jaxcomp.checks import check_count, check_key
from jaxcomp.kernels.kmeans import check_start, fit_codebook, nearest
from jaxcomp.sharding import automatic, spec_like

SCOPES = ("leaf", "model")


class Layout(NamedTuple):
    """Codebooks of a selection of leaves.

    Attributes:
        clusters: entries of each.
        scope: ``"leaf"`` for one a leaf (or a group of its channels), ``"model"`` for one in all.
        axis: which axis of each leaf is cut into groups with a codebook each; None for one a leaf.
        group_size: channels in a group.
        start: where k-means begins, see :func:`jaxcomp.kernels.kmeans.fit_codebook`.
        key: for a start that draws.
    """

    clusters: int
    scope: str = "leaf"
    axis: int | None = None
    group_size: int = 1
    start: str | None = None
    key: Any = None


def check_layout(layout: Layout) -> None:
    """Raise unless a layout makes sense for some leaves.

    Raises:
        TypeError: a number is none, or there is no key where one is needed.
        ValueError: a number, a scope or a start out of range, or a model cut into groups.

    Example:
        >>> check_layout(Layout(0))
        Traceback (most recent call last):
        ...
        ValueError: clusters must be 1 to 65536, not 0
    """
    check_count("clusters", layout.clusters, least=-(1 << 31))
    if not 1 <= layout.clusters <= MAX_CLUSTERS:
        raise ValueError(f"clusters must be 1 to {MAX_CLUSTERS}, not {layout.clusters}")
    if layout.scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not {layout.scope!r:.60}")
    if layout.axis is not None:
        check_count("axis", layout.axis, least=-(1 << 31))
        if layout.scope == "model":
            raise ValueError("one codebook for the model has no groups: leave axis out")
    check_count("group_size", layout.group_size)
    if layout.axis is None and layout.group_size != 1:
        raise ValueError("group_size needs an axis: which one is cut into groups?")
    if layout.key is not None:
        check_key(layout.key)
    check_start(layout.start, layout.clusters, layout.key)


def check_leaves(leaves: Mapping[str, Any], layout: Layout) -> None:
    """Raise unless a layout fits these leaves; messages name the path.

    Raises:
        ValueError: more clusters than weights, no such axis, or groups that do not divide it.

    Example:
        >>> check_leaves({"kernel": jnp.ones((2, 3))}, Layout(2, axis=-1, group_size=2))
        Traceback (most recent call last):
        ...
        ValueError: kernel: groups of 2 do not divide axis -1 of shape (2, 3)
    """
    for path, leaf in leaves.items():
        size = leaf.size
        if layout.axis is not None:
            if not -leaf.ndim <= layout.axis < leaf.ndim:
                raise ValueError(f"{path}: shape {leaf.shape} has no axis {layout.axis}")
            if leaf.shape[layout.axis] % layout.group_size:
                raise ValueError(
                    f"{path}: groups of {layout.group_size} do not divide axis {layout.axis} of "
                    f"shape {leaf.shape}"
                )
            size = size // leaf.shape[layout.axis] * layout.group_size
        if layout.scope == "leaf" and layout.clusters > size:
            raise ValueError(
                f"{path}: {layout.clusters} clusters for {size} weights: ask for at most {size}, "
                "or leave this leaf out with a None rule"
            )
    total = sum(leaf.size for leaf in leaves.values())
    if layout.clusters > total:
        raise ValueError(f"{next(iter(leaves))}: {layout.clusters} clusters for {total} weights")


def check_importance(importance: Any, leaves: Mapping[str, Any]) -> dict[str, Any] | None:
    """The importance of each leaf's weights; raises unless it fits them.

    Args:
        importance: a tree with a leaf at each of their paths, or None.
        leaves: the weights.

    Returns:
        By path, or None.

    Raises:
        ValueError: a path is missing, a shape is another, or a number is negative or not finite.

    Example:
        >>> check_importance({"kernel": jnp.array([-1.0])}, {"kernel": jnp.ones(1)})
        Traceback (most recent call last):
        ...
        ValueError: importance of kernel: numbers must be finite and at least 0: square gradients
    """
    if importance is None:
        return None
    given = tree_lib.flatten(importance)
    for path, leaf in leaves.items():
        if path not in given:
            raise ValueError(f"importance has no leaf '{path}'; {tree_lib.nearest(path, given)}")
        part = given[path]
        if getattr(part, "shape", None) != leaf.shape:
            raise ValueError(
                f"importance of {path}: shape {getattr(part, 'shape', None)}, but the weights have "
                f"{leaf.shape}: give one number a weight"
            )
        if not isinstance(part, Tracer) and not bool(_is_amount(part)):
            raise ValueError(
                f"importance of {path}: numbers must be finite and at least 0: square gradients"
            )
    return {path: given[path] for path in leaves}


@jax.jit
def _is_amount(x: Array) -> Array:
    return jnp.all(jnp.isfinite(x) & (x >= 0))


def owners(paths: Any, layout: Layout) -> dict[str, str]:
    """The path that each leaf's codebook lives under: its own, or the first for a whole model.

    Example:
        >>> owners(["a", "b"], Layout(4, scope="model"))
        {'a': 'a', 'b': 'a'}
    """
    paths = list(paths)
    return {path: paths[0] if layout.scope == "model" else path for path in paths}


def fit(
    leaves: Mapping[str, Any], layout: Layout, importance: Mapping[str, Any] | None = None
) -> dict[str, Array]:
    """Codebooks by k-means, by the path that they live under.

    Args:
        leaves: weights.
        layout: which of them share.
        importance: of each weight, in the shapes of the leaves; None for 1 each.

    Returns:
        float32, shape ``(clusters,)``, or with ``axis`` ``(groups, clusters)``.

    Example:
        >>> fit({"kernel": jnp.array([[0.0, 1.0], [0.0, 3.0]])}, Layout(1, axis=-1))
        {'kernel': Array([[0.],
               [2.]], dtype=float32)}
    """
    shares = importance or {}
    if layout.scope == "model":
        first, parts = next(iter(leaves)), [shares[path] for path in leaves if shares]
        book = fit_codebook(
            list(leaves.values()),
            layout.clusters,
            start=layout.start,
            key=layout.key,
            importance=parts or None,
        )
        return {first: book}
    books = {}
    for place, (path, leaf) in enumerate(leaves.items()):
        key = None if layout.key is None else jax.random.fold_in(layout.key, place)
        books[path] = _fit_leaf(leaf, layout, shares.get(path), key)
    return books


def _fit_leaf(leaf: Array, layout: Layout, share: Any, key: Any) -> Array:
    def one(x: Array, share: Any, key: Any) -> Array:
        return fit_codebook(x, layout.clusters, start=layout.start, key=key, importance=share)

    if layout.axis is None:
        return one(leaf, share, key)

    def groups(*parts: Array) -> Array:
        cut = [rows(part, layout) for part in parts]
        keys = None if key is None else jax.random.split(key, cut[0].shape[0])
        # One after the other: the table of costs of a fit is 4 MB.
        each = lambda args: one(args[0][0], args[0][1] if share is not None else None, args[1])
        return lax.map(each, (cut, keys))

    return automatic(groups)(*((leaf,) if share is None else (leaf, share)))


def rows(x: Array, layout: Layout) -> Array:
    """The weights of each group in a row.

    Example:
        >>> rows(jnp.array([[1, 2], [3, 4]]), Layout(1, axis=-1))
        Array([[1, 3],
               [2, 4]], dtype=int32)
    """
    moved = jnp.moveaxis(x, layout.axis or 0, 0)
    return moved.reshape(moved.shape[0] // layout.group_size, -1)


def unrows(x: Array, shape: tuple[int, ...], layout: Layout) -> Array:
    """Rows back in the shape that :func:`rows` took them from.

    Example:
        >>> unrows(jnp.array([[1, 3], [2, 4]]), (2, 2), Layout(1, axis=-1))
        Array([[1, 2],
               [3, 4]], dtype=int32)
    """
    axis = layout.axis or 0
    left = list(shape)
    size = left.pop(axis)
    return jnp.moveaxis(x.reshape(size, *left), 0, axis)


def blank(leaves: Mapping[str, Any], layout: Layout) -> dict[str, Array]:
    """Zeros in the shapes of the codebooks that :func:`fit` will give.

    Example:
        >>> blank({"kernel": jnp.ones((2, 4))}, Layout(3, axis=-1, group_size=2))["kernel"].shape
        (2, 3)
    """

    def shape(leaf: Any) -> tuple[int, ...]:
        groups = () if layout.axis is None else (leaf.shape[layout.axis] // layout.group_size,)
        return (*groups, layout.clusters)

    of = owners(leaves, layout)
    return {
        path: jnp.zeros(shape(leaf), jnp.float32)
        for path, leaf in leaves.items()
        if of[path] == path
    }


def assign(leaf: Array, codebook: Array, layout: Layout) -> Array:
    """The index of each weight's nearest entry, whatever their order.

    Args:
        leaf: weights.
        codebook: as from :func:`fit`, or trained since; entry 0 is for pruned weights alone if it
            is exactly 0.0.
        layout: how the codebook belongs to the leaf.

    Returns:
        Integers in the shape and sharding of the leaf.

    Example:
        >>> assign(jnp.array([[0.1, 0.9]]), jnp.array([1.0, 0.5, 0.0]), Layout(3))
        Array([[2, 0]], dtype=uint8)
    """

    def one(x: Array, book: Array) -> Array:
        pinned = (np.arange(book.shape[0]) == 0) & (book == 0)
        order = jnp.argsort(jnp.where(pinned, -jnp.inf, book)).astype(jnp.int32)
        # A leading zero means a pinned one, which another entry that happens to be zero is not.
        least = jnp.where(pinned | (book != 0), book, jnp.finfo(jnp.float32).tiny)
        found = nearest(x, least[order])
        return order[found.astype(jnp.int32)].astype(found.dtype)

    def search(x: Array, book: Array) -> Array:
        if layout.axis is None:
            return one(x, book)
        found = lax.map(lambda pair: one(*pair), (rows(x, layout), book))
        return unrows(found, x.shape, layout)

    leaf, codebook = lax.stop_gradient((leaf, codebook))
    return automatic(search, out=spec_like(leaf, leaf.shape))(leaf, codebook)


def shared(leaf: Array, codebook: Array, indices: Array, layout: Layout) -> Array:
    """What a leaf becomes: its entries, and zero where it is zero.

    Example:
        >>> book, indices = jnp.array([1.0, 2.0]), jnp.array([1, 1], jnp.uint8)
        >>> shared(jnp.array([0.0, 5.0]), book, indices, Layout(2))
        Array([0., 2.], dtype=float32)
    """
    # Gathered in float32 and cast after, so that the gradient is summed in float32 too.
    values = lookup(codebook, indices, _from_the_end(leaf, layout)).astype(leaf.dtype)
    return jnp.where(leaf == 0, jnp.zeros((), leaf.dtype), values)


def packed(leaf: Array, codebook: Array, indices: Array, layout: Layout) -> CodebookArray:
    """A leaf of the same values as :func:`shared`.

    Example:
        >>> book, indices = jnp.array([1.0, 2.0]), jnp.array([1, 1], jnp.uint8)
        >>> packed(jnp.array([0.0, 5.0]), book, indices, Layout(2)).decode()
        Array([0., 2.], dtype=float32)
    """
    zero, axis = leaf == 0, _from_the_end(leaf, layout)
    if bool(jnp.any(zero & (lookup(codebook, indices, axis) != 0))):
        # Removed after the codebook was made: the codebook gets an entry for zero.
        codebook = jnp.pad(codebook, [(0, 0)] * (codebook.ndim - 1) + [(1, 0)])
        dtype = jnp.uint8 if codebook.shape[-1] <= 256 else jnp.uint16
        indices = jnp.where(zero, 0, indices.astype(jnp.uint32) + 1).astype(dtype)
    return as_leaf(leaf, codebook, indices, layout)


def as_leaf(leaf: Array, codebook: Array, indices: Array, layout: Layout) -> CodebookArray:
    """A leaf of the values that indices stand for; may be traced.

    Example:
        >>> book, indices = jnp.array([1.0, 2.0]), jnp.array([1, 1], jnp.uint8)
        >>> as_leaf(jnp.array([0.0, 5.0]), book, indices, Layout(2)).decode()
        Array([2., 2.], dtype=float32)
    """
    return CodebookArray.from_indices(indices, codebook, leaf.dtype, _from_the_end(leaf, layout))


def _from_the_end(leaf: Array, layout: Layout) -> int | None:
    axis = layout.axis
    return axis - leaf.ndim if axis is not None and axis >= 0 else axis
