"""One leaf in training for the file: its rounded weights, and what its bits cost in gradients."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxcomp.quantize.formats import Format
from jaxcomp.quantize.rate.density import CodeDensity, code_bits, initial_density, prior_bits
from jaxcomp.quantize.scales import Scales, find_scales, spread_scales
from jaxcomp.quantize.training.learned_scale import used_step
from jaxcomp.quantize.training.step_gradient import fake_quant_learned
from jaxcomp.sharding import automatic, spec_like

# Where all weights of a leaf are zero (biases that have not been trained) there is nothing to see.
_STEP_OF_ZEROS = 0.05


class Coded(NamedTuple):
    """What is learned about a leaf.

    Attributes:
        log_step: logarithms of the step sizes to base 2, straight lines between powers of two, so
            that every platform makes the same bits of them; see :func:`step_of`.
        density: of the codes.
    """

    log_step: Float[Array, "..."]
    density: CodeDensity


def step_of(log_step: Float[Array, "..."]) -> Float[Array, "..."]:
    """Step sizes: powers of two, and straight lines between them.

    Args:
        log_step: as learned.

    Returns:
        ``2**floor(x) * (1 + x - floor(x))``, exact but for one rounding.

    Example:
        >>> step_of(jnp.array([-1.0, 0.5, 1.0]))
        Array([0.5, 1.5, 2. ], dtype=float32)
        >>> jax.grad(step_of)(1.5)
        Array(2., dtype=float32, weak_type=True)
    """
    whole = jax.lax.stop_gradient(jnp.clip(jnp.floor(log_step), -126, 126))
    # A float's bits are its exponent and what is behind 1: no platform's exp has a say.
    power = jax.lax.bitcast_convert_type((whole.astype(jnp.int32) + 127) << 23, jnp.float32)
    return power * (1 + (log_step - whole))


def _log_step(step: Array) -> Array:
    """Undo :func:`step_of`."""
    fraction, exponent = jnp.frexp(step)
    return (exponent - 1).astype(jnp.float32) + (2 * fraction - 1)


def begin_coded(leaf: Float[Array, "..."], format: Format, step: float | None) -> Coded:
    """What is learned about a leaf, at the beginning.

    Args:
        leaf: weights.
        format: what to quantize to.
        step: all step sizes; None: half of the root mean square of the weights that share one.

    Returns:
        Steps, and a density that knows nothing yet.

    Example:
        >>> step_of(begin_coded(jnp.array([[1.0, -1.0]]), Format(4), None).log_step)
        Array([[0.5, 0.5]], dtype=float32)
    """

    def size(leaf: Array) -> Array:
        wide = jax.lax.stop_gradient(leaf).astype(jnp.float32)
        # A power of two, which changes no digit, keeps the squares within float32.
        _, exponent = jnp.frexp(jnp.max(jnp.abs(wide)))
        wide = jnp.ldexp(wide, -exponent)
        shape = jax.eval_shape(lambda x: find_scales(x, format).scale, wide).shape
        spread = lambda field: spread_scales(Scales(field), wide.shape, format).scale
        (total,) = jax.linear_transpose(spread, jnp.zeros(shape))(wide * wide)
        mean = jnp.ldexp(jnp.sqrt(total / (wide.size // math.prod(shape))), exponent)
        given = jnp.full(shape, _STEP_OF_ZEROS if step is None else step, jnp.float32)
        return _log_step(given if step is not None else jnp.where(mean > 0, mean / 2, given))

    return Coded(automatic(size)(leaf), initial_density(leaf.shape, format.code_range[1]))


def priced(
    leaf: Float[Array, "*dims"], learned: Coded, format: Format, price: Float[Array, ""]
) -> Float[Array, "*dims"]:
    """The rounded weights, whose backward pass adds what the bits cost.

    Args:
        leaf: weights.
        learned: about them.
        format: what to quantize to.
        price: of a bit.

    Returns:
        Values as the leaf that is packed decodes to.

    Example:
        >>> from jaxcomp.quantize import PerTensor
        >>> leaf, format = jnp.array([0.6, -0.1]), Format(4, granularity=PerTensor())
        >>> learned = begin_coded(leaf, format, 0.5)
        >>> values = lambda leaf: priced(leaf, learned, format, jnp.float32(0.01))
        >>> values(leaf), jax.grad(lambda leaf: values(leaf).sum())(leaf)
        (Array([0.5, 0. ], dtype=float32), Array([1.02, 0.96], dtype=float32))
    """
    stopped = jax.lax.stop_gradient((leaf, learned))
    out = (spec_like(leaf, leaf.shape), PartitionSpec(), PartitionSpec())
    costs = automatic(functools.partial(_costs, format), out=out)(*stopped, price)
    leaf, step = _charge(leaf, step_of(learned.log_step), learned.density, costs)
    return fake_quant_learned(leaf, step, format)


def _costs(format: Format, leaf: Array, learned: Coded, price: Array) -> tuple[Any, Any, Any]:
    """The gradients of what the bits cost: to weights, steps and density."""
    step = used_step(step_of(learned.log_step), format, jnp.float32)
    wide = leaf.astype(jnp.float32)
    total = lambda leaf, step, density: _sum_bits(leaf, step, density, format)
    weights, steps, density = jax.grad(total, argnums=(0, 1, 2))(wide, step, learned.density)
    prior = jax.grad(prior_bits)(learned.density)
    # As fake_quant_learned scales the gradient of the loss, so that both stay of one kind.
    factor = 1 / math.sqrt(leaf.size // step.size * format.code_range[1])
    mean = jax.tree.map(lambda a, b: (a + b) / leaf.size, density, prior)
    return (price * weights).astype(leaf.dtype), price * factor * steps, mean


@jax.custom_vjp
def _charge(leaf: Array, step: Array, density: CodeDensity, costs: Any) -> tuple[Array, Array]:
    """Leaf and step, whose backward pass adds gradients of costs that the loss never sees."""
    del density, costs
    return leaf, step


def _charge_back(costs: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    leaf, step = cotangents
    return leaf + costs[0], step + costs[1], costs[2], None


_charge.defvjp(
    lambda leaf, step, density, costs: (_charge(leaf, step, density, costs), costs), _charge_back
)


def _sum_bits(leaf: Array, step: Array, density: CodeDensity, format: Format) -> Array:
    spread = spread_scales(Scales(step), leaf.shape, format).scale
    return jnp.sum(code_bits(leaf.astype(jnp.float32) / spread, density))


# Outside `jit` one program, instead of one for every operation on every shape.
@functools.partial(jax.jit, static_argnums=2)
def leaf_bits(leaf: Float[Array, "..."], learned: Coded, format: Format) -> Float[Array, ""]:
    """The bits of all codes of a leaf; differentiable.

    Args:
        leaf: weights.
        learned: about them.
        format: what to quantize to.

    Example:
        >>> from jaxcomp.quantize import PerTensor
        >>> leaf, format = jnp.array([0.6, -0.1]), Format(4, granularity=PerTensor())
        >>> leaf_bits(leaf, begin_coded(leaf, format, 0.5), format)
        Array(4., dtype=float32)
    """

    def bits(leaf: Array, learned: Coded) -> Array:
        step = used_step(step_of(learned.log_step), format, jnp.float32)
        return _sum_bits(leaf, step, learned.density, format)

    return automatic(bits)(leaf, learned)
