"""What holds for every strategy, and what each of them promises."""

import json

import jax
import pytest

from jaxcomp.search import Choice, Continuous, Integer, Repeat, run, spaces, strategies
from tests.search.strategy_cases import (
    CASES,
    CONDITIONAL,
    KEY,
    LARGEST,
    TINY,
    cost,
    driven,
    measured,
    trial,
)

ONE, TWO = ("minimize",), ("minimize", "minimize")


@pytest.fixture(params=CASES, ids=str)
def case(request):
    pytest.importorskip(request.param.needs)
    return request.param


def points_of(trials):
    return [each.point for each in trials]


def test_a_search_goes_on_after_any_round_as_if_it_had_not_ended(case):
    batch = 3 if case.name in ("nsga2-anew", "greedy", "optuna") else 2
    directions = TWO if case.several else ONE
    whole = driven(case.make(), CONDITIONAL, directions, 12, batch)
    assert len(whole) == 12 or not case.complete
    for point in points_of(whole):
        spaces.decode(CONDITIONAL, point)
        assert json.loads(json.dumps(point)) == point
        assert [type(value) for value in point.values()] == [
            type(value) for value in json.loads(json.dumps(point)).values()
        ]
    for done in range(batch, len(whole), batch):
        again = driven(case.make(), CONDITIONAL, directions, done + 1, batch, whole[:done])
        assert done < len(again) <= done + batch
        assert points_of(again) == points_of(whole)[: len(again)]


def test_no_point_comes_twice_and_tiny_spaces_end(case):
    if case.name in ("greedy-from", "netadapt"):
        pytest.skip("begins at a candidate of another space")
    directions = TWO if case.several else ONE
    found = [spaces.frozen(p) for p in points_of(driven(case.make(), TINY, directions, 99, 4))]
    assert len(set(found)) == len(found)
    if case.complete:
        assert len(found) == spaces.count(TINY) == 6


def test_a_space_of_one_point(case):
    if case.name in ("greedy-from", "netadapt"):
        pytest.skip("begins at a candidate of another space")
    assert points_of(driven(case.make(), {"depth": 3}, ONE, 99)) == [{}]


def test_only_the_key_decides(case):
    strategy = case.make()
    state = strategy.init(CONDITIONAL, ONE, KEY)
    points, after = strategy.ask(state, 5)
    assert strategy.ask(state, 5)[0] == points
    first, state = strategy.ask(state, 2)
    assert first == points[:2]
    if case.name != "optuna":  # whose estimator sees what is under way
        assert strategy.ask(state, 3)[0] == points[2:]
    assert points == strategy.ask(strategy.init(CONDITIONAL, ONE, KEY), 5)[0]
    other = strategy.ask(strategy.init(CONDITIONAL, ONE, jax.random.key(8)), 5)[0]
    assert (other != points) is case.random
    assert strategy.tell(after, []) is not None


def test_several_objectives_or_an_error(case):
    strategy = case.make()
    if case.several:
        assert len(driven(strategy, CONDITIONAL, TWO, 8)) == 8
    else:
        with pytest.raises(ValueError, match="takes one objective, not 2: make the others constr"):
            strategy.init(CONDITIONAL, TWO, KEY)


def test_states_are_values(case):
    """A state that somebody else went on from goes the same way."""
    strategy = case.make()
    state = strategy.init(CONDITIONAL, ONE, KEY)
    for i in range(2):
        points, after = strategy.ask(state, 2)
        if not points:
            break
        news = [trial(2 * i + j, point, (1.0 * j,)) for j, point in enumerate(points)]
        told = strategy.tell(after, news)
        expected = strategy.ask(told, 3)[0]
        strategy.tell(after, [each._replace(values=(-5.0,)) for each in news])
        assert strategy.ask(strategy.tell(after, news), 3)[0] == expected
        state = strategy.tell(after, news)


def test_foreign_trials_can_be_told(case):
    strategy = case.make()
    other = spaces.sample(CONDITIONAL, jax.random.key(99))
    state = strategy.tell(strategy.init(CONDITIONAL, ONE, KEY), [trial(0, other, (1.0,))])
    for point in strategy.ask(state, 2)[0]:
        spaces.decode(CONDITIONAL, point)


