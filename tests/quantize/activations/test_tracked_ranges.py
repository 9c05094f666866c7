"""Ranges that follow a moving average: the average itself, its state, and freezing it."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor
from jaxcomp.quantize.activations.bounds import fake_quant_within
from jaxcomp.quantize.activations.dynamic import activations
from jaxcomp.quantize.activations.tracked import track_ranges

RNG = np.random.default_rng(1)
AFFINE = Format(8, symmetric=False, granularity=PerTensor())


def normal(*shape):
    return jax.device_put(RNG.normal(size=shape).astype(np.float32))


PARAMS = {"first": normal(6, 8), "second": normal(8, 3)}
BATCHES = [normal(4, 6) * scale for scale in (1.0, 4.0, 0.5, 2.0)]


def mlp(params, x):
    return jax.nn.relu(x @ params["first"]) @ params["second"]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_average_is_that_of_the_extremes_without_bias(decay):
    tracked = track_ranges(mlp, PARAMS, BATCHES[0], format=AFFINE, decay=decay)
    state = tracked.init()
    sums, weight = np.zeros(2), 0.0
    for x in BATCHES:
        _, state = tracked(PARAMS, state, x)
        sums = decay * sums + (1 - decay) * np.array([x.min(), x.max()], np.float64)
        weight = decay * weight + (1 - decay)
    bounds = tracked.freeze(state)["first"]
    np.testing.assert_allclose(jnp.ravel(jnp.array(bounds)), sums / weight, rtol=1e-5)
    assert state["first"].times == len(BATCHES)
    assert np.all(tracked.freeze(state)["second"].low == 0)


def test_frozen_ranges_compute_what_the_last_step_did():
    tracked = track_ranges(mlp, PARAMS, BATCHES[0], decay=0.5)
    step = jax.jit(tracked)
    state = tracked.init()
    for x in BATCHES:
        outputs, state = step(PARAMS, state, x)
    frozen = activations(mlp, PARAMS, x, ranges=tracked.freeze(state))
    np.testing.assert_array_equal(jax.jit(frozen)(PARAMS, x), outputs)
    assert step._cache_size() == 1
    # Inside a jitted step too, where ranges are not known.
    inside = jax.jit(lambda s: activations(mlp, PARAMS, x, ranges=tracked.freeze(s))(PARAMS, x))
    np.testing.assert_array_equal(inside(state), outputs)


def test_until_it_begins_nothing_is_rounded():
    tracked = track_ranges(mlp, PARAMS, BATCHES[0], format=Format(2, True, PerTensor()), begin=2)
    state = tracked.init()
    for number, x in enumerate(BATCHES):
        outputs, state = tracked(PARAMS, state, x)
        error = jnp.abs(outputs - mlp(PARAMS, x)).max()
        assert (error < 1e-5) == (number < 2)


def test_the_state_goes_through_a_scan_with_gradients():
    tracked = track_ranges(mlp, PARAMS, BATCHES[0], decay=0.5)
    tx = optax.sgd(0.01)

    def step(carry, x):
        params, opt_state, state = carry

        def loss(params):
            outputs, new = tracked(params, state, x)
            return (outputs**2).mean(), new

        grads, state = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state, state), grads

    carry = (PARAMS, tx.init(PARAMS), tracked.init())
    scanned, grads = jax.jit(lambda c: jax.lax.scan(step, c, jnp.stack(BATCHES)))(carry)
    one = jax.jit(step, donate_argnums=0)
    carry = jax.tree.map(jnp.copy, carry)
    for x in BATCHES:
        carry, last = one(carry, x)
    for a, b in zip(
        jax.tree.leaves((scanned, jax.tree.map(lambda g: g[-1], grads))),
        jax.tree.leaves((carry, last)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert all(jnp.any(g) for g in jax.tree.leaves(last))


def layers(params, x):
    return jax.lax.scan(lambda h, w: (2 * jnp.tanh(h @ w), None), x, params["w"])[0]


def recurrent(params, x):
    return jax.lax.scan(lambda h, _: (2 * (h @ params["w"]), None), x, length=3)[0]


def test_layers_own_ranges_and_turns_share_one():
    params = {"w": normal(3, 6, 6)}
    tracked = track_ranges(layers, params, BATCHES[0])
    _, state = tracked(params, tracked.init(), BATCHES[1])
    entry = state["w"]
    assert entry.bounds.high.shape == (3, 1, 1)
    np.testing.assert_array_equal(entry.times, [1, 1, 1])
    np.testing.assert_allclose(entry.bounds.high[0, 0, 0], jnp.abs(BATCHES[1]).max())
    assert jnp.all(entry.bounds.high[1:] <= 2)

    params = {"w": jnp.eye(6)}
    tracked = track_ranges(recurrent, params, BATCHES[0], decay=0.5)
    _, state = tracked(params, tracked.init(), BATCHES[0])
    most = jnp.abs(BATCHES[0]).max()
    assert state["w"].times == 3
    # The second turn meets 2 and clips it at (1 + 2·2) / 3, so that the third meets 10/3.
    wanted = most * (1 + 2 * 2 + 4 * 10 / 3) / 7
    np.testing.assert_allclose(state["w"].bounds.high, [[wanted]], rtol=0.01)


def test_a_channel_that_is_no_contracted_one_has_a_range_of_its_own():
    x = normal(2, 3, 4, 5)

    def attend(params, x):
        return jnp.einsum("bhqd,bhkd->bhqk", x * params["g"], x)

    format = Format(8, granularity=PerChannel(1))
    tracked = track_ranges(attend, {"g": jnp.ones(5)}, x, format=format)
    _, state = tracked({"g": jnp.ones(5)}, tracked.init(), x)
    for entry in state.values():
        np.testing.assert_allclose(entry.bounds.high.ravel(), jnp.abs(x).max((0, 2, 3)))


def test_what_lies_outside_the_average_is_clipped_and_gets_no_gradient():
    tracked = track_ranges(lambda p, x: x @ p, jnp.eye(6), BATCHES[0], decay=0.9)
    _, state = tracked(jnp.eye(6), tracked.init(), BATCHES[0])
    x = 10 * BATCHES[0]
    grad, (outputs, state) = jax.grad(
        lambda x: (lambda out: (out[0].sum(), out))(tracked(jnp.eye(6), state, x)), has_aux=True
    )(x)
    (bounds,) = tracked.freeze(state).values()
    assert bounds.high < jnp.abs(x).max()
    np.testing.assert_array_equal(
        outputs, fake_quant_within(x, bounds, Format(8, granularity=PerTensor()))
    )
    step = bounds.high / 127
    np.testing.assert_array_equal(grad, jnp.abs(x) <= bounds.high + step / 2)


def test_values_that_are_not_finite_leave_the_average():
    tracked = track_ranges(mlp, PARAMS, BATCHES[0])
    _, state = tracked(PARAMS, tracked.init(), BATCHES[0])
    outputs, after = tracked(PARAMS, state, BATCHES[0].at[0, 0].set(jnp.nan))
    np.testing.assert_array_equal(after["first"].bounds.high, state["first"].bounds.high)
    assert jnp.all(jnp.isnan(outputs[0]))


def test_batches_spread_over_devices():
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        x = jax.device_put(BATCHES[1], NamedSharding(mesh, P("data", None)))
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        tracked = track_ranges(mlp, PARAMS, BATCHES[0])
        start = jax.device_put(tracked.init(), NamedSharding(mesh, P()))
        outputs, state = jax.jit(tracked)(params, start, x)
        wanted, wanted_state = tracked(PARAMS, tracked.init(), BATCHES[1])
        np.testing.assert_allclose(outputs, wanted, rtol=1e-4, atol=1e-4)
        high = wanted_state["second"].bounds.high
        np.testing.assert_allclose(state["second"].bounds.high, high, rtol=1e-5)


def test_messages():
    x = BATCHES[0]
    with pytest.raises(ValueError, match=r"decay is 1.0: from 0 to below 1"):
        track_ranges(mlp, PARAMS, x, decay=1.0)
    with pytest.raises(ValueError, match="begin is -1"):
        track_ranges(mlp, PARAMS, x, begin=-1)
    with pytest.raises(ValueError, match=r"first: PerGroup.* found anew in each call"):
        track_ranges(mlp, PARAMS, x, format=Format(4, granularity=PerGroup(2, -1)))
    tracked = track_ranges(mlp, PARAMS, x)
    with pytest.raises(ValueError, match="begin with its init"):
        tracked(PARAMS, {}, x)
    with pytest.raises(ValueError, match="first: no step led to it"):
        tracked.freeze(tracked.init())
    with pytest.raises(TypeError, match="decay must be a number"):
        inspect.unwrap(track_ranges)(mlp, PARAMS, x, decay="0.9")
    assert "first" in str(tracked)
