"""A teacher by its largest logits: bounds, exactness, gradients, masks and what is refused."""

import dataclasses
import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import log_softmax, logsumexp

from jaxcomp.distill import kl_divergence
from jaxcomp.distill.language.top_logits import TopLogits, top_divergence, top_logits

INF, NAN = np.inf, np.nan
VOCABULARY = 12
COUNTS = (1, 3, 12)


def logits(*shape, seed=0, spread=3.0, dtype=np.float32):
    student, teacher = spread * np.random.default_rng(seed).normal(size=(2, *shape))
    return student.astype(dtype), teacher.astype(dtype)


@functools.cache
def compiled(rest):
    def total(student, top, temperature, where):
        loss = top_divergence(student, top, temperature, rest=rest, where=where)
        return loss.sum(), loss

    return jax.jit(jax.value_and_grad(total, has_aux=True), static_argnames="temperature")


def both(student, top, temperature=None, where=None, rest="class"):
    """Loss and gradient in the student."""
    where = np.ones(student.shape[:-1], bool) if where is None else where
    (_, loss), found = jax.device_get(compiled(rest)(student, top, temperature, where))
    return loss, found


def coarse(logits, indices, temperature, rest):
    """Log-probabilities over the top, and the rest as one class, in float64."""
    logits = np.asarray(logits, np.float64) / temperature
    row = np.take_along_axis(logits, indices.astype(int), -1)
    if rest == "class":
        others = logits.copy()
        np.put_along_axis(others, indices.astype(int), -INF, -1)
        with np.errstate(divide="ignore"):
            row = np.append(row, logsumexp(others, -1)[..., None], -1)
    return log_softmax(row, -1)


def reference(student, teacher, count, temperature=1.0, rest="class"):
    indices = np.argsort(-teacher, -1, kind="stable")[..., :count]
    q, p = (coarse(x, indices, temperature, rest) for x in (student, teacher))
    with np.errstate(invalid="ignore"):
        return np.where(np.exp(p) > 0, np.exp(p) * (p - q), 0).sum(-1)


class TestTop:
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_values_indices_and_the_rest(self, temperature):
        teacher = logits(2, 3, VOCABULARY)[1]
        top = top_logits(teacher, 3, temperature)
        order = np.argsort(-teacher, -1)
        np.testing.assert_array_equal(top.indices, order[..., :3])
        np.testing.assert_array_equal(top.values, np.take_along_axis(teacher, order[..., :3], -1))
        others = np.take_along_axis(teacher, order[..., 3:], -1)
        expected = temperature * logsumexp(others / temperature, -1)
        np.testing.assert_allclose(top.rest, expected, rtol=1e-6)
        assert top.indices.dtype == np.uint16
        assert (top.vocabulary, top.temperature) == (VOCABULARY, temperature)

    def test_many_tokens_take_wider_indices(self):
        big = np.zeros((1, (1 << 16) + 1), jnp.bfloat16)
        big[0, -1] = 1
        top = top_logits(big, 1)
        assert top.indices.dtype == np.int32
        assert top.indices[0, 0] == 1 << 16
        assert top.values.dtype == np.float32

    def test_a_batch_is_sliced_as_any_pytree(self):
        top = top_logits(logits(4, VOCABULARY)[1], 3)
        one = jax.tree.map(lambda x: x[2], top)
        np.testing.assert_array_equal(one.values, np.asarray(top.values)[2])
        assert one.vocabulary == VOCABULARY

    def test_excluded_tokens(self):
        teacher = np.full((1, VOCABULARY), -INF, np.float32)
        teacher[0, 4] = 1
        top = top_logits(teacher, 3)
        assert np.asarray(top.rest)[0] == -INF
        loss, found = both(logits(1, VOCABULARY)[0], top)
        np.testing.assert_allclose(loss, kl_divergence(logits(1, VOCABULARY)[0], teacher))
        assert np.isfinite(found).all()


