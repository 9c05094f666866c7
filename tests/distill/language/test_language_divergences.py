"""Reverse KL and generalised Jensen-Shannon divergence: float64 forms, limits, masks, torch."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import NamedSharding, PartitionSpec
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr, softmax

from jaxcomp.distill import kl_divergence
from jaxcomp.distill.language.divergences import jensen_shannon_divergence, reverse_kl_divergence

INF, NAN = np.inf, np.nan


def mixed(interpolation):
    return functools.partial(jensen_shannon_divergence, interpolation=interpolation)


LOSSES = {"reverse": reverse_kl_divergence} | {f"{b}": mixed(b) for b in (0.0, 0.1, 0.5, 1.0)}


@functools.cache
def compiled(loss):
    """Loss, and gradients of its sum in student and teacher, as one program."""

    def total(*args, **kwargs):
        value = loss(*args, **kwargs)
        return value.sum(), value

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def both(name):
    """By name; the interpolation is traced, so that all of them share a program."""
    loss, kwargs = LOSSES[name], {}
    if name != "reverse":
        loss, kwargs = jensen_shannon_divergence, {"interpolation": float(name)}

    def call(student, teacher, temperature=1.0, where=None):
        if where is None:
            where = np.ones(student.shape, bool)
        done = compiled(loss)(student, teacher, temperature, where=where, **kwargs)
        (_, value), found = jax.device_get(done)
        return value, found

    return call


def reference(name, student, teacher, temperature=1.0, axis=-1):
    """The definitions in float64."""
    q = softmax(np.asarray(student, np.float64) / temperature, axis)
    p = softmax(np.asarray(teacher, np.float64) / temperature, axis)
    if name in ("reverse", "1.0"):
        return rel_entr(q, p).sum(axis)
    if name == "0.0":
        return rel_entr(p, q).sum(axis)
    b = float(name)
    m = b * p + (1 - b) * q
    return b * rel_entr(p, m).sum(axis) + (1 - b) * rel_entr(q, m).sum(axis)


def reference_gradients(name, student, teacher, temperature=1.0):
    """In float64, through the derivative of an f-divergence in q and p."""
    log_q = log_softmax(np.asarray(student, np.float64) / temperature, -1)
    log_p = log_softmax(np.asarray(teacher, np.float64) / temperature, -1)
    p, q, ratio = np.exp(log_p), np.exp(log_q), log_p - log_q
    if name == "0.0":
        in_p, in_q = ratio, -p / q
    elif name in ("reverse", "1.0"):
        in_p, in_q = -q / p, -ratio
    else:
        b = float(name)
        m = b * p + (1 - b) * q
        in_p, in_q = b * np.log(p / m), (1 - b) * np.log(q / m)
    return [
        x * (slope - (x * slope).sum(-1, keepdims=True)) / temperature
        for x, slope in ((q, in_q), (p, in_p))
    ]


def logits(*shape, seed=0, spread=3.0, dtype=np.float32):
    student, teacher = spread * np.random.default_rng(seed).normal(size=(2, *shape))
    return student.astype(dtype), teacher.astype(dtype)


every = pytest.mark.parametrize("name", LOSSES)
rows = hnp.arrays(np.float32, (4, 6), elements=st.floats(-60, 60, width=32, allow_subnormal=False))


class TestValues:
    @every
    def test_value_and_gradients_are_the_definition(self, name):
        student, teacher = logits(4, 6)
        for temperature in (0.5, 3.0):
            value, found = both(name)(student, teacher, temperature)
            assert value.dtype == np.float32
            np.testing.assert_allclose(
                value, reference(name, student, teacher, temperature), rtol=3e-6
            )
            for a, b in zip(
                found, reference_gradients(name, student, teacher, temperature), strict=True
            ):
                np.testing.assert_allclose(a, b, atol=3e-6)

    @pytest.mark.parametrize("name", ["reverse", "0.1"])
    def test_any_axis(self, name):
        student, teacher = logits(2, 3, 4)
        actual = LOSSES[name](student, teacher, axis=1)
        np.testing.assert_allclose(actual, reference(name, student, teacher, axis=1), rtol=3e-6)

    def test_against_scipy(self):
        student, teacher = logits(4, 6)
        expected = jensenshannon(softmax(student, -1), softmax(teacher, -1), axis=-1) ** 2
        np.testing.assert_allclose(both("0.5")(student, teacher)[0], expected, rtol=1e-5)

    def test_the_ends_are_the_limits_after_division(self):
        student, teacher = logits(4, 6, dtype=np.float64)
        with jax.enable_x64():
            near = jax.jit(jensen_shannon_divergence)
            for end, name in ((0.0, "0.0"), (1.0, "1.0")):
                small = np.asarray(near(student, teacher, interpolation=abs(end - 1e-7))) / 1e-7
                exact = reference(name, student, teacher)
                np.testing.assert_allclose(small, exact, rtol=1e-4)
                at_end = near(student, teacher, interpolation=end)
                np.testing.assert_allclose(at_end, exact, rtol=1e-12)

    def test_the_ends_are_the_divergences_that_have_names(self):
        student, teacher = logits(4, 6)
        np.testing.assert_allclose(
            both("0.0")(student, teacher)[0], kl_divergence(student, teacher), rtol=1e-6
        )
        for a, b in zip(
            both("1.0")(student, teacher)[1], both("reverse")(student, teacher)[1], strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-6)

    @every
    @given(rows, rows)
    def test_never_negative_bounded_and_zero_for_equal_logits(self, name, student, teacher):
        value, found = both(name)(student, teacher)
        assert (value >= 0).all()
        assert np.isfinite(found).all()
        if name == "0.5":
            assert (value <= np.log(2) * (1 + 1e-6)).all()
        np.testing.assert_allclose(value, reference(name, student, teacher), rtol=1e-4, atol=1e-15)
        equal, still = both(name)(teacher, teacher)
        assert not equal.any()
        assert not np.any(still)

    def test_a_share_of_the_smallest_probability(self):
        student = np.array([[48, -40, -40]], np.float32)
        teacher = np.array([[35.5, -51.5, -51.5]], np.float32)  # e**-87, half of which is flushed
        value, found = both("0.5")(student, teacher)
        np.testing.assert_allclose(value, 0, atol=1e-30)
        assert np.isfinite(found).all()

    @every
    def test_nearly_equal_keeps_its_digits(self, name):
        teacher = logits(4, 6, spread=2.0)[1]
        student = teacher + np.float32(1e-4) * logits(4, 6, seed=1)[0]
        value, found = both(name)(student, teacher)
        np.testing.assert_allclose(value, reference(name, student, teacher), rtol=1e-4)
        for a, b in zip(found, reference_gradients(name, student, teacher), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-9)

    def test_derivatives_in_everything_and_of_second_order(self):
        args, step = (*logits(3, 5, dtype=np.float64), np.float64(1.7)), 1e-5
        rng = np.random.default_rng(0)
        dots = tuple(rng.normal(size=np.shape(x)) for x in args)

        def loss(student, teacher, temperature, b):
            return jensen_shannon_divergence(student, teacher, temperature, interpolation=b).sum()

        slope = jax.value_and_grad(loss, (0, 1, 2, 3))

        def along(args, dots, b):
            return jax.jvp(lambda *a: slope(*a, b), args, dots)

        with jax.enable_x64():
            forward = jax.jit(along)
            for b in (0.0, 0.1, 1.0):
                _, curve = jax.device_get(forward(args, dots, b))
                up, down = (
                    jax.device_get(forward(moved, dots, b)[0])
                    for moved in (
                        tuple(x + sign * d for x, d in zip(args, dots, strict=True))
                        for sign in (step, -step)
                    )
                )
                for a, x, y in zip(*map(jax.tree.leaves, (curve, up, down)), strict=True):
                    np.testing.assert_allclose(a, (x - y) / (2 * step), rtol=1e-6, atol=1e-8)
            slopes = jax.device_get(forward(args, dots, 0.1)[0][1])
        central = [
            reference(f"{0.1 + change}", args[0], args[1], 1.7).sum() for change in (1e-6, -1e-6)
        ]
        np.testing.assert_allclose(slopes[3], (central[0] - central[1]) / 2e-6, rtol=1e-6)


class TestExtremes:
    def test_classes_without_probability(self):
        student = np.array([[0.0, 1.0, -INF], [0.0, 1.0, 2.0], [-INF, 1.0, -INF]], np.float32)
        teacher = np.array([[1.0, 2.0, -INF], [0.5, -INF, -INF], [1.0, -INF, -INF]], np.float32)
        for name in LOSSES:
            value, found = both(name)(student, teacher)
            np.testing.assert_allclose(value, reference(name, student, teacher), rtol=1e-6)
            assert np.isfinite(found).all()
        assert both("1.0")(student, teacher)[0][1] == both("reverse")(student, teacher)[0][1] == INF
        # The mixture excludes nothing: disjoint supports are as far apart as can be.
        np.testing.assert_allclose(both("0.5")(student, teacher)[0][2], np.log(2), rtol=1e-6)

    @every
    def test_rows_without_a_teacher_are_padding(self, name):
        nothing = np.full((4, 6), -INF, np.float32)
        some = logits(4, 6)[0]
        for student, teacher, expected in (
            (some, nothing, 0),
            (nothing, nothing, 0),
            (nothing, some, INF),
        ):
            value, found = both(name)(student, teacher)
            assert (value == expected).all()
            assert np.isfinite(found).all()

    @every
    def test_huge_and_tiny_magnitudes(self, name):
        student, teacher = logits(4, 6)
        for size in (1e30, 3e38, 1e-30):
            scaled = [np.clip(x * np.float64(size), -3e38, 3e38) for x in (student, teacher)]
            scaled = [x.astype(np.float32) for x in scaled]
            value, found = both(name)(*scaled)
            assert not np.isnan(value).any()
            assert np.isfinite(found).all()

    @every
    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_overflow_shows_in_its_position_only(self, name, bad):
        student, teacher = logits(4, 6)
        student[1, 2] = bad
        value, _ = both(name)(student, teacher)
        np.testing.assert_array_equal(np.isnan(value), [False, True, False, False])


class TestMasks:
    @every
    @pytest.mark.parametrize("behind", [NAN, INF])
    def test_padding_and_classes_that_are_left_out_are_never_seen(self, name, behind):
        student, teacher = logits(4, 6)
        where = np.random.default_rng(1).random((4, 6)) < 0.7
        where[2] = False
        dirty = [np.where(where, x, behind).astype(np.float32) for x in (student, teacher)]
        value, found = both(name)(*dirty, where=where)
        clean, expected = both(name)(student, teacher, where=where)
        np.testing.assert_array_equal(value, clean)
        np.testing.assert_array_equal(found, expected)
        assert value[2] == 0
        assert not np.asarray(found)[:, ~where].any()
        for i in (0, 1, 3):
            kept = where[i]
            one = reference(name, student[i, kept], teacher[i, kept])
            np.testing.assert_allclose(value[i], one, rtol=3e-6, atol=1e-7)

    def test_padding_by_position(self):
        student, teacher = logits(2, 3, 4)
        where = np.array([[True, True, False], [True, False, False]])
        for name in ("reverse", "0.5"):
            value, _ = both(name)(student, teacher, where=where)
            expected = np.where(where, reference(name, student, teacher), 0)
            np.testing.assert_allclose(value, expected, rtol=3e-6)


class TestTransformations:
    @pytest.mark.parametrize("name", ["reverse", "0.1"])
    def test_bfloat16_is_computed_in_float32(self, name):
        student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in logits(4, 6))
        value, found = both(name)(student, teacher)
        assert value.dtype == np.float32
        assert found[0].dtype == jnp.bfloat16
        np.testing.assert_allclose(value, reference(name, student, teacher), rtol=3e-6)

    def test_schedules_of_the_interpolation_compile_once_and_vmap(self):
        student, teacher = logits(4, 6)
        each = np.array([0.0, 0.1, 0.5, 1.0], np.float32)
        one = jax.vmap(lambda s, t, b: jensen_shannon_divergence(s, t, interpolation=b))
        actual = jax.jit(one)(student, teacher, each)
        expected = [reference(f"{b:.1f}", student[i], teacher[i]) for i, b in enumerate(each)]
        np.testing.assert_allclose(actual, expected, rtol=3e-6)

    @pytest.mark.parametrize("name", ["reverse", "0.1"])
    def test_sharded_as_on_one_device(self, name):
        student, teacher = logits(8, 12)
        mesh = jax.make_mesh((4, 2), ("batch", "model"))
        place = NamedSharding(mesh, PartitionSpec("batch", "model"))
        value, found = both(name)(*(jax.device_put(x, place) for x in (student, teacher)))
        expected = both(name)(student, teacher)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(found, expected[1], atol=1e-6)


class TestBadInput:
    student, teacher = logits(2, 3)

    @pytest.mark.parametrize("loss", [reverse_kl_divergence, jensen_shannon_divergence])
    def test_what_cannot_be_is_named(self, loss):
        with pytest.raises(ValueError, match="must have one shape"):
            loss(self.student, self.teacher[:1])
        with pytest.raises(TypeError, match="student_logits must be floating"):
            loss(self.student.astype(int), self.teacher)
        with pytest.raises(ValueError, match="positive and finite"):
            loss(self.student, self.teacher, 0.0)
        with pytest.raises(TypeError, match="where != 0"):
            loss(self.student, self.teacher, where=np.ones(2))

    @pytest.mark.parametrize("b", [-0.1, 1.1, NAN])
    def test_interpolation(self, b):
        with pytest.raises(ValueError, match=r"interpolation .* must be in"):
            jensen_shannon_divergence(self.student, self.teacher, interpolation=b)
        loss = jax.jit(jensen_shannon_divergence)(self.student, self.teacher, interpolation=b)
        assert np.isnan(loss).all()


@pytest.mark.slow
class TestAgainstTorch:
    def test_value_and_gradients(self):
        torch = pytest.importorskip("torch")
        from torch.nn import functional as F

        student, teacher = logits(4, 6)
        for name in LOSSES:
            s, t = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in logits(4, 6))
            log_q, log_p = F.log_softmax(s / 2, -1), F.log_softmax(t / 2, -1)
            kl = functools.partial(F.kl_div, reduction="none", log_target=True)
            if name in ("reverse", "1.0"):
                loss = kl(log_p, log_q).sum(-1)
            elif name == "0.0":
                loss = kl(log_q, log_p).sum(-1)
            else:
                b = float(name)
                m = torch.log(b * log_p.exp() + (1 - b) * log_q.exp())
                loss = (b * kl(m, log_p) + (1 - b) * kl(m, log_q)).sum(-1)
            loss.sum().backward()
            value, found = both(name)(student, teacher, 2.0)
            np.testing.assert_allclose(value, loss.detach().numpy(), rtol=3e-6)
            for a, b in zip(found, (s.grad, t.grad), strict=True):
                np.testing.assert_allclose(a, b.numpy(), atol=1e-6)
