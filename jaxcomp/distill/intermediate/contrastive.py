"""Contrastive representation distillation: know the teacher's view of an example from others."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.checks import check_count
from jaxcomp.distill.inputs import (
    as_floats,
    as_mask,
    check_positive,
    check_same_batch,
    check_scalar,
    known,
    normalized,
)
from jaxcomp.distill.intermediate.projection import init_projection, project
from jaxcomp.sharding import automatic, spec_like


class ContrastiveMemory(NamedTuple):
    """What is remembered of all examples; new after each call, as optimizer states are.

    Attributes:
        student: (count, features), a unit vector for each example, of the student's.
        teacher: (count, features), of the teacher's.
        log_means: (2,), of the first batch: the logarithm of the mean ``exp(score)`` of the
            student and of the teacher, by which all later ones are divided.
        begun: boolean scalar, whether ``log_means`` is set.
    """

    student: Array
    teacher: Array
    log_means: Array
    begun: Array


def init_contrastive(
    key: Any, student: Any, teacher: Any, features: int = 128
) -> dict[str, dict[str, Array]]:
    """Parameters of two linear maps, the student's and the teacher's, to a space of both.

    Train both by your optimizer next to the student, and leave them out of what you ship.

    Args:
        key: PRNG key.
        student: the student's features (batch, ...), array or ``jax.ShapeDtypeStruct``: only the
            shape is read; all axes but the first are flattened.
        teacher: the teacher's, likewise.
        features: of the common space; 128 in the paper.

    Returns:
        ``{"student": {"kernel", "bias"}, "teacher": {"kernel", "bias"}}`` in float32.

    Raises:
        ValueError: features that are empty or have no batch.

    Example:
        >>> heads = init_contrastive(jax.random.key(0), jnp.ones((8, 16)), jnp.ones((8, 4, 4, 3)))
        >>> jax.tree.map(jnp.shape, heads)
        {'student': {'bias': (128,), 'kernel': (16, 128)},
         'teacher': {'bias': (128,), 'kernel': (48, 128)}}

    Tian, Krishnan and Isola, "Contrastive Representation Distillation", 2020, section 3.
    """
    check_count("features", features)
    out = jax.ShapeDtypeStruct((1, features), jnp.float32)
    keys, heads = jax.random.split(key), {}
    for k, name, array in zip(keys, ("student", "teacher"), (student, teacher), strict=True):
        if not array.shape:
            raise ValueError(f"{name} {array.shape} must be (batch, ...).")
        flat = jax.ShapeDtypeStruct((1, math.prod(array.shape[1:])), jnp.float32)
        heads[name] = init_projection(k, flat, out)
    return heads


def init_memory(key: Any, count: int, features: int = 128) -> ContrastiveMemory:
    """A memory of random vectors, for as many examples as there are.

    Args:
        key: PRNG key.
        count: examples in the training set, at least 2.
        features: of the space that :func:`init_contrastive` made heads for.

    Returns:
        A memory of ``2 * count * features`` float32 numbers.

    Raises:
        ValueError: a count below 2, or features below 1.

    Example:
        >>> memory = init_memory(jax.random.key(0), count=50_000)
        >>> memory.student.shape, bool(memory.begun)
        ((50000, 128), False)

    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018.
    """
    if count < 2 or features < 1:
        raise ValueError(f"count {count} must be at least 2, and features {features} at least 1.")
    # As in the paper's code: such vectors have norm 1 on average.
    drawn = jax.random.uniform(key, (2, count, features), minval=-1) * math.sqrt(3 / features)
    return ContrastiveMemory(drawn[0], drawn[1], jnp.zeros(2), jnp.zeros((), bool))


def contrastive_loss(
    heads: dict[str, dict[str, Any]],
    memory: ContrastiveMemory,
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    indices: Shaped[ArrayLike, "..."],
    key: Any,
    *,
    negatives: int | Shaped[ArrayLike, "..."] = 16384,
    temperature: ArrayLike = 0.07,
    momentum: ArrayLike = 0.5,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> tuple[Float[Array, "batch"], ContrastiveMemory]:
    """Surprise at telling each example's own pair from pairs with others, per example.

    Noise-contrastive estimation, in nats: is a remembered vector of the teacher the one of this
    example, or one of the ``negatives``? A score is the cosine divided by the temperature; its
    exponential is divided by the mean of the first batch, once and for all, as in the paper's code
    (whose constant is that mean times the number of examples). The same is asked of the teacher's
    vector and the student's memory; both are added. Then the memory of the batch moves towards
    its new vectors and is normalized.

    Negatives are drawn with replacement, uniformly from all *other* examples; the paper's code
    draws from all, and may draw the example itself. Held in memory are ``batch * count`` scores,
    or ``batch * negatives * features`` numbers where these are fewer.

    Only features and heads are differentiated, not the memory. The teacher is, too; put
    ``jax.lax.stop_gradient`` around one that is a function of what you train: its head learns on.

    Args:
        heads: of :func:`init_contrastive`.
        memory: of :func:`init_memory`, or of the call before; may be donated.
        student: float array (batch, ...); all axes but the first are flattened.
        teacher: float array (batch, ...), likewise.
        indices: integers (batch,), each example's number in the training set, all different.
        key: PRNG key, a new one for each call; None where negatives are given.
        negatives: how many to draw for each example, 16384 in the paper; or integers (batch,
            negatives), numbers of examples that you drew, such as some of other classes.
        temperature: positive scalar, possibly traced.
        momentum: scalar in [0, 1], possibly traced: the weight of what was remembered.
        where: boolean (batch,), examples that count. The loss of the others is 0, and they are
            not remembered.

    Returns:
        The losses (batch,), float32, or float64 if an array is; and the memory for the next call,
        without gradient. Vectors that are not finite make losses NaN and are not remembered.

    Raises:
        TypeError: features that are not floating point, indices that are not integers, ``where``
            that is not boolean.
        ValueError: shapes that do not fit, indices that the memory does not have (inside ``jit``
            the loss is NaN), no negatives, a temperature or momentum out of range.

    Example:
        >>> student, teacher = jnp.ones((4, 6)), jnp.ones((4, 9))
        >>> heads = init_contrastive(jax.random.key(0), student, teacher, features=8)
        >>> memory = init_memory(jax.random.key(1), count=100, features=8)
        >>> loss = jax.jit(contrastive_loss, static_argnames="negatives", donate_argnames="memory")
        >>> losses, memory = loss(
        ...     heads, memory, student, teacher, jnp.arange(4), jax.random.key(2), negatives=32
        ... )
        >>> losses.shape, bool(memory.begun)
        ((4,), True)

    Tian, Krishnan and Isola, "Contrastive Representation Distillation", 2020, section 3.
    """
    s, t, keep = _embed(heads, student, teacher, where)
    memory = ContrastiveMemory(*map(jnp.asarray, memory))
    if memory.student.shape[1] != s.shape[1]:
        message = f"memory holds {memory.student.shape[1]} features, but heads lead to {s.shape[1]}"
        raise ValueError(f"{message}: pass the same features to both.")
    count = len(memory.student)
    ids, there = _check_indices("indices", indices, count, s.shape[:1], keep)
    others, known_others = _negatives(key, negatives, ids, count, keep)
    temperature = _check_temperature(temperature, s.dtype)
    momentum = check_scalar("momentum", momentum, 0, 1, "must be in [0, 1]: 0.5 is usual")
    there &= known_others
    compare = automatic(_compare, out=(_rows(s), PartitionSpec()))
    return compare(memory, s, t, ids, others, there, keep, temperature, momentum)


def _compare(
    memory: ContrastiveMemory,
    s: Array,
    t: Array,
    ids: Array,
    others: Array,
    there: Array,
    keep: Array,
    temperature: Array,
    momentum: Array,
) -> tuple[Array, ContrastiveMemory]:
    """The losses of unit vectors, and the memory after them."""
    chosen = jnp.concatenate([ids[:, None], others], 1)
    scores = jnp.stack([_scores(s, memory.teacher, chosen), _scores(t, memory.student, chosen)])
    scores = scores / temperature
    log_means, begun = _log_means(memory, scores, keep & there)
    # The odds of the pair against noise: those of the positive should be high, of others low.
    odds = scores - log_means.astype(scores.dtype)[:, None, None] - math.log(others.shape[1])
    losses = jax.nn.softplus(-odds[..., 0]) + jnp.sum(jax.nn.softplus(odds[..., 1:]), -1)
    losses = jnp.where(keep, jnp.where(there, jnp.sum(losses, 0), jnp.nan), 0)
    moved = ContrastiveMemory(
        student=_remember(memory.student, s, ids, keep & there, momentum),
        teacher=_remember(memory.teacher, t, ids, keep & there, momentum),
        log_means=log_means,
        begun=begun,
    )
    return losses, jax.lax.stop_gradient(moved)


def in_batch_contrastive_loss(
    heads: dict[str, dict[str, Any]],
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    temperature: ArrayLike = 0.07,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Surprise at telling each example's own pair from pairs with the rest of its batch.

    The contrastive loss without a memory, for large batches: the cross-entropy, in nats, of
    finding an example's teacher among the teachers of the batch by cosines over the temperature,
    and that of finding its student among the students, averaged. Zero for a batch of one.

    The teacher is differentiated too; put ``jax.lax.stop_gradient`` around one that is a function
    of what you train: its head learns on.

    Args:
        heads: of :func:`init_contrastive`.
        student: float array (batch, ...); all axes but the first are flattened.
        teacher: float array (batch, ...), likewise.
        temperature: positive scalar, possibly traced.
        where: boolean (batch,), examples that count; the others are no one's negatives.

    Returns:
        (batch,); float32, or float64 if an array is.

    Raises:
        TypeError: features that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, a temperature that is not positive and finite.

    Example:
        >>> heads = {name: {"kernel": jnp.eye(2)} for name in ("student", "teacher")}
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> print(in_batch_contrastive_loss(heads, x, x, temperature=0.5).round(4))
        [0.1269 0.1269]

    Van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding",
    2018, eq. 4; both directions as in Radford et al., "Learning Transferable Visual Models From
    Natural Language Supervision", 2021, section 2.3.
    """
    s, t, keep = _embed(heads, student, teacher, where)
    temperature = _check_temperature(temperature, s.dtype)
    return automatic(_in_batch, out=_rows(s))(s, t, keep, temperature)


