"""How far a quantized model's outputs are from the dense model's, as one number."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SMALL = 0.5  # of the logarithm of a ratio: where a series is closer than a difference


def kl_divergence(dense: Any, quantized: Any) -> Float[Array, ""]:
    """KL divergence of the quantized model's predictions from the dense model's, in nats.

    The mean over all but the last axis of ``sum(p * log(p / q))``, where ``p`` and ``q`` are the
    softmax of the logits (Kullback and Leibler, 1951). The terms are written as
    ``p * (q / p - 1 - log(q / p))``, of the same sum and never negative, so that differences far
    below the rounding of the logits' own entropy are still seen.

    Args:
        dense: logits of the dense model, floating, ``(..., classes)``.
        quantized: logits of the quantized one, likewise.

    Returns:
        One number, at least 0; 0 where the logits are the same.

    Raises:
        TypeError: the outputs are no array of logits.

    Example:
        >>> kl_divergence(jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 1.001]]))
        Array(9.8...e-08, dtype=float32)
    """
    for outputs in (dense, quantized):
        if not _is_floating(outputs) or outputs.ndim == 0:
            raise TypeError(
                "compare=kl_divergence needs outputs that are one array of logits, not "
                f"{_words(outputs)}: give another function of (dense outputs, quantized outputs), "
                "such as mean_square"
            )
    wide = jnp.promote_types(dense.dtype, jnp.float32)
    dense, quantized = dense.astype(wide), quantized.astype(wide)
    log_p, log_q = jax.nn.log_softmax(dense), jax.nn.log_softmax(quantized)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # A class that the dense model rules out may be infinitely far off; it adds q alone.
    ratio = jnp.where(p > 0, log_q - log_p, 0)
    near = jnp.clip(ratio, -_SMALL, _SMALL)
    series = (
        near * near * (1 / 2 + near * (1 / 6 + near * (1 / 24 + near * (1 / 120 + near / 720))))
    )
    apart = jnp.where(p > 0, q - p - p * ratio, q)
    terms = jnp.where((p > 0) & (jnp.abs(ratio) < _SMALL), p * series, apart)
    return jnp.mean(jnp.sum(terms, axis=-1))


def mean_square(dense: Any, quantized: Any) -> Float[Array, ""]:
    """Mean square of the difference of outputs, over that of the dense outputs.

    Args:
        dense: outputs of the dense model: any tree of floating arrays.
        quantized: those of the quantized one.

    Returns:
        One number; for embeddings of length 1, twice the mean of one minus the cosine.

    Raises:
        TypeError: an output is no floating array.

    Example:
        >>> mean_square(jnp.array([2.0, 0.0]), jnp.array([1.0, 0.0]))
        Array(0.25, dtype=float32)
    """
    change, size = jnp.float32(0), jnp.float32(0)
    for old, new in zip(jax.tree.leaves(dense), jax.tree.leaves(quantized), strict=True):
        if not _is_floating(old):
            raise TypeError(
                f"compare=mean_square needs floating outputs, not {_words(old)}: give another "
                "function of (dense outputs, quantized outputs)"
            )
        old, new = old.astype(jnp.float32), new.astype(jnp.float32)
        change, size = change + jnp.sum((new - old) ** 2), size + jnp.sum(old**2)
    return change / jnp.where(size > 0, size, 1)


def increase(dense: Any, quantized: Any) -> Any:
    """By how much a loss has grown, where ``apply_fn`` returns the loss.

    Args:
        dense: the loss of the dense model.
        quantized: that of the quantized one.

    Returns:
        The difference.

    Example:
        >>> increase(0.25, 1.0)
        0.75
    """
    return quantized - dense


def _is_floating(outputs: Any) -> bool:
    return hasattr(outputs, "dtype") and bool(jnp.issubdtype(outputs.dtype, jnp.floating))


def _words(outputs: Any) -> str:
    if hasattr(outputs, "dtype"):
        return f"{outputs.dtype} of shape {outputs.shape}"
    return f"{type(outputs).__name__}"
