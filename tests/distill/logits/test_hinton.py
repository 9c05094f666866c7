"""The distillation losses against float64 references, other libraries, and hostile input."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import rel_entr, softmax

from jaxcomp.distill import hinton_loss, kl_divergence

INF, NAN = np.inf, np.nan
kl_jit, hinton_jit = jax.jit(kl_divergence), jax.jit(hinton_loss)


# What the tests do with results they do in NumPy: every jax operation is one more compilation.
def kl(*args, **kwargs):
    return np.asarray(kl_divergence(*args, **kwargs))


def hinton(*args, **kwargs):
    return np.asarray(hinton_loss(*args, **kwargs))


def log_softmax(x, axis=-1):
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def reference_kl(student, teacher, temperature=1.0, axis=-1):
    """Float64, terms in the definition's own form."""
    q = log_softmax(np.asarray(student, np.float64) / temperature, axis)
    p = log_softmax(np.asarray(teacher, np.float64) / temperature, axis)
    with np.errstate(invalid="ignore"):
        return np.where(np.exp(p) == 0, 0, np.exp(p) * (p - q)).sum(axis)


def reference_ce(student, targets, axis=-1):
    q = log_softmax(np.asarray(student, np.float64), axis)
    with np.errstate(invalid="ignore"):
        return -np.where(targets == 0, 0, targets * q).sum(axis)


def reference_gradients(student, teacher, temperature=1.0):
    """Closed forms of the derivative of the KL, in float64."""
    q = log_softmax(np.asarray(student, np.float64) / temperature)
    p = log_softmax(np.asarray(teacher, np.float64) / temperature)
    ratio = np.where(np.exp(p) == 0, 0, p - q)
    kl = (np.exp(p) * ratio).sum(-1, keepdims=True)
    return (np.exp(q) - np.exp(p)) / temperature, np.exp(p) * (ratio - kl) / temperature


def logits(*shape, seed=0, spread=3.0, dtype=np.float32):
    student, teacher = spread * np.random.default_rng(seed).normal(size=(2, *shape))
    return student.astype(dtype), teacher.astype(dtype)


def with_value(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def gradients(loss, *args, **kwargs):
    """Of the sum over the batch, in student and teacher; compiled once a loss."""
    compiled = compiled_gradients(loss)
    return lambda *inputs: [np.asarray(g) for g in compiled(*inputs, *args, **kwargs)]


@functools.cache
def compiled_gradients(loss):
    def total(*args, **kwargs):
        return loss(*args, **kwargs).sum()

    return jax.jit(jax.grad(total, argnums=(0, 1)))


def check_derivatives(loss, *args):
    """First and second derivatives along random directions against central differences."""
    rng, step = np.random.default_rng(0), 1e-5
    args = [np.asarray(x, np.float64) for x in args]
    directions = [rng.normal(size=x.shape) for x in args]
    slope = jax.value_and_grad(lambda *args: loss(*args).sum(), tuple(range(len(args))))
    compiled = jax.jit(slope)
    forward = jax.jit(lambda args, dots: jax.jvp(slope, args, dots)[1])
    for chosen in range(len(args) + 1):  # each argument alone, then all together
        dots = [d if chosen in (i, len(args)) else 0 * d for i, d in enumerate(directions)]
        up = compiled(*[x + step * d for x, d in zip(args, dots, strict=True)])
        down = compiled(*[x - step * d for x, d in zip(args, dots, strict=True)])
        first, curve = forward(tuple(args), tuple(dots))
        backward = sum(np.vdot(g, d) for g, d in zip(compiled(*args)[1], dots, strict=True))
        expected = (float(up[0]) - float(down[0])) / (2 * step)
        np.testing.assert_allclose([first, backward], expected, rtol=1e-7, atol=1e-8)
        for actual, a, b in zip(curve, up[1], down[1], strict=True):
            expected = (np.asarray(a) - np.asarray(b)) / (2 * step)
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-8)


rows = hnp.arrays(np.float32, (4, 6), elements=st.floats(-60, 60, width=32, allow_subnormal=False))
temperatures = st.floats(0.25, 50, width=32)


