"""Statistics that stream: what is kept of many batches is as small as the answer.

A :class:`Statistic` is four pure functions on one matrix of samples. Its state is a pytree of a
fixed shape, and ``merge`` is associative, so batches may come in any split. Whoever calls it maps
it over groups, experts or layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Statistic(NamedTuple):
    """A statistic of samples, as four pure functions.

    Attributes:
        name: what to call it in messages.
        init: ``init(features) -> state``, the state of no samples: merging with it changes nothing.
        measure: ``measure(x) -> state`` of samples ``x``, float32 of shape ``(..., features)``;
            each index of the leading axes is one sample. Leave them apart (reduce over
            ``range(x.ndim - 1)``): a reshape that joins sharded axes would gather them.
        merge: ``merge(state, state) -> state`` of the samples of both.
        finish: ``finish(state) -> value``.
        patches: whether a convolution is seen as the matrix product that it is: a sample is then
            what one position of the kernel covers, with kernel × channels features. Otherwise a
            sample is a pixel, with its channels as features.
        measure_rows: ``measure_rows(ids, features) -> state`` of samples that are one-hot rows,
            given by the place of their one (a place outside ``features``: a row of zeros). What an
            embedding's input is. ``None`` where that is not worth knowing.

    Example:
        The share of inputs that are exactly zero, by channel:

        >>> def measure(x):
        ...     axes = tuple(range(x.ndim - 1))
        ...     return jnp.sum(x == 0, axes), jnp.full(x.shape[-1], x[..., 0].size)
        >>> zeros = Statistic(
        ...     name="zeros",
        ...     init=lambda features: (jnp.zeros(features, int), jnp.zeros(features, int)),
        ...     measure=measure,
        ...     merge=lambda a, b: (a[0] + b[0], a[1] + b[1]),
        ...     finish=lambda state: state[0] / state[1],
        ... )
        >>> zeros.finish(zeros.measure(jnp.array([[0.0, 1.0], [0.0, 0.0]])))
        Array([1. , 0.5], dtype=float32)
    """

    name: str
    init: Callable[[int], Any]
    measure: Callable[[jax.Array], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]
    patches: bool = False
    measure_rows: Callable[[jax.Array, int], Any] | None = None


class Range(NamedTuple):
    """Least and greatest value of each feature, each of shape ``(features,)``."""

    minimum: jax.Array
    maximum: jax.Array


class Histogram(NamedTuple):
    """How many values lie between two edges.

    Attributes:
        counts: ``(bins,)`` float32; exact up to 2²⁴.
        edges: ``(bins + 1,)`` float32, from 0 to infinity; a bin holds its lower edge.
    """

    counts: jax.Array
    edges: jax.Array


class Total(NamedTuple):
    """A sum of many float32 as two of them, what the first one rounds away being in the second."""

    high: jax.Array
    low: jax.Array


class Mean(NamedTuple):
    """A sum and how many samples it was taken over."""

    total: Total
    samples: Total


def absmax() -> Statistic:
    """The greatest magnitude of each input channel.

    Returns:
        A statistic with values of shape ``(features,)``.

    Example:
        >>> statistic = absmax()
        >>> statistic.finish(statistic.measure(jnp.array([[1.0, -3.0], [-2.0, 0.0]])))
        Array([2., 3.], dtype=float32)
    """
    return Statistic(
        name="absmax",
        init=lambda features: jnp.zeros(features, jnp.float32),
        measure=lambda x: jnp.max(jnp.abs(x), _samples(x), initial=0.0),
        merge=jnp.maximum,
        finish=lambda state: state,
    )


def minmax() -> Statistic:
    """The least and the greatest value of each input channel.

    Returns:
        A statistic with values :class:`Range`.

    Example:
        >>> statistic = minmax()
        >>> statistic.finish(statistic.measure(jnp.array([[1.0, -3.0], [-2.0, 0.0]])))
        Range(minimum=Array([-2., -3.], dtype=float32), maximum=Array([1., 0.], dtype=float32))
    """
    return Statistic(
        name="minmax",
        init=lambda features: Range(
            jnp.full(features, jnp.inf, jnp.float32), jnp.full(features, -jnp.inf, jnp.float32)
        ),
        measure=lambda x: Range(
            jnp.min(x, _samples(x), initial=jnp.inf), jnp.max(x, _samples(x), initial=-jnp.inf)
        ),
        merge=lambda a, b: Range(
            jnp.minimum(a.minimum, b.minimum), jnp.maximum(a.maximum, b.maximum)
        ),
        finish=lambda state: state,
    )


def mean_square() -> Statistic:
    """The mean of the squares of each input channel.

    For an embedding, whose input is a one-hot row, this is the frequency of each row. Squares below
    the smallest normal float32 count as zero.

    Returns:
        A statistic with values of shape ``(features,)``.

    Example:
        >>> statistic = mean_square()
        >>> statistic.finish(statistic.measure(jnp.array([[1.0, -3.0], [-2.0, 0.0]])))
        Array([2.5, 4.5], dtype=float32)
    """
    return Statistic(
        name="mean_square",
        init=lambda features: _mean_of(jnp.zeros(features, jnp.float32), 0),
        measure=lambda x: _mean_of(jnp.sum(jnp.square(x), _samples(x)), x[..., 0].size),
        merge=_merge_means,
        finish=_mean,
        measure_rows=lambda ids, features: _mean_of(_row_counts(ids, features), ids.size),
    )


def second_moment() -> Statistic:
    """The mean of x xᵀ over the samples x: the Hessian of a layer's squared error, up to a factor.

    A convolution's samples are its patches, so the features are kernel × input channels in the
    order in which the leaf's own axes follow each other. The diagonal is that of
    :func:`mean_square`; times the number of samples it is XᵀX. Products below the smallest normal
    float32 count as zero.

    Returns:
        A statistic with values of shape ``(features, features)``.

    Example:
        >>> statistic = second_moment()
        >>> statistic.finish(statistic.measure(jnp.array([[1.0, -3.0], [-2.0, 0.0]])))
        Array([[ 2.5, -1.5],
               [-1.5,  4.5]], dtype=float32)
    """
    return Statistic(
        name="second_moment",
        init=lambda features: _mean_of(jnp.zeros((features, features), jnp.float32), 0),
        measure=lambda x: _mean_of(
            jnp.einsum("...i,...j->ij", x, x, precision=lax.Precision.HIGHEST), x[..., 0].size
        ),
        merge=_merge_means,
        finish=_mean,
        patches=True,
    )


def histogram(low: int = -24, high: int = 8, steps: int = 8) -> Statistic:
    """How the magnitudes of all inputs of a weight are spread, over bins known beforehand.

    From 2^low to 2^high each octave is cut into equal ``steps``; the first bin takes all below
    (zeros too), the last all from 2^high on. So no range must be guessed, the relative width of
    a bin is at most 1 / steps, and two histograms can be added.

    Args:
        low: exponent of the first edge above zero, at least -126.
        high: exponent of the last finite edge, at most 127.
        steps: bins an octave, a power of two.

    Returns:
        A statistic with values :class:`Histogram` of ``(high - low) * steps + 2`` bins.

    Raises:
        ValueError: the exponents are not in order or outside of float32, or ``steps`` is not a
            power of two.

    Example:
        >>> statistic = histogram(-1, 1, steps=1)
        >>> counts, edges = statistic.finish(statistic.measure(jnp.array([[0.6, -0.7, 9.0]])))
        >>> counts.tolist(), edges.tolist()
        ([0.0, 2.0, 0.0, 1.0], [0.0, 0.5, 1.0, 2.0, inf])
    """
    if not -126 <= low < high <= 127:
        raise ValueError(f"low={low}, high={high}: -126 <= low < high <= 127 is needed")
    if steps not in tuple(2**k for k in range(11)):
        raise ValueError(f"steps={steps} must be a power of two, at most 1024")
    bins = (high - low) * steps
    exponents, within = np.divmod(np.arange(bins + 1), steps)
    finite = np.ldexp(1 + within / steps, low + exponents)
    edges = np.concatenate([[0], finite, [np.inf]]).astype(np.float32)
    # The magnitude of a float orders like its bits, and these end in the mantissa: cut there, they
    # count equal steps within octaves.
    shift = 23 - (steps.bit_length() - 1)
    first = int(edges[1:2].view(np.uint32)[0]) >> shift

    def measure(x: jax.Array) -> Total:
        bits = lax.bitcast_convert_type(jnp.abs(x).astype(jnp.float32), jnp.uint32)
        place = jnp.clip((bits >> shift).astype(jnp.int32) - (first - 1), 0, bins + 1)
        return _exact(jnp.zeros(bins + 2, jnp.int32).at[place].add(1))

    return Statistic(
        name="histogram",
        init=lambda features: _exact(jnp.zeros(bins + 2, jnp.int32)),
        measure=measure,
        merge=_add,
        finish=lambda state: Histogram(state.high + state.low, jnp.asarray(edges)),
    )


def _samples(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def _row_counts(ids: jax.Array, features: int) -> jax.Array:
    # Numpy's rule for negative places is not meant: a place below zero is no row at all.
    ids = jnp.where(ids < 0, features, ids)
    return jnp.zeros(features, jnp.int32).at[ids].add(1, mode="drop")


def _exact(counts: jax.Array) -> Total:
    """Integers below 2³¹ as a total, without rounding."""
    low = counts & 0xFFF
    return Total((counts - low).astype(jnp.float32), low.astype(jnp.float32))


def _mean_of(total: jax.Array, samples: int) -> Mean:
    if jnp.issubdtype(total.dtype, jnp.integer):
        return Mean(_exact(total), _number(samples))
    return Mean(Total(total, jnp.zeros_like(total)), _number(samples))


def _number(value: int) -> Total:
    high = np.float32(value)
    return Total(jnp.asarray(high), jnp.asarray(np.float32(value - int(high))))


def _merge_means(a: Mean, b: Mean) -> Mean:
    return Mean(_add(a.total, b.total), _add(a.samples, b.samples))


def _mean(state: Mean) -> jax.Array:
    samples = jnp.maximum(state.samples.high + state.samples.low, 1)
    return (state.total.high + state.total.low) / samples


def _add(a: Total, b: Total) -> Total:
    """The sum of two totals, with about twice the digits of float32.

    A plain float32 sum of positive numbers stops growing well before a million batches.

    Source: T. J. Dekker, "A floating-point technique for extending the available precision",
    Numerische Mathematik 18, 1971.
    """
    total = a.high + b.high
    part = total - a.high
    error = (a.high - (total - part)) + (b.high - part) + (a.low + b.low)
    high = total + error
    return Total(high, error - (high - total))
