"""The table that searches are compared on: what its networks are, and how a search is followed."""

import pathlib
import sys

import jax
import numpy as np
import pytest

from jaxcomp.search import spaces, strategies

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import search_table


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layers", [[8], [16, 4], [4, 32, 8]])
def test_a_masked_network_is_the_network_of_its_own_size(layers, skip):
    candidate = {"layers": layers, "activation": "tanh", "rate": 0.01, "skip": skip}
    arrays = search_table.as_arrays(candidate)
    params = search_table.initial(arrays, jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    made, before = x, 64
    for number, width in enumerate(layers):
        layer = jax.tree.map(np.asarray, params["layers"][number])
        after = np.tanh(made @ layer["kernel"][:before, :width] + layer["bias"][:width])
        if skip and number:
            common = min(before, width)
            after[:, :common] += made[:, :common]
        made, before = after, width
    expected = made @ np.asarray(params["out"]["kernel"])[:before]
    np.testing.assert_allclose(
        search_table.logits(params, arrays, x), expected, rtol=2e-5, atol=1e-5
    )
    size = np.std(np.asarray(params["out"]["kernel"]))
    assert size == pytest.approx(layers[-1] ** -0.5, rel=0.2)


def test_parameters_are_those_of_the_network_alone():
    assert search_table.parameters({"layers": [8, 4]}) == 64 * 8 + 8 + 8 * 4 + 4 + 4 * 10 + 10


def test_the_table_has_a_row_for_each_candidate_in_their_order():
    points = list(spaces.enumerate_points(search_table.SPACE))
    rows = search_table.rows()
    assert [row["number"] for row in rows] == list(range(len(points)))
    sizes = [search_table.parameters(spaces.decode(search_table.SPACE, p)) for p in points]
    assert [row["parameters"] for row in rows] == sizes
    true = search_table.truth()
    assert 0 <= true.min() < true.max() <= 1


def test_a_search_that_has_seen_all_has_found_the_best():
    points = list(spaces.enumerate_points(search_table.SPACE))
    numbers = {spaces.frozen(point): i for i, point in enumerate(points)}
    true = np.random.default_rng(0).random(len(points))
    curve = search_table.follow(strategies.grid(), 0, numbers, true, len(points))
    np.testing.assert_array_equal(curve, np.maximum.accumulate(curve))
    assert curve[-1] == true.max()
