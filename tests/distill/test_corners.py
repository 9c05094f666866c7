"""Corners of distillation that are easy to forget: in jit, on explicit meshes, empty, misused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp import distill

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(8, 7)).astype(np.float32)
TEACHER = RNG.normal(size=(8, 5)).astype(np.float32)


def test_the_top_is_taken_inside_jit():
    whole = distill.top_logits(TEACHER, 2, 4.0)
    compiled = jax.jit(lambda x: distill.top_logits(x, 2, 4.0))(TEACHER)
    np.testing.assert_array_equal(compiled.indices, whole.indices)
    np.testing.assert_allclose(compiled.rest, whole.rest, rtol=1e-6)


def _heads():
    return distill.init_contrastive(jax.random.key(0), STUDENT, TEACHER, 8)


def _contrastive(student, teacher):
    memory = distill.init_memory(jax.random.key(1), 10, 8)
    key = jax.random.key(2)
    return distill.contrastive_loss(
        _heads(), memory, student, teacher, jnp.arange(8), key, negatives=3
    )[0]


@pytest.mark.parametrize(
    "loss",
    [
        distill.relational_angle_loss,
        lambda s, t: distill.in_batch_contrastive_loss(_heads(), s, t),
        _contrastive,
    ],
    ids=["angles", "in batch", "memory"],
)
def test_relations_on_explicit_axes_without_a_mask(loss):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    expected = loss(STUDENT, TEACHER)
    with jax.set_mesh(mesh):
        found = jax.jit(loss)(jax.device_put(STUDENT, rows), jax.device_put(TEACHER, rows))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("write", [distill.sample_tokens, distill.beam_search])
def test_a_model_that_gives_only_the_last_logits_is_refused(write):
    def apply_fn(params, tokens):
        return jax.nn.one_hot(tokens[:, -1], 7)

    options = {"steps": 2}
    options |= {"beams": 2} if write is distill.beam_search else {"key": jax.random.key(0)}
    with pytest.raises(ValueError, match="vocabulary"):
        write(apply_fn, {}, jnp.array([[1, 2, 3]]), jnp.array([3]), **options)


@pytest.mark.parametrize("indices", [[[0.7, 1.2]], [[0, -1]]], ids=["floats", "negative"])
def test_a_top_whose_indices_are_no_tokens_is_refused(indices):
    top = distill.TopLogits(np.ones((1, 2), np.float32), np.array(indices), None, 5)
    with pytest.raises((TypeError, ValueError), match="indices"):
        distill.top_divergence(np.zeros((1, 5), np.float32), top, rest="drop")


def test_an_empty_batch_of_dist_says_what_is_wrong_or_is_empty():
    empty = np.ones((0, 3), np.float32)
    assert distill.kl_divergence(empty, empty).shape == (0,)
    assert distill.dist_loss(empty, empty).shape == (0,)


def test_the_teacher_has_a_gradient_at_the_largest_logits():
    teacher = np.array([3.4e38, -3.4e38, 0, 0], np.float32)
    slopes = jax.grad(lambda t: distill.additive_hinton_loss(jnp.zeros(4), t, 1, 2.0, 0.5))
    np.testing.assert_allclose(slopes(teacher), 0, atol=1e-6)


def test_masks_of_whole_examples():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 4, 3, 5)).astype(np.float32)
    where = np.array([True, False, True, False])
    params = distill.init_variational(jax.random.key(0), student, teacher)
    for loss in (
        distill.hint_loss,
        lambda *pair, **kwargs: distill.hidden_state_loss(*pair, kind="cosine", **kwargs),
        lambda *pair, **kwargs: distill.variational_loss(params, *pair, **kwargs),
    ):
        found = loss(student, teacher, where=where)
        expected = loss(student, teacher, where=np.repeat(where[:, None], 3, 1))
        np.testing.assert_array_equal(found, expected)
        assert not np.any(found[~where])
        assert np.all(found[where] != 0)


def test_errors_of_flow_name_its_arguments():
    maps = np.ones((2, 3, 2), np.float32)
    with pytest.raises(TypeError, match="student"):
        distill.flow_loss((maps.astype(int), maps), (maps, maps))
