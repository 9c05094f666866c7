"""A program with smaller kernels, and without what adds nothing but zero.

Programs become programs here, so that what a sub-network computes, and what it costs, are read from
one thing. A kernel that is cut to its centre meets the same inputs as before where its convolution
pads less by as much: any stride, dilation and padding will do. A value that is zero whatever the
inputs are is not computed; adding it to another is that other.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcomp.model.placement import smaller_shape
from jaxcomp.model.program import Block, Op, Program, Value
from jaxcomp.model.uses import live_ops

# Hand a kernel on with its axes and its centre where they are.
_CARRIERS = frozenset({"convert_element_type", "copy", "copy_p", "neg", "rev", "stop_gradient"})
_REMAT = frozenset({"checkpoint", "remat2"})
_BODIES = frozenset({"custom_jvp_call", "custom_vjp_call"}) | _REMAT
# Zero where any of what they read is zero; where all is; where the first input is.
_ABSORBING = frozenset({"mul", "dot_general", "conv_general_dilated", "and"})
_PRESERVING = frozenset(
    """
    abs add add_any asin asinh atan atanh broadcast_in_dim cbrt ceil concatenate
    convert_element_type copy copy_p cummax cumsum erf erf_inv expand_dims expm1 floor imag log1p
    max min neg pad real reduce_max reduce_min reduce_precision reduce_sum reshape rev round sign
    sin sinh split sqrt square squeeze stack stop_gradient sub tan tanh tile transpose unstack
    """.split()  # noqa: SIM905 (a table reads better)
)
_FIRST = frozenset({"div", "dynamic_slice", "gather", "integer_pow", "slice"})
_ADDING = frozenset({"add", "add_any"})


class Edited(NamedTuple):
    """A program that was edited.

    Attributes:
        program: it; its leaves are all those of the old one, in the same order.
        pairs: of what is left: the old operation and the new one.
        origins: by new value, the old one that it stands for.
        joins: additions of nothing that matter: the old operation, and what it is now.
        reads: operations that read a zero and do make something of it.
    """

    program: Program
    pairs: tuple[tuple[Op, Op], ...]
    origins: dict[Value, Value]
    joins: tuple[tuple[Op, Value], ...]
    reads: tuple[Op, ...]


def inlined(program: Program) -> Program:
    """The same program without rematerialization, whose bodies are put where they were called."""
    names: dict[Value, Value] = {}

    def ops(block: Block) -> Iterator[Op]:
        for op in block.ops:
            inputs = tuple(names.get(value, value) for value in op.inputs)
            if op.name in _REMAT:
                body = op.blocks[0]
                names.update(zip(body.inputs, inputs, strict=True))
                yield from ops(body)
                outputs = (names.get(value, value) for value in body.outputs)
                names.update(zip(op.outputs, outputs, strict=True))
            else:
                yield Op(op.primitive, op.params, inputs, op.outputs, op.blocks, op.scope)

    flat = tuple(ops(program.block))
    outputs = tuple(names.get(value, value) for value in program.block.outputs)
    return _with(program, flat, {}, outputs)


def kernel_axes(program: Program, path: str) -> tuple[int, ...]:
    """The axes of a leaf that convolutions slide along; those of its kernel's height and width.

    Args:
        program: without rematerialization.
        path: the leaf's.

    Returns:
        Axes of the leaf, ascending.

    Raises:
        ValueError: something else than convolutions reads the leaf, or what slides differs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxcomp.model.program import read
        >>> def model(kernel, x):
        ...     return jax.lax.conv(x, kernel, (1, 1), "SAME")
        >>> kernel_axes(read(model, jnp.ones((4, 3, 5, 5)), jnp.ones((1, 3, 8, 8))), "")
        (2, 3)
    """
    carried = {program.leaves[path]: tuple(range(len(program.leaves[path].shape)))}
    found: set[tuple[int, ...]] = set()
    for op in program.block.ops:
        if carried.keys().isdisjoint(op.inputs):
            continue
        (index, *more) = [i for i, value in enumerate(op.inputs) if value in carried]
        axes = carried[op.inputs[index]]
        if op.name == "conv_general_dilated" and index == 1:
            spatial = op.params["dimension_numbers"].rhs_spec[2:]
            found.add(tuple(sorted(axes[i] for i in spatial)))
        elif op.name == "transpose":
            carried[op.outputs[0]] = tuple(axes[i] for i in op.params["permutation"])
        elif not more and _carries(op, index):
            carried[op.outputs[0]] = axes
        else:
            raise ValueError(f"{path}: its kernel cannot be cut to its centre: {op} reads it too")
    if any(value in carried for value in program.block.outputs):
        raise ValueError(f"{path}: its kernel cannot be cut: it is an output of the model itself")
    if len(found) != 1:
        what = "convolutions slide along different axes of it" if found else "no convolution has it"
        raise ValueError(f"{path}: its kernel cannot be cut to its centre: {what}")
    return found.pop()


def _carries(op: Op, index: int) -> bool:
    if op.name in _CARRIERS:
        return True
    scales = op.name == "mul" or (op.name == "div" and index == 0)
    return scales and op.inputs[1 - index].shape == ()


def centre(size: int, cropped: int) -> slice:
    """Where the middle of an axis lies; all of it where it is no longer than that."""
    first = max(size - cropped, 0) // 2
    return slice(first, size - first)


def edit(program: Program, sizes: Mapping[str, int], gone: Collection[str]) -> Edited:
    """Cut kernels to their centres, and leave out what leaves that are zero make.

    Args:
        program: without rematerialization.
        sizes: by path of a kernel, of :func:`kernel_axes`, its new height and width.
        gone: paths of leaves that are zero.

    Returns:
        The program, and what came of the zeros.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.model.program import read
        >>> def model(p, x):
        ...     return x + jnp.tanh(x @ p["w"]) * p["scale"]
        >>> params = {"w": jnp.ones((2, 2)), "scale": jnp.ones(2)}
        >>> without = edit(read(model, params, jnp.ones((1, 2))), {}, ["scale"])
        >>> without.program.block.ops, [op.name for op, _ in without.joins]
        ((), ['add'])
    """
    return _Editor(program, sizes, gone).run()


class _Editor:
    """One walk through a program."""

    def __init__(self, program: Program, sizes: Mapping[str, int], gone: Collection[str]) -> None:
        self.program = program
        self.names: dict[Value, Value] = {}
        self.origins: dict[Value, Value] = {}
        self.zeros = {program.leaves[path] for path in gone}
        self.pairs: list[tuple[Op, Op]] = []
        # Operations that are left, in order; of additions of zero, what it is added to.
        self.steps: list[tuple[Op, Value | None]] = []
        self.reads: list[Op] = []
        for path, size in sizes.items():
            leaf, axes = program.leaves[path], kernel_axes(program, path)
            kept = cropped(leaf, axes, size)
            self._resize(leaf, smaller_shape(leaf.shape, kept))

    def _resize(self, value: Value, shape: tuple[int, ...]) -> None:
        if shape != value.shape:
            self.names[value] = new = Value(shape, value.dtype)
            self.origins[new] = value

    def run(self) -> Edited:
        for op in self.program.block.ops:
            self._op(op)
        outputs = tuple(map(self._value, self.program.block.outputs))
        edited = _with(self.program, tuple(new for _, new in self.pairs), self.names, outputs)
        alive = set(edited.block.ops)
        pairs = tuple(pair for pair in self.pairs if pair[1] in alive)
        left = {old for old, _ in pairs}
        reads = tuple(op for op in self.reads if op in left)
        return Edited(edited, pairs, self.origins, self._joins(), reads)

    def _joins(self) -> tuple[tuple[Op, Value], ...]:
        """The additions of zero that outputs depend on, as they stood in the old program."""
        wanted = set(self.program.block.outputs) - self.zeros
        joins = []
        for op, other in reversed(self.steps):
            if not wanted.isdisjoint(op.outputs):
                wanted.update(op.inputs if other is None else [other])
                joins += [] if other is None else [(op, other)]
        return tuple(reversed(joins))

    def _value(self, value: Value) -> Value:
        """What stands for a value now; an array of zeros where nobody can do without."""
        if value in self.zeros and value not in self.names:
            array = np.broadcast_to(np.zeros((), value.dtype), value.shape)
            self.names[value] = new = Value(value.shape, value.dtype, array)
            self.origins[new] = value
        return self.names.get(value, value)

    def _op(self, op: Op) -> None:
        if not self.zeros.isdisjoint(op.inputs):
            flags = [_is_zero(value, self.zeros) for value in op.inputs]
            results = _zero_results(op, flags)
            if all(results) and op.outputs:
                self.zeros.update(op.outputs)
                return
            if (other := _added(op, flags)) is None:
                self.reads.append(op)
            else:
                self.steps.append((op, other))
                if (other.shape, other.dtype) == (op.outputs[0].shape, op.outputs[0].dtype):
                    self.names[op.outputs[0]] = self._value(other)
                    return
        if not self.steps or self.steps[-1][0] is not op:
            self.steps.append((op, None))
        inputs = tuple(map(self._value, op.inputs))
        params = op.params
        if op.name == "conv_general_dilated" and inputs[1].shape != op.inputs[1].shape:
            params = {**params, "padding": _padding(op, inputs[1])}
        elif len(op.outputs) == 1:
            self._carry(op, inputs)
        outputs = tuple(self.names.get(value, value) for value in op.outputs)
        self.pairs.append((op, Op(op.primitive, params, inputs, outputs, op.blocks, op.scope)))

    def _carry(self, op: Op, inputs: tuple[Value, ...]) -> None:
        """A smaller kernel on its way to its convolution."""
        for old, new in zip(op.inputs, inputs, strict=True):
            if new.shape != old.shape:
                shape = new.shape
                if op.name == "transpose":
                    shape = tuple(shape[i] for i in op.params["permutation"])
                self._resize(op.outputs[0], shape)


def _padding(op: Op, kernel: Value) -> tuple[tuple[int, int], ...]:
    spatial = op.params["dimension_numbers"].rhs_spec[2:]
    padding = []
    for axis, (low, high), dilation in zip(
        spatial, op.params["padding"], op.params["rhs_dilation"], strict=True
    ):
        less = (op.inputs[1].shape[axis] - kernel.shape[axis]) // 2 * dilation
        padding.append((low - less, high - less))
    return tuple(padding)


def _is_zero(value: Value, zeros: Collection[Value]) -> bool:
    constant = value.constant
    return value in zeros or (
        isinstance(constant, (bool, int, float, np.ndarray, np.generic)) and not np.any(constant)
    )


def _added(op: Op, flags: list[bool]) -> Value | None:
    """What a zero is added to, or taken away from."""
    if op.name in _ADDING and flags[0] != flags[1]:
        return op.inputs[flags.index(False)]
    return op.inputs[0] if op.name == "sub" and flags == [False, True] else None


def _zero_results(op: Op, flags: list[bool]) -> list[bool]:
    """Which results of an operation are zero, where those of its inputs are that are said to be."""
    zero = bool(flags) and (
        (op.name in _ABSORBING and any(flags))
        or (op.name in _PRESERVING and all(flags))
        or (op.name in _FIRST and flags[0] and op.params.get("y", 1) > 0)
        or (op.name == "select_n" and all(flags[1:]))
    )
    if op.name in _BODIES and any(flags):
        return _zero_outputs(op.blocks[0], flags)
    if op.name == "cond" and any(flags[1:]):
        branches = [_zero_outputs(block, flags[1:]) for block in op.blocks]
        return [all(each) for each in zip(*branches, strict=True)]
    return [zero] * len(op.outputs)


def _zero_outputs(block: Block, flags: list[bool]) -> list[bool]:
    zeros = {value for value, flag in zip(block.inputs, flags, strict=True) if flag}
    for op in block.ops:
        results = _zero_results(op, [_is_zero(value, zeros) for value in op.inputs])
        zeros.update(value for value, flag in zip(op.outputs, results, strict=True) if flag)
    return [_is_zero(value, zeros) for value in block.outputs]


def _with(
    program: Program, ops: tuple[Op, ...], names: Mapping[Value, Value], outputs: tuple[Value, ...]
) -> Program:
    """A program with other operations, of which those stay that its outputs need."""
    news = [(value, names.get(value, value)) for value in program.block.inputs]
    # A leaf that is zero is an input still, which nothing reads.
    inputs = tuple(new if new.constant is None else value for value, new in news)
    leaves = dict(zip(program.leaves, inputs, strict=False))
    block = Block(inputs, live_ops(Block(inputs, ops, outputs)), outputs)
    return Program(leaves, program.inputs, block, program.params_tree, program.out_tree)


def needed(program: Program) -> set[str]:
    """The leaves that a program's outputs depend on.

    Args:
        program: whose operations all lead to outputs, as after :func:`edit`.
    """
    read = {value for op in program.block.ops for value in op.inputs}
    read.update(program.block.outputs)
    return {path for path, value in program.leaves.items() if value in read}


def cropped(leaf: Any, axes: Collection[int], size: int) -> tuple[np.ndarray | None, ...]:
    """For each axis of a kernel, the positions of its centre, or None for all.

    Example:
        >>> import numpy as np
        >>> cropped(np.ones((5, 5, 3, 8)), (0, 1), 3)
        (array([1, 2, 3]), array([1, 2, 3]), None, None)
    """
    return tuple(
        np.arange(n)[centre(n, size)] if axis in axes and n > size else None
        for axis, n in enumerate(leaf.shape)
    )
