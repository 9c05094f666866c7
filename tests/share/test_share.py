"""Codebooks of one leaf, and the method that trains them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp import share
from jaxcomp.arrays.codebook import lookup
from tests import methods


def test_kmeans_beats_rounding_and_packs_at_the_bits_of_its_indices():
    x = jax.random.normal(jax.random.key(0), (64, 100))
    for clusters in (2, 5, 200):
        leaf = share.kmeans(x, clusters)
        error = float(jnp.mean((leaf.decode() - x) ** 2))
        step = float(x.max() - x.min()) / clusters
        assert error < step**2 / 12
        bits = max(1, int(np.ceil(np.log2(clusters))))
        assert leaf.nbytes == 64 * int(np.ceil(100 * bits / 8)) + 4 * clusters
        assert len(np.unique(np.asarray(leaf.decode()))) <= clusters


@settings(max_examples=15)
@given(
    # Every number of clusters is a program of its own.
    st.sampled_from([1, 2, 3, 5, 8, 12]),
    st.integers(0, 2**16),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_zero_keeps_its_own_centroid(clusters, seed, sparsity, dtype):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8, 10)).astype(jnp.dtype(dtype))
    x[rng.random(x.shape) < sparsity] = 0
    decoded = np.asarray(share.kmeans(jax.device_put(x), clusters).decode())
    assert decoded.dtype == x.dtype
    assert np.all(decoded[x == 0] == 0)
    if clusters > 2 and sparsity:
        assert np.all(decoded[x != 0] != 0)


@pytest.mark.parametrize(
    ("x", "clusters", "message"),
    [
        (jnp.ones((2, 2)), 0, "clusters must be 1 to 65536"),
        (jnp.ones((2, 2)), 5, "5 clusters for 4 weights: ask for at most 4"),
        (jnp.zeros((0, 2)), 1, "no elements"),
        (jnp.array([[1.0, jnp.inf]]), 1, "NaN or infinite"),
    ],
)
def test_bad_input(x, clusters, message):
    with pytest.raises(ValueError, match=message):
        share.kmeans(x, clusters)


def test_bad_methods():
    with pytest.raises(ValueError, match="clusters must be 1 to 65536, not 0"):
        share.train(0)
    with pytest.raises(ValueError, match="begin must be a step from 0 on"):
        share.train(4, begin=-1)
    with pytest.raises(ValueError, match="second/kernel: 40 clusters for 32 weights"):
        share.train(40).init(methods.params())


@pytest.mark.parametrize("x", [jnp.full((4, 4), 0.25), jnp.zeros((4, 4)), jnp.eye(4)])
def test_fewer_distinct_values_than_clusters_are_exact(x):
    np.testing.assert_allclose(share.kmeans(x, 8).decode(), x, atol=1e-7)


def test_one_shot_inside_of_transformations():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)
    x = x.at[:, 0].set(0.0)
    alone = np.stack([share.kmeans(each, 4).decode() for each in x])
    decoded = jax.jit(lambda x: share.kmeans(x, 4).decode())
    np.testing.assert_array_equal(decoded(x[0]), alone[0])
    leaves = jax.vmap(lambda x: share.codebooks({"kernel": x}, 4)["kernel"])(x)
    np.testing.assert_array_equal(leaves.decode(), alone)


def test_dense_before_begin_and_shared_from_it_on():
    params = methods.params()
    method = share.train(4, begin=3)
    state = method.init(params)
    for step in range(6):
        seen = method.apply(params, state)["first"]["kernel"]
        if step < 3:
            np.testing.assert_array_equal(seen, params["first"]["kernel"])
            assert method.pack(params, state)["first"]["kernel"] is params["first"]["kernel"]
        else:
            assert len(np.unique(np.asarray(seen))) <= 4
            np.testing.assert_array_equal(seen, share.kmeans(params["first"]["kernel"], 4).decode())
        state = method.update(params, state, None)


def test_assignments_stay_while_centroids_move():
    params = methods.params()
    method = share.train(4)
    state = method.init(params)
    moved = state._replace(learned={p: c + 0.5 for p, c in state.learned.items()})
    new = method.update(jax.tree.map(lambda w: 2 * w, params), moved, None)
    for path, index in state.buffers.indices.items():
        np.testing.assert_array_equal(new.buffers.indices[path], index)
        np.testing.assert_array_equal(new.learned[path], moved.learned[path])
    seen = method.apply(params, new)["first"]["kernel"]
    np.testing.assert_allclose(
        seen, method.apply(params, state)["first"]["kernel"] + 0.5, rtol=1e-5
    )


def test_centroid_gradients_are_summed_in_float32_for_low_precision_weights():
    params = {
        "kernel": jnp.ones((64, 128), jnp.bfloat16)
        * jnp.array([1.0, -1.0], jnp.bfloat16)[:, None].repeat(32, 0)
    }
    method = share.train(2)
    state = method.init(params)

    def total(learned):
        return jnp.sum(
            method.apply(params, state._replace(learned=learned))["kernel"].astype(jnp.float32)
        )

    gradient = jax.grad(total)(state.learned)["kernel"]
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, [4096.0, 4096.0])


def test_a_weight_removed_later_gets_an_entry_for_zero():
    params = methods.params()
    method = share.train(4)
    state = method.init(params)
    later = jax.tree.map(lambda w: jnp.where(jnp.abs(w) < 0.2, 0, w), params)
    packed = method.pack(later, state)
    np.testing.assert_array_equal(
        packed["first"]["kernel"].decode(), method.apply(later, state)["first"]["kernel"]
    )
    assert packed["first"]["kernel"].clusters == 5
    indices = state.buffers.indices["first/kernel"]
    kept = later["first"]["kernel"] != 0
    values = lookup(state.learned["first/kernel"], indices)
    np.testing.assert_array_equal(packed["first"]["kernel"].decode()[kept], values[kept])
