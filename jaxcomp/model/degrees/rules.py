"""How each operation ties the degrees of its results to those of its inputs.

An operation without a rule is not homogeneous as far as anybody knows: all it touches has degree
zero.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from jaxcomp.model.degrees.walk import (
    ONE,
    Degree,
    Moves,
    Slot,
    Walk,
    minus,
    moved,
    plus,
    times,
)
from jaxcomp.model.dims import Dim, atoms, factors
from jaxcomp.model.program import Op, Value

_POWERS: dict[str, Fraction] = {
    **dict.fromkeys(
        ("abs", "convert_element_type", "copy", "copy_p", "device_put", "mesh_cast", "name", "neg"),
        ONE,
    ),
    **dict.fromkeys(("optimization_barrier", "pvary", "real", "reduce_precision", "reshard"), ONE),
    **dict.fromkeys(("sharding_constraint", "stop_gradient"), ONE),
    **dict.fromkeys(("sign", "is_finite"), Fraction(0)),
    "sqrt": Fraction(1, 2),
    "rsqrt": Fraction(-1, 2),
    "cbrt": Fraction(1, 3),
    "square": Fraction(2),
}
_ALIKE = frozenset({"add", "add_any", "sub", "max", "min", "clamp"})
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_SUMS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_WINDOWS = frozenset({"reduce_window_sum", "reduce_window_max", "reduce_window_min"})
_RUNS = frozenset({"cumsum", "cummax", "cummin"})


def _power(walk: Walk, op: Op) -> None:
    power = _POWERS.get(op.name) if op.name in _POWERS else Fraction(op.params["y"])
    assert power is not None
    for value, result in zip(op.inputs, op.outputs, strict=True):
        degrees = walk.of(value)
        if degrees is None:
            walk.degrees[result] = None if power > 0 else {}
        elif np.dtype(result.dtype).kind in "iu" and op.name != "sign":
            _cut_off(walk, op, f"{op} rounds")
        else:
            walk.put(result, ((s, times(d, power)) for s, d in degrees.items()), op)


def _alike(walk: Walk, op: Op) -> None:
    degrees = walk.alike(op, op.inputs)
    if degrees is None:
        walk.degrees[op.outputs[0]] = None
    else:
        walk.put(op.outputs[0], degrees.items(), op)


def _compare(walk: Walk, op: Op) -> None:
    walk.alike(op, op.inputs)
    walk.degrees[op.outputs[0]] = {}


def _select(walk: Walk, op: Op) -> None:
    walk.need_none(op.inputs[0], op)
    degrees = walk.alike(op, op.inputs[1:])
    if degrees is None:
        walk.degrees[op.outputs[0]] = None
    else:
        walk.put(op.outputs[0], degrees.items(), op)


def _product(walk: Walk, op: Op) -> None:
    left, right = map(walk.of, op.inputs)
    (result,) = op.outputs
    if left is None or (right is None and op.name == "mul"):
        walk.degrees[result] = None
        return
    sign = -ONE if op.name == "div" else ONE
    total = {slot: plus(left.get(slot, {}), times(d, sign)) for slot, d in (right or {}).items()}
    walk.put(result, {**left, **total}.items(), op)


def _transpose(walk: Walk, op: Op) -> None:
    order = list(op.params["permutation"])
    walk.move(op, op.inputs[0], op.outputs[0], lambda axis, i: (order.index(axis), i))


def _squeeze(walk: Walk, op: Op) -> None:
    gone = op.params["dimensions"]
    walk.move(op, op.inputs[0], op.outputs[0], lambda axis, i: (_left(axis, gone), i))


def _expand(walk: Walk, op: Op) -> None:
    new = op.params["dimensions"]
    kept = [axis for axis in range(len(op.outputs[0].shape)) if axis not in new]
    walk.move(op, op.inputs[0], op.outputs[0], lambda axis, i: (kept[axis], i))


def _broadcast(walk: Walk, op: Op) -> None:
    where = op.params["broadcast_dimensions"]
    walk.move(op, op.inputs[0], op.outputs[0], lambda axis, i: (where[axis], i))


def _reshape(walk: Walk, op: Op) -> None:
    before, after = (_in_order(walk, value) for value in (op.inputs[0], op.outputs[0]))

    def moves(axis: int, i: int) -> tuple[int, int] | None:
        atom = walk.places(walk.flow.of(op.inputs[0])[axis])[i][0]
        mine, theirs = before.get(atom, []), after.get(atom, [])
        return theirs[mine.index((axis, i))] if len(mine) == len(theirs) else None

    walk.move(op, op.inputs[0], op.outputs[0], moves)


def _in_order(walk: Walk, value: Value) -> dict[Dim, list[tuple[int, int]]]:
    found: dict[Dim, list[tuple[int, int]]] = {}
    for axis, dim in enumerate(walk.flow.of(value)):
        for i, (atom, _) in enumerate(walk.places(dim)):
            found.setdefault(atom, []).append((axis, i))
    return found


def _slice(walk: Walk, op: Op) -> None:
    (value,), (result,) = op.inputs, op.outputs
    strides = op.params["strides"] or (1,) * len(value.shape)
    steps = [
        walk.same_places(value, result, axis, start, stride)
        for axis, (start, stride) in enumerate(
            zip(op.params["start_indices"], strides, strict=True)
        )
    ]
    walk.move(op, value, result, lambda axis, i: steps[axis](axis, i))


def _split(walk: Walk, op: Op) -> None:
    axis, start = op.params["axis"], 0
    kept: set[Slot] = set()
    degrees = walk.of(op.inputs[0])
    for result in op.outputs:
        moves = walk.same_places(op.inputs[0], result, axis, start)
        start += result.shape[axis]
        if degrees is None:
            walk.degrees[result] = None
            continue
        goes = {slot: moved(slot, moves) for slot in degrees}
        own = {slot: to for slot, to in goes.items() if to is not None}
        kept |= own.keys()
        walk.put(result, ((to, degrees[slot]) for slot, to in own.items()), op)
    for slot, degree in (degrees or {}).items():
        if slot not in kept:
            walk.need(degree, op)


def _concatenate(walk: Walk, op: Op) -> None:
    axis, start = op.params["dimension"], 0
    (result,) = op.outputs
    gathered: dict[Slot | None, list[Degree]] = {}
    shared = {slot for slot in walk.slots(result) if all(at != axis for at, _ in slot)}
    zeros = True
    for value in op.inputs:
        # Positions of an input lie `start` further on in the result.
        moves = walk.same_places(value, result, axis, -start)
        start += value.shape[axis]
        degrees = walk.of(value)
        if degrees is None:
            continue
        zeros = False
        goes = {moved(slot, moves): degree for slot, degree in degrees.items()}
        for slot in shared - goes.keys():
            goes[slot] = {}
        for slot, degree in goes.items():
            gathered.setdefault(slot, []).append(degree)
    for slot, found in gathered.items():
        for other in found[1:] if slot is not None else ():
            walk.need(minus(found[0], other), f"{op} mixes them with what scales otherwise")
    if zeros:
        walk.degrees[result] = None
    else:
        rows = (
            (s, d) for s, found in gathered.items() for d in (found if s is None else found[:1])
        )
        walk.put(result, rows, op)


def _pad(walk: Walk, op: Op) -> None:
    value, filler = op.inputs
    config = op.params["padding_config"]
    if walk.of(filler) is not None or any(step for _, _, step in config):
        opaque(walk, op)
        return
    steps = [
        walk.same_places(value, op.outputs[0], axis, -low)
        for axis, (low, _, _) in enumerate(config)
    ]
    walk.move(op, value, op.outputs[0], lambda axis, i: steps[axis](axis, i))


def _reduce(walk: Walk, op: Op) -> None:
    gone = op.params["axes"]
    moves: Moves = lambda axis, i: None if axis in gone else (_left(axis, gone), i)
    walk.move(op, op.inputs[0], op.outputs[0], moves, f"{op} runs over them")


def _window(walk: Walk, op: Op) -> None:
    window, shape = op.params["window_dimensions"], op.outputs[0].shape
    walk.move(
        op,
        op.inputs[0],
        op.outputs[0],
        lambda axis, i: (
            (axis, i) if window[axis] == 1 and shape[axis] == op.inputs[0].shape[axis] else None
        ),
    )


def _run(walk: Walk, op: Op) -> None:
    along = op.params["axis"]
    moves: Moves = lambda axis, i: None if axis == along else (axis, i)
    walk.move(op, op.inputs[0], op.outputs[0], moves)


def _reverse(walk: Walk, op: Op) -> None:
    turned = op.params["dimensions"]
    moves: Moves = lambda axis, i: None if axis in turned else (axis, i)
    walk.move(op, op.inputs[0], op.outputs[0], moves)


def _gather(walk: Walk, op: Op) -> None:
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    shape = op.inputs[0].shape
    windows = iter(numbers.offset_dims)
    goes = {axis: next(windows) for axis in range(len(shape)) if axis not in gone}
    looked_up = {*gone, *numbers.start_index_map}

    def moves(axis: int, i: int) -> tuple[int, int] | None:
        whole = sizes[axis] == shape[axis] and axis not in looked_up
        return (goes[axis], i) if whole else None

    walk.need_none(op.inputs[1], op)
    walk.move(op, op.inputs[0], op.outputs[0], moves)


def _dynamic_slice(walk: Walk, op: Op) -> None:
    sizes, shape = op.params["slice_sizes"], op.inputs[0].shape
    moves: Moves = lambda axis, i: (axis, i) if sizes[axis] == shape[axis] else None
    walk.move(op, op.inputs[0], op.outputs[0], moves)


def _dot(walk: Walk, op: Op) -> None:
    contracted, batch = op.params["dimension_numbers"]
    free = [
        [a for a in range(len(v.shape)) if a not in (*contracted[side], *batch[side])]
        for side, v in enumerate(op.inputs)
    ]
    offsets = (len(batch[0]), len(batch[0]) + len(free[0]))

    def name(operand: int, axis: int, i: int) -> tuple[Any, int | None]:
        if axis in contracted[operand]:
            return ("summed", contracted[operand].index(axis), i), None
        if axis in batch[operand]:
            where = batch[operand].index(axis)
            return ("batch", where, i), where
        where = offsets[operand] + free[operand].index(axis)
        return ("free", where, i), where

    walk.contract(op, name)


def _conv(walk: Walk, op: Op) -> None:
    numbers, groups = op.params["dimension_numbers"], op.params["feature_group_count"]
    axes = [walk.flow.of(value) for value in op.inputs]
    heads = (
        _leading(axes[0][numbers.lhs_spec[1]], groups),
        _leading(axes[1][numbers.rhs_spec[0]], groups),
    )
    if op.params["batch_group_count"] != 1 or None in heads:
        opaque(walk, op)
        return
    batch, channel = numbers.out_spec[:2]

    def name(operand: int, axis: int, i: int) -> tuple[Any, int | None]:
        head = heads[operand] or 0
        if axis == (numbers.lhs_spec[1], numbers.rhs_spec[0])[operand]:
            if i < head:
                return ("group", i), channel
            return (("summed", i - head), None) if operand == 0 else (("out", i), channel)
        if operand == 1 and axis == numbers.rhs_spec[1]:
            return ("summed", i), None
        if operand == 0 and axis == numbers.lhs_spec[0]:
            return ("batch", i), batch
        return ("window", operand, axis, i), None

    walk.contract(op, name)


def opaque(walk: Walk, op: Op) -> None:
    """The rule for all others."""
    _cut_off(walk, op, f"{op} is not homogeneous")


def _cut_off(walk: Walk, op: Op, reason: str) -> None:
    touched = [degree for v in op.inputs for degree in (walk.of(v) or {}).values() if degree]
    for degree in touched:
        walk.need(degree, reason)
    for value in op.outputs:
        walk.degrees[value] = {}
        if touched:
            walk.cut(value, reason)


def _leading(dim: Dim, groups: int) -> int | None:
    """How many atoms make up the groups of a grouped convolution's axis; None if they do not."""
    size, count = 1, 0
    if groups == 1:
        return 0
    for factor in factors(dim):
        size, count = size * factor.size, count + len(list(atoms(factor)))
        if size == groups:
            return count
    return None


def _left(axis: int, gone: Sequence[int]) -> int:
    return axis - sum(other < axis for other in gone)


RULES: dict[str, Callable[[Walk, Op], None]] = {
    **dict.fromkeys(_ALIKE, _alike),
    **dict.fromkeys(_COMPARISONS, _compare),
    **dict.fromkeys(_SUMS, _reduce),
    **dict.fromkeys(_WINDOWS, _window),
    **dict.fromkeys(_RUNS, _run),
    **dict.fromkeys((*_POWERS, "integer_pow"), _power),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "div": _product,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "expand_dims": _expand,
    "gather": _gather,
    "mul": _product,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
