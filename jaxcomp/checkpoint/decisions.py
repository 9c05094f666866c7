"""A binary decision whose probability is learned while it is coded, from several contexts at once.

Each context is a partition of the decisions (by row, by column, by what the neighbours are, ...)
that counts how often the answer was yes in each of its classes. A class with few decisions is
shrunk to the overall frequency by a beta distribution; how strongly, the spread between the classes
tells (method of moments: a context whose classes do not differ says nothing, and costs nothing).
What the contexts say is added up as log-odds, under weights found by Newton's method on the
likelihood of what has been coded (logistic mixing, as in context-mixing compressors: Mahoney, 2005,
"Adaptive weighing of context models for lossless data compression").

Coder and decoder both run this, so it is exact: what is summed over decisions or classes are
integers, and below ``2**53`` where the sum is taken in floats.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from jaxcomp.checkpoint.log_odds import LIMIT, PRECISION, SCALE, log_odds, probability

# Constants of the format, found on pruned and quantized networks.
_DISPERSION, _DISPERSION_COUNT = 0.05, 20.0
_LEAST_DISPERSION, _MOST_DISPERSION = 1e-6, 0.7
_WEIGHT, _STIFFNESS, _FIRST_STIFFNESS = 0.85, 8.0, 80.0
_FEWEST, _LEARN_FROM = 16, 1 << 14
_LN2 = 0.6931471805599453
_RESIDUAL = 16.0
_LARGEST_RESIDUAL = float(1 << 22)

Keys = Int64[np.ndarray, "contexts _"]


class Partitions(NamedTuple):
    """The contexts of a decision, their classes numbered one context after the other.

    Attributes:
        starts: the first class of each context.
        context: the context of each class.
        lags: if any, there is one more context: the first again, but each class counted together
            with those so many classes away, to both sides.
    """

    starts: Int64[np.ndarray, " contexts"]
    context: Int64[np.ndarray, " classes"]
    lags: tuple[int, ...]


class Decision(NamedTuple):
    """What has been learned of a decision.

    Attributes:
        partitions: its contexts.
        yes: how often the answer was yes in each class.
        asked: how often it was asked.
        ones: overall count of yes, with a pseudo-count.
        total: overall count, likewise.
        weights: of the overall log-odds, then of each context's deviation from it.
        curvature: second derivatives of the description length by the weights, row by row.
    """

    partitions: Partitions
    yes: Int64[np.ndarray, " classes"]
    asked: Int64[np.ndarray, " classes"]
    ones: float
    total: float
    weights: tuple[float, ...]
    curvature: tuple[tuple[float, ...], ...]


class Forecast(NamedTuple):
    """Probabilities of yes, out of ``2**24``, and the log-odds that were mixed into them."""

    yes: Int64[np.ndarray, " decisions"]
    features: Float64[np.ndarray, "inputs decisions"]


def begin(
    classes: Sequence[int], ones: float = 0.4, total: float = 0.8, lags: Sequence[int] = ()
) -> Decision:
    """Nothing learned yet.

    Args:
        classes: how many classes each context has.
        ones: pseudo-count of yes.
        total: pseudo-count of all answers.
        lags: see :class:`Partitions`; below the number of the first context's classes.

    Example:
        >>> begin([3, 2]).weights
        (1.0, 0.85, 0.85)
    """
    sizes = [*classes, *classes[: bool(lags)]]
    partitions = Partitions(
        np.cumsum([0, *sizes], dtype=np.int64)[:-1],
        np.repeat(np.arange(len(sizes), dtype=np.int64), sizes),
        tuple(lags),
    )
    inputs = len(sizes) + 1
    stiff = [_FIRST_STIFFNESS, *[_STIFFNESS] * len(sizes)]
    curvature = tuple(
        tuple(stiff[i] if i == j else 0.0 for j in range(inputs)) for i in range(inputs)
    )
    weights = (1.0, *[_WEIGHT] * len(classes), *[0.0] * bool(lags))
    zeros = np.zeros(sum(classes), np.int64)
    return Decision(partitions, zeros, zeros, ones, total, weights, curvature)


def join(
    keys: Sequence[Shaped[np.ndarray, " decisions"]], classes: Sequence[int], count: int
) -> Keys:
    """Classes within each context to numbers that tell the classes of all contexts apart.

    Example:
        >>> join([np.array([0, 2]), np.array([1, 1])], [3, 2], 2)
        array([[0, 2],
               [4, 4]])
    """
    starts = itertools.accumulate([0, *classes[:-1]])
    joined = np.empty((len(keys), count), np.int64)
    for row, key, start in zip(joined, keys, starts, strict=False):
        np.add(key, start, out=row)
    return joined


def forecast(decision: Decision, keys: Keys, count: int) -> Forecast:
    """Probabilities for a batch of decisions.

    Args:
        decision: what is known.
        keys: the class of each decision in each context, of :func:`join`.
        count: how many decisions.

    Example:
        >>> forecast(begin([2]), np.array([[0, 1]]), 2).yes / 2**24
        array([0.5, 0.5])
    """
    yes = decision.ones / decision.total
    overall = float(log_odds(np.array([yes / (1.0 - yes)]))[0])
    features = np.empty((len(decision.weights), count))
    features[0] = overall
    mixed = features[0] * decision.weights[0]
    if len(keys):
        deviations = _opinions(decision, yes) - overall
        deviations = np.maximum(np.minimum(deviations, LIMIT), -LIMIT)
        known = len(decision.asked)
        np.take(deviations, keys, out=features[1 : 1 + len(keys)], mode="clip")
        if decision.partitions.lags:
            np.take(deviations[known:], keys[0], out=features[-1], mode="clip")
        for weight, feature in zip(decision.weights[1:], features[1:], strict=True):
            mixed += feature * weight
    return Forecast(probability(mixed), features)


def learn(
    decision: Decision, keys: Keys, made: Forecast, answers: Shaped[np.ndarray, " decisions"]
) -> Decision:
    """What is known after a batch.

    Args:
        decision: what was known before.
        keys: as in :func:`forecast`.
        made: what it gave.
        answers: 1 for yes, 0 for no.

    Example:
        >>> keys = np.array([[0, 0, 1]])
        >>> known = learn(begin([2]), keys, forecast(begin([2]), keys, 3), np.array([1, 1, 0]))
        >>> known.yes, known.asked
        (array([2, 0]), array([2, 1]))
    """
    affirmed = np.flatnonzero(answers)
    weights, curvature = decision.weights, decision.curvature
    if len(answers) >= _FEWEST:
        weights, curvature = _newton(decision, made, answers)
    yes, asked, classes = decision.yes, decision.asked, len(decision.asked)
    if classes:
        asked = asked + np.bincount(keys.reshape(-1), minlength=classes)
        yes = yes + np.bincount(keys[:, affirmed].reshape(-1), minlength=classes)
    ones, total = decision.ones + len(affirmed), decision.total + len(answers)
    return Decision(decision.partitions, yes, asked, ones, total, weights, curvature)


def _opinions(decision: Decision, overall: float) -> Float64[np.ndarray, " classes"]:
    """Log-odds of each class: its counts and those of a beta distribution around ``overall``."""
    yes, asked, other = decision.yes, decision.asked, 1.0 - overall
    starts, context, lags = decision.partitions
    if lags:
        first = int(starts[1])
        yes = np.concatenate([yes, _gathered(yes[:first], lags)])
        asked = np.concatenate([asked, _gathered(asked[:first], lags)])
    residual = np.rint((yes - asked * overall) * _RESIDUAL)
    residual = np.maximum(np.minimum(residual, _LARGEST_RESIDUAL), -_LARGEST_RESIDUAL)
    whole = residual.astype(np.int64)
    squares = np.add.reduceat(whole * whole, starts) * (1.0 / (_RESIDUAL * _RESIDUAL))
    variance = overall * other
    pairs = np.add.reduceat(asked * (asked - 1), starts) * variance
    prior = variance * _DISPERSION_COUNT
    spread = squares - np.add.reduceat(asked, starts) * variance + prior * _DISPERSION
    dispersion = np.minimum(spread / (pairs + prior), _MOST_DISPERSION)
    strength = (1.0 / np.maximum(dispersion, _LEAST_DISPERSION) - 1.0)[context]
    return log_odds((yes + strength * overall) / (asked - yes + strength * other))


def _gathered(counts: Int64[np.ndarray, " n"], lags: Sequence[int]) -> Int64[np.ndarray, " n"]:
    total = counts.copy()
    for lag in lags:
        total[lag:] += counts[:-lag]
        total[:-lag] += counts[lag:]
    return total


def _newton(
    decision: Decision, made: Forecast, answers: np.ndarray
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """One step on the batch's likelihood, with the curvature of all batches so far."""
    inputs = np.rint(made.features[:, :_LEARN_FROM] * 0.25)
    yes = made.yes[:_LEARN_FROM]
    errors = answers[:_LEARN_FROM] * 4096.0 - (yes >> (PRECISION - 12))
    short = yes >> (PRECISION - 14)
    variances = (short * ((1 << 14) - short) >> 14).astype(np.float64)
    # Products of integers that stay below 2**53: exact in whatever order they are summed.
    slope = (inputs @ errors).tolist()
    bend = ((inputs * variances) @ inputs.T).tolist()
    unit = _LN2 * 4.0 / SCALE
    by_slope, by_bend = unit / 4096.0, unit * unit / 16384.0
    curvature = tuple(
        tuple(old + new * by_bend for old, new in zip(row, news, strict=True))
        for row, news in zip(decision.curvature, bend, strict=True)
    )
    step = _solve(curvature, [g * by_slope for g in slope])
    weights = tuple(w + s for w, s in zip(decision.weights, step, strict=True))
    return weights, curvature


def _solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Gaussian elimination of a positive definite matrix, in an order that no library decides."""
    rows = [[*row, r] for row, r in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = rows[i]
        for j in range(i + 1, size):
            factor = rows[j][i] / pivot[i]
            if factor:
                rows[j] = [a - factor * b for a, b in zip(rows[j], pivot, strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        rest = rows[i][size]
        for j in range(i + 1, size):
            rest -= rows[i][j] * found[j]
        found[i] = rest / rows[i][i]
    return found
