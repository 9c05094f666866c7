"""Which channels go: scores, limits and rounding in; an order of removal out.

The order is a list of levels, each of which removes all that the level before it removes and a
little more. A sparsity and a budget are then both a level of one list: the first that removes
enough, or the first that costs little enough. Units that are gone already stay gone at every level,
so that removal can go on in steps.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Int

from jaxcomp import tree as tree_lib
from jaxcomp.prune.schedules import check_sparsity

Scope = Literal["layer", "global"]
Kept = dict[str, Bool[np.ndarray, "..."]]

# Sparsities are resolved to 1e-7, as for single weights, so that counts are exact integers.
_RESOLUTION = 10**7


class RemovalOrder(NamedTuple):
    """What goes when, in all groups together.

    Attributes:
        orders: by group, its units, the first to go first.
        names: the groups that steps point at.
        groups: (steps,): the group that loses units in a step.
        removed: (steps,): how many units the group has lost after it.
        steps_at: (levels + 1,): how many steps each level has taken; level 0 removes nothing but
            what is gone already.
        thresholds: (levels,): what a level is the first to reach: a sparsity in units of 1e-7
            (scope "layer"), or a number of units removed (scope "global").
        scope: "layer" or "global".
        units: by group that may lose units, how many it has.
    """

    orders: dict[str, Int[np.ndarray, "..."]]
    names: tuple[str, ...]
    groups: Int[np.ndarray, " steps"]
    removed: Int[np.ndarray, " steps"]
    steps_at: Int[np.ndarray, "..."]
    thresholds: Int[np.ndarray, "..."]
    scope: Scope
    units: dict[str, int]

    @property
    def levels(self) -> int:
        """The last level: all is removed that may be."""
        return len(self.thresholds)


def select(scores: Mapping[str, Any], sparsity: float, scope: Scope = "layer", **how: Any) -> Kept:
    """Which units each group keeps at a sparsity.

    Args:
        scores: by group, (units,); the lowest go first, and of equals those that come first.
        sparsity: fraction of the units removed, in [0, 1), resolved to 1e-7.
        scope: ``"layer"``: of each group, ``round(sparsity * units)``; ``"global"``: of all groups
            together, the lowest wherever they are.
        **how: as of :func:`removal_order`.

    Returns:
        By group, (units,) booleans, True where a unit is kept. With ``round_to`` the first choice
        is to remove more than asked for; :func:`shortfalls` says where that could not be.

    Raises:
        ValueError: as :func:`removal_order`, or a sparsity outside [0, 1).

    Example:
        >>> select({"a": np.array([3.0, 1.0, 2.0, 4.0])}, 0.5)
        {'a': array([ True, False, False,  True])}
    """
    order = removal_order(scores, scope, **how)
    return at_level(order, level_of(order, sparsity))


def removal_order(
    scores: Mapping[str, Any],
    scope: Scope = "layer",
    *,
    round_to: int = 1,
    positions: Mapping[str, Sequence[int]] | None = None,
    limits: Mapping[str, float] | None = None,
    keep: Iterable[str] = (),
    names: Mapping[str, Sequence[str]] | None = None,
    normalize: bool = True,
    gone: Mapping[str, Any] | None = None,
) -> RemovalOrder:
    """Put every removal that is allowed into one order.

    A group that loses units keeps a multiple of ``round_to``; it therefore loses them in blocks. In
    scope "global" the block with the lowest mean score goes first, whichever group it is of. No
    group loses its last unit.

    Args:
        scores: by group, (units,), finite; the lowest go first, and of equals those that come
            first.
        scope: see :func:`select`.
        round_to: every axis that is cut keeps a multiple of this width, such as 8 or 128.
        positions: by group, how many positions of an axis go with a unit, one number for each of
            its axes (a flattened 2·2 image has 4); 1 where a group is not named.
        limits: the greatest sparsity of the groups that a pattern matches; the least of several.
        keep: patterns of groups that are not cut.
        names: by group, what patterns are matched with, such as the paths of its leaves; its own
            name always counts. May hold groups that have no scores, so that they can be named too.
        normalize: whether scope "global" compares scores divided by their group's mean magnitude. A
            sum over a group grows with the group's size, so that raw scores mostly tell wide layers
            from narrow ones; a score in units of the loss can be compared as it is.
        gone: by group, (units,) booleans, True where a unit is gone already: it goes first whatever
            its score, takes no part in the normalization, and no level brings it back. A block of
            ``round_to`` that has lost some of its units loses the others before any other goes.

    Returns:
        The order.

    Raises:
        ValueError: no scores, scores that are not finite or not (units,), an unknown scope, a bad
            ``round_to`` or limit, a pattern that matches nothing, or more units gone than may go.

    Example:
        >>> order = removal_order({"a": np.array([3.0, 1.0, 2.0, 4.0])}, round_to=2)
        >>> [int(at_level(order, level)["a"].sum()) for level in range(order.levels + 1)]
        [4, 2]
    """
    arrays = _checked(scores, scope, round_to, gone or {})
    targets = {name: (name, *(names or {}).get(name, ())) for name in {**arrays, **(names or {})}}
    kept = {group for pattern in keep for group in match_groups(pattern, targets)}
    ceilings = _ceilings(limits or {}, targets)
    orders, keys, groups, removed = {}, [], [], []
    for index, (name, array) in enumerate(arrays.items()):
        orders[name] = np.argsort(array, kind="stable")
        step = _step(round_to, (positions or {}).get(name, (1,)))
        counts = _counts(len(array), step, ceilings.get(name, _RESOLUTION))
        _check_gone(name, array, counts if name not in kept else counts[:0])
        if name in kept:
            continue
        groups.append(np.full(len(counts), index))
        removed.append(counts)
        ranked = array[orders[name]]
        if scope == "global":
            keys.append(_block_means(_normalized(ranked) if normalize else ranked, counts))
        else:
            keys.append(_firsts(ranked, counts))
    key, group, lost = (np.concatenate(parts or [np.zeros(0)]) for parts in (keys, groups, removed))
    group, lost = group.astype(np.int64), lost.astype(np.int64)
    # Equal keys go group by group; within a group keys and counts rise together.
    sequence = np.lexsort((lost, group, key))
    key, group, lost = key[sequence], group[sequence], lost[sequence]
    units = {name: len(array) for name, array in arrays.items() if name not in kept}
    done = int(np.sum(np.isneginf(key)))
    if scope == "global":
        thresholds, steps_at = _total_removed(group, lost)[done:], np.arange(done, len(key) + 1)
    else:
        thresholds, counts = np.unique(key[done:].astype(np.int64), return_counts=True)
        steps_at = done + np.concatenate([[0], np.cumsum(counts)])
    return RemovalOrder(orders, tuple(arrays), group, lost, steps_at, thresholds, scope, units)


def level_of(order: RemovalOrder, sparsity: float) -> int:
    """The first level that removes as much as a sparsity asks for; the last if none does.

    Args:
        order: from :func:`removal_order`.
        sparsity: fraction of the units removed, in [0, 1).

    Raises:
        ValueError: a sparsity outside [0, 1).

    Example:
        >>> order = removal_order({"a": np.arange(4.0)}, "global")
        >>> level_of(order, 0.0), level_of(order, 0.5), level_of(order, 0.99)
        (0, 2, 3)
    """
    check_sparsity("sparsity", sparsity)
    if order.scope == "layer":
        reached = np.searchsorted(order.thresholds, round(sparsity * _RESOLUTION), side="right")
        return int(reached)
    target = _round_share(sparsity, sum(order.units.values()))
    if target <= _removed_at(order, 0).sum():
        return 0
    return min(int(np.searchsorted(order.thresholds, target, side="left")) + 1, order.levels)


def at_level(order: RemovalOrder, level: int) -> Kept:
    """Which units each group keeps at a level.

    Args:
        order: from :func:`removal_order`.
        level: 0 (nothing is removed but what is gone already) to ``order.levels``.

    Returns:
        By group, (units,) booleans, True where a unit is kept.

    Raises:
        ValueError: there is no such level.

    Example:
        >>> order = removal_order({"a": np.array([2.0, 1.0]), "b": np.array([5.0, 5.0])})
        >>> at_level(order, 1)
        {'a': array([ True, False]), 'b': array([False,  True])}
    """
    if not 0 <= level <= order.levels:
        raise ValueError(f"level {level} of an order with levels 0 to {order.levels}")
    kept = {}
    for name, count in zip(order.names, _removed_at(order, level), strict=True):
        kept[name] = np.ones(len(order.orders[name]), bool)
        kept[name][order.orders[name][:count]] = False
    return kept


def shortfalls(order: RemovalOrder, sparsity: float) -> tuple[str, ...]:
    """Where limits and rounding let less be removed than a sparsity asks for.

    Args:
        order: from :func:`removal_order`.
        sparsity: fraction of the units removed, in [0, 1).

    Returns:
        A sentence for each group (scope "layer"; groups that are kept are not counted), or one for
        all together.

    Example:
        >>> order = removal_order({"a": np.arange(12.0)}, round_to=8)
        >>> shortfalls(order, 0.75)
        ('a: 4 of 12 units removed, not 9: limits and round_to allow no more',)
    """
    kept = at_level(order, level_of(order, sparsity))
    removed = {name: int(np.sum(~mask)) for name, mask in kept.items()}
    if order.scope == "global":
        asked = {"all groups": (sum(removed.values()), sum(order.units.values()))}
    else:
        asked = {name: (removed[name], units) for name, units in order.units.items()}
    return tuple(
        f"{name}: {gone} of {units} units removed, not {_round_share(sparsity, units)}: "
        "limits and round_to allow no more"
        for name, (gone, units) in asked.items()
        if gone < _round_share(sparsity, units)
    )


def match_groups(pattern: str, names: Mapping[str, Sequence[str]]) -> list[str]:
    """The groups that a pattern matches by any of their names.

    Args:
        pattern: shell-style over a whole name; ``*`` matches any characters, ``/`` too. Brackets
            may stand for themselves, as in ``Conv_0/kernel[3]``.
        names: by group, its names.

    Returns:
        Groups, in order.

    Raises:
        ValueError: none matches; the message names the nearest.

    Example:
        >>> match_groups("Conv_*[3]", {"a": ["Conv_0/kernel[3]"], "b": ["Dense_0/kernel[1]"]})
        ['a']
    """
    literal = pattern.replace("[", "[[]")

    def matches(name: str) -> bool:
        return fnmatch.fnmatchcase(name, literal) or fnmatch.fnmatchcase(name, pattern)

    found = [group for group, own in names.items() if any(map(matches, own))]
    if not found:
        every = dict.fromkeys(name for own in names.values() for name in own)
        raise ValueError(
            f"pattern '{pattern}' matches no group of channels; {tree_lib.nearest(pattern, every)}"
        )
    return found


def _removed_at(order: RemovalOrder, level: int) -> np.ndarray:
    """(groups,): how many units each group has lost at a level."""
    steps = order.steps_at[level]
    counts = np.zeros(len(order.names), np.int64)
    np.maximum.at(counts, order.groups[:steps], order.removed[:steps])
    return counts


def _checked(
    scores: Mapping[str, Any], scope: str, round_to: int, gone: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The scores, with minus infinity for what is gone already."""
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be 'layer' or 'global', not {scope!r}")
    if isinstance(round_to, bool) or round_to < 1:
        raise ValueError(f"round_to must be a width of at least 1, such as 8, not {round_to}")
    if not scores:
        raise ValueError("there is no group of channels to cut: every one is fixed")
    for name in gone:
        if name not in scores:
            raise ValueError(f"gone names '{name}': no scores; {tree_lib.nearest(name, scores)}")
    arrays = {}
    for name, given in scores.items():
        array = np.array(given, np.float64)
        if array.ndim != 1 or not array.size:
            raise ValueError(f"{name}: scores of shape {array.shape}, not one number a unit")
        lost = np.asarray(gone.get(name, np.zeros(array.shape, bool)))
        if lost.dtype != bool or lost.shape != array.shape or lost.all():
            raise ValueError(
                f"{name}: gone must be {array.shape} booleans that leave a unit, not {lost!r:.80}"
            )
        array[lost] = 0.0
        bad = int(np.sum(~np.isfinite(array)))
        if bad:
            raise ValueError(
                f"{name}: {bad} of {array.size} scores are NaN or infinite: mend the weights or "
                "the score; to protect a group, `keep` it"
            )
        array[lost] = -np.inf
        arrays[name] = array
    return arrays


