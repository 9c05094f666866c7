"""Leaves as matrices: samples times matrix is what the model computes with the leaf."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxcomp import tree as tree_lib
from jaxcomp.model.matrices import MatrixForm, from_matrix, matrix_forms, to_matrix
from jaxcomp.model.observe import observe
from jaxcomp.model.program import read
from jaxcomp.model.statistics import Statistic


def normal(*shape, seed=0):
    return jax.device_put(
        np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)
    )


def all_samples(count):
    """A statistic that keeps the samples themselves, of one batch."""
    return Statistic(
        name="samples",
        init=lambda features: jnp.zeros((count, features)),
        measure=lambda x: x.reshape(count, x.shape[-1]),
        merge=jnp.add,
        finish=lambda state: state,
        patches=True,
    )


def conv(layout, **options):
    arguments = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lambda w, x: lax.conv_general_dilated(x, w, dimension_numbers=layout, **arguments)


HWIO = ("NHWC", "HWIO", "NHWC")
# Layer, shape of leaf and data, and the result as (*groups, samples, outputs).
LAYERS = {
    "dense": (lambda w, x: x @ w, (3, 4), (2, 5, 3), lambda y: y.reshape(10, 4)),
    "transposed": (lambda w, x: x @ w.T, (4, 3), (5, 3), lambda y: y),
    "weight first": (lambda w, x: w @ x.T, (4, 3), (5, 3), lambda y: y.T),
    "outputs in two axes": (
        lambda w, x: jnp.einsum("bi,hid->bhd", x, w),
        (2, 3, 4),
        (5, 3),
        lambda y: y.reshape(5, 8),
    ),
    "out of heads": (
        lambda w, x: jnp.einsum("bdh,hdo->bo", x, w),
        (2, 4, 3),
        (5, 4, 2),
        lambda y: y,
    ),
    "inputs last and first": (
        lambda w, x: jnp.einsum("bij,joi->bo", x, w),
        (4, 5, 3),
        (6, 3, 4),
        lambda y: y,
    ),
    "split by a reshape": (
        lambda w, x: jnp.einsum("bhd,hdo->bo", x, w.reshape(2, 4, 3)),
        (8, 3),
        (5, 2, 4),
        lambda y: y,
    ),
    "turned around": (lambda w, x: x @ w[::-1], (3, 4), (5, 3), lambda y: y),
    "experts": (lambda w, x: jnp.einsum("ebi,eio->ebo", x, w), (2, 3, 4), (2, 5, 3), lambda y: y),
    "experts last": (
        lambda w, x: jnp.einsum("bei,ioe->beo", x, w),
        (3, 4, 2),
        (5, 2, 3),
        lambda y: jnp.moveaxis(y, 1, 0),
    ),
    "conv": (conv(HWIO), (3, 2, 4, 5), (2, 4, 5, 4), lambda y: y.reshape(-1, 5)),
    "conv strides": (
        conv(HWIO, window_strides=(2, 3), padding="VALID"),
        (3, 2, 4, 5),
        (2, 5, 6, 4),
        lambda y: y.reshape(-1, 5),
    ),
    "conv OIHW": (
        conv(("NCHW", "OIHW", "NCHW")),
        (5, 4, 3, 2),
        (2, 4, 5, 6),
        lambda y: jnp.moveaxis(y, 1, -1).reshape(-1, 5),
    ),
    "conv grouped": (
        conv(HWIO, feature_group_count=3),
        (2, 2, 2, 6),
        (2, 4, 4, 6),
        lambda y: jnp.moveaxis(y.reshape(-1, 3, 2), 1, 0),
    ),
    "conv depthwise": (
        conv(HWIO, feature_group_count=4),
        (3, 3, 1, 8),
        (2, 4, 4, 4),
        lambda y: jnp.moveaxis(y.reshape(-1, 4, 2), 1, 0),
    ),
    "conv grouped, groups inside": (
        # The leaf's outputs are (2 of each group, 3 groups): sorted by group they change places.
        lambda w, x: conv(HWIO, feature_group_count=3)(
            jnp.moveaxis(w.reshape(2, 2, 2, 2, 3), 3, 4).reshape(2, 2, 2, 6), x
        ),
        (2, 2, 2, 6),
        (2, 4, 4, 6),
        lambda y: jnp.moveaxis(y.reshape(-1, 3, 2), 1, 0),
    ),
    "vmapped grouped conv": (
        jax.vmap(conv(HWIO, feature_group_count=2)),
        (2, 2, 1, 4, 6),
        (2, 1, 3, 3, 8),
        lambda y: jnp.moveaxis(y.reshape(2, -1, 2, 3), 2, 1),
    ),
    "stacked layers": (
        lambda w, x: lax.scan(lambda c, wx: (c, wx[1] @ wx[0]), 0.0, (w, x))[1],
        (3, 4, 2),
        (3, 5, 4),
        lambda y: y,
    ),
    "stacked in the middle": (
        lambda w, x: lax.scan(lambda c, wx: (c, wx[1] @ wx[0]), 0.0, (jnp.moveaxis(w, 1, 0), x))[1],
        (4, 3, 2),
        (3, 5, 4),
        lambda y: y,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_samples_times_matrix_is_the_result(name):
    layer, leaf_shape, data_shape, arranged = LAYERS[name]
    leaf, x = normal(*leaf_shape), normal(*data_shape, seed=1)
    apply_fn = lambda p, x: layer(p["w"], x)
    expected = arranged(layer(leaf, x))
    form = matrix_forms(read(apply_fn, {"w": leaf}, x), ["w"])["w"]
    samples = observe(apply_fn, {"w": leaf}, [x], all_samples(expected.shape[-2]))["w"]
    matrix = to_matrix(form, leaf)
    assert matrix.shape == (*form.groups, form.features, form.outputs)
    found = jnp.einsum("...nf,...fo->...no", samples, matrix, precision="highest")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(from_matrix(form, matrix), leaf)


@st.composite
def forms(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    axes = draw(st.permutations(range(len(sizes))))
    a, b = sorted(draw(st.tuples(*[st.integers(0, len(sizes))] * 2)))
    outer, inputs, outputs = axes[:a], axes[a:b], axes[b:]
    width = math.prod(sizes[axis] for axis in outputs)
    inner = draw(st.sampled_from([n for n in range(1, width + 1) if width % n == 0]))
    columns = tuple(draw(st.permutations(range(width)))) if draw(st.booleans()) else None
    return MatrixForm(tuple(sizes), tuple(inputs), tuple(outputs), tuple(outer), inner, columns)


@settings(max_examples=10)
@given(forms())
def test_there_and_back(form):
    leaf = np.arange(math.prod(form.shape)).reshape(form.shape)
    matrix = to_matrix(form, leaf)
    assert matrix.shape == (*form.groups, form.features, form.outputs)
    back = from_matrix(form, matrix)
    assert back.dtype == matrix.dtype
    np.testing.assert_array_equal(back, leaf)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, feature_group_count=3, name="conv")(x))
        x = x.reshape(x.shape[0], -1, 6)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, name="mix")(x)
        return nn.Dense(3, name="head")(x.mean(1))


def test_leaves_of_a_model_in_the_order_of_its_program():
    x = normal(4, 6, 6, 3, seed=5)
    model = Net()
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    found = matrix_forms(read(model.apply, params, x), tree_lib.select(params))
    assert {path: (f.groups, f.features, f.outputs) for path, f in found.items()} == {
        "params/conv/kernel": ((3,), 9, 2),
        **{f"params/mix/{name}/kernel": ((), 6, 4) for name in ("query", "key", "value")},
        "params/mix/out/kernel": ((), 4, 6),
        "params/head/kernel": ((), 6, 3),
    }
    assert found["params/conv/kernel"].kernel_axes == (0, 1)
    names = [path.split("/")[-2] for path in found]
    assert names[0] == "conv"
    assert set(names[1:4]) == {"query", "key", "value"}
    assert names[4:] == ["out", "head"]


def test_nnx_and_shared_layers():
    class Twice(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(jnp.sin(self.layer(x)))

    graph, state = nnx.split(Twice())
    program = read(lambda s, x: nnx.merge(graph, s)(x), state, normal(2, 4))
    assert matrix_forms(program, ["layer/kernel"])["layer/kernel"].output_axes == (1,)


def shard_mapped(p, x):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    body = lambda w, x: x @ w
    return jax.shard_map(
        body, mesh=mesh, in_specs=(jax.sharding.PartitionSpec(), spec), out_specs=spec
    )(p["w"], x)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda p, x: p["w"][x[:, 0].astype(int)], "looked up"),
        (lambda p, x: x @ p["w"] + (x @ p["w"].T), r"disagree.*\(0,\).*\(1,\)"),
        (lambda p, x: x * p["w"], "contracts nothing"),
        (lambda p, x: x, "no output depends on it"),
        (lambda p, x: (x @ p["w"], p["w"]), "returned as it is"),
        (lambda p, x: x[:, :2] @ p["w"][:2], "reads a part of its axis 0 only"),
        (shard_mapped, "each device on its own part"),
    ],
)
def test_what_is_no_matrix_is_named(model, words):
    with pytest.raises(ValueError, match=rf"^w: .*{words}"):
        matrix_forms(read(model, {"w": normal(4, 4)}, normal(4, 4)), ["w"])


def test_all_that_are_no_matrix_are_named_at_once():
    params = {"embed": normal(5, 4), "kernel": normal(4, 3), "scale": normal(2, 3)}
    model = lambda p, i: (p["embed"][i] @ p["kernel"]) * p["scale"]
    program = read(model, params, jnp.array([0, 1]))
    with pytest.raises(ValueError, match=r"embed: .*; scale: .*leave out") as error:
        matrix_forms(program, params)
    assert "kernel:" not in str(error.value)
    with pytest.raises(ValueError, match=r"no leaf 'kernle'; nearest: kernel"):
        matrix_forms(program, ["kernle"])


def test_other_shapes_are_refused():
    form = MatrixForm((2, 3), (0,), (1,))
    with pytest.raises(ValueError, match=r"\(2, 3\), the array of \(3, 2\)"):
        to_matrix(form, normal(3, 2))
    with pytest.raises(ValueError, match=r"matrices \(2, 3\), the array is \(3, 2\)"):
        from_matrix(form, normal(3, 2))
