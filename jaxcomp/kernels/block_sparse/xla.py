"""The product with a block-sparse matrix and its two gradients, as XLA compiles them.

On a CPU each kept block is one product, in a loop, which XLA runs on one core or little more. Where
the pattern is known when a program is compiled, and there is much to compute, the products of a row
of blocks are one, rows are computed side by side on all cores, and sums are written once. Elsewhere
the matrix is decoded: a loop would leave most of an accelerator idle.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomp.kernels.block_sparse.places import places, stored

# Measured on two cores: below, the loop is as fast, and compiled in a tenth of the time.
_UNROLLED_BLOCK, _UNROLLED_ROWS, _UNROLLED_COUNT = 128, 256, 1024


def forward(pattern: Any, x: jax.Array, values: jax.Array, keep: Any) -> jax.Array:
    """``x (rows, in)`` by the kept blocks ``values (count, k, c)``: ``(rows, grid columns, c)``.

    Args:
        pattern: ``keep`` as a NumPy array where it is known, or None.
        x: activations.
        values: kept blocks, row after row of the grid.
        keep: booleans, the grid of blocks.
    """
    return _on_platform(_FORWARD, pattern, x.shape[0], values, (x, values, keep))


def to_input(pattern: Any, dy: jax.Array, values: jax.Array, keep: Any) -> jax.Array:
    """``dy (rows, out)`` by the transposed matrix: ``(rows, grid rows, k)``."""
    return _on_platform(_TO_INPUT, pattern, dy.shape[0], values, (dy, values, keep))


def to_values(pattern: Any, x: jax.Array, dy: jax.Array, values: jax.Array, keep: Any) -> jax.Array:
    """``x.T @ dy`` at the kept blocks, of the shape of ``values``; these are not read."""
    made = _on_platform(_TO_VALUES, pattern, x.shape[0], values, (x, dy, values, keep))
    if pattern is not None and values.shape[0] == pattern.sum():
        return made
    real = stored(keep, values.shape[0])[:, None, None]
    return jnp.where(real, made, jnp.zeros((), made.dtype))


def _on_platform(forms: Any, pattern: Any, rows: int, values: Any, arrays: Any) -> jax.Array:
    unrolled, looped, decoded = forms
    area = math.prod(values.shape[1:])
    if area < (64 if rows <= 16 else 256):
        return decoded(*arrays)
    if (
        pattern is not None
        and min(values.shape[1:]) >= _UNROLLED_BLOCK
        and rows >= _UNROLLED_ROWS
        and 1 <= pattern.sum() <= _UNROLLED_COUNT
    ):
        looped = partial(unrolled, pattern)
    return lax.platform_dependent(*arrays, cpu=looped, default=decoded)


def _sums(*arrays: jax.Array) -> Any:
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """A product in the dtype that it is summed in."""
    dtype = jnp.result_type(left, right)
    return jnp.matmul(
        left.astype(dtype), right.astype(dtype), preferred_element_type=_sums(left, right)
    )


def _row(pattern: np.ndarray, values: jax.Array) -> list[tuple[int, np.ndarray, Any]]:
    """Of each row of the grid that keeps any: its number, its columns, its blocks side by side."""
    rows, start = [], 0
    _, k, c = values.shape
    for row, columns in enumerate(np.nonzero(line)[0] for line in pattern):
        if len(columns):
            blocks = values[start : start + len(columns)]
            rows.append((row, columns, blocks.transpose(1, 0, 2).reshape(k, len(columns) * c)))
            start += len(columns)
    return rows


def _side_by_side(y: jax.Array, columns: np.ndarray, c: int) -> jax.Array:
    return jnp.concatenate([y[:, j * c : (j + 1) * c] for j in columns], 1)


def _forward_unrolled(pattern: np.ndarray, x: Any, values: Any, keep: Any) -> jax.Array:
    del keep
    _, k, c = values.shape
    sums: list[Any] = [None] * pattern.shape[1]
    for row, columns, blocks in _row(pattern, values):
        products = _dot(x[:, row * k : (row + 1) * k], blocks)
        for at, j in enumerate(columns):
            one = products[:, at * c : (at + 1) * c]
            sums[j] = one if sums[j] is None else sums[j] + one
    nothing = jnp.zeros((x.shape[0], c), _sums(x, values))
    made = jnp.stack([nothing if one is None else one for one in sums], 1)
    return made.astype(jnp.result_type(x, values))


def _to_input_unrolled(pattern: np.ndarray, dy: Any, values: Any, keep: Any) -> jax.Array:
    del keep
    _, k, c = values.shape
    parts: list[Any] = [jnp.zeros((dy.shape[0], k), _sums(dy, values))] * pattern.shape[0]
    for row, columns, blocks in _row(pattern, values):
        parts[row] = _dot(_side_by_side(dy, columns, c), blocks.T)
    return jnp.stack(parts, 1).astype(jnp.result_type(dy, values))


def _to_values_unrolled(pattern: np.ndarray, x: Any, dy: Any, values: Any, keep: Any) -> jax.Array:
    del keep
    count, k, c = values.shape
    parts = []
    for row, columns, _ in _row(pattern, values):
        made = _dot(x[:, row * k : (row + 1) * k].T, _side_by_side(dy, columns, c))
        parts.append(made.reshape(k, len(columns), c).transpose(1, 0, 2))
    found = jnp.concatenate(parts).astype(jnp.result_type(x, dy))
    return jnp.pad(found, ((0, count - found.shape[0]), (0, 0), (0, 0)))


def _forward_looped(x: Any, values: Any, keep: Any) -> jax.Array:
    _, k, c = values.shape

    def step(y: jax.Array, block: Any) -> tuple[jax.Array, None]:
        value, row, column = block
        product = _dot(_columns(x, row * k, k), value)
        return _added(y, product, column * c, row < keep.shape[0]), None

    zeros = jnp.zeros((x.shape[0], keep.shape[1] * c), _sums(x, values))
    y, _ = lax.scan(step, zeros, (values, *places(keep, values.shape[0])))
    return y.reshape(x.shape[0], keep.shape[1], c).astype(jnp.result_type(x, values))


def _to_input_looped(dy: Any, values: Any, keep: Any) -> jax.Array:
    _, k, c = values.shape

    def step(dx: jax.Array, block: Any) -> tuple[jax.Array, None]:
        value, row, column = block
        product = _dot(_columns(dy, column * c, c), value.T)
        return _added(dx, product, row * k, row < keep.shape[0]), None

    zeros = jnp.zeros((dy.shape[0], keep.shape[0] * k), _sums(dy, values))
    dx, _ = lax.scan(step, zeros, (values, *places(keep, values.shape[0])))
    return dx.reshape(dy.shape[0], keep.shape[0], k).astype(jnp.result_type(dy, values))


def _to_values_looped(x: Any, dy: Any, values: Any, keep: Any) -> jax.Array:
    _, k, c = values.shape

    def one(block: Any) -> jax.Array:
        row, column = block
        return _dot(_columns(x, row * k, k).T, _columns(dy, column * c, c))

    made = lax.map(one, places(keep, values.shape[0]))
    return made.astype(jnp.result_type(x, dy))


def _columns(x: jax.Array, start: Any, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size, 1)


def _added(y: jax.Array, product: jax.Array, start: Any, real: Any) -> jax.Array:
    # Zeros of padding times infinity would be no zeros.
    product = jnp.where(real, product, jnp.zeros((), product.dtype))
    before = _columns(y, start, product.shape[1])
    return lax.dynamic_update_slice_in_dim(y, before + product, start, 1)


def _decoded(values: jax.Array, keep: Any) -> jax.Array:
    at = places(keep, values.shape[0])
    zeros = jnp.zeros((*keep.shape, *values.shape[1:]), values.dtype)
    blocks = zeros.at[at.rows, at.columns].set(values, mode="drop")
    rows, columns, k, c = blocks.shape
    return blocks.transpose(0, 2, 1, 3).reshape(rows * k, columns * c)


def _forward_decoded(x: Any, values: Any, keep: Any) -> jax.Array:
    y = _dot(x, _decoded(values, keep)).astype(jnp.result_type(x, values))
    return y.reshape(x.shape[0], keep.shape[1], values.shape[2])


def _to_input_decoded(dy: Any, values: Any, keep: Any) -> jax.Array:
    dx = _dot(dy, _decoded(values, keep).T).astype(jnp.result_type(dy, values))
    return dx.reshape(dy.shape[0], keep.shape[0], values.shape[1])


def _to_values_decoded(x: Any, dy: Any, values: Any, keep: Any) -> jax.Array:
    _, k, c = values.shape
    whole = _dot(x.T, dy).reshape(keep.shape[0], k, keep.shape[1], c)
    at = places(keep, values.shape[0])
    found = whole[at.rows, :, at.columns]
    return found.astype(jnp.result_type(x, dy))


_FORWARD = (_forward_unrolled, _forward_looped, _forward_decoded)
_TO_INPUT = (_to_input_unrolled, _to_input_looped, _to_input_decoded)
_TO_VALUES = (_to_values_unrolled, _to_values_looped, _to_values_decoded)
