"""Losses with parts of their own that are trained: what all promise, and each one's definition."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp.distill.intermediate.contrastive import (
    contrastive_loss,
    in_batch_contrastive_loss,
    init_contrastive,
    init_memory,
)
from jaxcomp.distill.intermediate.factor import (
    factor_transfer_loss,
    init_paraphraser,
    init_translator,
    paraphrase,
    paraphrase_loss,
    translate,
)
from jaxcomp.distill.intermediate.review import init_review, review_loss
from jaxcomp.distill.intermediate.variational import init_variational, variational_loss

BATCH, COUNT = 8, 20
NAN = np.nan
KEPT = np.array([True, False, True, True, False, True, False, True])
ROWS = np.array([3, 17, 5, 0, 9, 11, 12, 19])
OTHERS = np.random.default_rng(7).integers(0, COUNT, (BATCH, 6))


def softplus(x):
    return np.logaddexp(0, x)


def convolved(layer, x):
    """Zero-padded, offset by offset; for maps and for sequences."""
    kernel = layer["kernel"]
    dims = kernel.ndim - 2
    pad = [(0, 0), *[(k // 2, k // 2) for k in kernel.shape[:dims]], (0, 0)]
    padded, out = np.pad(x, pad), layer["bias"]
    for offset in np.ndindex(*kernel.shape[:dims]):
        sizes = zip(offset, x.shape[1:-1], strict=True)
        window = padded[(slice(None), *[slice(o, o + n) for o, n in sizes])]
        out = out + window @ kernel[offset]
    return out


def leaky(layers, x):
    for layer in layers:
        x = convolved(layer, x)
        x = np.where(x > 0, x, 0.1 * x)
    return x


def unit(x):
    flat = x.reshape(len(x), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def embedded(head, x):
    return unit(x.reshape(len(x), -1) @ head["kernel"] + head["bias"])


def variational(params, student, teacher):
    mean = student @ params["projection"]["kernel"] + params["projection"]["bias"]
    variance = softplus(params["raw_variance"]) + 1e-5
    return (0.5 * ((teacher - mean) ** 2 / variance + np.log(variance))).mean(-1)


def rebuilding(params, student, teacher):
    return ((leaky(params["decoder"], leaky(params["encoder"], teacher)) - teacher) ** 2).mean(
        (1, 2)
    )


def transfer(params, student, teacher):
    student = unit(leaky(params["translator"], student))
    teacher = unit(leaky(params["paraphraser"]["encoder"], teacher))
    return np.abs(student - teacher).sum(1)


def in_batch(params, student, teacher):
    scores = embedded(params["student"], student) @ embedded(params["teacher"], teacher).T / 0.2
    own = np.diagonal(scores)
    found = np.log(np.exp(scores).sum(0)) + np.log(np.exp(scores).sum(1))
    return found / 2 - own


def contrast(params, student, teacher):
    total = 0
    sides = ((params["student"], student, 1), (params["teacher"], teacher, 0))
    for head, x, other in sides:
        bank = np.asarray(MEMORY[other], np.float64)
        chosen = bank[np.concatenate([ROWS[:, None], OTHERS], 1)[: len(x)]]
        z = np.exp(np.einsum("bf,bnf->bn", embedded(head, x), chosen) / 0.2)
        # The constant is not differentiated: that of the inputs which the table gives.
        z = z / CONSTANTS[other]
        noise = OTHERS.shape[1] / COUNT
        total = (
            total - np.log(z[:, 0] / (z[:, 0] + noise)) - np.log(noise / (z[:, 1:] + noise)).sum(1)
        )
    return total


def context(gap):
    size = gap.shape[1]
    total, weights, weight = (gap**2).mean((1, 2, 3)), 1, 1
    for k in (4, 2, 1):
        if k < size:
            weight /= 2
            step = size // k
            pooled = gap.reshape(len(gap), k, step, k, step, -1).mean((2, 4))
            total, weights = total + weight * (pooled**2).mean((1, 2, 3)), weights + weight
    return total / weights


def review(params, student, teacher):
    total, deeper = 0, None
    for level, s, t in list(zip(params, student, teacher, strict=True))[::-1]:
        here = convolved(level["narrow"], s)
        if deeper is not None:
            deeper = deeper.repeat(2, 1).repeat(2, 2)
            both = np.concatenate([here, deeper], -1)
            weights = 1 / (1 + np.exp(-convolved(level["attention"], both)))
            here = here * weights[..., :1] + deeper * weights[..., 1:]
        deeper = here
        total = total + context(convolved(level["widen"], here) - t)
    return total


class Case(NamedTuple):
    """One loss: of parameters, student, teacher and ``where=``; its form in NumPy; its inputs."""

    loss: object
    reference: object
    init: object  # (key, student, teacher) -> parameters
    student: object  # shapes without the batch
    teacher: object
    per_position: bool = False  # the mask may have positions
    relational: bool = False  # what is not a number shows in others

    def inputs(self, dtype=np.float32, seed=0):
        rng = np.random.default_rng(seed)
        make = functools.partial(
            jax.tree.map,
            lambda shape: rng.normal(size=(BATCH, *shape)).astype(dtype),
            is_leaf=lambda x: isinstance(x, tuple),
        )
        student, teacher = make(self.student), make(self.teacher)
        shapes = jax.eval_shape(self.init, jax.random.key(0), student, teacher)
        params = jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(dtype), shapes)
        return params, student, teacher


def transfer_of(params, student, teacher, where):
    return factor_transfer_loss(
        translate(params["translator"], student, where=where),
        paraphrase(params["paraphraser"], teacher, where=where),
        where=where,
    )


def init_transfer(key, student, teacher):
    paraphraser = init_paraphraser(key, teacher)
    factor = jax.eval_shape(paraphrase, paraphraser, teacher)
    return {"paraphraser": paraphraser, "translator": init_translator(key, student, factor)}


def contrast_of(params, student, teacher, where):
    dtype = params["student"]["bias"].dtype
    memory = jax.tree.map(lambda x: x.astype(dtype), MEMORY._replace(begun=np.float32(0)))
    memory = memory._replace(begun=MEMORY.begun)
    options = {"negatives": OTHERS, "temperature": 0.2, "where": where}
    return contrastive_loss(params, memory, student, teacher, ROWS, None, **options)[0]


MEMORY = jax.device_get(init_memory(jax.random.key(1), COUNT, 5))
init_heads = functools.partial(init_contrastive, features=5)
STUDENTS, TEACHERS = [(4, 4, 3), (2, 2, 2)], [(4, 4, 2), (2, 2, 3)]
CASES = {
    "variational": Case(variational_loss, variational, init_variational, (6, 3), (6, 4), True),
    "paraphrase": Case(
        lambda params, student, teacher, where: paraphrase_loss(params, teacher, where=where),
        rebuilding,
        lambda key, student, teacher: init_paraphraser(key, teacher),
        (6, 3),
        (6, 4),
        True,
    ),
    "factor transfer": Case(transfer_of, transfer, init_transfer, (6, 3), (6, 4), True),
    "in batch": Case(
        functools.partial(in_batch_contrastive_loss, temperature=0.2),
        in_batch,
        init_heads,
        (2, 3),
        (4,),
        relational=True,
    ),
    "contrastive": Case(contrast_of, contrast, init_heads, (2, 3), (4,), relational=True),
    "review": Case(
        review_loss, review, functools.partial(init_review, width=4), STUDENTS, TEACHERS
    ),
}
every_loss = pytest.mark.parametrize("name", CASES)


def first_means(params, student, teacher):
    """What the first batch fixes in the contrastive loss, times the number of examples."""
    means = []
    for head, x, other in ((params["student"], student, 1), (params["teacher"], teacher, 0)):
        bank = np.asarray(MEMORY[other], np.float64)
        chosen = bank[np.concatenate([ROWS[:, None], OTHERS], 1)]
        scores = np.einsum("bf,bnf->bn", embedded(head, x), chosen) / 0.2
        means.insert(0, COUNT * np.exp(scores).mean())
    return means


CONSTANTS = first_means(*CASES["contrastive"].inputs(np.float64))


@functools.cache
def compiled(loss):
    """Losses, and gradients of their sum in parameters, student and teacher."""

    def both(params, student, teacher, where):
        def total(*args):
            losses = loss(*args, where=where)
            return losses.sum(), losses

        gradients, losses = jax.grad(total, (0, 1, 2), has_aux=True)(params, student, teacher)
        return losses, gradients

    return jax.jit(both)


def run(name, *inputs, where=None):
    where = np.ones(BATCH, bool) if where is None else where
    if name == "variational" and where.ndim == 1:
        where = where[:, None]
    return jax.device_get(compiled(CASES[name].loss)(*inputs, where))


def close(actual, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), actual, expected)


def finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


@every_loss
def test_value_is_the_definition_and_gradients_its_slopes(name):
    case, rng, step = CASES[name], np.random.default_rng(1), 1e-6
    with jax.enable_x64(True):
        inputs = case.inputs(np.float64)
        expected = case.reference(*inputs)
        losses, gradients = run(name, *inputs)
        np.testing.assert_allclose(losses, expected, rtol=1e-12)
        for i, gradient in enumerate(gradients):
            direction = jax.tree.map(lambda x: rng.normal(size=x.shape), inputs[i])
            ends = []
            for sign in (step, -step):
                moved = jax.tree.map(lambda x, d, sign=sign: x + sign * d, inputs[i], direction)
                ends.append(case.reference(*inputs[:i], moved, *inputs[i + 1 :]).sum())
            slope = sum(
                np.vdot(g, d)
                for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
            )
            np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6)
    losses, _ = run(name, *case.inputs())
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected, rtol=2e-5, atol=1e-5)


@every_loss
def test_padding_is_as_if_absent_whatever_it_holds(name):
    case = CASES[name]
    params, student, teacher = case.inputs()
    clean = run(name, params, student, teacher, where=KEPT)

    def behind(x):
        return np.where(KEPT.reshape(BATCH, *[1] * (x.ndim - 1)), x, np.float32(NAN))

    dirty = run(name, params, *jax.tree.map(behind, (student, teacher)), where=KEPT)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    losses, (_, *gradients) = dirty
    assert not losses[~KEPT].any()
    assert not any(g[~KEPT].any() for g in jax.tree.leaves(gradients))
    if name != "contrastive":  # whose constant is of another batch then
        rows = jax.tree.map(lambda x: np.asarray(x[KEPT], np.float64), (student, teacher))
        np.testing.assert_allclose(
            losses[KEPT], case.reference(params, *rows), rtol=2e-5, atol=1e-5
        )
    nothing = run(name, params, student, teacher, where=np.zeros(BATCH, bool))
    assert not any(x.any() for x in jax.tree.leaves(nothing))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.per_position])
def test_padded_positions_are_as_if_absent(name):
    case = CASES[name]
    params, student, teacher = case.inputs()
    where = np.ones((BATCH, 1), bool) & (np.arange(6) < 4)
    dirty = [np.where(where[..., None], x, np.float32(NAN)) for x in (student, teacher)]
    losses, gradients = run(name, params, *dirty, where=where)
    short = [np.asarray(x[:, :4], np.float64) for x in (student, teacher)]
    expected = case.reference(params, *short)
    if losses.ndim == 2:
        assert not losses[:, 4:].any()
        losses = losses[:, :4]
    np.testing.assert_allclose(losses, expected, rtol=2e-5, atol=1e-5)
    assert finite(gradients)
    assert not any(g[:, 4:].any() for g in gradients[1:])


@every_loss
def test_half_precision_is_computed_in_float32(name):
    params, *features = CASES[name].inputs()
    features = jax.tree.map(lambda x: x.astype(jnp.bfloat16), features)
    losses, gradients = run(name, params, *features)
    assert losses.dtype == np.float32
    assert {g.dtype for g in jax.tree.leaves(gradients[1:])} == {np.dtype(jnp.bfloat16)}
    widened = jax.tree.map(lambda x: x.astype(np.float32), features)
    expected, exact = run(name, params, *widened)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close(gradients[0], exact[0], rtol=1e-4, atol=1e-5)


@every_loss
def test_hostile_but_finite_features_have_finite_gradients(name):
    params, student, teacher = CASES[name].inputs()
    zeros = jax.tree.map(np.zeros_like, params)
    for a, b in ((0, 0), (0, 1), (1, 0), (1e-30, 1e-30), (1e15, 1e-30), (1e-30, 1e15)):
        scaled = [
            jax.tree.map(lambda x, scale=scale: (scale * x).astype(np.float32), features)
            for features, scale in ((student, a), (teacher, b))
        ]
        for made in (params, zeros):
            losses, gradients = run(name, made, *scaled)
            assert np.isfinite(losses).all()
            assert finite(gradients)
    same = jax.tree.map(lambda x: np.repeat(x[:1], BATCH, 0), (student, teacher))
    assert finite(run(name, params, *same))


@every_loss
def test_what_is_not_a_number_shows_in_its_example(name):
    case = CASES[name]
    params, student, teacher = case.inputs()
    for sides in ((0,), (1,)):
        features = [student, teacher]
        for i in sides:
            features[i] = jax.tree.map(lambda x: x.copy(), features[i])
            for x in jax.tree.leaves(features[i]):
                x[2] = NAN
        losses = run(name, params, *features)[0].reshape(BATCH, -1)
        if name == "paraphrase" and sides == (0,):
            continue
        assert np.isnan(losses[2]).all()
        if not case.relational:
            assert np.isfinite(np.delete(losses, 2, 0)).all()


@every_loss
def test_sharded_over_the_batch(name):
    params, *features = CASES[name].inputs()
    expected = run(name, params, *features, where=KEPT)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("batch"))
    features, where = jax.device_put((features, KEPT), place)
    actual = run(name, params, *features, where=where)
    close(actual, expected, rtol=1e-4, atol=1e-5)


@every_loss
def test_parameters_are_made_from_shapes_alone(name):
    case = CASES[name]
    params, *features = case.inputs()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), features)
    made = jax.eval_shape(lambda key: case.init(key, *shapes), jax.random.key(0))
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)
    assert {x.dtype for x in jax.tree.leaves(made)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("variance 0 must", lambda s, t: init_variational(None, s, t, variance=0)),
        ("minimum 0", lambda s, t: variational_loss(variational_params(s, t), s, t, minimum=0)),
        ("all axes but 2", lambda s, t: variational_loss(variational_params(s, t), s[:, 1:], t)),
        ("channels on axis 2", lambda s, t: variational_loss(variational_params(t, t), s, t)),
        ("make params for these", lambda s, t: variational_loss(variational_params(s, s), s, t)),
        ("rate 0.1 of 4 channels", lambda s, t: init_paraphraser(None, t, rate=0.1)),
        ("positions..., channels", lambda s, t: init_paraphraser(None, t[0])),
        ("as the parameters were made", lambda s, t: paraphrase(paraphraser_params(s), t)),
        ("order 3 must be", lambda s, t: factor_transfer_loss(t, t, order=3)),
        ("translate or resize", lambda s, t: factor_transfer_loss(s, t)),
        ("2 levels of students and 1", lambda s, t: init_review(None, [s, s], [t], 2)),
        ("students.0. .* must be .batch, height", lambda s, t: init_review(None, [s], [t], 2)),
        ("resize the student's", lambda s, t: init_review(None, [s[None]], [t[None, :5]], 2)),
        ("width 0 must", lambda s, t: init_review(None, [s[None]], [t[None]], 0)),
        ("params of 0 levels", lambda s, t: review_loss([], [s[None]], [t[None]])),
    ],
)
def test_what_does_not_fit_is_told(match, call):
    student, teacher = np.ones((8, 6, 3), np.float32), np.ones((8, 6, 4), np.float32)
    with pytest.raises(ValueError, match=match):
        call(student, teacher)


def variational_params(student, teacher):
    kernel = np.ones((student.shape[-1], teacher.shape[-1]), np.float32)
    raw = np.ones(teacher.shape[-1], np.float32)
    return {"projection": {"kernel": kernel}, "raw_variance": raw}


def paraphraser_params(teacher):
    shapes = jax.eval_shape(lambda key: init_paraphraser(key, teacher), jax.random.key(0))
    return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
