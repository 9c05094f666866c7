"""What every strategy remembers: how much was asked, and which points, so that none comes twice."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import checks
from jaxcomp.search.spaces import count, every_part, frozen, generator, sample
from jaxcomp.search.strategies.listing import first, following
from jaxcomp.search.trials import Point, Trial

_TRIES = 32


class Seen(NamedTuple):
    """A set that is never changed; one with a few more items shares nearly all with the old.

    Attributes:
        groups: disjoint sets, each over twice as large as the next.
    """

    groups: tuple[frozenset, ...] = ()

    def __contains__(self, item: Any) -> bool:
        return any(item in group for group in self.groups)

    def __len__(self) -> int:
        return sum(map(len, self.groups))


def with_points(seen: Seen, points: Sequence[Point]) -> Seen:
    """A set that holds these points too; each takes time that grows with the set's logarithm.

    Example:
        >>> seen = with_points(Seen(), [{"width": 8}, {"width": 16}, {"width": 8}])
        >>> len(seen), frozen({"width": 16}) in seen, frozen({"width": 24}) in seen
        (2, True, False)
    """
    new = frozenset(item for item in map(frozen, points) if item not in seen)
    groups = (*seen.groups, new) if new else seen.groups
    while len(groups) > 1 and len(groups[-2]) <= 2 * len(groups[-1]):
        groups = (*groups[:-2], groups[-2] | groups[-1])
    return Seen(groups)


class History(NamedTuple):
    """What was asked and told so far.

    Attributes:
        space: that points are of.
        key: of the search, as NumPy's array.
        points: how many the space has; ``math.inf`` where a part is continuous.
        asked: the number of the next trial.
        seen: points that were asked or told.
    """

    space: Any
    key: np.ndarray
    points: int | float
    asked: int
    seen: Seen


def begin(space: Any, key: Any) -> History:
    """The history of a search that begins.

    Args:
        space: to search.
        key: a JAX key.

    Returns:
        The history.

    Raises:
        TypeError: the key is none, or the space holds what is no part.
    """
    checks.check_key(key)
    every_part(space)
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    return History(space, np.asarray(key), count(space), 0, Seen())


def noted(history: History, trials: Sequence[Trial]) -> History:
    """The history after trials were told."""
    if not trials:
        return history
    return history._replace(
        asked=max(history.asked, trials[-1].number + 1),
        seen=with_points(history.seen, [trial.point for trial in trials]),
    )


def propose(
    history: History, number: int, draw: Callable[[np.random.Generator], Point]
) -> tuple[list[Point], History]:
    """New points, each drawn by a generator of its own, which its number decides.

    Args:
        history: so far.
        number: how many points.
        draw: gives a point; again where that one was seen.

    Returns:
        Points and the history with them; fewer points where the space has no more, and seen ones
        only where ``draw`` gives nothing else and the space is endless.
    """
    points = []
    for _ in range(number):
        if len(history.seen) >= history.points:
            break
        point = unseen(history, draw)
        points.append(point)
        seen = with_points(history.seen, [point])
        history = history._replace(asked=history.asked + 1, seen=seen)
    return points, history


def unseen(history: History, draw: Callable[[np.random.Generator], Point]) -> Point:
    """One point by ``draw``, if need be another one, that was not seen."""
    rng = generator(history.key, history.asked)
    point = draw(rng)
    for _ in range(_TRIES):
        if frozen(point) not in history.seen:
            return point
        point = draw(rng)
    point = sample(history.space, rng)
    if history.points == np.inf:
        # What is endless may be inside an option that is seldom drawn.
        for _ in range(32 * _TRIES):
            if frozen(point) not in history.seen:
                break
            point = sample(history.space, rng)
        return point
    # Nearly all points are seen: step on from a drawn one to the next that is not.
    while frozen(point) in history.seen:
        point = following(history.space, point) or first(history.space)
    return point
