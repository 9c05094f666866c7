"""What scores compute is float32 or wider: squares and products of half precision are not."""

from typing import Any

import jax.numpy as jnp


def wide(x: Any) -> Any:
    """An array as it is, or in float32 if its dtype is narrower.

    Example:
        >>> wide(jnp.ones(2, jnp.bfloat16)).dtype, wide(jnp.ones(2, int)).dtype
        (dtype('float32'), dtype('float32'))
    """
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def wide_zeros(leaf: Any) -> Any:
    """Zeros of a leaf's shape and placement, at least float32.

    Example:
        >>> wide_zeros(jnp.ones(2, jnp.bfloat16))
        Array([0., 0.], dtype=float32)
    """
    return jnp.zeros_like(leaf, dtype=jnp.promote_types(leaf.dtype, jnp.float32))


def wide_evidence(weight: Any, evidence: Any, score: str, what: str) -> Any:
    """The evidence of a leaf, at least float32, if it is there and fits.

    Args:
        weight: the leaf.
        evidence: of its shape, or broadcastable to it.
        score: the name of who reads it, for messages.
        what: what it is, for messages.

    Raises:
        ValueError: it is None, or does not broadcast to the leaf's shape.

    Example:
        >>> wide_evidence(jnp.ones(2), None, "taylor", "a gradient")
        Traceback (most recent call last):
        ...
        ValueError: taylor reads a gradient of each leaf, and got None: pass it
    """
    if evidence is None:
        raise ValueError(f"{score} reads {what} of each leaf, and got None: pass it")
    shape = tuple(evidence.shape)
    missing = len(weight.shape) - len(shape)
    if missing < 0 or any(
        size not in (1, full) for size, full in zip(shape, weight.shape[missing:], strict=True)
    ):
        raise ValueError(f"{score}: evidence of shape {shape} for a leaf of shape {weight.shape}")
    return wide(evidence)
