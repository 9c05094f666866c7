"""The highest sparsity whose drop on a validation set stays within bounds."""

import functools
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import columns
from jaxcomp import tree as tree_lib
from jaxcomp.checkpoint.records import Record, Records
from jaxcomp.checks import check_amount, check_count, check_function, is_number
from jaxcomp.model.progress import watched
from jaxcomp.prune import scores as scores_lib
from jaxcomp.prune.allocation import Allocation, global_threshold
from jaxcomp.prune.masks import Structures, apply_masks, renew, resolve
from jaxcomp.prune.post_training import study
from jaxcomp.prune.schedules import check_sparsity
from jaxcomp.prune.scores import Score
from jaxcomp.prune.structures import Element

FILE = "to_accuracy.jxc"
Reason = Literal["tolerance", "highest", "lowest", "max_evaluations", "max_seconds", "interrupted"]
Candidate = Callable[[float], tuple[dict[str, Any], tuple[int, ...]]]


class Trial(NamedTuple):
    """One sparsity that was tried.

    Attributes:
        asked: the sparsity that the masks were made for.
        sparsity: the exact fraction of the weights that they remove.
        value: what ``evaluate`` returned; NaN where it failed, or was not called.
        within: whether the value is within ``max_drop`` of the dense one.
        seconds: what it took.
        empty: a leaf that would have been left with nothing, so that nothing was evaluated.
    """

    asked: float
    sparsity: float
    value: float
    within: bool
    seconds: float
    empty: str | None = None


class ToAccuracy(NamedTuple):
    """The highest sparsity found.

    Attributes:
        params: the parameters, zero where they are pruned.
        masks: a tree like them; True where a weight is kept.
        sparsity: the exact fraction of the weights that is removed, of those that take part.
        value: what ``evaluate`` returned for ``params``.
        dense_value: what it returned for the dense ones.
        max_drop: by how much ``value`` may fall short of it.
        history: what was tried, in order; the first is the dense network.
        stopped_by: ``"tolerance"``: a sparsity that much higher was tried and is not within bounds;
            ``"highest"``: even ``highest`` is; ``"lowest"``: not even ``lowest`` is, and ``params``
            are dense; ``"max_evaluations"``, ``"max_seconds"`` or ``"interrupted"``: this is the
            best until then.
    """

    params: Any
    masks: Any
    sparsity: float
    value: float
    dense_value: float
    max_drop: float
    history: tuple[Trial, ...]
    stopped_by: Reason

    def __str__(self) -> str:
        """A table of what was tried."""
        rows = [("asked", "sparsity", "value", "drop", "", "seconds")]
        for trial in self.history:
            drop = self.dense_value - trial.value
            verdict = "within" if trial.within else "failed" if math.isnan(drop) else "too much"
            words = f"{trial.empty} is left empty" if trial.empty else verdict
            numbers = (f"{trial.sparsity:.3%}", f"{trial.value:.6g}", f"{drop:.3g}")
            rows.append((f"{trial.asked:.3%}", *numbers, words, f"{trial.seconds:.2f}"))
        return (
            f"{columns.table(rows)}\n"
            f"best: {self.sparsity:.3%} removed, value {self.value:.6g} (dense "
            f"{self.dense_value:.6g}, drop at most {self.max_drop:.3g}); stopped by "
            f"{self.stopped_by}"
        )


