"""What is removed together inside one leaf: single weights, N:M runs, blocks, channels, kernels.

A structure cuts a leaf into *units*. A unit's score is the mean of its weights' scores, so that
units of different sizes compare weight for weight. :class:`NM` and ``Element(within=...)`` are
*local*: their units compete in small groups, each of which loses the same number.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt32

from jaxcomp.kernels.threshold import smallest_masks
from jaxcomp.sharding import automatic, spec_like


class Element(NamedTuple):
    """Single weights.

    Attributes:
        within: None where all weights of the leaf compete; otherwise only those at the same
            position of these axes do. A kernel (input, output) with ``within=-1`` loses the same
            number of weights at each output.

    Example:
        >>> from jaxcomp.prune.masks import masks
        >>> scores = {"kernel": jnp.array([[1.0, 7.0], [2.0, 8.0]])}
        >>> masks(scores, 0.5, Element(within=-1))["kernel"]
        Array([[False, False],
               [ True,  True]], dtype=bool)
    """

    within: int | tuple[int, ...] | None = None


class NM(NamedTuple):
    """``n`` of each ``m`` neighbours along an axis stay: 2:4 is ``NM(2, 4)``.

    Attributes:
        n: how many stay.
        m: neighbours a run; divides the axis.
        axis: by default the input axis of Linen's and NNX's kernels.

    Example:
        >>> from jaxcomp.prune.masks import masks
        >>> masks({"kernel": jnp.array([[1.0], [4.0], [3.0], [2.0]])}, structure=NM(2, 4))
        {'kernel': Array([[False],
               [ True],
               [ True],
               [False]], dtype=bool)}
    """

    n: int
    m: int
    axis: int = -2


class Block(NamedTuple):
    """Tiles of the trailing axes.

    Attributes:
        shape: of a tile; each size divides its axis.

    Example:
        >>> pool(Block((1, 2)), jnp.array([[1.0, 3.0, 5.0, 5.0]]))
        Array([[2., 5.]], dtype=float32)
    """

    shape: tuple[int, ...]


class Channel(NamedTuple):
    """All weights at one position of an axis (of several axes: at one position of each).

    They become zero where they stand; :func:`jaxcomp.prune.channels` makes the model smaller.

    Attributes:
        axis: by default the output axis of Linen's and NNX's kernels.

    Example:
        >>> pool(Channel(-1), jnp.array([[1.0, 3.0], [5.0, 5.0]]))
        Array([3., 4.], dtype=float32)
    """

    axis: int | tuple[int, ...] = -1


class Kernel(NamedTuple):
    """Whole windows of a convolution: one unit for each pair of input and output channel.

    Attributes:
        axes: of the window; the first two of Linen's and NNX's two-dimensional convolutions.

    Example:
        >>> pool(Kernel(), jnp.ones((3, 3, 1, 2)))
        Array([[1., 1.]], dtype=float32)
    """

    axes: tuple[int, ...] = (0, 1)


Structure = Element | NM | Block | Channel | Kernel


def is_local(structure: Structure) -> bool:
    """Whether units compete in groups of their own, each of which loses the same number.

    Example:
        >>> is_local(NM(2, 4)), is_local(Element()), is_local(Element(within=-1))
        (True, False, True)
    """
    return isinstance(structure, NM) or (
        isinstance(structure, Element) and structure.within is not None
    )


def check_structure(path: str, structure: Any, shape: tuple[int, ...]) -> None:
    """Raise unless a structure fits a leaf.

    Args:
        path: of the leaf, for the message.
        structure: the structure.
        shape: of the leaf.

    Raises:
        TypeError: it is no structure.
        ValueError: an axis that the leaf lacks or that is named twice, sizes that do not tile it.

    Example:
        >>> check_structure("kernel", NM(2, 4), (6, 8))
        Traceback (most recent call last):
        ...
        ValueError: kernel: NM(n=2, m=4, axis=-2) needs an axis divisible by 4, but axis -2 of ...
    """
    if isinstance(structure, Structure):
        _check_integers(path, structure)
    if isinstance(structure, NM):
        _check_runs(path, structure, shape)
    elif isinstance(structure, Block):
        sizes = structure.shape
        if not sizes or len(sizes) > len(shape) or any(size < 1 for size in sizes):
            raise ValueError(
                f"{path}: {structure} does not fit shape {shape}: give 1 to {len(shape)} sizes"
            )
        for axis, size in enumerate(sizes, len(shape) - len(sizes)):
            if shape[axis] % size:
                raise ValueError(
                    f"{path}: {structure} does not tile shape {shape}: axis {axis} of size "
                    f"{shape[axis]} is no multiple of {size}; choose sizes that divide it, or "
                    "leave this leaf out with a None rule"
                )
    elif isinstance(structure, (Element, Channel, Kernel)):
        axes = _own_axes(structure)
        if isinstance(structure, Element) and structure.within is None:
            return
        if any(not -len(shape) <= axis < len(shape) for axis in axes):
            raise ValueError(f"{path}: {structure} names an axis that shape {shape} lacks")
        if len({axis % len(shape) for axis in axes}) != len(axes) or axes == ():
            raise ValueError(f"{path}: {structure} must name different axes, at least one")
    else:
        raise TypeError(
            f"{path}: {structure!r} is no structure: give Element(), NM(2, 4), Block((8, 8)), "
            "Channel(-1) or Kernel((0, 1))"
        )


def _check_integers(path: str, structure: Structure) -> None:
    for name, value in structure._asdict().items():
        if value is None and isinstance(structure, Element):
            continue
        several = isinstance(value, (tuple, list)) and not isinstance(structure, NM)
        must_be_several = isinstance(structure, (Block, Kernel))
        numbers: Any = value if several else (value,)
        whole = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in numbers)
        if not whole or (must_be_several and not several):
            wanted = "a tuple of whole numbers" if must_be_several else "whole"
            raise TypeError(f"{path}: {name} of {structure} must be {wanted}, not {value!r:.60}")


def _check_runs(path: str, structure: NM, shape: tuple[int, ...]) -> None:
    if not 1 <= structure.n < structure.m:
        raise ValueError(f"{path}: {structure} must keep 1 to m - 1 of m, such as NM(2, 4)")
    if not -len(shape) <= structure.axis < len(shape):
        raise ValueError(f"{path}: {structure} names an axis that shape {shape} lacks")
    if shape[structure.axis] % structure.m:
        raise ValueError(
            f"{path}: {structure} needs an axis divisible by {structure.m}, but axis "
            f"{structure.axis} of shape {shape} has size {shape[structure.axis]}: choose another "
            "axis, or leave this leaf out with a None rule"
        )


def units_shape(structure: Structure, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a leaf's units; a local structure's are the single weights.

    Args:
        structure: one that fits the leaf.
        shape: of the leaf.

    Example:
        >>> units_shape(Block((2, 4)), (3, 4, 8)), units_shape(Channel(-1), (3, 4, 8))
        ((3, 2, 2), (8,))
    """
    if isinstance(structure, Block):
        lead = len(shape) - len(structure.shape)
        tiles = zip(shape[lead:], structure.shape, strict=True)
        return (*shape[:lead], *(size // tile for size, tile in tiles))
    if isinstance(structure, (Channel, Kernel)):
        return tuple(shape[axis] for axis in _unit_axes(structure, len(shape)))
    return shape


def pool(structure: Structure, x: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """The mean of each unit, in float32.

    Args:
        structure: one that fits the leaf.
        x: one number a weight, such as scores.

    Returns:
        float32 of :func:`units_shape`.

    Example:
        >>> pool(Channel(0), jnp.array([[1.0, 3.0], [5.0, 5.0]]))
        Array([2., 5.], dtype=float32)
    """
    x = x.astype(jnp.float32)
    if isinstance(structure, Block):
        return automatic(lambda x: jnp.mean(_tiled(structure, x), _tile_axes(structure, x.ndim)))(x)
    if isinstance(structure, (Channel, Kernel)):
        units = _unit_axes(structure, x.ndim)
        return jnp.mean(x, tuple(axis for axis in range(x.ndim) if axis not in units))
    return x


def spread(structure: Structure, units: Array, like: Array) -> Array:
    """Give each weight what its unit has.

    Args:
        structure: one that fits the leaf.
        units: one value a unit, of :func:`units_shape`, any dtype.
        like: the leaf: its shape, and on a mesh its placement.

    Returns:
        An array of the leaf's shape.

    Example:
        >>> spread(Channel(-1), jnp.array([True, False]), jnp.ones((2, 2)))
        Array([[ True, False],
               [ True, False]], dtype=bool)
    """
    shape = like.shape
    if isinstance(structure, Block):

        def untiled(units: Array) -> Array:
            for axis, size in zip(range(-len(structure.shape), 0), structure.shape, strict=True):
                units = jnp.repeat(units, size, axis)
            return units

        return automatic(untiled, out=spec_like(like, shape))(units)
    if isinstance(structure, (Channel, Kernel)):
        axes = _unit_axes(structure, len(shape))
        sizes = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
        return automatic(
            lambda units: jnp.broadcast_to(units.reshape(sizes), shape), out=spec_like(like, shape)
        )(units)
    return units


def local_masks(structure: Structure, keys: UInt32[Array, "..."], count: Any) -> Array:
    """Masks of a local structure: each group loses its ``count`` lowest, the first of equals first.

    Args:
        structure: :class:`NM` or ``Element(within=...)``.
        keys: of one leaf's scores, from :func:`~jaxcomp.kernels.threshold.sortable_bits`.
        count: how many each group loses, an integer scalar; may be traced.

    Returns:
        Booleans of the leaf's shape, True where kept.

    Example:
        >>> keys = jnp.array([[1, 1, 3, 2]], jnp.uint32)
        >>> local_masks(NM(1, 2, axis=-1), keys, 1)
        Array([[False,  True,  True, False]], dtype=bool)
    """
    function = _of_runs if isinstance(structure, NM) else _of_groups
    masks = automatic(
        lambda keys, count: function(structure, keys, count), out=spec_like(keys, keys.shape)
    )
    return masks(keys, jnp.asarray(count, jnp.uint32))


def _of_runs(structure: Any, keys: Array, count: Array) -> Array:
    axis, m = structure.axis % keys.ndim, structure.m
    shape = (*keys.shape[:axis], keys.shape[axis] // m, m, *keys.shape[axis + 1 :])
    runs = keys.reshape(shape)
    this, other = jnp.expand_dims(runs, axis + 2), jnp.expand_dims(runs, axis + 1)
    place = jnp.arange(m)
    earlier = (place < place[:, None]).reshape(m, m, *[1] * (keys.ndim - axis - 1))
    before = (other < this) | ((other == this) & earlier)
    return (jnp.sum(before, axis + 2, dtype=jnp.uint32) >= count).reshape(keys.shape)


def _of_groups(structure: Any, keys: Array, count: Array) -> Array:
    within = [axis % keys.ndim for axis in _own_axes(structure)]
    front = jnp.moveaxis(keys, within, range(len(within)))
    rows = front.reshape(math.prod(front.shape[: len(within)]), -1)
    kept = jax.vmap(lambda row: smallest_masks((row,), count)[0])(rows)
    return jnp.moveaxis(kept.reshape(front.shape), range(len(within)), within)


def group_size(structure: Structure, shape: tuple[int, ...]) -> int:
    """How many weights compete in one group of a local structure.

    Example:
        >>> group_size(NM(2, 4), (8, 3)), group_size(Element(within=-1), (8, 3))
        (4, 8)
    """
    if isinstance(structure, NM):
        return structure.m
    assert isinstance(structure, Element)
    others = {axis % len(shape) for axis in _own_axes(structure)}
    return math.prod(size for axis, size in enumerate(shape) if axis not in others)


def _own_axes(structure: Element | Channel | Kernel) -> tuple[int, ...]:
    """The axes that an Element, a Channel or a Kernel names."""
    (named,) = structure
    if named is None:
        return ()
    return (named,) if isinstance(named, int) else tuple(named)


def _unit_axes(structure: Channel | Kernel, ndim: int) -> tuple[int, ...]:
    """The axes along which a leaf has several units, in order."""
    own = sorted(axis % ndim for axis in _own_axes(structure))
    if isinstance(structure, Channel):
        return tuple(own)
    return tuple(axis for axis in range(ndim) if axis not in own)


def _tiled(structure: Block, x: Array) -> Array:
    lead = x.ndim - len(structure.shape)
    sizes = zip(x.shape[lead:], structure.shape, strict=True)
    return x.reshape(*x.shape[:lead], *(n for size, tile in sizes for n in (size // tile, tile)))


def _tile_axes(structure: Block, ndim: int) -> tuple[int, ...]:
    lead = ndim - len(structure.shape)
    return tuple(lead + 2 * axis + 1 for axis in range(len(structure.shape)))
