"""Where the positions of a parameter leaf have gone: the algebra under :mod:`jaxcomp.model.uses`.

An axis of an array is written as *digits*, slowest first, as in a number of mixed radix: a digit
of size ``n`` either walks along one axis of the leaf with some stride, or is foreign (a broadcast).
So a kernel ``(in, 32)`` reshaped to ``(in, 4, 8)`` keeps exact account of both factors, and so does
the slice of a fused weight. What cannot be followed becomes foreign, and the leaf's axis is marked.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

FOREIGN = -1
# Holds something of the leaf, but nobody knows where.
LOST = -2


class Digit(NamedTuple):
    """One factor of an array's axis.

    Attributes:
        size: how many steps it has.
        axis: the leaf's axis that it walks along; ``FOREIGN`` or ``LOST`` if none.
        stride: positions of that axis between two steps; negative where reversed.
        inside: for a digit that is a whole concatenated axis: what of it comes from the leaf.
        offset: where on this axis ``inside`` begins.
    """

    size: int
    axis: int = FOREIGN
    stride: int = 1
    inside: tuple["Digit", ...] = ()
    offset: int = 0


Axis = tuple[Digit, ...]


class Trail(NamedTuple):
    """How an array that is computed from parameters alone holds one leaf.

    Attributes:
        path: the leaf's path.
        shape: the leaf's shape.
        starts: the position on each leaf axis where all digits are at step 0.
        axes: each axis of the array in digits.
        stacked: digits that a loop walks, with the loop (or None: an index picked one).
        vague: leaf axes whose positions are not known, though what they become is.
        lost: leaf axes of which some part was reduced or mixed away.
    """

    path: str
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    axes: tuple[Axis, ...]
    stacked: tuple[tuple[int | None, Axis], ...] = ()
    vague: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()


def begin(path: str, shape: Sequence[int]) -> Trail:
    """The trail of the leaf itself.

    Example:
        >>> begin("kernel", (2, 3)).axes
        ((Digit(size=2, axis=0, stride=1, ...),), (Digit(size=3, axis=1, stride=1, ...),))
    """
    axes = tuple((Digit(size, axis),) for axis, size in enumerate(shape))
    return Trail(path, tuple(shape), (0,) * len(axes), axes)


def leaf_axes(digits: Iterable[Digit]) -> frozenset[int]:
    """The leaf's axes that some digits walk along."""
    found: set[int] = set()
    for digit in digits:
        found |= leaf_axes(digit.inside) | ({digit.axis} - {FOREIGN, LOST})
    return frozenset(found)


def holds_lost(digits: Iterable[Digit]) -> bool:
    """Whether some digit holds the leaf in an unknown way."""
    return any((d.axis == LOST and d.size > 1) or holds_lost(d.inside) for d in digits)


def length(digits: Iterable[Digit]) -> int:
    """The size of the axis that the digits make."""
    return math.prod(digit.size for digit in digits)


def foreign(size: int) -> Axis:
    """An axis on which nothing of the leaf lies."""
    return (Digit(size),)


def lost(size: int) -> Axis:
    """An axis on which the leaf lies in an unknown way."""
    return (Digit(size, LOST),)


def merge_digits(digits: Iterable[Digit]) -> Axis:
    """The same axis in as few digits as possible."""
    result: list[Digit] = []
    for digit in digits:
        last = result[-1] if result else None
        if last is None or last.inside or digit.inside or last.axis != digit.axis:
            result.append(digit)
        elif digit.axis < 0 or last.stride == digit.size * digit.stride:
            result[-1] = digit._replace(size=last.size * digit.size)
        else:
            result.append(digit)
    return tuple(result)


def drop(trail: Trail, digits: Iterable[Digit]) -> Trail:
    """Note that some digits are gone: one position was picked, or all of them were mixed."""
    digits = tuple(digits)
    picked = tuple(d for d in digits if d.axis >= 0 and d.size == 1 < trail.shape[d.axis])
    mixed = leaf_axes(d for d in digits if d.size > 1)
    stacked = (*trail.stacked, (None, picked)) if picked else trail.stacked
    return trail._replace(stacked=stacked, lost=trail.lost | mixed)


def permute(trail: Trail, order: Sequence[int]) -> Trail:
    """The trail after a transpose."""
    return trail._replace(axes=tuple(trail.axes[i] for i in order))


