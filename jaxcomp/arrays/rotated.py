"""Leaves that were rotated before they were compressed: outliers are spread over their neighbours.

Some axes were multiplied by an orthonormal Hadamard matrix, after a random flip of signs. In that
basis a matrix with a few large weights has none, so that its scales are smaller. Decoding turns it
back, and any model runs on the leaf unchanged. As ``(x R)·(Rᵀ w) == x·w`` for orthonormal ``R``, a
kernel may as well rotate the inputs and multiply them by ``inner``.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomp.arrays.base import CompressedArray
from jaxcomp.arrays.bits import pack_bits, packed_length, unpack_bits
from jaxcomp.arrays.blocks import narrow
from jaxcomp.arrays.nested import PLAIN_KINDS, nest, unnest
from jaxcomp.arrays.parts import Parts, read_array, read_dtype, read_int, to_device
from jaxcomp.kernels.hadamard import hadamard
from jaxcomp.sharding import automatic, spec_like

# Negative, so that stacked leading axes do not move them; ascending.
Axes = tuple[int, ...]


def rotate_values(
    x: Float[Any, "..."], axes: Sequence[int], flips: Bool[Any, "..."] | None = None
) -> Float[Array, "..."]:
    """Flip signs and multiply axes by orthonormal Hadamard matrices; :func:`turn_back` undoes it.

    Args:
        x: floats of any shape.
        axes: which axes; see :func:`jaxcomp.kernels.hadamard.hadamard`.
        flips: True where a sign is flipped; broadcasts to ``x``. None: nowhere.

    Returns:
        The same shape and dtype.

    Example:
        >>> rotate_values(jnp.array([1.0, 1.0]), (-1,), jnp.array([True, False]))
        Array([ 0.       , -1.4142135], dtype=float32)
    """
    x = jnp.asarray(x)
    return hadamard(x if flips is None else jnp.where(flips, -x, x), tuple(axes))


def turn_back(
    x: Float[Any, "..."], axes: Sequence[int], flips: Bool[Any, "..."] | None = None
) -> Float[Array, "..."]:
    """Undo :func:`rotate_values`.

    Args:
        x: what it returned.
        axes: as there.
        flips: as there.

    Returns:
        The same shape and dtype.

    Example:
        >>> flips = jnp.array([True, False])
        >>> turn_back(rotate_values(jnp.array([1.0, 1.0]), (-1,), flips), (-1,), flips).round(6)
        Array([1., 1.], dtype=float32)
    """
    turned = hadamard(jnp.asarray(x), tuple(axes))
    return turned if flips is None else jnp.where(flips, -turned, turned)


def pack_flips(flips: Bool[Any, "*leading features"]) -> Array:
    """The signs of :class:`RotatedArray` from booleans.

    Args:
        flips: True where a sign is flipped: an axis for each of the leaf's axes before the first
            rotated one (of size 1 where all share them), then the rotated axes joined.

    Returns:
        ``uint8``, a bit a feature.

    Example:
        >>> pack_flips(jnp.array([True, False, True]))
        Array([5], dtype=uint8)
    """
    return pack_bits(jnp.asarray(flips).astype(jnp.uint8), 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class RotatedArray(CompressedArray):
    """A compressed leaf in another basis: ``decode()`` is the rotation undone.

    Made by :func:`jaxcomp.quantize.rotate`.

    Attributes:
        inner: the compressed leaf, of the same shape; best of float32, as sums of it are rounded
            to ``dense_dtype`` in the end.
        signs: ``uint8``, which features have their sign flipped before they are mixed; see
            :func:`pack_flips`. None: none has.
        axes: the rotated axes, negative and ascending.
        dense_dtype: dtype of the dense array.

    Source: Chee et al., "QuIP: 2-Bit Quantization of Large Language Models With Guarantees", 2023;
    Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024.
    """

    inner: Any
    signs: Any
    axes: Axes = dataclasses.field(metadata={"static": True})
    dense_dtype: Any = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        # One spelling of each, or equal forms would be compiled twice.
        object.__setattr__(self, "axes", tuple(self.axes))
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
        """The dense array, ``inner.decode()`` turned back."""
        return _decode(self)

    def form(self) -> str:
        """Such as ``int4 symmetric, groups of 32, rotated``."""
        return f"{self.inner.form()}, rotated{'' if self.signs is None else ' with signs'}"

    def to_parts(self) -> Parts:
        """Take the leaf apart, with the one within."""
        arrays = {} if self.signs is None else {"signs": np.asarray(self.signs)}
        static = {"axes": list(self.axes), "dtype": self.dense_dtype.name}
        return nest(Parts(static, {}, arrays), self.inner, PLAIN_KINDS)

    @classmethod
    def from_parts(cls, parts: Parts) -> "RotatedArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        signed = isinstance(parts.arrays, dict) and "signs" in parts.arrays
        arrays = {"signs"} if signed else frozenset()
        own, inner = unnest(parts, PLAIN_KINDS, static={"axes", "dtype"}, arrays=arrays)
        shape, axes = inner.shape, own.static["axes"]
        if not isinstance(axes, list) or not 0 < len(axes) <= len(shape):
            raise ValueError(f"axes must be 1 to {len(shape)} of the leaf's axes, not {axes!r:.60}")
        axes = [read_int(axis, "an axis", -len(shape), -1) for axis in axes]
        if axes != sorted(set(axes)):
            raise ValueError(f"axes must ascend, not {axes}")
        signs = read_array(own.arrays["signs"], "signs") if signed else None
        if signs is not None:
            _check_signs(signs, shape, tuple(axes))
        return cls(
            inner,
            None if signs is None else to_device(signs),
            tuple(axes),
            read_dtype(own.static["dtype"]),
        )


def _check_signs(signs: np.ndarray, shape: tuple[int, ...], axes: Axes) -> None:
    leading = shape[: len(shape) + axes[0]]
    features = math.prod(shape[axis] for axis in axes)
    fits = (
        signs.dtype == np.uint8
        and signs.ndim == len(leading) + 1
        and signs.shape[-1] == packed_length(features, 1)
        and all(m in (1, n) for m, n in zip(signs.shape, leading, strict=False))
    )
    if not fits:
        raise ValueError(
            f"signs must be a bit for each of {features} features, uint8, behind axes that "
            f"broadcast to {leading}, not {signs.dtype} of shape {signs.shape}"
        )


def flips_of(signs: Any, shape: tuple[int, ...], axes: Axes) -> Bool[Array, "..."] | None:
    """Packed signs as booleans that broadcast to the leaf; None for None.

    Args:
        signs: of a :class:`RotatedArray`.
        shape: of the leaf.
        axes: of it, negative.

    Example:
        >>> flips_of(jnp.array([[5]], jnp.uint8), (2, 3), (-1,))
        Array([[ True, False,  True]], dtype=bool)
    """
    if signs is None:
        return None
    sizes = [shape[axis] if axis in axes else 1 for axis in range(axes[0], 0)]
    bits = unpack_bits(signs, 1, math.prod(sizes))
    return bits.reshape(*signs.shape[:-1], *sizes).astype(bool)


@jax.jit
def _decode(leaf: RotatedArray) -> jax.Array:
    def dense(inner: jax.Array, signs: Any) -> jax.Array:
        wide = inner.astype(jnp.promote_types(inner.dtype, jnp.float32))
        # A limit that no weight reaches: without something between, a compiler may round the
        # product that made a weight and the first sum as one, in some programs and not in others.
        most = jnp.finfo(wide.dtype).max
        turned = turn_back(
            jnp.clip(wide, -most, most), leaf.axes, flips_of(signs, inner.shape, leaf.axes)
        )
        return narrow(turned, leaf.dense_dtype, clipped=True)

    inner = leaf.inner.decode()
    return automatic(dense, out=spec_like(inner, inner.shape))(inner, leaf.signs)
