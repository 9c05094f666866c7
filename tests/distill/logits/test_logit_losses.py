"""All losses on logits, through one table of cases: float64 forms, masks, hostile input, jit."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp.distill.logits.cross_entropy import additive_hinton_loss, entropy, soft_cross_entropy
from jaxcomp.distill.logits.decoupled import decoupled_loss
from jaxcomp.distill.logits.dist import dist_loss
from jaxcomp.distill.logits.ensemble import ensemble_logits, mean_logits
from jaxcomp.distill.logits.hinton import kl_divergence
from jaxcomp.distill.logits.logit_mse import logit_mse
from jaxcomp.distill.logits.multi_label import binary_kl_divergence, multi_label_loss
from jaxcomp.distill.logits.standardize import standardize_logits

BATCH, CLASSES = 8, 6
T, WEIGHT = 2.0, 0.4
IDS = np.array([0, 2, 5, 1, 3, 0, 4, 2], np.int32)
YES = np.random.default_rng(9).random((BATCH, CLASSES)) < 0.4
MEMBERS = np.array([1.0, 3.0], np.float32)


class Case(NamedTuple):
    """A loss with the arguments of this file, and what it must be, in float64 NumPy."""

    loss: Callable[..., Any]  # (student, teacher, where, temperature, weight)
    reference: Callable[..., Any]  # (student, teacher, keep), all (BATCH, CLASSES)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def kl_rows(s, t, temperature=T):
    p, log_q = softmax(t / temperature), log_softmax(s / temperature)
    return (p * (log_softmax(t / temperature) - log_q)).sum()


def entropy_rows(t):
    p = softmax(t / T)
    return -(p * np.log(p)).sum()


def by_row(function):
    """A reference on the kept classes of one example: student, teacher, their numbers, example."""

    def reference(student, teacher, keep):
        rows = zip(student, teacher, keep, strict=True)
        made = [
            function(s[k], t[k], np.flatnonzero(k), i) if k.any() else 0.0
            for i, (s, t, k) in enumerate(rows)
        ]
        return np.array(made)

    return reference


def label_part(s, kept, i):
    return -log_softmax(s)[kept == IDS[i]].sum()


def decoupled_row(s, t, kept, i):
    own, rest = kept == IDS[i], kept != IDS[i]
    first = 0.0
    if own.any():
        b, a = (np.array([softmax(x / T)[own].sum(), softmax(x / T)[rest].sum()]) for x in (t, s))
        first = (b * np.log(b / a)).sum()
    second = kl_rows(s[rest], t[rest]) if rest.any() else 0.0
    return T**2 * (WEIGHT * first + 8.0 * second)


def standard(x):
    return np.zeros_like(x) if np.ptp(x) == 0 else (x - x.mean()) / x.std() / T


def binary_row(s, t, kept, i):
    return sum(kl_rows(np.array([a, 0.0]), np.array([b, 0.0])) for a, b in zip(s, t, strict=True))


def multi_label_row(s, t, kept, i):
    signs = np.where(YES[i][kept], -1, 1)
    return (1 - WEIGHT) * np.log1p(np.exp(signs * s)).sum() + WEIGHT * T**2 * binary_row(
        s, t, kept, i
    )


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a**2).sum() * (b**2).sum())
    return (a * b).sum() / size if size > 0 else 0.0


def dist_reference(student, teacher, keep):
    """Each example's own part, plus the second part of the batch for all: only the mean is defined.

    Compared with ``dist_loss`` in the sum over the batch.
    """
    p, q = np.zeros(student.shape), np.zeros(student.shape)
    for i, k in enumerate(keep):
        if k.any():
            q[i, k], p[i, k] = softmax(student[i, k] / T), softmax(teacher[i, k] / T)
    rows, columns = np.flatnonzero(keep.any(1)), np.flatnonzero(keep.any(0))
    inter = [1 - correlation(q[i, keep[i]], p[i, keep[i]]) for i in rows]
    intra = [1 - correlation(q[keep[:, j], j], p[keep[:, j], j]) for j in columns]
    loss = np.zeros(len(student))
    loss[rows] = np.array(inter) + WEIGHT * np.mean(intra)
    return loss


def ensemble(mean, s, t, where, temperature, weight):
    members = jnp.stack([t, t[:, ::-1] * 0.5])
    kwargs = {"temperature": temperature} if mean is ensemble_logits else {}
    made = mean(members, MEMBERS, where=None if where is None else where[None], **kwargs)
    return kl_divergence(s, made, temperature, where=where)


def ensemble_reference(geometric):
    def reference(student, teacher, keep):
        mirrored = teacher[:, ::-1] * 0.5

        def row(s, t, kept, i):
            both = [t, mirrored[i][kept]]
            if geometric:
                made = (both[0] + 3 * both[1]) / 4
            else:
                made = T * np.log((softmax(both[0] / T) + 3 * softmax(both[1] / T)) / 4)
            return kl_rows(s, made)

        return by_row(row)(student, teacher, keep)

    return reference


CASES = {
    "entropy": Case(
        lambda s, t, where, T, w: entropy(s, T, where=where) + entropy(t, T, where=where),
        by_row(lambda s, t, kept, i: entropy_rows(s) + entropy_rows(t)),
    ),
    "soft": Case(
        lambda s, t, where, T, w: soft_cross_entropy(s, t, T, where=where),
        by_row(lambda s, t, kept, i: -(softmax(t / T) * log_softmax(s / T)).sum()),
    ),
    "additive": Case(
        lambda s, t, where, T, w: additive_hinton_loss(s, t, IDS, T, w, where=where),
        by_row(
            lambda s, t, kept, i: (
                label_part(s, kept, i) - WEIGHT * T**2 * (softmax(t / T) * log_softmax(s / T)).sum()
            )
        ),
    ),
    "mse": Case(
        lambda s, t, where, T, w: w * logit_mse(s, t, where=where),
        by_row(lambda s, t, kept, i: WEIGHT * ((s - t) ** 2).mean()),
    ),
    "centered": Case(
        lambda s, t, where, T, w: w * logit_mse(s, t, centered=True, where=where),
        by_row(lambda s, t, kept, i: WEIGHT * np.var(s - t)),
    ),
    "decoupled": Case(
        lambda s, t, where, T, w: decoupled_loss(s, t, IDS, T, target_weight=w, where=where),
        by_row(decoupled_row),
    ),
    "dist": Case(
        lambda s, t, where, T, w: dist_loss(s, t, T, intra_weight=w, where=where),
        dist_reference,
    ),
    "standardized": Case(
        lambda s, t, where, T, w: kl_divergence(
            *(standardize_logits(x, T, where=where) for x in (s, t)), T, where=where
        ),
        by_row(lambda s, t, kept, i: kl_rows(standard(s), standard(t))),
    ),
    "binary": Case(
        lambda s, t, where, T, w: binary_kl_divergence(s, t, T, where=where), by_row(binary_row)
    ),
    "multi_label": Case(
        lambda s, t, where, T, w: multi_label_loss(s, t, YES, T, w, where=where),
        by_row(multi_label_row),
    ),
    "ensemble": Case(functools.partial(ensemble, ensemble_logits), ensemble_reference(False)),
    "mean": Case(functools.partial(ensemble, mean_logits), ensemble_reference(True)),
}
# Zero for a student that says what its teacher says, with gradient zero.
DISTANCES = ["mse", "centered", "decoupled", "standardized", "binary"]
each = pytest.mark.parametrize("name", CASES)


@functools.cache
def compiled(name):
    """``(student, teacher, where, T, weight) -> losses, gradients of their sum`` in the floats."""

    def total(student, teacher, *args):
        losses = CASES[name].loss(student, teacher, *args)
        return losses.sum(), losses

    def both(*args):
        (_, losses), gradients = jax.value_and_grad(total, (0, 1, 3, 4), has_aux=True)(*args)
        return losses, gradients

    return jax.jit(both)


def run(name, student, teacher, where=None):
    keep = np.ones(student.shape, bool) if where is None else where
    losses, gradients = compiled(name)(student, teacher, keep, T, WEIGHT)
    assert np.isfinite(gradients[2:]).all() or not np.abs(losses).max() < 1e37
    return np.asarray(losses), [np.asarray(g) for g in gradients[:2]]


def logits(spread=3.0, seed=0, dtype=np.float32):
    made = np.random.default_rng(seed).normal(size=(2, BATCH, CLASSES)) * spread
    return made.astype(np.float32).astype(dtype)


def mask():
    """Classes of some examples, a class of all, and a whole example, do not count."""
    where = np.ones((BATCH, CLASSES), bool)
    where[0, 3:5] = where[2, 5] = where[5] = where[:, 1] = False
    return where


def check(name, actual, expected, **kwargs):
    if name == "dist":  # What is defined is the mean.
        actual, expected = actual.sum(), expected.sum()
    np.testing.assert_allclose(actual, expected, **kwargs)


@each
def test_values_and_gradients_are_those_of_a_float64_form(name):
    reference = CASES[name].reference
    for where in (np.ones((BATCH, CLASSES), bool), mask()):
        student, teacher = logits(dtype=np.float64)
        with jax.enable_x64(True):
            losses, gradients = run(name, student, teacher, where)
        assert losses.dtype == np.float64
        check(name, losses, reference(student, teacher, where), rtol=1e-11, atol=1e-14)
        assert not losses[~where.any(1)].any()
        for which in range(2):
            direction = np.random.default_rng(which).normal(size=student.shape)
            pair = [student, teacher]
            ends = []
            for step in (1e-5, -1e-5):
                moved = list(pair)
                moved[which] = pair[which] + step * direction
                ends.append(reference(*moved, where).sum())
            slope = (ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose(
                np.vdot(gradients[which], direction), slope, rtol=1e-6, atol=1e-8
            )
            assert not gradients[which][~where].any() or name in ("ensemble", "mean")
        low, low_gradients = run(name, *logits(), where)
        assert low.dtype == np.float32
        np.testing.assert_allclose(low, losses, rtol=2e-5, atol=1e-6)
        for a, b in zip(low_gradients, gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@each
def test_temperature_and_weight_may_be_learned(name):
    with jax.enable_x64(True):
        fixed = (*logits(dtype=np.float64), mask())
        gradients = compiled(name)(*fixed, T, WEIGHT)[1][2:]
        ends = [
            float(compiled(name)(*fixed, T + a * step, WEIGHT + b * step)[0].sum())
            for a, b in ((1, 0), (0, 1))
            for step in (1e-5, -1e-5)
        ]
    slopes = (np.subtract(ends[::2], ends[1::2])) / 2e-5
    np.testing.assert_allclose(gradients, slopes, rtol=1e-6, atol=1e-8)


@each
@pytest.mark.parametrize("behind", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_behind_a_mask_is_never_seen(name, behind):
    student, teacher = logits()
    where = mask()
    if name in ("ensemble", "mean"):  # their second teacher is the first one mirrored
        where &= where[:, ::-1]
    clean = run(name, student, teacher, where)
    dirty = [np.where(where, x, np.float32(behind)) for x in (student, teacher)]
    actual = run(name, *dirty, where)
    np.testing.assert_array_equal(actual[0], clean[0])
    for a, b in zip(actual[1], clean[1], strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()


HOSTILE = {
    "zeros": np.zeros((BATCH, CLASSES)),
    "one value": np.full((BATCH, CLASSES), -7.3),
    "one example": np.tile(logits()[0][:1], (BATCH, 1)),
    "one class": np.tile(logits()[0][:, :1], (1, CLASSES)),
    "huge": logits(1e4)[0],
    "tiny": logits(1e-30)[0],
    "sure": 80.0 * np.eye(CLASSES)[np.arange(BATCH) % CLASSES],
    "ordinary": logits(seed=3)[0],
}


@each
def test_gradients_are_finite_for_hostile_input(name):
    for student in HOSTILE.values():
        for teacher in HOSTILE.values():
            pair = [x.astype(np.float32) for x in (student, teacher)]
            losses, gradients = run(name, *pair)
            assert np.isfinite(losses).all()
            assert np.isfinite(gradients).all()
    for where in (np.zeros((BATCH, CLASSES), bool), np.arange(BATCH)[:, None] == [1] * CLASSES):
        losses, gradients = run(name, *logits(), where)
        assert not losses[~where.any(1)].any()
        assert np.isfinite(losses).all()
        assert np.isfinite(gradients).all()


@each
def test_magnitudes_that_float32_holds(name):
    far = [(1e30 * x).astype(np.float32) for x in logits(1.0)]
    low = np.full((BATCH, CLASSES), np.finfo(np.float32).min)
    low[:, :2] = 1.0
    for pair in (far, [low, low]):
        losses, gradients = run(name, *pair)
        if name in ("mse", "centered") and pair is far:
            continue  # The square of 1e30 is none of float32's.
        assert not np.isnan(losses).any()
        assert np.isfinite(gradients).all()


@pytest.mark.parametrize("name", DISTANCES)
def test_zero_with_gradient_zero_for_equal_logits(name):
    for logit in HOSTILE.values():
        student = logit.astype(np.float32)
        losses, gradients = run(name, student, student)
        np.testing.assert_array_equal(losses, 0)
        np.testing.assert_array_equal(gradients, 0)


@each
def test_an_overflow_shows_in_its_example(name):
    for bad in (np.nan, np.inf):
        for which in range(2):
            pair = logits()
            pair[which][2, 3] = bad
            losses = run(name, *pair)[0]
            assert np.isnan(losses[2])
            assert name == "dist" or np.isfinite(np.delete(losses, 2)).all()


@each
def test_an_absent_class_is_minus_infinity_in_both_arrays(name):
    pair = logits()
    pair[:, :, 1] = -np.inf
    if name in ("ensemble", "mean"):
        pair[:, :, -2] = -np.inf
    losses, gradients = run(name, *pair)
    assert not np.isnan(losses).any()
    assert np.isfinite(gradients).all()
    assert not np.asarray(gradients)[..., 1].any()
    if name not in ("dist", "additive", "decoupled", "multi_label"):
        expected = CASES[name].reference(*logits().astype(np.float64), pair[0] != -np.inf)
        check(name, losses, expected, rtol=2e-5, atol=1e-6)


@each
def test_sharded_as_on_one_device(name):
    kinds = (AxisType.Explicit, AxisType.Explicit)
    mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=kinds)
    expected = run(name, *logits(), mask())
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec("batch", "model"))
        arrays = [jax.device_put(x, place) for x in (*logits(), mask())]
        losses, gradients = compiled(name)(*arrays, T, WEIGHT)
        gradients = gradients[:2]
        np.testing.assert_allclose(losses, expected[0], rtol=1e-5, atol=1e-6)
        assert gradients[0].sharding.is_equivalent_to(place, 2)
        for a, b in zip(gradients, expected[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@each
def test_schedules_vmap_and_bfloat16(name):
    """In one program: scheduled temperature and weight, over two batches, computed in float32."""
    temperature = optax.linear_schedule(8.0, T, 10)
    weight = optax.cosine_decay_schedule(1.0, 10, alpha=WEIGHT)
    traced = []

    def at(student, teacher, where, step):
        traced.append(None)
        return CASES[name].loss(student, teacher, where, temperature(step), weight(step))

    mapped = jax.jit(jax.vmap(at, (0, 0, None, 0)))
    batches = [jnp.asarray(x, jnp.bfloat16) for x in np.stack([logits(), logits(seed=1)], 1)]
    exact, where = [np.asarray(x, np.float32) for x in batches], mask()
    for steps in (np.array([0, 10]), np.array([10, 0])):
        losses = mapped(*batches, where, steps)
        assert losses.dtype == jnp.float32
        for i, step in enumerate(steps):
            scalars = (8.0, 1.0) if step == 0 else (T, WEIGHT)
            expected = compiled(name)(exact[0][i], exact[1][i], where, *scalars)[0]
            np.testing.assert_allclose(losses[i], expected, rtol=1e-5, atol=1e-6)
    assert len(traced) == 1
    shapes = jax.eval_shape(compiled(name), *(x[0] for x in batches), where, T, WEIGHT)
    assert [x.dtype for x in shapes[1][:2]] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("mse", "centered")])
def test_a_temperature_that_is_not_positive_shows(name):
    for bad in (0.0, -1.0, np.nan):
        losses = compiled(name)(*logits(), mask(), bad, WEIGHT)[0]
        assert np.isnan(np.asarray(losses)[mask().any(1)]).all()
