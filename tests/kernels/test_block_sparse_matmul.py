"""What the product with a block-sparse matrix owes beyond the table of products."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from jaxcomp.arrays.block_sparse import BlockSparseArray
from jaxcomp.kernels.block_sparse import xla
from jaxcomp.kernels.block_sparse.matmul import block_sparse_matmul

KEEP = np.array([[0, 1, 0], [0, 0, 0], [0, 1, 1]], bool)
FORMS = (
    ("xla", jnp.float32), ("triton", jnp.float32), ("mosaic_tpu", jnp.float32),
    ("mosaic_gpu", jnp.bfloat16),
)  # fmt: skip
NEAR = {jnp.float32: 1e-3, jnp.bfloat16: 0.25}
every_form = pytest.mark.parametrize(
    ("form", "dtype"), FORMS, ids=lambda value: value if isinstance(value, str) else ""
)


def leaf(keep=KEEP, block=(128, 128), seed=0, dtype=jnp.float32):
    mask = np.kron(keep, np.ones(block, bool))
    dense = np.where(mask, np.random.default_rng(seed).normal(size=mask.shape), 0)
    return BlockSparseArray.encode(jnp.asarray(dense, dtype), block, jnp.asarray(mask))


def normal(*shape, seed=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def skip_if_not_interpreted(form):
    if form == "mosaic_gpu" and not hasattr(mosaic_gpu, "InterpretGPUParams"):
        pytest.skip("Pallas interprets transposed tiles of Mosaic GPU from jax 0.12 on")


@pytest.mark.parametrize("rows", [8, 256])
def test_forms_for_a_cpu_compute_the_same(rows):
    """Written for a pattern, in a loop and decoded; with a block more than are kept."""
    weight, x, dy = leaf(), normal(rows, 384), normal(rows, 384, seed=2)
    values = jnp.pad(weight.values, ((0, 1), (0, 0), (0, 0)), constant_values=3)
    dense, keep = np.asarray(weight.decode()), jnp.asarray(KEEP)
    of_blocks = lambda a: a.reshape(3, 128, 3, 128).transpose(0, 2, 1, 3)[KEEP]
    expected = (
        np.asarray(x) @ dense,
        np.asarray(dy) @ dense.T,
        of_blocks(np.asarray(x).T @ np.asarray(dy)),
    )
    kinds: Any = [(xla._FORWARD, (x,)), (xla._TO_INPUT, (dy,)), (xla._TO_VALUES, (x, dy))]
    for which, (forms, arrays) in enumerate(kinds):
        for form in (partial(forms[0], KEEP), *forms[1:]):
            found = np.asarray(form(*arrays, values, keep))
            found = found[:3] if which == 2 else found.reshape(rows, -1)
            np.testing.assert_allclose(found, expected[which], atol=1e-3)


def test_a_known_pattern_is_written_out_where_there_is_much_to_compute():
    weight = leaf()
    known = jax.jit(
        lambda x, values: block_sparse_matmul(x, dataclasses.replace(weight, values=values))
    )
    for rows, loops in ((256, False), (8, True)):
        text = str(known.lower(normal(rows, 384), weight.values).compile().as_text())
        assert (" while(" in text) == loops
    found = known(normal(256, 384), weight.values)
    traced = jax.jit(block_sparse_matmul)(normal(256, 384), weight)
    np.testing.assert_allclose(found, traced, atol=1e-4)


@every_form
def test_what_is_not_kept_does_not_count(form, dtype):
    """The second row of blocks is empty, and so is the first column; infinities go nowhere."""
    skip_if_not_interpreted(form)
    weight, x = leaf(dtype=dtype), normal(16, 384, dtype=dtype).at[0, 130].set(jnp.inf)
    y, back = jax.vjp(lambda x, w: block_sparse_matmul(x, w, implementation=form), x, weight)
    dx, gradient = back(jnp.ones_like(y))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[:, :128], 0)
    np.testing.assert_array_equal(dx[:, 128:256], 0)
    assert np.isfinite(gradient.values).all()


@every_form
def test_layers_of_a_stack_may_keep_different_numbers_of_blocks(form, dtype):
    """Rows of a stack are padded: what fills them up is neither read nor trained."""
    skip_if_not_interpreted(form)
    few = np.zeros((3, 3), bool)
    few[2, 2] = True
    layers = [leaf(dtype=dtype), leaf(few, seed=3, dtype=dtype)]
    pad = lambda w: jnp.pad(w.values, ((0, 3 - len(w.values)), (0, 0), (0, 0)))
    stacked = dataclasses.replace(
        layers[0],
        mask=jnp.stack([w.mask for w in layers]),
        values=jnp.stack([pad(w) for w in layers]),
    )
    x = normal(8, 384, dtype=dtype).at[0, 0].set(jnp.inf)
    run = jax.vmap(partial(block_sparse_matmul, implementation=form), (None, 0))
    y, back = jax.vjp(
        lambda values: run(x, dataclasses.replace(stacked, values=values)), stacked.values
    )
    for each, layer in zip(y, layers, strict=True):
        expected = np.asarray(x)[1:].astype(float) @ np.asarray(layer.decode()).astype(float)
        np.testing.assert_allclose(np.asarray(each)[1:].astype(float), expected, atol=NEAR[dtype])
    assert np.isfinite(y[1]).all()
    (gradient,) = back(jnp.ones_like(y))
    np.testing.assert_array_equal(gradient[1, 1:], 0)
    assert np.isfinite(gradient[1, 0]).all()


def test_a_matrix_without_blocks_is_zero():
    weight = leaf(np.zeros((2, 2), bool))
    y, back = jax.vjp(lambda x: block_sparse_matmul(x, weight), normal(4, 256))
    np.testing.assert_array_equal(y, np.zeros((4, 256)))
    np.testing.assert_array_equal(back(y)[0], np.zeros((4, 256)))


def test_blocks_of_a_row_and_a_stack():
    dense = jnp.asarray([[0.0, 0, 1, 2], [3, 4, 0, 0]])
    weight = BlockSparseArray.encode(dense, (2,))
    np.testing.assert_array_equal(block_sparse_matmul(jnp.eye(2), weight), dense)
    stack = BlockSparseArray.encode(dense.reshape(2, 2, 2), (1, 2), batch_axes=1)
    with pytest.raises(ValueError, match="take one layer"):
        block_sparse_matmul(jnp.ones((1, 2)), stack)


@pytest.mark.parametrize(("form", "dtype"), FORMS[1:])
def test_kernels_run_where_64_bits_are_allowed(form, dtype):
    weight, x = leaf(dtype=dtype), normal(4, 384, dtype=dtype)
    with jax.enable_x64(True):
        y = block_sparse_matmul(x, weight, implementation=form)
    np.testing.assert_allclose(
        y.astype(jnp.float32), (x @ weight.decode()).astype(jnp.float32), atol=NEAR[dtype]
    )
