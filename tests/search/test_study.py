"""Runs of a search: what is evaluated, recorded, kept, and when it ends."""

import io
import itertools
import math
import xml.etree.ElementTree as xml

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxcomp.search import Integer, Stop, Strategy, Study, load, plots, run, strategies
from tests.search.strategy_cases import KEY, trial

SPACE = {"x": Integer(0, 9), "y": Integer(0, 9)}


def search(evaluate, stop=20, strategy=None, objectives="minimize", **options):
    strategy = strategies.random() if strategy is None else strategy
    return run(SPACE, evaluate, strategy, objectives=objectives, key=KEY, stop=stop, **options)


def total(found):
    return [each["x"] + each["y"] for each in found]


def test_candidates_are_evaluated_in_batches_and_the_best_is_found():
    sizes = []

    def evaluate(found):
        sizes.append(len(found))
        return total(found)

    study = search(evaluate, stop=20, batch=8)
    assert sizes == [8, 8, 4]
    assert [each.number for each in study.trials] == list(range(20))
    assert study.best.values[0] == min(each.values[0] for each in study.trials)
    assert sum(study.candidate(study.best).values()) == study.best.values[0]
    assert search(evaluate, stop=20, batch=3).trials[0].point == study.trials[0].point
    assert study.reason == "evaluations"


def test_measures_of_any_kind_are_kept():
    def evaluate(found):
        for _ in found:
            yield {
                "loss": jnp.float32(0.5),
                "bytes": np.int64(90),
                "curve": np.array([1.0, math.nan]),
                "note": "fine",
                "ok": np.bool_(True),
                "best": math.inf,
                "more": {"a": (1, None)},
            }

    study = search(evaluate, stop=1, objectives={"loss": "minimize", "bytes": "minimize"})
    assert study.trials[0].values == (0.5, 90.0)
    assert study.trials[0].told == {
        "curve": [1.0, "nan"],
        "note": "fine",
        "ok": True,
        "best": "inf",
        "more": {"a": [1, None]},
    }


def test_measures_of_other_number_formats_are_kept():
    half = jnp.asarray(0.5, jnp.bfloat16)
    results = [half, {"value": half, "ok": np.array(True), "huge": 10**400}, -(10**400)]
    study = search(lambda found: results, stop=3, batch=3)
    assert [each.values for each in study.trials] == [(0.5,), (0.5,), None]
    assert study.trials[1].told == {"ok": True, "huge": "inf"}
    assert study.trials[2].told == {"error": "value is -inf"}


def test_a_study_of_failures_alone_is_shown():
    study = search(lambda found: found["x"], stop=2)
    assert str(study).startswith(
        "2 trials (2 failed), ended by evaluations\nfirst failure: trial 0"
    )
    assert study.table().row_count == 0
    with pytest.raises(TypeError, match=r"None is no trial: take one of study\.trials"):
        study.candidate(study.best)


def test_what_fails_is_recorded_and_the_search_goes_on():
    def evaluate(found):
        if any(each["x"] == 3 for each in found):
            raise RuntimeError("out of memory")
        return [math.nan if each["x"] == 4 else float(each["y"]) for each in found]

    study = search(evaluate, stop=100, batch=7)
    assert len(study.trials) == 100
    for each in study.trials:
        x = each.point["x"]
        assert each.status == ("failed" if x in (3, 4) else "finished")
        if x == 3:
            assert each.told["error"].startswith("RuntimeError: out of memory (test_study.py:")
        if x == 4:
            assert each.told == {"error": "value is nan"}
    assert study.best.values == (0.0,)
    assert "20 failed" in str(study)
    assert "first failure: trial" in str(study)


def test_results_that_are_yielded_before_an_error_count():
    seen = []

    def evaluate(found):
        for each in found:
            seen.append(each["x"])
            if each["x"] % 2:
                raise ValueError("odd")
            yield each["x"]

    study = search(evaluate, stop=30, batch=5)
    assert [each.status == "failed" for each in study.trials] == [
        bool(each.point["x"] % 2) for each in study.trials
    ]
    assert len(seen) < 60


