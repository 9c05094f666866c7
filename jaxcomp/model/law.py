"""Where zeroing channels and removing them is the same thing.

A cut zeroes every slice of a group in the masked model and drops it in the smaller one. The two
agree if no array that survives can tell the difference: a sum over the channels adds zeros, a
product contracts them with zeros. This file follows what stands at the cut positions of every
array (zero; another known number, as after a sigmoid; something finite; perhaps not finite) and
fixes the channels for which some operation would tell.
"""

import enum
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcomp.model.axes import Flow
from jaxcomp.model.axis_rules import ELEMENTWISE, REDUCTIONS, SCATTERS, SIDE_BY_SIDE, conv_axes
from jaxcomp.model.dims import Dim, atoms, find
from jaxcomp.model.program import Block, Op, Program, Value, wirings

_MOST_CONSTANTS = 1 << 22
# These hand their input's content on, whatever they do with its axes.
_LAYOUT_NAMES = """
    bitcast_convert_type broadcast_in_dim concatenate dynamic_slice dynamic_update_slice expand_dims
    gather reshape rev slice sort split squeeze stack tile transpose unstack
"""
_LAYOUT = frozenset(_LAYOUT_NAMES.split())


class Unknown(enum.Enum):
    """Content that is not a known number."""

    FINITE = "finite"
    WILD = "perhaps infinite or NaN"


Content = float | Unknown


class Contents(NamedTuple):
    """What an array holds.

    Attributes:
        at: what stands at the cut positions, by atom.
        uniform: the number that the whole array holds, if it is one.
        summed: if the array is a sum over channels: the axes that were summed.
    """

    at: dict[Dim, Content]
    uniform: float | None = None
    summed: tuple[Dim, ...] = ()


class Widths(NamedTuple):
    """Statistics that are taken over channels.

    Attributes:
        means: operations that divide a sum over channels by their number, with the axes summed.
        renormalized: atoms whose removal changes a statistic over channels, with the reason.
    """

    means: dict[Op, tuple[Dim, ...]]
    renormalized: dict[Dim, str]


def hold(flow: Flow, program: Program, renormalize: bool = False) -> Widths:
    """Fix the channels for which zeroing and removing differ.

    Args:
        flow: the axes of the program.
        program: the same program.
        renormalize: leave channels free whose removal only changes a mean, maximum or sum over
            them, and report those instead.

    Returns:
        The statistics over channels that are still free.
    """
    law = _Law(flow, renormalize)
    for value in program.leaves.values():
        law.contents[value] = Contents(dict.fromkeys(law.atoms(value), 0.0))
    for value in program.inputs:
        law.contents[value] = law.unknown(value)
    law.block(program.block)
    return Widths(law.means, law.renormalized)


