"""Run a program as it is, or with some operations done otherwise, and fold a state over it.

No hooks, no second model: the operations of the program are bound again, one by one, and a state is
handed from one to the next, into loops and branches and out of them. It all happens inside ``jit``.
A *tap* looks at what an operation reads or makes; a *swap* stands in its place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.model.program import Block, Op, Program, Value, Wiring, wirings

# Functions with a derivative of their own, which is lost where something is tapped inside.
RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
_REMAT = frozenset({"remat2", "checkpoint"})
_ENTERED = RULES | _REMAT | {"scan", "while", "cond"}

State = dict[str, Any]
# ``bind(*inputs)`` performs the operation as it is; its results in order.
Bind = Callable[..., Sequence[Any]]


class Tap(NamedTuple):
    """What to do at one operation.

    Attributes:
        key: the entry of the state that it works on.
        loops: the ``scan`` operations around it whose turns have an entry each, outermost first.
            The entry then has a leading axis for each of them.
        fold: ``fold(entry, inputs) -> entry``, from the values that the operation reads.
        after: give ``fold`` what the operation makes instead.
    """

    key: str
    loops: tuple[Op, ...]
    fold: Callable[[Any, tuple[Any, ...]], Any]
    after: bool = False


class Swap(NamedTuple):
    """How to perform one operation otherwise, with entries of the state.

    Attributes:
        keys: the entries that it works on.
        loops: as those of :class:`Tap`, for all of these entries.
        perform: ``perform(entries, inputs, bind) -> (results, entries)``, with the entries by key.
        reads: other values of the same body, computed before the operation, that ``perform`` is
            given behind the operation's own inputs.
    """

    keys: tuple[str, ...]
    loops: tuple[Op, ...]
    perform: Callable[[State, tuple[Any, ...], Bind], tuple[Sequence[Any], State]]
    reads: tuple[Value, ...] = ()


Taps = Mapping[Op, Sequence[Tap]]
# A plain function of ``(inputs, bind)`` is a swap without a state; it returns the results alone.
Swaps = Mapping[Op, Swap | Callable[[tuple[Any, ...], Bind], Sequence[Any]]]


class _Plan(NamedTuple):
    taps: Taps
    swaps: Swaps


def run(
    program: Program,
    values: Sequence[Any],
    taps: Taps,
    state: State,
    swaps: Swaps | None = None,
) -> tuple[list[Any], State]:
    """Run a program; its results, and the state after every tap and swap that was passed.

    A function with a derivative rule of its own (``jax.custom_jvp``, ``jax.custom_vjp``) keeps the
    rule as long as no tap or swap lies inside; otherwise its body runs in its place and is
    differentiated as it stands. Rematerialization is kept around what is swapped.

    Args:
        program: from :func:`jaxcomp.model.program.read`.
        values: arrays for the inputs of ``program.block``: the leaves, then the other inputs.
        taps: what to do where; for each operation that is the key of a tap or a swap,
            :func:`obstacle` must be None.
        state: an entry for each key.
        swaps: what to do instead of which operations. A tap at the same operation sees the inputs
            that the program gives it; of taps and swaps inside the bodies of a swapped operation
            there may be none.

    Returns:
        The outputs, flat, and the new state.

    Raises:
        ValueError: a swap makes results of other shapes or dtypes than its operation.

    Example:
        >>> from jaxcomp.model.program import read
        >>> program = read(lambda p, x: jnp.sin(x) * p, 2.0 * jnp.ones(3), jnp.ones(3))
        >>> product = program.block.ops[-1]
        >>> tap = Tap("seen", (), lambda entry, inputs: entry + 1)
        >>> run(program, (jnp.ones(3), jnp.zeros(3)), {product: [tap]}, {"seen": 0})
        ([Array([0., 0., 0.], dtype=float32)], {'seen': 1})

        The same program with a sum instead of the product:

        >>> swaps = {product: lambda inputs, bind: [inputs[0] + inputs[1]]}
        >>> run(program, (jnp.ones(3), jnp.zeros(3)), {}, {}, swaps)
        ([Array([1., 1., 1.], dtype=float32)], {})
    """
    return _block(program.block, values, _Plan(taps, swaps or {}), state)


def around(program: Program) -> Iterator[tuple[Op, tuple[tuple[Op, Block], ...]]]:
    """Every operation with the bodies that it lies in, outermost first."""

    def visit(block: Block, outside: tuple[tuple[Op, Block], ...]) -> Any:
        for op in block.ops:
            yield op, outside
            for body in op.blocks:
                yield from visit(body, (*outside, (op, body)))

    return visit(program.block, ())


def obstacle(outside: Sequence[tuple[Op, Block]]) -> str | None:
    """Why an operation inside these bodies cannot be tapped or swapped, or None.

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
    block: Block, values: Sequence[Any], plan: _Plan, state: State
) -> tuple[list[Any], State]:
    held: dict[Value, Any] = dict(zip(block.inputs, values, strict=True))

    def value(of: Value) -> Any:
        return of.constant if of.constant is not None else held[of]

    for op in block.ops:
        inputs = tuple(map(value, op.inputs))
        if op in plan.swaps:
            swap = plan.swaps[op]
            reads = map(value, swap.reads) if isinstance(swap, Swap) else ()
            results, state = _swapped(op, (*inputs, *reads), swap, state)
        elif any(True for _ in _entries(op.blocks, plan)):
            results, state = _nested(op, inputs, plan, state)
        else:
            results = bind(op, *inputs)
        held.update(zip(op.outputs, results, strict=True))
        for tap in plan.taps.get(op, ()):
            seen = tuple(results) if tap.after else inputs
            state = {**state, tap.key: tap.fold(state[tap.key], seen)}
    return [value(output) for output in block.outputs], state


