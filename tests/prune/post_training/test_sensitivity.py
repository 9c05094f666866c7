"""Sensitivity of one leaf at a time, batched and not; and the allocation that is made from it."""

import itertools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp import tree as tree_lib
from jaxcomp.checkpoint import records
from jaxcomp.kernels.threshold import removal_count_exact
from jaxcomp.prune import scores
from jaxcomp.prune.allocation import Part, uniform
from jaxcomp.prune.masks import masks
from jaxcomp.prune.post_training import sensitivity as module
from jaxcomp.prune.post_training.input_norms import input_norms
from jaxcomp.prune.post_training.sensitivity import FILE, Sensitivity, sensitivity
from jaxcomp.prune.post_training.sensitivity_allocation import (
    allocation_from_sensitivity,
    lower_hull,
)
from jaxcomp.prune.post_training.to_accuracy import to_accuracy
from jaxcomp.prune.structures import NM, Block, Channel, Element

RNG = np.random.default_rng(0)
SHAPES = {"first": (8, 16), "second": (16, 12), "third": (12, 4)}
PARAMS = {
    name: {
        "kernel": jnp.asarray(RNG.normal(size=shape), jnp.float32),
        "bias": jnp.asarray(RNG.normal(size=shape[1]), jnp.float32),
    }
    for name, shape in SHAPES.items()
}
INPUTS = jnp.asarray(RNG.normal(size=(64, 8)), jnp.float32)
PATHS = tuple(f"{name}/kernel" for name in SHAPES)
ASKED = (0.25, 0.5, 0.8, 0.9)


def forward(params, xp=jnp):
    x = xp.asarray(INPUTS)
    for name in SHAPES:
        x = xp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x


TARGETS = forward(PARAMS)


def evaluate(params):
    return -jnp.mean((forward(params) - TARGETS) ** 2)


def untraceable(params):
    return float(evaluate(params))


def reference():
    """One leaf at a time in numpy and float64, with a stable sort for the masks."""
    plain = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), PARAMS)
    values, removed = [], []
    for name in SHAPES:
        for sparsity in ASKED:
            leaf = plain[name]["kernel"].copy().ravel()
            count = math.floor(sparsity * leaf.size + 0.5)
            leaf[np.argsort(np.abs(leaf), kind="stable")[:count]] = 0
            kernel = leaf.reshape(SHAPES[name])
            pruned = {**plain, name: {**plain[name], "kernel": kernel}}
            values.append(-np.mean((forward(pruned, np) - np.asarray(TARGETS, np.float64)) ** 2))
            removed.append(count)
    return np.reshape(values, (3, 4)), np.reshape(removed, (3, 4))


@pytest.mark.parametrize(
    ("function", "at_once"),
    [(evaluate, None), (evaluate, 1), (evaluate, 3), (untraceable, None), (untraceable, 1)],
)
def test_values_and_counts_in_every_form(function, at_once):
    found = sensitivity(PARAMS, function, ASKED[::-1], at_once=at_once)
    values, removed = reference()
    np.testing.assert_allclose(found.values, values, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.removed, removed)
    assert (found.paths, found.sparsities) == (PATHS, ASKED)
    assert found.dense_value == 0.0
    assert found.sizes == (128, 192, 48)
    curves = found.curves()
    assert list(curves) == list(PATHS)
    np.testing.assert_array_equal(curves["first/kernel"][0], 0)
    np.testing.assert_array_equal(curves["first/kernel"][1:, 0], removed[0] / 128)
    np.testing.assert_array_equal(curves["first/kernel"][1:, 1], found.drops[0])
    lines = str(found).splitlines()
    order = [line.split()[0] for line in lines[2:]]
    expected = sorted(PATHS, key=lambda path: values[PATHS.index(path)].sum())
    assert order == expected
    assert "█" in str(found)


