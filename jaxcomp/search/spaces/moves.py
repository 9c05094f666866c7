"""Points drawn, changed and crossed."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import checks
from jaxcomp.search.spaces.kinds import Choice, Integer, Part
from jaxcomp.search.spaces.numbers import from_unit, size, to_unit
from jaxcomp.search.spaces.points import parts, walk
from jaxcomp.search.trials import Point


def generator(key: Any, *numbers: int) -> np.random.Generator:
    """Random numbers of the host, decided by a key: a draw costs a microsecond.

    Args:
        key: a JAX key; or a generator, which is given back as it is, to go on drawing from it.
        numbers: folded into the key, each at least 0: another sequence for each.

    Returns:
        A generator; equal keys and numbers give equal ones, on any machine.

    Raises:
        TypeError: it is no key.

    Example:
        >>> key = jax.random.key(0)
        >>> bool(generator(key, 7).random() == generator(key, 7).random())
        True
    """
    if isinstance(key, np.random.Generator):
        if numbers:
            raise TypeError("numbers are folded into keys, not into a generator: give a key")
        return key
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    elif getattr(key, "dtype", None) != np.uint32:
        raise TypeError(f"key must be a JAX key, as jax.random.key(0) is, not {key!r:.60}")
    # As spawn_key: in the entropy itself, numbers that are 0 would change nothing.
    seed = np.random.SeedSequence(np.asarray(key).ravel().tolist(), spawn_key=numbers)
    return np.random.default_rng(seed)


def sample(space: Any, key: Any) -> Point:
    """A point drawn from a space, each part by itself.

    Args:
        space: to draw from.
        key: a JAX key, or a generator as :func:`generator` gives it.

    Returns:
        The point.

    Raises:
        TypeError: the key is none, or the space holds what is no part.

    Example:
        >>> from jaxcomp.search.spaces import Choice, decode
        >>> space = {"act": Choice(("relu", "gelu"))}
        >>> decode(space, sample(space, jax.random.key(0)))["act"] in ("relu", "gelu")
        True
    """
    rng = generator(key)
    return walk(space, lambda path, part: from_unit(part, rng.random()))[1]


def mutate(
    space: Any, point: Mapping[str, Any], key: Any, *, spread: Any = None, index: Any = None
) -> Point:
    """A point with exactly one of its active parts changed to another value.

    Each active part that has another value is as likely to change. Parts that become active by the
    change are drawn, those that no longer are leave.

    Args:
        space: that the point is of.
        point: to change.
        key: a JAX key, or a generator.
        spread: of the step by which numbers change, as a standard deviation on their range (of
            the logarithm where they are drawn so), reflected at the bounds.
        index: of :func:`polynomial`, by which numbers change instead; where neither is given, they
            are drawn anew.

    Returns:
        Another point; the same one only where the space has no other.

    Raises:
        TypeError: the key is none, or a value is of the wrong kind.
        ValueError: the point is not of the space; the spread is not finite and above 0, or the
            index not finite and at least 0; both are given.

    Example:
        >>> from jaxcomp.search.spaces import Choice, Integer
        >>> space = {"act": Choice(("relu", "gelu")), "depth": Integer(3, 3)}
        >>> mutate(space, {"act": 0, "depth": 3}, jax.random.key(0))
        {'act': 1, 'depth': 3}
    """
    check_spread(spread)
    check_index(index)
    if spread is not None and index is not None:
        raise ValueError("spread and index are two ways to change a number: give one of them")
    rng = generator(key)
    active = parts(space, point)
    can = [path for path, part in active.items() if size(part) > 1]
    changed = can[rng.integers(len(can))] if can else None
    kept = {path: point[path] for path in active if path != changed}
    if changed is not None:
        kept[changed] = _other(active[changed], point[changed], rng, spread, index)
    return walk(space, lambda path, part: _kept_or_drawn(kept, path, part, rng))[1]


def check_spread(spread: Any) -> None:
    """Raise unless a spread is None or above 0.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite and above 0.
    """
    if spread is not None:
        checks.check_amount("spread", spread)
        if not spread:
            raise ValueError("spread is 0, which changes nothing: None draws anew")


def check_index(index: Any) -> None:
    """Raise unless an index is None or at least 0.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite and at least 0.
    """
    if index is not None:
        checks.check_amount("index", index)


def polynomial(unit: float, draw: float, index: float) -> float:
    """A number from 0 to 1 near another one, by a density that falls with a power of the distance.

    As likely below as above, however near a bound is, so what is best there is come close to.

    Args:
        unit: from 0 to 1.
        draw: an even random number from 0 to 1; 0 gives 0, 0.5 the number itself, 1 gives 1.
        index: how near: far from bounds the step is 1 / (index + 2) on average.

    Returns:
        The number.

    Example:
        >>> [round(polynomial(0.25, draw, index=20.0), 3) for draw in (0.0, 0.1, 0.5, 0.9, 1.0)]
        [0.0, 0.177, 0.25, 0.324, 1.0]

    Polynomial mutation: Deb and Goyal 1996, "A combined genetic adaptive search (GeneAS) for
    engineering design"; within bounds as in the program of Deb et al. 2002, NSGA-II.
    """
    below = draw < 0.5
    tail, room = (2 * draw, unit) if below else (2 - 2 * draw, 1 - unit)
    step = 1 - (tail + (1 - tail) * (1 - room) ** (index + 1)) ** (1 / (index + 1))
    return max(unit - step, 0.0) if below else min(unit + step, 1.0)


def cross(space: Any, a: Mapping[str, Any], b: Mapping[str, Any], key: Any) -> Point:
    """A point that has each part from either parent.

    Args:
        space: that both are of.
        a: a parent.
        b: the other one.
        key: a JAX key, or a generator.

    Returns:
        A point of the space; parts that both parents have come from either as likely, and what is
        inside an option or a list from a parent that has it.

    Raises:
        TypeError: the key is none, or a value is of the wrong kind.
        ValueError: a parent is not of the space.

    Example:
        >>> from jaxcomp.search.spaces import Choice
        >>> space = [Choice((1, 2)), Choice((1, 2))]
        >>> cross(space, {"0": 0, "1": 1}, {"0": 0, "1": 1}, jax.random.key(0))
        {'0': 0, '1': 1}
    """
    rng = generator(key)
    parents = [{path: parent[path] for path in parts(space, parent)} for parent in (a, b)]
    return walk(space, lambda path, part: _of_either(parents, path, rng))[1]


def _kept_or_drawn(
    kept: Mapping[str, Any], path: str, part: Part, rng: np.random.Generator
) -> int | float:
    return kept[path] if path in kept else from_unit(part, rng.random())


def _of_either(parents: list[Point], path: str, rng: np.random.Generator) -> int | float:
    # What is active was made so by the choices of a parent, which then has it too.
    having = [parent for parent in parents if path in parent]
    return having[rng.integers(len(having))][path]


def _other(
    part: Part, value: int | float, rng: np.random.Generator, spread: Any, index: Any
) -> int | float:
    for _ in range(64):
        drawn = from_unit(part, _unit(part, value, rng, spread, index))
        if drawn != value:
            return drawn
    # A spread that hardly ever leaves the value, or a range of a few floats: the nearest other one.
    return _neighbour(part, value, rng)


def _unit(
    part: Part, value: int | float, rng: np.random.Generator, spread: Any, index: Any
) -> float:
    if index is not None and not isinstance(part, Choice):
        return polynomial(to_unit(part, value), rng.random(), index)
    if spread is None or isinstance(part, Choice):
        return rng.random()
    moved = (to_unit(part, value) + rng.normal(scale=spread)) % 2
    return 2 - moved if moved > 1 else moved


def _neighbour(part: Part, value: int | float, rng: np.random.Generator) -> int | float:
    if isinstance(part, Choice):
        low, high, around = 0, int(size(part)) - 1, (value - 1, value + 1)
    elif isinstance(part, Integer):
        low, high, around = part.low, part.high, (value - part.step, value + part.step)
    else:
        around = (math.nextafter(value, -math.inf), math.nextafter(value, math.inf))
        low, high = part.low, part.high
    near = [other for other in around if low <= other <= high]
    return near[rng.integers(len(near))]