class _Law:
    """One walk through a program."""

    def __init__(self, flow: Flow, renormalize: bool) -> None:
        self.flow = flow
        self.renormalize = renormalize
        self.contents: dict[Value, Contents] = {}
        self.means: dict[Op, tuple[Dim, ...]] = {}
        self.renormalized: dict[Dim, str] = {}
        self._atoms: dict[Value, frozenset[Dim]] = {}
        self._known: dict[Any, Content] = {}

    def atoms(self, value: Value) -> frozenset[Dim]:
        """The atoms of a value that may be cut."""
        if value not in self._atoms:
            self._atoms[value] = self.free(self.flow.of(value))
        return self._atoms[value]

    def free(self, axes: Any) -> frozenset[Dim]:
        return frozenset(
            atom for dim in axes for atom in atoms(dim) if atom.fixed is None and atom.size > 1
        )

    def unknown(self, value: Value) -> Contents:
        return Contents(dict.fromkeys(self.atoms(value), Unknown.FINITE))

    def of(self, value: Value) -> Contents:
        if value not in self.contents:
            uniform = _uniform(value.constant)
            content = Unknown.FINITE if uniform is None else uniform
            self.contents[value] = Contents(dict.fromkeys(self.atoms(value), content), uniform)
        return self.contents[value]

    def fix(self, atom: Dim, reason: str) -> None:
        self.flow.dims.fix(atom, reason)

    def block(self, block: Block) -> None:
        for op in block.ops:
            if op.blocks and op.name != "shard_map":
                self._bodies(op)
            elif op.name in ELEMENTWISE:
                self._elementwise(op)
            elif op.name in _LAYOUT:
                self._layout(op)
            elif op.name in SCATTERS:
                self._scatter(op)
            elif op.name == "pad":
                self._pad(op)
            elif op.name in REDUCTIONS:
                self._reduce(op)
            elif op.name == "dot_general":
                self._dot(op)
            elif op.name == "conv_general_dilated":
                self._conv(op)
            elif op.name.startswith("reduce_window_") or op.name.startswith("cum"):
                self._window(op)
            else:
                for value in op.outputs:
                    self.contents[value] = self.unknown(value)

    def _bodies(self, op: Op) -> None:
        for value in op.outputs:
            self.contents.pop(value, None)
        for wiring in wirings(op):
            for outer, inner, _ in wiring.enter:
                self.contents[inner] = self.of(outer)
            # What a carry holds only ever becomes less certain, so this ends.
            self.block(wiring.block)
            while any([self._join(self.of(a), b) for a, b in wiring.carry]):
                self.block(wiring.block)
            for outer, inner, _ in wiring.leave:
                if outer in self.contents:
                    self._join(self.of(inner), outer)
                else:
                    self.contents[outer] = self._restrict(self.of(inner), outer)
        for value in op.outputs:
            if value not in self.contents:
                self.contents[value] = self.unknown(value)

    def _restrict(self, contents: Contents, value: Value) -> Contents:
        at = {a: contents.at.get(a, Unknown.FINITE) for a in self.atoms(value)}
        return Contents(at, contents.uniform, contents.summed)

    def _join(self, new: Contents, value: Value) -> bool:
        """Let a value hold what it held or something else; whether that changed it."""
        old = self.of(value)
        at = {a: _join(c, new.at.get(a, Unknown.FINITE)) for a, c in old.at.items()}
        uniform = old.uniform if old.uniform == new.uniform else None
        self.contents[value] = Contents(at, uniform)
        return at != old.at or uniform != old.uniform

    def _at(self, value: Value, atom: Dim) -> Content:
        """What a value contributes at the cut positions of an atom, whether it has it or not."""
        contents = self.of(value)
        if atom in contents.at:
            return contents.at[atom]
        return Unknown.FINITE if contents.uniform is None else contents.uniform

    def _elementwise(self, op: Op) -> None:
        if op.name in SIDE_BY_SIDE:
            for value, result in zip(op.inputs, op.outputs, strict=True):
                self.contents[result] = self.of(value)
            return
        (result,) = op.outputs
        inputs = [self.of(value) for value in op.inputs]
        at = {
            atom: self._compute(op, [self._at(value, atom) for value in op.inputs])
            for atom in self.atoms(result)
        }
        uniform = None
        if all(contents.uniform is not None for contents in inputs):
            value = self._compute(op, [contents.uniform for contents in inputs])  # type: ignore[misc]
            uniform = value if isinstance(value, float) else None
        summed = inputs[0].summed if op.name == "convert_element_type" else ()
        if op.name in ("div", "mul"):
            self._divide(op, inputs)
        self.contents[result] = Contents(at, uniform, summed)

    def _compute(self, op: Op, inputs: list[Content]) -> Content:
        """One element of an element-wise operation."""
        if Unknown.WILD in inputs:
            return Unknown.WILD
        if op.name == "select_n":
            cases = inputs[1:]
            return cases[0] if all(case == cases[0] for case in cases) else Unknown.FINITE
        if op.name in ("mul", "and") and 0.0 in inputs:
            return 0.0
        if op.name == "div" and inputs[1] == 0.0:
            return Unknown.WILD
        if op.name == "div" and inputs[0] == 0.0:
            return 0.0
        if Unknown.FINITE in inputs:
            return Unknown.FINITE
        key = (op.primitive, tuple(inputs), tuple(v.dtype for v in op.inputs), op.outputs[0].dtype)
        if op.name not in ("add", "sub", "mul", "div", "max", "min", "exp", "tanh", "logistic"):
            key += (str(op.params),)
        if key not in self._known:
            self._known[key] = _evaluate(op, inputs)
        return self._known[key]

    def _divide(self, op: Op, inputs: list[Contents]) -> None:
        """Recognise a mean: a sum over channels, divided by their number."""
        for sums, other in (inputs, inputs[::-1]):
            free = self.free(sums.summed)
            if not free or other.uniform is None or (op.name == "div" and sums is inputs[1]):
                continue
            count = math.prod(dim.size for dim in sums.summed)
            number = count if op.name == "div" else 1 / count
            if not math.isclose(other.uniform, number, rel_tol=1e-2 / count):
                continue
            if self.renormalize:
                self.means[op] = sums.summed
            for atom in free:
                self._width(atom, f"{op} takes a mean over it")

    def _width(self, atom: Dim, reason: str) -> None:
        """A statistic over channels would change."""
        if self.renormalize:
            self.renormalized.setdefault(find(atom), reason)
        else:
            self.fix(atom, reason)

    def _layout(self, op: Op) -> None:
        arrays = op.inputs[:1] if op.name in ("gather", "dynamic_slice") else op.inputs
        arrays = op.inputs[:2] if op.name == "dynamic_update_slice" else arrays
        contents = [self.of(value) for value in arrays]
        for result in op.outputs:
            at: dict[Dim, Content] = {}
            for atom in self.atoms(result):
                have = [c.at[atom] for c in contents if atom in c.at]
                at[atom] = have[0] if have else self._at(op.inputs[0], atom)
                for content in have[1:]:
                    at[atom] = _join(at[atom], content)
            single = len(arrays) == 1
            self.contents[result] = Contents(
                at,
                contents[0].uniform if single and op.name != "gather" else None,
                contents[0].summed if single else (),
            )

    def _scatter(self, op: Op) -> None:
        operand, _, updates = op.inputs
        at: dict[Dim, Content] = {}
        for atom in self.atoms(op.outputs[0]):
            content = _join(self._at(operand, atom), self._at(updates, atom))
            kept = content in (0.0, Unknown.WILD) or op.name == "scatter"
            at[atom] = content if kept else Unknown.FINITE
        self.contents[op.outputs[0]] = Contents(at)

    def _pad(self, op: Op) -> None:
        (result,) = op.outputs
        filler = self._at(op.inputs[1], Dim(0))
        at: dict[Dim, Content] = {}
        for atom in self.atoms(result):
            # Either the atom is the padding, or it lies across it: then it holds both.
            inside = self.of(op.inputs[0]).at.get(atom, filler)
            at[atom] = _join(inside, filler)
        self.contents[result] = Contents(at)

    def _reduce(self, op: Op) -> None:
        (value,), (result,) = op.inputs, op.outputs
        contents = self.of(value)
        axes = self.flow.of(value)
        gone = self.free([axes[i] for i in op.params["axes"]])
        for atom in gone:
            if op.name == "reduce_sum" and contents.at.get(atom) == 0.0:
                continue
            what = "adds up" if op.name == "reduce_sum" else "compares or multiplies"
            self._width(atom, f"{op} {what} channels that are not zero once their weights are")
        at = {}
        for atom in self.atoms(result):
            content = contents.at.get(atom, Unknown.FINITE)
            stays = op.name in ("reduce_max", "reduce_min") or content == 0.0
            at[atom] = content if stays or content is Unknown.WILD else Unknown.FINITE
        summed = tuple(axes[i] for i in op.params["axes"]) if gone else ()
        self.contents[result] = Contents(at, None, summed if op.name == "reduce_sum" else ())

    def _window(self, op: Op) -> None:
        (result,) = op.outputs
        contents = self.of(op.inputs[0])
        at = {a: contents.at.get(a, Unknown.FINITE) for a in self.atoms(result)}
        if op.name == "cumlogsumexp":
            at = {a: c if c is Unknown.WILD else Unknown.FINITE for a, c in at.items()}
        elif op.name not in ("reduce_window_max", "reduce_window_min", "cummax", "cummin"):
            at = {a: c if c == 0.0 or c is Unknown.WILD else Unknown.FINITE for a, c in at.items()}
        self.contents[result] = Contents(at)

    def _dot(self, op: Op) -> None:
        ((lhs_contract, _), _) = op.params["dimension_numbers"]
        axes = self.flow.of(op.inputs[0])
        self._contract(op, self.free([axes[i] for i in lhs_contract]))

    def _conv(self, op: Op) -> None:
        _, (_, rhs_in), _ = conv_axes(op)
        self._contract(op, self.free([self.flow.of(op.inputs[1])[rhs_in]]))

    def _contract(self, op: Op, gone: frozenset[Dim]) -> None:
        """A product of two arrays, summed over some atoms."""
        lhs, rhs = (self.of(value) for value in op.inputs)
        for atom in gone:
            pair = (lhs.at.get(atom, Unknown.FINITE), rhs.at.get(atom, Unknown.FINITE))
            if Unknown.WILD in pair:
                self.fix(atom, f"{op} meets values that may be infinite once weights are zero")
            elif 0.0 not in pair:
                self.fix(atom, f"{op} sums over channels that are not zero once their weights are")
        (result,) = op.outputs
        at: dict[Dim, Content] = {}
        for atom in self.atoms(result):
            pair = [c.at[atom] for c in (lhs, rhs) if atom in c.at]
            wild = Unknown.WILD if Unknown.WILD in pair else Unknown.FINITE
            at[atom] = 0.0 if 0.0 in pair and wild is Unknown.FINITE else wild
        self.contents[result] = Contents(at)


