"""Rescaled leaves: what they decode to, in and out of transformations, and parts that lie."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from leaf_samples import quantized, reference, sparse, weights

from jaxcomp.arrays import Parts, SparseArray, decode, nbytes
from jaxcomp.arrays.nested import PLAIN_KINDS, nest, unnest
from jaxcomp.arrays.rescaled import RescaledArray


def rescaled(shape=(4, 6), by=None, dtype="float32", seed=0, stored="bfloat16"):
    by = (shape[0], 1) if by is None else by
    multiplier = jnp.asarray(np.exp(weights(by, seed=seed + 1)), stored)
    return RescaledArray(quantized(weights(shape, seed=seed)), multiplier, dtype)


def dense(leaf):
    """By NumPy: every entry of an axis repeated over its run."""
    by = np.asarray(leaf.multiplier).astype(np.float32)
    for axis, size in enumerate(leaf.shape):
        by = np.repeat(by, size // by.shape[axis], axis)
    return (reference(leaf.inner).astype(np.float32) * by).astype(leaf.dtype)


def equal(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.tobytes() == b.tobytes()


@given(
    by=st.sampled_from([(4, 1), (1, 6), (1, 1), (4, 6), (2, 1), (2, 3), (4, 2)]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    stored=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_decode_is_exact_in_and_out_of_jit(by, dtype, stored, seed):
    leaf = rescaled(by=by, dtype=dtype, seed=seed, stored=stored)
    equal(leaf.decode(), dense(leaf))
    equal(jax.jit(lambda leaf: leaf.decode())(leaf), dense(leaf))
    equal(jax.jit(lambda: leaf.decode())(), dense(leaf))


def test_a_product_is_rounded_once_wherever_it_is_fused():
    leaf = rescaled((64, 64), dtype="bfloat16")
    x = weights((8, 64), seed=1)
    run = jax.jit(lambda x, w: x @ jnp.asarray(w).astype(jnp.float32))
    equal(run(x, leaf), run(x, leaf.decode()))


def test_what_it_says_of_itself():
    leaf = rescaled((4, 6), dtype="bfloat16")
    assert (leaf.shape, leaf.dtype, leaf.ndim, leaf.size) == ((4, 6), jnp.bfloat16, 2, 24)
    assert leaf.nbytes == leaf.inner.nbytes + 4 * 2 == nbytes(leaf)
    assert leaf.form() == "int4 symmetric, 6 scales, rescaled by 4"
    assert decode({"w": leaf})["w"].dtype == jnp.bfloat16
    assert jax.tree.structure(leaf) == jax.tree.structure(rescaled(dtype=jnp.bfloat16))


def test_stacked_layers_are_sliced_alike():
    stack = RescaledArray(
        quantized(weights((3, 4, 6)), batch_axes=1), jnp.asarray(weights((3, 4, 1))), "float32"
    )
    each = jax.vmap(lambda leaf: leaf.decode())(stack)
    _, scanned = jax.lax.scan(lambda carry, leaf: (carry, leaf.decode()), 0, stack)
    equal(each, dense(stack))
    equal(scanned, dense(stack))


def test_gradients_reach_the_multiplier():
    leaf = rescaled(stored="float32")

    def loss(by):
        return jnp.sum(RescaledArray(leaf.inner, by, "float32").decode() ** 2)

    got = jax.grad(loss)(leaf.multiplier)
    inner = reference(leaf.inner)
    want = 2 * np.sum(inner**2, 1, keepdims=True) * np.asarray(leaf.multiplier)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_beyond_the_dtype_is_its_largest():
    inner = quantized(np.full((2, 2), 60000.0, np.float32), 8)
    leaf = RescaledArray(inner, jnp.array([[2.0], [1.0]]), "float16")
    assert np.asarray(leaf.decode()).tolist()[0] == [65504.0] * 2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("by", [(8, 1), (2, 1), (1, 4)])
def test_sharded(kind, by):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    leaf = rescaled((8, 4), by=by)

    def place(field):
        spec = P("x") if field.ndim == 2 and field.shape[0] == 8 else P()
        return jax.device_put(field, NamedSharding(mesh, spec))

    placed = jax.tree.map(place, leaf)
    equal(placed.decode(), dense(leaf))
    equal(jax.jit(lambda leaf: leaf.decode())(placed), dense(leaf))


@pytest.mark.parametrize(
    "inner", [quantized(weights((4, 6)), 3, affine=True), sparse(weights((4, 6)))]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_round_trip_is_identical(inner, dtype):
    leaf = RescaledArray(inner, jnp.asarray(weights((2, 1)), "bfloat16"), dtype)
    parts = leaf.to_parts()
    assert json.loads(json.dumps(parts.static)) == parts.static
    assert set(parts.arrays) >= {"multiplier"}
    again = RescaledArray.from_parts(parts)
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    jax.tree.map(equal, again, leaf)
    assert all(isinstance(field, jax.Array) for field in jax.tree.leaves(again))


GOOD = rescaled().to_parts()


@pytest.mark.parametrize("section", ["static", "symbols", "arrays"])
def test_missing_unknown_and_misplaced_names(section):
    there = getattr(GOOD, section)
    for name in there:
        rest = {key: value for key, value in there.items() if key != name}
        with pytest.raises(ValueError, match=f"{section} must hold .*{name.split('.')[-1]}"):
            RescaledArray.from_parts(GOOD._replace(**{section: rest}))
    for name in ("surprise", "inner.surprise", "inner.inner.codes", "innercodes", ""):
        with pytest.raises(ValueError, match=f"{section} must hold .*, not "):
            RescaledArray.from_parts(GOOD._replace(**{section: {**there, name: 1}}))
    for wrong in (None, [], "inner", 3):
        with pytest.raises(ValueError, match=f"{section} must be a dict"):
            RescaledArray.from_parts(GOOD._replace(**{section: wrong}))


@pytest.mark.parametrize("kind", [None, 3, "", "rescaled", "unheard", ["quantized"], {"a": 1}])
def test_kinds_that_cannot_lie_within(kind):
    with pytest.raises(ValueError, match="inner must name a kind"):
        RescaledArray.from_parts(GOOD._replace(static={**GOOD.static, "inner": kind}))


def test_another_kind_within_refuses_the_parts():
    with pytest.raises(ValueError, match="the leaf within: static must hold"):
        RescaledArray.from_parts(GOOD._replace(static={**GOOD.static, "inner": "sparse"}))
    with pytest.raises(ValueError, match="the leaf within: bits must be an int"):
        RescaledArray.from_parts(GOOD._replace(static={**GOOD.static, "inner.bits": 99}))


@pytest.mark.parametrize(
    "shape", [(), (4,), (3, 1), (4, 4), (8, 1), (0, 1), (4, 0), (1, 4, 1), (4, 1, 1)]
)
def test_multipliers_that_do_not_fit(shape):
    lie = {**GOOD.arrays, "multiplier": np.ones(shape, np.float32)}
    with pytest.raises(ValueError, match="does not fit weights of"):
        RescaledArray.from_parts(GOOD._replace(arrays=lie))


@pytest.mark.parametrize("lie", [np.ones((4, 1), np.int32), np.ones((4, 1), ">f4"), "x", None])
def test_multipliers_that_are_none(lie):
    with pytest.raises(ValueError, match="multiplier must be"):
        RescaledArray.from_parts(GOOD._replace(arrays={**GOOD.arrays, "multiplier": lie}))


@pytest.mark.parametrize("dtype", [None, "int8", "f4", "float128", 4])
def test_dtypes_that_are_none(dtype):
    with pytest.raises(ValueError, match="dtype must name"):
        RescaledArray.from_parts(GOOD._replace(static={**GOOD.static, "dtype": dtype}))


def test_a_rescaled_leaf_holds_no_other():
    twice = RescaledArray(rescaled(), jnp.ones((1, 1)), "float32")
    with pytest.raises(ValueError, match="a RescaledArray cannot lie within"):
        twice.to_parts()


def test_without_elements():
    leaf = RescaledArray(quantized(weights((0, 4))), jnp.ones((0, 1)), "float32")
    assert leaf.decode().shape == (0, 4)
    assert RescaledArray.from_parts(leaf.to_parts()).shape == (0, 4)


def test_every_plain_kind_nests():
    assert set(PLAIN_KINDS) == {
        *("quantized", "grid", "codebook", "sparse", "nm_sparse", "block_sparse"),
        *("low_rank", "vector_codebook", "hashed"),
    }
    inner = SparseArray.encode(jnp.eye(3))
    own, again = unnest(
        nest(Parts({"a": 2}, {}, {}), inner, PLAIN_KINDS), PLAIN_KINDS, static={"a"}
    )
    assert own.static["a"] == 2
    equal(again.decode(), np.eye(3, dtype=np.float32))
