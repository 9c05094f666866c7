"""The multiple-choice knapsack: against every choice there is, and against SciPy's solver."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxcomp.quantize.post_training.allocation import knapsack
from jaxcomp.quantize.post_training.allocation.knapsack import Options, front, solve

DAMAGES = st.one_of(
    st.floats(-10, 10),
    st.sampled_from([0.0, 1.0, 1.0 + 1e-9, math.inf, math.nan]),
)


def options(pairs):
    return Options(np.array([c for c, _ in pairs], np.int64), np.array([d for _, d in pairs]))


INSTANCES = st.lists(
    st.lists(st.tuples(st.integers(0, 12), DAMAGES), min_size=1, max_size=4).map(options),
    min_size=1,
    max_size=5,
)


def every_choice(groups):
    found = []
    for choice in itertools.product(*(range(g.costs.size) for g in groups)):
        costs = [int(g.costs[i]) for g, i in zip(groups, choice, strict=True)]
        damages = [float(g.damages[i]) for g, i in zip(groups, choice, strict=True)]
        if all(map(math.isfinite, damages)):
            found.append((sum(costs), math.fsum(damages)))
    return found


def total(groups, choice):
    costs = sum(int(g.costs[i]) for g, i in zip(groups, choice, strict=True))
    return costs, math.fsum(float(g.damages[i]) for g, i in zip(groups, choice, strict=True))


def random_groups(seed, count, width=7, top=10_000):
    """Costs that rise and damages that mostly fall, as more bits have them."""
    rng = np.random.default_rng(seed)
    return [
        Options(
            np.sort(rng.integers(1, top, width)),
            np.sort(rng.lognormal(0, 2, width))[::-1] + rng.normal(0, 0.05, width),
        )
        for _ in range(count)
    ]


@settings(max_examples=300, deadline=None)
@given(INSTANCES, st.integers(0, 60))
def test_no_choice_within_the_budget_does_less_damage(groups, budget):
    fits = [(damage, cost) for cost, damage in every_choice(groups) if cost <= budget]
    assume(fits)
    found = solve(groups, budget)
    assert found.exact
    assert (found.cost, found.damage) == (
        total(groups, found.choice)[0],
        pytest.approx(total(groups, found.choice)[1], abs=1e-12),
    )
    assert found.cost <= budget
    assert found.damage == pytest.approx(min(fits)[0], abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(INSTANCES)
def test_the_front_is_what_no_choice_beats(groups):
    choices = every_choice(groups)
    assume(choices)
    found = front(groups)
    assert found.exact
    assert (np.diff(found.costs) > 0).all()
    assert (np.diff(found.damages) < 0).all()
    for cost, damage in choices:
        at = np.searchsorted(found.costs, cost, side="right") - 1
        assert at >= 0
        assert found.damages[at] <= damage + 1e-12
    known = sorted(choices)
    for cost, damage in zip(found.costs, found.damages, strict=True):
        assert any(c == cost and abs(d - damage) <= 1e-12 for c, d in known)


@settings(max_examples=200, deadline=None)
@given(INSTANCES, st.integers(0, 60), st.integers(1, 3))
def test_a_choice_that_may_miss_says_by_how_much(groups, budget, most_states):
    fits = [damage for cost, damage in every_choice(groups) if cost <= budget]
    assume(fits)
    found = solve(groups, budget, most_states)
    assert found.cost <= budget
    assert found.bound - 1e-12 <= min(fits) <= found.damage + 1e-12
    assert total(groups, found.choice)[1] == pytest.approx(found.damage, abs=1e-12)


def by_scipy(groups, budget):
    costs = np.concatenate([g.costs for g in groups]).astype(float)
    damages = np.concatenate([g.damages for g in groups])
    of_group = np.repeat(np.arange(len(groups)), [g.costs.size for g in groups])
    one_each = (of_group == np.arange(len(groups))[:, None]).astype(float)
    found = scipy.optimize.milp(
        damages,
        integrality=np.ones_like(damages),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(costs[None], -np.inf, budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert found.success
    return found.fun


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.35, 0.6])
def test_large_problems_come_to_what_scipy_comes_to(seed, share):
    groups = random_groups(seed, 40)
    budget = int(share * sum(g.costs.max() for g in groups))
    found = solve(groups, budget)
    assert found.exact
    assert found.damage == pytest.approx(by_scipy(groups, budget), rel=1e-9)


def test_bounds_decide_where_states_are_too_many(monkeypatch):
    """Costs without a common measure: the front is beyond reach, a single budget is not."""
    groups = random_groups(7, 60, top=10**9)
    budget = int(0.5 * sum(g.costs.max() for g in groups))
    assert not front(groups, 2000).exact
    monkeypatch.setattr(knapsack, "_PROBE", 8)
    guess = solve(groups, budget, most_states=8)
    assert not guess.exact
    found = solve(groups, budget)
    assert found.exact
    assert guess.bound <= found.damage <= guess.damage
    assert found.damage == pytest.approx(by_scipy(groups, budget), rel=1e-9)


def test_a_front_in_part_keeps_both_ends_and_tells_no_lies():
    groups = random_groups(3, 12, width=4)
    whole, part = front(groups), front(groups, 50)
    assert whole.exact
    assert not part.exact
    assert 10 < part.costs.size <= 50
    assert part.damages[-1] == pytest.approx(whole.damages[-1])
    at = np.searchsorted(whole.costs, part.costs, side="right") - 1
    assert (part.damages >= whole.damages[at] - 1e-12).all()


def test_what_cannot_be_chosen_never_is():
    only = Options(np.array([1, 2, 3]), np.array([math.nan, math.inf, 5.0]))
    assert solve([only], 3).choice == (2,)
    with pytest.raises(ValueError, match="cheapest choice costs 3, above the budget 2"):
        solve([only], 2)
    with pytest.raises(ValueError, match="group 1 has no option"):
        solve([only, Options(np.array([1]), np.array([math.nan]))], 9)
    with pytest.raises(ValueError, match="no groups"):
        front([])


def test_of_equal_damage_the_cheaper_is_chosen():
    same = Options(np.array([5, 2, 4]), np.array([1.0, 1.0, 1.0]))
    assert solve([same, same], 100).cost == 4