class TestValues:
    @pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_kl_is_the_definition(self, axis, temperature):
        student, teacher = logits(2, 3, 4)
        actual = kl(student, teacher, temperature, axis=axis)
        expected = reference_kl(student, teacher, temperature, axis)
        assert actual.shape == expected.shape
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=3e-6)

    @pytest.mark.parametrize("axis", [0, 1, -1])
    def test_hinton_is_the_definition_for_ids_and_for_probabilities(self, axis):
        student, teacher = logits(2, 3, 4, seed=1)
        classes = student.shape[axis]
        ids = np.random.default_rng(2).integers(0, classes, np.delete(student.shape, axis))
        one_hot = np.moveaxis(np.eye(classes)[ids], -1, axis)
        smooth = 0.9 * one_hot + 0.1 / classes
        soft = reference_kl(student, teacher, 3.0, axis)
        for labels, targets in ((ids, one_hot), (one_hot, one_hot), (smooth, smooth)):
            expected = 0.3 * reference_ce(student, targets, axis) + 0.7 * 9 * soft
            actual = hinton(student, teacher, labels, 3.0, 0.7, axis=axis)
            np.testing.assert_allclose(actual, expected, rtol=3e-6)

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64"])
    def test_any_integer_dtype_names_a_class(self, dtype):
        student, teacher = logits(2, 300)  # more classes than int8 can hold
        ids = np.array([3, 127], dtype)
        expected = reference_ce(student, np.eye(300)[ids])
        np.testing.assert_allclose(hinton(student, teacher, ids, 1.0, 0.0), expected, rtol=1e-6)

    def test_boolean_and_integer_one_hot(self):
        student, teacher = logits(4, 6)
        one_hot = np.eye(6)[[2, 0, 5, 5]]
        expected = hinton(student, teacher, jnp.array([2, 0, 5, 5]), 2.0, 0.5)
        for dtype in (bool, np.int32, np.float16):
            actual = hinton(student, teacher, one_hot.astype(dtype), 2.0, 0.5)
            np.testing.assert_array_equal(actual, expected)

    def test_one_example_without_batch_and_one_class(self):
        student, teacher = logits(6)
        assert kl(student, teacher).shape == ()
        loss = hinton(student, teacher, np.int32(2), 2.0, 0.5)
        expected = hinton(student[None], teacher[None], np.array([2]), 2.0, 0.5)[0]
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_array_equal(kl(student[:, None], teacher[:, None]), 0)

    def test_an_empty_batch_has_no_losses(self):
        empty = jnp.zeros((0, 3))
        assert kl(empty, empty).shape == (0,)
        assert hinton(empty, empty, jnp.zeros(0, int), 2.0, 0.5).shape == (0,)

    def test_numpy_arrays_come_in_and_jax_arrays_go_out(self):
        student, teacher = logits(4, 6)
        assert isinstance(student, np.ndarray)
        assert isinstance(kl_divergence(student, teacher, np.float64(2)), jax.Array)

    def test_float64_where_x64_is_enabled(self):
        with jax.enable_x64(True):
            student, teacher = logits(4, 6, dtype=np.float64)
            actual = kl(student, teacher.astype(np.float32), 2.5)
            assert actual.dtype == jnp.float64
            expected = reference_kl(student, np.asarray(teacher, np.float32), 2.5)
            np.testing.assert_allclose(actual, expected, rtol=1e-13)


