"""A function of a parameter tree as a short list of operations: the jaxpr, made easy to read.

A jaxpr nests: a call inside a call, one cached body used twice. A :class:`Program` has every plain
call (``jit`` and its kin) inlined, each value its own object, and each loop or branch as an
:class:`Op` with :class:`Block` bodies whose wiring to the outside is spelled out. Every reader in
this folder walks this form and none looks at a jaxpr again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
from jax.core import Tracer

from jaxcomp import tree as tree_lib

_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "core_closed_call", "composite"})
# Functions with a rule of their own, or marked for rematerialization: kept whole, with one body.
_WRAPPERS = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "shard_map": "jaxpr",
}


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """One array of a program; two values are the same only if they are the same object.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        constant: the array itself where the program holds it (a literal, or closed over).
    """

    shape: tuple[int, ...]
    dtype: Any
    constant: Any = None


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Operations in order, from inputs to outputs."""

    inputs: tuple[Value, ...]
    ops: tuple["Op", ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Op:
    """One operation.

    Attributes:
        primitive: the JAX primitive.
        params: its parameters, as in the jaxpr.
        inputs: what it reads.
        outputs: what it makes.
        blocks: bodies of a loop, a branch or a wrapper; empty otherwise.
        scope: the name stack at this place, such as ``ResNet/Conv_0``; may be empty.
    """

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    blocks: tuple[Block, ...] = ()
    scope: str = ""

    @property
    def name(self) -> str:
        """The primitive's name, such as ``dot_general``."""
        return self.primitive.name

    def __str__(self) -> str:
        return f"{self.name} in {self.scope}" if self.scope else self.name


class Link(NamedTuple):
    """A value outside a body and the same one inside; ``stacked`` if slices go in or out."""

    outer: Value
    inner: Value
    stacked: bool = False


class Wiring(NamedTuple):
    """How one body of an operation is tied to the outside.

    Attributes:
        block: the body.
        enter: what goes in.
        leave: what comes out.
        carry: pairs (output of the body, input of its next turn).
        trips: how often the body runs; ``None`` where only the running program knows.
    """

    block: Block
    enter: tuple[Link, ...]
    leave: tuple[Link, ...]
    carry: tuple[tuple[Value, Value], ...] = ()
    trips: int | None = 1


@dataclass(frozen=True, eq=False, slots=True)
class Program:
    """A traced function of a parameter tree.

    Attributes:
        leaves: the parameter leaves by path, in the order of the tree.
        inputs: the other inputs, flattened.
        block: what the function does; its inputs are the leaves, then the other inputs.
        params_tree: structure of the parameters.
        out_tree: structure of the outputs.
    """

    leaves: dict[str, Value]
    inputs: tuple[Value, ...]
    block: Block
    params_tree: Any = field(repr=False)
    out_tree: Any = field(repr=False)


def read(apply_fn: Callable[..., Any], params: Any, *inputs: Any) -> Program:
    """Trace a function of a parameter tree; nothing is computed.

    Args:
        apply_fn: any function of a parameter tree and further inputs that ``jax.jit`` can trace.
        params: any pytree of arrays, or of ``jax.ShapeDtypeStruct``.
        *inputs: pytrees of the same.

    Returns:
        The program.

    Raises:
        TypeError: ``apply_fn`` is not callable, or a leaf of ``params`` is not an array.
        ValueError: ``params`` has no leaves, or two with one path.

    Example:
        >>> import numpy as np
        >>> program = read(lambda p, x: x @ p["w"], {"w": np.ones((2, 3))}, np.ones((4, 2)))
        >>> [op.name for op in program.block.ops]
        ['dot_general']
    """
    if not callable(apply_fn):
        raise TypeError(f"apply_fn must be a function of (params, *inputs), not {apply_fn!r}")
    paths = tree_lib.flatten(params, is_leaf=lambda _: False)
    if not paths:
        raise ValueError("params has no leaves: pass the model's parameters as the second argument")
    for path, leaf in paths.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"{path}: {type(leaf).__name__} is not an array")
    closed, out_shape = jax.make_jaxpr(apply_fn, return_shape=True)(params, *inputs)
    block = _Reader().block(closed, "")
    return Program(
        leaves=dict(zip(paths, block.inputs[: len(paths)], strict=True)),
        inputs=block.inputs[len(paths) :],
        block=block,
        params_tree=jax.tree.structure(params),
        out_tree=jax.tree.structure(out_shape),
    )


def wirings(op: Op) -> tuple[Wiring, ...]:
    """How the bodies of an operation are tied to its inputs and outputs; empty without bodies.

    Args:
        op: an operation. Bodies of ``shard_map`` see per-device shapes.

    Returns:
        One :class:`Wiring` a body; for ``while``, the condition's first.

    Example:
        >>> import numpy as np
        >>> program = read(
        ...     lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, p)[0],
        ...     np.ones((5, 2, 2)),
        ...     np.ones((4, 2)),
        ... )
        >>> [wiring.trips for wiring in wirings(program.block.ops[0])]
        [5]
    """
    if op.name == "scan":
        return (_scan(op),)
    if op.name == "while":
        return _while(op)
    inputs = op.inputs[1:] if op.name == "cond" else op.inputs
    return tuple(
        Wiring(
            block,
            tuple(map(Link, inputs, block.inputs)),
            tuple(map(Link, op.outputs, block.outputs)),
        )
        for block in op.blocks
    )


