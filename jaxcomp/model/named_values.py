"""Intermediate values of a program by name, so that they can be asked for without hooks.

A value has a name where a *parameter* meets data there, where a *scope* is left with it, where the
user *named* it, or where it is an *output* of the function. See :func:`find_named`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp import tree as tree_lib
from jaxcomp.marks import read_mark
from jaxcomp.model import tapped
from jaxcomp.model.program import Block, Op, Program, Value, walk, wirings
from jaxcomp.model.reach import reached

Source = Literal["parameter", "scope", "checkpoint_name", "output"]
_Around = tuple[tuple[Op, Block], ...]


class Named(NamedTuple):
    """One intermediate value.

    Attributes:
        name: what it is asked for by.
        source: what gave it the name.
        value: the value; inside loops, that of one turn.
        op: the operation that makes it; None for an input that is handed on as an output.
        loops: the ``scan`` operations around it, outermost first: it has a value for each turn.
        obstacle: why it cannot be had, or None.
    """

    name: str
    source: Source
    value: Value
    op: Op | None
    loops: tuple[Op, ...] = ()
    obstacle: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, an axis for each loop around it in front."""
        return (*(loop.params["length"] for loop in self.loops), *self.value.shape)


def find_named(program: Program) -> tuple[Named, ...]:
    """Every value of a program that has a name.

    * ``params/Dense_0/kernel``, the path of a parameter: the result of the operation in which it
      meets what depends on the inputs: a product, a sum, a look-up; transposed, where nothing else
      reads it. A parameter that meets data more than once has further values, ``…#2``.
    * ``Model/Dense_0``, a scope (``jax.named_scope``; Linen opens one for every module): what is
      computed last in the scope and read outside it. A scope that is entered again has further
      values, ``…#2``; one that is entered twice with nothing between counts once.
    * ``hidden``, the name given by ``jax.ad_checkpoint.checkpoint_name(x, "hidden")``.
    * ``outputs/1/intermediates/act/0``, an output by its path in what the function returns: what
      ``sow`` collects is one, if the function returns the collection.

    Args:
        program: from :func:`jaxcomp.model.program.read`.

    Returns:
        The values in the order of the program, then its outputs.

    Example:
        >>> from jaxcomp.model.program import read
        >>> def model(p, x):
        ...     with jax.named_scope("head"):
        ...         return jnp.tanh(x @ p["w"] + p["b"])
        >>> program = read(model, {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, jnp.ones((4, 3)))
        >>> [(named.name, named.op.name) for named in find_named(program)]
        [('w', 'dot_general'), ('b', 'add'), ('head', 'tanh')]
    """
    scopes = {(op, index): found for found, op, index in _scopes(program.block, frozenset())}
    data = reached(program, program.inputs)
    weights = _weights(program, data)
    times: Counter[str] = Counter()
    found: list[Named] = []

    def add(name: str, source: Source, value: Value, op: Op | None, outside: _Around = ()) -> None:
        times[name] += 1
        name = name if times[name] == 1 else f"{name}#{times[name]}"
        loops = tuple(loop for loop, _ in outside if loop.name == "scan")
        found.append(Named(name, source, value, op, loops, _obstacle(outside)))

    readers = _readers(program)
    for op, outside in tapped.around(program):
        if not op.blocks and not data.isdisjoint(op.outputs):
            last = _transposed(op, readers)
            for path in _met(op, weights):
                add(path, "parameter", last.outputs[0], last, outside)
        if op.name == "name" and read_mark(op.params["name"]) is None:
            add(op.params["name"], "checkpoint_name", op.outputs[0], op, outside)
        for index, value in enumerate(op.outputs):
            for scope in scopes.get((op, index), ()):
                add(scope, "scope", value, op, outside)
    makers = {value: op for op in program.block.ops for value in op.outputs}
    places = jax.tree.unflatten(program.out_tree, range(len(program.block.outputs)))
    for path, i in tree_lib.flatten(places).items():
        value = program.block.outputs[i]
        if path:
            add(f"outputs/{path}", "output", value, makers.get(value))
    return tuple(found)


def _obstacle(outside: _Around) -> str | None:
    for op, _ in outside:
        if op.name in tapped.RULES:
            return f"it is computed inside {op}, whose own derivative would be lost"
        if op.name == "cond":
            return f"it is computed in a branch of {op}, which need not be taken"
        if op.name == "while":
            return f"it is computed inside {op}, whose turns are not known"
    return tapped.obstacle(outside)


def _weights(program: Program, data: set[Value]) -> dict[Value, dict[str, None]]:
    """For the values made of parameters alone: which."""
    found: dict[Value, dict[str, None]] = {
        value: {path: None} for path, value in program.leaves.items()
    }

    def hand_on(start: Iterable[Value], to: Iterable[Value]) -> bool:
        paths = {path: None for value in start for path in found.get(value, ())}
        news = False
        for value in to if paths else ():
            old = found.get(value, {})
            if value not in data and not paths.keys() <= old.keys():
                found[value], news = {**old, **paths}, True
        return news

    def visit(block: Block) -> None:
        for op in block.ops:
            for wiring in wirings(op) if op.blocks else ():
                for link in wiring.enter:
                    hand_on([link.outer], [link.inner])
                visit(wiring.block)
                while any([hand_on([after], [before]) for after, before in wiring.carry]):
                    visit(wiring.block)
                for link in wiring.leave:
                    hand_on([link.inner], [link.outer])
            if not op.blocks:
                hand_on(op.inputs, op.outputs)

    visit(program.block)
    return found


