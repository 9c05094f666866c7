"""What leaves say of themselves, and what they decode to, against NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from leaf_samples import (
    FORMS,
    block_sparse,
    grid,
    nm_sparse,
    quantized,
    reference,
    shared,
    sparse,
    weights,
)

from jaxcomp.arrays import (
    BlockSparseArray,
    CodebookArray,
    CompressedArray,
    QuantizedArray,
    SparseArray,
    decode,
    is_compressed,
    nbytes,
)
from jaxcomp.arrays.codebook import index_bits

DTYPES = ["float16", "bfloat16", "float32"]


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_decode_is_the_reference(form, dtype):
    for shape, batch_axes in [((6, 10), 0), ((3, 4, 6), 1)]:
        leaf = FORMS[form](weights(shape, dtype), batch_axes=batch_axes)
        assert leaf.shape == shape
        assert leaf.ndim == len(shape)
        assert leaf.size == math.prod(shape)
        assert leaf.dtype == jnp.dtype(dtype)
        assert isinstance(leaf.dtype, np.dtype)
        same_bits(leaf.decode(), reference(leaf))
        for field in jax.tree.leaves(leaf):
            assert field.shape[:batch_axes] == shape[:batch_axes]


@given(
    bits=st.integers(1, 8),
    affine=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(
        [
            ((7,), ()),
            ((8,), ((4, -1),)),
            ((3, 5), ()),
            ((4, 6), ((3, -1),)),
            ((4, 6), ((2, -2), (3, -1))),
        ]
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_quantized_decode_is_exact(bits, affine, dtype, scale_dtype, layout, seed):
    shape, blocks = layout
    leaf = quantized(weights(shape, dtype, seed), bits, blocks, affine, scale_dtype=scale_dtype)
    same_bits(leaf.decode(), reference(leaf))


@given(
    clusters=st.sampled_from([1, 2, 3, 16, 17, 256, 257, 65536]),
    dtype=st.sampled_from(DTYPES),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15)
def test_codebook_decode_is_exact(clusters, dtype, batch, seed):
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, clusters, (*batch, 2, 5))
    indices = indices.astype(np.uint8 if clusters <= 256 else np.uint16)
    book = rng.normal(size=(*batch, clusters)).astype(np.float32)
    book.flat[0] = [np.nan, np.inf, -0.0, 1e-45][seed % 4]
    leaf = CodebookArray.from_indices(jnp.asarray(indices), jnp.asarray(book), dtype)
    assert leaf.clusters == clusters
    same_bits(leaf.decode(), reference(leaf))


@st.composite
def sparse_weights(draw):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9))
    dtype = np.dtype(draw(st.sampled_from(["float16", "float32"])))
    special = st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -2.5, 6e-8])
    x = draw(hnp.arrays(dtype, shape, elements=special, fill=st.just(0.0)))
    return x, draw(st.integers(0, len(shape) - 1))


@given(sparse_weights())
@settings(max_examples=25)
def test_sparse_round_trip_is_exact(case):
    x, batch_axes = case
    leaf = SparseArray.encode(jnp.asarray(x), batch_axes=batch_axes)
    # A zero that is not kept comes back as +0.
    same_bits(leaf.decode(), np.where(x == 0, x.dtype.type(0), x))
    same_bits(leaf.decode(), reference(leaf))
    np.testing.assert_array_equal(leaf.keep(), x != 0)
    batch = x.shape[:batch_axes]
    longest = (x != 0).sum(axis=tuple(range(batch_axes, x.ndim))).max(initial=0)
    assert leaf.values.shape == (*batch, longest)
    assert leaf.mask.nbytes == math.prod(x.shape[:-1]) * -(-x.shape[-1] // 8)


def test_sparse_mask_keeps_zeros_with_their_sign():
    x = jnp.array([[-0.0, 0.0, 5.0], [-0.0, 0.0, 0.0]])
    mask = jnp.array([[True, True, True], [False, False, True]])
    leaf = SparseArray.encode(x, mask)
    assert leaf.values.shape == (4,)
    same_bits(leaf.decode(), np.array([[-0.0, 0, 5], [0, 0, 0]], np.float32))
    np.testing.assert_array_equal(leaf.keep(), mask)


def test_sparse_with_rows_all_empty_or_all_full():
    x = np.zeros((5, 13), np.float32)
    x[1], x[3, 7] = np.arange(1, 14), -1
    for batch_axes in (0, 1):
        same_bits(SparseArray.encode(jnp.asarray(x), batch_axes=batch_axes).decode(), x)
    for full in (np.zeros_like(x), x + 1):
        same_bits(SparseArray.encode(jnp.asarray(full)).decode(), full)


def test_sparse_refuses_what_it_would_lose():
    x = jnp.array([[0.0, 1.0], [jnp.nan, 2.0]])
    for mask in ([[True, False], [True, True]], [[True, True], [False, True]]):
        with pytest.raises(ValueError, match="multiply by the mask first"):
            SparseArray.encode(x, jnp.array(mask))
    for batch_axes in (-1, 2, 3):
        with pytest.raises(ValueError, match="no axis left"):
            SparseArray.encode(x, batch_axes=batch_axes)
    with pytest.raises(ValueError, match="no axis left"):
        SparseArray.encode(jnp.float32(1))
    # With the run-time type checks installed, the signature speaks first.
    with pytest.raises((ValueError, TypeError), match="mask"):
        SparseArray.encode(x, jnp.ones((2, 3), bool))


def test_sparse_encode_under_jit_says_why_not():
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(SparseArray.encode)(jnp.ones((2, 3)))


def test_codebook_refuses_what_does_not_fit():
    indices, book = jnp.zeros((2, 4), jnp.uint8), jnp.zeros(3)
    bad = [
        (jnp.zeros((), jnp.uint8), book),
        (indices, jnp.zeros(())),
        (indices, jnp.zeros((2, 0))),
        (indices, jnp.zeros((3, 3))),
        (indices, jnp.zeros((2, 4, 3))),
        (indices, jnp.zeros(65537)),
    ]
    for case in bad:
        with pytest.raises((ValueError, TypeError), match="codebook"):
            CodebookArray.from_indices(*case, jnp.float32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("length", [1, 7, 8, 33])
def test_nbytes_of_quantized_leaves(bits, length):
    leaf = quantized(weights((5, length)), bits)
    assert leaf.codes.nbytes == 5 * -(-bits * length // 8)
    assert leaf.nbytes == leaf.codes.nbytes + 4 * length
    affine = quantized(weights((5, length)), bits, affine=True)
    assert affine.nbytes == leaf.nbytes + length


@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 5, 16, 17, 256, 257, 4096, 65536])
def test_nbytes_of_codebook_leaves(clusters):
    bits = max(1, math.ceil(math.log2(clusters)))
    assert index_bits(clusters) == bits
    leaf = CodebookArray.from_indices(
        jnp.zeros((3, 11), jnp.uint16), jnp.zeros(clusters), "float32"
    )
    assert leaf.nbytes == 3 * -(-bits * 11 // 8) + 4 * clusters


def test_nbytes_of_a_tree_is_exact():
    tree = {
        "q": quantized(weights((4, 9)), 3),  # 4 * ceil(27 / 8) + 9 * 4
        "s": SparseArray.encode(jnp.array([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]])),  # 2 + 3 * 4
        "half": jnp.zeros((3, 5), jnp.bfloat16),
        "list": [np.zeros(7, np.uint16), jnp.zeros(()), None],
        "empty": jnp.zeros((0, 9)),
    }
    assert nbytes(tree) == (16 + 36) + (2 + 12) + 30 + 14 + 4
    assert nbytes(jax.eval_shape(lambda: tree)) == nbytes(tree)
    assert nbytes({}) == 0
    # More elements than 32 bits can count.
    assert nbytes(jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)) == 1 << 42
    assert (
        nbytes(tree["q"]) == tree["q"].nbytes == sum(x.nbytes for x in jax.tree.leaves(tree["q"]))
    )


@pytest.mark.parametrize("form", FORMS)
def test_arrays_may_be_mixed_with_leaves(form):
    leaf = FORMS[form](weights((4, 6)))
    dense = reference(leaf)
    x = weights((3, 4), seed=1)
    np.testing.assert_allclose(x @ jnp.asarray(leaf), x @ dense, rtol=1e-6)
    np.testing.assert_allclose(jnp.dot(jnp.asarray(x), leaf), x @ dense, rtol=1e-5)
    np.testing.assert_allclose(jnp.asarray(x) @ leaf, x @ dense, rtol=1e-5)
    same_bits(np.asarray(leaf), dense)
    same_bits(np.asarray(leaf, np.float64), dense.astype(np.float64))
    same_bits(np.array(leaf, copy=True), dense)
    with pytest.raises(ValueError, match="copy"):
        np.array(leaf, copy=False)
    same_bits(leaf[1:, 2], dense[1:, 2])
    same_bits(leaf[...], dense)
    same_bits(leaf.astype(jnp.float16), dense.astype(np.float16))


def test_decode_of_a_tree_touches_nothing_else():
    bias = jnp.ones(3)
    tree = {"a": [quantized(weights((2, 4))), bias], "b": None, "c": "text", "d": 5}
    dense = decode(tree)
    assert dense["a"][1] is bias
    assert {**dense, "a": 0} == {"a": 0, "b": None, "c": "text", "d": 5}
    same_bits(dense["a"][0], reference(tree["a"][0]))
    assert is_compressed(tree["a"][0])
    assert not is_compressed(dense["a"][0])
    same_bits(decode(tree["a"][0]), reference(tree["a"][0]))
    assert decode({}) == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_product_is_rounded_once_wherever_it_is_fused(dtype):
    # XLA keeps products of half precision in float32 where it can: 3 * scale must not depend on it.
    leaf = quantized(weights((64, 64), dtype), scale_dtype=dtype)
    x = weights((8, 64), seed=1)
    run = jax.jit(lambda x, w: x @ jnp.asarray(w).astype(jnp.float32))
    same_bits(run(x, leaf), run(x, leaf.decode()))
    wide = dataclasses.replace(leaf, dense_dtype=jnp.float32)
    same_bits(wide.decode(), reference(wide))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (2, 0, 4)])
def test_leaves_without_elements(shape):
    x = weights(shape)
    leaves = [quantized(x), quantized(x, 3, affine=True), shared(x, 3), sparse(x)]
    leaves += [nm_sparse(x, 2, 4, -1), block_sparse(x, (2,))]
    if len(shape) > 1:
        leaves += [quantized(x, 4, blocks=((2, -2),)), sparse(x, batch_axes=1)]
        leaves += [nm_sparse(x, 1, 2), block_sparse(x, (2,), batch_axes=1), block_sparse(x)]
    for leaf in leaves:
        assert leaf.shape == shape
        assert leaf.size == 0
        same_bits(leaf.decode(), x)
        assert repr(leaf).startswith(f"{type(leaf).__name__}(shape={shape}, dtype=float32, ")
        again = type(leaf).from_parts(leaf.to_parts())
        assert again.shape == shape


def test_host_copies_decode_too():
    for form in FORMS.values():
        leaf = jax.device_get(form(weights((4, 6))))
        assert all(isinstance(field, np.ndarray) for field in jax.tree.leaves(leaf))
        same_bits(leaf.decode(), reference(leaf))


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        (
            lambda: quantized(weights((4, 6)), 4),
            "QuantizedArray(shape=(4, 6), dtype=float32, int4 symmetric, 6 scales, 36 bytes)",
        ),
        (
            lambda: quantized(weights((8, 6), "bfloat16"), 3, ((4, -2),), affine=True),
            "QuantizedArray(shape=(8, 6), dtype=bfloat16, int3 affine, groups of 4, 84 bytes)",
        ),
        (
            lambda: quantized(weights((4, 6)), 1, ((2, -2), (3, -1)), zero=False),
            "QuantizedArray(shape=(4, 6), dtype=float32, int1 without zero, blocks of 2x3, "
            "20 bytes)",
        ),
        (
            lambda: grid(weights((4, 6)), "nf4"),
            "GridArray(shape=(4, 6), dtype=float32, nf4, 6 scales, 36 bytes)",
        ),
        (
            lambda: grid(weights((4, 6)), "float4_e2m1fn", ((2, -2),), "float8_e8m0fnu"),
            "GridArray(shape=(4, 6), dtype=float32, float4_e2m1fn, groups of 2 in float8_e8m0fnu, "
            "24 bytes)",
        ),
        (
            lambda: quantized(weights((7,)), 8),
            "QuantizedArray(shape=(7,), dtype=float32, int8 symmetric, 1 scale, 11 bytes)",
        ),
        (
            lambda: shared(weights((4, 6), "float16"), 5),
            "CodebookArray(shape=(4, 6), dtype=float16, 5 shared values, 32 bytes)",
        ),
        (
            lambda: SparseArray.encode(jnp.eye(10)),
            "SparseArray(shape=(10, 10), dtype=float32, 90.0% sparse, 60 bytes)",
        ),
        (
            lambda: SparseArray.encode(jnp.zeros((1000,)).at[5].set(1)),
            "SparseArray(shape=(1000,), dtype=float32, 99.9% sparse, 129 bytes)",
        ),
        (
            lambda: nm_sparse(weights((8, 6), "bfloat16"), 2, 4),
            "NMSparseArray(shape=(8, 6), dtype=bfloat16, 2:4 sparse, 56 bytes)",
        ),
        (
            lambda: BlockSparseArray.encode(jnp.eye(12), (4, 2)),
            "BlockSparseArray(shape=(12, 12), dtype=float32, 66.7% of 4x2 blocks removed, "
            "195 bytes)",
        ),
    ],
)
def test_repr(leaf, text):
    assert repr(leaf()) == text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "fill", [None, True, "a\nb", b"\n", 1.5, np.ones((3, 3)), {"x": [1]}, np.float32(2), range(9)]
)
def test_repr_of_nonsense_is_one_line(form, fill):
    node = jax.tree.map(lambda _: fill, FORMS[form](weights((4, 6))))
    assert isinstance(node, CompressedArray)
    text = repr(node)
    assert text.startswith(type(node).__name__ + "(")
    assert "\n" not in text
    assert len(text) < 200


def test_one_spelling_of_each_dtype():
    leaf = quantized(weights((4, 6)))
    structures = {
        jax.tree.structure(QuantizedArray(leaf.codes, leaf.scale, None, 4, leaf.length, (), dtype))
        for dtype in ("float32", jnp.float32, np.float32, np.dtype("float32"))
    }
    assert structures == {jax.tree.structure(leaf)}


def test_leaves_cannot_be_changed():
    leaf = quantized(weights((4, 6)))
    with pytest.raises(AttributeError):
        leaf.bits = 3  # pyright: ignore
