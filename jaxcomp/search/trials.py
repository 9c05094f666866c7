"""What a study is made of: trials, and the strategies that propose them."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Point = dict[str, int | float]
Direction = Literal["minimize", "maximize"]


class Trial(NamedTuple):
    """A candidate that was evaluated.

    Attributes:
        number: counted from 0, in the order of asking.
        point: the candidate as strategies see it, see :mod:`jaxcomp.search.spaces`.
        values: of the objectives, in their order; None where it failed.
        status: ``"finished"``; ``"failed"``: it raised an error or a value is not finite;
            ``"stopped"``: given up early, ``values`` being those of that time.
        seconds: it took.
        told: what else is known of it: other measures, ``"violation"`` (by how much it goes beyond
            its constraints; 0 or absent: by nothing), ``"error"`` in words.
    """

    number: int
    point: Point
    values: tuple[float, ...] | None
    status: Literal["finished", "failed", "stopped"]
    seconds: float
    told: dict[str, Any]


class Strategy(NamedTuple):
    """Three functions; what they propose depends on their arguments alone.

    A state made anew by ``init`` and told all trials so far, in the order of their numbers, goes on
    as the one that was lost would have: that is how a study goes on after a kill.

    Attributes:
        init: ``(space, directions, key) -> state``.
        ask: ``(state, count) -> (points, state)``; fewer points than asked for where there are no
            more, none where the strategy has come to its end.
        tell: ``(state, trials) -> state``.
        name: with all settings, as it is kept in a study's file.
    """

    init: Callable[[Any, tuple[Direction, ...], Any], Any]
    ask: Callable[[Any, int], tuple[list[Point], Any]]
    tell: Callable[[Any, list[Trial]], Any]
    name: str
