"""Prune a trained network: how far can it go, which layers hurt, and 2:4 with repair.

python examples/prune_trained.py
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jaxcomp
from jaxcomp import prune

EPOCHS = 20
Params = Any


class Classifier(nn.Module):
    """The user's model."""

    @nn.compact
    def __call__(self, x):
        """Images (n, 8, 8, 1) to logits (n, 10)."""
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def make_data() -> tuple[jax.Array, ...]:
    """Real digits: images and labels to train on, then to validate on."""
    digits: Any = load_digits()
    images = jnp.asarray(digits.images[..., None] / 16, jnp.float32)
    labels = jnp.asarray(digits.target)
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def predict(params: Params, images: jax.Array) -> Any:
    """The model as a function of its parameters."""
    return Classifier().apply(params, images)


def train(images: jax.Array, labels: jax.Array) -> Params:
    """The user's training."""
    params = Classifier().init(jax.random.key(0), images[:1])
    tx = optax.adam(2e-3)

    def loss_fn(params, x, y):
        logits = predict(params, x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for epoch in range(EPOCHS):
        order = jax.random.permutation(jax.random.key(epoch), len(images))
        for batch in order[: len(order) // 50 * 50].reshape(-1, 50):
            params, opt_state = step(params, opt_state, images[batch], labels[batch])
    return params


def main() -> dict[str, float]:
    """Train, then prune in four ways; accuracies by name."""
    images, labels, val_images, val_labels = make_data()
    params = train(images, labels)

    @jax.jit
    def accuracy(params):
        return jnp.mean(jnp.argmax(predict(params, val_images), -1) == val_labels)

    # The highest sparsity that costs at most one point; an evaluation a line.
    found = prune.to_accuracy(params, accuracy, max_drop=0.01, tolerance=0.02)
    print(found)

    # Which layers hurt, and a sparsity spread by that.
    hurts = prune.sensitivity(params, accuracy, sparsities=(0.5, 0.7, 0.9))
    print(hurts)
    scores = jax.tree.map(prune.scores.magnitude, params)
    spread = prune.allocation_from_sensitivity(hurts)
    by_sensitivity = prune.apply_masks(params, prune.masks(scores, 0.6, allocation=spread))

    # 2 of every 4 inputs, for sparse tensor cores: by size alone, and with the rest repaired.
    kernels = ["*Conv_1/kernel", "*Dense_*/kernel"]
    runs = {"*Conv_0*": prune.Element(), "*": prune.NM(2, 4)}
    plain = prune.masks(scores, 0.5, runs)
    calibration = [images[i : i + 100] for i in range(0, 500, 100)]
    repaired = prune.sparsegpt(
        predict, params, calibration, structure=prune.NM(2, 4), paths=kernels
    )
    print(repaired)

    accuracies = {
        "dense": float(accuracy(params)),
        f"{found.sparsity:.0%}, global": float(accuracy(found.params)),
        "60%, by sensitivity": float(accuracy(by_sensitivity)),
        "2:4, magnitude": float(accuracy(prune.apply_masks(params, plain))),
        "2:4, repaired": float(accuracy(repaired.params)),
    }
    for name, value in accuracies.items():
        print(f"{name:20} {value:.1%}")

    # The same model runs on packed leaves; the file holds them as they are.
    method = prune.keep_zeros(runs)
    packed = method.pack(repaired.params, method.init(repaired.params))
    jaxcomp.save("pruned.jxc", packed)
    assert jnp.all(predict(jaxcomp.load("pruned.jxc"), images) == predict(packed, images))
    return accuracies


if __name__ == "__main__":
    main()
