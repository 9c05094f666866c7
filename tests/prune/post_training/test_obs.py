"""Second-order pruning of one matrix against float64 forms of what was published."""

import itertools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.prune.masks import masks
from jaxcomp.prune.post_training.column_walk import block_counts, sparsegpt_matrix
from jaxcomp.prune.post_training.obs import optimal_brain_surgeon, output_error, repair
from jaxcomp.prune.structures import NM, Block, Element

PER_OUTPUT = Element(within=-1)
FEATURES, OUTPUTS = 8, 3
seeds = st.integers(0, 2**32 - 1)


def problem(seed, features=FEATURES, outputs=OUTPUTS, samples=40, spread=0.3):
    """A weight, correlated inputs and their second moment, in float64 of float32 values."""
    rng = np.random.default_rng((seed, features, outputs, samples))
    mix = spread * np.eye(features) + rng.normal(size=(features, features)) / features**0.5
    x = np.float32(rng.normal(size=(samples, features)) @ mix).astype(np.float64)
    weight = np.float32(rng.normal(size=(features, outputs))).astype(np.float64)
    return weight, x, x.T @ x / samples


def f32(x):
    return jnp.asarray(x, jnp.float32)


def error(weight, new, moment):
    change = weight - np.asarray(new, np.float64)
    return np.trace(change.T @ moment @ change)


def least_squares(weight, x, mask):
    """The best values of the kept weights, by numpy's own solver on the samples themselves."""
    new = np.zeros_like(weight)
    for output in range(weight.shape[1]):
        kept = mask[:, output]
        goal = x @ weight[:, output]
        new[kept, output] = np.linalg.lstsq(x[:, kept], goal, rcond=None)[0]
    return new


def best_masks(weight, x, moment, count):
    """Of every output, the best of all masks that remove ``count``; by trying them all."""
    features = len(weight)
    kept = np.ones(weight.shape, bool)
    for output in range(weight.shape[1]):
        found = []
        column = weight[:, [output]]
        for gone in itertools.combinations(range(features), count):
            mask = np.ones((features, 1), bool)
            mask[list(gone)] = False
            found.append((error(column, least_squares(column, x, mask), moment), gone))
        kept[list(min(found)[1]), output] = False
    return kept


# SparseGPT.


def algorithm_1(weight, moment, share, structure, block, damping):
    """Frantar & Alistarh 2023, Algorithm 1, as printed: W is (outputs, features)."""
    w = weight.T.copy()
    rows, columns = w.shape
    hessian = moment + damping * np.mean(np.diag(moment)) * np.eye(columns)
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T
    mask = np.ones(w.shape, bool)
    for i in range(0, columns, block):
        end = min(i + block, columns)
        errors = np.zeros((rows, end - i))
        for j in range(i, end):
            step = structure.m if isinstance(structure, NM) else block
            if (j - i) % step == 0:
                last = min(j + step, end)
                scores = w[:, j:last] ** 2 / np.diag(inverse)[j:last] ** 2
                if isinstance(structure, NM):
                    lowest = np.argsort(scores, 1)[:, : structure.m - structure.n]
                    np.put_along_axis(mask[:, j:last], lowest, False, 1)
                elif structure == PER_OUTPUT:
                    lowest = np.argsort(scores, 1)[:, : share(i, end)]
                    np.put_along_axis(mask[:, j:last], lowest, False, 1)
                else:
                    lowest = np.argsort(scores, axis=None)[: share(i, end)]
                    chosen = np.ones(scores.size, bool)
                    chosen[lowest] = False
                    mask[:, j:last] = chosen.reshape(scores.shape)
            errors[:, j - i] = np.where(mask[:, j], 0, w[:, j] / inverse[j, j])
            w[:, j:end] -= np.outer(errors[:, j - i], inverse[j, j:end])
        w[:, end:] -= errors @ inverse[i:end, end:]
    return (w * mask).T, mask.T


@pytest.mark.parametrize(
    ("structure", "block", "features"),
    [
        (Element(), 5, 12),
        (PER_OUTPUT, 4, 12),
        (NM(2, 4), 8, 12),
    ],
)
def test_the_walk_is_that_of_the_paper(structure, block, features):
    each = 1 if structure == PER_OUTPUT else 5
    half = lambda i, end: (each * end + 1) // 2 - (each * i + 1) // 2  # half up, in all so far
    for seed in range(5):
        weight, _, moment = problem(seed, features, 5)
        expected, kept = algorithm_1(weight, moment, half, structure, block, 0.01)
        sparsity = None if isinstance(structure, NM) else 0.5
        found = sparsegpt_matrix(f32(weight), f32(moment), sparsity, structure, block)
        np.testing.assert_array_equal(found.mask, kept)
        np.testing.assert_allclose(found.weight, expected, rtol=2e-3, atol=2e-4)


