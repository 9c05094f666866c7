"""Search for architectures and for the choices around them."""

from jaxcomp.search import spaces
from jaxcomp.search.spaces import Choice, Continuous, Integer, Repeat

__all__ = ["Choice", "Continuous", "Integer", "Repeat", "spaces"]
