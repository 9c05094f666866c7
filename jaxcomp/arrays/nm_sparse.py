"""N:M sparse leaves: of each run of m neighbours n values are kept, and where they stood."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomp.arrays.base import CompressedArray
from jaxcomp.arrays.bits import pack_bits_host, unpack_bits, unpack_bits_host
from jaxcomp.arrays.codebook import index_bits
from jaxcomp.arrays.parts import (
    Parts,
    Symbols,
    check_names,
    read_floats,
    read_int,
    read_symbols,
    to_device,
    which_kept,
)
from jaxcomp.arrays.patterns import count_patterns, rank_patterns, unrank_patterns
from jaxcomp.sharding import automatic, spec_like

MAX_GROUP = 256
_MOST_PATTERNS = 1 << 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class NMSparseArray(CompressedArray):
    """The n kept values of every m neighbours, and their positions among the m.

    2:4 is what sparse tensor cores read (Mishra et al., 2021, Accelerating Sparse Deep Neural
    Networks). Decoding takes n comparisons a weight, cheap for the small n of hardware; it neither
    gathers nor scatters, so that on a mesh every device decodes what it holds.

    Attributes:
        values: kept values, the dense shape with ``axis`` shortened by n/m.
        positions: ``uint8``, for each value its position among the m neighbours, ascending and
            distinct in every group, packed at ``ceil(log2 m)`` bits along the last axis.
        n: values kept in a group.
        m: neighbours in a group.
        axis: negative, the axis along which neighbours are grouped.
    """

    values: Any
    positions: Any
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def encode(
        cls,
        x: Float[Array, " *dims"],
        n: int,
        m: int,
        axis: int = -2,
        mask: Bool[Array, " *dims"] | None = None,
    ) -> "NMSparseArray":
        """Store the weights that ``mask`` keeps, or, without one, those that are not zero.

        A group that keeps fewer than n is filled up with zeros. What is checked depends on the
        data, so this runs outside ``jit``; the result decodes anywhere.

        Args:
            x: dense weights; axes in front of ``axis`` may stack layers.
            n: weights kept in a group, at least 1.
            m: neighbours in a group, more than n and at most 256.
            axis: negative, counted from the end; -2 is the input axis of a Flax kernel.
            mask: True where a weight is kept; by default where it is not exactly zero. What is not
                kept must be zero, or it would be lost.

        Raises:
            ValueError: ``axis`` is not an axis counted from the end or not divisible by m, a group
                keeps more than n weights, or a weight outside the mask is not zero.

        Example:
            >>> NMSparseArray.encode(jnp.array([0.0, 2.0, 0.0, 3.0]), n=2, m=4, axis=-1)
            NMSparseArray(shape=(4,), dtype=float32, 2:4 sparse, 9 bytes)
        """
        _check_layout(x.shape, n, m, axis)
        dense = np.asarray(x)
        keep = which_kept(dense, mask)
        at = dense.ndim + axis
        grouped = _group(keep, m, axis)
        counts = grouped.sum(axis=at + 1)
        if np.any(counts > n):
            place = np.argwhere(counts > n)[0]
            raise ValueError(
                f"{counts[tuple(place)]} of the {m} neighbours at {_where(place, at, m)} are kept, "
                f"{n}:{m} sparsity keeps {n}: prune to an {n}:{m} mask along axis {axis} first"
            )
        positions = _positions(grouped, n, at + 1)
        kept = np.take_along_axis(grouped, positions, at + 1)
        values = np.take_along_axis(_group(dense, m, axis), positions, at + 1)
        # What fills a group up may be -0.0, and no dead sign should cost bytes.
        values = np.where(kept, values, np.zeros((), dense.dtype))
        return cls._of(values, positions, n, m, axis)

    @classmethod
    def _of(cls, values: Any, positions: Any, n: int, m: int, axis: int) -> "NMSparseArray":
        """Pack values and positions that are split into groups, ``(…, groups, n, …)``."""
        flat = _ungroup(positions, axis)
        packed = pack_bits_host(flat, index_bits(m))
        return cls(to_device(_ungroup(values, axis)), to_device(packed), n, m, axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        shape = list(self.values.shape)
        shape[self.axis] = shape[self.axis] // self.n * self.m
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dense array."""
        return self.values.dtype

    def keep(self) -> Bool[Array, "..."]:
        """True where a value is stored: in every group n times, where it was filled up too."""
        return _keep(self)

    def decode(self) -> jax.Array:
        """The dense array, zeros where nothing is kept."""
        return _decode(self)

    def form(self) -> str:
        """Such as ``2:4 sparse``."""
        return f"{self.n}:{self.m} sparse"

    def to_parts(self) -> Parts:
        """Take the leaf apart; which n of the m are kept goes to the entropy coder.

        That is one number a group, below the ``m! / (n! (m - n)!)`` patterns there are: 2.6 bits
        for 2:4, where two positions take 4. Where these are more than 65,536, the mask goes.
        """
        values = np.asarray(self.values)
        bits = index_bits(self.m)
        flat = unpack_bits_host(np.asarray(self.positions), bits, values.shape[-1])
        positions = _group(flat, self.n, self.axis).astype(np.int64)
        at = values.ndim + self.axis + 1
        if np.any(np.diff(positions, axis=at) <= 0) or positions.max(initial=0) >= self.m:
            raise ValueError(
                f"the positions of a {self.n}:{self.m} leaf must be distinct, ascending and below "
                f"{self.m} in every group: make the leaf with NMSparseArray.encode"
            )
        if (patterns := count_patterns(self.n, self.m)) <= _MOST_PATTERNS:
            narrow = np.uint8 if patterns <= 256 else np.uint16
            symbols = Symbols(rank_patterns(positions, self.m, at).astype(narrow), patterns)
        else:
            mask = np.zeros(_group_shape(self.shape, self.m, self.axis), np.uint8)
            np.put_along_axis(mask, positions, 1, at)
            symbols = Symbols(_ungroup(mask, self.axis), 2)
        static = {"n": self.n, "m": self.m, "axis": self.axis}
        return Parts(static, {"patterns": symbols}, {"values": values})

    @classmethod
    def from_parts(cls, parts: Parts) -> "NMSparseArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        check_names(parts, static={"n", "m", "axis"}, symbols={"patterns"}, arrays={"values"})
        n = read_int(parts.static["n"], "n", 1, MAX_GROUP - 1)
        m = read_int(parts.static["m"], "m", n + 1, MAX_GROUP)
        values = read_floats(parts, "values")
        axis = read_int(parts.static["axis"], "axis", -values.ndim, -1)
        at, patterns = values.ndim + axis, count_patterns(n, m)
        numbered = patterns <= _MOST_PATTERNS
        symbols = read_symbols(parts, "patterns", patterns if numbered else 2)
        groups, rest = divmod(values.shape[at], n)
        along = groups if numbered else groups * m
        if rest or symbols.shape != (*values.shape[:at], along, *values.shape[at + 1 :]):
            raise ValueError(
                f"values of shape {values.shape} do not fit {n}:{m} patterns of {symbols.shape} "
                f"on axis {axis}"
            )
        if numbered:
            positions = unrank_patterns(symbols, n, m, at + 1)
        else:
            mask = _group(symbols, m, axis)
            if np.any(mask.sum(axis=at + 1) != n):
                raise ValueError(f"the patterns keep other than {n} of {m} neighbours")
            positions = _positions(mask.astype(bool), n, at + 1)
        return cls._of(_group(values, n, axis), positions, n, m, axis)