def to_accuracy(
    params: Any,
    evaluate: Callable[[Any], Any],
    max_drop: float,
    *,
    score: Score = scores_lib.magnitude,
    evidence: Any = None,
    structure: Structures = Element(),  # noqa: B008
    allocation: Allocation = global_threshold,
    paths: str | Iterable[str] | None = None,
    tolerance: float = 0.005,
    lowest: float = 0.0,
    highest: float = 0.999,
    max_evaluations: int | None = None,
    max_seconds: float | None = None,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> ToAccuracy:
    """Find the highest sparsity at which ``evaluate`` drops by at most ``max_drop``.

    Begins at half of the weights and halves what is kept as long as the drop is within bounds, or
    halves what is removed until it is; then halves the interval between the highest sparsity that
    is and the lowest that is not. Each sparsity prunes the dense parameters anew. What is returned
    was evaluated and is within bounds, however noisy ``evaluate`` is; only that no higher sparsity
    is takes an ``evaluate`` that falls with sparsity. To fine-tune before judging, do it inside
    ``evaluate``.

    Args:
        params: a parameter tree, or a selection.
        evaluate: ``evaluate(params) -> number``, higher is better, such as an accuracy on held-out
            data; for a loss, ``lambda params: -loss(params)``. The same parameters must give the
            same number. NaN and infinities count as failed.
        max_drop: by how much the number may fall, in its own unit; at least 0.
        score: function of a leaf and its evidence; the lowest go first.
        evidence: what the score reads: a tree like ``params``, or a selection by path.
        structure: what goes together, as in :func:`jaxcomp.prune.masks`; N:M removes at most
            ``1 - n/m`` of a leaf, whatever is asked.
        allocation: how a sparsity is spread over the leaves. One threshold over all of them, by
            default, so that layers which need their weights keep them and the sparsity that is
            found is higher (:data:`~jaxcomp.prune.allocation.lamp` may find more by magnitudes);
            scores that do not compare across layers need another one.
        paths: patterns of the weights that are pruned; None: all.
        tolerance: where to stop halving, in sparsity.
        lowest: sparsities below are not tried.
        highest: nor are those above.
        max_evaluations: how often ``evaluate`` may be called at most, the dense call and those of
            earlier runs included.
        max_seconds: no evaluation begins after this much time spent in them, likewise.
        directory: where finished evaluations are kept, in a file ``to_accuracy.jxc``. The same call
            goes on after a kill and comes to the same result bit for bit. Bounds, tolerance and
            budgets may change from call to call; what ``evaluate`` does must not, and is not in the
            file.
        progress: whether to show a progress bar; None: on a terminal, if it takes long.
        clock: seconds that only rise.

    Returns:
        The parameters, their masks and the history. Ctrl-C ends the search early and returns the
        best until then, once the dense parameters are evaluated.

    Raises:
        TypeError: ``evaluate`` or the score is no function, ``evaluate`` returns no real number,
            a number is none.
        ValueError: ``evaluate`` is not finite for the dense parameters, a number outside its range,
            weights, scores or a structure as in :func:`jaxcomp.prune.masks`, or another call wrote
            the file.
        CheckpointError: the file is damaged.

    Example:
        >>> weights = {"kernel": jnp.arange(1.0, 101.0).reshape(10, 10)}
        >>> kept = lambda params: jnp.sum(params["kernel"]) / 5050
        >>> found = to_accuracy(weights, kept, max_drop=0.1)
        >>> found.sparsity, found.stopped_by
        (0.31, 'tolerance')
        >>> print(found)
        asked    sparsity     value    drop            seconds
        0.000%     0.000%         1       0    within     ...
        50.000%   50.000%  0.747525   0.252  too much     ...
        25.000%   25.000%  0.935644  0.0644    within     ...
        ...
    """
    check_function("evaluate", evaluate, "params that returns one number")
    check_function("clock", clock, "nothing that returns seconds")
    if not isinstance(allocation, Allocation):
        raise TypeError(f"allocation must be one, such as allocation.lamp, not {allocation!r:.60}")
    _check_numbers(max_drop, tolerance, lowest, highest, max_evaluations, max_seconds)
    scores = study.score_leaves(params, score, evidence, paths)
    candidate = _maker(scores, structure, allocation)
    for probe in (lowest, highest):
        # What no sparsity mends is refused before anything is evaluated.
        candidate(probe)
    records = Records.open(
        directory, FILE, lambda: _identify(params, scores, candidate, structure, allocation)
    )

    def evaluated(masks: dict[str, Any], removed: tuple[int, ...]) -> Record:
        start = clock()
        name = " ".join(map(str, removed))
        if name not in records.found:
            pruned = apply_masks(params, tree_lib.Leaves(masks)) if any(removed) else params
            value = study.check_value(evaluate(pruned))
            records.add({name: Record(removed, value, clock() - start)})
        return records.found[name]

    sizes = {name: leaf.size for name, leaf in scores.items()}
    search = _Search(candidate, evaluated, sizes, max_drop, max_evaluations, max_seconds)
    history: list[Trial] = []
    reason: Reason = "interrupted"
    try:
        trials = search.trials(_bisection(lowest, highest, tolerance))
        for found in watched(trials, "looking for the highest sparsity", progress):
            if isinstance(found, Trial):
                history.append(found)
            else:
                reason = found
    except KeyboardInterrupt:
        if not history:
            raise
    best = max((trial for trial in history if trial.within), key=lambda trial: trial.sparsity)
    return _result(params, candidate, best, max_drop, history, reason)


class _Search(NamedTuple):
    """What the trials of one call have in common."""

    candidate: Candidate
    evaluated: Callable[[dict[str, Any], tuple[int, ...]], Record]
    sizes: dict[str, int]
    max_drop: float
    max_evaluations: int | None
    max_seconds: float | None

    def trials(self, proposals: Generator[float, bool, Reason]) -> Iterator[Trial | Reason]:
        """Every mask once, the dense one first; in the end, why it ends."""
        dense = self.evaluated({}, (0,) * len(self.sizes))
        if not math.isfinite(dense.value):
            raise ValueError(
                f"evaluate gave {dense.value} for the dense parameters: there is nothing to compare"
            )
        first = Trial(0.0, 0.0, dense.value, True, dense.seconds)
        seen = {dense.counts: first}
        yield first
        asked = next(proposals)
        while True:
            masks, removed = self.candidate(asked)
            if removed not in seen:
                empty = self._empty(removed)
                stop = None if empty else self._spent(list(seen.values()))
                if stop is not None:
                    yield stop
                    return
                fraction = sum(removed) / sum(self.sizes.values())
                trial = Trial(asked, fraction, math.nan, False, 0.0, empty)
                if not empty:
                    _, value, seconds = self.evaluated(masks, removed)
                    within = math.isfinite(value) and dense.value - value <= self.max_drop
                    trial = trial._replace(value=value, within=within, seconds=seconds)
                seen[removed] = trial
                yield trial
            try:
                asked = proposals.send(seen[removed].within)
            except StopIteration as end:
                yield end.value
                return

    def _empty(self, removed: tuple[int, ...]) -> str | None:
        pairs = zip(self.sizes.items(), removed, strict=True)
        return next((path for (path, size), gone in pairs if gone == size), None)

    def _spent(self, trials: list[Trial]) -> Reason | None:
        calls = sum(trial.empty is None for trial in trials)
        if self.max_evaluations is not None and calls >= self.max_evaluations:
            return "max_evaluations"
        seconds = sum(trial.seconds for trial in trials)
        if self.max_seconds is not None and seconds >= self.max_seconds:
            return "max_seconds"
        return None


def _bisection(lowest: float, highest: float, tolerance: float) -> Generator[float, bool, Reason]:
    """Sparsities to try; is sent whether each is within bounds, and returns why it ends."""
    now = min(max(0.5, lowest), highest)
    if (yield now):
        while True:
            good = now
            if good == highest:
                return "highest"
            now = min(1 - (1 - good) / 2, highest)
            if not (yield now):
                bad = now
                break
    else:
        while True:
            bad = now
            if bad == lowest:
                return "lowest"
            now = bad / 2 if bad / 2 > max(lowest, tolerance) else lowest
            if (yield now):
                good = now
                break
    while bad - good > tolerance:
        now = (good + bad) / 2
        good, bad = (now, bad) if (yield now) else (good, now)
    return "tolerance"


def _maker(scores: tree_lib.Leaves, structure: Structures, allocation: Allocation) -> Candidate:
    """From a sparsity to masks, and to the weights that they remove from each leaf."""
    structures = tuple(resolve(structure, scores).items())

    def candidate(sparsity: float) -> tuple[dict[str, Any], tuple[int, ...]]:
        kept, removed = _masks(scores, np.float32(sparsity), structures, allocation)
        return kept, tuple(np.asarray(removed).tolist())

    return candidate


@functools.partial(jax.jit, static_argnames=("structures", "allocation"))
def _masks(scores: Any, sparsity: Any, structures: Any, allocation: Allocation) -> Any:
    kept = renew(scores, sparsity, dict(structures), allocation)
    return kept, jnp.stack([jnp.sum(~mask, dtype=jnp.uint32) for mask in kept.values()])


def _identify(
    params: Any,
    scores: tree_lib.Leaves,
    candidate: Candidate,
    structure: Structures,
    allocation: Allocation,
) -> dict[str, str]:
    """The call in words. What an allocation does is told by what it removes."""
    removed = [candidate(sparsity)[1] for sparsity in (0.3, 0.6, 0.9)]
    return study.identify(
        params, scores, structure=structure, allocation=allocation.name, removed_weights=removed
    )


def _result(
    params: Any,
    candidate: Candidate,
    best: Trial,
    max_drop: float,
    history: list[Trial],
    reason: Reason,
) -> ToAccuracy:
    kept, removed = candidate(best.asked)
    everything = {
        path: jnp.ones(getattr(leaf, "shape", ()), bool)
        for path, leaf in tree_lib.flatten(params).items()
    }
    return ToAccuracy(
        apply_masks(params, tree_lib.Leaves(kept)) if any(removed) else params,
        tree_lib.replace(params, everything | kept),
        best.sparsity,
        best.value,
        history[0].value,
        float(max_drop),
        tuple(history),
        reason,
    )


def _check_numbers(
    max_drop: float,
    tolerance: float,
    lowest: float,
    highest: float,
    max_evaluations: int | None,
    max_seconds: float | None,
) -> None:
    check_amount("max_drop", max_drop)
    if not (is_number(tolerance) and 1e-6 <= tolerance < 1):
        raise ValueError(f"tolerance is a sparsity in [1e-6, 1), not {tolerance!r:.60}")
    check_sparsity("lowest", lowest)
    check_sparsity("highest", highest)
    if lowest > highest:
        raise ValueError(f"lowest is {lowest}, above highest, {highest}: exchange them")
    if max_evaluations is not None:
        check_count("max_evaluations", max_evaluations)
    if max_seconds is not None and max_seconds != math.inf:
        check_amount("max_seconds", max_seconds)
