"""Train with 3-bit weights and activations in your own loop, then ship what was trained.

python examples/quantize_aware.py
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jaxcomp
from jaxcomp import quantize
from jaxcomp.quantize import Format, PerTensor

EPOCHS = 12
WEIGHTS = Format(3)
ACTIVATIONS = Format(3, symmetric=False, granularity=PerTensor())
Params = Any


class Classifier(nn.Module):
    """The user's model: nothing in it knows of quantization."""

    @nn.compact
    def __call__(self, x, train):
        """Images (n, 8, 8, 1) to logits (n, 10)."""
        x = nn.Conv(16, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def make_data() -> tuple[jax.Array, ...]:
    """Real digits: images and labels to train on, then to validate on."""
    digits: Any = load_digits()
    images = jnp.asarray(digits.images[..., None] / 16, jnp.float32)
    labels = jnp.asarray(digits.target)
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def forward(params: Params, stats: Any, images: jax.Array) -> Any:
    """Logits and new statistics, while training."""
    variables = {"params": params, "batch_stats": stats}
    logits, new = Classifier().apply(variables, images, train=True, mutable=["batch_stats"])
    return logits, new["batch_stats"]


def predict(params: Params, stats: Any, images: jax.Array) -> Any:
    """Logits, once trained."""
    return Classifier().apply({"params": params, "batch_stats": stats}, images, train=False)


def train(images: jax.Array, labels: jax.Array) -> tuple[Params, Any, Any]:
    """The user's training: parameters, statistics, and ranges of the activations."""
    variables = Classifier().init(jax.random.key(0), images[:1], train=False)
    params, stats = variables["params"], variables["batch_stats"]
    # Three lines for quantization: the weights live in the optimizer, ...
    tx = jaxcomp.wrap_optimizer(optax.adam(2e-3), quantize.train(WEIGHTS))
    # ... the activations in the forward pass, with ranges that follow the training.
    rounded = quantize.track_ranges(forward, params, stats, images[:50], format=ACTIVATIONS)
    opt_state, ranges = tx.init(params), rounded.init()
    print(rounded)

    @jax.jit
    def step(params, opt_state, stats, ranges, x, y):
        def loss_fn(params):
            (logits, new), new_ranges = rounded(params, ranges, stats, x)
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), (new, new_ranges)

        effective = jaxcomp.compressed(params, opt_state)
        grads, (stats, ranges) = jax.grad(loss_fn, has_aux=True)(effective)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, stats, ranges

    for epoch in range(EPOCHS):
        order = jax.random.permutation(jax.random.key(epoch), len(images))
        for batch in order[: len(order) // 50 * 50].reshape(-1, 50):
            params, opt_state, stats, ranges = step(
                params, opt_state, stats, ranges, images[batch], labels[batch]
            )
    return jaxcomp.pack(params, opt_state), stats, rounded.freeze(ranges)


def main() -> dict[str, float]:
    """Train, pack, save and load; accuracies by name."""
    images, labels, val_images, val_labels = make_data()
    packed, stats, ranges = train(images, labels)

    # Shipped: the packed weights, and a range for each activation.
    jaxcomp.save("quantized.jxc", {"params": packed, "stats": stats})
    loaded = jaxcomp.load("quantized.jxc")
    params, stats = loaded["params"], loaded["stats"]
    rounded = quantize.activations(
        predict, params, stats, val_images, format=ACTIVATIONS, ranges=ranges
    )

    def accuracy(function):
        logits = jax.jit(function)(params, stats, val_images)
        return float(jnp.mean(jnp.argmax(logits, -1) == val_labels))

    accuracies = {
        "3-bit weights": accuracy(predict),
        "3-bit weights and activations": accuracy(rounded),
    }
    for name, value in accuracies.items():
        print(f"{name:30} {value:.1%}")
    return accuracies


if __name__ == "__main__":
    main()