def _join(first: Content, second: Content) -> Content:
    if Unknown.WILD in (first, second):
        return Unknown.WILD
    return first if first == second else Unknown.FINITE


def _uniform(constant: Any) -> float | None:
    """The number that a constant holds everywhere, if it is one real number."""
    if constant is None or isinstance(constant, Tracer):
        return None
    if jnp.issubdtype(getattr(constant, "dtype", np.float32), jax.dtypes.extended):
        return None
    array = np.asarray(constant)
    if not 0 < array.size <= _MOST_CONSTANTS or array.dtype.kind == "c":
        return None
    first = array.reshape(-1)[0]
    return float(first) if (array == first).all() else None


def _evaluate(op: Op, inputs: list[Any]) -> Content:
    """An element-wise operation on known numbers; not finite only if the zeros made it so."""
    if not all(math.isfinite(number) for number in inputs):
        return Unknown.FINITE
    arguments = [
        np.asarray(number).astype(value.dtype)
        for number, value in zip(inputs, op.inputs, strict=True)
    ]
    if op.name in ("sharding_constraint", "mesh_cast", "reshard", "pvary"):
        return inputs[0]
    with jax.ensure_compile_time_eval():
        result = np.asarray(op.primitive.bind(*arguments, **op.params))
    if result.dtype.kind == "c":
        return Unknown.FINITE
    number = float(result)
    return number if math.isfinite(number) else Unknown.WILD
