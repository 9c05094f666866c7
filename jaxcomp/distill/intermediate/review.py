"""Knowledge review: shallow layers of the teacher taught by deep ones of the student too."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import as_floats, as_mask, check_same_batch, check_same_shape
from jaxcomp.distill.intermediate.convolutions import convolve, init_convolution
from jaxcomp.distill.intermediate.projection import resize

CONTEXTS = (4, 2, 1)  # sizes that maps are pooled to


def init_review(
    key: Any, students: Sequence[Any], teachers: Sequence[Any], width: int
) -> list[dict[str, Any]]:
    """Parameters of the fusion of the student's levels, from the deepest to the shallowest.

    Each level has a convolution to ``width`` channels (``"narrow"``, of size 1) and one to the
    teacher's (``"widen"``, of size 3); all but the deepest have one that weighs the level against
    the deeper ones (``"attention"``). As in the paper, but with biases in place of batch
    normalisation, which would make an example's loss depend on its batch, and keep running
    averages. Train them by your optimizer next to the student, and leave them out of what you ship.

    Args:
        key: PRNG key.
        students: the student's maps (batch, height, width, channels), from shallow to deep: arrays
            or ``jax.ShapeDtypeStruct``s, of which only shapes are read.
        teachers: the teacher's, likewise, level by level of the student's heights and widths.
        width: channels that levels are fused in; 256 or 512 is usual on ImageNet.

    Returns:
        A dict of ``{"kernel", "bias"}``s for each level, in float32.

    Raises:
        ValueError: not as many levels of both, maps that do not fit, no width.

    Example:
        >>> students = [jnp.ones((2, 4, 4, 4)), jnp.ones((2, 2, 2, 4))]
        >>> teachers = [jnp.ones((2, 4, 4, 8)), jnp.ones((2, 2, 2, 8))]
        >>> params = init_review(jax.random.key(0), students, teachers, width=4)
        >>> [{name: layer["kernel"].shape for name, layer in level.items()} for level in params]
        [{'narrow': (1, 1, 4, 4), 'widen': (3, 3, 4, 8), 'attention': (1, 1, 8, 2)},
         {'narrow': (1, 1, 4, 4), 'widen': (3, 3, 4, 8)}]

    Chen et al., "Distilling Knowledge via Knowledge Review", 2021, section 3.3.
    """
    _check(students, teachers)
    if width < 1:
        raise ValueError(f"width {width} must be at least 1.")
    params = []
    for level, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        narrow, widen, attention = jax.random.split(jax.random.fold_in(key, level), 3)
        made = {
            "narrow": init_convolution(narrow, student.shape[-1], width, 1, 2),
            "widen": init_convolution(widen, width, teacher.shape[-1], 3, 2),
        }
        if level < len(students) - 1:
            made["attention"] = init_convolution(attention, 2 * width, 2, 1, 2)
        params.append(made)
    return params


def review_loss(
    params: Sequence[dict[str, Any]],
    students: Sequence[Shaped[ArrayLike, "..."]],
    teachers: Sequence[Shaped[ArrayLike, "..."]],
    *,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Distance of the student's fused levels from the teacher's, summed over levels, per example.

    From the deepest level on, what came from deeper is enlarged to the level's size and weighed
    against it at each position; the result is compared with the teacher's level by
    :func:`hierarchical_context_loss` and goes on to the next. So the deep layers of the student
    learn from the shallow ones of the teacher too.

    The teachers are differentiated too; put ``jax.lax.stop_gradient`` around those that are
    functions of what you train.

    Args:
        params: of :func:`init_review`.
        students: float arrays (batch, height, width, channels), from shallow to deep.
        teachers: float arrays likewise, level by level of the student's heights and widths
            (``resize`` brings maps to other sizes); dtypes and channels may differ.
        where: boolean (batch,), examples that count; the loss of the others is 0.

    Returns:
        (batch,); float32, or float64 if an array is.

    Raises:
        TypeError: features that are not floating point, ``where`` that is not boolean.
        ValueError: not as many levels of all, maps that do not fit.

    Example:
        >>> students = [jnp.ones((2, 4, 4, 4)), jnp.ones((2, 2, 2, 4))]
        >>> teachers = [jnp.ones((2, 4, 4, 8)), jnp.ones((2, 2, 2, 8))]
        >>> params = init_review(jax.random.key(0), students, teachers, width=4)
        >>> jax.jit(review_loss)(params, students, teachers).shape
        (2,)

    Chen et al., "Distilling Knowledge via Knowledge Review", 2021, sections 3.2, 3.3.
    """
    named = {f"student_{i}": x for i, x in enumerate(students)}
    named |= {f"teacher_{i}": x for i, x in enumerate(teachers)}
    arrays = as_floats(**named)
    students, teachers = arrays[: len(students)], arrays[len(students) :]
    _check(students, teachers)
    check_same_batch(**{f"students[{i}]": x for i, x in enumerate(students)})
    if len(params) != len(students):
        raise ValueError(f"params of {len(params)} levels, but students have {len(students)}.")
    keep = as_mask(where, students[0].shape[:1], students[0].shape)
    losses, deeper = jnp.zeros((), students[0].dtype), None
    for i in reversed(range(len(students))):
        student, teacher = jnp.where(keep, students[i], 0), jnp.where(keep, teachers[i], 0)
        deeper = _fuse(params[i], f"students[{i}]", student, deeper)
        fused = convolve(params[i]["widen"], f"students[{i}]", deeper)
        losses += hierarchical_context_loss(fused, teacher, where=where)
    return losses