class TestOtherLibraries:
    def test_optax(self):
        student, teacher = logits(4, 6)
        ids = np.arange(4)
        targets = softmax(teacher / 2, axis=-1)
        divergence = jax.jit(optax.losses.kl_divergence)(log_softmax(student / 2), targets)
        np.testing.assert_allclose(kl(student, teacher, 2.0), divergence, rtol=1e-5)
        hard = jax.jit(optax.losses.softmax_cross_entropy_with_integer_labels)(student, ids)
        np.testing.assert_allclose(hinton(student, teacher, ids, 2.0, 0.0), hard, rtol=1e-5)
        where = np.arange(24).reshape(4, 6) % 3 > 0
        hard = jax.jit(optax.losses.softmax_cross_entropy)(student, targets, where=where)
        actual = hinton(student, teacher, targets, 2.0, 0.0, where=where)
        np.testing.assert_allclose(actual, hard, rtol=1e-5)

    def test_scipy(self):
        student, teacher = logits(4, 6, seed=3)
        p, q = (softmax(np.asarray(x, np.float64), axis=-1) for x in (teacher, student))
        np.testing.assert_allclose(kl(student, teacher), rel_entr(p, q).sum(-1), rtol=3e-6)

    @pytest.mark.slow
    def test_torch_values_and_gradients(self):
        torch = pytest.importorskip("torch")
        functional = torch.nn.functional
        student, teacher = logits(4, 6, seed=4)
        s, t = (
            torch.tensor(np.asarray(x, np.float64), requires_grad=True)
            for x in logits(4, 6, seed=4)
        )
        theirs = functional.kl_div(
            functional.log_softmax(s / 4, -1),
            functional.log_softmax(t / 4, -1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        theirs.sum().backward()
        np.testing.assert_allclose(kl(student, teacher, 4.0), theirs.detach().numpy(), rtol=1e-5)
        for actual, expected in zip(
            gradients(kl_divergence, 4.0)(student, teacher), (s, t), strict=True
        ):
            np.testing.assert_allclose(actual, expected.grad.numpy(), rtol=1e-4, atol=1e-7)

    @pytest.mark.slow
    def test_torchdistill(self):
        torch = pytest.importorskip("torch")
        mid_level = pytest.importorskip("torchdistill.losses.mid_level")
        student, teacher = logits(4, 6, seed=5)
        ids = np.arange(4)
        theirs = mid_level.KDLoss("s", "output", "t", "output", temperature=4.0, alpha=0.3)
        s, t = (torch.tensor(np.asarray(x), requires_grad=True) for x in (student, teacher))
        loss = theirs({"s": {"output": s}}, {"t": {"output": t}}, torch.tensor(ids))
        loss.backward()
        ours = functools.partial(hinton_loss, labels=ids, temperature=4.0, weight=0.7)
        np.testing.assert_allclose(ours(student, teacher).mean(), loss.item(), rtol=1e-5)
        for actual, expected in zip(gradients(ours)(student, teacher), (s, t), strict=True):
            np.testing.assert_allclose(actual / 4, expected.grad.numpy(), rtol=1e-4, atol=1e-7)


class TestProperties:
    @given(rows, rows, temperatures)
    def test_never_negative_and_close_to_float64(self, student, teacher, temperature):
        actual = kl(student, teacher, temperature)
        assert (actual >= 0).all()
        expected = reference_kl(student, teacher, np.float32(temperature))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-13)

    @given(rows, temperatures)
    def test_equal_logits_give_exactly_zero_with_zero_gradients(self, student, temperature):
        assert not kl(student, student, temperature).any()
        for gradient in gradients(kl_divergence)(student, student, temperature):
            assert not gradient.any()

    @given(rows, rows, hnp.arrays(np.float32, (2, 4, 1), elements=st.integers(-4096, 4096)))
    def test_constants_added_to_a_row_change_nothing(self, student, teacher, constants):
        # On a grid of 2**-8 the additions are exact, so the losses must agree to rounding.
        student, teacher = (np.round(x * 256) / 256 for x in (student, teacher))
        moved = kl(student + constants[0], teacher + constants[1], 2.0)
        np.testing.assert_allclose(moved, kl(student, teacher, 2.0), rtol=1e-6, atol=1e-30)
        assert not kl(student + constants[0], student + constants[1], 2.0).any()

    @given(rows, rows, temperatures)
    def test_gradients_are_the_closed_forms_and_sum_to_zero(self, student, teacher, temperature):
        actual = gradients(kl_divergence)(student, teacher, temperature)
        expected = reference_gradients(student, teacher, np.float32(temperature))
        # A teacher's gradient is a difference of logarithms, each as large as logits lie apart.
        apart = max(np.ptp(student, -1).max(), np.ptp(teacher, -1).max()) / temperature
        for a, b in zip(actual, expected, strict=True):
            scale = 1 / temperature + np.abs(b).max()
            atol = 3e-6 * scale + 5e-7 * apart / temperature
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)
            every = 1e-5 * scale + a.shape[-1] * 5e-7 * apart / temperature
            np.testing.assert_allclose(a.sum(-1), 0, atol=every)

    @given(st.integers(0, 2**31), st.floats(3, 34))
    def test_hot_limit_is_half_the_variance_of_the_difference(self, seed, exponent):
        """Section 2.1 of the paper: matching logits is the limit of distillation."""
        student, teacher = logits(4, 6, seed=seed)
        temperature = np.float32(10.0**exponent)
        soft = hinton(student, teacher, np.zeros(4, int), temperature, 1.0)
        gap = np.asarray(teacher, np.float64) - np.asarray(student, np.float64)
        np.testing.assert_allclose(soft, gap.var(-1) / 2, rtol=30 / temperature + 3e-6)
        to_student, to_teacher = gradients(hinton_loss)(
            student, teacher, np.zeros(4, int), temperature, 1.0
        )
        expected = -(gap - gap.mean(-1, keepdims=True)) / 6
        np.testing.assert_allclose(to_student, expected, rtol=0, atol=100 / temperature + 1e-5)
        np.testing.assert_allclose(to_teacher, -expected, rtol=0, atol=100 / temperature + 1e-5)

    @given(st.integers(0, 2**31), st.integers(1, 12))
    def test_nearly_equal_distributions_keep_their_digits(self, seed, exponent):
        rng = np.random.default_rng(seed)
        teacher = rng.normal(size=(4, 6)).astype(np.float32)
        student = teacher + (10.0**-exponent * rng.normal(size=(4, 6))).astype(np.float32)
        gap = teacher.astype(np.float64) - student
        p = softmax(teacher.astype(np.float64), axis=-1)
        # KL = log E_p exp(-(gap - E_p gap)), without cancellation by its series.
        c = gap - (p * gap).sum(-1, keepdims=True)
        expected = np.log1p(
            (p * (c**2 / 2 - c**3 / 6 + c**4 / 24 - c**5 / 120 + c**6 / 720)).sum(-1)
        )
        np.testing.assert_allclose(
            kl(student, teacher), expected, rtol=2e-4 * 10.0**-exponent + 1e-6
        )


