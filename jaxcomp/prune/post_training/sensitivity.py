"""What each leaf alone costs on a validation set when it is pruned."""

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64

from jaxcomp import columns
from jaxcomp import tree as tree_lib
from jaxcomp.checkpoint.records import Record, Records
from jaxcomp.checks import check_count, check_function
from jaxcomp.model.progress import watched
from jaxcomp.prune import scores as scores_lib
from jaxcomp.prune.allocation import uniform
from jaxcomp.prune.masks import Structures, renew, resolve, zero_out
from jaxcomp.prune.post_training import study
from jaxcomp.prune.post_training.column_walk import lost_of_run
from jaxcomp.prune.schedules import check_sparsity
from jaxcomp.prune.scores import Score
from jaxcomp.prune.structures import NM, Element, Structure

FILE = "sensitivity.jxc"
MEMORY = 2**30  # bytes that a batch of candidates may take, by estimate
_BARS = "▁▂▃▄▅▆▇█"


class Sensitivity(NamedTuple):
    """Values with one leaf pruned at a time.

    Attributes:
        paths: of the leaves.
        sizes: how many weights each has.
        sparsities: that were asked for, rising.
        removed: how many weights were removed, (leaves, sparsities).
        values: what ``evaluate`` returned, likewise; NaN where it failed.
        dense_value: what it returned for the dense parameters.
    """

    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    sparsities: tuple[float, ...]
    removed: Int64[np.ndarray, "leaves sparsities"]
    values: Float64[np.ndarray, "leaves sparsities"]
    dense_value: float

    @property
    def drops(self) -> Float64[np.ndarray, "leaves sparsities"]:
        """By how much each value falls short of the dense one."""
        return self.dense_value - self.values

    def curves(self) -> dict[str, Float64[np.ndarray, "points 2"]]:
        """By path, rows of the exact sparsity of the leaf and the drop, from (0, 0) on."""
        found = {}
        for path, size, removed, drops in zip(
            self.paths, self.sizes, self.removed, self.drops, strict=True
        ):
            rows = np.stack([removed / size, drops], axis=1)
            found[path] = np.concatenate([np.zeros((1, 2)), rows])
        return found

    def __str__(self) -> str:
        """A table of drops, the most sensitive leaf first, with its curve; ``×`` is a failure."""
        finite = self.drops[np.isfinite(self.drops)]
        most = max(float(finite.max(initial=0.0)), np.finfo(float).tiny)
        rows = [("path", "weights", *(f"{s:.4g}" for s in self.sparsities), "")]
        worst = [math.inf if np.isnan(row).any() else float(row.sum()) for row in self.drops]
        for at in sorted(range(len(self.paths)), key=lambda at: -worst[at]):
            row = [float(drop) for drop in self.drops[at]]
            curve = "".join(_bar(drop, most) for drop in row)
            rows.append(
                (self.paths[at], f"{self.sizes[at]:,}", *(f"{drop:.3g}" for drop in row), curve)
            )
        title = f"drop of {self.dense_value:.6g} with one leaf pruned, by sparsity"
        return f"{title}\n{columns.table(rows)}"


