"""Kernel patterns: kernels of a convolution share a few shapes, each with a scale of its own."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, UInt

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import RescaledArray, VectorCodebookArray
from jaxcomp.arrays.blocks import Blocks, narrow
from jaxcomp.arrays.vector_codebook import lookup_vectors, split_vectors
from jaxcomp.checks import check_count, check_key
from jaxcomp.compression import Compression
from jaxcomp.kernels.vector_kmeans import fit_vectors, nearest_vectors
from jaxcomp.sharding import automatic, spec_like
from jaxcomp.share.fixed import SharingRule, fixed_sharing

# A pattern and its opposite are told apart by an index of 16 bits while they are looked for.
MAX_PATTERNS = 1 << 15
# How Flax and Haiku lay convolutions out: (height, width, inputs, outputs).
WINDOW = (-4, -3)


def kernel_patterns(
    x: Any, patterns: Any, *, key: Any, axes: Any = WINDOW, iterations: Any = 25
) -> RescaledArray:
    """Replace each kernel of a convolution by one of a few patterns times a scale of its own.

    Args:
        x: weights, floating.
        patterns: how many there are, 1 to 32,768, at most the number of kernels.
        key: one PRNG key, from which k-means starts.
        axes: those that make up one kernel, from the end and ascending; the default is that of
            ``(height, width, inputs, outputs)``. Each position of all others is a kernel.
        iterations: of the fit.

    Returns:
        A leaf of ``ceil(log2 patterns)`` bits and one float32 scale a kernel, beside the patterns,
        which have a length of 1; a scale may be negative.

    Raises:
        TypeError: no floating array, no key.
        ValueError: NaN or infinite values, no elements, axes that the weights lack, more patterns
            than kernels.

    Example:
        >>> edge = jnp.array([[1.0, 0.0], [0.0, -1.0]])[:, :, None, None]
        >>> x = jnp.concatenate([edge, 2 * edge, -3 * edge], axis=-1)
        >>> leaf = kernel_patterns(x, 1, key=jax.random.key(0))
        >>> bool(jnp.abs(leaf.decode() - x).max() < 1e-6)
        True

    Source: Son, Nah and Lee, "Clustering convolutional kernels to compress deep neural networks",
    ECCV 2018, section 3 (k-means of normalized kernels, and a scale for each).
    """
    _check(patterns, key, axes)
    check_count("iterations", iterations, 0)
    tree_lib.check_weight("x", x)
    blocks = _blocks("x", x, patterns, axes)
    x = jnp.asarray(x)
    learned, indices = _fit(x, key, patterns, blocks, iterations)
    return _encode(x, learned, indices, None, blocks)


def train_kernel_patterns(
    patterns: Any, *, key: Any, begin: Any = 0, axes: Any = WINDOW
) -> Compression:
    """Share kernels from a step on, and train the patterns and the scales.

    At step ``begin`` every leaf is fitted as by :func:`kernel_patterns`. From then on each kernel
    keeps its pattern; patterns are trained by the gradient summed over their kernels, each times
    its scale, and scales by that along their pattern. A weight that is zero in this method's input
    is zero in its output. Aim it at convolutions with :func:`jaxcomp.partition`.

    Args:
        patterns: of each leaf, 1 to 32,768.
        key: one PRNG key.
        begin: the step from which on kernels are shared; dense before.
        axes: those that make up one kernel, see :func:`kernel_patterns`.

    Returns:
        A method; it packs to :class:`RescaledArray` of :class:`VectorCodebookArray` from step
        ``begin`` on. ``state.learned`` holds ``{"patterns", "scale"}`` of each leaf. Its ``init``
        raises as :func:`kernel_patterns`, with the leaf's path.

    Raises:
        TypeError: no key, no whole number.
        ValueError: numbers out of range.

    Example:
        >>> method = train_kernel_patterns(2, key=jax.random.key(0))
        >>> params = {"kernel": jnp.ones((3, 3, 4, 8))}
        >>> method.init(params).learned["kernel"]["scale"].shape
        (1, 1, 4, 8)
    """
    _check(patterns, key, axes)
    blocks_of = lambda path, leaf: _blocks(path, leaf, patterns, axes)

    def check(path: str, leaf: Any) -> None:
        blocks_of(path, leaf)

    def fit(path: str, leaf: Any) -> tuple[Any, Array]:
        return _fit(leaf, key, patterns, blocks_of(path, leaf), 25)

    def show(leaf: Any, learned: Any, indices: Any) -> Any:
        spec = spec_like(leaf, leaf.shape)
        blocks = blocks_of("leaf", leaf)
        dense = lookup_vectors(learned["patterns"], indices, blocks, out=spec)
        product = lambda dense, scale: narrow(dense * scale, leaf.dtype, clipped=True)
        return automatic(product, out=spec)(dense, learned["scale"])

    def encode(leaf: Any, learned: Any, indices: Any, keep: Any) -> RescaledArray:
        return _encode(leaf, learned, indices, keep, blocks_of("leaf", leaf))

    return fixed_sharing(SharingRule(check, fit, show, encode), begin)


def fit_lines(
    x: Float[Array, "n d"], clusters: int, *, key: Any, iterations: int = 25
) -> tuple[Float32[Array, "clusters d"], UInt[Array, " n"], Float32[Array, " n"]]:
    """Vectors as multiples of a few directions.

    K-means of the normalized vectors up to their sign, then alternating least squares of all
    vectors: each takes the direction that it is nearest to a multiple of and its multiple, and each
    direction is fitted to its members, given their multiples.

    Args:
        x: vectors in rows.
        clusters: how many directions.
        key: one PRNG key.
        iterations: of each of both; static.

    Returns:
        Directions of length 1, which of them, and the multiple, of each vector. No step raises the
        error; a direction without members stays.

    Example:
        >>> x = jnp.array([[3.0, 4.0], [-6.0, -8.0]])
        >>> direction, index, scale = fit_lines(x, 1, key=jax.random.key(0))
        >>> bool(jnp.allclose(direction[index] * scale[:, None], x))
        True
    """
    fit = partial(_fit_lines, clusters=clusters, iterations=iterations)
    return automatic(fit)(x, key)


@partial(jax.jit, static_argnames=("clusters", "iterations"))
def _fit_lines(x: Array, key: Any, clusters: int, iterations: int) -> tuple[Array, Array, Array]:
    x = x.astype(jnp.float32)
    # Squares of weights that are far from 1 would leave float32.
    _, exponent = jnp.frexp(jnp.abs(x).max())
    x = jnp.ldexp(x, -exponent)
    directions = _unit(x)
    # A first guess of the sign: that of the largest element.
    largest = jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), 1)[:, None], 1)
    folded = directions * jnp.where(largest < 0, -1.0, 1.0)
    weight = jnp.broadcast_to((x * x).sum(1, keepdims=True), x.shape)
    start = fit_vectors(folded, clusters, key=key, importance=weight, iterations=iterations)

    def assign(lines: Array) -> tuple[Array, Array]:
        # The nearest of all directions and their opposites is that of the greatest multiple.
        found = nearest_vectors(directions, jnp.concatenate([lines, -lines])).astype(jnp.int32)
        index = found % clusters
        return index, (x * lines[index]).sum(1)

    def improve(_: Any, lines: Array) -> Array:
        index, scale = assign(lines)
        total = jax.ops.segment_sum(x * scale[:, None], index, clusters)
        return jnp.where(jnp.abs(total).max(1, keepdims=True) > 0, _unit(total), lines)

    lines = lax.fori_loop(0, iterations, improve, _unit(start))
    index, scale = assign(lines)
    dtype = jnp.uint8 if clusters <= 256 else jnp.uint16
    return lines, index.astype(dtype), jnp.ldexp(scale, exponent)


def _unit(x: Array) -> Array:
    """Rows of length 1; the first axis for a row of zeros."""
    largest = jnp.abs(x).max(1, keepdims=True)
    scaled = x / jnp.where(largest > 0, largest, 1)
    length = jnp.sqrt((scaled * scaled).sum(1, keepdims=True))
    first = (jnp.arange(x.shape[1]) == 0).astype(x.dtype)
    return jnp.where(largest > 0, scaled / jnp.where(length > 0, length, 1), first)


def _fit(x: Any, key: Any, patterns: int, blocks: Blocks, iterations: int) -> tuple[Any, Array]:
    grid = list(x.shape)
    for _, axis in blocks:
        grid[axis] = 1
    spec = spec_like(x, tuple(grid))

    def fit(x: Array, key: Any) -> Any:
        vectors = split_vectors(x, blocks)
        flat = vectors.reshape(-1, vectors.shape[-1])
        lines, index, scale = fit_lines(flat, patterns, key=key, iterations=iterations)
        learned = {"patterns": lines[None, None], "scale": scale.reshape(grid)}
        return learned, index.reshape(1, *grid)

    out = ({"patterns": PartitionSpec(), "scale": spec}, PartitionSpec(None, *spec))
    return automatic(fit, out=out)(x, key)


def _encode(leaf: Any, learned: Any, indices: Any, keep: Any, blocks: Blocks) -> RescaledArray:
    inner = VectorCodebookArray.from_indices(
        indices, learned["patterns"], blocks, jnp.float32, keep
    )
    return RescaledArray(inner, learned["scale"], leaf.dtype)


def _check(patterns: Any, key: Any, axes: Any) -> None:
    check_key(key)
    check_count("patterns", patterns)
    if patterns > MAX_PATTERNS:
        raise ValueError(f"patterns is {patterns}: at most {MAX_PATTERNS} are told apart")
    if not isinstance(axes, tuple) or not axes:
        raise TypeError(f"axes must be a tuple of axes, such as (-4, -3), not {axes!r:.60}")
    for axis in axes:
        check_count("axes", axis, least=-(1 << 31))
    if list(axes) != sorted(set(axes)) or axes[-1] >= 0:
        raise ValueError(f"axes must be negative and ascending, such as (-4, -3), not {axes}")


def _blocks(path: str, leaf: Any, patterns: int, axes: tuple[int, ...]) -> Blocks:
    """The whole of each axis that makes up a kernel, once it is clear that there is one."""
    if -axes[0] > leaf.ndim:
        raise ValueError(
            f"{path}: shape {tuple(leaf.shape)} has no axes {axes}: name those of one kernel with "
            "axes=..., or leave this leaf out with a None rule"
        )
    blocks = tuple((leaf.shape[axis], axis) for axis in axes)
    kernels = leaf.size
    for size, _ in blocks:
        kernels //= size
    if patterns > kernels:
        raise ValueError(
            f"{path}: {patterns} patterns for {kernels} kernels: ask for at most {kernels}, "
            "or leave this leaf out with a None rule"
        )
    return blocks
