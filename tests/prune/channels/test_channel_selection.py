"""Which channels go: counts, ties, rounding and limits against a slow, plain reference."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.prune.channels import selection
from jaxcomp.prune.channels.selection import (
    at_level,
    level_of,
    match_groups,
    removal_order,
    select,
    shortfalls,
)

numbers = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e30), st.floats(-5, 5))
sparsities = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.9]), st.floats(0, 0.999))


@st.composite
def networks(draw):
    sizes = st.integers(1, 14)
    count = draw(st.integers(1, 4))
    return {
        f"group_{i}": np.array(draw(st.lists(numbers, min_size=n, max_size=n)), np.float64)
        for i, n in enumerate(draw(st.lists(sizes, min_size=count, max_size=count)))
    }


@st.composite
def constraints(draw, networks):
    names = list(networks)
    return {
        "round_to": draw(st.sampled_from([1, 1, 2, 3, 4, 8])),
        "positions": {
            name: draw(st.lists(st.integers(1, 6), min_size=1, max_size=2))
            for name in names
            if draw(st.booleans())
        },
        "limits": {name: draw(st.floats(0, 1)) for name in names if draw(st.booleans())},
        "keep": [name for name in names if draw(st.integers(0, 4)) == 0],
    }


def half_up(sparsity, size):
    return math.floor(Fraction(round(sparsity * 1e7), 10**7) * size + Fraction(1, 2))


def allowed(size, name, how):
    """The numbers of units that a group may keep, by trying each."""
    if name in how["keep"]:
        return {size}
    limit = Fraction(round(how["limits"].get(name, 1.0) * 1e7), 10**7)
    widths = how["positions"].get(name, [1])
    return {size} | {
        r
        for r in range(1, size)
        if size - r <= limit * size and all(r * w % how["round_to"] == 0 for w in widths)
    }


@given(st.data(), networks(), sparsities)
def test_layer_scope_against_trying_every_count(data, scores, sparsity):
    how = data.draw(constraints(scores))
    kept = select(scores, sparsity, "layer", **how)
    for name, array in scores.items():
        choices = allowed(len(array), name, how)
        target = len(array) - half_up(sparsity, len(array))
        enough = [r for r in choices if r <= target]
        expected = max(enough) if enough else min(choices)
        gone = np.argsort(array, kind="stable")[: len(array) - expected]
        reference = np.ones(len(array), bool)
        reference[gone] = False
        np.testing.assert_array_equal(kept[name], reference)


@given(networks(), sparsities)
def test_global_scope_against_one_stable_sort(scores, sparsity):
    kept = select(scores, sparsity, "global", normalize=False)
    # The best unit of each group stays; of equal scores the first goes first.
    entries = []
    for index, (name, array) in enumerate(scores.items()):
        order = np.argsort(array, kind="stable")[:-1]
        entries += [(array[unit], index, place, name, unit) for place, unit in enumerate(order)]
    entries.sort(key=lambda entry: entry[:3])
    count = half_up(sparsity, sum(map(len, scores.values())))
    reference = {name: np.ones(len(array), bool) for name, array in scores.items()}
    for *_, name, unit in entries[:count]:
        reference[name][unit] = False
    for name, mask in reference.items():
        np.testing.assert_array_equal(kept[name], mask)


@given(st.data(), networks(), sparsities, st.sampled_from(["layer", "global"]))
def test_laws_of_every_order(data, scores, sparsity, scope):
    how = data.draw(constraints(scores))
    order = removal_order(scores, scope, **how)
    before = {name: np.ones(len(array), bool) for name, array in scores.items()}
    totals = []
    for level in range(order.levels + 1):
        kept = at_level(order, level)
        totals.append(sum(int(np.sum(~mask)) for mask in kept.values()))
        for name, mask in kept.items():
            assert int(mask.sum()) in allowed(len(mask), name, how)
            assert not np.any(mask & ~before[name]), "what is removed stays removed"
            if not mask.all():
                assert scores[name][~mask].max() <= scores[name][mask].min()
        before = kept
    assert totals[0] == 0
    assert all(a < b for a, b in itertools.pairwise(totals))
    for name, mask in before.items():
        assert int(mask.sum()) == min(allowed(len(mask), name, how))
    # A sparsity takes the first level that removes enough.
    if scope == "global":
        free = sum(len(array) for name, array in scores.items() if name not in how["keep"])
        target, level = half_up(sparsity, free), level_of(order, sparsity)
        assert totals[level] >= target or level == order.levels
        assert level == 0 or totals[level - 1] < target
        assert bool(shortfalls(order, sparsity)) == (totals[level] < target)


@given(networks(), sparsities, st.sampled_from(["layer", "global"]))
def test_doubling_a_groups_scores_changes_nothing(scores, sparsity, scope):
    name = next(iter(scores))
    doubled = scores | {name: scores[name] * 2}
    for group, mask in select(scores, sparsity, scope).items():
        np.testing.assert_array_equal(mask, select(doubled, sparsity, scope)[group])


def test_global_scope_compares_units_with_the_mean_of_their_group():
    scores = {"small": np.array([0.1, 1.0, 1.9]), "large": np.array([900.0, 1000.0, 1100.0])}
    kept = select(scores, 0.3, "global")
    assert [int(np.sum(~kept[name])) for name in scores] == [1, 1]
    raw = select(scores, 0.3, "global", normalize=False)
    assert [int(np.sum(~raw[name])) for name in scores] == [2, 0]


def test_blocks_go_by_their_mean():
    # The lowest unit of all is in a block that is dear as a whole.
    scores = {"a": np.array([0.0, 10.0, 11.0, 12.0]), "b": np.array([2.0, 3.0, 11.0, 12.0])}
    kept = select(scores, 0.25, "global", round_to=2, normalize=False)
    assert kept["a"].all()
    np.testing.assert_array_equal(kept["b"], [False, False, True, True])


def test_round_to_counts_the_axis_and_not_the_units():
    scores = {"conv": np.arange(16.0)}
    # Flattened 2·2 images: 4 positions a unit, so every 2 units fill 8.
    assert select(scores, 0.3, round_to=8, positions={"conv": (4,)})["conv"].sum() == 10
    assert select(scores, 0.3, round_to=8, positions={"conv": (1, 4)})["conv"].sum() == 8
    assert select(scores, 0.3, round_to=8, positions={"conv": (8,)})["conv"].sum() == 11


def test_what_cannot_be_reached_is_said():
    scores = {"narrow": np.arange(6.0), "wide": np.arange(16.0), "kept": np.arange(4.0)}
    order = removal_order(scores, round_to=8, keep=["kept"], limits={"wide": 0.5})
    assert shortfalls(order, 0.25) == (
        "narrow: 0 of 6 units removed, not 2: limits and round_to allow no more",
    )
    assert [line.split(":")[0] for line in shortfalls(order, 0.75)] == ["narrow", "wide"]
    whole = removal_order(scores, "global", keep=["*"])
    assert whole.levels == level_of(whole, 0.5) == 0
    assert shortfalls(whole, 0.5) == ()


def test_patterns_match_any_name_and_brackets_stand_for_themselves():
    names = {"a[1]": ["a[1]", "first/kernel"], "b[1]": ["b[1]", "second/kernel"], "fixed": ["head"]}
    assert match_groups("second/*", names) == ["b[1]"]
    assert match_groups("a[1]", names) == ["a[1]"]
    assert match_groups("[ab][[]1]", names) == ["a[1]", "b[1]"]
    with pytest.raises(ValueError, match="'thrid/kernel' matches no group of channels; nearest:"):
        match_groups("thrid/kernel", names)
    scores = {"a[1]": np.arange(4.0), "b[1]": np.arange(4.0)}
    named = {name: own for name, own in names.items()}
    kept = select(scores, 0.5, keep=["first/*", "head"], names=named)
    assert kept["a[1]"].all()
    assert kept["b[1]"].sum() == 2
    both = select(scores, 0.9, limits={"*": 0.5, "first/*": 0.25}, names=named)
    assert [int(mask.sum()) for mask in both.values()] == [3, 2]


def test_hostile_scores():
    with pytest.raises(ValueError, match="b: 1 of 2 scores are NaN or infinite"):
        select({"a": np.ones(2), "b": np.array([1.0, np.nan])}, 0.5)
    with pytest.raises(ValueError, match="b: 1 of 2 scores are NaN"):
        select({"b": np.array([1.0, np.inf])}, 0.5, "global")
    with pytest.raises(ValueError, match=r"a: scores of shape \(2, 2\)"):
        select({"a": np.ones((2, 2))}, 0.5)
    with pytest.raises(ValueError, match=r"a: scores of shape \(0,\)"):
        select({"a": np.ones(0)}, 0.5)
    with pytest.raises(ValueError, match="every one is fixed"):
        select({}, 0.5)
    huge = {"a": np.full(4, 1e308), "b": np.zeros(4), "c": np.full(4, 5e-324)}
    kept = select(huge, 0.25, "global")
    assert [int(kept[name].sum()) for name in huge] == [4, 1, 4]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"round_to": 0}, "round_to must be a width of at least 1"),
        ({"limits": {"*": 1.5}}, r"limits\['\*'\] must be a sparsity"),
        ({"limits": {"x": 0.5}}, "pattern 'x' matches no group"),
        ({"keep": ["x"]}, "pattern 'x' matches no group"),
    ],
)
def test_bad_constraints(how, words):
    with pytest.raises(ValueError, match=words):
        select({"a": np.ones(2)}, 0.5, **how)


def test_bad_levels_scopes_and_sparsities():
    order = removal_order({"a": np.ones(3)})
    with pytest.raises(ValueError, match="level 3 of an order with levels 0 to 2"):
        at_level(order, 3)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        select({"a": np.ones(3)}, 1.0)
    with pytest.raises(Exception, match="network"):
        select({"a": np.ones(3)}, 0.5, "network")
    assert selection.removal_order({"a": np.ones(1)}).levels == 0
