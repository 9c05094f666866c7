"""Where a model's activations can be rounded: the data that its dots and convolutions read."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcomp import tree as tree_lib
from jaxcomp.model import tapped
from jaxcomp.model.program import Block, Op, Program, Value, wirings
from jaxcomp.model.reach import reached
from jaxcomp.model.uses import find_uses, live_ops
from jaxcomp.quantize.formats import AnyFormat, PerChannel

PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
_SIDES = ("lhs", "rhs")
Rules = Mapping[str, AnyFormat | None] | Iterable[str] | str | None
# Operations that are their bodies: these have the points.
_OPEN = frozenset({"scan", "while", "cond", "remat2", "checkpoint", "shard_map"})


class Point(NamedTuple):
    """One input of one operation that depends on the model's inputs.

    Attributes:
        name: the path of the weight that it is multiplied by (``#2`` at the weight's second
            product); elsewhere ``scope/operation/operand``.
        op: the operation.
        operand: which of its inputs.
        loops: the ``scan`` operations around it that walk along parameters, outermost first: each
            of their turns is a layer of its own.
        obstacle: why it cannot be rounded, or None.
        rule: the function around it with a derivative of its own, or None.
    """

    name: str
    op: Op
    operand: int
    loops: tuple[Op, ...]
    obstacle: str | None
    rule: Op | None = None

    @property
    def value(self) -> Value:
        """What is to be rounded."""
        return self.op.inputs[self.operand]


class Found(NamedTuple):
    """Every place of a program.

    Attributes:
        products: the data operands of dots and convolutions, in the order of the program.
        others: the floating data operands of all other operations.
        without: products that have no data operand, by name, and why.
    """

    products: tuple[Point, ...]
    others: tuple[Point, ...]
    without: dict[str, str]


class Chosen(NamedTuple):
    """What is rounded.

    Attributes:
        points: the chosen ones, in the order of the program.
        formats: their formats by name.
        left_out: products that are not rounded, and why.
    """

    points: tuple[Point, ...]
    formats: dict[str, AnyFormat]
    left_out: dict[str, str]


def find_points(program: Program) -> Found:
    """Every input of an operation that could be rounded.

    Args:
        program: from :func:`jaxcomp.model.program.read`.

    Returns:
        The points.

    Example:
        >>> from jaxcomp.model.program import read
        >>> def attend(w, x):
        ...     query = x @ w["query"]
        ...     return query @ x.T
        >>> found = find_points(read(attend, {"query": jnp.ones((3, 3))}, jnp.ones((4, 3))))
        >>> [point.name for point in found.products]
        ['query', 'dot_general#2/lhs', 'dot_general#2/rhs']
    """
    data = reached(program, program.inputs)
    weights = reached(program, program.leaves.values()) - data
    alive = set(_alive(program.block))
    met: dict[Op, list[str]] = {}
    for use in find_uses(program):
        met.setdefault(use.op, []).append(use.path)
    names, paths = _Names(), _Names()
    products: list[Point] = []
    others: list[Point] = []
    without: dict[str, str] = {}
    for op, outside in tapped.around(program):
        place = names.next("/".join(part for part in (op.scope, op.name) if part))
        loops = tuple(loop for loop, _ in outside if _walks(loop, weights))
        rule = next((around for around, _ in outside if around.name in tapped.RULES), None)
        operands = [i for i, value in enumerate(op.inputs) if value in data]
        obstacle = tapped.obstacle(outside)
        if op not in alive:
            obstacle = "no output depends on it"
        if op.name in PRODUCTS:
            operands = [i for i in operands if i < len(_SIDES)]
            path = paths.next(met[op][0]) if op in met else place
            if not operands:
                without[path] = "none of the model's inputs leads to it"
            for i in operands:
                name = path if op in met and len(operands) == 1 else f"{place}/{_SIDES[i]}"
                reason = obstacle or _unfit(op.inputs[i])
                products.append(Point(name, op, i, loops, reason, rule))
        elif op.name not in _OPEN:
            others += [
                Point(f"{place}/{i}", op, i, loops, obstacle or _unfit(op.inputs[i]), rule)
                for i in operands
                if jnp.issubdtype(op.inputs[i].dtype, jnp.floating)
            ]
    return Found(tuple(products), tuple(others), without)


def choose(
    found: Found,
    format: AnyFormat,
    rules: Any,
) -> Chosen:
    """Give points their formats.

    Args:
        found: from :func:`find_points`.
        format: of every point that no rule gives another.
        rules: patterns of the points that are wanted, or a mapping of patterns to formats (None:
            leave alone); the first pattern that matches a point has it. A pattern that matches no
            operand of a product names inputs of other operations. None: all products.

    Returns:
        The choice.

    Raises:
        ValueError: a pattern matches nothing, only what earlier ones took, or by its full name a
            point that cannot be rounded; nothing is left to round.
    """
    named = {point.name: point for point in (*found.products, *found.others)}
    products = [point.name for point in found.products]
    table = _table(rules, format)
    others = [] if rules is None else [point.name for point in found.others]
    taken = _matched(table, products, others)
    left_out = dict(found.without)
    formats: dict[str, AnyFormat] = {}
    for name, point in named.items():
        pattern = taken.get(name)
        chosen = None if pattern is None else table[pattern]
        if chosen is not None and pattern == name and point.obstacle is not None:
            raise ValueError(f"points: '{name}' cannot be rounded: {point.obstacle}")
        reason = _reason(point, pattern, chosen)
        if reason is None and chosen is not None:
            formats[name] = chosen
        elif reason is not None and (pattern is not None or point.op.name in PRODUCTS):
            left_out[name] = reason
    if not formats:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"no activation to round: {reasons or 'the function has no product'}")
    for name, chosen in formats.items():
        _check_format(named[name], chosen)
    return Chosen(tuple(named[name] for name in formats), formats, left_out)


def _reason(point: Point, pattern: str | None, chosen: AnyFormat | None) -> str | None:
    """Why a point is left out, or None."""
    if point.obstacle is not None:
        return point.obstacle
    if pattern is None:
        return "no pattern matches it"
    if chosen is None:
        return f"left alone by the rule '{pattern}'"
    if point.rule is not None and pattern != point.name:
        return (
            f"it is inside {point.rule}, whose own derivative would be lost: name it in full to "
            "round it all the same"
        )
    return None


def _table(rules: Any, format: AnyFormat) -> dict[str, AnyFormat | None]:
    if rules is None:
        return {"*": format}
    if isinstance(rules, str):
        rules = [rules]
    if not isinstance(rules, Iterable):
        raise TypeError(f"points must be patterns, or formats by pattern, not {rules!r:.60}")
    table: dict[str, Any] = {}
    table |= rules if isinstance(rules, Mapping) else dict.fromkeys(rules, format)
    for pattern, rule in table.items():
        if not isinstance(pattern, str):
            raise TypeError(f"points: a pattern must be a string, not {pattern!r}")
        if rule is not None and not isinstance(rule, AnyFormat):
            raise TypeError(f"points: '{pattern}' must have a format or None, not {rule!r}")
    if not table:
        raise ValueError("points names nothing: leave it out to round what all products read")
    return table


def _matched(table: Iterable[str], products: list[str], others: list[str]) -> dict[str, str]:
    """The pattern that each point goes by."""
    taken: dict[str, str] = {}
    for pattern in table:
        matched = tree_lib.matching(pattern, products) or tree_lib.matching(pattern, others)
        if not matched and (products or others):
            near = tree_lib.nearest(pattern, (*products, *others))
            raise ValueError(f"points: '{pattern}' matches nothing; {near}")
        if matched and all(name in taken for name in matched):
            raise ValueError(f"points: '{pattern}' matches only what earlier patterns took")
        for name in matched:
            taken.setdefault(name, pattern)
    return taken


def _alive(block: Block) -> Iterator[Op]:
    for op in live_ops(block):
        yield op
        for body in op.blocks:
            yield from _alive(body)


def _walks(loop: Op, weights: set[Value]) -> bool:
    """Whether an operation is a loop that hands out slices of parameters."""
    if loop.name != "scan":
        return False
    (wiring,) = wirings(loop)
    return any(link.stacked and link.outer in weights for link in wiring.enter)


class _Names:
    """Names that are met again get a number: ``add``, ``add#2``."""

    def __init__(self) -> None:
        self.times: dict[str, int] = {}

    def next(self, name: str) -> str:
        self.times[name] = self.times.get(name, 0) + 1
        return name if self.times[name] == 1 else f"{name}#{self.times[name]}"