class TestDivergence:
    @pytest.mark.parametrize("rest", ["class", "drop"])
    @pytest.mark.parametrize("count", COUNTS)
    def test_the_definition(self, count, rest):
        student, teacher = logits(2, 3, VOCABULARY)
        loss, _ = both(student, top_logits(teacher, count, 2.0), rest=rest)
        expected = reference(student, teacher, count, 2.0, rest)
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-7)

    def test_with_nothing_left_out_it_is_the_full_divergence(self):
        student, teacher = logits(2, 3, VOCABULARY)
        top = top_logits(teacher, VOCABULARY, 3.0)
        for rest in ("class", "drop"):
            loss, found = both(student, top, rest=rest)
            np.testing.assert_allclose(loss, kl_divergence(student, teacher, 3.0), rtol=1e-6)
            exact = jax.grad(lambda s: kl_divergence(s, teacher, 3.0).sum())(student)
            np.testing.assert_allclose(found, exact, atol=1e-7)

    rows = hnp.arrays(
        np.float32, (4, VOCABULARY), elements=st.floats(-40, 40, width=32, allow_subnormal=False)
    )

    @given(rows, rows)
    def test_it_bounds_the_full_divergence_from_below_and_grows_with_the_count(
        self, student, teacher
    ):
        exact = np.asarray(kl_divergence(student, teacher))
        before = np.zeros(4)
        for count in COUNTS:
            top = top_logits(teacher, count)
            loss, found = both(student, top)
            assert (loss >= before * (1 - 1e-5) - 1e-9).all()
            assert (loss <= exact * (1 + 1e-5) + 1e-9).all()
            assert np.isfinite(found).all()
            before = loss
            equal, still = both(teacher, top)
            assert not equal.any()
            assert not still.any()

    @pytest.mark.parametrize("rest", ["class", "drop"])
    def test_the_gradient_against_differences_in_float64(self, rest):
        student, teacher = logits(3, VOCABULARY, dtype=np.float64)
        direction = np.random.default_rng(1).normal(size=student.shape)
        with jax.enable_x64():
            top = top_logits(teacher, 3, 2.0)
            loss, found = both(student, top, rest=rest)
            assert loss.dtype == np.float64
        step = 1e-6
        up, down = (
            reference(student + sign * direction, teacher, 3, 2.0, rest).sum()
            for sign in (step, -step)
        )
        np.testing.assert_allclose(np.vdot(found, direction), (up - down) / (2 * step), rtol=1e-7)
        if rest == "drop":
            rows = np.arange(3)[:, None]
            assert np.count_nonzero(found) == np.count_nonzero(found[rows, top.indices]) == 9

    def test_derivative_in_the_teacher(self):
        student, teacher = logits(3, VOCABULARY)
        loss = lambda t, count: top_divergence(student, top_logits(t, count)).sum()
        found = jax.grad(loss)(teacher, 3)
        step = 1e-3
        direction = np.random.default_rng(1).normal(size=teacher.shape).astype(np.float32)
        up, down = (
            reference(student, teacher + sign * direction, 3).sum() for sign in (step, -step)
        )
        np.testing.assert_allclose(np.vdot(found, direction), (up - down) / (2 * step), rtol=1e-3)

    def test_a_rest_of_little_mass_keeps_its_digits(self):
        teacher = np.full((1, VOCABULARY), -25.0, np.float32)
        teacher[0, :3] = [3.0, 2.0, 1.0]
        student = teacher + logits(1, VOCABULARY, seed=3)[0]
        loss, found = both(student, top_logits(teacher, 3))
        np.testing.assert_allclose(loss, reference(student, teacher, 3), rtol=1e-5)
        assert (found[0, 3:] != 0).all()

    def test_dropping_the_rest_serves_any_temperature(self):
        student, teacher = logits(2, 3, VOCABULARY)
        top = top_logits(teacher, 3)
        schedule = jax.jit(lambda t: top_divergence(student, top, t, rest="drop"))
        for temperature in (0.5, 4.0):
            expected = reference(student, teacher, 3, temperature, "drop")
            np.testing.assert_allclose(schedule(temperature), expected, rtol=1e-5)


class TestMasks:
    @pytest.mark.parametrize("rest", ["class", "drop"])
    def test_padding_is_never_seen(self, rest):
        student, teacher = logits(2, 3, VOCABULARY)
        where = np.array([[True, True, False], [True, False, False]])
        dirty = np.where(where[..., None], student, NAN).astype(np.float32)
        top = top_logits(np.where(where[..., None], teacher, NAN).astype(np.float32), 3)
        top = dataclasses.replace(top, indices=np.where(where[..., None], top.indices, 60000))
        loss, found = both(dirty, top, where=where, rest=rest)
        clean, expected = both(student, top_logits(teacher, 3), where=where, rest=rest)
        np.testing.assert_array_equal(loss, clean)
        np.testing.assert_array_equal(found, expected)
        assert not loss[~where].any()
        assert not found[~where].any()

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_overflow_shows_in_its_position_only(self, bad):
        student, teacher = logits(4, VOCABULARY)
        student[1, 2] = bad
        loss, _ = both(student, top_logits(teacher, 3))
        np.testing.assert_array_equal(np.isnan(loss), [False, True, False, False])

    def test_a_student_without_a_token_that_the_teacher_says(self):
        student, teacher = logits(2, VOCABULARY)
        student[0, teacher[0].argmax()] = -INF
        loss, found = both(student, top_logits(teacher, 3))
        assert loss[0] == INF
        assert np.isfinite(loss[1])
        assert np.isfinite(found).all()

    def test_huge_magnitudes(self):
        student, teacher = (x * np.float32(1e37) for x in logits(4, VOCABULARY))
        loss, found = both(student, top_logits(teacher, 3))
        assert not np.isnan(loss).any()
        assert np.isfinite(found).all()


