"""HQQ over a model: the half-quadratic range, on whatever format the rules name."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.quantize.affine import encode
from jaxcomp.quantize.formats import Format, GridFormat, PerGroup
from jaxcomp.quantize.post_training.hqq import hqq
from jaxcomp.quantize.post_training.round_to_nearest import round_to_nearest
from jaxcomp.quantize.ranges import HalfQuadratic, MeanSquare

RNG = np.random.default_rng(0)
# Heavy tails: a few weights would decide every range.
PARAMS = {
    "w0": jnp.asarray(RNG.standard_t(3, size=(64, 8)), jnp.float32),
    "w1": jnp.asarray(RNG.standard_t(3, size=(8, 64)), jnp.float32),
}
BATCHES = [jnp.asarray(RNG.normal(size=(40, 64)), jnp.float32)]


def model(p, x):
    return jnp.tanh(x @ p["w0"]) @ p["w1"]


def assert_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_each_leaf_is_that_of_its_range_and_needs_no_data(tmp_path):
    groups = Format(3, symmetric=False, granularity=PerGroup(8))
    rules = {"w0": groups, "w1": Format(2, symmetric=False, range=MeanSquare())}
    found = hqq(model, PARAMS, None, rules, directory=tmp_path)
    for path, format in rules.items():
        with_range = dataclasses.replace(format, range=HalfQuadratic())
        assert_bits(found.params[path], encode(PARAMS[path], with_range))
    measured = hqq(model, PARAMS, BATCHES, rules)
    assert_bits(measured.params, found.params)
    assert np.isnan(found.leaves[0].output_error)
    assert measured.leaves[0].output_error > 0
    # The same call goes on; another norm is another call.
    assert sorted(os.listdir(tmp_path)) == ["hqq-00000.jxc", "hqq.jxc"]
    assert_bits(hqq(model, PARAMS, None, rules, directory=tmp_path).params, found.params)
    with pytest.raises(ValueError, match=r"another formats: .*norm=0.7.*now .*norm=0.5"):
        hqq(model, PARAMS, None, rules, range=HalfQuadratic(norm=0.5), directory=tmp_path)


def test_most_weights_are_nearer_than_with_a_range_that_holds_all():
    """Not by the mean square, which outliers decide: by the norm that is minimized."""
    format = Format(2, symmetric=False)
    found, nearest = (
        method(model, PARAMS, None, format).params for method in (hqq, round_to_nearest)
    )
    for path, weight in PARAMS.items():
        errors = [
            np.abs(np.asarray(p[path].decode(), np.float64) - np.asarray(weight))
            for p in (found, nearest)
        ]
        mine, theirs = (np.sum(each**0.7) for each in errors)
        assert mine < 0.9 * theirs


def test_levels_of_a_grid_and_leaves_that_stay():
    rules = {"w0": GridFormat("float4_e2m1fn", PerGroup(8)), "w1": None}
    found = hqq(model, PARAMS, None, rules)
    with_range = GridFormat("float4_e2m1fn", PerGroup(8), range=HalfQuadratic())
    assert_bits(found.params["w0"], encode(PARAMS["w0"], with_range))
    assert found.params["w1"] is PARAMS["w1"]


def test_bad_rules_are_named():
    with pytest.raises(TypeError, match=r"rules must be a format.*not 4"):
        hqq(model, PARAMS, None, 4)
    with pytest.raises(TypeError, match=r"rule 'w0' must be a format or None.*not 4"):
        hqq(model, PARAMS, None, {"w0": 4})
    with pytest.raises(ValueError, match="pattern 'w9' matches no leaf"):
        hqq(model, PARAMS, None, {"w9": Format(4)})


def test_another_range_is_refused():
    for other in (MeanSquare(), None, 0.7):
        with pytest.raises(TypeError, match="range must be a HalfQuadratic"):
            hqq(model, PARAMS, None, Format(3), range=other)
