"""What every compressed leaf is: a pytree node that knows its dense shape and how to decode."""

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jaxcomp.arrays.parts import Parts


class CompressedArray(meta.AxisMetadata):
    """A leaf that stands for a dense array of ``shape`` and ``dtype`` but is stored smaller.

    Linen unboxes it (it is a Flax ``AxisMetadata`` whose ``unbox`` decodes), NNX and ``jax.numpy``
    convert it (``__getitem__``, ``__jax_array__``), and :func:`jaxcomp.decode` serves the rest, so
    that an unmodified model runs on it and XLA fuses the decoding into its use. A module that walks
    its own parameters as a tree (Linen's ``WeightNorm``) would meet the fields: it is of the rest.

    Subclasses are frozen dataclasses registered as pytrees. Every array field keeps leading axes
    in front, so that ``vmap`` and ``scan`` over stacked layers slice all of them alike; nothing
    static may depend on leading axes.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """Dtype of the dense array."""

    @abc.abstractmethod
    def decode(self) -> jax.Array:
        """The dense array."""

    @abc.abstractmethod
    def form(self) -> str:
        """A few words on the representation, such as ``int4 per-channel``."""

    @abc.abstractmethod
    def to_parts(self) -> Parts:
        """Take the leaf apart into names, numbers and host arrays."""

    @classmethod
    @abc.abstractmethod
    def from_parts(cls, parts: Parts) -> "CompressedArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""

    @property
    def ndim(self) -> int:
        """Number of axes of the dense array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the dense array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the fields occupy, packed as they are."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> jax.Array:
        return self.decode()[index]

    def __jax_array__(self) -> jax.Array:
        return self.decode()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a compressed leaf has no dense buffer: NumPy must be let copy")
        return np.asarray(self.decode(), dtype)

    def astype(self, dtype: Any) -> jax.Array:
        """The dense array in another dtype, as arrays have it."""
        return self.decode().astype(dtype)

    def __repr__(self) -> str:
        name = type(self).__name__
        try:
            dtype = jnp.dtype(self.dtype).name
            return f"{name}(shape={self.shape}, dtype={dtype}, {self.form()}, {self.nbytes} bytes)"
        except Exception:
            # A transformation has put something else than arrays into the fields: any error.
            return f"{name}({', '.join(map(_brief, jax.tree.leaves(self)))})"

    def unbox(self) -> jax.Array:
        """Flax's name for :meth:`decode`."""
        return self.decode()

    def replace_boxed(self, val: Any) -> Any:
        """A model that writes its parameter writes a dense one."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "CompressedArray":
        """The fields carry stacked axes themselves."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "CompressedArray":
        """The fields carry stacked axes themselves."""
        return self


def _brief(field: Any) -> str:
    if hasattr(field, "shape") and hasattr(field, "dtype"):
        return f"{field.dtype}{list(field.shape)}"
    return " ".join(repr(field).split())[:40]


def is_compressed(leaf: Any) -> bool:
    """Whether ``leaf`` is a compressed leaf (an ``is_leaf`` for ``jax.tree`` functions).

    Example:
        >>> is_compressed(jnp.zeros(3))
        False
    """
    return isinstance(leaf, CompressedArray)


def decode(tree: Any) -> Any:
    """Replace every compressed leaf of a tree by its dense array.

    Args:
        tree: any pytree.

    Returns:
        The same tree with ``CompressedArray`` leaves decoded and all other leaves as they were.

    Example:
        >>> decode({"bias": jnp.ones(2)})
        {'bias': Array([1., 1.], dtype=float32)}
    """
    return jax.tree.map(
        lambda leaf: leaf.decode() if is_compressed(leaf) else leaf, tree, is_leaf=is_compressed
    )


def nbytes(tree: Any) -> int:
    """Exact bytes of all array buffers of a tree, compressed leaves counted as they are stored.

    Args:
        tree: any pytree of arrays, compressed leaves or ``jax.ShapeDtypeStruct``.

    Returns:
        Bytes (not KB, not KiB).

    Example:
        >>> nbytes({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3, jnp.bfloat16)})
        30
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        total += math.prod(array.shape) * array.dtype.itemsize
    return total
