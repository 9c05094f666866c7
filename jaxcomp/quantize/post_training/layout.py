"""Who shares a scale, in the matrix form of a leaf: what solvers that choose scales walk over."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxcomp.arrays.blocks import split_blocks
from jaxcomp.model.matrices import MatrixForm, from_stack, to_stack
from jaxcomp.quantize.formats import AnyFormat


class ScaleLayout(NamedTuple):
    """Features that share their scales, and columns that do; static.

    Attributes:
        order: the features, those of one group together; groups are of one size.
        groups: how many groups of features.
        mates: ``(matrices, outputs)`` numbers from 0: columns of the same number share a scale in
            every group.
        sharing: how many such numbers there are.
    """

    order: np.ndarray
    groups: int
    mates: np.ndarray
    sharing: int


def scale_layout(form: MatrixForm, format: AnyFormat) -> ScaleLayout:
    """Who shares a scale in the matrices of a leaf.

    Args:
        form: of the leaf.
        format: of the leaf.

    Returns:
        The layout; the matrices of a stack are joined into one axis.

    Example:
        >>> from jaxcomp.quantize import Format, PerGroup
        >>> format = Format(4, granularity=PerGroup(2))
        >>> layout = scale_layout(MatrixForm((4, 3), (0,), (1,)), format)
        >>> layout.groups, layout.mates.tolist()
        (2, [[0, 1, 2]])
    """
    labels = _labels(form, format)
    features = _joined(labels, form.input_axes).ravel()
    counts = np.unique(features, return_counts=True)[1]
    columns = _joined(labels, (*form.outer_axes, *form.output_axes))
    columns = columns.reshape(-1, form.inner * form.outputs)
    if form.columns is not None:
        columns = columns[:, list(form.columns)]
    names, mates = np.unique(columns, return_inverse=True)
    return ScaleLayout(
        np.argsort(features, kind="stable"),
        len(counts),
        mates.reshape(-1, form.outputs),
        len(names),
    )


def by_group(
    form: MatrixForm, layout: ScaleLayout, spread: Shaped[Array, "..."]
) -> Shaped[Array, "matrices groups outputs"]:
    """One entry for each group of features, of what all its features share.

    Args:
        form: of the leaf.
        layout: of the leaf.
        spread: of the leaf's shape.
    """
    matrices = to_stack(form, spread)
    size = form.features // layout.groups
    return matrices[:, layout.order[::size]]


def like_scale(
    form: MatrixForm,
    format: AnyFormat,
    layout: ScaleLayout,
    chosen: Shaped[Array, "matrices groups outputs"],
    scale: Shaped[Array, "..."],
) -> Shaped[Array, "..."]:
    """What was chosen for each group, in the shape of the leaf's scales; undoes :func:`by_group`.

    Args:
        form: of the leaf.
        format: of the leaf.
        layout: of the leaf.
        chosen: the same for all that share a scale.
        scale: of the shape that is wanted.
    """
    size = form.features // layout.groups
    full = jnp.repeat(chosen, size, axis=1)[:, np.argsort(layout.order)]
    leaf = from_stack(form, full)
    split = split_blocks(leaf, format.blocks(form.shape))
    return split[tuple(slice(0, size) for size in scale.shape)]


def _labels(form: MatrixForm, format: AnyFormat) -> list[np.ndarray]:
    """For each axis of the leaf, numbers that are the same where a scale is shared along it."""
    rank = len(form.shape)
    sizes = {rank + axis: size for size, axis in format.blocks(form.shape)}
    shared = set() if sizes else {rank + axis for axis in format.reduced_axes(form.shape)}
    return [
        np.arange(n) // sizes.get(axis, 1) * (axis not in shared)
        for axis, n in enumerate(form.shape)
    ]


def _joined(labels: list[np.ndarray], axes: tuple[int, ...]) -> np.ndarray:
    """Numbers of the combinations of labels, of the shape of these axes."""
    joined = np.zeros((), np.int64)
    for axis in axes:
        joined = joined[..., None] * len(labels[axis]) + labels[axis]
    return joined