def _in_batch(s: Array, t: Array, keep: Array, temperature: Array) -> Array:
    scores = jnp.matmul(s, t.T, precision=jax.lax.Precision.HIGHEST) / temperature
    own, both = jnp.diagonal(scores), keep[:, None] & keep[None]
    scores = jnp.where(both, scores, -jnp.inf)
    # Rows that do not count keep one finite score, for a gradient without NaN.
    scores = jnp.where(jnp.eye(len(s), dtype=bool), own, scores)
    found = jax.nn.logsumexp(scores, 0) + jax.nn.logsumexp(scores, 1)
    return jnp.where(keep, found / 2 - own, 0)


def _rows(vectors: Array) -> PartitionSpec:
    """Where one number for each vector lies: as the vectors do."""
    return PartitionSpec(*spec_like(vectors, (len(vectors), 1))[:1])


def _embed(
    heads: dict[str, dict[str, Any]], student: Any, teacher: Any, where: Any
) -> tuple[Array, Array, Array]:
    """Unit vectors in the common space, and a mask (batch,)."""
    s, t = as_floats(student=student, teacher=teacher)
    check_same_batch(student=s, teacher=t)
    keep = jnp.broadcast_to(as_mask(where, s.shape[:1]), s.shape[:1])
    made = []
    for name, x in (("student", s), ("teacher", t)):
        flat = jnp.where(keep[:, None], x.reshape(len(x), -1), 0)
        made.append(normalized(project(heads[name], flat)))
    s, t = as_floats(student=made[0], teacher=made[1])
    if s.shape != t.shape:
        raise ValueError(f"heads lead to {s.shape[1]} and {t.shape[1]} features: one is needed.")
    return s, t, keep


