"""One contract for every product with a compressed matrix, in every form of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from product_row import exact
from products import PRODUCTS

from jaxcomp import kernels

FORMS = [
    pytest.param(name, form, id=f"{name}-{form}")
    for name, product in PRODUCTS.items()
    for form in ("xla", *product.forms)
]
every_form = pytest.mark.parametrize(("name", "form"), FORMS)
every_product = pytest.mark.parametrize("name", PRODUCTS)
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}


def made(name, sizes=None, rows=(24,), dtype=None, seed=0):
    """A product, its activations and its weight; the activations as NumPy's float64, rounded."""
    product, rng = PRODUCTS[name], np.random.default_rng(seed)
    dtype = dtype or product.dtypes[0]
    inputs, outputs = sizes or product.fits
    weight = product.make(rng, inputs, outputs, dtype)
    x = jnp.asarray(rng.normal(size=(*rows, inputs)), dtype)
    seen = product.rounded(exact(x)) if product.rounded else exact(x)
    return product, x, weight, seen


def assert_close(found, expected, dtype):
    """Within rounding of the largest, as sums of positive and negative numbers are."""
    error = np.abs(exact(found) - expected).max(initial=0)
    scale = np.abs(expected).max(initial=1e-30)
    assert error <= TOLERANCE[jnp.dtype(dtype).name] * max(scale, 1e-30) * 4


def skip_interpreted(form, why):
    if form == "mosaic_gpu" and jax.default_backend() == "cpu":
        pytest.skip(f"Pallas's interpreter of Mosaic GPU {why}")


def gradients(product, x, weight, dy, form) -> Any:
    def loss(x, floats):
        whole = product.trained(weight, floats) if product.trained else weight
        return jnp.sum(product.run(x, whole, form).astype(jnp.float32) * dy)

    if product.trained is None:
        return (jax.grad(loss)(x, None),)
    return jax.grad(loss, (0, 1))(x, product.floats(weight))


@pytest.mark.parametrize("which", [0, 1])
@every_form
def test_is_the_product_with_the_dense_matrix(name, form, which):
    dtype = PRODUCTS[name].dtypes[which]
    product, x, weight, seen = made(name, dtype=dtype)
    y = product.run(x, weight, form)
    assert y.dtype == dtype
    assert_close(y, seen @ product.dense(weight), dtype)


@every_form
def test_gradients_are_those_of_the_dense_matrix(name, form):
    if not hasattr(mosaic_gpu, "InterpretGPUParams"):
        skip_interpreted(form, "has no transposed tiles before jax 0.12")
    product, x, weight, _ = made(name)
    matrix = product.dense(weight)
    dy = np.random.default_rng(1).normal(size=(*x.shape[:-1], matrix.shape[1])).astype(np.float32)
    found = gradients(product, x, weight, dy, form)
    assert_close(found[0], exact(dy) @ matrix.T, x.dtype)
    if len(found) > 1:
        by_rule = gradients(product, x, weight, dy, "xla")[1]
        jax.tree.map(lambda a, b: assert_close(a, exact(b), x.dtype), found[1], by_rule)


@pytest.mark.parametrize("rows", [(), (1,), (2, 3)])
@every_form
def test_any_rows(name, form, rows):
    product, x, weight, seen = made(name, rows=rows)
    y = product.run(x, weight, form)
    assert y.shape == (*rows, product.fits[1])
    assert_close(y, seen @ product.dense(weight), x.dtype)


@every_product
def test_the_best_on_a_cpu_is_what_xla_compiles(name):
    product, x, weight, _ = made(name)
    best, xla = (product.run(x, weight, form) for form in (None, "xla"))
    np.testing.assert_array_equal(best, xla)


@every_product
def test_any_sizes_fall_back(name):
    for sizes in PRODUCTS[name].odd:
        product, x, weight, seen = made(name, sizes, rows=(3,))
        assert_close(product.run(x, weight), seen @ product.dense(weight), x.dtype)


@every_product
def test_views_of_numpy_with_any_strides(name, unchecked):
    """Every second number of activations that are turned; weights column by column."""
    product, x, weight, _ = made(name)
    wide = np.zeros((2 * x.shape[1], x.shape[0]), x.dtype)
    wide[::2] = np.asarray(x).T
    view = wide[::2].T
    assert not view.flags.c_contiguous
    turned = jax.tree.map(np.asfortranarray, weight)
    np.testing.assert_array_equal(product.run(view, turned), product.run(x, weight))


@every_form
def test_no_rows(name, form):
    product, x, weight, _ = made(name, rows=(0,))
    assert product.run(x, weight, form).shape == (0, product.fits[1])


@every_form
def test_zeros_and_large_numbers(name, form):
    product, x, weight, _ = made(name)
    zeros = product.run(jnp.zeros_like(x), weight, form)
    np.testing.assert_array_equal(zeros, np.zeros(zeros.shape))
    broken = product.run(x.at[1, 3].set(jnp.nan), weight, form)
    assert np.isnan(np.asarray(broken[1])).any()
    np.testing.assert_array_equal(np.isnan(np.asarray(broken[0])), False)


