"""A packed leaf laid out for one product: 8-bit integers, outputs first, inputs contiguous."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.arrays import QuantizedArray
from jaxcomp.arrays.bits import unpack_bits
from jaxcomp.arrays.blocks import split_shape, wide_scale
from jaxcomp.kernels.int8 import Int8Weight, int8_weight
from jaxcomp.model.program import Op
from jaxcomp.model.readers import Step, relayout
from jaxcomp.sharding import automatic

# Scales that change more often than this along the inputs cost more than the product.
_LEAST_GROUP = 8


class Unfit(Exception):
    """A product cannot be computed in integers; the message says why."""


class Layout(NamedTuple):
    """How a leaf becomes the matrix, or the kernel, of one product; static.

    Attributes:
        steps: from the leaf to the operand.
        order: the operand's axes: batch, outputs, inputs.
        stack: how many axes for loops are in front of them.
        batch: how many of the axes are batch axes.
        outputs: how many are outputs.
        conv: whether the inputs stay apart, as the window and the channels of a convolution.
    """

    steps: tuple[Step, ...]
    order: tuple[int, ...]
    stack: int
    batch: int
    outputs: int
    conv: bool = False


def layout_of(op: Op, operand: int, steps: tuple[Step, ...], stack: int) -> Layout:
    """The layout of a weight by the operation that reads it.

    Args:
        op: a dot or a convolution.
        operand: which of its inputs is the weight.
        steps: from the leaf to that input.
        stack: how many loops hand out slices of the leaf.

    Raises:
        Unfit: another operation, or a convolution of a form that is not supported.
    """
    rank = len(op.inputs[operand].shape)
    if op.name == "dot_general":
        contracted, batch = op.params["dimension_numbers"]
        mine, along = tuple(contracted[operand]), tuple(batch[operand])
        free = tuple(axis for axis in range(rank) if axis not in (*mine, *along))
        return Layout(steps, (*along, *free, *mine), stack, len(along), len(free))
    if op.name != "conv_general_dilated":
        raise Unfit(f"{op} is neither a dot nor a convolution")
    if operand != 1 or op.params["batch_group_count"] != 1:
        raise Unfit(f"{op} takes the weight for its input, or groups its batch")
    out, channels, *space = op.params["dimension_numbers"].rhs_spec
    return Layout(steps, (out, *space, channels), stack, 0, 1, conv=True)


class Scaling(NamedTuple):
    """Which of a leaf's scales belongs to which output of a product; host arrays.

    Attributes:
        places: in the flat scales, ``(*stack, *batch, out)`` or ``(*stack, *batch, groups, out)``.
        size: inputs that share a scale; 0 if all do.
    """

    places: np.ndarray
    size: int


def scaling_of(leaf: QuantizedArray, layout: Layout) -> Scaling:
    """Find the scales of a product's outputs.

    Args:
        leaf: a packed leaf.
        layout: of its product.

    Raises:
        Unfit: scales change along the inputs too often.
    """
    scales = np.arange(math.prod(leaf.scale.shape), dtype=np.int32).reshape(leaf.scale.shape)
    whole = np.broadcast_to(scales, split_shape(leaf.shape, leaf.blocks)).reshape(leaf.shape)
    index = _matrix(whole, layout, joined=True)
    if index.size == 0:
        raise Unfit("it has no elements")
    if scales.size == 1:
        return Scaling(index[..., 0], 0)
    axes = tuple(range(index.ndim - 1))
    changes = np.flatnonzero(np.any(index[..., 1:] != index[..., :-1], axis=axes)) + 1
    if not changes.size:
        return Scaling(index[..., 0], 0)
    size = math.gcd(index.shape[-1], *changes.tolist())
    if layout.conv:
        raise Unfit(f"its scales change every {size} inputs, which a convolution adds up at once")
    if size < _LEAST_GROUP:
        raise Unfit(f"its scales change every {size} of the inputs that are added up")
    return Scaling(np.swapaxes(index[..., ::size], -1, -2), size)


def _matrix(array: Any, layout: Layout, joined: bool) -> Any:
    """``(*stack, *batch, out, in)``; a convolution's inputs apart unless ``joined``."""
    operand = relayout(array, layout.steps)
    order = (*range(layout.stack), *(layout.stack + axis for axis in layout.order))
    operand = operand.transpose(order)
    lead = layout.stack + layout.batch
    shape, after = operand.shape, lead + layout.outputs
    inputs = (math.prod(shape[after:]),) if joined else shape[after:]
    return operand.reshape(*shape[:lead], math.prod(shape[lead:after]), *inputs)


def greatest_step(leaf: QuantizedArray) -> int:
    """The greatest distance of a code from zero."""
    if leaf.zero_point is not None or not leaf.zero:
        return (1 << leaf.bits) - 1
    return 1 << (leaf.bits - 1)


def check_leaf(leaf: QuantizedArray) -> None:
    """Raise :class:`Unfit` unless the levels of a leaf are 8-bit integers."""
    if not leaf.zero and leaf.bits > 7:
        raise Unfit("its levels are the odd numbers from -255 to 255, more than 8 bits hold")


def prepare(leaf: QuantizedArray, layout: Layout, scaling: Scaling) -> Int8Weight:
    """The weight of a product, from the leaf that it is packed in.

    Args:
        leaf: the packed leaf; may be traced.
        layout: from :func:`layout_of`.
        scaling: from :func:`scaling_of`.

    Returns:
        Codes of ``(*stack, *batch, out, in)``, ``(…, groups, out, size)`` or, for convolutions,
        ``(*stack, out, *window, channels)``, with scales, zero points and sums.
    """
    # Where mesh axes are explicit the result is replicated: its axes are no longer the leaf's.
    run = automatic(partial(_prepare, layout=layout, size=scaling.size))
    return run(leaf, jnp.asarray(scaling.places))


@partial(jax.jit, static_argnames=("layout", "size"))
def _prepare(leaf: QuantizedArray, index: jax.Array, *, layout: Layout, size: int) -> Int8Weight:
    codes = unpack_bits(leaf.codes, leaf.bits, leaf.length).astype(jnp.int32)
    half = 1 << (leaf.bits - 1)
    codes = codes - half if leaf.zero else 2 * codes - ((1 << leaf.bits) - 1)
    codes = codes.astype(jnp.int8)
    scale, zero_point = wide_scale(leaf.scale).reshape(-1)[index], None
    if leaf.zero_point is not None:
        zero_point = leaf.zero_point.astype(jnp.int32).reshape(-1)[index] - half
    matrix = _matrix(codes, layout, joined=True)
    if size:
        matrix = matrix.reshape(*matrix.shape[:-1], -1, size)
        matrix = jnp.swapaxes(matrix, -2, -3)
    weight = int8_weight(matrix, scale, zero_point)
    return weight._replace(codes=_matrix(codes, layout, joined=False)) if layout.conv else weight
