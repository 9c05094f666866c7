"""Losses between the attention of a student and of a teacher with as many heads."""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import as_floats, as_mask, check_same_shape, masked_mean
from jaxcomp.distill.logits.hinton import kl_divergence


def attention_map_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    kind: str = "squared",
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Distance of the student's attention from the teacher's, per head and query.

    Heads are compared one to one, as are positions. Models whose numbers of heads differ are
    compared by :func:`relation_loss`. The mean over heads and over queries that count is the
    papers' loss of a layer.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train.

    Args:
        student: float array (batch, heads, query, key) of any float dtype.
        teacher: float array of the same shape; its dtype may differ.
        kind: ``"squared"``, mean of the squared differences over the keys: of scores before the
            softmax, as in TinyBERT, or of probabilities. ``"divergence"``, ``KL(teacher ||
            student)`` in nats over the keys, of probabilities, as in MiniLM; a probability below
            the smallest normal float counts as that, so that the loss is finite. The divergence
            from scores is :func:`kl_divergence`, which keeps more digits.
        where: boolean, what counts: (batch, length), tokens, both as queries and as keys; or
            (batch, heads, query, key), as attention masks are, with size 1 on axes that it
            spans. Keys that do not count are left out of the mean, and what is left of the
            probabilities is scaled to the sum 1. A query without keys has the loss 0. Leave out
            what the model masks: scores of ``-inf`` in both have no difference.

    Returns:
        (batch, heads, query); float32, or float64 if an array is.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, an unknown kind.

    Example:
        >>> import jax.numpy as jnp
        >>> student = jnp.array([[[[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]]]])
        >>> teacher = jnp.array([[[[0.9, 0.1, 0.0], [0.4, 0.4, 0.2]]]])
        >>> print(attention_map_loss(student, teacher).round(4))
        [[[0.1067 0.08  ]]]
        >>> counts = jnp.array([[[[True, True, False]]]])  # the last key is padding
        >>> print(attention_map_loss(student, teacher, kind="divergence", where=counts).round(4))
        [[[0.3681 0.    ]]]

    Jiao et al., "TinyBERT", 2020, eq. 7; Wang et al., "MiniLM", 2020, section 3.1.
    """
    if kind not in ("squared", "divergence"):
        raise ValueError(f'kind {kind!r} must be "squared" or "divergence".')
    s, t = as_floats(student=student, teacher=teacher)
    check_same_shape("compare heads that differ by relation_loss.", student=s, teacher=t)
    if s.ndim != 4 or s.shape[-1] == 0:
        raise ValueError(f"student {s.shape} must be (batch, heads, query, key): reshape it.")
    keep = _pairs(where, s.shape)
    s, t = jnp.where(keep, s, 0), jnp.where(keep, t, 0)
    if kind == "squared":
        return masked_mean(jnp.square(s - t), keep, -1)
    tiny = jnp.finfo(s.dtype).tiny
    return kl_divergence(jnp.log(jnp.maximum(s, tiny)), jnp.log(jnp.maximum(t, tiny)), where=keep)


def _pairs(where: Any, shape: tuple[int, ...]) -> Array:
    """Mask of the pairs of query and key, which broadcasts against (batch, heads, query, key)."""
    if where is None or jnp.ndim(where) != 2:
        return as_mask(where, shape)
    batch, _, queries, keys = shape
    if queries != keys:
        message = f"where {jnp.shape(where)} names tokens, but queries {queries} and keys {keys}"
        raise ValueError(f"{message} differ: pass where of (batch, heads, query, key).")
    tokens = as_mask(where, (batch, keys))
    return tokens[:, None, :, None] & tokens[:, None, None, :]
