"""Pack unsigned codes of 1 to 16 bits densely into bytes, along the last axis."""

import math
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt, UInt8

from jaxcomp.sharding import automatic, spec_like


def packed_length(length: int, bits: int) -> int:
    """Bytes that ``length`` codes of ``bits`` bits occupy: ``ceil(length * bits / 8)``.

    Example:
        >>> packed_length(10, 3)
        4
    """
    return -(-length * bits // 8)


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
    return _pack_jit(codes, bits)


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
    _check(packed, bits, length)
    return _unpack_jit(packed, bits, length)


def pack_bits_host(
    codes: Shaped[np.ndarray, "*lead n"], bits: int
) -> UInt8[np.ndarray, "*lead bytes"]:
    """:func:`pack_bits` with NumPy: nothing to compile, no device memory.

    Example:
        >>> pack_bits_host(np.array([1, 2, 3, 0]), bits=2)
        array([57], dtype=uint8)
    """
    _check(codes, bits)
    return _pack(codes, bits, np)


def unpack_bits_host(
    packed: UInt8[np.ndarray, "*lead bytes"], bits: int, length: int
) -> UInt[np.ndarray, "*lead n"]:
    """:func:`unpack_bits` with NumPy: nothing to compile, no device memory.

    Example:
        >>> unpack_bits_host(np.array([57], np.uint8), bits=2, length=4)
        array([1, 2, 3, 0], dtype=uint8)
    """
    _check(packed, bits, length)
    return _unpack(packed, bits, length, np)


# Compiled also where the caller is not, so that no 32-bit copy of the codes is ever stored.
@partial(jax.jit, static_argnums=1)
def _pack_jit(codes: jax.Array, bits: int) -> jax.Array:
    shape = (*codes.shape[:-1], packed_length(codes.shape[-1], bits))
    return automatic(lambda codes: _pack(codes, bits, jnp), out=spec_like(codes, shape))(codes)


@partial(jax.jit, static_argnums=(1, 2))
def _unpack_jit(packed: jax.Array, bits: int, length: int) -> jax.Array:
    out = spec_like(packed, (*packed.shape[:-1], length))
    return automatic(lambda packed: _unpack(packed, bits, length, jnp), out=out)(packed)


def _pack(codes: Any, bits: int, xp: ModuleType) -> Any:
    lead, length = codes.shape[:-1], codes.shape[-1]
    per_group, group_bytes = _group(bits)
    groups = -(-length // per_group)
    wide = codes.astype(xp.uint32) & ((1 << bits) - 1)
    wide = _pad(wide, groups * per_group, xp).reshape(*lead, groups, per_group)
    columns = [_byte(wide, k, bits).astype(xp.uint8) for k in range(group_bytes)]
    packed = xp.stack(columns, axis=-1).reshape(*lead, groups * group_bytes)
    return packed[..., : packed_length(length, bits)]


def _unpack(packed: Any, bits: int, length: int, xp: ModuleType) -> Any:
    if bits == 8:
        return packed
    lead = packed.shape[:-1]
    per_group, group_bytes = _group(bits)
    groups = -(-length // per_group)
    data = _pad(packed, groups * group_bytes, xp).reshape(*lead, groups, group_bytes)
    dtype = xp.uint8 if bits < 8 else xp.uint16
    columns = [_code(data.astype(xp.uint32), j, bits).astype(dtype) for j in range(per_group)]
    return xp.stack(columns, axis=-1).reshape(*lead, groups * per_group)[..., :length]


def _group(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes: ``(codes, bytes)``."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _pad(x: Any, length: int, xp: ModuleType) -> Any:
    return xp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])


def _byte(codes: Any, k: int, bits: int) -> Any:
    """Byte ``k`` of each group: every code whose bits fall in ``[8k, 8k + 8)``."""
    total = 0
    for j in range(8 * k // bits, min(codes.shape[-1] - 1, (8 * k + 7) // bits) + 1):
        shift = j * bits - 8 * k
        code = codes[..., j]
        total = total | (code << shift if shift >= 0 else code >> -shift)
    return total & 0xFF


def _code(data: Any, j: int, bits: int) -> Any:
    """Code ``j`` of each group, gathered from the bytes that it spans."""
    first, last = j * bits // 8, (j * bits + bits - 1) // 8
    total = 0
    for k in range(first, last + 1):
        total = total | (data[..., k] << (8 * (k - first)))
    return (total >> (j * bits - 8 * first)) & ((1 << bits) - 1)


def _check(array: Any, bits: int, length: int | None = None) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, not {bits}")
    if array.ndim == 0:
        raise ValueError("a scalar has no axis to pack along: reshape it to (1,)")
    if length is None:
        return
    if length < 0 or array.shape[-1] != packed_length(length, bits):
        raise ValueError(
            f"{length} codes of {bits} bits need {packed_length(length, bits)} bytes, "
            f"the last axis has {array.shape[-1]}: pass the length that was packed"
        )
