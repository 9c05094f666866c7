"""Which products of a program a kernel can compute, and why it cannot compute the others."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcomp.arrays import BlockSparseArray, CodebookArray, QuantizedArray, is_compressed
from jaxcomp.kernels.block_sparse.matmul import block_sparse_matmul
from jaxcomp.kernels.codebook.matmul import codebook_matmul
from jaxcomp.kernels.masked.conv import masked_conv
from jaxcomp.kernels.masked.matmul import masked_matmul
from jaxcomp.kernels.quantized.matmul import quantized_matmul
from jaxcomp.model import tapped
from jaxcomp.model.program import Block, Op, Program, Value
from jaxcomp.model.readers import TURN, Reader, readers

_KERNELS: dict[type, Callable[..., jax.Array]] = {
    BlockSparseArray: block_sparse_matmul,
    CodebookArray: codebook_matmul,
    QuantizedArray: quantized_matmul,
}
_CONV = (
    *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"),
    "feature_group_count",
)
# Bodies that hand nothing around.
_INLINE = frozenset({"custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint"})


class Unfit(Exception):
    """A product that no kernel computes; the message says why."""


class Planned(NamedTuple):
    """A product that a kernel computes.

    Attributes:
        op: the operation.
        kernel: the name of the kernel.
        path: of the leaf that it reads, compressed; None for a mask that the program applies.
        loops: that hand out slices of the leaf, outermost first.
        reads: the dense weight and its mask, values of the program; empty for a compressed leaf.
        spent: whether nothing needs the leaf after its product in a turn of a loop.
    """

    op: Op
    kernel: str
    path: str | None
    loops: tuple[Op, ...] = ()
    reads: tuple[Value, ...] = ()
    spent: bool = False


class Plan(NamedTuple):
    """What is computed how.

    Attributes:
        products: by a name: the leaf's path, or the operation.
        left: every other use of a compressed leaf, or of a mask, and why.
        needed: paths of the leaves that are decoded.
    """

    products: dict[str, Planned]
    left: dict[str, str]
    needed: frozenset[str]


def make_plan(program: Program, leaves: Mapping[str, Any]) -> Plan:
    """Find what kernels can compute.

    Args:
        program: the model, traced on dense shapes.
        leaves: of the parameter tree by path, compressed or not.
    """
    products: dict[str, Planned] = {}
    left: dict[str, str] = {}
    needed = {path for path, leaf in leaves.items() if not is_compressed(leaf)}
    outside = {op: bodies for op, bodies in tapped.around(program)}
    for path in [path for path in leaves if path not in needed]:
        for reader in readers(program, path):
            name = path if path not in products else f"{path}, {reader.op}"
            try:
                products[name] = _of_leaf(path, leaves[path], reader, outside)
            except Unfit as error:
                needed.add(path)
                left[f"{path}, read by {reader.op or 'the caller'}"] = str(error)
    taken = {at.op for at in products.values()}
    for op, bodies in outside.items():
        masked = _masked(op, bodies[-1][1] if bodies else program.block)
        if masked is None or op in taken:
            continue
        try:
            products[f"{op}, {len(products)}"] = _of_mask(op, masked, bodies)
        except Unfit as error:
            left[f"{op}, {len(products)}"] = str(error)
    return Plan(products, left, frozenset(needed))


def swap_of(name: str, at: Planned, implementation: str | None) -> tapped.Swap:
    """The operation as its kernel performs it.

    Args:
        name: of the entry of the state that holds the leaf.
        at: what is planned.
        implementation: for the kernel.
    """
    how: Any = {"implementation": implementation}
    dtype = at.op.outputs[0].dtype

    def of_leaf(entries: Any, inputs: tuple[Any, ...], bind: Any) -> Any:
        leaf = entries[name]
        x = _inputs_last(at.op, inputs[0])
        # A loop that gets slices of a leaf would stack them up again.
        after = {name: ()} if at.spent else entries
        return [_KERNELS[type(leaf)](x, leaf, **how).astype(dtype)], after

    def of_mask(entries: Any, inputs: tuple[Any, ...], bind: Any) -> Any:
        x, _, w, mask = inputs
        if at.kernel == "masked_conv":
            window = {key: at.op.params[key] for key in _CONV}
            return [masked_conv(x, w, mask, **window).astype(dtype)], entries
        return [masked_matmul(_inputs_last(at.op, x), w, mask, **how).astype(dtype)], entries

    if at.path is None:
        return tapped.Swap((), (), of_mask, at.reads)
    return tapped.Swap((name,), at.loops, of_leaf)


def _inputs_last(op: Op, x: jax.Array) -> jax.Array:
    (axis,) = op.params["dimension_numbers"][0][0]
    return jnp.moveaxis(x, axis, -1)


def _of_leaf(path: str, leaf: Any, reader: Reader, outside: Mapping[Op, Any]) -> Planned:
    if reader.obstacle or reader.op is None:
        raise Unfit(reader.obstacle or "it is an output of the model")
    kernel = _KERNELS.get(type(leaf))
    if kernel is None:
        raise Unfit(f"no kernel reads a {type(leaf).__name__}")
    _check_dot(reader.op, reader.operand, outside[reader.op])
    if any(step != TURN for step in reader.steps):
        raise Unfit("its layout is changed before it is multiplied")
    around = tuple(op for op, _ in outside[reader.op] if op.name not in _INLINE)
    spent = around == reader.loops
    return Planned(reader.op, kernel.__name__, path, reader.loops, spent=spent)


def _check_dot(op: Op, operand: int, bodies: Any) -> None:
    if op.name != "dot_general":
        raise Unfit(f"{op.name} is no matrix product")
    contracted, batch = op.params["dimension_numbers"]
    if operand != 1 or len(op.inputs[1].shape) != 2 or batch[0] or tuple(contracted[1]) != (0,):
        raise Unfit("it is not the right operand of a product over its first axis")
    if op.params.get("precision") not in (None, jax.lax.Precision.DEFAULT):
        asked = op.params["precision"]
        if any(each != jax.lax.Precision.DEFAULT for each in asked):
            raise Unfit(f"the product asks for the precision {asked}")
    reason = tapped.obstacle(bodies)
    if reason:
        raise Unfit(reason)


def _of_mask(op: Op, masked: tuple[Value, Value], bodies: Any) -> Planned:
    if op.name == "dot_general":
        _check_dot(op, 1, bodies)
        return Planned(op, "masked_matmul", None, (), masked)
    reason = tapped.obstacle(bodies)
    if reason:
        raise Unfit(reason)
    if op.params["batch_group_count"] != 1:
        raise Unfit("it groups its batch")
    return Planned(op, "masked_conv", None, (), masked)


def _masked(op: Op, block: Block) -> tuple[Value, Value] | None:
    """The weight and the boolean mask whose product an operation reads, or None."""
    if op.name not in ("dot_general", "conv_general_dilated"):
        return None
    makers = {out: each for each in block.ops for out in each.outputs}
    made = makers.get(op.inputs[1])
    while made is not None and made.name in ("convert_element_type", "copy"):
        made = makers.get(made.inputs[0])
    if made is None:
        return None
    if made.name == "select_n" and len(made.inputs) == 3:
        mask, off, on = made.inputs
        if mask.dtype == jnp.bool_ and mask.shape == on.shape and _is_zero(off, makers):
            return on, mask
    if made.name == "mul":
        for w, other in zip(made.inputs, made.inputs[::-1], strict=True):
            cast = makers.get(other)
            if cast is not None and cast.name == "convert_element_type":
                mask = cast.inputs[0]
                if mask.dtype == jnp.bool_ and mask.shape == w.shape:
                    return w, mask
    return None


def _is_zero(value: Value, makers: Mapping[Value, Op]) -> bool:
    made = makers.get(value)
    while made is not None and made.name in ("broadcast_in_dim", "convert_element_type"):
        value = made.inputs[0]
        made = makers.get(value)
    constant = value.constant
    if constant is None or isinstance(constant, Tracer) or np.ndim(constant):
        return False
    return bool(constant == 0)
