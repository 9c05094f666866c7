"""Which operations read a leaf as it is stored, but for its layout, and in which layout."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcomp.model.program import Block, Op, Program, Value, wirings
from jaxcomp.model.uses import live_ops

# One change of layout, such as ("transpose", (1, 0)); "turn" hands a loop slices of the first axis.
Step = tuple[Any, ...]
TURN: Step = ("turn",)


class Reader(NamedTuple):
    """An operation that reads a leaf.

    Attributes:
        op: the operation; the first that is no change of layout.
        operand: which of its inputs.
        steps: the changes of layout on the way, from the leaf on.
        loops: the ``scan`` operations that hand out slices of the leaf, outermost first.
        obstacle: why nothing but the operation itself can read the leaf there, or None.
    """

    op: Op | None
    operand: int
    steps: tuple[Step, ...]
    loops: tuple[Op, ...]
    obstacle: str | None = None


class _Way(NamedTuple):
    steps: tuple[Step, ...] = ()
    loops: tuple[Op, ...] = ()


def readers(program: Program, path: str) -> list[Reader]:
    """The operations that read a leaf, in the order of the program.

    Args:
        program: from :func:`jaxcomp.model.program.read`.
        path: the leaf's.

    Returns:
        The readers on whom an output depends; ``op`` is None where the leaf is itself an output.

    Example:
        >>> from jaxcomp.model.program import read
        >>> program = read(lambda w, x: x @ w.T, jnp.ones((2, 3)), jnp.ones((4, 3)))
        >>> [(str(reader.op), reader.operand, reader.steps) for reader in readers(program, "")]
        [('dot_general', 1, (('transpose', (1, 0)),))]
    """
    found: list[Reader] = []
    ways = {program.leaves[path]: _Way()}
    _visit(program.block, ways, found)
    for output in program.block.outputs:
        if output in ways:
            found.append(Reader(None, 0, *ways[output], "it is an output of the model"))
    return found


def _visit(block: Block, ways: dict[Value, _Way], found: list[Reader]) -> None:
    """Follow what is in ``ways``, to which values are added that differ in layout alone."""
    for op in live_ops(block):
        held = [(i, ways[value]) for i, value in enumerate(op.inputs) if value in ways]
        if not held:
            continue
        if op.blocks:
            _enter(op, ways, found)
            continue
        step = layout_step(op)
        for i, way in held:
            if step is None:
                found.append(Reader(op, i, *way))
            else:
                ways[op.outputs[0]] = way._replace(steps=way.steps + step)


def _enter(op: Op, ways: dict[Value, _Way], found: list[Reader]) -> None:
    for wiring in wirings(op):
        carried = {before for _, before in wiring.carry}
        inner: dict[Value, _Way] = {}
        for link in wiring.enter:
            if link.outer not in ways:
                continue
            way = ways[link.outer]
            if link.inner in carried:
                reason = f"{op} carries it from turn to turn"
                found.append(Reader(op, op.inputs.index(link.outer), *way, reason))
            elif link.stacked:
                inner[link.inner] = _Way((*way.steps, TURN), (*way.loops, op))
            else:
                inner[link.inner] = way
        _visit(wiring.block, inner, found)
        for output in wiring.block.outputs:
            if output in inner:
                found.append(Reader(op, 0, *inner[output], f"it comes out of {op} again"))
    if op.name == "cond" and op.inputs[0] in ways:
        found.append(Reader(op, 0, *ways[op.inputs[0]], f"it decides {op}"))


def layout_step(op: Op) -> tuple[Step, ...] | None:
    """What an operation does to the layout of its input; None if it does anything else.

    Args:
        op: an operation of a program.

    Example:
        >>> from jaxcomp.model.program import read
        >>> program = read(lambda w, x: w.T + x, jnp.ones((2, 3)), jnp.ones((3, 2)))
        >>> [layout_step(op) for op in program.block.ops]
        [(('transpose', (1, 0)),), None]
    """
    if op.name in ("reshape", "squeeze", "expand_dims"):
        return None if op.params.get("dimensions") and op.name == "reshape" else _reshape(op)
    if op.name == "broadcast_in_dim":
        (before,), (after,) = op.inputs[:1], op.outputs
        same = [size for size in before.shape if size > 1] == [s for s in after.shape if s > 1]
        return _reshape(op) if same else None
    if op.name == "transpose":
        return (("transpose", tuple(op.params["permutation"])),)
    if op.name == "slice":
        starts, limits = op.params["start_indices"], op.params["limit_indices"]
        strides = op.params["strides"] or (1,) * len(starts)
        return (("slice", tuple(zip(starts, limits, strides, strict=True))),)
    if op.name == "rev":
        return (("rev", tuple(op.params["dimensions"])),)
    if op.name == "convert_element_type":
        return () if jnp.issubdtype(op.outputs[0].dtype, jnp.floating) else None
    return () if op.name in ("copy", "copy_p", "sharding_constraint", "reshard") else None


def _reshape(op: Op) -> tuple[Step, ...]:
    return (("reshape", tuple(op.outputs[0].shape)),)


def relayout(array: Any, steps: tuple[Step, ...]) -> Any:
    """An array of the leaf's shape as the operand of its product.

    Args:
        array: of NumPy or JAX.
        steps: from a :class:`Reader`.

    Returns:
        The operand, with an axis in front for each loop that walks along the leaf.

    Example:
        >>> relayout(jnp.ones((5, 2, 3)), (TURN, ("transpose", (1, 0)))).shape
        (5, 3, 2)
    """
    lead = 0
    for name, *arguments in steps:
        front = array.shape[:lead]
        if name == "turn":
            lead += 1
        elif name == "reshape":
            array = array.reshape(*front, *arguments[0])
        elif name == "transpose":
            moved = (lead + axis for axis in arguments[0])
            array = array.transpose(*range(lead), *moved)
        elif name == "slice":
            array = array[(slice(None),) * lead + tuple(slice(*cut) for cut in arguments[0])]
        else:
            turned = {lead + axis for axis in arguments[0]}
            back = (slice(None, None, -1 if axis in turned else 1) for axis in range(array.ndim))
            array = array[tuple(back)]
    return array


def by_operand(found: Mapping[str, list[Reader]]) -> dict[tuple[Op, int], tuple[str, Reader]]:
    """For each input of an operation the leaf that it is, and how it comes there.

    Args:
        found: the readers of each leaf by its path.
    """
    return {
        (reader.op, reader.operand): (path, reader)
        for path, some in found.items()
        for reader in some
        if reader.op is not None and reader.obstacle is None
    }