def test_results_say_what_failed_was_stopped_or_violates():
    results = [
        {"loss": 1.0, "error": "diverged", "steps": 3},
        {"loss": 2.0, "stopped": True},
        {"bytes": 300},
        {"loss": 3.0, "bytes": 300, "violation": 0.5},
        {"loss": 9.0, "bytes": 100},
        {"loss": 4.0, "bytes": math.inf},
    ]
    for result in results[:2]:
        result["bytes"] = 50

    study = search(
        lambda found: results,
        stop=6,
        batch=6,
        objectives={"loss": "minimize"},
        constraints={"bytes": 200},
    )
    kinds = [(each.status, each.values, each.told.get("violation")) for each in study.trials]
    assert kinds == [
        ("failed", None, None),
        ("stopped", (2.0,), None),
        ("stopped", None, 0.5),
        ("finished", (3.0,), 1.0),
        ("finished", (9.0,), None),
        ("failed", None, None),
    ]
    assert study.trials[0].told == {"error": "diverged", "steps": 3, "bytes": 50}
    assert study.trials[5].told["error"] == "bytes is inf"
    assert study.best.number == 4
    beyond = Study(SPACE, {"loss": "minimize"}, {"bytes": 200.0}, study.trials[:4], "seconds")
    assert beyond.best is None
    assert "none within the constraints; the least violation is 1" in str(beyond)


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        (lambda found: None, "must return a list of as many results, not None"),
        (lambda found: {"loss": 1.0}, "must return a list"),
        (lambda found: [], "returned 0 results for 2 candidates"),
        (lambda found: iter([1.0]), "returned 1 results for 2 candidates"),
        (lambda found: [1.0] * 3, "returned 3 results for 2 candidates"),
        (lambda found: ["good"] * 2, "a number or a dict of measures by name, not 'good'"),
        (lambda found: [{"accuracy": 1.0}] * 2, "a result lacks 'value', which is an objective"),
        (lambda found: [{"value": "high"}] * 2, "'value' must be a number, not 'high'"),
        (lambda found: [{"value": 1, "f": print}] * 2, "measure 'f' is builtin_function_or_method"),
        (lambda found: [{"value": 1, "violation": -1}] * 2, "violation is -1"),
        (lambda found: iter([1.0] * 3), "returned more than 2 results for 2 candidates"),
        (lambda found: [{"value": 1, "error": 0.1}] * 2, "'error' says in words why .*; 0.1 is a"),
        (lambda found: [{"value": 1, "stopped": 17}] * 2, "'stopped' must be True or False"),
    ],
)
def test_results_that_are_none_are_errors(evaluate, words):
    with pytest.raises((TypeError, ValueError), match=words):
        search(evaluate, batch=2)


def test_a_number_will_not_do_for_several_measures():
    with pytest.raises(TypeError, match="must return a dict of a, b each, not a number"):
        search(total, objectives={"a": "minimize", "b": "maximize"})
    with pytest.raises(ValueError, match="lacks 'bytes', which has a limit"):
        search(lambda found: [{"a": 1.0}], objectives={"a": "minimize"}, constraints={"bytes": 1})


@pytest.mark.parametrize(
    ("points", "words"),
    [([{"x": 33, "y": 0}], "x: 33 is not among 0 to 9"), ([3], "a point must be a dict")],
)
def test_a_strategy_that_goes_astray_leaves_no_trace(tmp_path, points, words):
    file = tmp_path / "study.jsonl"
    lost = Strategy(lambda *_: 0, lambda s, _: (points, s), lambda s, _: s, "lost()")
    with pytest.raises((TypeError, ValueError), match=rf"strategy lost\(\): asked for .*{words}"):
        search(total, 3, lost, file=file)
    assert len(file.read_text().splitlines()) == 1
    array = Strategy(
        lambda *_: 0, lambda s, _: ([{"y": np.int64(1), "x": 2}], s), lambda s, _: s, "lost()"
    )
    assert list(search(total, 1, array, file=file).trials[0].point.items()) == [("x", 2), ("y", 1)]


def test_the_bar_ends_at_its_end(capsys):
    search(total, stop=3, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_patience_counts_what_betters_nothing():
    values = itertools.chain([5.0, 4.0, 4.0, 4.5, 3.0], itertools.repeat(3.0))
    study = search(lambda found: [next(values)], stop=Stop(patience=3))
    assert (len(study.trials), study.reason) == (8, "patience")
    pairs = itertools.chain([(1, 5), (5, 1), (3, 3), (2, 2)], itertools.repeat((4, 4)))
    study = search(
        lambda found: [dict(zip("ab", next(pairs), strict=True))],
        stop=Stop(patience=3, evaluations=90),
        objectives={"a": "minimize", "b": "minimize"},
    )
    assert (len(study.trials), study.reason) == (7, "patience")
    assert [each.values for each in study.front] == [(1, 5), (5, 1), (2, 2)]


def test_seconds_and_the_end_of_the_space_end_a_search():
    assert search(total, stop=Stop(seconds=0)).trials == ()
    study = search(total, stop=Stop())
    assert (len(study.trials), study.reason) == (100, "exhausted")
    assert str(search(total, stop=0)) == "0 trials (none), ended by evaluations"


def test_strategies_see_points_and_trials_alone():
    told = []
    strategy = Strategy(
        lambda space, directions, key: 0,
        lambda state, count: ([{"x": state % 10, "y": 0}], state + 1),
        lambda state, trials: told.extend(trials) or state,
        "counting()",
    )
    study = search(lambda found: [{"v": 1.0, "more": 2}], 3, strategy, {"v": "maximize"})
    assert tuple(told) == study.trials
    assert told[2].told == {"more": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objectives": {}}, "objectives is empty"),
        ({"objectives": "up"}, "value is to be 'maximize' or 'minimize', not 'up'"),
        ({"objectives": 3}, "objectives must be a mapping"),
        ({"objectives": {"error": "minimize"}}, "'error' means something else"),
        ({"constraints": {"bytes": math.nan}}, "bytes is at most nan"),
        ({"stop": None}, r"stop must be a number of evaluations or a Stop, not None: Stop\(\)"),
        ({"stop": Stop(patience=0)}, "stop.patience is 0"),
        ({"stop": Stop(seconds=-1)}, "stop.seconds is -1"),
        ({"batch": 0}, "batch is 0"),
        ({"strategy": strategies.random}, "strategy must be one, such as strategies.evolution()"),
        ({"file": 3}, "file must be a path, not 3"),
    ],
)
def test_arguments_are_checked_before_anything_is_evaluated(options, words):
    def evaluate(found):
        raise KeyboardInterrupt

    with pytest.raises((TypeError, ValueError), match=words):
        search(evaluate, **options)


