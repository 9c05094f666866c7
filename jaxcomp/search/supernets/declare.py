"""From a user's patterns to parts of a space and masks, each checked against the traced model."""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcomp import checks
from jaxcomp import tree as tree_lib
from jaxcomp.model.couple import ChannelGroup, Coupling
from jaxcomp.model.program import Program, Value
from jaxcomp.search.supernets.branches import check_branch, matched
from jaxcomp.search.supernets.edit import kernel_axes
from jaxcomp.search.supernets.masks import Mask, Part, along, centred

# By part, for each place in its order, the leaves that a branch names.
Branches = dict[Part, tuple[tuple[str, ...], ...]]


def widths(
    coupling: Coupling, patterns: Any, ranks: Mapping[str, np.ndarray]
) -> dict[Part, list[Mask]]:
    """Parts of the widths that patterns name.

    Args:
        coupling: of the model.
        patterns: by pattern of groups, how much of each may be kept: counts, or fractions.
        ranks: by group, from the first unit to go in to the last, (units,) from 0.

    Returns:
        By part, its masks.

    Raises:
        TypeError: an option is no number.
        ValueError: a pattern names no group that can be cut, or an option does not fit it.
    """
    free = {group.name: group for group in coupling.groups if group.fixed is None}
    leaves = coupling.program.leaves
    found: dict[str, tuple[str, Any]] = {}
    for pattern, options in _mapping("width", patterns).items():
        names = [name for name, group in free.items() if _names(pattern, group, leaves)]
        if not names:
            raise ValueError(_no_group(pattern, coupling, free))
        for name in names:
            found.setdefault(name, (pattern, options))
    parts = {}
    for name, (pattern, options) in found.items():
        group = free[name]
        counts = [_count(pattern, option, group) for option in _options(pattern, options)]
        part = Part("width", name, tuple(sorted(set(counts))))
        parts[part] = _width_masks(part, group, ranks, coupling.program)
    return parts


def _names(pattern: str, group: ChannelGroup, leaves: Mapping[str, Value]) -> bool:
    """Whether a pattern names a group, a slice of it, or a leaf that makes its channels."""
    literal = pattern.replace("[", "[[]")
    rank = {piece.path: len(leaves[piece.path].shape) for piece in group.slices}
    first = group.slices[0]
    names = {group.name, first.path}
    if "[" in pattern:
        names |= {f"{piece.path}[{piece.axis}]" for piece in group.slices}
    # Where the first leaf makes them on its last axis, others make them on theirs.
    last = first.axis - rank[first.path]
    names |= {piece.path for piece in group.slices if piece.axis - rank[piece.path] == last}
    return any(fnmatch.fnmatchcase(name, each) for name in names for each in (literal, pattern))


def _no_group(pattern: str, coupling: Coupling, free: Mapping[str, Any]) -> str:
    leaves = coupling.program.leaves
    fixed = [g for g in coupling.groups if g.fixed and _names(pattern, g, leaves)]
    if fixed:
        reasons = "; ".join(f"{group.name} {group.fixed}" for group in fixed)
        others = f"name some of {', '.join(list(free)[:4])}" if free else "give depth= or kernel="
        return (
            f"width: pattern '{pattern}' names only channels that cannot be cut: {reasons}: "
            f"{others} instead"
        )
    near = tree_lib.nearest(pattern, free) if free else "none can be cut"
    return f"width: pattern '{pattern}' names no group of channels; {near}"


def _count(pattern: str, option: Any, group: ChannelGroup) -> int:
    if isinstance(option, (float, np.floating)):
        if not 0 < option <= 1:
            raise ValueError(f"width: '{pattern}': {option!r} is no fraction: above 0, at most 1")
        return max(1, math.ceil(float(option) * group.size - 1e-9))
    checks.check_count(f"width: '{pattern}'", option)
    if option > group.size:
        raise ValueError(f"width: '{pattern}': {group.name} has {group.size} units, not {option}")
    return int(option)


def _width_masks(
    part: Part,
    group: ChannelGroup,
    ranks: Mapping[str, np.ndarray],
    program: Program,
) -> list[Mask]:
    masks = []
    for piece in group.slices:
        shape = program.leaves[piece.path].shape
        least = np.ones(shape[piece.axis], np.int32)
        least[piece.positions] = (ranks[group.name] + 1)[:, None]
        masks.append(Mask(part, piece.path, along(piece.axis, len(shape), least)))
    return masks


