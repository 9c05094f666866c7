"""Optuna's samplers behind the common interface, and its storage shared by machines."""

import sys

import jax
import pytest

from jaxcomp.search import Choice, Continuous, Integer, Stop, run, spaces, strategies
from jaxcomp.search.strategies.optuna import _stored, _value
from tests.search.strategy_cases import KEY, trial

library = pytest.importorskip("optuna")
SPACE = {
    "width": Integer(8, 64, step=8, log=True),
    "act": Choice({"relu": None, "leaky": {"slope": Continuous(0.0, 0.5)}}),
    "rate": Continuous(1e-4, 1.0, log=True),
}


def sampler(seed):
    return library.samplers.TPESampler(seed=seed, n_startup_trials=3)


def loss(found):
    return [abs(each["width"] - 40) + each["rate"] for each in found]


def shared(file, **options):
    return strategies.optuna(sampler, storage=f"sqlite:///{file}", study_name="one", **options)


def search(strategy, key, stop, **options):
    return run(SPACE, loss, strategy, objectives="minimize", key=key, stop=stop, **options)


@pytest.mark.parametrize(
    "part",
    [Integer(8, 64, step=8, log=True), Integer(3, 18, step=5, log=True), Integer(1, 9, log=True),
     Integer(-4, 4, step=2), Choice(("a", True, None)), Choice({"x": 1, "y": None})],
)  # fmt: skip
def test_values_come_back_from_optuna(part):
    for point in spaces.enumerate_points(part):
        assert _value(part, _stored(part, point[""])) == point[""]


def test_machines_learn_from_each_other_and_a_killed_one_goes_on(tmp_path):
    first, second = jax.random.key(1), jax.random.key(2)
    database, file = tmp_path / "study.db", tmp_path / "first.jsonl"
    one = search(shared(database), first, 6, file=file, batch=2)
    two = search(shared(database), second, 4)
    every = strategies.optuna_trials(SPACE, f"sqlite:///{database}", "one")
    assert [each.point for each in every] == [each.point for each in one.trials + two.trials]
    assert [each.values for each in every] == [each.values for each in one.trials + two.trials]
    # Two are asked for and one of them is finished when the process is killed.
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]))
    again = search(shared(database), first, 8, file=file, batch=2)
    assert [each.point for each in again.trials[:6]] == [each.point for each in one.trials]
    every = strategies.optuna_trials(SPACE, f"sqlite:///{database}", "one")
    assert len(every) == 12  # none of the ten is there twice
    with pytest.raises(ValueError, match="directions minimize, not maximize: choose another name"):
        shared(database).init(SPACE, ("maximize",), first)
    with pytest.raises(ValueError, match="depth: trial 0 of 'one' has no value for it"):
        strategies.optuna_trials({"depth": Integer(1, 2)}, f"sqlite:///{database}", "one")
    with pytest.raises(KeyError):
        strategies.optuna_trials(SPACE, f"sqlite:///{database}", "two")


def test_a_trial_that_was_running_when_its_process_was_killed_is_finished(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    strategy = shared(tmp_path / "study.db")
    points, _ = strategy.ask(strategy.init(SPACE, ("minimize",), KEY), 2)
    news = [trial(i, point, (1.0 + i,), violation=i) for i, point in enumerate(points)]
    # Another process: made anew, it is told what it never asked for.
    strategy.tell(strategy.init(SPACE, ("minimize",), KEY), news)
    study = library.load_study(study_name="one", storage=storage)
    states = sorted(each.state.name for each in study.trials)
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"]  # what was running is given up
    found = strategies.optuna_trials(SPACE, storage, "one")
    assert [each.values for each in found] == [(1.0,), (2.0,)]
    assert found[1].told == {"violation": 1}
    assert study.best_value == 1.0


def test_the_model_is_told_what_stopped_failed_or_violates():
    strategy = strategies.optuna(sampler)
    state = strategy.init(SPACE, ("minimize",), KEY)
    for told in (True, False):
        points, asked = strategy.ask(state, 4)
        news = [
            trial(0, points[0], (3.0,)),
            trial(1, points[1], (1.0,), violation=2.0),
            trial(2, points[2], (2.0,), "stopped"),
            trial(3, points[3], None, "failed", error="no"),
        ]
        state = strategy.tell(asked if told else strategy.init(SPACE, ("minimize",), KEY), news)
        trials = state.study.trials
        assert [each.state.name for each in trials] == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
        assert [each.constraints["violation"] for each in trials] == [0.0, 2.0, 0.0, 0.0]
        assert trials[2].intermediate_values == {0: 2.0}
        state = strategy.init(SPACE, ("minimize",), KEY)


def test_small_spaces_are_asked_once_each_though_the_model_repeats_itself():
    space = {"a": Integer(0, 4), "b": Integer(0, 4)}
    study = run(
        space,
        lambda found: [each["a"] + each["b"] for each in found],
        strategies.optuna(sampler),
        objectives="minimize",
        key=KEY,
        stop=Stop(),
    )
    assert len({spaces.frozen(each.point) for each in study.trials}) == 25
    assert study.reason == "exhausted"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: strategies.optuna(3), "sampler must make one of Optuna's from a seed"),
        (lambda: strategies.optuna(lambda seed: seed), "sampler must make one"),
        (lambda: strategies.optuna(library.samplers.TPESampler), "sampler must make one"),
        (lambda: strategies.optuna(study_name="a"), "study_name without storage"),
        (lambda: strategies.optuna(storage="sqlite://"), "storage without study_name"),
        (
            lambda: strategies.optuna(lambda seed: library.samplers.NSGAIISampler(seed=seed)),
            "NSGAIISampler keeps notes in Optuna's storage",
        ),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


def test_without_optuna_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxcomp\[search\]'"):
        strategies.optuna()
