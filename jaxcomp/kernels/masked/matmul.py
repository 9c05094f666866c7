"""The product of activations with a matrix of which a mask keeps a part."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.checks import check_arrays, check_flag
from jaxcomp.kernels.forms import Kernel, choose
from jaxcomp.kernels.masked import tpu, triton
from jaxcomp.kernels.packed_mask import PackedMask, pack_mask
from jaxcomp.kernels.placed import Axes, explicit, flat_rows, placed, unflat_rows

# Each form is measured by itself.
_NAMES = {"forward": "", "to_input": ", to input", "to_weight": ", to weight"}
# What a device's part of the outputs must be a multiple of.
_COLUMNS = {"triton": 64, "mosaic_tpu": 128}
# The axes of each form's arrays and of its result; bits have an eighth of the inputs.
_AXES = {
    "forward": Axes((("r", "i"), ("i", "o"), ("i", "o")), ("r", "o")),
    "to_input": Axes((("r", "o"), ("i", "o"), ("i", "o")), ("r", "i")),
    "to_weight": Axes((("r", "i"), ("r", "o"), ("i", "o")), ("i", "o")),
}
# Of the gradient without a mask.
_DENSE = Axes((("r", "i"), ("r", "o")), ("i", "o"))


def masked_matmul(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    mask: Any,
    *,
    dense_gradient: bool = False,
    implementation: Any = None,
) -> Float[Array, "..."]:
    """``x @ (w * mask)``, with both gradients, and ``w * mask`` nowhere in memory.

    What the mask removes does not count at all: infinities and NaN there change nothing.

    Args:
        x: activations, ``(*rows, inputs)``.
        w: latent weights, dense, ``(inputs, outputs)``.
        mask: of the shape of ``w``: from :func:`pack_mask`; or booleans, which are packed in each
            call.
        dense_gradient: give ``w`` its gradient as if nothing were removed, as methods that let
            weights grow back need it; static.
        implementation: ``"xla"``, ``"triton"``, ``"mosaic_tpu"``, or None for the best on the
            platform; static.

    Returns:
        ``(*rows, outputs)``, summed in float32 (float64 for float64), in the dtype that ``x`` and
        ``w`` promote to.

    Raises:
        TypeError: the mask is neither packed nor boolean.
        ValueError: shapes that do not fit, or an implementation that does not take them.

    Example:
        >>> mask = jnp.array([[True, False], [True, True]])
        >>> masked_matmul(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0], [5.0, 6.0]]), mask)
        Array([[13., 12.]], dtype=float32)

    The dense gradient is that of Evci et al., "Rigging the Lottery: Making All Tickets Winners",
    2020, section 3.
    """
    check_arrays(x=x, w=w)
    check_flag("dense_gradient", dense_gradient)
    packed = mask if isinstance(mask, PackedMask) else pack_mask(mask)
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0] or packed.shape != w.shape:
        raise ValueError(
            f"x {x.shape}, w {w.shape} and mask {packed.shape} must be (*rows, inputs), "
            "(inputs, outputs) and (inputs, outputs)"
        )
    static = (packed.rows, packed.block, dense_gradient, implementation)
    y: Any = _product(static, flat_rows(x), w, packed.bits)
    return unflat_rows(y, x)


def masked_matmul_reference(x: Any, w: Any, mask: Any) -> jax.Array:
    """The same as :func:`masked_matmul`, written plainly.

    Example:
        >>> mask = jnp.array([[True], [False]])
        >>> masked_matmul_reference(jnp.ones((1, 2)), jnp.ones((2, 1)), mask)
        Array([[1.]], dtype=float32)
    """
    mask = mask.unpack() if isinstance(mask, PackedMask) else mask
    return x @ jnp.where(mask, w, jnp.zeros((), w.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: tuple[Any, ...], x: jax.Array, w: jax.Array, bits: jax.Array) -> Any:
    return _run("forward", static, x, w, bits)


def _product_forward(static: Any, x: Any, w: Any, bits: Any) -> Any:
    return _product(static, x, w, bits), (x, w, bits)


def _product_backward(static: Any, kept: Any, dy: jax.Array) -> Any:
    x, w, bits = kept
    dense_gradient = static[2]
    dx = _run("to_input", static, dy, w, bits, like=x).astype(x.dtype)
    if dense_gradient:
        dw = explicit(lambda x, dy: _dot(x.T, dy), _DENSE, like=w)(x, dy)
    else:
        dw = _run("to_weight", static, x, dy, bits, like=w)
    return dx, dw.astype(w.dtype), None


_product.defvjp(_product_forward, _product_backward)


def _run(kind: str, static: tuple[Any, ...], *arrays: jax.Array, like: Any = None) -> jax.Array:
    _, block, _, implementation = static

    def run(*arrays: jax.Array) -> jax.Array:
        forms = _kernels(kind, block)
        name = "masked_matmul" + _NAMES[kind]
        return choose(name, partial(_XLA[kind], block), forms, arrays, implementation)

    return explicit(run, _AXES[kind], like)(*arrays)


@functools.cache
def _kernels(kind: str, block: int) -> dict[str, Kernel]:
    forms = {"triton": triton, "mosaic_tpu": tpu}

    def on_a_mesh(name: str, kernel: Kernel) -> Kernel:
        axes = _AXES[kind]._replace(parts={"i": block, "o": _COLUMNS[name]})
        run = lambda *arrays, **how: placed(partial(kernel.run, **how), axes)(*arrays)
        return kernel._replace(run=run)

    return {name: on_a_mesh(name, getattr(form, kind)(block)) for name, form in forms.items()}


def _sums(*arrays: jax.Array) -> Any:
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    dtype = jnp.result_type(left, right)
    product = jnp.matmul(
        left.astype(dtype), right.astype(dtype), preferred_element_type=_sums(left, right)
    )
    return product.astype(dtype)


def _masked(block: int, w: jax.Array, bits: jax.Array) -> jax.Array:
    mask = PackedMask(bits, w.shape[0], block).unpack()
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


_XLA = {
    "forward": lambda block, x, w, bits: _dot(x, _masked(block, w, bits)),
    "to_input": lambda block, dy, w, bits: _dot(dy, _masked(block, w, bits).T),
    "to_weight": lambda block, x, dy, bits: _masked(block, _dot(x.T, dy), bits),
}
