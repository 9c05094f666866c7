"""Run a program as it is and fold a state over what passes through some of its operations.

No hooks, no second model: the operations of the program are bound again, one by one, and a state is
handed from one to the next, into loops and branches and out of them. It all happens inside ``jit``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.model.program import Block, Op, Program, Value, Wiring, wirings

# Bodies that run exactly once a visit, in the caller's own terms.
_INLINE = frozenset({"custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint"})
_ENTERED = _INLINE | {"scan", "while", "cond"}

State = dict[str, Any]


class Tap(NamedTuple):
    """What to do at one operation.

    Attributes:
        key: the entry of the state that it works on.
        loops: the ``scan`` operations around it whose turns have an entry each, outermost first.
            The entry then has a leading axis for each of them.
        fold: ``fold(entry, inputs) -> entry``, from the values that the operation reads.
    """

    key: str
    loops: tuple[Op, ...]
    fold: Callable[[Any, tuple[Any, ...]], Any]


Taps = Mapping[Op, Sequence[Tap]]


def run(
    program: Program, values: Sequence[Any], taps: Taps, state: State
) -> tuple[list[Any], State]:
    """Run a program; its results, and the state after every tap that was passed.

    Args:
        program: from :func:`jaxcomp.model.program.read`.
        values: arrays for the inputs of ``program.block``: the leaves, then the other inputs.
        taps: what to do where; for each operation that is the key of a tap,
            :func:`obstacle` must be None.
        state: an entry for each key.

    Returns:
        The outputs, flat, and the new state.

    Example:
        >>> from jaxcomp.model.program import read
        >>> program = read(lambda p, x: jnp.sin(x) * p, 2.0 * jnp.ones(3), jnp.ones(3))
        >>> product = program.block.ops[-1]
        >>> tap = Tap("seen", (), lambda entry, inputs: entry + 1)
        >>> run(program, (jnp.ones(3), jnp.zeros(3)), {product: [tap]}, {"seen": 0})
        ([Array([0., 0., 0.], dtype=float32)], {'seen': 1})
    """
    return _block(program.block, values, taps, state)


def around(program: Program) -> Iterator[tuple[Op, tuple[tuple[Op, Block], ...]]]:
    """Every operation with the bodies that it lies in, outermost first."""

    def visit(block: Block, outside: tuple[tuple[Op, Block], ...]) -> Any:
        for op in block.ops:
            yield op, outside
            for body in op.blocks:
                yield from visit(body, (*outside, (op, body)))

    return visit(program.block, ())


def obstacle(outside: Sequence[tuple[Op, Block]]) -> str | None:
    """Why an operation inside these bodies cannot be tapped, or None.

    Args:
        outside: as :func:`around` gives them.
    """
    for op, body in outside:
        if op.name == "while" and body is op.blocks[0]:
            return "it is used in the condition of a while loop, which returns one boolean only"
        if op.name not in _ENTERED:
            return f"it is used inside {op}, each device on its own part"
    return None


def _block(
    block: Block, values: Sequence[Any], taps: Taps, state: State
) -> tuple[list[Any], State]:
    held: dict[Value, Any] = dict(zip(block.inputs, values, strict=True))

    def value(of: Value) -> Any:
        return of.constant if of.constant is not None else held[of]

    for op in block.ops:
        inputs = tuple(map(value, op.inputs))
        if any(True for _ in _tapped(op.blocks, taps)):
            results, state = _nested(op, inputs, taps, state)
        else:
            results = _bind(op, inputs)
        held.update(zip(op.outputs, results, strict=True))
        for tap in taps.get(op, ()):
            state = {**state, tap.key: tap.fold(state[tap.key], inputs)}
    return [value(output) for output in block.outputs], state


def _bind(op: Op, inputs: tuple[Any, ...]) -> Sequence[Any]:
    results = op.primitive.bind(*inputs, **op.primitive.get_bind_params(op.params))
    return tuple(results) if op.primitive.multiple_results else (results,)


def _tapped(blocks: Sequence[Block], taps: Taps) -> Iterator[Tap]:
    for block in blocks:
        for op in block.ops:
            yield from taps.get(op, ())
            yield from _tapped(op.blocks, taps)


def _nested(
    op: Op, inputs: tuple[Any, ...], taps: Taps, state: State
) -> tuple[Sequence[Any], State]:
    """An operation with taps in its bodies; only their entries of the state go in."""
    inner = {tap.key: state[tap.key] for tap in _tapped(op.blocks, taps)}
    if op.name in _INLINE:
        results, inner = _block(op.blocks[0], inputs, taps, inner)
    else:
        results, inner = {"scan": _scan, "while": _while, "cond": _cond}[op.name](
            op, inputs, taps, inner
        )
    return results, {**state, **inner}


def _scan(op: Op, inputs: tuple[Any, ...], taps: Taps, state: State) -> Any:
    (wiring,) = wirings(op)
    carried = len(wiring.carry)
    last = sum(not link.stacked for link in wiring.enter)
    first = last - carried
    walked = {tap.key for tap in _tapped(op.blocks, taps) if op in tap.loops}

    def turn(carry: Any, slices: Any) -> Any:
        values, common = carry
        here, own = slices
        arguments = (*inputs[:first], *values, *here)
        results, entries = _block(op.blocks[0], arguments, taps, {**common, **own})
        carry = (results[:carried], {key: entries[key] for key in common})
        return carry, (results[carried:], {key: entries[key] for key in own})

    (values, common), (stacks, own) = jax.lax.scan(
        turn,
        (
            _typed(inputs[first:last], op.inputs[first:last]),
            {key: entry for key, entry in state.items() if key not in walked},
        ),
        (list(inputs[last:]), {key: state[key] for key in sorted(walked)}),
        length=op.params["length"],
        reverse=op.params["reverse"],
        unroll=op.params["unroll"],
    )
    return [*values, *stacks], {**common, **own}


def _while(op: Op, inputs: tuple[Any, ...], taps: Taps, state: State) -> Any:
    condition, body = wirings(op)
    n, m = op.params["cond_nconsts"], op.params["body_nconsts"]

    def goes_on(carry: Any) -> Any:
        (result,), _ = _block(condition.block, (*inputs[:n], *carry[0]), {}, {})
        return result

    def turn(carry: Any) -> Any:
        return _block(body.block, (*inputs[n : n + m], *carry[0]), taps, carry[1])

    return jax.lax.while_loop(goes_on, turn, (_typed(inputs[n + m :], op.inputs[n + m :]), state))


def _cond(op: Op, inputs: tuple[Any, ...], taps: Taps, state: State) -> Any:
    def branch(block: Block) -> Any:
        return lambda values, entries: _block(block, values, taps, entries)

    return jax.lax.switch(inputs[0], [branch(block) for block in op.blocks], inputs[1:], state)


def _typed(values: Sequence[Any], like: Sequence[Value]) -> list[Any]:
    """Loop carries that are literals, as arrays of the type that the loop was traced with."""
    return [
        jnp.asarray(value, dtype=of.dtype) if of.constant is not None else value
        for value, of in zip(values, like, strict=True)
    ]


class Walk(NamedTuple):
    """How a leaf comes to a value.

    Attributes:
        loops: the ``scan`` operations that hand out slices of it, outermost first.
        outside: names of the operations on the way to the innermost of these loops.
        inside: names of the operations after that.
    """

    loops: tuple[Op, ...] = ()
    outside: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()


def walks(program: Program, path: str) -> dict[Value, Walk]:
    """For every value that a leaf has to do with: which loops walk the leaf on the way there.

    Args:
        program: from :func:`jaxcomp.model.program.read`.
        path: the leaf's.
    """
    found = {program.leaves[path]: Walk()}

    def meet(value: Value, walk: Walk) -> bool:
        """Note one more way to a value; whether that is news."""
        old = found.get(value)
        if old is not None:
            walk = Walk(
                (*old.loops, *(loop for loop in walk.loops if loop not in old.loops)),
                old.outside | walk.outside,
                old.inside | walk.inside,
            )
        found[value] = walk
        return walk != old

    def visit(block: Block) -> None:
        for op in block.ops:
            for wiring in wirings(op) if op.blocks else ():
                enter(op, wiring)
            if not op.blocks:
                for walk in [found[value] for value in op.inputs if value in found]:
                    for output in op.outputs:
                        meet(output, walk._replace(inside=walk.inside | {op.name}))

    def enter(op: Op, wiring: Wiring) -> None:
        for link in wiring.enter:
            if link.outer in found:
                walk = found[link.outer]
                if link.stacked:
                    walk = Walk((*walk.loops, op), walk.outside | walk.inside)
                meet(link.inner, walk)
        visit(wiring.block)
        again = [meet(before, found[after]) for after, before in wiring.carry if after in found]
        if any(again):
            visit(wiring.block)
        for link in wiring.leave:
            if link.inner in found:
                walk = found[link.inner]
                loops = tuple(loop for loop in walk.loops if loop is not op)
                meet(link.outer, Walk(loops, walk.outside, walk.inside | {op.name}))

    visit(program.block)
    return found
