"""Leaves inside JAX's transformations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from leaf_samples import FORMS, quantized, reference, shared, sparse, weights

from jaxcomp.arrays import (
    BlockSparseArray,
    CodebookArray,
    QuantizedArray,
    SparseArray,
    decode,
    nbytes,
)
from jaxcomp.arrays.bits import pack_bits
from tests.users_programs import users_jit

FLAT = [f for f in FORMS if f not in ("int1", "int4-tensor", "codebook5")]


def equal(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def said(leaf):
    """What a leaf without values says of itself: all but the fraction of zeros."""
    form = leaf.form()
    if isinstance(leaf, SparseArray | BlockSparseArray):
        form = "sparse" if isinstance(leaf, SparseArray) else "sparse in 2x2 blocks"
    return f"shape=(4, 6), dtype=float32, {form}, {leaf.nbytes} bytes"


def same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(equal, a, b)


@pytest.mark.parametrize("form", FLAT)
def test_jit_takes_returns_and_closes_over_leaves(form):
    leaf = FORMS[form](weights((4, 6)))
    dense = reference(leaf)
    equal(jax.jit(lambda leaf: leaf.decode())(leaf), dense)
    equal(jax.jit(lambda: leaf.decode())(), dense)
    returned = jax.jit(lambda leaf: {"same": leaf})(leaf)["same"]
    same_tree(returned, leaf)
    assert repr(returned) == repr(leaf)


@pytest.mark.parametrize("form", FLAT)
def test_no_recompilation_between_leaves_of_one_form(form):
    traces = []

    @jax.jit
    def run(leaf):
        traces.append(repr(leaf))
        return leaf.decode()

    x = weights((4, 6))
    first = FORMS[form](x)
    for scale in (1, 2, -3):
        leaf = FORMS[form](x * scale)
        equal(run(leaf), reference(leaf))
    run(type(first).from_parts(first.to_parts()))
    run(jax.tree.map(lambda field: field, first))
    run(jax.tree.map(jnp.array, first))
    run(jax.device_put(first, jax.devices()[0]))
    assert len(traces) == 1
    assert "\n" not in traces[0]
    assert traces[0] == f"{type(first).__name__}({said(first)})"


def test_traced_leaves_know_their_shape_and_bytes():
    seen = []

    @jax.jit
    def run(leaves):
        seen.extend((leaf.shape, leaf.ndim, leaf.size, leaf.dtype, leaf.nbytes) for leaf in leaves)
        assert nbytes(leaves) == sum(leaf.nbytes for leaf in leaves)
        return leaves[0].decode()

    leaves = [form(weights((4, 6), "bfloat16")) for form in FORMS.values()]
    run(leaves)
    assert seen == [((4, 6), 2, 24, jnp.dtype("bfloat16"), leaf.nbytes) for leaf in leaves]


@pytest.mark.parametrize("form", FLAT)
def test_abstract_leaves(form):
    leaf = FORMS[form](weights((4, 6)))
    abstract = jax.eval_shape(lambda: leaf)
    assert all(isinstance(f, jax.ShapeDtypeStruct) for f in jax.tree.leaves(abstract))
    assert abstract.shape == (4, 6)
    assert abstract.dtype == jnp.float32
    assert abstract.nbytes == nbytes(abstract) == leaf.nbytes
    out = jax.eval_shape(lambda leaf: leaf.decode(), abstract)
    assert (out.shape, out.dtype) == ((4, 6), jnp.float32)
    assert repr(abstract) == f"{type(leaf).__name__}({said(leaf)})"
    compiled = jax.jit(decode).lower(abstract).compile()
    equal(compiled(leaf), reference(leaf))


def test_gradient_of_scales():
    leaf = quantized(weights((4, 6)), 4)
    codes = leaf.decode() / leaf.scale
    target = weights((4, 6), seed=1)

    def loss(scale):
        return (dataclasses.replace(leaf, scale=scale).decode() * target).sum()

    equal(jax.jit(jax.grad(loss))(leaf.scale).shape, (1, 6))
    np.testing.assert_allclose(
        jax.grad(loss)(leaf.scale), (codes * target).sum(0, keepdims=True), rtol=1e-5
    )
    check_grads(loss, (leaf.scale,), order=1, modes=["fwd", "rev"], rtol=1e-2)


def test_gradient_of_codebooks_is_summed_over_their_members():
    leaf = shared(weights((3, 4, 6)), 5, batch_axes=1)
    target = weights((3, 4, 6), seed=1)

    def loss(book):
        return (dataclasses.replace(leaf, codebook=book).decode() * target).sum()

    members = np.asarray(leaf.decode())[..., None] == np.asarray(leaf.codebook)[:, None, None]
    want = (members * target[..., None]).sum((1, 2))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(leaf.codebook), want, rtol=1e-5, atol=1e-6)
    check_grads(loss, (leaf.codebook,), order=1, modes=["fwd", "rev"], rtol=1e-2)


# Gradients have the dtype of the field: 8 bits hold no sum, and e8m0 no sign.
@pytest.mark.parametrize("form", [f for f in FLAT if f not in ("mxfp4", "e4m3-tiles")])
def test_gradient_of_a_whole_leaf(form):
    leaf = FORMS[form](weights((4, 6)))
    grad = jax.jit(jax.grad(lambda leaf: (leaf.decode() ** 2).sum(), allow_int=True))(leaf)
    assert jax.tree.structure(grad) == jax.tree.structure(leaf)
    # d/ds sum((c s)^2) s = 2 sum(dense^2): every form is linear in its float field, and a product
    # in the first of its factors.
    inner = 0.0
    fields = jax.tree_util.tree_flatten_with_path(leaf)[0]
    for slope, (keys, field) in zip(jax.tree.leaves(grad), fields, strict=True):
        if ".factors[1]" in jax.tree_util.keystr(keys):
            continue
        if jnp.issubdtype(field.dtype, jnp.floating):
            inner += float((slope * field).sum())
        else:
            assert slope.dtype == jax.dtypes.float0
    np.testing.assert_allclose(inner, 2 * (reference(leaf) ** 2).sum(), rtol=1e-5)
    assert "\n" not in repr(grad)


def test_gradient_of_sparse_values_is_the_kept_gradient():
    leaf = sparse(weights((4, 6)))
    target = weights((4, 6), seed=1)
    grad = jax.grad(lambda leaf: (leaf.decode() * target).sum(), allow_int=True)(leaf)
    np.testing.assert_allclose(grad.values, target[np.asarray(leaf.keep())], rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_and_scan_slice_every_field(form):
    stack = FORMS[form](weights((3, 4, 6)), batch_axes=1)
    dense = reference(stack)
    shapes = []

    def one(leaf):
        shapes.append((leaf.shape, "\n" in repr(leaf)))
        return leaf.decode()

    equal(jax.vmap(one)(stack), dense)
    equal(jax.lax.scan(lambda carry, leaf: (carry, one(leaf)), 0, stack)[1], dense)
    equal(jax.lax.map(one, stack), dense)
    assert set(shapes) == {((4, 6), False)}
    for layer in range(3):
        sliced = jax.tree.map(lambda field, layer=layer: field[layer], stack)
        equal(sliced.decode(), dense[layer])
        equal(stack[layer], dense[layer])


@pytest.mark.parametrize("form", ["int3-affine", "codebook16", "sparse", "2:4", "blocks"])
def test_two_stacked_axes(form):
    stack = FORMS[form](weights((2, 3, 4, 6)), batch_axes=2)
    dense = reference(stack)
    equal(stack.decode(), dense)
    equal(jax.vmap(jax.vmap(lambda leaf: leaf.decode()))(stack), dense)
    equal(jax.vmap(lambda leaf: leaf.decode(), in_axes=1, out_axes=1)(stack), dense)
    equal(jax.vmap(lambda leaf: jax.lax.map(lambda x: x.decode(), leaf))(stack), dense)


def test_encoding_under_vmap_gives_every_field_the_axis():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (3, 4, 7)), jnp.uint8)
    books = jnp.asarray(weights((3, 16)))

    def encode(codes, book):
        scale = jnp.max(book).reshape(1, 1)
        zero = jnp.full((1, 1), 7, jnp.uint8)
        return (
            QuantizedArray(pack_bits(codes, 4), scale, zero, 4, 7, (), jnp.float32),
            CodebookArray.from_indices(codes, book, jnp.float32),
        )

    for leaf in jax.jit(jax.vmap(encode))(codes, books):
        assert leaf.shape == (3, 4, 7)
        assert all(field.shape[0] == 3 for field in jax.tree.leaves(leaf))
        equal(leaf.decode(), reference(leaf))
        equal(jax.vmap(lambda leaf: leaf.decode())(leaf), reference(leaf))


@pytest.mark.parametrize("form", ["int4", "codebook16", "sparse", "2:4", "blocks"])
def test_checkpoint_inside_a_scan_with_gradients(form):
    stack = FORMS[form](weights((3, 6, 6)), batch_axes=1)
    x = jnp.asarray(weights((2, 6)))

    def loss(x, layers):
        @jax.checkpoint
        def step(x, leaf):
            return jnp.tanh(x @ leaf.decode()), None

        return jax.lax.scan(step, x, layers)[0].sum()

    def dense_loss(x, layers):
        for layer in layers:
            x = jnp.tanh(x @ layer)
        return x.sum()

    got = users_jit(jax.grad(loss))(x, stack)
    want = users_jit(jax.grad(dense_loss))(x, jnp.asarray(reference(stack)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FLAT)
def test_donated_buffers(form):
    leaf = FORMS[form](weights((4, 6)))
    dense, text = reference(leaf), repr(leaf)
    mine = jax.tree.map(jnp.array, leaf)
    moved = jax.jit(lambda leaf: leaf, donate_argnums=0)(mine)
    equal(moved.decode(), dense)
    assert all(field.is_deleted() for field in jax.tree.leaves(mine))
    assert "\n" not in repr(mine)
    assert mine.shape == (4, 6)
    assert mine.nbytes == leaf.nbytes
    assert repr(leaf) == text


@pytest.mark.parametrize("form", FLAT)
def test_tree_map_and_device_put(form):
    tree = {"w": FORMS[form](weights((4, 6))), "b": jnp.ones(3)}
    same_tree(jax.tree.map(lambda x: x, tree), tree)
    there = jax.device_put(tree, jax.devices()[3])
    assert all(field.devices() == {jax.devices()[3]} for field in jax.tree.leaves(there))
    equal(there["w"].decode(), reference(tree["w"]))
    assert there["w"].decode().devices() == {jax.devices()[3]}
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert len(set(paths)) == len(paths)
    assert any(path.startswith("['w'].") for path in paths)
    flat, treedef = jax.tree.flatten(tree)
    same_tree(jax.tree.unflatten(treedef, flat), tree)
    masks = jax.tree.map(lambda _: True, tree)
    assert jax.tree.leaves(masks) == [True] * len(flat)


def test_control_flow():
    a, b = quantized(weights((4, 6))), quantized(weights((4, 6), seed=1))

    @jax.jit
    def pick(flag):
        leaf = jax.lax.cond(flag, lambda: a, lambda: b)
        leaf = jax.lax.fori_loop(0, 2, lambda _, leaf: leaf, leaf)
        return jax.tree.map(functools.partial(jnp.where, flag), leaf, b).decode()

    equal(pick(True), reference(a))
    equal(pick(False), reference(b))


def test_decoding_is_fused_where_it_is_used():
    # Twenty 32-bit copies of the weights would undo what packing saves.
    leaf = quantized(weights((256, 256)), 4)
    compiled = jax.jit(lambda leaf, x: leaf.decode() * x).lower(leaf, jnp.float32(2)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 256 * 256


def test_decoding_runs_under_disable_jit():
    for form in ("int4", "sparse", "2:4"):
        leaf = FORMS[form](weights((4, 6)))
        with jax.disable_jit():
            equal(leaf.decode(), reference(leaf))
