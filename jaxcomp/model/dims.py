"""Axes that remember what they are made of: the algebra under channel coupling.

An array's axis is a :class:`Dim`. A dim is an *atom* (channels that may come and go one by one), a
*product* of dims (what a reshape made of heads × head size, row-major), or a *concatenation* (what
``concatenate`` or ``split`` sees). Two axes that must agree channel by channel are united; when one
of them has more structure than the other, the other takes it on. So an atom that a later reshape
splits into 4 × 8 is split everywhere it was ever used, and a cut of one factor means the same
channels in every array.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

CONFLICT = "its boundaries do not fit together"


class Dim:
    """One axis; compared by identity. Only :class:`Dims` writes to it."""

    __slots__ = ("factors", "fixed", "link", "parts", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.link: Dim | None = None
        self.factors: tuple[Dim, ...] = ()
        self.parts: tuple[Dim, ...] = ()
        self.fixed: str | None = None

    def __repr__(self) -> str:
        return f"Dim({describe(self)})"


class Tie(NamedTuple):
    """A record that two dims were united, and by what."""

    first: Dim
    second: Dim
    reason: str


def find(dim: Dim) -> Dim:
    """What a dim stands for now."""
    while dim.link is not None:
        if dim.link.link is not None:
            dim.link = dim.link.link
        dim = dim.link
    return dim


def is_atom(dim: Dim) -> bool:
    """Whether a dim (as found) has no parts and no factors."""
    return not dim.factors and not dim.parts


def factors(dim: Dim) -> list[Dim]:
    """A dim as a product of atoms and concatenations, slowest first; none of size 1."""
    dim = find(dim)
    if dim.factors:
        return [leaf for factor in dim.factors for leaf in factors(factor)]
    return [dim] if dim.size != 1 else []


def parts(dim: Dim) -> list[Dim]:
    """A dim as a concatenation of atoms and products."""
    dim = find(dim)
    return [leaf for part in dim.parts for leaf in parts(part)] if dim.parts else [dim]


def atoms(dim: Dim) -> Iterator[Dim]:
    """Every atom that a dim is made of; an atom used twice comes twice."""
    dim = find(dim)
    if is_atom(dim):
        yield dim
    for child in dim.factors or dim.parts:
        yield from atoms(child)


def describe(dim: Dim) -> str:
    """A dim in words of sizes: ``8``, ``4×8``, ``16+16``."""
    dim = find(dim)
    if dim.factors:
        return "×".join(f"({describe(f)})" if find(f).parts else describe(f) for f in factors(dim))
    if dim.parts:
        return "+".join(describe(part) for part in parts(dim))
    return str(dim.size)


class Dims:
    """Makes dims, unites them and keeps the reasons.

    Attributes:
        ties: every union that was made, in order.
    """

    def __init__(self) -> None:
        self.ties: list[Tie] = []

    def atom(self, size: int, fixed: str | None = None) -> Dim:
        """A new dim of its own."""
        dim = Dim(size)
        dim.fixed = fixed
        return dim

    def product(self, dims: Iterable[Dim]) -> Dim:
        """The row-major product of dims; dims of size 1 do not count."""
        dims = [dim for dim in dims if dim.size != 1]
        if len(dims) == 1:
            return dims[0]
        product = Dim(int(np.prod([dim.size for dim in dims], dtype=np.int64)))
        product.factors = tuple(dims)
        return product

    def concat(self, dims: Iterable[Dim]) -> Dim:
        """The concatenation of dims; empty dims do not count."""
        dims = [dim for dim in dims if dim.size != 0]
        if len(dims) == 1:
            return dims[0]
        concat = Dim(sum(dim.size for dim in dims))
        concat.parts = tuple(dims)
        return concat

    def fix(self, dim: Dim, reason: str) -> None:
        """Nothing may be cut from this dim; the first reason stays."""
        for atom in atoms(dim):
            if atom.fixed is None:
                atom.fixed = reason

    def unite(self, first: Dim, second: Dim, reason: str) -> None:
        """Two dims of one size are the same channels from now on.

        Where their structures cannot be brought together (6 channels as 2×3 and as 4+2), both are
        fixed and the reason says so.
        """
        self.ties.append(Tie(first, second, reason))
        self._unite(first, second, reason)

    def _unite(self, first: Dim, second: Dim, reason: str) -> None:
        first, second = find(first), find(second)
        if first is second:
            return
        if first.size != second.size:
            raise AssertionError(f"{describe(first)} and {describe(second)} in {reason}")
        if not is_atom(first):
            first, second = second, first
        if is_atom(first):
            if first.fixed is not None:
                self.fix(second, first.fixed)
            first.link = second
            return
        if first.parts and second.parts:
            self._unite_concats(first, second, reason)
        elif first.factors and second.factors:
            self._unite_products(first, second, reason)
        else:
            concat, product = (first, second) if first.parts else (second, first)
            self._unite_concat_product(concat, product, reason)
        # Uniting the children can already have made the two one.
        first, second = find(first), find(second)
        if first is not second:
            first.link = second

    def _unite_products(self, first: Dim, second: Dim, reason: str) -> None:
        """Walk both factor lists; where the sizes differ, the larger factor is split."""
        left, right = factors(first), factors(second)
        while left and right:
            a, b = find(left[0]), find(right[0])
            if a.factors or b.factors:
                left[:1], right[:1] = factors(a), factors(b)
            elif a.size == b.size:
                self._unite(a, b, reason)
                left, right = left[1:], right[1:]
            elif a.size % b.size == 0 and self._split_product(a, b.size, reason):
                left[:1] = factors(a)
            elif b.size % a.size == 0 and self._split_product(b, a.size, reason):
                right[:1] = factors(b)
            else:
                left, right = self._fix_block(left, right, reason)

    def _fix_block(
        self, left: list[Dim], right: list[Dim], reason: str
    ) -> tuple[list[Dim], list[Dim]]:
        """Fix the shortest heads of equal size of both lists; what comes after them."""
        i = j = 0
        size_left = size_right = 1
        while i == 0 or size_left != size_right:
            if size_left <= size_right:
                size_left, i = size_left * left[i].size, i + 1
            else:
                size_right, j = size_right * right[j].size, j + 1
        for dim in left[:i] + right[:j]:
            self.fix(dim, f"{reason}: {CONFLICT}")
        return left[i:], right[j:]

    def _split_product(self, dim: Dim, head: int, reason: str) -> bool:
        """Make a dim a product whose first factor has size ``head``; whether that was possible."""
        rest = self.atom(dim.size // head)
        if is_atom(dim):
            self._unite(dim, self.product([self.atom(head), rest]), reason)
            return True
        pieces = parts(dim)
        if any(piece.size % rest.size for piece in pieces):
            return False
        heads = [self.atom(piece.size // rest.size) for piece in pieces]
        for piece, piece_head in zip(pieces, heads, strict=True):
            self._unite(piece, self.product([piece_head, rest]), reason)
        find(dim).link = self.product([self.concat(heads), rest])
        return True

    def _unite_concats(self, first: Dim, second: Dim, reason: str) -> None:
        """Walk both lists of parts; where the sizes differ, the larger part is split."""
        left, right = parts(first), parts(second)
        while left and right:
            a, b = find(left[0]), find(right[0])
            if a.parts or b.parts:
                left[:1], right[:1] = parts(a), parts(b)
            elif a.size == b.size:
                self._unite(a, b, reason)
                left, right = left[1:], right[1:]
            elif a.size > b.size:
                left[:1] = self._split_concat(a, b.size, reason)
            else:
                right[:1] = self._split_concat(b, a.size, reason)

    def _split_concat(self, dim: Dim, head: int, reason: str) -> list[Dim]:
        """A dim (an atom or a product) as two dims one after the other."""
        if is_atom(dim):
            pieces = [self.atom(head), self.atom(dim.size - head)]
            self._unite(dim, self.concat(pieces), reason)
            return pieces
        slowest, *rest = factors(dim)
        inner = self.product(rest)
        if head % inner.size:
            self.fix(dim, f"{reason}: {CONFLICT}")
            return [
                self.atom(head, f"{reason}: {CONFLICT}"),
                self.atom(dim.size - head, f"{reason}: {CONFLICT}"),
            ]
        heads = [self.atom(head // inner.size), self.atom((dim.size - head) // inner.size)]
        self._unite(slowest, self.concat(heads), reason)
        return [self.product([piece, inner]) for piece in heads]

    def _unite_concat_product(self, concat: Dim, product: Dim, reason: str) -> None:
        """Parts that are whole rows of the product take its inner factors on."""
        pieces = parts(concat)
        slowest, *rest = factors(product)
        inner = self.product(rest)
        if any(piece.size % inner.size for piece in pieces):
            self.fix(concat, f"{reason}: {CONFLICT}")
            self.fix(product, f"{reason}: {CONFLICT}")
            return
        rows = [self.atom(piece.size // inner.size) for piece in pieces]
        self._unite(slowest, self.concat(rows), reason)
        for piece, row in zip(pieces, rows, strict=True):
            self._unite(piece, self.product([row, inner]), reason)


def positions(dim: Dim, atom: Dim) -> np.ndarray:
    """Where the units of an atom lie on an axis.

    Args:
        dim: the axis.
        atom: an atom that it is made of.

    Returns:
        ``(units, k)`` int64: the ``k`` positions that go with each unit, ascending; ``k`` is 0 if
        the axis does not hold the atom.
    """
    dim, atom = find(dim), find(atom)
    if dim is atom:
        return np.arange(atom.size)[:, None]
    found = np.zeros((atom.size, 0), np.int64)
    if dim.parts:
        offset = 0
        for part in dim.parts:
            found = np.concatenate([found, positions(part, atom) + offset], axis=1)
            offset += part.size
    stride = dim.size
    for factor in dim.factors:
        # Of the index (before, factor, after) only the middle is chosen by the unit.
        outer = np.arange(0, dim.size, stride)
        stride //= factor.size
        inner = positions(factor, atom) * stride
        here = outer[None, :, None, None] + inner[:, None, :, None] + np.arange(stride)
        found = np.concatenate([found, here.reshape(atom.size, -1)], axis=1)
    found = np.sort(found, axis=1)
    if found.shape[1] > 1 and (found[:, 1:] == found[:, :-1]).any():
        # An atom met twice in one product: the diagonal belongs to its unit once.
        found = np.stack([np.unique(row) for row in found])
    return found


def kept(dim: Dim, keep: dict[Dim, np.ndarray]) -> np.ndarray:
    """Which positions of an axis stay.

    Args:
        dim: the axis.
        keep: booleans by atom, for atoms that lose units.

    Returns:
        ``(size,)`` booleans.
    """
    dim = find(dim)
    if dim in keep:
        return keep[dim]
    if dim.parts:
        return np.concatenate([kept(part, keep) for part in dim.parts])
    mask = np.ones((1,), bool)
    for factor in dim.factors:
        mask = (mask[:, None] & kept(factor, keep)[None, :]).reshape(-1)
    return mask if dim.factors else np.ones((dim.size,), bool)
