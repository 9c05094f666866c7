"""Spaces, points, candidates and keys that will not do: errors say which and where."""

import math

import jax
import numpy as np
import pytest

import jaxcomp.search.spaces as sp
from jaxcomp.search.spaces import Choice, Continuous, Integer, Repeat

NAN = math.nan


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Choice(()), ValueError, "there are no options"),
        (lambda: Choice({}), ValueError, "there are no options"),
        (lambda: Choice("relu"), TypeError, "not 'relu'"),
        (lambda: Choice(3), TypeError, "a sequence of options or a mapping"),
        (lambda: Choice({1, 2}), TypeError, "a sequence of options or a mapping"),
        (lambda: Choice({1: None}), TypeError, "the option 1 must be named by a string"),
        (lambda: Choice({"": None}), ValueError, "name is empty"),
        (lambda: Choice((8, 16, 8.0)), ValueError, "8.0 is among the options twice"),
        (lambda: Choice((None, None)), ValueError, "None is among the options twice"),
        (lambda: Integer(3, 1), ValueError, "low is 3, above high, which is 1"),
        (lambda: Integer(1, 10, step=4), ValueError, "make high 9 or 13"),
        (lambda: Integer(1, 10, step=0), ValueError, "step is 0"),
        (lambda: Integer(1.0, 3), TypeError, "low must be a whole number"),
        (lambda: Integer(False, True), TypeError, "low must be a whole number, not False"),
        (lambda: Integer(0, 8, log=True), ValueError, "log needs at least 1"),
        (lambda: Integer(0, 2**60), ValueError, r"beyond 2\*\*53"),
        (lambda: Integer(-(2**60), 0), ValueError, "low is -"),
        (lambda: Continuous(NAN, 1), ValueError, "low is nan"),
        (lambda: Continuous(0, math.inf), ValueError, "high is inf"),
        (lambda: Continuous(1, 0), ValueError, "low is 1.0, above high"),
        (lambda: Continuous(0, 1, log=True), ValueError, "log needs a number above 0"),
        (lambda: Continuous(-1, 1, log=True), ValueError, "log needs a number above 0"),
        (lambda: Continuous("0", 1), TypeError, "low must be a number, not '0'"),
        (lambda: Continuous(0, 10**400), ValueError, "high is 1000"),
        (lambda: Continuous(1, 2, log="no"), TypeError, "log must be True or False, not 'no'"),
        (lambda: Integer(1, 2, log=1), TypeError, "log must be True or False, not 1"),
        (lambda: Continuous(False, 1), TypeError, "low must be a number, not False"),
        (lambda: Repeat(-1, 1), ValueError, "count is -1"),
        (lambda: Repeat(Integer(-1, 2), 1), ValueError, "the count may become -1: begin at 0"),
        (lambda: Repeat(Choice((1, 2)), 1), TypeError, "give an int, or an Integer"),
        (lambda: Repeat(2.0, 1), TypeError, "give an int, or an Integer"),
    ],
)
def test_parts_that_will_not_do(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("space", "kind", "message"),
    [
        ({"a": {"b": Integer(1, 2)}, "a/b": Integer(1, 2)}, ValueError, "^a/b: two parts"),
        ({1: Integer(1, 2), "1": Integer(1, 2)}, ValueError, "^1: two parts"),
        ({"a": Repeat(Integer(1, 2), 1), "a#count": Integer(1, 2)}, ValueError, "^a#count: two"),
        ({"a": Choice({"b": Integer(1, 2)}), "a/b": Integer(1, 2)}, ValueError, "^a/b: two parts"),
        ({"a": {"f": print}}, TypeError, "^a/f: <built-in function print> is neither"),
        ({"a": Repeat(2, [b"x"])}, TypeError, "^a/0/0: b'x' is neither"),
        ({"a": Choice({"b": {"c": {1, 2}}})}, TypeError, "^a/b/c: {1, 2} is neither"),
        ({"a": [NAN]}, ValueError, "^a/0: NaN"),
        ({"a": {(1, 2): 3}}, TypeError, r"^a: the key \(1, 2\)"),
        ({"a": {True: 3}}, TypeError, "^a: the key True"),
        ({"a": {"": 3}}, ValueError, "^a: a key is empty"),
        (np.ones(3), TypeError, "^the space: array"),
        ({"a": np.array([1, 2])}, TypeError, "^a: array"),
    ],
)
def test_spaces_that_will_not_do(space, kind, message):
    functions = [sp.every_part, sp.count, sp.enumerate_points, sp.describe, sp.as_json, sp.digest]
    for function in functions:
        with pytest.raises(kind, match=message):
            function(space)


