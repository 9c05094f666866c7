"""The canonical decomposition of a tensor: a sum of outer products, one vector an axis."""

import math
import string
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxcomp.checks import check_amount, check_count, check_key


def canonical(
    tensor: Float[Any, "..."],
    rank: int,
    key: Any = None,
    iterations: int = 100,
    damping: float = 1e-6,
) -> tuple[Float[Array, "_ rank"], ...]:
    """Factors whose outer products add up to a tensor as nearly as they can, by ALS.

    Each factor in turn is the least-squares solution for the others. A tensor may have no best
    approximation of a rank: terms then grow without bound and cancel. Two things keep that away:
    the length of each term is shared equally by its vectors in every turn, and each solution is
    damped, which bounds how long terms can grow. What is returned is the best turn.

    Args:
        tensor: two axes or more; computed in float32.
        rank: how many terms; at least 1.
        key: for the noise on the leading singular vectors of each axis, where it begins, and for
            vectors beyond them; None: ``jax.random.key(0)``.
        iterations: turns through all axes, at least 1.
        damping: what is added to each system, in means of its diagonal.

    Returns:
        A factor ``(size, rank)`` an axis, float32.

    Raises:
        ValueError: fewer than two axes, no elements, a rank or number out of range.
        TypeError: something is no number, or no key.

    Example:
        >>> tensor = jnp.einsum("i,j,k->ijk", jnp.arange(3.0), jnp.ones(2), jnp.arange(4.0))
        >>> a, b, c = canonical(tensor, 1)
        >>> bool(jnp.allclose(jnp.einsum("ir,jr,kr->ijk", a, b, c), tensor, atol=1e-4))
        True

    Source: Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned
    CP-Decomposition", 2015; De Silva and Lim, "Tensor rank and the ill-posedness of the best
    low-rank approximation problem", 2008, for degeneracy.
    """
    if tensor.ndim < 2 or 0 in tensor.shape:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has no such factors")
    check_count("rank", rank)
    check_count("iterations", iterations)
    check_amount("damping", damping)
    key = jax.random.key(0) if key is None else key
    check_key(key)
    return alternate(jnp.asarray(tensor), rank, key, iterations, damping)


@partial(jax.jit, static_argnums=(1, 3))
def alternate(
    tensor: Array, rank: int, key: Any, iterations: int, damping: Any
) -> tuple[Array, ...]:
    """:func:`canonical` without its checks.

    Args:
        tensor: as there.
        rank: as there.
        key: as there.
        iterations: as there.
        damping: as there.
    """
    tensor = tensor.astype(jnp.float32)
    norm = jnp.linalg.norm(tensor.ravel())
    tensor = tensor / jnp.where(norm > 0, norm, 1)
    axes = range(tensor.ndim)
    start = tuple(_start(tensor, axis, rank, jax.random.fold_in(key, axis)) for axis in axes)

    def turn(_: Any, carry: Any) -> Any:
        factors, best, least = carry
        for axis in axes:
            factors = _solved(tensor, factors, axis, damping)
        factors = _balanced(factors)
        error = jnp.sum((tensor - product(factors)) ** 2)
        better = error < least
        best = tuple(jnp.where(better, new, old) for new, old in zip(factors, best, strict=True))
        return factors, best, jnp.minimum(error, least)

    zeros = tuple(jnp.zeros_like(factor) for factor in start)
    # Nothing at all is the worst that is ever returned.
    begin = (start, zeros, jnp.sum(tensor**2))
    _, best, _ = lax.fori_loop(0, iterations, turn, begin)
    return tuple(factor * norm ** (1 / tensor.ndim) for factor in best)


def product(factors: tuple[Array, ...]) -> Array:
    """The sum of outer products.

    Example:
        >>> product((jnp.ones((2, 1)), jnp.ones((3, 1)))).shape
        (2, 3)
    """
    letters = string.ascii_lowercase[: len(factors)]
    equation = f"{','.join(letter + 'z' for letter in letters)}->{letters}"
    return jnp.einsum(equation, *factors, precision=_FULL, optimize="optimal")


_FULL = lax.Precision.HIGHEST


def _start(tensor: Array, axis: int, rank: int, key: Any) -> Array:
    """Leading singular vectors of an unfolding, and random ones where there are no more."""
    matrix = jnp.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    gram = jnp.matmul(matrix, matrix.T, precision=_FULL)
    vectors = jnp.linalg.eigh(gram)[1][:, ::-1][:, :rank]
    missing = rank - vectors.shape[1]
    vectors = jnp.pad(vectors, ((0, 0), (0, max(missing, 0))))
    # Singular vectors of a symmetric tensor may be a saddle, which noise leaves.
    noise = jax.random.normal(key, vectors.shape) / np.sqrt(len(vectors))
    return vectors + jnp.where(jnp.arange(rank) < rank - missing, 0.1, 1.0) * noise


def _solved(
    tensor: Array, factors: tuple[Array, ...], axis: int, damping: Any
) -> tuple[Array, ...]:
    """One factor anew, from the others."""
    letters = string.ascii_lowercase[: tensor.ndim]
    others = [at for at in range(tensor.ndim) if at != axis]
    terms = ",".join([letters, *(f"{letters[at]}z" for at in others)])
    seen = jnp.einsum(
        f"{terms}->{letters[axis]}z",
        tensor,
        *(factors[at] for at in others),
        precision=_FULL,
        optimize="optimal",
    )
    grams = [jnp.matmul(factors[at].T, factors[at], precision=_FULL) for at in others]
    system = math.prod(grams[1:], start=grams[0])
    size = jnp.mean(jnp.diagonal(system))
    # A term that has died has nothing on its diagonal.
    floor = jnp.maximum(damping * size, 1e-12)
    system = system + floor * jnp.eye(len(system), dtype=jnp.float32)
    solved = jax.scipy.linalg.solve(system, seen.T, assume_a="pos").T
    solved = jnp.where(jnp.isfinite(solved), solved, factors[axis])
    return (*factors[:axis], solved, *factors[axis + 1 :])


def _balanced(factors: tuple[Array, ...]) -> tuple[Array, ...]:
    """Vectors of a term all of one length."""
    norms = [jnp.linalg.norm(factor, axis=0) for factor in factors]
    length = jnp.exp(sum(jnp.log(jnp.maximum(norm, 1e-30)) for norm in norms) / len(norms))
    alive = math.prod((norm > 0 for norm in norms[1:]), start=norms[0] > 0)
    return tuple(
        factor / jnp.where(norm > 0, norm, 1) * jnp.where(alive, length, 0)
        for factor, norm in zip(factors, norms, strict=True)
    )
