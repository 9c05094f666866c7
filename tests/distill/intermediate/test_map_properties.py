"""What the definitions of the losses between feature maps imply, their options and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.distill.intermediate.attention_transfer import attention_transfer_loss
from jaxcomp.distill.intermediate.flow import flow_loss, flow_matrix
from jaxcomp.distill.intermediate.gram import gram_loss, gram_matrix
from jaxcomp.distill.intermediate.hint import hint_loss
from jaxcomp.distill.intermediate.neuron_selectivity import neuron_selectivity_loss

KERNELS = ("linear", "polynomial", "gaussian")
seeds = st.integers(0, 2**31)


def maps(seed=0, channels=4, shape=(2, 3, 2)):
    return np.random.default_rng(seed).normal(size=(*shape, channels)).astype(np.float32)


def selectivity(kernel):
    return lambda s, t, **kwargs: neuron_selectivity_loss(s, t, kernel=kernel, **kwargs)


def flow(student, teacher, **kwargs):
    return flow_loss((student, student), (teacher, teacher), **kwargs)


EACH = {
    "attention": attention_transfer_loss,
    "flow": flow,
    "gram": gram_loss,
    **{f"selectivity, {kernel}": selectivity(kernel) for kernel in KERNELS},
}
each = pytest.mark.parametrize("loss", EACH.values(), ids=EACH)
COMPILED = {name: jax.jit(loss) for name, loss in EACH.items()}


class TestInvariances:
    @given(seeds)
    def test_the_order_of_positions_is_nothing(self, seed):
        student, teacher = maps(seed), maps(seed + 1)
        order = np.random.default_rng(seed).permutation(6)
        shuffled = [x.reshape(2, 6, 4)[:, order].reshape(x.shape) for x in (student, teacher)]
        for loss in COMPILED.values():
            np.testing.assert_allclose(
                loss(*shuffled), loss(student, teacher), rtol=1e-4, atol=1e-6
            )

    @given(seeds, st.floats(0.1, 10))
    def test_scale_and_order_of_the_students_channels(self, seed, scale):
        student, teacher = maps(seed), maps(seed + 1)
        order = np.random.default_rng(seed).permutation(4)
        changed = np.float32(scale) * student[..., order]
        for name in ("attention", *(f"selectivity, {kernel}" for kernel in KERNELS)):
            loss = COMPILED[name]
            np.testing.assert_allclose(
                loss(changed, teacher), loss(student, teacher), rtol=1e-3, atol=1e-5
            )

    @given(seeds)
    def test_equal_maps_lose_nothing_and_no_loss_is_negative(self, seed):
        student = maps(seed)
        for loss in COMPILED.values():
            np.testing.assert_allclose(loss(student, student), 0, atol=1e-6)
            assert (np.asarray(loss(student, maps(seed + 1))) >= 0).all()


class TestAxes:
    @each
    def test_channels_may_come_first(self, loss):
        student, teacher = maps(0), maps(1)
        first = [np.moveaxis(x, -1, 1) for x in (student, teacher)]
        np.testing.assert_allclose(loss(*first, axis=1), loss(student, teacher), rtol=1e-6)
        where = np.ones((2, 3, 2), bool)
        where[0, 1, 1] = False
        np.testing.assert_allclose(
            loss(*first, axis=1, where=where), loss(student, teacher, where=where), rtol=1e-6
        )

    def test_hint_keeps_all_other_axes(self):
        student, teacher = maps(0), maps(1)
        expected = ((student - teacher) ** 2).mean(1)
        where = np.arange(16).reshape(2, 2, 4) % 3 > 0
        actual = hint_loss(student, teacher, axis=1, where=where)
        np.testing.assert_allclose(actual, np.where(where, expected, 0), rtol=1e-5)

    @each
    def test_a_mask_of_examples_is_one_of_all_their_positions(self, loss):
        student, teacher = maps(0), maps(1)
        examples = np.array([True, False])
        positions = np.broadcast_to(examples[:, None, None], (2, 3, 2))
        actual = loss(student, teacher, where=examples)
        np.testing.assert_array_equal(actual, loss(student, teacher, where=positions))
        assert actual[1] == 0 < actual[0]


class TestOptions:
    @pytest.mark.parametrize("power", [1, 2, 3.5])
    def test_attention_of_other_powers_has_finite_gradients_at_zero(self, power):
        student, teacher = maps(0), maps(1)
        student[0] = 0

        def total(student):
            return attention_transfer_loss(student, teacher, power=power).sum()

        value, gradient = jax.jit(jax.value_and_grad(total))(student)
        attentions = [(np.abs(x[1]) ** power).sum(-1) for x in (student, teacher)]
        s, t = (x / np.linalg.norm(x) for x in attentions)
        np.testing.assert_allclose(value, 1 + np.linalg.norm(s - t), rtol=1e-5)
        assert np.isfinite(gradient).all()

    def test_default_bandwidth_is_the_mean_squared_distance(self):
        student, teacher = maps(0), maps(1, channels=5)
        loss = selectivity("gaussian")
        for i in range(2):
            both = np.concatenate([x[i].reshape(6, -1) for x in (student, teacher)], 1).T
            both /= np.linalg.norm(both, axis=1, keepdims=True)
            squares = ((both[:, None] - both[None]) ** 2).sum(-1)
            mean = squares.sum() / (9 * 8)
            pair = student[i : i + 1], teacher[i : i + 1]
            expected = neuron_selectivity_loss(*pair, kernel="gaussian", bandwidth=mean)
            np.testing.assert_allclose(loss(*pair), expected, rtol=1e-4)

    def test_matrices_are_means_over_the_positions_that_count(self):
        first, second = maps(0), maps(1, channels=3)
        where = np.arange(12).reshape(2, 3, 2) < 4
        found = flow_matrix(first, second, where=where)
        expected = first[0][where[0]].T @ second[0][where[0]] / 4
        np.testing.assert_allclose(found[0], expected, rtol=1e-5)
        assert not np.asarray(found[1]).any()
        np.testing.assert_array_equal(gram_matrix(first), flow_matrix(first, first))

    def test_resolutions_may_differ_between_student_and_teacher_for_flow_and_gram(self):
        student, teacher = maps(0), maps(1, shape=(2, 4, 4))
        for loss, constant in ((flow, 1), (gram_loss, 1 / 64)):
            s, t = (np.asarray(gram_matrix(x)) for x in (student, teacher))
            expected = ((s - t) ** 2).sum((1, 2)) * constant
            np.testing.assert_allclose(loss(student, teacher), expected, rtol=1e-5)

    def test_a_traced_bandwidth(self):
        student, teacher = maps(0), maps(1)

        def loss(bandwidth):
            return neuron_selectivity_loss(student, teacher, kernel="gaussian", bandwidth=bandwidth)

        np.testing.assert_allclose(jax.jit(loss)(0.5), loss(0.5), rtol=1e-5)


class TestBadInput:
    @each
    def test_no_positions_or_the_wrong_axis(self, loss):
        with pytest.raises(ValueError, match=r"must be \(batch, \*positions, channels\)"):
            loss(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))
        with pytest.raises(ValueError, match=r"pass the right axis="):
            loss(maps(), maps(), axis=0)

    @pytest.mark.parametrize("name", ["attention", "selectivity, linear"])
    def test_other_resolutions_are_to_be_resized(self, name):
        other = maps(shape=(2, 2, 3))
        with pytest.raises(ValueError, match=r"positions \(3, 2\) and \(2, 3\): resize one"):
            EACH[name](maps(), other)

    @pytest.mark.parametrize("name", ["flow", "gram"])
    def test_other_channels_are_to_be_projected(self, name):
        with pytest.raises(ValueError, match="project the student's channels"):
            EACH[name](maps(), maps(channels=5))

    def test_hint_is_to_be_projected(self):
        with pytest.raises(ValueError, match="project or resize the student"):
            hint_loss(maps(), maps(channels=5))

    @pytest.mark.parametrize(
        ("match", "kwargs"),
        [
            ("kernel 'rbf' must be", {"kernel": "rbf"}),
            ("bandwidth .* is of kernel", {"bandwidth": 1.0}),
            ("must be positive and finite", {"kernel": "gaussian", "bandwidth": 0.0}),
            ("must be a scalar", {"kernel": "gaussian", "bandwidth": np.ones(2)}),
        ],
    )
    def test_kernels(self, match, kwargs):
        with pytest.raises(ValueError, match=match):
            neuron_selectivity_loss(maps(), maps(), **kwargs)

    def test_powers_and_pairs(self):
        with pytest.raises(ValueError, match=r"power 0\.5 must be at least 1"):
            attention_transfer_loss(maps(), maps(), power=0.5)
        with pytest.raises(ValueError, match="student must be a pair of arrays"):
            flow_loss((maps(),), (maps(), maps()))
        with pytest.raises(ValueError, match=r"positions .*: resize one"):
            flow_loss((maps(), maps(shape=(2, 2, 2))), (maps(), maps()))

    def test_float64_anywhere_makes_float64(self):
        with jax.enable_x64(True):
            student = maps(), maps()
            teacher = maps(), maps(1).astype(np.float64)
            assert flow_loss(student, teacher).dtype == jnp.float64
            assert gram_loss(student[0], teacher[1]).dtype == jnp.float64
