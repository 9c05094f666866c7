"""Fronts, crowding and volumes against their definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp.search import Trial, pareto
from jaxcomp.search.ranking import Leaders, costs_of, follow, violation

small = st.sampled_from([0.0, 1.0, 2.0, 3.0, -1.5])


@st.composite
def candidates(draw):
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    costs = draw(hnp.arrays(np.float64, shape, elements=small))
    violations = draw(
        hnp.arrays(np.float64, shape[:1], elements=st.sampled_from([0.0, 0.0, 1.0, 2.0]))
    )
    return costs, violations


def beats(i, j, costs, violations):
    """Deb et al. 2002, definition 1, word by word."""
    if violations[i] == 0 and violations[j] > 0:
        return True
    if violations[i] > 0 and violations[j] > 0:
        return violations[i] < violations[j]
    if violations[i] > 0:
        return False
    no_worse = all(costs[i][k] <= costs[j][k] for k in range(costs.shape[1]))
    return no_worse and any(costs[i][k] < costs[j][k] for k in range(costs.shape[1]))


def peeled(costs, violations):
    left, ranks, rank = set(range(len(costs))), np.zeros(len(costs), int), 0
    while left:
        best = {j for j in left if not any(beats(i, j, costs, violations) for i in left)}
        for j in best:
            ranks[j] = rank
        left, rank = left - best, rank + 1
    return ranks


@given(candidates())
def test_ranks_are_fronts_peeled_off_one_by_one(found):
    np.testing.assert_array_equal(pareto.ranks(*found), peeled(*found))
    np.testing.assert_array_equal(pareto.front(*found), peeled(*found) == 0)
    expected = [[beats(i, j, *found) for j in range(len(found[0]))] for i in range(len(found[0]))]
    np.testing.assert_array_equal(pareto.dominates(*found), expected)


@given(candidates(), st.randoms())
def test_the_order_of_candidates_does_not_matter(found, random):
    costs, violations = found
    order = random.sample(range(len(costs)), len(costs))
    np.testing.assert_array_equal(
        pareto.ranks(costs, violations)[order], pareto.ranks(costs[order], violations[order])
    )


@given(candidates())
def test_leaders_are_the_front_of_all_so_far(found):
    costs, violations = found
    directions = ("minimize", "maximize", "minimize")[: costs.shape[1]]
    signs = np.array([1, -1, 1])[: costs.shape[1]]
    trials = [
        Trial(i, {}, tuple((row * signs).tolist()), "finished", 0.0, {"violation": float(beyond)})
        for i, (row, beyond) in enumerate(zip(costs, violations, strict=True))
    ]
    again, again_violations = costs_of(trials, directions)
    np.testing.assert_array_equal(again, costs)
    np.testing.assert_array_equal(again_violations, violations)
    leaders = Leaders()
    for trial in trials:
        leaders = follow(leaders, trial, directions)
    on_front = [trials[i] for i in np.flatnonzero(pareto.front(costs, violations))]
    distinct = {(violation(t), t.values): t for t in reversed(on_front)}
    if violation(leaders.trials[0]):
        assert leaders.trials == (on_front[0],)
    else:
        first = sorted(trial.number for trial in distinct.values())
        assert [trial.number for trial in leaders.trials] == first
    assert leaders.seen == len(trials)


def test_crowding_is_the_distance_between_neighbours():
    costs = np.array([[0, 10], [1, 6], [4, 5], [10, 0]], float)
    expected = [np.inf, 0.4 + 0.5, 0.9 + 0.6, np.inf]
    np.testing.assert_allclose(pareto.crowding(costs), expected)
    np.testing.assert_allclose(pareto.crowding(costs[::-1]), expected[::-1])
    np.testing.assert_array_equal(pareto.crowding(np.ones((3, 2))), [np.inf, 0, np.inf])
    assert pareto.crowding(np.empty((0, 2))).shape == (0,)


@given(
    hnp.arrays(
        np.int64, st.tuples(st.integers(0, 7), st.integers(1, 3)), elements=st.integers(-1, 6)
    )
)
def test_hypervolume_counts_the_cells_that_are_dominated(costs):
    corner = np.full(costs.shape[1], 5)
    cells = itertools.product(range(-1, 5), repeat=costs.shape[1])
    counted = sum(any((row <= cell).all() for row in costs) for cell in cells)
    assert pareto.hypervolume(costs, corner) == counted


def test_hypervolume_against_monte_carlo():
    rng = np.random.default_rng(0)
    for objectives in (2, 3, 4):
        costs, drawn = rng.random((12, objectives)), rng.random((50_000, objectives))
        share = (costs[:, None] <= drawn).all(axis=2).any(axis=0).mean()
        assert pareto.hypervolume(costs, np.ones(objectives)) == pytest.approx(share, abs=0.01)


def test_a_large_front_is_found_without_all_pairs():
    rng = np.random.default_rng(1)
    costs = rng.random((100_000, 2))
    on_front = np.flatnonzero(pareto.front(costs))
    best = np.minimum.accumulate(costs[np.argsort(costs[:, 0]), 1])
    assert len(on_front) == len(np.unique(best))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pareto.ranks([1.0, 2.0]), "costs: must be of shape"),
        (lambda: pareto.ranks([[1.0, np.nan]]), "costs: a number is NaN"),
        (lambda: pareto.front([[1.0]], [-1.0]), "violations: one is negative"),
        (lambda: pareto.front([[1.0]], [1.0, 2.0]), "violations: must be one number for each of 1"),
        (lambda: pareto.hypervolume([[1.0, 2.0]], [3.0]), "reference: must be one finite number"),
        (lambda: pareto.hypervolume([[1.0]], [np.inf]), "reference: must be one finite number"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_of_equal_violations_the_first_leads_whatever_the_costs():
    for directions in (("minimize",), ("minimize", "minimize")):
        found = [(3.0,) * len(directions), (1.0,) * len(directions)]
        leaders = Leaders()
        for number, values in enumerate(found):
            each = Trial(number, {}, values, "finished", 0.0, {"violation": 0.5})
            leaders = follow(leaders, each, directions)
        assert [each.number for each in leaders.trials] == [0]
        assert leaders.since == 1


def test_the_largest_numbers_have_distances_and_volumes():
    assert pareto.crowding([[1e308, 0], [-1e308, 1], [0, 0.5]]).tolist() == [np.inf, np.inf, 2.0]
    assert pareto.hypervolume([[-np.inf, 1], [-np.inf, 1]], [3, 3]) == np.inf
