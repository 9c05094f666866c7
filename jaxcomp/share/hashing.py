"""Hashed sharing: weights of one bucket share a value, and a hash says which (HashedNets)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import HashedArray
from jaxcomp.arrays.blocks import narrow
from jaxcomp.arrays.hashed import MAX_SEED, hash_places, lookup_hashed
from jaxcomp.checks import check_count, is_number
from jaxcomp.compression import Compression
from jaxcomp.sharding import automatic, spec_like
from jaxcomp.share.fixed import SharingRule, fixed_sharing
from jaxcomp.share.layouts import check_importance


def hashed(x: Any, buckets: int, *, seed: int = 0, importance: Any = None) -> HashedArray:
    """Replace an array by the values of buckets that its weights are hashed to.

    Each bucket takes the least-squares value, the mean of its members times their signs. Members
    have nothing in common but the hash, so little of trained weights is left: what is meant is to
    train on, or from the start (:func:`train_hashed`).

    Args:
        x: weights, floating, at least one axis.
        buckets: how many values are stored, 1 to the number of weights.
        seed: 0 to 2^32 - 1; which of the hash functions.
        importance: what an error of each weight costs, at least 0, of the weights' shape; None: all
            the same. Weights of none count nothing in their bucket.

    Returns:
        A leaf of ``buckets`` floats, whatever its size.

    Raises:
        TypeError: no floating array, no whole numbers.
        ValueError: NaN or infinite values, no elements, numbers out of range, importance of another
            shape, negative, NaN or infinite.

    Example:
        >>> leaf = hashed(jnp.array([[1.0, 2.0, 3.0], [5.0, 7.0, 8.0]]), buckets=4)
        >>> leaf.buckets
        Array([ 4.,  3., -2.,  0.], dtype=float32)

    Source: Chen et al., "Compressing neural networks with the hashing trick", ICML 2015, section 4.
    """
    tree_lib.check_weight("x", x)
    _check_seed(seed)
    check_count("buckets", buckets)
    if buckets > x.size:
        raise ValueError(f"{buckets} buckets for {x.size} weights: ask for at most {x.size}")
    if importance is not None:
        check_importance({"x": importance}, {"x": x})
    x = jnp.asarray(x)
    values = _fit(x, importance, buckets, seed)
    return HashedArray.from_buckets(values, tuple(x.shape), seed, x.dtype)


def train_hashed(fraction: float, *, seed: int = 0, begin: int = 0) -> Compression:
    """Hash weights to buckets from a step on, and train the buckets.

    At step ``begin`` each bucket takes the least-squares value of its members, those that are zero
    left out. From then on the forward pass sees the buckets, and each is trained by the gradient
    summed over its members, each with its sign. A weight that is zero in this method's input is
    zero in its output, whenever it was removed.

    Args:
        fraction: buckets for each weight, above 0 and at most 1: ``round(fraction * weights)`` of a
            leaf, at least 1.
        seed: 0 to 2^32 - 1; which of the hash functions. Leaves share it, not their buckets.
        begin: the step from which on weights are shared; dense before.

    Returns:
        A method; it packs to :class:`HashedArray` from step ``begin`` on, with a bit a weight where
        zeros must be told apart. ``state.learned`` holds the buckets of each leaf.

    Raises:
        TypeError: no numbers.
        ValueError: numbers out of range.

    Example:
        >>> method = train_hashed(0.5)
        >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 5.0]])}
        >>> state = method.init(params)
        >>> state.learned["kernel"].shape
        (2,)

    Source: Chen et al., "Compressing neural networks with the hashing trick", ICML 2015, section
    4.3 (the gradient of a bucket).
    """
    if not is_number(fraction):
        raise TypeError(f"fraction must be a number above 0, not {fraction!r:.60}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, but must be above 0 and at most 1")
    _check_seed(seed)

    def check(path: str, leaf: Any) -> None:
        if leaf.size >= 1 << 31:
            raise ValueError(f"{path}: {leaf.size} weights: places below 2^31 can be hashed")

    def fit(path: str, leaf: Any) -> tuple[Array, tuple[()]]:
        del path
        buckets = max(1, round(float(fraction) * leaf.size))
        return _fit(leaf, (leaf != 0).astype(jnp.float32), buckets, seed), ()

    def show(leaf: Any, buckets: Any, codes: Any) -> Any:
        del codes
        dense = lookup_hashed(buckets, leaf.shape, seed, out=spec_like(leaf, leaf.shape))
        return narrow(dense, leaf.dtype, clipped=True)

    def encode(leaf: Any, buckets: Any, codes: Any, keep: Any) -> HashedArray:
        del codes
        return HashedArray.from_buckets(buckets, tuple(leaf.shape), seed, leaf.dtype, keep)

    return fixed_sharing(SharingRule(check, fit, show, encode), begin)


def _fit(x: Any, weight: Any, buckets: int, seed: int) -> Array:
    def means(x: Array, weight: Any) -> Array:
        place, sign = hash_places(x.shape, buckets, seed)
        x = x.astype(jnp.float32)
        weight = jnp.ones_like(x) if weight is None else weight.astype(jnp.float32)
        add = lambda values: jax.ops.segment_sum(values.ravel(), place.ravel(), buckets)
        mass = add(weight)
        # Scaled before it is summed, so that nothing overflows on the way.
        share = weight / jnp.where(mass > 0, mass, 1)[place]
        return add(share * sign * x)

    return automatic(jax.jit(means), out=PartitionSpec())(x, weight)


def _check_seed(seed: Any) -> None:
    check_count("seed", seed, 0)
    if seed > MAX_SEED:
        raise ValueError(f"seed is {seed}: at most {MAX_SEED} is a 32-bit number")