def remove(trail: Trail, gone: Iterable[int]) -> Trail:
    """The trail without some axes of the array: squeezed or reduced."""
    gone = frozenset(gone)
    kept = tuple(axis for i, axis in enumerate(trail.axes) if i not in gone)
    digits = [digit for i in sorted(gone) for digit in trail.axes[i]]
    return drop(trail, digits)._replace(axes=kept)


def broadcast(trail: Trail, shape: Sequence[int], where: Sequence[int]) -> Trail:
    """The trail after ``broadcast_in_dim``: axis ``i`` of the array becomes axis ``where[i]``."""
    axes = [foreign(size) for size in shape]
    spread: list[Digit] = []
    for axis, target in zip(trail.axes, where, strict=True):
        if length(axis) == shape[target]:
            axes[target] = axis
        else:
            spread += axis
    return drop(trail, spread)._replace(axes=tuple(axes))


def reshape(trail: Trail, shape: Sequence[int]) -> Trail:
    """The trail after a reshape; factors that do not fit together are given up, and only they."""
    digits = [digit for axis in trail.axes for digit in axis]
    if 0 in shape:
        return drop(trail, digits)._replace(axes=tuple(map(foreign, shape)))
    axes: list[Axis] = []
    for have, want in _chunks(digits, shape):
        split = _fit(have, want)
        if split is None:
            trail = drop(trail, have)
            axes += [lost(size) for size in want]
        else:
            axes += split[0]
            trail = drop(trail, split[1])
    return trail._replace(axes=tuple(merge_digits(axis) for axis in axes))


def _chunks(digits: list[Digit], shape: Sequence[int]) -> list[tuple[list[Digit], list[int]]]:
    """Runs of digits and of new sizes with equal products, as short as possible."""
    chunks: list[tuple[list[Digit], list[int]]] = []
    digits, sizes = list(digits), list(shape)
    while digits or sizes:
        have, want = [], []
        if digits and sizes and digits[0].size == 1 == sizes[0]:
            have, want = [digits.pop(0)], [sizes.pop(0)]
        elif sizes and sizes[0] == 1:
            want = [sizes.pop(0)]
        elif digits and digits[0].size == 1:
            have = [digits.pop(0)]
        else:
            have, want = [digits.pop(0)], [sizes.pop(0)]
            while (left := length(have)) != (right := math.prod(want)):
                if left < right:
                    have.append(digits.pop(0))
                else:
                    want.append(sizes.pop(0))
        chunks.append((have, want))
    return chunks


