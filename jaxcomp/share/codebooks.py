"""Shared weights: one codebook a leaf, by k-means, and the method that trains it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, UInt

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import CodebookArray
from jaxcomp.arrays.codebook import MAX_CLUSTERS, lookup
from jaxcomp.compression import Compression, Params, State
from jaxcomp.kernels.kmeans import fit_codebook, nearest


def kmeans(x: Float[Array, "..."], clusters: int) -> CodebookArray:
    """Replace an array by indices into a codebook of 1-D k-means centroids.

    Lloyd's algorithm on a histogram of the weights, from centroids at equal mass of the cube root
    of their density (Panter & Dite, 1951). Weights that are exactly zero keep a centroid of their
    own, exactly zero, and no other weight is given it.

    Args:
        x: weights, at least one axis; float16, bfloat16 or float32.
        clusters: size of the codebook, 1 to 65,536, and at most the number of weights.

    Returns:
        A leaf of ``ceil(log2 clusters)`` bits a weight.

    Raises:
        ValueError: NaN or infinite values, no elements, or more clusters than weights.

    Example:
        >>> kmeans(jnp.array([[0.0, 1.0, 3.0], [0.0, 1.0, 3.5]]), clusters=3).decode()
        Array([[0.  , 1.  , 3.25],
               [0.  , 1.  , 3.25]], dtype=float32)
    """
    tree_lib.check_weight("x", x)
    _check_clusters("x", x.size, clusters)
    codebook = fit_codebook(x, clusters)
    return CodebookArray.from_indices(nearest(x, codebook), codebook, x.dtype)


class ShareBuffers(NamedTuple):
    """Buffers of :func:`train`.

    Attributes:
        step: updates so far.
        indices: by path, which centroid each weight has; zeros until they are assigned.
    """

    step: Int32[Array, "..."]
    indices: dict[str, UInt[Array, "..."]]


def train(clusters: int, begin: int = 0) -> Compression:
    """Share weights from a step on, and train the shared values (Han et al., 2016, section 3).

    At step ``begin`` every leaf is clustered by k-means. From then on the forward pass sees the
    centroids; assignments stay, and each centroid is trained by the gradient summed over its
    members. A weight that is zero in this method's input (removed by one before it in the chain) is
    zero in its output, whenever it was removed.

    Args:
        clusters: shared values a leaf, 1 to 65,536.
        begin: the step from which on weights are shared; dense before.

    Returns:
        A method; it packs to :class:`CodebookArray` from step ``begin`` on. Its ``init`` raises
        ``ValueError`` where a leaf has fewer weights than clusters.

    Raises:
        ValueError: clusters outside 1 to 65,536, or ``begin`` negative.

    Example:
        >>> method = train(clusters=2)
        >>> params = {"kernel": jnp.array([[0.0, 1.0], [0.0, 3.0]])}
        >>> state = method.init(params)
        >>> state.learned["kernel"]
        Array([0., 2.], dtype=float32)
    """
    if not 1 <= clusters <= MAX_CLUSTERS:
        raise ValueError(f"clusters must be 1 to {MAX_CLUSTERS}, not {clusters}")
    if begin < 0:
        raise ValueError(f"begin must be a step from 0 on, not {begin}")

    def fit(leaves: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        books = {path: fit_codebook(leaf, clusters) for path, leaf in leaves.items()}
        return books, {path: nearest(leaf, books[path]) for path, leaf in leaves.items()}

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        for path, leaf in leaves.items():
            _check_clusters(path, leaf.size, clusters)
        if begin == 0:
            books, indices = fit(leaves)
        else:
            dtype = jnp.uint8 if clusters <= 256 else jnp.uint16
            books = {path: jnp.zeros(clusters, jnp.float32) for path in leaves}
            indices = {path: jnp.zeros_like(leaf, dtype) for path, leaf in leaves.items()}
        return State(books, ShareBuffers(jnp.zeros((), jnp.int32), indices))

    def apply(params: Params, state: State) -> Params:
        news = {}
        for path, leaf in tree_lib.take_like(params, state.buffers.indices).items():
            shared = _share(leaf, state.learned[path], state.buffers.indices[path])
            # A static `begin` of 0 spares the select.
            news[path] = jnp.where(state.buffers.step >= begin, shared, leaf) if begin else shared
        return tree_lib.replace(params, news)

    @jax.jit
    def advance(leaves: Any, books: Any, buffers: ShareBuffers) -> State:
        step, indices = buffers
        if begin:
            books, indices = jax.lax.cond(
                step + 1 == begin, lambda: fit(leaves), lambda: (books, indices)
            )
        return State(books, ShareBuffers(jnp.asarray(optax.safe_increment(step)), indices))

    def update(params: Params, state: State, grads: Params) -> State:
        del grads
        return advance(
            tree_lib.take_like(params, state.buffers.indices), state.learned, state.buffers
        )

    def pack(params: Params, state: State) -> Any:
        if int(state.buffers.step) < begin:
            return params
        news = {
            path: _pack(leaf, state.learned[path], state.buffers.indices[path])
            for path, leaf in tree_lib.take_like(params, state.buffers.indices).items()
        }
        return tree_lib.replace(params, news)

    return Compression(init, apply, update, pack)


def _share(leaf: Array, codebook: Array, indices: Array) -> Array:
    # Gathered in float32 and cast after, so that the gradient is summed in float32 too.
    values = lookup(codebook, indices).astype(leaf.dtype)
    return jnp.where(leaf == 0, jnp.zeros((), leaf.dtype), values)


def _pack(leaf: Array, codebook: Array, indices: Array) -> CodebookArray:
    """A leaf of the same values as :func:`_share`."""
    zero = leaf == 0
    if bool(jnp.any(zero & (lookup(codebook, indices) != 0))):
        # Removed after the codebook was made: the codebook gets an entry for zero.
        codebook = jnp.concatenate([jnp.zeros(1, codebook.dtype), codebook])
        dtype = jnp.uint8 if len(codebook) <= 256 else jnp.uint16
        indices = jnp.where(zero, 0, indices.astype(jnp.uint32) + 1).astype(dtype)
    return CodebookArray.from_indices(indices, codebook, leaf.dtype)


def _check_clusters(path: str, size: int, clusters: int) -> None:
    if not 1 <= clusters <= MAX_CLUSTERS:
        raise ValueError(f"{path}: clusters must be 1 to {MAX_CLUSTERS}, not {clusters}")
    if clusters > size:
        raise ValueError(
            f"{path}: {clusters} clusters for {size} weights: ask for at most {size}, "
            "or leave this leaf out with a None rule"
        )
