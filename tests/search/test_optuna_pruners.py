"""Optuna's pruners as rules of side-by-side training, against plain loops with Optuna."""

import sys

import jax
import numpy as np
import pytest

from jaxcomp import search
from tests.search.strategy_cases import trial

library = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
pruners = library.pruners
STATES = library.trial.TrialState
RUNGS = (1, 3, 9, 27)
# Curves of four lists: noise around levels that differ, and some that turn to NaN.
LISTS = np.random.default_rng(3).normal(size=(4, 7, 4), scale=0.3)
LISTS += np.array([0.2, -1, 0.6, 1, -0.2, -0.6, 0.1])[:, None]
LISTS[1, 2, 1:] = LISTS[2, 6, 0:] = np.nan
MAKE = {
    "nop": pruners.NopPruner,
    "threshold": lambda: pruners.ThresholdPruner(lower=-1.1, upper=1.0, n_warmup_steps=3),
    "patient": lambda: pruners.PatientPruner(None, patience=1),
    "halving": lambda: pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    "hyperband": lambda: pruners.HyperbandPruner(1, 27, reduction_factor=3),
    "median": lambda: pruners.MedianPruner(n_startup_trials=3),
    "percentile": lambda: pruners.PercentilePruner(30.0, n_startup_trials=2, n_warmup_steps=2),
    "wilcoxon": lambda: pruners.WilcoxonPruner(p_threshold=0.6),
    "patient median": lambda: pruners.PatientPruner(MAKE["median"](), patience=1),
}


def by_hand(pruner, direction, lists):
    """What anybody would write: each reports, and is pruned if Optuna says so."""
    study = library.create_study(direction=direction, pruner=pruner, study_name="jaxcomp")
    reached = []
    for curves in lists:
        asked = [study.ask() for _ in curves]
        ends = {}
        for i, step in enumerate(RUNGS):
            for place, each in enumerate(asked):
                if place in ends:
                    continue
                if np.isnan(curves[place, i]):
                    ends[place] = i, "failed"
                    study.tell(each, state=STATES.FAIL)
                    continue
                each.report(curves[place, i], step)
                if i == len(RUNGS) - 1:
                    ends[place] = i, "finished"
                    study.tell(each, curves[place, i])
                elif each.should_prune():
                    ends[place] = i, "stopped"
                    study.tell(each, state=STATES.PRUNED)
        reached.append([ends[place] for place in range(len(curves))])
    return reached


def by_rule(pruner, direction, lists):
    trials = []
    keep = search.optuna_pruner(pruner, earlier=lambda: trials)
    reached = []
    for curves in lists:
        seen, going, ends = np.full(curves.shape, np.nan), np.ones(len(curves), bool), {}
        for i in range(len(RUNGS)):
            seen[going, i] = curves[going, i]
            last = i == len(RUNGS) - 1
            stay = seen[:, i] == seen[:, i] if last else keep(seen[:, : i + 1], RUNGS, direction)
            for place in np.flatnonzero(going):
                if np.isnan(seen[place, i]):
                    assert not stay[place]
                    ends[place] = i, "failed"
                elif last or not stay[place]:
                    ends[place] = i, "finished" if last else "stopped"
            assert not stay[~going].any()
            going = stay
        reached.append([ends[place] for place in range(len(curves))])
        for place, (i, status) in sorted(ends.items()):
            curve = [x for x in seen[place].tolist() if x == x]
            value = None if status == "failed" else (curve[-1],)
            told = {"curve": curve, "steps": RUNGS[i]}
            trials.append(trial(len(trials), {}, value, status, **told))
    return reached


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("name", MAKE)
def test_they_stop_whom_a_plain_loop_stops(name, direction):
    found = by_rule(MAKE[name](), direction, LISTS)
    assert found == by_hand(MAKE[name](), direction, LISTS)
    statuses = [[status for _, status in each] for each in found]
    assert [each.count("failed") for each in statuses][::3] == [0, 0]
    stopped = [each.count("stopped") for each in statuses]
    needs_finished = name in ("median", "percentile", "wilcoxon", "patient median")
    assert (stopped[0] == 0) == (needs_finished or name == "nop")
    assert (sum(stopped) == 0) == (name == "nop")


