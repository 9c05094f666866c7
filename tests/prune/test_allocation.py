"""How a sparsity is spread: totals are exact, shares are those of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp import prune
from jaxcomp.prune import Block, allocation, masks
from jaxcomp.prune.allocation import Part
from jaxcomp.prune.structures import pool


def total_of(sparsity, sizes):
    return int(np.floor(round(sparsity * 1e7) / 1e7 * sum(sizes) + 0.5))


def parts_of(shapes):
    return {f"leaf{i}": Part(shape, int(np.prod(shape))) for i, shape in enumerate(shapes)}


def erk_densities(shapes, density):
    """Evci et al. 2020: raise whole layers to dense until none would pass 1; in float64."""
    raw = np.array([sum(shape) / np.prod(shape) for shape in shapes])
    sizes = np.array([np.prod(shape) for shape in shapes], np.float64)
    dense = np.zeros(len(shapes), bool)
    while True:
        left = density * sizes.sum() - sizes[dense].sum()
        scale = left / (raw * sizes)[~dense].sum() if (~dense).any() else 0
        if (~dense).any() and (scale * raw[~dense]).max() > 1:
            dense |= ~dense & (raw == raw[~dense].max())
            continue
        return np.where(dense, 1.0, scale * raw)


shapes = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6, unique=True
)


@settings(max_examples=60)
@given(shapes, st.floats(0.01, 0.98))
def test_erdos_renyi_kernel(shapes, sparsity):
    parts = parts_of(shapes)
    sizes = np.array([part.units for part in parts.values()])
    counts = np.asarray(allocation.erdos_renyi_kernel.counts(parts, sparsity), np.int64)
    assert counts.sum() == total_of(sparsity, sizes)
    assert np.all(counts >= 0)
    assert np.all(counts <= sizes)
    expected = (1 - erk_densities(shapes, 1 - sparsity)) * sizes
    assert np.all(np.abs(counts - expected) <= len(shapes) + 1e-4 * sizes)


def test_erdos_renyi_kernel_of_large_leaves_inside_jit():
    parts = parts_of([(4096, 4096), (3, 3, 64, 64), (512, 10)])
    sizes = [part.units for part in parts.values()]
    traced = jax.jit(lambda s: allocation.erdos_renyi_kernel.counts(parts, s))
    for sparsity in (0.0, 0.5, 0.9, 0.987654):
        counts = np.asarray(traced(sparsity), np.int64)
        assert counts.sum() == total_of(np.float64(np.float32(sparsity)), sizes)


def test_no_leaf_loses_more_than_it_has_where_float32_rounds_its_size_up():
    parts = parts_of([(4115, 4433), (20141, 5752), (5, 7)])
    sizes = np.array([part.units for part in parts.values()])
    counts = np.asarray(allocation.erdos_renyi_kernel.counts(parts, 0.39187548), np.int64)
    assert counts[0] in (0, 1)
    assert np.all(counts <= sizes)
    parts = parts_of([(4489, 4299), (25924, 7279)])
    counts = np.asarray(
        allocation.fixed({"leaf0": 0.9, "leaf1": 0.1}).counts(parts, 0.43), np.int64
    )
    assert np.all(counts <= [part.units for part in parts.values()])


def lamp_masks(leaves, count):
    """Lee et al. 2021, equation (4): one weight after the other, in float64."""
    scored = []
    for name, leaf in leaves.items():
        squares = np.sort(np.asarray(leaf, np.float64).ravel() ** 2)
        for rank, square in enumerate(squares):
            scored.append((square / squares[rank:].sum(), name, rank))
    gone = sorted(scored)[:count]
    return {name: sum(1 for _, other, _ in gone if other == name) for name in leaves}


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 50))
def test_lamp(seed, count):
    generator = np.random.default_rng(seed)
    leaves = {
        "one": generator.normal(size=(4, 5)).astype(np.float32),
        "two": (100 * generator.normal(size=(6, 7))).astype(np.float32),
    }
    magnitudes = {name: jnp.abs(jnp.asarray(leaf)) for name, leaf in leaves.items()}
    found = prune.masks(magnitudes, count / 62, allocation=allocation.lamp)
    gone = {name: int(np.sum(~np.asarray(mask))) for name, mask in found.items()}
    assert gone == lamp_masks(leaves, count)
    for name, mask in found.items():
        kept, size = np.asarray(mask), np.abs(leaves[name])
        if gone[name]:
            assert size[~kept].max() <= size[kept].min()


@settings(max_examples=30)
@given(st.lists(st.floats(0, 0.95), min_size=2, max_size=5).filter(any), st.floats(0.05, 0.6))
def test_fixed_sparsities_are_scaled_alike(given_sparsities, overall):
    paths = [f"leaf{i}" for i in range(len(given_sparsities))]
    spread = allocation.fixed(dict(zip(paths, given_sparsities, strict=True)))
    parts = parts_of([(10, 7 + i) for i in range(len(paths))])
    sizes = np.array([part.units for part in parts.values()])
    exact = np.asarray(spread.counts(parts, None))
    for count, sparsity, size in zip(exact, given_sparsities, sizes, strict=True):
        assert count == total_of(np.float64(np.float32(sparsity)), [size])
    counts = np.asarray(spread.counts(parts, overall), np.int64)
    wanted = total_of(np.float64(np.float32(overall)), sizes)
    most = sizes[np.array(given_sparsities) > 0].sum()
    assert counts.sum() == min(wanted, most)
    assert np.all(counts[np.array(given_sparsities) == 0] == 0)
    free = (counts < sizes) & (np.array(given_sparsities) > 0.01)
    if wanted <= most and free.sum() > 1:
        ratio = counts[free] / sizes[free] / np.array(given_sparsities)[free]
        slack = (len(paths) + 1) / (sizes[free] * np.array(given_sparsities)[free])
        assert np.all(np.abs(ratio - ratio.mean()) <= slack.max() + 1e-3)


def test_fixed_refuses_what_is_wrong():
    with pytest.raises(ValueError, match=r"head: sparsity is the fraction .* in \[0, 1\), not 1"):
        allocation.fixed({"head": 1.0})
    with pytest.raises(ValueError, match="nothing would be removed"):
        allocation.fixed({"head": 0.0})
    with pytest.raises(ValueError, match="'hed' matches no leaf; nearest: head"):
        masks({"head": jnp.ones((2, 2))}, allocation=allocation.fixed({"hed": 0.5}))


def test_a_global_threshold_counts_units_of_every_size():
    generator = np.random.default_rng(4)
    scores = {
        "a": jnp.asarray(generator.integers(0, 9, (8, 8)), jnp.float32),
        "c": jnp.asarray(generator.integers(0, 9, (4, 8)), jnp.float32),
    }
    structures = {"a": Block((4, 4)), "c": Block((2, 2))}
    found = masks(scores, 0.5, structures, allocation.global_threshold)
    means = [np.asarray(pool(structures[name], leaf)).ravel() for name, leaf in scores.items()]
    gone = np.argsort(np.concatenate(means), kind="stable")[:6]
    kept = [np.asarray(pool(structures[name], mask)).ravel() for name, mask in found.items()]
    np.testing.assert_array_equal(np.flatnonzero(np.concatenate(kept) == 0), np.sort(gone))


def test_what_would_be_left_with_nothing_is_named():
    scores = {"body": jnp.full((16, 16), 9.0), "head": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="head: all 4 weights would be removed"):
        masks(scores, 0.2, allocation=allocation.global_threshold)
    with pytest.raises(ValueError, match="head: all 4 weights would be removed"):
        masks(scores, 0.9)
    assert int(jnp.sum(masks(scores, 0.2, allocation=allocation.lamp)["head"])) > 0
    schedule = prune.cubic(0.9, 0, 10)
    method = prune.gradual(prune.scores.magnitude, schedule)
    with pytest.raises(ValueError, match="head: all 4 units would be removed at the end"):
        method.init(scores)
    # Under ERK small leaves stay.
    prune.gradual(prune.scores.magnitude, schedule, allocation.erdos_renyi_kernel).init(scores)
