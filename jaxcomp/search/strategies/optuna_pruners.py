"""Optuna's pruners as rules for who goes on, among candidates that are trained side by side."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcomp.search.strategies.optuna import optuna_library, quiet
from jaxcomp.search.trials import Direction, Trial

# Hyperband draws a trial's bracket from the study's name and the trial's number.
_STUDY = "jaxcomp"


def optuna_pruner(
    pruner: Any, *, earlier: Any = ()
) -> Callable[[np.ndarray, tuple[int, ...], Direction], np.ndarray]:
    """A pruner of Optuna as the rule ``keep`` of :func:`jaxcomp.search.successive_halving`.

    At each rung but the last, the candidates in training report their scores to a study of
    Optuna's, and are then asked about in their order whether they should be pruned. Its steps are
    steps of training. The rule keeps nothing between calls and works on a copy of the pruner: the
    same scores are always answered alike, also after a kill.

    A pruner that compares with finished trials (median, percentile, Wilcoxon, and what is to find
    out ``"auto"``) stops none of a first list, for none of it is finished; of later lists only with
    ``earlier``. Successive halving and Hyperband are Optuna's asynchronous ones: who is asked first
    has less to be held against. The synchronous one is a fraction as ``keep``.

    Args:
        pruner: one of Optuna's.
        earlier: trials of :func:`jaxcomp.search.halving_evaluator` that come before those that
            are in training, in the order of their numbers, or a function that returns them,
            ``lambda: search.load(file, space).trials``. Their whole curves are told.

    Returns:
        A function of curves, rungs and the direction: whether each candidate goes on.

    Raises:
        ImportError: Optuna is not installed.
        TypeError: ``pruner`` is none of Optuna's; ``earlier`` are not trials.
        ValueError: when it is asked: an earlier trial was trained with other rungs.

    Example:
        >>> import optuna
        >>> keep = optuna_pruner(optuna.pruners.ThresholdPruner(upper=1.0))
        >>> keep(np.array([[0.5], [1.5], [np.nan]]), (10, 100), "minimize")
        array([ True, False, False])

    Akiba, Sano, Yanase, Ohta and Koyama 2019, "Optuna: a next-generation hyperparameter
    optimization framework", section 3.2.
    """
    library = optuna_library("optuna_pruner")
    if not isinstance(pruner, library.pruners.BasePruner):
        raise TypeError(
            f"pruner must be one of Optuna's, such as MedianPruner(), not {pruner!r:.60}"
        )
    if not callable(earlier):
        _trials(earlier)
    # Some find out settings from the first trials they see, and remember them.
    pruner = copy.deepcopy(pruner)

    def keep(curves: np.ndarray, rungs: tuple[int, ...], direction: Direction) -> np.ndarray:
        study = _study(library, copy.deepcopy(pruner), direction)
        for trial in _trials(earlier() if callable(earlier) else earlier):
            _tell(library, study, trial, rungs)
        return _ask(library, study, curves, rungs)

    return keep


def _trials(given: Any) -> Sequence[Trial]:
    found = list(given) if isinstance(given, (list, tuple)) else [given]
    for each in found:
        if not isinstance(each, Trial):
            raise TypeError(
                "earlier must be trials, or a function that returns them, such as "
                f"lambda: search.load(file, space).trials, not {each!r:.60}"
            )
    return found


def _study(library: Any, pruner: Any, direction: Direction) -> Any:
    with quiet(library):
        return library.create_study(
            direction=direction,
            pruner=pruner,
            sampler=library.samplers.RandomSampler(seed=0),
            study_name=_STUDY,
        )


def _tell(library: Any, study: Any, trial: Trial, rungs: tuple[int, ...]) -> None:
    """Tell Optuna of an earlier trial, and ask at its rungs: what it finds out then it notes."""
    states = library.trial.TrialState
    curve = trial.told.get("curve", [])
    steps = trial.told.get("steps")
    if len(curve) > len(rungs) or (trial.status != "failed" and rungs[len(curve) - 1] != steps):
        raise ValueError(
            f"earlier: trial {trial.number} has a curve of {len(curve)} scores and {steps} steps, "
            f"which is not from rungs {rungs}: keep to the same rungs, or leave it out"
        )
    told = study.ask()
    for value, step in zip(curve, rungs, strict=False):
        told.report(value, step)
        if step != rungs[-1]:
            told.should_prune()
    if trial.status == "finished":
        study.tell(told, curve[-1])
    else:
        study.tell(told, state=states.FAIL if trial.status == "failed" else states.PRUNED)


def _ask(library: Any, study: Any, curves: np.ndarray, rungs: tuple[int, ...]) -> np.ndarray:
    """Who goes on after the rung of the last column; all columns are told, from the first."""
    states = library.trial.TrialState
    trials = [study.ask() for _ in curves]
    going = np.ones(len(curves), bool)
    for scores, step in zip(curves.T, rungs, strict=False):
        going &= np.isfinite(scores)
        for index in np.flatnonzero(going):
            trials[index].report(float(scores[index]), step)
        for index in np.flatnonzero(going):
            if trials[index].should_prune():
                study.tell(trials[index], state=states.PRUNED)
                going[index] = False
    return going
