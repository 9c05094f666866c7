"""Leaves in a rotated basis: what they decode to, on files, in loops and on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from leaf_samples import quantized, shared, sparse, weights

from jaxcomp.arrays import Parts
from jaxcomp.arrays.rotated import RotatedArray, flips_of, pack_flips, rotate_values, turn_back

FLIPS = {
    (-2,): np.array([1, 0, 0, 1, 1, 0, 1, 0], bool),
    (-3, -2): np.arange(4 * 8).reshape(4, 8) % 3 == 0,
}


def rotated(shape=(8, 6), axes=(-2,), signed=True, dtype="float32", batch_axes=0):
    inner = quantized(weights(shape), 4, batch_axes=batch_axes)
    signs = None
    if signed:
        leading = len(shape) + axes[0]
        flips = FLIPS[axes].reshape(-1)
        signs = pack_flips(
            np.broadcast_to(flips, (*shape[:batch_axes], *[1] * (leading - batch_axes), flips.size))
        )
    return RotatedArray(inner, signs, axes, dtype)


def dense(leaf, flips):
    """In float64, by the dense matrix."""
    x = np.asarray(leaf.inner.decode(), np.float64)
    for axis in leaf.axes:
        size = x.shape[axis]
        block = size & -size
        turn = np.kron(np.eye(size // block), scipy.linalg.hadamard(block) / np.sqrt(block))
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ turn, -1, axis)
    if flips is not None:
        x = np.where(flips[..., None], -x, x)
    return x


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("shape", "axes"), [((8, 6), (-2,)), ((4, 8, 6), (-3, -2))])
def test_it_decodes_to_the_inverse_of_the_rotation(shape, axes, signed):
    leaf = rotated(shape, axes, signed)
    expected = dense(leaf, FLIPS[axes] if signed else None)
    np.testing.assert_allclose(leaf.decode(), expected, rtol=0, atol=2e-6)
    assert leaf.shape == shape
    assert leaf.form() == leaf.inner.form() + (", rotated with signs" if signed else ", rotated")
    assert leaf.nbytes == leaf.inner.nbytes + (FLIPS[axes].size // 8 if signed else 0)


def test_rotating_and_turning_back():
    x = weights((3, 8, 6))
    flips = FLIPS[-2,][:, None]
    turned = rotate_values(x, (-2,), flips)
    np.testing.assert_allclose(turn_back(turned, (-2,), flips), x, atol=1e-6)
    # Inputs that are rotated too meet the rotated weights in the same products.
    inputs = weights((5, 8), seed=1)
    both = np.asarray(rotate_values(inputs, (-1,), flips[:, 0])) @ np.asarray(turned[0])
    np.testing.assert_allclose(both, inputs @ x[0], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_in_and_out_of_jit(dtype):
    # Scales that are no powers of two: a product and a sum rounded as one would show.
    leaf = rotated((64, 6), (-2,), signed=False, dtype=dtype)
    outside = np.asarray(leaf.decode())
    np.testing.assert_array_equal(jax.jit(lambda leaf: leaf.decode())(leaf), outside)
    with jax.disable_jit():
        np.testing.assert_array_equal(leaf.decode(), outside)
    x = weights((3, 64))
    _, again = jax.jit(lambda x, leaf: (x @ leaf.decode().astype(x.dtype), leaf.decode()))(x, leaf)
    np.testing.assert_array_equal(again, outside)


@pytest.mark.parametrize("signed", [True, False])
def test_vmap_and_scan_slice_every_field(signed):
    stack = rotated((3, 8, 6), (-2,), signed, batch_axes=1)
    whole = np.asarray(stack.decode())
    np.testing.assert_array_equal(jax.vmap(lambda leaf: leaf.decode())(stack), whole)
    _, each = jax.lax.scan(lambda carry, leaf: (carry, leaf.decode()), 0, stack)
    np.testing.assert_array_equal(each, whole)


@pytest.mark.parametrize("make", [shared, sparse, lambda x: quantized(x, 3, affine=True)])
def test_parts_of_any_leaf_within(make):
    leaf = RotatedArray(make(weights((8, 6))), pack_flips(FLIPS[-2,][None, :][0]), (-2,), "float16")
    back = RotatedArray.from_parts(leaf.to_parts())
    assert type(back.inner) is type(leaf.inner)
    assert back.axes == (-2,)
    assert back.dtype == np.float16
    np.testing.assert_array_equal(back.decode(), leaf.decode())


def wrong(**changes):
    parts = rotated().to_parts()
    static = {**parts.static, **changes.get("static", {})}
    return Parts(static, parts.symbols, {**parts.arrays, **changes.get("arrays", {})})


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (wrong(static={"axes": [-3]}), "an axis must be an int from -2 to -1"),
        (wrong(static={"axes": [True]}), "an axis must be an int"),
        (wrong(static={"axes": []}), "axes must be 1 to 2 of the leaf's axes"),
        (wrong(static={"axes": [-1, -2]}), "axes must ascend"),
        (wrong(static={"axes": "all"}), "axes must be 1 to 2"),
        (wrong(static={"axes": [-1]}), "signs must be a bit for each of 6 features"),
        (wrong(static={"dtype": "int8"}), "dtype must name a floating dtype"),
        (wrong(static={"inner": "rotated"}), "inner must name a kind of leaf"),
        (wrong(arrays={"signs": np.zeros(2, np.uint8)}), "signs must be a bit for each of 8"),
        (wrong(arrays={"signs": np.zeros((3, 1), np.uint8)}), "behind axes that broadcast"),
        (wrong(arrays={"signs": np.zeros(1, np.float32)}), "not float32"),
        (wrong(arrays={"more": np.zeros(1)}), "arrays must hold"),
    ],
)
def test_parts_that_lie_are_refused(parts, words):
    with pytest.raises(ValueError, match=words):
        RotatedArray.from_parts(parts)


def test_gradients_pass_through_to_what_is_within():
    leaf = rotated(signed=True)
    scale = leaf.inner.scale

    def loss(scale):
        inner = dataclasses.replace(leaf.inner, scale=scale)
        return jnp.sum(dataclasses.replace(leaf, inner=inner).decode() * weights((8, 6), seed=2))

    numeric = [
        (loss(scale + 1e-2 * step) - loss(scale - 1e-2 * step)) / 2e-2
        for step in np.eye(6, dtype=np.float32)
    ]
    np.testing.assert_allclose(jax.grad(loss)(scale).ravel(), numeric, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    leaf = rotated((8, 16), (-2,), signed=True)
    place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))
    codes = jax.device_put(leaf.inner.codes, place("a", "b"))
    scale = jax.device_put(leaf.inner.scale, place(None, "b"))
    signs = jax.device_put(leaf.signs, place(None))
    inner = dataclasses.replace(leaf.inner, codes=codes, scale=scale)
    spread = dataclasses.replace(leaf, inner=inner, signs=signs)
    np.testing.assert_array_equal(spread.decode(), leaf.decode())
    np.testing.assert_array_equal(jax.jit(lambda leaf: leaf.decode())(spread), leaf.decode())


def test_flips_lie_where_the_features_are():
    signs = pack_flips(FLIPS[-3, -2].reshape(1, -1))
    flips = flips_of(signs, (2, 4, 8, 6), (-3, -2))
    assert flips is not None
    np.testing.assert_array_equal(flips[0, :, :, 0], FLIPS[-3, -2])
    assert flips.shape == (1, 4, 8, 1)
    assert flips_of(None, (8, 6), (-2,)) is None
