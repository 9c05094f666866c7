"""Every architecture of the zoo: the channels that were derived by hand, and the law of removal."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.cutting import cut, difference
from tests.model.networks import Drawn, networks
from tests.model.zoo import ZOO

LAW = 1e-5


@functools.cache
def case_and_pair(name):
    """A network with what is cut from it, analysed once for all tests."""
    case = ZOO[name]()
    return case, cut(case.apply_fn, case.params, case.inputs)


@pytest.mark.parametrize("name", ZOO)
def test_what_can_be_cut_is_what_was_derived_by_hand_and_masked_equals_removed(name):
    case, pair = case_and_pair(name)
    found = {
        (group.size, frozenset((part.path, part.axis) for part in group.slices))
        for group in pair.groups
        if group.fixed is None
    }
    assert found == {(group.units, group.slices) for group in case.cuttable.values()}
    masked = jax.jit(case.apply_fn)(pair.masked, *case.inputs)
    removed = jax.jit(pair.smaller)(pair.small, *case.inputs)
    assert difference(masked, removed) < case.tolerance


@settings(max_examples=25, deadline=None)
@given(networks(), st.integers(0, 2**16))
def test_masked_equals_removed_in_random_networks(drawn: Drawn, seed: int):
    pair = cut(drawn.apply_fn, drawn.params, drawn.inputs, seed)
    masked = jax.jit(drawn.apply_fn)(pair.masked, *drawn.inputs)
    removed = jax.jit(pair.smaller)(pair.small, *drawn.inputs)
    assert difference(masked, removed) < LAW


@pytest.mark.parametrize("name", ["resnet", "llama half-split", "gru", "scanned remat", "vit"])
def test_gradients_of_the_smaller_model_are_those_of_the_masked_one(name):
    case, pair = case_and_pair(name)

    def loss(function):
        def of(params):
            outputs = jax.tree.leaves(function(params, *case.inputs))
            return sum((out**2).mean() for out in outputs)

        return jax.jit(jax.grad(of, allow_int=True))

    masked = jax.tree.leaves(loss(case.apply_fn)(pair.masked))
    removed = jax.tree.leaves(loss(pair.smaller)(pair.small))
    # Some are zero but for rounding (a key's bias under a softmax): the greatest is the measure.
    scale = max(float(np.abs(whole).max()) for whole in masked)
    for whole, small, path in zip(masked, removed, pair.kept, strict=True):
        error = np.abs(np.asarray(whole)[np.ix_(*pair.kept[path])] - np.asarray(small))
        assert error.max(initial=0) < 1e-5 * scale, path


@pytest.mark.parametrize("name", ["vgg", "vit", "llama half-split"])
def test_other_batch_sizes(name):
    case, pair = case_and_pair(name)
    more = jax.tree.map(lambda x: np.concatenate([x, x, x]), case.inputs)
    expected = jax.jit(case.apply_fn)(pair.masked, *more)
    assert difference(expected, jax.jit(pair.smaller)(pair.small, *more)) < LAW
