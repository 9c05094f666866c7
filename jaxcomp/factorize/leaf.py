"""One leaf factorized: its rank, its factors, and what is left over."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomp.arrays import CompressedArray, LowRankArray, LowRankSumArray
from jaxcomp.factorize.cp_tensor import alternate
from jaxcomp.factorize.rules import Factoring, LowRank, from_sides, numbers_of, to_sides
from jaxcomp.factorize.svd_matrix import (
    rank_for_energy,
    singular_values,
    truncate,
    truncate_whitened,
)
from jaxcomp.factorize.tucker_tensor import decompose

# ``encode(array) -> compressed leaf`` of the same shape and dtype.
Encoder = Callable[[Any], CompressedArray]
_TURNS = 10


def rank_of(
    rule: LowRank, factoring: Factoring, leaf: Any, moment: Any = None, damping: Any = 1e-6
) -> Any:
    """The rank that a rule comes to for a leaf.

    Args:
        rule: for the leaf.
        factoring: of the leaf.
        leaf: the weights; needed for an energy only.
        moment: ``(*groups, features, features)``, or None; for split ``"matrix"``.
        damping: see :func:`~jaxcomp.factorize.whitened_svd_matrix`.

    Returns:
        A whole number; two with ``"tucker"``. A given rank is handed on as it is, however large.

    Example:
        >>> from jaxcomp.factorize.rules import factoring_of, flax_form
        >>> leaf = jnp.diag(jnp.array([3.0, 1.0, 0.0]))
        >>> rank_of(LowRank(energy=0.9), factoring_of(flax_form((3, 3)), "matrix"), leaf)
        1
    """
    if rule.energy is None:
        if factoring.split != "tucker" or isinstance(rule.rank, tuple):
            return rule.rank if factoring.split == "tucker" else _single(rule.rank)
        return (rule.rank, rule.rank)
    sides = to_sides(factoring, leaf)
    if factoring.split != "tucker":
        seen = None if moment is None else moment.reshape(-1, *moment.shape[-2:])
        return rank_for_energy(np.asarray(singular_values(sides, seen, damping)), rule.energy)
    _, inputs, window, outputs = sides.shape
    down = singular_values(sides.reshape(-1, inputs, window * outputs))
    up = singular_values(sides.reshape(-1, inputs * window, outputs))
    a, b = (rank_for_energy(np.asarray(values), rule.energy) for values in (down, up))
    # Of ranks further apart than the window is large, some is left unused.
    return min(a, window * b), min(b, window * a)


def _single(rank: Any) -> int:
    # Two ranks are for convolutions; what has no window takes the smaller.
    return min(rank) if isinstance(rank, tuple) else rank


def obstacle_to(factoring: Factoring, rank: Any) -> str | None:
    """Why a rank leaves the leaf as it is, or None.

    Args:
        factoring: of the leaf.
        rank: from :func:`rank_of`.

    Example:
        >>> from jaxcomp.factorize.rules import factoring_of, flax_form
        >>> obstacle_to(factoring_of(flax_form((3, 3)), "matrix"), 2)
        'rank 2 saves nothing: 12 numbers, dense 9'
    """
    pair = isinstance(rank, tuple)
    name = f"ranks {rank[0]} and {rank[1]}" if pair else f"rank {rank}"
    numbers, dense = numbers_of(factoring, rank), int(np.prod(factoring.shape))
    if numbers >= dense:
        return f"{name} saves nothing: {numbers:,} numbers, dense {dense:,}"
    if factoring.split == "tucker":
        inputs, window, outputs = factoring.sizes
        a, b = rank
        if a > min(inputs, window * b) or b > min(outputs, window * a):
            return f"{name} cannot be those of {inputs} inputs and {outputs} outputs"
    return None


def factorize_leaf(
    factoring: Factoring, leaf: Any, rank: Any, moment: Any = None, damping: Any = 1e-6
) -> LowRankArray:
    """The factors of a leaf.

    Args:
        factoring: of the leaf.
        leaf: the weights.
        rank: one that the leaf can have, see :func:`rank_of`.
        moment: for split ``"matrix"``: of what the leaf is multiplied with, or None.
        damping: see :func:`~jaxcomp.factorize.whitened_svd_matrix`.

    Returns:
        A leaf whose factors are of the weights' dtype.

    Example:
        >>> from jaxcomp.factorize.rules import factoring_of, flax_form
        >>> factorize_leaf(factoring_of(flax_form((3, 4)), "matrix"), jnp.ones((3, 4)), 1)
        LowRankArray(shape=(3, 4), dtype=float32, rank 1, 28 bytes)
    """
    leaf = jnp.asarray(leaf)
    factors = factors_of(factoring, leaf, rank, moment, damping)
    factors = tuple(factor.astype(leaf.dtype) for factor in factors)
    return LowRankArray.from_factors(factors, factoring.equation, leaf.dtype)


@partial(jax.jit, static_argnums=(0, 2))
def factors_of(
    factoring: Factoring, leaf: Any, rank: Any, moment: Any = None, damping: Any = 1e-6
) -> tuple[Any, ...]:
    """The factors alone, in float32.

    Args:
        factoring: as for :func:`factorize_leaf`.
        leaf: as there.
        rank: as there.
        moment: as there.
        damping: as there.
    """
    sides = to_sides(factoring, leaf)
    if factoring.split == "tucker":
        # One kernel at a time: a stack takes no more memory than its largest.
        found = lax.map(lambda kernel: decompose(kernel, tuple(rank), _TURNS), sides)
    elif factoring.split == "cp":
        key = jax.random.key(0)
        found = lax.map(lambda kernel: alternate(kernel, rank, key, 10 * _TURNS, 1e-6), sides)
        found = (*found[:-1], jnp.swapaxes(found[-1], -1, -2))
    elif moment is None:
        found = truncate(sides, rank)
    else:
        seen = moment.reshape(-1, *moment.shape[-2:])
        found = truncate_whitened(sides, seen, rank, damping)
    return from_sides(factoring, tuple(found))


def with_residual(
    factoring: Factoring,
    leaf: Any,
    rank: Any,
    encode: Encoder,
    iterations: int = 5,
    moment: Any = None,
    damping: Any = 1e-6,
) -> LowRankSumArray:
    """A leaf as a product of factors plus whatever an encoder makes of the rest.

    Each in turn is found for what the other leaves over; the turn of the least error is kept. With
    the largest weights as encoder that is GoDec, with a quantizer LQ-LoRA's initialisation.

    Args:
        factoring: of the leaf.
        leaf: the weights.
        rank: as for :func:`factorize_leaf`.
        encode: of a float32 array of the leaf's shape; what it returns must be a plain leaf.
        iterations: turns, at least 1.
        moment: as there; the error is then that of the outputs.
        damping: as there.

    Returns:
        The sum.

    Raises:
        TypeError: the encoder returns no compressed leaf.
        ValueError: one of another shape.

    Source: Zhou and Tao, "GoDec: Randomized Low-rank & Sparse Matrix Decomposition in Noisy Case",
    2011, for sparse rests; Guo et al., "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for
    Efficient Language Model Finetuning", 2024, Algorithm 1, for quantized ones.
    """
    leaf = jnp.asarray(leaf)
    wide = leaf.astype(jnp.float32)
    rest = jnp.zeros_like(wide)
    best, least = None, np.inf
    for _ in range(iterations):
        low = factorize_leaf(factoring, (wide - rest).astype(leaf.dtype), rank, moment, damping)
        low = dataclasses.replace(low, dense_dtype=jnp.float32)
        inner = encode(wide - low.decode())
        check_encoded(inner, leaf)
        both = LowRankSumArray(low, inner, leaf.dtype)
        rest = inner.decode().astype(jnp.float32)
        error = float(_error(factoring, wide - low.decode() - rest, moment))
        if error < least:
            best, least = both, error
    if best is None:
        raise ValueError("the encoder makes NaN or infinite values of what is left over")
    return best


def check_encoded(inner: Any, leaf: Any) -> None:
    """Raise unless an encoder made a compressed leaf of the right shape.

    Args:
        inner: what it made.
        leaf: what it was to be like.

    Raises:
        TypeError: it is no compressed leaf.
        ValueError: it has another shape.
    """
    if not isinstance(inner, CompressedArray):
        raise TypeError(
            f"residual must return a compressed leaf, such as quantize.encode makes, not "
            f"{type(inner).__name__}"
        )
    if tuple(inner.shape) != tuple(leaf.shape):
        raise ValueError(f"residual made {inner.shape} of a leaf of shape {tuple(leaf.shape)}")


def _error(factoring: Factoring, change: Any, moment: Any) -> Any:
    if moment is None:
        return jnp.sum(change**2)
    sides = to_sides(factoring, change)
    seen = moment.reshape(-1, *moment.shape[-2:])
    return jnp.sum(sides * jnp.matmul(seen, sides, precision=lax.Precision.HIGHEST))
