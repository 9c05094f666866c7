"""The orthonormal Walsh–Hadamard transform of an axis, in O(n log n) and without its matrix.

For ``n = 2**k * m`` with odd ``m`` the axis is cut into ``m`` blocks of ``2**k`` that are
transformed alike: the matrix has ``m`` Hadamard matrices on its diagonal. It is symmetric and its
own inverse. A few large entries of a block are spread over all of it, which is what makes weights
and activations with outliers easy to quantize.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxcomp.sharding import automatic, spec_like


def block_size(size: int) -> int:
    """The largest power of two that divides an axis.

    Args:
        size: of the axis, at least 1.

    Returns:
        How many entries are mixed with each other; 1 where the size is odd.

    Raises:
        ValueError: the size is below 1.

    Example:
        >>> [block_size(n) for n in (64, 48, 768, 7)]
        [64, 16, 256, 1]
    """
    if size < 1:
        raise ValueError(f"an axis of size {size} cannot be transformed")
    return size & -size


def hadamard(x: Any, axis: int | Sequence[int] = -1) -> Float[Array, "..."]:
    """Multiply an axis by the orthonormal Hadamard matrix of its largest power of two.

    Linear, symmetric and orthonormal, so also its own transpose, inverse and derivative:
    ``x·y == hadamard(x)·hadamard(y)``.

    Args:
        x: floats of any shape.
        axis: which axis; its size is ``m * 2**k``, and each run of ``2**k`` entries is mixed. Or
            several, transformed one after the other.

    Returns:
        The same shape and dtype; float16 and bfloat16 are computed in float32 and rounded once.

    Raises:
        TypeError: ``x`` is not of real floats.
        ValueError: there is no such axis, or one is named twice.

    Example:
        >>> hadamard(jnp.array([4.0, 0.0, 0.0, 0.0]))
        Array([2., 2., 2., 2.], dtype=float32)
        >>> hadamard(hadamard(jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))).round(5)
        Array([1., 2., 3., 4., 5., 6.], dtype=float32)

    Source: Fino & Algazi, "Unified Matrix Treatment of the Fast Walsh-Hadamard Transform", 1976.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be of real floats, not {x.dtype}")
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    for each in axes:
        if not -x.ndim <= each < x.ndim:
            raise ValueError(f"x of shape {x.shape} has no axis {each}")
    axes = tuple(each % x.ndim for each in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"an axis is named twice: {axis}")
    return _placed(x, axes)


@partial(jax.jit, static_argnums=1)
def _placed(x: Array, axes: tuple[int, ...]) -> Array:
    return automatic(partial(_transform, axes=axes), spec_like(x, x.shape))(x)


def _transform(x: Array, axes: tuple[int, ...]) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mixed = 1
    for axis in axes:
        block = block_size(x.shape[axis]) if x.shape[axis] else 1
        mixed *= block
        stride = 1
        while stride < block:
            radix = min(4, block // stride)
            wide = _step(wide, axis, radix, stride)
            stride *= radix
    # Once, at the end: no product lies between sums, where a compiler may round both as one.
    return (wide * np.asarray(1 / math.sqrt(mixed), wide.dtype)).astype(x.dtype)


def _step(x: Array, axis: int, radix: int, stride: int) -> Array:
    """Sums and differences of entries that are ``stride`` apart; two such steps if ``radix`` is 4.

    Only additions, always in this order: the same bits however the program around is compiled.
    """
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    split = x.reshape(*before, x.shape[axis] // (radix * stride), radix, stride, *after)
    parts = [lax.index_in_dim(split, i, axis + 1, keepdims=False) for i in range(radix)]
    if radix == 2:
        a, b = parts
        mixed = [a + b, a - b]
    else:
        a, b, c, d = parts
        mixed = [(a + b) + (c + d), (a - b) + (c - d), (a + b) - (c + d), (a - b) - (c - d)]
    return jnp.stack(mixed, axis + 1).reshape(x.shape)
