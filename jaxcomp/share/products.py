"""Shared vectors: product quantization and residual codebooks of leaves, and their training."""

import dataclasses
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import VectorCodebookArray
from jaxcomp.arrays.blocks import Blocks, narrow
from jaxcomp.arrays.codebook import MAX_CLUSTERS
from jaxcomp.arrays.vector_codebook import lookup_vectors, split_vectors
from jaxcomp.checks import check_count, check_key
from jaxcomp.compression import Compression, Params
from jaxcomp.model.trace import ModelTrace
from jaxcomp.sharding import automatic, spec_like
from jaxcomp.share.fixed import SharingRule, fixed_sharing
from jaxcomp.share.residual import fit_stages


@dataclasses.dataclass(frozen=True)
class VectorFormat:
    """Which vectors of a leaf share what.

    A weight costs ``stages * ceil(log2 clusters) / length`` bits, and the leaf ``stages * clusters
    * length`` floats of codebook, times the number of sub-spaces with ``per_space``.

    Attributes:
        clusters: entries of a codebook, 1 to 65,536.
        length: weights of a vector, which lie behind each other along the axis.
        stages: entries that are added: 1 is product quantization, more a residual codebook.
        axis: which one is cut. None: the last one that the model sums over, if a trace is given;
            without, -2, the inputs of kernels as JAX libraries lay them out.
        per_space: a codebook of its own for each place along the axis, as in product quantization
            of vectors; by default all vectors of a leaf share.

    Example:
        >>> VectorFormat(clusters=256, length=8)
        VectorFormat(clusters=256, length=8, stages=1, axis=None, per_space=False)
    """

    clusters: int = 256
    length: int = 8
    stages: int = 1
    axis: Any = None
    per_space: Any = False

    def __post_init__(self) -> None:
        for name in ("clusters", "length", "stages"):
            check_count(name, getattr(self, name))
        if self.axis is not None:
            check_count("axis", self.axis, least=-(1 << 31))
        if not isinstance(self.per_space, bool):
            raise TypeError(f"per_space must be True or False, not {self.per_space!r:.60}")
        if self.clusters > MAX_CLUSTERS:
            raise ValueError(f"clusters must be 1 to {MAX_CLUSTERS}, not {self.clusters}")


def vector_codebook(
    x: Any,
    format: Any,
    *,
    key: Any,
    importance: Any = None,
    iterations: Any = 25,
    sweeps: Any = 10,
) -> VectorCodebookArray:
    """Replace an array by indices into codebooks of vectors, found by k-means.

    Args:
        x: weights, floating; at least two axes, or one and ``format.axis=0``.
        format: what shares.
        key: one PRNG key, from which k-means starts.
        importance: what an error of each weight costs, at least 0: an array that broadcasts to the
            weights' shape, such as the diagonal of a Hessian, or of the second moments of the
            inputs as ``(inputs, 1)``. None: all the same.
        iterations: Lloyd steps of a stage at most.
        sweeps: of joint refinement over the stages.

    Returns:
        A leaf of ``stages * ceil(log2 clusters) / length`` bits a weight beside its codebooks,
        which are float32. Zeros are values like any other; :func:`train_vectors` keeps them.

    Raises:
        TypeError: no floating array, no key.
        ValueError: NaN or infinite values, no elements, an axis that the length does not divide,
            more clusters than vectors; importance that does not fit, or is negative, NaN or
            infinite.

    Example:
        >>> x = jnp.array([[0.0, 5.0], [1.0, 6.0], [5.0, 0.0], [6.0, 1.0]])
        >>> leaf = vector_codebook(x, VectorFormat(clusters=2, length=2), key=jax.random.key(0))
        >>> leaf
        VectorCodebookArray(shape=(4, 2), dtype=float32, 2 shared vectors of 2, 18 bytes)
        >>> bool((leaf.decode() == x).all())
        True

    Source: Jégou et al., "Product quantization for nearest neighbor search", 2011; Gong et al.,
    "Compressing deep convolutional networks using vector quantization", 2014, section 3.2.
    """
    _check_format(format)
    tree_lib.check_weight("x", x)
    check_key(key)
    check_count("iterations", iterations, 0)
    check_count("sweeps", sweeps, 0)
    blocks = _blocks("x", x, format, None)
    x = jnp.asarray(x)
    weight = _importance("x", x, importance)
    books, indices = _fit(x, weight, key, format, blocks, iterations, sweeps)
    return VectorCodebookArray.from_indices(indices, books, blocks, x.dtype)


