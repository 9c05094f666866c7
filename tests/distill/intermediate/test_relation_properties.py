"""What the definitions of the losses between relations imply, their options and their errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.distill.intermediate.correlation import correlation_congruence_loss
from jaxcomp.distill.intermediate.probabilistic import probabilistic_transfer_loss
from jaxcomp.distill.intermediate.relational import (
    relational_angle_loss,
    relational_distance_loss,
)
from jaxcomp.distill.intermediate.similarity import similarity_preserving_loss

LOSSES = {
    "similarity": similarity_preserving_loss,
    "distances": relational_distance_loss,
    "angles": relational_angle_loss,
    "neighbours": probabilistic_transfer_loss,
    "congruence": correlation_congruence_loss,
}
COMPILED = {name: jax.jit(loss) for name, loss in LOSSES.items()}
each = pytest.mark.parametrize("loss", COMPILED.values(), ids=COMPILED)
seeds = st.integers(0, 2**31)


def rows(seed=0, features=3, examples=5):
    return np.random.default_rng(seed).normal(size=(examples, features)).astype(np.float32)


def rotation(seed):
    return np.linalg.qr(rows(seed, 3, 3))[0]


class TestInvariances:
    @given(seeds, st.floats(0.01, 100))
    def test_rotations_and_the_scale_of_all(self, seed, scale):
        student, teacher = rows(seed), rows(seed + 1)
        turned = np.float32(scale) * student @ rotation(seed)
        for loss in COMPILED.values():
            expected = loss(student, teacher)
            np.testing.assert_allclose(loss(turned, teacher), expected, rtol=1e-3, atol=1e-5)

    @given(seeds)
    def test_a_shift_is_nothing_to_distances_and_angles(self, seed):
        student, teacher = rows(seed), rows(seed + 1)
        for name in ("distances", "angles"):
            loss, shifted = COMPILED[name], student + rows(seed + 2)[:1]
            expected = loss(student, teacher)
            np.testing.assert_allclose(loss(shifted, teacher), expected, rtol=1e-3, atol=1e-5)

    @given(seeds)
    def test_the_length_of_each_is_nothing_to_cosines(self, seed):
        student, teacher = rows(seed), rows(seed + 1)
        longer = student * np.random.default_rng(seed).uniform(0.5, 2, (5, 1)).astype(np.float32)
        for name in ("neighbours", "congruence"):
            expected = COMPILED[name](student, teacher)
            actual = COMPILED[name](longer, teacher)
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)

    @given(seeds)
    def test_shares_follow_their_examples(self, seed):
        student, teacher = rows(seed), rows(seed + 1)
        order = np.random.default_rng(seed).permutation(5)
        for loss in COMPILED.values():
            expected = np.asarray(loss(student, teacher))[order]
            actual = loss(student[order], teacher[order])
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)
            assert (expected >= 0).all()

    @each
    def test_equal_relations_lose_nothing_whatever_the_shape_of_an_example(self, loss):
        student = rows()
        teacher = np.pad(student, [(0, 0), (0, 5)]).reshape(5, 2, 2, 2)
        np.testing.assert_allclose(loss(student, teacher), 0, atol=1e-6)


class TestSmallBatches:
    @pytest.mark.parametrize("name", LOSSES)
    def test_too_few_examples_for_a_relation_lose_nothing(self, name):
        fewest = {"distances": 2, "neighbours": 3, "angles": 3, "congruence": 2, "similarity": 2}
        for counted in range(fewest[name]):
            where = np.arange(5) < counted
            losses = COMPILED[name](rows(0), rows(1), where=where)
            np.testing.assert_allclose(losses, 0, atol=1e-12)
        losses = np.asarray(LOSSES[name](rows(0)[:1], rows(1)[:1]))
        assert losses.shape == (1,)
        np.testing.assert_allclose(losses, 0, atol=1e-12)


class TestRelational:
    @pytest.mark.parametrize("loss", [relational_distance_loss, relational_angle_loss])
    def test_chunks_change_nothing(self, loss):
        student, teacher = rows(0), rows(1)
        where = np.arange(5) != 3

        @functools.partial(jax.jit, static_argnames="chunk")
        def both(student, teacher, chunk):
            def total(student, teacher):
                losses = loss(student, teacher, chunk=chunk, where=where)
                return losses.sum(), losses

            return jax.grad(total, (0, 1), has_aux=True)(student, teacher)

        expected = jax.tree.leaves(both(student, teacher, None))
        for a, b in zip(jax.tree.leaves(both(student, teacher, 2)), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_chunks_of_a_sharded_batch(self):
        student, teacher = rows(0, examples=8), rows(1, examples=8)
        mesh = jax.make_mesh((8,), ("batch",))
        place = jax.NamedSharding(mesh, jax.P("batch"))
        with jax.set_mesh(mesh):
            sharded = [jax.device_put(x, place) for x in (student, teacher)]
            for loss in (relational_distance_loss, relational_angle_loss):
                actual, expected = (loss(*pair, chunk=3) for pair in (sharded, (student, teacher)))
                np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)

    def test_far_examples_lose_linearly(self):
        student = np.zeros((8, 2), np.float32)
        student[:, 0] = np.arange(8)
        teacher = student.copy()
        teacher[-1, 0] = 100
        s, t = (np.abs(x[:, None, 0] - x[None, :, 0]) for x in (student, teacher))
        difference = np.abs(s / s.sum() - t / t.sum()) * 56
        assert (difference > 1).any()
        huber = np.where(difference <= 1, difference**2 / 2, difference - 0.5)
        actual = relational_distance_loss(student, teacher)
        np.testing.assert_allclose(actual, huber.sum(1) / 7, rtol=1e-5)

    def test_near_examples_keep_their_distance_far_from_the_origin(self):
        student = (1000 + np.arange(5)[:, None] / 8 * [1, 0]).astype(np.float32)
        teacher = (np.arange(5)[:, None] * [0.0, 2.0, 0.0]).astype(np.float32)
        np.testing.assert_allclose(COMPILED["distances"](student, teacher), 0, atol=1e-8)
        np.testing.assert_allclose(COMPILED["angles"](student, teacher), 0, atol=1e-8)

    @pytest.mark.parametrize("name", ["distances", "angles"])
    def test_near_and_far_examples_are_told_apart_alike(self, name):
        """Whether differences or inner products are taken depends on the nearest two."""
        student, teacher = rows(0), rows(1)
        # The first needs differences, of which float32 knows four digits; the second does not.
        for moved in (1e-3, 0.5):
            near = student.copy()
            near[1] = near[0] + moved * near[2]
            with jax.enable_x64(True):
                exact = LOSSES[name](near.astype(np.float64), teacher.astype(np.float64))
            np.testing.assert_allclose(COMPILED[name](near, teacher), exact, rtol=1e-4, atol=1e-7)

    def test_the_memory_of_chunks_does_not_grow_with_the_cube_of_the_batch(self):
        def memory(batch, chunk):
            x = jax.ShapeDtypeStruct((batch, 4), jnp.float32)
            loss = functools.partial(relational_angle_loss, chunk=chunk)
            total = jax.jit(jax.grad(lambda s, t: loss(s, t).sum()))
            analysis = total.lower(x, x).compile().memory_analysis()
            return getattr(analysis, "temp_size_in_bytes", 0)

        assert 8 * memory(128, 4) < 4 * 128**3 * 2 < memory(128, None)
        assert memory(128, 4) < 4.5 * memory(64, 4)


class TestProbabilistic:
    def test_opposite_examples_have_finite_losses_and_gradients(self):
        student = np.array([[1, 0], [-1, 0], [0, 1], [1, 1], [2, 1]], np.float32)
        teacher = rows(1)
        total = jax.jit(jax.value_and_grad(lambda s, t: COMPILED["neighbours"](s, t).sum(), (0, 1)))
        for pair in ((student, teacher), (teacher, student)):
            value, gradients = total(*pair)
            assert np.isfinite(value)
            for gradient in gradients:
                assert np.isfinite(gradient).all()

    def test_near_agreement_keeps_its_digits(self):
        student = rows(0)
        near = student * (1 + np.float32(1e-3) * rows(1))
        with jax.enable_x64(True):
            exact = probabilistic_transfer_loss(*(x.astype(np.float64) for x in (near, student)))
        np.testing.assert_allclose(COMPILED["neighbours"](near, student), exact, rtol=0.01)


class TestCongruence:
    def test_high_orders_come_to_the_gaussian(self):
        student, teacher = rows(0), rows(1)

        def kernel(x):
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
            return np.exp(-0.7 * ((x[:, None] - x[None]) ** 2).sum(-1))

        expected = ((kernel(student) - kernel(teacher)) ** 2).mean(1)
        loss = functools.partial(correlation_congruence_loss, order=12)
        traced = jax.jit(lambda gamma: loss(student, teacher, gamma=gamma))
        np.testing.assert_allclose(traced(0.7), expected, rtol=1e-4)


class TestBadInput:
    @pytest.mark.parametrize(
        ("match", "loss", "kwargs"),
        [
            ("chunk is 0: at least 1", relational_distance_loss, {"chunk": 0}),
            ("chunk is -1: at least 1", relational_angle_loss, {"chunk": -1}),
            ("kernel 'rbf' must be", correlation_congruence_loss, {"kernel": "rbf"}),
            ("order is 0", correlation_congruence_loss, {"order": 0}),
            ("positive and finite", correlation_congruence_loss, {"gamma": 0.0}),
            ("positive and finite", correlation_congruence_loss, {"gamma": np.inf}),
            ("leave them", correlation_congruence_loss, {"kernel": "linear", "gamma": 0.4}),
            ("leave them", correlation_congruence_loss, {"kernel": "linear", "order": 2}),
        ],
    )
    def test_options(self, match, loss, kwargs):
        with pytest.raises(ValueError, match=match):
            loss(rows(), rows(), **kwargs)

    @pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
    def test_examples_without_features(self, loss):
        with pytest.raises(ValueError, match="with features an example"):
            loss(rows()[:, 0], rows())
        with pytest.raises(ValueError, match="hold no example"):
            loss(rows()[:0], rows()[:0])
