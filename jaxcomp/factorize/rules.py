"""How a leaf is to be factorized: its rank, and which of its axes lie in which factor."""

import dataclasses
import math
import string
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_count
from jaxcomp.factorize.svd_matrix import check_energy
from jaxcomp.model.matrices import MatrixForm

Split = Literal["matrix", "spatial", "tucker", "cp"]
_SPLITS = ("matrix", "spatial", "tucker", "cp")


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The rank of a leaf, and how it is taken apart.

    Attributes:
        rank: at least 1; with ``"tucker"`` of the inputs and of the outputs, one number for both
            or two.
        energy: instead of a rank: the share of the squared singular values that is kept, above 0
            and at most 1. Not with ``"cp"``.
        split: ``"matrix"``: inputs and outputs; a convolution becomes a narrow one and a 1 × 1 one.
            The others are for convolutions, and the same as ``"matrix"`` for leaves without a
            window: ``"spatial"`` cuts the window (k × 1, then 1 × k), ``"tucker"`` is a 1 × 1
            convolution before and after a small one, ``"cp"`` has every axis in a factor of its
            own.

    Raises:
        TypeError: (when made) a number is none.
        ValueError: a number out of range, neither rank nor energy or both, another split.

    Example:
        >>> LowRank(energy=0.9)
        LowRank(rank=None, energy=0.9, split='matrix')
    """

    rank: Any = None
    energy: Any = None
    split: Any = "matrix"

    def __post_init__(self) -> None:
        if self.split not in _SPLITS:
            raise ValueError(f"split must be one of {', '.join(_SPLITS)}, not {self.split!r:.60}")
        if (self.rank is None) == (self.energy is None):
            raise ValueError("give a rank or an energy, such as LowRank(rank=8), and not both")
        if self.energy is not None:
            check_energy(self.energy)
            if self.split == "cp":
                raise ValueError("split='cp' has no singular values to share: give a rank")
        pair = isinstance(self.rank, tuple)
        if pair and (self.split != "tucker" or len(self.rank) != 2):
            raise ValueError(f"rank is {self.rank}: two ranks are for split='tucker' only")
        for rank in self.rank if pair else () if self.rank is None else (self.rank,):
            check_count("rank", rank)


class Factoring(NamedTuple):
    """How the axes of a leaf lie in its factors; static, so it may be closed over.

    Attributes:
        split: as carried out.
        shape: of the leaf.
        equation: of :class:`~jaxcomp.arrays.LowRankArray`.
        outer: axes that have a product for each position.
        groups: the axes that are joined for each side: rows and columns of a matrix; with
            ``"tucker"`` inputs, window and outputs; with ``"cp"`` one axis each.
    """

    split: str
    shape: tuple[int, ...]
    equation: str
    outer: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each side."""
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.groups)

    @property
    def most(self) -> int:
        """The largest rank; with ``"tucker"`` that of both sides, for ``"cp"`` no limit."""
        if self.split == "cp":
            return math.prod(self.sizes)
        return min(self.sizes) if self.split == "matrix" else min(self.sizes[0], self.sizes[-1])


def factoring_of(form: MatrixForm, split: str) -> Factoring:
    """How a leaf is taken apart.

    Args:
        form: of the leaf, without inner groups.
        split: as asked; ``"matrix"`` is carried out where there is no window.

    Returns:
        The factoring.

    Example:
        >>> form = MatrixForm((3, 3, 8, 16), (0, 1, 2), (3,), kernel_axes=(0, 1))
        >>> factoring_of(form, "spatial").equation, factoring_of(form, "tucker").equation
        ('acr,rbd->abcd', 'cr,rabs,sd->abcd')
    """
    leading = 0
    while leading < len(form.outer_axes) and form.outer_axes[leading] == leading:
        leading += 1
    letters = {axis: string.ascii_lowercase[axis - leading] for axis in range(len(form.shape))}
    shared = [axis for axis in form.outer_axes if axis >= leading]
    window = form.kernel_axes
    channels = tuple(axis for axis in form.input_axes if axis not in window)
    if not window or (split == "spatial" and len(window) < 2):
        split = "matrix"

    def word(*axes: int) -> str:
        return "".join(letters[axis] for axis in axes)

    outer, result = word(*shared), word(*range(leading, len(form.shape)))
    groups: tuple[tuple[int, ...], ...]
    if split == "tucker":
        groups = (channels, window, form.output_axes)
        terms = [f"{word(*channels)}r", f"r{word(*window)}s", f"s{word(*form.output_axes)}"]
    elif split == "cp":
        groups = (*((axis,) for axis in window), channels, form.output_axes)
        terms = [*(f"{word(*group)}r" for group in groups[:-1]), f"r{word(*groups[-1])}"]
    else:
        rows, columns = form.input_axes, form.output_axes
        if split == "spatial":
            rows, columns = (*window[:1], *channels), (*window[1:], *form.output_axes)
        groups = (rows, columns)
        terms = [f"{word(*rows)}r", f"r{word(*columns)}"]
        split = "matrix" if split == "matrix" else "spatial"
    equation = f"{','.join(outer + term for term in terms)}->{result}"
    return Factoring(split, form.shape, equation, form.outer_axes, groups)


