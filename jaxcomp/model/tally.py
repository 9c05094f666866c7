"""The cost of a whole program, at its own shapes or at smaller ones."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxcomp.model.cost import NOTHING, Cost, is_counted, op_cost
from jaxcomp.model.program import Block, Op, Value, wirings
from jaxcomp.model.uses import devices, live_ops

Shape = Callable[[Value], tuple[int, ...]]


def full_shape(value: Value) -> tuple[int, ...]:
    """The shape that a value was traced with."""
    return value.shape


def cost_of(op: Op, shape: Shape = full_shape) -> Cost:
    """The cost of one operation without its bodies.

    Args:
        op: the operation.
        shape: the shape of each value.

    Returns:
        Its cost.
    """
    return op_cost(
        op.name,
        op.params,
        [shape(value) for value in op.inputs],
        [shape(value) for value in op.outputs],
        [value.dtype for value in op.inputs],
        [value.dtype for value in op.outputs],
    )


class Tally:
    """Adds up a program, and notes what the sum assumes.

    Attributes:
        uncounted: operations whose FLOPs are not known, and how many of each there are.
        notes: what the sum assumes: unknown loops, branches.
    """

    def __init__(self, shape: Shape = full_shape) -> None:
        self.uncounted: dict[str, int] = {}
        self.notes: list[str] = []
        self._shape = shape
        self._numbers: dict[Value, float] = {}

    def block(self, block: Block) -> Cost:
        """The cost of a block, with the bodies of its loops as often as they run."""
        return sum((self.op(op) for op in live_ops(block)), NOTHING)

    def op(self, op: Op) -> Cost:
        """The cost of one operation, with the bodies of a loop as often as they run."""
        if not op.blocks:
            if not is_counted(op.name):
                self.uncounted[op.name] = self.uncounted.get(op.name, 0) + 1
            return NOTHING if self._idle(op) else cost_of(op, self._shape)
        if op.name not in ("scan", "while", "cond", "shard_map"):
            for inner, outer in zip(op.blocks[0].inputs, op.inputs, strict=True):
                self._know(inner, self._number(outer))
        bodies = [self.block(wiring.block) for wiring in wirings(op)]
        if op.name == "cond":
            if len(set(bodies)) > 1:
                self.notes.append(f"{op}: the dearest of {len(bodies)} branches is counted")
            return max(bodies, key=lambda cost: (cost.flops, cost.bytes))
        if op.name == "while":
            self.notes.append(f"{op}: unknown number of turns, counted per iteration")
        times = devices(op) if op.name == "shard_map" else 1
        turns = [1 if wiring.trips is None else wiring.trips for wiring in wirings(op)]
        return sum((b.times(n * times) for b, n in zip(bodies, turns, strict=True)), NOTHING)

    def _idle(self, op: Op) -> bool:
        """Whether an operation hands on what it is given, as XLA sees without optimizing."""
        if op.name in ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze"):
            self._know(op.outputs[0], self._number(op.inputs[0]))
        numbers = [self._number(value) for value in op.inputs]
        return (
            (op.name == "add" and 0 in numbers)
            or (op.name == "sub" and numbers[1] == 0)
            or (op.name == "mul" and 1 in numbers)
        )

    def _number(self, value: Value) -> float | None:
        """The one number that a value holds throughout, where the program spells it out."""
        constant = value.constant
        if isinstance(constant, bool) or constant is None or np.size(constant) != 1:
            return self._numbers.get(value)
        known = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(
            value.dtype, jnp.integer
        )
        return float(np.asarray(constant).ravel()[0]) if known else None

    def _know(self, value: Value, number: float | None) -> None:
        if number is not None:
            self._numbers[value] = number
