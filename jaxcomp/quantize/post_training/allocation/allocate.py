"""Bits for each layer under a total: where the outputs suffer most, most bits go."""

import bisect
import dataclasses
import glob
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcomp import columns
from jaxcomp import tree as tree_lib
from jaxcomp.arrays import nbytes
from jaxcomp.checks import check_count, is_number
from jaxcomp.model.batches import peek, rereadable, spread
from jaxcomp.quantize.affine import fake_quant
from jaxcomp.quantize.formats import AnyFormat, Format
from jaxcomp.quantize.post_training.allocation import knapsack
from jaxcomp.quantize.post_training.allocation.damage import kl_divergence
from jaxcomp.quantize.post_training.allocation.sensitivity import (
    LeafSensitivity,
    Program,
    describe_call,
    find_candidates,
    measure,
)

_SHOWN = 12  # points of the front that are printed
_POINTS = 4096  # points of the front that are kept


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the quantized weights may take; one of the two.

    Attributes:
        bytes: of the whole tree, leaves that are not quantized included, in memory; an
            entropy-coded file is smaller.
        bits: stored bits a weight, scales and zero points included; the average over the leaves
            that bits are allocated to.

    Raises:
        TypeError: neither or both are given, or one is no number.
        ValueError: one is not positive and finite.

    Example:
        >>> Budget(bits=4.5)
        Budget(bytes=None, bits=4.5)
    """

    bytes: Any = None
    bits: Any = None

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.bits is None):
            raise TypeError("a budget is Budget(bytes=…) or Budget(bits=…): give one of the two")
        if self.bits is None:
            check_count("bytes", self.bytes)
            return
        if not is_number(self.bits):
            raise TypeError(f"bits must be a number, not {self.bits!r:.60}")
        if not (math.isfinite(self.bits) and self.bits > 0):
            raise ValueError(f"bits is {self.bits}, but must be positive and finite")


class AllocatedLeaf(NamedTuple):
    """What was chosen for a leaf.

    Attributes:
        path: of the leaf.
        size: how many weights it has.
        format: with concrete axes; None: left dense.
        nbytes: in that format.
        damage: to the outputs, while all other leaves are dense.
    """

    path: str
    size: int
    format: AnyFormat | None
    nbytes: int
    damage: float


class Allocation(NamedTuple):
    """A format for each leaf; ``print`` it for a table.

    Attributes:
        leaves: what was chosen, in the order of the program.
        nbytes: of the whole tree.
        predicted: the sum of the leaves' damages. That damages add up is an assumption.
        measured: the damage with all of them rounded to nearest at once; NaN if not measured.
        bound: no other choice within the budget has a smaller sum; equal to ``predicted`` where the
            choice is the best there is.
        front: bytes of the whole tree, rising, and the smallest sum of damages that they allow.
        front_is_whole: whether all choices that no other one beats are in the front.
        sensitivity: what was measured of each leaf.
        other_nbytes: of the leaves that bits are not allocated to.
    """

    leaves: tuple[AllocatedLeaf, ...]
    nbytes: int
    predicted: float
    measured: float
    bound: float
    front: tuple[tuple[int, float], ...]
    front_is_whole: bool
    sensitivity: tuple[LeafSensitivity, ...]
    other_nbytes: int

    @property
    def rules(self) -> dict[str, AnyFormat | None]:
        """By path, as a pattern: for methods after training, and for ``partition``."""
        return {glob.escape(leaf.path): leaf.format for leaf in self.leaves}

    @property
    def bits(self) -> float:
        """Stored bits a weight, the average over the leaves that bits were allocated to."""
        return 8 * (self.nbytes - self.other_nbytes) / sum(leaf.size for leaf in self.leaves)

    def at(self, budget: Any) -> "Allocation":
        """The choice for another budget, from what was measured already.

        Args:
            budget: the other budget.

        Returns:
            An allocation whose whole damage is not measured.

        Raises:
            TypeError: it is no budget.
            ValueError: nothing fits it.
        """
        return _choose(
            self.sensitivity, self.other_nbytes, budget, (self.front, self.front_is_whole)
        )

    def __str__(self) -> str:
        return _table(self)


def allocate(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    budget: Any,
    rules: Any = Format(),  # noqa: B008
    *,
    bits: Any = (2, 3, 4, 5, 6, 8),
    compare: Any = kl_divergence,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Allocation:
    """Choose each leaf's format, so that the outputs change least within a budget.

    One leaf at a time is rounded to nearest in each format, and the outputs are compared with the
    dense model's: a forward pass for each leaf, format and batch. Of all choices within the budget,
    the one with the smallest sum is taken: a multiple-choice knapsack, solved exactly or with a
    bound. That the sum stands for the whole is an assumption, and the result holds both.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        batches: a list or another iterable that starts over, or a function that returns one. A
            plain tuple is spread over ``inputs``; each batch counts alike.
        budget: bytes of the tree, or bits a weight.
        rules: a format, a sequence of formats (None among them: left dense), or such by path
            pattern, as methods after training have it. A uniform format alone stands for itself at
            each width in ``bits``, and any format alone also for leaving the leaf dense.
        bits: a sequence of the widths that a uniform format stands for.
        compare: ``compare(dense outputs, quantized outputs)``, the damage of a batch as one number:
            :func:`kl_divergence` of logits, :func:`mean_square`, or :func:`increase` where
            ``apply_fn`` returns a loss.
        directory: where finished measurements are kept, in a file ``bits.jxc``; the same call goes
            on after them, and may ask for other budgets, formats and widths.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        Formats by path as ``.rules``, for any method after training; and the Pareto front.

    Raises:
        ValueError: nothing fits the budget; a leaf has no format with a finite damage; a pattern
            matches nothing or a format does not fit; no batches; another call wrote the file.
        TypeError: something is no function, budget or format; batches that can be read only once;
            outputs that ``compare`` cannot take.
        CheckpointError: the file is damaged.

    Example:
        >>> import jax.numpy as jnp
        >>> weights = jnp.linspace(-1, 1, 64).reshape(8, 8)
        >>> params = {"first": weights, "last": jnp.sin(9 * weights)}
        >>> model = lambda p, x: jnp.tanh(x @ p["first"]) @ p["last"]
        >>> found = allocate(model, params, [jnp.eye(8)], Budget(bits=7.5), bits=(2, 4, 8))
        >>> [(path, format.bits) for path, format in found.rules.items()]
        [('first', 2), ('last', 4)]

    Source:
        Damages by KL divergence of the outputs, one layer at a time, and a budget: Cai et al.,
        ZeroQ, 2020, section 3.2; the knapsack: see :mod:`.knapsack`.
    """
    _check_budget(budget)
    program = Program.of(apply_fn, params, batches, compare)
    inputs = spread(peek(rereadable(batches)())[0])
    candidates = find_candidates(apply_fn, params, inputs, rules, bits)
    leaves = tree_lib.take(params, candidates)
    other = nbytes(params) - sum(nbytes(leaf) for leaf in leaves.values())
    call = lambda: describe_call(params, batches, compare)
    sensitivity = measure(program, candidates, call, directory, progress)
    found = _choose(sensitivity, other, budget)
    rounded = {
        leaf.path: fake_quant(leaves[leaf.path], leaf.format)
        for leaf in found.leaves
        if leaf.format is not None
    }
    (measured,) = program.damages([tree_lib.replace(params, rounded)])
    return found._replace(measured=measured)


Front = tuple[tuple[tuple[int, float], ...], bool]


def _choose(
    sensitivity: Sequence[LeafSensitivity], other: int, budget: Any, front: Front | None = None
) -> Allocation:
    _check_budget(budget)
    groups = [_options(leaf) for leaf in sensitivity]
    weights = sum(leaf.size for leaf in sensitivity)
    _check_fits(sensitivity, groups, other, budget)
    most = budget.bytes - other if budget.bits is None else math.floor(budget.bits * weights / 8)
    found = knapsack.solve(groups, most)
    front = front or _front(groups, other)
    leaves = tuple(
        AllocatedLeaf(leaf.path, leaf.size, leaf.formats[i], leaf.nbytes[i], leaf.damages[i])
        for leaf, i in zip(sensitivity, found.choice, strict=True)
    )
    return Allocation(
        leaves,
        found.cost + other,
        found.damage,
        math.nan,
        found.bound,
        *front,
        tuple(sensitivity),
        other,
    )


def _check_budget(budget: Any) -> None:
    if not isinstance(budget, Budget):
        raise TypeError(
            "budget must be a quantize.Budget, such as Budget(bytes=10**6) or Budget(bits=4.5), "
            f"not {budget!r:.60}"
        )


def _options(leaf: LeafSensitivity) -> knapsack.Options:
    if not any(map(math.isfinite, leaf.damages)):
        raise ValueError(
            f"{leaf.path}: the outputs are not finite in any of its formats: give it more bits, or "
            "leave it out with a rule of None"
        )
    return knapsack.Options(np.array(leaf.nbytes, np.int64), np.array(leaf.damages, np.float64))


def _check_fits(
    sensitivity: Sequence[LeafSensitivity],
    groups: Sequence[knapsack.Options],
    other: int,
    budget: Budget,
) -> None:
    least = sum(int(group.costs[np.isfinite(group.damages)].min()) for group in groups)
    bits = 8 * least / sum(leaf.size for leaf in sensitivity)
    if budget.bytes is not None and least + other > budget.bytes:
        raise ValueError(
            f"nothing fits {budget.bytes:,} bytes: the smallest formats take {least:,}, and the "
            f"leaves that are not quantized {other:,}: allow more, or formats of fewer bits"
        )
    if budget.bits is not None and bits > budget.bits:
        raise ValueError(
            f"nothing fits {budget.bits:g} bits a weight: the smallest formats take {bits:.3f}, "
            "scales included: allow more, or formats of fewer bits"
        )


def _front(groups: Sequence[knapsack.Options], other: int) -> Front:
    found = knapsack.front(groups, _POINTS)
    points = zip((found.costs + other).tolist(), found.damages.tolist(), strict=True)
    return tuple(points), found.exact


def _table(found: Allocation) -> str:
    rows = [("leaf", "weights", "format", "bits", "bytes", "damage")]
    for leaf in found.leaves:
        form = "dense" if leaf.format is None else _words(leaf.format)
        bits = 8 * leaf.nbytes / leaf.size
        numbers = (f"{bits:.2f}", f"{leaf.nbytes:,}", f"{leaf.damage:.3g}")
        rows.append((leaf.path, f"{leaf.size:,}", form, *numbers))
    exact = found.bound >= found.predicted
    least = "the least there is" if exact else f"none is below {found.bound:.4g}"
    measured = "not measured" if math.isnan(found.measured) else f"{found.measured:.4g}"
    lines = [
        columns.table(rows),
        f"total: {found.bits:.3f} bits a weight, {found.nbytes:,} bytes, {found.other_nbytes:,} of "
        "them in other leaves",
        f"damage: sum {found.predicted:.4g} ({least}), measured together {measured}",
        f"the front, {'whole' if found.front_is_whole else 'in part'}: {len(found.front):,} points",
    ]
    at = np.unique(np.linspace(0, len(found.front) - 1, _SHOWN).astype(int))
    size = sum(leaf.size for leaf in found.leaves)
    points = [("bytes", "bits", "damage")]
    for i in at:
        cost, damage = found.front[i]
        bits = 8 * (cost - found.other_nbytes) / size
        points.append((f"{cost:,}", f"{bits:.3f}", f"{damage:.3g}"))
    lines.append(columns.table(points, left=0))
    alike = [("all leaves alike", "bytes", "damage", "allocated")]
    for width, (cost, damage) in _uniform(found).items():
        best = found.front[bisect.bisect(found.front, cost, key=lambda point: point[0]) - 1][1]
        alike.append((f"{width} bits", f"{cost:,}", f"{damage:.3g}", f"{best:.3g}"))
    return "\n".join([*lines, columns.table(alike)] if len(alike) > 1 else lines)


def _uniform(found: Allocation) -> dict[int, tuple[int, float]]:
    """Bytes and damage with one width for all leaves, where each has one format of that width."""
    known = [[format and format.bits for format in leaf.formats] for leaf in found.sensitivity]
    totals = {}
    for width in sorted({bits for widths in known for bits in widths if bits}):
        if all(widths.count(width) == 1 for widths in known):
            at = [widths.index(width) for widths in known]
            pairs = list(zip(found.sensitivity, at, strict=True))
            cost = found.other_nbytes + sum(leaf.nbytes[i] for leaf, i in pairs)
            totals[width] = cost, sum(leaf.damages[i] for leaf, i in pairs)
    return totals


def _words(format: AnyFormat) -> str:
    if not isinstance(format, Format):
        return f"{format.bits} bits, {getattr(format, 'element', type(format).__name__)}"
    return f"int{format.bits} {'symmetric' if format.symmetric else 'affine'}"
