"""Shared weights in one shot: a codebook for an array, a tree, or groups of channels."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import CodebookArray
from jaxcomp.checks import choose
from jaxcomp.share import layouts
from jaxcomp.share.layouts import Layout


def kmeans(
    x: Float[Array, "..."],
    clusters: int,
    *,
    importance: Any = None,
    axis: int | None = None,
    group_size: int = 1,
    start: str | None = None,
    key: Any = None,
) -> CodebookArray:
    """Replace an array by indices into a codebook of 1-D k-means centroids.

    Up to 256 clusters the optimum, by dynamic programming; Lloyd's algorithm beyond, from centroids
    at equal mass of the cube root of the density (Panter & Dite, 1951). Weights that are exactly
    zero keep a centroid of their own, exactly zero, and no other weight is given it.

    Args:
        x: weights, at least one axis; float16, bfloat16 or float32.
        clusters: size of the codebook, 1 to 65,536, and at most the number of weights.
        importance: what a squared error of each weight costs, in the shape of ``x``, finite and at
            least 0; only ratios matter. The diagonal of the Hessian or of the Fisher information:
            means of squared gradients, such as ``prune.evidence.squared_gradients`` gives. None, or
            zero everywhere, for 1 each. Weights that cost nothing take the nearest entry.
        axis: which axis is cut into groups of channels with a codebook each; None for one in all.
        group_size: channels in a group.
        start: ``"optimal"``, or where Lloyd's algorithm begins: ``"companded"``, ``"linear"``,
            ``"density"`` or ``"k-means++"``; None for the best there is for so many clusters.
        key: PRNG key for ``"k-means++"``.

    Returns:
        A leaf of ``ceil(log2 clusters)`` bits a weight. May be called inside of ``jit``, where
        values are not looked at: NaN makes NaN of every weight.

    Raises:
        TypeError: ``x`` is no floating array, or a key is missing.
        ValueError: NaN or infinite values, no elements, more clusters than weights (of a group),
            groups that do not divide the axis, or an importance that does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[0.0, 1.0, 3.0], [0.0, 1.0, 3.5]])
        >>> kmeans(x, clusters=3).decode()
        Array([[0.  , 1.  , 3.25],
               [0.  , 1.  , 3.25]], dtype=float32)
        >>> kmeans(x, clusters=3, importance=jnp.array([[1.0, 1.0, 3.0], [1.0, 1.0, 1.0]])).decode()
        Array([[0.   , 1.   , 3.125],
               [0.   , 1.   , 3.125]], dtype=float32)

    Source: Han et al., "Deep compression", ICLR 2016, section 3; weighted by the Hessian: Choi et
    al., "Towards the limit of network quantization", ICLR 2017, section 3.
    """
    layout = Layout(clusters, "leaf", axis, group_size, start, key)
    layouts.check_layout(layout)
    tree_lib.check_weight("x", x)
    return _packed({"x": x}, layout, None if importance is None else {"x": importance})["x"]


def codebooks(
    params: Any,
    clusters: int,
    *,
    paths: str | Sequence[str] | None = None,
    importance: Any = None,
    scope: str = "leaf",
    axis: int | None = None,
    group_size: int = 1,
    start: str | None = None,
    key: Any = None,
) -> Any:
    """Replace the weights of a tree by indices into codebooks, one a leaf, a group or the model.

    Args:
        params: parameter tree.
        clusters: size of each codebook.
        paths: patterns of the leaves that are shared; None for all matrices, kernels and
            embeddings.
        importance: a tree as ``params``, of arrays as for :func:`kmeans`; leaves that are not
            shared may be missing.
        scope: ``"leaf"`` for a codebook a leaf, ``"model"`` for one that all leaves hold.
        axis: as for :func:`kmeans`, of every leaf.
        group_size: likewise.
        start: likewise.
        key: likewise.

    Returns:
        The tree with :class:`CodebookArray` leaves.

    Raises:
        TypeError: as :func:`kmeans`, with the path of the leaf.
        ValueError: likewise; a pattern matches nothing, or there is no weight.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"up": jnp.array([[1.0, 2.0]]), "down": jnp.array([[1.0], [4.0]])}
        >>> codebooks(params, clusters=3, scope="model")["up"].codebook
        Array([1., 2., 4.], dtype=float32)

    Source: as of :func:`kmeans`.
    """
    layout = Layout(clusters, scope, axis, group_size, start, key)
    layouts.check_layout(layout)
    return tree_lib.replace(params, _packed(choose(params, paths), layout, importance))


def _packed(leaves: Any, layout: Layout, importance: Any) -> dict[str, CodebookArray]:
    layouts.check_leaves(leaves, layout)
    leaves = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
    books = layouts.fit(leaves, layout, layouts.check_importance(importance, leaves))
    of = layouts.owners(leaves, layout)
    return {
        path: layouts.as_leaf(
            leaf, books[of[path]], layouts.assign(leaf, books[of[path]], layout), layout
        )
        for path, leaf in leaves.items()
    }
