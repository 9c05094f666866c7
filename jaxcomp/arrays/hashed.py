"""Hashed leaves: a hash of its place gives each weight its bucket and its sign (HashedNets)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from jaxcomp.arrays.base import CompressedArray
from jaxcomp.arrays.bits import pack_bits, pack_bits_host, unpack_bits_host
from jaxcomp.arrays.blocks import narrow
from jaxcomp.arrays.parts import (
    Parts,
    Symbols,
    check_names,
    read_dtype,
    read_floats,
    read_int,
    read_symbols,
    to_device,
)
from jaxcomp.arrays.vector_codebook import masked
from jaxcomp.sharding import automatic

MAX_SEED = (1 << 32) - 1
# Places are hashed as 32-bit numbers, and buckets indexed with signed ones.
_MOST_WEIGHTS = (1 << 31) - 1


def mix(x: Any) -> Any:
    """Scramble unsigned 32-bit integers: every bit of the result depends on every bit given.

    Args:
        x: uint32, an array of JAX or NumPy.

    Returns:
        uint32, of the same shape; a permutation of all 32-bit integers.

    Example:
        >>> [hex(n) for n in mix(np.arange(3, dtype=np.uint32)).tolist()]
        ['0x0', '0x514e28b7', '0x30f4c306']

    Source: Appleby, MurmurHash3 (public domain), 2011, the 32-bit finalizer.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def hash_places(
    shape: tuple[int, ...], buckets: int, seed: int
) -> tuple[Int32[Array, "..."], Float[Array, "..."]]:
    """The bucket and the sign of each weight.

    With ``p`` the weight's place in row-major order, ``s = mix(seed + 0x9E3779B9)`` and
    ``h = mix(p ^ s)``: the bucket is ``h mod buckets``, the sign that of the last bit of
    ``mix(h ^ 0x9E3779B9)``; all in 32-bit unsigned arithmetic, so equal on every machine.

    Args:
        shape: of the weights.
        buckets: how many values they share.
        seed: 0 to 2^32 - 1; which of the hash functions.

    Returns:
        Buckets, and signs 1.0 or -1.0, both of the shape.

    Example:
        >>> bucket, sign = hash_places((2, 3), buckets=4, seed=0)
        >>> bucket.tolist(), sign.tolist()
        ([[1, 2, 0], [1, 0, 0]], [[1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    """
    golden = np.uint32(0x9E3779B9)
    start = mix(np.array([(seed + int(golden)) & MAX_SEED], np.uint32))[0]
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    hashed = mix(place ^ start)
    sign = jnp.where(mix(hashed ^ golden) & 1, -1.0, 1.0)
    return (hashed % np.uint32(buckets)).astype(jnp.int32), sign


