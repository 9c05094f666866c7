"""What users get wrong is refused by name, also where nothing checks annotations, as users run."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxcomp.checks import as_patterns, check_amount, check_count, check_key, check_leaves
from jaxcomp.prune import scores
from jaxcomp.prune.channels.evidence import gather_evidence
from jaxcomp.prune.masks import resolve
from jaxcomp.prune.post_training import evidence, study
from jaxcomp.prune.post_training.obs import optimal_brain_surgeon, repair
from jaxcomp.prune.post_training.sensitivity import sensitivity
from jaxcomp.prune.post_training.sensitivity_allocation import allocation_from_sensitivity
from jaxcomp.prune.post_training.sparsegpt import sparsegpt
from jaxcomp.prune.post_training.synflow import synaptic_flow
from jaxcomp.prune.post_training.to_accuracy import to_accuracy
from jaxcomp.prune.post_training.wanda import wanda
from jaxcomp.prune.running_scores import running_fisher
from jaxcomp.prune.structures import NM, Block, Channel, Element
from jaxcomp.prune.widened import wide, wide_evidence

PARAMS: Any = {"up": {"kernel": jnp.eye(8)}, "down": {"kernel": jnp.ones((8, 4))}}
BATCHES = [jnp.ones((2, 8)), jnp.eye(8)]


def model(params, x):
    return jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def loss(params, x):
    return jnp.mean(model(params, x) ** 2)


def value(params):
    return -loss(params, BATCHES[1])


@pytest.fixture(autouse=True)
def as_users_run():
    """Without the checks of annotations that the tests of this project add."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sparsity": "0.5"}, TypeError, "sparsity must be a number"),
        ({"sparsity": None}, ValueError, "^up/kernel: .* needs a sparsity"),
        ({"structure": {"up/*": NM(2, 4)}, "sparsity": None}, ValueError, "^down/kernel: .* needs"),
        ({"structure": NM(2, 4), "sparsity": 0.9}, ValueError, "^up/kernel: .* removes at most"),
        ({"at_once": 1.5}, TypeError, "at_once must be a whole number, not 1.5"),
        ({"block_size": None}, TypeError, "block_size must be a whole number, not None"),
        ({"damping": -1.0}, ValueError, "damping is -1.0, but must be a finite number"),
        ({"damping": float("nan")}, ValueError, "damping is nan"),
        ({"damping": "a"}, TypeError, "damping must be a number"),
        ({"sequential": "no"}, TypeError, "sequential must be True or False, not 'no'"),
        ({"paths": 3}, TypeError, r"paths must be patterns, such as .* not 3"),
        ({"paths": []}, ValueError, "paths is empty"),
        ({"directory": 3}, TypeError, "directory must be a path, not 3"),
        ({"params": {**PARAMS, "act": max}}, TypeError, "act: .* is no array: give the arrays"),
    ],
)
def test_sparsegpt(change, error, words):
    call = {"params": PARAMS, "batches": BATCHES, "sparsity": 0.5} | change
    with pytest.raises(error, match=words):
        sparsegpt(model, call.pop("params"), call.pop("batches"), **call)


def test_an_iterator_that_is_returned_again_is_refused():
    once = iter(BATCHES)
    with pytest.raises(TypeError, match="returns the same list_iterator again"):
        sparsegpt(model, PARAMS, lambda: once, 0.5)


@pytest.mark.parametrize("structure", [Block((4, 4)), Element(-1), "2:4", {"*": NM(2, 4)}])
def test_wanda(structure):
    with pytest.raises(TypeError, match=r"structure must be NM\(n, m\), or None"):
        wanda(model, PARAMS, BATCHES, 0.5, structure)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_drop": None}, TypeError, "max_drop must be a number"),
        ({"tolerance": "a"}, ValueError, "tolerance is a sparsity .* not 'a'"),
        ({"max_evaluations": 1.5}, TypeError, "max_evaluations must be a whole number"),
        ({"max_seconds": "1"}, TypeError, "max_seconds must be a number"),
        ({"clock": None}, TypeError, "clock must be a function"),
        ({"allocation": "lamp"}, TypeError, "allocation must be one, .* not 'lamp'"),
        ({"paths": 1}, TypeError, "paths must be patterns"),
        ({"score": scores.movement()}, TypeError, "score remembers train steps"),
        ({"score": scores.movement}, TypeError, "^up/kernel: movement.. takes 0"),
        ({"score": lambda w, e: w * jnp.nan}, ValueError, "^up/kernel: 64 of 64 scores are NaN"),
        ({"score": lambda w, e: w > 0}, TypeError, "^up/kernel: the score gave bool"),
        ({"evidence": PARAMS}, ValueError, "scores.magnitude reads no evidence: give a score"),
        (
            {"score": scores.taylor, "evidence": {**PARAMS, "up": {"kernel": jnp.ones(3)}}},
            ValueError,
            r"^up/kernel: taylor: evidence of shape \(3,\) for a leaf of shape \(8, 8\)",
        ),
    ],
)
def test_to_accuracy(change, error, words):
    call = {"max_drop": 0.1, "paths": "up/*"} | change
    with pytest.raises(error, match=words):
        to_accuracy(PARAMS, value, **call)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sparsities": 0.5}, TypeError, "sparsities must be several fractions, .* not 0.5"),
        ({"sparsities": "0.5"}, TypeError, "sparsities must be several fractions"),
        ({"sparsities": None}, TypeError, "sparsities must be several fractions"),
        ({"at_once": "2"}, TypeError, "at_once must be a whole number"),
        ({"at_once": True}, TypeError, "at_once must be a whole number"),
        ({"structure": NM(2, 4)}, ValueError, "^down/kernel: .* removes at most 0.5"),
    ],
)
def test_sensitivity(change, error, words):
    with pytest.raises(error, match=words):
        sensitivity(PARAMS, value, **change)


