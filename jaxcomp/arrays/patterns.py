"""Number the ways to keep n of m neighbours: which are kept becomes one small integer and back.

Ascending positions ``p_0 < … < p_(n-1)`` have the number ``sum of C(p_j, j + 1)``, the
combinatorial number system (Knuth, The Art of Computer Programming 4A, 2011, section 7.2.1.3).
"""

import math

import numpy as np
from jaxtyping import Int64, Integer


def count_patterns(n: int, m: int) -> int:
    """In how many ways n of m neighbours can be kept: ``m! / (n! (m - n)!)``.

    Example:
        >>> count_patterns(2, 4)
        6
    """
    return math.comb(m, n)


def rank_patterns(
    positions: Integer[np.ndarray, "..."], m: int, axis: int
) -> Int64[np.ndarray, "..."]:
    """The number of each pattern, below :func:`count_patterns`.

    Args:
        positions: kept positions below m, ascending along ``axis``.
        m: neighbours in a group.
        axis: not negative; the result lacks it.

    Example:
        >>> rank_patterns(np.array([[0, 1], [1, 3], [2, 3]]), m=4, axis=1)
        array([0, 4, 5])
    """
    rows = np.moveaxis(positions, axis, 0)
    worth = _worth(len(rows), m)
    ranks = np.zeros(rows.shape[1:], np.int64)
    for j, row in enumerate(rows):
        ranks += worth[j, row - j]
    return ranks


def unrank_patterns(
    ranks: Integer[np.ndarray, "..."], n: int, m: int, axis: int
) -> Int64[np.ndarray, "..."]:
    """Undo :func:`rank_patterns`.

    Args:
        ranks: numbers of patterns, in ``[0, count_patterns(n, m))``.
        n: positions in a pattern.
        m: neighbours in a group.
        axis: not negative; where the result has the n positions.

    Example:
        >>> unrank_patterns(np.array([0, 4, 5]), n=2, m=4, axis=1)
        array([[0, 1],
               [1, 3],
               [2, 3]])
    """
    worth, rest = _worth(n, m), ranks.astype(np.int64)
    rows = []
    # The last position is the largest that is worth no more than what is left.
    for j in reversed(range(n)):
        i = np.searchsorted(worth[j], rest, side="right") - 1
        rest = rest - worth[j, i]
        rows.append(i + j)
    return np.stack(rows[::-1], axis=axis)


def _worth(n: int, m: int) -> np.ndarray:
    """``C(i + j, j + 1)`` at ``[j, i]``, what position ``i + j`` adds as the j-th of n."""
    table = [[math.comb(i + j, j + 1) for i in range(m - n + 1)] for j in range(n)]
    return np.array(table, np.int64)
