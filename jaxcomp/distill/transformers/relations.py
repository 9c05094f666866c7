"""Losses between the self-attention relations of a student and of a teacher, of any widths."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.checks import check_count
from jaxcomp.distill.inputs import as_floats, as_mask, check_same_batch
from jaxcomp.distill.logits.hinton import kl_divergence


def self_attention_relation(
    x: Shaped[ArrayLike, "..."], heads: int, where: Shaped[ArrayLike, "..."] | None = None
) -> Float[Array, "batch heads length length"]:
    """How much each token attends to each by the scaled dot product of like vectors.

    ``log softmax(X Xᵀ / sqrt(d))`` of each head, whose ``d`` is ``width / heads``. ``heads`` is
    the number of *relation* heads: any that divides the width, whatever the model's own.

    Args:
        x: float array (batch, length, width): all queries, all keys or all values of a layer,
            with the model's heads side by side, ``x.reshape(batch, length, -1)``.
        heads: the width is split to so many relation heads.
        where: boolean (batch, length), tokens that count; no token relates to the others.

    Returns:
        Log-probabilities (batch, heads, query, key); ``-inf`` at keys that do not count, and 0
        in the rows of queries that do not. float32, or float64 if ``x`` is.

    Raises:
        TypeError: ``x`` is not floating point, ``where`` is not boolean.
        ValueError: shapes that do not fit, heads that do not divide the width.

    Example:
        >>> values = jnp.array([[[2.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 2.0]]])
        >>> print((100 * jnp.exp(self_attention_relation(values, heads=2))).round())
        [[[[94.  6.]
           [50. 50.]]
        <BLANKLINE>
          [[33. 67.]
           [20. 80.]]]]

    Wang et al., "MiniLM", 2020, section 3.2; Wang et al., "MiniLMv2", 2021, section 3.1.
    """
    (x,) = as_floats(x=x)
    scores, keep = _scores("x", x, heads, where)
    rows = jnp.any(keep, -1, keepdims=True)
    logs = jax.nn.log_softmax(jnp.where(keep | ~rows, scores, -jnp.inf))
    return jnp.where(rows, logs, 0)


def relation_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    heads: int,
    *,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch length"]:
    """Divergence of the student's self-attention relations from the teacher's, per token.

    ``KL(teacher || student)`` in nats of :func:`self_attention_relation`, averaged over the
    relation heads. The mean over tokens is the paper's loss for one of queries, keys and values;
    MiniLMv2 adds the three, MiniLM adds that of the values to :func:`attention_map_loss`. Widths
    and numbers of heads of student and teacher may differ, so no projection is needed.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train. Products of features above 1e18 overflow float32.

    Args:
        student: float array (batch, length, width), queries, keys or values of a layer.
        teacher: float array (batch, length, its width) of the same vectors of the teacher's.
        heads: number of relation heads, which divides both widths; more heads, finer relations.
        where: boolean (batch, length), tokens that count; the others are in no relation.

    Returns:
        (batch, length); float32, or float64 if an array is.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, heads that do not divide both widths.

    Example:
        >>> import jax.numpy as jnp
        >>> teacher = jnp.array([[[2.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 2.0]]])
        >>> student = jnp.array([[[1.0, 1.0], [0.0, 1.0]]])
        >>> print(relation_loss(student, teacher, heads=2).round(4))
        [[0.1063 0.0995]]

    Wang et al., "MiniLM", 2020, section 3.2; Wang et al., "MiniLMv2", 2021, section 3.1.
    """
    s, t = as_floats(student=student, teacher=teacher)
    check_same_batch(student=s, teacher=t)
    student_scores, keep = _scores("student", s, heads, where)
    teacher_scores, _ = _scores("teacher", t, heads, where)
    if s.shape[1] != t.shape[1]:
        message = f"student {s.shape} and teacher {t.shape} must hold the same tokens on axis 1"
        raise ValueError(f"{message}: pad both to one length.")
    return jnp.mean(kl_divergence(student_scores, teacher_scores, where=keep), 1)


def _scores(
    name: str, x: Array, heads: int, where: Shaped[ArrayLike, "..."] | None
) -> tuple[Array, Array]:
    """Scaled products of all pairs of tokens, and a mask of the pairs that count."""
    if x.ndim != 3 or 0 in x.shape:
        message = f"{name} {x.shape} must be (batch, length, width), with something on each axis"
        raise ValueError(f"{message}: put heads side by side by a reshape.")
    batch, length, width = x.shape
    check_count("heads", heads)
    if width % heads:
        raise ValueError(f"heads {heads} must divide the width {width} of {name} {x.shape}.")
    tokens = as_mask(where, (batch, length))
    split = jnp.where(tokens[..., None], x, 0).reshape(batch, length, heads, width // heads)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bqhd,bkhd->bhqk", split, split, precision=exact)
    scores /= math.sqrt(width // heads)
    return scores, tokens[:, None, :, None] & tokens[:, None, None, :]
