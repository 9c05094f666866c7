"""What a weight is multiplied by, as samples × features in the leaf's own order.

A dot, a convolution and a look-up each hold the other operand in their own way. Here all become
``(groups, ..., features)``, with the features in the order in which the leaf's own input axes
follow each other, whatever transposes and reshapes lie between.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import GatherScatterMode

from jaxcomp.model.uses import Use


class Samples(NamedTuple):
    """How to take the samples of a use.

    Attributes:
        features: how many.
        groups: shape of the leading axes that have a value each: the leaf's batch axes, then the
            groups of a grouped convolution; empty without.
        take: from the values that the operation reads to ``(prod(groups), ..., features)``, without
            the first axis if ``groups`` is empty; row numbers if ``rows``.
        rows: whether the samples are one-hot and ``take`` gives the places of their ones.
    """

    features: int
    groups: tuple[int, ...]
    take: Callable[[tuple[Any, ...]], jax.Array]
    rows: bool = False


class Unobservable(Exception):
    """A use has no samples; the message says why."""


def of_use(use: Use, shape: Sequence[int], patches: bool) -> Samples:
    """How to take the samples of a use.

    Args:
        use: from :func:`jaxcomp.model.uses.find_uses`.
        shape: the leaf's.
        patches: whether a convolution's features are kernel × channels, or channels.

    Returns:
        The samples.

    Raises:
        Unobservable: there are none, or not in the order of the leaf.
    """
    if "other" in use.roles and use.kind in ("dot", "conv", "gather"):
        axis = use.roles.index("other")
        raise Unobservable(f"its axis {axis} is reduced or mixed with others before {use.op}")
    if use.kind == "dot":
        return _dot(use, shape)
    if use.kind == "conv":
        return _conv(use, shape, patches)
    if use.kind == "gather":
        return _lookup(use, shape)
    if use.op.name == "output":
        raise Unobservable("it is returned as it is")
    # An element-wise product is left out too: LayerNorm multiplies its scale by 1 / deviation in
    # one library and by the normalized channels in the next, so the value would say nothing.
    raise Unobservable(f"{use.op} contracts nothing with it")


def _dot(use: Use, shape: Sequence[int]) -> Samples:
    contracted, batch = use.op.params["dimension_numbers"]
    mine, other = use.operand, 1 - use.operand
    _check_numeric(use, other)
    sizes = use.op.inputs[mine].shape
    leaf_batch = _with_role(use, "batch")
    touched = _touched(use, leaf_batch)
    grouped = [i for i, axis in enumerate(batch[mine]) if axis in touched]
    order = _order(use, shape, _with_role(use, "input"), contracted[mine], sizes)
    group_order = _order(use, shape, leaf_batch, [batch[mine][i] for i in grouped], sizes)
    front = [batch[other][i] for i in grouped]
    back = list(contracted[other])
    rank = len(use.op.inputs[other].shape)
    middle = [axis for axis in range(rank) if axis not in (*front, *back)]

    def take(inputs: tuple[Any, ...]) -> jax.Array:
        x = jnp.transpose(inputs[other], (*front, *middle, *back))
        return _arrange(x, len(front), len(back), group_order if groups else None, order)

    groups = tuple(shape[axis] for axis in leaf_batch)
    return Samples(len(order), groups, take)


def _lookup(use: Use, shape: Sequence[int]) -> Samples:
    leaf_axes = _with_role(use, "input")
    axes = sorted(_touched(use, leaf_axes))
    if len(leaf_axes) != 1 or len(axes) != 1 or "batch" in use.roles:
        raise Unobservable(f"{use.op} looks it up along more axes than one")
    order = _order(use, shape, leaf_axes, axes, use.op.inputs[0].shape)
    if not np.array_equal(order, np.arange(order.size)):
        raise Unobservable(f"its rows are read by {use.op} in another order than they are stored")
    (axis,) = axes
    if use.op.params["slice_sizes"][axis] != 1:
        raise Unobservable(f"it is read by {use.op} in runs of several rows")
    rows = order.size
    if use.op.name == "dynamic_slice":
        return Samples(
            rows, (), lambda inputs: jnp.clip(jnp.ravel(inputs[1 + axis]), 0, rows - 1), True
        )
    along = tuple(use.op.params["dimension_numbers"].start_index_map)
    clip = use.op.params["mode"] == GatherScatterMode.CLIP
    if axis not in along or (len(along) > 1 and not clip):
        raise Unobservable(f"{use.op} looks it up along more axes than one")

    def take(inputs: tuple[Any, ...]) -> jax.Array:
        # Along any other axis the whole is taken, so that a clipped index has no say there.
        ids = inputs[1][..., along.index(axis)]
        return jnp.clip(ids, 0, rows - 1) if clip else ids

    return Samples(rows, (), take, rows=True)


def _conv(use: Use, shape: Sequence[int], patches: bool) -> Samples:
    params = use.op.params
    if use.operand != 1 or params["batch_group_count"] != 1:
        raise Unobservable(f"it is read by {use.op} as the image, not as the kernel")
    _check_numeric(use, 0)
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out, channel, *window = numbers.rhs_spec
    sizes = use.op.inputs[1].shape
    roles = ("input", "kernel") if patches else ("input",)
    leaf_axes = [i for i, role in enumerate(use.roles) if role in roles]
    order = _order(use, shape, leaf_axes, [channel, *window] if patches else [channel], sizes)
    leaf_batch = _with_role(use, "batch")
    group_order = _group_order(use, shape, leaf_batch, out, groups)
    batch = tuple(shape[axis] for axis in leaf_batch)
    inner = groups // math.prod(batch)
    shown = (*batch, *((inner,) if inner > 1 else ()))

    def take(inputs: tuple[Any, ...]) -> jax.Array:
        # Now (N, *positions, channels of all groups, *window).
        x = jnp.transpose(
            inputs[0], (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
        )
        x = _patches(x, [sizes[axis] for axis in window], params) if patches else x
        where = 1 + len(window)
        each = x.shape[where] // groups  # not -1, which a batch without examples leaves open
        x = x.reshape(*x.shape[:where], groups, each, *x.shape[where + 1 :])
        x = jnp.moveaxis(x, where, 0)
        return _arrange(x, 1, x.ndim - where - 1, group_order if shown else None, order)

    return Samples(len(order), shown, take)


def _patches(x: jax.Array, window: Sequence[int], params: dict[str, Any]) -> jax.Array:
    """What each position of a kernel covers: ``(N, *positions, channels, *window)``.

    Slices, not a convolution with ones: exact in every dtype and on every backend.
    """
    steps, spread = params["window_strides"], params["rhs_dilation"]
    # Padding may be negative, and the image itself spread out.
    edges = [
        (low, high, between - 1)
        for (low, high), between in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    held = x.shape[1:-1]
    counts = [
        max(0, (size - (width - 1) * gap - 1) // step + 1)
        for size, width, gap, step in zip(held, window, spread, steps, strict=True)
    ]
    pieces = []
    for offset in np.ndindex(*window):
        start = [place * gap for place, gap in zip(offset, spread, strict=True)]
        stop = [
            first + (count - 1) * step + 1 if count else first
            for first, count, step in zip(start, counts, steps, strict=True)
        ]
        pieces.append(
            lax.slice(
                x,
                (0, *start, 0),
                (x.shape[0], *stop, x.shape[-1]),
                (1, *steps, 1),
            )
        )
    stacked = jnp.stack(pieces, axis=-1)
    return stacked.reshape(*stacked.shape[:-1], *window)


def _arrange(
    x: jax.Array, leading: int, trailing: int, group_order: np.ndarray | None, order: np.ndarray
) -> jax.Array:
    """Join leading axes into groups (if any), trailing ones into features, ordered as the leaf."""
    groups = () if group_order is None else (group_order.size,)
    x = x.reshape(*groups, *x.shape[leading : x.ndim - trailing], order.size)
    if not np.array_equal(order, np.arange(order.size)):
        x = jnp.take(x, order, axis=-1)
    if group_order is not None and not np.array_equal(group_order, np.arange(group_order.size)):
        x = jnp.take(x, group_order, axis=0)
    return x


def _with_role(use: Use, role: str) -> list[int]:
    return [axis for axis, word in enumerate(use.roles) if word == role]


def _touched(use: Use, leaf_axes: Sequence[int]) -> set[int]:
    """The operand's axes that hold some leaf axes."""
    maps = [use.axes[axis] for axis in leaf_axes]
    return {part.axis for axis_map in maps if axis_map is not None for part in axis_map.parts}


