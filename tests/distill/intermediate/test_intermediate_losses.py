"""What every loss between layers promises, and each one's definition in float64, in loops."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp.distill.intermediate.attention_transfer import attention_transfer_loss
from jaxcomp.distill.intermediate.correlation import correlation_congruence_loss
from jaxcomp.distill.intermediate.flow import flow_loss
from jaxcomp.distill.intermediate.gram import gram_loss
from jaxcomp.distill.intermediate.hint import hint_loss
from jaxcomp.distill.intermediate.neuron_selectivity import neuron_selectivity_loss
from jaxcomp.distill.intermediate.probabilistic import probabilistic_transfer_loss
from jaxcomp.distill.intermediate.relational import (
    relational_angle_loss,
    relational_distance_loss,
)
from jaxcomp.distill.intermediate.similarity import similarity_preserving_loss

BATCH, LENGTH, CHANNELS = 8, 3, 4
NAN, INF = np.nan, np.inf
POSITIONS = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 5 > 0
POSITIONS[2] = False  # an example of padding only
EXAMPLES = np.array([1, 1, 0, 1, 1, 0, 1, 1], bool)


def unit(x):
    return x / np.linalg.norm(x)


def of_each(reference):
    """The form of one example, for a batch."""
    return lambda *pair: np.array([reference(*each) for each in zip(*pair, strict=True)])


def attention(student, teacher):
    s, t = (unit((x**2).sum(-1)) for x in (student, teacher))
    return np.linalg.norm(s - t)


def attention_squared(student, teacher):
    s, t = (unit((np.abs(x) ** 3).sum(-1)) for x in (student, teacher))
    return ((s - t) ** 2).mean()


def flow(student, teacher):
    s, t = (x[:, :2].T @ x[:, 2:] / len(x) for x in (student, teacher))
    return ((s - t) ** 2).sum()


def gram(student, teacher):
    s, t = (x.T @ x for x in (student, teacher))
    return ((s - t) ** 2).sum() / (4 * s.shape[0] ** 2 * len(student) ** 2)


def discrepancy(kernel, student, teacher):
    s, t = ([unit(channel) for channel in x.T] for x in (student, teacher))

    def mean(a, b):
        return np.mean([kernel(x, y) for x in a for y in b])

    return mean(s, s) + mean(t, t) - 2 * mean(s, t)


def similarity(student, teacher):
    s, t = (np.array([unit(row) for row in x @ x.T]) for x in (student, teacher))
    return ((s - t) ** 2).mean(1)


def huber(x):
    return 0.5 * x**2 if abs(x) <= 1 else abs(x) - 0.5


def distances(student, teacher):
    others = list(itertools.permutations(range(len(student)), 2))

    def relative(x):
        found = {(i, j): np.linalg.norm(x[i] - x[j]) for i, j in others}
        return {pair: d / np.mean(list(found.values())) for pair, d in found.items()}

    s, t = relative(student), relative(teacher)
    losses = np.zeros(len(student))
    for i, j in others:
        losses[i] += huber(s[i, j] - t[i, j]) / (len(student) - 1)
    return losses


def angles(student, teacher):
    n = len(student)
    losses = np.zeros(n)
    for i, j, k in itertools.permutations(range(n), 3):
        s, t = (unit(x[i] - x[j]) @ unit(x[k] - x[j]) for x in (student, teacher))
        losses[j] += huber(s - t) / ((n - 1) * (n - 2))
    return losses


def neighbours(student, teacher, itself=False):
    def likely(x):
        x = np.array([unit(row) for row in x])
        near = (x @ x.T + 1) / 2
        near = near if itself else near - np.diag(np.diag(near))
        return near / near.sum(1, keepdims=True)

    q, p = likely(student), likely(teacher)
    some = p > 0
    return np.where(some, p * np.log(np.where(some, p, 1) / np.where(some, q, 1)), 0).sum(1)


def congruence(student, teacher, gamma=None, order=2):
    def kernel(x):
        x = np.array([unit(row) for row in x])
        if gamma is None:
            return x @ x.T
        terms = [(2 * gamma * (x @ x.T)) ** p / math.factorial(p) for p in range(order + 1)]
        return np.exp(-2 * gamma) * sum(terms)

    return ((kernel(student) - kernel(teacher)) ** 2).mean(1)


class Case(NamedTuple):
    """One loss, of two arrays and ``where=``; its form in NumPy; and inputs for it."""

    loss: Callable
    reference: Callable
    teacher_channels: int = CHANNELS
    relations: bool = False
    per_position: bool = False
    largest: float = 1e30  # magnitude of which float32 can hold the gradient

    def inputs(self, seed=0, dtype=np.float32):
        rng = np.random.default_rng(seed)
        student = rng.normal(size=(BATCH, LENGTH, CHANNELS))
        teacher = rng.normal(size=(BATCH, LENGTH, self.teacher_channels))
        return student.astype(dtype), teacher.astype(dtype)

    @property
    def mask(self):
        return EXAMPLES if self.relations else POSITIONS

    def expected(self, student, teacher, mask=None):
        """Losses in float64; with a mask, of what is left when the rest is cut."""
        student, teacher = (np.asarray(x, np.float64) for x in (student, teacher))
        if self.relations:
            losses = np.zeros(BATCH)
            kept = np.ones(BATCH, bool) if mask is None else mask
            s, t = (x[kept].reshape(kept.sum(), -1) for x in (student, teacher))
            losses[kept] = self.reference(s, t)
            return losses
        if mask is None:
            return self.reference(student, teacher)
        losses = np.zeros(mask.shape if self.per_position else BATCH)
        for i in np.flatnonzero(mask.any(1)):
            found = self.reference(*(x[i : i + 1, mask[i]] for x in (student, teacher)))[0]
            if self.per_position:
                losses[i, mask[i]] = found
            else:
                losses[i] = found
        return losses


def flow_of_halves(student, teacher, where):
    student, teacher = ((x[..., :2], x[..., 2:]) for x in (student, teacher))
    return flow_loss(student, teacher, where=where)


def gaussian(x, y):
    return np.exp(-((x - y) ** 2).sum() / (2 * 0.7))


partial = functools.partial
CASES = {
    "hint": Case(hint_loss, lambda s, t: ((s - t) ** 2).mean(-1), per_position=True),
    "attention": Case(attention_transfer_loss, of_each(attention), 6),
    "attention, squared": Case(
        partial(attention_transfer_loss, power=3.0, squared=True), of_each(attention_squared), 6
    ),
    "flow": Case(flow_of_halves, of_each(flow), largest=1e8),
    "gram": Case(gram_loss, of_each(gram), largest=1e8),
    "selectivity, linear": Case(
        partial(neuron_selectivity_loss, kernel="linear"), of_each(partial(discrepancy, np.dot)), 6
    ),
    "selectivity, polynomial": Case(
        neuron_selectivity_loss, of_each(partial(discrepancy, lambda x, y: (x @ y) ** 2)), 6
    ),
    "selectivity, gaussian": Case(
        partial(neuron_selectivity_loss, kernel="gaussian", bandwidth=0.7),
        of_each(partial(discrepancy, gaussian)),
        6,
    ),
    "similarity": Case(similarity_preserving_loss, similarity, 6, True),
    "distances": Case(relational_distance_loss, distances, 6, True),
    "angles": Case(relational_angle_loss, angles, 6, True),
    "neighbours": Case(probabilistic_transfer_loss, neighbours, 6, True),
    "congruence, gaussian": Case(
        partial(correlation_congruence_loss, order=3),
        partial(congruence, gamma=0.4, order=3),
        6,
        True,
    ),
    "congruence, linear": Case(
        partial(correlation_congruence_loss, kernel="linear"), congruence, 6, True
    ),
}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# One of each loss: its variants differ in arithmetic only.
VARIANTS = ("squared", "linear", "polynomial")
ONE_OF_EACH = {name: case for name, case in CASES.items() if not name.endswith(VARIANTS)}
each_loss = pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=ONE_OF_EACH)


@functools.cache
def compiled(loss):
    """Losses, and gradients of their sum in student and teacher."""

    def both(student, teacher, where):
        def total(student, teacher):
            losses = loss(student, teacher, where=where)
            return losses.sum(), losses

        gradients, losses = jax.grad(total, (0, 1), has_aux=True)(student, teacher)
        return losses, gradients

    return jax.jit(both)


def run(case, student, teacher, where=None):
    where = np.ones_like(case.mask) if where is None else where
    return jax.device_get(compiled(case.loss)(student, teacher, where))


@every_loss
def test_value_is_the_definition_and_the_gradient_its_slope(case):
    with jax.enable_x64(True):
        student, teacher = case.inputs(dtype=np.float64)
        expected = case.expected(student, teacher)
        losses, gradients = run(case, student, teacher)
        np.testing.assert_allclose(losses, expected, rtol=1e-11)
        rng, step = np.random.default_rng(1), 1e-6
        for i, gradient in enumerate(gradients):
            direction = rng.normal(size=gradient.shape)
            up, down = [student, teacher], [student, teacher]
            up[i], down[i] = up[i] + step * direction, down[i] - step * direction
            slope = (case.expected(*up).sum() - case.expected(*down).sum()) / (2 * step)
            np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)
    student, teacher = case.inputs()
    losses, found = run(case, student, teacher)
    assert losses.dtype == np.float32
    assert losses.shape == ((BATCH, LENGTH) if case.per_position else (BATCH,))
    np.testing.assert_allclose(losses, expected, rtol=2e-5, atol=1e-6)
    for actual, wanted in zip(found, gradients, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


@every_loss
@pytest.mark.parametrize("behind", [NAN, INF, 1e38])
def test_padding_is_as_if_absent_whatever_it_holds(case, behind):
    student, teacher = case.inputs()
    out = ~case.mask
    dirty = [x.copy() for x in (student, teacher)]
    for x in dirty:
        x[out] = behind
    clean = run(case, student, teacher, case.mask)
    losses, gradients = run(case, dirty[0], dirty[1], case.mask)
    np.testing.assert_array_equal(losses, clean[0])
    for actual, expected in zip(gradients, clean[1], strict=True):
        np.testing.assert_array_equal(actual, expected)
        assert not actual[out].any()
    absent = out if case.per_position or case.relations else out.all(1)
    assert not losses[absent].any()
    expected = case.expected(student, teacher, case.mask)
    np.testing.assert_allclose(losses, expected, rtol=2e-5, atol=1e-6)


def hostile(case):
    student, teacher = case.inputs()
    one = np.zeros_like(case.mask)
    one[0] = True
    yield student, teacher, one
    yield student, teacher, 0 * one == 1
    yield student[..., : teacher.shape[-1]], np.resize(student, teacher.shape), None
    yield np.broadcast_to(student[:1], student.shape), teacher, None
    yield np.broadcast_to(student[:1], student.shape), 0 * teacher + 3, None
    zero_example, zero_channel = student.copy(), student.copy()
    zero_example[1], zero_channel[..., 0] = 0, 0
    yield zero_example, teacher, None
    yield zero_channel, teacher, None
    opposite = student.copy()
    opposite[1] = -opposite[0]
    yield opposite, teacher, None
    for scale in (0, 1e-30, case.largest):
        yield np.float32(scale) * student, teacher, None
        yield student, np.float32(scale) * teacher, None
        yield np.float32(scale) * student, np.float32(scale) * teacher, None
    mixed = student * np.where(np.arange(BATCH) % 2, case.largest, 1e-30)[:, None, None]
    yield mixed.astype(np.float32), teacher, None
    mixed = student * np.where(np.arange(CHANNELS) % 2, case.largest, 1e-30)
    yield mixed.astype(np.float32), teacher, None


@every_loss
def test_hostile_but_finite_features_have_finite_gradients(case):
    for i, (student, teacher, where) in enumerate(hostile(case)):
        losses, gradients = run(case, student, teacher, where)
        assert np.isfinite(losses).all() or (case.loss is hint_loss and i >= 8), i
        assert (losses >= -1e-6).all(), i
        for gradient in gradients:
            assert np.isfinite(gradient).all(), i


@every_loss
@pytest.mark.parametrize("bad", [NAN, INF])
def test_overflow_shows_where_it_takes_part(case, bad):
    for which in range(2):
        inputs = [x.copy() for x in case.inputs()]
        inputs[which][1, 1, 0] = bad
        with np.errstate(invalid="ignore"):
            losses, _ = run(case, inputs[0], inputs[1], case.mask)
        touched = np.zeros_like(losses, bool)
        touched[1] = True
        if case.per_position:
            touched[1, [0, 2]] = False
        if case.relations:
            touched = case.mask
        assert not np.isfinite(losses[touched]).any()
        assert np.isfinite(losses[~touched]).all()


@pytest.mark.parametrize("name", ["hint", "attention", "gram", "distances", "neighbours"])
def test_half_precision_under_vmap_is_a_loop_in_float32(name):
    case = CASES[name]
    inputs = [[x.astype(jnp.bfloat16) for x in case.inputs(seed)] for seed in range(2)]
    stacked = [np.stack(arrays) for arrays in zip(*inputs, strict=True)]
    losses, gradients = jax.jit(jax.vmap(compiled(case.loss), (0, 0, None)))(*stacked, case.mask)
    assert losses.dtype == np.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    for i, pair in enumerate(inputs):
        student, teacher = (x.astype(np.float32) for x in pair)
        expected, exact = run(case, student, teacher, case.mask)
        np.testing.assert_allclose(losses[i], expected, rtol=1e-5, atol=1e-6)
        for gradient, wanted in zip(gradients, exact, strict=True):
            actual = np.asarray(gradient[i]).astype(np.float32)
            np.testing.assert_allclose(actual, wanted, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, AxisType.Explicit) for case in ONE_OF_EACH.values()]
    + [(CASES["distances"], AxisType.Auto)],
    ids=[*ONE_OF_EACH, "distances, automatic"],
)
def test_a_batch_on_eight_devices_is_one_batch(case, kind):
    mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(kind, kind))
    specs = [PartitionSpec("batch", None, "model")] * 2 + [PartitionSpec("batch")]
    student, teacher = case.inputs()
    expected = run(case, student, teacher, case.mask)
    with jax.set_mesh(mesh):
        inputs = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip((student, teacher, case.mask), specs, strict=True)
        ]
        found = compiled(case.loss)(*inputs)
    for actual, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-6)


@each_loss
def test_what_does_not_fit_is_refused(case):
    student, teacher = case.inputs()
    with pytest.raises(TypeError, match="floating"):
        case.loss(student.astype(int), teacher, where=None)
    with pytest.raises(TypeError, match="boolean"):
        case.loss(student, teacher, where=case.mask * 1.0)
    with pytest.raises(ValueError, match="where"):
        case.loss(student, teacher, where=case.mask[:3])
    with pytest.raises(ValueError, match="must"):
        case.loss(student, teacher[:3], where=None)
    with pytest.raises(ValueError, match=r"must|nothing"):
        case.loss(student[:, :, :0], teacher, where=None)
