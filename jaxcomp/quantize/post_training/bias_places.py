"""Which bias takes up a shift of a product's outputs: found in the program, not by names.

From a dot or a convolution the outputs are followed through operations that keep a shift a shift
(reshapes, casts, sums, and products with what does not depend on the data, as in a folded
BatchNorm) to the sum with a leaf.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.model import samples as samples_lib
from jaxcomp.model import tapped
from jaxcomp.model.program import Block, Op, Program, Value, wirings
from jaxcomp.model.samples import Unobservable
from jaxcomp.model.uses import Use, find_uses, live_ops

_LAYOUT = frozenset(
    {
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "reduce_precision",
        "reshape",
        "sharding_constraint",
        "squeeze",
        "transpose",
    }
)
_SUMS = frozenset({"add", "add_any"})
_SCALINGS = frozenset({"mul", "div", "sub"})


class BiasPlace(NamedTuple):
    """One sum of a bias with outputs.

    Attributes:
        bias: path of the leaf.
        op: the sum.
        operand: which of its inputs are the outputs.
        loops: the ``scan`` operations that hand out slices of the bias, outermost first.
        turns: how many slices, by loop.
        stack: the axes of the bias that these are, their sizes.
        where: for each axis of the outputs that the bias lies along, where its entries are.
        sizes: the other axes of the bias.
    """

    bias: str
    op: Op
    operand: int
    loops: tuple[Op, ...]
    turns: tuple[int, ...]
    stack: tuple[int, ...]
    where: Mapping[int, np.ndarray]
    sizes: tuple[int, ...]

    def entries(self, outputs: Any) -> jax.Array:
        """The mean of outputs over all that the bias does not lie along, in its own layout."""
        over = [axis for axis in range(outputs.ndim) if axis not in self.where]
        mean = jnp.mean(outputs, axis=over, keepdims=True)
        index = tuple(self.where.get(axis, np.zeros((), int)) for axis in range(outputs.ndim))
        return jnp.broadcast_to(mean[index], self.sizes)


def bias_places(
    program: Program, paths: Sequence[str]
) -> tuple[dict[str, tuple[BiasPlace, ...]], dict[str, tuple[str, ...]], dict[str, str]]:
    """The biases behind the products of some leaves.

    Args:
        program: from :func:`jaxcomp.model.program.read`.
        paths: of the leaves.

    Returns:
        All places of each bias, in the order of the program; the leaves before each bias; and why
        a leaf has none, or not behind each of its products.

    Example:
        >>> from jaxcomp.model.program import read
        >>> params = {"w": np.ones((3, 2)), "b": np.ones(2), "v": np.ones((2, 2))}
        >>> program = read(lambda p, x: (x @ p["w"] + p["b"]) @ p["v"], params, np.ones((5, 3)))
        >>> places, weights, without = bias_places(program, ["w", "v"])
        >>> weights, without
        ({'b': ('w',)}, {'v': 'no bias behind it: its outputs leave as they are'})
    """
    uses = find_uses(program)
    finder = _Finder(program, uses)
    places: dict[str, tuple[BiasPlace, ...]] = {}
    weights: dict[str, tuple[str, ...]] = {}
    without: dict[str, str] = {}
    for path in dict.fromkeys([use.path for use in uses if use.path in paths] + list(paths)):
        products = [u for u in uses if u.path == path and u.kind in ("dot", "conv")]
        if not products:
            without[path] = "no product reads it"
        for use in products:
            try:
                bias = finder.bias_behind(use)
                if bias not in places:
                    places[bias] = finder.places(bias)
            except Unobservable as reason:
                without[path] = str(reason)
                continue
            if path not in weights.get(bias, ()):
                weights[bias] = (*weights.get(bias, ()), path)
    return places, weights, without


class _Finder:
    """Who reads which value of a program, and which values depend on the data."""

    def __init__(self, program: Program, uses: Sequence[Use]) -> None:
        self.program = program
        self.outside = dict(tapped.around(program))
        self.readers: dict[Value, list[Op]] = {}
        self.leaving: set[Value] = set()
        self.data: set[Value] = set(program.inputs)
        self.adds: dict[Op, Use] = {}
        self.uses: dict[str, list[Use]] = {}
        self.visit(program.block)
        for use in uses:
            self.uses.setdefault(use.path, []).append(use)
            if use.op.name in _SUMS and use.op.inputs[1 - use.operand] in self.data:
                self.adds.setdefault(use.op, use)

    def visit(self, block: Block) -> None:
        self.leaving.update(block.outputs)
        ops = live_ops(block)
        for op in ops:
            for value in op.inputs:
                readers = self.readers.setdefault(value, [])
                if op not in readers:
                    readers.append(op)
            for body in op.blocks:
                self.visit(body)
        self.spread(ops)

    def spread(self, ops: Sequence[Op]) -> None:
        """Mark what depends on the data."""
        for op in ops:
            if not self.data.isdisjoint(op.inputs):
                self.data.update(op.outputs)
            for wiring in wirings(op) if op.blocks else ():
                self.data.update(link.inner for link in wiring.enter if link.outer in self.data)
                before = -1
                while before < len(self.data):
                    before = len(self.data)
                    self.spread(wiring.block.ops)
                    carry = wiring.carry
                    self.data.update(inner for after, inner in carry if after in self.data)

    def bias_behind(self, use: Use) -> str:
        """The path of the bias that the outputs of a product come to, or why there is none."""
        value = use.op.outputs[0]
        while True:
            readers = self.readers.get(value, [])
            if value in self.leaving or len(readers) != 1:
                to = f"go to {len(readers)} operations" if readers else "leave as they are"
                raise Unobservable(f"no bias behind it: its outputs {to}")
            (op,) = readers
            if op in self.adds and op.inputs[1 - self.adds[op].operand] is value:
                return self.adds[op].path
            if not self.passes(op, value):
                raise Unobservable(f"no bias behind it: its outputs go to {op} first")
            (value,) = op.outputs

    def passes(self, op: Op, value: Value) -> bool:
        """Whether a shift of a value is a shift of what comes out, the same for each sample."""
        if op.name in _LAYOUT or (op.name in _SUMS and op.inputs[0] is not op.inputs[1]):
            return True
        others = [other for other in op.inputs if other is not value]
        if op.name not in _SCALINGS or len(others) != 1 or others[0] in self.data:
            return False
        return op.name != "div" or op.inputs[0] is value

    def places(self, bias: str) -> tuple[BiasPlace, ...]:
        """All sums that read a bias, or why it cannot be moved."""
        for use in self.uses[bias]:
            if self.adds.get(use.op) is not use:
                raise Unobservable(f"its bias {bias} is also used by {use.op}")
        return tuple(self.place(use) for use in self.uses[bias])

    def place(self, use: Use) -> BiasPlace:
        shape = self.program.leaves[use.path].shape
        around = self.outside.get(use.op, ())
        reason = tapped.obstacle(around)
        if reason is not None:
            raise Unobservable(f"its bias {use.path}: {reason}")
        walk = tapped.walks(self.program, use.path)[use.op.inputs[use.operand]]
        changed = (walk.inside | walk.outside) - _LAYOUT
        if changed:
            raise Unobservable(f"its bias {use.path} goes through {min(changed)} before the sum")
        held = [axis for axis, role in enumerate(use.roles) if role == "stack"]
        rest = [axis for axis in range(len(shape)) if axis not in held]
        stack, sizes = (tuple(shape[axis] for axis in axes) for axes in (held, rest))
        turns = tuple(loop.params["length"] for loop in walk.loops)
        if held != list(range(len(held))) or turns != stack:
            raise Unobservable(f"which part of its bias {use.path} is read is not fixed")
        where, _ = samples_lib.positions(use, shape, rest)
        covered = math.prod(use.op.inputs[use.operand].shape[axis] for axis in where)
        if covered != math.prod(sizes):
            raise Unobservable(f"its bias {use.path} is repeated or padded before the sum")
        return BiasPlace(use.path, use.op, 1 - use.operand, walk.loops, turns, stack, where, sizes)
