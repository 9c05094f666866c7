"""Run a function under the compiler's own sharding, also where mesh axes are explicit."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


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
    mesh = _explicit_mesh(arrays)
    return () if mesh is None else _explicit_names(mesh)


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
        mesh = _explicit_mesh(args)
        if mesh is None:
            return function(*args)
        # Without `jax.set_mesh` around the call, JAX learns the mesh from these shardings alone.
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            PartitionSpec() if out is None else out,
            is_leaf=lambda spec: isinstance(spec, PartitionSpec),
        )
        names = _explicit_names(mesh)
        return jax.sharding.auto_axes(function, axes=names, out_sharding=shardings)(*args)

    return wrapped


def _explicit_mesh(arrays: Any) -> Any:
    """The first mesh with explicit axes that any of the arrays lives on, or None."""
    for leaf in jax.tree.leaves(arrays):
        mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
        if mesh is not None and not mesh.empty and _explicit_names(mesh):
            return mesh
    return None


def _explicit_names(mesh: Any) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def spec_like(array: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """Where a result of ``shape`` lies when it is laid out as ``array`` is.

    Args:
        array: an array or tracer with as many axes as the result.
        shape: shape of the result.

    Returns:
        The placement of ``array`` on explicit mesh axes, without those that do not divide
        ``shape`` evenly; what :func:`automatic` takes as ``out``.

    Example:
        >>> import jax.numpy as jnp
        >>> tuple(spec_like(jnp.zeros((2, 3)), (2, 6)))
        ()
    """
    if not explicit_axes(array):
        return PartitionSpec()
    sharding = jax.typeof(array).sharding
    entries: list[Any] = []
    for names, size in zip(sharding.spec, shape, strict=True):
        axes = (names,) if isinstance(names, str) else names or ()
        parts = math.prod(sharding.mesh.shape[name] for name in axes)
        entries.append(names if size % parts == 0 else None)
    return PartitionSpec(*entries)


def placed_like(x: Any, like: Any) -> Any:
    """An array laid out as another of its shape, where mesh axes are explicit.

    Args:
        x: an array or tracer, such as numbers drawn without a thought of meshes.
        like: an array or tracer of the same shape.

    Returns:
        ``x``, with the placement of ``like`` if that lies on explicit mesh axes.

    Example:
        >>> import jax.numpy as jnp
        >>> placed_like(jnp.arange(2), jnp.zeros(2))
        Array([0, 1], dtype=int32)
    """
    if not explicit_axes(like):
        return x
    return automatic(lambda x, _: x, out=spec_like(like, like.shape))(x, like)
