"""Arrays of every dtype to bytes and back, bit for bit."""

import math

import jax
import jax.dtypes
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.checkpoint.packing import pack, unpack

# Bits of one element in the file; in memory every element takes whole bytes.
_BITS = {
    "bool": 1,
    "int2": 2,
    "uint2": 2,
    "int4": 4,
    "uint4": 4,
    "float4_e2m1fn": 4,
    "int8": 8,
    "uint8": 8,
    "float8_e3m4": 8,
    "float8_e4m3": 8,
    "float8_e4m3b11fnuz": 8,
    "float8_e4m3fn": 8,
    "float8_e4m3fnuz": 8,
    "float8_e5m2": 8,
    "float8_e5m2fnuz": 8,
    "float8_e8m0fnu": 8,
    "int16": 16,
    "uint16": 16,
    "float16": 16,
    "bfloat16": 16,
    "int32": 32,
    "uint32": 32,
    "float32": 32,
    "int64": 64,
    "uint64": 64,
    "float64": 64,
    "complex64": 64,
    "complex128": 128,
}

DTYPES = tuple(_BITS)


def dtype_of(name: str) -> np.dtype:
    """The dtype of a name in :data:`DTYPES`.

    Example:
        >>> dtype_of("bfloat16")
        dtype(bfloat16)
    """
    return jnp.dtype(name)


def stored_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes that :func:`to_bytes` makes of an array of this dtype and shape.

    Example:
        >>> stored_bytes("int4", (3,))
        2
    """
    return -(-math.prod(shape) * _BITS[name] // 8)


def memory_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes that an array of this dtype and shape takes in memory.

    Example:
        >>> memory_bytes("int4", (3,))
        3
    """
    return math.prod(shape) * max(1, _BITS[name] // 8)


def to_bytes(array: Shaped[np.ndarray, "..."]) -> bytes:
    r"""The bits of an array: little-endian, row-major, elements below a byte packed.

    Example:
        >>> to_bytes(np.array([True, False, True]))
        b'\x05'
    """
    bits = _BITS[array.dtype.name]
    if bits < 8:
        codes = np.ascontiguousarray(array).view(np.uint8) & np.uint8((1 << bits) - 1)
        return pack(codes, bits)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def from_bytes(
    data: bytes | bytearray | memoryview, name: str, shape: tuple[int, ...]
) -> Shaped[np.ndarray, "..."]:
    r"""Undo :func:`to_bytes`, into memory of its own.

    Raises:
        CheckpointError: the bytes do not fit the shape.

    Example:
        >>> from_bytes(b"\x05", "bool", (3,))
        array([ True, False,  True])
    """
    dtype, bits = dtype_of(name), _BITS[name]
    if bits < 8:
        codes = unpack(bytes(data), bits, math.prod(shape))
        return codes.view(dtype).reshape(shape)
    if len(data) != stored_bytes(name, shape):
        raise CheckpointError(f"{len(data)} bytes do not fill {name} of shape {shape}")
    little = np.frombuffer(data, dtype.newbyteorder("<"))
    return little.astype(dtype, copy=True).reshape(shape)


def in_jax(name: str) -> bool:
    """Whether JAX keeps this dtype as it is; without ``jax_enable_x64`` it narrows 64-bit ones.

    Example:
        >>> in_jax("float32")
        True
    """
    return jax.dtypes.canonicalize_dtype(dtype_of(name)) == dtype_of(name)


def to_jax(array: Shaped[np.ndarray, "..."]) -> Array | Shaped[np.ndarray, "..."]:
    """A JAX array where JAX keeps the dtype, else the NumPy array itself.

    Example:
        >>> to_jax(np.zeros(2, np.float32))
        Array([0., 0.], dtype=float32)
    """
    return jnp.asarray(array) if in_jax(array.dtype.name) else array
