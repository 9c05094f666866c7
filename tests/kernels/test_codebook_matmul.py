"""What the product with shared values owes beyond the table of products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp.arrays.codebook import CodebookArray
from jaxcomp.kernels.codebook.lookup import choose_by_bits
from jaxcomp.kernels.codebook.matmul import codebook_matmul

FORMS = ("xla", "triton", "mosaic_tpu")


def leaf(clusters, inputs, outputs, groups=None, axis=-1, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    indices = rng.integers(0, clusters, (inputs, outputs))
    codebook = rng.normal(size=(*(() if groups is None else (groups,)), clusters))
    return CodebookArray.from_indices(
        jnp.asarray(indices, jnp.uint8 if clusters <= 256 else jnp.uint16),
        jnp.asarray(codebook, jnp.float32),
        dtype,
        None if groups is None else axis,
    )


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_same(x, weight, form=None):
    """The product and both gradients, beside those of the decoded matrix."""

    def of_codebook(product):
        return lambda x, codebook: product(x, dataclasses.replace(weight, codebook=codebook))

    run = of_codebook(lambda x, w: codebook_matmul(x, w, implementation=form))
    y, back = jax.vjp(run, x, weight.codebook)
    plain, plain_back = jax.vjp(of_codebook(lambda x, w: x @ w.decode()), x, weight.codebook)
    np.testing.assert_allclose(y, plain, atol=1e-3)
    dy = normal(*y.shape, seed=2)
    for found, expected in zip(back(dy), plain_back(dy), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_the_outputs_have_values_of_their_own(form):
    assert_same(normal(4, 128), leaf(4, 128, 1024, groups=2), form)


@pytest.mark.parametrize(
    ("clusters", "groups", "axis", "reason"),
    [
        (256, None, -1, "8 bits"),
        (5, None, -1, "3 bits"),
        (16, 2, -2, "groups of inputs"),
        (16, 6, -1, "two of them"),
    ],
)
def test_others_are_decoded(clusters, groups, axis, reason):
    weight = leaf(clusters, 8, 6, groups, axis)
    assert_same(normal(3, 8), weight)
    with pytest.raises(ValueError, match=reason):
        codebook_matmul(normal(3, 8), weight, implementation="triton")


def test_a_matrix_is_looked_up_in_blocks_of_inputs():
    """1,100 inputs are two blocks and a rest of this width."""
    assert_same(normal(2, 1100), leaf(2, 1100, 2048))


def test_bit_by_bit_on_an_accelerator_as_looked_up_on_a_cpu():
    from jaxcomp.kernels.codebook import xla

    weight, dy = leaf(4, 32, 16, groups=2), normal(3, 4, 4)
    arrays = (2, weight.indices, weight.codebook, 1)
    np.testing.assert_array_equal(xla._chosen(*arrays), xla._looked_up(*arrays))
    weights, indices = normal(32, 4), jnp.asarray(weight.indices, jnp.int32) & 3
    scattered, selected = (f((2, 4), weights, indices) for f in (xla._scattered, xla._selected))
    np.testing.assert_allclose(scattered, selected, atol=1e-5)
    assert xla.to_input(2, dy, weight.indices, weight.codebook, jnp.arange(4)).shape == (3, 32)


def test_values_of_more_precision_than_the_weight():
    weight = leaf(16, 64, 32, dtype=jnp.bfloat16)
    x = normal(4, 64).astype(jnp.bfloat16)
    loss = lambda codebook: codebook_matmul(x, dataclasses.replace(weight, codebook=codebook)).sum()
    gradient = jax.grad(loss)(weight.codebook)
    assert codebook_matmul(x, weight).dtype == jnp.bfloat16
    assert gradient.dtype == jnp.float32


@pytest.mark.parametrize("form", ["triton", "mosaic_tpu"])
@pytest.mark.parametrize(("axis", "sharded"), [("i", (None, "d")), ("o", ())])
def test_a_matrix_on_many_devices_is_not_gathered(form, axis, sharded):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    weight, x = leaf(16, 256, 512), normal(16, 256)
    spec = ("d", None) if axis == "i" else (None, "d")
    placed = dataclasses.replace(
        weight, indices=put(weight.indices, *spec), codebook=put(weight.codebook)
    )
    run = jax.jit(lambda x, w: codebook_matmul(x, w, implementation=form))
    y = run(put(x, *sharded), placed)
    np.testing.assert_allclose(y, x @ weight.decode(), atol=1e-3)
    assert "all-gather" not in str(run.lower(put(x, *sharded), placed).compile().as_text())


@pytest.mark.parametrize("form", FORMS[1:])
def test_kernels_run_where_64_bits_are_allowed(form):
    weight, x = leaf(16, 128, 512), normal(4, 128)
    with jax.enable_x64(True):
        y = codebook_matmul(x, weight, implementation=form)
    np.testing.assert_allclose(y, x @ weight.decode(), atol=1e-3)


def test_bits_choose():
    entries = [jnp.float32(value) for value in range(8, 16)]
    indices = jnp.arange(8).reshape(2, 4)
    np.testing.assert_array_equal(choose_by_bits(indices, entries), indices + 8)


@pytest.mark.parametrize("clusters", [16, 5])
@pytest.mark.parametrize("shape", [(0, 16, 8), (3, 0, 8), (3, 16, 0)])
def test_a_product_of_nothing_is_zeros(shape, clusters):
    rows, inputs, outputs = shape
    weight, x = leaf(clusters, inputs, outputs), normal(2, rows, inputs)
    assert codebook_matmul(x, weight).shape == (2, rows, outputs)
    assert_same(x, weight)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize(
    ("shape", "spec"), [((4, 16), ("d",)), ((4, 3, 16), ("d", None, "m")), ((4, 16), ())]
)
def test_gradients_lie_as_what_they_are_of_on_explicit_axes(shape, spec, groups):
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=explicit)
    weight, x = leaf(16, 16, 8, groups), normal(*shape)

    def loss(x, codebook):
        y = codebook_matmul(x, dataclasses.replace(weight, codebook=codebook))
        return jnp.sum(y**2)

    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    expected = jax.grad(loss, (0, 1))(x, weight.codebook)
    with jax.set_mesh(mesh):
        plain = jax.grad(loss, (0, 1))(placed, weight.codebook)
    for found in (plain, jax.jit(jax.grad(loss, (0, 1)))(placed, weight.codebook)):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-3)
