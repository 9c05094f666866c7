"""Statistics of what each weight is multiplied by, gathered over batches without hooks."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxcomp import sharding as sharding_lib
from jaxcomp import tree as tree_lib
from jaxcomp.model import samples as samples_lib
from jaxcomp.model import tapped
from jaxcomp.model.batches import checked, spread
from jaxcomp.model.program import Block, Op, Program, Value, read
from jaxcomp.model.progress import watched
from jaxcomp.model.samples import Samples, Unobservable
from jaxcomp.model.statistics import Statistic
from jaxcomp.model.uses import Use, find_uses


@jax.tree_util.register_pytree_with_keys_class
class Observed(dict[str, Any]):
    """Values by the path of the leaf; a pytree.

    Attributes:
        unobserved: why a use has no value, by path.
    """

    def __init__(self, values: Iterable[tuple[str, Any]], unobserved: Mapping[str, str]) -> None:
        super().__init__(values)
        self.unobserved = dict(unobserved)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Pytree protocol."""
        values, aux = self.tree_flatten()
        return tuple((jax.tree_util.DictKey(k), v) for k, v in zip(self, values, strict=True)), aux

    def tree_flatten(self) -> tuple[Any, Any]:
        """Pytree protocol."""
        return tuple(self.values()), (tuple(self), tuple(self.unobserved.items()))

    @classmethod
    def tree_unflatten(cls, aux: Any, values: Iterable[Any]) -> "Observed":
        """Pytree protocol."""
        paths, unobserved = aux
        return cls(zip(paths, values, strict=True), dict(unobserved))


class _Entry(NamedTuple):
    """What is kept of one use of a leaf, or of several that see the same features.

    Two uses in one loop may share an entry only if that loop walks both or neither: ``depths``.
    """

    path: str
    kind: str
    roles: tuple[str, ...]
    features: int
    groups: tuple[int, ...]
    turns: tuple[int, ...]  # lengths of the loops that walk a stacked leaf
    stack: tuple[int, ...]  # the stacked axes themselves
    depths: tuple[int, ...]  # how many loops are around each of these loops


class _Plan(NamedTuple):
    program: Program
    entries: dict[str, _Entry]
    taps: dict[Op, list[tapped.Tap]]
    unobserved: dict[str, str]


class _Seen(NamedTuple):
    """How often a use ran in one batch, and how many of the values that it met are not finite."""

    times: Any
    broken: Any


def observe(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    statistic: Statistic,
    *,
    paths: str | Sequence[str] | None = None,
    progress: bool | None = None,
) -> Observed:
    """A statistic of what each weight is multiplied by, over all batches.

    The function is traced once for each shape of a batch and runs as it is; beside it, one jitted
    step updates the statistics in place. Batches are taken one at a time, and no more than two are
    held. Inputs may lie on several devices; the statistics are then the same on each.

    Observed are dots and convolutions, and look-ups (embeddings) where the statistic has a
    ``measure_rows``. Every other use of a leaf (a bias, a normalization's scale) is named in
    ``unobserved`` with the reason, as is a leaf that no output depends on.

    A value has the axes that the statistic gives it, over the features: the leaf's input axes (and
    the kernel's, where the statistic asks for patches) joined in the order in which the leaf has
    them. In front stand the leaf's stacked axes (a scan over layers), its batch axes (experts,
    ensembles), then the groups of a grouped convolution. Turns of a loop that see the same
    weight (an RNN's) count together, and of a branch only what is taken counts.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any pytree of arrays.
        batches: an iterable; a plain tuple is spread over the inputs, ``apply_fn(params, *item)``,
            and anything else (an array, a dict, a named tuple) is the one input.
        statistic: see :mod:`jaxcomp.model.statistics`. It sees float32.
        paths: patterns of the leaves to observe (see :func:`jaxcomp.tree.matching`); all if None.
        progress: whether to show a progress bar on stderr; None: only on a terminal, and only if it
            takes more than two seconds.

    Returns:
        Values by path. A leaf that is used in several ways (a tied embedding: looked up, then
        multiplied) has ``path`` for the first and ``path#2`` for the second, in the order of the
        program; uses that see the same features are one.

    Raises:
        ValueError: there are no batches; a pattern matches no leaf; no use can be observed; a
            weight met NaN or infinite values, or a statistic overflowed (the message names them);
            a batch of another shape leads to other uses than the first.
        TypeError: ``batches`` is one array, or no iterable.

    Example:
        >>> from jaxcomp.model.statistics import absmax
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> batches = [jnp.array([[1.0, -2.0]]), jnp.array([[-3.0, 0.5]])]
        >>> found = observe(lambda p, x: x @ p["kernel"] + p["bias"], params, batches, absmax())
        >>> found
        {'kernel': Array([3., 2.], dtype=float32)}
        >>> found.unobserved
        {'bias': 'add contracts nothing with it'}
    """
    patterns = [paths] if isinstance(paths, str) else paths
    plans: dict[Any, tuple[_Plan, Callable[..., Any]]] = {}
    first: _Plan | None = None
    state: Any = None
    times: dict[str, np.ndarray] = {}
    pending: list[Any] = []
    number = -1
    for number, item in enumerate(watched(checked(batches), "observing", progress)):
        inputs = spread(item)
        key = _signature((params, inputs))
        if key not in plans:
            plan = _plan(read(apply_fn, params, *inputs), statistic, patterns)
            place = _replicated((params, inputs))
            plans[key] = plan, _step(plan, statistic, place)
            if first is None:
                first = plan
                state = _begin(plan, statistic, place)
            _check_same(first, plan, number)
        state, seen = plans[key][1](state, params, inputs)
        # The device works on this batch while the last one is looked at: it never idles, and never
        # more than two batches wait in its memory.
        pending.append((number, seen))
        if len(pending) > 1:
            _look(pending.pop(0), times)
    if first is None:
        raise ValueError("batches is empty: give at least one batch of the model's inputs")
    for last in pending:
        _look(last, times)
    return _finish(first, statistic, state, times)


