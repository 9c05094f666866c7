"""Ranks for a whole model under a budget, by what each rank is worth for what it costs."""

import glob
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcomp import columns
from jaxcomp.checks import is_number
from jaxcomp.factorize.rules import LowRank
from jaxcomp.factorize.spectra import Spectra, Spectrum

_KINDS = ("bytes", "parameters", "flops")


class Budget(NamedTuple):
    """What the whole model may take; exactly one of them.

    Attributes:
        bytes: of all leaves, in memory.
        parameters: numbers in all leaves.
        flops: of the model on the inputs that it was read with, run on factors.

    A number up to 1 is a share of what the dense model takes, one above is the amount itself.
    """

    bytes: Any = None
    parameters: Any = None
    flops: Any = None


class Allocation(NamedTuple):
    """The ranks that were chosen; ``print`` it for a table.

    Attributes:
        ranks: by path; None where a leaf stays dense.
        rules: the same, as :func:`svd` takes them.
        kind: what the budget is of.
        cost: of the whole model with these ranks.
        dense_cost: of the dense model.
        error: what the singular values that are left out hold, as a share of their leaf's, summed
            over the leaves.
        bound: no choice of ranks within the budget has an error below this.
        errors: the share by path.
    """

    ranks: Mapping[str, int | None]
    rules: dict[str, LowRank | None]
    kind: str
    cost: int
    dense_cost: int
    error: float
    bound: float
    errors: Mapping[str, float]

    def __str__(self) -> str:
        """A table of the ranks."""
        rows = [("leaf", "rank", "error")]
        for path, rank in self.ranks.items():
            rows.append((path, "dense" if rank is None else str(rank), f"{self.errors[path]:.3g}"))
        return (
            f"{columns.table(rows)}\n"
            f"{self.kind}: {self.cost:,}, dense {self.dense_cost:,} "
            f"({self.cost / max(self.dense_cost, 1):.1%}); error {self.error:.4g}, at least "
            f"{self.bound:.4g}"
        )


def allocate(spectra: Any, budget: Any) -> Allocation:
    """Choose the rank of each leaf so that the model fits a budget and little is lost.

    Every leaf begins at rank 1 (or dense, where no rank saves anything). Then whatever takes off
    most error for its cost is bought, along the lower convex hull of each leaf's choices, dense
    among them; what the last purchases leave over is spent on what still fits. The errors of leaves
    are added up as shares of their own: with batches, of the energy of their outputs.

    Args:
        spectra: from :func:`~jaxcomp.factorize.spectra`.
        budget: a :class:`Budget`, such as ``Budget(bytes=0.5)``.

    Returns:
        The ranks, and a bound that tells how far from the best they can be.

    Raises:
        TypeError: no spectra, no budget, or one that is no number.
        ValueError: not exactly one kind; a budget that even rank 1 exceeds; FLOPs of a model that
            was not read.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.factorize.spectra import spectra
        >>> params = {"a": jnp.diag(jnp.array([9.0, 1.0, 1.0, 1.0])), "c": jnp.eye(6)}
        >>> found = allocate(spectra(None, params, None), Budget(parameters=0.75))
        >>> print(found)
        leaf   rank  error
        a         1  0.0357
        c         2   0.667
        parameters: 32, dense 52 (61.5%); error 0.7024, at least 0.2093
    """
    if not isinstance(spectra, Spectra):
        raise TypeError(f"spectra must come from factorize.spectra, not {spectra!r:.60}")
    kind, limit = _limit(spectra, budget)
    tables = {path: _choices(spectrum, kind) for path, spectrum in spectra.leaves.items()}
    fixed = spectra.totals[kind] - sum(_dense_cost(s, kind) for s in spectra.leaves.values())
    left = limit - fixed - sum(float(table.costs[0]) for table in tables.values())
    if left < 0:
        least = limit - left
        raise ValueError(
            f"a budget of {limit:,.0f} {kind} is below what rank 1 of every leaf takes with all "
            f"else, {least:,.0f}: raise it"
        )
    steps = sorted(
        (-slope, path, start, end)
        for path, table in tables.items()
        for slope, start, end in _hull(table)
    )
    tries = [_bought(tables, steps, left, go_on) for go_on in (True, False)]
    chosen = min(tries, key=lambda chosen: _error(tables, chosen))
    return _told(spectra, kind, fixed, tables, chosen, _bound(tables, steps, left))


def _bought(tables: Mapping[str, "_Table"], steps: Any, left: float, go_on: bool) -> dict[str, int]:
    """What is bought along the hulls, best value first, and of what is left over.

    Where a purchase does not fit, cheaper ones of other leaves may, or a smaller one of the same
    leaf: either may come to more, so ``go_on`` says whether the hulls are followed further.
    """
    chosen = dict.fromkeys(tables, 0)
    blocked: set[str] = set()
    for _, path, start, end in steps:
        price = float(tables[path].costs[end] - tables[path].costs[start])
        if price > left:
            blocked.add(path)
            if not go_on:
                break
        elif path not in blocked:
            chosen[path], left = end, left - price
    _spend(tables, chosen, left)
    return chosen


