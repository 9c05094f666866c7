"""Arithmetic that gives the same bits in every program: quotients, scales, rounding of floats."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcomp.arrays.elements import SmallFloat

# Below half of it XLA flushes weights to zero, which is then still within half a step.
TINY = 2.0**-125
# The reciprocals of larger scales would be subnormal, which XLA flushes to zero.
LARGE = 2.0**125


def widen(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x`` in float32, and as it is: XLA would take the unrounded result of an earlier operation.

    It does so with bfloat16 inside ``jit``, for excess precision; the codes would not be those of
    the weights that the program returns.

    Example:
        >>> widen(jnp.ones(1, jnp.bfloat16)).dtype
        dtype('float32')
    """
    wide = x.astype(jnp.float32)
    if x.dtype != jnp.bfloat16:
        return wide
    return jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)


def quotient(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x / scale`` for positive scales, with the same rounding everywhere.

    By the reciprocal, as XLA divides in some programs and not in others: the codes must not depend
    on that.

    Example:
        >>> quotient(jnp.array([3.0]), jnp.array([0.5]))
        Array([6.], dtype=float32)
    """
    return jnp.where(scale > LARGE, x * 0.25, x) * inverse_scale(scale)


def inverse_scale(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """``1 / scale``, four times that of scales whose own would be flushed to zero.

    Example:
        >>> inverse_scale(jnp.array([0.5, 2.0**126]))
        Array([2.0000000e+00, 4.7019774e-38], dtype=float32)
    """
    return 1 / jnp.where(scale > LARGE, scale * 0.25, scale)


def bounded_scale(scale: Float[Array, "..."], reach: Any, dtype: Any) -> Float[Array, "..."]:
    """Scales whose first ``reach`` multiples stay finite in ``dtype``; 1 for zeros only.

    Where they would not, the scale grows until the largest finite number is one of them: then
    nothing finite rounds to more.

    Args:
        scale: not negative, float32.
        reach: an integer, or integers that broadcast to ``scale``.
        dtype: of what is rounded.

    Example:
        >>> bounded_scale(jnp.array([0.0, 0.5]), 7, jnp.float32)
        Array([1. , 0.5], dtype=float32)
    """
    largest = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max)) * (1 - 2**-20)
    scale = jnp.where(scale == 0, 1.0, jnp.maximum(scale, TINY))
    multiples = jnp.minimum(jnp.floor(largest / scale * (1 + 2**-18)), reach)
    limit = largest / multiples
    return jnp.where(multiples < reach, limit, jnp.minimum(scale, limit)).astype(jnp.float32)


def magnitude_codes(
    x: Float[Array, "..."], element: SmallFloat, noise: Array | None = None
) -> Int[Array, "..."]:
    """Codes of magnitudes, unsigned and not yet limited to the largest.

    Args:
        x: float32; signs are ignored.
        element: the float to round to.
        noise: ``uint32`` of the shape of ``x``: rounds up with the probability that leaves the mean
            as it is. None rounds to the nearest, ties to the even mantissa, and without mantissa to
            the larger.

    Returns:
        ``int32`` codes.

    Example:
        >>> from jaxcomp.arrays.elements import ELEMENTS
        >>> magnitude_codes(jnp.array([2.4, 2.5, -7.0]), ELEMENTS["float4_e2m1fn"])
        Array([4, 4, 8], dtype=int32)
    """
    size, drop = element.mantissa_bits, 23 - element.mantissa_bits
    x = jnp.abs(x)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    steps = x * 2.0 ** (size - element.exponent)
    if noise is not None:
        added = (noise >> (32 - drop)).astype(jnp.int32)
        small = jnp.floor(steps + noise.astype(jnp.float32) * 2.0**-32)
    elif size:
        added = (1 << (drop - 1)) - 1 + ((bits >> drop) & 1)
        small = jnp.round(steps)
    else:
        added, small = 1 << (drop - 1), steps >= 0.5
    normal = ((bits + added) >> drop) - ((126 + element.exponent) << size)
    return jnp.where(x < 2.0**element.exponent, small.astype(jnp.int32), normal)
