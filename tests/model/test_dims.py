"""Axes as products and concatenations, against what becomes of real arrays."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.model.dims import Dims, atoms, describe, factors, find, kept, positions


def sizes(dim):
    return [find(factor).size for factor in factors(dim)]


def test_a_split_is_seen_wherever_the_atom_was_used():
    dims = Dims()
    channels = dims.atom(32)
    image = dims.product([dims.atom(3), dims.atom(5), channels])
    dims.unite(channels, dims.product([dims.atom(4), dims.atom(8)]), "reshape")
    assert sizes(image) == [3, 5, 4, 8]
    assert describe(channels) == "4×8"


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        ([2, 12], [6, 4], [2, 3, 4]),
        ([8, 3], [2, 2, 6], [2, 2, 2, 3]),
        ([24], [2, 3, 4], [2, 3, 4]),
        ([1, 6, 1], [6], [6]),
    ],
)
def test_two_products_get_a_common_refinement(first, second, common):
    dims = Dims()
    a, b = (dims.product([dims.atom(n) for n in of]) for of in (first, second))
    dims.unite(a, b, "reshape")
    assert sizes(a) == sizes(b) == common
    assert [find(x) for x in factors(a)] == [find(x) for x in factors(b)]
    assert all(atom.fixed is None for atom in atoms(a))


def test_products_that_do_not_fit_are_fixed_and_nothing_beside_them():
    dims = Dims()
    a = dims.product([dims.atom(5), dims.atom(6), dims.atom(4), dims.atom(7)])
    b = dims.product([dims.atom(5), dims.atom(8), dims.atom(3), dims.atom(7)])
    dims.unite(a, b, "reshape in Net")
    free = [find(x).fixed is None for x in factors(a)]
    assert free == [True, False, False, True]
    assert "reshape in Net" in find(factors(a)[1]).fixed
    assert {x.fixed is None for x in map(find, factors(b)[1:3])} == {False}


def test_concatenations_get_a_common_refinement():
    dims = Dims()
    a = dims.concat([dims.atom(4), dims.atom(8)])
    b = dims.concat([dims.atom(6), dims.atom(6)])
    dims.unite(a, b, "add")
    assert describe(a) == describe(b) == "4+2+6"


def test_a_fused_projection_ties_its_three_parts_when_it_is_reshaped():
    dims = Dims()
    fused = dims.atom(96)
    dims.unite(fused, dims.concat([dims.atom(32) for _ in range(3)]), "split")
    dims.unite(fused, dims.product([dims.atom(3), dims.atom(4), dims.atom(8)]), "reshape")
    found = list(dict.fromkeys(atoms(fused)))
    assert [atom.size for atom in found if atom.size > 1] == [4, 8]
    heads = next(atom for atom in found if atom.size == 4)
    assert positions(fused, heads).shape == (4, 24)
    assert positions(fused, heads)[1].tolist() == [
        *range(8, 16), *range(40, 48), *range(72, 80)
    ]  # fmt: skip


def test_parts_that_are_not_whole_rows_are_fixed():
    dims = Dims()
    concat = dims.concat([dims.atom(5), dims.atom(27)])
    product = dims.product([dims.atom(4), dims.atom(8)])
    dims.unite(concat, product, "reshape")
    assert all(atom.fixed for dim in (concat, product) for atom in atoms(dim))


def test_fixing_one_side_fixes_what_is_united_with_it_before_and_after():
    dims = Dims()
    a, b, c = dims.atom(4), dims.atom(4), dims.atom(4)
    dims.unite(a, b, "add")
    dims.fix(b, "sorted")
    dims.unite(b, c, "add")
    assert {find(x).fixed for x in (a, b, c)} == {"sorted"}
    pair = dims.product([dims.atom(2), dims.atom(2)])
    dims.unite(c, pair, "reshape")
    assert {atom.fixed for atom in atoms(pair)} == {"sorted"}


def test_an_atom_met_twice_in_a_product_counts_its_diagonal_once():
    dims = Dims()
    atom = dims.atom(3)
    square = dims.product([atom, atom])
    assert positions(square, atom).tolist() == [
        [0, 1, 2, 3, 6], [1, 3, 4, 5, 7], [2, 5, 6, 7, 8]
    ]  # fmt: skip
    assert kept(square, {atom: np.array([True, False, True])}).tolist() == [
        True, False, True, False, False, False, True, False, True
    ]  # fmt: skip


@st.composite
def journeys(draw):
    """Steps of reshapes, transposes, splits and concatenations from one axis of channels."""
    shape = [draw(st.sampled_from([8, 12, 16, 24, 30]))]
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["reshape", "transpose", "swap halves", "merge"]))
        if kind == "reshape":
            axis = draw(st.integers(0, len(shape) - 1))
            ways = [n for n in range(2, shape[axis]) if shape[axis] % n == 0]
            if not ways:
                continue
            n = draw(st.sampled_from(ways))
            shape = [*shape[:axis], n, shape[axis] // n, *shape[axis + 1 :]]
            steps.append(("reshape", tuple(shape)))
        elif kind == "transpose" and len(shape) > 1:
            order = draw(st.permutations(range(len(shape))))
            shape = [shape[i] for i in order]
            steps.append(("transpose", tuple(order)))
        elif kind == "swap halves":
            axis = draw(st.integers(0, len(shape) - 1))
            at = draw(st.integers(1, max(1, shape[axis] - 1)))
            if at < shape[axis]:
                steps.append(("swap", (axis, at)))
        elif kind == "merge":
            shape = [math.prod(shape)]
            steps.append(("reshape", tuple(shape)))
    return steps, shape


def travel(dims, start, steps):
    """The axes after every step, as the rules for these operations make them."""
    axes = [start]
    for kind, how in steps:
        if kind == "reshape":
            out = [dims.atom(n) for n in how]
            dims.unite(dims.product(axes), dims.product(out), "reshape")
            axes = out
        elif kind == "transpose":
            axes = [axes[i] for i in how]
        else:
            axis, at = how
            pieces = [dims.atom(at), dims.atom(axes[axis].size - at)]
            dims.unite(axes[axis], dims.concat(pieces), "split")
            axes = [*axes[:axis], dims.concat(pieces[::-1]), *axes[axis + 1 :]]
    return axes


@settings(max_examples=300, deadline=None)
@given(journeys(), st.randoms(use_true_random=False))
def test_what_is_cut_at_the_start_is_what_is_missing_at_the_end(journey, random):
    steps, shape = journey
    dims = Dims()
    start = dims.atom(math.prod(shape))
    axes = travel(dims, start, steps)
    keep = {
        atom: np.array([True, *(random.random() < 0.5 for _ in range(atom.size - 1))])
        for atom in dict.fromkeys(atoms(start))
        if atom.fixed is None and atom.size > 1
    }
    marks = kept(start, keep)
    for kind, how in steps:
        if kind == "reshape":
            marks = marks.reshape(how)
        elif kind == "transpose":
            marks = marks.transpose(how)
        else:
            axis, at = how
            head, tail = np.split(marks, [at], axis)
            marks = np.concatenate([tail, head], axis)
    predicted = np.ones((), bool)
    for dim in axes:
        predicted = predicted[..., None] & kept(dim, keep)
    assert (predicted == marks).all()
    for dim in axes:
        for atom in keep:
            where = positions(dim, atom)
            alone = kept(dim, {atom: np.arange(atom.size) > 0})
            assert (np.flatnonzero(~alone) == np.unique(where[0])).all()
