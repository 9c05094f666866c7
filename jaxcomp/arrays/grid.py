"""Leaves whose levels are those of a small float or a table, scaled: packed codes and scales."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt

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
from jaxcomp.arrays.elements import ELEMENTS, element_levels
from jaxcomp.arrays.parts import (
    Parts,
    Symbols,
    check_names,
    read_dtype,
    read_floats,
    read_symbols,
    to_device,
)
from jaxcomp.sharding import automatic, spec_like


def grid_values(
    codes: UInt[Array, " *dims"],
    scale: Shaped[Array, "..."],
    tensor_scale: Float[Array, "..."] | None,
    *,
    element: str,
    blocks: Blocks,
    dtype: Any,
) -> Float[Array, " *dims"]:
    """``level * (scale * tensor_scale)``, the one formula by which codes become weights.

    Args:
        codes: unsigned codes of the element.
        scale: broadcastable to ``codes`` (once split, where there are ``blocks``).
        tensor_scale: broadcastable to ``scale``, or None.
        element: one of :data:`jaxcomp.arrays.elements.ELEMENTS`.
        blocks: ``(size, negative axis)`` of each axis that is cut into blocks.
        dtype: dtype of the result; products are taken in float32, rounded once, and limited to the
            largest finite number.

    Returns:
        Dense weights of the shape of ``codes``.

    Example:
        >>> grid_values(jnp.array([7, 15], jnp.uint8), jnp.array([0.5]), None,
        ...             element="float4_e2m1fn", blocks=(), dtype=jnp.float32)
        Array([ 3., -3.], dtype=float32)
    """
    wide = wide_scale(scale)
    if tensor_scale is not None:
        wide = wide * tensor_scale
    levels = element_levels(split_blocks(codes, blocks), ELEMENTS[element])
    return narrow(merge_blocks(levels * wide, blocks), dtype, clipped=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class GridArray(CompressedArray):
    """Codes of a small float or a table, with a scale per tensor, channel, group or block.

    Made by :func:`jaxcomp.quantize.encode`.

    Attributes:
        codes: ``uint8`` of shape ``(*shape[:-1], ceil(shape[-1] * bits / 8))``, packed.
        scale: floating, one axis per axis of the leaf (size 1 where shared), and one more for each
            axis that is cut into blocks.
        tensor_scale: float32, with as many axes as ``scale``; None without.
        element: what the codes are: a name in :data:`jaxcomp.arrays.elements.ELEMENTS`.
        length: size of the dense last axis.
        blocks: ``(size, negative axis)`` of each axis that is cut into blocks, in their order.
        dense_dtype: dtype of the dense array.
    """

    codes: Any
    scale: Any
    tensor_scale: Any
    element: str = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    blocks: Blocks = dataclasses.field(metadata={"static": True})
    dense_dtype: Any = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        # One spelling of each dtype, or equal forms would be compiled twice.
        object.__setattr__(self, "dense_dtype", jnp.dtype(self.dense_dtype))

    @property
    def bits(self) -> int:
        """Bits per code."""
        return ELEMENTS[self.element].bits

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return (*self.codes.shape[:-1], self.length)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dense array."""
        return self.dense_dtype

    def decode(self) -> jax.Array:
        """The dense array, ``level * (scale * tensor_scale)``."""
        return _decode(self)

    def form(self) -> str:
        """Such as ``float4_e2m1fn, groups of 32, float8_e8m0fnu scales``."""
        scales = math.prod(self.scale.shape)
        shared = (
            describe_blocks(self.blocks)
            if self.blocks
            else f"{scales} {'scale' if scales == 1 else 'scales'}"
        )
        dtype = jnp.dtype(self.scale.dtype).name
        return f"{self.element}, {shared}" + (f" in {dtype}" if dtype != "float32" else "")

    def to_parts(self) -> Parts:
        """Take the leaf apart; the codes go to the entropy coder."""
        static = {
            "element": self.element,
            "blocks": [list(block) for block in self.blocks],
            "dtype": self.dense_dtype.name,
        }
        codes = unpack_bits_host(np.asarray(self.codes), self.bits, self.length)
        arrays = {"scale": np.asarray(self.scale)}
        if self.tensor_scale is not None:
            arrays["tensor_scale"] = np.asarray(self.tensor_scale)
        return Parts(static, {"codes": Symbols(codes, 1 << self.bits)}, arrays)

    @classmethod
    def from_parts(cls, parts: Parts) -> "GridArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        names = {"element", "blocks", "dtype"}
        check_names(
            parts, static=names, symbols={"codes"}, arrays={"scale"}, optional={"tensor_scale"}
        )
        element = parts.static["element"]
        if not isinstance(element, str) or element not in ELEMENTS:
            raise ValueError(f"element must be one of {', '.join(ELEMENTS)}, not {element!r:.60}")
        bits = ELEMENTS[element].bits
        codes, scale = read_symbols(parts, "codes", 1 << bits), read_floats(parts, "scale")
        blocks = read_blocks(parts.static["blocks"], codes.shape)
        check_fit(scale.shape, codes.shape, blocks)
        tensor_scale = None
        if "tensor_scale" in parts.arrays:
            tensor_scale = read_floats(parts, "tensor_scale")
            fits = tensor_scale.ndim == scale.ndim and all(
                a in (1, b) for a, b in zip(tensor_scale.shape, scale.shape, strict=True)
            )
            if tensor_scale.dtype != np.float32 or not fits:
                raise ValueError(
                    f"tensor_scale must be float32 and broadcast to scale, {scale.shape}, not "
                    f"{tensor_scale.dtype} of shape {tensor_scale.shape}"
                )
        return cls(
            codes=to_device(pack_bits_host(codes, bits)),
            scale=to_device(scale),
            tensor_scale=None if tensor_scale is None else to_device(tensor_scale),
            element=element,
            length=codes.shape[-1],
            blocks=blocks,
            dense_dtype=read_dtype(parts.static["dtype"]),
        )


@jax.jit
def _decode(leaf: GridArray) -> jax.Array:
    def dense(leaf: GridArray) -> jax.Array:
        return grid_values(
            unpack_bits(leaf.codes, leaf.bits, leaf.length),
            leaf.scale,
            leaf.tensor_scale,
            element=leaf.element,
            blocks=leaf.blocks,
            dtype=leaf.dense_dtype,
        )

    return automatic(dense, out=spec_like(leaf.codes, leaf.shape))(leaf)
