"""Uniformly quantized leaves: packed codes, scales and, if affine, zero points."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt

from jaxcomp.arrays.base import CompressedArray, Parts, Symbols
from jaxcomp.arrays.bits import pack_bits, packed_length, unpack_bits


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
        dtype: dtype of the result; the product itself is taken in the scale's dtype.

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
    values = (codes.astype(jnp.int32) - offset).astype(scale.dtype) * scale
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return (*self.codes.shape[:-1], self.length)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dense array."""
        return jnp.dtype(self.dense_dtype)

    def decode(self) -> jax.Array:
        """The dense array, ``(codes - zero_point) * scale``."""
        return dequantize(
            unpack_bits(self.codes, self.bits, self.length),
            self.scale,
            self.zero_point,
            bits=self.bits,
            group=self.group,
            dtype=self.dense_dtype,
        )

    def form(self) -> str:
        """Such as ``int4 symmetric, groups of 32``."""
        kind = "symmetric" if self.zero_point is None else "affine"
        if self.group is not None:
            return f"int{self.bits} {kind}, groups of {self.group[0]}"
        return f"int{self.bits} {kind}, {self.scale.size} scales"

    def to_parts(self) -> Parts:
        """Take the leaf apart; the codes go to the entropy coder."""
        static = {
            "bits": self.bits,
            "group": None if self.group is None else list(self.group),
            "dtype": jnp.dtype(self.dense_dtype).name,
        }
        codes = np.asarray(unpack_bits(self.codes, self.bits, self.length))
        arrays = {"scale": np.asarray(self.scale)}
        if self.zero_point is not None:
            arrays["zero_point"] = np.asarray(self.zero_point)
        return Parts(static, {"codes": Symbols(codes, 1 << self.bits)}, arrays)

    @classmethod
    def from_parts(cls, parts: Parts) -> "QuantizedArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        codes, scale = parts.symbols["codes"].values, parts.arrays["scale"]
        zero_point = parts.arrays.get("zero_point")
        bits, group = parts.static["bits"], parts.static["group"]
        if not isinstance(bits, int) or not 1 <= bits <= 8 or codes.ndim == 0:
            raise ValueError(f"not a quantized leaf: {bits} bits, {codes.ndim} axes")
        shape = codes.shape
        if group is not None:
            size, axis = (int(n) for n in group)
            if size < 1 or not -codes.ndim <= axis <= -1 or shape[axis] % size:
                raise ValueError(f"groups of {size} on axis {axis} do not fit shape {shape}")
            group = (size, axis)
            at = codes.ndim + axis
            shape = (*shape[:at], shape[at] // size, size, *shape[at + 1 :])
        fits = scale.ndim == len(shape) and all(
            a in (1, b) for a, b in zip(scale.shape, shape, strict=True)
        )
        if not fits or (zero_point is not None and zero_point.shape != scale.shape):
            raise ValueError(f"scales of shape {scale.shape} do not fit codes of shape {shape}")
        if not jnp.issubdtype(scale.dtype, jnp.floating):
            raise ValueError(f"scales must be floating, not {scale.dtype}")
        if zero_point is not None and zero_point.dtype != np.uint8:
            raise ValueError(f"zero points must be uint8, not {zero_point.dtype}")
        packed = pack_bits(jnp.asarray(codes), bits)
        assert packed.shape[-1] == packed_length(codes.shape[-1], bits)
        return cls(
            codes=packed,
            scale=jnp.asarray(scale),
            zero_point=None if zero_point is None else jnp.asarray(zero_point),
            bits=bits,
            length=codes.shape[-1],
            group=group,
            dense_dtype=jnp.dtype(parts.static["dtype"]),
        )
