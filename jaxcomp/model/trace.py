"""What a model does with each of its parameters, and what that costs.

FLOPs follow XLA's own count of the lowered program (:mod:`jaxcomp.model.cost` says how, and where
not); the differences that remain are of loops: XLA counts one turn of a ``scan``, here all turns
are counted; of a ``while`` both count one, since only the running program knows how many there are.
Like XLA, nothing is counted for adding or taking away a literal 0, or multiplying by a literal 1.
Of a ``cond`` both count the dearest branch. A ``shard_map`` is counted on all devices together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxcomp import columns
from jaxcomp import tree as tree_lib
from jaxcomp.model.cost import NOTHING, Cost
from jaxcomp.model.program import read
from jaxcomp.model.tally import Tally, cost_of
from jaxcomp.model.uses import Use, find_uses

# Which uses say what a leaf's axes are for, where it has several kinds.
_TELLING = (("dot", "conv", "gather"), ("elementwise",), ("other",))


class CostedUse(NamedTuple):
    """A use and its cost.

    Attributes:
        use: the use.
        cost: of the operation, times how often it runs; of one turn where that is not known. Each
            leaf in an operation is given the whole cost: costs of uses do not add up to a total.
    """

    use: Use
    cost: Cost


class TracedLeaf(NamedTuple):
    """A parameter leaf and its uses.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        uses: in the order of the program; empty if the outputs do not depend on it.
    """

    shape: tuple[int, ...]
    dtype: Any
    uses: tuple[CostedUse, ...]


@dataclass(frozen=True)
class ModelTrace:
    """What a model does with its parameters; ``print`` it for a table.

    Attributes:
        leaves: each parameter leaf by path, in the order of the tree.
        total: cost of the whole model, also of what no parameter takes part in.
        parameters: how many numbers the leaves hold.
        parameter_bytes: of the leaves as they are.
        uncounted: operations whose FLOPs are not known, and how many of each there are.
        notes: what the totals assume: unknown loops, branches.
    """

    leaves: dict[str, TracedLeaf]
    total: Cost
    parameters: int
    parameter_bytes: int
    uncounted: dict[str, int]
    notes: tuple[str, ...]

    @property
    def unused(self) -> tuple[str, ...]:
        """The leaves that the outputs do not depend on."""
        return tuple(path for path, leaf in self.leaves.items() if not leaf.uses)

    def input_axes(self, path: str) -> tuple[int, ...]:
        """The axes of a leaf that are contracted, or looked up.

        Args:
            path: of the leaf.

        Returns:
            Axes from 0; empty if there is none.

        Raises:
            ValueError: there is no such leaf, it has no use, or its uses disagree.
        """
        return self.axes(path, "input")

    def output_axes(self, path: str) -> tuple[int, ...]:
        """The axes of a leaf that its results keep; arguments as for :meth:`input_axes`."""
        return self.axes(path, "output")

    def axes(self, path: str, role: str) -> tuple[int, ...]:
        """The axes of a leaf that have a role.

        Dot products, convolutions and look-ups decide where there are any; then element-wise uses.

        Args:
            path: of the leaf.
            role: as in :class:`jaxcomp.model.uses.Use`.

        Returns:
            Axes from 0.

        Raises:
            ValueError: there is no such leaf, it has no use, or its uses disagree.

        Example:
            >>> import numpy as np
            >>> params = {"embedding": np.ones((9, 4), np.float32)}
            >>> def model(p, tokens):
            ...     return p["embedding"][tokens] @ p["embedding"].T
            >>> trace(model, params, np.zeros(3, int)).axes("embedding", "output")
            Traceback (most recent call last):
            ...
            ValueError: embedding: its uses disagree on the output axes: gather takes (1,),
            dot_general takes (0,); name the axes yourself
        """
        if path not in self.leaves:
            raise ValueError(f"no leaf '{path}'; {tree_lib.nearest(path, self.leaves)}")
        uses = [costed.use for costed in self.leaves[path].uses]
        if not uses:
            raise ValueError(f"{path}: the outputs do not depend on it, so its axes have no roles")
        telling = next(
            found for kinds in _TELLING if (found := [use for use in uses if use.kind in kinds])
        )
        answers: dict[tuple[int, ...], str] = {}
        for use in telling:
            found = tuple(axis for axis, word in enumerate(use.roles) if word == role)
            answers.setdefault(found, str(use.op))
        if len(answers) > 1:
            views = ", ".join(f"{op} takes {axes}" for axes, op in answers.items())
            raise ValueError(
                f"{path}: its uses disagree on the {role} axes: {views}; name the axes yourself"
            )
        return next(iter(answers))

    def __str__(self) -> str:
        return _table(self)


def trace(apply_fn: Callable[..., Any], params: Any, *inputs: Any) -> ModelTrace:
    """Read what a model does with each parameter, and what it costs; nothing is computed.

    Args:
        apply_fn: any function of a parameter tree and further inputs that ``jax.jit`` can trace.
            Data that it closes over counts as constant: pass it as an input.
        params: any pytree of arrays, or of ``jax.ShapeDtypeStruct``.
        *inputs: pytrees of the same.

    Returns:
        The trace.

    Raises:
        TypeError: ``apply_fn`` is not callable, or a leaf of ``params`` is not an array.
        ValueError: ``params`` has no leaves, or two with one path.

    Example:
        >>> import numpy as np
        >>> params = {"kernel": np.ones((8, 2), np.float32), "bias": np.ones(2, np.float32)}
        >>> def model(params, x):
        ...     return x @ params["kernel"] + params["bias"]
        >>> found = trace(model, params, np.ones((4, 8), np.float32))
        >>> found.input_axes("kernel"), found.output_axes("kernel"), found.total.flops
        ((0,), (1,), 136)
        >>> print(found)
        leaf    shape   operation    axes          times  FLOPs  MACs  bytes
        bias    (2)     add          output            1      8     0     72
        kernel  (8, 2)  dot_general  input output      1    128    64    224
        <BLANKLINE>
        FLOPs 136, MACs 64, transcendentals 0, bytes 312 (no operation fused with another)
        18 parameters, 72 bytes
    """
    program = read(apply_fn, params, *inputs)
    uses = find_uses(program)
    leaves = {
        path: TracedLeaf(
            value.shape,
            value.dtype,
            tuple(CostedUse(use, _use_cost(use)) for use in uses if use.path == path),
        )
        for path, value in program.leaves.items()
    }
    tally = Tally()
    total = tally.block(program.block)
    return ModelTrace(
        leaves=leaves,
        total=total,
        parameters=sum(math.prod(leaf.shape) for leaf in leaves.values()),
        parameter_bytes=sum(math.prod(v.shape) * v.dtype.itemsize for v in leaves.values()),
        uncounted=dict(sorted(tally.uncounted.items())),
        notes=tuple(dict.fromkeys(tally.notes)),
    )


def _use_cost(use: Use) -> Cost:
    if use.op.blocks or use.op.name == "output":
        return NOTHING
    return cost_of(use.op).times(1 if use.trips is None else use.trips)


_TITLES = ("leaf", "shape", "operation", "axes", "times", "FLOPs", "MACs", "bytes")


def _table(trace: ModelTrace) -> str:
    rows: list[Sequence[str]] = [_TITLES]
    for path, leaf in trace.leaves.items():
        shape = f"({', '.join(map(str, leaf.shape))})"
        for i, (use, cost) in enumerate(leaf.uses):
            times = "?" if use.trips is None else f"{use.trips:,}"
            numbers = (f"{n:,}" for n in (cost.flops, cost.macs, cost.bytes))
            first = (path, shape) if i == 0 else ("", "")
            rows.append((*first, use.op.name, " ".join(use.roles), times, *numbers))
        if not leaf.uses:
            rows.append((path, shape, "unused", "", "0", "0", "0", "0"))
    total = trace.total
    return "\n".join(
        [
            columns.table(rows, left=4),
            "",
            f"FLOPs {total.flops:,}, MACs {total.macs:,}, transcendentals "
            f"{total.transcendentals:,}, bytes {total.bytes:,} (no operation fused with another)",
            f"{trace.parameters:,} parameters, {trace.parameter_bytes:,} bytes",
            *(f"not counted: FLOPs of {name} ({n})" for name, n in trace.uncounted.items()),
            *trace.notes,
        ]
    )
