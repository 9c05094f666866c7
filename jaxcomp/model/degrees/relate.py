"""By which power of a channel's scale each array moves when the leaves that hold it are rescaled.

Multiply the slices of some leaves by ``s ** degree``, one ``s`` a channel: every array of the
program is then multiplied by a power of ``s`` too, wherever its operation allows it. A product adds
the degrees of its factors, a sum needs equal ones, a square root halves them, ReLU and maxima hand
a positive scale on, and whatever is not homogeneous (GELU, a softmax, an epsilon beside a variance)
needs degree zero. So a walk through the program leaves linear relations between the degrees of the
leaves, and every solution of them is a rescaling that keeps the function.

Channels are atoms of :mod:`jaxcomp.model.dims`; several atoms together (heads × head size) are
channels too, with a scale for each combination. Where an array holds such channels is a *slot*.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcomp.model.axes import Flow
from jaxcomp.model.degrees.rules import RULES, opaque
from jaxcomp.model.degrees.walk import (
    ONE,
    Degree,
    Relation,
    Slot,
    Unknown,
    Walk,
    minus,
)
from jaxcomp.model.dims import Dim, find
from jaxcomp.model.program import Block, Op, Program, Value, Wiring, wirings


class Degrees(NamedTuple):
    """The relations between the degrees of the leaves, for some channels.

    Attributes:
        channels: the atoms, each with one scale a unit, or one for each combination of units.
        unknowns: the slots of floating leaves.
        relations: what must be zero.
    """

    channels: tuple[Dim, ...]
    unknowns: tuple[Unknown, ...]
    relations: tuple[Relation, ...]


def relate(program: Program, flow: Flow, channels: Sequence[Dim]) -> Degrees:
    """Walk through a program and write down what the degrees of its leaves must obey.

    Args:
        program: the traced function.
        flow: its axes, from :func:`jaxcomp.model.flow.follow`.
        channels: different atoms.

    Returns:
        Unknowns and relations.
    """
    walk = Walk(flow, tuple(dict.fromkeys(find(atom) for atom in channels)))
    unknowns = []
    for path, value in program.leaves.items():
        if jnp.issubdtype(value.dtype, jnp.floating):
            found = [Unknown(path, slot) for slot in walk.slots(value)]
            unknowns += found
            walk.degrees[value] = {each.slot: {each: ONE} for each in found}
    _block(walk, program.block)
    for value in program.block.outputs:
        walk.need_none(value, "it is an output of the model")
    return Degrees(walk.channels, tuple(unknowns), tuple(walk.relations))


def _block(walk: Walk, block: Block) -> None:
    for op in block.ops:
        if op.name == "scan":
            _scan(walk, op)
        elif op.name == "while":
            _while(walk, op)
        elif op.blocks and op.name != "shard_map":
            _bodies(walk, op)
        else:
            RULES.get(op.name, opaque)(walk, op)


def _bodies(walk: Walk, op: Op) -> None:
    """A wrapper, or branches of which any may be taken."""
    if op.name == "cond":
        walk.need_none(op.inputs[0], op)
    found: dict[Value, list[Value]] = {}
    for wiring in wirings(op):
        for outer, inner, _ in wiring.enter:
            _hand(walk, op, outer, inner)
        _block(walk, wiring.block)
        for outer, inner, _ in wiring.leave:
            found.setdefault(outer, []).append(inner)
    for outer, inners in found.items():
        degrees = walk.alike(op, inners)
        if degrees is None:
            walk.degrees[outer] = None
        else:
            walk.put(outer, degrees.items(), op)


def _hand(walk: Walk, op: Op, outer: Value, inner: Value) -> None:
    degrees = walk.of(outer)
    if degrees is None:
        walk.degrees[inner] = None
    else:
        walk.put(inner, degrees.items(), op)


def _carry(walk: Walk, op: Op, wiring: Wiring) -> dict[Value, Value]:
    """Give what a loop carries unknown degrees, which its start must have; output by input."""
    turns = {before: after for after, before in wiring.carry}
    for outer, inner, _ in wiring.enter:
        if inner in turns:
            own: dict[Slot, Degree] = {
                slot: {("carry", id(inner), slot): ONE} for slot in walk.slots(inner)
            }
            _equal(walk, own, walk.of(outer), op)
            walk.degrees[inner] = own
    return turns


def _turn(walk: Walk, op: Op, turns: dict[Value, Value]) -> None:
    for before, after in turns.items():
        _equal(walk, walk.of(before) or {}, walk.of(after), f"carry of {op}")


def _equal(
    walk: Walk, first: dict[Slot, Degree], second: dict[Slot, Degree] | None, reason: Any
) -> None:
    """Two values have the same degrees, unless one is zero everywhere."""
    if second is None:
        return
    for slot in dict.fromkeys((*first, *second)):
        walk.need(minus(first.get(slot, {}), second.get(slot, {})), reason)


def _while(walk: Walk, op: Op) -> None:
    condition, body = wirings(op)
    turns = _carry(walk, op, body)
    for outer, inner, _ in body.enter:
        if inner not in turns:
            _hand(walk, op, outer, inner)
    for (outer, inner, _), again in zip(condition.enter, _same(condition, body), strict=True):
        _hand(walk, op, outer if again is None else again, inner)
    _block(walk, condition.block)
    _block(walk, body.block)
    _turn(walk, op, turns)
    for value in condition.block.outputs:
        walk.need_none(value, op)
    for (outer, _, _), before in zip(body.leave, turns, strict=True):
        _hand(walk, op, before, outer)


def _scan(walk: Walk, op: Op) -> None:
    (wiring,) = wirings(op)
    walked = {
        atom
        for link in wiring.enter
        if link.stacked and link.outer.shape
        for atom in (find(walk.flow.of(link.outer)[0]),)
        if atom in walk.channels and atom not in walk.walked
    }
    # What has an axis for the layers has degrees by layer: none that is shared by all turns.
    order = [atom for atom in walk.channels if atom not in walk.walked]
    inner_order = [atom for atom in order if atom not in walked]
    for link in wiring.enter:
        if walked and not link.stacked:
            walk.need_none(link.outer, f"{op} hands it on from layer to layer")
    outside = {link.outer: walk.of(link.outer) for link in wiring.enter}
    walk.walked |= walked
    turns = {before: after for after, before in wiring.carry}
    if walked:
        for link in wiring.enter:
            if not link.stacked:
                walk.degrees[link.inner] = None if outside[link.outer] is None else {}
    else:
        turns = _carry(walk, op, wiring)
    for link in wiring.enter:
        if link.stacked:
            _enter(walk, op, link.inner, outside[link.outer], order, inner_order)
        elif not walked and link.inner not in turns:
            _hand(walk, op, link.outer, link.inner)
    _block(walk, wiring.block)
    if walked:
        for after in turns.values():
            walk.need_none(after, f"{op} hands it on from layer to layer")
    else:
        _turn(walk, op, turns)
    inside = {link.inner: walk.of(link.inner) for link in wiring.leave}
    walk.walked -= walked
    carried = iter(turns)
    for link in wiring.leave:
        if not link.stacked:
            before = next(carried)
            walk.degrees[link.outer] = {} if walked else walk.of(before)
        elif inside[link.inner] is None:
            walk.degrees[link.outer] = None
        else:
            rows = (inside[link.inner] or {}).items()
            leave = [(_stacked(slot, order, inner_order), degree) for slot, degree in rows]
            walk.put(link.outer, leave, op)


def _enter(
    walk: Walk,
    op: Op,
    inner: Value,
    degrees: dict[Slot, Degree] | None,
    order: Sequence[Dim],
    inner_order: Sequence[Dim],
) -> None:
    """One slice of a stacked value: its slots lose the axis that the loop walks."""
    if degrees is None:
        walk.degrees[inner] = None
        return
    rows: list[tuple[Slot | None, Degree]] = []
    for slot, degree in degrees.items():
        by_atom = dict(zip(order, slot, strict=True))
        picked = all(by_atom[atom] == (0, 0) for atom in order if atom not in inner_order)
        rest = [by_atom[atom] for atom in inner_order]
        whole = picked and all(axis > 0 for axis, _ in rest)
        rows.append((tuple((axis - 1, i) for axis, i in rest) if whole else None, degree))
    walk.put(inner, rows, op)


def _stacked(slot: Slot, order: Sequence[Dim], inner_order: Sequence[Dim]) -> Slot:
    inner = {atom: (axis + 1, i) for atom, (axis, i) in zip(inner_order, slot, strict=True)}
    return tuple(inner.get(atom, (0, 0)) for atom in order)


def _same(condition: Wiring, body: Wiring) -> list[Value | None]:
    """For what enters the condition: the carried value that the body sees, if it is one."""
    carried = {before for _, before in body.carry}
    inner = [link.inner for link in body.enter if link.inner in carried]
    constants = len(condition.enter) - len(inner)
    return [*[None] * constants, *inner]