class TestDerivatives:
    def test_finite_differences_of_both_orders(self):
        with jax.enable_x64(True):
            student, teacher = logits(4, 6, spread=1.5, dtype=np.float64)
            check_derivatives(kl_divergence, student, teacher, 1.7)

    def test_finite_differences_under_a_mask_and_with_impossible_classes(self):
        with jax.enable_x64(True):
            student, teacher = logits(2, 3, 6, spread=1.5, dtype=np.float64)
            where = np.random.default_rng(0).random((2, 3, 6)) < 0.8
            impossible = np.zeros((2, 3, 6), bool)
            impossible[0, 1, 2] = impossible[1, 0] = True

            def loss(s, t, labels, temperature, weight):
                t = jnp.where(impossible, -INF, t)
                s = jnp.where(impossible[:, :, ::-1] & impossible, -INF, s)
                labels = labels * ~impossible
                return hinton_loss(s, t, labels, temperature, weight, axis=1, where=where)

            check_derivatives(loss, student, teacher, softmax(student, axis=1), 1.3, 0.6)

    def test_gradients_come_back_in_the_dtype_of_their_argument(self):
        student, teacher = logits(2, 3)
        found = gradients(kl_divergence)(student.astype(jnp.bfloat16), teacher.astype(jnp.float16))
        assert [g.dtype for g in found] == [jnp.bfloat16, jnp.float16]

    def test_a_stopped_teacher_gets_no_gradient(self):
        student, teacher = logits(4, 6)

        def loss(s, t):
            return kl_divergence(s, jax.lax.stop_gradient(t), 2.0)

        to_student, to_teacher = gradients(loss)(student, teacher)
        assert not to_teacher.any()
        np.testing.assert_allclose(
            to_student, reference_gradients(student, teacher, 2.0)[0], atol=1e-6
        )

    def test_the_temperature_can_be_learned(self):
        student, teacher = logits(4, 6)

        def slope(loss, reference):
            step = 1e-5
            expected = (reference(3 + step) - reference(3 - step)) / (2 * step)
            np.testing.assert_allclose(
                jax.jit(jax.grad(lambda t: loss(t).sum()))(3.0), expected.sum(), rtol=1e-4
            )

        slope(
            lambda t: kl_divergence(student, teacher, t),
            lambda t: reference_kl(student, teacher, t),
        )
        slope(
            lambda t: hinton_loss(student, teacher, np.zeros(4, int), t, 1.0),
            lambda t: t**2 * reference_kl(student, teacher, t),
        )


class TestLowPrecision:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
    def test_no_digit_is_lost_beyond_the_rounded_logits(self, dtype):
        student, teacher = (x.astype(dtype) for x in logits(16, 100, seed=7))
        ids = np.arange(16)
        s, t = (np.asarray(x.astype(np.float32), np.float64) for x in (student, teacher))
        actual = hinton(student, teacher, ids, 4.0, 0.5)
        assert actual.dtype == jnp.float32
        expected = 0.5 * reference_ce(s, np.eye(100)[ids]) + 8 * reference_kl(s, t, 4.0)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        for a, b in zip(
            gradients(kl_divergence)(student, teacher), reference_gradients(s, t), strict=True
        ):
            unit = float(jnp.finfo(dtype).eps)
            tiny = float(jnp.finfo(dtype).smallest_subnormal)
            np.testing.assert_allclose(a.astype(np.float32), b, rtol=unit, atol=tiny + 1e-6)

    def test_float16_logits_at_the_end_of_its_range(self):
        student = np.array([[65504, -65504, 0], [-65504, 65504, 65504]], np.float16)
        teacher = student[:, ::-1]
        loss = hinton(student, teacher, np.array([0, 1]), 1.0, 0.5)
        expected = 0.5 * reference_ce(student, np.eye(3)[[0, 1]]) + 0.5 * reference_kl(
            student, teacher
        )
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        for gradient in gradients(kl_divergence)(student, teacher):
            assert np.isfinite(gradient).all()


