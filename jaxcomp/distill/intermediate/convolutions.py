"""Convolutions that are learned next to a student and left out of what is shipped."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcomp.distill.inputs import as_floats


def init_convolution(
    key: Any, channels: int, out: int, size: int, positions: int, gain: float = 1.0
) -> dict[str, Array]:
    """Parameters of a convolution, normal with variance ``gain / inputs``; biases begin at 0.

    Args:
        key: PRNG key.
        channels: of the input.
        out: channels of the output.
        size: of the kernel along each position axis.
        positions: how many position axes.
        gain: 1 keeps the variance of what is not rectified.

    Returns:
        ``{"kernel": (*sizes, channels, out), "bias": (out,)}`` in float32.

    Example:
        >>> jax.tree.map(jnp.shape, init_convolution(jax.random.key(0), 8, 4, 3, positions=2))
        {'bias': (4,), 'kernel': (3, 3, 8, 4)}
    """
    shape = (*[size] * positions, channels, out)
    kernel = jax.random.normal(key, shape, jnp.float32) * math.sqrt(gain / math.prod(shape[:-1]))
    return {"kernel": kernel, "bias": jnp.zeros(out, jnp.float32)}


def convolve(convolution: dict[str, Any], name: str, x: Any) -> Array:
    """A convolution of stride 1; outside of the map is zero, so that its sizes stay.

    Args:
        convolution: of :func:`init_convolution`.
        name: of the argument that ``x`` is or comes from, for the error.
        x: float array (batch, positions..., channels).

    Returns:
        (batch, positions..., out); float32, or float64 if an array is.

    Raises:
        ValueError: the kernel has other channels, or other position axes.

    Example:
        >>> layer = init_convolution(jax.random.key(0), 8, 4, 3, positions=2)
        >>> convolve(layer, "student", jnp.ones((2, 4, 4, 8))).shape
        (2, 4, 4, 4)
    """
    x, kernel, bias = as_floats(x=x, kernel=convolution["kernel"], bias=convolution["bias"])
    if x.ndim != kernel.ndim or x.shape[-1] != kernel.shape[-2]:
        wanted = ", ".join(["batch", *["position"] * (kernel.ndim - 2), str(kernel.shape[-2])])
        raise ValueError(f"{name} {x.shape} must be ({wanted}), as the parameters were made for.")
    axes = tuple(range(1, x.ndim - 1))
    numbers = jax.lax.ConvDimensionNumbers(
        lhs_spec=(0, x.ndim - 1, *axes),
        rhs_spec=(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)),
        out_spec=(0, x.ndim - 1, *axes),
    )
    ones = (1,) * len(axes)
    return jax.lax.conv_general_dilated(x, kernel, ones, "SAME", dimension_numbers=numbers) + bias