def _fit(have: list[Digit], want: list[int]) -> tuple[list[Axis], list[Digit]] | None:
    """Deal digits out to axes, split where needed, and what is left over; None if they clash."""
    have, axes, left = list(have), [], []
    for size in want:
        axis: list[Digit] = []
        while (need := size // length(axis)) > 1 or (size == 1 and have and have[0].size == 1):
            digit = have.pop(0)
            if digit.size == 1 < size:
                left.append(digit)
                continue
            if digit.size > need:
                if digit.size % need or digit.inside:
                    return None
                low = digit.size // need
                have.insert(0, digit._replace(size=low))
                digit = digit._replace(size=need, stride=digit.stride * low)
            elif need % digit.size:
                return None
            axis.append(digit)
            if size == 1:
                break
        axes.append(tuple(axis) or foreign(1))
    return axes, left + have


def cut(trail: Trail, axis: int, start: int | None, count: int, step: int = 1) -> Trail | None:
    """The trail after a slice along one axis (``start`` may be unknown); None: nothing is left."""
    digits = trail.axes[axis]
    plain = not leaf_axes(digits) and not any(digit.inside for digit in digits)
    if (start in (0, None) and count == length(digits)) or plain:
        return _with(trail, axis, digits if count == length(digits) else foreign(count))
    if start is None:
        return _cut_somewhere(trail, axis, count)
    if len(digits) == 1 and digits[0].inside:
        return _cut_inside(trail, axis, start, count, step)
    if len(digits) == 1:
        (digit,) = digits
        starts = list(trail.starts)
        starts[digit.axis] += start * digit.stride
        new = digit._replace(size=count, stride=digit.stride * step)
        return _with(trail, axis, (new,))._replace(starts=tuple(starts))
    low = length(digits[1:])
    if step == 1 and start % low == 0 and count % low == 0:
        head = _with(trail, axis, digits[:1])
        head = cut(head, axis, start // low, count // low)
        return None if head is None else _with(head, axis, (*head.axes[axis], *digits[1:]))
    if step == 1 and start // low == (start + count - 1) // low:
        # Within one step of the slowest digit, which is thereby picked.
        head = cut(_with(trail, axis, digits[:1]), axis, start // low, 1)
        if head is None:
            return None
        head = drop(head, head.axes[axis])
        return cut(_with(head, axis, digits[1:]), axis, start % low, count)
    return _lose(trail, axis, count)


def _cut_somewhere(trail: Trail, axis: int, count: int) -> Trail:
    digits = trail.axes[axis]
    first, rest = _first(digits)
    if rest or first.inside:
        return _lose(trail, axis, count)
    vague = trail.vague | leaf_axes(digits)
    return _with(trail, axis, (first._replace(size=count),))._replace(vague=vague)


def _cut_inside(trail: Trail, axis: int, start: int, count: int, step: int) -> Trail | None:
    (digit,) = trail.axes[axis]
    first, held = digit.offset - start, length(digit.inside)
    if step != 1:
        return _lose(trail, axis, count)
    if first >= count or first + held <= 0:
        return None
    begin_at, end_at = max(0, -first), min(held, count - first)
    inner = cut(_with(trail, axis, digit.inside), axis, begin_at, end_at - begin_at)
    return None if inner is None else embed(inner, axis, max(0, first), count)


def embed(trail: Trail, axis: int, offset: int, size: int) -> Trail:
    """The trail after concatenation or padding: the axis lies at ``offset`` of a longer one."""
    digits = trail.axes[axis]
    if length(digits) == size:
        return trail
    if len(digits) == 1 and digits[0].inside:
        offset, digits = offset + digits[0].offset, digits[0].inside
    return _with(trail, axis, (Digit(size, inside=digits, offset=offset),))


def stack(trail: Trail, axis: int, position: int, size: int) -> Trail:
    """The trail after arrays were stacked along a new axis, this one at ``position``."""
    new = (Digit(size, inside=foreign(1), offset=position),)
    return trail._replace(axes=(*trail.axes[:axis], new, *trail.axes[axis:]))


def tile(trail: Trail, repeats: Sequence[int]) -> Trail:
    """The trail after each axis was repeated as a whole."""
    axes = zip(repeats, trail.axes, strict=True)
    return trail._replace(axes=tuple(merge_digits((Digit(n), *axis)) for n, axis in axes))


def reverse(trail: Trail, axis: int) -> Trail:
    """The trail after ``rev`` along one axis."""
    starts = list(trail.starts)

    def turned(axis: Axis) -> Axis:
        return tuple(map(turn, axis))

    def turn(digit: Digit) -> Digit:
        if digit.axis >= 0:
            starts[digit.axis] += (digit.size - 1) * digit.stride
        offset = digit.size - digit.offset - length(digit.inside) if digit.inside else 0
        inside = turned(digit.inside)
        return digit._replace(stride=-digit.stride, inside=inside, offset=offset)

    return _with(trail, axis, turned(trail.axes[axis]))._replace(starts=tuple(starts))


def shard(trail: Trail, axis: int, parts: int) -> Trail:
    """The trail of one device's part of an axis that is split over ``parts`` devices."""
    first, rest = _first(trail.axes[axis])
    if parts == 1 or first.size % parts or first.inside:
        return trail if parts == 1 else _lose(trail, axis, length(trail.axes[axis]) // parts)
    own = _with(trail, axis, (first._replace(size=first.size // parts), *rest))
    # Every device holds other positions.
    return own._replace(vague=trail.vague | leaf_axes((first,)))


def unshard(trail: Trail, axis: int, parts: int) -> Trail:
    """The trail of the whole axis, gathered from ``parts`` devices."""
    first, rest = _first(trail.axes[axis])
    whole = parts * first.size
    if parts == 1:
        return trail
    if first.axis >= 0 and whole * abs(first.stride) > trail.shape[first.axis]:
        return _lose(trail, axis, parts * length(trail.axes[axis]))
    vague = trail.vague
    if first.axis >= 0 and whole * first.stride == trail.shape[first.axis]:
        vague -= {first.axis}
    return _with(trail, axis, (first._replace(size=whole), *rest))._replace(vague=vague)


def _first(digits: Axis) -> tuple[Digit, Axis]:
    return digits[0], digits[1:]


def enter_loop(trail: Trail, loop: int) -> Trail:
    """The trail of one slice along the leading axis, which a loop walks."""
    leading, *rest = trail.axes
    return trail._replace(axes=tuple(rest), stacked=(*trail.stacked, (loop, leading)))


def leave_loop(trail: Trail, loop: int, trips: int) -> Trail:
    """The trail of slices stacked along a new leading axis."""
    mine = [digits for key, digits in trail.stacked if key == loop]
    others = tuple(entry for entry in trail.stacked if entry[0] != loop)
    leading = mine[0] if len(mine) == 1 else foreign(trips)
    stacked = others if len(mine) == 1 else trail.stacked
    return trail._replace(axes=(leading, *trail.axes), stacked=stacked)


def spread(trail: Trail, shape: Sequence[int]) -> Trail:
    """The trail after an element-wise operation with a result of ``shape``.

    Scalars and axes of size 1 are broadcast by the operation itself.
    """
    if len(trail.axes) == len(shape):
        return broadcast(trail, shape, range(len(shape)))
    gone = drop(trail, [digit for axis in trail.axes for digit in axis])
    return gone._replace(axes=tuple(map(foreign, shape)))


def settle(trails: Iterable[Trail]) -> tuple[Trail, ...]:
    """Each trail once; one that says nothing that another of its leaf does not say is left out."""
    unique = tuple(dict.fromkeys(trails))
    return tuple(
        trail
        for trail in unique
        if not any(other is not trail and _covers(other, trail) for other in unique)
    )


def common(trails: Iterable[Trail], nothing: bool = False) -> tuple[Trail, ...]:
    """One trail a leaf that says what all of its trails say; or only that the leaf is there."""
    by_path: dict[str, list[Trail]] = {}
    for trail in trails:
        by_path.setdefault(trail.path, []).append(trail)
    return tuple(_agreed(same, nothing) for same in by_path.values())


def _agreed(trails: list[Trail], nothing: bool) -> Trail:
    first, *others = trails
    differ = [
        i
        for i, digits in enumerate(first.axes)
        if nothing or any(trail.axes[i] != digits for trail in others)
    ]
    lost = frozenset[int]().union(
        *(trail.lost for trail in trails),
        *(leaf_axes(trail.axes[i]) for trail in trails for i in differ),
    )
    moved = {a for a, start in enumerate(first.starts) if any(t.starts[a] != start for t in others)}
    vague = frozenset(moved).union(*(trail.vague for trail in trails))
    return mix(first, differ)._replace(lost=lost, vague=vague)


def _covers(more: Trail, less: Trail) -> bool:
    if more.path != less.path or len(more.axes) != len(less.axes):
        return False
    followed = [leaf_axes(axis) for axis in less.axes]
    agree = all(not f or a == b for f, a, b in zip(followed, more.axes, less.axes, strict=True))
    if not agree or not set(less.stacked) <= set(more.stacked):
        return False
    # Two that follow the same axes stay two unless one knows strictly more.
    return sum(map(len, followed)) < sum(len(leaf_axes(axis)) for axis in more.axes)


def _with(trail: Trail, axis: int, digits: Axis) -> Trail:
    return trail._replace(axes=(*trail.axes[:axis], digits, *trail.axes[axis + 1 :]))


def _lose(trail: Trail, axis: int, size: int) -> Trail:
    return drop(_with(trail, axis, lost(size)), trail.axes[axis])


def mix(trail: Trail, gone: Iterable[int]) -> Trail:
    """The trail after some axes were mixed or picked from; the axes themselves stay in place."""
    gone = tuple(gone)
    mixed = leaf_axes(digit for i in gone for digit in trail.axes[i])
    axes = tuple(lost(length(a)) if i in gone else a for i, a in enumerate(trail.axes))
    return trail._replace(axes=axes, lost=trail.lost | mixed)


def spoil(trail: Trail, shape: Sequence[int]) -> Trail:
    """The trail of an array of which only the leaf is known."""
    axes = tuple(map(foreign, shape))
    return mix(trail, range(len(trail.axes)))._replace(axes=axes)