def test_only_the_pruned_leaf_is_stacked():
    """What comes before the leaf is computed once, and no other leaf is copied."""
    seen = []

    @jax.custom_batching.custom_vmap
    def spy(x):
        return x

    @spy.def_vmap
    def rule(axis_size, in_batched, x):
        seen.append((axis_size, in_batched[0]))
        return x, in_batched[0]

    def watched(params):
        x = jnp.tanh(INPUTS @ spy(params["first"]["kernel"]) + params["first"]["bias"])
        x = spy(x) @ spy(params["second"]["kernel"])
        return jnp.mean(x)

    sensitivity(PARAMS, watched, ASKED, paths="second/*", at_once=4)
    assert seen == [(4, True)]


@pytest.mark.parametrize(("memory", "count"), [(2**30, 4), (30000, 3), (20000, 2), (1, 1)])
def test_candidates_at_once_by_memory(monkeypatch, memory, count):
    """Twice 512 bytes of the leaf, and twice 64 x 16 values of the widest layer, for each."""
    sizes = []
    monkeypatch.setattr(module, "MEMORY", memory)

    def watched(params):
        return evaluate(params)

    real = jnp.stack

    def stack(arrays, *args, **kwargs):
        if arrays[0].shape == SHAPES["first"]:
            sizes.append(len(arrays))
        return real(arrays, *args, **kwargs)

    monkeypatch.setattr(module.jnp, "stack", stack)
    sensitivity(PARAMS, watched, ASKED, paths="first/*")
    each = 2 * (8 * 16 * 4 + 64 * 16 * 4)
    assert count == max(1, min(4, memory // each))
    assert sizes == [count] * math.ceil(4 / count)


class Killed(Exception):
    """Stands for the end of a process."""


def ending(function, end, log):
    def counted(params):
        if isinstance(params["third"]["bias"], jax.core.Tracer):
            return function(params)
        if len(log) == end:
            raise Killed
        log.append(None)
        return function(params)

    return counted


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_killed_at_every_evaluation_and_resumed(tmp_path):
    whole = sensitivity(PARAMS, untraceable, ASKED)
    for end in range(13):
        log = []
        with pytest.raises(Killed):
            sensitivity(PARAMS, ending(untraceable, end, log), ASKED, directory=tmp_path / str(end))
        rest = []
        function = ending(untraceable, 13 - end, rest)
        resumed = sensitivity(PARAMS, function, ASKED, directory=tmp_path / str(end))
        assert len(rest) == 13 - end
        assert_same(resumed, whole)
        assert os.listdir(tmp_path / str(end)) == [FILE]


def test_killed_between_batches_and_resumed(tmp_path, monkeypatch):
    """Two candidates at once: seven writes, the dense one's first; ends after each of them."""
    how = {"at_once": 2, "directory": tmp_path}
    whole = sensitivity(PARAMS, evaluate, ASKED, at_once=2)
    write, writes = records.write_records, []

    def write_and_end(*args):
        write(*args)
        writes.append(None)
        if len(writes) < 7:
            raise Killed

    monkeypatch.setattr(records, "write_records", write_and_end)
    for _ in range(6):
        with pytest.raises(Killed):
            sensitivity(PARAMS, evaluate, ASKED, **how)
    assert_same(sensitivity(PARAMS, evaluate, ASKED, **how), whole)
    assert_same(sensitivity(PARAMS, evaluate, ASKED, **how), whole)
    assert len(writes) == 7
    # More sparsities go on from what is known.
    monkeypatch.setattr(records, "write_records", write)
    log = []
    more = sensitivity(
        PARAMS, ending(untraceable, 3, log), (*ASKED, 0.6), at_once=1, directory=tmp_path
    )
    assert len(log) == 3
    np.testing.assert_array_equal(more.values[:, [0, 1, 3, 4]], whole.values)
    with pytest.raises(ValueError, match="another scores/first/kernel"):
        sensitivity(PARAMS, evaluate, ASKED, score=lambda w, e: w**2, **how)
    with pytest.raises(ValueError, match="another structure"):
        sensitivity(PARAMS, evaluate, ASKED, structure=Channel(-1), **how)


@pytest.mark.parametrize("form", [lambda value: value, float])
def test_failed_evaluations_are_kept_and_the_rest_goes_on(form):
    def failing(params):
        gone = jnp.mean(params["second"]["kernel"] == 0)
        value = evaluate(params)
        return form(jnp.where(gone > 0.85, jnp.nan, jnp.where(gone > 0.7, -jnp.inf, value)))

    found = sensitivity(PARAMS, failing, ASKED)
    values, _ = reference()
    assert np.isnan(found.values[1, 2:]).all()
    values[1, 2:] = np.nan
    np.testing.assert_allclose(found.values, values, rtol=1e-4, atol=1e-6)
    assert str(found).splitlines()[2].startswith("second/kernel")
    assert "××" in str(found)
    # No other leaf is spared for one that has failed.
    allocation = allocation_from_sensitivity(found)
    kept = masks(jax.tree.map(jnp.abs, PARAMS), 0.6, allocation=allocation)
    assert int(jnp.sum(~kept["second"]["kernel"])) <= 96


def test_structures_evidence_and_selections():
    structure = {"first/*": NM(2, 4), "second/*": Block((4, 4)), "third/*": Channel(-1)}
    evidence = jax.tree.map(lambda leaf: 1 / (jnp.abs(leaf) + 1), PARAMS)
    score = lambda weight, evidence: evidence
    found = sensitivity(
        PARAMS, evaluate, (0.25, 0.5), structure=structure, score=score, evidence=evidence
    )
    np.testing.assert_array_equal(found.removed, [[32, 64], [48, 96], [12, 24]])
    for sparsity, value in zip((0.25, 0.5), found.values[2], strict=True):
        mask = masks(evidence, sparsity, structure)["third"]["kernel"]
        pruned = jnp.where(mask, PARAMS["third"]["kernel"], 0)
        whole = {**PARAMS, "third": {**PARAMS["third"], "kernel": pruned}}
        assert value == pytest.approx(float(evaluate(whole)), rel=1e-5)
    leaves = tree_lib.Leaves({"k": PARAMS["first"]["kernel"]})
    selected = sensitivity(leaves, lambda params: jnp.sum(params["k"] != 0), (0.5, 0.999))
    np.testing.assert_array_equal(selected.values, [[64, 0]])
    assert selected.paths == ("k",)


def test_bad_calls():
    with pytest.raises(TypeError, match="evaluate"):
        sensitivity(PARAMS, 0.5)
    with pytest.raises(TypeError, match="evaluate must return one real number"):
        sensitivity(PARAMS, lambda params: jnp.ones(2))
    with pytest.raises(TypeError, match="evaluate must return one real number"):
        sensitivity(PARAMS, lambda params: (jnp.float32(1), None))
    with pytest.raises(TypeError, match="cannot be traced"):
        sensitivity(PARAMS, untraceable, at_once=2)
    with pytest.raises(ValueError, match="gave nan for the dense"):
        sensitivity(PARAMS, lambda params: jnp.nan)
    for bad, words in (
        ({"sparsities": ()}, "sparsities is empty"),
        ({"sparsities": (0.5, 1.0)}, "sparsities"),
        ({"sparsities": (math.nan,)}, "sparsities"),
        ({"at_once": 0}, "at_once is 0"),
        ({"paths": "fourth/*"}, "'fourth/\\*' matches no leaf; nearest"),
        ({"structure": NM(2, 5)}, "first/kernel: .* divisible by 5"),
        (
            {"evidence": {"first": {"kernel": jnp.ones((8, 16))}}, "score": scores.taylor},
            "second/kernel: no evidence",
        ),
        ({"score": lambda w, e: w * jnp.inf}, "first/kernel: 128 of 128"),
    ):
        with pytest.raises(ValueError, match=words):
            sensitivity(PARAMS, evaluate, **bad)


def measured(sizes, removed, drops):
    """A table as it would be measured."""
    return Sensitivity(
        tuple(f"leaf {at}" for at in range(len(sizes))),
        tuple(sizes),
        tuple(np.linspace(0.1, 0.9, len(removed[0]))),
        np.asarray(removed, np.int64),
        1.0 - np.asarray(drops, np.float64),
        1.0,
    )


def parts_of(found):
    pairs = zip(found.paths, found.sizes, strict=True)
    return {path: Part((1, size), size) for path, size in pairs}


@st.composite
def tables(draw):
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    points = draw(st.integers(1, 4))
    removed = [
        sorted(draw(st.lists(st.integers(0, size), min_size=points, max_size=points)))
        for size in sizes
    ]
    drop = st.one_of(st.floats(-1, 5), st.sampled_from([0.0, 0.0, 1.0]))
    drops = [draw(st.lists(drop, min_size=points, max_size=points)) for _ in sizes]
    return measured(sizes, removed, drops)


@settings(max_examples=5)
@given(tables())
def test_totals_exact_monotone_and_the_same_inside_jit(found):
    parts, total = parts_of(found), sum(found.sizes)
    counts = allocation_from_sensitivity(found).counts
    grid = np.unique(np.concatenate([np.linspace(0, 0.999, 12), [0.9999999]]))
    rows = [np.asarray(counts(parts, float(sparsity))) for sparsity in grid]
    compiled = jax.jit(lambda sparsities: jax.lax.map(lambda s: counts(parts, s), sparsities))
    np.testing.assert_array_equal(rows, compiled(jnp.asarray(grid, jnp.float32)))
    for sparsity, row in zip(grid, rows, strict=True):
        assert row.sum() == removal_count_exact(float(sparsity), total)
        assert (row <= found.sizes).all()
    assert (np.diff(np.asarray(rows, np.int64), axis=0) >= 0).all()


@settings(max_examples=25)
@given(tables(), st.floats(0, 0.99))
def test_least_sum_of_drops_by_linear_programming(found, sparsity):
    """A program over all mixtures of measured points knows nothing of hulls or slopes."""
    optimize = pytest.importorskip("scipy.optimize")
    total = removal_count_exact(sparsity, sum(found.sizes))
    most = int(found.removed[:, -1].sum())
    if total > most:
        total, sparsity = most, None
    curves = []
    for removed, drops in zip(found.removed, found.drops, strict=True):
        # A number of units that was measured twice has the last of its values.
        curves.append(sorted(({**dict(zip(removed, drops, strict=True))} | {0: 0.0}).items()))
    costs = [drop for curve in curves for _, drop in curve]
    units = [place for curve in curves for place, _ in curve]
    owners = [at for at, curve in enumerate(curves) for _ in curve]
    mixtures = np.array([[owner == at for owner in owners] for at in range(len(curves))], float)
    best = optimize.linprog(
        costs, A_eq=np.vstack([mixtures, units]), b_eq=[*np.ones(len(curves)), total]
    )
    assert best.status == 0
    if sparsity is None:
        # Everything measured is used up before anything else is touched.
        sparsity = min(0.9999999, total / sum(found.sizes))
    row = np.asarray(allocation_from_sensitivity(found).counts(parts_of(found), sparsity))
    assert row.sum() == total
    cost = 0.0
    for count, curve in zip(row, curves, strict=True):
        cost += hull_value(curve, int(count))
    assert cost == pytest.approx(best.fun, abs=1e-7)


def hull_value(curve, at):
    """The lowest chord of a curve above a place, by trying all of them."""
    values = [drop for place, drop in curve if place == at]
    for (a, low), (b, high) in itertools.combinations(curve, 2):
        if a <= at <= b and a != b:
            values.append(low + (high - low) * (at - a) / (b - a))
    return min(values)


@settings(max_examples=10)
@given(st.data())
def test_least_of_all_ways_on_convex_curves(data):
    """Every split of the units of three small leaves is tried."""
    sizes = [5, 4, 6]
    drops = []
    for size in sizes:
        slopes = sorted(data.draw(st.lists(st.integers(-3, 9), min_size=size, max_size=size)))
        drops.append(np.cumsum([0, *slopes]).astype(float))
    removed = [[min(at, size) for at in range(1, 7)] for size in sizes]
    tall = [[drop[min(at, len(drop) - 1)] for at in range(1, 7)] for drop in drops]
    found = measured(sizes, removed, tall)
    counts = allocation_from_sensitivity(found).counts
    splits = itertools.product(*(range(size + 1) for size in sizes))
    least = {}
    for split in splits:
        cost = sum(drop[at] for drop, at in zip(drops, split, strict=True))
        least[sum(split)] = min(least.get(sum(split), math.inf), cost)
    for total in range(15):
        row = np.asarray(counts(parts_of(found), total / 15))
        assert row.sum() == total
        assert sum(drop[at] for drop, at in zip(drops, row, strict=True)) == least[total]


def test_equal_leaves_share_and_the_last_units_stay():
    found = measured([640, 640, 64], [[320], [320], [32]], [[0.0], [0.0], [0.0]])
    counts = allocation_from_sensitivity(found).counts
    for sparsity in (0.1, 0.25, 0.4, 0.7, 0.95):
        row = np.asarray(counts(parts_of(found), sparsity))
        np.testing.assert_allclose(row / found.sizes, sparsity, atol=2 / 64)
    row = np.asarray(counts(parts_of(found), 1 - 3 / 1344))
    np.testing.assert_array_equal(row, [639, 639, 63])


def test_large_leaves_are_counted_to_the_unit():
    """Beyond what float32 resolves, and beyond 31 bits in all."""
    sizes = [2_000_000_001, 2_000_000_003]
    found = measured(sizes, [[1_000_000_001], [1_999_999_999]], [[0.1], [0.9]])
    counts = allocation_from_sensitivity(found).counts
    for sparsity in (0.1234567, 0.5, 0.7777777, 0.9999999):
        row = np.asarray(counts(parts_of(found), sparsity)).astype(np.int64)
        assert row.sum() == removal_count_exact(sparsity, sum(sizes))
    np.testing.assert_array_equal(counts(parts_of(found), 0.125)[1], 0)


def test_units_of_other_structures():
    """Measured weight by weight, used by block: the same fractions."""
    found = sensitivity(PARAMS, evaluate, ASKED)
    allocation = allocation_from_sensitivity(found)
    kept = masks(jax.tree.map(jnp.abs, PARAMS), 0.5, Block((4, 4)), allocation)
    removed = [int(jnp.sum(~kept[name]["kernel"])) for name in SHAPES]
    assert sum(removed) == 16 * removal_count_exact(0.5, sum(found.sizes) // 16)
    assert all(count % 16 == 0 for count in removed)


def test_better_than_uniform_on_a_network_that_needs_it():
    """One layer takes no part in the output: all of the sparsity goes there first."""
    params = {**PARAMS, "unused": {"kernel": jnp.ones((16, 16))}}
    found = sensitivity(params, evaluate, (0.25, 0.5, 0.75, 0.9))
    unused = found.drops[found.paths.index("unused/kernel")]
    np.testing.assert_allclose(unused, 0, atol=1e-12)  # compiled, and called as it is
    allocation = allocation_from_sensitivity(found)
    kept = masks(jax.tree.map(jnp.abs, params), 230 / 624, allocation=allocation)
    assert int(jnp.sum(~kept["unused"]["kernel"])) == 230
    assert all(bool(jnp.all(kept[name]["kernel"])) for name in SHAPES)
    most = to_accuracy(params, evaluate, 1e-12, allocation=allocation, tolerance=0.002)
    assert 230 / 624 - 0.002 <= most.sparsity <= 231 / 624


def test_leaves_that_do_not_fit_are_named():
    found = measured([10, 20], [[5], [10]], [[1.0], [2.0]])
    counts = allocation_from_sensitivity(found).counts
    parts = parts_of(found)
    with pytest.raises(ValueError, match=r"head/kernel, tail/kernel: not measured .*nearest"):
        counts({**parts, "head/kernel": Part((2, 2), 4), "tail/kernel": Part((2, 2), 4)}, 0.5)
    with pytest.raises(ValueError, match="leaf 1: 21 weights, but 20 when"):
        counts({**parts, "leaf 1": Part((3, 7), 21)}, 0.5)
    # Fewer leaves than were measured are no mistake.
    np.testing.assert_array_equal(counts({"leaf 1": parts["leaf 1"]}, 0.5), [10])


def test_hull_against_all_chords():
    rng = np.random.default_rng(1)
    for _ in range(20):
        places = np.unique(np.concatenate([[0], rng.integers(1, 30, 6)])).astype(float)
        curve = np.stack([places, rng.normal(size=places.size)], axis=1)
        hull = lower_hull(curve)
        for at in range(int(places[-1]) + 1):
            expected = hull_value(curve.tolist(), at)
            assert np.interp(at, hull[:, 0], hull[:, 1]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_as_on_one_device(kind):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))

    def kept(params):
        return sum(jnp.sum(jnp.abs(params[name]["kernel"])) for name in SHAPES)

    on_one = sensitivity(PARAMS, kept, ASKED)
    allocation = allocation_from_sensitivity(on_one)
    params = jax.device_put(
        PARAMS,
        jax.tree.map(
            lambda leaf: NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "x")), PARAMS
        ),
    )
    found = sensitivity(params, kept, ASKED)
    np.testing.assert_array_equal(found.removed, on_one.removed)
    np.testing.assert_allclose(found.values, on_one.values, rtol=1e-5)
    one, many = (
        to_accuracy(tree, kept, 40.0, allocation=allocation, tolerance=0.02)
        for tree in (PARAMS, params)
    )
    assert one.sparsity == many.sparsity > 0
    for name in SHAPES:
        leaf = many.params[name]["kernel"]
        np.testing.assert_array_equal(leaf, one.params[name]["kernel"])
        assert leaf.sharding.is_equivalent_to(params[name]["kernel"].sharding, 2)


