"""A function run with its activations rounded: traced once for each shape of its inputs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxcomp import columns
from jaxcomp.arrays import decode
from jaxcomp.checks import check_function
from jaxcomp.model import tapped
from jaxcomp.model.program import Op, Program, holds_tracers, read
from jaxcomp.quantize.activations.points import Chosen, Point, Rules, choose, find_points
from jaxcomp.quantize.formats import AnyFormat, Format
from jaxcomp.quantize.ranges import AbsMax

# ``perform(point, format, x, entry) -> (rounded x, entry)``; the entry is None without a state.
Perform = Callable[[Point, AnyFormat, Any, Any], tuple[Any, Any]]
# ``run(params, state, inputs) -> (outputs, state)``, with an entry for each point, or none.
Run = Callable[[Any, dict[str, Any], tuple[Any, ...]], tuple[Any, dict[str, Any]]]


class RoundedPoint(NamedTuple):
    """One input of one operation that is rounded.

    Attributes:
        operation: which operation reads it, and where.
        shape: of the activation, for the inputs that were given as an example.
        format: what it is rounded to.
        layers: lengths of the loops over layers around it; each layer has a range of its own.
    """

    operation: str
    shape: tuple[int, ...]
    format: AnyFormat
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class RoundedFunction:
    """A function of ``(params, *inputs)`` whose activations are rounded.

    Attributes:
        points: what is rounded, by name.
        left_out: dots and convolutions, or inputs of them, that are not, and why.
    """

    points: Mapping[str, RoundedPoint]
    left_out: Mapping[str, str]
    _call: Callable[..., Any] = dataclasses.field(repr=False)

    def __call__(self, params: Any, *inputs: Any) -> Any:
        """What the function returns, with its activations rounded."""
        return self._call(params, *inputs)

    def __str__(self) -> str:
        return table(self.points, self.left_out)


def trace_points(
    apply_fn: Any, params: Any, inputs: tuple[Any, ...], format: Any, rules: Any
) -> tuple[Program, Chosen]:
    """Trace a function and choose what to round.

    Raises:
        TypeError: ``apply_fn`` is no function, or ``format`` no format.
        ValueError: see :func:`choose`.
    """
    check_function("apply_fn", apply_fn, "(params, *inputs) -> outputs")
    if not isinstance(format, AnyFormat):
        raise TypeError(
            "format must be a quantize.Format, such as Format(8, granularity=PerTensor()), not "
            f"{format!r}"
        )
    program = read(apply_fn, decode(params), *inputs)
    return program, choose(find_points(program), format, rules)


def rounded_points(chosen: Chosen) -> dict[str, RoundedPoint]:
    """What to tell about the chosen points."""
    return {
        point.name: RoundedPoint(
            f"{point.op}, input {point.operand}",
            point.value.shape,
            chosen.formats[point.name],
            tuple(loop.params["length"] for loop in point.loops),
        )
        for point in chosen.points
    }


def runner(
    apply_fn: Callable[..., Any],
    first: Chosen,
    format: AnyFormat,
    rules: Rules,
    perform: Perform,
    stateful: bool,
) -> Run:
    """A function that runs another with each chosen point replaced by what ``perform`` makes of it.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        first: what was chosen for the inputs that were given as an example.
        format: see :func:`choose`.
        rules: likewise.
        perform: what to do with one activation.
        stateful: whether each point has an entry of the state.

    Returns:
        The function. It raises ``ValueError`` where inputs of another shape lead to other points.
    """
    runs: dict[Any, Any] = {}

    def run(params: Any, state: dict[str, Any], inputs: tuple[Any, ...]) -> Any:
        params = decode(params)
        values, key = jax.tree.leaves((params, inputs)), signature(params, inputs)
        if key in runs:
            return runs[key](values, state)
        program, chosen = trace_points(apply_fn, params, inputs, format, rules)
        check_same(first, chosen)
        swaps = _swaps(chosen, perform, stateful)

        def compute(values: list[Any], state: dict[str, Any]) -> Any:
            outputs, state = tapped.run(program, values, {}, state, swaps)
            return jax.tree.unflatten(program.out_tree, outputs), state

        if holds_tracers(program):
            return compute(values, state)
        runs[key] = jax.jit(compute)
        return runs[key](values, state)

    return run


def signature(params: Any, inputs: tuple[Any, ...]) -> Any:
    """All that an analysis depends on: structure, shapes and dtypes."""
    values, structure = jax.tree.flatten((params, inputs))
    return structure, tuple(map(jax.typeof, values))


def _swaps(chosen: Chosen, perform: Perform, stateful: bool) -> dict[Op, tapped.Swap]:
    at: dict[Op, list[Point]] = {}
    for point in chosen.points:
        at.setdefault(point.op, []).append(point)

    def swap(points: list[Point]) -> tapped.Swap:
        names = tuple(point.name for point in points) if stateful else ()

        def rounded(entries: Any, inputs: tuple[Any, ...], bind: tapped.Bind) -> Any:
            arguments, entries = list(inputs), dict(entries)
            for point in points:
                x, entry = perform(
                    point,
                    chosen.formats[point.name],
                    inputs[point.operand],
                    entries.get(point.name),
                )
                arguments[point.operand] = x
                if stateful:
                    entries[point.name] = entry
            return bind(*arguments), entries

        return tapped.Swap(names, points[0].loops, rounded)

    return {op: swap(points) for op, points in at.items()}


def check_same(first: Chosen, chosen: Chosen) -> None:
    """Raise unless the same points were chosen."""
    for name in first.formats.keys() ^ chosen.formats.keys():
        where = "only there" if name in chosen.formats else "not there"
        raise ValueError(
            f"{name}: these inputs lead to other operations than the inputs given as an example, "
            f"and this point is {where}: make a function for each of them"
        )


def table(points: Mapping[str, RoundedPoint], left_out: Mapping[str, str]) -> str:
    """Points as lines of text."""
    rows = [("point", "shape", "operation", "format")]
    for name, point in points.items():
        layers = f" × {' × '.join(map(str, point.layers))} layers" if point.layers else ""
        shape = f"({', '.join(map(str, point.shape))}){layers}"
        rows.append((name, shape, point.operation, _words(point.format)))
    lines = columns.table(rows, left=len(rows[0]))
    return "\n".join([lines, *(f"left out: {name}: {why}" for name, why in left_out.items())])


def _words(format: AnyFormat) -> str:
    if isinstance(format, Format):
        kind = f"{format.bits} bits, {'symmetric' if format.symmetric else 'affine'}"
    else:
        kind = format.element
    found = "" if isinstance(format.range, AbsMax) else f", {format.range}"
    return f"{kind}, {format.granularity}{found}"
