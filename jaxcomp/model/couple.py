"""Which slices of which leaves must go together: the dependency graph of channels."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcomp.model.axes import Flow
from jaxcomp.model.dims import Dim, Dims, atoms, describe, find, positions
from jaxcomp.model.flow import follow
from jaxcomp.model.law import Widths, hold
from jaxcomp.model.program import Program, read, walk

OUTPUT = "is an axis of the model's outputs"
UNUSED = "is not used by apply_fn: give the function that uses it in `also`"


class Slice(NamedTuple):
    """What a group takes of one axis of one leaf.

    Attributes:
        path: the leaf.
        axis: the axis.
        positions: ``(units, k)`` int64: the ``k`` positions that go with each unit.
        reason: the operations that tie this axis to the group's first one, in order.
    """

    path: str
    axis: int
    positions: np.ndarray
    reason: str


class ChannelGroup(NamedTuple):
    """Channels that can only be removed together.

    Attributes:
        name: the first leaf and axis that it cuts, such as ``params/Conv_0/kernel[3]``.
        size: how many units there are to remove.
        slices: what goes with them.
        fixed: why nothing can be removed; ``None`` if it can.
        note: what removal changes besides dropping channels, where ``renormalize`` allowed that.
    """

    name: str
    size: int
    slices: tuple[Slice, ...]
    fixed: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        state = f"kept: {self.fixed}" if self.fixed else self.note or "can be cut"
        lines = [f"{self.name}: {self.size} channels, {state}"]
        for path, axis, where, reason in self.slices:
            each = "" if where.shape[1] == 1 else f", {where.shape[1]} positions each"
            lines.append(f"  {path} axis {axis}{each}{': ' if reason else ''}{reason}")
        return "\n".join(lines)


class Coupling(NamedTuple):
    """A program with its channels.

    Attributes:
        program: the traced function.
        flow: the axes of its arrays.
        widths: statistics over channels that may still be cut.
        groups: the groups of channels, free ones and fixed ones.
        units: the atom of each group, by its name.
    """

    program: Program
    flow: Flow
    widths: Widths
    groups: tuple[ChannelGroup, ...]
    units: dict[str, Dim]


def couple(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    also: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]] = (),
    renormalize: bool = False,
) -> tuple[ChannelGroup, ...]:
    r"""Find which slices of which leaves must be removed together.

    Read from the data flow of the traced function, so for any model: nothing is called by name.
    What cannot be followed is fixed, with the operation named; so are the axes of the model's
    inputs and outputs, and widths that a mean, a maximum or a softmax is taken over.

    Args:
        apply_fn: the model as a function of ``(params, *inputs)``; the one that is used for
            inference, since whatever it returns keeps its shape.
        params: its parameters, and statistics such as ``batch_stats`` if it takes them; arrays or
            ``jax.ShapeDtypeStruct``.
        *inputs: further inputs, of any batch size; arrays or ``jax.ShapeDtypeStruct``.
        also: other functions of the same parameters, each with its inputs, that must run on the
            smaller ones too, such as a training step's forward pass: what they tie is tied. Their
            outputs may shrink.
        renormalize: leave widths free that a mean or maximum is taken over. Removing such channels
            changes the statistic; the group's ``note`` says so.

    Returns:
        The groups in the order of the leaves; ``fixed`` says which cannot be cut and why.

    Raises:
        TypeError: ``apply_fn`` is not callable, or a leaf of ``params`` is not an array.
        ValueError: ``params`` has no leaves.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> def mlp(p, x):
        ...     return jax.nn.relu(x @ p["w0"] + p["b0"]) @ p["w1"]
        >>> params = {"w0": jnp.ones((3, 8)), "b0": jnp.ones(8), "w1": jnp.ones((8, 2))}
        >>> groups = couple(mlp, params, jnp.ones((1, 3)))
        >>> print(*(group for group in groups if not group.fixed), sep="\n")
        w0[1]: 8 channels, can be cut
          w0 axis 1
          w1 axis 0: custom_jvp_call, dot_general
          b0 axis 0: add
    """
    others = [read(function, params, *given) for function, given in also]
    return analyse(read(apply_fn, params, *inputs), others, renormalize).groups


def analyse(
    program: Program, others: Sequence[Program] = (), renormalize: bool = False
) -> Coupling:
    """The coupling of programs that were read already.

    Args:
        program: the traced model.
        others: other functions of the same parameters.
        renormalize: as in :func:`couple`.

    Returns:
        The program, its axes and its groups.
    """
    flow = follow(program, others)
    for value in program.block.outputs:
        flow.fix(flow.of(value), OUTPUT)
    _fix_unused(flow, (program, *others))
    held = [hold(flow, each, renormalize) for each in (program, *others)]
    widths = Widths(
        {op: axes for each in held for op, axes in each.means.items()},
        {atom: note for each in reversed(held) for atom, note in each.renormalized.items()},
    )
    groups, units = _groups(program, flow, widths)
    return Coupling(program, flow, widths, groups, units)


def _fix_unused(flow: Flow, programs: Sequence[Program]) -> None:
    """A leaf that no function reads goes with others that nobody knows."""
    used = {
        value
        for program in programs
        for op in walk(program.block)
        for value in (*op.inputs, *(out for block in op.blocks for out in block.outputs))
    }
    for program in programs:
        used.update(program.block.outputs)
    for values in zip(*(program.leaves.values() for program in programs), strict=True):
        if not used.intersection(values):
            flow.fix(flow.of(values[0]), UNUSED)


def _groups(
    program: Program, flow: Flow, widths: Widths
) -> tuple[tuple[ChannelGroup, ...], dict[str, Dim]]:
    members: dict[Dim, list[tuple[str, int, Dim]]] = {}
    for path, value in program.leaves.items():
        for axis, dim in enumerate(flow.of(value)):
            for atom in dict.fromkeys(atoms(dim)):
                if atom.size > 1:
                    members.setdefault(atom, []).append((path, axis, dim))
    reasons = _Reasons(flow.dims)
    ranks = {path: len(value.shape) for path, value in program.leaves.items()}
    groups, units = [], {}
    for atom, axes in members.items():
        # The leaf that makes the channels names the group: all of an axis, of the largest leaf.
        axes = sorted(
            axes, key=lambda member: (find(member[2]) is not atom, -ranks[member[0]], -member[1])
        )
        path, axis, dim = axes[0]
        name = f"{path}[{axis}]"
        if find(dim) is not atom:
            order = list(dict.fromkeys(atoms(dim))).index(atom)
            name += f".{order} of {describe(dim)}"
        slices = tuple(
            Slice(path, axis, positions(dim, atom), reason)
            for (path, axis, dim), reason in zip(axes, reasons.chains(atom, axes), strict=True)
        )
        note = widths.renormalized.get(atom)
        groups.append(ChannelGroup(name, atom.size, slices, atom.fixed, note))
        units[name] = atom
    return tuple(groups), units


class _Reasons:
    """The chains of operations behind the groups."""

    def __init__(self, dims: Dims) -> None:
        # Every axis that was ever united with another, by the atoms that it holds now.
        self.edges: dict[Dim, dict[Dim, list[tuple[Dim, str]]]] = {}
        for first, second, reason in dims.ties:
            for atom in set(atoms(first)) & set(atoms(second)):
                graph = self.edges.setdefault(atom, {})
                graph.setdefault(first, []).append((second, reason))
                graph.setdefault(second, []).append((first, reason))
                # A concatenation or product is met again through its pieces.
                for dim in (first, second):
                    for piece in dim.factors or dim.parts:
                        if atom in set(atoms(piece)):
                            graph.setdefault(dim, []).append((piece, ""))
                            graph.setdefault(piece, []).append((dim, ""))

    def chains(self, atom: Dim, axes: list[tuple[str, int, Dim]]) -> Iterator[str]:
        """For each axis, the operations from the first axis to it; empty for the first."""
        graph = self.edges.get(atom, {})
        start = axes[0][2]
        came: dict[Dim, tuple[Dim, str] | None] = {start: None}
        queue = deque([start])
        while queue:
            dim = queue.popleft()
            for neighbour, reason in graph.get(dim, ()):
                if neighbour not in came:
                    came[neighbour] = (dim, reason)
                    queue.append(neighbour)
        for i, (_, _, dim) in enumerate(axes):
            yield "" if i == 0 else ", ".join(_chain(came, dim)) or "the same axis"


def _chain(came: dict[Dim, tuple[Dim, str] | None], dim: Dim) -> list[str]:
    words: list[str] = []
    step = came.get(dim)
    while step is not None:
        dim, reason = step
        if reason and (not words or words[-1] != reason):
            words.append(reason)
        step = came[dim]
    return words[::-1]
