"""The product of activations with a matrix of shared values."""

import functools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.arrays.codebook import CodebookArray, index_bits
from jaxcomp.checks import check_arrays
from jaxcomp.kernels.codebook import tpu, triton, xla
from jaxcomp.kernels.forms import Kernel, choose
from jaxcomp.kernels.placed import Axes, explicit, flat_rows, placed, unflat_rows

# What a device's part of the inputs and of the bytes of the outputs must be a multiple of.
_PARTS = {"triton": (16, triton.WIDTH), "mosaic_tpu": (128, tpu.WIDTH)}


def codebook_matmul(
    x: Float[Array, "..."], weight: Any, *, implementation: Any = None
) -> Float[Array, "..."]:
    """``x @ weight.decode()``, with gradients for ``x`` and for the shared values.

    Of 2, 3, 4 and 9 to 16 values (1, 2 or 4 bits a weight), for all weights or for equal parts of
    the outputs, the weight is read as packed indices. Others are decoded first.

    Args:
        x: activations, ``(*rows, inputs)``.
        weight: a matrix ``(inputs, outputs)``.
        implementation: ``"xla"``, ``"triton"``, ``"mosaic_tpu"``, or None for the best on the
            platform; static. Of the product: gradients are XLA's, which builds the dense weight.

    Returns:
        ``(*rows, outputs)``, summed in float32 (float64 for float64), in the dtype that ``x`` and
        the weight promote to.

    Raises:
        TypeError: the weight is another leaf.
        ValueError: shapes that do not fit, or an implementation that does not take them.

    Example:
        >>> weight = CodebookArray.from_indices(jnp.array([[1, 0]], jnp.uint8),
        ...                                     jnp.array([0.5, 2.0]), jnp.float32)
        >>> codebook_matmul(jnp.array([[3.0]]), weight)
        Array([[6. , 1.5]], dtype=float32)

    Sums over the weights of a value: Han et al., "Deep Compression", 2016, section 3.3.
    """
    if not isinstance(weight, CodebookArray):
        raise TypeError(f"weight must be a CodebookArray, not {type(weight).__name__}")
    shape, codebook = weight.shape, weight.codebook
    if len(shape) != 2 or codebook.ndim != (1 if weight.axis is None else 2):
        raise ValueError(f"a leaf of shape {shape} is no matrix: take one layer of it")
    check_arrays(x=x)
    if x.ndim < 1 or x.shape[-1] != shape[0]:
        raise ValueError(f"x {x.shape} must be (*rows, inputs), weight {shape}")
    rows, bits = flat_rows(x), index_bits(weight.clusters)
    books = codebook.reshape(-1, weight.clusters)
    reason = _unpackable(weight, bits, books.shape[0])
    if reason:
        plain = lambda x, weight: _decoded(x, weight)
        if implementation not in (None, "xla"):
            kernels = {name: Kernel(plain, lambda *_: reason) for name in _PARTS}
            y = choose("codebook_matmul", plain, kernels, (rows, weight), implementation)
            return unflat_rows(y, x)
        return unflat_rows(_decoded(rows, weight), x)
    # Indices of padding have any value, but one.
    missing = (1 << bits) - weight.clusters
    books = jnp.pad(books.astype(weight.dtype), ((0, 0), (0, missing)), mode="edge")
    shifts = jnp.arange(8 // bits, dtype=jnp.int32) * bits
    y: Any = _product((bits, implementation), rows, weight.indices, books, shifts)
    y = y.reshape(rows.shape[0], y.shape[1] * y.shape[2])[:, : shape[1]]
    return unflat_rows(y, x)


def codebook_matmul_reference(x: Any, weight: CodebookArray) -> jax.Array:
    """The same as :func:`codebook_matmul`, written plainly.

    Example:
        >>> weight = CodebookArray.from_indices(jnp.array([[1, 0]], jnp.uint8),
        ...                                     jnp.array([0.5, 2.0]), jnp.float32)
        >>> codebook_matmul_reference(jnp.array([[3.0]]), weight)
        Array([[6. , 1.5]], dtype=float32)
    """
    return x @ weight.decode()


def _unpackable(weight: CodebookArray, bits: int, groups: int) -> str | None:
    """Why the indices cannot be read packed, or None."""
    if bits not in (1, 2, 4):
        return f"indices of {bits} bits are decoded by XLA"
    if groups > 1 and weight.axis != -1:
        return "values shared by groups of inputs are decoded by XLA"
    if groups > 1 and weight.length % (groups * (8 // bits)):
        return f"{weight.length} outputs in {groups} groups: bytes belong to two of them"
    return None


def _decoded(x: jax.Array, weight: CodebookArray) -> jax.Array:
    dense = weight.decode()
    sums = jnp.promote_types(jnp.float32, jnp.result_type(x, dense))
    dtype = jnp.result_type(x, dense)
    y = jnp.matmul(x.astype(dtype), dense.astype(dtype), preferred_element_type=sums)
    return y.astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: Any, x: Any, packed: Any, codebook: Any, shifts: Any) -> Any:
    bits, implementation = static
    groups, width = codebook.shape[0], packed.shape[1]

    def run(*arrays: jax.Array) -> jax.Array:
        forms = _kernels(bits, groups, width // groups)
        plain = partial(xla.forward, bits)
        return choose("codebook_matmul", plain, forms, arrays, implementation)

    return explicit(run, _axes(groups))(x, packed, codebook, shifts)


def _product_forward(static: Any, x: Any, packed: Any, codebook: Any, shifts: Any) -> Any:
    return _product(static, x, packed, codebook, shifts), (x, packed, codebook, shifts)


def _product_backward(static: Any, kept: Any, dy: jax.Array) -> Any:
    (bits, _), (x, packed, codebook, shifts) = static, kept
    forward = _axes(codebook.shape[0])
    rows, indices, book, parts = forward.arrays
    to_input = Axes((forward.result, indices, book, parts), rows)
    to_codebook = Axes((rows, forward.result, indices, book), book)
    dx = explicit(partial(xla.to_input, bits), to_input, x)(dy, packed, codebook, shifts)
    dbook = explicit(partial(xla.to_codebook, bits), to_codebook, codebook)(x, dy, packed, codebook)
    return dx.astype(x.dtype), None, dbook, None


_product.defvjp(_product_forward, _product_backward)


def _axes(groups: int) -> Axes:
    """Of activations, bytes, codebooks and shifts; groups lie along the outputs."""
    book = ("o" if groups > 1 else "g", "e")
    return Axes((("r", "i"), ("i", "o"), book, ("t",)), ("r", "o", "t"))


@functools.cache
def _kernels(bits: int, groups: int, each: int) -> dict[str, Kernel]:
    def on_a_mesh(name: str, kernel: Kernel) -> Kernel:
        inputs, width = _PARTS[name]
        parts = {"i": inputs, "o": math.lcm(width, each) if groups > 1 else width}
        axes = _axes(groups)._replace(parts=parts)
        run = lambda *arrays, **how: placed(partial(kernel.run, **how), axes)(*arrays)
        return kernel._replace(run=run)

    forms = {"triton": triton, "mosaic_tpu": tpu}
    return {name: on_a_mesh(name, form.forward(bits)) for name, form in forms.items()}
