"""Soft assignment to centroids, annealed to a hard one: differentiable k-means.

A weight w attends to each centroid c_k in proportion to exp(-(w - c_k)² / t): the temperature t
makes it the mean of all or the nearest alone. Sums over centroids run one centroid after the other,
forward and backward, so that nothing of weights times centroids is ever held.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_amount, check_count
from jaxcomp.compression import Compression, Params, State
from jaxcomp.sharding import automatic, spec_like
from jaxcomp.share import layouts
from jaxcomp.share.layouts import Layout
from jaxcomp.share.training import begun, checked, leaves_of, owners_of, pack_nearest


def attend(
    weights: Float[Array, "*dims"], codebook: Float[Array, " clusters"], temperature: Any
) -> Float[Array, "*dims"]:
    """The mean of the centroids that each weight attends to, by its squared distances to them.

    Differentiable in the weights and the codebook; the temperature is a constant.

    Args:
        weights: any shape; computed in float32.
        codebook: K centroids, in any order; entry 0 is for pruned weights alone if it is exactly
            0.0 and not the only one: nothing attends to it.
        temperature: above 0, in squared units of the weights; may be traced.

    Returns:
        float32, in the shape of the weights. Memory is a few arrays of that shape, whatever K.

    Raises:
        TypeError: the temperature is no number.
        ValueError: it is not above 0, or the codebook has no entries or more than one axis.

    Example:
        >>> attend(jnp.array([1.5, 2.0]), jnp.array([1.0, 3.0]), 2.0).round(2)
        Array([1.54, 2.  ], dtype=float32)

    Source: Cho et al., "DKM: differentiable k-means clustering layer for neural network
    compression", ICLR 2022, section 3.2, with squared distances.
    """
    if codebook.ndim != 1 or not codebook.size:
        raise ValueError(f"a codebook of shape {codebook.shape}: give a row of one entry or more")
    if not isinstance(temperature, jax.Array):
        _check_temperature(temperature)
    wide = weights.astype(jnp.float32)
    codebook = codebook.astype(jnp.float32)
    closed = (np.arange(codebook.shape[0]) == 0) & (codebook == 0) & (codebook.shape[0] > 1)
    return _attend(wide, codebook, lax.stop_gradient(jnp.float32(temperature)), closed)


@jax.custom_vjp
def _attend(w: Array, codebook: Array, temperature: Array, closed: Array) -> Array:
    return _attend_forward(w, codebook, temperature, closed)[0]


def _squared(w: Array, entry: tuple[Array, Array]) -> Array:
    return jnp.where(entry[1], jnp.inf, (w - entry[0]) ** 2)


def _attend_forward(w: Array, codebook: Array, temperature: Array, closed: Array) -> Any:
    entries = codebook, closed
    least = lambda best, entry: (jnp.minimum(best, _squared(w, entry)), None)
    best, _ = lax.scan(least, jnp.full_like(w, jnp.inf), entries)

    def add(sums: tuple[Array, Array], entry: tuple[Array, Array]) -> tuple[Any, None]:
        share = jnp.exp((best - _squared(w, entry)) / temperature)
        return (sums[0] + share * entry[0], sums[1] + share), None

    (total, share), _ = lax.scan(add, (jnp.zeros_like(w), jnp.zeros_like(w)), entries)
    seen = total / share
    return seen, (w, codebook, temperature, closed, best, share, seen)


def _attend_backward(kept: Any, cotangent: Array) -> Any:
    w, codebook, temperature, closed, best, total, seen = kept

    def add(slope: Array, entry: tuple[Array, Array]) -> tuple[Array, Array]:
        share = jnp.exp((best - _squared(w, entry)) / temperature) / total
        # How the log of the share grows with the weight, times what it moves.
        growth = 2 * (entry[0] - w) / temperature * (entry[0] - seen)
        # Far beyond what is attended to it may overflow, and 0 times infinity is NaN.
        growth = jnp.where(share > 0, growth, 0)
        return slope + share * growth, jnp.sum(cotangent * share * (1 - growth))

    slope, by_entry = lax.scan(add, jnp.zeros_like(w), (codebook, closed))
    return cotangent * slope, by_entry, jnp.zeros_like(temperature), None


_attend.defvjp(_attend_forward, _attend_backward)


def soft(
    clusters: int,
    begin: int = 0,
    *,
    end: int,
    temperature: tuple[float, float] = (1.0, 0.01),
    scope: str = "leaf",
    axis: int | None = None,
    group_size: int = 1,
    start: str | None = None,
    key: Any = None,
) -> Compression:
    """Attend to centroids softly, ever more sharply, and from a step on take the nearest alone.

    At step ``begin`` weights are clustered by k-means. Until ``end`` the forward pass sees, for
    each weight, the mean of the centroids by its attention to them (see :func:`attend`), whose
    gradient trains the weights, which so choose their centroids, and the centroids. From ``end`` on
    each weight is its nearest centroid, and centroids alone are trained. In the paper centroids are
    iterated means of the weights that attend to them; here they begin as means and are trained.
    What is zero stays zero, as with :func:`train`.

    Args:
        clusters: as for :func:`train`.
        begin: likewise.
        end: the step from which on assignments are hard; above ``begin``.
        temperature: at ``begin`` and at ``end``, geometric between, in squares of the mean distance
            between neighbouring centroids; above 0.
        scope: as for :func:`train`.
        axis: likewise.
        group_size: likewise.
        start: likewise.
        key: likewise.

    Returns:
        A method. It packs to :class:`CodebookArray` from step ``end`` on, and dense before.

    Raises:
        TypeError: as :func:`train`; ``temperature`` is not two numbers.
        ValueError: likewise; ``end`` is not above ``begin``, or a temperature not above 0.

    Example:
        >>> method = soft(clusters=2, end=1)
        >>> params = {"kernel": jnp.array([[0.0, 0.0, 1.0], [1.0, 1.5, 3.0]])}
        >>> state = method.init(params)
        >>> method.apply(params, state)["kernel"].round(2)
        Array([[0.  , 0.  , 1.62],
               [1.62, 1.62, 1.62]], dtype=float32)

    Source: Cho et al., "DKM: differentiable k-means clustering layer for neural network
    compression", ICLR 2022, section 3.
    """
    layout = checked(Layout(clusters, scope, axis, group_size, start, key), begin)
    check_count("end", end, least=begin + 1)
    first, last = _checked_temperatures(temperature)

    def temperature_at(step: Array) -> Array:
        part = jnp.clip((step - begin) / np.float32(end - begin), 0.0, 1.0)
        return first * (last / first) ** part

    @jax.jit
    def see(leaf: Array, book: Array, step: Array) -> Array:
        def attending() -> Array:
            seen = _attend_leaf(leaf, book, temperature_at(step), layout).astype(leaf.dtype)
            return jnp.where(leaf == 0, jnp.zeros((), leaf.dtype), seen)

        def nearest() -> Array:
            return layouts.shared(leaf, book, layouts.assign(leaf, book, layout), layout)

        return lax.cond(step < end, attending, nearest)

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        buffers = begun(leaves, layout)
        make = layouts.fit if begin == 0 else layouts.blank
        return State(make(leaves, layout), buffers)

    def apply(params: Params, state: State) -> Params:
        news, of, step = {}, owners_of(state, layout), state.buffers.step
        for path, leaf in leaves_of(params, state).items():
            seen = see(leaf, state.learned[of[path]], step)
            news[path] = jnp.where(step >= begin, seen, leaf) if begin else seen
        return tree_lib.replace(params, news)

    @jax.jit
    def advance(leaves: Any, books: Any, buffers: Any) -> State:
        step = jnp.asarray(optax.safe_increment(buffers.step))
        if begin:
            fresh = lambda: layouts.fit(leaves, layout)
            books = lax.cond(step == begin, fresh, lambda: books)
        return State(books, buffers.replace(step=step))

    def update(params: Params, state: State, grads: Params) -> State:
        del grads
        return advance(leaves_of(params, state), state.learned, state.buffers)

    def pack(params: Params, state: State) -> Any:
        step = int(state.buffers.step)
        if step < begin:
            return params
        return apply(params, state) if step < end else pack_nearest(params, state, layout)

    return Compression(init, apply, update, pack)


def _checked_temperatures(temperature: Any) -> tuple[float, float]:
    if not isinstance(temperature, (tuple, list)) or len(temperature) != 2:
        raise TypeError(f"temperature must be two numbers, at begin and end, not {temperature!r}")
    for value in temperature:
        _check_temperature(value)
    return float(temperature[0]), float(temperature[1])


def _check_temperature(value: Any) -> None:
    check_amount("temperature", value)
    if value == 0:
        raise ValueError("temperature is 0: it must be above 0, such as 0.01")


def _attend_leaf(leaf: Array, book: Array, temperature: Array, layout: Layout) -> Array:
    def one(x: Array, book: Array, temperature: Array) -> Array:
        fixed = lax.stop_gradient(book)
        gap = (fixed.max() - fixed.min()) / max(layout.clusters - 1, 1)
        # All centroids alike are no scale: any temperature will do.
        return attend(x, book, temperature * jnp.where(gap > 1e-18, gap * gap, 1.0))

    def whole(x: Array, book: Array, temperature: Array) -> Array:
        if layout.axis is None:
            return one(x, book, temperature)
        each = jax.vmap(one, (0, 0, None))
        return layouts.unrows(each(layouts.rows(x, layout), book, temperature), x.shape, layout)

    out = spec_like(leaf, leaf.shape)
    return automatic(whole, out=out)(leaf, book, temperature)
