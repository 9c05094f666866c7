"""Deep Compression: train, prune, share the weights that are left, and entropy-code them.

python examples/deep_compression.py                                  # scikit-learn's digits
python examples/deep_compression.py --data-dir DIR --epochs 15 15 5  # MNIST
python examples/deep_compression.py --data-dir DIR --network lenet-5 --epochs 8 6 2

Source: Han, Mao and Dally, "Deep Compression: Compressing Deep Neural Networks with Pruning,
Trained Quantization and Huffman Coding", ICLR 2016.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

import jaxcomp
from jaxcomp import prune, share
from jaxcomp.demo.data import Dataset, load_digits, load_mnist

BATCH = 64
Params = Any


class LeNet300(nn.Module):
    """Two hidden layers of 300 and 100 units; dropout of pixels and of units."""

    dropout: tuple[float, float]

    @nn.compact
    def __call__(self, x, train=False):
        """Images (n, height, width, 1) to logits (n, 10)."""
        x = nn.Dropout(self.dropout[0], deterministic=not train)(x.reshape(len(x), -1))
        for width in (300, 100):
            x = nn.relu(nn.Dense(width)(x))
            x = nn.Dropout(self.dropout[1], deterministic=not train)(x)
        return nn.Dense(10)(x)


class LeNet5(nn.Module):
    """Two convolutions and one hidden layer, as in Caffe, with a ReLU after each."""

    dropout: tuple[float, float]

    @nn.compact
    def __call__(self, x, train=False):
        """Images (n, 28, 28, 1) to logits (n, 10)."""
        x = nn.Dropout(self.dropout[0], deterministic=not train)(x)
        for channels in (20, 50):
            x = nn.relu(nn.Conv(channels, (5, 5), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(500)(x.reshape(len(x), -1)))
        x = nn.Dropout(self.dropout[1], deterministic=not train)(x)
        return nn.Dense(10)(x)


class Plan(NamedTuple):
    """What is done to a network.

    Attributes:
        module: its class.
        sparsities: fraction of each layer's weights that go.
        clusters: shared values of each layer.
        dropout: of pixels and of hidden units, while it is dense.
        sparse_dropout: likewise, once weights go: fewer of them overfit less.
    """

    module: Any
    sparsities: dict[str, float]
    clusters: dict[str, int]
    dropout: tuple[float, float]
    sparse_dropout: tuple[float, float]


PLANS = {
    "lenet-300-100": Plan(
        LeNet300,
        {"Dense_0/kernel": 0.92, "Dense_1/kernel": 0.88, "Dense_2/kernel": 0.5},
        {"*/kernel": 16},
        (0.1, 0.2),
        (0.1, 0.0),
    ),
    "lenet-5": Plan(
        LeNet5,
        {
            "Conv_0/kernel": 0.34,
            "Conv_1/kernel": 0.88,
            "Dense_0/kernel": 0.94,
            "Dense_1/kernel": 0.81,
        },
        {"Conv*/kernel": 32, "*/kernel": 16},
        (0.0, 0.4),
        (0.0, 0.2),
    ),
}


def train(
    module: Any,
    params: Params,
    method: jaxcomp.Compression,
    data: Dataset,
    epochs: int,
    rate: float,
) -> tuple[Params, Any]:
    """An ordinary train loop; returns the weights, and what is to be shipped."""
    per_epoch = len(data.train_labels) // BATCH
    schedule = optax.cosine_decay_schedule(rate, epochs * per_epoch, 0.01)
    tx = jaxcomp.wrap_optimizer(optax.adam(schedule), method)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, images, labels, key):
        def loss_fn(params):
            seen = jaxcomp.compressed(params, opt_state)
            logits = module.apply({"params": seen}, images, train=True, rngs={"dropout": key})
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    generator = np.random.default_rng(0)
    for epoch in range(epochs):
        order = generator.permutation(len(data.train_labels))[: per_epoch * BATCH]
        keys = jax.random.split(jax.random.key(epoch), per_epoch)
        for key, index in zip(keys, order.reshape(per_epoch, BATCH), strict=True):
            batch = data.train_images[index], data.train_labels[index]
            params, opt_state = step(params, opt_state, *batch, key)
    return params, jaxcomp.pack(params, opt_state)


def error(module: Any, params: Params, data: Dataset) -> float:
    """Of the test images, in percent; the model runs on compressed leaves as they are."""
    predict = jax.jit(lambda params, images: module.apply({"params": params}, images).argmax(-1))
    parts = np.array_split(data.test_images, max(1, len(data.test_labels) // 1000))
    found = np.concatenate([predict(params, part) for part in parts])
    return 100 * float((found != data.test_labels).mean())


def compress(plan: Plan, data: Dataset, epochs: Sequence[int]) -> dict[str, tuple[int, float]]:
    """Run all stages; by stage the bytes of its file, and the error of what is loaded from it."""
    dense, sparse = plan.module(plan.dropout), plan.module(plan.sparse_dropout)
    params = dense.init(jax.random.key(0), data.train_images[:1])["params"]
    float32_bytes = jaxcomp.nbytes(params)
    found = {}

    def ship(stage: str, packed: Any) -> None:
        size = jaxcomp.save("deep_compression.jxc", packed)
        found[stage] = size, error(dense, jaxcomp.load("deep_compression.jxc"), data)
        print(f"{stage:8} {size:>9,} bytes {float32_bytes / size:6.1f}× {found[stage][1]:6.2f}%")

    params, packed = train(dense, params, jaxcomp.identity(), data, epochs[0], 1e-3)
    ship("dense", packed)

    # Small weights go gradually in the first half; those that stay make up for them.
    steps = epochs[1] * (len(data.train_labels) // BATCH)
    kernels = {path: math.prod(_at(params, path).shape) for path in plan.sparsities}
    total = sum(plan.sparsities[path] * size for path, size in kernels.items())
    method = prune.gradual(
        prune.scores.magnitude,
        prune.cubic(total / sum(kernels.values()), begin=0, end=steps // 2),
        prune.allocation.fixed(plan.sparsities),
    )
    params, packed = train(sparse, params, method, data, epochs[1], 1e-3)
    ship("pruned", packed)

    # What is left shares a few values, which go on being trained; what has gone stays away.
    sharing: dict[str, jaxcomp.Compression | None] = {}
    for path, clusters in plan.clusters.items():
        sharing[path] = share.train(clusters)
    method = jaxcomp.chain(prune.keep_zeros(), jaxcomp.partition(sharing))
    _, packed = train(sparse, params, method, data, epochs[2], 3e-4)
    ship("shared", packed)
    return found


def _at(params: Params, path: str) -> Any:
    layer, name = path.split("/")
    return params[layer][name]


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[int, float]]:
    """The command line; bytes and error in percent by stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", help="MNIST's IDX files; without it, scikit-learn's digits")
    parser.add_argument("--network", choices=PLANS, default="lenet-300-100")
    parser.add_argument("--epochs", type=int, nargs=3, default=[30, 30, 10])
    options = parser.parse_args(arguments)
    if options.data_dir is None and options.network == "lenet-5":
        parser.error("lenet-5 wants images of 28 × 28: pass --data-dir")
    data = load_digits() if options.data_dir is None else load_mnist(options.data_dir)
    return compress(PLANS[options.network], data, options.epochs)


if __name__ == "__main__":
    main()