class TestExtremes:
    @pytest.mark.parametrize("size", [1e2, 1e4, 1e30, 1e38])
    @pytest.mark.parametrize("temperature", [1.0, 100.0])
    def test_huge_logits(self, size, temperature):
        signs = np.random.default_rng(0).integers(-1, 2, (2, 4, 6)).astype(np.float32)
        signs[0, 0], signs[1, 1], signs[:, 2] = 1, -1, 0
        student, teacher = np.float32(size) * signs
        expected = reference_kl(student, teacher, temperature)
        with np.errstate(over="ignore"):
            expected = expected.astype(np.float32)  # past float32 the divergence is infinite
        np.testing.assert_allclose(kl(student, teacher, temperature), expected, rtol=1e-6)
        for gradient in gradients(kl_divergence)(student, teacher, temperature):
            assert np.isfinite(gradient).all()
        for gradient in gradients(hinton_loss)(student, teacher, np.arange(4), temperature, 0.5):
            assert np.isfinite(gradient).all()

    @pytest.mark.parametrize("temperature", [1e-37, 1e-20, 1e-4, 1e4, 1e20, 3e38])
    def test_temperatures_from_freezing_to_melting(self, temperature):
        student, teacher = logits(4, 6)
        student = with_value(student, np.s_[:3], teacher[:3] + 0.25)
        temperature = np.float32(temperature)
        loss = kl(student, teacher, temperature)
        assert (loss >= 0).all()
        np.testing.assert_allclose(
            loss, reference_kl(student, teacher, np.float64(temperature)), rtol=3e-5, atol=1e-15
        )
        for function, args in ((kl_divergence, ()), (hinton_loss, (1.0,))):
            labels = (np.zeros(4, int),) if args else ()
            for gradient in gradients(function)(student, teacher, *labels, temperature, *args):
                assert np.isfinite(gradient).all()

    def test_impossible_classes_follow_zero_log_zero(self):
        teacher = np.array([[1.0, 2.0, -INF], [0.5, -INF, -INF], [1.0, 2.0, -INF]], np.float32)
        student = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, -INF], [3.0, 1.0, -INF]], np.float32)
        expected = [
            reference_kl(student[0], teacher[0]),
            -log_softmax(np.array([0.0, 1.0]))[0],
            reference_kl(student[2, :2], teacher[2, :2]),
        ]
        np.testing.assert_allclose(kl(student, teacher), expected, rtol=1e-6)
        to_student, to_teacher = gradients(kl_divergence)(student, teacher)
        want_student, want_teacher = reference_gradients(
            np.where(np.isinf(student), -1e4, student), np.where(np.isinf(teacher), -1e4, teacher)
        )
        np.testing.assert_allclose(to_student, want_student, atol=1e-6)
        np.testing.assert_allclose(to_teacher, want_teacher, atol=1e-6)

    def test_a_student_that_excludes_what_the_teacher_allows(self):
        student, teacher = np.array([[[0.0, 1.0, -INF]], [[0.0, 0.0, 1.0]]], np.float32)
        assert kl(student, teacher) == INF
        to_student, to_teacher = gradients(kl_divergence)(student, teacher)
        limit = reference_gradients([[0.0, 1.0, -1e5]], teacher)[0]
        np.testing.assert_allclose(to_student[:, :2], limit[:, :2], atol=1e-6)
        assert to_student[0, 2] == 0
        assert not to_teacher.any()
        # The same for a label, and a part that is switched off does not spoil the other.
        loss = functools.partial(hinton_loss, labels=np.array([2]), temperature=1.0)
        assert loss(student, student, weight=0.5) == INF
        assert loss(student, student, weight=1.0) == 0
        gradient = gradients(loss, weight=0.0)(student, student)[0]
        np.testing.assert_allclose(gradient[0, :2], softmax([0.0, 1.0]), atol=1e-6)

    def test_rows_with_no_class_left_are_padding(self):
        nothing = np.full((4, 6), -INF, np.float32)
        some = logits(4, 6)[0]
        assert (kl(nothing, nothing) == 0).all()
        assert (kl(some, nothing) == 0).all()
        assert (kl(nothing, some) == INF).all()
        for pair in ((nothing, nothing), (some, nothing), (nothing, some)):
            for gradient in gradients(kl_divergence)(*pair):
                assert np.isfinite(gradient).all()

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_overflow_shows_in_its_example_and_in_no_other(self, bad):
        student, teacher = logits(4, 6)
        for pair in (
            (with_value(student, (1, 2), bad), teacher),
            (student, with_value(teacher, (1, 2), bad)),
        ):
            for loss in (kl(*pair), hinton(*pair, np.arange(4), 2.0, 0.5)):
                np.testing.assert_array_equal(np.isnan(loss), [False, True, False, False])
            gradient = gradients(kl_divergence)(*pair)[0]
            np.testing.assert_array_equal(np.isnan(gradient).any(-1), [False, True, False, False])


