"""Every score against a float64 form written from its paper, and what holds for all of them."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp import tree as tree_lib
from jaxcomp.prune import scores
from jaxcomp.prune.masks import masks

REFERENCES = {
    # name: (score, its float64 form of weight and evidence)
    "magnitude": (scores.magnitude, lambda w, e: np.sqrt(w * w)),
    "l2": (scores.l2, lambda w, e: w * w),
    "gradient": (scores.gradient, lambda w, e: np.sqrt(e * e)),
    "taylor": (scores.taylor, lambda w, e: np.abs(w) * np.abs(e)),
    "snip": (scores.snip, lambda w, e: np.abs(w) * np.abs(e)),
    "grasp": (scores.grasp, lambda w, e: -(-w * e)),
    "synaptic_flow": (scores.synaptic_flow, lambda w, e: np.abs(w) * np.abs(e)),
    "wanda": (scores.wanda, lambda w, e: np.abs(w) * e),
    "obd": (scores.obd, lambda w, e: e * w * w / 2),
    "fisher": (scores.fisher, lambda w, e: e),
    "fisher_weighted": (scores.fisher_weighted, lambda w, e: w * w * e),
}
NEED_NOTHING = ("magnitude", "l2")
numbers = st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)


@pytest.mark.parametrize("name", REFERENCES)
@settings(max_examples=15)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6))
def test_against_the_formula_in_float64(name, pairs):
    score, reference = REFERENCES[name]
    weight, evidence = np.array(pairs, np.float32).T
    found = score(jnp.asarray(weight), jnp.asarray(evidence))
    assert found.shape == weight.shape
    expected = reference(weight.astype(np.float64), evidence.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=3e-7)


@pytest.mark.parametrize("name", [n for n in REFERENCES if n != "magnitude"])
def test_half_precision_is_widened_before_it_is_multiplied(name):
    score, reference = REFERENCES[name]
    # Squares of these leave float16 at both ends, and their products need more than its 11 bits.
    weight = jnp.array([300.0, 1e-5, 1.001], jnp.float16)
    evidence = jnp.array([300.0, 1e-5, 0.999], jnp.float16)
    found = score(weight, evidence)
    assert found.dtype == jnp.float32
    expected = reference(np.asarray(weight, np.float64), np.asarray(evidence, np.float64))
    np.testing.assert_allclose(found, expected, rtol=3e-7)


def test_magnitude_keeps_the_dtype():
    assert scores.magnitude(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", [n for n in REFERENCES if n not in NEED_NOTHING])
def test_missing_evidence_is_named(name):
    with pytest.raises(ValueError, match=rf"^{name} reads .*, and got None: pass it"):
        REFERENCES[name][0](jnp.ones(2), None)


@pytest.mark.parametrize("name", ["running_fisher", "movement"])
def test_missing_gradients_of_running_scores_are_named(name):
    score = getattr(scores, name)()
    with pytest.raises(ValueError, match=rf"^{name} reads a gradient of each leaf, and got None"):
        score.accumulate(score.init("kernel", jnp.ones(2)), jnp.ones(2), None)


def test_evidence_that_does_not_fit():
    with pytest.raises(ValueError, match=r"wanda: evidence of shape \(3,\) for a leaf of shape"):
        scores.wanda(jnp.ones((2, 2)), jnp.ones(3))
    with pytest.raises(ValueError, match=r"wanda: evidence of shape \(1, 2, 2\)"):
        scores.wanda(jnp.ones((2, 2)), jnp.ones((1, 2, 2)))


def test_snip_and_taylor_are_the_same_numbers():
    weight, gradient = jax.random.normal(jax.random.key(0), (2, 50))
    np.testing.assert_array_equal(scores.snip(weight, gradient), scores.taylor(weight, gradient))


def test_units_by_l2_are_ordered_by_their_euclidean_norm():
    weight = jax.random.normal(jax.random.key(0), (7, 30))
    order = np.argsort(np.linalg.norm(np.asarray(weight, np.float64), axis=0))
    np.testing.assert_array_equal(np.argsort(jnp.mean(scores.l2(weight), 0)), order)


def history(steps=6, size=5):
    weights, gradients = np.random.default_rng(0).normal(size=(2, steps, size))
    return weights, gradients


def run(score, weights, gradients):
    """Inside one scan, as a train step would."""
    weights, gradients = jnp.float32(weights), jnp.float32(gradients)
    kept = score.init("layer/kernel", weights[0])
    kept, _ = jax.lax.scan(
        lambda kept, x: (score.accumulate(kept, *x), None), kept, (weights, gradients)
    )
    return jax.jit(score.score)(weights[-1], kept)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("decay", [None, 0.0, 0.9])
def test_running_fisher(decay, weighted):
    weights, gradients = history()
    expected = np.zeros(5)
    for g in gradients:
        expected = expected + g**2 if decay is None else decay * expected + (1 - decay) * g**2
    expected = expected * weights[-1] ** 2 if weighted else expected
    found = run(scores.running_fisher(decay, weighted=weighted), weights, gradients)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("decay", [1, -0.1, 1.5, float("nan")])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match="decay is"):
        scores.running_fisher(decay)


def test_movement_is_the_negative_sum():
    weights, gradients = history()
    expected = -sum(w * g for w, g in zip(weights, gradients, strict=True))
    np.testing.assert_allclose(run(scores.movement(), weights, gradients), expected, rtol=2e-6)


def test_movement_keeps_what_training_moves_away_from_zero():
    score, rate = scores.movement(), 0.1
    weight = jnp.array([0.5, -0.5, 0.5, -0.5])
    target = jnp.array([2.0, -2.0, 0.1, -0.1])
    kept = score.init("kernel", weight)
    for _ in range(5):
        gradient = weight - target
        kept = score.accumulate(kept, weight, gradient)
        weight = weight - rate * gradient
    removed = jnp.argsort(score.score(weight, kept))[:2]
    assert set(removed.tolist()) == {2, 3}


def test_running_scores_add_up_in_float32():
    score, weight = scores.running_fisher(), jnp.ones(1, jnp.bfloat16)
    kept = score.init("kernel", weight)
    for _ in range(600):
        kept = score.accumulate(kept, weight, weight)
    assert kept.dtype == jnp.float32
    assert score.score(weight, kept)[0] == 600


def test_random_stays_the_same_and_leaves_are_independent():
    score, weight = scores.random(jax.random.key(7)), jnp.zeros((40, 50))
    kept = score.init("a/kernel", weight)
    first = score.score(weight, kept)
    later = score.score(weight + 1, score.accumulate(kept, weight, weight))
    np.testing.assert_array_equal(first, later)
    np.testing.assert_array_equal(first, score.score(weight, score.init("a/kernel", weight)))
    for other in (
        score.score(weight, score.init("b/kernel", weight)),
        scores.random(jax.random.key(8)).score(weight, kept),
    ):
        assert abs(np.corrcoef(np.ravel(first), np.ravel(other))[0, 1]) < 0.1
    assert np.asarray(kept) == zlib.crc32(b"a/kernel")
    # Uniform: the share below each of nine marks is what it should be, to five deviations.
    marks = np.arange(1, 10) / 10
    shares = np.mean(np.ravel(first)[:, None] < marks, axis=0)
    np.testing.assert_allclose(shares, marks, atol=5 * 0.5 / 2000**0.5)


def test_scores_under_jit_and_vmap():
    weight, evidence = jnp.abs(jax.random.normal(jax.random.key(1), (2, 4, 3)))
    for name, (score, _) in REFERENCES.items():
        expected = score(weight, evidence)
        np.testing.assert_array_equal(jax.jit(score)(weight, evidence), expected, err_msg=name)
        mapped = jax.vmap(score, in_axes=1, out_axes=1)(weight, evidence)
        np.testing.assert_array_equal(mapped, expected, err_msg=name)


def test_a_nan_gradient_is_refused_by_masks_with_its_path():
    params = {"block": {"kernel": jnp.ones((2, 2)), "other": jnp.ones((2, 2))}}
    bad = jnp.array([[1.0, jnp.nan], [0.0, 0.0]])
    gradients = {"block": {"kernel": bad, "other": jnp.ones((2, 2))}}
    for score in (scores.taylor, scores.obd, scores.grasp, scores.fisher_weighted):
        with pytest.raises(ValueError, match="block/kernel: 1 of 4 values are NaN"):
            masks(jax.tree.map(score, params, gradients), 0.5)


def test_the_ten_lines_of_the_module_docstring():
    def mean_gradient(decay):
        return scores.RunningScore(
            init=lambda path, weight: jnp.zeros(weight.shape),
            accumulate=lambda kept, weight, g: decay * kept + (1 - decay) * g,
            score=lambda weight, kept: jnp.abs(weight * kept),
        )

    weights, gradients = history()
    expected = np.zeros(5)
    for g in gradients:
        expected = 0.5 * expected + 0.5 * g
    found = run(mean_gradient(0.5), weights, gradients)
    np.testing.assert_allclose(found, np.abs(weights[-1] * expected), rtol=1e-5)


def test_negative_scores_go_first():
    weight = tree_lib.Leaves(kernel=jnp.array([[1.0, 1.0, 1.0, 1.0]]))
    evidence = tree_lib.Leaves(kernel=jnp.array([[-3.0, 0.0, 2.0, -1.0]]))
    kept = masks(jax.tree.map(scores.grasp, weight, evidence), 0.5)
    np.testing.assert_array_equal(kept["kernel"], [[False, True, True, False]])
