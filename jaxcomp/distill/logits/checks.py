"""What the logit losses check first: shapes and dtypes always, values where they are known."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcomp.distill.inputs import check_floating, check_scalar, known, spans


def check_logits(student_logits: Any, teacher_logits: Any, axis: int) -> tuple[Array, Array, int]:
    """Both as arrays, and ``axis`` from the front."""
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    check_floating(student_logits=student, teacher_logits=teacher)
    if student.shape != teacher.shape:
        message = "student_logits {} and teacher_logits {} must have one shape"
        message = message.format(student.shape, teacher.shape)
        raise ValueError(f"{message}: use jnp.broadcast_to, or slice both to the same classes.")
    return student, teacher, _check_classes(student.shape, axis)


def check_single_logits(logits: Any, axis: int) -> tuple[Array, int]:
    """As an array, and ``axis`` from the front."""
    array = jnp.asarray(logits)
    check_floating(logits=array)
    return array, _check_classes(array.shape, axis)


def _check_classes(shape: tuple[int, ...], axis: int) -> int:
    if not -len(shape) <= axis < len(shape) or shape[axis] == 0:
        raise ValueError(f"logits {shape} have no class on axis {axis}: pass the classes' axis=.")
    return axis % len(shape)


def check_where(where: Any, shape: tuple[int, ...], axis: int) -> Array:
    """The classes that count, as a mask that broadcasts against the logits."""
    if where is None:
        return jnp.ones((1,) * len(shape), bool)
    keep = jnp.asarray(where)
    if keep.dtype != bool:
        raise TypeError(f"where must be boolean, got {keep.dtype}: pass where != 0.")
    examples = shape[:axis] + shape[axis + 1 :]
    for wanted in (shape, examples):
        if spans(keep, wanted):
            return keep if wanted == shape else jnp.expand_dims(keep, axis)
    raise ValueError(
        f"where {keep.shape} fits neither the logits {shape} (classes that count) nor {examples} "
        "(examples that count): give it one of these shapes, or size 1 on the axes it spans."
    )


def check_labels(labels: Any, shape: tuple[int, ...], keep: Array, axis: int) -> Array:
    """Class ids, wide enough to be compared with any class, or target probabilities."""
    array = jnp.asarray(labels)
    if array.shape == shape and not jnp.issubdtype(array.dtype, jnp.complexfloating):
        return array
    examples = shape[:axis] + shape[axis + 1 :]
    if array.shape != examples:
        raise ValueError(
            f"labels {array.shape} {array.dtype} must be class ids of shape {examples} or real "
            f"target probabilities of shape {shape}, as logits {shape} have classes on axis {axis}."
        )
    remedy = f"cast them, or pass target probabilities of shape {shape}."
    return _check_ids(labels, array, shape, keep, axis, remedy)


def check_class_ids(labels: Any, shape: tuple[int, ...], keep: Array, axis: int) -> Array:
    """Class ids alone, for losses that know no target probabilities."""
    array, examples = jnp.asarray(labels), shape[:axis] + shape[axis + 1 :]
    if array.shape != examples:
        message = f"labels {array.shape} {array.dtype} must be class ids of shape {examples}"
        raise ValueError(f"{message}, as logits {shape} have classes on axis {axis}.")
    return _check_ids(labels, array, shape, keep, axis, "cast them.")


def _check_ids(
    labels: Any, array: Array, shape: tuple[int, ...], keep: Array, axis: int, remedy: str
) -> Array:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        message = f"labels {array.shape} are class ids and must be integers, got {array.dtype}"
        raise TypeError(f"{message}: {remedy}")
    ids, counts, classes = known(labels), known(keep), shape[axis]
    if ids is not None and counts is not None:
        read = np.broadcast_to(counts.any(axis), array.shape)
        unknown = ids[read & ((ids < 0) | (ids >= classes))]
        if unknown.size:
            message = f"labels hold {unknown[0]}, but logits have classes 0 to {classes - 1}"
            raise ValueError(f"{message}: map labels to these, or leave examples out with where=.")
    return array.astype(jnp.int32) if array.dtype.itemsize < 4 else array


def check_temperature(temperature: Any, dtype: Any) -> Array:
    """In the dtype that is computed in, which must hold it and its half."""
    low, high = 2 * jnp.finfo(dtype).tiny, jnp.finfo(dtype).max
    remedy = "must be positive and finite: 1 to 20 is usual"
    return check_scalar("temperature", temperature, low, high, remedy).astype(dtype)


def check_weight(name: str, weight: Any, dtype: Any) -> Array:
    """The weight of a part of a loss, in the dtype that is computed in."""
    remedy = "must be finite and not negative"
    return check_scalar(name, weight, 0, jnp.finfo(dtype).max, remedy).astype(dtype)
