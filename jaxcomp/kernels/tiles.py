"""What kernels do with their tiles."""

from typing import Any

import jax
import jax.numpy as jnp

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def unfit_dtype(*dtypes: Any) -> str | None:
    """Why Triton has no product of one of these dtypes, or None.

    Example:
        >>> unfit_dtype(jnp.bfloat16, jnp.int8)
        'int8 is not float32, bfloat16 or float16'
    """
    wrong = [jnp.dtype(dtype).name for dtype in dtypes if dtype not in FLOATS]
    return f"{wrong[0]} is not float32, bfloat16 or float16" if wrong else None


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """A product summed in float32, of the dtype that both promote to; for use in kernels.

    Example:
        >>> dot(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((2, 1), jnp.bfloat16))
        Array([[2.]], dtype=float32)
    """
    dtype = jnp.result_type(left, right)
    return jnp.dot(left.astype(dtype), right.astype(dtype), preferred_element_type=jnp.float32)


def pad_rows(x: jax.Array, multiple: int) -> jax.Array:
    """Zeros below a matrix, up to a multiple of rows.

    Example:
        >>> pad_rows(jnp.ones((3, 2)), 8).shape
        (8, 2)
    """
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0)))


def row_tile(most: int, rows: int, least: int = 16) -> int:
    """Rows of a tile: a power of two from ``least`` to ``most``, no larger than rows need.

    Example:
        >>> row_tile(128, 5), row_tile(128, 33), row_tile(128, 4096)
        (16, 64, 128)
    """
    return max(least, min(most, 1 << max(rows - 1, 0).bit_length()))


def largest_divisor(most: int, total: int) -> int:
    """The largest power of two up to ``most`` that divides ``total``.

    Example:
        >>> largest_divisor(128, 14336), largest_divisor(128, 192)
        (128, 64)
    """
    size = most
    while total % size:
        size //= 2
    return size
