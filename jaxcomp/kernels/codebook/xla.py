"""The product with shared values and its gradients, as XLA compiles them: anywhere, any sizes.

Indices that share a byte have products of their own, whose outputs lie side by side. On a CPU
values are looked up, elsewhere chosen bit by bit, which is fused with what follows. XLA's compiler
for CPUs writes what an operand is made of: there, a block of inputs at a time, which stays in the
cache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.kernels.codebook.lookup import choose_by_bits, part_of_indices

# Weights that are looked up at a time on a CPU: 4 MiB in float32.
_BLOCK = 1 << 20
# What gives the values of one part of each byte: of bits, packed indices, codebook and part.
_Values = Callable[..., jax.Array]


def forward(
    bits: int, x: jax.Array, packed: jax.Array, codebook: jax.Array, shifts: jax.Array
) -> jax.Array:
    """The outputs of each byte: ``(rows, width, parts)``.

    Args:
        bits: of an index: 1, 2 or 4.
        x: activations, ``(rows, inputs)``.
        packed: indices, ``(inputs, width)`` bytes.
        codebook: ``(groups, 2 ** bits)``; groups are equal parts of the outputs.
        shifts: where the parts of a byte begin; of these only how many is read.
    """
    parts = shifts.shape[0]
    if 0 in (x.shape[0], *packed.shape):
        shape = (x.shape[0], packed.shape[1], parts)
        return jnp.zeros(shape, jnp.result_type(x, codebook))
    in_blocks = partial(_forward_in_blocks, bits, parts)
    whole = partial(_products, _chosen, bits, parts)
    totals = lax.platform_dependent(x, packed, codebook, cpu=in_blocks, default=whole)
    return totals.astype(jnp.result_type(x, codebook))


def to_input(
    bits: int, dy: jax.Array, packed: jax.Array, codebook: jax.Array, shifts: jax.Array
) -> jax.Array:
    """``(rows, inputs)`` of ``dy (rows, width, parts)``."""
    parts = range(shifts.shape[0])

    def products(values: _Values, dy: jax.Array, *arrays: jax.Array) -> Any:
        return sum(_dot(dy[:, :, part], values(bits, *arrays, part).T) for part in parts)

    looked_up, chosen = partial(products, _looked_up), partial(products, _chosen)
    dx = lax.platform_dependent(dy, packed, codebook, cpu=looked_up, default=chosen)
    return dx.astype(jnp.result_type(dy, codebook))


def to_codebook(
    bits: int, x: jax.Array, dy: jax.Array, packed: jax.Array, codebook: jax.Array
) -> jax.Array:
    """The gradients of all weights that share a value, summed up: of the shape of ``codebook``."""
    groups, entries = codebook.shape
    total = jnp.zeros((groups, entries), _sums(x, dy))
    for part in range(dy.shape[2]):
        weights, indices = _dot(x.T, dy[:, :, part]), part_of_indices(packed, part, bits)
        scattered, selected = (
            partial(_scattered, codebook.shape),
            partial(_selected, codebook.shape),
        )
        total += lax.platform_dependent(weights, indices, cpu=scattered, default=selected)
    return total.astype(codebook.dtype)


def _forward_in_blocks(bits: int, parts: int, x: Any, packed: Any, codebook: Any) -> jax.Array:
    inputs, width = packed.shape
    length = max(1, min(inputs, _BLOCK // (width * parts)))
    count, rest = divmod(inputs, length)

    def block(first: Any, length: int) -> jax.Array:
        left = lax.dynamic_slice_in_dim(x, first, length, 1)
        here = lax.dynamic_slice_in_dim(packed, first, length, 0)
        return _products(_looked_up, bits, parts, left, here, codebook)

    total = block(0, length)
    if count > 1:
        add = lambda k, total: total + block(k * length, length)
        total = lax.fori_loop(1, count, add, total)
    return total + block(count * length, rest) if rest else total


def _products(
    values: _Values, bits: int, parts: int, x: jax.Array, packed: jax.Array, codebook: jax.Array
) -> jax.Array:
    made = [_dot(x, values(bits, packed, codebook, part)) for part in range(parts)]
    return jnp.stack(made, -1)


def _chosen(bits: int, packed: jax.Array, codebook: jax.Array, part: int) -> jax.Array:
    groups, entries = codebook.shape
    each = packed.shape[1] // groups
    of_group = lambda k: jnp.repeat(codebook[:, k], each)[None] if groups > 1 else codebook[0, k]
    indices = part_of_indices(packed, part, bits)
    return choose_by_bits(indices, [of_group(entry) for entry in range(entries)])


def _looked_up(bits: int, packed: jax.Array, codebook: jax.Array, part: int) -> jax.Array:
    indices = _in_all_groups(part_of_indices(packed, part, bits), codebook.shape)
    return jnp.take(codebook.reshape(-1), indices, mode="clip")


def _in_all_groups(indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Indices into the codebooks of all groups, one behind the other."""
    groups, entries = shape
    return indices + jnp.repeat(jnp.arange(groups) * entries, indices.shape[1] // groups)


def _scattered(shape: tuple[int, ...], weights: jax.Array, indices: jax.Array) -> jax.Array:
    at = _in_all_groups(indices, shape).reshape(-1)
    zeros = jnp.zeros(shape[0] * shape[1], weights.dtype)
    return zeros.at[at].add(weights.reshape(-1), mode="clip").reshape(shape)


def _selected(shape: tuple[int, ...], weights: jax.Array, indices: jax.Array) -> jax.Array:
    """One pass for each value: in a scatter all weights would wait for a few places."""
    inputs, groups, width = weights.shape[0], shape[0], weights.shape[1] // shape[0]
    weights, indices = (a.reshape(inputs, groups, width) for a in (weights, indices))
    pick = lambda entry: jnp.sum(jnp.where(indices == entry, weights, 0), (0, 2))
    return jnp.stack([pick(entry) for entry in range(shape[1])], -1)


def _sums(*arrays: jax.Array) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    dtype = jnp.result_type(left, right)
    return jnp.matmul(
        left.astype(dtype), right.astype(dtype), preferred_element_type=_sums(left, right)
    )
