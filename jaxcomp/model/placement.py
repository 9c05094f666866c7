"""Take positions of arrays where they lie: on the host, on a device, over a mesh."""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp.sharding import automatic, explicit_axes, spec_like


def take(leaf: Any, kept: tuple[Any, ...]) -> Any:
    """Some positions of an array along each of its axes.

    Args:
        leaf: a JAX or NumPy array, a tracer, or a ``jax.ShapeDtypeStruct``.
        kept: for each axis the positions that stay, or None for all.

    Returns:
        An array of the same kind, on the same devices; a sharded axis whose new size no longer
        divides is replicated. The same object if nothing is cut.

    Example:
        >>> take(np.arange(6).reshape(2, 3), (None, np.array([0, 2])))
        array([[0, 2],
               [3, 5]])
    """
    if all(positions is None for positions in kept):
        return leaf
    shape = smaller_shape(leaf.shape, kept)
    sharding = getattr(leaf, "sharding", None) if not isinstance(leaf, jax.core.Tracer) else None
    placed = divisible(sharding, shape) if isinstance(sharding, NamedSharding) else None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=placed)

    def cut(array: Any) -> Any:
        library = np if isinstance(array, np.ndarray) else jnp
        for axis, positions in enumerate(kept):
            if positions is not None:
                array = library.take(array, positions, axis=axis)
        return array

    if isinstance(leaf, np.ndarray) or on_host(leaf) is not leaf:
        return at_once(cut, leaf)
    smaller = automatic(cut, out=spec_like(leaf, shape))(leaf)
    return smaller if placed is None or explicit_axes(leaf) else jax.device_put(smaller, placed)


def on_host(leaf: Any) -> Any:
    """An array of one device as NumPy's; what is spread, traced or not numbers as it is.

    Each shape would be compiled anew for what is done with it once; NumPy does it at once.
    """
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        single = len(leaf.sharding.device_set) == 1 and leaf.is_fully_addressable
        if single and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return np.asarray(leaf)
    return leaf


def at_once(function: Any, leaf: Any) -> Any:
    """Run a function of one array where it takes least: on the host, and back to its device."""
    host = on_host(leaf)
    if host is leaf:
        return function(leaf)
    return jax.device_put(function(host), leaf.sharding if leaf.committed else None)


def divisible(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """A placement without the mesh axes that do not divide a shape, which is replicated there.

    Example:
        >>> mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
        >>> tuple(divisible(NamedSharding(mesh, PartitionSpec("data", "model")), (8, 6)).spec)
        ('data', None)
    """
    entries: list[Any] = []
    for names, size in zip(sharding.spec, shape, strict=False):
        axes = (names,) if isinstance(names, str) else names or ()
        parts = math.prod(sharding.mesh.shape[name] for name in axes)
        entries.append(names if size % parts == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)


def smaller_shape(shape: tuple[int, ...], kept: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape that :func:`take` comes to.

    Example:
        >>> smaller_shape((2, 3), (None, np.array([0, 2])))
        (2, 2)
    """
    pairs = zip(shape, kept, strict=True)
    return tuple(size if positions is None else len(positions) for size, positions in pairs)
