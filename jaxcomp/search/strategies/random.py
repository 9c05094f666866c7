"""Random search."""

from typing import Any

from jaxcomp.search.spaces import sample
from jaxcomp.search.strategies.history import History, begin, noted, propose
from jaxcomp.search.trials import Point, Strategy


def random() -> Strategy:
    """Points drawn one by one, whatever the others came to; none twice.

    What other strategies have to beat. Takes any number of objectives; ends when it has asked all
    points of a space.

    Returns:
        A strategy.

    Example:
        >>> import jax
        >>> from jaxcomp.search import Integer
        >>> strategy = random()
        >>> state = strategy.init(Integer(1, 3), ("minimize",), jax.random.key(0))
        >>> points, state = strategy.ask(state, 5)
        >>> sorted(point[""] for point in points)
        [1, 2, 3]

    Bergstra and Bengio 2012, "Random search for hyper-parameter optimization".
    """

    def init(space: Any, directions: Any, key: Any) -> History:
        return begin(space, key)

    def ask(state: History, count: int) -> tuple[list[Point], History]:
        return propose(state, count, lambda rng: sample(state.space, rng))

    return Strategy(init, ask, noted, "random()")
