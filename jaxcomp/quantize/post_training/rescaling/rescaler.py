"""Rescalings of channels that keep the function: found by proof, tried on numbers, applied.

A :class:`Direction` says by which power of a channel's scale each leaf is multiplied. What
:mod:`~jaxcomp.model.degrees.relate` relates leaves a space of them; one is picked by what
it must do (a kernel's inputs times ``s``) and by what it had better leave alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import combinations, product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from jaxcomp import columns
from jaxcomp import tree as tree_lib
from jaxcomp.model.axes import Flow
from jaxcomp.model.degrees.walk import Unknown, places
from jaxcomp.model.dims import Dim, find
from jaxcomp.model.flow import follow
from jaxcomp.model.matrices import MatrixForm, matrix_form
from jaxcomp.model.program import Program, read, walk, wirings
from jaxcomp.model.samples import Unobservable
from jaxcomp.model.uses import find_uses
from jaxcomp.sharding import automatic, spec_like

_MOST_BUNDLES = 64
_MOST_ATOMS = 4
# Powers of two leave no trace in the arithmetic; what is not proven to be exact is seen at once.
_TOLERANCE = 1e-6


class Direction(NamedTuple):
    """A rescaling that keeps the function.

    Attributes:
        channels: the atoms of its channels.
        powers: the power of the scale that each slot of a leaf is multiplied by; none is zero.
    """

    channels: tuple[Dim, ...]
    powers: dict[Unknown, Fraction]

    @property
    def size(self) -> int:
        """How many scales there are."""
        return math.prod(atom.size for atom in self.channels)

    def paths(self, sign: int) -> tuple[str, ...]:
        """The leaves that are multiplied (1) or divided (-1)."""
        return tuple(dict.fromkeys(u.path for u, power in self.powers.items() if power * sign > 0))


class RescaledGroup(NamedTuple):
    """What became of a group of channels.

    Attributes:
        name: the kernel that reads the channels.
        channels: how many there are.
        divided: the leaves that make them, divided by the scales.
        multiplied: the leaves that read them, multiplied by the scales.
        before: how far the widest channel is above the geometric mean of all, of the worst tensor;
            1 where all are alike.
        after: the same after rescaling.
        kept: why nothing was rescaled; None where it was.
    """

    name: str
    channels: int
    divided: tuple[str, ...] = ()
    multiplied: tuple[str, ...] = ()
    before: float = math.nan
    after: float = math.nan
    kept: str | None = None


class Rescaled(NamedTuple):
    """A rescaled model; ``print`` it for a table.

    Attributes:
        params: parameters of the same structure, dtypes and placement, and the same function.
        groups: what was rescaled, then what was not, with the reason.
    """

    params: Any
    groups: tuple[RescaledGroup, ...]

    def __str__(self) -> str:
        done = [group for group in self.groups if group.kept is None]
        rows = [("divided", "multiplied", "channels", "widest", "after")]
        for group in done:
            words = (", ".join(group.divided), ", ".join(group.multiplied))
            rows.append(
                (*words, str(group.channels), f"{group.before:.2f}x", f"{group.after:.2f}x")
            )
        lines = [columns.table(rows, left=2)] if done else ["nothing was rescaled"]
        lines += [f"{group.name}: kept, {group.kept}" for group in self.groups if group.kept]
        return "\n".join(lines)


class Model(NamedTuple):
    """A model that was read.

    Attributes:
        apply_fn: a function of ``(params, *inputs)``.
        params: its parameters.
        inputs: one batch.
        program: the traced function.
        flow: the axes of its arrays.
    """

    apply_fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    program: Program
    flow: Flow


def read_model(apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Model:
    """Trace a model and follow its axes."""
    program = read(apply_fn, params, *inputs)
    flow = follow(program)
    for op in walk(program.block):
        if op.name == "scan":
            # Turn by turn a loop is at one position of all that it walks along: one axis of layers.
            (wiring,) = wirings(op)
            links = [link for link in (*wiring.enter, *wiring.leave) if link.stacked]
            for link in links[1:]:
                flow.dims.unite(flow.of(links[0].outer)[0], flow.of(link.outer)[0], str(op))
    return Model(apply_fn, params, inputs, program, flow)


def narrowed(direction: Direction, channels: Sequence[Dim]) -> set[Unknown]:
    """The slots of a direction as those of channels that are part of its own, if they are."""
    if not set(channels) < set(direction.channels):
        return set()
    where = [direction.channels.index(atom) for atom in channels]
    return {Unknown(u.path, tuple(u.slot[i] for i in where)) for u in direction.powers}


def forms_of(
    model: Model, paths: Iterable[str]
) -> tuple[dict[str, MatrixForm], list[RescaledGroup]]:
    """The matrix forms of leaves, in the order of the program, and those leaves that have none."""
    wanted = list(paths)
    found: dict[str, MatrixForm] = {}
    without = dict.fromkeys(wanted, "no product reads it")
    for use in find_uses(model.program):
        if use.path not in wanted:
            continue
        try:
            form = matrix_form(use, model.program.leaves[use.path].shape)
        except Unobservable:
            continue
        if found.setdefault(use.path, form) == form:
            without.pop(use.path, None)
        else:
            without[use.path] = "its products disagree on what its inputs are"
    forms = {path: form for path, form in found.items() if path not in without}
    return forms, [RescaledGroup(path, 0, kept=reason) for path, reason in without.items()]


def bundles(model: Model, path: str, axes: Sequence[int]) -> list[tuple[Dim, ...]]:
    """The channels on some axes of a leaf: atoms that vary together, one bundle a part."""
    dims = model.flow.of(model.program.leaves[path])
    each = [_bundles(dims[axis]) for axis in axes]
    if math.prod(map(len, each)) > _MOST_BUNDLES:
        return []
    joined = [tuple(atom for part in parts for atom in part) for parts in product(*each)]
    return [atoms for atoms in joined if 0 < len(atoms) == len(set(atoms)) <= _MOST_ATOMS]


def narrower(channels: Sequence[Dim]) -> list[tuple[Dim, ...]]:
    """A bundle and all that is part of it, the widest first: fewer scales, shared by more."""
    sizes = range(len(channels), 0, -1)
    return [part for size in sizes for part in combinations(channels, size)]


def _bundles(dim: Dim) -> list[tuple[Dim, ...]]:
    dim = find(dim)
    if dim.parts:
        return [bundle for part in dim.parts for bundle in _bundles(part)]
    if dim.factors:
        joined = product(*map(_bundles, dim.factors))
        return [tuple(atom for part in parts for atom in part) for parts in joined]
    return [(dim,)] if dim.size > 1 else [()]


def units(
    model: Model, channels: Sequence[Dim], unknown: Unknown
) -> tuple[tuple[int, ...], np.ndarray]:
    """Which axes of a leaf a slot is on, and the channel at each of their joined positions.

    Positions of other channels have the number of channels, one more than the last.
    """
    dims = model.flow.of(model.program.leaves[unknown.path])
    axes = tuple(sorted({axis for axis, _ in unknown.slot}))
    shape = tuple(dims[axis].size for axis in axes)
    index = np.zeros(shape, np.int64)
    inside = np.ones(shape, bool)
    for atom, (axis, i) in zip(channels, unknown.slot, strict=True):
        _, where = places(dims[axis])[i]
        unit = np.full(dims[axis].size, -1)
        unit[where] = np.arange(len(where))[:, None]
        along = unit.reshape([-1 if a == axis else 1 for a in axes])
        index, inside = index * atom.size + along, inside & (along >= 0)
    count = math.prod(atom.size for atom in channels)
    return axes, np.where(inside, index, count).astype(np.int32)


def largest(x: Array, axes: tuple[int, ...], index: np.ndarray, count: int) -> Array:
    """The largest magnitude at each channel; zero where there is none."""
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    reduced = jnp.max(jnp.abs(x.astype(jnp.float32)), others)
    if _in_order(index, count):
        return reduced.reshape(count)
    return jnp.zeros(count, jnp.float32).at[index].max(reduced, mode="drop")


def multiplied(
    x: Array, scale: Array, power: float, axes: tuple[int, ...], index: np.ndarray
) -> Array:
    """A leaf times its channels' scales to a power."""
    factor = scale if power == 1 else 1 / scale if power == -1 else scale**power
    if not _in_order(index, scale.size):
        factor = jnp.append(factor, jnp.ones((), scale.dtype))[index]
    return x * factor.reshape([x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)])


