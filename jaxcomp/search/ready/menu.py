"""Kinds with parameters of their own: as a space, as what was chosen, and as numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import checks, tree
from jaxcomp.search.spaces import Choice
from jaxcomp.search.spaces.kinds import Part, is_constant


class Parameter(NamedTuple):
    """Of a kind: what it is where nothing is said, and what it may be."""

    usual: float
    part: Part


class Kind(NamedTuple):
    """Something that is chosen by name: a function, and the parameters that it takes by name."""

    function: Callable[..., Any]
    parameters: dict[str, Parameter]


Kinds = Mapping[str, Kind]


class Numbers(NamedTuple):
    """A choice among kinds as arrays, so that one vmapped program holds several.

    Attributes:
        kind: int32, the position among all kinds.
        values: float32 ``(slots,)``; each parameter of each kind has a slot, and those of kinds
            that are not chosen have their usual values, with which they may safely be computed.
    """

    kind: Any
    values: Any


def space_of(what: str, kinds: Kinds, chosen: Any) -> Choice:
    """A space of some kinds: all with their parameters, some plain, or some as given.

    Raises:
        TypeError: ``chosen`` is neither None nor names nor a mapping, or a parameter neither a
            number nor a part.
        ValueError: there is no such kind, or it has no such parameter; there are none, or one comes
            twice.
    """
    if chosen is None:
        free = {name: _free(kind) for name, kind in kinds.items()}
        return Choice(free)
    if isinstance(chosen, (Mapping, Sequence)) and not chosen:
        raise ValueError(f"{what}: there is no kind to choose: name one, or give None for all")
    if isinstance(chosen, Mapping):
        for name, given in chosen.items():
            _check(what, kinds, name, given)
            for key, value in (given or {}).items():
                check_free(f"{what}/{name}/{key}", value)
        return Choice({name: dict(given) if given else None for name, given in chosen.items()})
    if isinstance(chosen, str) or not isinstance(chosen, Sequence):
        raise TypeError(
            f"{what}: kinds must be None, a list of names, or a mapping of names to parameters, "
            f"not {chosen!r:.60}"
        )
    for i, name in enumerate(chosen):
        _check(what, kinds, name, None)
        if name in chosen[:i]:
            raise ValueError(f"{what}: {name!r} is named twice: take one out")
    return Choice(dict.fromkeys(chosen))


def _free(kind: Kind) -> dict[str, Part] | None:
    return {name: parameter.part for name, parameter in kind.parameters.items()} or None


def read(what: str, kinds: Kinds, candidate: Any) -> tuple[str, dict[str, Any]]:
    """The name and all parameters of what a candidate chose, usual ones where it names none.

    Raises:
        TypeError: it is neither a name nor ``{name: parameters}``, or a parameter is no number.
        ValueError: there is no such kind, or it has no such parameter.
    """
    name, given = candidate, None
    if isinstance(candidate, Mapping) and len(candidate) == 1:
        ((name, given),) = candidate.items()
    if not isinstance(name, str):
        raise TypeError(f"{what}: must be a name or {{name: parameters}}, not {candidate!r:.60}")
    _check(what, kinds, name, given)
    for key, value in (given or {}).items():
        check_number(f"{what}/{name}/{key}", value)
    usual = {key: parameter.usual for key, parameter in kinds[name].parameters.items()}
    return name, {**usual, **(given or {})}


def numbers_of(what: str, kinds: Kinds, candidate: Any) -> Numbers:
    """What a candidate chose, as arrays; on the host unless a parameter is traced.

    Raises:
        TypeError: as :func:`read`.
        ValueError: likewise.
    """
    chosen, given = read(what, kinds, candidate)
    values = [
        given[key] if name == chosen else parameter.usual
        for name, kind in kinds.items()
        for key, parameter in kind.parameters.items()
    ]
    kind = np.int32(list(kinds).index(chosen))
    if any(isinstance(value, jax.Array) for value in values):
        return Numbers(kind, jnp.stack([jnp.asarray(value, jnp.float32) for value in values]))
    return Numbers(kind, np.array(values, np.float32))


def by_kind(kinds: Kinds, numbers: Numbers, dtype: Any = None) -> list[dict[str, Any]]:
    """The parameters of each kind by name, as scalars of a type."""
    values = jnp.asarray(numbers.values, dtype)
    slots = iter(range(values.shape[-1]))
    return [{key: values[next(slots)] for key in kind.parameters} for kind in kinds.values()]


def stack(numbers: Sequence[Any]) -> Any:
    """Several candidates' numbers side by side, for ``jax.vmap`` to go over.

    Args:
        numbers: at least one; all from the same function.

    Returns:
        The same tree with a leading axis, one entry a candidate.

    Raises:
        TypeError: they are of several functions.
        ValueError: there are none.

    Example:
        >>> from jaxcomp.search import ready
        >>> stack([ready.activation_numbers(name) for name in ("relu", "tanh")]).kind
        array([2, 1], dtype=int32)
    """
    if not numbers:
        raise ValueError("stack: there are no numbers: give those of at least one candidate")
    kinds = sorted({type(each).__name__ for each in numbers})
    if len(kinds) > 1:
        raise TypeError(f"stack: {' and '.join(kinds)} do not stand side by side: stack each alone")
    traced = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(list(numbers)))
    return jax.tree.map(lambda *each: (jnp if traced else np).stack(each), *numbers)


def check_number(path: str, value: Any) -> None:
    """Raise unless a value of a candidate is a number, or an array, which may be traced.

    Raises:
        TypeError: it is none.

    Example:
        >>> check_number("activation/relu/leak", "0.1")
        Traceback (most recent call last):
        ...
        TypeError: activation/relu/leak: must be a number, not '0.1'
    """
    if not checks.is_number(value) and not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{path}: must be a number, not {value!r:.60}")


def check_free(path: str, value: Any) -> None:
    """Raise unless a value of a space is a number or something to choose.

    Raises:
        TypeError: it is neither.
    """
    if is_constant(value) and not checks.is_number(value):
        raise TypeError(f"{path}: must be a number or a part, not {value!r:.60}")


def _check(what: str, kinds: Kinds, name: Any, given: Any) -> None:
    if name not in kinds:
        raise ValueError(f"{what}: there is no {name!r:.60}: choose among {', '.join(kinds)}")
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{what}/{name}: parameters must be given by name, not as {given!r:.60}")
    known = kinds[name].parameters
    for key in given or ():
        if key not in known:
            has = tree.nearest(key, known) if known else "it has none"
            raise ValueError(f"{what}/{name}: there is no parameter {key!r:.60}; {has}")
