"""Rounding activations, by the range that they have in each call or by ranges that are given."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcomp import tree as tree_lib
from jaxcomp.quantize.activations.bounds import Bounds, bounds_shape, fake_quant_within
from jaxcomp.quantize.activations.points import Point, Rules
from jaxcomp.quantize.activations.traced import (
    RoundedFunction,
    RoundedPoint,
    rounded_points,
    runner,
    trace_points,
)
from jaxcomp.quantize.affine import fake_quant
from jaxcomp.quantize.formats import AnyFormat, Format, PerTensor

INT8 = Format(8, granularity=PerTensor())


def activations(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    format: AnyFormat = INT8,
    ranges: Mapping[str, Bounds] | None = None,
    points: Rules = None,
) -> RoundedFunction:
    """A model whose dots and convolutions read rounded activations, with no change to the model.

    The function is traced once for each shape of its inputs and run operation by operation, with
    the data that a product reads fake-quantized on the way in: the operand that depends on the
    model's inputs, and both operands where both do (attention's scores). Weights stay as they are:
    :func:`train` and the methods beside it quantize them, packed ones are decoded. Gradients pass
    straight through, and are zero where a value is clipped.

    A point is called by the path of the weight that it meets (``#2`` at the weight's second
    product), the operands of a product of data by ``scope/operation/lhs`` and ``rhs``, and inputs
    of other operations by ``scope/operation/operand``, such as ``ResNet/Block_0/add/1``. A product
    inside a function with a derivative of its own (``jax.custom_vjp``), which would be lost, is
    left out unless it is named in full.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any pytree of arrays, as an example of what will be given; compressed leaves too.
        *inputs: pytrees of arrays, likewise. ``jax.ShapeDtypeStruct`` will do for all of them.
        format: of the activations, one scale a tensor by default. ``PerChannel(0)`` is one scale an
            example: channels that a product sums over cannot have scales of their own.
        ranges: of each point, from :func:`observe_ranges` or :func:`track_ranges`. None: found anew
            in each call by the format's range, over the whole batch.
        points: patterns of the points to round, or a mapping of patterns to formats (None: leave
            alone), of which the first that matches decides. A pattern that matches no operand of a
            product names inputs of other operations. None: all products.

    Returns:
        A function of ``(params, *inputs)`` that returns what ``apply_fn`` does; it can be jitted,
        differentiated, vmapped, scanned and sharded. Its ``points`` and ``left_out`` tell, as does
        printing it, what is rounded and what is not. It raises ``ValueError`` where inputs of
        another shape lead to other points.

    Raises:
        TypeError: ``apply_fn`` is no function, or ``format`` no format.
        ValueError: a pattern matches nothing or what cannot be rounded; a format does not fit a
            point; ranges are missing, unknown, of another shape or not finite; there is nothing
            to round.

    Example:
        >>> params = {"first": jnp.ones((3, 2)), "second": jnp.ones((2, 1))}
        >>> def model(params, x):
        ...     return jnp.maximum(x @ params["first"], 0) @ params["second"]
        >>> x = jnp.array([[0.1, -0.52, 1.27]])
        >>> rounded = activations(model, params, x, format=Format(2, granularity=PerTensor()))
        >>> rounded(params, x), model(params, x)
        (Array([[2.54]], dtype=float32), Array([[1.7]], dtype=float32))
        >>> list(rounded.points)
        ['first', 'second']

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, section 3.
    """
    _, chosen = trace_points(apply_fn, params, inputs, format, points)
    told = rounded_points(chosen)
    if ranges is not None:
        ranges = check_ranges(ranges, told, chosen.left_out)

    def perform(point: Point, format: AnyFormat, x: Any, bounds: Any) -> Any:
        del point
        if bounds is None:
            return fake_quant(x, format), None
        return fake_quant_within(x, bounds, format), bounds

    run = runner(apply_fn, chosen, format, points, perform, stateful=ranges is not None)

    def call(params: Any, *inputs: Any) -> Any:
        return run(params, {} if ranges is None else dict(ranges), inputs)[0]

    return RoundedFunction(told, chosen.left_out, call)


def check_ranges(
    ranges: Any, points: Mapping[str, RoundedPoint], left_out: Mapping[str, str]
) -> dict[str, Bounds]:
    """The ranges of the points as arrays.

    Args:
        ranges: as given to :func:`activations`.
        points: what is rounded.
        left_out: what is not, and why; ranges of these are not used.

    Returns:
        By the name of the point.

    Raises:
        TypeError: a range is no pair, or they have no names.
        ValueError: a range is missing, of no point, of another shape or not finite.

    Example:
        >>> check_ranges({}, {}, {})
        {}
    """
    if not isinstance(ranges, Mapping):
        raise TypeError(f"ranges must map names of points to Bounds, not {ranges!r:.60}")
    for name in ranges:
        if name not in points and name not in left_out:
            raise ValueError(f"ranges: '{name}' is no point; {tree_lib.nearest(name, points)}")
    found = {}
    for name, point in points.items():
        if name not in ranges:
            raise ValueError(f"ranges: there is none for '{name}': observe it, or leave it out")
        if not isinstance(ranges[name], tuple | list) or len(ranges[name]) != 2:
            raise TypeError(f"ranges: '{name}' must be Bounds(low, high), not {ranges[name]!r:.60}")
        shape = (*point.layers, *bounds_shape(point.shape, point.format, name))
        for edge in ranges[name]:
            if jnp.shape(edge) != shape:
                raise ValueError(
                    f"ranges: '{name}' has shape {jnp.shape(edge)}, but the point needs {shape}"
                )
            if not isinstance(edge, Tracer) and not np.all(np.isfinite(edge)):
                raise ValueError(
                    f"ranges: '{name}' is not finite: no batch led to it, or it met such values"
                )
        found[name] = Bounds(*(jnp.asarray(edge, jnp.float32) for edge in ranges[name]))
    return found
