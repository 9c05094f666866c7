"""The networks of teacher_images.py, and their training."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from lsq_models import BATCH, batches

from jaxcomp import distill
from jaxcomp.demo.data import Dataset


class Mlp(nn.Module):
    """Two hidden layers of ReLUs.

    Attributes:
        width: units of a hidden layer.
        dropout: share of the hidden units left out where ``train`` is true.
    """

    width: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = images.reshape(len(images), -1)
        for name in ("first", "second"):
            x = nn.relu(nn.Dense(self.width, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(10, name="last")(x)


class Training(NamedTuple):
    """How a network is trained: Adam, its rate warmed up and then decayed by a cosine to zero.

    Attributes:
        width: of the hidden layers.
        epochs: how many.
        rate: the peak of the learning rate.
    """

    width: int
    epochs: int
    rate: float


class Lesson(NamedTuple):
    """What a student learns from.

    Attributes:
        temperature: of the teacher's soft targets.
        weight: their share of the loss; 0 is the labels alone.
        unseen: a digit that is missing from the training images; None for all ten.
    """

    temperature: float
    weight: float
    unseen: int | None = None


def optimizer(training: Training, images: int) -> optax.GradientTransformation:
    steps = training.epochs * (images // BATCH)
    rate = optax.warmup_cosine_decay_schedule(0.0, training.rate, steps // 20, steps)
    return optax.adam(rate)


def initial(module: Mlp, data: Dataset, seed: int) -> Any:
    return module.init(jax.random.key(seed), data.train_images[:1])["params"]


def fit_teacher(
    module: Mlp, training: Training, data: Dataset, seed: int, tick: Callable[[], None]
) -> Any:
    """Dropout, labels, and images moved by up to two pixels."""
    tx = optimizer(training, len(data.train_labels))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, images: Any, labels: Any, key: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            rngs = {"dropout": key}
            logits: Any = module.apply({"params": params}, images, train=True, rngs=rngs)
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = initial(module, data, seed)
    opt_state = tx.init(params)
    key = jax.random.key(seed + 1000)
    for i, (images, labels) in enumerate(batches(data, training.epochs, seed)):
        params, opt_state = step(params, opt_state, images, labels, jax.random.fold_in(key, i))
        tick()
    return params


def orders(count: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Which images make a batch: all of them shuffled, epoch after epoch, full batches only."""
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(count)
        yield from order[: count - count % BATCH].reshape(-1, BATCH)


def fit_student(
    training: Training,
    lesson: Lesson,
    data: Dataset,
    teacher_logits: np.ndarray,
    seed: int,
    tick: Callable[[], None],
) -> Any:
    """Nothing is moved or left out; the teacher's logits are looked up.

    The step is the same program with and without the teacher, whose weight is an argument.
    """
    kept = np.flatnonzero(data.train_labels != lesson.unseen)
    module, tx = Mlp(training.width), optimizer(training, len(kept))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Any, opt_state: Any, images: Any, labels: Any, teacher: Any, weight: Any
    ) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            logits: Any = module.apply({"params": params}, images)
            losses = distill.hinton_loss(logits, teacher, labels, lesson.temperature, weight)
            return losses.mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = initial(module, data, seed)
    opt_state = tx.init(params)
    for order in orders(len(kept), training.epochs, seed):
        index = kept[order]
        batch = (data.train_images[index], data.train_labels[index], teacher_logits[index])
        params, opt_state = step(params, opt_state, *batch, lesson.weight)
        tick()
    return params


def logits_of(module: Mlp, params: Any, images: np.ndarray) -> np.ndarray:
    """Of all images, without dropout."""
    predict: Any = jax.jit(lambda params, images: module.apply({"params": params}, images))
    parts = np.array_split(images, max(1, len(images) // 1000))
    return np.concatenate([predict(params, part) for part in parts])


class Tested(NamedTuple):
    """On the test images.

    Attributes:
        errors: how many have the wrong digit.
        unseen_errors: how many of these show the digit that was missing in training.
        loss: mean cross-entropy, nats.
    """

    errors: int
    unseen_errors: int
    loss: float


def judged(logits: np.ndarray, labels: np.ndarray, unseen: int | None = None) -> Tested:
    wrong = logits.argmax(-1) != labels
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), labels)
    return Tested(int(wrong.sum()), int((wrong & (labels == unseen)).sum()), float(losses.mean()))