def vector_codebooks(
    params: Params,
    format: Any,
    *,
    key: Any,
    importance: Mapping[str, Any] | None = None,
    trace: ModelTrace | None = None,
) -> Any:
    """:func:`vector_codebook` of every weight of a tree; its zeros stay zero, at a bit a weight.

    Args:
        params: a tree, or a selection of one.
        format: what shares.
        key: one PRNG key; each leaf draws its own, by its path.
        importance: by path, see :func:`vector_codebook`; leaves not named count all weights alike.
        trace: of the model; says which axis is cut.

    Returns:
        The tree with compressed leaves.

    Raises:
        TypeError: as :func:`vector_codebook`.
        ValueError: likewise, with the leaf's path; importance for a path that is no weight.

    Example:
        >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4), "bias": jnp.zeros(4)}
        >>> vector_codebooks(params, VectorFormat(2, 2), key=jax.random.key(0))["kernel"]
        VectorCodebookArray(shape=(4, 4), dtype=float32, 2 shared vectors of 2, masked, 22 bytes)
    """
    method = train_vectors(format, key=key, importance=importance, trace=trace)
    return method.pack(params, method.init(params))


def train_vectors(
    format: Any,
    *,
    key: Any,
    begin: int = 0,
    importance: Mapping[str, Any] | None = None,
    trace: ModelTrace | None = None,
) -> Compression:
    """Share vectors of weights from a step on, and train the codebooks.

    At step ``begin`` every leaf is fitted as by :func:`vector_codebook`, weights that are zero
    left out. From then on the forward pass sees the codebooks' entries; indices stay, and each
    entry is trained by the gradient summed over its members. A weight that is zero in this method's
    input is zero in its output, whenever it was removed.

    Args:
        format: what shares.
        key: one PRNG key; each leaf draws its own, by its path.
        begin: the step from which on vectors are shared; dense before.
        importance: by path, see :func:`vector_codebook`.
        trace: of the model; says which axis is cut.

    Returns:
        A method; it packs to :class:`VectorCodebookArray` from step ``begin`` on, with a bit a
        weight where zeros must be told apart. ``state.learned`` holds the codebooks,
        ``(stages, spaces, clusters, length)``. Its ``init`` raises as :func:`vector_codebooks`.

    Raises:
        TypeError: arguments of other kinds.
        ValueError: ``begin`` is negative.

    Example:
        >>> method = train_vectors(VectorFormat(clusters=1, length=2), key=jax.random.key(0))
        >>> params = {"kernel": jnp.array([[1.0, 3.0], [2.0, 4.0]])}
        >>> method.apply(params, method.init(params))["kernel"]
        Array([[2., 2.],
               [3., 3.]], dtype=float32)

    Source: Stock et al., "And the bit goes down: revisiting the quantization of neural networks",
    ICLR 2020, section 3.3 (codewords trained by the gradient averaged over their members).
    """
    _check_format(format)
    if trace is not None and not isinstance(trace, ModelTrace):
        raise TypeError(f"trace must come from jaxcomp.model.trace, not {trace!r:.60}")
    check_key(key)
    known = dict(importance or {})

    def check(path: str, leaf: Any) -> None:
        _blocks(path, leaf, format, trace)
        _importance(path, leaf, known.get(path))

    def fit(path: str, leaf: Any) -> tuple[Array, Array]:
        weight = (leaf != 0).astype(jnp.float32)
        if path in known:
            weight = weight * _importance(path, leaf, known[path])
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return _fit(leaf, weight, own, format, _blocks(path, leaf, format, trace), 25, 10)

    def blocks_of(leaf: Any, indices: Any) -> Blocks:
        # The axis that is cut shows in the grid of the indices; a length of 1 cuts none.
        grid = indices.shape[1:]
        cut = [axis for axis in range(-leaf.ndim, 0) if leaf.shape[axis] != grid[axis]]
        return ((format.length, cut[0] if cut else -1),)

    def show(leaf: Any, books: Any, indices: Any) -> Any:
        blocks = blocks_of(leaf, indices)
        dense = lookup_vectors(books, indices, blocks, out=spec_like(leaf, leaf.shape))
        return narrow(dense, leaf.dtype, clipped=True)

    def encode(leaf: Any, books: Any, indices: Any, keep: Any) -> VectorCodebookArray:
        blocks = blocks_of(leaf, indices)
        return VectorCodebookArray.from_indices(indices, books, blocks, leaf.dtype, keep)

    method = fixed_sharing(SharingRule(check, fit, show, encode), begin)

    def init(params: Params) -> Any:
        missing = [path for path in known if path not in tree_lib.flatten(params)]
        if missing:
            near = tree_lib.nearest(missing[0], tree_lib.flatten(params))
            raise ValueError(f"importance names '{missing[0]}', which is no leaf; {near}")
        return method.init(params)

    return method._replace(init=init)