def test_modules_of_nnx_and_norms_of_inputs():
    """WANDA per output on an NNX model: the published choice, written again in numpy."""
    module_ = nnx.Sequential(
        nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 4, rngs=nnx.Rngs(1))
    )
    graph, state = nnx.split(module_)
    apply = lambda state, x: nnx.merge(graph, state)(x)
    target = apply(state, INPUTS)
    loss = lambda state: -jnp.mean((apply(state, INPUTS) - target) ** 2)
    norms = input_norms(apply, state, [INPUTS])
    how = {"score": scores.wanda, "evidence": norms, "structure": Element(within=-1)}
    found = sensitivity(state, loss, (0.5, 0.75), **how)
    path = next(path for path in found.paths if norms[path].shape[0] == 8)
    kernel = np.asarray(tree_lib.flatten(state)[path], np.float64)
    ranked = np.abs(kernel) * np.linalg.norm(np.asarray(INPUTS, np.float64), axis=0)[:, None]
    order = np.argsort(np.argsort(ranked, axis=0, kind="stable"), axis=0)
    pruned = tree_lib.replace(
        state, {path: jnp.asarray(np.where(order < 4, 0, kernel), jnp.float32)}
    )
    at = found.paths.index(path)
    assert found.values[at, 0] == pytest.approx(float(loss(pruned)), rel=1e-4)
    np.testing.assert_array_equal(found.removed[at], [64, 96])
    best = to_accuracy(state, loss, float(found.drops.max()), **how, allocation=uniform)
    assert 0 < best.sparsity < 1
    assert float(loss(best.params)) == pytest.approx(best.value, rel=1e-4)
    assert jax.tree.structure(best.params) == jax.tree.structure(state)