@jax.jit
def _decode(leaf: NMSparseArray) -> jax.Array:
    return _spread(leaf, leaf.values)


@jax.jit
def _keep(leaf: NMSparseArray) -> jax.Array:
    return _spread(leaf, jnp.ones_like(leaf.values, bool))


def _spread(leaf: NMSparseArray, values: jax.Array) -> jax.Array:
    def dense(packed: jax.Array, values: jax.Array) -> jax.Array:
        positions = unpack_bits(packed, index_bits(leaf.m), values.shape[-1])
        positions, values = (_group(x, leaf.n, leaf.axis) for x in (positions, values))
        at = values.ndim - 1 + leaf.axis + 1
        places = jnp.arange(leaf.m, dtype=positions.dtype)
        places = places.reshape(leaf.m, *(1,) * (values.ndim - at - 1))
        out = jnp.zeros((), values.dtype)
        for j in range(leaf.n):
            one = lambda x, j=j: jax.lax.slice_in_dim(x, j, j + 1, axis=at)
            out = jnp.where(one(positions) == places, one(values), out)
        return _ungroup(out, leaf.axis)

    run = automatic(dense, out=spec_like(leaf.values, leaf.shape))
    return run(leaf.positions, values)


def _group_shape(shape: tuple[int, ...], size: int, axis: int) -> tuple[int, ...]:
    at = len(shape) + axis
    return (*shape[:at], shape[at] // size, size, *shape[at + 1 :])


def _group(x: Any, size: int, axis: int) -> Any:
    """Split ``axis`` (negative) into (groups, size), in NumPy or JAX."""
    return x.reshape(_group_shape(x.shape, size, axis))


def _ungroup(x: Any, axis: int) -> Any:
    """Undo :func:`_group`."""
    at = x.ndim - 1 + axis
    return x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])


def _positions(keep: np.ndarray, n: int, at: int) -> np.ndarray:
    """The first n kept positions along axis ``at``, the lowest others where fewer are kept."""
    first = np.argsort(~keep, axis=at, kind="stable")
    return np.sort(np.take(first, range(n), axis=at), axis=at)


def _check_layout(shape: tuple[int, ...], n: int, m: int, axis: int) -> None:
    if not 1 <= n < m <= MAX_GROUP:
        raise ValueError(f"n:m must have 1 <= n < m <= {MAX_GROUP}, not {n}:{m}")
    if not -len(shape) <= axis <= -1:
        raise ValueError(
            f"axis {axis} is no axis of shape {shape} counted from the end: pass one from "
            f"{-len(shape)} to -1, so that stacked leading axes do not move it"
        )
    if shape[axis] % m:
        raise ValueError(
            f"axis {axis} of shape {shape} has {shape[axis]} entries, no multiple of m = {m}: "
            "choose another m or axis, or store the leaf as a SparseArray"
        )


def _where(index: np.ndarray, at: int = -1, m: int = 0) -> str:
    """An index as Python writes it, with a group of m at axis ``at`` as a slice."""
    return "[{}]".format(
        ", ".join(f"{m * i}:{m * i + m}" if k == at else str(i) for k, i in enumerate(index))
    )
