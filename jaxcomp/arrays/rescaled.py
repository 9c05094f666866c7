"""Leaves whose channels were scaled before they were compressed: the inverse beside the codes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxcomp.arrays.base import CompressedArray
from jaxcomp.arrays.blocks import narrow, wide_scale
from jaxcomp.arrays.nested import PLAIN_KINDS, nest, unnest
from jaxcomp.arrays.parts import Parts, read_dtype, read_floats, to_device
from jaxcomp.sharding import automatic, spec_like


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class RescaledArray(CompressedArray):
    """A compressed leaf times a multiplier for each of some channels.

    The channels that matter most to the outputs were made larger before they were rounded (Lin et
    al., 2023, AWQ, section 3.2); the multiplier makes them what they were, in the leaf itself and
    not in the layer before it. Made by :func:`jaxcomp.quantize.awq`.

    Attributes:
        inner: the compressed leaf, of the same shape.
        multiplier: floating, an axis for each of the leaf's. Each entry of an axis is that of a run
            of neighbours, all of the same length: with size 1 the whole axis shares it.
        dense_dtype: dtype of the dense array; the product is taken in float32 and rounded once,
            so that ``inner`` is best of float32; what is then beyond the dtype becomes its largest.
    """

    inner: Any
    multiplier: Any
    dense_dtype: Any = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        # One spelling of each dtype, or equal forms would be compiled twice.
        object.__setattr__(self, "dense_dtype", jnp.dtype(self.dense_dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return self.inner.shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dense array."""
        return self.dense_dtype

    def decode(self) -> jax.Array:
        """The dense array, ``inner.decode() * multiplier``."""
        return _decode(self)

    def form(self) -> str:
        """Such as ``int4 symmetric, groups of 32, rescaled by 64``."""
        return f"{self.inner.form()}, rescaled by {math.prod(self.multiplier.shape)}"

    def to_parts(self) -> Parts:
        """Take the leaf apart, with the one within."""
        own = {"dtype": self.dense_dtype.name}, {}, {"multiplier": np.asarray(self.multiplier)}
        return nest(Parts(*own), self.inner, PLAIN_KINDS)

    @classmethod
    def from_parts(cls, parts: Parts) -> "RescaledArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        own, inner = unnest(parts, PLAIN_KINDS, static={"dtype"}, arrays={"multiplier"})
        multiplier, shape = read_floats(own, "multiplier"), inner.shape
        fits = len(multiplier.shape) == len(shape) and all(
            m == n or (m and n and n % m == 0) for m, n in zip(multiplier.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(f"a multiplier of {multiplier.shape} does not fit weights of {shape}")
        return cls(inner, to_device(multiplier), read_dtype(own.static["dtype"]))


def spread_runs(x: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    """Each entry repeated over its run, up to axes that broadcast.

    Args:
        x: an array of as many axes as ``shape``, each of a size that divides the other.
        shape: of what it is multiplied with.

    Returns:
        The same numbers, axes of size 1 as they were and all others as in ``shape``.

    Example:
        >>> spread_runs(jnp.array([[1, 2]]), (3, 4))
        Array([[1, 1, 2, 2]], dtype=int32)
    """
    for axis, size in enumerate(shape):
        if 1 < x.shape[axis] < size:
            x = jnp.repeat(x, size // x.shape[axis], axis)
    return x


@jax.jit
def _decode(leaf: RescaledArray) -> jax.Array:
    def dense(inner: jax.Array, multiplier: jax.Array) -> jax.Array:
        values = wide_scale(inner) * wide_scale(spread_runs(multiplier, inner.shape))
        return narrow(values, leaf.dense_dtype, clipped=True)

    inner = leaf.inner.decode()
    return automatic(dense, out=spec_like(inner, inner.shape))(inner, leaf.multiplier)
