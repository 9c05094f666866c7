"""Grid search."""

from typing import Any, NamedTuple

from jaxcomp import checks
from jaxcomp.search.spaces import every_part, size
from jaxcomp.search.strategies.listing import first, following
from jaxcomp.search.trials import Point, Strategy, Trial


class _State(NamedTuple):
    space: Any
    coming: Point | None
    asked: int  # the number of the trial that it will be


def grid(levels: Any = None) -> Strategy:
    """All points of a space, in its order: the last part changes first.

    Takes any number of objectives; ends after the last point.

    Args:
        levels: how many values of each continuous part to try, from bound to bound; None refuses
            spaces with such parts.

    Returns:
        A strategy.

    Raises:
        TypeError: ``levels`` is no whole number.
        ValueError: it is below 1; when it begins: a part is continuous and there are no ``levels``.

    Example:
        >>> import jax
        >>> from jaxcomp.search import Continuous, Integer
        >>> strategy = grid(levels=3)
        >>> space = {"depth": Integer(1, 2), "rate": Continuous(0.01, 1.0, log=True)}
        >>> state = strategy.init(space, ("minimize",), jax.random.key(0))
        >>> [tuple(point.values()) for point in strategy.ask(state, 4)[0]]
        [(1, 0.01), (1, 0.1), (1, 1.0), (2, 0.01)]
    """
    if levels is not None:
        checks.check_count("levels", levels)

    def init(space: Any, directions: Any, key: Any) -> _State:
        for path, part in every_part(space).items():
            if size(part, levels) == float("inf"):
                raise ValueError(
                    f"{path or 'the space'}: a grid needs to know how many values of a continuous "
                    "part to try: grid(levels=5)"
                )
        return _State(space, first(space, levels), 0)

    def ask(state: _State, count: int) -> tuple[list[Point], _State]:
        points: list[Point] = []
        coming = state.coming
        while coming is not None and len(points) < count:
            points.append(coming)
            coming = following(state.space, coming, levels)
        return points, state._replace(coming=coming, asked=state.asked + len(points))

    def tell(state: _State, trials: list[Trial]) -> _State:
        if not trials or trials[-1].number < state.asked:  # what comes after it was asked already
            return state
        coming = following(state.space, trials[-1].point, levels)
        return state._replace(coming=coming, asked=trials[-1].number + 1)

    return Strategy(init, ask, tell, f"grid(levels={levels})")
