"""What a search is for: quality on data, what a model costs, how long it takes here."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import checks
from jaxcomp.model.timing import median_milliseconds
from jaxcomp.model.trace import trace


def accuracy(logits: Any, labels: Any) -> jax.Array:
    """The fraction of examples whose highest logit is that of their label.

    Args:
        logits: (..., classes).
        labels: (...,) class numbers.

    Returns:
        float32 scalar; NaN if a logit is NaN, so that a network that is lost is not taken for one
        that guesses, or if a label is no class, such as -1.

    Raises:
        TypeError: labels are no whole numbers.
        ValueError: shapes do not go together.

    Example:
        >>> accuracy(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0]))
        Array(0.5, dtype=float32)
    """
    logits, labels = _checked(logits, labels)
    right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    return _unless_lost(right.mean(), logits, labels)


def cross_entropy(logits: Any, labels: Any) -> jax.Array:
    """The mean negative logarithm of the labels' probabilities, in nats.

    Args:
        logits: (..., classes).
        labels: (...,) class numbers.

    Returns:
        float32 scalar; NaN if a logit is NaN or a label is no class.

    Raises:
        TypeError: labels are no whole numbers.
        ValueError: shapes do not go together.

    Example:
        >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).round(4)  # ln 4
        Array(1.3863, dtype=float32)
    """
    logits, labels = _checked(logits, labels)
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    found = -jnp.take_along_axis(logs, labels[..., None], axis=-1, mode="clip").mean()
    return _unless_lost(found, logits, labels)


def f1(logits: Any, labels: Any, average: str = "macro") -> jax.Array:
    """F1, the harmonic mean of precision and recall, of the classes with the highest logits.

    Args:
        logits: (..., classes).
        labels: (...,) class numbers.
        average: ``"macro"``: the mean over the classes that are among the labels or predictions;
            ``"micro"``: of all decisions together, which is the accuracy here, where each example
            has one class; ``"binary"``: of class 1 of two.

    Returns:
        float32 scalar; NaN if a logit is NaN or a label is no class; 0 where there is nothing to be
        right about.

    Raises:
        TypeError: labels are no whole numbers.
        ValueError: shapes do not go together; an unknown average; ``"binary"`` of more classes.

    Example:
        >>> logits = jnp.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        >>> f1(logits, jnp.array([1, 0, 0]), average="binary").round(4)  # 2 / (2 + 1)
        Array(0.6667, dtype=float32)

    Source: van Rijsbergen, "Information Retrieval", 2nd edition, 1979, chapter 7, with beta = 1.
    """
    logits, labels = _checked(logits, labels)
    if average not in ("macro", "micro", "binary"):
        raise ValueError(f"average is {average!r}: it must be 'macro', 'micro' or 'binary'")
    classes = np.shape(logits)[-1]
    if average == "binary" and classes != 2:
        raise ValueError(f"average='binary' of {classes} classes: use 'macro' or 'micro'")
    predicted = jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes).reshape(-1, classes)
    actual = jax.nn.one_hot(labels, classes).reshape(-1, classes)
    right = (predicted * actual).sum(0)
    # Precision and recall have the same numerator: 2 TP / (predicted + actual).
    decisions = predicted.sum(0) + actual.sum(0)
    if average == "micro":
        right, decisions = right.sum(keepdims=True), decisions.sum(keepdims=True)
    if average == "binary":
        right, decisions = right[1:], decisions[1:]
    scores = 2 * right / jnp.maximum(decisions, 1)
    found = scores.sum() / jnp.maximum((decisions > 0).sum(), 1)
    return _unless_lost(found, logits, labels)


def costs(apply_fn: Any, params: Any, *inputs: Any) -> dict[str, int]:
    """What a model costs, counted and not run, as measures for :func:`jaxcomp.search.run`.

    Args:
        apply_fn: ``(params, *inputs)``.
        params: arrays, or ``jax.ShapeDtypeStruct`` of them (``jax.eval_shape``).
        *inputs: likewise; the FLOPs are of as many examples.

    Returns:
        ``"parameters"``, their ``"bytes"`` as they are, ``"flops"`` and ``"macs"`` of one call; as
        :func:`jaxcomp.model.trace` counts them, which also says what it cannot count.

    Raises:
        TypeError: as :func:`jaxcomp.model.trace`.
        ValueError: likewise.

    Example:
        >>> costs(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 2))}, jnp.ones((1, 8)))
        {'parameters': 16, 'bytes': 64, 'flops': 32, 'macs': 16}
    """
    found = trace(apply_fn, params, *inputs)
    return {
        "parameters": found.parameters,
        "bytes": found.parameter_bytes,
        "flops": found.total.flops,
        "macs": found.total.macs,
    }


def latency(
    function: Any,
    *inputs: Any,
    repeats: int = 20,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """How long one call takes on this machine: measured, not estimated.

    It is compiled once, run a few times that do not count, and timed until its results are there.
    Another program on the same machine is measured too: leave the machine alone meanwhile.

    Args:
        function: of arrays; it is jitted.
        *inputs: that it is called with; on the device before the clock starts.
        repeats: calls that are timed.
        warm_up: calls before them.
        clock: gives seconds.

    Returns:
        The median in milliseconds.

    Raises:
        TypeError: ``function`` is none.
        ValueError: ``repeats`` is below 1, or ``warm_up`` below 0.

    Example:
        >>> ticks = iter(map(float, range(100)))
        >>> latency(jnp.sin, 1.0, repeats=3, clock=lambda: next(ticks))
        1000.0
    """
    checks.check_function("function", function, "the inputs")
    checks.check_count("repeats", repeats)
    checks.check_count("warm_up", warm_up, least=0)
    placed = jax.device_put(inputs)
    compiled = jax.jit(function).lower(*placed).compile()
    run = lambda: jax.block_until_ready(compiled(*placed))
    return median_milliseconds(run, repeats, warm_up, clock)


def _checked(logits: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if logits.ndim < 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {logits.shape} and labels {labels.shape} do not go together: labels are class "
            "numbers, one for each row of logits"
        )
    if labels.size == 0:
        raise ValueError("labels are empty: there is nothing to measure")
    if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == bool):
        raise TypeError(f"labels are of {labels.dtype}: give class numbers, as integers")
    return logits, labels.astype(jnp.int32)


def _unless_lost(found: jax.Array, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """What was measured, or NaN where it means nothing."""
    classes = (labels >= 0) & (labels < logits.shape[-1])
    return jnp.where(jnp.isnan(logits).any() | ~classes.all(), jnp.nan, found)
