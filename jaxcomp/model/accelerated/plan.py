"""Which products of a program a kernel can compute, and why it cannot compute the others."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcomp.arrays import BlockSparseArray, CodebookArray, QuantizedArray, is_compressed
from jaxcomp.kernels.block_sparse.matmul import block_sparse_matmul
from jaxcomp.kernels.codebook.matmul import codebook_matmul
from jaxcomp.kernels.fake_quant.conv import fake_quant_conv
from jaxcomp.kernels.fake_quant.matmul import fake_quant_matmul
from jaxcomp.kernels.fake_quant.rounding import Rounding
from jaxcomp.kernels.masked.conv import masked_conv
from jaxcomp.kernels.masked.matmul import masked_matmul
from jaxcomp.kernels.quantized.matmul import quantized_matmul
from jaxcomp.marks import read_mark
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
_LAYOUTS = frozenset(
    (
        *("broadcast_in_dim", "convert_element_type", "copy", "reshape", "rev", "slice", "squeeze"),
        "transpose",
    )
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
        path: of the leaf that it reads, compressed; None for a mask or a rounding that the program
            applies.
        loops: that hand out slices of the leaf, outermost first.
        reads: values of the program, the dense weight first: then its mask, or the scale and zero
            point where they are not found from it; empty for a compressed leaf.
        rounding: of the dense weight.
        through: the operation that lets the weight's gradient past the mask or the rounding; what
            it goes to is then the last that is read.
        spent: whether nothing needs the leaf after its product in a turn of a loop.
    """

    op: Op
    kernel: str
    path: str | None
    loops: tuple[Op, ...] = ()
    reads: tuple[Value, ...] = ()
    rounding: Rounding | None = None
    through: Op | None = None
    spent: bool = False