def bind(op: Op, *inputs: Any) -> Sequence[Any]:
    """Perform an operation as it is.

    Args:
        op: an operation of a program.
        *inputs: what it reads.

    Returns:
        Its results, in order.

    Example:
        >>> from jaxcomp.model.program import read
        >>> (op,) = read(lambda p, x: p * x, jnp.ones(2), jnp.ones(2)).block.ops
        >>> bind(op, jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
        (Array([3., 8.], dtype=float32),)
    """
    results = op.primitive.bind(*inputs, **op.primitive.get_bind_params(op.params))
    return tuple(results) if op.primitive.multiple_results else (results,)


def _swapped(op: Op, inputs: tuple[Any, ...], swap: Any, state: State) -> Any:
    def as_it_is(*inputs: Any) -> Sequence[Any]:
        return bind(op, *inputs)

    if isinstance(swap, Swap):
        entries = {key: state[key] for key in swap.keys}
        results, entries = swap.perform(entries, inputs, as_it_is)
        state = {**state, **entries}
    else:
        results = swap(inputs, as_it_is)
    made = [(kind.shape, kind.dtype) for kind in map(jax.typeof, results)]
    wanted = [(output.shape, output.dtype) for output in op.outputs]
    if made != wanted:
        raise ValueError(f"the swap of {op} makes {made}: it must make {wanted}, as {op.name} does")
    return results, state


def _entries(blocks: Sequence[Block], plan: _Plan) -> Iterator[tuple[str | None, tuple[Op, ...]]]:
    """Every tap and swap in some bodies: the keys with their loops, and None for a swap itself."""
    for block in blocks:
        for op in block.ops:
            for tap in plan.taps.get(op, ()):
                yield tap.key, tap.loops
            swap = plan.swaps.get(op)
            if swap is not None:
                yield None, ()
            if isinstance(swap, Swap):
                loops = swap.loops
                yield from ((key, loops) for key in swap.keys)
            yield from _entries(op.blocks, plan)


def _nested(op: Op, inputs: tuple[Any, ...], plan: _Plan, state: State) -> Any:
    """An operation with taps or swaps in its bodies; only their entries of the state go in."""
    keys = dict.fromkeys(key for key, _ in _entries(op.blocks, plan) if key is not None)
    inner = {key: state[key] for key in keys}
    if op.name in RULES:
        results, inner = _block(op.blocks[0], inputs, plan, inner)
    elif op.name in _REMAT:
        results, inner = _remat(op, inputs, plan, inner)
    else:
        results, inner = {"scan": _scan, "while": _while, "cond": _cond}[op.name](
            op, inputs, plan, inner
        )
    return results, {**state, **inner}


def _remat(op: Op, inputs: tuple[Any, ...], plan: _Plan, state: State) -> Any:
    def body(inputs: tuple[Any, ...], entries: State) -> Any:
        return _block(op.blocks[0], inputs, plan, entries)

    again = jax.checkpoint(body, policy=op.params["policy"], prevent_cse=op.params["prevent_cse"])
    return again(inputs, state)


def _scan(op: Op, inputs: tuple[Any, ...], plan: _Plan, state: State) -> Any:
    (wiring,) = wirings(op)
    carried = len(wiring.carry)
    last = sum(not link.stacked for link in wiring.enter)
    first = last - carried
    walked = {key for key, loops in _entries(op.blocks, plan) if key is not None and op in loops}

    def turn(carry: Any, slices: Any) -> Any:
        values, common = carry
        here, own = slices
        arguments = (*inputs[:first], *values, *here)
        results, entries = _block(op.blocks[0], arguments, plan, {**common, **own})
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


def _while(op: Op, inputs: tuple[Any, ...], plan: _Plan, state: State) -> Any:
    condition, body = wirings(op)
    n, m = op.params["cond_nconsts"], op.params["body_nconsts"]

    def goes_on(carry: Any) -> Any:
        (result,), _ = _block(condition.block, (*inputs[:n], *carry[0]), _Plan({}, {}), {})
        return result

    def turn(carry: Any) -> Any:
        return _block(body.block, (*inputs[n : n + m], *carry[0]), plan, carry[1])

    return jax.lax.while_loop(goes_on, turn, (_typed(inputs[n + m :], op.inputs[n + m :]), state))


def _cond(op: Op, inputs: tuple[Any, ...], plan: _Plan, state: State) -> Any:
    def branch(block: Block) -> Any:
        return lambda values, entries: _block(block, values, plan, entries)

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
