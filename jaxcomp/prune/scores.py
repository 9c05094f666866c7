"""How much a weight matters: pure functions of a weight and its gradient; the lowest go first.

A score takes one leaf and the gradient with respect to it (same shape; None where no gradient is at
hand) and gives one number a weight. To try another, write one::

    def taylor(weight, gradient):
        return jnp.abs(weight * gradient)

    method = prune.gradual(taylor, prune.cubic(0.9, begin=0, end=1000))
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

Score = Callable[[Any, Any], Array]


def magnitude(
    weight: Float[Array, " *dims"], gradient: Float[Array, " *dims"] | None = None
) -> Float[Array, " *dims"]:
    """The weight's absolute value (Han et al., 2015, section 3).

    Args:
        weight: one leaf.
        gradient: not used.

    Returns:
        Scores of the leaf's shape and dtype.

    Example:
        >>> magnitude(jnp.array([-2.0, 1.0]))
        Array([2., 1.], dtype=float32)
    """
    del gradient
    return jnp.abs(weight)