def several():
    trials = (
        trial(0, {"x": 1, "y": 1}, (0.90, 2000.0)),
        trial(1, {"x": 2, "y": 1}, (0.95, 90000.0)),
        trial(2, {"x": 3, "y": 1}, (0.89, 30000.0)),
        trial(3, {"x": 4, "y": 1}, None, "failed", error="[red]no[/red]"),
        trial(4, {"x": 5, "y": 1}, (0.99, 99000.0), violation=1.0),
    )
    objectives = {"accuracy": "maximize", "flops": "minimize"}
    return Study(SPACE, objectives, {"flops": 95000.0}, trials, "evaluations")


def test_the_front_is_a_table():
    study = several()
    assert [each.number for each in study.front] == [0, 1]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(study.table())
    text = console.export_text()
    assert "Pareto front of 5 trials, 1 failed" in text
    assert "90,000" in text
    assert "99,000" not in text
    assert "{'x': 2, 'y': 1}" in text
    assert "flops ↓ ≤ 95,000" in str(study)
    with pytest.raises(ValueError, match=r"accuracy and flops have no common order.*study\.front"):
        _ = study.best


@pytest.mark.parametrize("names", [(), ("flops", "accuracy"), ("accuracy",)])
def test_a_plot_is_a_sound_picture(tmp_path, names):
    file = tmp_path / "study.svg"
    several().plot(file, *names)
    root = xml.parse(file).getroot()
    tag = "{http://www.w3.org/2000/svg}"
    width, height = float(root.get("width")), float(root.get("height"))
    circles = root.findall(f"{tag}circle")
    assert len(circles) == 4
    for each in circles:
        assert 90 <= float(each.get("cx")) <= width - 20
        assert 40 <= float(each.get("cy")) <= height - 60
    assert sum(each.get("fill") == "#c1272d" for each in circles) == 2
    words = [each.text for each in root.findall(f"{tag}text")]
    assert "5 trials, 1 failed" in words
    assert all(name in words for name in names)
    line = root.find(f"{tag}polyline").get("points").split()
    assert len(line) == (4 if len(names) == 1 else 3)


def test_stairs_go_around_what_is_dominated():
    red = lambda *points: [(x, y, "#c1272d") for x, y in points]
    minimal = plots._stairs(red((1, 3), (2, 1)), ("minimize", "minimize"), False)
    assert minimal == [(1, 3), (2, 3), (2, 1)]
    maximal = plots._stairs(red((1, 3), (2, 1)), ("maximize", "maximize"), False)
    assert maximal == [(1, 3), (1, 1), (2, 1)]
    third = plots._stairs(red((1, 3), (1.5, 4), (2, 1), (2, 1)), ("minimize", "minimize"), False)
    assert third == minimal  # what leads in a third objective alone is within


def test_a_plot_needs_something_to_draw(tmp_path):
    with pytest.raises(ValueError, match="'speed' is no objective: accuracy, flops are"):
        several().plot(tmp_path / "a.svg", "speed")
    with pytest.raises(ValueError, match="nothing to draw"):
        several()._replace(trials=()).plot(tmp_path / "a.svg")
    for values in ([0.0, 0.0], [1e308, -1e308], [5.0], [-3.0, 1e-9], [1e-300, 1e300]):
        axis = plots.axis("loss", values)
        assert all(0 <= axis.place(each) <= 1 for each in values)
        assert len(axis.ticks) < 12


def test_keys_of_the_old_kind_go_the_same_way(tmp_path):
    file = tmp_path / "study.jsonl"
    options = {"objectives": "minimize", "stop": 4, "file": file}
    study = run(SPACE, total, strategies.random(), key=jax.random.key(5), **options)
    again = run(SPACE, total, strategies.random(), key=jax.random.PRNGKey(5), **options)
    assert again.trials == study.trials == load(file, SPACE).trials
