"""What an operation makes of weight-side values: the rules of :mod:`jaxcomp.model.uses`."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxcomp.model import trails as trail_lib
from jaxcomp.model.cost import ELEMENTWISE, REDUCTIONS
from jaxcomp.model.program import Op, Value
from jaxcomp.model.trails import Trail

# Of a value: None if it depends on the model's inputs, else the leaves in it (none: a constant).
State = tuple[Trail, ...] | None

# As many outputs as inputs, each the same value.
_BUNDLES = frozenset({"optimization_barrier", "device_put"})
_States = tuple[State, ...]


def follow(op: Op, states: _States) -> tuple[State, ...] | None:
    """What an operation without bodies makes of its inputs.

    Args:
        op: the operation.
        states: of its inputs.

    Returns:
        The states of its outputs; None if it is a use: weights meet data there, or they meet an
        operation that has no rule.
    """
    if op.name in _BUNDLES:
        return states
    weights = [i for i, state in enumerate(states) if state]
    if not weights:
        return tuple(None if None in states else () for _ in op.outputs)
    if None in states:
        return None
    if op.name in ELEMENTWISE:
        shape = op.outputs[0].shape
        kept = [trail_lib.spread(t, shape) for state in states for t in state or ()]
        return tuple(trail_lib.settle(kept) for _ in op.outputs)
    rule = _RULES.get(op.name)
    if rule is None and op.name in REDUCTIONS:
        rule = _reduce
    if rule is None:
        return None
    return tuple(
        trail_lib.settle(trail for trail in row if trail is not None) for row in rule(op, states)
    )


def _rows(op: Op, state: State, change: Callable[[Trail, Value], Trail | None]) -> Any:
    return [[change(trail, output) for trail in state or ()] for output in op.outputs]


def _ints(numbers: Iterable[Any]) -> tuple[int, ...]:
    # jnp hands NumPy's integers on to the jaxpr.
    return tuple(int(number) for number in numbers)


def _transpose(op: Op, states: _States) -> Any:
    order = _ints(op.params["permutation"])
    return _rows(op, states[0], lambda trail, _: trail_lib.permute(trail, order))


def _reshape(op: Op, states: _States) -> Any:
    order = op.params.get("dimensions")

    def change(trail: Trail, output: Value) -> Trail:
        trail = trail if order is None else trail_lib.permute(trail, _ints(order))
        return trail_lib.reshape(trail, output.shape)

    return _rows(op, states[0], change)


def _broadcast(op: Op, states: _States) -> Any:
    where = _ints(op.params["broadcast_dimensions"])
    return _rows(op, states[0], lambda t, output: trail_lib.broadcast(t, output.shape, where))


def _squeeze(op: Op, states: _States) -> Any:
    gone = _ints(op.params["dimensions"])
    return _rows(op, states[0], lambda trail, _: trail_lib.remove(trail, gone))


def _reduce(op: Op, states: _States) -> Any:
    gone = _ints(op.params["axes"])
    return _rows(op, states[0], lambda trail, _: trail_lib.remove(trail, gone))


def _slice(op: Op, states: _States) -> Any:
    starts = _ints(op.params["start_indices"])
    steps = _ints(op.params["strides"] or ()) or (1,) * len(starts)
    return _rows(op, states[0], lambda t, output: _window(t, starts, output.shape, steps))


def _dynamic_slice(op: Op, states: _States) -> Any:
    starts = tuple(_known_start(value) for value in op.inputs[1:])
    rows = _rows(op, states[0], lambda t, output: _window(t, starts, output.shape))
    # A parameter that says where to look (or how much to shift) has no axes left in the result.
    indices = [trail for state in states[1:] for trail in state or ()]
    shape = op.outputs[0].shape
    return [row + [trail_lib.spread(trail, shape) for trail in indices] for row in rows]


def _known_start(value: Value) -> int | None:
    return None if value.constant is None else int(np.asarray(value.constant))


def _window(
    trail: Trail,
    starts: Iterable[int | None],
    shape: tuple[int, ...],
    steps: Iterable[int] | None = None,
) -> Trail | None:
    steps = (1,) * len(shape) if steps is None else steps
    for axis, (start, count, step) in enumerate(zip(starts, shape, steps, strict=True)):
        found = trail_lib.cut(trail, axis, start, count, step)
        if found is None:
            return None
        trail = found
    return trail


def _split(op: Op, states: _States) -> Any:
    axis, sizes = int(op.params["axis"]), _ints(op.params["sizes"])
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    return [
        [trail_lib.cut(trail, axis, start, size) for trail in states[0] or ()]
        for start, size in zip(starts, sizes, strict=True)
    ]


def _stack(op: Op, states: _States) -> Any:
    axis, size = int(op.params["axis"]), len(op.inputs)
    return [
        [trail_lib.stack(t, axis, i, size) for i, state in enumerate(states) for t in state or ()]
    ]


def _unstack(op: Op, states: _States) -> Any:
    axis = int(op.params["axis"])
    cuts = [
        [trail_lib.cut(trail, axis, i, 1) for trail in states[0] or ()]
        for i in range(len(op.outputs))
    ]
    return [[t and trail_lib.remove(t, [axis]) for t in row] for row in cuts]


def _tile(op: Op, states: _States) -> Any:
    repeats = _ints(op.params["reps"])
    return _rows(op, states[0], lambda trail, _: trail_lib.tile(trail, repeats))


def _concatenate(op: Op, states: _States) -> Any:
    axis, row, offset = int(op.params["dimension"]), [], 0
    size = op.outputs[0].shape[axis]
    for value, state in zip(op.inputs, states, strict=True):
        row += [trail_lib.embed(trail, axis, offset, size) for trail in state or ()]
        offset += value.shape[axis]
    return [row]


def _pad(op: Op, states: _States) -> Any:
    (output,) = op.outputs

    def change(trail: Trail) -> Trail | None:
        for axis, (low, high, interior) in enumerate(map(_ints, op.params["padding_config"])):
            if interior:
                return trail_lib.spoil(trail, output.shape)
            held = op.inputs[0].shape[axis]
            start, stop = max(0, -low), held + min(0, high)
            found = trail_lib.cut(trail, axis, start, stop - start)
            if found is None:
                return None
            trail = trail_lib.embed(found, axis, max(0, low), output.shape[axis])
        return trail

    filling = [trail_lib.spread(trail, output.shape) for trail in states[1] or ()]
    return [[*map(change, states[0] or ()), *filling]]


def _reverse(op: Op, states: _States) -> Any:
    def change(trail: Trail, _: Value) -> Trail:
        for axis in _ints(op.params["dimensions"]):
            trail = trail_lib.reverse(trail, axis)
        return trail

    return _rows(op, states[0], change)


def _all_gather(op: Op, states: _States) -> Any:
    axis, parts = _ints((op.params["all_gather_dimension"], op.params["axis_size"]))

    def change(trail: Trail, output: Value) -> Trail:
        if op.params["tiled"]:
            return trail_lib.unshard(trail, axis, parts)
        where = [i for i in range(len(output.shape)) if i != axis]
        return trail_lib.broadcast(trail, output.shape, where)

    return _rows(op, states[0], change)


def _dot(op: Op, states: _States) -> Any:
    """A product of two weights (low-rank factors): free axes stay, contracted ones are mixed."""
    (contracted, batch), row = op.params["dimension_numbers"], []
    shape = op.outputs[0].shape
    free = [
        [i for i in range(len(v.shape)) if i not in (*contracted[side], *batch[side])]
        for side, v in enumerate(op.inputs)
    ]
    for side, state in enumerate(states):
        first = len(batch[0]) + (len(free[0]) if side else 0)
        kept = [*batch[side], *free[side]]
        where = [*range(len(batch[0])), *range(first, first + len(free[side]))]
        for trail in state or ():
            trail = trail_lib.permute(trail_lib.mix(trail, contracted[side]), kept)
            row.append(trail_lib.broadcast(trail, shape, where))
    return [row]


def _gather(op: Op, states: _States) -> Any:
    """Rows picked by a constant: what is not indexed stays."""
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(len(sizes)) if axis not in dropped]
    (output,) = op.outputs
    partial = [axis for axis in kept if sizes[axis] != op.inputs[0].shape[axis]]
    row = []
    for trail in states[0] or ():
        trail = trail_lib.mix(trail, (*dropped, *partial))
        trail = trail_lib.permute(trail, kept)
        axes = tuple(
            trail_lib.foreign(sizes[axis]) if axis in partial else trail.axes[i]
            for i, axis in enumerate(kept)
        )
        trail = trail._replace(axes=axes)
        row.append(trail_lib.broadcast(trail, output.shape, numbers.offset_dims))
    return [row + [trail_lib.spread(t, output.shape) for t in states[1] or ()]]


_RULES: dict[str, Callable[[Op, _States], Any]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "pad": _pad,
    "rev": _reverse,
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    "dot_general": _dot,
    "gather": _gather,
}
