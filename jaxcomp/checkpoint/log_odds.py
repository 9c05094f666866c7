"""Logarithms of odds and probabilities in fixed point, the same on every platform.

Log-odds are multiples of ``1 / SCALE`` bits, kept in float64 that holds them exactly; probabilities
are integers out of ``2**24``. Tables are made with integer arithmetic, and what is done to arrays
is addition, multiplication, division and rounding of float64, which IEEE 754 defines to the last
bit: no function of a platform's mathematics library decides a probability.
"""

import functools
import math

import numpy as np
from jaxtyping import Float64, Int64

SCALE = 256
LIMIT = 16 * SCALE
PRECISION = 24
_MANTISSA = 4096


def log_odds(ratio: Float64[np.ndarray, "*dims"]) -> Float64[np.ndarray, "*dims"]:
    """``SCALE * log2(ratio)``, rounded and limited to 16 bits either way.

    Args:
        ratio: positive and finite, of a probability to its complement.

    Example:
        >>> log_odds(np.array([1.0, 2.0, 0.25])) / SCALE
        array([ 0.,  1., -2.])
    """
    mantissa, exponent = np.frexp(ratio)
    fraction = _logarithms()[(mantissa * (2 * _MANTISSA)).astype(np.int64) - _MANTISSA]
    return np.maximum(np.minimum((exponent - 1) * float(SCALE) + fraction, LIMIT), -LIMIT)


def probability(odds: Float64[np.ndarray, " decisions"]) -> Int64[np.ndarray, " decisions"]:
    """The probability out of ``2**24`` for log-odds, at least ``2**-16`` from 0 and from 1.

    Example:
        >>> probability(np.array([0.0, float(SCALE)])) / 2**24
        array([0.5       , 0.66666663])
    """
    within = np.maximum(np.minimum(np.rint(odds), LIMIT), -LIMIT)
    return _probabilities()[within.astype(np.int64) + LIMIT]


@functools.cache
def _logarithms() -> np.ndarray:
    """``SCALE * log2`` in the middle of each of 4,096 equal steps from 1 to 2; 0 for the first."""
    x = (np.arange(_MANTISSA, 2 * _MANTISSA, dtype=np.uint64) * 2 + 1) << np.uint64(17)
    x[0] = 1 << 30
    digits = np.zeros(_MANTISSA, np.int64)
    for _ in range(13):
        x = (x * x) >> np.uint64(30)
        one = x >= 1 << 31
        digits = 2 * digits + one
        x = np.where(one, x >> np.uint64(1), x)
    return ((digits * SCALE + (1 << 12)) >> 13).astype(np.float64)


@functools.cache
def _probabilities() -> np.ndarray:
    one = 1 << 60
    root = 2 * one
    for _ in range(SCALE.bit_length() - 1):
        root = math.isqrt(root * one)
    powers = [one]
    for _ in range(LIMIT):
        powers.append(powers[-1] * root >> 60)
    upper = [(power << PRECISION) // (power + one) for power in powers]
    lower = [(1 << PRECISION) - p for p in upper[:0:-1]]
    return np.array(lower + upper, np.int64)
