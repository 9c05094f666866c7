"""Which parameter an array in another tree belongs to: momenta, masks, gradients, averages.

Such a tree repeats the parameters' structure somewhere inside its own. Two kinds of evidence count:
a node whose leaves are, path by path and shape by shape, those of the parameters or of a subtree of
them; and a path that ends in a parameter's path. The longer common ending wins, structure decides
between equals, and what is left open is left open: nothing is matched on a guess.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Parts = tuple[str, ...]
Shape = tuple[int, ...]


class Parameter(NamedTuple):
    """A leaf of the parameters.

    Attributes:
        path: its path.
        shape: its shape.
        kept: for each axis the positions that stay, or None for all.
        dtype: its dtype, where it is known.
    """

    path: str
    shape: Shape
    kept: tuple[Any, ...]
    dtype: Any = None

    @property
    def is_cut(self) -> bool:
        """Whether any axis loses positions."""
        return any(positions is not None for positions in self.kept)


class Entry(NamedTuple):
    """A leaf of another tree.

    Attributes:
        parts: its path, split.
        shape: its shape; None for a placeholder, which stands for a subtree of any kind; ``()`` for
            what is not an array.
        optional: whether a placeholder may also stand for nothing.
    """

    parts: Parts
    shape: Shape | None
    optional: bool = False


class Index(NamedTuple):
    """Parameters, ready to be looked up.

    Attributes:
        endings: parameters by every ending of their path.
        subtrees: by every beginning of a path, the parameters below it, by the rest of theirs.
        signatures: beginnings by the paths and shapes below them.
    """

    endings: dict[Parts, list[Parameter]]
    subtrees: dict[Parts, dict[Parts, Parameter]]
    signatures: dict[frozenset[tuple[Parts, Shape]], list[Parts]]


def split(path: str) -> Parts:
    """A path as a tuple of names.

    Example:
        >>> split("params/Dense_0/kernel")
        ('params', 'Dense_0', 'kernel')
    """
    return tuple(path.split("/"))


def index(parameters: Sequence[Parameter]) -> Index:
    """Make parameters ready to be looked up.

    Example:
        >>> found = index([Parameter("a/kernel", (2, 3), (None, None))])
        >>> sorted(found.subtrees), sorted(found.endings)
        ([(), ('a',)], [('a', 'kernel'), ('kernel',)])
    """
    endings: dict[Parts, list[Parameter]] = defaultdict(list)
    subtrees: dict[Parts, dict[Parts, Parameter]] = defaultdict(dict)
    for parameter in parameters:
        parts = split(parameter.path)
        for i in range(len(parts)):
            endings[parts[i:]].append(parameter)
            subtrees[parts[:i]][parts[i:]] = parameter
    signatures: dict[frozenset[tuple[Parts, Shape]], list[Parts]] = defaultdict(list)
    for beginning, leaves in subtrees.items():
        key = frozenset((rest, parameter.shape) for rest, parameter in leaves.items())
        signatures[key].append(beginning)
    return Index(dict(endings), dict(subtrees), dict(signatures))


def candidates(found: Index, entries: Sequence[Entry]) -> list[list[Parameter]]:
    """The parameters that each leaf of another tree may belong to.

    Args:
        found: the parameters.
        entries: all leaves of the other tree, in order.

    Returns:
        A list for each entry: empty where there is no evidence, several where it does not decide.
        Their shapes may differ from the entry's, which then is a statistic of the parameter.

    Example:
        >>> found = index([Parameter("params/a/kernel", (2, 3), (None, None))])
        >>> momentum, count = Entry(("0", "mu", "a", "kernel"), (2, 3)), Entry(("0", "count"), ())
        >>> [[p.path for p in each] for each in candidates(found, [momentum, count])]
        [['params/a/kernel'], []]
    """
    below: dict[Parts, list[Entry]] = defaultdict(list)
    for entry in entries:
        for i in range(len(entry.parts)):
            below[entry.parts[:i]].append(entry)
    covered = {node: _covered(found, node, inside) for node, inside in below.items()}
    return [_of_entry(found, entry, below, covered) for entry in entries]


def _of_entry(
    found: Index,
    entry: Entry,
    below: Mapping[Parts, list[Entry]],
    covered: Mapping[Parts, list[Parts]],
) -> list[Parameter]:
    parts = entry.parts
    if not entry.shape:
        return []
    ending = next((parts[i:] for i in range(len(parts)) if parts[i:] in found.endings), ())
    nearest = found.endings.get(ending, [])
    structural, whole = _by_structure(found, parts, covered)
    if whole:
        return structural
    paths = {parameter.path for parameter in structural}
    both = [p for p in nearest if p.path in paths]
    # A whole path is as good as structure; without structure, all but a collection's name will do.
    missing = 1 if not structural and len(ending) > 1 else 0
    short = [p for p in nearest if len(split(p.path)) <= len(ending) + missing]
    if structural and not both:
        return structural + short
    evident = both + [p for p in short if p.path not in paths]
    same = [p for p in evident if p.shape == entry.shape]
    if len(same) > 1:
        # Leaves side by side are of one subtree: leave out those that their neighbours are not in.
        node = parts[: len(parts) - len(ending)]
        fitting = [p for p in same if _holds(found, split(p.path), ending, node, below[node])]
        return fitting or same
    return same or evident


def _by_structure(
    found: Index, parts: Parts, covered: Mapping[Parts, list[Parts]]
) -> tuple[list[Parameter], bool]:
    """What the highest node above a leaf that repeats parameters says; whether it repeats all."""
    for i in range(len(parts)):
        if nodes := covered[parts[:i]]:
            rest = parts[i:]
            leaves = [found.subtrees[node][rest] for node in nodes if rest in found.subtrees[node]]
            return leaves, nodes == [()]
    return [], False


def _holds(found: Index, parts: Parts, ending: Parts, node: Parts, inside: Sequence[Entry]) -> bool:
    """Whether every array in a node has its like in the subtree that a parameter suggests."""
    leaves = found.subtrees[parts[: len(parts) - len(ending)]]
    rests = ((entry.parts[len(node) :], entry.shape) for entry in inside if entry.shape)
    return all(rest in leaves and leaves[rest].shape == shape for rest, shape in rests)


def _covered(found: Index, node: Parts, inside: Sequence[Entry]) -> list[Parts]:
    """The subtrees of the parameters that a node repeats, leaf by leaf."""
    arrays = {entry.parts[len(node) :]: entry.shape for entry in inside if entry.shape is not None}
    absent = [entry for entry in inside if entry.shape is None]
    gaps = [entry.parts[len(node) :] for entry in absent]
    needed = [entry.parts[len(node) :] for entry in absent if not entry.optional]
    if not arrays:
        return []
    exact = found.signatures.get(frozenset(arrays.items()), [])  # type: ignore[arg-type]
    if not gaps or (exact and not needed):
        return exact

    def fits(leaves: Mapping[Parts, Parameter]) -> bool:
        if any(rest not in leaves or leaves[rest].shape != s for rest, s in arrays.items()):
            return False
        missing = [rest for rest in leaves if rest not in arrays]
        return all(any(rest[: len(gap)] == gap for gap in gaps) for rest in missing) and all(
            any(rest[: len(gap)] == gap for rest in missing) for gap in needed
        )

    return [beginning for beginning, leaves in found.subtrees.items() if fits(leaves)]
