"""Pack unsigned codes of 1 to 16 bits densely into bytes, along the last axis."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt, UInt8

_CODES = 8  # eight codes of b bits fill exactly b bytes


def packed_length(length: int, bits: int) -> int:
    """Bytes that ``length`` codes of ``bits`` bits occupy: ``ceil(length * bits / 8)``.

    Example:
        >>> packed_length(10, 3)
        4
    """
    return math.ceil(length * bits / 8)


def pack_bits(codes: Shaped[Array, "*lead n"], bits: int) -> UInt8[Array, "*lead bytes"]:
    """Pack codes along the last axis, least significant bit first, with no gap between codes.

    Args:
        codes: integer codes in ``[0, 2**bits)``, shape ``(*lead, n)``; higher bits are dropped.
        bits: bits per code, 1 to 16.

    Returns:
        ``uint8`` of shape ``(*lead, ceil(n * bits / 8))``; unused last bits are zero.

    Raises:
        ValueError: ``bits`` is outside 1 to 16, or ``codes`` has no axis.

    Example:
        >>> pack_bits(jnp.array([1, 2, 3, 0], jnp.uint8), bits=2)
        Array([57], dtype=uint8)
    """
    _check(codes, bits)
    length = codes.shape[-1]
    groups = math.ceil(length / _CODES)
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, groups * _CODES - length)]
    wide = jnp.pad(codes.astype(jnp.uint32) & ((1 << bits) - 1), padding)
    wide = wide.reshape(*codes.shape[:-1], groups, _CODES)
    columns = [_byte(wide, k, bits) for k in range(bits)]
    packed = jnp.stack(columns, axis=-1).reshape(*codes.shape[:-1], groups * bits)
    return packed[..., : packed_length(length, bits)]


def unpack_bits(
    packed: UInt8[Array, "*lead bytes"], bits: int, length: int
) -> UInt[Array, "*lead n"]:
    """Undo :func:`pack_bits`.

    Args:
        packed: ``uint8`` of shape ``(*lead, ceil(length * bits / 8))``.
        bits: bits per code, 1 to 16.
        length: how many codes the last axis holds.

    Returns:
        Codes of shape ``(*lead, length)``: ``uint8`` up to 8 bits, ``uint16`` above.

    Raises:
        ValueError: ``bits`` is outside 1 to 16, or the last axis does not have the bytes needed.

    Example:
        >>> unpack_bits(jnp.array([57], jnp.uint8), bits=2, length=4)
        Array([1, 2, 3, 0], dtype=uint8)
    """
    _check(packed, bits)
    if packed.shape[-1] != packed_length(length, bits):
        raise ValueError(
            f"{length} codes of {bits} bits need {packed_length(length, bits)} bytes, "
            f"the last axis has {packed.shape[-1]}: pass the length that was packed"
        )
    if bits == _CODES:
        return packed
    groups = math.ceil(length / _CODES)
    padding = [(0, 0)] * (packed.ndim - 1) + [(0, groups * bits - packed.shape[-1])]
    dtype = jnp.uint8 if bits <= 8 else jnp.uint16
    data = jnp.pad(packed, padding).reshape(*packed.shape[:-1], groups, bits).astype(jnp.uint32)
    columns = [_code(data, j, bits).astype(dtype) for j in range(_CODES)]
    return jnp.stack(columns, axis=-1).reshape(*packed.shape[:-1], groups * _CODES)[..., :length]


def _byte(codes: jax.Array, k: int, bits: int) -> jax.Array:
    """Byte ``k`` of each group: every code whose bits fall in ``[8k, 8k + 8)``."""
    total = jnp.zeros(codes.shape[:-1], jnp.uint32)
    for j in range(8 * k // bits, min(_CODES - 1, (8 * k + 7) // bits) + 1):
        shift = j * bits - 8 * k
        code = codes[..., j]
        total = total | (code << shift if shift >= 0 else code >> -shift)
    return (total & 0xFF).astype(jnp.uint8)


def _code(data: jax.Array, j: int, bits: int) -> jax.Array:
    """Code ``j`` of each group, gathered from the bytes that it spans."""
    first, last = j * bits // 8, (j * bits + bits - 1) // 8
    total = jnp.zeros(data.shape[:-1], jnp.uint32)
    for k in range(first, last + 1):
        total = total | (data[..., k] << (8 * (k - first)))
    return (total >> (j * bits - 8 * first)) & ((1 << bits) - 1)


def _check(array: jax.Array, bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, not {bits}")
    if array.ndim == 0:
        raise ValueError("a scalar has no axis to pack along: reshape it to (1,)")
