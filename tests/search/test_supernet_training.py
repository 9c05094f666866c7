"""The sandwich rule, in-place distillation, and statistics of a sub-network's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from jaxcomp.search.supernets import recalibrate, sandwich, supernet
from jaxcomp.search.supernets.training import soft_cross_entropy


def mlp(p, x):
    x = jax.nn.relu(x @ p["stem"] + p["bias"])
    x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
    return x @ p["head"]


def start(inputs=64, width=32, hidden=48, outputs=10, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"stem": (inputs, width), "up": (width, hidden), "down": (hidden, width),
              "head": (width, outputs)}  # fmt: skip
    params = {n: (rng.normal(size=s) / s[0] ** 0.5).astype(np.float32) for n, s in shapes.items()}
    return params | {"bias": np.zeros(width, np.float32)}


def cross_entropy(logits, batch):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def forward(p, batch):
    return mlp(p, batch[0])


ELASTIC = {"width": {"stem": (0.25, 0.5, 1.0), "up": (0.25, 1.0)}, "connections": {"block": "down"}}


def test_all_sub_networks_of_digits_learn_and_come_out_as_they_were():
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    test, params = np.arange(len(images)) % 5 == 4, start()
    net = supernet(mlp, params, images[:1], **ELASTIC)
    tx, function = optax.adam(3e-3), sandwich(net, forward, cross_entropy, randoms=1)

    @jax.jit
    def step(carry, batch):
        params, opt_state, key = carry
        key, own = jax.random.split(key)
        grads, told = jax.grad(function, has_aux=True)(params, own, batch)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state, key), told

    train = jax.device_put((images[~test], labels[~test]))
    order = np.random.default_rng(0).integers(0, len(train[0]), (300, 64))
    carry = (jax.device_put(params), tx.init(params), jax.random.key(0))
    carry, told = jax.lax.scan(lambda c, rows: step(c, (train[0][rows], train[1][rows])), carry,
                               order)  # fmt: skip
    assert told.others.shape == (300, 2)
    trained = carry[0]
    run = jax.jit(lambda p, c: jnp.argmax(mlp(net.masked(p, c), images[test]), -1))
    small = net.extract(trained, net.smallest)
    guesses = {"largest": run(trained, net.largest), "smallest": run(trained, net.smallest)}
    right = {name: float(np.mean(guess == labels[test])) for name, guess in guesses.items()}
    assert right["largest"] > 0.9, right
    assert right["smallest"] > 0.8, right
    # What nobody trained: cut from the largest as it is.
    alone = np.argmax(jax.jit(small.apply)(small.params, images[test]), -1)
    np.testing.assert_array_equal(alone, guesses["smallest"])
    assert small.after.parameters < 0.25 * small.before.parameters


def test_the_loss_is_that_of_the_rule():
    params, rng = start(5, 4, 6, 3), np.random.default_rng(1)
    batch = rng.normal(size=(7, 5)).astype(np.float32), rng.integers(0, 3, 7).astype(np.int32)
    net = supernet(mlp, params, batch[0], width={"stem": (1, 2, 4)})
    middle = {"width": {"down[1]": 2}}
    rule = sandwich(net, forward, cross_entropy, randoms=1, always=[middle])
    function = jax.jit(jax.value_and_grad(rule, has_aux=True))
    (total, told), grads = function(params, jax.random.key(4), batch)
    names = (net.largest, net.smallest, middle, told.candidates[0])
    logits = [np.asarray(mlp(net.masked(params, c), batch[0]), np.float64) for c in names]
    logs = [each - np.log(np.exp(each).sum(1, keepdims=True)) for each in logits]
    soft = [-np.mean(np.sum(np.exp(logs[0]) * each, 1)) for each in logs[1:]]
    hard = -np.mean(logs[0][np.arange(7), batch[1]])
    np.testing.assert_allclose(told.largest, hard, rtol=1e-5)
    np.testing.assert_allclose(told.others, soft, rtol=1e-5)
    np.testing.assert_allclose(total, hard + np.sum(soft), rtol=1e-5)
    # The largest does not learn from how the others differ from it.
    kept = jax.jit(jax.grad(lambda p: cross_entropy(forward(p, batch), batch)))(params)
    gone = np.asarray(net.masked(kept, {"width": {"down[1]": 4}})["head"])
    assert np.abs(np.asarray(grads["head"])[2:] - gone[2:]).max() < 1e-6 or int(
        told.candidates[0]["width"]["down[1]"]) == 4  # fmt: skip


def test_soft_labels_teach_but_do_not_learn():
    student, teacher = np.ones((2, 3), np.float32), np.eye(2, 3, dtype=np.float32)
    slopes = jax.grad(soft_cross_entropy, (0, 1))(student, teacher)
    assert np.abs(slopes[0]).max() > 0.01
    assert not np.asarray(slopes[1]).any()
    # Of classes that are ruled out nothing is said, and half floats are summed in whole ones.
    out = np.array([[0.0, 1.0, -np.inf]], np.float32)
    value, slope = jax.value_and_grad(soft_cross_entropy)(out, out)
    wanted = np.array([np.exp(0), np.exp(1)]) / (1 + np.e)
    np.testing.assert_allclose(value, -np.sum(wanted * np.log(wanted)), rtol=1e-6)
    np.testing.assert_allclose(slope, np.zeros((1, 3)), atol=1e-6)
    half = soft_cross_entropy(jnp.asarray(student, jnp.bfloat16), jnp.asarray(teacher, "bfloat16"))
    np.testing.assert_allclose(half, np.log(3), rtol=1e-6)


def test_what_a_sandwich_cannot_be_made_of_is_refused():
    params = start(5, 4, 6, 3)
    net = supernet(mlp, params, np.ones((1, 5), np.float32), width={"stem": (1, 4)})
    with pytest.raises(TypeError, match="forward must be a function"):
        sandwich(net, None, cross_entropy)
    with pytest.raises(ValueError, match="randoms"):
        sandwich(net, forward, cross_entropy, randoms=-1)
    with pytest.raises(ValueError, match="down"):
        sandwich(net, forward, cross_entropy, always=[{"width": {"down[1]": 3}}])
    batch = np.ones((2, 5), np.float32), np.zeros(2, np.int32)
    with pytest.raises(TypeError, match="key must be one PRNG key"):
        sandwich(net, forward, cross_entropy)(params, 0, batch)
    with pytest.raises(TypeError, match=r"forward must return \(outputs, aux\) with has_aux=True"):
        sandwich(net, forward, cross_entropy, has_aux=True)(params, jax.random.key(0), batch)
    with pytest.raises(TypeError, match="net must be of search"):
        sandwich(None, forward, cross_entropy)
    with pytest.raises(TypeError, match="distance must be a function"):
        sandwich(net, forward, cross_entropy, distance="kl")
    with pytest.raises(TypeError, match="always must be a list of candidates"):
        sandwich(net, forward, cross_entropy, always=net.largest)
    with pytest.raises(TypeError, match="loss must return one floating number"):
        jax.eval_shape(sandwich(net, forward, lambda o, b: o), params, jax.random.key(0), batch)


class Normed(nn.Module):
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="norm")(x)
        return nn.Dense(2, name="head")(nn.relu(x))


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_statistics_are_the_mean_over_batches_whatever_the_momentum(momentum):
    model, rng = Normed(momentum), np.random.default_rng(0)
    batches = [rng.normal(size=(8, 3)).astype(np.float32) for _ in range(3)]
    variables = jax.jit(model.init)(jax.random.key(0), batches[0])
    net = supernet(model.apply, variables, batches[0], width={"*first*": (2, 6)})
    update = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[1]
    masked = jax.jit(net.masked)(variables, net.smallest)
    found = recalibrate(update, masked, batches)
    first = {k: np.asarray(v, np.float64) for k, v in masked["params"]["first"].items()}
    made = [x @ first["kernel"] + first["bias"] for x in batches]
    stats = found["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], np.mean([y.mean(0) for y in made], 0), atol=1e-6)
    np.testing.assert_allclose(stats["var"], np.mean([y.var(0) for y in made], 0), atol=1e-5)
    assert found["params"] is not None
    # The extracted network comes to the same statistics, and so to the same outputs.
    small = net.extract(variables, net.smallest)
    own = recalibrate(small.rewrite(update), small.params, batches)
    np.testing.assert_allclose(own["batch_stats"]["norm"]["var"], stats["var"][:2], atol=1e-5)


class NnxNormed(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(3, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.first(x))))


def test_nnx_modules_are_supernets_and_recalibrated():
    graph, state = nnx.split(NnxNormed(nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)

    def apply(state, x):
        model = nnx.merge(graph, state)
        model.eval()
        return model(x)

    def update(state, x):
        model = nnx.merge(graph, state)
        model.train()
        model(x)
        return {"norm": nnx.state(model, nnx.BatchStat)["norm"]}

    net = supernet(apply, state, x, width={"*": (2, 6)}, also=[(update, (x,))])
    small = net.extract(state, net.smallest)
    before = jax.jit(lambda s: apply(net.masked(s, net.smallest), x))(state)
    np.testing.assert_allclose(jax.jit(small.apply)(small.params, x), before, rtol=1e-4, atol=1e-6)
    found = recalibrate(small.rewrite(update), small.params, [x, x])
    y = x @ np.asarray(small.params["first"]["kernel"][...]) + np.asarray(
        small.params["first"]["bias"][...])  # fmt: skip
    np.testing.assert_allclose(found["norm"]["var"][...], y.var(0), atol=1e-5)


def test_what_is_no_moving_average_is_refused():
    params, x = {"mean": jnp.zeros(2), "n": jnp.zeros((), jnp.int32)}, jnp.ones((3, 2))
    with pytest.raises(ValueError, match="mean: is no moving average"):
        recalibrate(lambda p, x: {"mean": 2 * p["mean"] + x.mean(0)}, params, [x])
    with pytest.raises(ValueError, match="returned 'average', which is not in params"):
        recalibrate(lambda p, x: {"average": x.mean(0)}, params, [x])
    with pytest.raises(TypeError, match="n: int32 is no statistic"):
        recalibrate(lambda p, x: {"n": p["n"] + 1}, params, [x])
    with pytest.raises(ValueError, match="update returned no statistics"):
        recalibrate(lambda p, x: {}, params, [x])
    with pytest.raises(ValueError, match=r"mean: update returned shape \(3,\), but params have"):
        recalibrate(lambda p, x: {"mean": x.mean(1)}, params, [x])
    with pytest.raises(ValueError, match="batches: there are none"):
        recalibrate(lambda p, x: {"mean": x.mean(0)}, params, [])