class Plan(NamedTuple):
    """What is computed how.

    Attributes:
        products: by a name: the leaf's path, or the operation.
        left: every other use of a compressed leaf, a mask or a rounded weight, and why.
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
        if op in taken or op.name not in ("dot_general", "conv_general_dilated"):
            continue
        name = f"{op}, {len(products) + len(left)}"
        try:
            planned = _of_dense(op, bodies[-1][1] if bodies else program.block, bodies)
        except Unfit as error:
            left[name] = str(error)
        else:
            products.update({name: planned} if planned else {})
    return Plan(products, left, frozenset(needed))


def swap_of(name: str, at: Planned, implementation: str | None) -> tapped.Swap:
    """The operation as its kernel performs it.

    Args:
        name: of the entry of the state that holds the leaf.
        at: what is planned.
        implementation: for the kernel.
    """
    dtype = at.op.outputs[0].dtype

    def of_leaf(entries: Any, inputs: tuple[Any, ...], bind: Any) -> Any:
        leaf = entries[name]
        x = _inputs_last(at.op, inputs[0])
        # A loop that gets slices of a leaf would stack them up again.
        after = {name: ()} if at.spent else entries
        return [_KERNELS[type(leaf)](x, leaf, implementation=implementation).astype(dtype)], after

    def of_dense(entries: Any, inputs: tuple[Any, ...], bind: Any) -> Any:
        x, _, w, *more = inputs
        if at.through is not None:
            *more, stored = more
            (w,) = tapped.bind(at.through, stored, w)
        product = _of_rounding if at.rounding else _of_mask
        return [product(at, x, w, more, implementation).astype(dtype)], entries

    if at.path is None:
        return tapped.Swap((), (), of_dense, at.reads)
    return tapped.Swap((name,), at.loops, of_leaf)


def _of_mask(at: Planned, x: Any, w: Any, more: Any, implementation: Any) -> jax.Array:
    # A cast and a mask may change places.
    w, dense_gradient = w.astype(at.op.inputs[1].dtype), at.through is not None
    if at.kernel == "masked_conv":
        return masked_conv(x, w, *more, **_window(at.op), dense_gradient=dense_gradient)
    how: Any = {"dense_gradient": dense_gradient, "implementation": implementation}
    return masked_matmul(_inputs_last(at.op, x), w, *more, **how)


def _of_rounding(at: Planned, x: Any, w: Any, more: Any, implementation: Any) -> jax.Array:
    how: Any = dict(zip(("scale", "zero_point"), more, strict=False))
    how["dtype"] = jnp.result_type(*(each.dtype for each in at.op.inputs[:2]))
    how["dense_gradient"] = at.through is not None
    if at.kernel == "fake_quant_conv":
        return fake_quant_conv(x, w, at.rounding, **_window(at.op), **how)
    how["implementation"] = implementation
    return fake_quant_matmul(_inputs_last(at.op, x), w, at.rounding, **how)


def _window(op: Op) -> dict[str, Any]:
    return {key: op.params[key] for key in _CONV}


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


def _of_dense(op: Op, block: Block, bodies: Any) -> Planned | None:
    """A product with a weight that the program masks or rounds right there; None for any other."""
    makers = {out: each for each in block.ops for out in each.outputs}
    made, through = _maker(op.inputs[1], makers)
    rounding, reads = _rounded(made) if made is not None else (None, None)
    if made is not None and reads is None:
        # Where gradients go past it, no derivative of the mask's own is used.
        inside = made.name in tapped.RULES and through is not None
        reads = _masked_inside(made) if inside else _masked(made, makers)
    if reads is None:
        return _check_none(op, makers, through)
    if op.name == "dot_general":
        _check_dot(op, 1, bodies)
    elif op.params["batch_group_count"] != 1:
        raise Unfit("it groups its batch")
    reason = tapped.obstacle(bodies)
    if reason:
        raise Unfit(reason)
    if through is not None:
        if reads[0].dtype != through.inputs[0].dtype:
            raise Unfit(f"its weight is cast to {reads[0].dtype} by what compresses it")
        reads = (*reads, through.inputs[0])
    kind = "matmul" if op.name == "dot_general" else "conv"
    name = f"masked_{kind}" if rounding is None else f"fake_quant_{kind}"
    return Planned(op, name, None, (), reads, rounding, through)


def _check_none(op: Op, makers: Mapping[Value, Op], through: Op | None) -> None:
    """That a product without a kernel has no weight that was compressed, as far as it is noted."""
    if through is not None:
        raise Unfit(
            "kernels mask weights, and round them to a Format from the first step on: what is done "
            "to this one is another thing"
        )
    for operand, value in enumerate(op.inputs[:2]):
        turned = False
        while (made := makers.get(value)) is not None and made.name in _LAYOUTS:
            value, turned = made.inputs[0], True
        if made is None or _note(made) is None:
            continue
        if operand == 0 and not turned:
            raise Unfit("its left operand is compressed, and kernels read the right one")
        raise Unfit("its weight is compressed, and its layout changed before it is multiplied")


def _maker(value: Value, makers: Mapping[Value, Op]) -> tuple[Op | None, Op | None]:
    """What made a weight before it was cast, and what let its gradient through, or None."""
    through, dtypes = None, [value.dtype]
    while (made := makers.get(value)) is not None:
        if made.name in ("convert_element_type", "copy"):
            value = made.inputs[0]
        elif through is None and _note(made) == ["straight_through"]:
            through, value = made, made.inputs[1]
        else:
            break
        dtypes.append(value.dtype)
    # Cast twice, it would have lost more than once.
    once = sum(a != b for a, b in itertools.pairwise(dtypes)) <= 1
    return (made, through) if once else (None, None)


def _note(op: Op) -> list[Any] | None:
    """What the body of a function with its own derivative notes about its result."""
    if op.name != "custom_jvp_call":
        return None
    names = [each.params["name"] for each in op.blocks[0].ops if each.name == "name"]
    return next(filter(None, map(read_mark, names)), None)


def _rounded(made: Op) -> tuple[Rounding | None, tuple[Value, ...] | None]:
    """How a weight was rounded; the weight and, where not found from it, its scales; or None."""
    note = _note(made)
    if note is None or note[0] != "fake_quant":
        return None, None
    bits, symmetric, axis, blocks, zero = note[1:]
    # JSON has no tuples.
    axis, blocks = tuple(axis) if isinstance(axis, list) else axis, tuple(map(tuple, blocks))
    # The array, its values, what is inside, and the scale and zero point, where not found.
    w, _, *given = made.inputs
    return Rounding(bits, symmetric, axis, blocks, zero), (w, *given[1:])


def _masked(made: Op, makers: Mapping[Value, Op]) -> tuple[Value, Value] | None:
    """The weight and the boolean mask whose product an operation makes, or None."""
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


def _masked_inside(made: Op) -> tuple[Value, ...] | None:
    """As :func:`_masked` for the result of a function with its own derivative."""
    body = made.blocks[0]
    makers = {out: each for each in body.ops for out in each.outputs}
    last = makers.get(body.outputs[0])
    masked = _masked(last, makers) if last is not None else None
    outer = dict(zip(body.inputs, made.inputs, strict=True))
    if masked is None or not all(each in outer for each in masked):
        return None
    return tuple(outer[each] for each in masked)


def _is_zero(value: Value, makers: Mapping[Value, Op]) -> bool:
    made = makers.get(value)
    while made is not None and made.name in ("broadcast_in_dim", "convert_element_type"):
        value = made.inputs[0]
        made = makers.get(value)
    constant = value.constant
    if constant is None or isinstance(constant, Tracer) or np.ndim(constant):
        return False
    return bool(constant == 0)
