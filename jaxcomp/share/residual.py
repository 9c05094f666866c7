"""Codebooks of several stages: vectors are sums, one entry of each stage (additive codebooks)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt

from jaxcomp.kernels.vector_kmeans import fit_vectors, nearest_vectors
from jaxcomp.sharding import automatic


def fit_stages(
    x: Float[Array, "*batch n d"],
    clusters: int,
    stages: int,
    *,
    key: Any,
    importance: Float[Array, "*batch n d"] | None = None,
    iterations: int = 25,
    sweeps: int = 10,
) -> tuple[Float32[Array, "*batch stages clusters d"], UInt[Array, "*batch stages n"]]:
    """Codebooks whose entries add up to vectors, and which entries.

    Each stage is k-means of what those before it leave (residual quantization). Then sweeps over
    the stages: each is fitted once more to what *all* others leave, first its indices, then its
    entries, which are least squares given all indices; no such step raises the error.

    Args:
        x: vectors in rows, one problem for each position of the leading axes.
        clusters: entries a stage.
        stages: how many entries are added; static.
        key: one PRNG key.
        importance: what an error of each element costs, see
            :func:`jaxcomp.kernels.vector_kmeans.fit_vectors`.
        iterations: Lloyd steps of a stage; static.
        sweeps: over all stages, if there are more than one; static.

    Returns:
        Codebooks, and indices of each stage.

    Raises:
        ValueError: sizes out of range.

    Example:
        >>> x = jnp.array([[0.0], [1.0], [10.0], [11.0]])
        >>> books, indices = fit_stages(x, 2, 2, key=jax.random.key(0))
        >>> sorted(sum_stages(books, indices)[:, 0].tolist())
        [0.0, 1.0, 10.0, 11.0]

    Source: Chen et al., "Approximate nearest neighbor search by residual vector quantization",
    2010; Babenko and Lempitsky, "Additive quantization", 2014 (alternating refinement).
    """
    if stages < 1 or sweeps < 0:
        raise ValueError(f"stages={stages}, sweeps={sweeps}: at least 1 and 0 are needed")
    fit = partial(_fit, clusters=clusters, stages=stages, iterations=iterations, sweeps=sweeps)
    return automatic(fit)(x, importance, key)


def sum_stages(
    codebooks: Float[Array, "*batch stages clusters d"], indices: UInt[Array, "*batch stages n"]
) -> Float[Array, "*batch n d"]:
    """The vectors that indices of all stages stand for.

    Example:
        >>> sum_stages(jnp.array([[[1.0]], [[2.0]]]), jnp.zeros((2, 1), jnp.uint8))
        Array([[3.]], dtype=float32)
    """
    total = jnp.zeros((), codebooks.dtype)
    for stage in range(codebooks.shape[-3]):
        total = total + _take(codebooks[..., stage, :, :], indices[..., stage, :])
    return total


def _take(codebook: Array, indices: Array) -> Array:
    return jnp.take_along_axis(codebook, indices.astype(jnp.int32)[..., None], -2)


@partial(jax.jit, static_argnames=("clusters", "stages", "iterations", "sweeps"))
def _fit(
    x: Array, importance: Any, key: Any, clusters: int, stages: int, iterations: int, sweeps: int
) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    rest, books, indices = x, [], []
    for one in jax.random.split(key, stages):
        book = fit_vectors(rest, clusters, key=one, importance=importance, iterations=iterations)
        index = nearest_vectors(rest, book, importance)
        rest = rest - _take(book, index)
        books.append(book)
        indices.append(index)

    def sweep(_: Any, found: Any) -> Any:
        books, indices = map(list, found)
        for stage in range(stages):
            others = [_take(books[i], indices[i]) for i in range(stages) if i != stage]
            target = x - sum(others)
            books[stage] = fit_vectors(
                target, clusters, key=key, importance=importance, iterations=1, start=books[stage]
            )
            indices[stage] = nearest_vectors(target, books[stage], importance)
        return books, indices

    if stages > 1:
        books, indices = lax.fori_loop(0, sweeps, sweep, (books, indices))
    return jnp.stack(books, -3), jnp.stack(indices, -2)
