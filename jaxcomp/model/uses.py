"""Which operations read which parameter leaf, and as what.

A value that is computed from parameters and constants alone is *weight-side*: transposes, casts,
masks, normalizations and dequantization keep it so. The operation at which it meets a value that
depends on the model's inputs is a *use* of every leaf in it. What is not understood is reported as
a use of kind ``"other"`` that names the operation; nothing is skipped.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import numpy as np

from jaxcomp.model import trails as trail_lib
from jaxcomp.model.program import Block, Op, Program, Value, Wiring, wirings
from jaxcomp.model.roles import kind_and_roles
from jaxcomp.model.sides import State, follow
from jaxcomp.model.trails import Digit, Trail

_ROUNDS = 8
_OUTPUT = jex.Primitive("output")


class Part(NamedTuple):
    """Some positions of a leaf's axis, spread over one axis of the operand.

    Step ``i`` is ``i * leaf_stride`` further on the leaf's axis and at ``offset + i * stride`` on
    the operand's; the parts of an axis, and the parts on an operand's axis, add up.

    Attributes:
        size: how many steps.
        leaf_stride: positions of the leaf's axis a step; negative where reversed.
        axis: the operand's axis.
        stride: positions of the operand's axis a step.
        offset: where on the operand's axis the first step is.
    """

    size: int
    leaf_stride: int
    axis: int
    stride: int
    offset: int = 0


class AxisMap(NamedTuple):
    """Where a leaf's axis lies in the operand.

    Attributes:
        start: the leaf's position where all parts are at their first step.
        parts: slowest first; none where the operand holds one position only.
    """

    start: int
    parts: tuple[Part, ...]

    def positions(self) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """The leaf's positions in the operand, and for each operand axis where they are.

        Example:
            >>> AxisMap(4, (Part(2, 2, axis=0, stride=3),)).positions()
            (array([4, 6]), {0: array([0, 3])})
        """
        leaf = np.full((1,), self.start)
        where = {part.axis: np.zeros((1,), int) for part in self.parts}
        for part in self.parts:
            steps = np.arange(part.size)
            leaf = np.add.outer(leaf, steps * part.leaf_stride).ravel()
            for axis in where:
                move = part.offset + steps * part.stride if axis == part.axis else 0 * steps
                where[axis] = np.add.outer(where[axis], move).ravel()
        return leaf, where


class Use(NamedTuple):
    """One operation that reads one parameter leaf beside values that depend on the inputs.

    Attributes:
        path: the parameter leaf.
        op: the operation; a pseudo-operation ``output`` where the leaf reaches the outputs unused.
        operand: which input of ``op`` holds the weight.
        kind: ``"dot"``, ``"conv"``, ``"gather"``, ``"elementwise"`` or ``"other"``.
        roles: a word for each axis of the leaf: ``"input"`` (contracted, or looked up),
            ``"output"``, ``"batch"``, ``"kernel"`` (a convolution's window), ``"stack"`` (a loop or
            an index picks one position a time), ``"other"`` (reduced, broadcast, mixed).
        axes: where each axis of the leaf lies in the operand; None where the positions are not one
            fixed set (a loop walks them, a reduction mixes them).
        trips: how often the operation runs, over the loops around it and the devices of a
            ``shard_map``; None if only the running program knows.
    """

    path: str
    op: Op
    operand: int
    kind: str
    roles: tuple[str, ...]
    axes: tuple[AxisMap | None, ...]
    trips: int | None


def find_uses(program: Program) -> tuple[Use, ...]:
    """Every use of every parameter leaf, in the order of the program.

    Args:
        program: from :func:`jaxcomp.model.program.read`.

    Returns:
        The uses. A leaf that no use names has no influence on the outputs.

    Example:
        >>> from jaxcomp.model.program import read
        >>> def model(params, x):
        ...     return x @ params["kernel"].T.astype(x.dtype) + params["bias"]
        >>> params = {"kernel": np.ones((3, 2), np.float16), "bias": np.ones(3, np.float32)}
        >>> for use in find_uses(read(model, params, np.ones((5, 2), np.float32))):
        ...     print(use.path, use.kind, use.roles)
        kernel dot ('output', 'input')
        bias elementwise ('output',)
    """
    walker = _Walker()
    for path, value in program.leaves.items():
        walker.states[value] = (trail_lib.begin(path, value.shape),)
    for value in program.inputs:
        walker.states[value] = None
    walker.block(program.block, 1, report=True)
    for value in program.block.outputs:
        op = Op(_OUTPUT, {}, (value,), ())
        walker.uses += [use for use in walker.used(op, 1) if use not in walker.uses]
    return tuple(walker.uses)


def live_ops(block: Block) -> tuple[Op, ...]:
    """The operations of a block that its outputs, or the world outside, depend on.

    Args:
        block: of a program; all its outputs count as wanted.

    Example:
        >>> from jaxcomp.model.program import read
        >>> def model(w, x):
        ...     unused = x @ w
        ...     return x + 1
        >>> [op.name for op in live_ops(read(model, np.ones((2, 2)), np.ones((2, 2))).block)]
        ['add']
    """
    wanted, kept = set(block.outputs), []
    for op in reversed(block.ops):
        # Without outputs an operation is there for what it does: printing, calling back.
        if not op.outputs or not wanted.isdisjoint(op.outputs):
            kept.append(op)
            wanted.update(op.inputs)
    return tuple(reversed(kept))


class _Walker:
    """Follows every value through a program; ``states`` says what each depends on."""

    def __init__(self) -> None:
        self.states: dict[Value, State] = {}
        self.uses: list[Use] = []

    def state(self, value: Value) -> State:
        return self.states.get(value, ())

    def block(self, block: Block, trips: int | None, report: bool) -> None:
        for op in live_ops(block):
            if op.blocks:
                self.nested(op, trips, report)
                continue
            states = tuple(map(self.state, op.inputs))
            results = follow(op, states)
            if results is None:
                if report:
                    self.uses += self.used(op, trips)
                results = tuple(None if None in states else () for _ in op.outputs)
            self.states.update(zip(op.outputs, results, strict=True))

    def used(self, op: Op, trips: int | None, only: Sequence[int] | None = None) -> list[Use]:
        """The uses at an operation (of some of its inputs)."""
        return [
            _use(op, operand, trail, trips)
            for operand, value in enumerate(op.inputs)
            if only is None or operand in only
            for trail in self.state(value) or ()
        ]

    def nested(self, op: Op, trips: int | None, report: bool) -> None:
        """An operation with bodies: what goes in, around and out."""
        leaving: list[list[State]] = [[] for _ in op.outputs]
        absorbed: set[int] = set()
        for wiring in wirings(op):
            inside = _times(trips, devices(op) if op.name == "shard_map" else wiring.trips)
            self.enter(op, wiring)
            absorbed |= self.turn(op, wiring, inside)
            if report:
                self.block(wiring.block, inside, report=True)
            for output, link in zip(op.outputs, wiring.leave, strict=False):
                state = _outside(op, wiring, output, link.inner, self.state(link.inner))
                leaving[op.outputs.index(output)].append(state)
        results = [_join(states) for states in leaving]
        if op.name == "cond" and self.state(op.inputs[0]) is None:
            # Which branch was taken depends on the inputs, so what comes out does.
            for states in zip(
                *(map(self.state, block.outputs) for block in op.blocks), strict=True
            ):
                absorbed |= {i for i, v in enumerate(op.inputs) if _shares(self.state(v), states)}
            results = [None] * len(results)
        if report:
            self.uses += self.used(op, trips, sorted(absorbed))
        self.states.update(zip(op.outputs, results, strict=True))

    def enter(self, op: Op, wiring: Wiring) -> None:
        for i, link in enumerate(wiring.enter):
            self.states[link.inner] = _inside(op, i, link.stacked, self.state(link.outer))

    def turn(self, op: Op, wiring: Wiring, trips: int | None) -> set[int]:
        """Go round a loop until nothing changes; which inputs a carry of the data took up."""
        first = {inner: self.state(inner) for _, inner in wiring.carry}
        for round_ in range(3 * _ROUNDS):
            self.block(wiring.block, trips, report=False)
            changed = False
            for after, before in wiring.carry:
                state = _join([self.state(before), self.state(after)])
                if round_ >= _ROUNDS and state:
                    # Never twice the same: keep what all turns agree on, in the end nothing.
                    state = trail_lib.common(state, nothing=round_ >= 2 * _ROUNDS)
                changed |= state != self.state(before)
                self.states[before] = state
            if not changed:
                break
        taken = {inner for inner, state in first.items() if state and self.state(inner) is None}
        return {i for i, link in enumerate(op.inputs) if _feeds(wiring, link, taken)}


def _feeds(wiring: Wiring, outer: Value, inner: set[Value]) -> bool:
    return any(link.outer is outer and link.inner in inner for link in wiring.enter)


def _shares(state: State, others: Sequence[State]) -> bool:
    """Whether a weight-side value holds a leaf that some of the others hold."""
    paths = {trail.path for other in others for trail in other or ()}
    return any(trail.path in paths for trail in state or ())


def _join(states: Sequence[State]) -> State:
    trails: list[Trail] = []
    for state in states:
        if state is None:
            return None
        trails += state
    return trail_lib.settle(trails)


def _inside(op: Op, i: int, stacked: bool, state: State) -> State:
    if not state:
        return state
    if stacked:
        return trail_lib.settle(trail_lib.enter_loop(trail, id(op)) for trail in state)
    if op.name == "shard_map":
        parts = _split(op, op.params["in_specs"][i], len(op.inputs[i].shape))
        return trail_lib.settle(_each(trail_lib.shard, trail, parts) for trail in state)
    return state


def _outside(op: Op, wiring: Wiring, output: Value, inner: Value, state: State) -> State:
    if not state:
        return state
    stacked = any(link.outer is output and link.stacked for link in wiring.leave)
    if stacked:
        trips = output.shape[0]
        return trail_lib.settle(trail_lib.leave_loop(trail, id(op), trips) for trail in state)
    if op.name == "shard_map":
        parts = [a // b for a, b in zip(output.shape, inner.shape, strict=True)]
        return trail_lib.settle(_each(trail_lib.unshard, trail, parts) for trail in state)
    return state


def _each(change: Any, trail: Trail, parts: Sequence[int]) -> Trail:
    for axis, count in enumerate(parts):
        trail = change(trail, axis, count)
    return trail


def _split(op: Op, spec: Any, rank: int) -> list[int]:
    """Over how many devices each axis of a ``shard_map`` input is split."""
    sizes = dict(op.params["mesh"].shape)
    names = [() if n is None else (n,) if isinstance(n, str) else tuple(n) for n in spec]
    return [math.prod(sizes[n] for n in group) for group in names] + [1] * (rank - len(names))


def devices(op: Op) -> int:
    """How many devices run the body of a ``shard_map`` on parts of their own."""
    sizes = dict(op.params["mesh"].shape)
    manual = op.params.get("newly_manual_axes", op.params.get("manual_axes", sizes))
    return math.prod(sizes[name] for name in manual)


def _times(outer: int | None, inner: int | None) -> int | None:
    return None if outer is None or inner is None else outer * inner


def _use(op: Op, operand: int, trail: Trail, trips: int | None) -> Use:
    kind, roles = kind_and_roles(op, operand, trail)
    axes = tuple(_axis_map(trail, axis) for axis in range(len(trail.shape)))
    return Use(trail.path, op, operand, kind, roles, axes, trips)


def _axis_map(trail: Trail, axis: int) -> AxisMap | None:
    held = trail_lib.leaf_axes(d for key, ds in trail.stacked if key is not None for d in ds)
    unknown = trail.lost | trail.vague | held
    for digits in trail.axes:
        # Where positions add up to those of an axis that is not known, neither is.
        found = trail_lib.leaf_axes(digits)
        if axis in found and (found & unknown or trail_lib.holds_lost(digits)):
            return None
    if axis in unknown:
        return None
    parts = tuple(
        Part(digit.size, digit.stride, where, stride, offset)
        for where, digits in enumerate(trail.axes)
        for digit, stride, offset in _strides(digits, 1, 0)
        if digit.axis == axis
    )
    return AxisMap(trail.starts[axis], tuple(sorted(parts, key=lambda p: -abs(p.leaf_stride))))


def _strides(digits: Sequence[Digit], stride: int, offset: int) -> list[tuple[Digit, int, int]]:
    """Each digit that walks the leaf, its stride and its offset on the array's axis.

    Positions of several digits add up, so what lies before them all is counted with the first.
    """
    found: list[tuple[Digit, int, int]] = []
    stride *= trail_lib.length(digits)
    for digit in digits:
        stride //= digit.size
        if digit.inside:
            found += _strides(digit.inside, stride, 0)
            offset += digit.offset * stride
        elif digit.axis >= 0:
            found.append((digit, stride, 0))
    if found:
        first, step, before = found[0]
        found[0] = (first, step, before + offset)
    return found