def _in_order(index: np.ndarray, count: int) -> bool:
    return index.size == count and bool((index.ravel() == np.arange(count)).all())


def rescaler(model: Model, directions: Sequence[Direction]) -> Callable[[Sequence[Any]], Any]:
    """A function from ``(channels,)`` positive scales, one for each direction, to parameters.

    What it returns has the structure, dtypes and placement of the model's parameters.
    """
    todo: dict[str, list[tuple[int, float, tuple[int, ...], np.ndarray]]] = {}
    for number, direction in enumerate(directions):
        for unknown, power in direction.powers.items():
            step = (number, float(power), *units(model, direction.channels, unknown))
            todo.setdefault(unknown.path, []).append(step)
    leaves = tree_lib.flatten(model.params)
    old = {path: jnp.asarray(leaves[path]) for path in todo}

    def work(old: dict[str, Array], scales: Sequence[Array]) -> dict[str, Array]:
        news = {}
        for path, steps in todo.items():
            new = old[path].astype(jnp.promote_types(old[path].dtype, jnp.float32))
            for number, power, axes, index in steps:
                new = multiplied(new, scales[number], power, axes, index)
            news[path] = new.astype(old[path].dtype)
        return news

    specs = {path: spec_like(leaf, leaf.shape) for path, leaf in old.items()}
    run = jax.jit(automatic(work, specs))

    def rescale(scales: Sequence[Any]) -> Any:
        news = run(old, [jnp.asarray(scale, jnp.float32) for scale in scales])
        for path, new in news.items():
            sharding = getattr(leaves[path], "sharding", None)
            if isinstance(sharding, NamedSharding):
                news[path] = jax.device_put(new, sharding)
        return tree_lib.replace(model.params, news)

    return rescale