@given(seeds, st.floats(0, 0.99), st.sampled_from([Element(), PER_OUTPUT]), st.sampled_from([1, 5]))
@settings(max_examples=10)
def test_as_many_go_as_of_a_mask_by_magnitude(seed, sparsity, structure, matrices):
    size = 3
    counts = np.asarray(block_counts(sparsity, structure, FEATURES, OUTPUTS, size, matrices))
    leaf = jnp.abs(f32(np.random.default_rng(seed).normal(size=(matrices, FEATURES, OUTPUTS))))
    within = (0, 2) if structure == PER_OUTPUT else None
    try:
        kept = np.asarray(masks({"a": leaf}, sparsity, Element(within))["a"])
    except ValueError:  # nothing would be left
        kept = np.zeros(leaf.shape, bool)
    if structure == PER_OUTPUT:
        assert (np.sum(~kept, 1) == counts.sum(1)[:, None]).all()
    else:
        assert np.sum(~kept) == counts.sum()
        assert np.ptp(counts.sum(1)) <= 1
    assert (counts <= size * (1 if structure == PER_OUTPUT else OUTPUTS)).all()


@given(seeds, st.sampled_from([0.0, 0.1, 0.37, 0.5, 0.9]), st.sampled_from([Element(), PER_OUTPUT]))
@settings(max_examples=10)
def test_exactly_what_is_asked_is_removed(seed, sparsity, structure):
    weight, _, moment = problem(seed)
    new, mask = sparsegpt_matrix(f32(weight), f32(moment), sparsity, structure, 3)
    assert np.sum(~mask) == np.sum(block_counts(sparsity, structure, FEATURES, OUTPUTS, 3)) * (
        OUTPUTS if structure == PER_OUTPUT else 1
    )
    assert not np.any(np.where(mask, 0, new))
    if sparsity == 0:
        np.testing.assert_array_equal(new, f32(weight))


@pytest.mark.parametrize(("n", "m"), [(3, 4), (1, 2)])
def test_runs_keep_n_of_m(n, m):
    weight, _, moment = problem(n + m)
    _, mask = sparsegpt_matrix(f32(weight), f32(moment), structure=NM(n, m), block_size=6)
    assert (np.sum(mask.reshape(-1, m, OUTPUTS), 1) == n).all()
    with pytest.raises(ValueError, match="removes at most"):
        sparsegpt_matrix(f32(weight), f32(moment), 0.9, NM(n, m))


def test_better_than_without_repair_and_no_better_than_the_optimum():
    """Four of eight weights of each output; means over problems, the bound in each."""
    totals = dict.fromkeys(["best", "surgeon", "sparsegpt", "wanda", "magnitude"], 0.0)
    for seed in range(6):
        weight, x, moment = problem(seed)
        norms = np.sqrt(np.diag(moment))[:, None]
        w, h = f32(weight), f32(moment)
        results = {
            "best": least_squares(weight, x, best_masks(weight, x, moment, 4)),
            "surgeon": optimal_brain_surgeon(w, h, 4, PER_OUTPUT).weight,
            "sparsegpt": sparsegpt_matrix(w, h, 0.5, PER_OUTPUT, 3).weight,
        }
        for name, scores in (("wanda", abs(weight) * norms), ("magnitude", abs(weight))):
            results[name] = np.where(scores > np.sort(scores, 0)[3], weight, 0)
        least = error(weight, results["best"], moment)
        for name, new in results.items():
            assert (np.sum(np.asarray(new) == 0, 0) == 4).all()
            found = error(weight, new, moment)
            assert found >= least * (1 - 1e-6)
            totals[name] += found / error(weight, 0 * weight, moment)
    assert totals["best"] <= totals["surgeon"] < totals["sparsegpt"] < totals["wanda"]
    assert totals["surgeon"] < 1.5 * totals["best"]
    assert totals["wanda"] < totals["magnitude"]


# Repair.


@given(seeds, st.floats(0.1, 0.9))
@settings(max_examples=12)
def test_repair_is_least_squares(seed, density):
    weight, x, moment = problem(seed)
    mask = np.random.default_rng(seed).random(weight.shape) < density
    expected = least_squares(weight, x, mask)
    found = repair(f32(weight), f32(moment), mask)
    # float32 moments of a condition of some thousands: the error is what must agree.
    size = error(weight, 0 * weight, moment)
    best = error(weight, expected, moment)
    assert best - 1e-9 * size <= error(weight, found, moment) <= best + 1e-5 * size
    assert not np.any(np.where(mask, 0, found))
    whole = mask.all(0)
    np.testing.assert_array_equal(np.asarray(found)[:, whole], f32(weight)[:, whole])