def _signature(arguments: Any) -> Any:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple(map(jax.typeof, leaves))


def _replicated(arguments: Any) -> Any:
    """Where the statistics lie: with the arguments, whole on each device."""
    for leaf in jax.tree.leaves(arguments):
        place = getattr(leaf, "sharding", None)
        if isinstance(place, NamedSharding):
            return NamedSharding(place.mesh, PartitionSpec())
    places = {getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arguments)} - {None}
    single = [place for place in places if isinstance(place, SingleDeviceSharding)]
    return single[0] if len(single) == 1 else None


def _plan(program: Program, statistic: Statistic, patterns: Sequence[str] | None) -> _Plan:
    paths = program.leaves if patterns is None else tree_lib.assign(patterns, program.leaves)
    outside = dict(tapped.around(program))
    tell = functools.cache(lambda path: tapped.walks(program, path))
    uses = [use for use in find_uses(program) if use.path in paths]
    found: list[tuple[Use, Any, Any]] = []
    for use in uses:
        try:
            found.append((use, *_observable(program, use, statistic, outside, tell)))
        except Unobservable as reason:
            found.append((use, str(reason), None))
    plan = _Plan(program, {}, {}, {path: "no output depends on it" for path in paths})
    names: dict[str, list[Any]] = {path: [] for path in paths}
    # A weight divided by its own norm meets its data twice at one place: once is enough.
    good = {(use.path, use.op): use for use, _, tap in reversed(found) if tap is not None}
    for use, entry, tap in found:
        if good.get((use.path, use.op), use) is not use:
            continue
        if entry not in names[use.path]:
            names[use.path].append(entry)
        place = names[use.path].index(entry) + 1
        key = use.path if place == 1 else f"{use.path}#{place}"
        plan.unobserved.pop(key, None)
        if tap is None:
            plan.unobserved[key] = entry
        else:
            plan.entries[key] = entry
            plan.taps.setdefault(use.op, []).append(tap._replace(key=key))
    if not plan.entries:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in plan.unobserved.items())
        raise ValueError(f"no use can be observed with {statistic.name}: {reasons}")
    return plan


def _observable(
    program: Program,
    use: Use,
    statistic: Statistic,
    outside: Mapping[Op, tuple[tuple[Op, Block], ...]],
    tell: Callable[[str], dict[Value, tapped.Walk]],
) -> tuple[_Entry, tapped.Tap]:
    """What to keep of a use and how; raises :class:`Unobservable` with the reason if it cannot."""
    around = outside.get(use.op, ())
    reason = tapped.obstacle(around)
    if reason is not None:
        raise Unobservable(reason)
    shape = program.leaves[use.path].shape
    samples = samples_lib.of_use(use, shape, statistic.patches)
    if samples.rows and statistic.measure_rows is None:
        raise Unobservable(f"its rows are looked up, and {statistic.name} has no measure_rows")
    stack = tuple(size for size, role in zip(shape, use.roles, strict=True) if role == "stack")
    walk = tell(use.path)[use.op.inputs[use.operand]] if stack else tapped.Walk()
    turns = tuple(loop.params["length"] for loop in walk.loops)
    unordered = {"rev", "gather", "concatenate", "scan", "while", "sort"}
    if len(turns) > 1:
        unordered |= {"transpose"}
    if int(np.prod(turns)) != int(np.prod(stack)) or unordered & walk.outside:
        raise Unobservable(f"which of its layers {use.op} reads, only the running program knows")
    scans = [op for op, _ in around if op.name == "scan"]
    depths = tuple(scans.index(loop) for loop in walk.loops)
    entry = _Entry(
        use.path, use.kind, use.roles, samples.features, samples.groups, turns, stack, depths
    )
    return entry, tapped.Tap("", walk.loops, _fold(samples, statistic))