def lookup_hashed(
    buckets: Float[Array, "*batch k"], dims: tuple[int, ...], seed: int, out: Any = None
) -> Float[Array, " *batch_and_dims"]:
    """The array that buckets stand for: each weight is its bucket times its sign.

    Args:
        buckets: ``(*batch, k)``; entries of the leading axes are hashed alike.
        dims: shape of an array of one batch entry.
        seed: see :func:`hash_places`.
        out: where the result lies on explicit mesh axes; None: replicated.

    Returns:
        ``(*batch, *dims)``, in the dtype of the buckets.

    Example:
        >>> lookup_hashed(jnp.array([1.0, 2.0, 3.0, 4.0]), (2, 3), seed=0)
        Array([[ 2., -3., -1.],
               [ 2.,  1.,  1.]], dtype=float32)
    """

    def dense(buckets: Array) -> Array:
        place, sign = hash_places(dims, buckets.shape[-1], seed)
        return jnp.take(buckets, place, axis=-1, mode="clip") * sign.astype(buckets.dtype)

    return automatic(dense, out=PartitionSpec() if out is None else out)(buckets)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class HashedArray(CompressedArray):
    """Weights that share values by a hash of their place: nothing but the values is stored.

    Made by :func:`jaxcomp.share.hashed` (Chen et al., 2015, HashedNets).

    Attributes:
        buckets: the shared values, ``(*batch, k)``; ``batch`` are stacked leading axes, which are
            hashed alike.
        dims: shape of the dense array without ``batch``.
        seed: of the hash, see :func:`hash_places`.
        dense_dtype: dtype of the dense array.
        mask: ``uint8``, a bit a weight, 0 where the weight is zero whatever its bucket; or None.
    """

    buckets: Any
    dims: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    seed: int = dataclasses.field(metadata={"static": True})
    dense_dtype: Any = dataclasses.field(metadata={"static": True})
    mask: Any = None

    def __post_init__(self) -> None:
        # One spelling of each dtype, or equal forms would be compiled twice.
        object.__setattr__(self, "dense_dtype", jnp.dtype(self.dense_dtype))

    @classmethod
    def from_buckets(
        cls, buckets: Any, dims: tuple[int, ...], seed: int, dtype: Any, mask: Any = None
    ) -> "HashedArray":
        """A leaf of buckets that fit.

        Args:
            buckets: ``(*batch, k)``, floating.
            dims: shape of the dense array without ``batch``.
            seed: 0 to 2^32 - 1.
            dtype: dtype of the dense array.
            mask: booleans of the dense array's shape, False where it is zero; or None.

        Raises:
            ValueError: sizes out of range, or a mask of another shape.

        Example:
            >>> HashedArray.from_buckets(jnp.ones(100), (64, 32), 0, jnp.float32)
            HashedArray(shape=(64, 32), dtype=float32, 100 hashed values, 400 bytes)
        """
        _check(buckets.shape, dims)
        read_int(seed, "seed", 0, MAX_SEED)
        leaf = cls(buckets, tuple(dims), seed, dtype)
        if mask is None:
            return leaf
        _check_mask(mask.shape, leaf.shape)
        return dataclasses.replace(leaf, mask=pack_bits(jnp.asarray(mask).astype(jnp.uint8), 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return (*self.buckets.shape[:-1], *self.dims)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dense array."""
        return self.dense_dtype

    def decode(self) -> jax.Array:
        """The dense array, ``sign * buckets[bucket]``."""
        return _decode(self)

    def form(self) -> str:
        """Such as ``100 hashed values``."""
        kept = "" if self.mask is None else ", masked"
        return f"{self.buckets.shape[-1]} hashed values{kept}"

    def to_parts(self) -> Parts:
        """Take the leaf apart; a mask goes to the entropy coder."""
        symbols = {}
        if self.mask is not None:
            bits = unpack_bits_host(np.asarray(self.mask), 1, self.shape[-1])
            symbols["mask"] = Symbols(bits, 2)
        static = {"dtype": self.dense_dtype.name, "dims": list(self.dims), "seed": self.seed}
        return Parts(static, symbols, {"buckets": np.asarray(self.buckets)})

    @classmethod
    def from_parts(cls, parts: Parts) -> "HashedArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        kept = isinstance(parts.symbols, dict) and "mask" in parts.symbols
        names = {"mask"} if kept else set()
        check_names(parts, static={"dtype", "dims", "seed"}, symbols=names, arrays={"buckets"})
        buckets, dtype = read_floats(parts, "buckets"), read_dtype(parts.static["dtype"])
        dims, seed = parts.static["dims"], read_int(parts.static["seed"], "seed", 0, MAX_SEED)
        if not isinstance(dims, list) or not 1 <= len(dims) <= 32:
            raise ValueError(f"dims must be a list of 1 to 32 sizes, not {dims!r:.60}")
        dims = tuple(read_int(size, "a size of dims", 0, _MOST_WEIGHTS) for size in dims)
        _check(buckets.shape, dims)
        leaf = cls(to_device(buckets), dims, seed, dtype)
        if not kept:
            return leaf
        bits = read_symbols(parts, "mask", 2)
        _check_mask(bits.shape, leaf.shape)
        return dataclasses.replace(leaf, mask=to_device(pack_bits_host(bits, 1)))


@jax.jit
def _decode(leaf: HashedArray) -> jax.Array:
    dense = lookup_hashed(leaf.buckets, leaf.dims, leaf.seed)
    return masked(narrow(dense, leaf.dense_dtype, clipped=True), leaf.mask)


def _check(buckets: tuple[int, ...], dims: tuple[int, ...]) -> None:
    if not buckets or not 1 <= buckets[-1] <= _MOST_WEIGHTS:
        raise ValueError(f"buckets are (..., at least 1), not of shape {buckets}")
    # Sizes of an empty array are bounded too.
    if math.prod(max(size, 1) for size in (*buckets[:-1], *dims)) > _MOST_WEIGHTS:
        raise ValueError(f"dims {dims} of {buckets} buckets: at most {_MOST_WEIGHTS} weights")
    if not dims:
        raise ValueError("a hashed leaf has at least one axis beside stacked ones")


def _check_mask(mask: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if tuple(mask) != shape:
        raise ValueError(f"a mask of shape {mask} does not fit weights of {shape}")
