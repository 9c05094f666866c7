"""Spaces drawn by hypothesis, for property tests."""

from typing import NamedTuple

from hypothesis import strategies as st

from jaxcomp.search.spaces import Choice, Continuous, Integer, Repeat


class Pair(NamedTuple):
    first: object
    second: object


names = st.sampled_from(["a", "b", "width", "x/y", "relu", "ä", "0"])
constants = st.sampled_from([None, True, False, 0, 1, 2.5, "relu", ""])


@st.composite
def integers(draw):
    low, step, steps = draw(st.integers(-3, 20)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    return Integer(low, low + step * steps, step, log=low >= 1 and draw(st.booleans()))


@st.composite
def continuous(draw):
    low, log = draw(st.sampled_from([1e-6, 0.5, 3.0])), draw(st.booleans())
    width = draw(st.sampled_from([0.0, 1e-9, 2.0, 1e6]))
    return Continuous(low if log else low - 1, (low if log else low - 1) + width, log)


def spaces(endless: bool = True):
    """Any space, up to a dozen parts; without continuous ones where it shall have an end."""
    numbers = st.one_of(integers(), continuous()) if endless else integers()
    return st.recursive(st.one_of(constants, numbers, choices(constants)), grown, max_leaves=6)


def grown(inner):
    counts = st.one_of(st.integers(0, 2), st.sampled_from([Integer(0, 2), Integer(1, 3, 2)]))
    return st.one_of(
        choices(inner),
        st.dictionaries(names, inner, max_size=3),
        st.lists(inner, max_size=2),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
        st.builds(Repeat, counts, inner),
    )


@st.composite
def choices(draw, inner):
    options = draw(st.dictionaries(names, inner, min_size=1, max_size=3))
    if draw(st.booleans()):
        return Choice(options)
    # Positions tell unnamed options apart, and constants must not be equal.
    return Choice([{name: option} for name, option in options.items()])