class TestMasks:
    @pytest.mark.parametrize("behind", [NAN, INF, -INF, 1e38])
    def test_what_is_behind_a_mask_is_never_seen(self, behind):
        student, teacher = logits(4, 6)
        where = np.array([True, True, False, True, False, True])[None] & np.ones((4, 1), bool)
        where[2] = False  # an example left out whole
        dirty = [np.where(where, x, behind).astype(np.float32) for x in (student, teacher)]
        targets = np.where(where, softmax(teacher, axis=-1), behind).astype(np.float32)
        ids = np.array([0, 1, -100, 5])
        for loss, args in (
            (kl_divergence, (2.0,)),
            (hinton_loss, (ids, 2.0, 0.5)),
            (hinton_loss, (targets, 2.0, 0.5)),
        ):
            actual = loss(*dirty, *args, where=where)
            np.testing.assert_array_equal(actual, loss(student, teacher, *args, where=where))
            assert actual[2] == 0
            assert (np.delete(actual, 2) > 0).all()
            found = gradients(loss, *args, where=where)
            for a, b in zip(found(*dirty), found(student, teacher), strict=True):
                np.testing.assert_array_equal(a, b)
                assert not a[~where].any()
                assert np.isfinite(a).all()

    def test_the_lowest_float_as_a_mask_value_is_as_good_as_minus_infinity(self):
        student, teacher = logits(4, 6)
        low = np.finfo(np.float32).min
        masked = [with_value(x, np.s_[:, 2:4], low) for x in (student, teacher)]
        absent = [with_value(x, np.s_[:, 2:4], -INF) for x in (student, teacher)]
        np.testing.assert_array_equal(kl(*masked), kl(*absent))
        for a, b in zip(
            gradients(kl_divergence)(*masked), gradients(kl_divergence)(*absent), strict=True
        ):
            np.testing.assert_array_equal(a, b)
        flat = np.full((4, 6), low, np.float32)
        np.testing.assert_allclose(kl(flat, teacher), kl(0 * flat, teacher), rtol=1e-6)

    def test_masked_classes_are_as_if_absent(self):
        student, teacher = logits(4, 6)
        where = np.array([[True, True, False, True, False, True]])
        kept = np.flatnonzero(where[0])
        np.testing.assert_allclose(
            hinton(student, teacher, np.array([0, 1, 3, 5]), 2.0, 0.3, where=where),
            hinton(student[:, kept], teacher[:, kept], np.arange(4), 2.0, 0.3),
            rtol=1e-6,
        )

    @pytest.mark.parametrize("axis", [0, 2])
    def test_masks_of_examples_and_of_classes_broadcast(self, axis):
        student, teacher = logits(2, 3, 4)
        shape = list(student.shape)
        batch = shape[:axis] + shape[axis + 1 :]
        examples = np.random.default_rng(1).random(batch) < 0.5
        loss = kl(student, teacher, axis=axis)
        actual = kl(student, teacher, axis=axis, where=examples)
        np.testing.assert_allclose(actual, np.where(examples, loss, 0), rtol=1e-6)
        column = [1] * 3
        column[axis] = shape[axis]
        classes = (np.arange(shape[axis]) > 0).reshape(column)
        full = np.broadcast_to(classes, shape)
        np.testing.assert_array_equal(
            kl(student, teacher, axis=axis, where=classes),
            kl(student, teacher, axis=axis, where=full),
        )

    def test_a_label_on_a_masked_class_has_no_hard_part(self):
        student, teacher = logits(4, 6)
        where = np.arange(6)[None] < 5
        for labels in (np.array([1, 5, 2, 3]), np.eye(6)[[1, 5, 2, 3]]):
            loss = hinton(student, teacher, labels, 1.0, 0.0, where=where)
            np.testing.assert_array_equal(loss == 0, [False, True, False, False])

    def test_no_nan_arises_inside_for_a_nan_detector_to_find(self):
        student, teacher = logits(4, 6)
        student, teacher = with_value(student, (0, 1), -INF), with_value(teacher, np.s_[:, 1], -INF)
        with jax.debug_nans(True):
            found = gradients(hinton_loss)(student, teacher, np.array([0, 2, 3, 4]), 2.0, 0.5)
        assert np.isfinite(found).all()