def walk(block: Block) -> Iterator[Op]:
    """Every operation of a block, an operation before those of its bodies."""
    for op in block.ops:
        yield op
        for body in op.blocks:
            yield from walk(body)


def holds_tracers(program: Program) -> bool:
    """Whether the function closes over values of a trace around it: it is of use only there."""
    return any(
        isinstance(value.constant, Tracer)
        for op in walk(program.block)
        for value in (*op.inputs, *(out for block in op.blocks for out in block.outputs))
    )


def scan_counts(op: Op) -> tuple[int, int]:
    """How many inputs of a ``scan`` are constants, and how many are carried.

    What is walked along has one axis more outside than inside; JAX's own parameters for this differ
    between versions.
    """
    (block,) = op.blocks
    whole = sum(
        len(outer.shape) == len(inner.shape)
        for outer, inner in zip(op.inputs, block.inputs, strict=True)
    )
    carries = sum(
        len(outer.shape) == len(inner.shape)
        for outer, inner in zip(op.outputs, block.outputs, strict=True)
    )
    return whole - carries, carries


def _scan(op: Op) -> Wiring:
    (block,) = op.blocks
    consts, carries = scan_counts(op)
    enter = tuple(
        Link(outer, inner, stacked=i >= consts + carries)
        for i, (outer, inner) in enumerate(zip(op.inputs, block.inputs, strict=True))
    )
    leave = tuple(
        Link(outer, inner, stacked=i >= carries)
        for i, (outer, inner) in enumerate(zip(op.outputs, block.outputs, strict=True))
    )
    turns = zip(block.outputs[:carries], block.inputs[consts : consts + carries], strict=True)
    return Wiring(block, enter, leave, tuple(turns), op.params["length"])


def _while(op: Op) -> tuple[Wiring, Wiring]:
    condition, body = op.blocks
    n, m = op.params["cond_nconsts"], op.params["body_nconsts"]
    carry = op.inputs[n + m :]
    return (
        Wiring(condition, tuple(map(Link, op.inputs[:n] + carry, condition.inputs)), (), (), None),
        Wiring(
            body,
            tuple(map(Link, op.inputs[n : n + m] + carry, body.inputs)),
            tuple(map(Link, op.outputs, body.outputs)),
            tuple(zip(body.outputs, body.inputs[m:], strict=True)),
            None,
        ),
    )


class _Reader:
    """Turns jaxprs into blocks; each visit of a jaxpr makes new values."""

    def block(self, jaxpr: Any, scope: str) -> Block:
        inputs = tuple(_value(var) for var in _open(jaxpr).invars)
        ops: list[Op] = []
        outputs = self._inline(jaxpr, inputs, ops, scope)
        return Block(inputs, tuple(ops), outputs)

    def _inline(
        self, jaxpr: Any, inputs: tuple[Value, ...], ops: list[Op], scope: str
    ) -> tuple[Value, ...]:
        """Append the operations of a jaxpr on given inputs; its outputs."""
        open_jaxpr = _open(jaxpr)
        values = dict(zip(open_jaxpr.invars, inputs, strict=True))
        for var, constant in zip(open_jaxpr.constvars, _consts(jaxpr), strict=True):
            values[var] = _value(var, constant)

        def value(atom: Any) -> Value:
            if isinstance(atom, jex.Literal):
                return _value(atom, atom.val)
            return values[atom]

        for eqn in open_jaxpr.eqns:
            name = eqn.primitive.name
            here = _join(scope, str(eqn.source_info.name_stack))
            arguments = tuple(value(atom) for atom in eqn.invars)
            if name in _CALLS:
                body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                results = self._inline(body, arguments, ops, here)
                values.update(zip(eqn.outvars, results, strict=True))
                continue
            results = tuple(_value(var) for var in eqn.outvars)
            values.update(zip(eqn.outvars, results, strict=True))
            blocks = tuple(self.block(body, here) for body in _bodies(name, eqn.params))
            ops.append(Op(eqn.primitive, dict(eqn.params), arguments, results, blocks, here))
        return tuple(value(atom) for atom in open_jaxpr.outvars)


def _bodies(name: str, params: dict[str, Any]) -> tuple[Any, ...]:
    if name == "scan":
        return (params["jaxpr"],)
    if name == "while":
        return (params["cond_jaxpr"], params["body_jaxpr"])
    if name == "cond":
        return tuple(params["branches"])
    return (params[_WRAPPERS[name]],) if name in _WRAPPERS else ()


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _consts(jaxpr: Any) -> tuple[Any, ...]:
    return tuple(getattr(jaxpr, "consts", ()))


def _value(var: Any, constant: Any = None) -> Value:
    aval = var.aval
    return Value(tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", None), constant)


def _join(outer: str, inner: str) -> str:
    return "/".join(part for part in (outer, inner) if part)