def _scores(anchors: Array, remembered: Array, chosen: Array) -> Array:
    """Products of each anchor (batch, features) with its chosen rows of the memory."""
    remembered = jax.lax.stop_gradient(remembered).astype(anchors.dtype)
    exact = jax.lax.Precision.HIGHEST
    if chosen.shape[1] * anchors.shape[1] < len(remembered):
        return jnp.einsum("bf,bnf->bn", anchors, remembered[chosen], precision=exact)
    # All scores take less room than the chosen rows.
    return jnp.take_along_axis(jnp.matmul(anchors, remembered.T, precision=exact), chosen, 1)


def _log_means(memory: ContrastiveMemory, scores: Array, keep: Array) -> tuple[Array, Array]:
    """The constants of the memory, or those of this batch if it is the first with an example."""
    scores = jax.lax.stop_gradient(scores)
    counts = jnp.sum(keep, dtype=scores.dtype) * scores.shape[-1]
    safe = jnp.where(keep[:, None], scores, -jnp.inf)
    found = jax.nn.logsumexp(safe, (1, 2)) - jnp.log(jnp.maximum(counts, 1))
    usable = (counts > 0) & jnp.all(jnp.isfinite(found))
    found = jnp.where(counts > 0, found, 0)
    log_means = jnp.where(memory.begun, memory.log_means.astype(found.dtype), found)
    stored = jnp.where(memory.begun | usable, log_means, memory.log_means)
    return stored.astype(memory.log_means.dtype), memory.begun | usable