def hierarchical_context_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Squared differences of maps and of their averages over larger and larger parts, per example.

    The maps themselves have the weight 1; pooled to 4x4, 2x2 and 1x1, each where that is smaller,
    they have a half, a quarter and so on; the weights are divided by their sum. Each part is the
    mean over positions and channels.

    Args:
        student: float array (batch, height, width, channels).
        teacher: float array of the same shape; its dtype may differ.
        where: boolean (batch,), examples that count; the loss of the others is 0.

    Returns:
        (batch,); float32, or float64 if an array is.

    Raises:
        TypeError: features that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit.

    Example:
        >>> student = jnp.array([[[[3.0], [1.0]], [[1.0], [3.0]]]])
        >>> print(hierarchical_context_loss(student, jnp.ones((1, 2, 2, 1))).round(3))
        [1.667]

    Chen et al., "Distilling Knowledge via Knowledge Review", 2021, section 3.3.
    """
    s, t = as_floats(student=student, teacher=teacher)
    check_same_shape("project or resize the student.", student=s, teacher=t)
    _check([s], [t])
    keep = as_mask(where, s.shape[:1], s.shape)
    gap, total, weight = jnp.where(keep, s, 0) - jnp.where(keep, t, 0), 1.0, 1.0
    losses = jnp.mean(jnp.square(gap), (1, 2, 3))
    for size in CONTEXTS:
        if size < min(gap.shape[1:3]):
            weight /= 2
            total += weight
            # Pooling is linear: the pooled difference is the difference of the pooled.
            losses += weight * jnp.mean(jnp.square(resize(gap, (size, size))), (1, 2, 3))
    return jnp.where(keep[:, 0, 0, 0], losses / total, 0)


def _fuse(level: dict[str, Any], name: str, student: Array, deeper: Array | None) -> Array:
    """The level in the common width, with what came from deeper levels weighed in."""
    here = convolve(level["narrow"], name, student)
    if deeper is None:
        return here
    larger: Array = jax.image.resize(deeper, here.shape, "nearest")
    both = jnp.concatenate([here, larger], -1)
    weights = jax.nn.sigmoid(convolve(level["attention"], name, both))
    return here * weights[..., :1] + larger * weights[..., 1:]


def _check(students: Sequence[Any], teachers: Sequence[Any]) -> None:
    if len(students) != len(teachers) or not students:
        message = f"{len(students)} levels of students and {len(teachers)} of teachers"
        raise ValueError(f"{message} must be as many, and one at least.")
    for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        for name, maps in (("students", student), ("teachers", teacher)):
            if len(maps.shape) != 4 or 0 in maps.shape:
                raise ValueError(
                    f"{name}[{i}] {maps.shape} must be (batch, height, width, channels)."
                )
        if student.shape[:3] != teacher.shape[:3]:
            message = f"students[{i}] {student.shape} and teachers[{i}] {teacher.shape}"
            raise ValueError(f"{message} must be of one size: resize the student's.")