def test_repair_of_the_best_mask_is_the_optimum():
    weight, x, moment = problem(7, features=6)
    best = best_masks(weight, x, moment, 3)
    found = repair(f32(weight), f32(moment), best)
    np.testing.assert_allclose(found, least_squares(weight, x, best), rtol=1e-3, atol=1e-4)


def test_damping_holds_the_kept_weights():
    weight, _, moment = problem(5)
    mask = np.arange(FEATURES)[:, None] % 2 == np.arange(OUTPUTS) % 2
    damping = 0.5 * np.mean(np.diag(moment))
    expected = np.where(mask, weight, 0)
    for output in range(OUTPUTS):
        kept = mask[:, output]
        system = moment[np.ix_(kept, kept)] + damping * np.eye(kept.sum())
        lost = moment[np.ix_(kept, ~kept)] @ weight[~kept, output]
        expected[kept, output] += np.linalg.solve(system, lost)
    found = repair(f32(weight), f32(moment), mask, damping=0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# The surgeon.


def greedy(weight, x, moment, count, per_output):
    """Each time the weight whose loss costs least after the best values for the rest."""
    kept = np.ones(weight.shape, bool)
    fits = lambda kept, o: error(
        weight[:, [o]], least_squares(weight[:, [o]], x, kept[:, [o]]), moment
    )
    for _ in range(count):
        costs = np.full(weight.shape, np.inf)
        for i, o in np.argwhere(kept):
            less = kept.copy()
            less[i, o] = False
            costs[i, o] = fits(less, o) - fits(kept, o)
        if per_output:
            kept[np.argmin(costs, 0), np.arange(weight.shape[1])] = False
        else:
            kept[np.unravel_index(np.argmin(costs), costs.shape)] = False
    return kept


@pytest.mark.parametrize(("structure", "count"), [(Element(), 10), (PER_OUTPUT, 4)])
def test_the_surgeon_takes_what_costs_least(structure, count):
    for seed in range(3):
        weight, x, moment = problem(seed)
        expected = greedy(weight, x, moment, count, structure == PER_OUTPUT)
        found = optimal_brain_surgeon(f32(weight), f32(moment), count, structure)
        np.testing.assert_array_equal(found.mask, expected)
        best = least_squares(weight, x, expected)
        np.testing.assert_allclose(found.weight, best, rtol=5e-3, atol=5e-4)


def test_the_surgeon_can_take_all_or_nothing():
    weight, _, moment = problem(1)
    for count in (0, weight.size):
        found = optimal_brain_surgeon(f32(weight), f32(moment), count)
        assert np.sum(~found.mask) == count
        np.testing.assert_array_equal(found.weight, f32(weight) if count == 0 else 0 * weight)


# Hessians that are hard.


def hard(kind):
    weight, x, _ = problem(3, samples=3 if kind == "few samples" else 40)
    if kind == "repeated":
        x[:, 4:] = x[:, :4]
    elif kind == "dead":
        x[:, [1, 6]] = 0
    elif kind == "all dead":
        x[:] = 0
    elif kind == "tiny":
        x *= 1e-15
    elif kind == "huge":
        x *= 1e12
    elif kind == "uneven":
        x *= 10.0 ** np.arange(-4, 4)
    return weight, x, x.T @ x / len(x)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize(
    "kind", ["few samples", "repeated", "dead", "all dead", "tiny", "huge", "uneven"]
)
def test_hard_hessians(kind, damping):
    weight, x, moment = hard(kind)
    size = max(error(weight, 0 * weight, moment), 1e-300)
    walked = sparsegpt_matrix(f32(weight), f32(moment), 0.5, Element(), 3, damping)
    operated = optimal_brain_surgeon(f32(weight), f32(moment), 12, Element(), damping)
    for new, mask in (walked, operated):
        assert np.isfinite(new).all()
        assert np.sum(~mask) == 12
        # Correcting is no worse than leaving what the mask keeps as it was.
        fixed = repair(f32(weight), f32(moment), mask, damping)
        plain = error(weight, np.where(mask, weight, 0), moment)
        best = error(weight, least_squares(weight, x, np.asarray(mask)), moment)
        assert error(weight, fixed, moment) <= plain + 1e-5 * size
        if damping == 0:
            assert error(weight, fixed, moment) <= best + 1e-4 * size
        # Nothing is blown up to make up for little.
        assert np.max(np.abs(fixed)) <= 1e3 * np.max(np.abs(weight))
    if kind == "dead":
        dead = np.array([1, 6])
        np.testing.assert_array_equal(operated.mask[dead], False)
        kept = np.asarray(walked.mask)[dead]
        np.testing.assert_array_equal(
            np.asarray(walked.weight)[dead][kept], f32(weight)[dead][kept]
        )
    if kind == "all dead":
        by_magnitude = masks({"a": jnp.abs(f32(weight))}, 0.5)["a"]
        np.testing.assert_array_equal(operated.mask, by_magnitude)
    if kind == "repeated":
        assert error(weight, operated.weight, moment) <= 1e-4 * size


def test_ties_go_in_the_order_of_the_matrix():
    weight, moment = jnp.ones((FEATURES, OUTPUTS)), jnp.eye(FEATURES)
    operated = optimal_brain_surgeon(weight, moment, 12)
    np.testing.assert_array_equal(operated.mask.ravel(), np.arange(24) >= 12)
    # Half of 9, of 18 and of 24, rounded up, are gone after each block of three features.
    walked = sparsegpt_matrix(weight, moment, 0.5, block_size=3)
    place = np.arange(24) % 9
    lost = np.repeat([5, 4, 3], [9, 9, 6])
    np.testing.assert_array_equal(walked.mask.ravel(), place >= lost)
    for found in (operated, walked):
        np.testing.assert_allclose(found.weight, found.mask, rtol=1e-6)
    runs = sparsegpt_matrix(weight, moment, structure=NM(1, 2), block_size=6).mask
    np.testing.assert_array_equal(runs[:, 0], np.arange(FEATURES) % 2 == 1)


# Inside transformations.


def test_traced_and_mapped():
    stack = [problem(seed) for seed in range(2)]
    weights = jnp.stack([f32(weight) for weight, _, _ in stack])
    moments = jnp.stack([f32(moment) for _, _, moment in stack])
    mapped = jax.jit(
        jax.vmap(lambda w, h, s: sparsegpt_matrix(w, h, s, block_size=3), in_axes=(0, 0, None))
    )
    new, mask = mapped(weights, moments, 0.37)
    for i in range(2):
        alone = sparsegpt_matrix(weights[i], moments[i], 0.37, block_size=3)
        np.testing.assert_array_equal(mask[i], alone.mask)
        np.testing.assert_allclose(new[i], alone.weight, rtol=1e-4, atol=1e-5)


def operations(jaxpr):
    """How many there are, those of loops and calls included."""
    inner = [sub for eqn in jaxpr.eqns for sub in jex.jaxprs_in_params(eqn.params)]
    return len(jaxpr.eqns) + sum(map(operations, inner))


def test_programs_do_not_grow_with_the_features():
    def sizes(features):
        moment, weight = jnp.eye(features), jnp.ones((features, 2))
        programs = [
            jax.make_jaxpr(lambda w, h: sparsegpt_matrix(w, h, 0.5, block_size=4))(weight, moment),
            jax.make_jaxpr(lambda w, h: optimal_brain_surgeon(w, h, features))(weight, moment),
            jax.make_jaxpr(lambda w, h: repair(w, h, w > 0))(weight, moment),
        ]
        return [operations(program.jaxpr) for program in programs]

    assert sizes(8) == sizes(64)


def test_output_error_is_that_of_the_samples():
    weight, x, moment = problem(2)
    other, _, _ = problem(3)
    expected = np.mean(np.sum((x @ weight - x @ other) ** 2, 1))
    np.testing.assert_allclose(
        output_error(f32(weight), f32(other), f32(moment)), expected, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": jnp.ones((8, 3)).at[0, 0].set(jnp.nan)}, "weight has NaN"),
        ({"moment": jnp.eye(8).at[0, 0].set(jnp.inf)}, "second_moment has NaN"),
        ({"moment": jnp.eye(7)}, r"\(8, 3\) and second moment \(7, 7\)"),
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": None}, "needs a sparsity"),
        ({"sparsity": None, "structure": NM(2, 5)}, "divisible by 5"),
        ({"sparsity": None, "structure": NM(2, 3, axis=-1)}, "walk over features"),
        ({"structure": Block((2, 3))}, "walk over features"),
        ({"structure": Element(within=0)}, "walk over features"),
        ({"block_size": 0}, "block_size is 0"),
    ],
)
def test_bad_input(change, words):
    weight, moment = change.pop("weight", jnp.ones((8, 3))), change.pop("moment", jnp.eye(8))
    change = {"sparsity": 0.5} | change
    with pytest.raises(ValueError, match=words):
        sparsegpt_matrix(weight, moment, **change)


def test_bad_counts():
    with pytest.raises(ValueError, match="count is 25, but there are 24"):
        optimal_brain_surgeon(jnp.ones((8, 3)), jnp.eye(8), 25)
    with pytest.raises(ValueError, match="count is 9, but there are 8"):
        optimal_brain_surgeon(jnp.ones((8, 3)), jnp.eye(8), 9, PER_OUTPUT)
    with pytest.raises(ValueError, match="give Element"):
        optimal_brain_surgeon(jnp.ones((8, 3)), jnp.eye(8), 1, Element(within=0))
