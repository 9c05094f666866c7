"""A Pallas kernel under ``vmap`` and on a mesh: each device runs it on its own part."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp.sharding import automatic, explicit_axes, spec_like

# The name of an axis under `vmap`; of two, twice.
_BATCH = "batch"


class Axes(NamedTuple):
    """Which axes of an operation's arrays and result are the same.

    Attributes:
        arrays: for each array the names of its axes.
        result: of the result's; a name that is missing is summed over.
        parts: what a device's part of an axis must be a multiple of; 1 where nothing is said.
            An axis of another length under the same name is in proportion to it.
    """

    arrays: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]
    parts: Mapping[str, int] = {}


def placed(run: Callable[..., Any], axes: Axes) -> Callable[..., Any]:
    """Let a compiler of several devices cut an operation that it cannot look into.

    Where an axis that is summed over lies on several devices, their sums are added up; nothing is
    gathered, except along an axis whose parts are no multiple of what ``axes`` asks for.

    Args:
        run: a function of arrays, one array out; its kernel gets a leading axis under ``vmap``.
        axes: of its arrays and its result.

    Returns:
        The function, to be called inside ``jit`` or outside.

    Example:
        >>> import jax.numpy as jnp
        >>> double = placed(lambda x: 2 * x, Axes((("a", "b"),), ("a", "b")))
        >>> double(jnp.ones((1, 2))), jax.vmap(double)(jnp.ones((2, 1, 1))).shape
        (Array([[2., 2.]], dtype=float32), (2, 1, 1))
    """

    @custom_vmap
    def batched(*arrays: Any) -> Any:
        return _partitioned(run, axes, arrays)(*arrays)

    @batched.def_vmap
    def _(size: int, in_batched: Any, *arrays: Any) -> Any:
        del size
        leading = tuple(0 if each else None for each in in_batched)
        # An axis like the others: it may lie on several devices.
        name = _BATCH
        while name in axes.result:
            name += _BATCH
        names = [
            (name, *own) if each else own for own, each in zip(axes.arrays, in_batched, strict=True)
        ]
        many = axes._replace(arrays=tuple(names), result=(name, *axes.result))
        return placed(jax.vmap(run, leading), many)(*arrays), True

    return batched


def explicit(run: Callable[..., Any], axes: Axes, like: Any = None) -> Callable[..., Any]:
    """Place an operation's result by its arrays where the axes of a mesh are explicit.

    Args:
        run: as for :func:`placed`; any function of arrays will do.
        axes: of its arrays and its result.
        like: an array of the result's shape, to lie as that does: what a gradient is of. None: as
            the arrays tell.

    Returns:
        The function; the compiler has its way inside it.

    Example:
        >>> import jax.numpy as jnp
        >>> explicit(lambda x: 2 * x, Axes((("a", "b"),), ("a", "b")))(jnp.ones((1, 2)))
        Array([[2., 2.]], dtype=float32)
    """

    def wrapped(*arrays: Any) -> Any:
        if not explicit_axes(*arrays):
            return run(*arrays)
        if like is not None:
            return automatic(run, spec_like(like, like.shape))(*arrays)
        specs = [jax.typeof(array).sharding.spec for array in arrays]
        places = _places(axes, specs, [array.shape for array in arrays], None)
        return automatic(run, _spec(axes.result, places))(*arrays)

    return wrapped


def flat_rows(x: Any) -> jax.Array:
    """All axes but the last as one, wherever they lie on explicit mesh axes.

    Args:
        x: ``(*rows, columns)``.

    Example:
        >>> import jax.numpy as jnp
        >>> flat_rows(jnp.ones((2, 0, 3))).shape
        (0, 3)
    """
    spec = _spec_of(x)
    taken = [names for names in spec[:-1] if names]
    merged = tuple(
        name for names in taken for name in ((names,) if isinstance(names, str) else names)
    )
    return _reshaped(
        x, (math.prod(x.shape[:-1]), x.shape[-1]), PartitionSpec(merged or None, spec[-1])
    )


def unflat_rows(y: Any, x: Any) -> jax.Array:
    """The opposite of :func:`flat_rows`, for a result of as many rows.

    Args:
        y: ``(rows, columns)``.
        x: what was flattened.

    Example:
        >>> import jax.numpy as jnp
        >>> unflat_rows(jnp.ones((6, 4)), jnp.ones((2, 3, 5))).shape
        (2, 3, 4)
    """
    lead, last = _spec_of(x)[:-1], _spec_of(y)[-1]
    taken = {
        name for names in lead for name in ((names,) if isinstance(names, str) else names or ())
    }
    mine = {last} if isinstance(last, str) else set(last or ())
    spec = PartitionSpec(*lead, None if mine & taken else last)
    return _reshaped(y, (*x.shape[:-1], y.shape[-1]), spec)


def _spec_of(x: Any) -> tuple[Any, ...]:
    return tuple(spec_like(x, x.shape)) or (None,) * x.ndim


def _reshaped(x: Any, shape: tuple[int, ...], spec: PartitionSpec) -> jax.Array:
    return automatic(lambda x: x.reshape(shape), spec)(x)


def _partitioned(run: Callable[..., Any], axes: Axes, arrays: Sequence[Any]) -> Any:
    # It looks up the names of arguments, which a partial function hides.
    cut: Any = custom_partitioning(lambda *parts: run(*parts))

    def partition(mesh: Any, arguments: Any, result: Any) -> Any:
        del result
        specs = [each.sharding.spec for each in arguments]
        places = _places(axes, specs, [each.shape for each in arguments], mesh)
        summed = [names for axis, names in places.items() if axis not in axes.result]
        over = tuple(name for names in summed for name in names)

        def part(*parts: Any) -> Any:
            return lax.psum(run(*parts), over) if over else run(*parts)

        shardings = [NamedSharding(mesh, _spec(names, places)) for names in axes.arrays]
        return mesh, part, NamedSharding(mesh, _spec(axes.result, places)), tuple(shardings)

    rule, sizes, summed = _rule(axes, arrays)
    cut.def_partition(partition=partition, sharding_rule=rule, reduction_factors=summed, **sizes)
    return cut


def _places(
    axes: Axes, specs: Sequence[Any], shapes: Sequence[tuple[int, ...]], mesh: Any
) -> dict[str, tuple[str, ...]]:
    """The mesh axes that each axis lies on: the first that is told, if its parts are whole."""
    places: dict[str, tuple[str, ...]] = {}
    for names, spec, shape in zip(axes.arrays, specs, shapes, strict=True):
        for name, on, size in zip(names, tuple(spec) + (None,) * len(names), shape, strict=False):
            on = (on,) if isinstance(on, str) else tuple(on or ())
            taken = {each for others in places.values() for each in others}
            if not on or name in places or taken & set(on):
                continue
            parts = 1 if mesh is None else math.prod(mesh.shape[each] for each in on)
            if size % (parts * axes.parts.get(name, 1)) == 0:
                places[name] = on
    return places


def _spec(names: tuple[str, ...], places: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(places.get(name) for name in names))


def _rule(axes: Axes, arrays: Sequence[Any]) -> tuple[str, dict[str, int], tuple[str, ...]]:
    """The same for Shardy: an axis that is longer elsewhere is a product of two factors."""
    least: dict[str, int] = {}
    for names, array in zip(axes.arrays, arrays, strict=True):
        for name, size in zip(names, array.shape, strict=True):
            least[name] = min(least.get(name, size), size)
    sizes: dict[str, int] = {}

    def written(names: tuple[str, ...], shape: Sequence[int | None]) -> str:
        words = []
        for name, size in zip(names, shape, strict=True):
            times = 1 if size is None else size // least[name]
            if times > 1:
                sizes[f"{name}{times}"] = times
            words.append(f"({name} {name}{times})" if times > 1 else name)
        return " ".join(words)

    read = [written(n, a.shape) for n, a in zip(axes.arrays, arrays, strict=True)]
    longest = {
        name: max(
            array.shape[names.index(name)]
            for names, array in zip(axes.arrays, arrays, strict=True)
            if name in names
        )
        for name in axes.result
    }
    rule = f"{', '.join(read)} -> {written(axes.result, [longest[n] for n in axes.result])}"
    kept = {
        *axes.result,
        *(factor for factor in sizes if factor.rstrip("0123456789") in axes.result),
    }
    factors = dict.fromkeys(re.findall(r"[a-z]+[0-9]*", rule))
    return rule, sizes, tuple(factor for factor in factors if factor not in kept)
