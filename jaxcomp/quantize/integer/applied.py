"""A model run with its dots and convolutions in 8-bit integers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp import columns
from jaxcomp import tree as tree_lib
from jaxcomp.arrays import QuantizedArray, is_compressed
from jaxcomp.checks import check_function
from jaxcomp.model import tapped
from jaxcomp.model.program import Op, Program, holds_tracers, read
from jaxcomp.quantize.activations.bounds import Bounds
from jaxcomp.quantize.activations.dynamic import INT8, check_ranges
from jaxcomp.quantize.activations.points import Rules
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.integer.plan import IntegerProduct, Plan, make_plan
from jaxcomp.quantize.integer.products import find_integers, product
from jaxcomp.quantize.integer.weights import prepare


class IntegerParams(NamedTuple):
    """What an integer model runs on; a pytree like any other.

    Attributes:
        weights: for each product in integers its weight, outputs first, with an axis in front for
            each loop over layers.
        ranges: of its activations, where they were given.
        rest: the other leaves by path, as they were: packed ones are decoded where they are used.
    """

    weights: dict[str, Any]
    ranges: dict[str, Bounds]
    rest: tree_lib.Leaves


@dataclasses.dataclass(frozen=True, eq=False)
class Integer:
    """A model whose products run in integers where they can.

    Attributes:
        params: what it runs on, made of the packed tree.
        executed: the products that run in integers, by the path of their weight.
        left: every other product, and every other use of a packed leaf, with the reason.
    """

    params: IntegerParams
    executed: Mapping[str, IntegerProduct]
    left: Mapping[str, str]
    _call: Callable[..., Any] = dataclasses.field(repr=False)

    def apply(self, params: Any, *inputs: Any) -> Any:
        """What the model returns; a pure function to jit, vmap, scan or shard.

        Args:
            params: this model's ``params``, or others of that structure.
            *inputs: of the model.

        Raises:
            TypeError: ``params`` are not such.
            ValueError: inputs of this shape lead to other products.
        """
        if not isinstance(params, IntegerParams):
            raise TypeError(
                f"params must be those of the integer model, model.params, not {type(params)}: "
                "weights are laid out anew in them"
            )
        return self._call(params, *inputs)

    def __str__(self) -> str:
        return _table(self.executed, self.left)


def integer_apply(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    format: AnyFormat = INT8,
    ranges: Mapping[str, Bounds] | None = None,
    points: Rules = None,
) -> Integer:
    """Run a packed model in integers, with no change to the model.

    Every dot and convolution that reads a uniformly quantized leaf through nothing but changes of
    layout (reshape, transpose, slice, cast, slices of a loop over layers) multiplies codes: its
    data is rounded to 8 bits or fewer, products are summed in 32 bits, exactly, and the scales of
    both sides are applied afterwards. What comes out is what :func:`activations` simulates on the
    packed tree, up to the rounding of float32; a rounding at the next layer can then fall on the
    other side, by one step. Everything else runs as it was and is named in ``left``.

    Codes are unpacked once, to a byte each. It is for inference: rounding has no gradient here.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: a tree with packed leaves, such as :func:`jaxcomp.pack` makes.
        *inputs: examples of the other inputs; ``jax.ShapeDtypeStruct`` will do.
        format: of the activations, one scale a tensor by default; ``PerChannel(0)`` is one an
            example. Under ``vmap`` each example is a tensor of its own.
        ranges: of the activations, from :func:`observe_ranges`, by the names that
            :func:`activations` gives; those of other points are not used. None: found in each call.
        points: patterns of the products to run in integers, or a mapping of patterns to formats
            (None: leave alone). None: all.

    Returns:
        The model in integers: ``model.apply(model.params, *inputs)``. Printed, it tells what runs
        in integers and what does not.

    Raises:
        TypeError: ``apply_fn`` is no function, or ``format`` no format.
        ValueError: nothing can run in integers; a pattern matches nothing; a format does not fit
            an activation; a range is missing or does not fit.

    Example:
        >>> from jaxcomp.quantize import Format, encode
        >>> params = {"kernel": encode(jnp.array([[1.0, -2.0], [3.0, 0.5]]), Format(8)),
        ...           "bias": jnp.ones(2)}
        >>> model = integer_apply(
        ...     lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((1, 2))
        ... )
        >>> model.apply(model.params, jnp.array([[1.0, 2.0]])).round(3)
        Array([[ 8.   , -0.008]], dtype=float32)
        >>> list(model.executed), model.left
        (['kernel'], {})

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, section 2.
    """
    check_function("apply_fn", apply_fn, "(params, *inputs) -> outputs")
    if not isinstance(format, AnyFormat):
        raise TypeError(f"format must be a quantize.Format, such as Format(8), not {format!r}")
    leaves = tree_lib.flatten(params)
    packed = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, QuantizedArray)}
    outlines = tree_lib.Leaves((path, _outline(leaf)) for path, leaf in leaves.items())
    example = tree_lib.replace(params, outlines)

    def trace(inputs: tuple[Any, ...]) -> tuple[Program, Plan]:
        program = read(apply_fn, example, *inputs)
        return program, make_plan(program, leaves, packed, format, points, ranges)

    _, first = trace(inputs)
    if not first.products:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in first.left.items())
        raise ValueError(f"nothing can run in integers: {reasons}")
    weights = {
        name: prepare(packed[at.path], at.layout, at.scaling) for name, at in first.products.items()
    }
    given = {} if ranges is None else check_ranges(ranges, first.rounded(), first.left)
    rest = tree_lib.Leaves((p, leaf) for p, leaf in leaves.items() if p in first.needed)
    ready = IntegerParams(weights, given, rest)
    run = _runner(trace, first, outlines)
    return Integer(ready, first.told(packed), first.left, run)


def _outline(leaf: Any) -> jax.ShapeDtypeStruct | Any:
    if is_compressed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


def _runner(
    trace: Callable[[tuple[Any, ...]], tuple[Program, Plan]], first: Plan, outlines: Any
) -> Callable[..., Any]:
    runs: dict[Any, Any] = {}

    def call(params: IntegerParams, *inputs: Any) -> Any:
        arguments, structure = jax.tree.flatten(inputs)
        # An analysis depends on nothing but structure, shapes and dtypes, so it may be kept.
        key = (structure, tuple(map(jax.typeof, arguments)))
        if key in runs:
            return runs[key](params, arguments)
        program, plan = trace(inputs)
        _check_same(first, plan)

        def compute(params: IntegerParams, arguments: list[Any]) -> Any:
            values = [*_values(outlines, params.rest), *arguments]
            state = {
                name: (weight, params.ranges.get(name)) for name, weight in params.weights.items()
            }
            outputs, _ = tapped.run(program, values, {}, state, _swaps(plan))
            return jax.tree.unflatten(program.out_tree, outputs)

        if holds_tracers(program):
            return compute(params, arguments)
        runs[key] = jax.jit(compute)
        return runs[key](params, arguments)

    return call


def _values(outlines: Mapping[str, Any], rest: Mapping[str, Any]) -> list[Any]:
    """The leaves as arrays. Nothing reads those that are not there: NaN would tell."""
    values = []
    for path, outline in outlines.items():
        if path not in rest:
            values.append(jnp.full(outline.shape, jnp.nan, outline.dtype))
        else:
            leaf = rest[path]
            values.append(leaf.decode() if is_compressed(leaf) else leaf)
    return values


def _swaps(plan: Plan) -> dict[Op, tapped.Swap]:
    swaps = {}
    for name, at in plan.products.items():

        def perform(
            entries: Any, inputs: tuple[Any, ...], bind: Any, name: str = name, at: Any = at
        ) -> Any:
            weight, bounds = entries[name]
            x = find_integers(inputs[at.operand], at.format, bounds)
            result = product(at.op, at.operand, at.layout, x, weight)
            # A loop that gets slices of a weight would stack them up again.
            return [result], {name: () if at.spent else entries[name]}

        swaps[at.op] = tapped.Swap((name,), at.loops, perform)
    return swaps


def _check_same(first: Plan, plan: Plan) -> None:
    for name in first.products.keys() ^ plan.products.keys():
        where = "only there" if name in plan.products else "not there"
        raise ValueError(
            f"{name}: inputs of this shape lead to other products than the inputs given as an "
            f"example, and this one is {where}: make an integer model for each of them"
        )
    for name, at in plan.products.items():
        if at.layout != first.products[name].layout:
            raise ValueError(
                f"{name}: inputs of this shape read it in another layout than the inputs given "
                "as an example: make an integer model for each of them"
            )
    if plan.needed - first.needed:
        raise ValueError(
            f"{min(plan.needed - first.needed)}: inputs of this shape need it in floating point, "
            "those given as an example did not: make an integer model for each of them"
        )


def _table(executed: Mapping[str, IntegerProduct], left: Mapping[str, str]) -> str:
    rows = [("in integers", "inputs × outputs", "operation", "weight", "activations")]
    for name, at in executed.items():
        layers = f" × {' × '.join(map(str, at.layers))} layers" if at.layers else ""
        size = f"{at.inputs} × {at.outputs}{layers}"
        data = at.activations
        kind = "symmetric" if data.symmetric else "affine"
        words = f"int{data.bits} {kind}, {data.granularity}"
        rows.append((name, size, at.operation, at.weight, words))
    lines = columns.table(rows, left=len(rows[0]))
    return "\n".join([lines, *(f"left: {name}: {why}" for name, why in left.items())])
