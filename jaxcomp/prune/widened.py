"""What scores compute is float32 or wider: squares and products of half precision are not."""

from typing import Any

import jax.numpy as jnp


def wide(x: Any) -> Any:
    """An array as it is, or in float32 if its dtype is narrower.

    Example:
        >>> wide(jnp.ones(2, jnp.bfloat16)).dtype, wide(jnp.ones(2, int)).dtype
        (dtype('float32'), dtype('float32'))
    """
    check_leaf(x)
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_leaf(x: Any) -> None:
    """Raise unless a score is given an array.

    Raises:
        TypeError: it is given something else, such as a whole tree.

    Example:
        >>> check_leaf({"kernel": jnp.ones(2)})
        Traceback (most recent call last):
        ...
        TypeError: a score takes the arrays of one leaf, not {'kernel': ...}: for a tree, ...
    """
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(
            f"a score takes the arrays of one leaf, not {x!r:.60}: for a tree, "
            "jax.tree.map(score, params, evidence)"
        )


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
        TypeError: one of them is no array.
        ValueError: the evidence is None, or does not broadcast to the leaf's shape.

    Example:
        >>> wide_evidence(jnp.ones(2), None, "taylor", "a gradient")
        Traceback (most recent call last):
        ...
        ValueError: taylor reads a gradient of each leaf, and got None: pass it
    """
    if evidence is None:
        raise ValueError(f"{score} reads {what} of each leaf, and got None: pass it")
    check_leaf(weight)
    check_leaf(evidence)
    shape = tuple(evidence.shape)
    missing = len(weight.shape) - len(shape)
    if missing < 0 or any(
        size not in (1, full) for size, full in zip(shape, weight.shape[missing:], strict=True)
    ):
        raise ValueError(
            f"{score}: evidence of shape {shape} for a leaf of shape {tuple(weight.shape)}: give "
            "one number for each weight, or what broadcasts to that"
        )
    return wide(evidence)