@pytest.mark.parametrize("structure", [Block([2, 4]), Channel([-1]), Element([-1]), Element([1])])
def test_lists_in_structures_are_as_good_as_tuples(structure):
    (field,) = structure
    scored = study.score_leaves(PARAMS, scores.magnitude, None, "up/*")
    assert resolve(structure, scored) == {"up/kernel": structure._make([tuple(field)])}
    found = sensitivity(PARAMS, value, (0.5,), structure=structure, paths="up/*", at_once=1)
    assert found.removed.tolist() == [[32]]


def test_evidence():
    for wrong, words in (
        (None, "loss must be a function of .* not None"),
        (model, r"loss must return one floating number, .* not float32 \(2, 4\)"),
        (lambda params, x: 1.0, "loss must return one floating number, .* not 1.0"),
        (lambda params, x: (loss(params, x), x), "loss must return one floating number"),
        (lambda params, x: jnp.argmax(model(params, x)), "loss must return .* not int32"),
    ):
        with pytest.raises(TypeError, match=words):
            evidence.gradients(wrong, PARAMS, BATCHES)
    with pytest.raises(TypeError, match="name: str is no array"):
        evidence.gradients(loss, {**PARAMS, "name": "mlp"}, BATCHES)
    found = evidence.gradients(loss, {**PARAMS, "step": 3}, BATCHES)
    assert found["step"].shape == ()
    for key in (None, 0, jax.random.split(jax.random.key(0), 2)):
        with pytest.raises(TypeError, match="key must be one PRNG key"):
            evidence.hessian_diagonal(loss, PARAMS, BATCHES, key)
    with pytest.raises(TypeError, match="samples must be a whole number"):
        evidence.hessian_diagonal(loss, PARAMS, BATCHES, jax.random.key(0), 1.5)


def test_the_loss_of_channel_scores():
    for wrong, words in ((3, "loss must be a function"), (model, "loss must return one floating")):
        call: Any = {"loss": wrong, "batches": BATCHES, "key": None}
        with pytest.raises(TypeError, match=words):
            gather_evidence(frozenset({"gradients"}), model, PARAMS, (BATCHES[0],), **call)


def test_synaptic_flow():
    with pytest.raises(TypeError, match="rounds must be a whole number"):
        synaptic_flow(model, PARAMS, BATCHES[0], sparsity=0.5, rounds=1.5)
    with pytest.raises(TypeError, match="apply_fn must be a function"):
        synaptic_flow(None, PARAMS, BATCHES[0], sparsity=0.5)

    def attention(params, x):
        keys = jax.nn.softmax(params["up"]["kernel"] @ x.T, 0)
        return jnp.sum(keys, 0)[:, None] * jnp.sum(params["down"]["kernel"], 0)

    with pytest.raises(ValueError, match=r"^up/kernel: all 64 .*softmax.*with paths="):
        synaptic_flow(attention, PARAMS, BATCHES[0], sparsity=0.7, rounds=1)


def test_second_order_pruning():
    weight, moment, mask = jnp.ones((8, 3)), jnp.eye(8), jnp.ones((8, 3), bool)
    solve, surgeon = repair, optimal_brain_surgeon
    with pytest.raises(ValueError, match=r"mask of shape \(8, 2\) does not fit"):
        solve(weight, moment, mask[:, :2])
    with pytest.raises(TypeError, match="mask must be booleans"):
        solve(weight, moment, jnp.ones((8, 3)))
    with pytest.raises(ValueError, match=r"weight \(8, 3\) and second moment \(4, 4\)"):
        solve(weight, moment[:4, :4], mask)
    with pytest.raises(ValueError, match="second_moment has NaN"):
        solve(weight, moment * jnp.nan, mask)
    with pytest.raises(ValueError, match="damping is -1"):
        solve(weight, moment, mask, -1.0)
    with pytest.raises(ValueError, match="damping is -1"):
        surgeon(weight, moment, 3, damping=-1.0)
    with pytest.raises(TypeError, match=r"count must be a whole number, not 0.5"):
        surgeon(weight, moment, 0.5)
    with pytest.raises(TypeError, match="weight must be an array"):
        surgeon([[1.0]], moment, 1)


def test_scores_take_one_leaf():
    word: Any = "a"
    for score in (scores.magnitude, scores.l2, scores.gradient, scores.taylor, scores.wanda):
        with pytest.raises(TypeError, match=r"(?s)arrays of one leaf, .* jax\.tree\.map"):
            score(PARAMS, PARAMS)
    with pytest.raises(TypeError, match="arrays of one leaf, not 'a'"):
        wide(word)
    with pytest.raises(TypeError, match=r"arrays of one leaf, not 1.0"):
        wide_evidence(jnp.ones(2), 1.0, "taylor", "a gradient")
    with pytest.raises(TypeError, match=r"key must be one PRNG key, .* not 0"):
        scores.random(0)
    with pytest.raises(ValueError, match="decay is a"):
        running_fisher(word)


def test_allocations_read_a_sensitivity():
    curves: Any = {"up/kernel": np.zeros((2, 2))}
    for wrong in (None, curves):
        with pytest.raises(TypeError, match="found must be what sensitivity returned"):
            allocation_from_sensitivity(wrong)


def test_what_is_right_passes():
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        check_key(key)
    for count in (1, np.int64(3)):
        check_count("count", count)
    for amount in (0, 0.5, np.float32(0.5), jnp.float32(0.5), np.array(2)):
        check_amount("amount", amount)
    check_leaves({"w": jnp.ones(2), "step": 3, "none": None})
    assert as_patterns("a*") == ("a*",)
    assert as_patterns(p for p in ("a", "b")) == ("a", "b")
