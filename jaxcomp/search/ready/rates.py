"""Learning-rate schedules: as a space, as functions of the step, side by side."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomp import checks
from jaxcomp.search.ready.menu import (
    Kind,
    Numbers,
    Parameter,
    by_kind,
    check_free,
    check_number,
    numbers_of,
    read,
    space_of,
)
from jaxcomp.search.spaces import Continuous, Integer

# Each gives the fraction of the rate that is left; `done` steps of `whole` are behind.


def _exponential(done: Any, whole: Any, final: Any) -> Any:
    return final ** (done / whole)


def _step(done: Any, whole: Any, drops: Any, factor: Any) -> Any:
    # Multiplied first: a quotient of whole numbers that is whole is exact.
    return factor ** jnp.minimum(jnp.floor(done * (drops + 1) / whole), drops)


def _cosine(done: Any, whole: Any, final: Any) -> Any:
    return final + (1 - final) * (1 + jnp.cos(jnp.pi * done / whole)) / 2


def _linear(done: Any, whole: Any, final: Any) -> Any:
    return 1 - (1 - final) * done / whole


_KINDS = {
    "constant": Kind(lambda done, whole: jnp.ones_like(done), {}),
    "exponential": Kind(_exponential, {"final": Parameter(0.01, Continuous(1e-3, 0.5, log=True))}),
    "step": Kind(
        _step,
        {
            "drops": Parameter(2.0, Integer(1, 4)),
            "factor": Parameter(0.1, Continuous(0.05, 0.5, log=True)),
        },
    ),
    "cosine": Kind(_cosine, {"final": Parameter(0.0, Continuous(0.0, 0.2))}),
    "linear": Kind(_linear, {"final": Parameter(0.0, Continuous(0.0, 0.2))}),
}


class ScheduleNumbers(NamedTuple):
    """A schedule as arrays, so that one vmapped program holds several.

    Attributes:
        rate: float32, the highest.
        warmup: float32, the fraction of all steps.
        decay: which, and its parameters.
    """

    rate: Any
    warmup: Any
    decay: Numbers


def schedules(
    kinds: Any = None,
    *,
    rate: Any = Continuous(1e-4, 1e-1, log=True),  # noqa: B008, frozen
    warmup: Any = Continuous(0.0, 0.2),  # noqa: B008, frozen
) -> dict[str, Any]:
    """A space of learning-rate schedules.

    A schedule rises from 0 to ``rate`` in a line over the fraction ``warmup`` of all steps; what
    is left of them decays it:

    ====================  ==========================================================
    kind                  what is left of the rate; parameters and their usual values
    ====================  ==========================================================
    constant              all
    exponential           ``final`` at the end, in equal ratios; ``final=0.01``
    step                  ``factor`` as much at each of ``drops`` times, evenly apart;
                          ``drops=2, factor=0.1``
    cosine                ``final`` at the end, along half a wave; ``final=0``
    linear                ``final`` at the end, in a line; ``final=0``
    ====================  ==========================================================

    Args:
        kinds: names, for these with their usual parameters; a mapping of names to parameters,
            each a constant or a part; None for all kinds and all their parameters.
        rate: the highest: a constant or a part.
        warmup: the fraction of all steps: a constant or a part; 0.0 begins at ``rate``.

    Returns:
        A space, whose candidates are ``{"rate": …, "warmup": …, "decay": …}``.

    Raises:
        TypeError: ``kinds`` is none of these; a constant is no number.
        ValueError: there is no such kind, or it has no such parameter.

    Example:
        >>> from jaxcomp.search import spaces
        >>> space = schedules(["constant", "cosine"], rate=0.1, warmup=0.0)
        >>> spaces.decode(space, {"decay": 1})
        {'rate': 0.1, 'warmup': 0.0, 'decay': 'cosine'}

    Source: cosine: Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5; warm-up: Goyal et al.,
    "Accurate, large minibatch SGD", 2017, section 2.2.
    """
    check_free("schedules/rate", rate)
    check_free("schedules/warmup", warmup)
    return {"rate": rate, "warmup": warmup, "decay": space_of("schedules/decay", _KINDS, kinds)}


def schedule(candidate: Any, steps: Any) -> Callable[[Any], Any]:
    """The schedule that a candidate stands for.

    Args:
        candidate: ``{"rate": …, "warmup": …, "decay": …}``; numbers may be traced scalars.
        steps: of the whole training.

    Returns:
        A function of the step, from 0, that optax takes as ``learning_rate``; float32.

    Raises:
        TypeError: the candidate is none, a number of it is none, or ``steps`` is no whole number.
        ValueError: there is no such kind or parameter; a part is missing; the warm-up is no
            fraction; ``steps`` is below 1.

    Example:
        >>> rate = schedule({"rate": 0.5, "warmup": 0.2, "decay": "linear"}, steps=10)
        >>> [round(float(rate(step)), 3) for step in (0, 1, 2, 6, 10)]
        [0.0, 0.25, 0.5, 0.25, 0.0]
    """
    rate, warmup, decay = _opened(candidate)
    name, values = read("schedule/decay", _KINDS, decay)
    _check_steps(steps)
    function = _KINDS[name].function
    return lambda step: _rate(rate, warmup, step, steps, partial(function, **values))


def schedule_numbers(candidate: Any) -> ScheduleNumbers:
    """A candidate as arrays, for :func:`schedule_of`.

    Args:
        candidate: ``{"rate": …, "warmup": …, "decay": …}``; numbers may be traced scalars.

    Returns:
        Rate, warm-up, and the decay with its parameters; :func:`stack` puts several side by side.

    Raises:
        TypeError: the candidate is none, or a number of it is none.
        ValueError: there is no such kind or parameter; a part is missing; the warm-up is no
            fraction.

    Example:
        >>> schedule_numbers({"rate": 0.5, "warmup": 0.25, "decay": "cosine"}).decay.kind
        np.int32(3)
    """
    rate, warmup, decay = _opened(candidate)
    return ScheduleNumbers(
        _scalar(rate), _scalar(warmup), numbers_of("schedule/decay", _KINDS, decay)
    )


def schedule_of(numbers: ScheduleNumbers, steps: Any) -> Callable[[Any], Any]:
    """The schedule that numbers stand for, which may be traced: one program for a whole grid.

    Args:
        numbers: from :func:`schedule_numbers`.
        steps: of the whole training.

    Returns:
        A function of the step, from 0, that optax takes as ``learning_rate``; float32.

    Raises:
        TypeError: ``steps`` is no whole number.
        ValueError: ``steps`` is below 1.

    Example:
        >>> import jax
        >>> from jaxcomp.search.ready import stack
        >>> grid = [{"rate": 0.5, "warmup": 0.0, "decay": kind} for kind in ("constant", "linear")]
        >>> grid = stack([schedule_numbers(candidate) for candidate in grid])
        >>> jax.vmap(lambda numbers: schedule_of(numbers, steps=4)(1))(grid)
        Array([0.5  , 0.375], dtype=float32)
    """
    _check_steps(steps)

    def left(done: Any, whole: Any) -> Any:
        of_kinds = by_kind(_KINDS, numbers.decay)
        branches = [
            lambda done, whole, f=kind.function, values=values: f(done, whole, **values)
            for kind, values in zip(_KINDS.values(), of_kinds, strict=True)
        ]
        return lax.switch(numbers.decay.kind, branches, done, whole)

    return lambda step: _rate(numbers.rate, numbers.warmup, step, steps, left)


def _rate(rate: Any, warmup: Any, step: Any, steps: Any, left: Callable[..., Any]) -> Any:
    step, steps = jnp.asarray(step, jnp.float32), jnp.asarray(steps, jnp.float32)
    rising = jnp.round(warmup * steps)
    whole = jnp.maximum(steps - rising, 1)
    fraction = jnp.where(
        step < rising,
        step / jnp.maximum(rising, 1),
        left(jnp.clip(step - rising, 0, whole), whole),
    )
    return jnp.asarray(rate * fraction, jnp.float32)


def _scalar(value: Any) -> Any:
    return value if hasattr(value, "dtype") else np.float32(value)


def _opened(candidate: Any) -> tuple[Any, Any, Any]:
    if not hasattr(candidate, "keys"):
        raise TypeError(f"schedule: must be a dict of rate, warmup, decay, not {candidate!r:.60}")
    names = ("rate", "warmup", "decay")
    for name in {*names, *candidate}:
        if name not in candidate or name not in names:
            lacks = "is not there" if name in names else "is no part of a schedule"
            raise ValueError(f"schedule: {name!r:.60} {lacks}: give rate, warmup, decay")
    rate, warmup = candidate["rate"], candidate["warmup"]
    check_number("schedule/rate", rate)
    check_number("schedule/warmup", warmup)
    if not hasattr(warmup, "dtype") and not 0 <= warmup <= 1:  # traced ones cannot be looked at
        raise ValueError(f"schedule/warmup is {warmup}: a fraction of the steps is from 0 to 1")
    return rate, warmup, candidate["decay"]


def _check_steps(steps: Any) -> None:
    if not hasattr(steps, "dtype"):  # traced ones cannot be looked at
        checks.check_count("steps", steps)
