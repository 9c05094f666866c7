"""Where a function normalizes by leaves of its tree, and which layer made what is normalized."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.model.program import Block, Op, Program, Value, read, wirings
from jaxcomp.model.uses import Use, find_uses

_LOOPS = frozenset({"scan", "while", "cond", "shard_map"})
_SAME = frozenset({"convert_element_type", "copy", "reshape", "squeeze", "optimization_barrier"})


class Channels(NamedTuple):
    """A leaf, and which axis of it is the channels."""

    path: str
    rank: int
    axis: int

    def along(self, vector: np.ndarray) -> np.ndarray:
        """A vector over the channels, so that it broadcasts to the leaf."""
        return vector.reshape([-1 if axis == self.axis else 1 for axis in range(self.rank)])

    def vector(self, values: np.ndarray) -> np.ndarray:
        """The vector of a leaf without other axes than the channels."""
        return values.reshape(-1)


class Norm(NamedTuple):
    """A normalization behind a layer: ``(x - mean) / sqrt(var + epsilon) * scale + bias``.

    Attributes:
        path: what its variance's path begins with.
        kernel_leaf: of the layer before.
        biases: of the layer before, one or none.
        mean: the running mean.
        var: the running variance.
        scale: None without.
        bias: None without.
        epsilon: what is added to the variance.
        factor: what the norm multiplies each channel by, float64.
    """

    path: str
    kernel_leaf: Channels
    biases: tuple[Channels, ...]
    mean: Channels
    var: Channels
    scale: Channels | None
    bias: Channels | None
    epsilon: float
    factor: np.ndarray

    @property
    def kernel(self) -> str:
        """The path of the kernel."""
        return self.kernel_leaf.path


class _Stays(Exception):
    """Why a norm cannot be folded."""


def find_norms(
    apply_fn: Callable[..., Any], variables: Any, *inputs: Any
) -> tuple[list[Norm], list[tuple[str, str]]]:
    """The normalizations by running statistics in a function.

    Args:
        apply_fn: a function of the variables and inputs, in inference mode.
        variables: any tree of arrays.
        *inputs: its inputs.

    Returns:
        Those that stand behind a layer of their own; and of all others the path and what is in the
        way.

    Raises:
        TypeError: ``apply_fn`` is not callable, or a leaf is not an array.
        ValueError: there is none.
    """
    reader = _Reader(read(apply_fn, variables, *inputs), tree_lib.flatten(variables))
    norms, kept = [], []
    for op, operand, root in reader.candidates():
        path = _parent(reader.leaves_behind(root.inputs[0])[0])
        try:
            norms.append(reader.norm(path, op, operand, root))
        except _Stays as reason:
            kept.append((path, str(reason)))
    if not norms and not kept:
        raise ValueError(
            "nothing is normalized by running statistics in variables: pass them beside the "
            "parameters, and call the model in inference mode (train=False)"
        )
    return norms, kept


def _parent(path: str) -> str:
    return path.rsplit("/", 1)[0]


class _Reader:
    """A program without calls: who makes each value, who reads it, and which leaves are in it."""

    def __init__(self, program: Program, leaves: tree_lib.Leaves) -> None:
        self.leaves = leaves
        self.paths = {value: path for path, value in program.leaves.items()}
        self.alias: dict[Value, Value] = {}
        self.makers: dict[Value, Op] = {}
        self.readers: dict[Value, list[Op | None]] = {}
        self.loops: dict[Op, str] = {}
        self.ops = list(self.flat(program.block, ""))
        for op in self.ops:
            self.makers |= dict.fromkeys(op.outputs, op)
            for value in op.inputs:
                self.readers.setdefault(self.real(value), []).append(op)
        for value in program.block.outputs:
            self.readers.setdefault(self.real(value), []).append(None)
        self.uses: dict[Op, list[Use]] = {}
        self.count: dict[str, int] = {}
        for use in find_uses(program):
            self.uses.setdefault(use.op, []).append(use)
            self.count[use.path] = self.count.get(use.path, 0) + 1

    def flat(self, block: Block, loop: str) -> Iterator[Op]:
        """Operations with those of bodies in their place."""
        for op in block.ops:
            inside = loop or (op.name if op.name in _LOOPS else "")
            for wiring in wirings(op):
                self.alias |= {link.inner: link.outer for link in wiring.enter}
                yield from self.flat(wiring.block, inside)
                if not inside:
                    self.alias |= {link.outer: link.inner for link in wiring.leave}
            if loop:
                self.loops[op] = loop
            if inside or not op.blocks:
                yield op

    def real(self, value: Value) -> Value:
        while value in self.alias:
            value = self.alias[value]
        return value

    def maker(self, value: Value) -> Op | None:
        return self.makers.get(self.real(value))

    def behind(self, value: Value) -> Iterator[Op]:
        """The operations that a value is made by, back to leaves and inputs."""
        op = self.maker(value)
        if op is not None:
            yield op
            for source in op.inputs:
                yield from self.behind(source)

    def leaves_behind(self, value: Value) -> list[str]:
        values = [value, *(source for op in self.behind(value) for source in op.inputs)]
        found = [self.paths.get(self.real(source)) for source in values]
        return list(dict.fromkeys(path for path in found if path is not None))

    def candidates(self) -> Iterator[tuple[Op, int, Op]]:
        """Where data meet the root of a leaf: the operation, the root's side, and the root."""
        for op in self.ops:
            operands = {use.operand for use in self.uses.get(op, ())}
            if op.name not in ("mul", "div") or len(operands) != 1:
                continue
            (operand,) = operands
            roots = [o for o in self.behind(op.inputs[operand]) if o.name in ("rsqrt", "sqrt")]
            if len(roots) == 1 and self.leaves_behind(roots[0].inputs[0]):
                yield op, operand, roots[0]

    def norm(self, path: str, op: Op, operand: int, root: Op) -> Norm:
        """Read one; raises :class:`_Stays`."""
        if op in self.loops:
            raise _Stays(f"it is inside a loop ({self.loops[op]})")
        if op.name == "div" and operand == 0:
            raise _Stays("its root is divided by the data")
        (var_path, *more), epsilon = self.variance(root)
        if more:
            raise _Stays(f"its variance is made of several leaves ({var_path}, {more[0]})")
        others = [use for use in self.uses[op] if use.path != var_path]
        var = next(use for use in self.uses[op] if use.path == var_path)
        centred = self.maker(op.inputs[1 - operand])
        centred = self.before(centred) if centred and centred.name in _SAME else centred
        if centred is None or centred.name != "sub" or len(self.uses.get(centred, ())) != 1:
            raise _Stays("no running mean is subtracted before it")
        (mean,) = self.uses[centred]
        if mean.operand != 1:
            raise _Stays("the data are subtracted from its mean")
        self.read_once(centred)
        axis = self.channel_axis(mean)
        factor = self.evaluate(op.inputs[operand])
        factor = 1 / _vector(factor, axis) if op.name == "div" else _vector(factor, axis)
        scale, bias, extra = self.after(op, others)
        factor = factor * (1.0 if extra is None else _vector(self.evaluate(extra), axis))
        kernel, biases = self.layer(centred, axis - len(op.outputs[0].shape))
        return Norm(
            path,
            kernel,
            biases,
            self.channels(mean),
            self.channels(var),
            self.channels(scale) if scale else None,
            self.channels(bias) if bias else None,
            epsilon,
            factor,
        )

    def variance(self, root: Op) -> tuple[list[str], float]:
        """The leaf under a root, and what is added to it."""
        epsilon, value = 0.0, root.inputs[0]
        while (op := self.maker(value)) is not None:
            if op.name == "add":
                sides = [bool(self.leaves_behind(side)) for side in op.inputs]
                if sum(sides) != 1:
                    raise _Stays("more than a constant is added to its variance")
                epsilon += float(np.ravel(self.evaluate(op.inputs[sides.index(False)]))[0])
                value = op.inputs[sides.index(True)]
            elif op.name in _SAME or op.name in ("broadcast_in_dim", "transpose"):
                value = op.inputs[0]
            else:
                raise _Stays(f"its variance goes through {op.name}")
        return self.leaves_behind(value), epsilon

    def after(self, op: Op, others: list[Use]) -> tuple[Use | None, Use | None, Value | None]:
        """Scale and bias, and the scale's operand where it is not within the factor."""
        if len(others) > 1:
            raise _Stays(f"its factor is made of several leaves ({others[0].path}, …)")
        scale, extra = (others[0] if others else None), None
        while (following := self.follower(op)) is not None:
            uses = self.uses.get(following, [])
            if following.name == "mul" and len(uses) == 1 and scale is None:
                scale, extra = uses[0], following.inputs[uses[0].operand]
            elif following.name == "add" and len(uses) == 1:
                return scale, uses[0], extra
            elif following.name != "convert_element_type":
                break
            op = following
        return scale, None, extra

    def follower(self, op: Op) -> Op | None:
        readers = self.readers.get(self.real(op.outputs[0]), [])
        return readers[0] if len(readers) == 1 else None

    def read_once(self, op: Op) -> None:
        if len(self.readers[self.real(op.outputs[0])]) != 1:
            raise _Stays(f"what it normalizes is used elsewhere too (the result of {op})")

    def before(self, op: Op) -> Op | None:
        self.read_once(op)
        return self.maker(op.inputs[0])

    def layer(self, centred: Op, axis: int) -> tuple[Channels, tuple[Channels, ...]]:
        """The layer whose output is centred, with the channels on an axis from the end."""
        biases, value = [], centred.inputs[0]
        while True:
            op = self.maker(value)
            if op is None:
                raise _Stays("it normalizes an input")
            self.read_once(op)
            uses = self.uses.get(op, [])
            if op.name in ("conv_general_dilated", "dot_general"):
                return self.kernel(op, uses, axis), tuple(biases)
            if op.name == "add" and len(uses) == 1:
                biases.append(self.channels(uses[0], axis + len(op.outputs[0].shape)))
                value = op.inputs[1 - uses[0].operand]
            elif op.name in _SAME and op.outputs[0].shape[axis:] == op.inputs[0].shape[axis:]:
                value = op.inputs[0]
            else:
                raise _Stays(f"it normalizes the result of {op}")

    def kernel(self, op: Op, uses: list[Use], axis: int) -> Channels:
        if len(uses) != 1:
            raise _Stays(f"the weight of {op} is not one leaf")
        (use,) = uses
        where = axis + len(op.outputs[0].shape)
        if op.name == "dot_general":
            return self.channels(use, _dot_axis(op, use.operand, where))
        numbers = op.params["dimension_numbers"]
        if where != numbers.out_spec[1] or use.operand != 1:
            raise _Stays(f"it normalizes another axis than the channels of {op}")
        return self.channels(use, numbers.rhs_spec[0])

    def channels(self, use: Use, where: int | None = None) -> Channels:
        """Which axis of a leaf lies whole on an axis of the operand (on the only one if None)."""
        if self.count[use.path] != 1:
            raise _Stays(f"{use.path} is used at {self.count[use.path]} places")
        shape = self.leaves[use.path].shape
        for axis, found in enumerate(use.axes):
            if found is None or len(found.parts) != 1:
                continue
            (part,) = found.parts
            if where is not None and part.axis != where:
                continue
            whole = part.size == shape[axis] and not found.start and not part.offset
            if whole and part.leaf_stride == 1 and part.stride == 1:
                if where is None and shape[axis] != np.prod(shape):
                    continue
                return Channels(use.path, len(shape), axis)
        raise _Stays(f"no axis of {use.path} is the channels")

    def channel_axis(self, mean: Use) -> int:
        """The axis of the data that the mean has an entry for each index of."""
        found = mean.axes[self.channels(mean).axis]
        assert found is not None
        return found.parts[0].axis

    def evaluate(self, value: Value) -> Any:
        """What is computed from leaves alone."""
        value = self.real(value)
        if value in self.paths:
            return self.leaves[self.paths[value]]
        op = self.makers.get(value)
        if op is None:
            if value.constant is None:
                raise _Stays("it depends on the inputs")
            return value.constant
        if op.blocks:
            raise _Stays(f"its factor goes through {op}")
        results = op.primitive.bind(*map(self.evaluate, op.inputs), **op.params)
        return results[op.outputs.index(value)] if op.primitive.multiple_results else results


def _vector(values: Any, axis: int) -> np.ndarray:
    """The entries along one axis of an array that is the same along all others."""
    wide = np.asarray(values).astype(np.float64)
    return wide[tuple(slice(None) if at == axis else 0 for at in range(wide.ndim))]


def _dot_axis(op: Op, operand: int, where: int) -> int:
    """Which axis of a product's operand becomes an axis of its output."""
    contracted, batch = op.params["dimension_numbers"]
    free = [
        [a for a in range(len(value.shape)) if a not in (*contracted[i], *batch[i])]
        for i, value in enumerate(op.inputs)
    ]
    sources = [
        *((operand, axis) for axis in batch[operand]),
        *((0, axis) for axis in free[0]),
        *((1, axis) for axis in free[1]),
    ]
    side, axis = sources[where]
    if side != operand:
        raise _Stays(f"it normalizes another axis than the channels of {op}")
    return axis
