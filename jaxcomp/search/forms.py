"""Ways to run one function for many candidates: one program, and which way is the fastest."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp.model.timing import milliseconds

Form = Literal["vmap", "map", "loop"]
FORMS: tuple[Form, ...] = get_args(Form)
# Timing is there to save time: what takes long is not run often for it.
_PATIENCE = 500.0  # milliseconds for the runs of a form


@dataclass(frozen=True)
class Program:
    """A function of one candidate as one of many.

    Attributes:
        run: ``(stacked, *shared) -> stacked results``, on arrays that are placed.
        jitted: of the same arguments, what ``run`` spends its time in; None where it is a loop.
        split: sharding of candidates; None: where JAX puts them.
        same: sharding of what all share.
    """

    run: Callable[..., Any]
    jitted: Any
    split: Any = None
    same: Any = None

    def __call__(self, stacked: Any, *shared: Any) -> Any:
        """Place the arguments and run; returns before it is done, as JAX does."""
        return self.run(jax.device_put(stacked, self.split), *jax.device_put(shared, self.same))

    def bytes_at(self, count: int, stacked: Any, shared: tuple[Any, ...]) -> int | None:
        """What it takes on one device at once for so many candidates; compiled, and not run.

        Args:
            count: how many.
            stacked: any number of them.
            shared: what all share.

        Returns:
            Bytes of inputs, outputs and what lies between, by the compiler's own account; None
            where it gives none.
        """
        if self.jitted is None:
            return None

        def kind(x: Any) -> Any:
            shape = (count, *np.shape(x)[1:])
            return jax.ShapeDtypeStruct(shape, jnp.result_type(x), sharding=self.split)

        shared = jax.device_put(shared, self.same)
        found = self.jitted.lower(jax.tree.map(kind, stacked), *shared).compile().memory_analysis()
        if found is None:
            return None
        moved = found.argument_size_in_bytes + found.output_size_in_bytes
        return moved + found.temp_size_in_bytes - found.alias_size_in_bytes


def program(
    function: Callable[..., Any],
    form: Form,
    chunk: int = 1,
    mesh: Any = None,
    axis: str | None = None,
) -> Program:
    """A function of one candidate as one of many.

    Args:
        function: ``(candidate, *shared) -> results``, trees of arrays; pure.
        form: ``"vmap"``: all at once, batched by ``jax.vmap``; ``"map"``: ``chunk`` at once, one
            chunk after the other inside one program, by ``jax.lax.map``; ``"loop"``: a compiled
            call for each, from Python.
        chunk: as said; on each device.
        mesh: devices to spread the candidates over; not with ``"loop"``.
        axis: of the mesh, whose size divides the number of candidates.

    Returns:
        The program, compiled at the first call with new shapes.

    Example:
        >>> program(lambda x, y: x * y, "map")(np.arange(3.0), 2.0)
        Array([0., 2., 4.], dtype=float32)
    """
    if form == "loop":
        return Program(_loop(function), None)
    jitted = jax.jit(_spread(_together(function, form, chunk), mesh, axis))
    if mesh is None:
        return Program(jitted, jitted)
    # Explicit axes take no array that lies otherwise than its type says.
    split, same = (NamedSharding(mesh, PartitionSpec(*names)) for names in ((axis,), ()))
    return Program(jitted, jitted, split, same)


def seconds_of(runs: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
    """What each of some runs takes, in turn so that a drifting machine favours none.

    Args:
        runs: functions that start the work and return its results; compiled by a first run.

    Returns:
        Median seconds of up to five runs, of fewer where they take long.

    Example:
        >>> list(seconds_of({"vmap": lambda: 1, "loop": lambda: 2}))
        ['vmap', 'loop']
    """
    waiting = {form: lambda run=run: jax.block_until_ready(run()) for form, run in runs.items()}
    for run in waiting.values():
        run()
    times: dict[Any, list[float]] = {form: [] for form in waiting}
    for _ in range(5):
        for form, run in waiting.items():
            if sum(times[form]) < _PATIENCE:
                times[form].append(milliseconds(run))
    return {form: statistics.median(found) / 1000 for form, found in times.items()}


def fastest(seconds: Mapping[Any, float]) -> Any:
    """The form that takes least.

    Example:
        >>> fastest({"vmap": 0.2, "loop": 0.1})
        'loop'
    """
    return min(seconds, key=lambda form: seconds[form])


def check_form(form: Any, mesh: Any) -> None:
    """Raise unless a form is None or one of the three, and goes with the mesh.

    Raises:
        ValueError: it is not.

    Example:
        >>> check_form("pmap", None)
        Traceback (most recent call last):
        ...
        ValueError: form is 'pmap': it must be 'vmap', 'map', 'loop', or None for the fastest
    """
    if form is not None and form not in FORMS:
        names = ", ".join(map(repr, FORMS))
        raise ValueError(f"form is {form!r}: it must be {names}, or None for the fastest")
    if form == "loop" and mesh is not None:
        raise ValueError("form='loop' runs on one device: use 'vmap' or 'map' on a mesh")


def mesh_axis(mesh: Any, axis: str | None) -> tuple[str | None, int]:
    """The mesh axis that candidates are spread over, and its size.

    Raises:
        TypeError: ``mesh`` is none.
        ValueError: there is no such axis, or it is not clear which.

    Example:
        >>> mesh_axis(None, None)
        (None, 1)
    """
    if mesh is None:
        if axis is not None:
            raise ValueError(f"axis='{axis}' is of a mesh: pass mesh too")
        return None, 1
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh (jax.make_mesh), not {mesh!r:.60}")
    names: list[str] = list(mesh.axis_names)
    if axis is None and len(names) > 1:
        raise ValueError(f"mesh has axes {', '.join(names)}: name one with axis=")
    axis = names[0] if axis is None else axis
    if axis not in names:
        raise ValueError(f"axis='{axis}' is not one of the mesh: {', '.join(names)}")
    return axis, mesh.shape[axis]


def _together(function: Callable[..., Any], form: Form, chunk: int) -> Callable[..., Any]:
    def together(stacked: Any, *shared: Any) -> Any:
        each = lambda candidate: function(candidate, *shared)
        if form == "vmap":
            return jax.vmap(each)(stacked)
        # A chunk of one is not batched at all: it computes what the function alone computes.
        return lax.map(each, stacked, batch_size=chunk if chunk > 1 else None)

    return together


def _spread(together: Callable[..., Any], mesh: Any, axis: str | None) -> Callable[..., Any]:
    if mesh is None:
        return together
    split, same = PartitionSpec(axis), PartitionSpec()

    def spread(stacked: Any, *shared: Any) -> Any:
        specs = (split, *(same for _ in shared))
        # Loops begin with values that are alike on all devices, which is checked in vain here.
        return jax.shard_map(together, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)(
            stacked, *shared
        )

    return spread


def _loop(function: Callable[..., Any]) -> Callable[..., Any]:
    def one(stacked: Any, index: Any, results: Any, *shared: Any) -> Any:
        candidate = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, False), stacked)
        found = function(candidate, *shared)
        return jax.tree.map(lambda all, one: all.at[index].set(one), results, found)

    def blank(stacked: Any, *shared: Any) -> Any:
        first = jax.tree.map(lambda x: x[0], stacked)
        size = len(jax.tree.leaves(stacked)[0])
        kinds = jax.eval_shape(function, first, *shared)
        return jax.tree.map(lambda x: lax.full((size, *x.shape), 0, x.dtype), kinds)

    # Each call writes its row in place: nothing is left to join, whose shape would be compiled too.
    one, blank = jax.jit(one, donate_argnums=2), jax.jit(blank)

    def looped(stacked: Any, *shared: Any) -> Any:
        results = blank(stacked, *shared)
        for index in range(len(jax.tree.leaves(stacked)[0])):
            results = one(stacked, np.int32(index), results, *shared)
        return results

    return looped