def unit_ranks(groups: Sequence[ChannelGroup], params: Any, order: str) -> dict[str, np.ndarray]:
    """In which order the units of each group go in.

    Args:
        groups: of the model.
        params: its parameters.
        order: ``"first"`` or ``"l1"``, as of :func:`~jaxcomp.search.supernet`.

    Returns:
        By group, (units,) ranks from 0.
    """
    if order == "first":
        return {group.name: np.arange(group.size) for group in groups}
    leaves = tree_lib.flatten(params, is_leaf=lambda _: False)
    ranks = {}
    for group in groups:
        norms = np.zeros(group.size)
        for piece in group.slices:
            leaf = leaves[piece.path]
            if tree_lib.is_weight(piece.path, leaf):
                sizes = np.abs(np.moveaxis(np.asarray(leaf, np.float64), piece.axis, 0))
                along_axis = sizes.reshape(len(sizes), -1).sum(1)
                norms += along_axis[piece.positions].sum(1)
        ranks[group.name] = np.argsort(np.argsort(-norms, kind="stable"), kind="stable")
    return ranks


def kernels(programs: Sequence[Program], patterns: Any) -> dict[Part, list[Mask]]:
    """Parts of the kernel sizes that patterns name.

    Args:
        programs: the model, and other functions of the same parameters.
        patterns: by pattern of leaves, heights and widths; of the leaves, those of fewer than three
            axes do not count.

    Returns:
        By part, its mask.

    Raises:
        TypeError: a size is no whole number.
        ValueError: a pattern matches no leaf, no kernel that can be cut, or a size has no centre
            in the kernel.
    """
    patterns, program = _mapping("kernel", patterns), programs[0]
    try:
        assigned = tree_lib.assign(patterns, program.leaves)
    except ValueError as error:
        raise ValueError(f"kernel: {error}") from None
    # Biases go by the names of their layers too; a convolution's kernel has three axes or more.
    could_be = lambda path: len(program.leaves[path].shape) >= 3
    useful = {pattern for path, pattern in assigned.items() if could_be(path)}
    parts: dict[Part, list[Mask]] = {}
    for path, pattern in assigned.items():
        if pattern in useful and not could_be(path):
            continue
        shape, axes = program.leaves[path].shape, kernel_axes(program, path)
        for other in programs[1:]:
            kernel_axes(other, path)
        for size in (sizes := _options(pattern, patterns[pattern])):
            checks.check_count(f"kernel: '{pattern}'", size)
            largest = max(shape[axis] for axis in axes)
            odd = [shape[axis] for axis in axes if shape[axis] > size and (shape[axis] - size) % 2]
            if size > largest:
                raise ValueError(f"kernel: {path} has a kernel of size {largest}, not {size}")
            if odd:
                raise ValueError(
                    f"kernel: {path}: {size} positions have no centre among {odd[0]}: give "
                    f"{'odd' if odd[0] % 2 else 'even'} sizes"
                )
        part = Part("kernel", path, tuple(sorted({int(size) for size in sizes})))
        parts[part] = [Mask(part, path, centred(shape, axes))]
    return parts


def branches(
    programs: Sequence[Program], depth: Any, connections: Any
) -> tuple[Branches, list[Mask]]:
    """Parts of the branches that can be left out.

    Args:
        programs: the model, and other functions of the same parameters.
        depth: by name of a stage, its branches in order, each one or several patterns of leaves.
        connections: by name of a branch, one or several patterns of leaves.

    Returns:
        By part, the leaves of each branch; and all masks.

    Raises:
        TypeError: they are no patterns.
        ValueError: a pattern matches no leaf, or something is left of a branch without its leaves.
    """
    leaves = programs[0].leaves
    found: Branches = {}
    for stage, given in _mapping("depth", depth).items():
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise TypeError(
                f"depth: '{stage}' must be a list of its branches in order, each one or several "
                f"patterns of leaves, not {given!r:.60}"
            )
        part = Part("depth", stage, tuple(range(len(given) + 1)))
        found[part] = tuple(
            matched(patterns, leaves, f"depth: {stage}, branch {i}")
            for i, patterns in enumerate(given)
        )
    for name, patterns in _mapping("connections", connections).items():
        part = Part("connections", name, (False, True))
        found[part] = (matched(patterns, leaves, f"connections: {name}"),)
    masks = []
    for part, each in found.items():
        for i, paths in enumerate(each):
            where = f", branch {i}" if part.kind == "depth" else ""
            for program in programs:
                check_branch(program, paths, f"{part.kind}: {part.name}{where}")
            masks += [Mask(part, path, np.asarray(i + 1, np.int32)) for path in paths]
    return found, masks


def _mapping(kind: str, given: Any) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"{kind} must be a mapping of strings, not {given!r:.60}")
    return given


def _options(pattern: str, options: Any) -> tuple[Any, ...]:
    if isinstance(options, str) or not isinstance(options, (Sequence, np.ndarray)):
        raise TypeError(f"'{pattern}': options must be a sequence of numbers, not {options!r:.60}")
    if not len(options):
        raise ValueError(f"'{pattern}': there are no options: give at least one")
    return tuple(options)
