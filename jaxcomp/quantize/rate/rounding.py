"""Rounding one matrix for the file: each weight goes to the code of least error and bits together.

The error is that of the product's outputs, a quadratic form in the errors of the weights. A walk
over the features rounds one after the other, and those still to come make up for each error as far
as the inputs let them; sweeps over single weights then go on until they, too, have nothing better.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from jaxcomp.checks import check_amount, check_count
from jaxcomp.model.second_moments import check_matrix, dot, inverse_factor


class CodePrices(NamedTuple):
    """The bits of signed codes, which may depend on where they stand.

    Attributes:
        zero: of the code 0; broadcasts to the matrix.
        nonzero: of not being 0; likewise.
        magnitudes: of sign and magnitude, for magnitudes from 1 on.
    """

    zero: Float[Any, "..."]
    nonzero: Float[Any, "..."]
    magnitudes: Float[Any, " high"]

    def of(self, codes: Int[Any, "..."]) -> Float[Array, "..."]:
        """The bits of codes, each at its place.

        Example:
            >>> CodePrices(jnp.float32(0.5), jnp.float32(2), jnp.array([1.0, 2])).of(
            ...     jnp.array([0, 1, -2]))
            Array([0.5, 3. , 4. ], dtype=float32)
        """
        size = jnp.abs(codes)
        some = self.nonzero + self.magnitudes[jnp.maximum(size, 1) - 1]
        return jnp.where(size == 0, self.zero, some)


def rate_round(
    weight: Float[Any, "features outputs"],
    second_moment: Float[Any, "_ _"],
    scale: Float[Any, "..."],
    prices: CodePrices,
    penalty: Any,
    *,
    sweeps: int = 2,
    damping: Any = 0.01,
) -> Int32[Array, "features outputs"]:
    """Codes that make the error of the outputs plus ``penalty`` times their bits small.

    What is made small is ``trace(Eᵀ H E) + penalty * bits`` with ``E = weight - codes * scale``.
    Every code is tried for every weight, so that where H is diagonal the result is the best there
    is. The walk takes the features with the largest inputs first.

    Args:
        weight: the matrix, any floating dtype; computed in float32.
        second_moment: H, the mean of x xᵀ.
        scale: the step of each weight; broadcasts to the matrix.
        prices: bits of the codes.
        penalty: error per bit, at least 0. At 0 the codes are those of least error.
        sweeps: passes over all weights after the walk; each lowers the sum, or changes nothing.
        damping: what is added to H in the walk, in means of its diagonal.

    Returns:
        Signed codes.

    Raises:
        TypeError: something is no array or no number.
        ValueError: shapes that do not fit, NaN or infinite values, a penalty or damping below 0.

    Example:
        The first weight is not worth three bits, and the second, whose input is the same, takes
        its place:

        >>> prices = CodePrices(jnp.float32(0.2), jnp.float32(2.0), jnp.ones(7))
        >>> weight, moment = jnp.array([[0.6], [2.2]]), jnp.ones((2, 2))
        >>> rate_round(weight, moment, jnp.ones(1), prices, 0.1).tolist()
        [[0], [3]]

    Source: the walk as in Frantar et al., "GPTQ", 2022, Algorithm 1; error plus bits as in
    Wiedemann et al., "DeepCABAC", 2020, section III-C, there for each weight alone.
    """
    check_matrix(weight, second_moment, damping)
    check_amount("penalty", penalty)
    check_count("sweeps", sweeps, 0)
    for name, given in (("scale", scale), ("zero", prices.zero), ("nonzero", prices.nonzero)):
        shape = jnp.shape(given)
        if len(shape) > 2 or any(
            size not in (1, whole)
            for size, whole in zip(shape[::-1], weight.shape[::-1], strict=False)
        ):
            raise ValueError(f"{name} {shape} does not broadcast to weight {weight.shape}")
    return round_with_prices(weight, second_moment, scale, prices, penalty, damping, sweeps)


@partial(jax.jit, static_argnums=6)
def round_with_prices(
    weight: Float[Any, "features outputs"],
    second_moment: Float[Any, "features features"],
    scale: Float[Any, "..."],
    prices: CodePrices,
    penalty: Any,
    damping: Any,
    sweeps: int,
) -> Int32[Array, "features outputs"]:
    """:func:`rate_round` without its checks.

    Args:
        weight: the matrix.
        second_moment: H.
        scale: broadcasts to the matrix.
        prices: likewise.
        penalty: as there.
        damping: as there.
        sweeps: as there.

    Returns:
        Signed codes.
    """
    weight = weight.astype(jnp.float32)
    moment = second_moment.astype(jnp.float32)
    spread = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), weight.shape)
    scale, zero, nonzero = spread(scale), spread(prices.zero), spread(prices.nonzero)
    # Smallest first: of two that cost the same the one nearer to zero is taken.
    sizes = np.arange(1, prices.magnitudes.shape[0] + 1)
    sizes = jnp.asarray(np.concatenate([[0], np.stack([sizes, -sizes], 1).ravel()]), jnp.int32)

    def best(target: Array, curvature: Any, j: Any) -> Array:
        """For each weight of a row the code that costs least, whatever the others do."""
        here = CodePrices(zero[j], nonzero[j], prices.magnitudes)
        error = target - sizes[:, None] * scale[j]
        costs = curvature * error * error + penalty * here.of(sizes[:, None])
        return sizes[jnp.argmin(costs, axis=0)]

    codes = _walk(weight, moment, scale, best, damping)

    def change(j: Any, codes: Array) -> Array:
        error = weight - codes * scale
        diagonal = moment[j, j]
        # What the others leave to be made up for; an input that is always 0 asks for nothing.
        others = dot(moment[j][None], error)[0] - diagonal * error[j]
        target = weight[j] + others / jnp.where(diagonal > 0, diagonal, 1)
        return codes.at[j].set(best(target, diagonal, j))

    for _ in range(sweeps):
        codes = lax.fori_loop(0, len(weight), change, codes)
    return codes


def _walk(weight: Array, moment: Array, scale: Array, best: Any, damping: Any) -> Array:
    """Row after row, largest inputs first; the rows to come make up for each error."""
    diagonal = jnp.diagonal(moment)
    order = jnp.argsort(-diagonal, stable=True)
    factor = inverse_factor(moment[order][:, order], damping)
    mean = jnp.mean(diagonal)

    def step(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, codes = carry
        j = order[i]
        # What an error costs once all later rows have done what they can.
        own = factor[i, i]
        code = best(rows[i], mean / (own * own), j)
        error = (rows[i] - code * scale[j]) / own
        return rows - factor[i][:, None] * error, codes.at[j].set(code)

    start = (weight[order], jnp.zeros(weight.shape, jnp.int32))
    return lax.fori_loop(0, len(weight), step, start)[1]
