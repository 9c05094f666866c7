"""What is particular to N:M sparse leaves."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from leaf_samples import nm_parts, nm_sparse, reference, weights

from jaxcomp.arrays import NMSparseArray
from jaxcomp.arrays.patterns import count_patterns, rank_patterns, unrank_patterns

DTYPES = ["float16", "bfloat16", "float32"]
SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -2.5, 6e-8]
# Few layouts, many values: what compiles is the layout.
LAYOUTS = [
    ((8,), 2, 4, -1), ((4, 5), 2, 4, -2), ((3, 12), 1, 3, -1), ((2, 3, 8, 3), 3, 8, -2),
    ((16, 2), 5, 16, -2), ((6, 2, 3), 1, 2, -3), ((2, 10), 4, 5, -1), ((0, 4), 2, 4, -1),
]  # fmt: skip


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.tobytes() == b.tobytes()


def random_mask(rng, shape, n, m, axis):
    """Up to n of every m, group by group."""
    mask = np.zeros(shape, bool)
    rows = np.moveaxis(mask, axis, -1)
    for at in np.ndindex(*rows.shape[:-1]):
        for start in range(0, shape[axis], m):
            kept = rng.choice(m, rng.integers(0, n, endpoint=True), replace=False)
            rows[at][start + kept] = True
    return mask


@given(
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    with_mask=st.booleans(),
)
def test_round_trip_is_exact(layout, dtype, seed, with_mask):
    shape, n, m, axis = layout
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, shape, n, m, axis)
    x = np.where(mask, rng.choice(SPECIAL, shape), rng.choice([0.0, -0.0], shape))
    x = x.astype(jnp.dtype(dtype))
    leaf = NMSparseArray.encode(
        jnp.asarray(x), n, m, axis, jnp.asarray(mask) if with_mask else None
    )
    # Kept zeros keep their sign; a zero that is not kept comes back as +0.
    want = np.where(mask if with_mask else x != 0, x, np.zeros((), x.dtype))
    same_bits(leaf.decode(), want)
    same_bits(leaf.decode(), reference(leaf))
    assert leaf.shape == shape
    keep = np.asarray(leaf.keep())
    assert not np.any((mask & (x != 0)) & ~keep)
    again = NMSparseArray.from_parts(leaf.to_parts())
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(leaf), strict=True):
        same_bits(one, two)


@pytest.mark.parametrize(("n", "m"), [(16, 32), (1, 256), (100, 256), (2, 256), (255, 256)])
def test_wide_groups(n, m):
    leaf = nm_sparse(weights((2, m, 3)), n, m)
    same_bits(leaf.decode(), reference(leaf))
    assert leaf.positions.shape == (2, n, math.ceil(3 * math.ceil(math.log2(m)) / 8))
    ((_, alphabet),) = leaf.to_parts().symbols.values()
    assert alphabet == (math.comb(m, n) if math.comb(m, n) <= 65536 else 2)
    again = NMSparseArray.from_parts(leaf.to_parts())
    same_bits(again.positions, leaf.positions)


@pytest.mark.parametrize("m", range(2, 8))
def test_patterns_are_numbered_without_gaps(m):
    for n in range(1, m):
        patterns = np.array(list(itertools.combinations(range(m), n)))
        assert count_patterns(n, m) == len(patterns)
        ranks = rank_patterns(patterns, m, 1)
        assert sorted(ranks.tolist()) == list(range(len(patterns)))
        np.testing.assert_array_equal(unrank_patterns(ranks, n, m, 1), patterns)
        np.testing.assert_array_equal(unrank_patterns(ranks, n, m, 0), patterns.T)


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 4, -2), (2, 4, -1), (1, 16, -2), (4, 9, -1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nbytes_is_exact(n, m, axis, dtype):
    leaf = nm_sparse(weights((144, 144), dtype), n, m, axis)
    rows, columns = (144 * n // m, 144) if axis == -2 else (144, 144 * n // m)
    bits = {4: 2, 9: 4, 16: 4}[m]
    assert leaf.values.shape == (rows, columns)
    assert leaf.nbytes == rows * columns * jnp.dtype(dtype).itemsize + rows * -(
        -columns * bits // 8
    )


def test_an_empty_group_and_a_short_one():
    x = np.zeros((8, 2), np.float32)
    x[6, 0] = 3
    leaf = NMSparseArray.encode(jnp.asarray(x), 2, 4)
    same_bits(leaf.decode(), x)
    assert np.asarray(leaf.values).tolist() == [[0, 0], [0, 0], [0, 0], [3, 0]]
    assert np.asarray(leaf.keep()).sum(axis=0).tolist() == [4, 4]


def test_a_kernel_of_a_convolution_is_grouped_along_its_input():
    x = np.zeros((3, 3, 4, 2), np.float32)
    x[:, :, 1:3] = weights((3, 3, 2, 2))
    leaf = NMSparseArray.encode(jnp.asarray(x), 2, 4)
    same_bits(leaf.values, x[:, :, 1:3])
    same_bits(leaf.decode(), x)


def test_what_is_refused_and_where():
    x = np.zeros((2, 8, 3), np.float32)
    x[1, 4:7, 2] = 1
    with pytest.raises(ValueError, match=r"3 of the 4 neighbours at \[1, 4:8, 2\] are kept.*prune"):
        NMSparseArray.encode(jnp.asarray(x), 2, 4)
    mask = np.zeros(x.shape, bool)
    mask[0, :3, 1] = True
    with pytest.raises(ValueError, match=r"3 of the 4 neighbours at \[0, 0:4, 1\]"):
        NMSparseArray.encode(jnp.zeros(x.shape), 2, 4, mask=jnp.asarray(mask))
    with pytest.raises(ValueError, match=r"weight at \[1, 4, 2\] is outside.*multiply by the mask"):
        NMSparseArray.encode(jnp.asarray(x), 2, 4, mask=jnp.zeros(x.shape, bool))
    nan = jnp.zeros((4, 1)).at[3].set(jnp.nan)
    with pytest.raises(ValueError, match=r"weight at \[3, 0\]"):
        NMSparseArray.encode(nan, 2, 4, mask=jnp.zeros((4, 1), bool))
    for axis in (0, 1, 2, -4):
        with pytest.raises(ValueError, match="counted from the end: pass one from -3 to -1"):
            NMSparseArray.encode(jnp.asarray(x), 2, 4, axis)
    for n, m in [(0, 4), (4, 4), (5, 4), (1, 257), (-1, 2)]:
        with pytest.raises(ValueError, match=f"not {n}:{m}"):
            NMSparseArray.encode(jnp.asarray(x), n, m)
    with pytest.raises(ValueError, match=r"axis -1 .* has 3 entries, no multiple of m = 4: choose"):
        NMSparseArray.encode(jnp.asarray(x), 2, 4, -1)
    with pytest.raises(ValueError, match="no axis of shape"):
        NMSparseArray.encode(jnp.float32(1), 2, 4, -1)
    # With the run-time type checks installed, the signature speaks first.
    with pytest.raises((ValueError, TypeError), match="mask"):
        NMSparseArray.encode(jnp.asarray(x), 2, 4, mask=jnp.ones((8, 3), bool))
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(lambda x: NMSparseArray.encode(x, 2, 4))(x)


@pytest.mark.parametrize("positions", [[0b0000], [0b0001]])  # the same twice, descending
def test_positions_that_are_no_pattern_are_not_taken_apart(positions):
    leaf = NMSparseArray(jnp.ones(2), jnp.array(positions, jnp.uint8), 2, 4, -1)
    with pytest.raises(ValueError, match="distinct, ascending and below 4"):
        leaf.to_parts()
    beyond = NMSparseArray(jnp.ones(1), jnp.array([3], jnp.uint8), 1, 3, -1)
    with pytest.raises(ValueError, match="below 3"):
        beyond.to_parts()


def test_gradient_of_values_is_the_kept_gradient():
    leaf = nm_sparse(weights((8, 6)), 2, 4)
    target = jnp.asarray(weights((8, 6), seed=1))
    loss = lambda values: (dataclasses.replace(leaf, values=values).decode() * target).sum()
    grad = jax.jit(jax.grad(loss))(leaf.values)
    kept = np.asarray(target).T[np.asarray(leaf.keep()).T].reshape(6, 4).T
    same_bits(grad, kept)


@functools.cache
def mesh_of(kind):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axis", [-1, -2])
def test_a_sharded_leaf_decodes_where_it_lies(axis, kind):
    leaf = nm_sparse(weights((16, 64)), 2, 4, axis)
    there = jax.device_put(leaf, NamedSharding(mesh_of(kind), P("a", "b")))
    compiled = jax.jit(lambda leaf: leaf.decode()).lower(there).compile()
    text = compiled.as_text()
    assert text
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text
    dense = compiled(there)
    same_bits(dense, reference(leaf))
    assert dense.sharding.is_equivalent_to(there.values.sharding, 2)


def test_nm_parts_that_do_not_fit():
    for values in [(5, 6), (3, 6), (4, 5), (4, 6, 1), (2, 4, 6), (0, 6)]:
        with pytest.raises(ValueError, match=r"do not fit 2:4 patterns"):
            NMSparseArray.from_parts(nm_parts(values=values))
    for values in [(), (6,)]:
        with pytest.raises(ValueError, match="axis must be an int"):
            NMSparseArray.from_parts(nm_parts(values=values))
    for axis in (-1, -3, 0, 1, None, "-2", -2.0, True, 1 << 70, [-2]):
        with pytest.raises(ValueError, match=r"axis must be an int|do not fit"):
            NMSparseArray.from_parts(nm_parts(axis=axis))
    for lie in (0, -1, 256, 257, 1 << 70, 2.0, "2", None, True, [2]):
        with pytest.raises(ValueError, match="n must be an int from 1 to 255"):
            NMSparseArray.from_parts(nm_parts(n=lie))
    for lie in (2, 1, 0, 257, 4.0, "4", None, True):
        with pytest.raises(ValueError, match="m must be an int from 3 to 256"):
            NMSparseArray.from_parts(nm_parts(m=lie))
    with pytest.raises(ValueError, match="alphabet of patterns must be an int from 10 to 10"):
        NMSparseArray.from_parts(nm_parts(m=5))


def test_nm_masks_that_keep_other_than_n():
    # 16:32 has too many patterns to number: the mask itself is in the file.
    mask = np.tile([1, 0], 32)
    good = nm_parts(mask, (64,), 2, (32,), n=16, m=32, axis=-1)
    leaf = NMSparseArray.from_parts(good)
    np.testing.assert_array_equal(leaf.keep(), mask)
    for wrong in (np.ones(64, int), np.zeros(64, int), mask * (np.arange(64) != 0)):
        lie = nm_parts(wrong, (64,), 2, (32,), n=16, m=32, axis=-1)
        with pytest.raises(ValueError, match="keep other than 16 of 32"):
            NMSparseArray.from_parts(lie)
    with pytest.raises(ValueError, match="do not fit"):
        NMSparseArray.from_parts(nm_parts(mask, (32,), 2, (32,), n=16, m=32, axis=-1))