class TestTransformations:
    def test_bfloat16(self):
        student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in logits(4, VOCABULARY))
        loss, found = both(student, top_logits(teacher, 3))
        assert loss.dtype == np.float32
        assert found.dtype == jnp.bfloat16
        exact = reference(*(np.asarray(x, np.float64) for x in (student, teacher)), 3)
        np.testing.assert_allclose(loss, exact, rtol=1e-5)

    def test_vmap_and_scan_go_over_the_positions(self):
        student, teacher = logits(4, VOCABULARY)
        top = top_logits(teacher, 3)
        expected = both(student, top)[0]
        np.testing.assert_allclose(jax.vmap(top_divergence)(student, top), expected, rtol=1e-6)
        _, loss = jax.lax.scan(lambda _, x: (None, top_divergence(*x)), None, (student, top))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)

    @pytest.mark.parametrize(
        ("kind", "spec"),
        [
            (AxisType.Auto, ("batch", "model")),
            (AxisType.Explicit, ("batch", "model")),
            (AxisType.Explicit, ("batch", None)),
        ],
    )
    def test_sharded_as_on_one_device(self, spec, kind):
        student, teacher = logits(8, VOCABULARY)
        expected = both(student, top_logits(teacher, 3))
        mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(kind, kind))
        place = NamedSharding(mesh, PartitionSpec(*spec))
        s, t = (jax.device_put(x, place) for x in (student, teacher))
        actual = both(s, top_logits(t, 3))
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)

    def test_nothing_of_the_teacher_is_as_large_as_the_vocabulary(self):
        size = 4096
        student = jax.ShapeDtypeStruct((2, 8, size), np.float32)
        few = jax.ShapeDtypeStruct((2, 8, 4), np.float32)
        top = TopLogits(
            few, few.update(dtype=np.int32), jax.ShapeDtypeStruct((2, 8), np.float32), size
        )
        slope = jax.jit(jax.grad(lambda s, t: top_divergence(s, t).sum()))
        full = jax.jit(jax.grad(lambda s, t: kl_divergence(s, t).sum()))
        used, more = (
            f.lower(student, t).compile().memory_analysis()
            for f, t in ((slope, top), (full, student))
        )
        whole = 2 * 8 * size * 4
        assert more.argument_size_in_bytes >= 2 * whole
        assert used.argument_size_in_bytes < 1.1 * whole


class TestBadInput:
    student, teacher = logits(2, VOCABULARY)

    def test_top(self):
        for count, words in ((0, "count is 0"), (VOCABULARY + 1, "count 13 is above 12")):
            with pytest.raises(ValueError, match=words):
                top_logits(self.teacher, count)
        with pytest.raises(TypeError, match="logits must be floating"):
            top_logits(self.teacher.astype(int), 2)
        with pytest.raises(ValueError, match="vocabulary on its last axis"):
            top_logits(np.float32(1), 1)
        with pytest.raises(ValueError, match="temperature 0"):
            top_logits(self.teacher, 2, 0.0)
        with pytest.raises(ValueError, match="not traced"):
            jax.jit(lambda t: top_logits(self.teacher, 2, t).values)(2.0)

    @pytest.mark.parametrize("how", ["known", "traced", "compiled"])
    def test_a_rest_of_another_temperature(self, how):
        top = top_logits(self.teacher, 2, 2.0)
        call = {
            "known": lambda: top_divergence(self.student, top, 1.0),
            "traced": lambda: jax.jit(lambda t: top_divergence(self.student, top, t))(2.0),
            "compiled": lambda: jax.jit(lambda top: top_divergence(self.student, top, 1.0))(top),
        }[how]
        with pytest.raises(ValueError, match=r"is not 2\.0, at which the rest"):
            call()
        top_divergence(self.student, top, 2)

    def test_what_does_not_fit(self):
        top = top_logits(self.teacher, 2)
        with pytest.raises(ValueError, match="leave out the tokens"):
            top_divergence(self.student[:, 1:], top)
        with pytest.raises(ValueError, match="must be of the same positions"):
            top_divergence(self.student[:1], top)
        with pytest.raises(ValueError, match='"class" or "drop"'):
            top_divergence.__wrapped__(self.student, top, rest="none")
        bare = TopLogits(top.values, top.indices, None, VOCABULARY)
        with pytest.raises(ValueError, match="has no rest"):
            top_divergence(self.student, bare)
        top_divergence(self.student, bare, rest="drop")
        with pytest.raises(ValueError, match="one number for each position"):
            top_divergence(self.student, dataclasses.replace(top, rest=top.values))
        with pytest.raises(TypeError, match="where != 0"):
            top_divergence(self.student, top, where=np.ones(2))