def to_sides(factoring: Factoring, leaf: Any) -> Array:
    """A leaf with the axes of each side joined, and a stack of such in front.

    Args:
        factoring: of the leaf.
        leaf: of its shape.

    Returns:
        ``(stack, *sizes)``.

    Example:
        >>> form = MatrixForm((3, 3, 8, 16), (0, 1, 2), (3,), kernel_axes=(0, 1))
        >>> to_sides(factoring_of(form, "spatial"), jnp.ones((3, 3, 8, 16))).shape
        (1, 24, 48)
    """
    order = (*factoring.outer, *(axis for group in factoring.groups for axis in group))
    return jnp.transpose(jnp.asarray(leaf), order).reshape(-1, *factoring.sizes)


def from_sides(factoring: Factoring, factors: tuple[Any, ...]) -> tuple[Array, ...]:
    """Stacked factors of joined axes as those of a :class:`~jaxcomp.arrays.LowRankArray`.

    Args:
        factoring: of the leaf.
        factors: each ``(stack, ...)``, with its side and its ranks in the order of the equation.

    Returns:
        The factors with the leaf's own axes.
    """
    outer = [factoring.shape[axis] for axis in factoring.outer]
    found = []
    for at, (group, factor) in enumerate(zip(factoring.groups, factors, strict=True)):
        sizes = [factoring.shape[axis] for axis in group]
        before = [factor.shape[1]] if factor.ndim == 4 or at == len(factors) - 1 else []
        after = [] if at == len(factors) - 1 else [factor.shape[-1]]
        found.append(factor.reshape(*outer, *before, *sizes, *after))
    return tuple(found)


def numbers_of(factoring: Factoring, rank: Any) -> int:
    """How many numbers the factors of a rank hold.

    Args:
        factoring: of the leaf.
        rank: as in :class:`LowRank`.

    Example:
        >>> numbers_of(factoring_of(MatrixForm((6, 8), (0,), (1,)), "matrix"), 2)
        28
    """
    stack = math.prod(factoring.shape[axis] for axis in factoring.outer)
    sizes = factoring.sizes
    if factoring.split == "tucker":
        a, b = rank if isinstance(rank, tuple) else (rank, rank)
        return stack * (sizes[0] * a + a * sizes[1] * b + b * sizes[2])
    return stack * rank * sum(sizes)


def flax_form(shape: tuple[int, ...]) -> MatrixForm | None:
    """The matrix form of a leaf in Flax's layouts; None where its axes do not tell.

    Args:
        shape: of the leaf: ``(inputs, outputs)``, or that of a convolution's kernel in two or three
            dimensions, ``(*window, inputs, outputs)``.

    Example:
        >>> flax_form((3, 3, 8, 16)).kernel_axes, flax_form((64, 4, 16))
        ((0, 1), None)
    """
    if len(shape) == 2:
        return MatrixForm(tuple(shape), (0,), (1,))
    if len(shape) not in (4, 5):
        return None
    last = len(shape) - 1
    window = tuple(range(last - 1))
    return MatrixForm(tuple(shape), tuple(range(last)), (last,), kernel_axes=window)


def chosen_rules(params: Any, rules: Any) -> dict[str, LowRank]:
    """The leaves that rules name and the rule of each, in the order of the tree.

    Args:
        params: any tree, or a selection.
        rules: one :class:`LowRank` for all leaves that are compressed by default, or
            ``{path pattern: LowRank or None}``.

    Returns:
        By path.

    Raises:
        TypeError: a rule is none.
        ValueError: a pattern matches nothing; no rule is left; a leaf cannot be factorized.

    Example:
        >>> params = {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}
        >>> chosen_rules(params, {"*": LowRank(2)})
        {'kernel': LowRank(rank=2, energy=None, split='matrix')}
    """
    weights = tree_lib.select(params, check=False)
    table = rules if isinstance(rules, Mapping) else {"*": rules}
    if not table:
        raise ValueError("rules is empty: {'*': LowRank(rank=8)} is for every weight")
    for pattern, rule in table.items():
        if rule is not None and not isinstance(rule, LowRank):
            raise TypeError(
                f"rule '{pattern}' must be a LowRank or None, such as LowRank(rank=8), not "
                f"{rule!r:.60}"
            )
        named = tree_lib.matching(pattern, tree_lib.flatten(params))
        if named and not tree_lib.matching(pattern, weights):
            raise ValueError(
                f"pattern '{pattern}' matches only leaves that are not compressed by default "
                f"({named[0]}): aim it at matrices, kernels or embeddings"
            )
    assigned = tree_lib.assign(table, weights)
    found = {path: table[assigned[path]] for path in weights if path in assigned}
    found = {path: rule for path, rule in found.items() if rule is not None}
    if not found:
        raise ValueError("every rule is None: there is nothing to factorize")
    for path in found:
        tree_lib.check_weight(path, weights[path])
    return found


def describe(rule: LowRank) -> str:
    """A rule in words.

    Example:
        >>> describe(LowRank(8)), describe(LowRank(energy=0.9, split="spatial"))
        ('rank 8', 'energy 0.9, spatial')
    """
    words = f"rank {rule.rank}" if rule.energy is None else f"energy {rule.energy:g}"
    return words if rule.split == "matrix" else f"{words}, {rule.split}"
