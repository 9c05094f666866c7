"""The LeNet-5 of lsq.py with learned steps at its activations, and its training."""

import hashlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp
from jaxcomp import Compression, compressed, identity, partition, wrap_optimizer
from jaxcomp.demo.data import Dataset
from jaxcomp.quantize import Format, PerTensor
from jaxcomp.quantize.training.learned_step import learned_step
from jaxcomp.quantize.training.step_gradient import fake_quant_learned, initial_step

OUTER_BITS = 8  # the first and the last layer, as in the papers
BATCH = 128
SHIFT = 2  # pixels, in each direction


class Quantizer(nn.Module):
    """Rounds what is never negative to multiples of a step, which is a parameter."""

    bits: int

    @nn.compact
    def __call__(self, x):
        format = Format(self.bits, symmetric=False, granularity=PerTensor())
        zero = jnp.zeros((), jnp.uint8)
        step = self.param("step", lambda key: initial_step(x, format, zero).reshape(()))
        return fake_quant_learned(x, step, format, zero, count=x[0].size)


class LeNet5(nn.Module):
    """LeNet-5 with ReLUs; the pixels that enter it have 8 bits already.

    Attributes:
        widths: channels of two convolutions, then of the dense layers between.
        bits: of the inputs of all layers but the first and the last; None for float.
    """

    widths: tuple[int, ...]
    bits: int | None = None

    @nn.compact
    def __call__(self, x):
        first, second, *dense = self.widths
        x = nn.relu(nn.Conv(first, (5, 5), padding="VALID", name="first")(x))
        x = self.rounded(nn.max_pool(x, (2, 2), (2, 2)), self.bits, "conv")
        x = nn.relu(nn.Conv(second, (5, 5), padding="VALID", name="conv")(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        for i, width in enumerate(dense):
            x = self.rounded(x, self.bits, f"dense{i}")
            x = nn.relu(nn.Dense(width, name=f"dense{i}")(x))
        x = self.rounded(x, OUTER_BITS, "last")
        return nn.Dense(10, name="last")(x)

    def rounded(self, x, bits, before):
        return x if self.bits is None else Quantizer(bits, name=f"{before}_input")(x)


class Recipe(NamedTuple):
    """How all runs are trained.

    Attributes:
        widths: of the network.
        epochs: of the float network from its start, and of every run that goes on from it.
        rates: peaks of the learning rate in both.
        decay: weight decay, of everything that is trained.
    """

    widths: tuple[int, ...]
    epochs: tuple[int, ...]
    rates: tuple[float, ...]
    decay: float


def batches(data: Dataset, epochs: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled full batches, each image moved by up to two pixels; black moves in."""
    generator = np.random.default_rng(seed)
    padded = np.pad(data.train_images[..., 0], ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    views = np.lib.stride_tricks.sliding_window_view(padded, data.train_images.shape[1:3], (1, 2))
    for _ in range(epochs):
        order = generator.permutation(len(padded))
        for index in order[: len(order) - len(order) % BATCH].reshape(-1, BATCH):
            down, right = generator.integers(0, 2 * SHIFT + 1, (2, BATCH))
            yield views[index, down, right][..., None], data.train_labels[index]


def optimizer(rate: float, steps: int, decay: float) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    return optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(schedule, momentum=0.9, nesterov=True)
    )


def method_of(bits: int | None) -> Compression:
    """Learned steps, one a layer, for every kernel; nothing for float."""
    if bits is None:
        return identity()
    inner, outer = (learned_step(Format(n, granularity=PerTensor())) for n in (bits, OUTER_BITS))
    return partition({"first/kernel": outer, "last/kernel": outer, "*/kernel": inner})


def with_steps(module: LeNet5, params: Any, images: np.ndarray) -> Any:
    """The parameters of a float network, and steps begun at its activations of some images."""
    _, found = module.apply(
        {"params": params}, images, rngs={"params": jax.random.key(0)}, mutable=["params"]
    )
    return found["params"]


def fit(
    module: LeNet5,
    params: Any,
    data: Dataset,
    recipe: Recipe,
    stage: int,
    seed: int,
    tick: Callable[[], None],
) -> Any:
    """Train from given weights; what would be shipped after the last step."""
    count = recipe.epochs[stage] * (len(data.train_labels) // BATCH)
    tx = wrap_optimizer(optimizer(recipe.rates[stage], count, recipe.decay), method_of(module.bits))

    @jax.jit
    def step(params: Any, opt_state: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            logits: Any = module.apply({"params": compressed(params, opt_state)}, images)
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for images, labels in batches(data, recipe.epochs[stage], 10 * seed + stage):
        params, opt_state = step(params, opt_state, images, labels)
        tick()
    return jaxcomp.pack(params, opt_state)


def trained(
    data: Dataset,
    recipe: Recipe,
    bits: int | None,
    stage: int,
    seed: int,
    directory: pathlib.Path,
    tick: Callable[[], None],
) -> pathlib.Path:
    """The file of a finished run; trained first where it is not there.

    Stage 0 is the float network from its start; stage 1 goes on from it, in float or in few bits.
    """
    # What comes later does not tell one float network from another.
    until = slice(stage + 1)
    settings = recipe._replace(epochs=recipe.epochs[until], rates=recipe.rates[until])
    told = repr((settings, data.name, len(data.train_labels), BATCH, SHIFT, OUTER_BITS))
    digest = hashlib.sha256(told.encode()).hexdigest()[:8]
    file = directory / f"lsq-{stage}-{bits or 'float'}-{digest}-{seed}.jxc"
    if file.exists():
        return file
    module, images = LeNet5(recipe.widths, bits), data.train_images[:1000]
    if stage == 0:
        params = module.init(jax.random.key(seed), images[:1])["params"]
    else:
        start = trained(data, recipe, None, 0, seed, directory, lambda: None)
        params = with_steps(module, jaxcomp.load(start), images)
    packed = fit(module, params, data, recipe, stage, seed, tick)
    directory.mkdir(parents=True, exist_ok=True)
    jaxcomp.save(file.with_suffix(".part"), packed)
    file.with_suffix(".part").rename(file)
    return file


def accuracy(module: LeNet5, tree: Any, data: Dataset) -> float:
    """On all test images, in percent."""

    @jax.jit
    def predict(tree: Any, images: Any) -> Any:
        logits: Any = module.apply({"params": tree}, images)
        return logits.argmax(-1)

    parts = np.array_split(data.test_images, max(1, len(data.test_images) // 1000))
    found = np.concatenate([predict(tree, part) for part in parts])
    return 100 * float((found == data.test_labels).mean())
