"""The memory of contrastive distillation: what is kept, drawn, moved and told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp.distill.intermediate.contrastive import (
    contrastive_loss,
    in_batch_contrastive_loss,
    init_contrastive,
    init_memory,
)

BATCH, COUNT, FEATURES = 4, 12, 3
INDICES = np.array([7, 2, 11, 0])


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(BATCH, 5)), rng.normal(size=(BATCH, 2, 3))
    heads = {
        name: {
            "kernel": rng.normal(size=(size, FEATURES)).astype(np.float32),
            "bias": rng.normal(size=FEATURES).astype(np.float32),
        }
        for name, size in (("student", 5), ("teacher", 6))
    }
    return heads, student.astype(np.float32), teacher.astype(np.float32)


MEMORY = jax.device_get(init_memory(jax.random.key(0), COUNT, FEATURES))


@functools.partial(jax.jit, static_argnames="negatives")
def call(heads, memory, student, teacher, indices, seed, where, negatives=6, temperature=0.3):
    key = jax.random.key(seed)
    options = {"negatives": negatives, "temperature": temperature, "where": where}
    return contrastive_loss(heads, memory, student, teacher, indices, key, **options)


def step(memory=MEMORY, seed=0, where=(True,) * BATCH, indices=INDICES, of=None, **options):
    heads, student, teacher = inputs() if of is None else of
    made = call(heads, memory, student, teacher, indices, seed, np.array(where), **options)
    return jax.device_get(made)


def embedded(head, x):
    made = x.reshape(len(x), -1) @ head["kernel"] + head["bias"]
    return made / np.linalg.norm(made, axis=1, keepdims=True)


class TestMemory:
    def test_it_moves_towards_the_batch_and_nowhere_else(self):
        heads, student, teacher = inputs()
        memory = step()[1]
        rest = np.delete(np.arange(COUNT), INDICES)
        for name, x in (("student", student), ("teacher", teacher)):
            before, after = getattr(MEMORY, name), getattr(memory, name)
            np.testing.assert_array_equal(after[rest], before[rest])
            moved = 0.5 * before[INDICES] + 0.5 * embedded(heads[name], x)
            moved /= np.linalg.norm(moved, axis=1, keepdims=True)
            np.testing.assert_allclose(after[INDICES], moved, rtol=1e-5, atol=1e-6)

    def test_constants_are_those_of_the_first_batch_that_counts(self):
        nothing = step(where=(False,) * BATCH)
        assert not nothing[0].any()
        jax.tree.map(np.testing.assert_array_equal, nothing[1], MEMORY)
        first = step(nothing[1])[1]
        assert first.begun
        assert first.log_means.all()
        later = step(first, seed=5, of=inputs(1))[1]
        np.testing.assert_array_equal(later.log_means, first.log_means)

    def test_what_does_not_count_or_is_not_finite_is_not_remembered(self):
        heads, student, teacher = inputs()
        student[1] = np.nan
        teacher[2] = np.inf
        where = np.array([True, True, True, False])
        begun = step()[1]
        losses, memory = step(begun, where=where, of=(heads, student, teacher))
        np.testing.assert_array_equal(np.isnan(losses), [False, True, True, False])
        assert losses[3] == 0
        np.testing.assert_array_equal(
            memory.student[INDICES[[1, 3]]], begun.student[INDICES[[1, 3]]]
        )
        np.testing.assert_array_equal(
            memory.teacher[INDICES[[2, 3]]], begun.teacher[INDICES[[2, 3]]]
        )
        assert (memory.student[INDICES[[0, 2]]] != begun.student[INDICES[[0, 2]]]).all()
        assert not step(of=(heads, student, teacher))[1].begun  # a first batch that overflowed

    def test_random_vectors_begin_with_norm_one_on_average(self):
        memory = init_memory(jax.random.key(0), 1000, 16)
        norms = np.linalg.norm(memory.student, axis=1)
        np.testing.assert_allclose((norms**2).mean(), 1, atol=0.02)
        assert not np.allclose(memory.student, memory.teacher)

    def test_it_goes_through_a_scan_donated_and_learns(self):
        heads, student, teacher = inputs()
        tx = optax.adam(0.05)

        def body(carry, key):
            heads, state, memory = carry

            def loss(heads):
                options = {"negatives": 6, "temperature": 0.3}
                made = contrastive_loss(heads, memory, student, teacher, INDICES, key, **options)
                return made[0].mean(), made[1]

            (value, memory), slope = jax.value_and_grad(loss, has_aux=True)(heads)
            updates, state = tx.update(slope, state)
            return (optax.apply_updates(heads, updates), state, memory), value

        @functools.partial(jax.jit, donate_argnums=0)
        def train(carry, keys):
            return jax.lax.scan(body, carry, keys)

        memory = jax.tree.map(jnp.array, MEMORY)
        carry = (jax.tree.map(jnp.asarray, heads), tx.init(heads), memory)
        (_, _, after), losses = train(carry, jax.random.split(jax.random.key(0), 60))
        assert memory.student.is_deleted()
        assert after.begun
        assert losses[-10:].mean() < losses[:10].mean() - 0.5


class TestNegatives:
    def test_an_example_is_never_its_own_and_all_others_are_drawn_alike(self):
        """Seen by their scores: remembered vectors of equal angles to nothing but themselves."""
        memory = init_memory(jax.random.key(0), COUNT, COUNT)
        memory = memory._replace(
            student=np.eye(COUNT, dtype=np.float32),
            teacher=np.eye(COUNT, dtype=np.float32),
            begun=np.array(True),
        )
        eye = np.eye(COUNT, dtype=np.float32)
        heads = {name: {"kernel": eye} for name in ("student", "teacher")}
        # With this key's draws, the loss of each vector of the space tells how often it is drawn.
        tight = {"negatives": 4000, "temperature": 0.05}
        student = np.repeat(eye[None, 3], BATCH, 0)
        indices = np.array([3, 4, 5, 6])
        call = jax.jit(functools.partial(contrastive_loss, **tight))
        losses = np.asarray(call(heads, memory, student, student, indices, jax.random.key(0))[0])
        hit = np.logaddexp(0, 20 - np.log(4000)) - np.logaddexp(0, -np.log(4000))
        rest = 4000 * np.log1p(1 / 4000)
        own = np.logaddexp(0, -20 + np.log(4000))
        np.testing.assert_allclose(losses[0], 2 * (own + rest), rtol=1e-3)  # never drawn
        drawn = (losses[1:] / 2 - rest - np.log1p(4000)) / hit
        np.testing.assert_allclose(drawn, 4000 / (COUNT - 1), rtol=0.2)

    def test_both_ways_to_the_scores_agree_and_given_ones_are_used(self):
        _, student, teacher = inputs()
        sizes = {"student": 5, "teacher": 6}
        heads = {k: {"kernel": np.eye(n, FEATURES, dtype=np.float32)} for k, n in sizes.items()}
        loss = jax.jit(contrastive_loss)

        def losses(memory, others):
            options = {"negatives": np.array(others)}
            return loss(heads, memory, student, teacher, INDICES, None, **options)[0]

        memory = MEMORY._replace(begun=np.array(True))
        few = losses(memory, [[1, 2], [3, 7], [0, 0], [5, 11]])
        again = losses(memory, [[1, 3], [3, 7], [0, 0], [5, 11]])
        np.testing.assert_array_equal(few == again, [False, True, True, True])
        # With so many examples, gathering rows takes less room than all scores.
        more = memory._replace(
            student=np.tile(MEMORY.student, (3, 1)), teacher=np.tile(MEMORY.teacher, (3, 1))
        )
        many = losses(more, [[1, 2], [3, 7], [0, 0], [5, 11]])
        np.testing.assert_allclose(few, many, rtol=1e-5)

    def test_keys_change_what_is_drawn(self):
        begun = step()[1]
        assert not np.allclose(step(begun, seed=1)[0], step(begun, seed=2)[0])
        np.testing.assert_array_equal(step(begun, seed=1)[0], step(begun, seed=1)[0])


class TestInBatch:
    def test_a_batch_of_one_has_nothing_to_tell_apart(self):
        heads, student, teacher = inputs()
        loss = jax.jit(in_batch_contrastive_loss)(heads, student[:1], teacher[:1])
        np.testing.assert_allclose(loss, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "hold 12, but the memory has 0 to 11", {"indices": np.array([0, 1, 2, 12])}),
        (ValueError, "indices hold -1", {"indices": np.array([0, -1, 2, 3])}),
        (ValueError, "indices .* must be", {"indices": np.array([0, 1])}),
        (TypeError, "indices must be integers", {"indices": np.ones(BATCH)}),
        (ValueError, "negatives is 0", {"negatives": 0}),
        (ValueError, "negatives hold 99", {"negatives": np.full((BATCH, 2), 99)}),
        (ValueError, "negatives .* must be", {"negatives": np.zeros((2, 2), int)}),
        (ValueError, "temperature 0.0", {"temperature": 0.0}),
        (ValueError, "momentum 1.5", {"momentum": 1.5}),
        (ValueError, "memory holds 5 features", {"memory": init_memory}),
        (ValueError, "same examples", {"student": np.ones((3, 5), np.float32)}),
        (TypeError, "where != 0", {"where": np.ones(BATCH)}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(error, match, change):
    heads, student, teacher = inputs()
    if change.get("memory"):
        change = {"memory": init_memory(jax.random.key(0), COUNT, 5)}
    given = {"memory": MEMORY, "student": student, "teacher": teacher, "indices": INDICES}
    given |= {"key": None, "negatives": np.zeros((BATCH, 2), int)} | change
    with pytest.raises(error, match=match):
        contrastive_loss(heads, **given)


def test_what_does_not_fit_in_the_beginning_is_told():
    with pytest.raises(ValueError, match="count 1 must be"):
        init_memory(jax.random.key(0), 1)
    with pytest.raises(ValueError, match="must be \\(batch"):
        init_contrastive(jax.random.key(0), np.ones(()), np.ones((2, 3)))
    heads, student, teacher = inputs()
    heads["teacher"] = {"kernel": np.ones((6, 4), np.float32)}
    with pytest.raises(ValueError, match="3 and 4 features"):
        in_batch_contrastive_loss(heads, student, teacher)


def test_indices_that_only_show_inside_jit_make_the_loss_not_a_number():
    indices = np.array([7, -1, 12, 0])
    begun = step()[1]
    losses, memory = step(begun, indices=indices)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, True, False])
    rest = np.delete(np.arange(COUNT), indices[[0, 3]])
    np.testing.assert_array_equal(memory.student[rest], begun.student[rest])