def positions(
    use: Use, shape: Sequence[int], leaf_axes: Sequence[int]
) -> tuple[dict[int, np.ndarray], tuple[int, ...]]:
    """For each operand axis: where on it every combination of positions on leaf axes lies.

    Args:
        use: of the leaf.
        shape: of the leaf.
        leaf_axes: some of its axes.

    Returns:
        By operand axis, an array with the sizes of the leaf's axes; and these sizes.

    Raises:
        Unobservable: the positions are not one fixed set, or not all of an axis.
    """
    sizes = tuple(shape[axis] for axis in leaf_axes)
    where: dict[int, np.ndarray] = {}
    for i, axis in enumerate(leaf_axes):
        axis_map = use.axes[axis]
        if axis_map is None:
            raise Unobservable(f"which part of its axis {axis} {use.op} reads is not fixed")
        held, places = axis_map.positions()
        if not np.array_equal(np.sort(held), np.arange(shape[axis])):
            raise Unobservable(f"{use.op} reads a part of its axis {axis} only")
        along = [1] * len(sizes)
        along[i] = -1
        for operand_axis, place in places.items():
            steps = place[np.argsort(held)].reshape(along)
            where[operand_axis] = where.get(operand_axis, 0) + steps
    return {axis: np.broadcast_to(place, sizes) for axis, place in where.items()}, sizes


