"""How sparse at which step. Any function of the step serves, optax schedules too."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

Schedule = Callable[[Any], Any]


def check_sparsity(name: str, sparsity: float) -> None:
    """Raise unless a sparsity (the fraction removed) is a number in [0, 1).

    Raises:
        TypeError: it is not a number.
        ValueError: it is outside.

    Example:
        >>> check_sparsity("sparsity", 90)
        Traceback (most recent call last):
        ...
        ValueError: sparsity is the fraction of weights removed, in [0, 1), not 90
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float, np.number)):
        raise TypeError(f"{name} must be a number in [0, 1), such as 0.5, not {sparsity!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"{name} is the fraction of weights removed, in [0, 1), not {sparsity}")


def cubic(final_sparsity: float, begin: int, end: int, initial_sparsity: float = 0.0) -> Schedule:
    """Prune fast at first and ever slower (Zhu & Gupta, 2018, equation 1).

    ``s(t) = final + (initial - final) * (1 - (t - begin) / (end - begin))**3`` from step ``begin``
    to ``end``, 0 before and ``final`` after.

    Args:
        final_sparsity: fraction removed from ``end`` on, in [0, 1).
        begin: first step of pruning.
        end: step at which the final sparsity is reached; ``end == begin`` prunes at once.
        initial_sparsity: fraction removed at ``begin``.

    Returns:
        A function of the step (a Python or traced integer) to the sparsity, float32.

    Raises:
        ValueError: a sparsity outside [0, 1), a falling one, or ``end`` before ``begin``.

    Example:
        >>> [round(float(cubic(0.8, begin=0, end=4)(step)), 2) for step in range(5)]
        [0.0, 0.46, 0.7, 0.79, 0.8]
    """
    check_sparsity("final_sparsity", final_sparsity)
    check_sparsity("initial_sparsity", initial_sparsity)
    if initial_sparsity > final_sparsity:
        raise ValueError(
            f"initial_sparsity {initial_sparsity} is above final_sparsity {final_sparsity}: "
            "pruning only removes; exchange them"
        )
    if not 0 <= begin <= end:
        raise ValueError(f"steps must satisfy 0 <= begin <= end, not begin={begin}, end={end}")

    def schedule(step: Any) -> Any:
        progress = jnp.clip((jnp.asarray(step) - begin) / max(end - begin, 1), 0, 1)
        ramp = final_sparsity + (initial_sparsity - final_sparsity) * (1 - progress) ** 3
        ramp = jnp.where(jnp.asarray(step) >= end, final_sparsity, ramp)
        return jnp.where(jnp.asarray(step) < begin, 0.0, ramp).astype(jnp.float32)

    return schedule


def constant(sparsity: float) -> Schedule:
    """The same sparsity at every step, from the first on.

    Args:
        sparsity: fraction removed, in [0, 1).

    Returns:
        A function of the step to the sparsity, float32.

    Raises:
        ValueError: a sparsity outside [0, 1).

    Example:
        >>> float(constant(0.5)(0))
        0.5
    """
    return one_shot(sparsity, 0)


def one_shot(sparsity: float, step: int) -> Schedule:
    """Nothing before a step, everything at it.

    Args:
        sparsity: fraction removed from ``step`` on, in [0, 1).
        step: when.

    Returns:
        A function of the step to the sparsity, float32.

    Raises:
        ValueError: a sparsity outside [0, 1), or a negative step.

    Example:
        >>> [float(one_shot(0.5, step=2)(step)) for step in range(4)]
        [0.0, 0.0, 0.5, 0.5]
    """
    return cubic(sparsity, begin=step, end=step)


def staircase(sparsity: float, rounds: int, every: int, begin: int = 0) -> Schedule:
    """In rounds, each of which removes the same fraction of what is left (Frankle & Carbin, 2019).

    After round ``k`` of ``rounds`` the sparsity is ``1 - (1 - sparsity) ** (k / rounds)``; the
    first round ends at step ``begin + every``.

    Args:
        sparsity: fraction removed after the last round, in [0, 1).
        rounds: how many.
        every: steps a round.
        begin: step at which the first round begins.

    Returns:
        A function of the step to the sparsity, float32.

    Raises:
        ValueError: a sparsity outside [0, 1), no rounds, no steps a round, or a negative ``begin``.

    Example:
        >>> [round(float(staircase(0.75, rounds=2, every=3)(step)), 2) for step in range(8)]
        [0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.75, 0.75]
    """
    check_sparsity("sparsity", sparsity)
    if rounds < 1 or every < 1 or begin < 0:
        raise ValueError(
            f"rounds and every must be at least 1 and begin at least 0, not rounds={rounds}, "
            f"every={every}, begin={begin}"
        )

    def schedule(step: Any) -> Any:
        done = jnp.clip((jnp.asarray(step) - begin) // every, 0, rounds)
        kept = jnp.power(jnp.float32(1 - sparsity), done.astype(jnp.float32) / rounds)
        # The last step of the stairs is what was asked for, not a power that rounds to its side.
        return jnp.where(done == rounds, jnp.float32(sparsity), 1 - kept)

    return schedule
