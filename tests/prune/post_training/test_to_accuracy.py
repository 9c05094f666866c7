"""The search for the highest sparsity: its bound, its optimum, its budgets, and resuming it."""

import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp import tree as tree_lib
from jaxcomp.checkpoint import CheckpointError
from jaxcomp.prune import allocation, scores
from jaxcomp.prune.post_training.to_accuracy import FILE, to_accuracy
from jaxcomp.prune.structures import NM, Channel


def make_params():
    rng = np.random.default_rng(0)
    return {
        "first": {"kernel": jnp.asarray(rng.normal(size=(20, 30)), jnp.float32)},
        "second": {"kernel": jnp.asarray(rng.normal(size=(30, 20)), jnp.float32)},
        "bias": jnp.zeros(20),
    }


PARAMS = make_params()
SIZE = 1200


def zeros_of(params):
    return sum(int(jnp.sum(leaf["kernel"] == 0)) for leaf in (params["first"], params["second"]))


class Killed(Exception):
    """Stands for the end of a process."""


def table_evaluate(values, log=None, end=None):
    """A value looked up by the number of zeros, as noisy as the table is; ends at a call."""

    def evaluate(params):
        if log is not None:
            log.append(zeros_of(params))
            if end is not None and len(log) > end:
                raise Killed
        return float(values[zeros_of(params) * len(values) // (SIZE + 1)])

    return evaluate


@settings(max_examples=30)
@given(st.floats(0.01, 0.99), st.sampled_from([0.05, 0.005, 0.001]))
def test_finds_the_edge_of_a_monotone_function(edge, tolerance):
    """Within the tolerance below where the value falls, whatever the edge."""
    evaluate = lambda params: 1.0 if zeros_of(params) <= edge * SIZE else 0.0
    found = to_accuracy(PARAMS, evaluate, 0.5, tolerance=tolerance)
    assert zeros_of(found.params) <= edge * SIZE
    assert found.sparsity == zeros_of(found.params) / SIZE
    if found.stopped_by == "highest":
        assert edge * SIZE >= round(0.999 * SIZE)
    else:
        assert found.stopped_by == "tolerance"
        # The next sparsity that was tried is not within bounds, and one tolerance away at most.
        over = min(t.asked for t in found.history if not t.within)
        best = max(t.asked for t in found.history if t.within)
        assert over - best <= tolerance
        assert edge - found.sparsity <= tolerance + 1 / SIZE
    assert len(found.history) <= 12 + math.log2(0.25 / tolerance)


noise = st.one_of(st.floats(-2, 2), st.sampled_from([math.nan, math.inf, -math.inf, 1.0]))


@settings(max_examples=40)
@given(
    st.lists(noise, min_size=5, max_size=40),
    st.floats(0, 1),
    st.one_of(st.none(), st.integers(1, 8)),
    st.floats(0, 0.9),
)
def test_never_out_of_bounds_however_noisy(values, max_drop, budget, lowest):
    values = [1.0, *values]
    log = []
    evaluate = table_evaluate(values, log)
    found = to_accuracy(
        PARAMS, evaluate, max_drop, max_evaluations=budget, lowest=lowest, tolerance=0.02
    )
    assert found.dense_value == 1.0
    assert math.isfinite(found.value)
    assert 1.0 - found.value <= max_drop
    assert evaluate(found.params) == found.value
    log.pop()
    evaluated = [trial for trial in found.history if not trial.empty]
    assert len(log) == len(evaluated)
    assert budget is None or len(log) <= budget
    assert len(set(log)) == len(log)
    # The best of all that were seen, by the test's own account of them.
    fine = [
        n for n in log if math.isfinite(v := table_evaluate_at(values, n)) and 1 - v <= max_drop
    ]
    assert zeros_of(found.params) == max(fine)
    for trial, zeros in zip(evaluated, log, strict=True):
        assert trial.sparsity == zeros / SIZE
        np.testing.assert_equal(trial.value, table_evaluate_at(values, zeros))
    if found.stopped_by == "max_evaluations":
        assert len(log) == budget


def table_evaluate_at(values, zeros):
    return float(values[zeros * len(values) // (SIZE + 1)])


def assert_same(one, two):
    assert jax.tree.structure(one.params) == jax.tree.structure(two.params)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(one.masks), jax.tree.leaves(two.masks), strict=True):
        np.testing.assert_array_equal(a, b)
    timeless = lambda found: [str(trial._replace(seconds=0.0)) for trial in found.history]
    assert timeless(one) == timeless(two)
    assert one.stopped_by == two.stopped_by
    assert (one.value, one.sparsity) == (two.value, two.sparsity)


TABLE = [1.0, 0.99, 0.97, math.nan, 0.96, 0.98, 0.95, 0.91, 0.5, 0.7, 0.1]


def test_killed_at_every_evaluation_and_resumed(tmp_path):
    how = {"max_drop": 0.055, "tolerance": 0.003}
    log = []
    whole = to_accuracy(PARAMS, table_evaluate(TABLE, log), **how)
    calls = len(log)
    assert calls > 6
    for end in range(calls):
        directory = tmp_path / str(end)
        with pytest.raises(Killed):
            to_accuracy(PARAMS, table_evaluate(TABLE, [], end), directory=directory, **how)
        again = []
        resumed = to_accuracy(PARAMS, table_evaluate(TABLE, again), directory=directory, **how)
        assert again == log[end:]
        assert_same(resumed, whole)
        assert os.listdir(directory) == [FILE]
    to_accuracy(PARAMS, table_evaluate(TABLE, again, 0), directory=directory, **how)
    assert again == log[end:]


def test_killed_at_every_evaluation_in_turn(tmp_path):
    """One evaluation a life still comes to the end, each made once."""
    how = {"max_drop": 0.055, "tolerance": 0.003}
    log = []
    whole = to_accuracy(PARAMS, table_evaluate(TABLE, log), **how)
    lives = []
    for _ in log:
        made = []
        try:
            last = to_accuracy(PARAMS, table_evaluate(TABLE, made, 1), directory=tmp_path, **how)
        except Killed:
            made.pop()
        lives += made
    assert lives == log
    assert_same(last, whole)


SCRIPT = """
    import os, signal, sys
    from tests.prune.post_training.test_to_accuracy import PARAMS, TABLE, table_evaluate
    from tests.prune.post_training.test_to_accuracy import to_accuracy
    log = []
    evaluate = table_evaluate(TABLE, log)
    def killed(params):
        value = evaluate(params)
        if len(log) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return value
    to_accuracy(PARAMS, killed, 0.055, tolerance=0.003, directory=sys.argv[1])
"""


def test_resumed_after_a_kill(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=os.getcwd())
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    log, rest = [], []
    whole = to_accuracy(PARAMS, table_evaluate(TABLE, log), 0.055, tolerance=0.003)
    evaluate = table_evaluate(TABLE, rest)
    resumed = to_accuracy(PARAMS, evaluate, 0.055, tolerance=0.003, directory=tmp_path)
    assert rest == log[3:]
    assert_same(resumed, whole)


def test_ctrl_c_returns_the_best_so_far(tmp_path):
    log = []
    evaluate = table_evaluate([1.0] * 10 + [0.0], log)

    def interrupted(params):
        if len(log) == 3:
            raise KeyboardInterrupt
        return evaluate(params)

    found = to_accuracy(PARAMS, interrupted, 0.1, directory=tmp_path)
    assert found.stopped_by == "interrupted"
    assert zeros_of(found.params) == max(log) == 900
    assert "stopped by interrupted" in str(found)
    finished = to_accuracy(PARAMS, evaluate, 0.1, directory=tmp_path)
    assert finished.stopped_by == "tolerance"
    assert finished.sparsity > found.sparsity

    def at_once(params):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_accuracy(PARAMS, at_once, 0.1)


def test_budgets_go_on_in_a_later_call(tmp_path):
    log = []
    evaluate = table_evaluate(TABLE, log)
    few = to_accuracy(PARAMS, evaluate, 0.055, max_evaluations=3, directory=tmp_path)
    assert few.stopped_by == "max_evaluations"
    assert len(log) == len(few.history) == 3
    assert_same(to_accuracy(PARAMS, evaluate, 0.055, max_evaluations=3, directory=tmp_path), few)
    assert len(log) == 3
    more = to_accuracy(PARAMS, evaluate, 0.055, directory=tmp_path)
    assert len(set(log)) == len(log) == len(more.history)
    assert more.history[:3] == few.history
    # Other bounds read what is known, and evaluate only what is not.
    known = len(log)
    tighter = to_accuracy(PARAMS, evaluate, 0.015, directory=tmp_path)
    assert len(set(log)) == len(log) < known + len(tighter.history)
    assert_same(tighter, to_accuracy(PARAMS, table_evaluate(TABLE), 0.015))


def test_a_budget_of_seconds_by_the_clock_given(tmp_path):
    ticks = itertools.count()
    clock = lambda: float(next(ticks))
    evaluate = table_evaluate([1.0] * 10 + [0.0])
    how = {"clock": clock, "directory": tmp_path}
    found = to_accuracy(PARAMS, evaluate, 0.1, max_seconds=2.5, **how)
    assert found.stopped_by == "max_seconds"
    assert [trial.seconds for trial in found.history] == [1.0, 1.0, 1.0]
    longer = to_accuracy(PARAMS, evaluate, 0.1, max_seconds=4.0, **how)
    assert len(longer.history) == 4
    assert longer.history[:3] == found.history
    nothing = to_accuracy(PARAMS, evaluate, 0.1, max_seconds=0.0)
    assert nothing.sparsity == 0
    assert nothing.params is PARAMS
    assert len(nothing.history) == 1


def test_the_file_of_another_call_and_a_damaged_one(tmp_path):
    evaluate = table_evaluate(TABLE)
    call = lambda params=PARAMS, **how: to_accuracy(
        params, evaluate, 0.1, directory=tmp_path, max_evaluations=2, **how
    )
    call()
    other = {**PARAMS, "bias": jnp.ones(20)}
    with pytest.raises(ValueError, match=r"another params/bias: .* pass another directory"):
        call(other)
    with pytest.raises(ValueError, match="another allocation"):
        call(allocation=allocation.uniform)
    with pytest.raises(ValueError, match="another structure"):
        call(structure=Channel(0))
    with pytest.raises(ValueError, match="another scores/first/kernel"):
        call(score=lambda weight, evidence: weight**2 + 1)
    with pytest.raises(ValueError, match="another removed weights"):
        call(paths="first/*")
    first = {"first/kernel": 0.2, "second/kernel": 0.4}
    with pytest.raises(ValueError, match="another allocation"):
        call(allocation=allocation.fixed(first))
    data = bytearray((tmp_path / FILE).read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(CheckpointError):
        call()


def test_evidence_by_path_and_as_a_tree():
    """Only what evidence says is unimportant goes, whatever the magnitudes."""
    first = jnp.zeros((20, 30)).at[:, :15].set(1.0)
    by_path = tree_lib.Leaves({"first/kernel": first, "second/kernel": jnp.ones((30, 20))})
    as_tree = {"first": {"kernel": first}, "second": {"kernel": jnp.ones((30, 20))}, "bias": 0.0}
    score = lambda weight, evidence: jnp.abs(weight) * evidence + evidence

    def evaluate(params):
        return jnp.sum(jnp.abs(params["first"]["kernel"]) * first) + jnp.sum(
            jnp.abs(params["second"]["kernel"])
        )

    for evidence in (by_path, as_tree):
        found = to_accuracy(PARAMS, evaluate, 0.0, score=score, evidence=evidence, tolerance=0.001)
        assert 0.249 <= found.sparsity <= 0.25
        assert bool(jnp.all(found.masks["second"]["kernel"]))
        assert bool(jnp.all(found.masks["first"]["kernel"][:, :15]))
        assert bool(jnp.all(found.masks["bias"]))
    del by_path["first/kernel"]
    with pytest.raises(ValueError, match="first/kernel: no evidence for this leaf"):
        to_accuracy(PARAMS, evaluate, 0.0, score=score, evidence=by_path)
    with pytest.raises(ValueError, match=r"taylor.*gradient"):
        to_accuracy(PARAMS, evaluate, 0.0, score=scores.taylor)


def test_structures_paths_and_leaves_left_empty():
    always = lambda params: 1.0
    found = to_accuracy(
        PARAMS, always, 0.0, structure=NM(1, 4), allocation=allocation.uniform, paths="first/*"
    )
    assert found.sparsity == 0.75
    assert found.params["second"] is not None
    np.testing.assert_array_equal(found.params["second"]["kernel"], PARAMS["second"]["kernel"])
    runs = np.asarray(found.masks["first"]["kernel"]).reshape(5, 4, 30).sum(1)
    np.testing.assert_array_equal(runs, 1)
    # A leaf of low scores is emptied by one threshold; that is refused, not evaluated.
    low = {**PARAMS, "first": {"kernel": PARAMS["first"]["kernel"] * 1e-6}}

    def evaluate(params):
        assert bool(jnp.any(params["first"]["kernel"]))
        return 1.0

    found = to_accuracy(low, evaluate, 0.0, tolerance=0.001)
    assert 0.498 <= found.sparsity < 0.5
    assert found.stopped_by == "tolerance"
    assert any(trial.empty == "first/kernel" for trial in found.history)
    assert "first/kernel is left empty" in str(found)
    # Nor does any allocation lose the last weight that way and go on.
    uniform = to_accuracy(low, evaluate, 0.0, allocation=allocation.uniform)
    assert uniform.stopped_by == "highest"
    assert uniform.sparsity == pytest.approx(0.999, abs=1e-3)


def test_a_loss_a_selection_and_a_traced_value():
    target = PARAMS["first"]["kernel"]
    leaves = tree_lib.Leaves({"k": target})
    loss = jax.jit(lambda params: jnp.mean((params["k"] - target) ** 2))
    found = to_accuracy(leaves, lambda params: -loss(params), 0.05)
    assert isinstance(found.params, tree_lib.Leaves)
    assert isinstance(found.masks, tree_lib.Leaves)
    # An independent account: squares of the smallest, summed until the bound.
    squares = np.sort(np.ravel(np.asarray(target, np.float64)) ** 2)
    most = int(np.sum(np.cumsum(squares) / squares.size <= 0.05)) / squares.size
    assert most - 0.005 - 1 / 600 <= found.sparsity <= most


@pytest.mark.parametrize(
    "value", [None, "0.9", jnp.ones(1), np.ones((2, 2)), (0.9, {}), True, jnp.array(True), 1j]
)
def test_evaluate_that_gives_no_number(value, tmp_path):
    with pytest.raises(TypeError, match="evaluate must return one real number"):
        to_accuracy(PARAMS, lambda params: value, 0.1, directory=tmp_path)


def test_numbers_of_every_kind():
    for one in (1, np.float64(1), np.float32(1), jnp.int32(1), jnp.bfloat16(1), np.array(1.0)):
        found = to_accuracy(PARAMS, lambda params, one=one: one, 0.0, max_evaluations=1)
        assert found.value == 1.0
        assert type(found.value) is float


def test_bad_calls():
    fine = lambda params: 1.0
    with pytest.raises(TypeError, match="evaluate"):
        to_accuracy(PARAMS, 0.9, 0.1)
    with pytest.raises(TypeError, match="score"):
        to_accuracy(PARAMS, fine, 0.1, score="magnitude")
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="for the dense parameters"):
            to_accuracy(PARAMS, lambda params, value=value: value, 0.1)
    for bad, words in (
        ({"max_drop": -0.1}, "max_drop is -0.1"),
        ({"max_drop": math.nan}, "max_drop is nan"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"lowest": -0.1}, "lowest"),
        ({"highest": 1.0}, "highest"),
        ({"lowest": 0.9, "highest": 0.5}, "above highest"),
        ({"max_evaluations": 0}, "max_evaluations"),
        ({"max_seconds": math.nan}, "max_seconds"),
        ({"paths": "third/*"}, "'third/\\*' matches no leaf; nearest"),
        ({"paths": ()}, "paths is empty"),
        ({"structure": NM(2, 7)}, "first/kernel: .* divisible by 7"),
        ({"score": lambda w, e: jnp.full(w.shape, jnp.nan)}, "first/kernel: .*NaN"),
        ({"score": lambda w, e: jnp.sum(w)}, "first/kernel: the score gave"),
    ):
        with pytest.raises(ValueError, match=words):
            to_accuracy(PARAMS, fine, **{"max_drop": 0.1, **bad})
    with pytest.raises(ValueError, match="no weight to compress"):
        to_accuracy({"bias": jnp.ones(3)}, fine, 0.1)
    broken = {**PARAMS, "first": {"kernel": jnp.full((20, 30), jnp.nan)}}
    with pytest.raises(ValueError, match="first/kernel: 600 of 600 values are NaN"):
        to_accuracy(broken, fine, 0.1)


def test_not_even_the_lowest():
    found = to_accuracy(PARAMS, lambda p: float(zeros_of(p) == 0), 0.5, lowest=0.3)
    assert found.stopped_by == "lowest"
    assert found.sparsity == 0
    assert found.params is PARAMS
    assert [trial.asked for trial in found.history] == [0.0, 0.5, 0.3]


def test_a_module_with_functions_among_its_leaves(tmp_path):
    model = eqx.nn.MLP(4, 3, 16, 1, key=jax.random.key(0))
    inputs = jnp.linspace(-1, 1, 32).reshape(8, 4)
    target = jax.vmap(model)(inputs)
    evaluate = lambda model: -jnp.mean((jax.vmap(model)(inputs) - target) ** 2)
    found = to_accuracy(model, evaluate, 0.01, directory=tmp_path)
    again = to_accuracy(model, lambda model: 1 / 0, 0.01, directory=tmp_path)
    for one in (found, again):
        assert one.params.activation is model.activation
        assert 0 < one.sparsity < 1
        assert float(evaluate(one.params)) == one.value >= -0.01
    assert bool(again.masks.activation)
