"""Ranges of activations that follow a moving average while a network trains."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcomp.checks import check_count, is_number
from jaxcomp.quantize.activations.bounds import (
    Bounds,
    bounds_of,
    bounds_shape,
    fake_quant_within,
)
from jaxcomp.quantize.activations.dynamic import INT8
from jaxcomp.quantize.activations.points import Point, Rules
from jaxcomp.quantize.activations.traced import (
    RoundedPoint,
    rounded_points,
    runner,
    table,
    trace_points,
)
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.ranges import AbsMax


class Tracked(NamedTuple):
    """What is kept of one point.

    Attributes:
        bounds: the moving average of the least and the greatest value; NaN before the first.
        times: ``int32``, how often it was met.
    """

    bounds: Bounds
    times: Any


@dataclasses.dataclass(frozen=True, eq=False)
class TrackedFunction:
    """A function of ``(params, state, *inputs)`` that returns outputs and the new state.

    Attributes:
        points: what is rounded, by name.
        left_out: dots and convolutions, or inputs of them, that are not, and why.
    """

    points: Mapping[str, RoundedPoint]
    left_out: Mapping[str, str]
    _call: Callable[..., Any] = dataclasses.field(repr=False)

    def init(self) -> dict[str, Tracked]:
        """The state of no steps: a plain pytree by the names of the points."""
        state = {}
        for name, point in self.points.items():
            shape = (*point.layers, *bounds_shape(point.shape, point.format, name))
            unknown = jnp.full(shape, jnp.nan, jnp.float32)
            times = jnp.zeros(point.layers, jnp.int32)
            state[name] = Tracked(Bounds(unknown, jnp.copy(unknown)), times)
        return state

    def __call__(self, params: Any, state: Any, *inputs: Any) -> tuple[Any, dict[str, Tracked]]:
        """What the function returns, with its activations rounded; and the new state."""
        return self._call(params, state, *inputs)

    def freeze(self, state: Mapping[str, Tracked]) -> dict[str, Bounds]:
        """The ranges so far, for :func:`activations`.

        Raises:
            ValueError: a point was never met.
        """
        for name, entry in state.items():
            if not isinstance(entry.times, Tracer) and jnp.any(entry.times == 0):
                raise ValueError(f"{name}: no step led to it, so that it has no range")
        return {name: entry.bounds for name, entry in state.items()}

    def __str__(self) -> str:
        return table(self.points, self.left_out)


def track_ranges(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    format: AnyFormat = INT8,
    decay: float = 0.99,
    begin: int = 0,
    points: Rules = None,
) -> TrackedFunction:
    """A model whose activations are rounded by ranges that follow the training.

    As :func:`activations`, but each point's range is a moving average of its least and greatest
    values: steadier than those of one batch, and known when training ends. Each call adds what it
    meets and rounds by the average with that in it; what lies outside is clipped. The average is
    free of the bias towards its beginning. Values that are not finite leave it as it was.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: as for :func:`activations`.
        *inputs: likewise.
        format: of the activations, with a range for the tensor or for given axes.
        decay: of the average, from 0 (the last call alone) to below 1.
        begin: how many calls only watch: until then nothing is rounded.
        points: as for :func:`activations`.

    Returns:
        A function of ``(params, state, *inputs)`` that returns the outputs and the new state.
        ``init()`` makes the first state, a plain pytree; ``freeze(state)`` the ranges for
        :func:`activations`. The layers of a loop over stacked weights have a range each; turns of a
        loop that share their weights add to one range, one after the other.

    Raises:
        TypeError: an argument is of another type.
        ValueError: as for :func:`activations`; ``decay`` or ``begin`` is out of range; the format
            has groups or blocks, or a range other than :class:`AbsMax`.

    Example:
        >>> params = {"kernel": jnp.ones((2, 1))}
        >>> def model(params, x):
        ...     return x @ params["kernel"]
        >>> tracked = track_ranges(model, params, jnp.ones((1, 2)), decay=0.5)
        >>> state = tracked.init()
        >>> for most in (1.0, 4.0):
        ...     out, state = tracked(params, state, jnp.array([[0.5, most]]))
        >>> tracked.freeze(state)["kernel"].high
        Array([[3.]], dtype=float32)
        >>> out
        Array([[3.496063]], dtype=float32)

    Source: Jacob et al., 2018, section 3.1; without bias as in Kingma and Ba, "Adam", 2015,
    section 3.
    """
    _check(decay, begin)
    _, chosen = trace_points(apply_fn, params, inputs, format, points)
    told = rounded_points(chosen)
    for name, point in told.items():
        bounds_shape(point.shape, point.format, name)
        if not isinstance(point.format.range, AbsMax):
            raise ValueError(
                f"{name}: {point.format.range} cannot be averaged over calls: track ranges with "
                "AbsMax(), or find them with observe_ranges"
            )

    def perform(point: Point, format: AnyFormat, x: Any, entry: Tracked) -> Any:
        del point
        entry = _met(entry, bounds_of(x, format), decay)
        rounded = fake_quant_within(x, entry.bounds, format)
        return (jnp.where(entry.times > begin, rounded, x) if begin else rounded), entry

    run = runner(apply_fn, chosen, format, points, perform, stateful=True)

    def call(params: Any, state: Any, *inputs: Any) -> Any:
        if not isinstance(state, Mapping) or state.keys() != told.keys():
            raise ValueError("state is not that of this function: begin with its init()")
        return run(params, dict(state), inputs)

    return TrackedFunction(told, chosen.left_out, call)


def _met(entry: Tracked, new: Bounds, decay: float) -> Tracked:
    """The average with one more value in it."""
    times = entry.times + 1
    share = (1 - decay) / (1 - jnp.float32(decay) ** times)

    def averaged(old: jax.Array, new: jax.Array) -> jax.Array:
        moved = jnp.where(jnp.isfinite(old), old + share * (new - old), new)
        return jnp.where(jnp.isfinite(new), moved, old)

    bounds = Bounds(*map(averaged, entry.bounds, new))
    return Tracked(bounds, times)


def _check(decay: Any, begin: Any) -> None:
    if not is_number(decay):
        raise TypeError(f"decay must be a number from 0 to below 1, not {decay!r}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}: from 0 to below 1 is needed")
    check_count("begin", begin, least=0)
