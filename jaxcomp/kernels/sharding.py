"""The kernels' name for :mod:`jaxcomp.sharding`."""

from jaxcomp.sharding import automatic, explicit_axes

__all__ = ["automatic", "explicit_axes"]