def _check_gone(name: str, array: np.ndarray, counts: np.ndarray) -> None:
    """Raise unless all that is gone may go."""
    lost, most = int(np.sum(np.isneginf(array))), int(counts.max(initial=0))
    if lost > most:
        raise ValueError(
            f"{name}: {lost} of {len(array)} units are gone already, but keep, limits and round_to "
            f"allow {most}: loosen them"
        )


def _ceilings(limits: Mapping[str, float], names: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """By group, the greatest sparsity in units of 1e-7."""
    ceilings: dict[str, int] = {}
    for pattern, limit in limits.items():
        if not 0 <= limit <= 1:
            raise ValueError(f"limits['{pattern}'] must be a sparsity in [0, 1], not {limit}")
        for group in match_groups(pattern, names):
            ceiling = round(limit * _RESOLUTION)
            ceilings[group] = min(ceiling, ceilings.get(group, _RESOLUTION))
    return ceilings


def _step(round_to: int, positions: Sequence[int]) -> int:
    """The least number of units whose positions are a multiple of ``round_to`` on every axis."""
    return math.lcm(*(round_to // math.gcd(round_to, count) for count in positions))


def _counts(size: int, step: int, ceiling: int) -> np.ndarray:
    """How many units may be removed: rising, without zero."""
    fewest = max(1, size - size * ceiling // _RESOLUTION)
    most = (size - 1) // step * step
    fewest = -(-fewest // step) * step
    return size - np.arange(most, fewest - 1, -step)


def _normalized(ranked: np.ndarray) -> np.ndarray:
    """Scores over the mean magnitude of those that are not gone."""
    magnitudes = np.abs(ranked[np.isfinite(ranked)])
    largest = float(np.max(magnitudes))
    # Scaled first, so that sums of huge scores and means of tiny ones stay finite.
    return ranked / largest / np.mean(magnitudes / largest) if largest else ranked


def _block_means(ranked: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean of each block that goes at once; ``ranked`` rises, so do the means."""
    if not len(counts):
        return np.zeros(0)
    starts = np.concatenate([[0], counts[:-1]])
    means = np.add.reduceat(ranked[: counts[-1]], starts) / (counts - starts)
    return np.maximum.accumulate(means)


def _firsts(ranked: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The least sparsity, in units of 1e-7, that asks for more than the count before."""
    before = np.concatenate([[0], counts[:-1]])[: len(counts)].astype(np.int64)
    least = -(-_RESOLUTION * (2 * before + 1) // (2 * len(ranked)))
    return np.where(np.isneginf(ranked[before]), -np.inf, least)


def _total_removed(groups: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """How many units all groups have lost after each step."""
    before: dict[int, int] = {}
    gains = []
    for group, count in zip(groups.tolist(), removed.tolist(), strict=True):
        gains.append(count - before.get(group, 0))
        before[group] = count
    return np.cumsum(np.asarray(gains, np.int64))


def _round_share(sparsity: float, units: int) -> int:
    return (2 * round(sparsity * _RESOLUTION) * units + _RESOLUTION) // (2 * _RESOLUTION)