def _remember(remembered: Array, vectors: Array, ids: Array, keep: Array, momentum: Array) -> Array:
    """Rows of the batch moved towards its vectors and normalized."""
    momentum = momentum.astype(vectors.dtype)
    moved = momentum * remembered[ids].astype(vectors.dtype) + (1 - momentum) * vectors
    moved = normalized(moved).astype(remembered.dtype)
    usable = keep & jnp.all(jnp.isfinite(moved), -1)
    return remembered.at[jnp.where(usable, ids, len(remembered))].set(moved, mode="drop")


def _negatives(
    key: Any, negatives: Any, ids: Array, count: int, keep: Array
) -> tuple[Array, Array]:
    """Numbers of other examples (batch, negatives), and where the memory has them all."""
    if jnp.ndim(negatives):
        shape = (len(ids), *jnp.shape(negatives)[1:])
        others, there = _check_indices("negatives", negatives, count, shape, keep[:, None])
        if others.ndim != 2 or 0 in shape:
            raise ValueError(f"negatives {others.shape} must be (batch, negatives).")
        return others, jnp.all(there, 1)
    check_count("negatives", negatives)
    if key is None:
        raise TypeError("key is None: pass a PRNG key, or the negatives themselves.")
    steps = jax.random.randint(key, (len(ids), negatives), 1, count, ids.dtype)
    return (ids[:, None] + steps) % count, jnp.ones_like(keep)


def _check_indices(
    name: str, indices: Any, count: int, shape: tuple[int, ...], keep: Array
) -> tuple[Array, Array]:
    """Indices that the memory has, and where they were these."""
    array = jnp.asarray(indices)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {array.dtype}: cast them.")
    if array.shape != shape:
        raise ValueError(f"{name} {array.shape} must be {shape}, some for each example.")
    values, kept = known(indices), known(keep)
    if values is not None and kept is not None:
        unknown = values[kept & ((values < 0) | (values >= count))]
        if unknown.size:
            message = f"{name} hold {unknown[0]}, but the memory has 0 to {count - 1}"
            raise ValueError(f"{message}: make it for all examples.")
    array = array.astype(jnp.int32)
    there = (array >= 0) & (array < count)
    return jnp.where(there, array, 0), there


def _check_temperature(temperature: Any, dtype: Any) -> Array:
    return check_positive("temperature", temperature, dtype, "0.07 is usual").astype(dtype)