def _check_format(format: Any) -> None:
    if not isinstance(format, VectorFormat):
        raise TypeError(f"format must be a share.VectorFormat, not {format!r:.60}")


def _fit(
    x: Any, weight: Any, key: Any, format: VectorFormat, blocks: Blocks, steps: int, sweeps: int
) -> tuple[Array, Array]:
    spec = PartitionSpec(None, *spec_like(x, _grid(x.shape, blocks)))
    fit = partial(_fit_alone, format=format, blocks=blocks, iterations=steps, sweeps=sweeps)
    return automatic(fit, out=(PartitionSpec(), spec))(x, weight, key)


@partial(jax.jit, static_argnames=("format", "blocks", "iterations", "sweeps"))
def _fit_alone(
    x: Any,
    weight: Any,
    key: Any,
    format: VectorFormat,
    blocks: Blocks,
    iterations: int,
    sweeps: int,
) -> tuple[Array, Array]:
    """Codebooks ``(stages, spaces, clusters, d)``, and indices ``(stages, *grid)``."""
    ((_, axis),) = blocks

    def problems(x: Any) -> Any:
        vectors = split_vectors(x, blocks)
        if format.per_space:
            return jnp.moveaxis(vectors, axis - 1, 0).reshape(vectors.shape[axis - 1], -1, *d)
        return vectors.reshape(1, -1, *d)

    d = (format.length,)
    books, indices = fit_stages(
        problems(x),
        format.clusters,
        format.stages,
        key=key,
        importance=None if weight is None else problems(weight),
        iterations=iterations,
        sweeps=sweeps,
    )
    grid = _grid(x.shape, blocks)
    indices = jnp.moveaxis(indices, 0, 1)
    if format.per_space:
        # `(stages, spaces, vectors)`: the cut axis goes back to its place.
        others = [n for at, n in enumerate(grid) if at - len(grid) != axis]
        indices = jnp.moveaxis(indices.reshape(format.stages, grid[axis], *others), 1, axis)
    return jnp.moveaxis(books, 0, 1), indices.reshape(format.stages, *grid)


def _grid(shape: tuple[int, ...], blocks: Blocks) -> tuple[int, ...]:
    """How many vectors there are along each axis."""
    grid = list(shape)
    for length, axis in blocks:
        grid[axis] //= length
    return tuple(grid)


def _blocks(path: str, leaf: Any, format: VectorFormat, trace: ModelTrace | None) -> Blocks:
    """How a leaf is cut, once it is clear that it can be."""
    axis = format.axis
    if axis is None:
        inputs = () if trace is None else trace.input_axes(path)
        axis = inputs[-1] if inputs else -2
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(
            f"{path}: shape {tuple(leaf.shape)} has no axis {axis}: name one with "
            "VectorFormat(axis=...), or leave this leaf out with a None rule"
        )
    axis = axis - leaf.ndim if axis >= 0 else axis
    if leaf.shape[axis] % format.length:
        raise ValueError(
            f"{path}: axis {axis} of shape {tuple(leaf.shape)} does not divide into vectors of "
            f"{format.length}: choose a length that divides {leaf.shape[axis]}, another axis, or "
            "leave this leaf out with a None rule"
        )
    count = (
        leaf.size // format.length // (leaf.shape[axis] // format.length if format.per_space else 1)
    )
    if format.clusters > count:
        raise ValueError(
            f"{path}: {format.clusters} clusters for {count} vectors: ask for at most {count}, "
            "or leave this leaf out with a None rule"
        )
    return ((format.length, axis),)


def _importance(path: str, leaf: Any, given: Any) -> Any:
    """What each weight's error costs, in the leaf's shape; None if nothing was given."""
    if given is None:
        return None
    given = jnp.asarray(given, jnp.float32)
    try:
        fits = jnp.broadcast_shapes(given.shape, leaf.shape) == tuple(leaf.shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{path}: importance of shape {given.shape} does not broadcast to {tuple(leaf.shape)}"
        )
    if not isinstance(given, Tracer):
        with jax.ensure_compile_time_eval():
            if not bool(jnp.all(jnp.isfinite(given) & (given >= 0))):
                raise ValueError(f"{path}: importance must be finite and at least 0 everywhere")
    return jnp.broadcast_to(given, leaf.shape)
