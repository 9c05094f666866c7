"""Leaves taken apart and put together; parts that lie."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leaf_samples import (
    FORMS,
    block_parts,
    nm_parts,
    quantized,
    reference,
    shared,
    sparse,
    weights,
)

from jaxcomp.arrays import (
    BlockSparseArray,
    CodebookArray,
    GridArray,
    NMSparseArray,
    Parts,
    QuantizedArray,
    SparseArray,
    Symbols,
)
from jaxcomp.arrays.parts import read_array, read_dtype, read_floats, read_int, read_symbols

CLASSES = [
    QuantizedArray,
    GridArray,
    CodebookArray,
    SparseArray,
    NMSparseArray,
    BlockSparseArray,
]


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("form", FORMS)
def test_round_trip_is_identical(form, dtype):
    for shape, batch_axes in [((6, 10), 0), ((3, 4, 6), 1)]:
        leaf = FORMS[form](weights(shape, dtype), batch_axes=batch_axes)
        parts = leaf.to_parts()
        assert json.loads(json.dumps(parts.static)) == parts.static
        for values, alphabet in parts.symbols.values():
            if isinstance(leaf, QuantizedArray | GridArray | CodebookArray | SparseArray):
                assert values.shape == shape
            assert values.dtype == np.uint8
            assert values.max() < alphabet
        for array in parts.arrays.values():
            assert isinstance(array, np.ndarray)
        again = type(leaf).from_parts(parts)
        same_bits(again, leaf)
        assert all(isinstance(field, jax.Array) for field in jax.tree.leaves(again))
        np.testing.assert_array_equal(again.decode(), reference(leaf))


@given(
    bits=st.integers(1, 8), rows=st.integers(0, 3), length=st.integers(0, 20), affine=st.booleans()
)
def test_round_trip_of_quantized_leaves(bits, rows, length, affine):
    leaf = quantized(weights((rows, length)), bits, affine=affine)
    same_bits(QuantizedArray.from_parts(leaf.to_parts()), leaf)


@given(clusters=st.integers(1, 65536), seed=st.integers(0, 9))
@settings(max_examples=10)
def test_round_trip_of_codebook_leaves(clusters, seed):
    rng = np.random.default_rng(seed)
    indices = jnp.asarray(rng.integers(0, clusters, (3, 5)), jnp.uint16)
    leaf = CodebookArray.from_indices(indices, jnp.asarray(weights((clusters,))), jnp.float32)
    parts = leaf.to_parts()
    assert parts.symbols["indices"].alphabet == clusters
    same_bits(CodebookArray.from_parts(parts), leaf)


def test_round_trip_keeps_bits_of_nan_and_negative_zero():
    x = jnp.array([[np.nan, 0.0, -np.inf, 5e-45]])
    leaf = SparseArray.encode(x)
    payload = np.array([0x7FC12345, 0xFF800001, 0x80000000], np.uint32).view(np.float32)
    leaf = SparseArray(leaf.mask, jnp.asarray(payload), 4)
    same_bits(SparseArray.from_parts(leaf.to_parts()), leaf)


def test_a_layer_of_a_stack_keeps_its_padding():
    stack = sparse(weights((4, 5, 6)), batch_axes=1)
    layer = jax.tree.map(lambda field: field[3], stack)
    assert layer.values.size > int(layer.keep().sum())
    same_bits(SparseArray.from_parts(layer.to_parts()), layer)


def quantized_parts(**changes):
    static = {"bits": 4, "blocks": [], "zero": True, "dtype": "float32"}
    symbols = {"codes": Symbols(np.zeros((4, 6), np.uint8), 16)}
    arrays = {"scale": np.ones((1, 6), np.float32)}
    return Parts({**static, **changes.pop("static", {})}, symbols, {**arrays, **changes})


def grid_parts(**changes):
    static = {"element": "float4_e2m1fn", "blocks": [[2, -1]], "dtype": "float32"}
    symbols = {"codes": Symbols(np.zeros((4, 6), np.uint8), 16)}
    arrays = {"scale": np.ones((4, 3, 1), jnp.float8_e8m0fnu)}
    return Parts({**static, **changes.pop("static", {})}, symbols, {**arrays, **changes})


def codebook_parts(codebook, indices=(0,), shape=(4, 6), alphabet=None):
    values = np.resize(np.array(indices, np.int64), shape)
    alphabet = codebook.shape[-1] if alphabet is None else alphabet
    return Parts(
        {"dtype": "float32"}, {"indices": Symbols(values, alphabet)}, {"codebook": codebook}
    )


def sparse_parts(mask, values, alphabet=2):
    return Parts({}, {"mask": Symbols(np.asarray(mask), alphabet)}, {"values": values})


GOOD = [
    (QuantizedArray, quantized_parts()),
    (CodebookArray, codebook_parts(np.ones(3, np.float32), (0, 2))),
    (SparseArray, sparse_parts(np.eye(4, dtype=np.int64), np.ones(4, np.float32))),
    (NMSparseArray, nm_parts()),
    (BlockSparseArray, block_parts(np.eye(2, 3, dtype=np.int64), (2, 2, 2))),
    (GridArray, grid_parts()),
]


@pytest.mark.parametrize(("cls", "parts"), GOOD)
def test_the_good_parts_are_good(cls, parts):
    assert cls.from_parts(parts).shape in [(4, 6), (4, 4), (8, 6)]


@pytest.mark.parametrize(("cls", "parts"), GOOD)
@pytest.mark.parametrize("section", ["static", "symbols", "arrays"])
def test_missing_unknown_and_misplaced_names(cls, parts, section):
    for name in getattr(parts, section):
        rest = {k: v for k, v in getattr(parts, section).items() if k != name}
        with pytest.raises(ValueError, match=f"{section} must hold .*{name}"):
            cls.from_parts(parts._replace(**{section: rest}))
    with pytest.raises(ValueError, match=f"{section} must hold .*, not .*'surprise'"):
        cls.from_parts(parts._replace(**{section: {**getattr(parts, section), "surprise": 1}}))
    for wrong in (None, [], "bits", 3, [("bits", 4)]):
        with pytest.raises(ValueError, match=f"{section} must be a dict"):
            cls.from_parts(parts._replace(**{section: wrong}))


@pytest.mark.parametrize("cls", CLASSES)
def test_parts_of_another_class(cls):
    for other, parts in GOOD:
        if other is not cls:
            with pytest.raises(ValueError, match="must hold"):
                cls.from_parts(parts)


@pytest.mark.parametrize("bits", [0, -1, 9, 16, 4.0, "4", True, None, [4], 1 << 70, np.int64(4)])
def test_wrong_bits(bits):
    with pytest.raises(ValueError, match="bits must be an int from 1 to 8"):
        QuantizedArray.from_parts(quantized_parts(static={"bits": bits}))


DTYPE_LIES = [None, 4, "", "int8", "uint8", "bool", "complex64", "f4", "<f4", ">f4", "float", "O"]
DTYPE_LIES += ["object", "float128", "longdouble", "f4,f4", "V8", "M8[ns]", "float32 ", "half"]
DTYPE_LIES += ["(2,)f4", "int4", ["float32"], {"a": "f4"}, "\0", "float64", "a" * 10**5, "key<fry>"]


@pytest.mark.parametrize("dtype", DTYPE_LIES, ids=lambda dtype: repr(dtype)[:20])
def test_wrong_dtypes(dtype):
    with pytest.raises(ValueError, match="dtype must name a floating dtype") as error:
        QuantizedArray.from_parts(quantized_parts(static={"dtype": dtype}))
    assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match="dtype must name a floating dtype"):
        CodebookArray.from_parts(GOOD[1][1]._replace(static={"dtype": dtype}))


BLOCK_LIES = [4, "ab", [2], [2, -1, 0], [2, 0], [2, 1], [2, -3], [0, -1], [-2, -1], [4, -1]]
BLOCK_LIES += [[2.0, -1], [True, -1], [2, None], ["2", "-1"], {"size": 2, "axis": -1}, False]
BLOCK_LIES += [[1 << 80, -1], [[2], -1], [2, -(1 << 80)]]


@pytest.mark.parametrize("block", BLOCK_LIES, ids=repr)
def test_wrong_blocks(block):
    scale = np.ones((4, 3, 1), np.float32)
    for blocks in (block, [block]):
        with pytest.raises(ValueError, match=r"blocks"):
            QuantizedArray.from_parts(quantized_parts(static={"blocks": blocks}, scale=scale))
        with pytest.raises(ValueError, match=r"blocks"):
            GridArray.from_parts(grid_parts(static={"blocks": blocks}))


@pytest.mark.parametrize("blocks", [[[2, -1], [2, -1]], [[3, -1], [2, -2]]])
def test_blocks_twice_or_out_of_order(blocks):
    with pytest.raises(ValueError, match="each axis once and in order"):
        QuantizedArray.from_parts(quantized_parts(static={"blocks": blocks}))


@pytest.mark.parametrize("zero", [None, 0, 1, "true", [True]])
def test_zero_of_another_type(zero):
    with pytest.raises(ValueError, match="zero must be true, or false without a zero_point"):
        QuantizedArray.from_parts(quantized_parts(static={"zero": zero}))


def test_a_zero_point_without_zero():
    with pytest.raises(ValueError, match="zero must be true, or false without a zero_point"):
        QuantizedArray.from_parts(
            quantized_parts(static={"zero": False}, zero_point=np.zeros((1, 6), np.uint8))
        )


@pytest.mark.parametrize("element", [None, 4, "", "int4", "float32", ["nf4"], "nf4 ", "n" * 10**5])
def test_unknown_elements(element):
    with pytest.raises(ValueError, match="element must be one of float8_e4m3fn, ") as error:
        GridArray.from_parts(grid_parts(static={"element": element}))
    assert len(str(error.value)) < 300


def test_elements_of_other_bits():
    for element in ("float8_e4m3fn", "power_of_two_3"):
        with pytest.raises(ValueError, match="the alphabet of codes must be"):
            GridArray.from_parts(grid_parts(static={"element": element}))


def test_scales_of_a_grid_that_do_not_fit():
    for shape in [(), (1,), (4, 6), (4, 2, 1), (1, 4, 3, 1)]:
        with pytest.raises(ValueError, match="do not fit codes of shape"):
            GridArray.from_parts(grid_parts(scale=np.ones(shape, np.float32)))
    assert GridArray.from_parts(grid_parts(tensor_scale=np.ones((1, 1, 1), np.float32))).ndim == 2
    for wrong in (np.ones((1, 1), np.float32), np.ones((2, 1, 1), np.float32)):
        with pytest.raises(ValueError, match="tensor_scale must be float32 and broadcast to scale"):
            GridArray.from_parts(grid_parts(tensor_scale=wrong))
    with pytest.raises(ValueError, match="tensor_scale must be float32"):
        GridArray.from_parts(grid_parts(tensor_scale=np.ones((1, 1, 1), np.float16)))


@pytest.mark.parametrize(
    "shape", [(), (6,), (2, 6), (4, 7), (1, 1, 6), (4, 6, 1), (0, 6), (1, 0), (4, 3, 1)]
)
def test_scales_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="do not fit codes of shape"):
        QuantizedArray.from_parts(quantized_parts(scale=np.ones(shape, np.float32)))


def test_grouped_scales_that_do_not_fit():
    good = quantized_parts(static={"blocks": [[3, -1]]}, scale=np.ones((4, 2, 1), np.float32))
    assert QuantizedArray.from_parts(good).blocks == ((3, -1),)
    tiles = {"blocks": [[2, -2], [3, -1]]}
    good = quantized_parts(static=tiles, scale=np.ones((2, 1, 2, 1), np.float32))
    assert QuantizedArray.from_parts(good).blocks == ((2, -2), (3, -1))
    with pytest.raises(ValueError, match="do not fit codes of shape"):
        QuantizedArray.from_parts(good._replace(arrays={"scale": np.ones((2, 3, 1, 1), "f4")}))
    for shape in [(1, 6), (4, 3, 1), (4, 2), (2, 4, 1)]:
        with pytest.raises(ValueError, match="do not fit codes of shape"):
            QuantizedArray.from_parts(
                quantized_parts(static={"blocks": [[3, -1]]}, scale=np.ones(shape, np.float32))
            )


ARRAY_LIES = {
    "none": None,
    "list": [1.0],
    "int": np.ones((1, 6), np.int32),
    "bool": np.ones((1, 6), bool),
    "complex": np.ones((1, 6), np.complex64),
    "object": np.full((1, 6), None),
    "text": np.full((1, 6), "x"),
    "float64": np.ones((1, 6)),
    "longdouble": np.ones((1, 6), np.longdouble),
    "swapped": np.ones((1, 6), ">f4"),
    "record": np.zeros((1, 6), "f4,f4"),
    "float": 1.0,
    "symbols": Symbols(np.ones((1, 6), np.uint8), 2),
}


@pytest.mark.parametrize("lie", ARRAY_LIES)
def test_arrays_of_wrong_dtype(lie):
    wrong = ARRAY_LIES[lie]
    with pytest.raises(ValueError, match="scale must be"):
        QuantizedArray.from_parts(quantized_parts(scale=wrong))
    with pytest.raises(ValueError, match="codebook must be"):
        CodebookArray.from_parts(GOOD[1][1]._replace(arrays={"codebook": wrong}))
    with pytest.raises(ValueError, match="values must be"):
        SparseArray.from_parts(GOOD[2][1]._replace(arrays={"values": wrong}))
    for cls, parts in GOOD[3:5]:
        with pytest.raises(ValueError, match="values must be"):
            cls.from_parts(parts._replace(arrays={"values": wrong}))
    if wrong is not None:  # None stands for a symmetric leaf
        with pytest.raises(ValueError, match="zero_point must be"):
            QuantizedArray.from_parts(quantized_parts(zero_point=wrong))


def test_zero_points_that_are_no_codes():
    for zero in (np.full((1, 6), 16, np.uint8), np.zeros((6,), np.uint8), np.zeros((4, 6), "u1")):
        with pytest.raises(ValueError, match="zero_point"):
            QuantizedArray.from_parts(quantized_parts(zero_point=zero))
    good = QuantizedArray.from_parts(quantized_parts(zero_point=np.full((1, 6), 15, np.uint8)))
    np.testing.assert_array_equal(good.decode(), -15)


SYMBOL_LIES = {
    "negative": (np.full((4, 6), -1), "must be in"),
    "large": (np.full((4, 6), 16), "must be in"),
    "wraps": (np.full((4, 6), 256), "must be in"),
    "wraps32": (np.full((4, 6), 1 << 32), "must be in"),
    "one": (np.eye(4, 6, dtype=np.int64) * 16, "must be in"),
    "huge": (np.full((4, 6), 2**64 - 1, np.uint64), "must be in"),
    "float": (np.zeros((4, 6)), "must be integers"),
    "bool": (np.zeros((4, 6), bool), "must be integers"),
    "object": (np.zeros((4, 6), object), "must be integers"),
    "scalar": (np.zeros((), np.uint8), "at least one axis"),
    "list": ([[0] * 6] * 4, "must be an array"),
    "none": (None, "must be an array"),
    "swapped": (np.zeros((4, 6), ">i4"), "byte order"),
    "endless": (np.zeros((0, 1 << 62), np.uint8), "impossible shape"),
    "endless2": (np.zeros((1 << 40, 0, 1 << 20), np.uint8), "impossible shape"),
    "axes": (np.zeros((1,) * 64, np.uint8), "impossible shape"),
}


@pytest.mark.parametrize("lie", SYMBOL_LIES)
def test_symbols_that_lie(lie):
    values, message = SYMBOL_LIES[lie]
    for cls, parts in GOOD:
        ((name, good),) = parts.symbols.items()
        with pytest.raises(ValueError, match=message):
            cls.from_parts(parts._replace(symbols={name: Symbols(values, good.alphabet)}))


def test_alphabets_that_lie():
    for cls, parts in GOOD:
        ((name, good),) = parts.symbols.items()
        n = good.alphabet
        for alphabet in (0, n - 1, n + 1, -n, float(n), str(n), None, True, 1 << 70, [n]):
            with pytest.raises(ValueError, match="the alphabet of"):
                cls.from_parts(parts._replace(symbols={name: Symbols(good.values, alphabet)}))
        for wrong in (None, good.values, tuple(good), {"values": good.values}):
            with pytest.raises(ValueError, match="must be Symbols"):
                cls.from_parts(parts._replace(symbols={name: wrong}))


def test_codebooks_that_do_not_fit():
    for shape in [(), (0,), (65537,), (2, 0)]:
        with pytest.raises(ValueError, match=r"codebook|indices must be|alphabet"):
            CodebookArray.from_parts(codebook_parts(np.ones(shape, np.float32), alphabet=1))
    for shape in [(3, 3), (4, 6, 3), (6, 3), (4, 6, 1, 3)]:
        with pytest.raises(ValueError, match="does not fit indices"):
            CodebookArray.from_parts(codebook_parts(np.ones(shape, np.float32)))
    assert CodebookArray.from_parts(codebook_parts(np.ones((4, 3), np.float32))).shape == (4, 6)


def test_sparse_values_that_do_not_fit():
    eye = np.eye(4, dtype=np.uint8)
    for shape in [(), (3, 4), (4, 4, 1), (1, 4)]:
        with pytest.raises(ValueError, match="do not fit a mask"):
            SparseArray.from_parts(sparse_parts(eye, np.ones(shape, np.float32)))
    for shape in [(3,), (0,), (4, 0)]:
        with pytest.raises(ValueError, match="values"):
            SparseArray.from_parts(sparse_parts(eye, np.ones(shape, np.float32)))
    assert SparseArray.from_parts(sparse_parts(eye, np.ones((4, 1), np.float32))).shape == (4, 4)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4]), max_size=3).map(tuple)


def filled(*dtypes):
    return st.builds(
        lambda dtype, shape, fill: np.full(shape, fill).astype(dtype),
        st.sampled_from([jnp.dtype(dtype) for dtype in dtypes]),
        SHAPES,
        st.sampled_from([0, 1, 2, 15]),
    )


def seldom(strategy, other):
    """Mostly ``strategy``: a leaf with one lie in it says more than one of nothing else."""
    return st.integers(0, 9).flatmap(lambda n: strategy if n else other)


FLOATS = seldom(filled("f4", "f2", "bfloat16"), filled("f8", "i4", "?") | ANYTHING)
CODES = seldom(filled("u1", "u2", "i4", "i8"), filled("f4", "?", "i1", "u8") | ANYTHING)
ZEROS = seldom(filled("u1"), filled("i1", "f4") | ANYTHING)
ALPHABETS = seldom(st.sampled_from([1, 2, 4, 8, 16]), ANYTHING)
SYMBOLS = seldom(st.builds(Symbols, CODES, ALPHABETS), ANYTHING)
BLOCKS = st.lists(st.tuples(st.integers(1, 2), st.integers(-2, -1)).map(list), max_size=2)
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
STATIC = {
    "bits": seldom(st.integers(1, 4), ANYTHING),
    "blocks": seldom(BLOCKS, ANYTHING),
    "zero": seldom(st.booleans(), ANYTHING),
    "element": seldom(st.sampled_from(["nf4", "power_of_two_3", "float8_e5m2"]), ANYTHING),
    "dtype": seldom(DTYPES, ANYTHING),
    "n": seldom(st.just(1), ANYTHING),
    "m": seldom(st.sampled_from([2, 4]), ANYTHING),
    "axis": seldom(st.sampled_from([-1, -2]), ANYTHING),
    "block_shape": seldom(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=2), ANYTHING),
}


def static(*names):
    return st.fixed_dictionaries({name: STATIC[name] for name in names})


PARTS = {
    QuantizedArray: st.builds(
        Parts,
        static("bits", "blocks", "zero", "dtype"),
        st.fixed_dictionaries({"codes": SYMBOLS}),
        st.fixed_dictionaries({"scale": FLOATS}, optional={"zero_point": ZEROS}),
    ),
    GridArray: st.builds(
        Parts,
        static("element", "blocks", "dtype"),
        st.fixed_dictionaries({"codes": SYMBOLS}),
        st.fixed_dictionaries({"scale": FLOATS}, optional={"tensor_scale": FLOATS}),
    ),
    CodebookArray: st.builds(
        Parts,
        static("dtype"),
        st.fixed_dictionaries({"indices": SYMBOLS}),
        st.fixed_dictionaries({"codebook": FLOATS}),
    ),
    SparseArray: st.builds(
        Parts,
        st.just({}),
        st.fixed_dictionaries({"mask": SYMBOLS}),
        st.fixed_dictionaries({"values": FLOATS}),
    ),
    NMSparseArray: st.builds(
        Parts,
        static("n", "m", "axis"),
        st.fixed_dictionaries({"patterns": SYMBOLS}),
        st.fixed_dictionaries({"values": FLOATS}),
    ),
    BlockSparseArray: st.builds(
        Parts,
        static("block_shape"),
        st.fixed_dictionaries({"mask": SYMBOLS}),
        st.fixed_dictionaries({"values": FLOATS}),
    ),
}


@pytest.mark.parametrize("cls", CLASSES)
@given(data=st.data())
@settings(max_examples=100)
def test_random_parts_give_a_leaf_or_a_value_error(cls, data):
    check(cls, data.draw(PARTS[cls]))


@given(st.sampled_from(GOOD), st.data())
@settings(max_examples=60)
def test_changed_parts_give_a_leaf_or_a_value_error(good, data):
    cls, parts = good
    section = data.draw(st.sampled_from(Parts._fields))
    there = dict(getattr(parts, section))
    for name in there:
        there[name] = data.draw(
            {"symbols": SYMBOLS, "arrays": FLOATS, "static": STATIC.get(name)}[section]
        )
    check(cls, parts._replace(**{section: there}))


def check(cls, parts):
    try:
        leaf, error = cls.from_parts(parts), None
    except ValueError as caught:
        leaf, error = None, str(caught)
    if leaf is None:
        assert error
        assert "\n" not in error
        assert len(error) < 500
        return
    ((_, symbols),) = parts.symbols.items()
    if cls in CLASSES[:4]:
        assert leaf.shape == symbols.values.shape
    assert leaf.decode().shape == leaf.shape
    again = leaf.to_parts()
    np.testing.assert_array_equal(next(iter(again.symbols.values())).values, symbols.values)
    assert again.arrays.keys() == {k for k, v in parts.arrays.items() if v is not None}


def test_readers():
    assert read_int(3, "n", 3, 3) == 3
    assert read_dtype("float16") == np.float16
    parts = Parts({}, {"s": Symbols(np.array([0, 299], np.int64), 300)}, {"a": jnp.ones(2)})
    assert read_symbols(parts, "s", 300).dtype == np.uint16
    assert read_floats(parts, "a").tolist() == [1, 1]
    assert read_array(np.zeros((0, 3)), "x").shape == (0, 3)


def test_float64_leaves_where_jax_has_it():
    with jax.enable_x64(True):
        leaf = CodebookArray.from_parts(
            codebook_parts(np.array([0.1, 0.2]))._replace(static={"dtype": "float64"})
        )
        assert leaf.decode().dtype == np.float64
        assert float(leaf.decode()[0, 0]) == 0.1


def test_loading_compiles_nothing():
    from jax._src import test_util

    leaf = shared(weights((7, 11)), 16)
    parts = leaf.to_parts()
    with test_util.count_jit_compilation_cache_miss() as count:
        CodebookArray.from_parts(parts).to_parts()
    assert count() == 0
