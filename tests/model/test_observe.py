"""Observed statistics against the inputs that each layer is known to have."""

import collections
import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxcomp.model.observe import observe
from jaxcomp.model.statistics import absmax, histogram, mean_square, minmax, second_moment
from tests.model.cases import randomize


def normal(*shape, seed=0):
    return jax.device_put(
        np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)
    )


def moment(x):
    """The second moment of samples, in float64."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.T @ x / len(x)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.max(np.abs(expected)))


# A layer is linear in its kernel, so its Jacobian by the kernel holds its input: an oracle that
# knows nothing of dimension numbers, strides or padding.


class Layer(NamedTuple):
    apply: Any
    kernel: tuple[int, ...]
    data: tuple[int, ...]
    outputs: tuple[int, ...]  # which axes of the kernel are its outputs
    features: int  # how many axes of the layer's result are its channels
    groups: int = 1


def conv(layout, **options):
    def apply(w, x):
        arguments = {"window_strides": (1, 1), "padding": "SAME"} | options
        return lax.conv_general_dilated(x, w, dimension_numbers=layout, **arguments)

    return apply


HWIO = ("NHWC", "HWIO", "NHWC")
LAYERS = {
    "dense": Layer(lambda w, x: x @ w, (3, 4), (2, 5, 3), (1,), 1),
    "transposed": Layer(lambda w, x: x @ w.T, (4, 3), (5, 3), (0,), 1),
    "weight first": Layer(lambda w, x: (w @ x.T).T, (4, 3), (5, 3), (0,), 1),
    "into heads": Layer(lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (3, 2, 4), (5, 3), (1, 2), 2),
    "out of heads": Layer(
        lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), (2, 4, 3), (5, 2, 4), (2,), 1
    ),
    "out of transposed heads": Layer(
        lambda w, x: jnp.einsum("bdh,hdo->bo", x, w), (2, 4, 3), (5, 4, 2), (2,), 1
    ),
    "inputs last and first": Layer(
        lambda w, x: jnp.einsum("bij,joi->bo", x, w), (4, 5, 3), (6, 3, 4), (1,), 1
    ),
    "joined by a reshape": Layer(
        lambda w, x: x @ w.reshape(8, 3).astype(jnp.float32), (2, 4, 3), (5, 8), (2,), 1
    ),
    "split by a reshape": Layer(
        lambda w, x: jnp.einsum("bhd,hdo->bo", x, w.reshape(2, 4, 3)), (8, 3), (5, 2, 4), (1,), 1
    ),
    "turned around": Layer(lambda w, x: x @ w[::-1], (3, 4), (5, 3), (1,), 1),
    "some outputs": Layer(lambda w, x: x @ jnp.split(w, 2, 1)[1], (3, 8), (5, 3), (1,), 1),
    "conv": Layer(conv(HWIO), (3, 2, 4, 5), (2, 4, 5, 4), (3,), 1),
    "conv strides": Layer(
        conv(HWIO, window_strides=(2, 3), padding="VALID"), (3, 2, 4, 5), (2, 5, 6, 4), (3,), 1
    ),
    "conv dilated": Layer(conv(HWIO, rhs_dilation=(2, 1)), (3, 3, 2, 3), (2, 6, 5, 2), (3,), 1),
    "conv from spread image": Layer(
        conv(HWIO, lhs_dilation=(2, 3), padding=((1, 2), (-1, 3))),
        (3, 2, 2, 3),
        (1, 4, 5, 2),
        (3,),
        1,
    ),
    "conv transposed": Layer(
        lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME", transpose_kernel=True),
        (3, 3, 4, 2),
        (2, 3, 3, 2),
        (2,),
        1,
    ),
    "conv OIHW": Layer(
        lambda w, x: jnp.moveaxis(conv(("NCHW", "OIHW", "NCHW"))(w, x), 1, -1),
        (5, 4, 3, 2),
        (2, 4, 5, 6),
        (0,),
        1,
    ),
    "conv of one axis": Layer(
        lambda w, x: lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, 2, 4),
        (2, 7, 2),
        (2,),
        1,
    ),
    "conv grouped": Layer(
        conv(HWIO, feature_group_count=3), (2, 2, 2, 6), (2, 4, 4, 6), (3,), 1, groups=3
    ),
    "conv depthwise": Layer(
        conv(HWIO, feature_group_count=4), (3, 3, 1, 8), (2, 4, 4, 4), (3,), 1, groups=4
    ),
}


def samples(layer, kernel, x):
    """(groups, samples, features) from the Jacobian of one output channel of each group."""
    jacobian = np.asarray(jax.jit(jax.jacrev(layer.apply))(kernel, x), np.float64)
    result = jax.eval_shape(layer.apply, kernel, x).shape
    rows = math.prod(result[: len(result) - layer.features])
    jacobian = jacobian.reshape(rows, -1, *kernel.shape)
    outputs = tuple(2 + axis for axis in layer.outputs)
    jacobian = np.moveaxis(jacobian, outputs, range(2, 2 + len(outputs)))
    width = math.prod(layer.kernel[axis] for axis in layer.outputs)
    jacobian = jacobian.reshape(rows, -1, width, kernel.size // width)
    found = []
    for group in range(layer.groups):
        output = (group + 1) * (width // layer.groups) - 1
        # That output of the layer that depends on this output channel of the kernel.
        where = np.argmax(np.abs(jacobian[:, :, output]).sum((0, 2)))
        found.append(jacobian[:, where, output])
    return np.stack(found)


@pytest.mark.parametrize("name", LAYERS)
def test_second_moment_is_that_of_the_jacobian(name):
    layer = LAYERS[name]
    kernel, x = normal(*layer.kernel), normal(*layer.data, seed=1)
    found = observe(lambda p, x: layer.apply(p["w"], x), {"w": kernel}, [x], second_moment())
    expected = np.stack([moment(group) for group in samples(layer, kernel, x)])
    assert not found.unobserved
    close(found["w"], expected if layer.groups > 1 else expected[0])


@pytest.mark.parametrize(
    "name", ["out of transposed heads", "inputs last and first", "turned around"]
)
def test_channels_of_a_dot_are_in_the_order_of_the_leaf(name):
    layer = LAYERS[name]
    kernel, x = normal(*layer.kernel), normal(*layer.data, seed=1)
    found = observe(lambda p, x: layer.apply(p["w"], x), {"w": kernel}, [x], minmax())["w"]
    (expected,) = samples(layer, kernel, x)
    close(found.minimum, expected.min(0))
    close(found.maximum, expected.max(0))


def test_channels_of_a_convolution_are_those_of_the_image():
    x = normal(2, 6, 7, 4, seed=1)
    layer = LAYERS["conv grouped"]
    plain = observe(conv(HWIO), normal(3, 2, 4, 5), [x], mean_square())[""]
    close(plain, np.mean(np.asarray(x, np.float64) ** 2, (0, 1, 2)))
    x = normal(*layer.data)
    grouped = observe(layer.apply, normal(*layer.kernel), [x], absmax())[""]
    close(grouped, np.abs(np.asarray(x)).max((0, 1, 2)).reshape(3, 2))


# Frameworks.


class Cnn(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, dtype=self.dtype, name="stem")(x))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=2, dtype=self.dtype, name="mix")(x))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(3, dtype=self.dtype, name="head")(nn.LayerNorm(name="norm")(x))


def captured(model, params, *inputs):
    """What each Linen module was called with."""

    @jax.jit
    def run(params, *inputs):
        seen = collections.defaultdict(list)

        def spy(call, args, kwargs, context):
            if context.method_name == "__call__" and args:
                seen["/".join(context.module.path)].append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(spy):
            model.apply(params, *inputs)
        return dict(seen)

    return run(params, *inputs)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_linen_layers(dtype):
    model = Cnn(dtype)
    batches = [normal(2, 6, 6, 3, seed=seed) for seed in range(2)]
    params = randomize(jax.eval_shape(model.init, jax.random.key(0), batches[0]))
    found = observe(model.apply, params, batches, mean_square())
    call = captured(model, params, np.concatenate(batches))
    for name, groups in [("stem", 1), ("mix", 2), ("head", 1)]:
        x = np.asarray(jnp.asarray(call[name][0], dtype), np.float64)
        x = x.reshape(-1, x.shape[-1])
        value = found[f"params/{name}/kernel"]
        assert value.dtype == jnp.float32
        assert value.shape == ((2, 2) if groups == 2 else x.shape[1:])
        np.testing.assert_allclose(value.ravel(), np.mean(x**2, 0), rtol=2e-2 if dtype else 1e-5)
    leaves = {"stem/bias", "mix/bias", "head/bias", "norm/bias", "norm/scale"}
    assert set(found.unobserved) == {f"params/{leaf}" for leaf in leaves}


def test_attention():
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=5)
    x = normal(2, 4, 3)
    params = randomize(jax.eval_shape(model.init, jax.random.key(1), x))
    found = observe(model.apply, params, [x], second_moment())
    calls = captured(model, params, x)
    for name in ("query", "key", "value"):
        close(found[f"params/{name}/kernel"], moment(x))
    mixed = calls["out"][0]
    assert mixed.shape == (2, 4, 2, 3)
    close(found["params/out/kernel"], moment(mixed.reshape(2, 4, 6)))


def test_nnx_equinox_and_plain_functions_agree():
    w0, w1, x = normal(4, 6), normal(6, 3), normal(5, 4, seed=2)
    hidden = np.maximum(np.asarray(x, np.float64) @ np.asarray(w0, np.float64), 0)
    expected = {"first": moment(x), "second": moment(hidden)}

    def plain(params, x):
        return jax.nn.relu(x @ params["first"]) @ params["second"]

    class Pair(nnx.Module):
        def __init__(self):
            linear = functools.partial(nnx.Linear, use_bias=False, rngs=nnx.Rngs(0))
            self.first = linear(4, 6, kernel_init=lambda *_: w0)
            self.second = linear(6, 3, kernel_init=lambda *_: w1)

        def __call__(self, x):
            return self.second(jax.nn.relu(self.first(x)))

    graph, state = nnx.split(Pair())
    unbiased = {"use_bias": False, "use_final_bias": False}
    mlp = eqx.filter_eval_shape(eqx.nn.MLP, 4, 3, 6, 1, **unbiased, key=jax.random.key(0))
    leaves = lambda m: [m.layers[0].weight, m.layers[1].weight]
    arrays, static = eqx.partition(eqx.tree_at(leaves, mlp, [w0.T, w1.T]), eqx.is_array)
    runs = [
        (plain, {"first": w0, "second": w1}),
        (lambda s, x: nnx.merge(graph, s)(x), state),
        (lambda a, x: jax.vmap(eqx.combine(a, static))(x), arrays),
    ]
    for apply_fn, params in runs:
        first, second = observe(apply_fn, params, [x], second_moment()).values()
        close(first, expected["first"])
        close(second, expected["second"])


# Control flow.


def test_turns_of_a_loop_count_together():
    params = {"x": normal(3, 4), "h": normal(4, 4)}

    def rnn(params, x):
        turn = lambda h, x: (jnp.tanh(x @ params["x"] + h @ params["h"]), None)
        return lax.scan(turn, jnp.zeros((x.shape[1], 4)), x)[0]

    batches = [normal(7, 2, 3, seed=5), normal(7, 2, 3, seed=6)]
    states = []
    for x in batches:
        h = np.zeros((2, 4))
        for step in x:
            states.append(h)
            h = np.tanh(np.asarray(step) @ params["x"] + h @ params["h"])
    found = observe(rnn, params, batches, second_moment())
    close(found["x"], moment(np.concatenate(batches)))
    close(found["h"], moment(np.stack(states)))
    counts = observe(rnn, params, batches, histogram())["x"].counts
    assert counts.sum() == 2 * 7 * 2 * 3


@pytest.mark.parametrize(("reverse", "remat"), [(False, False), (True, True)])
def test_layers_of_a_scan_have_a_value_each(reverse, remat):
    params = normal(5, 4, 4)

    def model(params, x):
        layer = lambda x, w: (jnp.sin(x @ w), jnp.sum(x))
        layer = jax.checkpoint(layer) if remat else layer
        return lax.scan(layer, x, params, reverse=reverse)

    x = normal(3, 4, seed=1)
    h, expected = np.asarray(x), {}
    for i in reversed(range(5)) if reverse else range(5):
        expected[i] = moment(h)
        h = np.sin(h @ np.asarray(params[i]))
    found = observe(model, params, [x], second_moment())[""]
    close(found, np.stack([expected[i] for i in range(5)]))


def test_nested_loops():
    """Walked by both loops, by the inner one, by the outer one and by none."""
    params = {
        "both": normal(2, 3, 4, 4),
        "inner": normal(3, 4, 4),
        "outer": normal(2, 4, 4),
        "none": normal(4, 4),
    }

    def model(params, x):
        def inner(x, slices):
            both, inner, outer = slices[0], slices[1], slices[2]
            for w in (both, inner, outer, params["none"]):
                x = jnp.sin(x @ w)
            return x, None

        def outer(x, slices):
            both, own = slices
            turn = lambda x, weights: inner(x, (*weights, own))
            return lax.scan(turn, x, (both, params["inner"]))

        return lax.scan(outer, x, (params["both"], params["outer"]))[0]

    x = normal(3, 4, seed=1)
    h = np.asarray(x)
    seen = collections.defaultdict(list)
    for i in range(2):
        for j in range(3):
            for name, at in (("both", (i, j)), ("inner", (j,)), ("outer", (i,)), ("none", ())):
                seen[(name, at)].append(h)
                h = np.sin(h @ np.asarray(params[name][at]))
    found = observe(model, params, [x], second_moment())
    assert not found.unobserved
    for (name, at), inputs in seen.items():
        close(found[name][at], moment(np.stack(inputs)))


def test_a_weight_walked_by_one_loop_and_again_by_a_loop_inside():
    def model(params, x):
        again = lambda h, w: (jnp.sin(h @ w), None)
        layer = lambda h, w: (lax.scan(again, jnp.cos(h @ w), params)[0], None)
        return lax.scan(layer, x, params)[0]

    params, x = normal(2, 4, 4), normal(3, 4, seed=1)
    h, outer, inner = np.asarray(x), [], [[], []]
    for w in np.asarray(params):
        outer.append(moment(h))
        h = np.cos(h @ w)
        for i, v in enumerate(np.asarray(params)):
            inner[i].append(h)
            h = np.sin(h @ v)
    found = observe(model, params, [x], second_moment())
    assert list(found) == ["", "#2"]
    close(found[""], np.stack(outer))
    close(found["#2"], np.stack([moment(np.stack(inputs)) for inputs in inner]))


def test_while_loops():
    def model(w, x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1] @ w)), (0, x))

    w, x = normal(4, 4), normal(2, 4, seed=1)
    h, states = np.asarray(x), []
    for _ in range(3):
        states.append(h)
        h = np.sin(h @ np.asarray(w))
    close(observe(model, w, [x], second_moment())[""], moment(np.stack(states)))


def test_only_the_branch_that_is_taken_counts():
    def model(params, x):
        left = lambda x: x @ params["left"]
        right = lambda x: (2 * x) @ params["right"]
        return lax.cond(x[0, 0] > 0, left, right, x)

    params = {"left": normal(3, 3), "right": normal(3, 3)}
    positive, negative = jnp.full((2, 3), 1.5), jnp.full((2, 3), -1.5)
    found = observe(model, params, [positive, 2 * positive, negative], absmax())
    np.testing.assert_array_equal(found["left"], np.full(3, 3.0))
    np.testing.assert_array_equal(found["right"], np.full(3, 3.0))
    found = observe(model, params, [positive], absmax())
    assert list(found) == ["left"]
    assert "no batch led to" in found.unobserved["right"]


def test_custom_derivatives_and_calls():
    @jax.custom_vjp
    def layer(w, x):
        return jax.jit(jnp.dot)(x, w)

    layer.defvjp(lambda w, x: (layer(w, x), (w, x)), lambda saved, g: saved)

    @jax.custom_jvp
    def other(w, x):
        return x @ w

    other.defjvps(lambda t, y, w, x: x @ t, lambda t, y, w, x: t @ w)
    w, x = normal(3, 3), normal(5, 3, seed=1)
    for function in (layer, other, jax.checkpoint(layer)):
        close(observe(function, w, [x], second_moment())[""], moment(x))


def test_vmapped_models():
    w, x = normal(3, 4), normal(5, 3, seed=1)
    by_example = jax.vmap(lambda w, x: x @ w, in_axes=(None, 0))
    close(observe(by_example, w, [x], second_moment())[""], moment(x))
    members, inputs = normal(2, 3, 4), normal(2, 5, 3, seed=1)
    ensemble = jax.vmap(lambda w, x: x @ w)
    found = observe(ensemble, members, [inputs], second_moment())[""]
    close(found, np.stack([moment(inputs[0]), moment(inputs[1])]))
    kernels, images = normal(2, 2, 1, 4, 6), normal(2, 1, 3, 3, 8, seed=1)
    grouped = conv(HWIO, feature_group_count=2)
    found = observe(jax.vmap(grouped), kernels, [images], second_moment())[""]
    assert found.shape == (2, 2, 8, 8)
    for i in range(2):
        close(found[i], observe(grouped, kernels[i], [images[i]], second_moment())[""])


def test_experts_and_low_rank_factors():
    params = {"experts": normal(3, 4, 5), "down": normal(5, 2), "up": normal(2, 5)}

    def model(params, x):
        x = jnp.einsum("ecd,edf->ecf", x, params["experts"])
        return x + x @ params["down"] @ params["up"]

    x = normal(3, 6, 4, seed=1)
    hidden = np.einsum("ecd,edf->ecf", x, params["experts"])
    found = observe(model, params, [x], second_moment())
    close(found["experts"], np.stack([moment(x[i]) for i in range(3)]))
    close(found["down"], moment(hidden))
    close(found["up"], moment(hidden @ np.asarray(params["down"])))


def test_batch_axes_come_in_the_order_of_the_leaf():
    w, x = normal(2, 3, 4, 5), normal(3, 2, 6, 4, seed=1)

    def model(w, x):
        numbers = (((3,), (2,)), ((0, 1), (1, 0)))
        return lax.dot_general(x, w, numbers)

    found = observe(model, w, [x], second_moment())[""]
    assert found.shape == (2, 3, 4, 4)
    for i in range(2):
        for j in range(3):
            close(found[i, j], moment(x[j, i]))


def test_what_is_done_to_a_weight_does_not_change_its_input():
    w, x = normal(3, 4), normal(5, 3, seed=1)
    mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 4)), jnp.float32)
    for change in (
        lambda w: w * mask,
        lambda w: w / jnp.linalg.norm(w, axis=0),
        lambda w: jnp.round(w * 4) / 4,
        lambda w: w.astype(jnp.float16).astype(jnp.float32),
    ):
        found = observe(lambda w, x: x @ change(w), w, [x], second_moment())  # noqa: B023
        assert not found.unobserved
        close(found[""], moment(x))


# Tied weights and embeddings.


def test_a_tied_embedding_is_looked_up_and_then_multiplied():
    table, ids = normal(7, 4), jnp.array([[1, 1, 6], [0, 1, -1]])

    def model(params, ids):
        return jnp.tanh(params["table"][ids]) @ params["table"].T

    found = observe(model, {"table": table}, [ids], mean_square())
    assert list(found) == ["table", "table#2"]
    np.testing.assert_allclose(found["table"], np.array([1, 3, 0, 0, 0, 0, 2]) / 6, rtol=1e-6)
    hidden = np.tanh(np.asarray(table, np.float64))[np.asarray(ids)]
    close(found["table#2"], np.mean(hidden**2, (0, 1)))
    found = observe(model, {"table": table}, [ids], second_moment())
    assert list(found) == ["table#2"]
    assert "looked up" in found.unobserved["table"]


LOOKUPS = {
    "by index": lambda table, ids: table[ids],
    "by example": lambda table, ids: jax.vmap(lambda i: table[i])(ids),
    "by slice": lambda table, ids: lax.map(lambda i: table[i], ids),
    "by name": lambda table, ids: jnp.take(table.T, ids, axis=1),
    "one-hot": lambda table, ids: jax.nn.one_hot(ids, len(table)) @ table,
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_rows_of_an_embedding_are_counted(name):
    batches = [jnp.array([0, 1, 1, 4]), jnp.array([4, 4, 1, 4])]
    found = observe(LOOKUPS[name], normal(5, 3), batches, mean_square())[""]
    np.testing.assert_allclose(found, np.array([1, 3, 0, 0, 4]) / 8)


@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_rows_outside_of_an_embedding(mode):
    def model(table, ids):
        return jnp.take(table, ids, axis=0, mode=mode)

    found = observe(model, normal(3, 2), [jnp.array([0, 2, 2, 5])], mean_square())[""]
    np.testing.assert_allclose(found, [0.25, 0, 0.75 if mode == "clip" else 0.5])


def test_uses_of_a_weight_are_one_if_they_see_the_same_features():
    w, x = normal(4, 4), normal(5, 4, seed=1)

    def same(w, x):
        return jnp.sin(x @ w) @ w

    hidden = np.sin(np.asarray(x, np.float64) @ np.asarray(w))
    found = observe(same, w, [x], second_moment())
    assert list(found) == [""]
    close(found[""], moment(np.concatenate([x, hidden])))
    found = observe(lambda w, x: jnp.sin(x @ w) @ w.T, w, [x], second_moment())
    assert list(found) == ["", "#2"]
    close(found[""], moment(x))
    close(found["#2"], moment(hidden))
