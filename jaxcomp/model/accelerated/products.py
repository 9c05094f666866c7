"""A product as its kernel performs it, in the place of the program's own."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.arrays import BlockSparseArray, CodebookArray, GridArray, QuantizedArray
from jaxcomp.kernels.block_sparse.matmul import block_sparse_matmul
from jaxcomp.kernels.codebook.matmul import codebook_matmul
from jaxcomp.kernels.convolution import convolution
from jaxcomp.kernels.fake_quant.conv import fake_quant_conv
from jaxcomp.kernels.fake_quant.matmul import fake_quant_matmul
from jaxcomp.kernels.fake_quant.operand import Operand, scaled
from jaxcomp.kernels.fake_quant.rounding import Rounding
from jaxcomp.kernels.masked.conv import masked_conv
from jaxcomp.kernels.masked.matmul import masked_matmul
from jaxcomp.kernels.quantized.matmul import quantized_matmul
from jaxcomp.model import tapped
from jaxcomp.model.accelerated.matrices import matrix_blocks, matrix_of, matrix_scales
from jaxcomp.model.program import Op, Value
from jaxcomp.sharding import explicit_axes

KERNELS: dict[type, Callable[..., jax.Array]] = {
    BlockSparseArray: block_sparse_matmul,
    CodebookArray: codebook_matmul,
    GridArray: quantized_matmul,
    QuantizedArray: quantized_matmul,
}
_CONV = (
    *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"),
    "feature_group_count",
)


class Planned(NamedTuple):
    """A product that a kernel computes.

    Attributes:
        op: the operation.
        kernel: the name of the kernel.
        path: of the leaf that it reads, compressed; None for a mask or a rounding that the program
            applies.
        loops: that hand out slices of the leaf, outermost first.
        reads: values of the program, the dense weight first: then its mask, or the scale and zero
            point where they are not found from it; empty for a compressed leaf.
        rounding: of the dense weight.
        switched: whether a boolean says if it is rounded; it is read behind these.
        through: the operation that lets the weight's gradient past the mask or the rounding; what
            it goes to is then the last that is read.
        spent: whether nothing needs the leaf after its product in a turn of a loop.
        operand: which input of the operation the weight is; the left one only of two axes.
        transposed: whether the product sums over the second of the leaf's two axes.
    """

    op: Op
    kernel: str
    path: str | None
    loops: tuple[Op, ...] = ()
    reads: tuple[Value, ...] = ()
    rounding: Rounding | None = None
    switched: bool = False
    through: Op | None = None
    spent: bool = False
    operand: int = 1
    transposed: bool = False


def swap_of(name: str, at: Planned, implementation: str | None) -> tapped.Swap:
    """The operation as its kernel performs it.

    Args:
        name: of the entry of the state that holds the leaf.
        at: what is planned.
        implementation: for the kernel.
    """
    made = at.op.outputs[0]

    def of_leaf(entries: Any, inputs: tuple[Any, ...], bind: Any) -> Any:
        leaf = entries[name]
        # A loop that gets slices of a leaf would stack them up again.
        after = {name: ()} if at.spent else entries
        x, how = inputs[1 - at.operand], {"transposed": True} if at.transposed else {}
        if _is_laid_out(at.op.inputs[at.operand], x, leaf):
            return bind(x, leaf.decode()), after
        matrix = matrix_of(leaf, summed_axes(at.op))
        # What is wider than the activations is summed and kept so.
        x = _inputs_last(at.op, x, 1 - at.operand).astype(made.dtype)
        y = KERNELS[type(leaf)](x, matrix, implementation=implementation, **how)
        return [_as(made, y if at.operand else jnp.moveaxis(y, -1, 0))], after

    def of_dense(entries: Any, inputs: tuple[Any, ...], bind: Any) -> Any:
        x, dense, w, *more = inputs
        if at.op.name == "dot_general" and _is_laid_out(at.op.inputs[1], x, dense):
            return bind(x, dense), entries
        if at.through is not None:
            *more, stored = more
            (w,) = tapped.bind(at.through, stored, w)
        product = _of_rounding if at.rounding else _of_mask
        y = product(at, x, w, more, implementation)
        return [_as(made, y)], entries

    if at.path is None:
        return tapped.Swap((), (), of_dense, at.reads)
    return tapped.Swap((name,), at.loops, of_leaf)


def _as(made: Value, y: jax.Array) -> jax.Array:
    y = y if y.shape == made.shape else y.reshape(made.shape)
    return y.astype(made.dtype)


def _of_mask(at: Planned, x: Any, w: Any, more: Any, implementation: Any) -> jax.Array:
    # A cast and a mask may change places.
    w, dense_gradient = w.astype(at.op.inputs[1].dtype), at.through is not None
    if at.kernel == "masked_conv":
        return masked_conv(x, w, *more, **_window(at.op), dense_gradient=dense_gradient)
    how: Any = {"dense_gradient": dense_gradient, "implementation": implementation}
    mask = _matrix(at.op, more[0])
    return masked_matmul(_inputs_last(at.op, x), _matrix(at.op, w), mask, **how)


def _of_rounding(at: Planned, x: Any, w: Any, more: Any, implementation: Any) -> jax.Array:
    *scales, active = more if at.switched else (*more, None)
    how: Any = dict(zip(("scale", "zero_point"), scales, strict=False))
    how["active"] = active
    how["dtype"] = jnp.result_type(*(each.dtype for each in at.op.inputs[:2]))
    how["dense_gradient"] = at.through is not None
    if at.kernel == "fake_quant_conv":
        return fake_quant_conv(x, w, at.rounding, **_window(at.op), **how)
    how["implementation"] = implementation
    rounding: Any = at.rounding
    if w.ndim > 2:
        rounding, how = _of_matrix(at.op, w, rounding, how)
    return fake_quant_matmul(_inputs_last(at.op, x), _matrix(at.op, w), rounding, **how)


def _of_matrix(op: Op, w: Any, rounding: Rounding, how: Any) -> tuple[Rounding, Any]:
    """How the matrix of a weight of more axes is rounded, with the scales of these."""
    inputs, scale = summed_axes(op), how.get("scale")
    kept = scaled(Operand(rounding, False, False), w, scale, how.get("zero_point"))
    found: dict[str, Any] = {
        name: matrix_scales(array, w.shape, rounding.blocks, inputs)
        for name, array in (("scale", kept.scale), ("zero_point", kept.zero_point))
        if array is not None
    }
    if scale is None:
        # What is found holds all of it: nothing is clipped.
        found["dense_gradient"] = True
    blocks = matrix_blocks(rounding.blocks, w.ndim, inputs)
    return rounding._replace(axis=-1, blocks=blocks), {**how, **found}


def is_product(op: Op) -> bool:
    """Whether a convolution is a product with a kernel whose axes lie as those of a matrix."""
    x, w = (jax.ShapeDtypeStruct(each.shape, each.dtype) for each in op.inputs)
    how = convolution(x, w, **_window(op))
    in_order = how.matrix_axes() == tuple(range(len(w.shape)))
    return how.is_product(w.shape) and in_order and op.params["batch_group_count"] == 1


def _window(op: Op) -> dict[str, Any]:
    return {key: op.params[key] for key in _CONV}


def summed_axes(op: Op) -> int:
    """How many axes of its weight a product sums over: a ``dot_general``, or as a convolution."""
    if op.name == "conv_general_dilated":
        return len(op.inputs[1].shape) - 1
    return len(op.params["dimension_numbers"][0][0])


def _inputs_last(op: Op, x: jax.Array, operand: int = 0) -> jax.Array:
    if op.name == "conv_general_dilated":
        return x
    axes, count = op.params["dimension_numbers"][0][operand], summed_axes(op)
    x = jnp.moveaxis(x, axes, range(-count, 0))
    return x if count == 1 else x.reshape(*x.shape[:-count], math.prod(x.shape[-count:]))


def _matrix(op: Op, w: jax.Array) -> jax.Array:
    return w if w.ndim == 2 else w.reshape(math.prod(w.shape[: summed_axes(op)]), -1)


def _is_laid_out(weight: Value, *arrays: Any) -> bool:
    """Whether axes that would have to be merged are explicit axes of a mesh."""
    return len(weight.shape) > 2 and bool(explicit_axes(arrays))
