"""Laws that hold in every space."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_spaces import Pair
from random_spaces import spaces as any_space

import jaxcomp.search.spaces as sp
from jaxcomp.search.spaces import Choice, Continuous, Integer, Repeat

quick = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)

NETWORK = {
    "layers": Repeat(
        Integer(1, 3), {"width": Integer(8, 24, step=8), "skip": Choice((False, True))}
    ),
    "act": Choice({"relu": None, "leaky": {"slope": Continuous(0.01, 0.5, log=True)}}),
    "seed": 7,
}


def lawful(space):
    """Whether no two parts share a path: hypothesis draws such names on purpose."""
    try:
        sp.every_part(space)
    except ValueError:
        return False
    return True


@quick
@given(any_space(), seeds)
def test_points_and_candidates_are_the_same_thing(space, rng):
    assume(lawful(space))
    point = sp.sample(space, rng)
    candidate = sp.decode(space, point)
    again = sp.encode(space, candidate)
    assert sp.decode(space, again) == candidate
    assert again == point  # no two options of these spaces give the same candidate
    assert list(again) == list(point)


@quick
@given(any_space(), seeds)
def test_json_keeps_points_and_candidates(space, rng):
    assume(lawful(space))
    point = sp.sample(space, rng)
    kept = json.loads(json.dumps(point))
    assert kept == point
    assert sp.decode(space, kept) == sp.decode(space, point)
    assert json.loads(json.dumps(sp.as_json(space))) == sp.as_json(space)


@quick
@given(any_space(), seeds)
def test_every_active_part_is_known_and_its_value_is_one_of_its_own(space, rng):
    assume(lawful(space))
    every = sp.every_part(space)
    point = sp.sample(space, rng)
    active = sp.parts(space, point)
    assert list(active) == list(point)
    for path, part in active.items():
        assert every[path] is part
        unit = sp.to_unit(part, point[path])
        assert 0 <= unit <= 1
        assert sp.from_unit(part, unit) == pytest.approx(point[path], rel=1e-9, abs=1e-9)


@quick
@given(
    any_space(),
    seeds,
    st.sampled_from([{}, *({"spread": i} for i in (1e-9, 0.1, 3.0)), {"index": 0}, {"index": 20}]),
)
def test_mutation_changes_one_active_part(space, rng, how):
    assume(lawful(space))
    point = sp.sample(space, rng)
    other = sp.mutate(space, point, rng, **how)
    sp.decode(space, other)
    changed = [path for path in point if path in other and point[path] != other[path]]
    assert len(changed) == (0 if sp.count(space) == 1 else 1)
    if changed:
        here = changed[0]
        before, after = sp.parts(space, point), sp.parts(space, other)
        assert before[here] is after[here]
        # What comes or leaves is inside what was changed.
        root = here.removesuffix("#count")
        assert all(path.startswith(root) for path in point.keys() ^ other.keys())


@quick
@given(any_space(), seeds)
def test_children_have_each_part_from_a_parent(space, rng):
    assume(lawful(space))
    a, b = sp.sample(space, rng), sp.sample(space, rng)
    child = sp.cross(space, a, b, rng)
    sp.decode(space, child)
    for path, value in child.items():
        assert value in [parent[path] for parent in (a, b) if path in parent]
    assert sp.cross(space, a, a, rng) == a


@quick
@given(any_space(endless=False))
def test_count_is_the_length_of_the_list(space):
    assume(lawful(space))
    number = sp.count(space)
    assume(number <= 40)
    points = list(sp.enumerate_points(space))
    assert len(points) == number
    assert len({sp.frozen(point) for point in points}) == number
    candidates = [sp.decode(space, point) for point in points]
    assert len(set(map(repr, candidates))) == number
    assert all(
        sp.encode(space, candidate) == point
        for candidate, point in zip(candidates, points, strict=True)
    )


@quick
@given(any_space(), any_space())
def test_descriptions_differ_where_spaces_do(space, other):
    assume(lawful(space) and lawful(other))
    equal = sp.as_json(space) == sp.as_json(other)
    assert (sp.digest(space) == sp.digest(other)) is equal
    assert "\n" in sp.describe([space, 1])


def test_levels_stand_in_for_what_has_no_end():
    space = {"rate": Continuous(1e-4, 1.0, log=True), "one": Continuous(2, 2)}
    assert sp.count(space) == math.inf
    rates = [point["rate"] for point in sp.enumerate_points(space, levels=5)]
    assert rates == [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert sp.count(space, levels=5) == 5
    assert len(list(sp.enumerate_points(Continuous(0, 1), levels=1))) == 1


def test_large_spaces_are_counted_exactly_and_listed_lazily():
    space = Repeat(Integer(0, 500), Choice(tuple(range(10))))
    assert sp.count(space) == sum(10**n for n in range(501))
    wide = [Repeat(400, Choice(tuple(range(10)))), Continuous(0, 1)]
    assert sp.count(wide) == math.inf
    assert sp.count(Repeat(0, Continuous(0, 1))) == 1
    assert sp.count(Repeat(Integer(0, 2), Continuous(0, 1))) == math.inf
    listed = sp.enumerate_points(wide, levels=3)
    assert [point["1"] for point in itertools.islice(listed, 4)] == [0.0, 0.5, 1.0, 0.0]


def test_draws_are_even_in_what_was_declared():
    units = (np.arange(1200) + 0.5) / 1200
    drawn = lambda part: np.array([sp.from_unit(part, unit) for unit in units])
    assert set(np.bincount(drawn(Integer(8, 64, step=8)) // 8)[1:]) == {150}
    assert set(np.bincount(drawn(Choice(("a", "b", "c"))))) == {400}
    rates = np.log10(drawn(Continuous(1e-4, 1.0, log=True)))
    assert set(np.histogram(rates, bins=4, range=(-4, 0))[0]) == {300}
    # Whole numbers share the logarithm's range by what is rounded to them.
    share = np.mean(drawn(Integer(1, 100, log=True)) <= 9)
    assert abs(share - np.log(9.5 / 0.5) / np.log(100.5 / 0.5)) < 1 / 1200


def test_samples_draw_each_part_by_itself():
    rng = np.random.default_rng(0)
    points = [sp.sample([Choice((0, 1)), Continuous(0, 1)], rng) for _ in range(300)]
    first, second = np.array([list(point.values()) for point in points]).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15
    assert len(set(second)) == 300


def test_mutation_reaches_every_part_as_often():
    rng = np.random.default_rng(0)
    space = {"a": Integer(1, 100), "b": Choice((1, 2)), "c": Integer(5, 5), "d": Continuous(0, 1)}
    point = sp.sample(space, rng)
    changed = [
        next(path for path in point if other[path] != point[path])
        for other in (sp.mutate(space, point, rng) for _ in range(600))
    ]
    for path, share in (("a", 1 / 3), ("b", 1 / 3), ("c", 0), ("d", 1 / 3)):
        assert abs(changed.count(path) / 600 - share) < 0.06


def test_spread_keeps_near():
    rng = np.random.default_rng(0)
    space = {"n": Integer(0, 1000), "rate": Continuous(1e-6, 1.0, log=True)}
    point = {"n": 500, "rate": 1e-3}
    near = [sp.mutate(space, point, rng, spread=0.02) for _ in range(60)]
    assert max(abs(other["n"] - 500) for other in near) < 90
    assert max(abs(np.log10(other["rate"]) + 3) for other in near) < 0.6
    with pytest.raises(ValueError, match="spread is 0, which changes nothing"):
        sp.mutate(space, point, rng, spread=0.0)


def test_lists_keep_their_items_when_they_grow_and_shrink():
    space = Repeat(Integer(1, 3), Integer(1, 100))
    rng = np.random.default_rng(3)
    point = {"#count": 2, "0": 11, "1": 22}
    for _ in range(50):
        other = sp.mutate(space, point, rng)
        if other["#count"] != 2:
            assert other["0"] == 11
            assert other.get("1", 22) == 22


def test_ranges_of_a_few_floats_still_change():
    low = 1e300
    space = Continuous(low, math.nextafter(low, math.inf), log=True)
    point = {"": low}
    assert sp.mutate(space, point, np.random.default_rng(0)) == {"": space.high}
    wide = Continuous(-1.7e308, 1.7e308)
    rng = np.random.default_rng(0)
    values = [sp.sample(wide, rng)[""] for _ in range(20)]
    assert all(math.isfinite(value) for value in values)
    assert all(0 <= sp.to_unit(wide, value) <= 1 for value in values)


def test_kinds_of_nodes_are_kept():
    space = {"pair": Pair(Integer(1, 2), "x"), "list": [1, (2, Integer(3, 3))], 3: None}
    candidate = sp.decode(space, {"pair/first": 2, "list/1/1": 3})
    assert candidate == {"pair": Pair(2, "x"), "list": [1, (2, 3)], 3: None}
    assert isinstance(candidate["pair"], Pair)
    assert sp.encode(space, candidate) == {"pair/first": 2, "list/1/1": 3}


def test_numbers_of_numpy_become_plain():
    space = {
        "of": Choice(np.array([8, 16])),
        "or": Choice((np.float32(0.5), np.int64(2))),
        "n": Integer(np.int64(1), np.int32(3)),
        "c": np.float64(1.5),
    }
    candidate = sp.decode(space, {"of": np.int64(1), "or": 0, "n": np.int8(2)})
    assert candidate == {"of": 16, "or": 0.5, "n": 2, "c": 1.5}
    assert {type(value) for value in candidate.values()} == {int, float}
    assert sp.encode(space, {**candidate, "n": np.int64(2)})["n"] == 2


def test_options_that_look_alike_are_told_apart():
    space = Choice((1, True, "1", None, 2.5))
    for i, option in enumerate(space.spaces):
        assert sp.encode(space, option) == {"": i}
    assert sp.encode(space, 1.0) == {"": 0}
    first = Choice(({"n": Integer(1, 3)}, {"n": Integer(2, 5)}))
    assert sp.encode(first, {"n": 2}) == {"": 0, "0/n": 2}
    assert sp.encode(first, {"n": 4}) == {"": 1, "1/n": 4}


def test_options_may_be_parts():
    space = Choice({"off": None, "rate": Continuous(0, 1), "other": Choice((1, 2)), "three": 3})
    assert sp.decode(space, {"": 1, "rate": 0.5}) == {"rate": 0.5}
    assert sp.decode(space, {"": 2, "other": 1}) == {"other": 2}
    assert sp.decode(space, {"": 3}) == {"three": 3}
    assert sp.encode(space, "off") == {"": 0}


def test_fifty_deep():
    space = Integer(1, 2)
    for i in range(50):
        space = {"in": Choice({"deeper": space, "out": None})} if i % 2 else Repeat(1, [space])
    rng = np.random.default_rng(0)
    assert sp.count(space) == 27
    points = list(sp.enumerate_points(space))
    assert len(points) == 27
    assert max(map(len, points)) == 26
    deepest = max(points, key=len)
    assert sp.encode(space, sp.decode(space, deepest)) == deepest
    assert sp.cross(space, deepest, sp.mutate(space, deepest, rng), rng)
    assert "deeper" in sp.describe(space)


def test_digest_is_the_same_in_another_process():
    code = (
        "from jaxcomp.search.spaces import *\n"
        "print(digest({'layers': Repeat(Integer(1, 3), {'width': Integer(8, 24, step=8), "
        "'skip': Choice((False, True))}), 'act': Choice({'relu': None, "
        "'leaky': {'slope': Continuous(0.01, 0.5, log=True)}}), 'seed': 7}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == sp.digest(NETWORK) == "0c5454853eecce21"


def test_what_a_network_prints_as():
    assert sp.describe(NETWORK) == (
        "layers     1 to 3 items\n"
        "  width    8, 16, …, 24\n"
        "  skip     False or True\n"
        "act        relu or leaky\n"
        "  leaky\n"
        "    slope  0.01 to 0.5 (log)\n"
        "seed       always 7\n"
        "endless points"
    )
    assert sp.describe(Choice((1, 2))) == "(space)  1 or 2\n2 points"
    assert sp.describe({}) == "1 point"


def test_ends_whose_quotient_no_float_holds():
    part = Continuous(1e-200, 1e200, log=True)
    units = [sp.to_unit(part, value) for value in (1e-200, 1e-100, 1.0, 1e200)]
    assert units == pytest.approx([0, 0.25, 0.5, 1], abs=1e-12)
    assert sp.to_unit(Continuous(3.0, 3.0 + 4e-15, log=True), 3.0 + 2e-15) == pytest.approx(
        0.5, 0.2
    )


@pytest.mark.parametrize(
    "part",
    [Integer(1, 2**53, log=True), Integer(7, 2**50 + 7, 2**10, log=True), Integer(3, 3, log=True)],
)
def test_the_ends_of_whole_numbers_are_reached(part):
    assert [sp.from_unit(part, unit) for unit in (0.0, 1.0)] == [part.low, part.high]


def test_a_spread_that_leaves_no_number_takes_the_next_one():
    rng = np.random.default_rng(0)
    for low, value in ((0.0, 0.5), (0.5, 0.5)):
        other = sp.mutate(Continuous(low, 9.0), {"": value}, rng, spread=1e-30)[""]
        assert 0 < abs(other - value) < 1e-15


def test_polynomial_steps_are_as_large_as_told_and_stay_within():
    draws = (np.arange(2000) + 0.5) / 2000
    moved = np.array([sp.moves.polynomial(0.5, draw, 20.0) for draw in draws])
    assert np.abs(moved - 0.5).mean() == pytest.approx(1 / 22, rel=1e-3)
    assert (np.diff(moved) > 0).all()
    for unit in (0.0, 0.02, 1.0):
        near = [sp.moves.polynomial(unit, draw, 5.0) for draw in (0.0, *draws, 1.0)]
        assert near[0] == 0
        assert near[-1] == 1
        assert np.median(near) == pytest.approx(unit, abs=1e-3)  # as likely below as above


def test_counts_that_python_refuses_to_write_are_described():
    assert sp.describe(Repeat(5000, Integer(0, 9))).endswith("about 10^5000 points")
    assert sp.describe(Repeat(99, Integer(0, 9))).endswith(f"{10**99:,} points")