def _unfit(value: Value) -> str | None:
    """Why no format fits a value, or None."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"{value.dtype} is not a floating type"
    if value.dtype.itemsize > jnp.dtype(jnp.float32).itemsize:
        return f"{value.dtype} is wider than the float32 scales"
    if not value.shape:
        return "it is a single number"
    return "it has no elements" if 0 in value.shape else None


def _check_format(point: Point, format: AnyFormat) -> None:
    """Raise unless a format fits a point's shape, and a product can take its scales out."""
    shape = point.value.shape
    reduced = format.reduced_axes(shape, point.name)
    if not isinstance(format.granularity, PerChannel):
        return
    own = [axis for axis in _summed(point) if axis - len(shape) not in reduced]
    if own:
        raise ValueError(
            f"{point.name}: {format.granularity} gives axis {own[0]} of shape {shape} scales of "
            f"its own, and {point.op.name} sums over it, so they could not be taken out of a "
            "product of integers: use granularity=PerTensor(), or name other axes"
        )


def _summed(point: Point) -> tuple[int, ...]:
    """The axes (from 0) that a product sums over."""
    numbers: Any = point.op.params.get("dimension_numbers")
    if point.op.name == "dot_general":
        contracted, _ = numbers
        return tuple(contracted[point.operand])
    if point.op.name == "conv_general_dilated":
        spec = numbers.rhs_spec if point.operand else numbers.lhs_spec
        return tuple(spec[1:])
    return ()