@every_form
def test_vmap_over_rows_and_over_matrices(name, form):
    product, x, weight, seen = made(name, rows=(2, 4))
    run = lambda x, weight: product.run(x, weight, form)
    matrix = product.dense(weight)
    assert_close(jax.vmap(run, (0, None))(x, weight), seen @ matrix, x.dtype)
    other = product.make(np.random.default_rng(7), *product.fits, x.dtype)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), weight, other)
    expected = np.stack([seen[0] @ matrix, seen[1] @ product.dense(other)])
    assert_close(jax.vmap(run)(x, both), expected, x.dtype)


@every_form
def test_one_program_inside_scan(name, form):
    skip_interpreted(form, "has ordered effects, which no scan has")
    product, x, weight, seen = made(name, rows=(3, 4))
    count = 0

    def step(carry, x):
        nonlocal count
        count += 1
        return carry, product.run(x, weight, form)

    run = jax.jit(lambda x: jax.lax.scan(step, 0, x)[1])
    assert_close(run(x), seen @ product.dense(weight), x.dtype)
    run(x + 1)
    assert count == 1


@every_form
def test_a_gradient_is_differentiated_again(name, form):
    """As where its norm is a penalty; what is summed is smooth, and not large."""
    if not hasattr(mosaic_gpu, "InterpretGPUParams"):
        skip_interpreted(form, "has no transposed tiles before jax 0.12")
    product, x, weight, _ = made(name, rows=(4,))
    if product.rounded:
        pytest.skip("activations are rounded: the second derivative is that of no dense product")
    matrix = jnp.asarray(product.dense(weight), jnp.float32)

    def penalty(run):
        loss = lambda x: jnp.sin(run(x).astype(jnp.float32) / 64).sum()
        return lambda x: (jax.grad(loss)(x).astype(jnp.float32) ** 2).sum()

    found = jax.jit(jax.grad(penalty(lambda x: product.run(x, weight, form))))(x)
    expected = jax.grad(penalty(lambda x: x @ matrix))(x.astype(jnp.float32))
    error = np.abs(exact(found) - exact(expected)).max()
    assert error <= 20 * TOLERANCE[x.dtype.name] * np.abs(exact(expected)).max()


@every_form
def test_kernels_run_where_64_bits_are_allowed(name, form):
    if not hasattr(mosaic_gpu, "InterpretGPUParams"):
        skip_interpreted(form, "has no transposed tiles before jax 0.12")
    product, x, weight, seen = made(name)
    matrix = product.dense(weight)
    dy = np.ones((*x.shape[:-1], matrix.shape[1]), np.float32)
    with jax.enable_x64(True):
        y = product.run(x, weight, form)
        dx = gradients(product, x, weight, dy, form)[0]
    assert_close(y, seen @ matrix, x.dtype)
    assert_close(dx, exact(dy) @ matrix.T, x.dtype)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@every_form
def test_rows_on_many_devices_gather_nothing(name, form, kind):
    skip_interpreted(form, "has ordered effects: one device")
    product, x, weight, seen = made(name)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    rows, weight = put(x, "data"), jax.tree.map(put, weight)
    run = jax.jit(lambda x, weight: product.run(x, weight, form))
    y = run(rows, weight)
    assert y.sharding.spec[0] == "data"
    assert_close(y, seen @ product.dense(weight), x.dtype)
    assert "all-gather" not in str(run.lower(rows, weight).compile().as_text())


@every_product
def test_another_form_or_a_misfit_is_an_error(name):
    product, x, weight, _ = made(name)
    with pytest.raises(ValueError, match="has no form 'cuda'"):
        product.run(x, weight, "cuda")
    with pytest.raises(ValueError, match="inputs"):
        product.run(x[..., :-1], weight)
    _, x, weight, _ = made(name, (3, 5))
    for form in product.forms:
        with pytest.raises(ValueError, match=f"{form}: "):
            product.run(x, weight, form)


@pytest.mark.parametrize(
    ("product", "message"),
    [
        (lambda x, w: kernels.quantized_matmul(x, w), "QuantizedArray or a GridArray"),
        (lambda x, w: kernels.codebook_matmul(x, w), "must be a CodebookArray"),
        (lambda x, w: kernels.block_sparse_matmul(x, w), "must be a BlockSparseArray"),
        (lambda x, w: kernels.masked_matmul(x, w, w), "mask is float32: give booleans"),
        (lambda x, w: kernels.fake_quant_matmul(x, w, 4), "must be a Rounding"),
    ],
)
def test_another_leaf_is_an_error(product, message):
    with pytest.raises(TypeError, match=message):
        product(jnp.ones((2, 8)), jnp.ones((8, 4)))
