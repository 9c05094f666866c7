"""A low-rank leaf and what it leaves over: the sum of both."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcomp.arrays.base import CompressedArray
from jaxcomp.arrays.blocks import narrow
from jaxcomp.arrays.low_rank import LowRankArray, factor_names
from jaxcomp.arrays.nested import PLAIN_KINDS, nest, unnest
from jaxcomp.arrays.parts import Parts, read_dtype
from jaxcomp.sharding import automatic, spec_like


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class LowRankSumArray(CompressedArray):
    """A low-rank leaf plus another leaf of the same shape: sparse, quantized, or any plain one.

    Made by :func:`jaxcomp.factorize.svd` with ``residual=``.

    Attributes:
        low_rank: a :class:`LowRankArray` without a mask.
        inner: the other leaf. Both are best of float32, as their sum is rounded to ``dense_dtype``
            in the end.
        dense_dtype: dtype of the dense array; what is beyond it becomes its largest.
    """

    low_rank: Any
    inner: Any
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
        """The dense array, ``low_rank.decode() + inner.decode()``."""
        return _decode(self)

    def form(self) -> str:
        """Such as ``rank 8 + int4 symmetric, groups of 32``."""
        return f"{self.low_rank.form()} + {self.inner.form()}"

    def to_parts(self) -> Parts:
        """Take the leaf apart, with the one within."""
        own = self.low_rank.to_parts()
        if own.symbols:
            raise ValueError("the low-rank part of a sum has no mask: decode it first")
        static = {**own.static, "low_rank_dtype": own.static["dtype"]}
        static["dtype"] = self.dense_dtype.name
        return nest(own._replace(static=static), self.inner, PLAIN_KINDS)

    @classmethod
    def from_parts(cls, parts: Parts) -> "LowRankSumArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        equation = parts.static.get("equation") if isinstance(parts.static, dict) else None
        names = set(factor_names(equation))
        static = {"dtype", "equation", "low_rank_dtype"}
        own, inner = unnest(parts, PLAIN_KINDS, static=static, arrays=names)
        mine = {"dtype": own.static["low_rank_dtype"], "equation": equation}
        low_rank = LowRankArray.from_parts(Parts(mine, {}, own.arrays))
        if low_rank.shape != inner.shape:
            raise ValueError(f"factors of {low_rank.shape} do not fit weights of {inner.shape}")
        return cls(low_rank, inner, read_dtype(own.static["dtype"]))


@jax.jit
def _decode(leaf: LowRankSumArray) -> jax.Array:
    def dense(inner: Array, product: Array) -> Array:
        wide = jnp.promote_types(jnp.promote_types(inner.dtype, product.dtype), jnp.float32)
        # A limit that no weight reaches: without something between, a compiler may round the
        # product that made a weight and the sum as one, in some programs and not in others.
        most = jnp.finfo(wide).max
        values = jnp.clip(inner.astype(wide), -most, most) + product.astype(wide)
        return narrow(values, leaf.dense_dtype, clipped=True)

    inner = leaf.inner.decode()
    product = leaf.low_rank.decode()
    return automatic(dense, out=spec_like(inner, inner.shape))(inner, product)
