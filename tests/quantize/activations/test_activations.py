"""Rounded activations against numbers worked out apart, and through every transformation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor, fake_quant, train
from jaxcomp.quantize.activations.bounds import Bounds
from jaxcomp.quantize.activations.dynamic import activations

RNG = np.random.default_rng(0)
INT8 = Format(8, granularity=PerTensor())


def normal(*shape, dtype=np.float32):
    return jax.device_put(RNG.normal(size=shape).astype(dtype))


def mlp(params, x):
    return jax.nn.relu(x @ params["first"]) @ params["second"]


PARAMS = {"first": normal(6, 8), "second": normal(8, 3)}
X = normal(4, 6)


def rounded64(x, bits, symmetric, axis=None):
    """Fake quantization in float64, by the definition."""
    x = np.asarray(x, np.float64)
    if symmetric:
        scale = np.max(np.abs(x), axis, keepdims=True) / (2 ** (bits - 1) - 1)
        scale = np.where(scale == 0, 1, scale)
        return np.round(x / scale) * scale
    low = np.minimum(np.min(x, axis, keepdims=True), 0)
    high = np.maximum(np.max(x, axis, keepdims=True), 0)
    scale = np.where(low == high, 1, (high - low) / (2**bits - 1))
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "axis"), [(PerTensor(), None), (PerChannel(0), 1)])
def test_both_products_read_what_the_definition_says(bits, symmetric, granularity, axis):
    run = activations(mlp, PARAMS, X, format=Format(bits, symmetric, granularity))
    first, second = (np.asarray(PARAMS[name], np.float64) for name in ("first", "second"))
    hidden = np.maximum(rounded64(X, bits, symmetric, axis) @ first, 0)
    expected = rounded64(hidden, bits, symmetric, axis) @ second
    np.testing.assert_allclose(run(PARAMS, X), expected, rtol=2e-5, atol=2e-5)
    assert list(run.points) == ["first", "second"]
    assert not run.left_out


def test_gradients_pass_straight_through_a_range_that_holds_all():
    run = activations(lambda p, x: (x @ p["first"]) @ p["second"], PARAMS, X, format=INT8)
    grads, dx = jax.grad(lambda p, x: run(p, x).sum(), argnums=(0, 1))(PARAMS, X)
    seen = rounded64(X, 8, True)
    first, second = (np.asarray(PARAMS[name], np.float64) for name in ("first", "second"))
    out = np.ones((4, 3))
    np.testing.assert_allclose(
        grads["second"], rounded64(seen @ first, 8, True).T @ out, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(grads["first"], seen.T @ (out @ second.T), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, out @ second.T @ first.T, rtol=1e-4, atol=1e-5)


def test_no_gradient_where_a_given_range_clips():
    ranges = {"w": Bounds(jnp.array([[-0.5]]), jnp.array([[1.0]]))}
    w = normal(6, 2)
    affine = Format(4, symmetric=False, granularity=PerTensor())
    run = activations(lambda p, x: x @ p["w"], {"w": w}, X, format=affine, ranges=ranges)
    dx = jax.grad(lambda x: run({"w": w}, x).sum())(X)
    # The range ends half a step of 0.1 beyond its last levels.
    inside = (X > -0.55) & (X < 1.05)
    assert 0 < inside.mean() < 1
    np.testing.assert_allclose(dx, jnp.where(inside, w.sum(1), 0), rtol=1e-6)
    clipped = np.clip(X, -0.5, 1.0)
    np.testing.assert_allclose(run({"w": w}, X), clipped @ w, atol=1.5 / 15 * jnp.abs(w).sum())


def test_nothing_is_kept_for_the_gradient_of_a_range_that_holds_all():
    run = activations(lambda p, x: x @ p, normal(6, 2), X, format=INT8)
    grad = jax.jit(jax.grad(lambda p, x: run(p, x).sum(), argnums=1))
    text = grad.lower(normal(6, 2), X).compile().as_text()
    # No mask, and nothing is rounded: the gradient does not depend on the activation.
    assert "pred[" not in text
    assert "round-nearest" not in text


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x)).mean((1, 2))
        return nn.Dense(3, name="head")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.first(x)))


def linen_net():
    x = normal(2, 5, 5, 3)
    return Net().apply, Net().init(jax.random.key(0), x), x


def nnx_net():
    graph, state = nnx.split(NnxNet(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state, X


def plain_net():
    return mlp, PARAMS, X


@pytest.mark.parametrize("net", [linen_net, nnx_net, plain_net])
@pytest.mark.parametrize("weights", [Format(8), Format(3, False, PerGroup(2))])
def test_what_training_simulates_is_what_the_packed_model_computes(net, weights):
    apply_fn, params, x = net()
    if weights.bits == 3 and net is linen_net:
        weights = Format(3, False, PerGroup(2, axis=-1))
        params["params"].pop("head")
        apply_fn = lambda p, x: nn.Conv(4, (3, 3)).apply({"params": p["params"]["conv"]}, x)
    method = train(weights)
    state = method.init(params)
    run = activations(apply_fn, params, x, format=INT8)
    simulated = jax.jit(lambda p: run(method.apply(p, state), x))(params)
    packed = jax.jit(run)(method.pack(params, state), x)
    np.testing.assert_array_equal(simulated, packed)
    assert np.any(simulated != jax.jit(apply_fn)(params, x))


def test_examples_by_vmap_are_examples_of_a_batch():
    run = activations(mlp, PARAMS, X, format=Format(4, granularity=PerChannel(0)))
    one = activations(mlp, PARAMS, X[:1], format=Format(4, granularity=PerTensor()))
    each = jax.vmap(lambda row: one(PARAMS, row[None])[0])(X)
    np.testing.assert_allclose(each, run(PARAMS, X), rtol=1e-6)


def test_vmap_over_stacked_parameters():
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, -2 * leaf]), PARAMS)
    run = activations(mlp, PARAMS, X, format=INT8)
    both = jax.vmap(run, in_axes=(0, None))(stacked, X)
    for i in range(2):
        alone = run(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), X)
        np.testing.assert_allclose(both[i], alone, rtol=1e-5, atol=1e-6)


def layers(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def unrolled(params, x):
    for w in params["w"]:
        x = jnp.tanh(x @ w)
    return x


def test_a_scan_over_layers_is_the_layers_in_turn():
    params = {"w": normal(3, 6, 6)}
    # The unrolled one slices its leaf, whose path all three points have.
    scanned = activations(layers, params, X, format=INT8)
    in_turn = activations(unrolled, params, X, format=INT8)
    assert list(scanned.points) == ["w"]
    assert scanned.points["w"].layers == (3,)
    assert list(in_turn.points) == ["w", "w#2", "w#3"]
    np.testing.assert_allclose(scanned(params, X), in_turn(params, X), rtol=1e-5, atol=1e-6)
    grads = [
        jax.grad(lambda p, run=run: run(p, X).sum())(params)["w"] for run in (scanned, in_turn)
    ]
    np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-5)
    high = jnp.array([0.5, 1.0, 2.0])
    ranges = {"w": Bounds(-high[:, None, None], high[:, None, None])}
    each = {
        name: Bounds(-h.reshape(1, 1), h.reshape(1, 1))
        for name, h in zip(("w", "w#2", "w#3"), high, strict=True)
    }
    given = activations(layers, params, X, format=INT8, ranges=ranges)
    wanted = activations(unrolled, params, X, format=INT8, ranges=each)
    np.testing.assert_allclose(given(params, X), wanted(params, X), rtol=1e-5, atol=1e-6)


def test_rematerialization_changes_no_gradient():
    run = activations(mlp, PARAMS, X, format=INT8)
    again = activations(jax.checkpoint(mlp), PARAMS, X, format=INT8)
    wanted, got = (
        jax.jit(jax.grad(lambda p, f=f: (f(p, X) ** 2).sum()))(PARAMS) for f in (run, again)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, wanted)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_round_to_multiples_of_the_step(dtype):
    x = X.astype(dtype)
    run = activations(lambda p, x: x @ p, jnp.eye(6, dtype=dtype), x, format=INT8)
    np.testing.assert_array_equal(run(jnp.eye(6, dtype=dtype), x), fake_quant(x, INT8))


def test_it_is_traced_once_for_each_shape():
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return mlp(params, x)

    run = activations(counted, PARAMS, X, format=INT8)
    step = jax.jit(jax.grad(lambda p, x: run(p, x).sum()))
    for x in (X, 2 * X, X[:2], X[:2]):
        step(PARAMS, x)
        run(PARAMS, x)
    assert traces == [(4, 6), (2, 6)]
    assert step._cache_size() == 2


def test_a_function_of_values_of_a_trace_around_it():
    @jax.jit
    def outer(scale):
        run = activations(lambda p, x: (x @ p["first"]) * scale, PARAMS, X, format=INT8)
        return run(PARAMS, X) + run(PARAMS, X)

    alone = activations(lambda p, x: x @ p["first"], PARAMS, X, format=INT8)
    np.testing.assert_allclose(outer(3.0), 6 * alone(PARAMS, X), rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["dynamic", "given"])
def test_batches_spread_over_devices(kind, given):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    x = jax.device_put(X, NamedSharding(mesh, P("data", None)))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    bounds = Bounds(jnp.full((1, 1), -1.0), jnp.full((1, 1), 1.5))
    ranges = dict.fromkeys(PARAMS, bounds) if given else None
    affine = Format(8, symmetric=False, granularity=PerTensor())
    spread = activations(mlp, params, x, format=affine, ranges=ranges)
    whole = activations(mlp, PARAMS, X, format=affine, ranges=ranges)

    def value(run, params, x):
        return jax.jit(jax.value_and_grad(lambda p: (run(p, x) ** 2).sum()))(params)

    got, wanted = value(spread, params, x), value(whole, PARAMS, X)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, wanted)
    if kind == AxisType.Auto:
        text = jax.jit(spread).lower(params, x).compile().as_text()
        assert "all-gather" not in text
        assert ("all-reduce" in text) != given


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.relu(x))


def test_outputs_beside_the_logits_are_handed_on():
    model = Normed()
    variables = model.init(jax.random.key(0), X, train=False)

    def apply_fn(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    run = activations(apply_fn, variables, X, format=Format(2, granularity=PerTensor()))
    _, changed = jax.jit(run)(variables, X)
    kernel = variables["params"]["Dense_0"]["kernel"]
    mean = (fake_quant(X, Format(2, granularity=PerTensor())) @ kernel).mean(0)
    got = changed["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(got, 0.5 * mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [False, True], ids=["dynamic", "given"])
def test_nan_is_not_rounded_away(given):
    ranges = dict.fromkeys(PARAMS, Bounds(-jnp.ones((1, 1)), jnp.ones((1, 1)))) if given else None
    run = activations(mlp, PARAMS, X, format=INT8, ranges=ranges)
    out = run(PARAMS, X.at[1, 2].set(jnp.nan))
    assert jnp.all(jnp.isnan(out[1]))