class TestTransformations:
    def test_vmap_over_students_examples_and_temperatures(self):
        student, teacher = logits(4, 6)
        ids = np.arange(4)
        each = np.array([1.0, 2.0, 4.0, 8.0], np.float32)
        per_example = jax.vmap(hinton_loss, (0, 0, 0, 0, None))(student, teacher, ids, each, 0.5)
        for i in range(4):
            expected = hinton(student, teacher, ids, each[i], 0.5)[i]
            np.testing.assert_allclose(per_example[i], expected, rtol=1e-6)
        grad = jax.jit(jax.vmap(jax.grad(kl_divergence), in_axes=(0, None)))(student, teacher[0])
        expected = reference_gradients(student, np.broadcast_to(teacher[:1], (4, 6)))[0]
        np.testing.assert_allclose(grad, expected, atol=1e-6)

    def test_scan_with_scheduled_temperature_and_weight_compiles_once(self):
        student, teacher = logits(4, 6)
        ids = np.arange(4)
        temperature = optax.linear_schedule(8.0, 1.0, 10)
        weight = optax.linear_schedule(1.0, 0.0, 10)
        traced = []

        def loss(s, step):
            traced.append(None)
            return hinton_loss(s, teacher, ids, temperature(step), weight(step)).mean()

        def body(s, step):
            value, gradient = jax.value_and_grad(loss)(s, step)
            return s - gradient, value

        _, losses = jax.lax.scan(body, student, jnp.arange(10))
        assert np.isfinite(losses).all()
        count = len(traced)
        step = jax.jit(jax.value_and_grad(loss))
        s = student
        for i in range(10):
            value, gradient = step(s, jnp.int32(i))
            np.testing.assert_allclose(value, losses[i], rtol=1e-5)
            s = s - gradient
        assert len(traced) == count + 1

    def test_checkpointing_and_forward_mode(self):
        student, teacher = logits(4, 6)
        kept = gradients(jax.checkpoint(kl_divergence))(student, teacher)
        for a, b in zip(kept, gradients(kl_divergence)(student, teacher), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
        forward = jax.jit(lambda *dots: jax.jvp(kl_divergence, (student, teacher), dots)[1])
        tangent = forward(teacher, student)
        expected = sum((g * d).sum(-1) for g, d in zip(kept, (teacher, student), strict=True))
        np.testing.assert_allclose(tangent, expected, rtol=1e-5)

    def test_strict_dtype_promotion(self):
        student, teacher = logits(4, 6)
        with jax.numpy_dtype_promotion("strict"):
            loss = hinton(student.astype(jnp.bfloat16), teacher, np.arange(4), 2.0, 0.5)
            gradient = gradients(kl_divergence)(student, teacher.astype(jnp.float16))[0]
        assert loss.dtype == gradient.dtype == jnp.float32

    @pytest.mark.parametrize(
        ("kind", "spec"),
        [
            (AxisType.Auto, ("batch", "model")),
            (AxisType.Explicit, ("batch", "model")),
            (AxisType.Explicit, ("batch", None)),
            (AxisType.Explicit, (None, "model")),
        ],
    )
    def test_sharded_as_on_one_device(self, kind, spec):
        student, teacher = logits(8, 12)
        ids, where = np.arange(8), np.random.default_rng(0).random((8, 12)) < 0.8

        def loss(s, t, y, w):
            return hinton_loss(s, t, y, 2.0, 0.5, where=w)

        def both(s, t, y, w):
            return loss(s, t, y, w), jax.grad(lambda s, t: loss(s, t, y, w).mean(), (0, 1))(s, t)

        expected = jax.device_get(jax.jit(both)(student, teacher, ids, where))
        mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(kind, kind))
        place, rows = NamedSharding(mesh, PartitionSpec(*spec)), PartitionSpec(spec[0])
        with jax.set_mesh(mesh):
            s, t, w = (jax.device_put(x, place) for x in (student, teacher, where))
            y = jax.device_put(ids, NamedSharding(mesh, rows))
            actual = jax.jit(both)(s, t, y, w)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
                actual,
                expected,
            )
            assert actual[0].sharding.is_equivalent_to(NamedSharding(mesh, rows), 1)
            assert actual[1][0].sharding.is_equivalent_to(place, 2)
            # Eagerly, with labels that are not sharded, and a mask to be broadcast.
            np.testing.assert_allclose(
                loss(s, t, ids, where[:1]), loss(student, teacher, ids, where[:1]), rtol=1e-5
            )


