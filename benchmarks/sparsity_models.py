"""The two networks of sparsity.py, their real data, and a plain train loop that can be resumed."""

import collections
import hashlib
import math
import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomp import compressed, wrap_optimizer
from jaxcomp import tree as tree_lib
from jaxcomp.compression import Compression
from jaxcomp.demo import data as images_lib

MAX_SYMBOLS = 128


class LeNet(nn.Module):
    """LeCun et al. 1998, with 8 rather than 6 first channels, so that fours divide its inputs."""

    @nn.compact
    def __call__(self, x):
        for features in (8, 16):
            x = nn.relu(nn.Conv(features, (5, 5), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for features in (120, 84):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


class Block(nn.Module):
    """Causal self-attention and an MLP, each after a norm."""

    heads: int

    @nn.compact
    def __call__(self, x):
        batch, length, width = x.shape
        y = nn.LayerNorm(name="attention_norm")(x)
        query, key, value = (
            nn.Dense(width, name=name)(y).reshape(batch, length, self.heads, -1)
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + nn.Dense(width, name="out")(attended.reshape(batch, length, width))
        y = nn.LayerNorm(name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(4 * width, name="up")(y))
        return x + nn.Dense(width, name="down")(y)


class Decoder(nn.Module):
    """A decoder-only language model over characters."""

    symbols: int
    width: int
    heads: int
    depth: int
    length: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.symbols, self.width, name="embedding")(tokens)
        x = x + nn.Embed(self.length, self.width, name="position")(jnp.arange(tokens.shape[1]))
        for i in range(self.depth):
            x = Block(self.heads, name=f"block{i}")(x)
        return nn.Dense(self.symbols, name="head")(nn.LayerNorm(name="norm")(x))


class Task(NamedTuple):
    """A network and its data.

    Attributes:
        name: for tables and files.
        module: the network.
        steps: how long a training lasts.
        rate: the peak of the learning rate.
        batch: ``(generator, size) -> (inputs, labels)`` from the training part.
        batch_size: of a training step.
        held_out: batches of (inputs, labels) that no training sees.
        describe: what the data are, in words.
    """

    name: str
    module: nn.Module
    steps: int
    rate: float
    batch: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
    batch_size: int
    held_out: list[tuple[np.ndarray, np.ndarray]]
    describe: str


def standard_library() -> str:
    """The source of Python's own standard library: real text that every reader has."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py")) + sorted(root.glob("asyncio/*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def encode(text: str) -> tuple[np.ndarray, int]:
    """Characters as numbers, the most common first; the rarest beyond 127 share one number."""
    common = [c for c, _ in collections.Counter(text).most_common(MAX_SYMBOLS - 1)]
    numbers = {c: i for i, c in enumerate(common)}
    tokens = np.array([numbers.get(c, len(common)) for c in text], np.int32)
    return tokens, int(tokens.max()) + 1


def windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and the characters that follow them, shape (starts, length) each."""
    at = starts[:, None] + np.arange(length + 1)
    return tokens[at[:, :-1]], tokens[at[:, 1:]]


def text_task(file: str | None, length: int, steps: int) -> Task:
    """Next-character prediction; of twenty pieces of the text, every tenth is held out."""
    text = standard_library() if file is None else pathlib.Path(file).read_text(encoding="utf-8")
    tokens, symbols = encode(text)
    pieces = np.array_split(tokens, 20)
    train = np.concatenate([p for i, p in enumerate(pieces) if i % 10 != 9])
    held_out = np.concatenate([p for i, p in enumerate(pieces) if i % 10 == 9])
    if len(held_out) <= 64 * length:
        raise ValueError(f"--text has {len(tokens)} characters: give a text 20 times as long")

    def batch(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        return windows(train, generator.integers(0, len(train) - length, size), length)

    # Evenly over the held-out part, 1,024 windows at most.
    count = min(1024, (len(held_out) - 1) // length)
    starts = np.linspace(0, len(held_out) - length - 1, count).astype(np.int64)
    source = "the standard library's source" if file is None else pathlib.Path(file).name
    return Task(
        name="language model",
        module=Decoder(symbols, width=96, heads=4, depth=2, length=length),
        steps=steps,
        rate=3e-3,
        batch=batch,
        batch_size=32,
        held_out=[windows(held_out, part, length) for part in np.array_split(starts, 8)],
        describe=f"{source}: {len(tokens):,} characters, {symbols} symbols, "
        f"{count * length:,} characters of the held-out tenth tested",
    )


def image_task(directory: str | None, steps: int) -> Task:
    """MNIST where a directory is given, else the digits that scikit-learn carries."""
    data = images_lib.load("mnist" if directory else "digits", directory)
    train_images, test_images = data.train_images, data.test_images
    if not directory:  # 8×8 is too small for two unpadded windows of 5×5.
        train_images, test_images = (
            np.kron(x, np.ones((1, 3, 3, 1), np.float32)) for x in (train_images, test_images)
        )
    parts = max(1, len(test_images) // 1000)

    def batch(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        index = generator.integers(0, len(train_images), size)
        return train_images[index], data.train_labels[index]

    return Task(
        name="LeNet",
        module=LeNet(),
        steps=steps,
        rate=2e-3,
        batch=batch,
        batch_size=64,
        held_out=list(
            zip(
                np.array_split(test_images, parts),
                np.array_split(data.test_labels, parts),
                strict=True,
            )
        ),
        describe=f"{data.name}: {len(train_images):,} training, {len(test_images):,} test images",
    )


def mean_loss(module: nn.Module, params: Any, inputs: Any, labels: Any) -> Any:
    logits: Any = module.apply({"params": params}, inputs)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


class Quality(NamedTuple):
    """On held-out data: nats a prediction, and the fraction predicted right."""

    loss: float
    accuracy: float

    @property
    def bits(self) -> float:
        return self.loss / math.log(2)


def evaluator(task: Task) -> Callable[[Any], Quality]:
    """A function of parameters to their quality; compiled once for all of them."""

    @jax.jit
    def one(params: Any, inputs: Any, labels: Any) -> tuple[Any, Any]:
        logits: Any = task.module.apply({"params": params}, inputs)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.sum(), (logits.argmax(-1) == labels).sum()

    def evaluate(params: Any) -> Quality:
        sums = np.array([one(params, *batch) for batch in task.held_out], np.float64).sum(0)
        loss, right = sums / sum(labels.size for _, labels in task.held_out)
        return Quality(float(loss), float(right))

    return evaluate


def initial(task: Task, seed: int) -> Any:
    inputs, _ = task.batch(np.random.default_rng(0), 1)
    return task.module.init(jax.random.key(seed), inputs)["params"]


def optimizer(task: Task) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay, the same for every method."""
    rate = optax.warmup_cosine_decay_schedule(0.0, task.rate, task.steps // 20, task.steps)
    return optax.adamw(rate, weight_decay=1e-2)


def fit(task: Task, method: Compression, params: Any, seed: int, tick: Callable[[], None]) -> Any:
    """Train from given weights with a method in the optimizer, and apply it to the result."""
    tx = wrap_optimizer(optimizer(task), method)

    @jax.jit
    def step(params: Any, opt_state: Any, inputs: Any, labels: Any) -> tuple[Any, Any]:
        def loss(stored: Any) -> Any:
            return mean_loss(task.module, compressed(stored, opt_state), inputs, labels)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    generator = np.random.default_rng(seed)
    opt_state = tx.init(params)
    for _ in range(task.steps):
        params, opt_state = step(params, opt_state, *task.batch(generator, task.batch_size))
        tick()
    return jax.block_until_ready(compressed(params, opt_state))


class Recipe(NamedTuple):
    """How to train: the name and the settings tell one result on disk from another.

    Attributes:
        name: for tables and files.
        settings: everything that decides the result beside task, name and seed.
        start: ``(parameters, key) -> parameters`` that training begins from.
        method: ``key -> method``, what is wrapped around the optimizer.
    """

    name: str
    settings: str
    start: Callable[[Any, jax.Array], Any]
    method: Callable[[jax.Array], Compression]


def trained(
    task: Task, recipe: Recipe, seed: int, directory: pathlib.Path, tick: Callable[[], None]
) -> Any:
    """Weights of a finished training, read from disk where they are there already."""
    facts = (task.module, task.steps, task.rate, task.batch_size, task.describe)
    digest = hashlib.sha256(repr((facts, recipe.name, recipe.settings)).encode()).hexdigest()[:8]
    file = directory / f"{task.name}-{recipe.name}-{digest}-{seed}.npz".replace(" ", "_")
    params = initial(task, seed)
    if not file.exists():
        key = jax.random.key(seed + 1000)
        params = fit(task, recipe.method(key), recipe.start(params, key), seed, tick)
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part.npz")
        arrays: Any = {k: np.asarray(v) for k, v in tree_lib.flatten(params).items()}
        np.savez(unfinished, **arrays)
        unfinished.rename(file)
        return params
    with np.load(file) as saved:
        return tree_lib.replace(params, {k: jnp.asarray(saved[k]) for k in saved.files})
