"""Objectives against scikit-learn, the model reader and a clock of our own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from jaxcomp import model
from jaxcomp.search import objectives

RNG = np.random.default_rng(0)
CLASSES = 5


def drawn(count, classes=CLASSES):
    """Logits that are right half of the time, for labels that need not hold every class."""
    labels = RNG.integers(0, classes - 1, count)
    logits = RNG.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 1.0
    return logits, labels


def test_measures_are_those_of_scikit_learn():
    measures = {name: jax.jit(getattr(objectives, name)) for name in ("accuracy", "cross_entropy")}
    f1 = jax.jit(objectives.f1, static_argnums=2)
    for _ in range(20):
        logits, labels = drawn(24)
        predicted = logits.argmax(1)
        np.testing.assert_allclose(
            measures["accuracy"](logits, labels), metrics.accuracy_score(labels, predicted)
        )
        for average in ("macro", "micro"):
            wanted = metrics.f1_score(labels, predicted, average=average, zero_division=0)
            found = f1(logits, labels, average)
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
        chances = np.exp(logits.astype(np.float64))
        chances /= chances.sum(1, keepdims=True)
        np.testing.assert_allclose(
            measures["cross_entropy"](logits, labels),
            metrics.log_loss(labels, chances, labels=range(CLASSES)),
            rtol=1e-5,
        )


def test_binary_f1_is_that_of_class_one():
    for labels in ([0, 1, 1, 0, 1], [0] * 5, [1] * 5):
        for predicted in ([0, 1, 0, 1, 1], [0] * 5):
            logits = np.eye(2, dtype=np.float32)[predicted]
            wanted = metrics.f1_score(labels, predicted, zero_division=0)
            found = objectives.f1(logits, np.array(labels), "binary")
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="of 5 classes"):
        objectives.f1(np.zeros((2, 5)), np.zeros(2, int), "binary")


def test_they_work_side_by_side_and_a_lost_network_is_lost_alone():
    logits, labels = drawn(24)
    many = np.stack([logits, logits * np.nan, -logits])
    for measure in (objectives.accuracy, objectives.f1, objectives.cross_entropy):
        found = np.asarray(jax.jit(jax.vmap(measure, in_axes=(0, None)))(many, labels))
        assert np.isnan(found).tolist() == [False, True, False]
        np.testing.assert_allclose(found[0], measure(logits, labels), rtol=1e-6)


@pytest.mark.parametrize("measure", [objectives.accuracy, objectives.f1, objectives.cross_entropy])
def test_shapes_that_do_not_go_together_are_refused(measure):
    with pytest.raises(ValueError, match="do not go together"):
        measure(np.zeros((3, 2)), np.zeros((3, 1), int))
    with pytest.raises(ValueError, match="labels are empty"):
        measure(np.zeros((0, 2)), np.zeros(0, int))


def test_labels_that_are_no_classes_are_not_measured():
    logits = np.eye(3, dtype=np.float32)
    for measure in (objectives.accuracy, objectives.f1, objectives.cross_entropy):
        for wrong in (-1, 3):
            assert np.isnan(jax.jit(measure)(logits, np.array([0, 1, wrong])))
        with pytest.raises(TypeError, match="labels are of float32: give class numbers"):
            measure(logits, np.zeros(3, np.float32))


def test_costs_are_those_of_the_model_reader_and_need_no_arrays():
    params = {"w": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((3, 8), jnp.bfloat16)
    found = objectives.costs(lambda p, x: jax.nn.relu(x @ p["w"]), params, x)
    total = model.trace(lambda p, x: jax.nn.relu(x @ p["w"]), params, x).total
    assert found == {"parameters": 32, "bytes": 64, "flops": total.flops, "macs": 96}


def test_latency_is_the_median_of_the_runs_that_count():
    # Each run is two looks at the clock; the first two runs are warm-up.
    spans = iter([50.0, 40.0, 1.0, 9.0, 2.0])
    now = [0.0, False]

    def clock():
        if now[1]:
            now[0] += next(spans)
        now[1] = not now[1]
        return now[0]

    traced = []

    def function(x):
        traced.append(x)
        return x * 2

    assert objectives.latency(function, 1.0, repeats=3, warm_up=2, clock=clock) == 2000.0
    assert len(traced) == 1
    assert objectives.latency(jnp.sin, np.ones(4), repeats=2) > 0
    with pytest.raises(ValueError, match="repeats is 0"):
        objectives.latency(jnp.sin, 1.0, repeats=0)
