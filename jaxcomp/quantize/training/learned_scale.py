"""What all who learn a scale share: its sign does not count, and its derivative is given."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxcomp.arrays.blocks import wide_scale
from jaxcomp.kernels.arithmetic import TINY
from jaxcomp.quantize.formats import Format
from jaxcomp.quantize.scales import scales_of


def magnitude(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The absolute value, with a derivative at zero: an optimizer may overstep zero, and come back.

    Example:
        >>> jax.grad(magnitude)(0.0), jax.grad(magnitude)(-2.0)
        (Array(1., dtype=float32, weak_type=True), Array(-1., dtype=float32, weak_type=True))
    """
    return jnp.where(scale < 0, -scale, scale)


# Outside `jit` one program, instead of one for every operation on every shape.
@functools.partial(jax.jit, static_argnums=(1, 2))
def used_step(scale: Float[Array, "..."], format: Format, dtype: Any) -> Shaped[Array, "..."]:
    """The step sizes that quantize, of those that are learned: positive, no level overflows.

    Args:
        scale: as learned.
        format: what to quantize to.
        dtype: of what is quantized.

    Returns:
        Their magnitudes in the format's ``scale_dtype``.

    Example:
        >>> used_step(jnp.array([-0.5, 0.0]), Format(4), jnp.float32)
        Array([5.0000000e-01, 2.3509887e-38], dtype=float32)
    """
    largest = float(jnp.finfo(dtype).max) / 2**format.bits
    step = jnp.clip(magnitude(wide_scale(scale)), TINY, largest)
    if format.scale_dtype == "float32":
        return step.astype(jnp.float32)
    return scales_of(None, step * format.code_range[1], format, dtype).scale


def level_limits(
    format: Format, zero_point: Shaped[Array, "..."] | None = None
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The first and the last level of a uniform format, in multiples of the scale.

    Args:
        format: a uniform one.
        zero_point: codes of zero; None unless affine.

    Example:
        >>> level_limits(Format(bits=4))
        (Array(-7., dtype=float32), Array(7., dtype=float32))
    """
    low, high = format.code_range
    if not format.zero:
        low = -high
    zero = 0.0 if zero_point is None else zero_point.astype(jnp.float32)
    return jnp.asarray(low, jnp.float32) - zero, jnp.asarray(high, jnp.float32) - zero


@jax.custom_jvp
def with_slope(
    x: Float[Array, " *dims"],
    carrier: Float[Array, " *dims"],
    values: Float[Array, " *dims"],
    inside: Bool[Array, " *dims"],
    slope: Float[Array, " *dims"],
) -> Float[Array, " *dims"]:
    """``values``, with the derivative of ``x`` where inside, plus ``slope`` times the carrier's.

    Args:
        x: what is quantized.
        carrier: a scale for every element; only its derivative is used.
        values: what quantizing made of ``x``.
        inside: where the derivative of ``x`` passes.
        slope: the derivative of each of the values with respect to its scale, float32.

    Returns:
        ``values``.

    Example:
        >>> one = jnp.ones(1)
        >>> run = lambda x, s: with_slope(x, s, 3 * one, one == 1, 0.5 * one)[0]
        >>> jax.value_and_grad(run, argnums=(0, 1))(one, one)
        (Array(3., dtype=float32), (Array([1.], dtype=float32), Array([0.5], dtype=float32)))
    """
    del x, carrier, inside, slope
    return values


@with_slope.defjvp
def _with_slope_jvp(primals: Any, tangents: Any) -> Any:
    values, (_, _, _, inside, slope) = with_slope(*primals), primals
    through = jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0]))
    # The product in float32, so that the gradients of all who share a scale are summed in it.
    return values, through + (slope * tangents[1]).astype(through.dtype)
