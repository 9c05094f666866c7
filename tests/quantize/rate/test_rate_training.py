"""Training under a price of bits: gradients of loss + penalty * bits, smaller files, settling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp import prune, quantize
from jaxcomp.quantize import Format, PerTensor
from jaxcomp.quantize.rate.coded import Coded, step_of

PENALTY = 0.02
FORMAT = Format(4, granularity=PerTensor())
RNG = np.random.default_rng(0)
# Inputs 3 and 4 say nothing about the target.
X = RNG.normal(size=(256, 6)).astype(np.float32)
Y = np.tanh(X[:, :3] @ RNG.normal(size=(3, 4))).astype(np.float32)
PARAMS = {
    "kernel": jnp.asarray(0.4 * RNG.normal(size=(6, 4)), jnp.float32),
    "bias": jnp.zeros(4, jnp.float32),
}


def loss(params):
    return jnp.mean((X @ params["kernel"] + params["bias"] - Y) ** 2)


def everything(method):
    return jaxcomp.partition({"*": method}, where=lambda path, leaf: True)


def train(method, steps=300):
    tx = jaxcomp.wrap_optimizer(optax.adam(optax.cosine_decay_schedule(0.02, steps)), method)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: loss(jaxcomp.compressed(p, state)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state, value = PARAMS, tx.init(PARAMS), jnp.inf
    for _ in range(steps):
        params, state, value = step(params, state)
    return params, state, float(value)


def settling():
    return quantize.rate_distortion(0.01, FORMAT, step=0.2, settle=2, examples=5)


def total_bits(params, state):
    bits = quantize.estimated_bits(params, state.compression)
    return sum(float(each) for each in bits.values())


def test_gradients_are_those_of_loss_plus_penalty_times_bits():
    method = everything(quantize.rate_distortion(PENALTY, FORMAT, step=0.15))
    state = method.init(PARAMS)
    free = everything(quantize.rate_distortion(0.0, FORMAT, step=0.15))

    @jax.jit
    def explicit(params, learned):
        state_of = lambda state: state._replace(learned=learned)
        values = free.apply(params, state_of(free.init(PARAMS)))
        bits = quantize.estimated_bits(params, state_of(state))
        return loss(values), sum(bits.values())

    @jax.jit
    def implicit(params, learned):
        values, pull = jax.vjp(
            lambda p, q: method.apply(p, state._replace(learned=q)), params, learned
        )
        return pull(jax.grad(loss)(values))

    of_loss = jax.jit(jax.grad(lambda *a: explicit(*a)[0], (0, 1)))(PARAMS, state.learned)
    of_bits = jax.jit(jax.grad(lambda *a: explicit(*a)[1], (0, 1)))(PARAMS, state.learned)
    weights, learned = implicit(PARAMS, state.learned)
    for path in PARAMS:
        want = of_loss[0][path] + PENALTY * of_bits[0][path]
        np.testing.assert_allclose(weights[path], want, rtol=1e-5, atol=1e-6)
        factor = 1 / np.sqrt(PARAMS[path].size * 7)
        want = of_loss[1][path].log_step + factor * PENALTY * of_bits[1][path].log_step
        np.testing.assert_allclose(learned[path].log_step, want, rtol=1e-4, atol=1e-6)
        mean = of_bits[1][path].density.more / PARAMS[path].size
        np.testing.assert_allclose(learned[path].density.more, mean, rtol=1e-5, atol=1e-7)


def test_a_higher_price_makes_fewer_bits_and_empties_inputs_that_say_nothing():
    found = [train(everything(quantize.rate_distortion(p, step=0.1))) for p in (0.0, 1e-3)]
    bits = [total_bits(params, state) for params, state, _ in found]
    assert bits[1] < 0.75 * bits[0]
    assert found[1][2] < 0.1
    packed = jaxcomp.pack(*found[1][:2])
    assert not np.asarray(packed["kernel"].decode())[3:].any()
    assert np.asarray(packed["kernel"].decode())[:3].any()


def test_pruned_weights_stay_zero_behind_the_masks():
    masks = prune.gradual(prune.scores.magnitude, prune.cubic(0.5, begin=0, end=2), every=1)
    method = jaxcomp.chain(masks, quantize.rate_distortion(1e-4, FORMAT))
    params, state, _ = train(method, steps=10)
    seen = np.asarray(jaxcomp.compressed(params, state)["kernel"])
    assert (seen[np.asarray(params["kernel"]) == 0] == 0).all()
    assert (np.asarray(params["kernel"]) == 0).sum() == 12
    assert set(quantize.estimated_bits(params, state.compression)) == {"kernel"}


@pytest.mark.parametrize("pruned", [False, True])
def test_training_goes_on_when_channels_have_left(pruned, tmp_path):
    def model(params, x):
        hidden = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
        return hidden @ params["down"]["kernel"]

    params = {
        "up": {"kernel": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32), "bias": jnp.ones(8)},
        "down": {"kernel": jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)},
    }
    method = everything(quantize.rate_distortion(1e-4, step=0.1, settle=5, examples=256))
    if pruned:
        masks = prune.gradual(prune.scores.magnitude, prune.cubic(0.5, begin=0, end=2), every=1)
        method = jaxcomp.chain(masks, method)
    tx = jaxcomp.wrap_optimizer(optax.adam(1e-2), method)

    @jax.jit
    def step(params, state):
        error = lambda p: jnp.mean((model(jaxcomp.compressed(p, state), X) - Y) ** 2)
        updates, state = tx.update(jax.grad(error)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    smaller = prune.channels(model, params, X, sparsity=0.25)
    kept = smaller.shrink(state)
    assert jax.tree.structure(kept) == jax.tree.structure(tx.init(smaller.params))
    find = lambda state: jax.tree.leaves(
        state.compression.learned["up/kernel"], is_leaf=lambda node: isinstance(node, Coded)
    )[-1]
    rows, columns = find(kept).density.axes
    assert (rows.shape, columns.shape) == ((6, 1), (1, 6))
    np.testing.assert_array_equal(rows, find(state).density.axes[0])
    assert np.isin(columns, find(state).density.axes[1]).all()
    params, state = smaller.params, kept
    for _ in range(3):
        params, state = step(params, state)
    seen = jaxcomp.compressed(params, state)
    jaxcomp.save(tmp_path / "model.jxc", jaxcomp.pack(params, state))
    loaded = jaxcomp.decode(jaxcomp.load(tmp_path / "model.jxc"))
    jax.tree.map(np.testing.assert_array_equal, loaded, seen)
    assert seen["up"]["kernel"].shape == (6, 6)
    if pruned:
        zeros = np.asarray(params["up"]["kernel"]) == 0
        assert zeros.any()
        assert not np.asarray(seen["up"]["kernel"])[zeros].any()


def test_codes_settle_where_the_loss_bends_least():
    method = settling()
    params = {"kernel": jnp.array([[0.15, 0.15], [0.25, -0.45]], jnp.float32)}
    grads = {"kernel": jnp.array([[0.1, 1.0], [0.0, 1.0]], jnp.float32)}
    state = method.init(params)
    before = np.asarray(method.apply(params, state)["kernel"])
    np.testing.assert_allclose(before, [[0.2, 0.2], [0.2, -0.4]], atol=1e-6)
    bits = []
    for _ in range(3):
        state = method.update(params, state, grads)
        bits.append(float(quantize.estimated_bits(params, state)["kernel"]))
    # 0.01 * 2 bits / (5 * g**2 * 0.2): 2 where the gradient is 0.1, 0.02 where it is 1.
    after = np.asarray(method.apply(params, state)["kernel"])
    np.testing.assert_allclose(after, [[0, 0.2], [0, -0.4]], atol=1e-6)
    np.testing.assert_array_equal(method.pack(params, state)["kernel"].decode(), after)
    assert bits[0] > bits[1] == bits[2]


def test_the_default_format_clips_no_weight_of_sixty_steps():
    method = quantize.rate_distortion(0.0, step=0.05)
    params = {"kernel": jnp.array([[3.0, -2.0], [0.1, 0.0]], jnp.float32)}
    state = method.init(params)
    seen, pull = jax.vjp(lambda p: method.apply(p, state)["kernel"], params)
    np.testing.assert_allclose(seen, params["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(pull(jnp.ones((2, 2)))[0]["kernel"], np.ones((2, 2)))


def test_steps_are_powers_of_two_with_lines_between():
    logs = np.linspace(-20, 10, 301, dtype=np.float32)
    steps = np.asarray(step_of(jnp.asarray(logs)), np.float64)
    assert (np.diff(steps) > 0).all()
    np.testing.assert_allclose(steps, 2.0**logs, rtol=0.0615)
    whole = logs == np.round(logs)
    np.testing.assert_array_equal(steps[whole], 2.0 ** logs[whole])


def test_leaves_that_are_all_zero_or_all_equal_begin_somewhere():
    method = quantize.rate_distortion(0.0)
    equal = [(jnp.full((2, 3), -3.0 * size), 1.5 * size) for size in (1.0, 2.0**70, 2.0**-70)]
    for kernel, step in ((jnp.zeros((2, 3)), 0.05), *equal):
        state = method.init({"kernel": kernel})
        found = np.asarray(step_of(state.learned["kernel"].log_step))
        np.testing.assert_allclose(found, step, rtol=1e-6)
        seen = np.asarray(method.apply({"kernel": kernel}, state)["kernel"])
        np.testing.assert_allclose(seen, kernel, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: quantize.rate_distortion(-1.0), ValueError, "penalty must be finite"),
        (lambda: quantize.rate_distortion("much"), TypeError, "penalty must be a number"),
        (lambda: quantize.rate_distortion(0.0, step=0.0), ValueError, "step must be positive"),
        (lambda: quantize.rate_distortion(0.0, Format(4, False)), ValueError, "affine"),
        (lambda: quantize.rate_distortion(0.0, Format(4, zero=False)), ValueError, "no level at"),
        (lambda: quantize.rate_distortion(0.0, begin=5, settle=5), ValueError, "settle is 5"),
        (lambda: quantize.rate_distortion(0.0, examples=0), ValueError, "examples is 0"),
        (
            lambda: quantize.rate_distortion(0.0).init({"kernel": jnp.zeros((0, 2))}),
            ValueError,
            "kernel",
        ),
        (
            lambda: settling().update(PARAMS, settling().init(PARAMS), None),
            ValueError,
            "settle needs gradients",
        ),
        (lambda: quantize.estimated_bits(PARAMS, PARAMS), TypeError, "that of a method"),
        (
            lambda: quantize.estimated_bits(PARAMS, jaxcomp.identity().init(PARAMS)),
            ValueError,
            "no leaf of this state",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
