"""A teacher beside every other method: in one loss, one optimizer, one jitted step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp import distill, prune, quantize, share

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, name="hidden")(x))
        return nn.Dense(4, name="head")(x)


TEACHER, STUDENT = Net(24), Net(8)
TAUGHT = TEACHER.init(jax.random.key(1), X)
Y = np.asarray(TEACHER.apply(TAUGHT, X)).argmax(-1)

METHODS = {
    "pruned": prune.gradual(prune.scores.magnitude, prune.cubic(0.5, begin=2, end=6)),
    "2:4": prune.straight_through(
        prune.scores.magnitude, prune.constant(0.5), structure=prune.NM(2, 4), decay=2e-4
    ),
    "2 bits": quantize.train(quantize.Format(2)),
    "learned steps": quantize.learned_step(quantize.Format(2)),
    "shared": share.train(4, begin=2),
    "pruned, then 4 bits": jaxcomp.chain(
        prune.gradual(prune.scores.magnitude, prune.cubic(0.5, begin=2, end=6)),
        quantize.train(quantize.Format(4), begin=6),
    ),
}


def loss_of(effective, projection, teacher, x, y):
    """Labels, the teacher's logits and its hidden layer."""
    wanted_logits, wanted = distill.features(
        TEACHER.apply, distill.frozen(teacher), x, at="Net/hidden"
    )
    logits, own = distill.features(STUDENT.apply, effective, x, at="Net/hidden")
    soft = distill.hinton_loss(logits, wanted_logits, y, temperature=2.0, weight=0.5)
    hint = distill.hint_loss(distill.project(projection, own["Net/hidden"]), wanted["Net/hidden"])
    return soft.mean() + hint.mean()


@functools.cache
def trained(name, steps=40):
    """The student and its projection, trained by one optimizer; losses; how often it was traced."""
    student = STUDENT.init(KEY, X)
    shapes = [
        distill.list_features(net.apply, params, X, at="Net/hidden").shapes["Net/hidden"]
        for net, params in ((STUDENT, student), (TEACHER, TAUGHT))
    ]
    params = {"student": student, "projection": distill.init_projection(KEY, *shapes)}
    method = jaxcomp.partition({"projection/*": None, "student/*/kernel": METHODS[name]})
    tx = jaxcomp.wrap_optimizer(optax.adam(2e-2), method)
    traced = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, teacher, x, y):
        traced.append(None)

        def loss_fn(params):
            effective = jaxcomp.compressed(params, opt_state)
            return loss_of(effective["student"], effective["projection"], teacher, x, y)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)
    losses = []
    for _ in range(steps):
        params, opt_state, loss = step(params, opt_state, TAUGHT, X, Y)
        losses.append(float(loss))
    return params, opt_state, losses, len(traced)


@pytest.mark.parametrize("name", METHODS)
def test_a_student_learns_from_its_teacher_while_it_is_compressed(name):
    _, _, losses, traced = trained(name)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.75 * losses[0]
    assert traced == 1


@pytest.mark.parametrize("name", METHODS)
def test_what_is_shipped_computes_what_was_trained_and_the_projection_stays_behind(name, tmp_path):
    params, opt_state, _, _ = trained(name)
    effective = jaxcomp.compressed(params, opt_state)
    packed = jaxcomp.pack(params, opt_state)
    jaxcomp.save(tmp_path / "student.jxc", packed["student"])
    loaded = jaxcomp.load(tmp_path / "student.jxc")
    run = jax.jit(STUDENT.apply)
    np.testing.assert_allclose(run(loaded, X), run(effective["student"], X), rtol=1e-5, atol=1e-6)
    assert isinstance(packed["student"]["params"]["hidden"]["kernel"], jaxcomp.CompressedArray)
    projection = params["projection"]
    assert all(leaf is packed["projection"][key] for key, leaf in projection.items())


def test_a_projection_is_trained_by_the_same_optimizer():
    params, _, _, _ = trained("2 bits")
    first = distill.init_projection(KEY, jnp.ones((1, 8)), jnp.ones((1, 24)))
    assert np.abs(params["projection"]["kernel"] - first["kernel"]).max() > 1e-3


def test_a_packed_teacher_teaches():
    packed = jax.tree.map(
        lambda leaf: quantize.encode(leaf, quantize.Format(8)) if leaf.ndim == 2 else leaf, TAUGHT
    )
    student = STUDENT.init(KEY, X)
    projection = distill.init_projection(KEY, jnp.ones((1, 8)), jnp.ones((1, 24)))
    loss = jax.jit(jax.value_and_grad(loss_of))
    near, slopes = loss(student, projection, packed, X, Y)
    exact, _ = loss(student, projection, TAUGHT, X, Y)
    np.testing.assert_allclose(near, exact, rtol=2e-2)
    assert near != exact
    assert all(np.any(leaf) for leaf in jax.tree.leaves(slopes))


def test_a_teacher_in_bfloat16():
    student = STUDENT.init(KEY, X)
    projection = distill.init_projection(KEY, jnp.ones((1, 8)), jnp.ones((1, 24)))
    loss = jax.jit(loss_of)
    half = distill.frozen(TAUGHT, jnp.bfloat16)
    exact = loss(student, projection, TAUGHT, X, Y)
    np.testing.assert_allclose(loss(student, projection, half, X, Y), exact, rtol=2e-2)
