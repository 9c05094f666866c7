"""Which products of a program a kernel can compute, and why it cannot compute the others."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcomp.arrays import is_compressed
from jaxcomp.kernels.fake_quant.rounding import Rounding
from jaxcomp.kernels.quantized.matmul import quantized_matmul
from jaxcomp.kernels.quantized.packed import scales_are_spread
from jaxcomp.marks import read_mark
from jaxcomp.model import tapped
from jaxcomp.model.accelerated.matrices import matrix_blocks, matrix_of
from jaxcomp.model.accelerated.products import KERNELS, Planned, is_product, summed_axes
from jaxcomp.model.accelerated.stacked import Unfit, stacked
from jaxcomp.model.program import Block, Op, Program, Value
from jaxcomp.model.readers import TURN, Reader, readers

_LAYOUTS = frozenset(
    (
        *("broadcast_in_dim", "convert_element_type", "copy", "reshape", "rev", "slice", "squeeze"),
        "transpose",
    )
)
# Bodies that hand nothing around.
_INLINE = frozenset({"custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint"})


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
            try:
                products[_free(path, products)] = _of_leaf(path, leaves[path], reader, outside)
            except Unfit as error:
                needed.add(path)
                name = f"{path}, read by {reader.op or 'the caller'}"
                left[_free(name, left)] = str(error)
    taken = {at.op for at in products.values()}
    for op, bodies in outside.items():
        if op in taken or op.name not in ("dot_general", "conv_general_dilated"):
            continue
        try:
            planned = _of_dense(op, program, bodies)
        except Unfit as error:
            left[_free(str(op), left)] = str(error)
        else:
            products.update({_free(str(op), products): planned} if planned else {})
    return Plan(products, left, frozenset(needed))


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """A name that is not taken."""
    count = itertools.count(2)
    found = name
    while found in taken:
        found = f"{name} ({next(count)})"
    return found


def _of_leaf(path: str, leaf: Any, reader: Reader, outside: Mapping[Op, Any]) -> Planned:
    if reader.obstacle or reader.op is None:
        raise Unfit(reader.obstacle or "it is an output of the model")
    kernel = KERNELS.get(type(leaf))
    if kernel is None:
        raise Unfit(f"no kernel reads a {type(leaf).__name__}")
    transposed = _is_transposed(reader)
    if transposed and kernel is not quantized_matmul:
        raise Unfit("its transpose is multiplied, which kernels do of quantized leaves alone")
    _check_place(reader.op, outside[reader.op])
    around = tuple(op for op, _ in outside[reader.op] if op.name not in _INLINE)
    loops, inputs = len(reader.loops), summed_axes(reader.op)

    def check(leaf: Any) -> None:
        layer = jax.tree.map(lambda part: part[(0,) * loops], stacked(leaf, loops))
        matrix = matrix_of(layer, inputs)
        if transposed and scales_are_spread(matrix):
            raise Unfit("its transpose is multiplied, and its scales differ along both axes")

    jax.eval_shape(check, leaf)
    how = {"operand": reader.operand, "transposed": transposed, "spent": around == reader.loops}
    return Planned(reader.op, kernel.__name__, path, reader.loops, **how)


def _is_transposed(reader: Reader) -> bool:
    """Whether a product sums over the last of a leaf's two axes; raises for what is none."""
    op, operand = reader.op, reader.operand
    assert op is not None
    steps = [step for step in reader.steps if step != TURN]
    turned = steps == [("transpose", (1, 0))]
    if steps and not turned:
        raise Unfit("its layout is changed before it is multiplied")
    if op.name == "conv_general_dilated":
        if operand != 1 or turned or not is_product(op):
            raise Unfit("it is a convolution of more than one position, or of another layout")
        return False
    if op.name != "dot_general" or len(op.inputs[operand].shape) != 2:
        _check_dot(op, operand)
        return False
    contracted, batch = op.params["dimension_numbers"]
    if batch[operand] or len(contracted[operand]) != 1:
        raise Unfit("it is not multiplied as a matrix")
    return (contracted[operand][0] == 1) != turned


def _check_dot(op: Op, operand: int) -> None:
    if op.name != "dot_general":
        raise Unfit(f"{op.name} is no matrix product")
    contracted, batch = op.params["dimension_numbers"]
    ndim, summed = len(op.inputs[1].shape), tuple(contracted[1])
    if (
        operand != 1
        or batch[0]
        or summed != tuple(range(len(summed)))
        or not 0 < len(summed) < ndim
    ):
        raise Unfit("it is not the right operand of a product over its first axes")