class TestBadInput:
    student, teacher = logits(2, 3)
    ids = np.array([0, 2])

    @pytest.mark.parametrize(
        ("error", "match", "args", "kwargs"),
        [
            (ValueError, "must have one shape", (student, teacher[:1]), {}),
            (ValueError, "must have one shape", (student, teacher[0]), {}),
            (TypeError, "student_logits must be floating", (student.astype(int), teacher), {}),
            (TypeError, "teacher_logits must be floating", (student, teacher > 0), {}),
            (ValueError, "no class on axis", (student, teacher), {"axis": 2}),
            (ValueError, "no class on axis", (student[0, 0], teacher[0, 0]), {}),
            (ValueError, "no class on axis", (student[:, :0], teacher[:, :0]), {}),
            (ValueError, "positive and finite", (student, teacher, 0.0), {}),
            (ValueError, "positive and finite", (student, teacher, -1), {}),
            (ValueError, "positive and finite", (student, teacher, NAN), {}),
            (ValueError, "positive and finite", (student, teacher, INF), {}),
            (ValueError, "positive and finite", (student, teacher, 1e-300), {}),
            (ValueError, "jax.vmap", (student, teacher, np.ones(2)), {}),
            (TypeError, "where != 0", (student, teacher), {"where": np.ones((2, 3))}),
            (ValueError, "where .* fits neither", (student, teacher), {"where": np.ones(3, bool)}),
            (ValueError, "where .* fits", (student, teacher), {"where": np.ones((2, 2), bool)}),
        ],
    )
    def test_kl(self, error, match, args, kwargs):
        with pytest.raises(error, match=match):
            kl(*args, **kwargs)

    @pytest.mark.parametrize(
        ("error", "match", "labels", "weight"),
        [
            (ValueError, "labels hold 3", np.array([0, 3]), 0.5),
            (ValueError, "labels hold -1", jnp.array([-1, 0]), 0.5),
            (ValueError, "labels hold 1099511627776", np.array([0, 2**40]), 0.5),
            (ValueError, "class ids of shape", np.array([0, 1, 2]), 0.5),
            (ValueError, "class ids of shape", np.zeros((3, 2)), 0.5),
            (TypeError, "must be integers", np.array([0.0, 1.0]), 0.5),
            (TypeError, "must be integers", np.array([True, False]), 0.5),
            (ValueError, "real", np.zeros((2, 3), complex), 0.5),
            (ValueError, "weight 1.5 must be in", ids, 1.5),
            (ValueError, "weight -0.1 must be in", ids, -0.1),
            (ValueError, "weight nan must be in", ids, NAN),
            (ValueError, "weight .* scalar", ids, np.ones(2)),
        ],
    )
    def test_hinton(self, error, match, labels, weight):
        with pytest.raises(error, match=match):
            hinton(self.student, self.teacher, labels, 2.0, weight)

    def test_what_only_shows_inside_jit_becomes_nan(self):
        loss = hinton_jit(self.student, self.teacher, np.array([3, 2]), 2.0, 0.5)
        np.testing.assert_array_equal(np.isnan(loss), [True, False])
        loss = hinton_jit(self.student, self.teacher, np.array([0, -1]), 2.0, 0.5)
        np.testing.assert_array_equal(np.isnan(loss), [False, True])
        for temperature in (0.0, -1.0, NAN):
            assert np.isnan(kl_jit(self.student, self.teacher, temperature)).all()

    def test_bad_values_are_found_while_the_logits_are_traced(self):
        with pytest.raises(ValueError, match="labels hold 5"):
            jax.grad(lambda s: hinton_loss(s, self.teacher, np.array([0, 5]), 2.0, 0.5).sum())(
                self.student
            )
        with pytest.raises(ValueError, match="temperature"):
            jax.jit(functools.partial(kl_divergence, temperature=0.0))(self.student, self.teacher)
