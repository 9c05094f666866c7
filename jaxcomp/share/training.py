"""Training with shared weights: fixed, re-assigned, and straight through to latent weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_amount, check_count
from jaxcomp.compression import Compression, Params, State
from jaxcomp.share import layouts
from jaxcomp.share.layouts import Layout


@struct.dataclass
class ShareBuffers:
    """Buffers of the methods that share weights.

    Attributes:
        step: ``int32``, updates so far.
        indices: by path, which centroid each weight has, zeros until they are assigned; empty where
            they are found anew in each forward pass.
        importance: by path, the running mean of squared gradients; empty unless asked for.
        shapes: path and shape of each leaf that ``init`` saw; static.
    """

    step: Any
    indices: Any
    importance: Any
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = struct.field(pytree_node=False, default=())


def train(
    clusters: int,
    begin: int = 0,
    *,
    scope: str = "leaf",
    axis: int | None = None,
    group_size: int = 1,
    start: str | None = None,
    key: Any = None,
    reassign_every: int | None = None,
    importance_decay: float | None = None,
) -> Compression:
    """Share weights from a step on, and train the shared values (Han et al., 2016, section 3).

    At step ``begin`` every leaf is clustered by k-means. From then on the forward pass sees the
    centroids, and each centroid is trained by the gradient summed over its members. Assignments
    stay; or, with ``reassign_every``, the stored weights go on being trained, straight through, and
    every so many steps each takes the centroid nearest to it. A weight that is zero in this
    method's input (removed by one before it in the chain) is zero in its output, whenever it was
    removed.

    Args:
        clusters: shared values a codebook, 1 to 65,536.
        begin: the step from which on weights are shared; dense before.
        scope: ``"leaf"`` for a codebook a leaf, ``"model"`` for one that all leaves hold.
        axis: which axis of every leaf is cut into groups of channels with a codebook each.
        group_size: channels in a group.
        start: of k-means, see :func:`kmeans`.
        key: PRNG key for ``"k-means++"``.
        reassign_every: steps between assignments; None for one alone.
        importance_decay: k-means weighs each weight by the running mean of its squared gradients,
            which forgets by this factor a step; below 1. None for weights that count alike.

    Returns:
        A method; it packs to :class:`CodebookArray` from step ``begin`` on. Its ``init`` raises
        ``ValueError`` where a leaf has fewer weights than clusters, or groups do not divide it.

    Raises:
        TypeError: a number is none, or a key is missing.
        ValueError: clusters outside 1 to 65,536, ``begin`` negative, or another option out of
            range; ``importance_decay`` with ``begin=0``, when no gradient is known.

    Example:
        >>> method = train(clusters=2)
        >>> params = {"kernel": jnp.array([[0.0, 1.0], [0.0, 3.0]])}
        >>> state = method.init(params)
        >>> state.learned["kernel"]
        Array([0., 2.], dtype=float32)

    Source: Han et al., "Deep compression", ICLR 2016, section 3.
    """
    layout = checked(Layout(clusters, scope, axis, group_size, start, key), begin)
    if reassign_every is not None:
        check_count("reassign_every", reassign_every)
    return _method(layout, begin, reassign_every, False, importance_decay)


def straight_through(
    clusters: int,
    begin: int = 0,
    *,
    scope: str = "leaf",
    axis: int | None = None,
    group_size: int = 1,
    start: str | None = None,
    key: Any = None,
    importance_decay: float | None = None,
) -> Compression:
    """Train latent weights of which every forward pass sees the nearest centroids.

    The stored weights stay dense and are trained by the gradient with respect to what they are
    rounded to; the centroids by the gradient summed over their members. A weight changes its
    centroid as soon as another is nearer. What is zero stays zero, as with :func:`train`.

    Args:
        clusters: as for :func:`train`.
        begin: likewise.
        scope: likewise.
        axis: likewise.
        group_size: likewise.
        start: likewise.
        key: likewise.
        importance_decay: likewise.

    Returns:
        A method, as :func:`train` gives.

    Raises:
        TypeError: as :func:`train`.
        ValueError: likewise.

    Example:
        >>> method = straight_through(clusters=2)
        >>> params = {"kernel": jnp.array([[1.0, 2.0], [1.5, 4.0]])}
        >>> state = method.init(params)
        >>> moved = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
        >>> method.apply(moved, state)["kernel"]
        Array([[1.5, 1.5],
               [4. , 4. ]], dtype=float32)

    Source: Bengio et al., "Estimating or propagating gradients through stochastic neurons", 2013,
    section 3.
    """
    layout = checked(Layout(clusters, scope, axis, group_size, start, key), begin)
    return _method(layout, begin, None, True, importance_decay)


def _method(
    layout: Layout, begin: int, every: int | None, always: bool, decay: float | None
) -> Compression:
    _check_decay(begin, decay)
    latent = always or every is not None

    def see(leaf: Array, book: Array, held: Any) -> Array:
        indices = layouts.assign(leaf, book, layout) if held is None else held
        seen = layouts.shared(leaf, book, indices, layout)
        # Adding nothing lets the gradient through; where a weight is zero it stays.
        return seen + jnp.where(leaf == 0, 0, leaf - lax.stop_gradient(leaf)) if latent else seen

    def assigned(leaves: Any, books: Any) -> dict[str, Array]:
        of = layouts.owners(leaves, layout)
        found = {p: layouts.assign(leaf, books[of[p]], layout) for p, leaf in leaves.items()}
        return {} if always else found

    def fitted(leaves: Any, importance: Any) -> tuple[Any, Any]:
        books = layouts.fit(leaves, layout, importance or None)
        return books, assigned(leaves, books)

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        buffers = begun(leaves, layout)
        if decay is not None:
            kept = {path: jnp.zeros_like(leaf, jnp.float32) for path, leaf in leaves.items()}
            buffers = buffers.replace(importance=kept)
        if begin == 0:
            books, indices = fitted(leaves, None)
        else:
            dtype = jnp.uint8 if layout.clusters <= 256 else jnp.uint16
            indices = {path: jnp.zeros_like(leaf, dtype) for path, leaf in leaves.items()}
            books, indices = layouts.blank(leaves, layout), {} if always else indices
        return State(books, buffers.replace(indices=indices))

    def apply(params: Params, state: State) -> Params:
        news, of = {}, owners_of(state, layout)
        for path, leaf in leaves_of(params, state).items():
            seen = see(leaf, state.learned[of[path]], state.buffers.indices.get(path))
            # A static `begin` of 0 spares the select.
            news[path] = jnp.where(state.buffers.step >= begin, seen, leaf) if begin else seen
        return tree_lib.replace(params, news)

    @jax.jit
    def advance(leaves: Any, books: Any, buffers: Any, grads: Any) -> State:
        step, indices, kept = buffers.step, buffers.indices, buffers.importance
        if decay is not None:
            kept = {path: _running(kept[path], grads[path], step, decay) for path in kept}
        if begin:
            books, indices = lax.cond(
                step + 1 == begin, lambda: fitted(leaves, kept), lambda: (books, indices)
            )
        if every is not None:
            due = (step + 1 > begin) & ((step + 1 - begin) % every == 0)
            indices = lax.cond(due, lambda: assigned(leaves, books), lambda: indices)
        step = jnp.asarray(optax.safe_increment(step))
        return State(books, buffers.replace(step=step, indices=indices, importance=kept))

    def update(params: Params, state: State, grads: Params) -> State:
        if decay is not None and grads is None:
            raise ValueError("importance_decay needs gradients: update(params, state, grads)")
        leaves = leaves_of(params, state)
        taken = None if decay is None else tree_lib.take(grads, leaves)
        return advance(leaves, state.learned, state.buffers, taken)

    def pack(params: Params, state: State) -> Any:
        return params if int(state.buffers.step) < begin else pack_nearest(params, state, layout)

    return Compression(init, apply, update, pack)


def begun(leaves: tree_lib.Leaves, layout: Layout) -> Any:
    """:class:`ShareBuffers` of step 0; raises for leaves that a layout does not fit.

    Example:
        >>> begun(tree_lib.Leaves(a=jnp.ones((2, 2))), Layout(2)).shapes
        (('a', (2, 2)),)
    """
    layouts.check_leaves(leaves, layout)
    shapes = tuple((path, tuple(leaf.shape)) for path, leaf in leaves.items())
    return ShareBuffers(jnp.zeros((), jnp.int32), {}, {}, shapes)


def leaves_of(params: Params, state: State) -> tree_lib.Leaves:
    """The leaves that a state was made for; raises where they are not of the shapes it saw.

    Example:
        >>> params = {"kernel": jnp.ones((2, 2))}
        >>> list(leaves_of(params, train(1).init(params)))
        ['kernel']
    """
    shapes = {p: jax.ShapeDtypeStruct(shape, jnp.float32) for p, shape in state.buffers.shapes}
    return tree_lib.take_like(params, shapes)


def owners_of(state: State, layout: Layout) -> dict[str, str]:
    """The path that each leaf's codebook lives under in ``state.learned``.

    Example:
        >>> params = {"a": jnp.ones((2, 2)), "c": jnp.ones((2, 2))}
        >>> owners_of(train(1, scope="model").init(params), Layout(1, "model"))
        {'a': 'a', 'c': 'a'}
    """
    return layouts.owners([path for path, _ in state.buffers.shapes], layout)


def pack_nearest(params: Params, state: State, layout: Layout) -> Any:
    """Pack the indices that a state holds, or those of the nearest entries where it holds none.

    Example:
        >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
        >>> pack_nearest(params, straight_through(2).init(params), Layout(2))["kernel"].decode()
        Array([[1., 2.]], dtype=float32)
    """
    news, of = {}, owners_of(state, layout)
    for path, leaf in leaves_of(params, state).items():
        # NumPy's float64 is a dtype that JAX may not have, and no file with it could be loaded.
        leaf = jnp.asarray(leaf)
        book, held = state.learned[of[path]], state.buffers.indices.get(path)
        indices = layouts.assign(leaf, book, layout) if held is None else held
        news[path] = layouts.packed(leaf, book, indices, layout)
    return tree_lib.replace(params, news)


def checked(layout: Layout, begin: int) -> Layout:
    """The layout itself; raises for options that make no sense.

    Example:
        >>> checked(Layout(4), begin=-1)
        Traceback (most recent call last):
        ...
        ValueError: begin must be a step from 0 on, not -1
    """
    layouts.check_layout(layout)
    check_count("begin", begin, least=-(1 << 31))
    if begin < 0:
        raise ValueError(f"begin must be a step from 0 on, not {begin}")
    return layout


def _check_decay(begin: int, decay: float | None) -> None:
    if decay is None:
        return
    check_amount("importance_decay", decay)
    if decay >= 1:
        raise ValueError(f"importance_decay must be below 1, not {decay}")
    if begin == 0:
        raise ValueError("importance_decay needs gradients: begin at step 1 or later")


def _running(kept: Array, gradient: Array, step: Array, decay: float) -> Array:
    """A running mean; early gradients weigh alike, so that it needs no correction."""
    fresh = jnp.maximum(1 - decay, 1 / (step + 1).astype(jnp.float32))
    return kept + fresh * (gradient.astype(jnp.float32) ** 2 - kept)
