"""The demo's train step: an ordinary Flax loop, compressing by two of its lines."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import jaxcomp
from jaxcomp import distill
from jaxcomp.demo.data import Dataset

TEMPERATURE = 4.0
TEACHER_WEIGHT = 0.3


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, images: Any, labels: Any, teacher: Any) -> TrainState:
    """One step on one batch; ``teacher`` holds the teacher's logits, or None."""

    def loss_fn(params: Any) -> Any:
        seen = jaxcomp.compressed(params, state.opt_state)
        logits = state.apply_fn({"params": seen}, images)
        if teacher is None:
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        else:
            losses = distill.hinton_loss(logits, teacher, labels, TEMPERATURE, TEACHER_WEIGHT)
        return losses.mean()

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


def batches(data: Dataset, size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of shuffled full batches."""
    generator = np.random.default_rng(seed)
    count = len(data.train_labels)
    for _ in range(epochs):
        order = generator.permutation(count)
        yield from order[: count - count % size].reshape(-1, size)


def fit(
    model: nn.Module,
    params: Any,
    tx: optax.GradientTransformation,
    data: Dataset,
    order: Iterator[np.ndarray],
    teacher_logits: np.ndarray | None,
    tick: Callable[[], None],
) -> TrainState:
    """Train from ``params`` over the batches of ``order``, calling ``tick`` after each."""
    # The step donates its state, and the caller keeps its weights.
    params = jax.tree.map(jnp.copy, params)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for index in order:
        logits = None if teacher_logits is None else teacher_logits[index]
        state = train_step(state, data.train_images[index], data.train_labels[index], logits)
        tick()
    return jax.block_until_ready(state)


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply_fn: Callable[..., Any], params: Any, images: Any) -> Any:
    return apply_fn({"params": params}, images)


def predict(model: nn.Module, params: Any, images: np.ndarray, size: int = 1000) -> np.ndarray:
    """Logits of a model on weights or compressed leaves, in batches."""
    parts = [
        _logits(model.apply, params, images[i : i + size]) for i in range(0, len(images), size)
    ]
    return np.concatenate([np.asarray(part) for part in parts])


def correct(model: nn.Module, params: Any, data: Dataset) -> int:
    """How many test images the model classifies correctly."""
    logits = predict(model, params, data.test_images)
    return int(np.sum(logits.argmax(-1) == data.test_labels))
