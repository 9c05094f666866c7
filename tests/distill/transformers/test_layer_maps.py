"""Layer maps against the pairs that the papers write out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.distill import layer_map


def test_the_pairs_of_the_papers():
    # TinyBERT: m -> 3 m, counted from 1.
    assert [i + 1 for i in layer_map(4, 12)] == [3, 6, 9, 12]
    # Patient distillation: the first five layers of six, counted from 1.
    assert [i + 1 for i in layer_map(6, 12)[:-1]] == [2, 4, 6, 8, 10]
    assert [i + 1 for i in layer_map(5, 11, "last")] == [7, 8, 9, 10, 11]
    # DistilBERT's six layers of BERT's twelve.
    assert layer_map(6, 12, "spread") == (0, 2, 4, 7, 9, 11)
    assert layer_map(3, 12, "first") == (0, 1, 2)
    assert layer_map(1, 12, "spread") == layer_map(1, 12) == layer_map(1, 12, "last") == (11,)


@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from(["uniform", "spread", "last"]))
def test_every_map_rises_to_the_last_layer(depth, times, kind):
    made = layer_map(depth, depth * times, kind)
    assert len(made) == depth
    assert list(made) == sorted(set(made))
    assert made[0] >= 0
    assert made[-1] == depth * times - 1
    assert layer_map(depth, depth, kind) == tuple(range(depth))


@pytest.mark.parametrize(
    ("match", "args"),
    [
        ("student_depth 0 must be", (0, 3)),
        ("student_depth 4 is above teacher_depth 3", (4, 3)),
        ('does not divide teacher_depth 12: use kind="spread"', (5, 12)),
        ("kind 'skip' must be", (6, 12, "skip")),
    ],
)
def test_depths_that_do_not_fit_are_told(match, args):
    with pytest.raises(ValueError, match=match):
        layer_map(*args)
