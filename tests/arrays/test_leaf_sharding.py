"""Leaves spread over a mesh of fake devices decode to the same values, where they lie."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from leaf_samples import (
    FORMS,
    block_sparse,
    fit_nm,
    pack_reference,
    quantized,
    reference,
    shared,
    sparse,
    weights,
)

from jaxcomp.arrays import CodebookArray, QuantizedArray
from jaxcomp.arrays.bits import pack_bits, unpack_bits
from jaxcomp.arrays.codebook import lookup
from jaxcomp.sharding import automatic, explicit_axes, spec_like

KINDS = [AxisType.Auto, AxisType.Explicit]
# Mesh axes of the leaf's axes, from the last one on.
LAYOUTS = {
    "replicated": (None, None),
    "rows": (None, "a"),
    "columns": ("b", None),
    "both": ("b", "a"),
    "one_axis_twice": (("a", "b"), None),
}


@functools.cache
def mesh_of(kind):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))


def put(leaf, mesh, layout):
    """Each field by the same axes from the last, where they divide it."""

    def one(field):
        spec = [None] * field.ndim
        for back, names in enumerate(layout, 1):
            if names is None or back > field.ndim:
                continue
            parts = np.prod([mesh.shape[n] for n in np.atleast_1d(names)])
            if field.shape[-back] % parts == 0:
                spec[-back] = names
        return jax.device_put(field, NamedSharding(mesh, P(*spec)))

    return jax.tree.map(one, leaf)


def equal(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "form", ["int3-affine", "int5-groups-last", "mxfp4", "codebook16", "sparse", "2:4", "blocks"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_inside_jit(form, layout, kind):
    leaf = FORMS[form](weights((8, 64)))
    there = put(leaf, mesh_of(kind), LAYOUTS[layout])
    dense = jax.jit(lambda leaf: leaf.decode())(there)
    equal(dense, reference(leaf))
    if kind == AxisType.Explicit and layout != "replicated":
        packed = jax.tree.leaves(there)[0]
        assert dense.sharding.is_equivalent_to(packed.sharding, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "form", ["int8-groups-first", "int1", "e4m3-tiles", "codebook5", "sparse", "1:all", "blocks"]
)
def test_decode_without_jit_and_inside_set_mesh(form, kind):
    mesh = mesh_of(kind)
    leaf = FORMS[form](weights((8, 64)))
    there = put(leaf, mesh, LAYOUTS["both"])
    equal(there.decode(), reference(leaf))
    with jax.set_mesh(mesh):
        equal(jax.jit(lambda leaf: leaf.decode())(there), reference(leaf))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["int4", "e4m3-tiles", "codebook16", "sparse", "2:4", "blocks"])
@pytest.mark.parametrize("axis", ["layers", "rows"])
def test_stacks_under_vmap_and_scan(form, axis, kind):
    stack = FORMS[form](weights((4, 8, 16)), batch_axes=1)
    mesh = mesh_of(kind)

    def spec(field):
        if axis == "layers":
            return P("b")
        return P(None, "a") if field.ndim == 3 and field.shape[1] == 8 else P()

    there = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), stack)
    dense = reference(stack)
    equal(jax.jit(lambda leaf: leaf.decode())(there), dense)
    equal(jax.jit(jax.vmap(lambda leaf: leaf.decode()))(there), dense)
    if axis == "rows" or kind == AxisType.Auto:
        # JAX scans only over an axis that is not explicitly sharded.
        scanned = jax.jit(lambda leaf: jax.lax.scan(lambda c, x: (c, x.decode()), 0, leaf)[1])
        equal(scanned(there), dense)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["int3-affine", "codebook16", "sparse", "2:4", "blocks"])
@pytest.mark.parametrize("manual", [{"a", "b"}, {"a"}])
def test_inside_shard_map(form, kind, manual):
    # Each device (or each row of devices, with "b" left to the compiler) decodes layers of its own.
    stack = FORMS[form](weights((4, 8, 16)), batch_axes=1)
    mesh = mesh_of(kind)
    there = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("a"))), stack)
    run = jax.shard_map(
        lambda leaf: leaf.decode(), mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names=manual
    )
    equal(jax.jit(run)(there), reference(stack))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [quantized, shared, sparse, fit_nm, block_sparse])
def test_a_linen_model_on_sharded_leaves(make, kind):
    mesh = mesh_of(kind)
    kernel = make(weights((16, 32)))
    params = {"kernel": put(kernel, mesh, LAYOUTS["columns"]), "bias": jnp.ones(32)}
    params["bias"] = jax.device_put(params["bias"], NamedSharding(mesh, P("b")))
    x = jax.device_put(weights((8, 16), seed=1), NamedSharding(mesh, P("a", None)))
    with jax.set_mesh(mesh):
        y = jax.jit(nn.Dense(32).apply)({"params": params}, x)
    np.testing.assert_allclose(y, np.asarray(x) @ reference(kernel) + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [quantized, shared, sparse, fit_nm, block_sparse])
def test_gradients(make, kind):
    leaf = make(weights((8, 64)))
    there = put(leaf, mesh_of(kind), LAYOUTS["columns"])
    loss = lambda leaf: (leaf.decode() ** 2).sum()
    got = jax.jit(jax.grad(loss, allow_int=True))(there)
    want = jax.grad(loss, allow_int=True)(leaf)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if b.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [quantized, shared, sparse, fit_nm, block_sparse])
def test_matmul_of_a_sharded_leaf(make, kind):
    leaf = make(weights((64, 32)))
    there = put(leaf, mesh_of(kind), LAYOUTS["columns"])
    x = weights((8, 64), seed=1)
    here = jax.device_put(x, NamedSharding(mesh_of(kind), P("a", None)))
    y = jax.jit(lambda x, leaf: x @ leaf.decode())(here, there)
    np.testing.assert_allclose(np.asarray(y), x @ reference(leaf), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 3, 4, 12])
@pytest.mark.parametrize("length", [16, 24, 20, 13])
def test_packing_of_sharded_codes(bits, length, kind):
    # 20 codes of 4 bits are 10 bytes: they cannot lie on the four devices that the codes lie on.
    codes = np.random.default_rng(0).integers(0, 1 << bits, (4, length)).astype(np.uint16)
    spec = P("a", "b" if length % 4 == 0 else None)
    here = jax.device_put(codes, NamedSharding(mesh_of(kind), spec))
    packed = pack_bits(here, bits)
    equal(packed, pack_reference(codes, bits))
    equal(unpack_bits(packed, bits, length), codes)


def test_a_result_that_cannot_lie_evenly_is_replicated():
    mesh = mesh_of(AxisType.Explicit)
    packed = jnp.arange(32, dtype=jnp.uint8)
    there = jax.device_put(packed, NamedSharding(mesh, P("b")))
    codes = jax.jit(lambda p: unpack_bits(p, 4, 63))(there)
    assert codes.sharding.spec == P(None)
    equal(codes, unpack_bits(packed, 4, 63))


@pytest.mark.parametrize("kind", KINDS)
def test_lookup_of_narrow_indices_in_a_sharded_codebook(kind):
    # A gather with uint8 indices aborted the process in XLA's partitioner.
    book = weights((16,))
    indices = np.random.default_rng(0).integers(0, 16, (8, 12)).astype(np.uint8)
    mesh = mesh_of(kind)
    placed = jax.device_put(book, NamedSharding(mesh, P("b")))
    here = jax.device_put(indices, NamedSharding(mesh, P("a", "b")))
    equal(jax.jit(lookup)(placed, here), book[indices])


def test_encoding_on_an_explicit_mesh_inside_jit():
    mesh = mesh_of(AxisType.Explicit)
    codes = np.random.default_rng(0).integers(0, 8, (8, 12)).astype(np.uint8)
    here = jax.device_put(codes, NamedSharding(mesh, P("a", "b")))
    book = jax.device_put(weights((8,)), NamedSharding(mesh, P()))

    @jax.jit
    def encode(codes, book):
        scale = jnp.max(book).reshape(1, 1)
        quantized = QuantizedArray(pack_bits(codes, 3), scale, None, 3, 12, (), "float32")
        return quantized, CodebookArray.from_indices(codes, book, "float32")

    for leaf in encode(here, book):
        equal(leaf.decode(), reference(leaf))
        assert leaf.decode().sharding.spec == P("a", None)  # 36 bits fill 5 bytes


def test_device_put_of_a_tree_by_one_sharding():
    mesh = mesh_of(AxisType.Auto)
    leaf = quantized(weights((8, 64)))
    there = jax.device_put({"w": leaf}, NamedSharding(mesh, P()))
    assert all(len(field.devices()) == 8 for field in jax.tree.leaves(there))
    assert repr(there["w"]) == repr(leaf)
    leaf = sparse(weights((8, 64)))
    assert repr(put(leaf, mesh, LAYOUTS["both"])) == repr(leaf)


def test_automatic_learns_the_mesh_from_its_arguments():
    x = jnp.arange(16.0)
    for kind in KINDS:
        mesh = mesh_of(kind)
        here = jax.device_put(x, NamedSharding(mesh, P("b")))
        total = automatic(jnp.cumsum, P("b"))
        outputs = [total(here), jax.jit(total)(here)]
        with jax.set_mesh(mesh):
            outputs += [total(here), jax.jit(total)(here)]
        for out in outputs:
            equal(out, np.cumsum(x))
            if kind == AxisType.Explicit:
                assert out.sharding.spec == P("b")
        assert explicit_axes(here, {"x": x}) == (() if kind == AxisType.Auto else ("a", "b"))
    pair = automatic(lambda x: (x * 2, x.sum()), (P("b"), P()))
    here = jax.device_put(x, NamedSharding(mesh_of(AxisType.Explicit), P("b")))
    doubled, total = jax.jit(pair)(here)
    equal(doubled, x * 2)
    assert (doubled.sharding.spec, float(total)) == (P("b"), 120.0)


def test_spec_like_drops_what_does_not_divide():
    here = jax.device_put(
        jnp.zeros((8, 8, 3)), NamedSharding(mesh_of(AxisType.Explicit), P("a", ("b",), None))
    )
    assert spec_like(here, (8, 8, 3)) == P("a", "b", None)
    assert spec_like(here, (6, 6, 6)) == P("a", None, None)
    assert spec_like(here, (5, 0, 1)) == P(None, "b", None)
    assert spec_like(jnp.zeros((2, 2)), (4, 4)) == P()