def _bound(tables: Mapping[str, "_Table"], steps: Any, left: float) -> float:
    """The error if a part of a purchase could be had: no choice has less."""
    error = sum(float(table.errors[0]) for table in tables.values())
    for slope, path, start, end in steps:
        price = float(tables[path].costs[end] - tables[path].costs[start])
        error += slope * min(price, left)
        left -= price
        if left <= 0:
            break
    return max(error, 0.0)


def _error(tables: Mapping[str, "_Table"], chosen: Mapping[str, int]) -> float:
    return sum(float(tables[path].errors[at]) for path, at in chosen.items())


class _Table(NamedTuple):
    """The choices of a leaf: ranks (0: dense), what each costs, and the share that is lost."""

    ranks: np.ndarray
    costs: np.ndarray
    errors: np.ndarray


def _choices(spectrum: Spectrum, kind: str) -> _Table:
    squares = np.asarray(spectrum.values, np.float64) ** 2
    squares = squares.reshape(-1, squares.shape[-1]).sum(0)
    total = squares.sum()
    # From the end: the smallest are added first.
    tail = np.append(np.cumsum(squares[::-1])[::-1], 0.0) / (total if total > 0 else 1)
    most = spectrum.most
    ranks = np.arange(1, most + 1)
    dense = _dense_cost(spectrum, kind)
    share = (spectrum.features + spectrum.outputs) / (spectrum.features * spectrum.outputs)
    costs = np.append(np.rint(ranks * share * dense), dense)
    return _Table(np.append(ranks, 0), costs, np.append(tail[1 : most + 1], 0.0))


def _dense_cost(spectrum: Spectrum, kind: str) -> int:
    return {
        "bytes": spectrum.nbytes,
        "parameters": math.prod(spectrum.shape),
        "flops": spectrum.flops,
    }[kind]


def _hull(table: _Table) -> list[tuple[float, int, int]]:
    """The lower convex hull: error taken off a unit of cost, from one choice to another."""
    corners: list[int] = []
    for at in range(len(table.ranks)):
        while corners and table.costs[at] <= table.costs[corners[-1]]:
            corners.pop()
        while len(corners) > 1 and _slope(table, corners[-2], corners[-1]) <= _slope(
            table, corners[-1], at
        ):
            corners.pop()
        corners.append(at)
    pairs = itertools.pairwise(corners)
    return [(_slope(table, start, end), start, end) for start, end in pairs]


def _slope(table: _Table, start: int, end: int) -> float:
    price = float(table.costs[end] - table.costs[start])
    return float(table.errors[start] - table.errors[end]) / price


def _spend(tables: Mapping[str, _Table], chosen: dict[str, int], left: float) -> None:
    """Spend what is left over, best value first, on choices between the corners of the hull."""
    while True:
        best: tuple[float, str, int] | None = None
        for path, table in tables.items():
            here = chosen[path]
            prices = table.costs - table.costs[here]
            gains = table.errors[here] - table.errors
            fits = (prices > 0) & (prices <= left) & (gains > 0)
            if np.any(fits):
                values = np.where(fits, gains / np.where(fits, prices, 1), 0)
                at = int(np.argmax(values))
                if best is None or values[at] > best[0]:
                    best = (float(values[at]), path, at)
        if best is None:
            return
        _, path, at = best
        left -= float(tables[path].costs[at] - tables[path].costs[chosen[path]])
        chosen[path] = at


def _told(
    spectra: Spectra,
    kind: str,
    fixed: float,
    tables: Mapping[str, _Table],
    chosen: Mapping[str, int],
    bound: float,
) -> Allocation:
    ranks = {path: int(tables[path].ranks[at]) or None for path, at in chosen.items()}
    errors = {path: float(tables[path].errors[at]) for path, at in chosen.items()}
    cost = fixed + sum(float(tables[path].costs[at]) for path, at in chosen.items())
    rules: dict[str, LowRank | None] = {
        glob.escape(path): None if rank is None else LowRank(rank) for path, rank in ranks.items()
    }
    error = sum(errors.values())
    dense = int(spectra.totals[kind])
    return Allocation(ranks, rules, kind, round(cost), dense, error, min(bound, error), errors)


def _limit(spectra: Spectra, budget: Any) -> tuple[str, float]:
    if not isinstance(budget, Budget):
        raise TypeError(f"budget must be a Budget, such as Budget(bytes=0.5), not {budget!r:.60}")
    given = {name: value for name in _KINDS if (value := getattr(budget, name)) is not None}
    if len(given) != 1:
        raise ValueError(f"a budget is of one of {', '.join(_KINDS)}, not of {len(given)} of them")
    ((kind, value),) = given.items()
    if not is_number(value):
        raise TypeError(f"a budget of {kind} must be a number, not {value!r:.60}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"a budget of {kind} must be above 0, not {value}")
    if kind not in spectra.totals:
        raise ValueError("FLOPs are those of a model: give apply_fn and batches to spectra")
    return kind, value * spectra.totals[kind] if value <= 1 else value
