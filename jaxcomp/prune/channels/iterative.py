"""Remove channels in steps, with fine-tuning between them."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.checkpoint.resuming import describe, file_in
from jaxcomp.model.placement import at_once, on_host
from jaxcomp.model.progress import watched
from jaxcomp.model.removed import Kept, Size, kept_positions, size_of
from jaxcomp.prune.channels import scores as channel_scores
from jaxcomp.prune.channels.budget import Budget
from jaxcomp.prune.channels.removal import (
    Model,
    Options,
    as_patterns,
    build,
    decide,
    rank,
    shapes_of,
    trace_model,
)
from jaxcomp.prune.channels.resume import FILE, Point, read_point, write_point
from jaxcomp.prune.channels.selection import Scope
from jaxcomp.prune.channels.shrink import shrink
from jaxcomp.prune.channels.smaller_model import SmallerModel
from jaxcomp.prune.schedules import check_sparsity
from jaxcomp.sharding import automatic, spec_like

Goal = float | Budget
Finetune = Callable[[SmallerModel, Any, int], tuple[Any, Any]]


class Iterated(NamedTuple):
    """What is left after the last step.

    Attributes:
        model: the smaller model, with fine-tuned parameters.
        state: the state that the last fine-tuning returned.
    """

    model: SmallerModel
    state: Any


def channels_iteratively(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    finetune: Finetune,
    steps: int,
    sparsity: float | Sequence[float] | Callable[[int], Any] | None = None,
    budget: Budget | Sequence[Budget] | None = None,
    state: Any = None,
    directory: str | os.PathLike | None = None,
    score: Callable[[Any], Any] = channel_scores.l1,
    scope: Scope = "layer",
    round_to: int = 1,
    keep: str | Iterable[str] = (),
    limits: Mapping[str, float] | None = None,
    also: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]] = (),
    renormalize: bool = False,
    loss: Callable[..., Any] | None = None,
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    key: Any = None,
    progress: bool | None = None,
) -> Iterated:
    """Remove channels a few at a time, and fine-tune the smaller model after each cut.

    Every step scores the weights that the fine-tuning before it left, as the full-size model with
    zeros where channels are gone. What is gone stays gone, so that in scope "layer" the last step
    has the very widths that :func:`channels` has at once; in scope "global" as many channels are
    removed in all (with ``round_to``, to a block).

    Args:
        apply_fn: the model, as in :func:`channels`.
        params: its parameters.
        *inputs: an example batch.
        finetune: ``params, state = finetune(smaller, state, step)``, called after each cut with
            the step from 0. ``smaller`` is cut from the full-size model, however many steps there
            were: its ``apply``, ``rewrite`` and ``shrink`` take what belongs to that. It returns
            the new ``smaller.params``. The last step is what the function returns; to keep another
            one, hold on to ``dataclasses.replace(smaller, params=params)``.
        steps: how many cuts.
        sparsity: fraction of the channels removed in the end, in equal steps; or that after each
            step, as a sequence or as a function of the cuts so far, 1 to ``steps``, such as
            ``prune.cubic(0.5, begin=0, end=steps)``.
        budget: what the smaller model may cost at most in the end, from the dense cost in equal
            steps; or that after each step. One of milliseconds is measured, so it only stands in a
            sequence: ``(Budget(flops=0.7), Budget(milliseconds=3))``.
        state: any pytree that goes with the parameters, such as an optimizer state; full-size here,
            and cut by :func:`shrink` with the parameters.
        directory: where the last finished step is kept, in a file ``channels.jxc``. The same call
            goes on after it, and comes to the same result bit for bit; what ``apply_fn``, ``loss``,
            ``batches`` and ``finetune`` do is not in the file, and must be the same. With it, the
            state keeps its structure.
        score: as in :func:`channels`, like all that follow.
        scope: ``"layer"`` or ``"global"``.
        round_to: the widths that stay are multiples of this.
        keep: patterns of groups that stay whole.
        limits: the greatest sparsity of groups, by pattern.
        also: other functions of the same parameters, each with its inputs, that must run on the
            smaller ones too.
        renormalize: also cut widths that statistics are taken over. Scores that read data see the
            model with zeros there, which differs.
        loss: ``loss(params, *batch) -> scalar``, of full-size parameters.
        batches: tuples, read once a step: a list or another iterable that starts over, or a
            function that returns one.
        key: a PRNG key, for random scores.
        progress: whether to show a progress bar; None: on a terminal, if it takes long.

    Returns:
        The smaller model and the state.

    Raises:
        TypeError: as :func:`channels`; ``batches`` can be read only once; ``finetune`` returned
            something else than parameters and a state, or the state cannot be written.
        ValueError: as :func:`channels`; steps that bring channels back; ``finetune`` returned
            parameters of other shapes or dtypes, or, with a directory, a state of another
            structure; the file was written by another call.
        CheckpointError: the file is damaged.

    Example:
        >>> def mlp(p, x):
        ...     return jax.nn.relu(x @ p["w0"] + p["b0"]) @ p["w1"]
        >>> params = {
        ...     "w0": jnp.arange(24.0).reshape(3, 8), "b0": jnp.ones(8), "w1": jnp.ones((8, 2))
        ... }
        >>> def finetune(smaller, state, step):
        ...     print(step, smaller.params["b0"].shape)
        ...     return jax.tree.map(lambda leaf: 0.9 * leaf, smaller.params), state
        >>> model, _ = channels_iteratively(
        ...     mlp, params, jnp.ones((1, 3)), finetune=finetune, steps=2, sparsity=0.5
        ... )
        0 (6,)
        1 (4,)
        >>> model.shapes["w1"]
        ((8, 2), (4, 2))
    """
    _check(finetune, steps, batches)
    options = Options(
        score, scope, round_to, as_patterns(keep), limits, renormalize, loss, None, key, False
    )
    model = trace_model(apply_fn, params, inputs, renormalize, also)
    goals = _goals(sparsity, budget, steps, size_of(model.coupling, {}))
    full = shapes_of(params)
    point = Point(0, {}, (), params, state)
    path = call = None
    if directory is not None:
        call = _describe_call(model, goals, options, params, state)
        path = file_in(directory, FILE)
        if os.path.exists(path):
            point = _resume(path, call, steps, model, full, point)
    for step in watched(range(point.done, steps), "removing channels", progress):
        now = options._replace(batches=batches() if callable(batches) else batches)
        smaller, point = _cut(model, full, point, goals, now)
        before = jax.tree.structure(point.state)
        new, state = _finetuned(finetune, smaller, point.state, step)
        point = point._replace(done=step + 1, params=new, state=state)
        if path is not None and call is not None:
            _check_structure(before, jax.tree.structure(state))
            write_point(path, call, point)
    kept = kept_positions(model.coupling, point.units)
    params = expand(point.params, full, kept)
    return Iterated(build(model, params, point.units, point.notes, renormalize), point.state)


def expand(params: Any, like_params: Any, kept: Mapping[str, tuple[Any, ...]]) -> Any:
    """Put smaller parameters back to where they were cut from, with zeros around them.

    Args:
        params: smaller parameters.
        like_params: the full-size ones, or their shapes.
        kept: by path, for each axis the positions that stayed, or None for all.

    Returns:
        A tree of the shapes of ``like_params``.

    Raises:
        ValueError: a leaf is missing, or has another shape than the cut gave it.

    Example:
        >>> kept = {"kernel": (None, np.array([0, 2]))}
        >>> expand({"kernel": jnp.ones((1, 2))}, {"kernel": jnp.ones((1, 3))}, kept)
        {'kernel': Array([[1., 0., 1.]], dtype=float32)}
    """
    leaves = tree_lib.flatten(params, is_leaf=lambda _: False)
    news = {}
    for path, full in tree_lib.flatten(like_params, is_leaf=lambda _: False).items():
        if path not in leaves:
            raise ValueError(f"'{path}' is missing; {tree_lib.nearest(path, leaves)}")
        leaf, shape = leaves[path], tuple(full.shape)
        places = kept.get(path, (None,) * len(shape))
        pairs = zip(shape, places, strict=True)
        expected = tuple(size if at is None else len(at) for size, at in pairs)
        if tuple(leaf.shape) != expected:
            raise ValueError(f"{path}: shape {tuple(leaf.shape)}, but the cut gave {expected}")
        if any(at is not None for at in places):
            news[path] = _scatter(leaf, shape, places)
    return tree_lib.replace(params, news)


def _scatter(leaf: Any, shape: tuple[int, ...], places: tuple[Any, ...]) -> Any:
    def put(array: Any) -> Any:
        for axis, (size, at) in enumerate(zip(shape, places, strict=True)):
            if at is None:
                continue
            if isinstance(array, np.ndarray):
                whole = np.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), array.dtype)
                whole[(slice(None),) * axis + (at,)] = array
                array = whole
            else:
                # Read by index, not written: a position that is gone reads past the end, a zero.
                reader = np.full(size, len(at))
                reader[at] = np.arange(len(at))
                array = jnp.take(array, reader, axis=axis, mode="fill", fill_value=0)
        return array

    if isinstance(leaf, np.ndarray) or on_host(leaf) is not leaf:
        return at_once(put, leaf)
    return automatic(put, out=spec_like(leaf, shape))(leaf)


def _cut(
    model: Model, full: Any, point: Point, goals: Sequence[Goal], options: Options
) -> tuple[SmallerModel, Point]:
    """The next cut, and what belongs to it, before it is fine-tuned."""
    before = kept_positions(model.coupling, point.units)
    params = expand(point.params, full, before)
    gone = {name: ~mask for name, mask in point.units.items() if not mask.all()}
    order = rank(model, params, options, gone)
    last = goals[-1]
    if not point.done and isinstance(last, Budget) and last.kind != "milliseconds":
        # A budget that can never be met is refused before anything is fine-tuned.
        decide(order, model, params, last, options)
    units, notes = decide(order, model, params, goals[point.done], options)
    smaller = build(model, params, units, notes, options.renormalize)
    further = _relative(before, smaller.kept)
    state = shrink(point.state, shapes_of(point.params), further)
    return smaller, Point(point.done, units, notes, smaller.params, state)


def _relative(before: Kept, after: Kept) -> Kept:
    """Which of the positions that stayed before stay now, by their place among them."""

    def within(old: Any, new: Any) -> Any:
        if old is None or new is None:
            return new
        return None if len(old) == len(new) else np.searchsorted(old, new)

    return {
        path: tuple(within(old, new) for old, new in zip(before[path], axes, strict=True))
        for path, axes in after.items()
    }


def _finetuned(finetune: Finetune, smaller: SmallerModel, state: Any, step: int) -> tuple[Any, Any]:
    returned = finetune(smaller, state, step)
    if type(returned) is not tuple or len(returned) != 2:
        raise TypeError(
            f"finetune must return (params, state), not {type(returned).__name__}: without a "
            "state, return (params, None)"
        )
    params, state = returned
    old, new = jax.tree.structure(smaller.params), jax.tree.structure(params)
    if old != new:
        raise ValueError(f"finetune returned parameters of structure {new}, not {old}")
    leaves = tree_lib.flatten(params, is_leaf=lambda _: False)
    for path, leaf in tree_lib.flatten(smaller.params, is_leaf=lambda _: False).items():
        found = getattr(leaves[path], "shape", None), getattr(leaves[path], "dtype", None)
        if found != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{path}: finetune returned {found[1]} {found[0]}, but it was given {leaf.dtype} "
                f"{leaf.shape}: train the parameters that it is given"
            )
    return params, state


def _goals(
    sparsity: float | Sequence[float] | Callable[[int], Any] | None,
    budget: Budget | Sequence[Budget] | None,
    steps: int,
    dense: Size,
) -> list[Goal]:
    """What each step comes to; budgets in absolute numbers, since every model after is smaller."""
    if (sparsity is None) == (budget is None):
        raise ValueError("give sparsity=, such as 0.5, or budget=, such as Budget(flops=0.5)")
    if budget is not None:
        return list(_budgets(budget, steps, dense))
    if callable(sparsity):
        given = [float(sparsity(cuts)) for cuts in range(1, steps + 1)]
    elif isinstance(sparsity, Sequence):
        given = [float(each) for each in sparsity]
    else:
        assert sparsity is not None
        check_sparsity("sparsity", sparsity)
        given = [sparsity * cuts / steps for cuts in range(1, steps)] + [sparsity]
    _check_length("sparsity", given, steps)
    for each in given:
        check_sparsity("sparsity", each)
    for earlier, later in itertools.pairwise(given):
        if later < earlier:
            raise ValueError(f"sparsity falls from {earlier} to {later}: what is gone is gone")
    return [*given]


def _budgets(budget: Budget | Sequence[Budget], steps: int, dense: Size) -> Iterator[Budget]:
    given = [budget] if isinstance(budget, Budget) else list(budget)
    for each in given:
        if not isinstance(each, Budget):
            raise TypeError(f"budget must be prune.Budgets, such as Budget(flops=0.5), not {each}")
    if not isinstance(budget, Budget):
        _check_length("budget", given, steps)
    elif budget.kind == "milliseconds" and steps > 1:
        raise ValueError(
            "a budget of milliseconds is measured, so the steps before are not known: give one "
            "for each step, such as (Budget(flops=0.7), Budget(milliseconds=3))"
        )
    limits: dict[str, int | float] = {}
    for each in given:
        kind = each.kind
        cost = 0 if kind == "milliseconds" else getattr(dense, kind)
        limit = each.limit(cost)
        if limit > limits.get(kind, limit):
            raise ValueError(f"budget rises from {limits[kind]} to {limit} {kind}")
        limits[kind] = limit
        left = range(steps - 1, -1, -1) if isinstance(budget, Budget) else (0,)
        for cuts in left:
            between = limit if kind == "milliseconds" else limit + (cost - limit) * cuts // steps
            yield Budget(**{kind: max(1, between) if kind != "milliseconds" else between})


def _check_length(name: str, given: Sequence[Any], steps: int) -> None:
    if len(given) != steps:
        raise ValueError(f"{name}: {len(given)} given for {steps} steps: give one for each")


def _check(finetune: Any, steps: int, batches: Any) -> None:
    if not callable(finetune):
        raise TypeError(f"finetune must be a function of (smaller, state, step), not {finetune!r}")
    if isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches: {type(batches).__name__} can be read only once, and every step reads it: "
            "pass a list, or a function that returns a new iterator"
        )


def _check_structure(before: Any, after: Any) -> None:
    if before != after:
        raise ValueError(
            f"state: finetune was given the structure {before} and returned {after}: such a state "
            "cannot be restored; pass state= as finetune returns it, such as tx.init(params), or "
            "leave out directory"
        )


def _describe_call(
    model: Model, goals: Sequence[Goal], options: Options, params: Any, state: Any
) -> dict[str, str]:
    """What tells this call from another one, as far as a file can say."""
    score = getattr(options.score, "function", options.score)
    numbers = [f"{g.kind} {getattr(g, g.kind)}" if isinstance(g, Budget) else g for g in goals]
    free = [f"{group.name} ({group.size})" for group in model.coupling.groups if not group.fixed]
    return {
        "number of steps": str(len(goals)),
        "sparsity or budget": str(numbers),
        "score": getattr(score, "__qualname__", type(score).__qualname__),
        "scope": options.scope,
        "round_to": str(options.round_to),
        "keep": str(options.keep),
        "limits": str(sorted((options.limits or {}).items())),
        "renormalize": str(options.renormalize),
        "set of channels": ", ".join(free),
        **describe("key", options.key),
        **describe("params", params),
        **describe("state", state),
    }


def _resume(
    path: str, call: Mapping[str, str], steps: int, model: Model, full: Any, start: Point
) -> Point:
    sizes = {group.name: group.size for group in model.coupling.groups if not group.fixed}

    def shrunk(units: Any) -> tuple[Any, Any]:
        kept = kept_positions(model.coupling, units)
        return shrink(start.params, full, kept), shrink(start.state, full, kept)

    return read_point(path, call, steps, sizes, shrunk)
