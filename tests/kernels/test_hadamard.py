"""The fast Hadamard transform against SciPy's matrix, and the bits that it must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp.kernels.hadamard import block_size, hadamard


def matrix(size):
    """Dense, in float64, one block beside the other."""
    block = 1
    while size % (2 * block) == 0:
        block *= 2
    return scipy.linalg.block_diag(
        *[scipy.linalg.hadamard(block) / np.sqrt(block)] * (size // block)
    )


def butterflies(x):
    """Along the last axis, in float32, two at a time in the textbook's order."""
    block = x.shape[-1] & -x.shape[-1]
    y, half = x.reshape(-1, block).copy(), 1
    while half < block:
        for start in range(0, block, 2 * half):
            a, b = y[:, start : start + half].copy(), y[:, start + half : start + 2 * half].copy()
            y[:, start : start + half], y[:, start + half : start + 2 * half] = a + b, a - b
        half *= 2
    return (y * np.float32(1 / np.sqrt(block))).reshape(x.shape)


def sample(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size", [1, 3, 8, 12, 40, 128])
def test_it_is_the_dense_matrix(size):
    x = sample(3, size, seed=size)
    exact = x.astype(np.float64) @ matrix(size)
    # log2 of a block additions and one product, each of half a unit in the last place.
    bound = 10 * 2.0**-24 * np.linalg.norm(x, axis=-1, keepdims=True) * np.sqrt(block_size(size))
    assert (np.abs(hadamard(x) - exact) <= bound).all()


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2)])
def test_any_axis_and_several(axis):
    x = sample(4, 6, 8)
    expected = x.astype(np.float64)
    for each in (axis,) if isinstance(axis, int) else axis:
        moved = np.moveaxis(expected, each, -1)
        expected = np.moveaxis(moved @ matrix(x.shape[each]), -1, each)
    np.testing.assert_allclose(hadamard(x, axis), expected, atol=2e-6)


@pytest.mark.parametrize("size", [8, 12, 40])
def test_the_matrix_is_orthonormal_symmetric_and_its_own_inverse(size):
    dense = np.asarray(hadamard(np.eye(size, dtype=np.float32)), np.float64)
    np.testing.assert_array_equal(dense, dense.T)
    np.testing.assert_allclose(dense @ dense, np.eye(size), atol=1e-6)
    assert len(np.unique(np.abs(dense[dense != 0]))) == 1


@given(
    hnp.arrays(np.float32, (2, 16), elements=st.integers(-(2**15), 2**15).map(float)),
    st.integers(-8, 8),
)
def test_small_integers_keep_products_and_come_back_exactly(x, exponent):
    # Sums of integers below 2**24 are exact, and so is the root of 16.
    scaled = np.ldexp(x, exponent)
    once = np.asarray(hadamard(scaled))
    np.testing.assert_array_equal(hadamard(once), scaled)
    first, second = scaled.astype(np.float64)
    assert float(once[0].astype(np.float64) @ once[1]) == first @ second


def test_twice_is_the_input_within_rounding_and_lengths_stay():
    x = sample(3, 128)
    twice = np.asarray(hadamard(hadamard(x)))
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    assert np.abs(twice - x).max() <= 2e-6 * norm.max()
    np.testing.assert_allclose(np.linalg.norm(hadamard(x), axis=-1), norm[:, 0], rtol=1e-6)


@pytest.mark.parametrize("size", [8, 40])
def test_the_same_bits_eager_jitted_vmapped_and_by_the_textbook(size):
    x = sample(6, size)
    expected = butterflies(x)
    np.testing.assert_array_equal(hadamard(x), expected)
    np.testing.assert_array_equal(jax.jit(hadamard)(x), expected)
    np.testing.assert_array_equal(jax.vmap(hadamard)(x), expected)
    np.testing.assert_array_equal(jax.jit(hadamard, static_argnums=1)(x.T, 0).T, expected)


def test_the_derivative_is_the_transform_itself():
    x, cotangent = sample(2, 12), sample(2, 12, seed=1)
    value, pull = jax.vjp(hadamard, x)
    np.testing.assert_allclose(pull(cotangent)[0], cotangent @ matrix(12), atol=1e-6)
    _, push = jax.jvp(hadamard, (x,), (cotangent,))
    np.testing.assert_allclose(push, cotangent @ matrix(12), atol=1e-6)
    assert value.shape == x.shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_are_rounded_once(dtype):
    x = sample(3, 16).astype(jnp.dtype(dtype))
    found = hadamard(x)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, hadamard(x.astype(np.float32)).astype(dtype))


def test_an_outlier_is_spread_over_its_block_and_no_further():
    x = np.zeros(24, np.float32)
    x[3] = 8.0
    found = np.abs(hadamard(x))
    np.testing.assert_allclose(found[:8], np.full(8, 8 / np.sqrt(8)), rtol=1e-6)
    np.testing.assert_array_equal(found[8:], 0)


def test_nan_and_infinity_stay_in_their_block():
    x = np.zeros(12, np.float32)
    x[0], x[5] = np.nan, np.inf
    found = np.asarray(hadamard(x))
    assert np.isnan(found[:4]).all()
    assert np.isinf(found[4:8]).all()
    np.testing.assert_array_equal(found[8:], 0)


def test_empty_axes_pass():
    assert hadamard(np.zeros((0, 4), np.float32)).shape == (0, 4)
    assert hadamard(np.zeros((4, 0), np.float32)).shape == (4, 0)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_along_the_axis_and_beside_it(kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    x = sample(16, 8)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))
    found = hadamard(placed, 0)
    np.testing.assert_array_equal(found, hadamard(x, 0))


def test_what_cannot_be_transformed_is_refused():
    with pytest.raises(TypeError, match="x must be of real floats, not int32"):
        hadamard(jnp.arange(4))
    with pytest.raises(ValueError, match=r"x of shape \(2, 4\) has no axis 2"):
        hadamard(sample(2, 4), 2)
    with pytest.raises(ValueError, match="an axis is named twice"):
        hadamard(sample(2, 4), (1, -1))
    with pytest.raises(ValueError, match="size 0"):
        block_size(0)
