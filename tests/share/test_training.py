"""Codebooks of trees, groups and models, and the methods that train them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import decode, share
from jaxcomp.share.layouts import Layout, assign
from tests import methods

PATHS = ("first/kernel", "second/kernel")


def test_a_group_of_channels_has_its_own_codebook():
    x = methods.params()["first"]["kernel"]
    whole = np.asarray(share.kmeans(x, 4, axis=-1, group_size=4).decode())
    for part in (slice(0, 4), slice(4, 8)):
        np.testing.assert_array_equal(whole[:, part], share.kmeans(x[:, part], 4).decode())
    first = share.kmeans(x, 3, axis=0, group_size=3)
    assert first.axis == -2
    assert first.codebook.shape == (2, 3)


def test_one_codebook_for_the_model():
    params = methods.params()
    packed = share.codebooks(params, 8, scope="model")
    leaves = [packed[layer]["kernel"] for layer in ("first", "second")]
    np.testing.assert_array_equal(leaves[0].codebook, leaves[1].codebook)
    both = jnp.concatenate([params[layer]["kernel"].ravel() for layer in ("first", "second")])
    np.testing.assert_array_equal(leaves[0].codebook, share.kmeans(both, 8).codebook)
    assert packed["first"]["bias"] is params["first"]["bias"]


def test_importance_lowers_what_it_weighs():
    params = methods.params()
    x = np.asarray(params["first"]["kernel"])
    worth = jax.tree.map(lambda w: jnp.exp(5 * w), params)
    error = lambda leaf: float(np.sum(np.exp(5 * x) * (np.asarray(leaf.decode()) - x) ** 2))
    weighed = share.codebooks(params, 4, paths="first/*nel", importance=worth)["first"]["kernel"]
    assert error(weighed) < error(share.kmeans(params["first"]["kernel"], 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 40}, "second/kernel: 40 clusters for 32 weights"),
        ({"clusters": 9, "axis": -1}, "first/kernel: 9 clusters for 6 weights"),
        ({"clusters": 2, "axis": -1, "group_size": 3}, "first/kernel: groups of 3 do not divide"),
        ({"clusters": 2, "axis": 2}, "first/kernel: shape .* has no axis 2"),
        ({"clusters": 2, "axis": 0, "scope": "model"}, "leave axis out"),
        ({"clusters": 2, "group_size": 2}, "group_size needs an axis"),
        ({"clusters": 2, "scope": "layer"}, "scope must be one of leaf, model"),
        ({"clusters": 2, "start": "best"}, "start must be one of"),
        ({"clusters": 2, "importance": {"first": {}}}, "importance has no leaf 'first/kernel'"),
        ({"clusters": 81, "scope": "model"}, "81 clusters for 80 weights"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        share.codebooks(methods.params(), **options)


def test_bad_importance():
    params = methods.params()
    for bad in (-1.0, np.nan, np.inf):
        worth = jax.tree.map(lambda w, bad=bad: np.full(w.shape, bad, np.float32), params)
        with pytest.raises(ValueError, match="importance of first/kernel: numbers must be finite"):
            share.codebooks(params, 2, importance=worth)
    with pytest.raises(ValueError, match="importance of x: shape"):
        share.kmeans(params["first"]["kernel"], 2, importance=jnp.ones(3))


def test_bad_training():
    for make, message in (
        (lambda: share.train(4, importance_decay=0.9), "begin at step 1 or later"),
        (lambda: share.train(4, 1, importance_decay=1.0), "below 1"),
        (lambda: share.train(4, reassign_every=0), "reassign_every is 0"),
        (lambda: share.soft(4, 3, end=3), "end is 3"),
        (lambda: share.soft(4, end=3, temperature=(1.0, 0.0)), "must be above 0"),
        (lambda: share.straight_through(0), "clusters must be 1 to 65536"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    method, params = share.train(4, 2, importance_decay=0.5), methods.params()
    state = method.init(params)
    with pytest.raises(ValueError, match="needs gradients"):
        method.update(params, state, None)


def test_reassigned_every_so_often_by_what_is_stored():
    params = methods.params()
    method = share.train(4, reassign_every=2)
    state = method.init(params)
    flipped = jax.tree.map(lambda w: -w, params)
    first = state.buffers.indices["first/kernel"]
    for step in (1, 2):
        state = method.update(flipped, state, None)
        index = state.buffers.indices["first/kernel"]
        assert np.array_equal(index, first) == (step == 1)
    wanted = assign(flipped["first"]["kernel"], state.learned["first/kernel"], Layout(4))
    np.testing.assert_array_equal(index, wanted)


def gradients(method, params, state):
    """Of a sum that weighs every value by its place."""

    def total(params, learned):
        seen = method.apply(params, state._replace(learned=learned))["first"]["kernel"]
        return jnp.sum(seen * jnp.arange(seen.size).reshape(seen.shape))

    return jax.grad(total, argnums=(0, 1))(params, state.learned)


def test_straight_through_trains_latent_weights_and_centroids():
    params = methods.params()
    params["first"]["kernel"] = params["first"]["kernel"].at[0].set(0.0)
    method = share.straight_through(4)
    state = method.init(params)
    latent, learned = gradients(method, params, state)
    place = np.arange(48.0).reshape(6, 8)
    place[0] = 0
    np.testing.assert_array_equal(latent["first"]["kernel"], place)
    index = assign(params["first"]["kernel"], state.learned["first/kernel"], Layout(4))
    wanted = np.bincount(np.asarray(index).ravel(), place.ravel(), minlength=4)
    np.testing.assert_allclose(learned["first/kernel"], wanted, rtol=1e-6)


def test_trained_centroids_need_no_order():
    x = jnp.array([[0.0, 1e-3, -0.4, 1.5, 9.0]])
    for book, wanted in (
        ([0.0, 2.0, -1.0, 0.5], [0, 3, 2, 1, 1]),
        # A zero that is not the first stands for any weight near it.
        ([2.0, 0.0, 0.25, 0.5], [1, 1, 1, 0, 0]),
    ):
        np.testing.assert_array_equal(assign(x, jnp.array(book), Layout(4)), [wanted])


def soft_reference(w, book, temperature):
    share = jax.nn.softmax(-((w[..., None] - book) ** 2) / temperature)
    return jnp.sum(share * book, -1)


@pytest.mark.parametrize("temperature", [3.0, 0.1, 1e-4])
def test_soft_assignment_and_its_gradient(temperature):
    w = methods.params()["first"]["kernel"]
    book = jnp.array([-0.7, 0.9, -0.1, 0.3])
    ours = lambda w, book: jnp.sum(jnp.sin(3 * share.attend(w, book, temperature)))
    wanted = lambda w, book: jnp.sum(jnp.sin(3 * soft_reference(w, book, temperature)))
    np.testing.assert_allclose(
        share.attend(w, book, temperature), soft_reference(w, book, temperature), atol=1e-5
    )
    for a, b in zip(
        jax.grad(ours, (0, 1))(w, book), jax.grad(wanted, (0, 1))(w, book), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_soft_assignment_holds_nothing_of_weights_times_centroids():
    w, book = jnp.ones((64, 64)), jnp.arange(500.0)
    gradient = jax.grad(lambda w, book: jnp.sum(share.attend(w, book, 0.5)), (0, 1))
    text = str(jax.make_jaxpr(gradient)(w, book))
    assert "64,64" in text
    assert "500,64" not in text
    assert "64,500" not in text


def test_the_gradient_of_a_sharp_attention_stays_finite():
    weights, book = jnp.array([[-1.0, 0.5]]), jnp.array([-1.0, 3e3])
    total = lambda w, c: share.attend(w, c, 1e-34).sum()
    for slope in jax.grad(total, (0, 1))(weights, book):
        assert np.isfinite(slope).all()


def test_soft_ends_hard():
    params = methods.params()
    method = share.soft(4, 1, end=4, temperature=(1.0, 0.1))
    state = method.init(params)
    spread = []
    for step in range(6):
        seen = np.asarray(method.apply(params, state)["first"]["kernel"])
        packed = method.pack(params, state)
        np.testing.assert_array_equal(decode(packed)["first"]["kernel"], seen)
        if step >= 1:
            book = np.asarray(state.learned["first/kernel"])
            spread.append(np.abs(seen[..., None] - book).min(-1).max())
        state = method.update(params, state, None)
    assert spread[:4] == sorted(spread[:4], reverse=True)
    assert spread[2] > 1e-3
    assert spread[3:] == [0, 0]


@pytest.mark.parametrize("value", [0.25, 0.0])
def test_weights_that_are_all_alike(value):
    params = jax.tree.map(lambda w: jnp.full(w.shape, value), methods.params())
    for method in (share.soft(4, end=2), share.straight_through(4), share.train(1)):
        state = method.init(params)
        for _ in range(3):
            seen = method.apply(params, state)["first"]["kernel"]
            np.testing.assert_array_equal(seen, np.full((6, 8), value, np.float32))
            state = method.update(params, state, None)


def test_importance_of_squared_gradients():
    params = methods.params()
    grads = jax.tree.map(lambda w: jnp.exp(2 * w), params)
    method = share.train(4, 2, importance_decay=0.5)
    state = method.init(params)
    for _ in range(2):
        state = method.update(params, state, grads)
    worth = jax.tree.map(lambda g: g**2, grads)
    wanted = share.codebooks(params, 4, importance=worth)["first"]["kernel"].codebook
    np.testing.assert_allclose(state.learned["first/kernel"], wanted, rtol=1e-5)
