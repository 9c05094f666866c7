"""The operations of benchmarks/kernels.py: how each makes its weight, and the least it must do."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp import quantize
from jaxcomp.arrays import BlockSparseArray, CodebookArray
from jaxcomp.arrays.bits import packed_length
from jaxcomp.kernels import (
    Rounding,
    block_sparse_matmul,
    codebook_matmul,
    fake_quant_matmul,
    masked_matmul,
    pack_mask,
    quantized_matmul,
)
from jaxcomp.quantize import Format, PerChannel, PerGroup

Make = Callable[[Any, tuple[int, int], Any], Any]


class Case(NamedTuple):
    """One operation.

    Attributes:
        make: ``make(key, shape, dtype) -> weight``.
        run: ``run(x, weight, implementation)``.
        trained: whether forward and both gradients are run.
        density: the part of the products that must be computed.
        rate: of a chip at which it multiplies: "rate", "int8" or "float8".
    """

    make: Make
    run: Callable[..., Any]
    trained: bool = False
    density: float = 1.0
    rate: str = "rate"

    def flops(self, rows: int, shape: tuple[int, int]) -> float:
        """Multiplications and additions that cannot be left out."""
        return (3 if self.trained else 1) * 2 * rows * math.prod(shape) * self.density

    def moved(self, rows: int, shape: tuple[int, int], weight: Any, dtype: Any) -> float:
        """Bytes that must be read and written at least: the weight, activations, gradients."""
        size = jnp.dtype(dtype).itemsize
        activations = rows * sum(shape) * size
        stored = sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight)
        )
        if not self.trained:
            return stored + activations
        return 2 * stored + 3 * activations + math.prod(shape) * size


def _normal(key: Any, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) / shape[0] ** 0.5


def _masked(key: Any, shape: tuple[int, int], dtype: Any) -> Any:
    keep, values = jax.random.split(key)
    return _normal(values, shape, dtype), pack_mask(jax.random.bernoulli(keep, 0.2, shape))


def _encoded(format: Any) -> Make:
    return lambda key, shape, dtype: quantize.encode(_normal(key, shape, dtype), format)


def _shared(key: Any, shape: tuple[int, int], dtype: Any) -> Any:
    indices = jax.random.randint(key, shape, 0, 16).astype(jnp.uint8)
    return CodebookArray.from_indices(indices, jnp.linspace(-2, 2, 16), dtype)


def _blocks(density: float) -> Make:
    def make(key: Any, shape: tuple[int, int], dtype: Any) -> Any:
        grid = (shape[0] // 128, shape[1] // 128)
        kept = round(density * math.prod(grid))
        mask = jnp.zeros(math.prod(grid), jnp.uint8).at[:kept].set(1)
        mask = jax.random.permutation(key, mask).reshape(grid)
        values = _normal(key, (kept * 128, 128), dtype).reshape(kept, 128, 128)
        return BlockSparseArray(pack_columns(mask), values, (128, 128), grid[1])

    return make


def pack_columns(mask: jax.Array) -> jax.Array:
    """A mask of blocks as its leaf keeps it: bits along the last axis."""
    width = 8 * packed_length(mask.shape[1], 1)
    bits = jnp.pad(mask, ((0, 0), (0, width - mask.shape[1]))).reshape(mask.shape[0], -1, 8)
    return jnp.sum(bits << jnp.arange(8, dtype=jnp.uint8), axis=-1).astype(jnp.uint8)


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """The rival: the product as XLA, or its library, computes it."""
    return x @ w


def masked(x: jax.Array, weight: Any, implementation: Any) -> jax.Array:
    return masked_matmul(x, *weight, implementation=implementation)


def rounded(activations: str) -> Callable[..., jax.Array]:
    """Activations are rounded in the same program: the time of that counts."""
    return functools.partial(quantized_matmul, activations=activations)


def fake_quantized(x: jax.Array, weight: Any, implementation: Any) -> jax.Array:
    return fake_quant_matmul(x, weight, Rounding(8), implementation=implementation)


CASES = {
    "masked, 80%": Case(_masked, masked),
    "masked, 80%, forward and backward": Case(_masked, masked, trained=True),
    "int8, channels": Case(_encoded(Format(8, granularity=PerChannel(-1))), quantized_matmul),
    "int4, channels": Case(_encoded(Format(4, granularity=PerChannel(-1))), quantized_matmul),
    "int4, groups of 128": Case(_encoded(Format(4, granularity=PerGroup(128))), quantized_matmul),
    "codebook of 16": Case(_shared, codebook_matmul),
    "w8a8": Case(_encoded(Format(8)), rounded("int8"), rate="int8"),
    "fp8 × fp8": Case(_encoded(quantize.fp8()), rounded("float8_e4m3fn"), rate="float8"),
    "fake-quantized, 8 bits, forward and backward": Case(_normal, fake_quantized, trained=True),
    "blocks of 128, 80%": Case(_blocks(0.2), block_sparse_matmul, density=0.2),
    "blocks of 128, 90%": Case(_blocks(0.1), block_sparse_matmul, density=0.1),
}
