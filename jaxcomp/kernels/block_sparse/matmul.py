"""The product of activations with a matrix that keeps some of its blocks."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxcomp.arrays.bits import unpack_bits_host
from jaxcomp.arrays.block_sparse import BlockSparseArray
from jaxcomp.checks import check_arrays
from jaxcomp.kernels.block_sparse import mosaic_gpu, tpu, triton, xla
from jaxcomp.kernels.forms import Kernel, choose
from jaxcomp.kernels.placed import Axes, explicit, flat_rows, placed, unflat_rows

# Lists of blocks are of the whole grid: only rows lie on several devices.
_WHOLE = dict.fromkeys("iokcnpq", 1 << 62)
_VALUES, _GRID = ("n", "k", "c"), ("p", "q")
# Each form is measured by itself.
_NAMES = {"forward": "", "to_input": ", to input", "to_values": ", to values"}
_AXES = {
    "forward": Axes((("r", "i"), _VALUES, _GRID), ("r", "q", "c"), _WHOLE),
    "to_input": Axes((("r", "o"), _VALUES, _GRID), ("r", "p", "k"), _WHOLE),
    "to_values": Axes((("r", "i"), ("r", "o"), _VALUES, _GRID), _VALUES, _WHOLE),
}


def block_sparse_matmul(
    x: Float[Array, "..."], weight: Any, *, implementation: Any = None
) -> Float[Array, "..."]:
    """``x @ weight.decode()``, over the kept blocks only, with gradients for them and for ``x``.

    What is not kept is not computed, forward or backward, and gets no gradient; only where XLA is
    left with blocks of fewer than 256 weights, or with any on a GPU or TPU, it decodes the matrix.
    Where ``weight.mask`` is no tracer (it is closed over by what is compiled, and only ``values``
    are an argument), a CPU's program is written for the pattern: faster from some 256 rows on.

    Args:
        x: activations, ``(*rows, inputs)``.
        weight: a matrix ``(inputs, outputs)``, in blocks of any size.
        implementation: ``"xla"``, ``"triton"``, ``"mosaic_gpu"`` (Hopper; bfloat16 or float16),
            ``"mosaic_tpu"``, or None for what :func:`tuned` says (which alone takes
            ``"mosaic_gpu"``), or the platform's first that fits; static.

    Returns:
        ``(*rows, outputs)``, summed in float32 (float64 for float64), in the dtype that ``x`` and
        the blocks promote to.

    Raises:
        TypeError: the weight is another leaf.
        ValueError: shapes that do not fit, or an implementation that does not take them.

    Example:
        >>> weight = BlockSparseArray.encode(jnp.eye(4), (2, 2))
        >>> block_sparse_matmul(jnp.arange(4.0), weight)
        Array([0., 1., 2., 3.], dtype=float32)
        >>> gradient = jax.grad(lambda weight: block_sparse_matmul(jnp.ones(4), weight).sum(),
        ...                     allow_int=True)(weight)
        >>> gradient.values.shape
        (2, 2, 2)

    Gray et al., "GPU Kernels for Block-Sparse Weights", 2017.
    """
    if not isinstance(weight, BlockSparseArray):
        raise TypeError(f"weight must be a BlockSparseArray, not {type(weight).__name__}")
    if len(weight.grid) != 2 or weight.values.ndim != len(weight.block_shape) + 1:
        raise ValueError(
            f"a block-sparse leaf of shape {weight.shape} is no matrix: take one layer of it"
        )
    check_arrays(x=x)
    if x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x {x.shape} must be (*rows, inputs), weight {weight.shape}")
    rows = flat_rows(x)
    block = (1,) * (2 - len(weight.block_shape)) + weight.block_shape
    values = weight.values.reshape(weight.values.shape[0], *block)
    pattern = _pattern(weight)
    if pattern is None:
        keep, known = weight.keep(), None
    else:
        keep, known = jnp.asarray(pattern), pattern.tobytes()
        values = values[: max(int(pattern.sum()), 1)]
    static = (weight.grid, known, implementation)
    # What Pallas interprets of Mosaic for GPUs cannot be part of another program.
    product = _product if implementation == "mosaic_gpu" else _product_jit
    y: Any = product(static, rows, values, keep)
    return unflat_rows(y.reshape(rows.shape[0], weight.shape[1]), x)


def block_sparse_matmul_reference(x: Any, weight: BlockSparseArray) -> jax.Array:
    """The same as :func:`block_sparse_matmul`, written plainly.

    Example:
        >>> block_sparse_matmul_reference(jnp.ones(2), BlockSparseArray.encode(jnp.eye(2), (1, 1)))
        Array([1., 1.], dtype=float32)
    """
    return x @ weight.decode()


def _pattern(weight: BlockSparseArray) -> np.ndarray | None:
    """Which blocks are kept, if that is known when a program is compiled."""
    mask = weight.mask
    if isinstance(mask, Tracer) or not getattr(mask, "is_fully_addressable", True):
        return None
    return unpack_bits_host(np.asarray(mask), 1, weight.length).astype(bool)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: Any, x: jax.Array, values: jax.Array, keep: jax.Array) -> Any:
    return _run("forward", static, x, values, keep)


def _product_forward(static: Any, x: Any, values: Any, keep: Any) -> Any:
    return _product(static, x, values, keep), (x, values, keep)


def _product_backward(static: Any, kept: Any, dy: jax.Array) -> Any:
    x, values, keep = kept
    dy = dy.reshape(x.shape[0], -1)
    dx = _run("to_input", static, dy, values, keep).reshape(x.shape)
    dvalues = _run("to_values", static, x, dy, values, keep)
    return dx.astype(x.dtype), dvalues.astype(values.dtype), None


_product.defvjp(_product_forward, _product_backward)
# Outside `jit` one program, instead of one for every operation in every call.
_product_jit = jax.jit(_product, static_argnums=0)


def _run(kind: str, static: Any, *arrays: jax.Array) -> jax.Array:
    grid, known, implementation = static
    pattern = None if known is None else np.frombuffer(known, bool).reshape(grid)

    def run(*arrays: jax.Array) -> jax.Array:
        plain = partial(getattr(xla, kind), pattern)
        name = "block_sparse_matmul" + _NAMES[kind]
        examples = partial(_examples, tuple((each.shape, each.dtype) for each in arrays), pattern)
        return choose(name, plain, _kernels(kind), arrays, implementation, examples)

    return explicit(run, _AXES[kind])(*arrays)


def _examples(shapes: Any, pattern: np.ndarray | None, rng: np.random.Generator) -> Any:
    """Random numbers, and as many kept blocks as there are values, here or there."""
    *floats, (grid, _) = shapes
    if pattern is None:
        kept = min(floats[-1][0][0], grid[0] * grid[1])
        pattern = rng.permutation(np.arange(grid[0] * grid[1]) < kept).reshape(grid)
    return *(jnp.asarray(rng.normal(size=s), dtype) for s, dtype in floats), jnp.asarray(pattern)


@functools.cache
def _kernels(kind: str) -> dict[str, Kernel]:
    def on_a_mesh(kernel: Kernel) -> Kernel:
        run = lambda *arrays, **how: placed(partial(kernel.run, **how), _AXES[kind])(*arrays)
        return kernel._replace(run=run)

    forms = {"triton": triton, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": tpu}
    return {name: on_a_mesh(getattr(form, kind)()) for name, form in forms.items()}