def _check_place(op: Op, bodies: Any) -> None:
    """That a product, of any kind, can be swapped where it stands."""
    if op.params.get("precision") not in (None, jax.lax.Precision.DEFAULT):
        asked = op.params["precision"]
        if any(each != jax.lax.Precision.DEFAULT for each in asked):
            raise Unfit(f"the product asks for the precision {asked}")
    if any(each.name in tapped.RULES for each, _ in bodies):
        raise Unfit("it is inside a function with a derivative of its own, which would be lost")
    reason = tapped.obstacle(bodies)
    if reason:
        raise Unfit(reason)


def _of_dense(op: Op, program: Program, bodies: Any) -> Planned | None:
    """A product with a weight that the program masks or rounds right there; None for any other."""
    block = bodies[-1][1] if bodies else program.block
    makers = _makers(block)
    made, through = _maker(op.inputs[1], makers)
    made, behind = _switched(made, makers)
    switched = bool(behind)
    rounding, reads = _rounded(made) if made is not None else (None, None)
    if made is not None and reads is None:
        # Where gradients go past it, no derivative of the mask's own is used.
        inside = made.name in tapped.RULES and through is not None
        reads = _masked_inside(made) if inside else _masked(made, makers)
    if reads is None:
        return _check_none(op, program, bodies, through)
    if op.name == "dot_general":
        _check_dot(op, 1)
        if rounding is not None and len(reads[0].shape) > 2:
            matrix_blocks(rounding.blocks, len(reads[0].shape), summed_axes(op))
    elif op.params["batch_group_count"] != 1:
        raise Unfit("it groups its batch")
    _check_place(op, bodies)
    summed, dtype = op.outputs[0].dtype, jnp.result_type(*(each.dtype for each in op.inputs[:2]))
    if jnp.promote_types(summed, dtype) != dtype:
        raise Unfit(f"its sums are kept in {summed}, which kernels would round to {dtype}")
    if through is not None:
        if reads[0].dtype != through.inputs[0].dtype:
            raise Unfit(f"its weight is cast to {reads[0].dtype} by what compresses it")
        behind = (*behind, through.inputs[0])
    kind = "matmul" if op.name == "dot_general" else "conv"
    name = f"masked_{kind}" if rounding is None else f"fake_quant_{kind}"
    return Planned(op, name, None, (), (*reads, *behind), rounding, switched, through)


def _makers(block: Block) -> dict[Value, Op]:
    return {out: op for op in block.ops for out in op.outputs}


def _check_none(op: Op, program: Program, bodies: Any, through: Op | None) -> None:
    """That a product without a kernel has no weight that was compressed, as far as it is noted."""
    if through is not None:
        raise Unfit(
            "kernels mask weights, and round them to a Format of fixed bits: what is done to this "
            "one is another thing"
        )
    for operand, value in enumerate(op.inputs[:2]):
        made, makers, passed = _origin(value, program, bodies)
        if made is None or (
            _note(made) is None and (operand == 0 or _masked(made, makers) is None)
        ):
            continue
        if operand == 0 and not passed:
            raise Unfit("its left operand is compressed, and kernels read the right one")
        raise Unfit(f"its weight is compressed before {passed}, and kernels do it right there")


def _origin(
    value: Value, program: Program, bodies: Any
) -> tuple[Op | None, dict[Value, Op], Op | None]:
    """What made a value, however it was laid out and handed inside since, and the last such step.

    Returns:
        The operation, the makers of the values beside it, and the first operation after it.
    """
    outside, passed = list(bodies), None
    while True:
        block = outside[-1][1] if outside else program.block
        makers = _makers(block)
        while (made := makers.get(value)) is not None and made.name in _LAYOUTS:
            value, passed = made.inputs[0], made
        if made is not None or value not in block.inputs or not outside:
            return made, makers, passed
        around, _ = outside.pop()
        # Where the inputs of the body are those of the operation, in their order.
        if around.name not in _INLINE | {"scan"}:
            return None, makers, passed
        value, passed = around.inputs[block.inputs.index(value)], around


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


def _switched(made: Op | None, makers: Mapping[Value, Op]) -> tuple[Op | None, tuple[Value, ...]]:
    """What rounds a weight, and the boolean that chooses between both, if there is one."""
    if made is None or made.name != "select_n" or len(made.inputs) != 3:
        return made, ()
    active, w, other = made.inputs
    maker = makers.get(other)
    reads = _rounded(maker)[1] if maker is not None else None
    if active.shape or active.dtype != jnp.bool_ or reads is None or reads[0] is not w:
        return made, ()
    return maker, (active,)


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
    makers = _makers(body)
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
