"""Scores that remember earlier train steps: sums of squared gradients, movement, fixed chance."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcomp.checks import check_key, is_number
from jaxcomp.prune.widened import wide, wide_evidence, wide_zeros
from jaxcomp.sharding import placed_like


class RunningScore(NamedTuple):
    """A score that remembers earlier steps.

    Attributes:
        init: ``init(path, weight) -> kept``, any pytree of arrays.
        accumulate: ``accumulate(kept, weight, gradient) -> kept``, once every train step.
        score: ``score(weight, kept) -> scores`` of the leaf's shape, where masks are updated.

    Example:
        >>> count = RunningScore(
        ...     init=lambda path, weight: jnp.zeros(weight.shape),
        ...     accumulate=lambda kept, weight, gradient: kept + (gradient != 0),
        ...     score=lambda weight, kept: kept,
        ... )
        >>> weight = jnp.ones(2)
        >>> kept = count.accumulate(count.init("kernel", weight), weight, jnp.array([0.0, 0.5]))
        >>> count.score(weight, kept)
        Array([0., 1.], dtype=float32)
    """

    init: Callable[[str, Any], Any]
    accumulate: Callable[[Any, Any, Any], Any]
    score: Callable[[Any, Any], Array]


def running_fisher(decay: float | None = None, *, weighted: bool = False) -> RunningScore:
    """Squared gradients of all steps so far, optionally times the squared weight of today.

    Args:
        decay: None for the plain sum; a number in [0, 1) for the moving average
            ``F ← decay F + (1 − decay) g²``, which forgets early training.
        weighted: whether the score is ``w² F`` instead of ``F``.

    Returns:
        A running score that keeps one float32 array a leaf.

    Raises:
        ValueError: the decay is no number in [0, 1).

    Example:
        >>> score, weight = running_fisher(weighted=True), jnp.array([-2.0, 1.0])
        >>> kept = score.init("kernel", weight)
        >>> kept = score.accumulate(kept, weight, jnp.array([0.5, 1.0]))
        >>> kept = score.accumulate(kept, weight, jnp.array([0.5, 2.0]))
        >>> score.score(weight, kept)
        Array([2., 5.], dtype=float32)
    """
    if decay is not None and not (is_number(decay) and 0 <= decay < 1):
        raise ValueError(f"decay is {decay}: give a number in [0, 1), or None for the plain sum")

    def accumulate(kept: Any, weight: Any, gradient: Any) -> Any:
        square = wide_evidence(weight, gradient, "running_fisher", "a gradient") ** 2
        return kept + square if decay is None else decay * kept + (1 - decay) * square

    def score(weight: Any, kept: Any) -> Any:
        return wide(weight) ** 2 * kept if weighted else kept

    return RunningScore(_zeros, accumulate, score)


def movement() -> RunningScore:
    """Whether training moves the weight away from zero: ``−Σ w · ∂L/∂w`` over all steps so far.

    A weight that each step makes larger in magnitude has a growing score and is kept, however small
    it is; one that shrinks goes.

    Returns:
        A running score that keeps one float32 array a leaf; scores may be negative.

    Example:
        >>> score, weight = movement(), jnp.array([-2.0, 1.0])
        >>> kept = score.accumulate(score.init("kernel", weight), weight, jnp.array([0.5, 1.0]))
        >>> score.score(weight, kept)
        Array([ 1., -1.], dtype=float32)

    Source:
        Sanh et al. 2020, *Movement Pruning: Adaptive Sparsity by Fine-Tuning*, section 3, the
        accumulated score without its learning rate.
    """

    def accumulate(kept: Any, weight: Any, gradient: Any) -> Any:
        return kept - wide(weight) * wide_evidence(weight, gradient, "movement", "a gradient")

    return RunningScore(_zeros, accumulate, lambda weight, kept: kept)


def random(key: Any) -> RunningScore:
    """A uniform random number a weight: the baseline that every score has to beat.

    A weight's number depends on the key and on its leaf's path alone, so it stays the same from one
    mask update to the next, and pruning only ever adds to what is removed. Leaves are independent.

    Args:
        key: from ``jax.random.key``.

    Returns:
        A running score that keeps one integer a leaf.

    Raises:
        TypeError: the key is not one PRNG key.

    Example:
        >>> score, weight = random(jax.random.key(0)), jnp.ones(1000)
        >>> scores = score.score(weight, score.init("kernel", weight))
        >>> scores.shape, bool(jnp.all((scores >= 0) & (scores < 1)))
        ((1000,), True)
    """
    check_key(key)

    def init(path: str, weight: Any) -> Any:
        del weight
        # Python's own hash of a string changes from one process to the next.
        return jnp.asarray(zlib.crc32(path.encode()), jnp.uint32)

    def score(weight: Any, kept: Any) -> Any:
        noise = jax.random.uniform(jax.random.fold_in(key, kept), weight.shape)
        return placed_like(noise, weight)

    return RunningScore(init, lambda kept, weight, gradient: kept, score)


def _zeros(path: str, weight: Any) -> Any:
    del path
    return wide_zeros(weight)
