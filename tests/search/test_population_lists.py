"""Lists of candidates: grouped by structure, stacked, evaluated as a search asks for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import search

ACTS = {"tanh": jnp.tanh, "relu": jax.nn.relu}
X = np.linspace(-1, 1, 6, dtype=np.float32)
KEY = jax.random.key(0)


def test_stacking_takes_numbers_arrays_and_keys():
    keys = jax.random.split(KEY, 2)
    found = search.stack(
        [
            {"a": (1, True, None), "b": np.arange(2.0), "k": keys[0], "h": jnp.bfloat16(1)},
            {"a": (2.5, False, None), "b": np.ones(2), "k": keys[1], "h": jnp.bfloat16(2)},
        ]
    )
    assert found["a"][0].dtype == jnp.float32
    assert found["a"][1].dtype == jnp.bool_
    assert found["a"][2] is None
    assert found["h"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["b"], [[0, 1], [1, 1]])
    np.testing.assert_array_equal(jax.random.key_data(found["k"]), jax.random.key_data(keys))


@pytest.mark.parametrize(
    ("candidates", "error", "message"),
    [
        ([], ValueError, "candidates is empty"),
        ([{"a": 1}, {"a": 1, "b": {"c": 2}}], ValueError, "candidate 1 has 'b/c'"),
        ([{"a": {"b": 1}}, {"a": {}}], ValueError, "candidate 1 lacks 'a/b'"),
        ([{"a": (1,)}, {"a": [1]}], ValueError, "nested otherwise"),
        ([{"a": np.ones(2)}, {"a": np.ones(3)}], ValueError, r"a: shapes \(2,\) and \(3,\)"),
        ([{"a": 1}, {"a": 2**40}], ValueError, "a: 1099511627776 is beyond int32"),
        ([{"a": 1}, {"a": "x"}], TypeError, "a: a candidate has 'x' here"),
        ([0.5, max], TypeError, "candidates: a candidate has <built-in"),
    ],
)
def test_what_does_not_stack_is_named(candidates, error, message):
    with pytest.raises(error, match=message):
        search.stack(candidates)


def test_groups_are_programs():
    candidates = [
        {"layers": [8, 8], "act": "relu", "rate": 0.1},
        {"layers": [8], "act": "relu", "rate": 0.2},
        {"layers": [8, 8], "act": "relu", "rate": 0.3},
        {"layers": [8, 16], "act": "relu", "rate": 0.3},
        {"layers": [True, 8], "act": "relu", "rate": 0.3},
    ]
    indices = lambda static: [g.indices for g in search.groups(candidates, static)]
    assert indices(()) == [(0, 2, 3, 4), (1,)]
    assert indices("layers/*") == [(0, 2), (1,), (3,), (4,)]  # True is not 1
    assert indices(("layers/*", "rate")) == [(0,), (1,), (2,), (3,), (4,)]
    assert search.groups([]) == []
    with pytest.raises(TypeError, match="a: an array cannot be static"):
        search.groups([{"a": np.ones(2)}], "a")


def measures(candidate, x):
    """Depth, activation and width make programs; rates do not."""
    for layer in candidate["layers"]:
        x = ACTS[candidate["act"]](x * layer["rate"])
    return {"mean": x.mean(), "wide": jnp.zeros(candidate["width"]) + x.max()}


def by_hand(candidate):
    x = X
    for layer in candidate["layers"]:
        x = x * layer["rate"]
        x = np.tanh(x) if candidate["act"] == "tanh" else np.maximum(x, 0)
    return {"mean": x.mean(), "wide": np.full(candidate["width"], x.max())}


def test_an_evaluator_takes_candidates_of_any_structure():
    space = {
        "layers": search.Repeat(search.Integer(1, 2), {"rate": search.Continuous(0.5, 2.0)}),
        "act": search.Choice(("tanh", "relu")),
        "width": search.Integer(2, 3),
    }
    keys = jax.random.split(KEY, 8)
    candidates = [search.spaces.decode(space, search.spaces.sample(space, key)) for key in keys]
    programs = []

    def counted(candidate, x):
        programs.append(candidate)
        return measures(candidate, x)

    evaluate = search.evaluator(counted, X, static="width", form="vmap")
    for some in (candidates, candidates[:3], []):
        for candidate, found in zip(some, evaluate(some), strict=True):
            wanted = by_hand(candidate)
            np.testing.assert_allclose(found["mean"], wanted["mean"], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found["wide"], wanted["wide"], rtol=1e-5)
            assert isinstance(found["mean"], float)
    before = len(programs)
    evaluate(candidates)
    assert len(programs) == before  # made once


def test_a_search_uses_it_and_records_what_is_nan(tmp_path):
    space = {"x": search.Choice((0.0, 1.0, -1.0, 4.0))}
    evaluate = search.evaluator(lambda c: {"root": jnp.sqrt(c["x"])}, form="map")
    study = search.run(
        space, evaluate, search.strategies.grid(), objectives={"root": "maximize"},
        key=KEY, stop=4, batch=3, progress=False,
    )  # fmt: skip
    assert study.candidate(study.best) == {"x": 4.0}
    failed = [trial for trial in study.trials if trial.status == "failed"]
    assert [study.candidate(trial)["x"] for trial in failed] == [-1.0]


def test_a_candidate_may_be_all_static_and_a_measure_one_number():
    evaluate = search.evaluator(lambda c, x: ACTS[c](x).sum(), X)  # the form is chosen
    found = evaluate(["relu", "tanh", "relu", "relu"])
    np.testing.assert_allclose(
        found, [X.clip(0).sum(), 0, X.clip(0).sum(), X.clip(0).sum()], atol=1e-6
    )
    with pytest.raises(TypeError, match="function must be"):
        search.evaluator(None)
    with pytest.raises(ValueError, match="chunk is 0"):
        search.evaluator(measures, chunk=0)
    with pytest.raises(TypeError, match="candidates must be a list of them, not dict"):
        evaluate({"a": "relu"})
    with pytest.raises(TypeError, match="candidates must be a list of them, not dict"):
        search.stack({"a": 1})