def sensitivity(
    params: Any,
    evaluate: Callable[[Any], Any],
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    *,
    score: Score = scores_lib.magnitude,
    evidence: Any = None,
    structure: Structures = Element(),  # noqa: B008
    paths: str | Iterable[str] | None = None,
    at_once: int | None = None,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Prune one leaf at a time, and evaluate.

    Where ``evaluate`` can be traced, the candidates of a leaf are evaluated together by ``vmap``
    over that leaf alone: nothing else is copied, and what is computed before the leaf is used is
    computed once for all of them. It is compiled once a leaf for that, and its Python code runs
    then, not at each evaluation. With ``at_once=1`` it is called each time, as it is: quicker where
    an evaluation takes less time than its compilation.

    Args:
        params: a parameter tree, or a selection.
        evaluate: ``evaluate(params) -> number``, higher is better; for a loss,
            ``lambda params: -loss(params)``. The same parameters must give the same number. NaN and
            infinities count as failed, and are kept as NaN.
        sparsities: fractions in [0, 1), in any order.
        score: function of a leaf and its evidence; the lowest go first.
        evidence: what the score reads: a tree like ``params``, or a selection by path.
        structure: what goes together, as in :func:`jaxcomp.prune.masks`.
        paths: patterns of the weights that are looked at; None: all.
        at_once: how many candidates at once; None: as many as fit in 1 GiB, by an estimate of twice
            the leaf and the largest value of ``evaluate`` for each, or one if it cannot be traced.
        directory: where finished evaluations are kept, in a file ``sensitivity.jxc``. The same call
            goes on after a kill and comes to the same result bit for bit; other sparsities may be
            asked for. What ``evaluate`` does is not in the file, and must be the same.
        progress: whether to show a progress bar; None: on a terminal, if it takes long.

    Returns:
        A table; :func:`allocation_from_sensitivity` makes an allocation from it.

    Raises:
        TypeError: ``evaluate`` or the score is no function, ``evaluate`` returns no real number, or
            ``at_once`` is above 1 and it cannot be traced; a number is none.
        ValueError: ``evaluate`` is not finite for the dense parameters, no sparsities or one
            outside [0, 1) or above what N:M removes, weights, scores or a structure as in
            :func:`jaxcomp.prune.masks`, or another call wrote the file.
        CheckpointError: the file is damaged.

    Example:
        >>> params = {"first": jnp.arange(1.0, 5.0).reshape(2, 2), "second": jnp.ones((2, 4))}
        >>> evaluate = lambda params: jnp.sum(params["first"]) + jnp.sum(params["second"])
        >>> print(sensitivity(params, evaluate, (0.25, 0.5, 0.75)))
        drop of 18 with one leaf pruned, by sparsity
        path    weights  0.25  0.5  0.75
        second        8     2    4     6  ▃▆█
        first         4     1    3     6  ▂▅█
    """
    check_function("evaluate", evaluate, "params that returns one number")
    if at_once is not None:
        check_count("at_once", at_once)
    asked = _checked(sparsities)
    scores = study.score_leaves(params, score, evidence, paths)
    structures = resolve(structure, scores)
    _check_runs(structures, asked[-1])
    leaves = tree_lib.take(params, scores)
    records = Records.open(
        directory, FILE, lambda: study.identify(params, scores, structure=structure)
    )
    if "" not in records.found:
        start = time.perf_counter()
        value = study.check_value(evaluate(params))
        records.add({"": Record((), value, time.perf_counter() - start)})
    dense = records.found[""].value
    if not math.isfinite(dense):
        raise ValueError(
            f"evaluate gave {dense} for the dense parameters: there is nothing to compare"
        )
    missing = {name: [s for s in asked if _name(name, s) not in records.found] for name in leaves}
    largest = None
    if at_once != 1 and any(missing.values()):
        largest = _largest_value(evaluate, params, needed=at_once is not None)
    for name in watched(list(leaves), "pruning one leaf at a time", progress):
        pruned = functools.partial(_pruned, leaves[name], scores[name], structures[name])
        run, count = _runner(params, evaluate, name, at_once, largest, leaves[name], len(asked))
        for begin in range(0, len(missing[name]), count):
            records.add(_evaluated(run, pruned, name, missing[name][begin : begin + count], count))
    return _collect(leaves, asked, records.found, dense)


Run = Callable[[list[Any]], list[float]]


def _runner(
    params: Any,
    evaluate: Callable[[Any], Any],
    path: str,
    at_once: int | None,
    largest: int | None,
    leaf: Any,
    most: int,
) -> tuple[Run, int]:
    """A function from pruned forms of one leaf to values, and how many it takes."""

    def one(leaf: Any, params: Any) -> Any:
        return evaluate(tree_lib.replace(params, {path: leaf}))

    if largest is None:
        return lambda candidates: [study.check_value(one(each, params)) for each in candidates], 1
    each = 2 * (leaf.size * leaf.dtype.itemsize + largest)
    count = min(most, at_once or max(1, MEMORY // max(1, each)))
    together = jax.jit(jax.vmap(one, in_axes=(0, None)))

    def run(candidates: list[Any]) -> list[float]:
        # The last few are filled up, so that they are not compiled for another number.
        filled = candidates + candidates[-1:] * (count - len(candidates))
        values = together(jnp.stack(filled), params)
        return [float(value) for value in np.asarray(values)[: len(candidates)]]

    return run, count


def _evaluated(
    run: Run,
    pruned: Callable[[float], tuple[Any, int]],
    path: str,
    sparsities: list[float],
    count: int,
) -> dict[str, Record]:
    start = time.perf_counter()
    candidates = [pruned(sparsity) for sparsity in sparsities]
    values = run([leaf for leaf, _ in candidates])
    seconds = (time.perf_counter() - start) / count
    return {
        _name(path, sparsity): Record((removed,), value, seconds)
        for sparsity, (_, removed), value in zip(sparsities, candidates, values, strict=True)
    }


def _pruned(leaf: Any, scores: Any, structure: Structure, sparsity: float) -> tuple[Any, int]:
    pruned, removed = _prune(leaf, scores, structure, np.float32(sparsity))
    return pruned, int(removed)


@functools.partial(jax.jit, static_argnames="structure")
def _prune(leaf: Any, scores: Any, structure: Structure, sparsity: Any) -> Any:
    mask = renew({"": scores}, sparsity, {"": structure}, uniform)[""]
    return zero_out(leaf, mask), jnp.sum(~mask, dtype=jnp.uint32)


def _largest_value(evaluate: Callable[[Any], Any], params: Any, needed: bool) -> int | None:
    """Bytes of the largest value that ``evaluate`` computes; None if it cannot be traced."""
    try:
        jaxpr = jax.make_jaxpr(evaluate)(params)
    except Exception as error:
        # Whatever a function of the user's raises that is not made to be traced.
        if needed:
            raise TypeError(
                "evaluate cannot be traced, so that no candidates can be evaluated at once: leave "
                "out at_once, or return a jax scalar without float() or .item()"
            ) from error
        return None
    (value, *others) = jaxpr.out_avals
    if others or not study.is_real_scalar(value):
        return None
    return _largest(jaxpr)


def _largest(jaxpr: Any) -> int:
    sizes = [0]
    is_jaxpr = lambda value: hasattr(value, "eqns")
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            size, dtype = (getattr(variable.aval, name, None) for name in ("size", "dtype"))
            sizes.append((size or 0) * getattr(dtype, "itemsize", 0))
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
        sizes.extend(_largest(each) for each in inner if is_jaxpr(each))
    return max(sizes)


def _collect(
    leaves: tree_lib.Leaves,
    asked: list[float],
    records: dict[str, Record],
    dense: float,
) -> Sensitivity:
    found = [[records[_name(path, sparsity)] for sparsity in asked] for path in leaves]
    values = np.array([[record.value for record in row] for row in found], np.float64)
    return Sensitivity(
        tuple(leaves),
        tuple(leaf.size for leaf in leaves.values()),
        tuple(asked),
        np.array([[record.counts[0] for record in row] for row in found], np.int64),
        np.where(np.isfinite(values), values, np.nan),
        dense,
    )


def _name(path: str, sparsity: float) -> str:
    return f"{path} {sparsity!r}"


def _checked(sparsities: Sequence[float]) -> list[float]:
    try:
        asked = np.asarray(list(sparsities), np.float64)
    except (TypeError, ValueError):
        asked = None
    if asked is None or asked.ndim != 1 or isinstance(sparsities, str):
        raise TypeError(
            f"sparsities must be several fractions, such as (0.5, 0.7, 0.9), not {sparsities!r:.60}"
        )
    if not asked.size:
        raise ValueError("sparsities is empty: give some fractions, such as (0.5, 0.7, 0.9)")
    for sparsity in asked.tolist():
        check_sparsity("each of sparsities", sparsity)
    return sorted(set(asked.tolist()))


def _check_runs(structures: dict[str, Structure], highest: float) -> None:
    for path, structure in structures.items():
        if isinstance(structure, NM):
            try:
                lost_of_run(highest, structure)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error


def _bar(drop: float, most: float) -> str:
    if math.isnan(drop):
        return "×"
    level = round(max(drop, 0.0) / most * (len(_BARS) - 1))
    return _BARS[level]
