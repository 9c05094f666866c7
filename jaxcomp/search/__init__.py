"""Search for architectures and for the choices around them."""

from jaxcomp.search import pareto, ready, spaces, strategies
from jaxcomp.search.spaces import Choice, Continuous, Integer, Repeat
from jaxcomp.search.stop import Stop
from jaxcomp.search.study import Study, load, run
from jaxcomp.search.trials import Strategy, Trial

__all__ = [
    "Choice",
    "Continuous",
    "Integer",
    "Repeat",
    "Stop",
    "Strategy",
    "Study",
    "Trial",
    "load",
    "pareto",
    "ready",
    "run",
    "spaces",
    "strategies",
]
