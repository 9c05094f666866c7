"""Which axes of a program's arrays are the same channels.

Every array of the program gets a :class:`~jaxcomp.model.dims.Dim` an axis. The rules of
:mod:`~jaxcomp.model.axis_rules` say what each operation makes of its inputs' axes; here they are
applied from the parameters to the outputs, through loops, branches and wrappers.
"""

from collections.abc import Sequence

from jaxcomp.model.axes import Flow
from jaxcomp.model.axis_rules import RULES, opaque
from jaxcomp.model.program import Block, Op, Program, wirings


def follow(program: Program, others: Sequence[Program] = ()) -> Flow:
    """Give every array of a program its axes.

    Args:
        program: a traced function.
        others: other functions of the same parameters, whose ties count as well.

    Returns:
        The axes, with the models' inputs fixed; their outputs are left to the caller.
    """
    flow = Flow()
    for value in program.leaves.values():
        flow.axes[value] = flow.fresh(value)
    for other in others:
        for value, first in zip(other.leaves.values(), program.leaves.values(), strict=True):
            flow.axes[value] = flow.of(first)
    for each in (program, *others):
        _follow_program(flow, each)
    return flow


def _follow_program(flow: Flow, program: Program) -> None:
    for value in program.inputs:
        flow.axes[value] = flow.fresh(value, "is an axis of the model's inputs")
    follow_block(flow, program.block)


def follow_block(flow: Flow, block: Block) -> None:
    """The same for a block whose inputs have their axes already."""
    for op in block.ops:
        if op.blocks and op.name != "shard_map":
            _bodies(flow, op)
            continue
        rule = RULES.get(op.name, opaque)
        for value, axes in zip(op.outputs, rule(flow, op), strict=True):
            flow.axes[value] = axes


def _bodies(flow: Flow, op: Op) -> None:
    """A loop, a branch or a wrapper: its bodies' axes are those outside."""
    for value in op.outputs:
        flow.axes[value] = flow.fresh(value)
    for wiring in wirings(op):
        for outer, inner, stacked in wiring.enter:
            axes = flow.of(outer)
            if stacked:
                flow.dims.fix(axes[0], f"{op} walks along it")
                axes = axes[1:]
            # Axes of their own, united: each turn of a loop then reports its own reason.
            flow.axes[inner] = flow.fresh(inner)
            flow.unite(flow.axes[inner], axes, str(op))
        follow_block(flow, wiring.block)
        for result, argument in wiring.carry:
            flow.unite(flow.of(result), flow.of(argument), f"carry of {op}")
        for outer, inner, stacked in wiring.leave:
            axes = flow.of(outer)
            if stacked:
                flow.dims.fix(axes[0], f"{op} walks along it")
                axes = axes[1:]
            flow.unite(axes, flow.of(inner), str(op))
