"""Schedules are their formulas, inside ``jit`` too."""

import jax
import numpy as np
import pytest

from jaxcomp.prune import constant, cubic, one_shot, staircase


def test_cubic_is_the_published_formula():
    schedule = cubic(0.9, begin=10, end=110, initial_sparsity=0.2)
    for step in (0, 9, 10, 11, 60, 109, 110, 111, 10**6):
        t = np.clip((step - 10) / 100, 0, 1)
        expected = 0.0 if step < 10 else 0.9 + (0.2 - 0.9) * (1 - t) ** 3
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)
        assert float(jax.jit(schedule)(step)) == pytest.approx(expected, abs=1e-6)
    assert float(cubic(0.9, 5, 5)(5)) == pytest.approx(0.9)
    for bad in ((0.9, 5, 4), (0.9, -1, 4)):
        with pytest.raises(ValueError, match="begin"):
            cubic(*bad)
    with pytest.raises(ValueError, match="exchange"):
        cubic(0.3, 0, 10, initial_sparsity=0.5)


def test_staircase_removes_the_same_fraction_of_what_is_left_each_round():
    schedule = staircase(0.9, rounds=5, every=7, begin=3)
    for step in range(60):
        rounds = min(max((step - 3) // 7, 0), 5)
        expected = 1 - 0.1 ** (rounds / 5)
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)
        assert float(jax.jit(schedule)(step)) == pytest.approx(expected, abs=1e-6)
    assert np.float32(schedule(10**6)) == np.float32(0.9)
    for bad in ({"rounds": 0, "every": 1}, {"rounds": 1, "every": 0}):
        with pytest.raises(ValueError, match="rounds and every must be at least 1"):
            staircase(0.5, **bad)


def test_one_shot_and_constant():
    assert [float(one_shot(0.25, 2)(step)) for step in range(4)] == [0, 0, 0.25, 0.25]
    assert [float(constant(0.25)(step)) for step in range(2)] == [0.25, 0.25]
    with pytest.raises(ValueError, match="fraction of weights removed"):
        constant(1.0)