@pytest.mark.parametrize(
    "strategy", [strategies.evolution(4, 20), strategies.nsga2(4, 0.0)], ids=["evolution", "nsga2"]
)
def test_parents_are_feasible_and_did_not_fail(strategy):
    space = [Integer(0, 1000), Integer(0, 1000), Integer(0, 1000)]
    good = {"0": 1, "1": 2, "2": 3}
    trials = [
        trial(0, {"0": 11, "1": 12, "2": 13}, (-9.0,), violation=0.1),
        trial(1, {"0": 21, "1": 22, "2": 23}, None, "failed", error="ValueError"),
        trial(2, good, (5.0,)),
        trial(3, {"0": 31, "1": 32, "2": 33}, None, "stopped", violation=3.0),
    ]
    state = strategy.tell(strategy.init(space, ONE, KEY), trials)
    shared = [
        sum(point[path] == good[path] for path in good) for point in strategy.ask(state, 30)[0]
    ]
    # A tournament of two may draw the other one twice; of twenty, hardly ever.
    assert shared.count(2) == 30 if strategy.name.startswith("evo") else shared.count(2) > 10
    nothing = [each._replace(values=None, status="failed", told={}) for each in trials]
    state = strategy.tell(strategy.init(space, ONE, KEY), nothing)
    assert len(strategy.ask(state, 5)[0]) == 5


def test_evolution_forgets_the_old():
    strategy, space = strategies.evolution(3, 50), [Integer(0, 1000)] * 4
    old = trial(0, {"0": 1, "1": 1, "2": 1, "3": 1}, (-100.0,))
    news = [trial(i, {str(j): 100 * i for j in range(4)}, (float(i),)) for i in (1, 2, 3)]
    state = strategy.init(space, ONE, KEY)
    near = lambda state, value: [
        list(point.values()).count(value) for point in strategy.ask(state, 5)[0]
    ]
    assert near(strategy.tell(state, [old, *news[:2]]), 1) == [3] * 5
    assert near(strategy.tell(state, [old, *news]), 100) == [3] * 5


def test_grid_is_the_list_of_all_points():
    space = {"c": Continuous(0.001, 1, log=True), "x": TINY, "n": Continuous(2, 2)}
    listed = list(spaces.enumerate_points(space, levels=3))
    assert points_of(driven(strategies.grid(3), space, TWO, 1000, 5)) == listed


def test_grid_may_be_asked_ahead_of_what_it_is_told():
    strategy = strategies.grid()
    first, state = strategy.ask(strategy.init(Integer(1, 5), ONE, KEY), 2)
    second, state = strategy.ask(state, 2)
    state = strategy.tell(state, [trial(i, each, (1.0,)) for i, each in enumerate(first)])
    assert [each[""] for each in first + second + strategy.ask(state, 9)[0]] == [1, 2, 3, 4, 5]


def test_the_endless_option_of_many_is_found():
    space = Choice({**{str(i): None for i in range(99)}, "rate": Continuous(0, 1)})
    found = points_of(driven(strategies.random(), space, ONE, 130, 10))
    assert len({spaces.frozen(point) for point in found}) == 130


def test_greedy_ends_where_no_part_alone_is_better():
    value = lambda c: (c["a"] - 3) ** 2 + (c["b"] - 5) ** 2 + (0 if c["on"] else 10)
    space = {"a": Integer(0, 7), "b": Integer(0, 7), "on": Choice((False, True))}
    study = run(
        space,
        lambda found: map(value, found),
        strategies.greedy(),
        objectives="minimize",
        key=KEY,
        stop=1000,
    )
    assert study.candidate(study.best) == {"a": 3, "b": 5, "on": True}
    assert study.reason == "exhausted"
    assert len(study.trials) <= 1 + (7 + 7 + 1) * 2  # the second round betters nothing


