"""The smallest ranks whose drop on a validation set stays within bounds."""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcomp import columns
from jaxcomp.arrays import nbytes
from jaxcomp.checkpoint.records import Records
from jaxcomp.checkpoint.resuming import describe
from jaxcomp.checks import check_function
from jaxcomp.factorize.budget import Budget, allocate
from jaxcomp.factorize.spectra import Spectra, truncated
from jaxcomp.model.highest import Limits, Reason, Trial, check_limits, find_highest

FILE = "factorize_to_accuracy.jxc"


class RanksToAccuracy(NamedTuple):
    """The smallest model found; ``print`` it for a table of what was tried.

    Attributes:
        params: the tree with low-rank leaves.
        ranks: by path; None where a leaf stays dense.
        saved: the share of the dense bytes that is saved.
        value: what ``evaluate`` returned for ``params``.
        dense_value: what it returned for the dense ones.
        max_drop: by how much ``value`` may fall short of it.
        history: what was tried, in order; the first is the dense model.
        stopped_by: why the search ended: ``"tolerance"``, ``"highest"``, ``"lowest"`` (``params``
            are then dense), ``"max_evaluations"``, ``"max_seconds"`` or ``"interrupted"``.
    """

    params: Any
    ranks: Mapping[str, int | None]
    saved: float
    value: float
    dense_value: float
    max_drop: float
    history: tuple[Trial, ...]
    stopped_by: Reason

    def __str__(self) -> str:
        """A table of what was tried."""
        rows = [("asked", "value", "drop", "", "seconds")]
        for trial in self.history:
            drop = self.dense_value - trial.value
            verdict = "within" if trial.within else "failed" if math.isnan(drop) else "too much"
            numbers = (f"{trial.value:.6g}", f"{drop:.3g}", verdict, f"{trial.seconds:.2f}")
            rows.append((f"{trial.asked:.2%}", *numbers))
        return (
            f"{columns.table(rows)}\n"
            f"best: {self.saved:.2%} of the bytes saved, value {self.value:.6g} (dense "
            f"{self.dense_value:.6g}, drop at most {self.max_drop:.3g}); stopped by "
            f"{self.stopped_by}"
        )


def to_accuracy(
    found: Any,
    evaluate: Any,
    max_drop: float,
    *,
    tolerance: float = 0.01,
    lowest: float = 0.0,
    highest: float = 0.99,
    max_evaluations: int | None = None,
    max_seconds: float | None = None,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> RanksToAccuracy:
    """Find the lowest ranks at which ``evaluate`` drops by at most ``max_drop``.

    Searches over the share of the bytes that is saved; :func:`allocate` spreads each over the
    leaves. What is returned was evaluated and is within bounds, however noisy ``evaluate`` is; only
    that nothing smaller is takes an ``evaluate`` that falls with the bytes.

    Args:
        found: from :func:`~jaxcomp.factorize.spectra`.
        evaluate: ``evaluate(params) -> number``, higher is better, such as an accuracy on held-out
            data. It is given low-rank leaves, on which the model runs as it is. The same parameters
            must give the same number. NaN and infinities count as failed.
        max_drop: by how much the number may fall, in its own unit; at least 0.
        tolerance: where to stop halving, in shares of the bytes.
        lowest: shares below are not tried.
        highest: nor are those above; what rank 1 of every leaf saves is the most in any case.
        max_evaluations: how often ``evaluate`` may be called at most, the dense call and those of
            earlier runs included.
        max_seconds: no evaluation begins after this much time spent in them, likewise.
        directory: where finished evaluations are kept. The same call goes on after a kill and comes
            to the same result bit for bit; what ``evaluate`` does must not change.
        progress: whether to show a progress bar; None: on a terminal, if it takes long.
        clock: seconds that only rise.

    Returns:
        The parameters, their ranks and the history. Ctrl-C ends the search early and returns the
        best until then, once the dense parameters are evaluated.

    Raises:
        TypeError: ``evaluate`` is no function or returns no real number; a number is none.
        ValueError: it is not finite for the dense parameters, a number is out of range, or another
            call wrote the file.
        CheckpointError: the file is damaged.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.factorize.spectra import spectra
        >>> params = {"w": jnp.diag(2.0 ** -jnp.arange(16.0))}
        >>> kept = lambda params: jnp.sum(jnp.asarray(params["w"]) ** 2) / jnp.sum(params_w**2)
        >>> params_w = params["w"]
        >>> smallest = to_accuracy(spectra(None, params, None), kept, max_drop=0.01)
        >>> smallest.ranks, smallest.saved
        ({'w': 4}, 0.5)
    """
    if not isinstance(found, Spectra):
        raise TypeError(f"found must come from factorize.spectra, not {found!r:.60}")
    check_function("evaluate", evaluate, "params that returns one number")
    check_function("clock", clock, "nothing that returns seconds")
    limits = Limits(max_drop, lowest, highest, tolerance, max_evaluations, max_seconds)
    check_limits(limits)
    most = _most(found)
    records = Records.open(directory, FILE, lambda: _identify(found))

    def ranks_at(saved: float) -> dict[str, int | None]:
        if saved <= 0:
            return dict.fromkeys(found.leaves)
        return dict(allocate(found, Budget(bytes=1 - min(saved, most))).ranks)

    def candidate(saved: float) -> tuple[Callable[[], Any], tuple[int, ...]]:
        ranks = ranks_at(saved)
        return lambda: truncated(found, ranks), tuple(rank or 0 for rank in ranks.values())

    history, reason = find_highest(
        found.params,
        candidate,
        evaluate,
        limits,
        records,
        clock=clock,
        words="looking for the lowest ranks",
        progress=progress,
    )
    within = [trial for trial in history if trial.within]
    best = max(within, key=lambda trial: trial.asked)
    ranks = ranks_at(best.asked)
    params = truncated(found, ranks)
    saved = 1 - nbytes(params) / found.totals["bytes"]
    dense = history[0].value
    return RanksToAccuracy(
        params, ranks, saved, best.value, dense, float(max_drop), history, reason
    )


def _most(found: Spectra) -> float:
    """What rank 1 of every leaf saves."""
    small = truncated(found, {p: 1 for p, s in found.leaves.items() if s.most})
    # A little less, so that rounding does not ask for more than there is.
    return max(1 - (nbytes(small) + 0.5) / found.totals["bytes"], 0.0)


def _identify(found: Spectra) -> dict[str, str]:
    values = {path: np.asarray(spectrum.values) for path, spectrum in found.leaves.items()}
    return {**describe("params", found.params), **describe("spectra", values)}
