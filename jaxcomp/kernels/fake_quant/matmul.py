"""The product of activations with a weight that is rounded on the way."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped, UInt8

from jaxcomp.checks import check_arrays
from jaxcomp.kernels.fake_quant import tpu, triton
from jaxcomp.kernels.fake_quant.operand import (
    Kept,
    Operand,
    coded,
    differentiated_once,
    nothing_of,
    operands,
    product_dtype,
    scaled,
    straight_through,
    switched,
    values,
)
from jaxcomp.kernels.fake_quant.rounding import (
    Rounding,
    find_codes,
    find_scale,
    values_of,
)
from jaxcomp.kernels.forms import Kernel, choose
from jaxcomp.kernels.placed import Axes, explicit, flat_rows, placed, unflat_rows

_NAMES = {"forward": "fake_quant_matmul", "to_input": "fake_quant_matmul, to input"}


def fake_quant_matmul(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    rounding: Any,
    *,
    scale: Shaped[Array, "..."] | None = None,
    zero_point: UInt8[Array, "..."] | None = None,
    inputs: Rounding | None = None,
    input_scale: Shaped[Array, "..."] | None = None,
    input_zero_point: UInt8[Array, "..."] | None = None,
    keep: str = "weight",
    dtype: Any = None,
    dense_gradient: bool = False,
    active: Bool[Array, ""] | None = None,
    implementation: Any = None,
) -> Float[Array, "..."]:
    """``x @ w`` with ``w``, and ``x`` if wanted, rounded to evenly spaced levels.

    Gradients are straight through: as if nothing were rounded, and 0 where a number was clipped,
    which none is where the range is found here. For them no rounded number is kept: of ``w``
    nothing but itself; of activations that are rounded a byte each, and a bit where they may have
    been clipped.

    Args:
        x: activations, ``(*rows, inputs)``.
        w: latent weights, ``(inputs, outputs)``.
        rounding: of ``w``; static.
        scale: steps of ``w``, broadcastable to it (once it is cut into blocks); None: found, so
            that nothing is clipped. No gradient goes to it.
        zero_point: codes of zero, with ``scale`` where the rounding is not symmetric.
        inputs: rounding of ``x``, in its own shape; ``axis=None`` is one scale for all,
            ``axis=tuple(range(x.ndim - 1))`` one for each row. None leaves ``x``; static.
        input_scale: as ``scale``.
        input_zero_point: as ``zero_point``.
        keep: ``"weight"``: ``w`` is kept and rounded once more for the gradients, which costs no
            memory where it is a parameter; ``"codes"``: a byte a weight, and a bit where ``scale``
            is given, instead of ``w``, for one that is made in passing (cast, normalized); static.
        dtype: that ``x`` and the rounded weight are cast to before they are multiplied, such as
            bfloat16; None: what they promote to; static.
        dense_gradient: give ``w`` its gradient where it is clipped, too; static.
        active: whether ``w`` is rounded, a boolean of the program such as ``step >= 1000``; not
            with ``keep="codes"``. None: always.
        implementation: ``"xla"``, ``"triton"``, ``"mosaic_tpu"``, or None for the best on the
            platform; static. The gradient of ``w`` is XLA's in all.

    Returns:
        ``(*rows, outputs)``, summed in float32 (float64 for float64), in ``dtype``. What is
        multiplied are the numbers of :func:`jaxcomp.quantize.fake_quant`.

    Raises:
        TypeError: ``dtype`` is not floating; ``active`` is no boolean.
        ValueError: shapes that do not fit, a rounding that does not exist, or an implementation
            that does not take them.

    Example:
        >>> w = jnp.array([[0.4, -3.0], [3.0, 1.9]])
        >>> fake_quant_matmul(jnp.array([[1.0, 2.0]]), w, Rounding(bits=3))
        Array([[6., 1.]], dtype=float32)
    """
    check_arrays(x=x, w=w)
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"x {x.shape} and w {w.shape} must be (*rows, inputs), (inputs, outputs)")
    of_inputs, of_weight = (inputs, input_scale, input_zero_point), (rounding, scale, zero_point)
    of_x, of_w = operands(x, w, of_inputs, of_weight, keep, dense_gradient, active)
    scales = (input_scale, input_zero_point, scale, zero_point)
    dtype = product_dtype(x, w, dtype)
    return _product_jit((of_x, of_w, dtype, implementation), x, w, active, *scales)


def fake_quant_matmul_reference(
    x: Any, w: Any, rounding: Rounding, scale: Any = None, zero_point: Any = None
) -> jax.Array:
    """The forward of :func:`fake_quant_matmul`, written plainly.

    Example:
        >>> w = jnp.array([[0.4, -3.0], [3.0, 1.9]])
        >>> fake_quant_matmul_reference(jnp.array([[1.0, 2.0]]), w, Rounding(bits=3))
        Array([[6., 1.]], dtype=float32)
    """
    if scale is None:
        scale, zero_point = find_scale(w, rounding)
    codes, _ = find_codes(w, scale, zero_point, rounding)
    return x @ values_of(codes, scale, zero_point, rounding, w.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: Any, x: jax.Array, w: jax.Array, *scales: Any) -> Any:
    return _product_forward(static, x, w, *scales)[0]


def _product_forward(static: Any, x: Any, w: Any, *scales: Any) -> Any:
    of_x, of_w, dtype, implementation = static
    left, right = scaled(of_x, x, *scales[:2]), scaled(of_w, w, *scales[2:])
    rows = flat_rows(values(of_x, left, x.dtype)).astype(dtype)
    y = _run("forward", of_w, implementation, rows, right)
    return unflat_rows(y, x), (coded(of_x, left), coded(of_w, right), nothing_of(x), nothing_of(w))


def _product_backward(static: Any, kept: Any, dy: jax.Array) -> Any:
    of_x, of_w, dtype, implementation = static
    # Or the compiler would find the values made before, and hold them until now.
    (left, right, of_type, w_type), dy = lax.optimization_barrier((kept, dy))
    if of_w.codes or of_x.codes:
        dy, of_type, w_type = differentiated_once((dy, of_type, w_type))
    rows = flat_rows(dy)
    x = values(of_x, left, of_type.dtype)
    inputs = flat_rows(x)
    dx = _run("to_input", of_w, implementation, rows, right, w_type.dtype, like=inputs)
    dw = _run_to_weight(inputs.astype(dtype), rows, right.array).astype(w_type.dtype)
    dx = unflat_rows(dx, x).astype(x.dtype)
    through = straight_through(of_x, left, dx), straight_through(of_w, right, dw)
    return *through, None, None, None, None


_product.defvjp(_product_forward, _product_backward)


# Outside `jit` one program, instead of one for every operation on every shape.
@partial(jax.jit, static_argnums=0)
def _product_jit(static: Any, x: Any, w: Any, active: Any, *scales: Any) -> Any:
    if active is not None:
        scales = (*scales[:2], *switched(static[1], active, w, *scales[2:]))
    return _product(static, x, w, *scales)


def _run_to_weight(x: jax.Array, dy: jax.Array, w: jax.Array) -> jax.Array:
    axes = Axes((("r", "i"), ("r", "o")), ("i", "o"))
    return explicit(lambda x, dy: _dot(x.T, dy), axes, like=w)(x, dy)


def _run(
    kind: str, how: Operand, implementation: Any, x: jax.Array, w: Kept, dtype: Any = None,
    like: Any = None,
) -> jax.Array:  # fmt: skip
    """``x @ w`` or ``x @ w.T`` with a weight, or codes of one, rounded on the way; as ``x`` is."""
    arrays = tuple(each for each in (x, *w[:3]) if each is not None)
    axes, rounding = _axes(kind, how, w), how.rounding or Rounding()

    def xla(x: jax.Array, *weight: jax.Array) -> jax.Array:
        matrix = values(how, Kept(*weight), dtype or weight[0].dtype).astype(x.dtype)
        return _dot(x, matrix if kind == "forward" else matrix.T)

    def run(*arrays: jax.Array) -> jax.Array:
        # What is kept as codes is XLA's to decode.
        if w.array.dtype == jnp.uint8:
            return xla(*arrays)
        return choose(_NAMES[kind], xla, _kernels(kind, rounding, axes[:2]), arrays, implementation)

    return explicit(run, axes, like)(*arrays)


def _axes(kind: str, how: Operand, w: Kept) -> Axes:
    """A scale's axes are those of the weight, in proportion, or of their own where shared."""
    names, sizes = [], iter(w.scale.shape)
    blocks = {axis for _, axis in how.rounding.blocks} if how.rounding else set()
    for axis, name, alone in ((-2, "i", "u"), (-1, "o", "v")):
        names.append(name if next(sizes) > 1 else alone)
        if axis in blocks:
            # The members of a block, which share it.
            next(sizes)
            names.append(alone * 2)
    scales = (tuple(names),) * (1 if w.zero_point is None else 2)
    x, result = (("r", "i"), ("r", "o")) if kind == "forward" else (("r", "o"), ("r", "i"))
    return Axes((x, ("i", "o"), *scales), result)


@functools.cache
def _kernels(kind: str, rounding: Rounding, names: Any) -> dict[str, Kernel]:
    group = rounding.blocks[0][0] if rounding.blocks else 1

    def on_a_mesh(kernel: Kernel, part: int) -> Kernel:
        here = Axes(*names, parts={"i": max(part, group), "o": part})
        run = lambda *arrays, **how: placed(partial(kernel.run, **how), here)(*arrays)
        return kernel._replace(run=run)

    forms = {"triton": (triton, 64), "mosaic_tpu": (tpu, 128)}
    return {
        name: on_a_mesh(getattr(form, kind)(rounding), part) for name, (form, part) in forms.items()
    }


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    dtype = jnp.result_type(left, right)
    sums = jnp.promote_types(jnp.float32, dtype)
    product = jnp.matmul(left.astype(dtype), right.astype(dtype), preferred_element_type=sums)
    return product.astype(dtype)