def broken(
    model: Model, directions: Sequence[Direction], rescale: Callable[[Sequence[Any]], Any]
) -> dict[int, str]:
    """The directions that change the outputs when random powers of two are put in, and by how much.

    Args:
        model: that was read.
        directions: to be tried, together and, if that changes anything, one by one.
        rescale: from :func:`rescaler`, of the same directions.

    Returns:
        A reason for each direction that fails, by its number.
    """
    if not directions:
        return {}
    run = jax.jit(model.apply_fn)
    rng = np.random.default_rng(0)
    # Even exponents, so that square roots are exact too.
    drawn = [np.exp2(2.0 * rng.integers(-1, 2, direction.size)) for direction in directions]
    before = jax.tree.leaves(run(model.params, *model.inputs))

    def change(scales: Sequence[Any]) -> float:
        after = jax.tree.leaves(run(rescale(scales), *model.inputs))
        # NumPy's maximum: Python's passes over NaN.
        return float(np.max([0.0, *map(_difference, before, after)]))

    if change(drawn) <= _TOLERANCE:
        return {}
    ones = [np.ones_like(scale) for scale in drawn]
    each = {
        number: change([*ones[:number], scale, *ones[number + 1 :]])
        for number, scale in enumerate(drawn)
    }
    return {
        number: f"tried with powers of two, the outputs move by {move:.1e}"
        for number, move in each.items()
        if not move <= _TOLERANCE
    }


def _difference(before: Any, after: Any) -> float:
    """The largest, over the largest value; NaN where both are NaN counts as equal."""
    if jnp.issubdtype(before.dtype, jax.dtypes.prng_key):
        return 0.0
    a, b = (np.asarray(x) for x in (before, after))
    if a.dtype.kind not in "fc":
        a, b = a.astype(np.float64), b.astype(np.float64)
    same = (a == b) | ((a != a) & (b != b))
    if same.all():
        return 0.0
    size = np.abs(np.where(np.isfinite(a), a, 0)).max(initial=0)
    return float(np.where(same, 0, np.abs(a - b)).max() / max(float(size), 1e-30))


def spread(ranges: Iterable[Array]) -> Array:
    """How far the widest channel of a tensor is above their geometric mean; of the worst tensor."""
    found = []
    for each in ranges:
        logs = jnp.log(jnp.where(each > 0, each, 1))
        count = jnp.maximum(jnp.sum(each > 0), 1)
        top = jnp.max(jnp.where(each > 0, logs, -jnp.inf))
        found.append(jnp.where(jnp.any(each > 0), jnp.exp(top - jnp.sum(logs) / count), 1.0))
    return jnp.max(jnp.stack(found))