def test_a_rule_forgets_what_it_was_asked_and_leaves_the_pruner_alone():
    pruner = MAKE["hyperband"]()
    before = dict(vars(pruner), _pruners=[])
    keep = search.optuna_pruner(pruner)
    first = keep(LISTS[0, :, :2], RUNGS, "minimize")
    keep(LISTS[3], RUNGS, "maximize")
    np.testing.assert_array_equal(keep(LISTS[0, :, :2], RUNGS, "minimize"), first)
    assert vars(pruner) == before


TARGET = {"measure": "distance", "direction": "minimize", "key": jax.random.key(0), "form": "vmap"}
SPACE = {"rate": search.Choice((0.3, 0.01, 0.1, 0.001, 0.03, 0.2, 0.003, 0.5, 1e30))}


def evaluate_by(keep):
    return search.halving_evaluator(
        init=lambda candidate, key: 0.0 * candidate["rate"],
        step=lambda w, candidate, x: w - candidate["rate"] * (w - x),
        score=lambda w, candidate: (w - 1) ** 2,
        batches=[1.0], rungs=(1, 3, 9), keep=keep, **TARGET,
    )  # fmt: skip


def test_a_killed_search_is_pruned_as_one_that_was_not(tmp_path):
    def run(file, stop):
        keep = search.optuna_pruner(
            pruners.MedianPruner(n_startup_trials=2),
            earlier=lambda: search.load(file, SPACE).trials,
        )
        return search.run(
            SPACE, evaluate_by(keep), search.strategies.grid(), batch=3, stop=stop, file=file,
            objectives={"distance": "minimize"}, key=jax.random.key(1), progress=False,
        )  # fmt: skip

    whole = run(tmp_path / "whole.jsonl", 9)
    curves = {each.number: each.told["curve"] for each in whole.trials}
    assert [each.status for each in whole.trials[:3]] == ["finished"] * 3
    # The median of the finished at each step, worked out here; 1e30 is failed.
    for each in whole.trials[3:]:
        if each.status == "failed":
            continue
        rivals = [t for t in whole.trials[: each.number // 3 * 3] if t.status == "finished"]
        median = np.median([curves[t.number] for t in rivals], axis=0)
        steps = next((i for i in (0, 1) if min(each.told["curve"][: i + 1]) > median[i]), 2)
        assert each.told["steps"] == (1, 3, 9)[steps]
        assert each.status == ("finished" if steps == 2 else "stopped")
        assert each.values == (curves[each.number][-1],)
    assert {each.status for each in whole.trials} == {"finished", "stopped", "failed"}
    run(tmp_path / "killed.jsonl", 6)
    again = run(tmp_path / "killed.jsonl", 9)
    assert [t._replace(seconds=0.0) for t in again.trials] == [
        t._replace(seconds=0.0) for t in whole.trials
    ]


def test_all_may_be_stopped():
    found = evaluate_by(search.optuna_pruner(pruners.ThresholdPruner(upper=-1.0)))(
        [{"rate": 0.1}, {"rate": 1e30}]
    )
    assert found[0]["stopped"]
    assert found[0]["steps"] == 1
    assert "not finite" in found[1]["error"]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: search.optuna_pruner(0.5), TypeError, "pruner must be one of Optuna's"),
        (
            lambda: search.optuna_pruner(pruners.MedianPruner),
            TypeError,
            "pruner must be one of Optuna's",
        ),
        (
            lambda: search.optuna_pruner(pruners.NopPruner(), earlier=[3]),
            TypeError,
            "earlier must be trials",
        ),
        (
            lambda: search.optuna_pruner(
                pruners.NopPruner(), earlier=[trial(4, {}, (1.0,), curve=[2.0, 1.0], steps=4)]
            )(LISTS[0, :, :1], RUNGS, "minimize"),
            ValueError,
            r"trial 4 has a curve of 2 scores and 4 steps, which is not from rungs \(1, 3, 9, 27\)",
        ),
    ],
)
def test_arguments_are_checked(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_without_optuna_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"optuna_pruner needs .*pip install 'jaxcomp\[search\]'"):
        search.optuna_pruner(None)
