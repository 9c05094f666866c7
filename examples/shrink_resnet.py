"""Train a ResNet on scikit-learn's digits, remove half of its FLOPs, and train on.

python examples/shrink_resnet.py

The smaller network goes on from the trained weights, the running statistics of its batch norms and
Adam's moments, all cut alike; neither the model nor the training step is written anew.
"""

import statistics
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxcomp
from jaxcomp import prune

EPOCHS, FINE_TUNING_EPOCHS, BATCH = 8, 4, 64


class Block(nn.Module):
    """Two convolutions and a shortcut, projected where the width changes."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        """Images (n, height, width, channels) to the same with `features` channels."""
        norm = lambda: nn.BatchNorm(use_running_average=not train, momentum=0.9)
        y = nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)
        y = nn.Conv(self.features, (3, 3), use_bias=False)(nn.relu(norm()(y)))
        y = norm()(y)
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.features, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The user's model, as it was."""

    @nn.compact
    def __call__(self, x, train):
        """Images (n, 8, 8, 1) to logits (n, 10)."""
        x = nn.Conv(32, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for features, stride in ((32, 1), (64, 2)):
            x = Block(features, stride)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


class State(NamedTuple):
    """All that training carries: the model's variables, and the optimizer's."""

    variables: Any
    opt_state: Any


MODEL = ResNet()
OPTIMIZER = optax.adam(2e-3)


def predict(variables, images):
    """The model as it is used; this is what loses channels."""
    return MODEL.apply(variables, images, train=False)


def forward(variables, images):
    """The model as it is trained: logits, and batch statistics that moved on."""
    logits, moved = MODEL.apply(variables, images, train=True, mutable=["batch_stats"])
    return logits, moved["batch_stats"]


def make_train_step(forward):
    """The user's train step, of any such `forward`."""

    @jax.jit
    def train_step(state, images, labels):
        def loss_fn(params):
            logits, batch_stats = forward({**state.variables, "params": params}, images)
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), batch_stats

        params = state.variables["params"]
        grads, batch_stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = OPTIMIZER.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        return State({"params": params, "batch_stats": batch_stats}, opt_state)

    return train_step


def train(train_step, state, images, labels, epochs, seed):
    """Run some epochs in random order."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            state = train_step(state, images[batch], labels[batch])
    return state


def compare(rows, images, labels):
    """Print accuracy, time of a batch of 64 and bytes of the file; the accuracies."""
    accuracies, times = {}, {name: [] for name in rows}
    runs = {name: jax.jit(predict) for name, (predict, _) in rows.items()}
    for name, (_, variables) in rows.items():
        right = jnp.argmax(runs[name](variables, images), -1) == labels
        accuracies[name] = float(jnp.mean(right))
        runs[name](variables, images[:64])
    for _ in range(60):  # by turns, so that a busy machine does not favour one of them
        for name, (_, variables) in rows.items():
            start = time.perf_counter()
            runs[name](variables, images[:64]).block_until_ready()
            times[name].append(time.perf_counter() - start)
    for name, (_, variables) in rows.items():
        milliseconds = 1000 * statistics.median(times[name])
        size = jaxcomp.save("resnet.jxc", variables)
        print(f"{name:20} {accuracies[name]:7.2%} test, {milliseconds:5.2f} ms, {size:,} bytes")
    return accuracies


def main() -> dict[str, float]:
    """Train, cut and train on; the dense network trains on for as long. Test accuracies."""
    digits: Any = load_digits()
    images = np.asarray(digits.images, np.float32)[..., None] / 16
    test = np.arange(len(images)) % 5 == 4
    train_set = images[~test], digits.target[~test]
    test_set = jnp.asarray(images[test]), jnp.asarray(digits.target[test])

    variables = jax.jit(lambda key: MODEL.init(key, images[:1], train=False))(jax.random.key(0))
    state = State(variables, OPTIMIZER.init(variables["params"]))
    train_step = make_train_step(forward)
    dense = train(train_step, state, *train_set, EPOCHS, seed=1)
    longer = train(train_step, dense, *train_set, FINE_TUNING_EPOCHS, seed=2)

    # A width that fills the processor's vectors is fast: 23 channels can take longer than 32.
    smaller = prune.channels(
        predict,
        dense.variables,
        images[:1],
        budget=prune.Budget(flops=0.5),
        scope="global",
        round_to=8,
    )
    print(smaller)
    cut = State(smaller.params, smaller.shrink(dense.opt_state))
    train_step = make_train_step(smaller.rewrite(forward))
    tuned = train(train_step, cut, *train_set, FINE_TUNING_EPOCHS, seed=2)

    rows = {
        "dense": (predict, dense.variables),
        "dense, trained on": (predict, longer.variables),
        "half of the FLOPs": (smaller.apply, cut.variables),
        "half, trained on": (smaller.apply, tuned.variables),
    }
    return compare(rows, *test_set)


if __name__ == "__main__":
    main()
