"""Which products of a program run in integers, and why the others do not."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxcomp.arrays import QuantizedArray, is_compressed
from jaxcomp.model import tapped
from jaxcomp.model.program import Op, Program
from jaxcomp.model.readers import Reader, by_operand, readers
from jaxcomp.model.uses import find_uses
from jaxcomp.quantize.activations.points import PRODUCTS, Point, Rules, choose, find_points
from jaxcomp.quantize.activations.traced import RoundedPoint
from jaxcomp.quantize.formats import AnyFormat, Format
from jaxcomp.quantize.integer.products import check_activations, check_sums
from jaxcomp.quantize.integer.weights import (
    Layout,
    Scaling,
    Unfit,
    check_leaf,
    greatest_step,
    layout_of,
    scaling_of,
)

# Bodies that hand nothing around.
_INLINE = frozenset({"custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint"})


class IntegerProduct(NamedTuple):
    """One dot or convolution that runs in integers.

    Attributes:
        operation: which, and where.
        inputs: products that are added up for an output.
        outputs: of the weight, of all groups together.
        layers: lengths of the loops that walk along the weight.
        weight: the form in which it was packed.
        activations: to what its data is rounded.
    """

    operation: str
    inputs: int
    outputs: int
    layers: tuple[int, ...]
    weight: str
    activations: Format


class Planned(NamedTuple):
    """How to run one product in integers.

    Attributes:
        op: the operation.
        operand: which of its inputs is the data; the weight is the other.
        point: that data.
        path: the weight's leaf.
        layout: of the weight.
        scaling: which of the leaf's scales are whose.
        format: of the data.
        loops: that hand out slices of the weight, outermost first.
        spent: whether nothing needs the weight after its product in a turn.
    """

    op: Op
    operand: int
    point: Point
    path: str
    layout: Layout
    scaling: Scaling
    format: Format
    loops: tuple[Op, ...]
    spent: bool


class Plan(NamedTuple):
    """A program seen as integers.

    Attributes:
        products: what runs in integers, by name.
        left: what does not, and why.
        needed: the paths of the leaves that are read in floating point as well, or only.
    """

    products: dict[str, Planned]
    left: dict[str, str]
    needed: frozenset[str]

    def rounded(self) -> dict[str, RoundedPoint]:
        """The data that is rounded, as :mod:`activations` describes it."""
        return {
            name: RoundedPoint(
                f"{at.op}, input {at.operand}", at.point.value.shape, at.format, _lengths(at.loops)
            )
            for name, at in self.products.items()
        }

    def told(self, packed: Mapping[str, QuantizedArray]) -> dict[str, IntegerProduct]:
        """What to tell about the products."""
        return {
            name: IntegerProduct(
                str(at.op), *_sizes(at), _lengths(at.loops), packed[at.path].form(), at.format
            )
            for name, at in self.products.items()
        }


def make_plan(
    program: Program,
    leaves: Mapping[str, Any],
    packed: Mapping[str, QuantizedArray],
    format: AnyFormat,
    rules: Rules,
    ranges: Mapping[str, Any] | None,
) -> Plan:
    """Find what can run in integers.

    Args:
        program: the model, traced on dense shapes.
        leaves: the tree's, by path.
        packed: those of them that are uniformly quantized.
        format: of the data.
        rules: see :func:`jaxcomp.quantize.activations.points.choose`.
        ranges: of the data, or None.

    Raises:
        ValueError: as :func:`choose`.
    """
    found = find_points(program)
    chosen = choose(found, format, rules)
    read = {path: readers(program, path) for path in packed}
    search = _Search(program, leaves, packed, by_operand(read), _met(program))
    products: dict[str, Planned] = {}
    left = dict(chosen.left_out)
    for point in chosen.points:
        try:
            at = search.planned(point, chosen.formats[point.name], ranges is not None)
        except Unfit as error:
            left[point.name] = str(error)
        else:
            products[point.name] = at
    done = {(at.op, 1 - at.operand) for at in products.values()}
    needed = set(leaves) - set(packed)
    for path, some in read.items():
        for reader in some:
            if reader.obstacle is None and (reader.op, reader.operand) in done:
                continue
            needed.add(path)
            # Products are named by what they multiply already.
            if reader.obstacle or reader.op is None or reader.op.name not in PRODUCTS:
                left[f"{path}, read by {reader.op or 'the caller'}"] = _why(reader)
        if not some:
            left[path] = "no output depends on it"
    return Plan(products, left, frozenset(needed))


class _Search(NamedTuple):
    """What is known of a program while its products are planned."""

    program: Program
    leaves: Mapping[str, Any]
    packed: Mapping[str, QuantizedArray]
    weights: Mapping[tuple[Op, int], tuple[str, Reader]]
    met: Mapping[tuple[Op, int], str]

    def planned(self, point: Point, format: AnyFormat, with_ranges: bool) -> Planned:
        """How to run one product, or :class:`Unfit`."""
        if point.op.name not in PRODUCTS:
            raise Unfit(f"{point.op.name} is neither a dot nor a convolution")
        weight = (point.op, 1 - point.operand)
        if weight not in self.weights:
            raise Unfit(self._without(weight))
        path, reader = self.weights[weight]
        leaf = self.packed[path]
        check_activations(format)
        check_leaf(leaf)
        layout = layout_of(*weight, reader.steps, len(reader.loops))
        scaling = scaling_of(leaf, layout)
        if with_ranges and reader.loops != point.loops:
            raise Unfit("its weight is the same in turns of a loop that have ranges each")
        assert isinstance(format, Format)
        bodies = [op for op, _ in dict(tapped.around(self.program))[point.op]]
        spent = tuple(op for op in bodies if op.name not in _INLINE) == reader.loops
        at = Planned(
            *(point.op, point.operand, point, path, layout, scaling, format, reader.loops, spent)
        )
        check_sums(scaling.size or _sizes(at)[0], format, greatest_step(leaf))
        return at

    def _without(self, weight: tuple[Op, int]) -> str:
        """Why an operand is no packed leaf."""
        path = self.met.get(weight)
        if path is None:
            return "it is multiplied by another activation, not by a weight"
        if path in self.packed:
            return f"{path} is changed, not only laid out anew, before it is multiplied"
        leaf = self.leaves[path]
        if is_compressed(leaf):
            return f"{path} holds no uniform integers but {leaf.form()}"
        return f"{path} is not quantized"


def _met(program: Program) -> dict[tuple[Op, int], str]:
    """The leaf that each operand is computed from."""
    return {(use.op, use.operand): use.path for use in find_uses(program)}


def _why(reader: Reader) -> str:
    if reader.obstacle or reader.op is None:
        return reader.obstacle or ""
    if reader.op.name in ("gather", "dynamic_slice"):
        return "its rows are looked up, not multiplied"
    return f"{reader.op.name} needs its values"


def _lengths(loops: tuple[Op, ...]) -> tuple[int, ...]:
    return tuple(loop.params["length"] for loop in loops)


def _sizes(at: Planned) -> tuple[int, int]:
    """Inputs and outputs of a product."""
    shape = [at.op.inputs[1 - at.operand].shape[axis] for axis in at.layout.order]
    after = at.layout.batch + at.layout.outputs
    return math.prod(shape[after:]), math.prod(shape[:after])
