"""Ranks under a budget against all choices, and the search by accuracy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import nbytes
from jaxcomp.factorize import (
    Budget,
    LowRank,
    allocate,
    low_rank_apply,
    spectra,
    svd,
    to_accuracy,
    truncated,
)
from jaxcomp.model import trace

RNG = np.random.default_rng(0)


def decaying(m, n, rate, seed):
    values = RNG.normal(size=(m, n))
    u, _, v = np.linalg.svd(values, full_matrices=False)
    return jnp.asarray(u * rate ** np.arange(min(m, n)) @ v, jnp.float32)


PARAMS = {
    "first": {"kernel": decaying(12, 8, 0.5, 0), "bias": jnp.ones(8)},
    "second": {"kernel": decaying(8, 10, 0.8, 1)},
    "third": {"kernel": decaying(10, 6, 0.95, 2)},
}
BATCHES = [jnp.asarray(RNG.normal(size=(32, 12)) * np.linspace(0.1, 2, 12), jnp.float32)]


def model(p, x):
    x = jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"])
    return jnp.tanh(x @ p["second"]["kernel"]) @ p["third"]["kernel"]


FOUND = spectra(model, PARAMS, BATCHES)


def every_choice(kind):
    """Cost and error of all combinations of ranks, counted anew."""
    sizes = {p: s.shape for p, s in FOUND.leaves.items()}
    tables = []
    for path, (m, n) in sizes.items():
        squares = FOUND.leaves[path].values[0].astype(np.float64) ** 2
        dense = FOUND.leaves[path].flops if kind == "flops" else m * n
        unit = {"bytes": 4, "parameters": 1, "flops": 1}[kind]
        share = dense / (m * n)
        choices = [
            (unit * round(r * (m + n) * share), squares[r:].sum() / squares.sum())
            for r in range(1, min(m, n) + 1)
            if r * (m + n) < m * n
        ]
        tables.append([*choices, (unit * dense, 0.0)])
    fixed = FOUND.totals[kind] - sum(table[-1][0] for table in tables)
    for choice in itertools.product(*tables):
        yield fixed + sum(cost for cost, _ in choice), sum(error for _, error in choice)


@pytest.mark.parametrize("kind", ["bytes", "parameters", "flops"])
def test_a_budget_is_kept_and_nearly_the_best_is_found(kind):
    choices = list(every_choice(kind))
    for share in (0.45, 0.6, 0.8, 0.95):
        chosen = allocate(FOUND, Budget(**{kind: share}))
        limit = share * FOUND.totals[kind]
        best = min(error for cost, error in choices if cost <= limit)
        assert chosen.cost <= limit
        assert any(
            cost == chosen.cost and math.isclose(error, chosen.error, abs_tol=1e-6)
            for cost, error in choices
        )
        assert chosen.bound - 1e-9 <= best <= chosen.error + 1e-9
        assert chosen.error <= best + 0.05


def test_a_budget_for_everything_leaves_all_dense():
    chosen = allocate(FOUND, Budget(bytes=1.0))
    assert set(chosen.ranks.values()) == {None}
    assert (chosen.error, chosen.bound, chosen.cost) == (0, 0, chosen.dense_cost)
    assert "dense" in str(chosen)
    assert truncated(FOUND, chosen.ranks)["first"]["kernel"] is PARAMS["first"]["kernel"]


def test_bytes_and_flops_are_those_of_the_model():
    chosen = allocate(FOUND, Budget(bytes=0.6))
    params = truncated(FOUND, chosen.ranks)
    assert nbytes(params) == chosen.cost
    by_flops = allocate(FOUND, Budget(flops=0.7))
    fast = low_rank_apply(model, truncated(FOUND, by_flops.ranks), BATCHES[0])
    counted = trace(fast.apply, truncated(FOUND, by_flops.ranks), BATCHES[0]).total.flops
    # The count of a sum of products has no part for the bias of each factor.
    assert abs(counted - by_flops.cost) <= 0.03 * by_flops.dense_cost
    rows = svd(model, PARAMS, BATCHES, chosen.rules, sequential=False).leaves
    for row in rows:
        want = chosen.errors[row.path]
        assert row.form == f"rank {chosen.ranks[row.path]}"
        np.testing.assert_allclose(row.output_error, want, rtol=1e-2, atol=1e-5)


def test_every_rank_is_a_cut_of_the_largest():
    found = spectra(None, PARAMS, None)
    for rank in (1, 3):
        want = svd(None, PARAMS, None, {"first/kernel": LowRank(rank)}).params
        got = truncated(found, {"first/kernel": rank})
        np.testing.assert_allclose(
            got["first"]["kernel"].decode(), want["first"]["kernel"].decode(), atol=1e-6
        )


def test_stacked_layers_are_cut_together(tmp_path):
    stack = {"kernel": jnp.stack([decaying(8, 8, 0.5, i) for i in range(3)])}

    scan = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["kernel"])[0]
    x = BATCHES[0][:, :8]
    found = spectra(scan, stack, [x], directory=tmp_path)
    again = spectra(scan, stack, [x], directory=tmp_path)
    small = truncated(again, {"kernel": 2})["kernel"]
    assert (small.shape, small.ranks) == ((3, 8, 8), {"r": 2})
    np.testing.assert_array_equal(small.decode(), truncated(found, {"kernel": 2})["kernel"])
    np.testing.assert_allclose(scan({"kernel": small}, x), scan({"kernel": small.decode()}, x))


def score(params):
    """Higher is better; falls with the bytes."""
    want = model(PARAMS, BATCHES[0])
    return -float(jnp.mean((model(params, BATCHES[0]) - want) ** 2))


def test_the_lowest_ranks_within_bounds(tmp_path):
    calls = []

    def evaluate(params):
        calls.append(1)
        return score(params)

    options = {"directory": tmp_path, "tolerance": 0.02, "clock": lambda: 0.0}
    found = to_accuracy(FOUND, evaluate, 1e-3, **options)
    assert found.stopped_by == "tolerance"
    assert found.dense_value - found.value <= 1e-3
    assert 0.05 < found.saved < 0.9
    np.testing.assert_allclose(score(found.params), found.value, rtol=1e-6)
    worse = [t for t in found.history if not t.within]
    assert min(t.asked for t in worse) > max(t.asked for t in found.history if t.within)
    count = len(calls)
    again = to_accuracy(FOUND, evaluate, 1e-3, **options)
    assert (len(calls), again.ranks, str(again)) == (count, found.ranks, str(found))
    few = to_accuracy(FOUND, score, 1e-3, max_evaluations=2)
    assert (few.stopped_by, len(few.history)) == ("max_evaluations", 2)
    none = to_accuracy(FOUND, lambda p: 1.0 if p is PARAMS else 0.0, 0.0, tolerance=0.1)
    assert none.saved == 0
    assert to_accuracy(FOUND, lambda p: 0.0, 0.0).stopped_by == "highest"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: allocate(FOUND, 0.5), TypeError, r"Budget\(bytes=0.5\)"),
        (lambda: allocate(PARAMS, Budget(bytes=0.5)), TypeError, "factorize.spectra"),
        (lambda: truncated(PARAMS, {"first/kernel": 1}), TypeError, "factorize.spectra"),
        (lambda: allocate(FOUND, Budget()), ValueError, "of one of"),
        (lambda: allocate(FOUND, Budget(bytes=0.5, flops=0.5)), ValueError, "of one of"),
        (lambda: allocate(FOUND, Budget(bytes="few")), TypeError, "must be a number"),
        (lambda: allocate(FOUND, Budget(bytes=-1)), ValueError, "above 0"),
        (lambda: allocate(FOUND, Budget(bytes=0.01)), ValueError, "below what rank 1"),
        (
            lambda: allocate(spectra(None, PARAMS, None), Budget(flops=0.5)),
            ValueError,
            "give apply_fn",
        ),
        (lambda: truncated(FOUND, {"fist/kernel": 1}), ValueError, "nearest: first/kernel"),
        (lambda: truncated(FOUND, {"first/kernel": 8}), ValueError, "rank 8 saves nothing"),
        (lambda: truncated(FOUND, {"first/kernel": 0}), ValueError, "at least 1"),
        (lambda: to_accuracy(FOUND, lambda p: math.nan, 0.1), ValueError, "nothing to compare"),
        (lambda: to_accuracy(FOUND, lambda p: "good", 0.1), TypeError, "one real number"),
        (lambda: to_accuracy(FOUND, score, -1), ValueError, "max_drop"),
        (lambda: to_accuracy(FOUND, score, 0.1, highest=1.5), ValueError, "highest is 1.5"),
        (lambda: spectra(None, {"w": jnp.ones((2, 2, 2))}, None), ValueError, "give batches"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
