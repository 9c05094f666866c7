"""What defines each loss on logits: laws, other libraries, edges, and what it says of bad input."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from scipy.special import entr, expit, log_softmax, softmax

from jaxcomp.distill.logits.cross_entropy import additive_hinton_loss, entropy, soft_cross_entropy
from jaxcomp.distill.logits.decoupled import decoupled_loss
from jaxcomp.distill.logits.dist import dist_loss
from jaxcomp.distill.logits.ensemble import ensemble_logits, mean_logits
from jaxcomp.distill.logits.hinton import hinton_loss, kl_divergence
from jaxcomp.distill.logits.logit_mse import logit_mse
from jaxcomp.distill.logits.multi_label import binary_kl_divergence, multi_label_loss
from jaxcomp.distill.logits.standardize import standardize_logits

INF, NAN = np.inf, np.nan
IDS = np.array([2, 0, 5, 5], np.int32)
rows = hnp.arrays(np.float32, (4, 6), elements=st.floats(-30, 30, width=32, allow_subnormal=False))
temperatures = st.floats(0.5, 20, width=32)


def logits(*shape, seed=0, spread=3.0):
    return (spread * np.random.default_rng(seed).normal(size=(2, *shape))).astype(np.float32)


def with_gradients(loss, *args):
    """Losses, and the gradients of their sum in every argument."""

    def total(*args):
        losses = loss(*args)
        return losses.sum(), losses

    slope = jax.grad(total, tuple(range(len(args))), has_aux=True)
    gradients, losses = jax.jit(slope)(*args)
    return np.asarray(losses), [np.asarray(g) for g in gradients]


class TestLaws:
    @given(rows, rows, temperatures)
    def test_cross_entropy_is_entropy_plus_divergence(self, student, teacher, temperature):
        h, ce = entropy(teacher, temperature), soft_cross_entropy(student, teacher, temperature)
        expected = entr(softmax(np.float64(teacher) / temperature, -1)).sum(-1)
        np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-12)
        assert (np.asarray(h) <= np.log(6) + 1e-6).all()
        divergence = np.asarray(kl_divergence(student, teacher, temperature))
        np.testing.assert_allclose(ce, divergence + np.asarray(h), rtol=1e-6)

    @given(rows, rows, temperatures, st.floats(0, 4, width=32))
    def test_the_two_forms_of_hinton_differ_by_the_entropy(self, student, teacher, T, c):
        actual = additive_hinton_loss(student, teacher, IDS, T, c)
        average = (1 + c) * np.asarray(
            hinton_loss(student, teacher, IDS, T, np.float32(c / (1 + c)))
        )
        constant = c * T**2 * np.asarray(entropy(teacher, T))
        np.testing.assert_allclose(actual, average + constant, rtol=2e-5, atol=1e-6)

    def test_the_additive_form_composes_of_its_parts(self):
        student, teacher = logits(4, 6)
        hard = jax.jit(optax.losses.softmax_cross_entropy_with_integer_labels)(student, IDS)
        soft = soft_cross_entropy(student, teacher, 4.0)
        expected = np.asarray(hard) + 0.3 * np.asarray(soft)
        actual = additive_hinton_loss(student, teacher, IDS, 4.0, 0.3 / 16)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    @given(rows, rows, temperatures)
    def test_decoupled_parts_with_the_teachers_weights_are_plain_distillation(self, s, t, T):
        first, second = (
            np.asarray(decoupled_loss(s, t, IDS, T, target_weight=a, other_weight=b))
            for a, b in ((1.0, 0.0), (0.0, 1.0))
        )
        assert (first >= 0).all()
        assert (second >= 0).all()
        p = softmax(np.float64(t) / T, -1)
        p[np.arange(4), IDS] = 0  # what is left is the probability of the other classes
        expected = T**2 * np.asarray(kl_divergence(s, t, T))
        actual = first + p.sum(-1) * second
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=2e-4 * T**2 * 1e-2)

    @pytest.mark.parametrize("margin", [10, 25, 60])
    def test_decoupled_is_right_for_a_teacher_that_is_sure(self, margin):
        """From 17 on a float32 probability of the target is 1, from 37 on one in float64 is."""
        _, teacher = np.round(logits(4, 6) * 16) / 16
        others = np.arange(6) != IDS[:, None]
        sure = np.where(others, teacher, teacher.max() + np.float32(margin))
        less = np.where(others, teacher[:, ::-1], sure - np.float32(5))
        lowest = [
            np.log((np.exp(np.float64(x)) * others).sum(-1)) - x[np.arange(4), IDS]
            for x in (less, sure)
        ]
        b_s, b_t = (expit(x) for x in lowest)  # of all other classes together
        log_t, log_s = (-np.logaddexp(0, -x) for x in lowest[::-1])
        first = b_t * (log_t - log_s) + (1 - b_t) * (np.log1p(-b_t) - np.log1p(-b_s))
        second = kl_divergence(less, sure, where=others)
        for a, b, expected in ((1.0, 0.0, first), (0.0, 1.0, second)):
            actual = decoupled_loss(less, sure, IDS, 1.0, target_weight=a, other_weight=b)
            np.testing.assert_allclose(actual, expected, rtol=2e-5)

    @given(rows, rows, st.floats(-50, 50, width=32))
    def test_centered_mse_is_the_limit_of_the_divergence(self, student, teacher, constant):
        student = student / 8  # so that the temperature is high beside it
        teacher = teacher / 8
        T = np.float32(3e3)
        limit = 2 * T**2 * np.asarray(kl_divergence(student, teacher, T))
        actual = np.asarray(logit_mse(student, teacher, centered=True))
        np.testing.assert_allclose(actual, limit, rtol=1e-2, atol=1e-5)
        moved = logit_mse(student + np.float32(constant), teacher, centered=True)
        np.testing.assert_allclose(moved, actual, rtol=1e-3, atol=1e-3)

    @given(rows, st.floats(0.125, 64, width=32), st.floats(-8, 8, width=32))
    def test_standardised_logits_know_no_scale_and_offset(self, student, scale, offset):
        student = np.round(student * 16) / 16  # a grid on which the change is nearly exact
        actual = np.asarray(standardize_logits(student, 2.0))
        moved = standardize_logits(student * np.float32(scale) + np.float32(offset), 2.0)
        np.testing.assert_allclose(moved, actual, atol=2e-3)
        np.testing.assert_allclose(actual.sum(-1), 0, atol=1e-5)
        some = np.ptp(student, -1) > 0
        np.testing.assert_allclose(actual.std(-1), some / 2, atol=1e-5)

    @given(rows, rows)
    def test_dist_is_between_zero_and_four_and_symmetric(self, student, teacher):
        mean = np.asarray(dist_loss(student, teacher)).mean()
        assert -1e-5 <= mean <= 4 + 1e-5
        turned = np.asarray(dist_loss(teacher, student)).mean()
        # Correlations near one are taken from one.
        np.testing.assert_allclose(mean, turned, rtol=1e-5, atol=1e-6)

    def test_dist_of_equal_logits_is_zero_and_knows_no_constants(self):
        student, teacher = logits(4, 6)
        np.testing.assert_allclose(np.asarray(dist_loss(student, student)).sum(), 0, atol=1e-5)
        actual = dist_loss(student + np.arange(4, dtype=np.float32)[:, None], teacher)
        np.testing.assert_allclose(actual, dist_loss(student, teacher), atol=1e-5)
        # A batch of one has no relations between examples: r = 0.
        one = np.asarray(dist_loss(student[:1], student[:1], intra_weight=0.5))
        np.testing.assert_allclose(one, 0.5, atol=1e-6)

    def test_dist_takes_every_axis_but_the_classes_for_examples(self):
        student, teacher = logits(4, 6)
        flat = np.asarray(dist_loss(student, teacher))
        cube = [x.reshape(2, 2, 6).transpose(0, 2, 1) for x in (student, teacher)]
        np.testing.assert_allclose(dist_loss(*cube, axis=1).reshape(4), flat, rtol=1e-5, atol=1e-6)

    @given(hnp.arrays(np.float32, (3, 4, 6), elements=st.floats(-30, 30, width=32)), temperatures)
    def test_an_ensemble_has_the_mean_of_the_probabilities(self, members, temperature):
        weights = np.array([1, 0, 3], np.float32)
        made = np.float64(ensemble_logits(members, weights, temperature=temperature))
        p = softmax(np.float64(members) / temperature, -1)
        expected = (p[0] + 3 * p[2]) / 4
        np.testing.assert_allclose(softmax(made / temperature, -1), expected, rtol=2e-5, atol=1e-30)
        np.testing.assert_allclose(
            mean_logits(members, weights), (members[0] + 3 * members[2]) / 4, atol=1e-5
        )


class TestEnsembles:
    def test_axes(self):
        members = logits(4, 6, seed=1)
        expected = np.asarray(ensemble_logits(members))
        for axis, class_axis in ((2, 1), (-2, -1), (0, -2)):
            moved = np.moveaxis(members, (0, 2), (axis, class_axis))
            actual = np.asarray(ensemble_logits(moved, axis=axis, class_axis=class_axis))
            actual = actual.T if actual.shape == (6, 4) else actual
            np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_teachers_that_know_some_classes_or_saw_some_examples(self):
        members = logits(4, 6, seed=2)
        knows = np.ones((2, 4, 6), bool)
        knows[0, 0, 3:] = False  # the second alone has these classes
        knows[:, 1, 4] = False  # nobody has this one
        knows[0, 2] = False  # the first has not seen this example
        knows[:, 3] = False  # nobody has seen this one
        dirty = np.where(knows, members, NAN)
        made = np.asarray(ensemble_logits(dirty, where=knows))
        p = softmax(np.where(knows, np.float64(members), -INF)[:, :2], -1)
        np.testing.assert_allclose(np.exp(made[:2]), p.mean(0), rtol=1e-5)
        np.testing.assert_allclose(np.exp(made[2]), softmax(np.float64(members[1, 2])), rtol=1e-5)
        assert (made[3] == -INF).all()
        assert made[1, 4] == -INF
        assert np.asarray(kl_divergence(members[0], made))[3] == 0
        geometric = np.asarray(mean_logits(dirty, where=knows))
        np.testing.assert_allclose(geometric[0, :3], members[:, 0, :3].mean(0), rtol=1e-5)
        assert (geometric[0, 3:] == -INF).all()
        assert (geometric[3] == -INF).all()
        np.testing.assert_allclose(geometric[2], members[1, 2], rtol=1e-6)
        for mean in (ensemble_logits, mean_logits):
            made, (gradient,) = with_gradients(
                lambda x, f=mean: kl_divergence(members[0], f(x, where=knows)), dirty
            )
            assert np.isfinite(made).all()
            assert np.isfinite(gradient).all()
            assert not gradient[~knows].any()

    def test_weights_may_be_learned(self):
        members = logits(4, 6, seed=3)
        loss = jax.jit(lambda w, x: kl_divergence(x[0], ensemble_logits(x, w)).sum())
        gradient = jax.grad(loss)(jnp.ones(2), members)
        step = 1e-2
        ends = [float(loss(np.array([1 + d, 1.0], np.float32), members)) for d in (step, -step)]
        np.testing.assert_allclose(gradient[0], (ends[0] - ends[1]) / (2 * step), rtol=1e-2)
        np.testing.assert_allclose(gradient.sum(), 0, atol=1e-5)  # only proportions count


class TestEdges:
    def test_infinite_where_the_student_rules_out_what_the_teacher_does_not(self):
        student, teacher = logits(4, 6)
        student[1, 3] = -INF
        for loss in (
            soft_cross_entropy,
            logit_mse,
            functools.partial(decoupled_loss, labels=IDS, temperature=2.0),
            binary_kl_divergence,
        ):
            losses, gradients = with_gradients(loss, student, teacher)
            np.testing.assert_array_equal(np.isinf(losses), [False, True, False, False])
            assert np.isfinite(np.asarray(gradients)).all()
        # For the decoupled loss also in the label's own class, and in all others.
        student, teacher = logits(4, 6)
        student[0, 2] = student[1, 1:] = -INF
        loss = functools.partial(decoupled_loss, labels=IDS, temperature=2.0)
        losses, gradients = with_gradients(loss, student, teacher)
        np.testing.assert_array_equal(np.isinf(losses), [True, True, False, False])
        assert np.isfinite(np.asarray(gradients)).all()
        assert np.isfinite(np.asarray(dist_loss(student, teacher))).all()

    def test_a_weight_of_zero_switches_an_infinite_part_off(self):
        student, teacher = logits(4, 6)
        student[1, 3] = -INF
        for loss in (
            additive_hinton_loss(student, teacher, IDS, 2.0, 0.0),
            decoupled_loss(student, teacher, IDS, 2.0, other_weight=0.0),
        ):
            assert np.isfinite(np.asarray(loss)).all()

    def test_a_label_on_a_class_that_does_not_count_has_no_first_part(self):
        student, teacher = logits(4, 6)
        where = np.arange(6)[None] != 5
        loss = decoupled_loss(student, teacher, IDS, 1.0, other_weight=0.0, where=where)
        np.testing.assert_array_equal(np.asarray(loss) == 0, IDS == 5)
        loss = decoupled_loss(student, teacher, IDS, 1.0, other_weight=1.0, where=where)
        plain = np.asarray(kl_divergence(student, teacher, where=where))
        np.testing.assert_allclose(loss[2:], plain[2:], rtol=1e-6)

    def test_ids_of_examples_left_out_are_not_read_and_others_show(self):
        student, teacher = logits(4, 6)
        ids, seen = np.array([2, 0, -100, 5], np.int32), np.array([True, True, False, True])
        loss = np.asarray(decoupled_loss(student, teacher, ids, 2.0, where=seen))
        expected = np.asarray(decoupled_loss(student, teacher, IDS, 2.0, where=seen))
        np.testing.assert_array_equal(loss, expected)
        bad = jax.jit(decoupled_loss)(student, teacher, ids, 2.0)
        np.testing.assert_array_equal(np.isnan(bad), ~seen)

    def test_entropy_of_a_distribution_that_is_almost_sure(self):
        sure = np.array([[24.0, 0.0, 0.0], [18.0, 0.0, 1.0]], np.float32)
        expected = entr(softmax(np.float64(sure), -1)).sum(-1)
        np.testing.assert_allclose(entropy(sure), expected, rtol=1e-6)
        gradient = jax.jit(jax.grad(lambda x: entropy(x).sum()))(sure)
        p = softmax(np.float64(sure), -1)
        closed = -p * (log_softmax(np.float64(sure), -1) + expected[:, None])
        np.testing.assert_allclose(gradient, closed, rtol=1e-5, atol=5e-8)


class TestSmoothing:
    def test_smoothed_labels_are_targets_for_every_loss_that_takes_them(self):
        student, teacher = logits(4, 6)
        smooth = optax.smooth_labels(jnp.eye(6)[IDS], 0.1)
        expected = -(np.asarray(smooth) * log_softmax(np.float64(student), -1)).sum(-1)
        for loss in (hinton_loss, additive_hinton_loss):
            actual = loss(student, teacher, smooth, 1.0, 0.0)
            np.testing.assert_allclose(actual, expected, rtol=1e-5)
        yes = optax.smooth_labels(jnp.eye(2)[IDS % 2], 0.1)[:, 1:]
        actual = multi_label_loss(student[:, :1], teacher[:, :1], yes, 1.0, 0.0)
        pair = np.stack([0 * student[:, 0], student[:, 0]], -1)
        expected = hinton_loss(pair, pair, jnp.concatenate([1 - yes, yes], -1), 1.0, 0.0)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


class TestOtherLibraries:
    def test_optax(self):
        student, teacher = logits(4, 6)
        targets = softmax(teacher / 2, axis=-1)
        soft = jax.jit(optax.losses.softmax_cross_entropy)(student / 2, targets)
        np.testing.assert_allclose(soft_cross_entropy(student, teacher, 2.0), soft, rtol=1e-5)
        binary = jax.jit(optax.losses.sigmoid_binary_cross_entropy)
        yes = np.arange(24).reshape(4, 6) % 5 < 2
        hard = np.asarray(binary(student, yes)).sum(-1)
        np.testing.assert_allclose(
            multi_label_loss(student, teacher, yes, 1.0, 0.0), hard, rtol=1e-5
        )
        own = expit(teacher)
        apart = np.asarray(binary(student, own)) - np.asarray(binary(teacher, own))
        np.testing.assert_allclose(binary_kl_divergence(student, teacher), apart.sum(-1), rtol=1e-4)
        squared = np.asarray(jax.jit(optax.losses.squared_error)(student, teacher)).mean(-1)
        np.testing.assert_allclose(logit_mse(student, teacher), squared, rtol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name", ["soft", "binary", "multi_label", "mse", "decoupled", "dist", "std"]
    )
    def test_torch_and_torchdistill(self, name):
        torch = pytest.importorskip("torch")
        ours, theirs = pairs(torch)[name]
        student, teacher = logits(4, 6, seed=4)
        s, t = (torch.tensor(np.float64(x), requires_grad=True) for x in (student, teacher))
        expected = theirs(s, t)
        expected.backward()
        value, gradients = jax.value_and_grad(lambda *x: ours(*x).mean(), (0, 1))(student, teacher)
        np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
        np.testing.assert_allclose(gradients[0], s.grad.numpy(), rtol=1e-4, atol=1e-6)
        if t.grad is not None:
            np.testing.assert_allclose(gradients[1], t.grad.numpy(), rtol=1e-4, atol=1e-6)


def pairs(torch):
    """Ours, per example, and the mean that PyTorch and torchdistill take of theirs."""
    functional, T = torch.nn.functional, 4.0
    yes, ids = np.arange(24).reshape(4, 6) % 5 < 2, torch.tensor(np.int64(IDS))
    level = pytest.importorskip("torchdistill.losses.mid_level")

    def named(loss):
        return lambda s, t: loss({"s": {"output": s}}, {"t": {"output": t}}, ids)

    def multi_label(s, t):
        hard = functional.binary_cross_entropy_with_logits(s, torch.tensor(np.float64(yes)))
        p, q = (torch.stack([x, 0 * x], -1).div(T).log_softmax(-1) for x in (t, s))
        return 6 * (
            0.7 * hard + 0.3 * T**2 * functional.kl_div(q, p, log_target=True, reduction="sum") / 24
        )

    def decoupled(s, t):
        """By the paper: the pair (target, rest), and the rest alone."""
        keep = functional.one_hot(ids, 6).bool()
        p, q = ((x / T).softmax(-1) for x in (t, s))
        pairs = [torch.stack([x[keep], x[~keep].reshape(4, 5).sum(-1)], -1) for x in (p, q)]
        first = functional.kl_div(pairs[1].log(), pairs[0], reduction="batchmean")
        rest = [(x[~keep].reshape(4, 5) / T).log_softmax(-1) for x in (t, s)]
        second = functional.kl_div(rest[1], rest[0], reduction="batchmean", log_target=True)
        return T**2 * (2 * first + 5 * second)

    places = ("s", "output", "t", "output")
    bessel = np.sqrt(6 / 5)  # torchdistill divides the variance by one class less

    def standardized(s, t):
        pair = (standardize_logits(x, T * bessel) for x in (s, t))
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(s, IDS)
        return 0.4 * hard + 0.6 * T**2 * kl_divergence(*pair)

    return {
        "soft": (
            lambda s, t: soft_cross_entropy(s, t, T),
            lambda s, t: functional.cross_entropy(s / T, (t / T).softmax(-1)),
        ),
        "binary": (
            lambda s, t: binary_kl_divergence(s, t, T),
            lambda s, t: (
                (
                    functional.binary_cross_entropy_with_logits(s / T, (t / T).sigmoid())
                    - functional.binary_cross_entropy_with_logits(t / T, (t / T).sigmoid())
                )
                * 6
            ),
        ),
        "multi_label": (lambda s, t: multi_label_loss(s, t, yes, T, 0.3), multi_label),
        "mse": (logit_mse, functional.mse_loss),
        "decoupled": (
            lambda s, t: decoupled_loss(s, t, IDS, T, target_weight=2.0, other_weight=5.0),
            decoupled,
        ),
        "dist": (
            lambda s, t: T**2 * dist_loss(s, t, T, inter_weight=2.0, intra_weight=0.5),
            named(level.DISTLoss(*places, beta=2.0, gamma=0.5, tau=T)),
        ),
        "std": (standardized, named(level.LogitStdKDLoss(*places, temperature=T, alpha=0.4))),
    }


S, L = logits(2, 3)
ONE = np.array([0, 2])
STACK = logits(4, 3)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "logits must be floating", lambda: entropy(np.ones((2, 3), int))),
        (ValueError, "no class on axis 2", lambda: entropy(S, axis=2)),
        (ValueError, "positive and finite", lambda: entropy(S, 0.0)),
        (ValueError, "where .* fits neither", lambda: entropy(S, where=np.ones(3, bool))),
        (ValueError, "must have one shape", lambda: soft_cross_entropy(S, L[:1])),
        (ValueError, "weight -1.0 must be", lambda: additive_hinton_loss(S, L, ONE, 1.0, -1.0)),
        (ValueError, "labels hold 3", lambda: additive_hinton_loss(S, L, ONE + 1, 1.0, 1.0)),
        (TypeError, "teacher_logits must be floating", lambda: logit_mse(S, L > 0)),
        (TypeError, "where != 0", lambda: logit_mse(S, L, where=np.ones(2))),
        (ValueError, "labels hold 3", lambda: decoupled_loss(S, L, ONE + 1, 1.0)),
        (TypeError, "must be integers", lambda: decoupled_loss(S, L, np.zeros(2), 1.0)),
        (
            ValueError,
            "must be class ids of shape",
            lambda: decoupled_loss(S, L, np.eye(3)[ONE], 1.0),
        ),
        (ValueError, "other_weight", lambda: decoupled_loss(S, L, ONE, 1.0, other_weight=NAN)),
        (ValueError, "target_weight", lambda: decoupled_loss(S, L, ONE, 1.0, target_weight=-1)),
        (ValueError, "inter_weight", lambda: dist_loss(S, L, inter_weight=-1)),
        (ValueError, "intra_weight", lambda: dist_loss(S, L, intra_weight=INF)),
        (ValueError, "temperature", lambda: standardize_logits(S, -1.0)),
        (ValueError, "labels .* the logits' shape", lambda: multi_label_loss(S, L, ONE, 1.0, 0.5)),
        (TypeError, "must be real", lambda: multi_label_loss(S, L, S * 1j, 1.0, 0.5)),
        (ValueError, "weight 2.0 must be", lambda: multi_label_loss(S, L, S > 0, 1.0, 2.0)),
        (ValueError, "no teachers on axis 1", lambda: ensemble_logits(STACK, axis=1, class_axis=1)),
        (ValueError, "no teachers on axis 3", lambda: mean_logits(STACK, axis=3)),
        (ValueError, "one for each of 2", lambda: ensemble_logits(STACK, np.ones(3))),
        (ValueError, "not all 0", lambda: ensemble_logits(STACK, np.zeros(2))),
        (ValueError, "not negative", lambda: mean_logits(STACK, np.array([1.0, -1.0]))),
        (ValueError, "temperature", lambda: ensemble_logits(STACK, temperature=0.0)),
    ],
)
def test_bad_input_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call()
