"""What every loss between transformer layers promises, and each one's definition in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp.distill import (
    attention_map_loss,
    hidden_state_loss,
    relation_loss,
    self_attention_relation,
)

BATCH, LENGTH, WIDTH, HEADS = 8, 3, 4, 2
NAN, INF = np.nan, np.inf
TOKENS = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 5 > 0
TOKENS[2] = False  # an example of padding only


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def squared(student, teacher):
    return ((student - teacher) ** 2).mean(-1)


def cosine(student, teacher):
    norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return 1 - (student * teacher).sum(-1) / norms


def divergence(student, teacher):
    return kl(teacher / teacher.sum(-1, keepdims=True), student / student.sum(-1, keepdims=True))


def relation(x, heads):
    """(length, width) -> (heads, length, length), head by head."""
    split = np.split(x, heads, axis=-1)
    return np.stack([softmax(h @ h.T / np.sqrt(h.shape[-1])) for h in split])


def relations(student, teacher):
    each = zip(student, teacher, strict=True)
    return np.stack([kl(relation(t, HEADS), relation(s, HEADS)).mean(0) for s, t in each])


class Case(NamedTuple):
    """One loss: of two arrays and ``where=``, its form in NumPy, and inputs for it."""

    loss: object
    reference: object
    shape: tuple
    probabilities: bool = False
    teacher_width: int | None = None

    def inputs(self, seed=0, dtype=np.float32):
        rng = np.random.default_rng(seed)
        student, teacher = rng.normal(size=(2, *self.shape))
        if self.probabilities:
            student, teacher = softmax(student), softmax(teacher)
        if self.teacher_width:
            teacher = rng.normal(size=(*self.shape[:-1], self.teacher_width))
        return student.astype(dtype), teacher.astype(dtype)

    def without(self, x, example):
        """The inputs of an example from which what ``TOKENS`` leaves out is cut."""
        kept = x[example : example + 1]
        for axis in range(1, kept.ndim):
            if kept.shape[axis] == LENGTH:
                kept = kept.compress(TOKENS[example], axis)
        return kept

    def left_out(self, shape):
        """Where an input is behind ``TOKENS``: its axes of that length are tokens."""
        out = np.zeros(shape, bool)
        for axis in range(1, len(shape)):
            if shape[axis] == LENGTH:
                one = [BATCH] + [1] * (len(shape) - 1)
                one[axis] = LENGTH
                out |= ~TOKENS.reshape(one)
        return out


STATES, MAPS = (BATCH, LENGTH, WIDTH), (BATCH, HEADS, LENGTH, LENGTH)
CASES = {
    "squared states": Case(hidden_state_loss, squared, STATES),
    "cosine states": Case(functools.partial(hidden_state_loss, kind="cosine"), cosine, STATES),
    "squared maps": Case(attention_map_loss, squared, MAPS),
    "divergence of maps": Case(
        functools.partial(attention_map_loss, kind="divergence"), divergence, MAPS, True
    ),
    "relations": Case(
        functools.partial(relation_loss, heads=HEADS), relations, STATES, teacher_width=6
    ),
}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


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


def run(loss, student, teacher, where=None):
    where = np.ones((BATCH, LENGTH), bool) if where is None else where
    losses, gradients = jax.device_get(compiled(loss)(student, teacher, where))
    return losses, gradients


@every_loss
def test_value_is_the_definition_and_derivatives_are_its_slopes(case):
    rng, step = np.random.default_rng(1), 1e-6
    with jax.enable_x64(True):
        student, teacher = case.inputs(dtype=np.float64)
        expected = case.reference(student, teacher)
        losses, gradients = run(case.loss, student, teacher)
        np.testing.assert_allclose(losses, expected, rtol=1e-12)
        directions = [rng.normal(size=x.shape) for x in (student, teacher)]
        for i in range(2):
            up, down = [student, teacher], [student, teacher]
            up[i], down[i] = up[i] + step * directions[i], down[i] - step * directions[i]
            slope = (case.reference(*up).sum() - case.reference(*down).sum()) / (2 * step)
            np.testing.assert_allclose((gradients[i] * directions[i]).sum(), slope, rtol=1e-7)
        slopes = jax.grad(lambda s, t: case.loss(s, t).sum(), (0, 1))
        curve = jax.jit(functools.partial(jax.jvp, slopes))((student, teacher), tuple(directions))
        up = run(case.loss, student + step * directions[0], teacher + step * directions[1])[1]
        down = run(case.loss, student - step * directions[0], teacher - step * directions[1])[1]
        for actual, a, b in zip(curve[1], up, down, strict=True):
            np.testing.assert_allclose(actual, (a - b) / (2 * step), rtol=1e-5, atol=1e-7)
    losses, gradients = run(case.loss, *case.inputs())
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected, rtol=2e-5, atol=1e-6)


@every_loss
@pytest.mark.parametrize("behind", [NAN, INF, 1e38])
def test_padding_is_as_if_absent_whatever_it_holds(case, behind):
    student, teacher = case.inputs()
    clean = run(case.loss, student, teacher, TOKENS)
    dirty = [
        np.where(case.left_out(x.shape), np.float32(behind), x).astype(np.float32)
        for x in (student, teacher)
    ]
    losses, gradients = run(case.loss, *dirty, TOKENS)
    np.testing.assert_array_equal(losses, clean[0])
    for actual, expected in zip(gradients, clean[1], strict=True):
        np.testing.assert_array_equal(actual, expected)
        assert not actual[case.left_out(actual.shape)].any()
    out = np.broadcast_to(
        (~TOKENS).reshape((BATCH, *[1] * (losses.ndim - 2), LENGTH)), losses.shape
    )
    assert not losses[out].any()
    for example in (0, 1):
        cut = [case.without(np.asarray(x, np.float64), example) for x in (student, teacher)]
        expected = case.reference(*cut)[0]
        actual = losses[example][~out[example]].reshape(expected.shape)
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)


@every_loss
def test_half_precision_is_computed_in_float32(case):
    student, teacher = (x.astype(jnp.bfloat16) for x in case.inputs())
    losses, gradients = run(case.loss, student, teacher)
    assert losses.dtype == np.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    expected, exact = run(case.loss, student.astype(np.float32), teacher.astype(np.float32))
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-7)
    for actual, wanted in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(actual.astype(np.float32), wanted, rtol=0.01, atol=1e-6)


@every_loss
def test_hostile_but_finite_features_have_finite_gradients(case):
    student, teacher = case.inputs()
    zero_student, zero_teacher = np.zeros_like(student), np.zeros_like(teacher)
    pairs = [(zero_student, zero_teacher), (zero_student, teacher), (student, zero_teacher)]
    pairs += [(zero_student + 1, zero_teacher + 1), (student * 1e-30, teacher * 1e-30)]
    pairs += [(student * 1e-30, teacher * 1e18), (student * 1e18, teacher * 1e-30)]
    for pair in pairs:
        losses, gradients = run(case.loss, *(x.astype(np.float32) for x in pair))
        assert np.isfinite(losses).all()
        assert all(np.isfinite(g).all() for g in gradients)
    losses, gradients = run(case.loss, student, teacher, np.zeros_like(TOKENS))
    assert not losses.any()
    assert not any(g.any() for g in gradients)


@every_loss
def test_equal_layers_have_no_loss_and_no_slope(case):
    student = case.inputs()[0]
    losses, gradients = run(case.loss, student, student)
    np.testing.assert_allclose(losses, 0, atol=1e-12)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


@every_loss
def test_what_is_not_a_number_shows_in_its_example_and_in_no_other(case):
    for i in range(2):
        pair = list(case.inputs())
        pair[i][1] = NAN
        losses = run(case.loss, *pair)[0]
        np.testing.assert_array_equal(
            np.isnan(losses.reshape(BATCH, -1)).all(-1), np.arange(BATCH) == 1
        )
        assert np.isnan(losses).sum() == losses[1].size


@every_loss
def test_sharded_over_the_batch_and_mapped_over_it(case):
    student, teacher = case.inputs()
    expected = run(case.loss, student, teacher, TOKENS)
    mesh = jax.make_mesh((8,), ("batch",))
    place = NamedSharding(mesh, PartitionSpec("batch"))
    sharded = [jax.device_put(x, place) for x in (student, teacher, TOKENS)]
    losses, gradients = compiled(case.loss)(*sharded)
    assert losses.sharding.is_equivalent_to(place, losses.ndim)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-6)
    for actual, wanted in zip(gradients, expected[1], strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-7)

    def one(student, teacher, where):
        return case.loss(student[None], teacher[None], where=where[None])[0]

    mapped = jax.jit(jax.vmap(one))(student, teacher, TOKENS)
    np.testing.assert_allclose(mapped, expected[0], rtol=1e-6, atol=1e-7)


class TestHiddenStates:
    def test_other_axes_and_the_embedding_layer(self):
        student, teacher = CASES["squared states"].inputs()
        for kind in ("squared", "cosine"):
            expected = run(CASES[f"{kind} states"].loss, student, teacher)[0]
            moved = [np.moveaxis(x, -1, 1) for x in (student, teacher)]
            actual = jax.jit(functools.partial(hidden_state_loss, kind=kind, axis=1))(*moved)
            np.testing.assert_allclose(actual, expected, rtol=1e-6)
        ids = np.random.default_rng(0).integers(0, 11, (BATCH, LENGTH))
        embedded = [
            x[ids].astype(np.float32) for x in np.random.default_rng(1).normal(size=(2, 11, WIDTH))
        ]
        losses = run(hidden_state_loss, *embedded)[0]
        np.testing.assert_allclose(losses, squared(*embedded), rtol=1e-6)  # TinyBERT, eq. 9

    @given(st.integers(0, 2**31), st.floats(-12, 12), st.floats(-12, 12))
    def test_cosine_knows_directions_only(self, seed, a, b):
        student, teacher = CASES["cosine states"].inputs(seed)
        loss = CASES["cosine states"].loss
        expected = run(loss, student, teacher)[0]
        scaled = run(loss, student * np.float32(10**a), teacher * np.float32(10**b))[0]
        np.testing.assert_allclose(scaled, expected, rtol=1e-5, atol=1e-7)
        turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)))[0]
        turned = run(loss, *((x @ turn).astype(np.float32) for x in (student, teacher)))[0]
        np.testing.assert_allclose(turned, expected, rtol=1e-4, atol=1e-6)

    def test_cosine_of_no_direction_and_of_opposite_ones(self):
        student, _ = CASES["cosine states"].inputs()
        teacher = -student
        student[1:], teacher[2:] = 0, 0
        losses, gradients = run(CASES["cosine states"].loss, student, teacher)
        np.testing.assert_allclose(losses[0], 2, rtol=1e-6)
        np.testing.assert_array_equal(losses[1:], 1)
        assert not any(g[1:].any() for g in gradients)


class TestAttentionMaps:
    def test_masks_of_keys_as_attention_takes_them(self):
        student, teacher = CASES["divergence of maps"].inputs()
        causal = np.tril(np.ones((1, 1, LENGTH, LENGTH), bool))
        student, teacher = (np.where(causal, x, 0) for x in (student, teacher))
        loss = CASES["divergence of maps"].loss
        losses = run(loss, student, teacher, causal)[0]
        kept = (x[..., :2] / x[..., :2].sum(-1, keepdims=True) for x in (student, teacher))
        expected = divergence(*(x[..., 1, :].astype(np.float64) for x in kept))
        np.testing.assert_allclose(losses[..., 1], expected, rtol=1e-5, atol=1e-7)
        assert not losses[..., 0].any()  # one key: probability 1 in both
        scores = np.log(np.maximum(student, 1e-30)), np.log(np.maximum(teacher, 1e-30))
        squares = run(attention_map_loss, *scores, causal)[0]
        gap = ((scores[0] - scores[1]) ** 2).astype(np.float64)
        np.testing.assert_allclose(squares[..., 1], gap[..., 1, :2].mean(-1), rtol=1e-5)

    def test_probabilities_that_vanished_leave_a_finite_loss(self):
        teacher = np.array([0.5, 0.5, 0.0], np.float32) * np.ones(MAPS, np.float32)
        student = np.array([1.0, 0.0, 0.0], np.float32) * np.ones(MAPS, np.float32)
        losses, gradients = run(CASES["divergence of maps"].loss, student, teacher)
        np.testing.assert_allclose(losses, 0.5 * np.log(0.25 / 1.1755e-38), rtol=1e-4)
        assert all(np.isfinite(g).all() for g in gradients)

    @pytest.mark.slow
    def test_torch(self):
        torch = pytest.importorskip("torch")
        functional = torch.nn.functional
        student, teacher = CASES["divergence of maps"].inputs()
        s, t = (
            torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (student, teacher)
        )
        for kind, theirs in (
            ("squared", functional.mse_loss(s, t, reduction="none").mean(-1)),
            ("divergence", functional.kl_div(s.log(), t, reduction="none").sum(-1)),
        ):
            s.grad = None
            theirs.sum().backward()
            loss = functools.partial(attention_map_loss, kind=kind)
            losses, gradients = run(loss, student, teacher)
            np.testing.assert_allclose(losses, theirs.detach().numpy(), rtol=1e-4, atol=1e-7)
            wanted = s.grad.numpy()
            if kind == "divergence":  # ours is of what is scaled to the sum 1
                wanted = wanted - (wanted * student).sum(-1, keepdims=True)
            np.testing.assert_allclose(gradients[0], wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_cosine_embedding_loss_of_torch(self):
        torch = pytest.importorskip("torch")
        student, teacher = CASES["cosine states"].inputs()
        s, t = (torch.tensor(x.reshape(-1, WIDTH), requires_grad=True) for x in (student, teacher))
        theirs = torch.nn.CosineEmbeddingLoss(reduction="none")(s, t, torch.ones(len(s)))
        theirs.sum().backward()
        losses, gradients = run(CASES["cosine states"].loss, student, teacher)
        np.testing.assert_allclose(losses.ravel(), theirs.detach().numpy(), rtol=1e-5, atol=1e-6)
        for actual, wanted in zip(gradients, (s, t), strict=True):
            wanted = wanted.grad.numpy().reshape(actual.shape)
            np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-6)


class TestRelations:
    def test_the_relation_is_the_definition_and_leaves_padding_out(self):
        values = CASES["relations"].inputs()[1]
        logs = np.asarray(jax.jit(self_attention_relation, static_argnums=1)(values, 3, TOKENS))
        for example in (0, 1):
            kept = TOKENS[example]
            expected = relation(values[example][kept].astype(np.float64), 3)
            actual = np.exp(logs[example])
            np.testing.assert_allclose(actual[:, kept][:, :, kept], expected, rtol=1e-5)
            assert not actual[:, kept][:, :, ~kept].any()
            assert (logs[example][:, ~kept] == 0).all()
        assert (logs[2] == 0).all()

    def test_relations_are_of_directions_between_tokens_not_of_axes(self):
        """One head: turning all vectors of a model alike changes nothing."""
        student, teacher = CASES["squared states"].inputs()
        turn = np.linalg.qr(np.random.default_rng(3).normal(size=(WIDTH, WIDTH)))[0]
        loss = jax.jit(functools.partial(relation_loss, heads=1))
        expected = loss(student, teacher)
        turned = loss((student @ turn).astype(np.float32), teacher)
        np.testing.assert_allclose(turned, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "match", "loss", "student", "teacher", "kwargs"),
    [
        (ValueError, "kind 'l2'", hidden_state_loss, (2, 3), (2, 3), {"kind": "l2"}),
        (ValueError, "one shape: project", hidden_state_loss, (2, 3), (2, 4), {}),
        (ValueError, "nothing on axis 2", hidden_state_loss, (2, 3), (2, 3), {"axis": 2}),
        (ValueError, "where .* must have", hidden_state_loss, (2, 3), (2, 3), {"where": (3,)}),
        (ValueError, "kind 'kl'", attention_map_loss, MAPS, MAPS, {"kind": "kl"}),
        (ValueError, "relation_loss", attention_map_loss, MAPS, (BATCH, 4, 3, 3), {}),
        (ValueError, "heads, query, key", attention_map_loss, (2, 3, 3), (2, 3, 3), {}),
        (ValueError, "differ: pass", attention_map_loss, (2, 1, 3, 4), None, {"where": (2, 4)}),
        (ValueError, "where .* must have", attention_map_loss, MAPS, MAPS, {"where": (BATCH, 2)}),
        (ValueError, "length, width", relation_loss, (2, 3), (2, 3), {"heads": 1}),
        (ValueError, "same tokens", relation_loss, (2, 3, 4), (2, 4, 4), {"heads": 1}),
        (ValueError, "same examples", relation_loss, (2, 3, 4), (3, 3, 4), {"heads": 1}),
        (ValueError, "width 4 of student", relation_loss, (2, 3, 4), (2, 3, 6), {"heads": 3}),
        (ValueError, "width 6 of teacher", relation_loss, (2, 3, 4), (2, 3, 6), {"heads": 4}),
        (ValueError, "heads is 0", relation_loss, (2, 3, 4), (2, 3, 6), {"heads": 0}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(error, match, loss, student, teacher, kwargs):
    if "where" in kwargs:
        kwargs = kwargs | {"where": np.ones(kwargs["where"], bool)}
    student, teacher = (np.ones(shape, np.float32) for shape in (student, teacher or student))
    with pytest.raises(error, match=match):
        loss(student, teacher, **kwargs)


@every_loss
def test_dtypes_that_do_not_fit_are_told(case):
    student, teacher = case.inputs()
    with pytest.raises(TypeError, match="student must be floating"):
        case.loss(student.astype(int), teacher)
    with pytest.raises(TypeError, match="where != 0"):
        case.loss(student, teacher, where=TOKENS.astype(np.float32))