SPACE = {
    "layers": Repeat(Integer(1, 3), {"width": Integer(8, 24, step=8)}),
    "act": Choice({"relu": None, "leaky": {"slope": Continuous(0.01, 0.5)}}),
    "norm": Choice(("batch", None, {"groups": Choice((2, 4))})),
    "pair": (1, 2),
}
GOOD = {"layers#count": 1, "layers/0/width": 16, "act": 0, "norm": 1}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"layers#count": 2}, ValueError, "^layers/1/width: active, but"),
        ({"layers/1/width": 8}, ValueError, "^layers/1/width: .* not active"),
        ({"unknown": 8}, ValueError, "^unknown: .* not active"),
        ({"layers/0/width": 12}, ValueError, "^layers/0/width: 12 is not among 8, 16, …, 24"),
        ({"layers/0/width": 32}, ValueError, "^layers/0/width: 32 is not among"),
        ({"layers/0/width": 16.0}, TypeError, "^layers/0/width: must be a whole number, not 16.0"),
        ({"layers/0/width": True}, TypeError, "^layers/0/width: must be a whole number, not True"),
        ({"layers#count": 0}, ValueError, "^layers#count: 0 is not among 1 to 3"),
        ({"act": 2}, ValueError, "^act: 2 is the position of an option that is not there: 0 to 1"),
        ({"act": -1}, ValueError, "^act: -1 is the position"),
        ({"act": "relu"}, TypeError, "^act: must be the position of an option, not 'relu'"),
        ({"act": 1}, ValueError, "^act/leaky/slope: active, but"),
        ({"act": 1, "act/leaky/slope": 0.6}, ValueError, "^act/leaky/slope: 0.6 is not within 0.0"),
        ({"act": 1, "act/leaky/slope": NAN}, ValueError, "^act/leaky/slope: nan is not within"),
        ({"act": 1, "act/leaky/slope": "a"}, TypeError, "^act/leaky/slope: must be a number"),
        ({"act": 1, "act/leaky/slope": True}, TypeError, "^act/leaky/slope: must be a number"),
    ],
)
def test_points_that_do_not_fit(change, kind, message):
    with pytest.raises(kind, match=message):
        sp.decode(SPACE, {**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"layers": [{"width": 12}]}, ValueError, "^layers/0/width: 12 is not among"),
        ({"layers": [{"width": 8}] * 4}, ValueError, "^layers#count: 4 is not among 1 to 3"),
        ({"layers": {"width": 8}}, TypeError, "^layers: must be a list of items"),
        ({"layers": [{"wdith": 8}]}, ValueError, "^layers/0/width: the candidate lacks it"),
        ({"layers": [{"width": 8, "x": 1}]}, ValueError, "^layers/0/x: the space lacks it"),
        ({"layers": [8]}, TypeError, "^layers/0: must be a dict, not 8"),
        ({"act": "gelu"}, ValueError, "^act: 'gelu' is none of the options 'relu', {'leaky': …}"),
        ({"act": "leaky"}, ValueError, "^act: 'leaky' is none of"),
        ({"act": {"leaky": {"slope": 0.9}}}, ValueError, "^act/leaky/slope: 0.9 is not within"),
        ({"act": {"leaky": {"slope": 0.1}, "relu": None}}, ValueError, "^act: .* is none of"),
        ({"norm": "layer"}, ValueError, "^norm: 'layer' is none of the options 'batch', None, "),
        ({"norm": {"groups": 3}}, ValueError, "norm: .*; norm/2/groups: 3 is none of"),
        ({"norm": False}, ValueError, "^norm: False is none of"),
        ({"pair": (1, 3)}, ValueError, "^pair/1: must be 2, not 3"),
        ({"pair": (1,)}, ValueError, "^pair: 1 items, where there are 2"),
        ({"pair": 1}, TypeError, "^pair: must be a tuple, not 1"),
        ({"more": 1}, ValueError, "^more: the space lacks it"),
    ],
)
def test_candidates_that_do_not_fit(change, kind, message):
    candidate = sp.decode(SPACE, GOOD)
    with pytest.raises(kind, match=message):
        sp.encode(SPACE, {**candidate, **change})


def test_repeats_of_a_given_count_have_that_many():
    with pytest.raises(ValueError, match=r"^the space: 1 items, where there are 2"):
        sp.encode(Repeat(2, Integer(1, 2)), [1])


def test_parents_and_points_to_change_are_checked_too():
    rng = np.random.default_rng(0)
    bad = {**GOOD, "layers/0/width": 12}
    for move in (lambda: sp.mutate(SPACE, bad, rng), lambda: sp.cross(SPACE, GOOD, bad, rng)):
        with pytest.raises(ValueError, match=r"^layers/0/width: 12"):
            move()


def test_what_is_no_point_or_no_spread():
    for move in (sp.decode, sp.parts):
        with pytest.raises(TypeError, match=r"a point must be a dict of values by path, not \[3\]"):
            move(SPACE, [3])
    for spread, kind in ((math.inf, ValueError), ("wide", TypeError)):
        with pytest.raises(kind, match="spread"):
            sp.mutate(SPACE, GOOD, np.random.default_rng(0), spread=spread)
    with pytest.raises(ValueError, match="index is -1"):
        sp.mutate(SPACE, GOOD, np.random.default_rng(0), index=-1)
    with pytest.raises(ValueError, match="spread and index are two ways"):
        sp.mutate(SPACE, GOOD, np.random.default_rng(0), index=1, spread=1)
    with pytest.raises(ValueError, match="is none of the options 'relu'"):
        sp.encode(Choice({"relu": None}), np.array(["relu", "gelu"]))


def test_no_end_of_values_is_named():
    with pytest.raises(ValueError, match=r"^act/leaky/slope: a continuous part"):
        sp.enumerate_points(SPACE)
    with pytest.raises(ValueError, match="levels is 0"):
        sp.enumerate_points(SPACE, levels=0)


def test_keys():
    key = jax.random.key(0)
    draws = [
        sp.generator(key).random(),
        sp.generator(key, 0).random(),
        sp.generator(key, 0, 0).random(),
        sp.generator(key, 1).random(),
        sp.generator(jax.random.key(1)).random(),
    ]
    assert len(set(draws)) == 5
    assert sp.generator(jax.random.PRNGKey(0)).random() == draws[0]
    assert sp.sample(SPACE, key) == sp.sample(SPACE, key)
    rng = np.random.default_rng(0)
    assert sp.generator(rng) is rng
    for bad in (0, None, np.arange(2)):
        with pytest.raises(TypeError, match="key must be a JAX key"):
            sp.sample(SPACE, bad)
    with pytest.raises(TypeError, match="give a key"):
        sp.generator(rng, 1)
