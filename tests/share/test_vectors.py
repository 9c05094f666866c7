"""Shared vectors, hashed values and kernel patterns against references in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp
from jaxcomp import share
from jaxcomp.arrays.hashed import hash_places
from jaxcomp.share.kernel_patterns import fit_lines
from jaxcomp.share.residual import fit_stages, sum_stages

KEY = jax.random.key(0)


def weights(shape=(16, 24), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def error(x, leaf, weight=1.0):
    difference = np.asarray(leaf.decode(), np.float64) - x
    return float((weight * difference**2).sum())


def test_vectors_take_their_nearest_entry():
    x = weights()
    leaf = share.vector_codebook(jnp.asarray(x), share.VectorFormat(8, 4), key=KEY)
    book = np.asarray(leaf.codebook, np.float64)[0, 0]
    vectors = x.reshape(4, 4, 24).transpose(0, 2, 1)
    best = ((vectors[..., None, :] - book) ** 2).sum(-1).min(-1).sum()
    np.testing.assert_allclose(error(x, leaf), best, rtol=1e-5)
    # Three bits for each of 4 x 24 vectors, and the codebook.
    assert leaf.nbytes == 4 * 24 * 3 // 8 + 8 * 4 * 4


def test_an_axis_of_its_own_and_codebooks_of_their_own():
    x = jnp.asarray(weights())
    whole = share.vector_codebook(x, share.VectorFormat(8, 4, axis=-1), key=KEY)
    spaces = share.vector_codebook(x, share.VectorFormat(8, 4, axis=1, per_space=True), key=KEY)
    assert whole.codebook.shape == (1, 1, 8, 4)
    assert spaces.codebook.shape == (1, 6, 8, 4)
    assert error(np.asarray(x), spaces) < error(np.asarray(x), whole)
    # Each space alone is the same problem.
    part = np.asarray(x)[:, 4:8]
    decoded, book = np.asarray(spaces.decode())[:, 4:8], np.asarray(spaces.codebook)[0, 1]
    np.testing.assert_allclose(
        ((part[:, None] - book) ** 2).sum(-1).min(1), ((part - decoded) ** 2).sum(-1), rtol=1e-4
    )


def test_refinement_lowers_the_error_of_stages():
    x = jnp.asarray(weights((200, 4)))
    errors = []
    for sweeps in (0, 1, 8):
        found = fit_stages(x, 6, 2, key=KEY, sweeps=sweeps)
        errors.append(float(((np.asarray(sum_stages(*found)) - x) ** 2).sum()))
    assert errors[2] < errors[1] < errors[0]
    one = fit_stages(x, 6, 1, key=KEY)
    assert errors[0] < 0.8 * float(((np.asarray(sum_stages(*one)) - x) ** 2).sum())


def test_entries_are_least_squares_given_the_indices():
    x = weights((100, 3))
    books, indices = map(np.asarray, fit_stages(jnp.asarray(x), 4, 2, key=KEY, sweeps=60))
    hot = np.concatenate([np.eye(4)[index] for index in indices], 1)
    solution = np.linalg.lstsq(hot, x.astype(np.float64), rcond=None)[0]
    best = ((hot @ solution - x) ** 2).sum()
    found = ((hot @ books.reshape(8, 3) - x) ** 2).sum()
    assert best <= found * (1 + 1e-6)
    assert found < 1.001 * best


def test_importance_moves_the_error_to_where_it_costs_least():
    x = weights()
    weight = np.where(np.arange(16) % 2 == 0, 100.0, 1.0)[:, None]
    format = share.VectorFormat(8, 4)
    aware = share.vector_codebook(jnp.asarray(x), format, key=KEY, importance=weight)
    plain = share.vector_codebook(jnp.asarray(x), format, key=KEY)
    assert error(x, aware, weight) < 0.8 * error(x, plain, weight)
    assert error(x, plain) < error(x, aware)


def test_a_tree_keeps_its_zeros_and_its_other_leaves():
    kernel = weights() * (weights(seed=1) > 0)
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.ones(24)}
    packed = share.vector_codebooks(params, share.VectorFormat(8, 4), key=KEY)
    assert packed["bias"] is params["bias"]
    dense = np.asarray(packed["kernel"].decode())
    assert (dense[kernel == 0] == 0).all()
    assert (dense[kernel != 0] != 0).any()


def test_vectors_refuse_what_cannot_be_shared():
    x = jnp.asarray(weights())
    for array, format, words in [
        (x, share.VectorFormat(8, 5), "does not divide into vectors of 5: choose a length"),
        (x, share.VectorFormat(256, 4), "256 clusters for 96 vectors: ask for at most 96"),
        (x, share.VectorFormat(32, 4, per_space=True), "for 24 vectors"),
        (x, share.VectorFormat(8, 4, axis=2), "has no axis 2"),
        (x[0], share.VectorFormat(8, 4), "has no axis -2"),
        (x.at[0, 0].set(jnp.nan), share.VectorFormat(8, 4), "NaN"),
        (x[:0], share.VectorFormat(8, 4), "no elements"),
    ]:
        with pytest.raises(ValueError, match=words):
            share.vector_codebook(array, format, key=KEY)
    for importance, words in [(np.ones(3), "broadcast"), (-np.ones((16, 1)), "at least 0")]:
        with pytest.raises(ValueError, match=words):
            share.vector_codebook(x, share.VectorFormat(8, 4), key=KEY, importance=importance)
    method = share.train_vectors(share.VectorFormat(8, 5), key=KEY)
    with pytest.raises(ValueError, match=r"layer/kernel.*5"):
        method.init({"layer": {"kernel": x}})
    with pytest.raises(ValueError, match="importance names 'kernle'"):
        share.vector_codebooks(
            {"kernel": x}, share.VectorFormat(8, 4), key=KEY, importance={"kernle": x}
        )
    with pytest.raises(ValueError, match="clusters"):
        share.VectorFormat(0)


def test_equal_weights_are_kept_exactly():
    x = jnp.full((16, 24), 0.3)
    leaf = share.vector_codebook(x, share.VectorFormat(8, 4), key=KEY)
    np.testing.assert_array_equal(leaf.decode(), x)


def test_entries_are_trained_by_the_gradient_summed_over_their_members():
    params = {"kernel": jnp.asarray(weights())}
    method = share.train_vectors(share.VectorFormat(8, 4), key=KEY)
    state = method.init(params)
    target = weights(seed=2)
    loss = lambda learned: (
        method.apply(params, state._replace(learned=learned))["kernel"] * target
    ).sum()
    grads = np.asarray(jax.grad(loss)(state.learned)["kernel"])[0, 0]
    index = np.asarray(state.buffers.codes["kernel"])[0]
    vectors = target.reshape(4, 4, 24).transpose(0, 2, 1)
    want = [vectors[index == k].sum(0) for k in range(8)]
    np.testing.assert_allclose(grads, want, rtol=1e-4, atol=1e-5)


def test_buckets_are_least_squares_and_spread_evenly():
    x = weights((30, 40))
    leaf = share.hashed(jnp.asarray(x), 150, seed=3)
    place, sign = map(np.asarray, hash_places((30, 40), 150, 3))
    design = np.eye(150)[place.ravel()] * sign.reshape(-1, 1)
    want = np.linalg.lstsq(design, x.ravel().astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(leaf.buckets, want, rtol=1e-4, atol=1e-6)
    counts = np.bincount(place.ravel(), minlength=150)
    # Poisson of 8 a bucket.
    assert 0.7 < counts.var() / counts.mean() < 1.4
    assert abs(sign.mean()) < 0.1
    other = np.asarray(hash_places((30, 40), 150, 4)[0])
    assert (other == place).mean() < 0.03


def test_hashing_refuses_what_does_not_fit():
    x = jnp.asarray(weights())
    for options, words in [
        (dict(buckets=0), "buckets is 0"),
        (dict(buckets=385), "at most 384"),
        (dict(buckets=2, seed=1 << 32), "32-bit"),
        (dict(buckets=2, importance=x[0]), "one number a weight"),
    ]:
        with pytest.raises(ValueError, match=words):
            share.hashed(x, **options)
    for fraction in (0, 1.5):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            share.train_hashed(fraction)


def test_kernels_that_share_patterns_are_found():
    rng = np.random.default_rng(0)
    shapes = rng.normal(size=(4, 9))
    scale, which = rng.normal(size=(8, 16)), rng.integers(4, size=(8, 16))
    x = np.moveaxis((shapes[which] * scale[..., None]).reshape(8, 16, 3, 3), (2, 3), (0, 1))
    x = x.astype(np.float32)
    leaf = share.kernel_patterns(jnp.asarray(x), 4, key=KEY)
    np.testing.assert_allclose(leaf.decode(), x, atol=1e-5)
    # Two bits and a scale for each of 128 kernels, and four patterns of 9.
    assert leaf.nbytes == 128 * 2 // 8 + 128 * 4 + 4 * 9 * 4


def test_lines_are_no_worse_than_the_first_component():
    x = weights((60, 5))
    line, index, scale = map(np.asarray, fit_lines(jnp.asarray(x), 1, key=KEY, iterations=60))
    found = ((line[index] * scale[:, None] - x) ** 2).sum()
    best = (np.linalg.svd(x, compute_uv=False)[1:] ** 2).sum()
    assert best * (1 - 1e-5) <= found < 1.001 * best
    np.testing.assert_allclose(np.linalg.norm(line, axis=1), 1, rtol=1e-6)


def test_kernels_of_zeros_stay_zeros_and_refusals_name_the_leaf():
    x = jnp.zeros((3, 3, 2, 4))
    np.testing.assert_array_equal(share.kernel_patterns(x, 2, key=KEY).decode(), x)
    with pytest.raises(ValueError, match=r"dense/kernel.*has no axes"):
        share.train_kernel_patterns(2, key=KEY).init({"dense": {"kernel": x[0, 0]}})
    with pytest.raises(ValueError, match="9 patterns for 8 kernels"):
        share.kernel_patterns(x, 9, key=KEY)
    with pytest.raises(ValueError, match="negative and ascending"):
        share.kernel_patterns(x, 2, key=KEY, axes=(0, 1))


def test_leaves_come_back_from_a_file(tmp_path):
    x = jnp.asarray(weights())
    tree = {
        "vectors": share.vector_codebook(x, share.VectorFormat(8, 4), key=KEY),
        "hashed": share.hashed(x, 20),
        "patterns": share.kernel_patterns(x, 3, key=KEY, axes=(-2,)),
    }
    jaxcomp.save(tmp_path / "model.jxc", tree)
    back = jaxcomp.load(tmp_path / "model.jxc")
    for name, leaf in tree.items():
        np.testing.assert_array_equal(back[name].decode(), leaf.decode())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: share.codebooks({"x": x}, 2)["x"],
        lambda x: share.hashed(x, 4),
        lambda x: share.vector_codebook(x, share.VectorFormat(2, 2), key=KEY),
        lambda x: share.kernel_patterns(x, 2, key=KEY, axes=(-2,)),
        lambda x: packed_by(share.train(2), x),
        lambda x: packed_by(share.train_hashed(0.5), x),
    ],
)
def test_doubles_become_what_jax_has(make, tmp_path):
    x = np.arange(16.0).reshape(4, 4)
    assert x.dtype == np.float64
    leaf = make(x)
    assert leaf.dtype == np.float32
    jaxcomp.save(tmp_path / "leaf.jxc", {"x": leaf})
    found = jaxcomp.load(tmp_path / "leaf.jxc")["x"].decode()
    np.testing.assert_array_equal(found, leaf.decode())


def packed_by(method, x):
    return method.pack({"x": x}, method.init({"x": jnp.asarray(x)}))["x"]


WEIGHT = jnp.ones((4, 4))
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: share.VectorFormat(axis="last"), TypeError, "axis must be a whole number"),
        (lambda: share.VectorFormat(per_space=1), TypeError, "per_space must be True or False"),
        (lambda: share.vector_codebook(WEIGHT, "4", key=KEY), TypeError, "share.VectorFormat"),
        (
            lambda: share.vector_codebook(WEIGHT, share.VectorFormat(2, 2), key=KEY, sweeps=-1),
            ValueError,
            "sweeps is -1",
        ),
        (
            lambda: share.vector_codebook(WEIGHT, share.VectorFormat(2, 2), key=KEY, iterations=""),
            TypeError,
            "iterations must be a whole number",
        ),
        (lambda: share.hashed(WEIGHT, 2, importance=jnp.ones(3)), ValueError, "one number a"),
        (lambda: share.hashed(WEIGHT, 2, importance=-WEIGHT), ValueError, "at least 0"),
        (lambda: share.hashed(WEIGHT, 2, importance=[1.0, 2.0]), ValueError, "importance"),
        (lambda: share.train_kernel_patterns(1 << 16, key=KEY), ValueError, "at most 32768"),
        (lambda: share.train_kernel_patterns(2, key=KEY, axes=(0, 1)), ValueError, "ascending"),
        (lambda: share.train_kernel_patterns(2, key=KEY, axes=-1), TypeError, "tuple of axes"),
        (lambda: share.train_kernel_patterns(2, key=KEY, axes=(-2.0,)), TypeError, "whole number"),
        (lambda: share.attend(WEIGHT, jnp.ones(2), 0.0), ValueError, "temperature is 0"),
        (lambda: share.attend(WEIGHT, jnp.ones(0), 1.0), ValueError, "one entry or more"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
