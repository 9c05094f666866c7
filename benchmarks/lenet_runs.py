"""Stages of training for lenet.py, each kept in a file; after a kill from its last epoch on."""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lenet_models as models
import numpy as np
import optax
from lenet_models import Params

import jaxcomp
from jaxcomp import Compression, compressed, pack, wrap_optimizer
from jaxcomp.demo.data import Dataset

Tick = Callable[[int], None]


class Stage(NamedTuple):
    """One training of all weights, from what the stage before left.

    Attributes:
        name: what is done, with all that the method is given: it tells files apart.
        method: from the number of steps to what is done to the weights.
        epochs: passes over the training images.
        rate: of Adam, at its peak; it falls to a hundredth by a cosine.
        dropout: fractions of the pixels and of the hidden units.
        batch: images a step.
        prepare: from the weights that are there, and the data, to those that training begins with.
    """

    name: str
    method: Callable[[int], Compression]
    epochs: int
    rate: float
    dropout: tuple[float, float] = (0.0, 0.0)
    batch: int = 128
    prepare: Callable[[Params, Dataset], Params] = lambda params, data: params


class Run(NamedTuple):
    """A finished stage.

    Attributes:
        file: what is shipped.
        params: what was loaded from it.
        seconds: of training, of this stage and those before it.
    """

    file: pathlib.Path
    params: Params
    seconds: float


def finished(
    directory: pathlib.Path, network: models.Network, stages: list[Stage], data: Dataset, seed: int
) -> pathlib.Path:
    """Where the last of some stages is kept: other settings, of any of them, give another file."""
    told = [(s.name, s.epochs, s.rate, s.dropout, s.batch) for s in stages]
    digest = hashlib.sha256(repr((network, data.name, told)).encode()).hexdigest()[:8]
    word = stages[-1].name.partition(" ")[0]
    return directory / f"{network.name}-{word}-{digest}-{seed}.jxc"


def trained(
    directory: pathlib.Path,
    network: models.Network,
    stages: list[Stage],
    data: Dataset,
    seed: int,
    tick: Tick,
) -> Run:
    """The last of some stages; what is not kept in the directory is trained first.

    Args:
        directory: of the kept files.
        network: which one.
        stages: in order.
        data: images and labels.
        seed: of the weights and of the order of the images.
        tick: called with the number of epochs done so far, of one more stage or of a kept one.
    """
    file = finished(directory, network, stages, data, seed)
    if file.exists():
        tick(sum(stage.epochs for stage in stages))
    else:
        directory.mkdir(parents=True, exist_ok=True)
        if len(stages) == 1:
            before, params = 0.0, models.initial(network, seed)
        else:
            start = trained(directory, network, stages[:-1], data, seed, tick)
            before, params = start.seconds, jaxcomp.decode(start.params)
        params = stages[-1].prepare(params, data)
        packed, seconds = fit(params, stages[-1], data, (seed, len(stages)), file, tick)
        unfinished = file.with_suffix(".new")
        jaxcomp.save(unfinished, models.to_ship(packed))
        file.with_suffix(".json").write_text(json.dumps({"seconds": before + seconds}))
        unfinished.rename(file)
        _progress_file(file).unlink(missing_ok=True)
    seconds = json.loads(file.with_suffix(".json").read_text())["seconds"]
    return Run(file, models.from_file(jaxcomp.load(file)), seconds)


def fit(
    params: Params,
    stage: Stage,
    data: Dataset,
    seeds: tuple[int, int],
    file: pathlib.Path,
    tick: Tick,
) -> tuple[Params, float]:
    """Train, keeping weights and optimizer after each epoch beside ``file``.

    Returns:
        What would be shipped, and the seconds of training.
    """
    per_epoch = len(data.train_labels) // stage.batch
    steps = per_epoch * stage.epochs
    rate = optax.warmup_cosine_decay_schedule(
        0.0, stage.rate, min(200, steps // 10), steps, stage.rate / 100
    )
    tx = wrap_optimizer(optax.adam(rate), stage.method(steps))
    step = _step_of(tx, stage.dropout)
    state = (params, tx.init(params))
    images, done, seconds = data.train_images[..., 0], 0, 0.0
    if _progress_file(file).exists():
        state, done, seconds = _resume(_progress_file(file), state)
    tick(done)
    for epoch in range(done, stage.epochs):
        begun = time.perf_counter()
        generator = np.random.default_rng((*seeds, epoch))
        order = generator.permutation(len(images))[: per_epoch * stage.batch]
        for number, index in enumerate(order.reshape(per_epoch, stage.batch)):
            at = (seeds[0], seeds[1], epoch * per_epoch + number)
            state = step(state, images[index], data.train_labels[index], np.array(at, np.uint32))
        jax.block_until_ready(state)
        seconds += time.perf_counter() - begun
        _keep(_progress_file(file), state, epoch + 1, seconds)
        tick(1)
    return pack(*state), seconds


def _step_of(tx: optax.GradientTransformation, dropout: tuple[float, float]) -> Any:
    def step(state: Any, images: Any, labels: Any, at: Any) -> Any:
        params, opt_state = state
        key = jax.random.key(0)
        for number in at:
            key = jax.random.fold_in(key, number)

        def loss(params: Params) -> Any:
            logits = models.apply(compressed(params, opt_state), images, dropout, key)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step)


def _progress_file(file: pathlib.Path) -> pathlib.Path:
    return file.with_suffix(".progress.npz")


def _keep(path: pathlib.Path, state: Any, epochs: int, seconds: float) -> None:
    """Replace the file at once: whoever is killed meanwhile leaves the one before."""
    leaves: dict[str, Any] = {
        f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))
    }
    unfinished = path.with_suffix(".new")
    with open(unfinished, "wb") as file:
        np.savez(file, epochs=epochs, seconds=seconds, **leaves)
    os.replace(unfinished, path)


def _resume(path: pathlib.Path, state: Any) -> tuple[Any, int, float]:
    leaves, treedef = jax.tree.flatten(state)
    with np.load(path) as kept:
        found = [jnp.asarray(kept[f"leaf{i}"]) for i in range(len(leaves))]
        return jax.tree.unflatten(treedef, found), int(kept["epochs"]), float(kept["seconds"])
