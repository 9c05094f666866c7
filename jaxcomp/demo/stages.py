"""The stages of the demo: which method each trains with, and what came of it."""

import dataclasses
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import jaxcomp
from jaxcomp import checkpoint, prune, quantize, share
from jaxcomp.demo import models, training
from jaxcomp.demo.data import Dataset


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long and how far; everything that the command line can change.

    Attributes:
        model: a key of ``models.STUDENTS``.
        epochs: passes over the training images of fresh weights; weights that are pruned get
            twice as many more, others that are compressed half as many.
        batch_size: images a step.
        sparsity: fraction of weights removed.
        clusters: shared values a leaf.
        bits: bits of the quantized stage.
        learning_rate: peak of a cosine schedule.
    """

    model: str = "cnn"
    epochs: int = 18
    batch_size: int = 64
    sparsity: float = 0.9
    clusters: int = 8
    bits: int = 4
    learning_rate: float = 2e-3

    def steps(self, data: Dataset, epochs: int) -> int:
        """Steps of so many passes."""
        return epochs * (len(data.train_labels) // self.batch_size)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: its name.
        method: what the weights become; None for the float32 weights themselves.
        start: the stage whose weights it starts from; None for fresh ones.
        distilled: whether the teacher's logits are in its loss.
        epochs: passes over the training images.
    """

    name: str
    method: jaxcomp.Compression | None
    start: str | None
    distilled: bool
    epochs: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What a stage came to with one seed.

    Attributes:
        correct: test images classified correctly.
        tested: test images.
        file_bytes: bytes of the saved file.
        parameters: weights and biases.
        sparsity: fraction of all parameters that are exactly zero.
    """

    correct: int
    tested: int
    file_bytes: int
    parameters: int
    sparsity: float

    @property
    def accuracy(self) -> float:
        """Percent of the test images."""
        return 100 * self.correct / self.tested

    @property
    def ratio(self) -> float:
        """How many times smaller than all parameters in float32."""
        return 4 * self.parameters / self.file_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file for each parameter."""
        return 8 * self.file_bytes / self.parameters


def stages(plan: Plan, data: Dataset) -> tuple[Stage, ...]:
    """The stages in the order in which they run."""
    long, short = 2 * plan.epochs, max(1, plan.epochs // 2)
    steps = plan.steps(data, long)
    schedule = prune.cubic(plan.sparsity, begin=0, end=steps // 2)
    pruned = prune.gradual(prune.scores.magnitude, schedule, prune.allocation.global_threshold)
    shared_later = share.train(plan.clusters, begin=int(0.7 * steps))
    quantized = quantize.train(quantize.Format(plan.bits))
    return (
        Stage("dense", None, None, False, plan.epochs),
        Stage("distilled", None, None, True, plan.epochs),
        Stage("pruned", pruned, "distilled", False, long),
        Stage("shared", share.train(plan.clusters), "distilled", False, short),
        Stage("quantized", quantized, "distilled", False, short),
        Stage("all together", jaxcomp.chain(pruned, shared_later), "distilled", True, long),
    )


def total_steps(plan: Plan, data: Dataset, seeds: int) -> int:
    """Train steps of the whole demo, the teacher's too."""
    epochs = plan.epochs + sum(stage.epochs for stage in stages(plan, data))
    return seeds * plan.steps(data, epochs)


def run(
    plan: Plan,
    data: Dataset,
    seeds: int,
    output: pathlib.Path,
    tick: Callable[[str], None],
) -> dict[str, list[Result]]:
    """Train every stage with every seed; the first seed's last stage is written to ``output``.

    Args:
        plan: sizes and targets.
        data: images and labels.
        seeds: how many seeds, from 0 on.
        output: the file to ship.
        tick: called after each step with a few words on what is under way.

    Returns:
        Results by the name of the stage, one a seed.
    """
    table = stages(plan, data)
    # One transformation a stage, so that later seeds find its compiled step.
    optimizers = {stage.name: _optimizer(plan, data, stage) for stage in table}
    results: dict[str, list[Result]] = {stage.name: [] for stage in table}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            trees = _run_seed(plan, data, table, optimizers, seed, tick)
            for name, tree in trees.items():
                path = output if name == table[-1].name and seed == 0 else f"{folder}/stage.jxc"
                metadata = {"model": plan.model, "data": data.name, "stage": name}
                results[name].append(_measure(plan, data, tree, path, metadata))
    return results


def _optimizer(plan: Plan, data: Dataset, stage: Stage) -> optax.GradientTransformation:
    steps = plan.steps(data, stage.epochs)
    optimizer = optax.adam(optax.cosine_decay_schedule(plan.learning_rate, steps, 0.01))
    return jaxcomp.wrap_optimizer(optimizer, stage.method or jaxcomp.identity())


def _run_seed(
    plan: Plan, data: Dataset, table: Any, optimizers: Any, seed: int, tick: Callable[[str], None]
) -> dict[str, Any]:
    """Train every stage with one seed; packed trees by stage."""
    student, teacher = models.STUDENTS[plan.model], models.TEACHERS[plan.model]
    keys = jax.random.split(jax.random.key(seed), 2)
    fresh = student.init(keys[0], data.train_images[:1])["params"]
    teacher_params = teacher.init(keys[1], data.train_images[:1])["params"]

    def train(model: Any, params: Any, stage: Stage, logits: Any, name: str) -> Any:
        order = training.batches(data, plan.batch_size, stage.epochs, seed)
        report = lambda: tick(f"seed {seed}: {name}")
        return training.fit(model, params, optimizers[stage.name], data, order, logits, report)

    state = train(teacher, teacher_params, table[0], None, "teacher")
    logits = training.predict(teacher, state.params, data.train_images)
    weights, packed = {None: fresh}, {}
    for stage in table:
        known = logits if stage.distilled else None
        state = train(student, weights[stage.start], stage, known, stage.name)
        weights[stage.name] = state.params
        packed[stage.name] = jaxcomp.pack(state.params, state.opt_state)
    return packed


def _measure(plan: Plan, data: Dataset, tree: Any, path: Any, metadata: Any) -> Result:
    """Save a stage, and evaluate what the file holds rather than what was in memory."""
    file_bytes = checkpoint.save(path, tree, metadata)
    loaded = checkpoint.load(path)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jaxcomp.decode(loaded))]
    parameters = sum(leaf.size for leaf in leaves)
    return Result(
        correct=training.correct(models.STUDENTS[plan.model], loaded, data),
        tested=len(data.test_labels),
        file_bytes=file_bytes,
        parameters=parameters,
        sparsity=sum(int(np.sum(leaf == 0)) for leaf in leaves) / parameters,
    )


def verify(path: pathlib.Path, data_dir: str | None) -> int:
    """Evaluate a file in a new process.

    Returns:
        Test images that it classifies correctly there.

    Raises:
        RuntimeError: the new process failed; the message holds what it said.
    """
    command = [sys.executable, "-m", "jaxcomp.demo.verify", str(path)]
    command += [] if data_dir is None else ["--data-dir", data_dir]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"a new process could not evaluate {path}:\n{done.stderr.strip()}")
    return int(done.stdout.split()[-1])