def _fold(samples: Samples, statistic: Statistic) -> Callable[[Any, tuple[Any, ...]], Any]:
    def measure(x: jax.Array) -> Any:
        if statistic.measure_rows is not None and samples.rows:
            return statistic.measure_rows(x, samples.features)
        return statistic.measure(x)

    def update(entry: Any, *inputs: Any) -> Any:
        state, seen = entry
        x = samples.take(inputs)
        if x.size == 0:
            return entry
        x = x if samples.rows else x.astype(jnp.float32)
        each = jax.vmap if samples.groups else (lambda function: function)
        state = each(statistic.merge)(state, each(measure)(x))
        broken = jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)
        return state, _Seen(seen.times + 1, seen.broken + broken)

    return lambda entry, inputs: sharding_lib.automatic(update)(entry, *inputs)


def _step(plan: _Plan, statistic: Statistic, place: Any) -> Callable[..., Any]:
    def step(state: Any, params: Any, inputs: Any) -> Any:
        entries = {}
        for key, entry in plan.entries.items():
            none = jnp.zeros(entry.turns, jnp.int32)
            entries[key] = (state[key], _Seen(none, none))
        values = jax.tree.leaves((params, inputs))
        _, entries = tapped.run(plan.program, values, plan.taps, entries)
        return (
            {key: entries[key][0] for key in plan.entries},
            {key: entries[key][1] for key in plan.entries},
        )

    return jax.jit(step, donate_argnums=0, out_shardings=place)


def _leading(entry: _Entry) -> tuple[int, ...]:
    return (*entry.turns, *((int(np.prod(entry.groups)),) if entry.groups else ()))


def _begin(plan: _Plan, statistic: Statistic, place: Any) -> Any:
    def begin() -> Any:
        return {
            key: jax.tree.map(
                lambda leaf, entry=entry: jnp.broadcast_to(leaf, (*_leading(entry), *leaf.shape)),
                statistic.init(entry.features),
            )
            for key, entry in plan.entries.items()
        }

    return jax.jit(begin, out_shardings=place)()


def _check_same(first: _Plan, plan: _Plan, number: int) -> None:
    for key in first.entries | plan.entries:
        if first.entries.get(key) != plan.entries.get(key):
            raise ValueError(
                f"batch {number}: {key} is used in another way than in batch 0 "
                f"({plan.entries.get(key)}, not {first.entries.get(key)}): "
                "observe batches that lead to other operations apart"
            )


def _look(report: tuple[int, dict[str, _Seen]], times: dict[str, np.ndarray]) -> None:
    """Add up how often each use ran; raise if one met values that are not finite."""
    number, seen = report
    seen = jax.device_get(seen)
    broken = {key: int(np.sum(one.broken)) for key, one in seen.items() if np.any(one.broken)}
    if broken:
        (key, count), *others = broken.items()
        more = f"; after it {', '.join(path for path, _ in others)}" if others else ""
        raise ValueError(
            f"batch {number}: {key} is multiplied by {count} NaN or infinite values{more}: "
            "mend this batch, or the parameters before that leaf"
        )
    for key, one in seen.items():
        times[key] = np.asarray(times.get(key, 0) + one.times.astype(np.int64))


def _finish(
    plan: _Plan, statistic: Statistic, state: dict[str, Any], times: dict[str, np.ndarray]
) -> Observed:
    unobserved = dict(plan.unobserved)
    for key in plan.entries:
        never = int(np.sum(times[key] == 0))
        if never:
            of = f" in {never} of {times[key].size} layers" if times[key].size > 1 else ""
            unobserved[key] = f"no batch led to the operation that reads it{of}"
    keys = [key for key in plan.entries if key not in unobserved]

    def finish(state: Any) -> Any:
        values = {key: _value(plan.entries[key], statistic, state[key]) for key in keys}
        return values, {key: _is_finite(state[key]) for key in keys}

    values, finite = jax.jit(finish)(state)
    broken = [key for key in keys if not finite[key]]
    if broken:
        raise ValueError(
            f"{', '.join(broken)}: {statistic.name} overflows float32: scale the inputs"
        )
    return Observed(((key, values[key]) for key in keys), unobserved)


def _is_finite(state: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))


def _value(entry: _Entry, statistic: Statistic, state: Any) -> Any:
    """A finished state, with the axes of the leaf in front."""
    leading = _leading(entry)
    finish = statistic.finish
    for _ in leading:
        finish = jax.vmap(finish)
    return jax.tree.map(
        lambda leaf: leaf.reshape(*entry.stack, *entry.groups, *leaf.shape[len(leading) :]),
        finish(state),
    )
