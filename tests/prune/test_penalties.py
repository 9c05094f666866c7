"""Penalties against sums written out unit by unit in float64, and their exact gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import tree as tree_lib
from jaxcomp.prune import penalties
from jaxcomp.prune.structures import NM, Block, Channel, Element, Kernel


def unit_of(structure, index):
    """A name for the unit that the weight at ``index`` belongs to, from the definition."""
    if isinstance(structure, Element):
        return index
    if isinstance(structure, Block):
        lead = len(index) - len(structure.shape)
        tiles = (i // size for i, size in zip(index[lead:], structure.shape, strict=True))
        return (*index[:lead], *tiles)
    if isinstance(structure, Channel):
        axes = (structure.axis,) if isinstance(structure.axis, int) else structure.axis
        return tuple(index[axis] for axis in axes)
    return tuple(i for axis, i in enumerate(index) if axis not in structure.axes)


def units(structure, shape):
    """Flat indices of each unit."""
    found = {}
    for place, index in enumerate(itertools.product(*map(range, shape))):
        found.setdefault(unit_of(structure, index), []).append(place)
    return list(found.values())


def group_lasso_by_hand(structure, leaf):
    flat = np.asarray(leaf, np.float64).ravel()
    gradient, total = np.zeros_like(flat), 0.0
    for unit in units(structure, leaf.shape):
        norm = np.linalg.norm(flat[unit])
        total += np.sqrt(len(unit)) * norm
        gradient[unit] = np.sqrt(len(unit)) * flat[unit] / norm if norm else 0.0
    return total, gradient.reshape(leaf.shape)


CASES = [
    (Element(), (3, 4)),
    (Element(within=-1), (3, 4)),
    (Channel(-1), (3, 4)),
    (Channel((0, 2)), (2, 3, 4)),
    (Block((2, 3)), (4, 6)),
    (Block((2,)), (3, 4)),
    (Kernel(), (3, 3, 2, 4)),
]


@pytest.mark.parametrize(("structure", "shape"), CASES, ids=str)
def test_group_lasso_and_its_gradient_unit_by_unit(structure, shape):
    leaf = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    # One unit is all zero: there the gradient is 0, not NaN.
    leaf.ravel()[units(structure, shape)[0]] = 0
    params = {"kernel": jnp.asarray(leaf), "bias": jnp.ones(4)}
    value, gradient = jax.jit(jax.value_and_grad(lambda p: penalties.group_lasso(p, structure)))(
        params
    )
    total, expected = group_lasso_by_hand(structure, leaf)
    np.testing.assert_allclose(value, total, rtol=2e-6)
    np.testing.assert_allclose(gradient["kernel"], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient["bias"], 0)


def test_group_lasso_of_single_weights_is_l1():
    params = {"kernel": jax.random.normal(jax.random.key(0), (5, 7))}
    np.testing.assert_array_equal(penalties.group_lasso(params, Element()), penalties.l1(params))


def test_l1_and_l2_and_their_gradients():
    leaf = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    leaf[0] = 0
    params = {"kernel": jnp.asarray(leaf), "bias": jnp.ones(5)}
    for penalty, total, expected in (
        (penalties.l1, np.abs(leaf.astype(np.float64)).sum(), np.sign(leaf)),
        (penalties.l2, np.square(leaf.astype(np.float64)).sum(), 2 * leaf),
    ):
        value, gradient = jax.value_and_grad(penalty)(params)
        np.testing.assert_allclose(value, total, rtol=1e-6)
        np.testing.assert_array_equal(gradient["kernel"], expected)
        np.testing.assert_array_equal(gradient["bias"], 0)


def test_each_leaf_its_own_structure():
    keys = jax.random.split(jax.random.key(2), 3)
    params = {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 2, 4))},
        "dense": {"kernel": jax.random.normal(keys[1], (4, 6))},
        "rest": {"kernel": jax.random.normal(keys[2], (2, 2))},
    }
    structures = {"conv/*": Kernel(), "dense/*": Channel(0)}
    expected = sum(
        group_lasso_by_hand(structures.get(f"{name}/*", Element()), np.asarray(leaf["kernel"]))[0]
        for name, leaf in params.items()
    )
    np.testing.assert_allclose(penalties.group_lasso(params, structures), expected, rtol=2e-6)


def test_narrow_weights_are_summed_in_float32():
    # In bfloat16 a sum of ones stops at 256, in float16 a sum of these squares overflows.
    ones = {"kernel": jnp.ones((100, 100), jnp.bfloat16)}
    large = {"kernel": jnp.full((10, 10), 200.0, jnp.float16)}
    assert penalties.l1(ones) == penalties.l2(ones) == 10_000
    assert penalties.group_lasso(ones, Channel(-1)) == 10_000
    assert penalties.l2(large) == 4_000_000
    np.testing.assert_allclose(penalties.group_lasso(large, Channel(-1)), 20_000, rtol=1e-6)
    assert penalties.l1(ones).dtype == jnp.float32
    assert jax.grad(penalties.l1)(ones)["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e25])
def test_group_lasso_neither_underflows_nor_overflows(scale):
    leaf = np.random.default_rng(3).normal(size=(8, 4)).astype(np.float32) * np.float32(scale)
    params = {"kernel": jnp.asarray(leaf)}
    value, gradient = jax.value_and_grad(lambda p: penalties.group_lasso(p, Channel(-1)))(params)
    total, expected = group_lasso_by_hand(Channel(-1), leaf)
    np.testing.assert_allclose(value, total, rtol=2e-6)
    np.testing.assert_allclose(gradient["kernel"], expected, rtol=1e-5)


def test_a_selection_means_all_its_leaves():
    leaves = tree_lib.Leaves({"a/bias": jnp.array([-3.0, 1.0])})
    assert penalties.l1(leaves) == 4
    assert penalties.l1({"a": {"bias": jnp.array([-3.0, 1.0])}}, where=lambda p, x: True) == 4


def test_nan_is_not_hidden():
    params = {"kernel": jnp.array([[jnp.nan, 1.0], [1.0, 1.0]])}
    assert jnp.isnan(penalties.l1(params))
    assert jnp.isnan(penalties.group_lasso(params, Channel(-1)))


@pytest.mark.parametrize(
    ("params", "structure", "message"),
    [
        ({"a": {"kernel": jnp.ones((4, 4))}}, NM(2, 4), "a/kernel: NM.*no units"),
        ({"a": {"kernel": jnp.ones((4, 4))}}, Block((3, 1)), "a/kernel.*does not tile"),
        ({"a": {"kernel": jnp.ones((4, 4))}}, {"b/*": Channel()}, r"'b/\*' matches no leaf"),
        ({"a": {"bias": jnp.ones(4)}}, Channel(), "no weight"),
    ],
)
def test_what_does_not_fit_is_refused_by_path(params, structure, message):
    with pytest.raises(ValueError, match=message):
        penalties.group_lasso(params, structure)


def test_leaves_that_are_not_floating_are_refused():
    with pytest.raises(TypeError, match=r"codes.*int32"):
        penalties.l2(tree_lib.Leaves(codes=jnp.ones((2, 2), jnp.int32)))