def _order(
    use: Use,
    shape: Sequence[int],
    leaf_axes: Sequence[int],
    operand_axes: Sequence[int],
    operand_shape: Sequence[int],
) -> np.ndarray:
    """For each position on some leaf axes, joined: its place on some operand axes, joined."""
    where, sizes = positions(use, shape, leaf_axes)
    wide = tuple(operand_shape[axis] for axis in operand_axes)
    if math.prod(sizes) != math.prod(wide):
        raise Unobservable(f"{use.op} reads it padded, repeated or mixed with other axes")
    zero = np.zeros(sizes, int)
    places = [where.get(axis, zero) for axis in operand_axes]
    order = np.ravel_multi_index(places, wide).ravel() if wide else np.zeros(1, int)
    if not np.array_equal(np.sort(order), np.arange(order.size)):
        raise Unobservable(f"{use.op} reads it padded, repeated or mixed with other axes")
    return order


def _group_order(
    use: Use, shape: Sequence[int], leaf_batch: Sequence[int], out: int, groups: int
) -> np.ndarray:
    """The groups of a convolution by the leaf's batch axes, then by what groups remain in each."""
    where, sizes = positions(use, shape, leaf_batch)
    if groups % math.prod(sizes):
        raise Unobservable(f"{use.op} reads it padded, repeated or mixed with other axes")
    width = use.op.inputs[1].shape[out] // groups
    first = where.get(out, np.zeros(sizes, int)).reshape(-1, 1) // width
    order = (first + np.arange(groups // math.prod(sizes))).ravel()
    if not np.array_equal(np.sort(order), np.arange(groups)):
        raise Unobservable(f"{use.op} reads it padded, repeated or mixed with other axes")
    return order


def _check_numeric(use: Use, other: int) -> None:
    dtype = use.op.inputs[other].dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise Unobservable(f"{use.op} multiplies it by {dtype}")
