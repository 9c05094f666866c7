"""Hard-concrete gates against the paper's formulas in float64, their distribution, and training."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp import chain, partition, prune
from jaxcomp.arrays import BlockSparseArray, SparseArray
from jaxcomp.prune.structures import NM, Block, Channel, Element, Kernel
from jaxcomp.prune.training.hard_concrete import (
    expected_density,
    gate,
    hard_concrete,
    without_noise,
)
from jaxcomp.prune.training.movement import movement
from tests import methods

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
KEY = jax.random.key(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_gates_are_those_of_the_paper():
    rng = np.random.default_rng(0)
    log_alpha, u = rng.normal(size=200) * 3, rng.uniform(1e-3, 1 - 1e-3, size=200)
    sampled = sigmoid((np.log(u) - np.log(1 - u) + log_alpha) / BETA) * (ZETA - GAMMA) + GAMMA
    mean = sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA
    noise = jnp.asarray(np.log(u) - np.log(1 - u), jnp.float32)
    for noisy, expected in ((True, sampled), (False, mean)):
        got = gate(jnp.asarray(log_alpha, jnp.float32), noise, jnp.asarray(noisy))
        np.testing.assert_allclose(got, np.clip(expected, 0, 1), atol=2e-6)
        assert np.any(expected < 0)
        assert np.any(expected > 1)


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_gates_close_and_open_as_often_as_their_distribution_says(log_alpha):
    count = 200_000
    method = hard_concrete(0.0, KEY)
    params = {"kernel": jnp.ones((count // 2, 2))}
    learned = {"kernel": jnp.full((count // 2, 2), log_alpha)}
    state = method.init(params)._replace(learned=learned)
    gates = np.asarray(jax.jit(method.apply)(params, state)["kernel"])
    # P(s <= x) of the binary concrete distribution, at the points that are stretched to 0 and 1.
    cdf = lambda x: sigmoid(math.log(x / (1 - x)) * BETA - log_alpha)
    closed, whole = cdf(-GAMMA / (ZETA - GAMMA)), 1 - cdf((1 - GAMMA) / (ZETA - GAMMA))
    deviation = 5 * 0.5 / math.sqrt(count)
    assert abs(np.mean(gates == 0) - closed) < deviation
    assert abs(np.mean(gates == 1) - whole) < deviation
    assert abs(float(expected_density(learned)["kernel"]) - (1 - closed)) < 1e-5


STRUCTURES = [
    (Element(), (4, 6), (4, 6), 1),
    (Channel(0), (4, 6), (4,), 6),
    (Block((2, 3)), (4, 6), (2, 2), 6),
    (Kernel(), (3, 3, 2, 4), (2, 4), 9),
]


@pytest.mark.parametrize(("structure", "shape", "units", "size"), STRUCTURES, ids=str)
def test_the_penalty_enters_the_gradient_exactly(structure, shape, units, size):
    """Where the loss says nothing, the gradient is that of the expected number of weights."""
    penalty = 0.07
    method, params = hard_concrete(penalty, KEY, structure), {"kernel": jnp.ones(shape)}
    state = method.init(params)
    log_alpha = np.random.default_rng(1).normal(size=units) * 2
    assert state.learned["kernel"].shape == units

    def seen(learned):
        return method.apply(params, state._replace(learned={"kernel": learned}))["kernel"]

    _, pull = jax.vjp(seen, jnp.asarray(log_alpha, jnp.float32))
    (got,) = pull(jnp.zeros(shape))
    expected = lambda a: penalty * size * sigmoid(a - BETA * math.log(-GAMMA / ZETA))
    eps = 1e-6
    slope = (expected(log_alpha + eps) - expected(log_alpha - eps)) / (2 * eps)
    np.testing.assert_allclose(got, slope, rtol=1e-5, atol=1e-9)


def test_gradients_through_sampled_gates_equal_finite_differences():
    with jax.enable_x64():
        rng = np.random.default_rng(2)
        weight, target = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.normal(size=(6, 4)))
        method = hard_concrete(0.0, KEY, Channel(0), droprate_init=0.4)
        state = method.init({"kernel": weight})
        log_alpha = jnp.asarray(rng.normal(size=6))

        @jax.jit
        def loss(weight, log_alpha):
            learned = state._replace(learned={"kernel": log_alpha})
            seen = method.apply({"kernel": weight}, learned)["kernel"]
            return jnp.sum(jnp.sin(seen * target))

        gradients = jax.grad(loss, argnums=(0, 1))(weight, log_alpha)
        assert np.any(np.asarray(gradients[1]) != 0)
        eps = 1e-6
        for argument, gradient in enumerate(gradients):
            for index in np.ndindex(gradient.shape):
                both = []
                for sign in (1, -1):
                    moved = [weight, log_alpha]
                    step = np.zeros(gradient.shape)
                    step[index] = sign * eps
                    moved[argument] = moved[argument] + step
                    both.append(float(loss(*moved)))
                slope = (both[0] - both[1]) / (2 * eps)
                np.testing.assert_allclose(gradient[index], slope, rtol=1e-5, atol=1e-8)


def test_noise_is_new_in_every_step_leaf_and_key_and_the_same_for_the_same_state():
    params = {name: {"kernel": jnp.ones((8, 8))} for name in ("a", "b")}
    method = hard_concrete(0.0, KEY, droprate_init=0.5)
    state = method.init(params)
    see = lambda method, state: np.asarray(method.apply(params, state)["a"]["kernel"])
    first = see(method, state)
    np.testing.assert_array_equal(first, see(method, state))
    np.testing.assert_array_equal(first, jax.jit(method.apply)(params, state)["a"]["kernel"])
    other_key = hard_concrete(0.0, jax.random.key(1), droprate_init=0.5)
    others = [
        np.asarray(method.apply(params, state)["b"]["kernel"]),
        see(method, method.update(params, state, params)),
        see(other_key, other_key.init(params)),
    ]
    for other in others:
        assert np.mean(first == other) < 0.3
    # An old-style key is the same key.
    legacy = hard_concrete(0.0, jax.random.PRNGKey(0), droprate_init=0.5)
    np.testing.assert_array_equal(first, see(legacy, legacy.init(params)))


def test_noise_ends_at_a_step_or_by_request():
    params, log_alpha = methods.params(), 0.8
    exact = min(1.0, float(sigmoid(log_alpha)) * (ZETA - GAMMA) + GAMMA)
    method = hard_concrete(0.0, KEY, end=2)
    state = method.init(params)
    state = state._replace(learned=jax.tree.map(lambda a: 0 * a + log_alpha, state.learned))

    def is_exact(seen):
        ratio = np.asarray(seen["first"]["kernel"] / params["first"]["kernel"])
        return np.allclose(ratio, exact, rtol=1e-5)

    for step in range(4):
        assert is_exact(method.apply(params, state)) == (step >= 2)
        assert is_exact(method.apply(params, without_noise(state)))
        state = method.update(params, state, params)
    # Training on from a state without noise samples again.
    early = method.update(params, without_noise(method.init(params)), params)
    assert bool(early.buffers.noisy)


def test_without_noise_finds_gates_wherever_they_are():
    method = partition(
        {
            "first/*": chain(movement(prune.constant(0.5)), hard_concrete(1e-3, KEY)),
            "*": hard_concrete(1e-3, KEY, Channel(-1)),
        }
    )
    tx = optax.chain(optax.clip(1.0), jaxcomp.wrap_optimizer(optax.adam(1e-3), method))
    opt_state = tx.init(methods.params())
    quiet = without_noise(opt_state)
    assert jax.tree.structure(quiet) == jax.tree.structure(opt_state)
    buffers = quiet[1].compression.buffers
    assert not buffers["first/*"][1].noisy
    assert not buffers["*"].noisy
    with pytest.raises(ValueError, match="no state of hard_concrete"):
        without_noise(optax.adam(1e-3).init(methods.params()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("noisy", [True, False])
def test_packed_is_what_was_seen_bit_for_bit(dtype, noisy):
    params = methods.params(dtype=dtype)
    structures = {"first/*": Block((2, 2)), "second/*": Element()}
    method = hard_concrete(0.0, KEY, structures)
    state = method.init(params)
    learned = {path: jax.random.normal(KEY, leaf.shape) * 3 for path, leaf in state.learned.items()}
    state = state._replace(learned=learned)
    state = state if noisy else without_noise(state)
    packed = method.pack(params, state)
    assert isinstance(packed["first"]["kernel"], BlockSparseArray)
    assert isinstance(packed["second"]["kernel"], SparseArray)
    for seen in (method.apply(params, state), jax.jit(method.apply)(params, state)):
        for layer in ("first", "second"):
            got, want = (
                np.asarray(packed[layer]["kernel"].decode()),
                np.asarray(seen[layer]["kernel"]),
            )
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(np.signbit(got), np.signbit(want))
            assert 0 < np.sum(want == 0) < want.size


def test_trained_weights_start_unchanged_without_noise():
    method, params = hard_concrete(1e-3, KEY, end=0), methods.params()
    seen = method.apply(params, method.init(params))
    for layer in params:
        np.testing.assert_array_equal(seen[layer]["kernel"], params[layer]["kernel"])
    half = hard_concrete(1e-3, KEY, end=0, droprate_init=0.5)
    seen = half.apply(params, half.init(params))
    np.testing.assert_allclose(seen["first"]["kernel"], params["first"]["kernel"] * 0.5, rtol=1e-6)


def test_a_donated_state_leaves_the_method_its_key():
    method, params = hard_concrete(1e-3, KEY), {"kernel": jnp.ones((2, 2))}
    step = jax.jit(lambda state: method.update(params, state, params), donate_argnums=0)
    first = method.apply(params, method.init(params))["kernel"]
    step(method.init(params))
    again = method.apply(params, method.init(params))["kernel"]
    np.testing.assert_array_equal(first, again)
    jax.random.normal(KEY)


def test_gates_of_irrelevant_inputs_close_and_those_of_relevant_ones_stay_open():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(200, 8)).astype(np.float32)
    truth = np.zeros((8, 2), np.float32)
    truth[[1, 4, 6]] = rng.choice([-1, 1], size=(3, 2)) * rng.uniform(0.8, 1.5, size=(3, 2))
    y = x @ truth + 0.05 * rng.normal(size=(200, 2)).astype(np.float32)
    method = hard_concrete(0.02, KEY, Channel(0), droprate_init=0.3)
    tx = jaxcomp.wrap_optimizer(optax.adam(0.03), method)

    @jax.jit
    def train(params, opt_state):
        def body(carry, _):
            params, opt_state = carry
            loss = lambda p: jnp.mean((x @ jaxcomp.compressed(p, opt_state)["kernel"] - y) ** 2)
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(body, (params, opt_state), None, length=1000)[0]

    params = {"kernel": jnp.asarray(0.3 * rng.normal(size=(8, 2)), jnp.float32)}
    params, opt_state = train(params, tx.init(params))
    seen = jaxcomp.compressed(params, without_noise(opt_state))["kernel"]
    np.testing.assert_array_equal(np.any(seen != 0, axis=1), np.any(truth != 0, axis=1))
    np.testing.assert_allclose(seen, truth, atol=0.1)
    density = expected_density(opt_state.compression.learned)["kernel"]
    assert 3 / 8 - 0.02 < density < 3 / 8 + 0.15


def test_bad_arguments_keys_and_structures_are_refused():
    for bad in (-1.0, float("inf")):
        with pytest.raises(ValueError, match="penalty"):
            hard_concrete(bad, KEY)
    for bad in (0.0, 1.0):
        with pytest.raises(ValueError, match="droprate_init"):
            hard_concrete(0.1, KEY, droprate_init=bad)
    with pytest.raises(ValueError, match="end"):
        hard_concrete(0.1, KEY, end=-1)
    for bad in (0, jax.random.split(KEY, 2), jnp.ones(2)):
        with pytest.raises(TypeError, match="key must be one PRNG key"):
            hard_concrete(0.1, bad)
    with pytest.raises(ValueError, match="kernel: NM"):
        hard_concrete(0.1, KEY, NM(2, 4)).init({"kernel": jnp.ones((4, 4))})
    with pytest.raises(ValueError, match=r"kernel.*does not tile"):
        hard_concrete(0.1, KEY, Block((3, 3))).init({"kernel": jnp.ones((4, 4))})
    method = hard_concrete(0.1, KEY, Channel(-1))
    state = method.init({"kernel": jnp.ones((8, 4))})
    with pytest.raises(ValueError, match=r"kernel: shape \(3, 4\)"):
        method.apply({"kernel": jnp.ones((3, 4))}, state)