def _met(op: Op, weights: dict[Value, dict[str, None]]) -> list[str]:
    """The parameters that an operation brings together with data."""
    return list(dict.fromkeys(path for value in op.inputs for path in weights.get(value, ())))


def _readers(program: Program) -> dict[Value, list[Op | None]]:
    """What reads each value; None for the results of a body."""
    found: dict[Value, list[Op | None]] = {}
    blocks = [program.block, *(body for op in walk(program.block) for body in op.blocks)]
    for block in blocks:
        for op in block.ops:
            for value in op.inputs:
                found.setdefault(value, []).append(op)
        for value in block.outputs:
            found.setdefault(value, []).append(None)
    return found


def _transposed(op: Op, readers: dict[Value, list[Op | None]]) -> Op:
    """The operation itself, or the transpose that alone reads it, as in ``einsum`` and ``vmap``."""
    match readers.get(op.outputs[0], []):
        case [Op() as reader] if reader.name == "transpose" and len(op.outputs) == 1:
            return _transposed(reader, readers)
    return op


def _scopes(block: Block, taken: frozenset[str]) -> Iterator[tuple[tuple[str, ...], Op, int]]:
    """Where scopes are left: their names, the operation whose output they leave with, and which.

    A scope belongs to the outermost body that has an operation in it.
    """
    inside = [_prefixes(op.scope) for op in block.ops]
    here = dict.fromkeys(scope for scopes in inside for scope in scopes if scope not in taken)
    readers: dict[Value, list[int]] = {}
    for i, op in enumerate(block.ops):
        for value in op.inputs:
            readers.setdefault(value, []).append(i)
    for value in block.outputs:
        readers.setdefault(value, []).append(len(block.ops))
    left: dict[tuple[Op, int], list[str]] = {}
    for scope in here:
        members = [i for i, scopes in enumerate(inside) if scope in scopes]
        for first, last in _runs(members):
            place = _last_left(block, first, last, readers)
            if place is not None:
                left.setdefault(place, []).append(scope)
    for (op, index), scopes in left.items():
        yield tuple(scopes), op, index
    for op in block.ops:
        for body in op.blocks:
            yield from _scopes(body, taken.union(here))


def _last_left(
    block: Block, first: int, last: int, readers: dict[Value, list[int]]
) -> tuple[Op, int] | None:
    """The last output of some operations in a row that others read."""
    for i in range(last, first - 1, -1):
        op = block.ops[i]
        for index, value in reversed(list(enumerate(op.outputs))):
            if any(reader > last for reader in readers.get(value, ())):
                return op, index
    return None


def _runs(members: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    start = 0
    for i in range(1, len(members) + 1):
        if i == len(members) or members[i] != members[i - 1] + 1:
            yield members[start], members[i - 1]
            start = i


def _prefixes(scope: str) -> set[str]:
    parts = scope.split("/") if scope else []
    return {"/".join(parts[: i + 1]) for i in range(len(parts))}


def capture(
    program: Program, values: Sequence[Any], wanted: Sequence[Named]
) -> tuple[list[Any], dict[str, Any]]:
    """Run a program and keep some of its values.

    Args:
        program: from :func:`jaxcomp.model.program.read`.
        values: arrays for the inputs of ``program.block``.
        wanted: from :func:`find_named`, without an obstacle.

    Returns:
        The outputs, flat, and the values by name; what is inside loops is stacked.

    Example:
        >>> from jaxcomp.model.program import read
        >>> program = read(lambda w, x: jnp.tanh(x * w).sum(), jnp.ones(()), jnp.ones(2))
        >>> capture(program, [jnp.array(2.0), jnp.array([0.0, 1.0])], find_named(program))[1]
        {'': Array([0., 2.], dtype=float32)}
    """
    taps: dict[Op, list[tapped.Tap]] = {}
    state: dict[str, Any] = {}
    for named in wanted:
        if named.op is not None and named.source != "output":
            index = next(i for i, value in enumerate(named.op.outputs) if value is named.value)
            keep = lambda _, made, index=index: made[index]
            taps.setdefault(named.op, []).append(tapped.Tap(named.name, named.loops, keep, True))
            state[named.name] = jnp.zeros(named.shape, named.value.dtype)
    outputs, state = tapped.run(program, values, taps, state)
    given = dict(zip(program.block.outputs, outputs, strict=True))
    for named in wanted:
        if named.source == "output":
            state[named.name] = given[named.value]
    return outputs, {named.name: state[named.name] for named in wanted}
