"""The two LeNets of lenet.py as plain functions of their parameters, whatever widths these have.

LeNet-300-100 has 266,610 parameters; LeNet-5 is Caffe's (20 and 50 convolutions of 5 × 5, pools of
2 × 2, 500 hidden units), 431,080 parameters, with a ReLU after each of its layers but the last.
Inside, examples lie on the last axis, where small layers are twice as fast on a CPU.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp
from jaxcomp import prune
from jaxcomp.demo.data import Dataset

Params = dict[str, dict[str, Any]]
HELD_OUT = 5000


class Network(NamedTuple):
    """A network by the shapes of its kernels.

    Attributes:
        name: as on the command line.
        kernels: shape by layer, inputs before outputs; a bias for each output.
    """

    name: str
    kernels: dict[str, tuple[int, ...]]

    @property
    def float32_bytes(self) -> int:
        """Of all parameters, biases too."""
        return 4 * sum(math.prod(shape) + shape[-1] for shape in self.kernels.values())


NETWORKS = {
    "lenet-300-100": Network(
        "lenet-300-100", {"dense1": (784, 300), "dense2": (300, 100), "dense3": (100, 10)}
    ),
    "lenet-5": Network(
        "lenet-5",
        {
            "conv1": (5, 5, 1, 20),
            "conv2": (5, 5, 20, 50),
            "dense1": (800, 500),
            "dense2": (500, 10),
        },
    ),
}


def narrowed(params: Params, widths: tuple[int, ...], data: Dataset) -> Params:
    """The network with fewer channels or units in its hidden layers, the least important removed.

    Args:
        params: of a trained network.
        widths: what each hidden layer keeps.
        data: whose first training images score channels.
    """
    kept = dict(zip(params, widths, strict=False))
    limits = {f"{name}/bias": 1 - n / params[name]["bias"].size for name, n in kept.items()}

    def loss(params: Params, images: Any, labels: Any) -> Any:
        logits = apply(params, images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    images, labels = data.train_images[:4096, ..., 0], data.train_labels[:4096]
    smaller = prune.channels(
        apply,
        params,
        images[:2],
        score=prune.channel_scores.taylor,
        sparsity=0.99,
        limits=limits,
        loss=loss,
        batches=zip(np.split(images, 8), np.split(labels, 8), strict=True),
        progress=False,
    )
    found = {name: smaller.params[name] for name in params}
    if [found[name]["bias"].size for name in kept] != list(widths):
        raise RuntimeError(f"channels could not be removed down to {widths}: {smaller}")
    return found


def initial(network: Network, seed: int) -> Params:
    """Normal kernels of variance 2 / inputs (He et al., 2015), biases of zero."""
    keys = jax.random.split(jax.random.key(seed), len(network.kernels))
    params = {}
    for key, (layer, shape) in zip(keys, network.kernels.items(), strict=True):
        deviation = np.float32(np.sqrt(2 / math.prod(shape[:-1])))
        kernel = deviation * jax.random.normal(key, shape)
        params[layer] = {"kernel": kernel, "bias": jnp.zeros(shape[-1])}
    return params


def apply(
    params: Params, images: Any, dropout: tuple[float, float] = (0.0, 0.0), key: Any = None
) -> Any:
    """Images (n, 28, 28) to logits (n, 10), in training with dropout of pixels and hidden units."""
    params = jaxcomp.decode(params)
    x = _dropped(jnp.transpose(images, (1, 2, 0))[None], dropout[0], key, 0)
    for layer in ("conv1", "conv2"):
        if layer in params:
            x = _pool(_convolution(x, params[layer]))
    x = x.reshape(-1, x.shape[-1])
    dense = sorted(layer for layer in params if layer.startswith("dense"))
    for number, layer in enumerate(dense):
        if number:
            x = _dropped(jax.nn.relu(x), dropout[1], key, number)
        x = params[layer]["kernel"].T @ x + params[layer]["bias"][:, None]
    return x.T


def _dropped(x: Any, fraction: float, key: Any, number: int) -> Any:
    if not fraction:
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - fraction, x.shape)
    return jnp.where(kept, x / (1 - fraction), 0)


def _convolution(x: Any, layer: dict[str, Any]) -> Any:
    """5 × 5 over (channels, height, width, n), as one product with all patches; then a ReLU."""
    channels, height, width, count = x.shape
    kernel = layer["kernel"]
    patches = jnp.stack(
        [x[:, i : i + height - 4, j : j + width - 4] for i in range(5) for j in range(5)]
    )
    made = kernel.reshape(-1, kernel.shape[-1]).T @ patches.reshape(25 * channels, -1)
    made = made.reshape(-1, height - 4, width - 4, count)
    return jax.nn.relu(made + layer["bias"][:, None, None, None])


def _pool(x: Any) -> Any:
    channels, height, width, count = x.shape
    return x.reshape(channels, height // 2, 2, width // 2, 2, count).max((2, 4))


def to_ship(params: Params) -> list[Any]:
    """The leaves without their names, which cost bytes: kernel and bias of each layer in turn."""
    return [leaf for layer in params for leaf in (params[layer]["kernel"], params[layer]["bias"])]


def from_file(leaves: list[Any]) -> Params:
    """Undo :func:`to_ship`; the number of leaves tells the network."""
    names = ("conv1", "conv2", "dense1", "dense2") if len(leaves) == 8 else None
    names = names or ("dense1", "dense2", "dense3")
    pairs = zip(leaves[::2], leaves[1::2], strict=True)
    return {
        name: {"kernel": kernel, "bias": bias}
        for name, (kernel, bias) in zip(names, pairs, strict=True)
    }


def held_out(data: Dataset) -> Dataset:
    """The training images alone, 5,000 of them in place of the test images."""
    order = np.random.default_rng(2016).permutation(len(data.train_labels))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return Dataset(
        f"{data.name}, held out",
        data.train_images[train],
        data.train_labels[train],
        data.train_images[test],
        data.train_labels[test],
    )


@jax.jit
def _predict(params: Params, images: Any) -> Any:
    return apply(params, images).argmax(-1)


def error(params: Params, data: Dataset) -> float:
    """Of the test images, in percent."""
    parts = np.array_split(data.test_images[..., 0], max(1, len(data.test_labels) // 1000))
    found = np.concatenate([_predict(params, part) for part in parts])
    return 100 * float((found != data.test_labels).mean())
