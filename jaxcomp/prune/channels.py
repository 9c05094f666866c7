"""Remove channels for real: neurons, filters and heads leave the parameters, and the model runs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import is_compressed
from jaxcomp.model.couple import ChannelGroup, Coupling, analyse
from jaxcomp.model.program import read
from jaxcomp.model.rewrite import rewrite
from jaxcomp.prune import channel_scores
from jaxcomp.prune.budget import Budget, Met, meet, meet_time
from jaxcomp.prune.channel_evidence import Evidence, gather_evidence
from jaxcomp.prune.channel_groups import evaluate, needs_of, scored_group
from jaxcomp.prune.channel_selection import (
    Kept,
    RemovalOrder,
    Scope,
    at_level,
    level_of,
    match_groups,
    removal_order,
    shortfalls,
)
from jaxcomp.prune.shrink import shrink
from jaxcomp.prune.smaller_model import SmallerModel, kept_positions, masked, size_of

# Fixed for every model alike, and no news: not worth a line of the print-out.
_PLAIN_REASONS = ("is an axis of the model's", "slides along it", "walks along it")


def channels(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    score: Callable[[Any], Any] = channel_scores.l1,
    sparsity: float | None = None,
    budget: Budget | None = None,
    scope: Scope = "layer",
    round_to: int = 1,
    keep: Iterable[str] = (),
    limits: Mapping[str, float] | None = None,
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
        score: a function of a :class:`~jaxcomp.prune.channel_groups.ScoredGroup`, such as those of
            :mod:`jaxcomp.prune.channel_scores`; the lowest go.
        sparsity: fraction of the channels to remove, in [0, 1).
        budget: what the smaller model may cost at most, instead of a sparsity.
        scope: ``"layer"``: the same fraction of every group; ``"global"``: the lowest anywhere.
        round_to: each axis that is cut keeps a multiple of this width, such as 8 or 128.
        keep: patterns of groups, or of leaves that they cut, that stay whole.
        limits: the greatest sparsity of groups, by pattern.
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
        Array([[178., 178.]], dtype=float32)
    """
    if (sparsity is None) == (budget is None):
        raise ValueError("give sparsity=, such as 0.5, or budget=, such as Budget(flops=0.5)")
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(f"budget must be a prune.Budget, such as Budget(flops=0.5), not {budget!r}")
    _check_dense(params)
    coupling = analyse(read(apply_fn, params, *inputs), renormalize)
    evidence = gather_evidence(
        needs_of(score), apply_fn, params, inputs,
        loss=loss, batches=batches, key=key, progress=progress,
    )  # fmt: skip
    keep = tuple(keep)
    names = {group.name: _names(group) for group in coupling.groups}
    order = removal_order(
        _scores(coupling, params, score, evidence, _kept_groups(keep, names)),
        scope,
        round_to=round_to,
        positions={g.name: [s.positions.shape[1] for s in g.slices] for g in coupling.groups},
        limits=limits,
        keep=keep,
        names=names,
    )
    if budget is None:
        assert sparsity is not None
        units = at_level(order, level_of(order, sparsity))
        notes = shortfalls(order, sparsity)
    else:
        met = _meet(budget, order, coupling, apply_fn, params, inputs, renormalize, progress)
        units, notes = met.selection, (_met(budget, met),)
    return _build(coupling, apply_fn, params, units, notes, renormalize)


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
    leaves = tree_lib.flatten(params, is_leaf=lambda _: False)
    free = [g for g in coupling.groups if g.fixed is None and g.name not in spared]
    if not free:
        reasons = (f"{g.name} {g.fixed or 'is named by keep'}" for g in coupling.groups)
        raise ValueError(f"no channel of this model can be cut: {'; '.join(reasons)}")
    return {
        group.name: np.asarray(
            evaluate(score, scored_group(group, leaves, **evidence._asdict())), np.float64
        )
        for group in free
    }


def _meet(
    budget: Budget,
    order: RemovalOrder,
    coupling: Coupling,
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: tuple[Any, ...],
    renormalize: bool,
    progress: bool | None,
) -> Met:
    select = lambda level: at_level(order, level)
    if budget.kind != "milliseconds":
        cost = lambda units: getattr(size_of(coupling, _keep(coupling, units)), budget.kind)
        return meet(budget, cost, select, order.levels)

    def prepare(units: Kept) -> Callable[[], Any]:
        kept = kept_positions(coupling, units)
        run = jax.jit(rewrite(apply_fn, _shapes(params), kept, renormalize))
        smaller = shrink(params, params, kept)
        return lambda: jax.block_until_ready(run(smaller, *inputs))

    return meet_time(budget, prepare, select, order.levels, progress=progress is not False)


def _met(budget: Budget, met: Met) -> str:
    timed = budget.kind == "milliseconds"
    show = (lambda cost: f"{cost:.3g} ms") if timed else (lambda cost: f"{cost:,} {budget.kind}")
    return f"budget: {show(met.cost)} of {show(met.limit)}"


def _keep(coupling: Coupling, units: Mapping[str, np.ndarray]) -> dict[Any, np.ndarray]:
    return {coupling.units[name]: mask for name, mask in units.items() if not mask.all()}


def _shapes(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def _build(
    coupling: Coupling,
    apply_fn: Callable[..., Any],
    params: Any,
    units: Kept,
    notes: tuple[str, ...],
    renormalize: bool,
) -> SmallerModel:
    kept = kept_positions(coupling, units)
    full, keep = _shapes(params), _keep(coupling, units)
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
        apply=rewrite(apply_fn, full, kept, renormalize),
        full_params=full,
        renormalize=renormalize,
    )
