"""Ranges of activations from batches, found once and kept."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.arrays import decode
from jaxcomp.model import tapped
from jaxcomp.model.batches import peek, spread
from jaxcomp.model.program import Op, Program
from jaxcomp.model.progress import watched
from jaxcomp.quantize.activations.bounds import Bounds, bounds_of, bounds_shape
from jaxcomp.quantize.activations.dynamic import INT8
from jaxcomp.quantize.activations.magnitudes import (
    Magnitudes,
    add_magnitudes,
    check_range,
    clipped,
    no_magnitudes,
)
from jaxcomp.quantize.activations.points import Chosen, Point, Rules
from jaxcomp.quantize.activations.traced import check_same, signature, trace_points
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.ranges import AbsMax


class _Seen(NamedTuple):
    """What is kept of one point.

    Attributes:
        bounds: the least and the greatest value so far.
        counts: how often each magnitude came; None where the largest decides.
        times: how often the point was met.
    """

    bounds: Bounds
    counts: Magnitudes | None
    times: Any


def observe_ranges(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    format: AnyFormat = INT8,
    *,
    points: Rules = None,
    progress: bool | None = None,
) -> dict[str, Bounds]:
    """The range of each activation over batches, for :func:`activations`.

    The model runs as it is, in float, on one batch after the other. What is kept of them is as
    small as the answer: the least and the greatest value, and where the format's range clips, a
    histogram of the magnitudes. By its bins (64 an octave) the ends of such a range are known to
    1.6%.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any pytree of arrays; compressed leaves are decoded.
        batches: an iterable; a plain tuple is spread over the inputs, anything else is the one.
        format: of the activations; its ``range`` says how theirs is found.
        points: as for :func:`activations`.
        progress: whether to show a progress bar on stderr; None: only on a terminal, and only if it
            takes more than two seconds.

    Returns:
        Bounds by the name of the point: a plain tree that can be saved.

    Raises:
        TypeError: ``batches`` is one array, or no iterable; an argument is of another type.
        ValueError: as for :func:`activations`; there are no batches; a batch led to NaN or infinite
            values; no batch led to a point; the format has groups or blocks.

    Example:
        >>> params = {"kernel": jnp.ones((2, 3))}
        >>> batches = [jnp.array([[1.0, -2.0]]), jnp.array([[-3.0, 0.5]])]
        >>> observe_ranges(lambda p, x: x @ p["kernel"], params, batches)
        {'kernel': Bounds(low=Array([[-3.]], dtype=float32), high=Array([[3.]], dtype=float32))}
    """
    batch, batches = peek(batches)
    params = decode(params)
    program, first = trace_points(apply_fn, params, spread(batch), format, points)
    state = {point.name: _begin(point, first.formats[point.name]) for point in first.points}
    steps = {signature(params, spread(batch)): _step(program, first)}
    pending: list[Any] = []
    for number, batch in enumerate(watched(batches, "observing", progress)):
        key = signature(params, spread(batch))
        if key not in steps:
            program, chosen = trace_points(apply_fn, params, spread(batch), format, points)
            check_same(first, chosen)
            steps[key] = _step(program, chosen)
        state, broken = steps[key](state, params, spread(batch))
        # One batch behind, so that the device is not waited for.
        pending.append((number, broken))
        if len(pending) > 1:
            _check_finite(*pending.pop(0))
    for last in pending:
        _check_finite(*last)
    return {
        point.name: _finish(point.name, first.formats[point.name], state[point.name])
        for point in first.points
    }


def _begin(point: Point, format: AnyFormat) -> _Seen:
    shape = bounds_shape(point.value.shape, format, point.name)
    if not isinstance(format.range, AbsMax):
        check_range(point.name, format)
    layers = tuple(loop.params["length"] for loop in point.loops)
    # Each a buffer of its own, as they are donated.
    low, high = (jnp.zeros((*layers, *shape), jnp.float32) for _ in range(2))
    counts = None if isinstance(format.range, AbsMax) else no_magnitudes((*layers, *shape))
    return _Seen(Bounds(low, high), counts, jnp.zeros(layers, jnp.int32))


def _step(program: Program, chosen: Chosen) -> Callable[..., Any]:
    """A compiled step: ``step(state, params, inputs) -> (state, broken)``."""
    taps: dict[Op, list[tapped.Tap]] = {}
    for point in chosen.points:
        fold = _fold(point, chosen.formats[point.name])
        taps.setdefault(point.op, []).append(tapped.Tap(point.name, point.loops, fold))

    def step(state: dict[str, _Seen], params: Any, inputs: tuple[Any, ...]) -> Any:
        values = jax.tree.leaves((params, inputs))
        entries = {name: (seen, jnp.zeros_like(seen.times)) for name, seen in state.items()}
        _, entries = tapped.run(program, values, taps, entries)
        return (
            {name: seen for name, (seen, _) in entries.items()},
            {name: broken for name, (_, broken) in entries.items()},
        )

    return jax.jit(step, donate_argnums=0)


def _fold(point: Point, format: AnyFormat) -> Callable[[Any, tuple[Any, ...]], Any]:
    def fold(entry: tuple[_Seen, Any], inputs: tuple[Any, ...]) -> Any:
        seen, broken = entry
        x = inputs[point.operand]
        new = bounds_of(x, format)
        bounds = Bounds(
            jnp.minimum(seen.bounds.low, new.low), jnp.maximum(seen.bounds.high, new.high)
        )
        counts = seen.counts
        if counts is not None:
            counts = add_magnitudes(counts, x, format)
        broken = broken + jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)
        return _Seen(bounds, counts, seen.times + 1), broken

    return fold


def _check_finite(number: int, broken: dict[str, Any]) -> None:
    for name, count in jax.device_get(broken).items():
        if count.any():
            raise ValueError(
                f"batch {number}: {name} met {count.sum()} NaN or infinite values: mend this "
                "batch, or the parameters before this point"
            )


def _finish(name: str, format: AnyFormat, seen: _Seen) -> Bounds:
    if not jnp.all(seen.times):
        raise ValueError(
            f"{name}: no batch led to it, so that it has no range: leave it out with a rule "
            f"{{{name!r}: None, '*': format}}, or give such a batch"
        )
    return seen.bounds if seen.counts is None else clipped(seen.bounds, seen.counts, format)