def test_greedy_looks_for_another_start_where_one_fails():
    space = {"a": Integer(0, 3), "b": Integer(0, 3)}

    def evaluate(found):
        return [{"loss": c["a"] + c["b"]} if c["a"] > 1 else {"error": "no"} for c in found]

    for i in range(4):
        study = run(
            space,
            evaluate,
            strategies.greedy(),
            objectives={"loss": "minimize"},
            key=jax.random.key(i),
            stop=100,
        )
        assert study.best.values == (2.0,)


def test_netadapt_meets_each_steps_budget_and_ends_within_the_last():
    space = Repeat(3, Integer(8, 64, step=8))
    worth = lambda c: 5 * c[0] + 3 * c[1] + c[2]
    strategy = strategies.netadapt(sum, 72, start=[64, 64, 64], step=1 / 8)
    study = run(
        space,
        lambda found: map(worth, found),
        strategy,
        objectives="maximize",
        key=KEY,
        stop=1000,
        batch=3,
    )
    candidates = [study.candidate(each) for each in study.trials]
    assert candidates[:4] == [[64, 64, 64], [40, 64, 64], [64, 40, 64], [64, 64, 40]]
    # The last layer matters least and goes first, then the second, then the first; each step takes
    # 24 from one of them, and what would leave a layer less than 8 is not proposed.
    assert [64, 40, 16] in candidates
    assert [64, 16, 16] in candidates
    assert candidates[-1] == [40, 16, 16]
    assert study.reason == "exhausted"


def test_netadapt_takes_the_cheapest_where_no_part_meets_the_step():
    strategy = strategies.netadapt(sum, 0, start=[3, 3], step=1.0)
    study = run(
        [Integer(1, 3), Integer(1, 3)],
        lambda found: map(sum, found),
        strategy,
        objectives="minimize",
        key=KEY,
        stop=100,
    )
    assert [study.candidate(each) for each in study.trials] == [[3, 3], [1, 3], [3, 1], [1, 1]]


def test_random_uses_up_a_space_that_is_nearly_seen():
    space = [Integer(1, 12), Integer(1, 12)]
    assert len(driven(strategies.random(), space, ONE, 1000, 7)) == 144


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: strategies.evolution(population=0), "population is 0: at least 1"),
        (lambda: strategies.evolution(sample_size=1.5), "sample_size must be a whole number"),
        (lambda: strategies.evolution(spread=-1), "spread is -1"),
        (lambda: strategies.evolution(spread=0), "spread is 0, which changes nothing"),
        (lambda: strategies.nsga2(population=1), "population is 1: at least 2"),
        (lambda: strategies.nsga2(index=-1), "index is -1"),
        (lambda: strategies.nsga2(crossover=2), "crossover is 2, but must be a probability"),
        (lambda: strategies.grid(levels=0), "levels is 0"),
        (lambda: strategies.greedy(levels=1), "levels is 1: at least 2"),
        (lambda: strategies.netadapt(3, 1.0, start=0), "cost must be a function"),
        (lambda: strategies.netadapt(cost, 1.0, start=0, step=0), "step is 0, but must be above"),
        (lambda: strategies.netadapt(cost, -1.0, start=0), "budget is -1"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


def test_what_a_space_lacks_is_named():
    with pytest.raises(ValueError, match=r"rate: a grid needs .* grid\(levels=5\)"):
        strategies.grid().init({"rate": Continuous(0, 1)}, ONE, KEY)
    with pytest.raises(ValueError, match="width: 65 is not among"):
        strategies.greedy(start={**LARGEST, "width": 65}).init(CONDITIONAL, ONE, KEY)
    with pytest.raises(TypeError, match="cost must return a finite number, not 'x'"):
        strategies.netadapt(lambda _: "x", 1, start=LARGEST).init(CONDITIONAL, ONE, KEY)
    with pytest.raises(TypeError, match="key must be one PRNG key"):
        strategies.random().init(CONDITIONAL, ONE, 0)


def test_names_hold_all_settings(case):
    names = [each.make().name for each in CASES if each.needs == "jax"]
    assert len(set(names)) == len(names)
    assert case.make().name == case.make().name
    assert measured(LARGEST)["size"] == cost(LARGEST)
