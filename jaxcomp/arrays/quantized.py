"""Uniformly quantized leaves: packed codes, scales and, if affine, zero points."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt

from jaxcomp.arrays.base import CompressedArray
from jaxcomp.arrays.bits import pack_bits_host, unpack_bits, unpack_bits_host
from jaxcomp.arrays.blocks import (
    Blocks,
    check_fit,
    describe_blocks,
    merge_blocks,
    narrow,
    read_blocks,
    split_blocks,
    wide_scale,
)
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


def dequantize(
    codes: UInt[Array, " *dims"],
    scale: Shaped[Array, "..."],
    zero_point: UInt[Array, "..."] | None,
    *,
    bits: int,
    blocks: Blocks,
    dtype: Any,
    zero: bool = True,
) -> Float[Array, " *dims"]:
    """``(codes - zero_point) * scale``, the one formula by which codes become weights.

    Args:
        codes: unsigned codes; a symmetric format offsets them by ``2**(bits - 1)``.
        scale: step sizes, broadcastable to ``codes`` (once split, where there are ``blocks``).
        zero_point: the code of zero, shaped like ``scale``; None for a symmetric format.
        bits: bits per code.
        blocks: ``(size, negative axis)`` of each axis that is cut into blocks.
        dtype: dtype of the result; the product is taken in float32 and rounded once.
        zero: whether zero is a level. If not, the levels are the odd multiples of ``scale``,
            which is half a step then: ``(2 * codes - (2**bits - 1)) * scale``.

    Returns:
        Dense weights of the shape of ``codes``.

    Example:
        >>> dequantize(jnp.array([7, 8, 9], jnp.uint8), jnp.array([0.5]), None, bits=4,
        ...            blocks=(), dtype=jnp.float32)
        Array([-0.5,  0. ,  0.5], dtype=float32)
    """
    wide = wide_scale(scale)
    steps = uniform_steps(split_blocks(codes, blocks), zero_point, bits=bits, zero=zero)
    values = merge_blocks(steps.astype(wide.dtype) * wide, blocks)
    return narrow(values, dtype, clipped=scale.dtype != wide.dtype)


def uniform_steps(
    codes: UInt[Array, "..."], zero_point: Shaped[Array, "..."] | None, *, bits: int, zero: bool
) -> Int[Array, "..."]:
    """By how many scales each code is away from zero.

    Args:
        codes: unsigned codes.
        zero_point: the code of zero, broadcastable to ``codes``; None for a symmetric format.
        bits: bits per code.
        zero: whether zero is a level.

    Example:
        >>> uniform_steps(jnp.arange(4, dtype=jnp.uint8), None, bits=2, zero=False)
        Array([-3, -1,  1,  3], dtype=int32)
    """
    codes = codes.astype(jnp.int32)
    if not zero:
        return 2 * codes - ((1 << bits) - 1)
    return codes - (1 << (bits - 1) if zero_point is None else zero_point.astype(jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class QuantizedArray(CompressedArray):
    """Codes of ``bits`` bits with a scale per tensor, channel, group or block.

    Made by :func:`jaxcomp.quantize.encode`.

    Attributes:
        codes: ``uint8`` of shape ``(*shape[:-1], ceil(shape[-1] * bits / 8))``, packed.
        scale: step sizes, one axis per axis of the leaf (size 1 where shared), and one more for
            each axis that is cut into blocks.
        zero_point: ``uint8`` codes of zero, shaped like ``scale``; None if symmetric.
        bits: bits per code.
        length: size of the dense last axis.
        blocks: ``(size, negative axis)`` of each axis that is cut into blocks, in their order.
        dense_dtype: dtype of the dense array.
        zero: whether zero is a level; if not, the levels are odd multiples of ``scale``.
    """

    codes: Any
    scale: Any
    zero_point: Any
    bits: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    blocks: Blocks = dataclasses.field(metadata={"static": True})
    dense_dtype: Any = dataclasses.field(metadata={"static": True})
    zero: bool = dataclasses.field(default=True, metadata={"static": True})

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
        kind = kind if self.zero else "without zero"
        if self.blocks:
            return f"int{self.bits} {kind}, {describe_blocks(self.blocks)}"
        scales = math.prod(self.scale.shape)
        return f"int{self.bits} {kind}, {scales} {'scale' if scales == 1 else 'scales'}"

    def to_parts(self) -> Parts:
        """Take the leaf apart; the codes go to the entropy coder."""
        static = {
            "bits": self.bits,
            "blocks": [list(block) for block in self.blocks],
            "zero": self.zero,
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
        names = {"bits", "blocks", "zero", "dtype"}
        check_names(
            parts, static=names, symbols={"codes"}, arrays={"scale"}, optional={"zero_point"}
        )
        bits = read_int(parts.static["bits"], "bits", 1, 8)
        codes, scale = read_symbols(parts, "codes", 1 << bits), read_floats(parts, "scale")
        blocks = read_blocks(parts.static["blocks"], codes.shape)
        check_fit(scale.shape, codes.shape, blocks)
        zero = parts.static["zero"]
        if not isinstance(zero, bool) or not (zero or "zero_point" not in parts.arrays):
            raise ValueError(f"zero must be true, or false without a zero_point, not {zero!r:.60}")
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
            blocks=blocks,
            dense_dtype=read_dtype(parts.static["dtype"]),
            zero=zero,
        )


@jax.jit
def _decode(leaf: QuantizedArray) -> jax.Array:
    def dense(leaf: QuantizedArray) -> jax.Array:
        return dequantize(
            unpack_bits(leaf.codes, leaf.bits, leaf.length),
            leaf.scale,
            leaf.zero_point,
            bits=leaf.bits,
            blocks=leaf.blocks,
            dtype=leaf.dense_dtype,
            zero=leaf.zero,
        )

    return automatic(dense, out=spec_like(leaf.codes, leaf.shape))(leaf)
