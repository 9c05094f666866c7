"""What sub-networks cost: one exactly, and a mixture of them in expectation, differentiably."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcomp.model.couple import Coupling
from jaxcomp.model.dims import Dim, atoms
from jaxcomp.model.program import Op, Program, Value, walk
from jaxcomp.model.removed import Size
from jaxcomp.model.rewrite import smaller_shapes
from jaxcomp.model.tally import Tally
from jaxcomp.search.supernets.edit import Edited, edit, needed
from jaxcomp.search.supernets.masks import Part

MOST_ENTRIES = 100_000


class Costing(NamedTuple):
    """What costs depend on.

    Attributes:
        coupling: of the model, without rematerialization.
        atoms: by part, the channels whose number it is.
        kernels: by part, the leaf whose size it is.
        branches: by part, for each place in its order, the leaves that a branch names.
    """

    coupling: Coupling
    atoms: Mapping[Part, Dim]
    kernels: Mapping[Part, str]
    branches: Mapping[Part, tuple[tuple[str, ...], ...]]


class Table(NamedTuple):
    """What some operations and leaves cost, by all that it depends on.

    Attributes:
        parts: that it depends on.
        costs: ``(options of each part, ..., 4)``: MACs, FLOPs, parameters, bytes.
    """

    parts: tuple[Part, ...]
    costs: np.ndarray


def cut_program(costing: Costing, values: Mapping[Part, int]) -> Edited:
    """The program of a candidate, with all its channels still.

    Args:
        costing: of the supernet.
        values: by part.
    """
    zeros = zero_leaves(costing, values)
    program = costing.coupling.program
    left = needed(edit(program, {}, zeros).program) if zeros else set(program.leaves)
    sizes = {path: values[part] for part, path in costing.kernels.items() if path in left}
    return edit(program, sizes, zeros)


def zero_leaves(costing: Costing, values: Mapping[Part, int]) -> tuple[str, ...]:
    """The leaves of the branches that a candidate leaves out."""
    return tuple(
        dict.fromkeys(
            path
            for part, each in costing.branches.items()
            for paths in each[int(values[part]) :]
            for path in paths
        )
    )


def gone_leaves(costing: Costing, edited: Edited, zeros: Sequence[str]) -> tuple[str, ...]:
    """The leaves that nothing needs any more; those that nothing ever needed stay."""
    program = costing.coupling.program
    gone = (needed(program) - needed(edited.program)) | set(zeros)
    return tuple(path for path in program.leaves if path in gone)


def size_of(costing: Costing, values: Mapping[Part, int]) -> Size:
    """What a candidate is and costs; nothing is traced.

    Args:
        costing: of the supernet.
        values: by part.

    Returns:
        Its size.
    """
    edited = cut_program(costing, values)
    gone = gone_leaves(costing, edited, zero_leaves(costing, values))
    shape = _shapes(costing, edited.origins, values)
    cost = Tally(shape).block(edited.program.block)
    leaves = [value for path, value in edited.program.leaves.items() if path not in gone]
    counts = [math.prod(shape(value)) for value in leaves]
    sizes = [getattr(value.dtype, "itemsize", 0) for value in leaves]
    total = sum(count * size for count, size in zip(counts, sizes, strict=True))
    return Size(cost.macs, cost.flops, sum(counts), total)


def _shapes(
    costing: Costing, origins: Mapping[Value, Value], values: Mapping[Part, int]
) -> Callable[[Value], tuple[int, ...]]:
    """The shape of each value of an edited program once channels are gone."""
    keep = {
        atom: np.arange(atom.size) < values[part]
        for part, atom in costing.atoms.items()
        if part in values
    }
    channels = smaller_shapes(costing.coupling, keep)

    def shape(value: Value) -> tuple[int, ...]:
        if value not in origins:
            return channels(value)
        old = origins[value]
        triples = zip(channels(old), value.shape, old.shape, strict=True)
        return tuple(new if new != whole else size for size, new, whole in triples)

    return shape


def expected(tables: Sequence[Table], weights: Any) -> Size:
    """What is costed on average where options are drawn with given probabilities.

    Args:
        tables: of :func:`tabulate`.
        weights: by kind and name, (options,) that sum to one.

    Returns:
        The expectation; differentiable. A candidate's own cost where every part's weight is on one
        option.

    Example:
        >>> part = Part("width", "kernel", (1, 2))
        >>> table = Table((part,), np.array([[1.0, 2.0, 1.0, 4.0], [2.0, 4.0, 2.0, 8.0]]))
        >>> expected([table], {"width": {"kernel": jnp.array([0.5, 0.5])}}).flops
        Array(3., dtype=float32)
    """
    total: Any = np.zeros(len(Size._fields))
    for table in tables:
        costs = jnp.asarray(table.costs, jnp.result_type(float))
        for part in table.parts:
            costs = jnp.tensordot(jnp.asarray(part.of(weights), costs.dtype), costs, 1)
        total = total + costs
    return Size(*total)


def tabulate(costing: Costing) -> tuple[Table, ...]:
    """Take the cost of a supernet apart, by what each operation and leaf depends on.

    Args:
        costing: of the supernet.

    Returns:
        Tables, whose sum is the cost.

    Raises:
        ValueError: an operation depends on so many parts at once that a table of it is too large.
    """
    return _Tabulator(costing).tables()


class _Tabulator:
    """Costs of operations and leaves one by one; each is asked for what it depends on only."""

    def __init__(self, costing: Costing) -> None:
        self.costing = costing
        self.program: Program = costing.coupling.program
        self.full = {part: max(part.options)
                     for part in (*costing.atoms, *costing.kernels, *costing.branches)}  # fmt: skip
        self.numbers = {atom: part for part, atom in costing.atoms.items()}
        self.carried = self._carried()
        self.versions: dict[tuple[int, ...], _Version] = {}
        self.shape: Callable[[Value], tuple[int, ...]] = lambda value: value.shape
        self.tally = Tally(lambda value: self.shape(value))
        # Which numbers the program spells out does not depend on its shapes.
        self.tally.block(self.program.block)

    def tables(self) -> tuple[Table, ...]:
        found: dict[tuple[Part, ...], np.ndarray] = {}
        items: list[Item] = [*self.program.block.ops, *self.program.leaves]
        uses = self._branches(items)
        for item in items:
            sized = self._ordered({*self._widths(item), *self._kernels(item)})
            optional = self._ordered(uses[item])
            shape = tuple(len(part.options) for part in (*sized, *optional))
            if math.prod(shape) > MOST_ENTRIES:
                names = ", ".join(part.name for part in (*sized, *optional))
                raise ValueError(
                    f"expected_cost: {item} depends on {len(shape)} parts at once, which has "
                    f"{math.prod(shape):,} combinations: make fewer of these elastic: {names}"
                )
            costs = np.array([self._cost(item, values) for values in _combinations(sized)], float)
            there = [self._there(item, self._version(v)) for v in _combinations(optional)]
            costs = costs[:, None, :] * np.array(there, float)[:, None]
            parts = (*sized, *optional)
            found[parts] = found.get(parts, 0.0) + costs.reshape((*shape, len(Size._fields)))
        return tuple(Table(parts, costs) for parts, costs in found.items())

    def _ordered(self, parts: set[Part]) -> tuple[Part, ...]:
        return tuple(part for part in self.full if part in parts)

    def _cost(self, item: "Item", values: dict[Part, int]) -> tuple[float, ...]:
        """The cost where no branch is left out."""
        version = self._version({p: v for p, v in values.items() if p in self.costing.kernels})
        self.shape = _shapes(self.costing, version.edited.origins, values)
        if isinstance(item, str):
            leaf = version.edited.program.leaves[item]
            count = math.prod(self.shape(leaf))
            return (0, 0, count, count * getattr(leaf.dtype, "itemsize", 0))
        if item not in version.ops:
            return (0, 0, 0, 0)
        cost = self.tally.op(version.ops[item])
        return (cost.macs, cost.flops, 0, 0)

    def _version(self, values: Mapping[Part, int]) -> "_Version":
        """The program with some kernels cut and branches left out."""
        values = {**self.full, **values}
        key = tuple(value for part, value in values.items() if part not in self.costing.atoms)
        if key not in self.versions:
            edited = cut_program(self.costing, values)
            gone = gone_leaves(self.costing, edited, zero_leaves(self.costing, values))
            self.versions[key] = _Version(edited, dict(edited.pairs), frozenset(gone))
        return self.versions[key]

    def _branches(self, items: "Sequence[Item]") -> "dict[Item, set[Part]]":
        """The parts without whose branches an operation or a leaf is not there."""
        found: dict[Item, set[Part]] = {item: set() for item in items}
        for part in self.costing.branches:
            for count in part.options[:-1]:
                version = self._version({part: count})
                for item in items:
                    if not self._there(item, version):
                        found[item].add(part)
        for item, parts in found.items():
            others = {part: 0 for part in self.costing.branches if part not in parts}
            # What several branches share goes only with all of them.
            if any(
                self._there(item, self._version(values))
                != self._there(item, self._version({**values, **others}))
                for values in _combinations(self._ordered(parts))
            ):
                parts.update(others)
        return found

    def _there(self, item: "Item", version: "_Version") -> bool:
        return item not in version.gone if isinstance(item, str) else item in version.ops

    def _widths(self, item: "Item") -> set[Part]:
        if isinstance(item, str):
            values = [self.program.leaves[item]]
        else:
            values = [*item.inputs, *item.outputs]
            for block in item.blocks:
                values += [v for op in walk(block) for v in (*op.inputs, *op.outputs)]
        flow = self.costing.coupling.flow
        held = {atom for value in values for dim in flow.of(value) for atom in atoms(dim)}
        return {self.numbers[atom] for atom in held if atom in self.numbers}

    def _kernels(self, item: "Item") -> set[Part]:
        values = [self.program.leaves[item]] if isinstance(item, str) else item.inputs
        return {self.carried[value] for value in values if value in self.carried}

    def _carried(self) -> dict[Value, Part]:
        """By value, the kernel that it is or was made of."""
        found: dict[Value, Part] = {}
        for part, path in self.costing.kernels.items():
            edited = edit(self.program, {path: min(part.options)}, ())
            found |= dict.fromkeys(edited.origins.values(), part)
        return found


def _combinations(parts: tuple[Part, ...]) -> list[dict[Part, int]]:
    every = itertools.product(*(part.options for part in parts))
    return [dict(zip(parts, values, strict=True)) for values in every]


# An operation, or a leaf by its path.
Item = Op | str


class _Version(NamedTuple):
    """A program without some branches, with some kernel sizes."""

    edited: Edited
    ops: dict[Op, Op]
    gone: frozenset[str]
