"""Networks trained side by side: as each alone; the best go on, the others are stopped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import search

RNG = np.random.default_rng(0)
TRUE = RNG.normal(size=3).astype(np.float32)
BATCHES = [
    (x := RNG.normal(size=(8, 3)).astype(np.float32), x @ TRUE + np.float32(0.01)) for _ in range(3)
]
KEY = jax.random.key(7)
RATES = [0.3, 0.01, 0.1, 0.001, 0.03, 0.2, 0.003, 1e20]


def init(candidate, key):
    return {"w": jnp.zeros(3), "key": key, "steps": jnp.int32(0)}


def step(state, candidate, batch):
    x, y = batch
    gradient = x.T @ (x @ state["w"] - y) / len(y)
    moved = state["w"] - candidate["rate"] * gradient
    return {"w": moved, "key": state["key"], "steps": state["steps"] + 1}


def score(state, candidate):
    return jnp.sum((state["w"] - TRUE) ** 2)


def alone(rate, steps):
    w = np.zeros(3)
    for i in range(steps):
        x, y = BATCHES[i % len(BATCHES)]
        w = w - rate * (x.T @ (x @ w - y) / len(y))
    return w, np.sum((w - TRUE) ** 2)


def halve(rates, **settings):
    settings = {"rungs": (2, 6), "keep": 0.5, "form": "vmap", "direction": "minimize", **settings}
    candidates = [{"rate": rate} for rate in rates]
    batches = settings.pop("batches", BATCHES)
    return search.successive_halving(init, step, score, candidates, batches, key=KEY, **settings)


def check_as_alone(found, rates):
    for index, rate in enumerate(rates):
        if found.status[index] != "failed":
            wanted = alone(rate, found.steps[index])[1]
            np.testing.assert_allclose(found.values[index], wanted, rtol=2e-4)
    for index, state in zip(found.survivors, found.states, strict=True):
        np.testing.assert_allclose(
            state["w"], alone(rates[index], found.steps[index])[0], rtol=1e-4
        )
        assert state["steps"] == found.steps[index]
        # The key depends on the place in the list alone.
        ours = jax.random.key_data(state["key"])
        np.testing.assert_array_equal(ours, jax.random.key_data(jax.random.fold_in(KEY, index)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"together": 1},
        {"together": 4},
        {"form": "map", "chunk": 3},
        {"form": "loop"},
        {"form": None},
        {"mesh": True},
    ],
    ids=str,
)
def test_each_is_trained_as_if_it_were_alone(settings):
    if settings.get("mesh"):
        settings = {"mesh": jax.make_mesh((8,), ("d",), (jax.sharding.AxisType.Explicit,))}
    found = halve(RATES, **settings)
    check_as_alone(found, RATES)
    # By the scores at the rungs, worked out here.
    first = [alone(rate, 2)[1] for rate in RATES]
    go_on = sorted(range(8), key=lambda i: first[i])[:4]
    wanted = sorted(go_on, key=lambda i: alone(RATES[i], 6)[1])
    assert found.survivors == tuple(wanted)
    for i in range(8):
        assert found.status[i] == ("finished" if i in go_on else "failed" if i == 7 else "stopped")
        assert found.steps[i] == (6 if i in go_on else 2)
        assert np.isfinite(found.curves[i]).tolist() == [i != 7, i in go_on]
    assert np.isnan(found.values[7])


def test_one_rung_is_plain_training_side_by_side():
    found = halve(RATES[:7], rungs=5)
    assert set(found.status) == {"finished"}
    assert len(found.survivors) == 7
    check_as_alone(found, RATES[:7])


def test_the_same_call_gives_the_same_bits():
    first, second = halve(RATES), halve(RATES, batches=lambda: iter(BATCHES))
    np.testing.assert_array_equal(first.curves, second.curves)
    assert first.survivors == second.survivors
    np.testing.assert_array_equal(first.states[0]["w"], second.states[0]["w"])


def test_of_equals_the_first_goes_on_and_thirds_are_thirds():
    found = halve([0.1] * 9, keep=1 / 3, rungs=(2, 4, 6))
    assert found.steps.tolist() == [6, 4, 4, 2, 2, 2, 2, 2, 2]
    assert found.survivors == (0,)
    found = halve([0.1] * 2, keep=0.1)
    assert found.survivors == (0,)  # one at least


def test_maximizing_is_minimizing_of_the_opposite():
    found = search.successive_halving(
        init, step, lambda state, candidate: -score(state, candidate),
        [{"rate": rate} for rate in RATES], BATCHES,
        rungs=(2, 6), keep=0.5, form="vmap", direction="maximize", key=KEY,
    )  # fmt: skip
    assert found.survivors == halve(RATES).survivors


def test_a_rule_says_who_goes_on():
    asked = []

    def keep(curves, rungs, direction):
        asked.append((curves.copy(), rungs, direction))
        curves[:] = 0.0  # its own
        return np.arange(8) % 2 == curves.shape[1] % 2

    found = halve(RATES, keep=keep, rungs=(2, 4, 6))
    check_as_alone(found, RATES)
    assert found.steps.tolist() == [2, 4, 2, 4, 2, 4, 2, 2]
    assert found.status == ("stopped",) * 7 + ("failed",)
    assert found.survivors == ()
    for reached, (curves, rungs, direction) in enumerate(asked, start=1):
        assert (rungs, direction) == ((2, 4, 6), "minimize")
        np.testing.assert_array_equal(curves, found.curves[:, :reached])
    assert len(asked) == 2
    with pytest.raises(ValueError, match=r"keep returned float64 \(8,\): it must"):
        halve(RATES, keep=lambda *_: np.ones(8))
    with pytest.raises(ValueError, match=r"keep returned bool \(1,\): .* 8 candidates"):
        halve(RATES, keep=lambda *_: [True])


def test_all_may_fail():
    found = halve([1e20, 1e25])
    assert found.status == ("failed", "failed")
    assert (found.survivors, found.states, found.steps.tolist()) == ((), (), [2, 2])
    assert np.isnan(found.values).all()


def test_structures_compete_with_each_other():
    def wide(candidate, key):
        return {"w": jnp.zeros((candidate["width"], 3))}

    def train(state, candidate, batch):
        x, y = batch
        w = state["w"]
        gradient = x.T @ (x @ w.sum(0) - y) / len(y)
        return {"w": w - candidate["rate"] * gradient / len(w)}

    candidates = [
        {"width": 1, "rate": 0.1},
        {"width": 2, "rate": 0.3},
        {"width": 1, "rate": 0.2},
        {"width": 2, "rate": 0.01},
    ]
    found = search.successive_halving(
        wide, train, lambda state, _: jnp.sum((state["w"].sum(0) - TRUE) ** 2), candidates, BATCHES,
        rungs=(2, 6), keep=0.5, direction="minimize", key=KEY, static="width", form="vmap",
    )  # fmt: skip
    assert found.survivors == (1, 2)
    assert [state["w"].shape for state in found.states] == [(2, 3), (1, 3)]
    for index, each in enumerate(candidates):
        wanted = alone(each["rate"], found.steps[index])[1]
        np.testing.assert_allclose(found.values[index], wanted, rtol=2e-4)


def test_a_search_records_what_was_stopped_and_what_failed(tmp_path):
    space = {"rate": search.Choice(tuple(RATES))}
    evaluate = search.halving_evaluator(
        init, step, score, BATCHES, measure="distance", direction="minimize", rungs=(2, 6),
        keep=0.5, key=KEY, form="vmap", known=lambda candidate: {"flops": 12},
    )  # fmt: skip
    run = lambda stop, file: search.run(
        space, evaluate, search.strategies.grid(), batch=4, key=KEY, stop=stop, file=file,
        objectives={"distance": "minimize", "flops": "minimize"}, progress=False,
    )  # fmt: skip
    study = run(8, tmp_path / "whole.jsonl")
    statuses = [trial.status for trial in study.trials]
    assert statuses.count("finished") == 4
    assert statuses.count("failed") == 1
    best = study.front[0]
    assert best.told["steps"] == 6
    assert len(best.told["curve"]) == 2
    np.testing.assert_allclose(
        best.values[0], alone(study.candidate(best)["rate"], 6)[1], rtol=1e-4
    )
    # Killed after a batch, it goes on to the same trials.
    run(4, tmp_path / "killed.jsonl")
    again = run(8, tmp_path / "killed.jsonl")
    untimed = lambda trials: [trial._replace(seconds=0.0) for trial in trials]
    assert untimed(again.trials) == untimed(study.trials)
    assert len((tmp_path / "killed.jsonl").read_text().split("\n")) > 8
    json.dumps(best.told)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rungs": (5, 5)}, ValueError, "rungs are"),
        ({"rungs": 0}, ValueError, "rungs is 0"),
        ({"keep": 0}, ValueError, "keep is 0"),
        ({"keep": 1.5}, ValueError, "keep is 1.5"),
        ({"direction": "up"}, ValueError, "direction is 'up'"),
        ({"form": "pmap"}, ValueError, "form is 'pmap'"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": iter(BATCHES)}, TypeError, "read only once"),
        ({"batches": [np.ones(2), np.ones(3)]}, ValueError, r"has shape \(3,\)"),
        ({"batches": [{"x": 1.0}, {"y": 1.0}]}, ValueError, "batches: x is not in all of them"),
        ({"batches": [()]}, ValueError, "a batch holds no array"),
    ],
)
def test_errors_come_before_anything_is_computed(settings, error, message):
    with pytest.raises(error, match=message):
        halve(RATES, **settings)


def test_a_step_must_return_what_it_was_given():
    bad = lambda state, candidate, batch: {**state, "w": state["w"][:2]}
    with pytest.raises(TypeError, match=r"step: w is float32 \(3,\) before and float32 \(2,\)"):
        search.successive_halving(
            init, bad, score, [{"rate": 0.1}], BATCHES, rungs=2, direction="minimize", key=KEY
        )
    with pytest.raises(ValueError, match="candidates is empty"):
        halve([])


@pytest.mark.parametrize(
    ("made", "shown"),
    [(None, "None"), (1j * jnp.ones(()), "shape"), (jnp.ones(3), r"shape \(3,\)")],
)
def test_a_score_must_order_candidates(made, shown):
    with pytest.raises(TypeError, match=f"score must return one real number, not .*{shown}"):
        search.successive_halving(
            init, step, lambda state, _: made, [{"rate": 0.1}], BATCHES,
            rungs=1, direction="minimize", key=KEY, form="vmap",
        )  # fmt: skip


def test_an_evaluator_is_refused_before_a_search_takes_its_errors_for_failures():
    def make(known=None, **settings):
        settings = {"measure": "loss", "direction": "minimize", "rungs": 1, "key": KEY, **settings}
        return search.halving_evaluator(init, step, score, BATCHES, known=known, **settings)

    for settings, error, message in (
        ({"direction": "up"}, ValueError, "direction is 'up'"),
        ({"rung": 3}, TypeError, "unexpected keyword argument 'rung'"),
        ({"measure": "steps"}, ValueError, "measure='steps' means something else"),
        ({"measure": 3}, TypeError, "measure must be what the score is called"),
        ({"known": 3}, TypeError, "known must be a function"),
        ({"form": "loop", "mesh": jax.make_mesh((8,), ("d",))}, ValueError, "runs on one device"),
    ):
        with pytest.raises(error, match=message):
            make(**settings)
    assert make()([]) == []
    with pytest.raises(ValueError, match="known returned 'loss', which training tells"):
        make(lambda _: {"loss": 0.0})([{"rate": 0.1}])
    with pytest.raises(TypeError, match="known must return a dict of measures, not 3"):
        make(lambda _: 3)([{"rate": 0.1}])
