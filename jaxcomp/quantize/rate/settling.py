"""Second-order rounding while training: a weight goes to the next code later than half way.

Between the codes 0 and 1, ``curvature / 2 * error**2 + price * bits`` is the same not at half a
step but ``price * (bits of 1 - bits of 0) / (curvature * step**2)`` steps behind it. Weights are
moved towards zero by that much and then rounded to nearest.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxcomp.kernels.arithmetic import TINY
from jaxcomp.quantize.formats import Format
from jaxcomp.quantize.rate.coded import Coded, step_of
from jaxcomp.quantize.rate.density import magnitude_bits, nonzero_bits
from jaxcomp.quantize.scales import Scales, spread_scales
from jaxcomp.quantize.training.learned_scale import used_step
from jaxcomp.sharding import automatic, spec_like


def nothing_known(leaf: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """What :func:`remember` begins with.

    Example:
        >>> nothing_known(jnp.ones(2))
        Array([0., 0.], dtype=float32)
    """
    return jnp.zeros_like(leaf, dtype=jnp.float32)


def remember(
    kept: Float[Array, "*dims"],
    gradient: Float[Array, "*dims"],
    now: Int32[Array, ""],
    settle: int,
    margins: Callable[[Array], Array],
) -> Float[Array, "*dims"]:
    """The mean square of the gradient before codes settle, and then once the margins.

    Args:
        kept: what was remembered until now, float32.
        gradient: of the step.
        now: steps so far, this one included.
        settle: the step from which on codes are settled.
        margins: from the mean square to what is remembered from ``settle`` on.

    Returns:
        What is remembered from now on. The mean is of all gradients until there are a thousand,
        then it forgets.

    Example:
        >>> remember(jnp.ones(1), 2 * jnp.ones(1), jnp.int32(2), 9, jnp.sqrt)
        Array([2.5], dtype=float32)
    """
    wide = gradient.astype(jnp.float32)
    share = jnp.maximum(1 / now.astype(jnp.float32), 1e-3)
    squares = kept + share * (wide * wide - kept)
    return jax.lax.cond(
        now == settle,
        lambda kept, squares: margins(squares),
        lambda kept, squares: jnp.where(now < settle, squares, kept),
        kept,
        squares,
    )


def margins_of(
    squares: Float[Array, "*dims"],
    learned: Coded,
    format: Format,
    price: Any,
    examples: int,
) -> Float[Array, "*dims"]:
    """How far behind half a step a weight is worth the next code.

    Args:
        squares: mean square of the gradient of the loss, a mean over ``examples``.
        learned: about the leaf.
        format: what to quantize to.
        price: of a bit.
        examples: in the loss.

    Returns:
        In units of the weights; 0 where 1 costs no more bits than 0. Huge where the loss does not
        bend at all: nothing there is worth a bit.

    Example:
        >>> from jaxcomp.quantize import PerTensor
        >>> from jaxcomp.quantize.rate.coded import begin_coded
        >>> leaf, format = jnp.array([0.6, -0.1]), Format(4, granularity=PerTensor())
        >>> learned = begin_coded(leaf, format, 0.5)
        >>> margins_of(jnp.array([1.0, 4.0]), learned, format, 0.5, 1)  # 0.5 * 2 / (1 * 0.5)
        Array([2. , 0.5], dtype=float32)
    """

    def find(squares: Array, learned: Coded, price: Array) -> Array:
        step = used_step(step_of(learned.log_step), format, jnp.float32)
        spread = spread_scales(Scales(step), squares.shape, format).scale
        zero, nonzero = nonzero_bits(learned.density, squares.ndim)
        more = jnp.maximum(nonzero + magnitude_bits(learned.density)[0] - zero, 0)
        worth, slope = price * more, examples * squares * spread
        return jnp.where(worth > 0, worth / jnp.maximum(slope, TINY), 0.0)

    out = spec_like(squares, squares.shape)
    return automatic(find, out=out)(squares, learned, jnp.asarray(price, jnp.float32))


def shrink(
    leaf: Float[Array, "*dims"], margin: Float[Array, "*dims"], settled: Bool[Array, ""]
) -> Float[Array, "*dims"]:
    """Towards zero by a margin, straight through: gradients pass as if nothing had been done.

    Args:
        leaf: weights.
        margin: not negative.
        settled: whether to do it.

    Returns:
        Of the leaf's dtype.

    Example:
        >>> shrink(jnp.array([0.75, -0.1]), jnp.array([0.25, 0.25]), jnp.array(True))
        Array([0.5, 0. ], dtype=float32)
    """
    stopped = jax.lax.stop_gradient(leaf)
    limit = jnp.minimum(margin, float(jnp.finfo(leaf.dtype).max)).astype(leaf.dtype)
    moved = stopped - jnp.clip(stopped, -limit, limit)
    return _with_derivative_of(leaf, jnp.where(settled, moved, stopped))


@jax.custom_jvp
def _with_derivative_of(x: Array, values: Array) -> Array:
    del x
    return values


@_with_derivative_of.defjvp
def _with_derivative_of_jvp(primals: Any, tangents: Any) -> Any:
    return _with_derivative_of(*primals), tangents[0]
