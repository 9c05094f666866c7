"""Remove channels for real: neurons, filters and heads leave the parameters, and the model runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import is_compressed
from jaxcomp.model.couple import ChannelGroup, Coupling, analyse
from jaxcomp.model.placement import on_host
from jaxcomp.model.program import read
from jaxcomp.model.removed import kept_positions, masked, size_of
from jaxcomp.model.rewrite import rewrite
from jaxcomp.prune.channels import scores as channel_scores
from jaxcomp.prune.channels.budget import Budget, Met, meet, meet_time
from jaxcomp.prune.channels.evidence import Evidence, gather_evidence
from jaxcomp.prune.channels.groups import evaluate_all, needs_of, scored_group
from jaxcomp.prune.channels.selection import (
    Kept,
    RemovalOrder,
    Scope,
    at_level,
    level_of,
    match_groups,
    removal_order,
    shortfalls,
)
from jaxcomp.prune.channels.shrink import shrink
from jaxcomp.prune.channels.smaller_model import SmallerModel

# Fixed for every model alike, and no news: not worth a line of the print-out.
_PLAIN_REASONS = ("is an axis of the model's", "slides along it", "walks along it")


class Model(NamedTuple):
    """A traced model: the function, example inputs, and the coupling of its channels."""

    apply_fn: Callable[..., Any]
    inputs: tuple[Any, ...]
    coupling: Coupling


class Options(NamedTuple):
    """How channels are chosen: the arguments of :func:`channels` of the same names."""

    score: Callable[[Any], Any]
    scope: Scope
    round_to: int
    keep: tuple[str, ...]
    limits: Mapping[str, float] | None
    renormalize: bool
    loss: Callable[..., Any] | None
    batches: Iterable[Any] | None
    key: Any
    progress: bool | None


def channels(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    score: Callable[[Any], Any] = channel_scores.l1,
    sparsity: float | None = None,
    budget: Budget | None = None,
    scope: Scope = "layer",
    round_to: int = 1,
    keep: str | Iterable[str] = (),
    limits: Mapping[str, float] | None = None,
    also: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]] = (),
    renormalize: bool = False,
    loss: Callable[..., Any] | None = None,
    batches: Iterable[Any] | None = None,
    key: Any = None,
    progress: bool | None = None,
) -> SmallerModel:
    """Remove whole channels, and everything that depends on them, from a trained model.

    Neurons of dense layers, filters of convolutions, heads and head sizes of attention are all
    this one call: :func:`jaxcomp.model.couple` finds which slices of which leaves must go together,
    a score ranks them, and the lowest are cut out of the parameters. The masked model (the same
    channels zeroed) and the smaller one have equal outputs, to rounding.

    Args:
        apply_fn: the model as it is used for inference, a function of ``(params, *inputs)``.
        params: its parameters, with ``batch_stats`` and the like if it takes them.
        *inputs: an example batch; only shapes and dtypes matter, and other batch sizes will do
            later.
        score: a function of a :class:`~jaxcomp.prune.channels.groups.ScoredGroup`, such as those of
            :mod:`jaxcomp.prune.channels.scores`; the lowest go.
        sparsity: fraction of the channels to remove, in [0, 1).
        budget: what the smaller model may cost at most, instead of a sparsity.
        scope: ``"layer"``: the same fraction of every group; ``"global"``: the lowest anywhere.
        round_to: each axis that is cut keeps a multiple of this width, such as 8 or 128.
        keep: patterns of groups, or of leaves that they cut, that stay whole.
        limits: the greatest sparsity of groups, by pattern.
        also: other functions of the same parameters, each with its inputs, that must run on the
            smaller ones too: needed where training uses parameters that inference does not.
        renormalize: also cut widths that a mean, maximum or softmax is taken over, such as a
            LayerNorm's; it is then taken over the channels that remain, and masked and smaller
            differ there.
        loss: ``loss(params, *batch) -> scalar``, for scores that read gradients.
        batches: tuples, for scores that read data: the loss takes all of a tuple, the model its
            first ``len(inputs)`` items.
        key: a PRNG key, for random scores.
        progress: whether to show progress of long work; None: on a terminal, if it takes long.

    Returns:
        The smaller model.

    Raises:
        TypeError: a leaf of ``params`` is not an array or is compressed; ``budget`` is no
            :class:`Budget`.
        ValueError: not exactly one of ``sparsity`` and ``budget``; no channel can be cut (with the
            reasons); a pattern matches nothing; a score that is not finite; a budget that cannot be
            met; something that the score needs was not given.

    Example:
        >>> import jax.numpy as jnp
        >>> def mlp(p, x):
        ...     return jax.nn.relu(x @ p["w0"] + p["b0"]) @ p["w1"]
        >>> params = {
        ...     "w0": jnp.arange(24.0).reshape(3, 8), "b0": jnp.ones(8), "w1": jnp.ones((8, 2))
        ... }
        >>> smaller = channels(mlp, params, jnp.ones((1, 3)), sparsity=0.5)
        >>> print(smaller)
        b0 (8,) → (4,)
        w0 (3, 8) → (3, 4)
        w1 (8, 2) → (4, 2)
        MACs: 40 → 20 (50.0%)
        FLOPs: 96 → 48 (50.0%)
        parameters: 48 → 24 (50.0%)
        bytes: 192 → 96 (50.0%)
        >>> smaller.apply(smaller.params, jnp.ones((1, 3)))
        Array([[166., 166.]], dtype=float32)
    """
    goal = sparsity if budget is None else budget
    if goal is None or (sparsity is not None and budget is not None):
        raise ValueError("give sparsity=, such as 0.5, or budget=, such as Budget(flops=0.5)")
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(f"budget must be a prune.Budget, such as Budget(flops=0.5), not {budget!r}")
    options = Options(
        score, scope, round_to, as_patterns(keep), limits, renormalize, loss, batches, key, progress
    )
    model = trace_model(apply_fn, params, inputs, renormalize, also)
    order = rank(model, params, options)
    units, notes = decide(order, model, params, goal, options)
    return build(model, params, units, notes, renormalize)


def as_patterns(keep: str | Iterable[str]) -> tuple[str, ...]:
    """One pattern, or several."""
    return (keep,) if isinstance(keep, str) else tuple(keep)


def trace_model(
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: tuple[Any, ...],
    renormalize: bool,
    also: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]] = (),
) -> Model:
    """Read a model whose channels are to be removed.

    Args:
        apply_fn: the model.
        params: its parameters, dense.
        inputs: an example batch.
        renormalize: as in :func:`channels`.
        also: as in :func:`channels`.

    Returns:
        The model with its coupling.

    Raises:
        TypeError: a leaf of ``params`` is not an array or is compressed.
    """
    _check_dense(params)
    others = [read(function, params, *given) for function, given in also]
    coupling = analyse(read(apply_fn, params, *inputs), others, renormalize)
    return Model(apply_fn, inputs, coupling)


def rank(
    model: Model, params: Any, options: Options, gone: Mapping[str, np.ndarray] | None = None
) -> RemovalOrder:
    """Score all channels and put their removal into one order.

    Args:
        model: the traced model.
        params: the full-size parameters, zero where channels are gone.
        options: how channels are chosen.
        gone: by group, (units,) booleans, True where a unit is gone already.

    Returns:
        The order.

    Raises:
        ValueError: as :func:`channels`.
    """
    evidence = gather_evidence(
        needs_of(options.score), model.apply_fn, params, model.inputs,
        loss=options.loss, batches=options.batches, key=options.key, progress=options.progress,
    )  # fmt: skip
    groups = model.coupling.groups
    if gone:
        evidence = _without(evidence, model.coupling, gone)
    names = {group.name: _names(group) for group in groups}
    spared = _kept_groups(options.keep, names)
    return removal_order(
        _scores(model.coupling, params, options.score, evidence, spared),
        options.scope,
        round_to=options.round_to,
        positions={g.name: [s.positions.shape[1] for s in g.slices] for g in groups},
        limits=options.limits,
        keep=options.keep,
        names=names,
        gone=gone,
    )


def decide(
    order: RemovalOrder, model: Model, params: Any, goal: float | Budget, options: Options
) -> tuple[Kept, tuple[str, ...]]:
    """How far along an order to go.

    Args:
        order: from :func:`rank`.
        model: the traced model.
        params: the full-size parameters, to measure time with.
        goal: a sparsity or a budget.
        options: how channels are chosen.

    Returns:
        By group, which units stay; and notes for the report.

    Raises:
        ValueError: the budget cannot be met.
    """
    if isinstance(goal, Budget):
        met = _meet(goal, order, model, params, options)
        return met.selection, (_met(goal, met),)
    return at_level(order, level_of(order, goal)), shortfalls(order, goal)


def _without(evidence: Evidence, coupling: Coupling, gone: Mapping[str, np.ndarray]) -> Evidence:
    """No gradients where weights are gone: the smaller model has none there."""
    kept = kept_positions(coupling, {name: ~lost for name, lost in gone.items()})
    fields = ("gradients", "squared_gradients")
    given = {name: getattr(evidence, name) for name in fields}
    return evidence._replace(
        **{name: masked(tree, kept) for name, tree in given.items() if tree is not None}
    )


def _check_dense(params: Any) -> None:
    for path, leaf in tree_lib.flatten(params).items():
        if is_compressed(leaf):
            raise TypeError(
                f"{path}: {type(leaf).__name__} is compressed already: remove channels first, or "
                "pass jaxcomp.decode(params)"
            )


def _names(group: ChannelGroup) -> list[str]:
    return [name for s in group.slices for name in (f"{s.path}[{s.axis}]", s.path)]


def _kept_groups(keep: Iterable[str], names: Mapping[str, list[str]]) -> set[str]:
    every = {name: (name, *others) for name, others in names.items()}
    return {group for pattern in keep for group in match_groups(pattern, every)}


def _scores(
    coupling: Coupling,
    params: Any,
    score: Callable[[Any], Any],
    evidence: Evidence,
    spared: set[str],
) -> dict[str, np.ndarray]:
    leaves = {
        path: on_host(leaf)
        for path, leaf in tree_lib.flatten(params, is_leaf=lambda _: False).items()
    }
    free = [g for g in coupling.groups if g.fixed is None and g.name not in spared]
    if not free:
        reasons = (f"{g.name} {g.fixed or 'is named by keep'}" for g in coupling.groups)
        raise ValueError(f"no channel of this model can be cut: {'; '.join(reasons)}")
    groups = [scored_group(group, leaves, **evidence._asdict()) for group in free]
    scores = evaluate_all(score, groups)
    return {g.name: np.asarray(s, np.float64) for g, s in zip(groups, scores, strict=True)}


def _meet(
    budget: Budget,
    order: RemovalOrder,
    model: Model,
    params: Any,
    options: Options,
) -> Met:
    apply_fn, inputs, coupling = model
    select = lambda level: at_level(order, level)
    if budget.kind != "milliseconds":
        cost = lambda units: getattr(size_of(coupling, _keep(coupling, units)), budget.kind)
        return meet(budget, cost, select, order.levels)

    def prepare(units: Kept) -> Callable[[], Any]:
        kept = kept_positions(coupling, units)
        run = jax.jit(rewrite(apply_fn, shapes_of(params), kept, options.renormalize))
        smaller = shrink(params, params, kept)
        return lambda: jax.block_until_ready(run(smaller, *inputs))

    return meet_time(budget, prepare, select, order.levels, progress=options.progress is not False)


def _met(budget: Budget, met: Met) -> str:
    timed = budget.kind == "milliseconds"
    show = (lambda cost: f"{cost:.3g} ms") if timed else (lambda cost: f"{cost:,} {budget.kind}")
    return f"budget: {show(met.cost)} of {show(met.limit)}"


def _keep(coupling: Coupling, units: Mapping[str, np.ndarray]) -> dict[Any, np.ndarray]:
    return {coupling.units[name]: mask for name, mask in units.items() if not mask.all()}


def shapes_of(params: Any) -> Any:
    """The same tree with shapes and dtypes for arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def build(
    model: Model, params: Any, units: Kept, notes: tuple[str, ...], renormalize: bool
) -> SmallerModel:
    """Cut, and say what was cut.

    Args:
        model: the traced model.
        params: the full-size parameters.
        units: by group, which units stay; groups that are not named stay whole.
        notes: for the report.
        renormalize: as in :func:`channels`.

    Returns:
        The smaller model.
    """
    coupling = model.coupling
    kept = kept_positions(coupling, units)
    full, keep = shapes_of(params), _keep(coupling, units)
    smaller = shrink(params, full, kept)
    before = tree_lib.flatten(full, is_leaf=lambda _: False)
    after = tree_lib.flatten(smaller, is_leaf=lambda _: False)
    cut = [path for path, positions in kept.items() if any(p is not None for p in positions)]
    fixed = {
        group.name: group.fixed
        for group in coupling.groups
        if group.fixed is not None and not any(words in group.fixed for words in _PLAIN_REASONS)
    }
    changed = tuple(
        f"{group.name}: {group.note}: masked and smaller differ"
        for group in coupling.groups
        if group.note is not None and not units.get(group.name, np.ones(1, bool)).all()
    )
    return SmallerModel(
        params=smaller,
        masked=masked(params, kept),
        kept=kept,
        shapes={path: (before[path].shape, tuple(after[path].shape)) for path in cut},
        before=size_of(coupling, {}),
        after=size_of(coupling, keep),
        fixed=fixed,
        notes=(*changed, *notes),
        apply=rewrite(model.apply_fn, full, kept, renormalize),
        full_params=full,
        renormalize=renormalize,
    )
