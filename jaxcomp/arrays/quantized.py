"""Uniformly quantized leaves: packed codes, scales and, if affine, zero points."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt

from jaxcomp.arrays.base import CompressedArray
from jaxcomp.arrays.bits import pack_bits_host, unpack_bits, unpack_bits_host
from jaxcomp.arrays.parts import (
    Parts,
    Symbols,
    check_names,
    read_array,
    read_dtype,
    read_floats,
    read_int,
    read_symbols,
    to_device,
)
from jaxcomp.sharding import automatic, spec_like


def split_groups(x: Shaped[Array, "..."], size: int, axis: int) -> Shaped[Array, "..."]:
    """Split ``axis`` (negative) into (groups, size): ``(…, n, …)`` to ``(…, n / size, size, …)``.

    Example:
        >>> split_groups(jnp.zeros((6, 4)), size=3, axis=-2).shape
        (2, 3, 4)
    """
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])


def merge_groups(x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """Undo :func:`split_groups`.

    Example:
        >>> merge_groups(jnp.zeros((2, 3, 4)), axis=-2).shape
        (6, 4)
    """
    at = x.ndim - 1 + axis
    return x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])


def dequantize(
    codes: UInt[Array, " *dims"],
    scale: Float[Array, "..."],
    zero_point: UInt[Array, "..."] | None,
    *,
    bits: int,
    group: tuple[int, int] | None,
    dtype: Any,
) -> Float[Array, " *dims"]:
    """``(codes - zero_point) * scale``, the one formula by which codes become weights.

    Args:
        codes: unsigned codes; a symmetric format offsets them by ``2**(bits - 1)``.
        scale: step sizes, broadcastable to ``codes`` (to split groups where ``group`` is given).
        zero_point: the code of zero, shaped like ``scale``; None for a symmetric format.
        bits: bits per code.
        group: ``(size, negative axis)`` of groups that share a scale, or None.
        dtype: dtype of the result; the product is taken in float32 and rounded once.

    Returns:
        Dense weights of the shape of ``codes``.

    Example:
        >>> dequantize(jnp.array([7, 8, 9], jnp.uint8), jnp.array([0.5]), None, bits=4,
        ...            group=None, dtype=jnp.float32)
        Array([-0.5,  0. ,  0.5], dtype=float32)
    """
    if group is not None:
        codes = split_groups(codes, *group)
    offset = 1 << (bits - 1) if zero_point is None else zero_point.astype(jnp.int32)
    # In a narrower dtype XLA may or may not round the product, as it happens to fuse.
    wide = jnp.promote_types(scale.dtype, jnp.float32)
    values = (codes.astype(jnp.int32) - offset).astype(wide) * scale.astype(wide)
    if group is not None:
        values = merge_groups(values, group[1])
    return values.astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class QuantizedArray(CompressedArray):
    """Codes of ``bits`` bits with a scale per tensor, channel or group.

    Made by :func:`jaxcomp.quantize.encode`.

    Attributes:
        codes: ``uint8`` of shape ``(*shape[:-1], ceil(shape[-1] * bits / 8))``, packed.
        scale: step sizes, one axis per axis of the leaf (size 1 where shared), with groups one
            more.
        zero_point: ``uint8`` codes of zero, shaped like ``scale``; None if symmetric.
        bits: bits per code.
        length: size of the dense last axis.
        group: ``(size, negative axis)`` of groups that share a scale, or None.
        dense_dtype: dtype of the dense array.
    """

    codes: Any
    scale: Any
    zero_point: Any
    bits: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    group: tuple[int, int] | None = dataclasses.field(metadata={"static": True})
    dense_dtype: Any = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        # One spelling of each dtype, or equal forms would be compiled twice.
        object.__setattr__(self, "dense_dtype", jnp.dtype(self.dense_dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return (*self.codes.shape[:-1], self.length)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dense array."""
        return self.dense_dtype

    def decode(self) -> jax.Array:
        """The dense array, ``(codes - zero_point) * scale``."""
        return _decode(self)

    def form(self) -> str:
        """Such as ``int4 symmetric, groups of 32``."""
        kind = "symmetric" if self.zero_point is None else "affine"
        if self.group is not None:
            return f"int{self.bits} {kind}, groups of {self.group[0]}"
        scales = math.prod(self.scale.shape)
        return f"int{self.bits} {kind}, {scales} {'scale' if scales == 1 else 'scales'}"

    def to_parts(self) -> Parts:
        """Take the leaf apart; the codes go to the entropy coder."""
        static = {
            "bits": self.bits,
            "group": None if self.group is None else list(self.group),
            "dtype": self.dense_dtype.name,
        }
        codes = unpack_bits_host(np.asarray(self.codes), self.bits, self.length)
        arrays = {"scale": np.asarray(self.scale)}
        if self.zero_point is not None:
            arrays["zero_point"] = np.asarray(self.zero_point)
        return Parts(static, {"codes": Symbols(codes, 1 << self.bits)}, arrays)

    @classmethod
    def from_parts(cls, parts: Parts) -> "QuantizedArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        names = {"bits", "group", "dtype"}
        check_names(
            parts, static=names, symbols={"codes"}, arrays={"scale"}, optional={"zero_point"}
        )
        bits = read_int(parts.static["bits"], "bits", 1, 8)
        codes, scale = read_symbols(parts, "codes", 1 << bits), read_floats(parts, "scale")
        group, shape = _read_group(parts.static["group"], codes.shape)
        fits = scale.ndim == len(shape) and all(
            a in (1, b) for a, b in zip(scale.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(f"scales of shape {scale.shape} do not fit codes of shape {shape}")
        zero_point = parts.arrays.get("zero_point")
        if zero_point is not None:
            zero_point = read_array(zero_point, "zero_point")
            if zero_point.dtype != np.uint8 or zero_point.shape != scale.shape:
                raise ValueError(
                    f"zero_point must be uint8 in the shape of scale, {scale.shape}, "
                    f"not {zero_point.dtype} of shape {zero_point.shape}"
                )
            if zero_point.max(initial=0) >> bits:
                raise ValueError(f"a zero_point is no code of {bits} bits: {zero_point.max()}")
        return cls(
            codes=to_device(pack_bits_host(codes, bits)),
            scale=to_device(scale),
            zero_point=None if zero_point is None else to_device(zero_point),
            bits=bits,
            length=codes.shape[-1],
            group=group,
            dense_dtype=read_dtype(parts.static["dtype"]),
        )


@jax.jit
def _decode(leaf: QuantizedArray) -> jax.Array:
    def dense(leaf: QuantizedArray) -> jax.Array:
        return dequantize(
            unpack_bits(leaf.codes, leaf.bits, leaf.length),
            leaf.scale,
            leaf.zero_point,
            bits=leaf.bits,
            group=leaf.group,
            dtype=leaf.dense_dtype,
        )

    return automatic(dense, out=spec_like(leaf.codes, leaf.shape))(leaf)


def _read_group(
    group: Any, shape: tuple[int, ...]
) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
    """The checked group, and the shape that codes have once they are split into groups."""
    if group is None:
        return None, shape
    if not isinstance(group, list | tuple) or len(group) != 2:
        raise ValueError(f"group must be null or [size, axis], not {group!r:.60}")
    axis = read_int(group[1], "the axis of a group", -len(shape), -1)
    at = len(shape) + axis
    size = read_int(group[0], "the size of a group", 1, 1 << 31)
    if shape[at] % size:
        raise ValueError(f"groups of {size} on axis {axis} do not fit codes of shape {shape}")
    return (size, axis), (*shape[:at], shape[at] // size, size, *shape[at + 1 :])
