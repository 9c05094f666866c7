"""Run a function under the compiler's own sharding, also where mesh axes are explicit."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def explicit_axes(*arrays: Any) -> tuple[str, ...]:
    """The names of the explicit mesh axes that the arrays (or tracers) live on.

    Args:
        arrays: any pytrees of arrays.

    Returns:
        Mesh axis names whose type is ``AxisType.Explicit``; empty without a mesh.

    Example:
        >>> import jax.numpy as jnp
        >>> explicit_axes(jnp.zeros(3))
        ()
    """
    names: dict[str, None] = {}
    for leaf in jax.tree.leaves(arrays):
        mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
        if mesh is None or mesh.empty:
            continue
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
            if kind == AxisType.Explicit:
                names[name] = None
    return tuple(names)


def automatic(function: Callable[..., Any], out: Any = None) -> Callable[..., Any]:
    """Let the compiler place what sharding-in-types cannot: scatters, sorts, reshapes.

    Args:
        function: a function of arrays (positional arguments only).
        out: a ``PartitionSpec`` (or a pytree prefix of them) for the outputs; replicated if None.

    Returns:
        ``function`` itself in effect; on a mesh with explicit axes its body runs with these axes
        in automatic mode.

    Example:
        >>> import jax.numpy as jnp
        >>> automatic(jnp.sort)(jnp.array([2, 1]))
        Array([1, 2], dtype=int32)
    """

    def wrapped(*args: Any) -> Any:
        axes = explicit_axes(*args)
        if not axes:
            return function(*args)
        spec = PartitionSpec() if out is None else out
        return jax.sharding.auto_axes(function, axes=axes, out_sharding=spec)(*args)

    return wrapped
