"""What is particular to block-sparse leaves."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from leaf_samples import block_parts, block_sparse, reference, weights

from jaxcomp.arrays import BlockSparseArray

DTYPES = ["float16", "bfloat16", "float32"]
SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -2.5, 6e-8]
# Few layouts, many values: what compiles is the layout (and the number of blocks).
LAYOUTS = [
    ((8,), (2,), 0), ((4, 6), (2, 3), 0), ((3, 4, 6), (2, 2), 1), ((2, 2, 2, 4), (1, 4), 2),
    ((2, 3, 4), (1, 3, 2), 0), ((3, 3, 4), (4,), 0), ((2, 4, 4), (2, 4), 0), ((0, 4), (2, 2), 0),
]  # fmt: skip


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.tobytes() == b.tobytes()


def widen(grid, block):
    """The mask of weights that a mask of blocks stands for."""
    for axis, size in enumerate(block, -len(block)):
        grid = grid.repeat(size, axis)
    return grid


@given(
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    density=st.sampled_from([0, 0.5, 1]),
)
def test_round_trip_is_exact(layout, dtype, seed, density):
    shape, block, batch_axes = layout
    rng = np.random.default_rng(seed)
    lead = shape[: len(shape) - len(block)]
    counts = [size // part for size, part in zip(shape[len(lead) :], block, strict=True)]
    grid = rng.random((*lead, *counts)) < density
    mask = widen(grid, block)
    x = np.where(mask, rng.choice(SPECIAL, shape), rng.choice([0.0, -0.0], shape))
    x = x.astype(jnp.dtype(dtype))
    leaf = BlockSparseArray.encode(jnp.asarray(x), block, jnp.asarray(mask), batch_axes)
    np.testing.assert_array_equal(leaf.keep(), grid)
    # A kept block is stored whole, zeros with their signs; what is not kept comes back as +0.
    same_bits(leaf.decode(), np.where(mask, x, np.zeros((), x.dtype)))
    same_bits(leaf.decode(), reference(leaf))
    assert (leaf.shape, leaf.grid) == (shape, grid.shape)
    longest = grid.sum(axis=tuple(range(batch_axes, grid.ndim))).max(initial=0)
    assert leaf.values.shape == (*shape[:batch_axes], longest, *block)
    again = BlockSparseArray.from_parts(leaf.to_parts())
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(leaf), strict=True):
        same_bits(one, two)


@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 2), (12, 18)])
def test_blocks_are_those_of_scipy(block):
    x = np.where(np.random.default_rng(0).random((12, 18)) < 0.1, weights((12, 18)), 0)
    leaf = BlockSparseArray.encode(jnp.asarray(x), block)
    # A BSR matrix keeps all blocks with a non-zero in them, row by row of blocks.
    bsr = scipy.sparse.bsr_matrix(x, blocksize=block)
    bsr.sort_indices()
    same_bits(leaf.values, bsr.data)
    assert np.flatnonzero(np.asarray(leaf.keep())).size == bsr.data.shape[0]
    same_bits(leaf.decode(), bsr.toarray())


def test_without_a_mask_blocks_of_zeros_go():
    x = np.zeros((4, 4), np.float32)
    x[0, 0], x[2, 2], x[2, 3] = -0.0, 5, -0.0
    leaf = BlockSparseArray.encode(jnp.asarray(x), (2, 2))
    assert np.asarray(leaf.keep()).tolist() == [[False, False], [False, True]]
    want = x.copy()
    want[0, 0] = 0
    same_bits(leaf.decode(), want)


def test_a_mask_that_keeps_some_of_a_block_keeps_it_whole():
    mask = np.zeros((4, 4), bool)
    mask[1, 3] = True
    x = np.zeros((4, 4), np.float32)
    x[0, 2] = -0.0
    leaf = BlockSparseArray.encode(jnp.asarray(x), (2, 2), jnp.asarray(mask))
    assert leaf.values.shape == (1, 2, 2)
    same_bits(leaf.decode(), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nbytes_is_exact(dtype):
    leaf = block_sparse(weights((3, 12, 36), dtype), (4, 2), batch_axes=1)
    kept = np.asarray(leaf.keep()).sum(axis=(1, 2))
    assert len(set(kept.tolist())) > 1
    assert leaf.nbytes == 3 * 3 * 3 + 3 * kept.max() * 8 * jnp.dtype(dtype).itemsize


def test_what_is_refused_and_where():
    x = jnp.zeros((2, 6, 8)).at[1, 2, 3].set(1)
    with pytest.raises(ValueError, match=r"weight at \[1, 2, 3\] is outside.*multiply by the mask"):
        BlockSparseArray.encode(x, (2, 2), jnp.zeros(x.shape, bool))
    partly = jnp.zeros(x.shape, bool).at[1, 2, 2].set(True)
    with pytest.raises(ValueError, match="multiply by the mask first"):
        BlockSparseArray.encode(x, (2, 2), partly)
    with pytest.raises(
        ValueError, match=r"do not tile .*: axis -2 has 6 entries, no multiple of 4"
    ):
        BlockSparseArray.encode(x, (4, 4))
    for size in (0, -2):
        with pytest.raises(ValueError, match="do not tile"):
            BlockSparseArray.encode(x, (2, size))
    for block, batch_axes in [((), 0), ((1, 1, 1, 1), 0), ((2, 2), 2), ((2,), 3), ((2,), -1)]:
        with pytest.raises(ValueError, match="need as many axes beside"):
            BlockSparseArray.encode(x, block, batch_axes=batch_axes)
    # With the run-time type checks installed, the signature speaks first.
    with pytest.raises((ValueError, TypeError), match="mask"):
        BlockSparseArray.encode(x, (2, 2), jnp.ones((6, 8), bool))
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(lambda x: BlockSparseArray.encode(x, (2, 2)))(x)


def test_gradient_of_values_is_the_kept_gradient():
    leaf = block_sparse(weights((4, 6)))
    target = weights((4, 6), seed=1)
    loss = lambda values: (dataclasses.replace(leaf, values=values).decode() * target).sum()
    grad = jax.jit(jax.grad(loss))(leaf.values)
    wanted = BlockSparseArray.encode(
        jnp.asarray(np.where(widen(np.asarray(leaf.keep()), (2, 2)), target, 0)), (2, 2)
    )
    same_bits(grad, wanted.values)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_no_weights_travel_where_the_mask_is_sharded(kind):
    leaf = block_sparse(weights((16, 64)), (2, 4))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
    there = dataclasses.replace(
        leaf,
        mask=jax.device_put(leaf.mask, NamedSharding(mesh, P("b", None))),
        values=jax.device_put(leaf.values, NamedSharding(mesh, P())),
    )
    compiled = jax.jit(lambda leaf: leaf.decode()).lower(there).compile()
    text = compiled.as_text()
    assert text
    moved = re.findall(r"= (\w+)\[.*\]\S* (?:all-|collective-|reduce-scatter)", text)
    assert set(moved) <= {"s32", "pred"}
    dense = compiled(there)
    same_bits(dense, reference(leaf))
    assert dense.sharding.is_equivalent_to(there.mask.sharding, 2)
    stack = block_sparse(weights((4, 8, 16)), batch_axes=1)
    there = jax.device_put(stack, NamedSharding(mesh, P("b")))
    compiled = jax.jit(lambda leaf: leaf.decode()).lower(there).compile()
    text = compiled.as_text()
    assert text
    assert "all-gather" not in text
    same_bits(compiled(there), reference(stack))


BLOCK_LIES = [None, 2, "22", [], {}, [2, 2, 2], [0, 2], [-2, -2], [2.0, 2], [True, 2]]
BLOCK_LIES += [[2, None], [[2], 2], [1 << 70, 2], [4, 1], [2, 1], "block", {"0": 2}]


@pytest.mark.parametrize("block", BLOCK_LIES, ids=repr)
def test_blocks_that_lie(block):
    with pytest.raises(ValueError, match=r"block|do not fit"):
        BlockSparseArray.from_parts(block_parts(np.eye(2, 3, dtype=int), (2, 2, 2), block))


def test_block_values_that_do_not_fit():
    eye = np.eye(4, 6, dtype=int)
    for values in [(), (2,), (2, 2), (4, 2, 3), (4, 4, 2, 2, 2), (1, 4, 2, 2), (4, 6, 1, 2, 2)]:
        with pytest.raises(ValueError, match="do not fit blocks"):
            BlockSparseArray.from_parts(block_parts(eye, values))
    for values in [(3, 2, 2), (0, 2, 2)]:
        with pytest.raises(ValueError, match=r"keeps 4 blocks, \d are there"):
            BlockSparseArray.from_parts(block_parts(eye, values))
    # A stacked axis may not also be one that blocks tile.
    with pytest.raises(ValueError, match="do not fit blocks"):
        BlockSparseArray.from_parts(block_parts(eye, (4, 1, 2, 2)))
    assert BlockSparseArray.from_parts(block_parts(eye, (4, 1, 2), (2,))).shape == (4, 12)


def test_removed_blocks_of_impossible_size():
    none = np.zeros((2, 2), int)
    assert BlockSparseArray.from_parts(
        block_parts(none, (0, 1 << 14, 1 << 14), (1 << 14, 1 << 14))
    ).shape == (1 << 15, 1 << 15)
    with pytest.raises(ValueError, match="too many"):
        BlockSparseArray.from_parts(block_parts(none, (0, 1 << 15, 1 << 15), (1 << 15, 1 << 15)))
    with pytest.raises(ValueError, match="impossible shape"):
        BlockSparseArray.from_parts(block_parts(none, (0, 1 << 20, 1 << 20), (1 << 20, 1 << 20)))
