"""Matrix products of 8-bit integers, summed in 32 bits and scaled afterwards.

XLA's own int8 dot is the kernel on every platform; what differs is the form in which it is fast.
On a TPU and a GPU that is the plain one. XLA's CPU library leaves a single row to a slow path, and
with few rows it is faster with the weight as the left operand: rows are padded and results turned.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Int32, UInt8

# Up to this many rows XLA's CPU library is faster with the weight on the left.
_FEW_ROWS = 64
# Groups are multiplied together as long as their sums, int32, stay within 32 MiB.
_GROUP_SUMS = 1 << 23


class Int8Weight(NamedTuple):
    """A weight of integers, ready to be multiplied: ``(codes - zero_point) * scale``.

    Attributes:
        codes: ``(*batch, out, in)``; with groups along the input ``(*batch, groups, out, size)``.
        scale: float32, ``(*batch, out)`` or ``(*batch, groups, out)``.
        zero_point: int32 of the same shape; None for a symmetric weight.
        sums: int32 of the same shape: the sum of ``codes - zero_point`` over the inputs.
    """

    codes: Any
    scale: Any
    zero_point: Any
    sums: Any


def int8_weight(
    codes: Int8[Array, "*dims size"],
    scale: Float[Array, "..."],
    zero_point: Int32[Array, "..."] | None = None,
) -> Int8Weight:
    """A weight with the sums that an activation's zero point needs.

    Args:
        codes: ``(*batch, out, in)``, or ``(*batch, groups, out, size)``.
        scale: steps, broadcastable to ``codes.shape[:-1]``.
        zero_point: likewise; None for a symmetric weight.

    Returns:
        The weight, everything spread to ``codes.shape[:-1]``.

    Example:
        >>> int8_weight(jnp.array([[1, 2], [3, 4]], jnp.int8), jnp.array(0.5)).sums
        Array([3, 7], dtype=int32)
    """
    rows = codes.shape[:-1]
    sums = jnp.sum(codes, axis=-1, dtype=jnp.int32)
    if zero_point is not None:
        zero_point = jnp.broadcast_to(zero_point, rows)
        sums = sums - codes.shape[-1] * zero_point
    return Int8Weight(codes, jnp.broadcast_to(scale.astype(jnp.float32), rows), zero_point, sums)


def signed(codes: UInt8[Array, " *dims"]) -> Int8[Array, " *dims"]:
    """Codes from 0 to 255 as integers from -128 to 127: less 128.

    Example:
        >>> signed(jnp.array([0, 128, 255], jnp.uint8))
        Array([-128,    0,  127], dtype=int8)
    """
    return lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8)


def int8_matmul(
    x: Int8[Array, "..."], codes: Int8[Array, "..."], *, implementation: str | None = None
) -> Int32[Array, "..."]:
    """``x @ codes.T`` of 8-bit integers, exact in 32 bits.

    Args:
        x: ``(*batch, *rows, in)``.
        codes: ``(*batch, out, in)``. Of fewer than 2^17 inputs no sum can overflow.
        implementation: ``"plain"``, ``"cpu"`` (rows padded, the weight on the left where that is
            faster), or None for what the platform is best at.

    Returns:
        ``(*batch, *rows, out)``.

    Raises:
        ValueError: shapes that do not fit, or another implementation.

    Example:
        >>> int8_matmul(jnp.array([[1, 2]], jnp.int8), jnp.array([[3, 4], [5, 6]], jnp.int8))
        Array([[11, 17]], dtype=int32)
    """
    _check(x, codes)
    return _by_platform(lambda form, *args: form(*args, _as_they_are), implementation)(x, codes)


def int8_matmul_reference(x: Int8[Array, "..."], codes: Int8[Array, "..."]) -> Int32[Array, "..."]:
    """The same as :func:`int8_matmul`, written plainly: every product in 32 bits.

    Example:
        >>> int8_matmul_reference(jnp.ones((1, 2), jnp.int8), jnp.ones((3, 2), jnp.int8))
        Array([[2, 2, 2]], dtype=int32)
    """
    batch = codes.ndim - 2
    between = tuple(range(batch, x.ndim - 1))
    wide = jnp.expand_dims(codes.astype(jnp.int32), between)
    return jnp.sum(x.astype(jnp.int32)[..., None, :] * wide, axis=-1)


def int8_linear(
    x: Int8[Array, "..."],
    x_scale: Float[Array, "..."],
    weight: Int8Weight,
    x_zero_point: Int32[Array, "..."] | None = None,
    *,
    grouped: bool = False,
    implementation: str | None = None,
) -> Float32[Array, "..."]:
    """The product of what integers stand for, computed on the integers.

    ``sum (x - x_zero) (w - w_zero) = sum x w - w_zero sum x - x_zero sum (w - w_zero)`` is exact
    as an integer; it is rounded to float32 and multiplied with both scales. Groups have a sum and
    scales each, and are added up in float32.

    Args:
        x: activations, ``(*batch, *rows, in)``.
        x_scale: their step: a scalar, or one for each row with 1 where it is shared,
            ``(*batch, *rows)``.
        weight: from :func:`int8_weight`.
        x_zero_point: the code of zero, shaped like ``x_scale``; None for symmetric activations.
        grouped: whether the weight has groups along its input; static.
        implementation: as for :func:`int8_matmul`.

    Returns:
        ``(*batch, *rows, out)``.

    Raises:
        ValueError: shapes that do not fit, or another implementation.

    Example:
        >>> weight = int8_weight(jnp.array([[3, 4], [5, 6]], jnp.int8), jnp.array([1.0, 0.5]))
        >>> int8_linear(jnp.array([[1, 2]], jnp.int8), jnp.array(0.5), weight)
        Array([[5.5 , 4.25]], dtype=float32)

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, equation 7.
    """
    if not grouped:
        _check(x, weight.codes)
        return _by_platform(_scaled, implementation)(x, x_scale, x_zero_point, weight)
    axis = weight.codes.ndim - 3
    groups = weight.codes.shape[axis]
    if x.shape[-1] != groups * weight.codes.shape[-1]:
        raise ValueError(f"{groups} groups of {weight.codes.shape[-1]} do not make {x.shape[-1]}")
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, axis)
    _check(x, weight.codes)
    x_scale = x_scale if x_scale.ndim == 0 else jnp.expand_dims(x_scale, axis)
    if x_zero_point is not None and x_zero_point.ndim:
        x_zero_point = jnp.expand_dims(x_zero_point, axis)
    total = lambda *args: jnp.sum(_scaled(*args), axis=axis)
    product = _by_platform(total, implementation)
    steps = _steps(groups, math.prod(x.shape[:-1]) * weight.codes.shape[-2])

    def part(i: Any) -> jax.Array:
        cut = lambda a: lax.dynamic_slice_in_dim(a, i * (groups // steps), groups // steps, axis)
        return product(cut(x), x_scale, x_zero_point, jax.tree.map(cut, weight))

    return lax.fori_loop(1, steps, lambda i, total: total + part(i), part(0))


def _steps(groups: int, sums: int) -> int:
    """Over how many turns to spread groups, so that one turn's sums stay few."""
    divisors = (n for n in range(1, groups) if groups % n == 0)
    return next((n for n in divisors if groups // n * sums <= _GROUP_SUMS), groups)


def _as_they_are(sums: jax.Array, per_output: Any, per_row: Any) -> jax.Array:
    del per_output, per_row
    return sums


# From sums, and how to spread over them a number for each output and one for each row.
_Spread = Callable[[Any], Any]
_Finish = Callable[[jax.Array, _Spread, _Spread], jax.Array]
_Form = Callable[[jax.Array, jax.Array, _Finish], jax.Array]


def _plain(x: jax.Array, codes: jax.Array, finish: _Finish) -> jax.Array:
    batch = codes.ndim - 2
    between = tuple(range(batch, x.ndim - 1))
    sums = _dot(x, codes, batch)
    return finish(sums, lambda output: jnp.expand_dims(output, between), lambda row: row[..., None])


def _cpu(x: jax.Array, codes: jax.Array, finish: _Finish) -> jax.Array:
    """Few rows stand behind the outputs, and are turned once they are scaled."""
    batch = codes.ndim - 2
    rows = x.shape[batch:-1]
    if math.prod(rows) > _FEW_ROWS:
        return _plain(x, codes, finish)
    if math.prod(rows) == 1:
        x = x.reshape(*x.shape[:batch], 1, x.shape[-1])
        sums = _dot(codes, jnp.concatenate([x, jnp.zeros_like(x)], axis=-2), batch)
        sums = sums[..., 0].reshape(*sums.shape[:-1], *rows)
    else:
        sums = _dot(codes, x, batch)
    behind = tuple(range(batch + 1, batch + 1 + len(rows)))
    values = finish(
        # A transpose would be folded into the dot, and its operands change places again.
        lax.optimization_barrier(sums),
        lambda output: jnp.expand_dims(output, behind),
        lambda row: jnp.expand_dims(row, batch),
    )
    return jnp.moveaxis(values, batch, -1)


def _dot(left: jax.Array, right: jax.Array, batch: int) -> jax.Array:
    axes = tuple(range(batch))
    return lax.dot_general(
        left,
        right,
        (((left.ndim - 1,), (right.ndim - 1,)), (axes, axes)),
        preferred_element_type=jnp.int32,
    )


def _scaled(
    form: _Form, x: jax.Array, x_scale: jax.Array, x_zero: jax.Array | None, weight: Int8Weight
) -> jax.Array:
    def finish(sums: jax.Array, per_output: _Spread, per_row: _Spread) -> jax.Array:
        spread = lambda a: a if a.ndim == 0 else per_row(a)
        if weight.zero_point is not None:
            inputs = jnp.sum(x, axis=-1, dtype=jnp.int32)
            sums = sums - per_output(weight.zero_point) * per_row(inputs)
        if x_zero is not None:
            sums = sums - per_output(weight.sums) * spread(x_zero)
        return sums.astype(jnp.float32) * (per_output(weight.scale) * spread(x_scale))

    return form(x, weight.codes, finish)


_FORMS = {"plain": _plain, "cpu": _cpu}


def _by_platform(
    run: Callable[..., jax.Array], implementation: str | None
) -> Callable[..., jax.Array]:
    """``run(form, *arrays)`` as a function of arrays, with the form that is asked for or best."""
    if implementation is not None:
        if implementation not in _FORMS:
            raise ValueError(
                f"implementation must be None or one of {list(_FORMS)}, not {implementation!r}"
            )
        return partial(run, _FORMS[implementation])
    cpu, plain = partial(run, _cpu), partial(run, _plain)
    return lambda *arrays: lax.platform_dependent(*arrays, cpu=cpu, default=plain)


def _check(x: jax.Array, codes: jax.Array) -> None:
    batch = codes.ndim - 2
    fits = x.ndim > batch and x.shape[:batch] == codes.shape[:-2] and x.shape[-1] == codes.shape[-1]
    if batch < 0 or not fits:
        raise ValueError(
            f"x of shape {x.shape} must be (*batch, *rows, in) for codes (*batch, out, in), which "
            f"are {codes.shape}"
        )
