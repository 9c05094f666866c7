"""The language models of teacher_text.py, and their training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from sparsity_models import Task, initial, optimizer

from jaxcomp import distill
from jaxcomp.distill.transformers.hidden_states import hidden_state_loss
from jaxcomp.distill.transformers.layer_maps import layer_map


class Lesson(NamedTuple):
    """What a student learns from beside the next characters.

    Attributes:
        temperature: of the teacher's distributions.
        weight: their share of the loss on the logits; 0 is the characters alone.
        features: factor of the distances of hidden states, summed over the student's layers.
    """

    temperature: float = 1.0
    weight: float = 0.0
    features: float = 0.0


def apply_of(task: Task) -> Callable[[Any, Any], Any]:
    return lambda params, tokens: task.module.apply({"params": params}, tokens)


def layers(depth: int) -> list[str]:
    """The scopes of a Decoder's blocks, from the first to the last."""
    return [f"Decoder/block{i}" for i in range(depth)]


def paired(student: Task, teacher: Task) -> tuple[list[str], list[str]]:
    """Which of the teacher's blocks each of the student's learns from."""
    depths = student.module.depth, teacher.module.depth
    every = layers(depths[1])
    return layers(depths[0]), [every[i] for i in layer_map(*depths)]


def init_projections(key: jax.Array, student: Task, teacher: Task, params: list[Any]) -> list[Any]:
    """A projection for each of the student's blocks, from its width to the teacher's."""
    tokens, _ = student.batch(np.random.default_rng(0), 1)
    shapes = [
        distill.list_features(apply_of(task), tree, tokens, at=names).shapes
        for task, tree, names in zip(
            (student, teacher), params, paired(student, teacher), strict=True
        )
    ]
    pairs = list(zip(*paired(student, teacher), strict=True))
    keys = jax.random.split(key, len(pairs))
    return [
        distill.init_projection(k, shapes[0][own], shapes[1][other])
        for k, (own, other) in zip(keys, pairs, strict=True)
    ]


def lesson_loss(
    student: Task, teacher: Task, lesson: Lesson
) -> Callable[[Any, Any, Any, Any], jax.Array]:
    """Mean loss of (trained, the teacher's parameters, tokens, the tokens that follow).

    ``trained`` holds the parameters of the student and the projections. Only the parts of the
    teacher that the lesson needs are run.
    """
    own_names, teacher_names = paired(student, teacher)

    def loss(trained: Any, teacher_params: Any, tokens: Any, following: Any) -> jax.Array:
        params = trained["student"]
        if lesson == Lesson():
            logits = apply_of(student)(params, tokens)
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, following)
            return losses.mean()
        logits, own = distill.features(apply_of(student), params, tokens, at=own_names)
        frozen = distill.frozen(teacher_params)
        teacher_logits, wanted = distill.features(
            apply_of(teacher), frozen, tokens, at=teacher_names
        )
        total = distill.hinton_loss(
            logits, teacher_logits, following, lesson.temperature, lesson.weight
        ).mean()
        if lesson.features:
            for name, other, projection in zip(
                own_names, teacher_names, trained["projections"], strict=True
            ):
                projected = distill.project(projection, own[name])
                distance = hidden_state_loss(projected, wanted[other]).mean()
                total = total + lesson.features * distance
        return total

    return loss


def fit(
    student: Task,
    teacher: Task,
    teacher_params: Any,
    lesson: Lesson,
    seed: int,
    tick: Callable[[], None],
) -> Any:
    """The student's parameters after training; the same start and batches for every lesson."""
    params, tx = initial(student, seed), optimizer(student)
    loss = lesson_loss(student, teacher, lesson)

    @jax.jit
    def step(
        trained: Any, opt_state: Any, teacher_params: Any, tokens: Any, following: Any
    ) -> tuple[Any, Any]:
        slopes = jax.grad(loss)(trained, teacher_params, tokens, following)
        updates, opt_state = tx.update(slopes, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    trained = {"student": params}
    if lesson.features:
        key = jax.random.key(seed + 1000)
        trees = [params, teacher_params]
        trained["projections"] = init_projections(key, student, teacher, trees)
    opt_state, generator = tx.init(trained), np.random.default_rng(seed)
    for _ in range(student.steps):
        batch = student.batch(generator, student.batch_size)
        trained, opt_state = step(trained, opt_state, teacher_params, *batch)
        tick()
    return jax.block_until_ready(trained["student"])
