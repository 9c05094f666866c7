"""Optimizers with their settings: as a space, as optax transformations, side by side."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxcomp import checks
from jaxcomp.search.ready.menu import (
    Kind,
    Kinds,
    Numbers,
    Parameter,
    by_kind,
    numbers_of,
    read,
    space_of,
)
from jaxcomp.search.spaces import Choice, Continuous

# Each gives the update before the rate: with the rate outside, kinds differ in this alone.


def _sgd(momentum: Any, decay: Any) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay), optax.trace(momentum))


def _nesterov(momentum: Any, decay: Any) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay), optax.trace(momentum, nesterov=True))


def _adamw(b1: Any, b2: Any, decay: Any) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(b1, b2), optax.add_decayed_weights(decay))


def _lion(b1: Any, b2: Any, decay: Any) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_lion(b1, b2), optax.add_decayed_weights(decay))


def _kind(
    function: Callable[..., optax.GradientTransformation], usual: float, **others: Parameter
) -> Kind:
    rate = Parameter(usual, Continuous(usual / 30, usual * 10, log=True))
    return Kind(function, {"rate": rate, **others})


_decay = Parameter(0.0, Continuous(1e-6, 1e-2, log=True))
_momentum = Continuous(0.0, 0.99)
_KINDS: Kinds = {
    "sgd": _kind(_sgd, 0.1, momentum=Parameter(0.0, _momentum), decay=_decay),
    "nesterov": _kind(_nesterov, 0.1, momentum=Parameter(0.9, _momentum), decay=_decay),
    "adam": _kind(
        optax.scale_by_adam,
        1e-3,
        b1=Parameter(0.9, Continuous(0.8, 0.98)),
        b2=Parameter(0.999, Continuous(0.9, 0.9999)),
    ),
    "adamw": _kind(
        _adamw,
        1e-3,
        b1=Parameter(0.9, Continuous(0.8, 0.98)),
        b2=Parameter(0.999, Continuous(0.9, 0.9999)),
        decay=Parameter(1e-4, Continuous(1e-5, 1.0, log=True)),
    ),
    "lion": _kind(
        _lion,
        1e-4,
        b1=Parameter(0.9, Continuous(0.8, 0.98)),
        b2=Parameter(0.99, Continuous(0.9, 0.999)),
        decay=Parameter(1e-3, Continuous(1e-5, 1.0, log=True)),
    ),
}


class OptimizerState(NamedTuple):
    """Of an optimizer whose kind is a number.

    Attributes:
        count: int32, of updates.
        each: the state of each kind; only that of the one chosen changes.
    """

    count: Any
    each: tuple[Any, ...]


def optimizers(kinds: Any = None) -> Choice:
    """A space of optimizers.

    ====================  ==========================================================
    kind                  parameters and their usual values
    ====================  ==========================================================
    sgd                   ``rate=0.1, momentum=0, decay=0`` (of weights, into gradients)
    nesterov              ``rate=0.1, momentum=0.9, decay=0`` (likewise)
    adam                  ``rate=1e-3, b1=0.9, b2=0.999``
    adamw                 ``rate=1e-3, b1=0.9, b2=0.999, decay=1e-4`` (beside gradients)
    lion                  ``rate=1e-4, b1=0.9, b2=0.99, decay=1e-3`` (likewise)
    ====================  ==========================================================

    Args:
        kinds: names, for these with their usual parameters; a mapping of names to parameters,
            each a constant or a part; None for all kinds and all their parameters.

    Returns:
        A choice, whose value is a name or ``{name: {parameter: value}}``.

    Raises:
        TypeError: ``kinds`` is none of these.
        ValueError: there is no such kind, or it has no such parameter.

    Example:
        >>> from jaxcomp.search import spaces
        >>> space = optimizers({"sgd": {"momentum": Choice((0.0, 0.9))}, "adam": None})
        >>> [spaces.decode(space, point) for point in spaces.enumerate_points(space)]
        [{'sgd': {'momentum': 0.0}}, {'sgd': {'momentum': 0.9}}, 'adam']

    Source: Nesterov: Sutskever et al., ICML 2013, section 2; Adam: Kingma and Ba, ICLR 2015,
    algorithm 1; AdamW: Loshchilov and Hutter, ICLR 2019, algorithm 2; Lion: Chen et al., "Symbolic
    discovery of optimization algorithms", NeurIPS 2023, algorithm 2.
    """
    return space_of("optimizers", _KINDS, kinds)


def optimizer(
    candidate: Any, schedule: Callable[[Any], Any] | None = None
) -> optax.GradientTransformation:
    """The optimizer that a candidate stands for.

    Args:
        candidate: a name or ``{name: {parameter: value}}``; values may be traced scalars, so that
            one vmapped program trains several of a kind.
        schedule: of the step, from 0; multiplies the rate. One that has a rate itself, as
            :func:`schedule` makes it, wants ``"rate": 1.0`` here.

    Returns:
        An optax transformation; its ``update`` needs the parameters. Updates and moments keep
        their types, whatever those of the candidate's values are.

    Raises:
        TypeError: the candidate is neither; the schedule is no function.
        ValueError: there is no such kind, or it has no such parameter.

    Example:
        >>> tx = optimizer({"sgd": {"rate": 0.5}})
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> updates, _ = tx.update({"w": jnp.array([1.0, -1.0])}, tx.init(params), params)
        >>> updates["w"]
        Array([-0.5,  0.5], dtype=float32)
    """
    name, values = read("optimizer", _KINDS, candidate)
    _check_schedule(schedule)
    rate = values.pop("rate")
    of_step = rate if schedule is None else lambda step: rate * schedule(step)
    inner = optax.chain(_KINDS[name].function(**values), optax.scale_by_learning_rate(of_step))
    return _typed(inner)


def optimizer_numbers(candidate: Any) -> Numbers:
    """A candidate as arrays, for :func:`optimizer_of`.

    Args:
        candidate: a name or ``{name: {parameter: value}}``; values may be traced scalars.

    Returns:
        The kind and all parameters; :func:`stack` puts several side by side.

    Raises:
        TypeError: the candidate is neither.
        ValueError: there is no such kind, or it has no such parameter.

    Example:
        >>> optimizer_numbers({"adam": {"rate": 0.5}}).values[6:9]
        array([0.5  , 0.9  , 0.999], dtype=float32)
    """
    return numbers_of("optimizer", _KINDS, candidate)


def optimizer_of(
    numbers: Numbers, schedule: Callable[[Any], Any] | None = None
) -> optax.GradientTransformation:
    """The optimizer that numbers stand for, which may be traced: one program for all kinds.

    Its state holds that of every kind, seven times the parameters in all: for small networks.

    Args:
        numbers: from :func:`optimizer_numbers`.
        schedule: of the step, from 0; multiplies the rate.

    Returns:
        An optax transformation; its ``update`` needs the parameters.

    Raises:
        TypeError: the schedule is no function.

    Example:
        >>> from jaxcomp.search.ready import stack
        >>> both = [{"sgd": {"rate": 0.5}}, {"lion": {"rate": 0.5, "decay": 0.0}}]
        >>> def update(numbers, params, grads):
        ...     tx = optimizer_of(numbers)
        ...     return tx.update(grads, tx.init(params), params)[0]
        >>> both = stack([optimizer_numbers(candidate) for candidate in both])
        >>> jax.vmap(update, (0, None, None))(both, jnp.ones(2), jnp.array([3.0, -1.0]))
        Array([[-1.5,  0.5],
               [-0.5,  0.5]], dtype=float32)
    """
    _check_schedule(schedule)
    of_kinds = by_kind(_KINDS, numbers)
    rates = jnp.stack([values.pop("rate") for values in of_kinds])
    inner = [
        _typed(kind.function(**values))
        for kind, values in zip(_KINDS.values(), of_kinds, strict=True)
    ]

    def init(params: Any) -> OptimizerState:
        return OptimizerState(jnp.zeros((), jnp.int32), tuple(tx.init(params) for tx in inner))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        branches = [
            lambda g, s, p, i=i: _update_one(inner[i], i, g, s, p) for i in range(len(inner))
        ]
        directions, each = lax.switch(numbers.kind, branches, updates, state.each, params)
        rate = rates[numbers.kind] * (1.0 if schedule is None else schedule(state.count))
        updates = jax.tree.map(lambda d: (-rate * d).astype(d.dtype), directions)
        return updates, OptimizerState(optax.safe_increment(state.count), each)

    return optax.GradientTransformation(init, update)


def _update_one(
    tx: optax.GradientTransformation, index: int, grads: Any, states: tuple[Any, ...], params: Any
) -> tuple[Any, tuple[Any, ...]]:
    direction, new = tx.update(grads, states[index], params)
    return direction, (*states[:index], new, *states[index + 1 :])


def _typed(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep the types of updates and state, which traced float32 settings would widen."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(_as_before, tx.update(updates, state, params), (updates, state))

    return optax.GradientTransformation(tx.init, update)


def _as_before(new: Any, old: Any) -> Any:
    return jnp.asarray(new, old.dtype)


def _check_schedule(schedule: Any) -> None:
    if schedule is not None:
        checks.check_function("schedule", schedule, "the step that returns a factor of the rate")
