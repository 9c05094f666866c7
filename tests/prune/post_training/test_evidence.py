"""Evidence against float64 derivatives and loops over every number that a weight meets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp import tree as tree_lib
from jaxcomp.prune import scores
from jaxcomp.prune.post_training import evidence


def parameters():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "up": {"kernel": jax.random.normal(keys[0], (3, 4)), "bias": jnp.full(4, 0.1)},
        "down": {"kernel": jax.random.normal(keys[1], (4, 2))},
        "steps": jnp.arange(3),
    }


def model(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"]


def loss(params, x, y):
    return jnp.mean((model(params, x) - y) ** 2)


def data(count=3, rows=5):
    generator = np.random.default_rng(1)
    return [
        (
            generator.normal(size=(rows, 3)).astype(np.float32),
            generator.normal(size=(rows, 2)).astype(np.float32),
        )
        for _ in range(count)
    ]


# Derivatives in float64, by central differences of a network written in numpy.
NAMES = ("down/kernel", "up/bias", "up/kernel")


def numpy_loss(vector, x, y):
    down, bias, up = np.split(vector, [8, 12])
    hidden = np.tanh(x @ up.reshape(3, 4) + bias)
    return np.mean((hidden @ down.reshape(4, 2) - y) ** 2)


def vector_of(tree):
    leaves = tree_lib.flatten(tree)
    return np.concatenate([np.ravel(np.asarray(leaves[name], np.float64)) for name in NAMES])


def differences(function, at, step=1e-5):
    columns = np.eye(at.size) * step
    return np.stack([(function(at + c) - function(at - c)) / (2 * step) for c in columns])


def numpy_gradient(vector, x, y):
    return differences(lambda v: numpy_loss(v, x, y), vector)


def numpy_hessian(vector, x, y):
    return differences(lambda v: differences(lambda u: numpy_loss(u, x, y), v, 1e-4), vector, 1e-4)


def test_gradients_and_their_squares():
    params, batches, at = parameters(), data(), vector_of(parameters())
    each = np.stack([numpy_gradient(at, np.float64(x), np.float64(y)) for x, y in batches])
    found = evidence.gradients(loss, params, iter(batches))
    np.testing.assert_allclose(vector_of(found), each.mean(0), rtol=1e-4, atol=1e-6)
    found = evidence.squared_gradients(loss, params, iter(batches))
    np.testing.assert_allclose(vector_of(found), (each**2).mean(0), rtol=1e-4, atol=1e-7)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    np.testing.assert_array_equal(found["steps"], np.zeros(3))


def test_hessian_diagonal_is_unbiased():
    params, batches, at = parameters(), data(2), vector_of(parameters())
    hessians = np.stack([numpy_hessian(at, np.float64(x), np.float64(y)) for x, y in batches])
    samples = 400
    found = evidence.hessian_diagonal(loss, params, batches, jax.random.key(3), samples)
    # Independent signs for each batch and sample: the variance is that of the rest of each row.
    rest = sum((h**2).sum(1) - np.diag(h) ** 2 for h in hessians)
    deviation = np.sqrt(rest / samples) / len(batches)
    error = vector_of(found) - np.diag(hessians.mean(0))
    assert np.all(np.abs(error) < 5 * deviation + 1e-4)
    # And not better than chance allows: an exact answer here would mean that no signs were drawn.
    assert np.mean(np.abs(error) / deviation) > 0.3
    other = evidence.hessian_diagonal(loss, params, batches, jax.random.key(4), samples)
    assert not np.allclose(vector_of(found), vector_of(other), rtol=1e-3)
    # The same batch again has signs of its own.
    once, twice = (
        evidence.hessian_diagonal(loss, params, batches[:1] * times, jax.random.key(3))
        for times in (1, 2)
    )
    assert not np.allclose(vector_of(once), vector_of(twice), rtol=1e-3)


def test_hessian_diagonal_of_a_diagonal_hessian_is_exact():
    curved = lambda p, x: jnp.sum(x * (p["a"] ** 3)) + jnp.sum(p["b"] ** 2)
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}
    batches = [np.float32([1, 2]), np.float32([3, -4])]
    found = evidence.hessian_diagonal(curved, params, batches, jax.random.key(0))
    np.testing.assert_allclose(found["a"], [6 * 1 * 2, 6 * -2 * -1], rtol=1e-6)
    np.testing.assert_allclose(found["b"], [2], rtol=1e-6)
    obd = jax.tree.map(scores.obd, params, found)
    np.testing.assert_allclose(obd["a"], [6, 24], rtol=1e-6)


def test_hessian_times_gradient_and_grasp():
    params, batches, at = parameters(), data(), vector_of(parameters())
    pairs = [(np.float64(x), np.float64(y)) for x, y in batches]
    hessian = np.mean([numpy_hessian(at, *pair) for pair in pairs], axis=0)
    gradient = np.mean([numpy_gradient(at, *pair) for pair in pairs], axis=0)
    found = evidence.hessian_times_gradient(loss, params, batches)
    np.testing.assert_allclose(vector_of(found), hessian @ gradient, rtol=1e-3, atol=1e-5)
    # What the score promises: shrinking a weight a little changes |g|² by -2 * score * a little.
    grasp = vector_of(jax.tree.map(scores.grasp, params, found))

    def square(vector):
        slope = np.mean([numpy_gradient(vector, *pair) for pair in pairs], axis=0)
        return slope @ slope

    for index in (int(np.argmin(grasp)), int(np.argmax(grasp))):
        small = np.zeros(at.size)
        small[index] = 1e-3 * at[index]
        change = (square(at - small) - square(at + small)) / 2
        np.testing.assert_allclose(change, -2e-3 * grasp[index], rtol=1e-3)


def test_a_sum_over_narrow_leaves_is_float32():
    narrow = {"kernel": jnp.ones((2, 1), jnp.bfloat16)}
    batches = [jnp.full((2, 1), 1 + i / 128, jnp.bfloat16) for i in range(64)]
    linear = lambda p, x: jnp.sum(p["kernel"] * x)
    found = evidence.gradients(linear, narrow, batches)["kernel"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.full((2, 1), 1 + 31.5 / 128), rtol=1e-6)
    squares = evidence.squared_gradients(linear, narrow, batches)["kernel"]
    expected = np.mean((1 + np.arange(64) / 128) ** 2)
    np.testing.assert_allclose(squares, np.full((2, 1), expected), rtol=1e-6)


def test_batches_of_one_argument_and_of_dicts():
    params = {"kernel": jnp.ones(2)}
    one = evidence.gradients(lambda p, x: p["kernel"] @ x, params, [jnp.array([1.0, 2.0])])
    np.testing.assert_array_equal(one["kernel"], [1, 2])
    named = evidence.gradients(
        lambda p, batch: p["kernel"] @ batch["x"], params, [{"x": jnp.array([1.0, 2.0])}]
    )
    np.testing.assert_array_equal(named["kernel"], [1, 2])


def test_an_nnx_state_and_boxes_stay_what_they_are():
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    batches = [np.ones((4, 3), np.float32)]
    found = evidence.gradients(lambda s, x: jnp.sum(nnx.merge(graph, s)(x)), state, batches)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    np.testing.assert_allclose(tree_lib.flatten(found)["kernel"], np.full((3, 2), 4.0))
    norms = evidence.input_norms(lambda s, x: nnx.merge(graph, s)(x), state, batches)
    np.testing.assert_allclose(norms["kernel"], np.full((3, 1), 2.0))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_leaves_stay_sharded(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    kernel = jax.random.normal(jax.random.key(0), (8, 4))
    params = {"kernel": jax.device_put(kernel, place(None, "model"))}
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    batches = [jax.device_put(x, place("data"))] * 2
    apply = lambda p, x: jnp.tanh(x @ p["kernel"])
    square = lambda p, x: jnp.sum(apply(p, x) ** 2)
    plain, plain_batches = {"kernel": kernel}, [x, x]
    for name in ("gradients", "hessian_times_gradient"):
        found = getattr(evidence, name)(square, params, batches)["kernel"]
        expected = getattr(evidence, name)(square, plain, plain_batches)["kernel"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert found.sharding.is_equivalent_to(params["kernel"].sharding, 2), name
    key = jax.random.key(0)
    found = evidence.hessian_diagonal(square, params, batches, key)["kernel"]
    expected = evidence.hessian_diagonal(square, plain, plain_batches, key)["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    norms = evidence.input_norms(apply, params, batches)["kernel"]
    np.testing.assert_allclose(norms[:, 0], np.linalg.norm(np.concatenate([x, x]), axis=0), 1e-5)


def test_bad_batches():
    params = parameters()
    for function in (evidence.gradients, evidence.squared_gradients):
        with pytest.raises(ValueError, match="batches is empty"):
            function(loss, params, [])
        with pytest.raises(TypeError, match="batches is one array"):
            function(loss, params, jnp.ones((3, 3)))
    with pytest.raises(TypeError, match="read twice: give a list"):
        evidence.hessian_times_gradient(loss, params, iter(data()))
    with pytest.raises(ValueError, match="samples is 0"):
        evidence.hessian_diagonal(loss, params, data(), jax.random.key(0), samples=0)
    with pytest.raises(ValueError, match="batches is empty"):
        evidence.input_norms(model, params, [])


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_nan_names_leaf_and_batch(bad):
    batches = data()
    batches[bad][1][0, 0] = np.nan
    for function in (evidence.gradients, evidence.squared_gradients):
        with pytest.raises(ValueError, match=rf"^batch {bad}: down/kernel: .* and of 2 more are"):
            function(loss, parameters(), batches)


def test_one_bad_leaf_is_the_one_that_is_named():
    # The derivative of a root at zero is infinite.
    bad = lambda p, x: jnp.sum(p["fine"] * x) + jnp.sum(jnp.sqrt(p["root"]))
    params = {"fine": jnp.ones(2), "root": jnp.zeros(2)}
    with pytest.raises(ValueError, match="batch 0: root: its gradients are NaN or infinite"):
        evidence.gradients(bad, params, [jnp.ones(2)])


def test_leaves_that_cannot_be_differentiated():
    with pytest.raises(TypeError, match="kernel: complex64"):
        evidence.gradients(lambda p: 0.0, {"kernel": jnp.ones(2, jnp.complex64)}, [()])
    with pytest.raises(ValueError, match="no floating leaf"):
        evidence.gradients(lambda p: 0.0, {"kernel": jnp.ones(2, jnp.int32)}, [()])


# Norms of inputs: each layout against a loop over what its definition multiplies.


def norms_of(apply, params, batches, **options):
    found = evidence.input_norms(apply, params, batches, **options)
    for path, norm in found.items():
        np.broadcast_shapes(norm.shape, tree_lib.flatten(params)[path].shape)
    return found


def images(channels, seed=0):
    return np.random.default_rng(seed).normal(size=(2, 5, 4, channels)).astype(np.float32)


def test_norms_of_dense_layouts():
    x = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
    expected = np.linalg.norm(np.float64(x), axis=0)
    linen = norms_of(lambda p, x: x @ p["k"], {"k": jnp.ones((12, 3))}, [x[:2], x[2:]])
    np.testing.assert_allclose(linen["k"], expected[:, None], rtol=1e-6)
    turned = norms_of(lambda p, x: x @ p["k"].T, {"k": jnp.ones((3, 12))}, [x])
    np.testing.assert_allclose(turned["k"], expected[None], rtol=1e-6)
    heads = {"q": jnp.ones((12, 2, 5)), "out": jnp.ones((3, 4, 7)), "swap": jnp.ones((4, 7, 3))}

    def attend(p, x):
        split = x.reshape(-1, 3, 4)
        q = jnp.einsum("ni,ihk->nhk", x, p["q"])
        return (
            q,
            jnp.einsum("nhk,hko->no", split, p["out"]),
            jnp.einsum("nhk,koh->no", split, p["swap"]),
        )

    found = norms_of(attend, heads, [x])
    np.testing.assert_allclose(found["q"], expected[:, None, None], rtol=1e-6)
    np.testing.assert_allclose(found["out"], expected.reshape(3, 4, 1), rtol=1e-6)
    np.testing.assert_allclose(found["swap"], expected.reshape(3, 4).T[:, None], rtol=1e-6)


def test_norms_of_experts_and_stacked_layers():
    x = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
    experts = norms_of(
        lambda p, x: jnp.einsum("eni,oei->eno", x, p["k"]), {"k": jnp.ones((5, 3, 4))}, [x]
    )
    np.testing.assert_allclose(experts["k"], np.linalg.norm(x, axis=1)[None], rtol=1e-6)
    layers = jax.random.normal(jax.random.key(0), (3, 4, 4))

    def scanned(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["k"])[0]

    found = norms_of(scanned, {"k": layers}, [x[0]])["k"]
    hidden, expected = np.float64(x[0]), []
    for layer in np.float64(layers):
        expected.append(np.linalg.norm(hidden, axis=0)[:, None])
        hidden = np.tanh(hidden @ layer)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_norms_of_a_convolution(groups):
    """Each weight of the kernel, alone: its norm is that of the output that it alone makes."""
    conv = nn.Conv(8, (2, 3), strides=2, feature_group_count=groups, use_bias=False)
    x = images(4)
    params = conv.init(jax.random.key(0), x)
    found = norms_of(conv.apply, params, [x[:1], x[1:]])["params/kernel"]
    kernel = params["params"]["kernel"]
    full = np.broadcast_to(found, kernel.shape)
    alone = jax.jit(
        lambda index: conv.apply(
            {
                "params": {
                    "kernel": jnp.zeros(kernel.shape).ravel().at[index].set(1).reshape(kernel.shape)
                }
            },
            x,
        )
    )
    for index in np.random.default_rng(1).choice(kernel.size, 12, replace=False):
        expected = np.linalg.norm(np.float64(alone(index)))
        np.testing.assert_allclose(full.ravel()[index], expected, rtol=1e-5)


def test_norms_of_vmapped_grouped_convolutions():
    conv = nn.Conv(4, (3,), feature_group_count=2, use_bias=False)
    x = np.random.default_rng(0).normal(size=(3, 2, 6, 4)).astype(np.float32)
    kernels = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
    apply = jax.vmap(lambda p, x: conv.apply({"params": p}, x))
    found = norms_of(apply, {"kernel": kernels}, [x])["kernel"]
    for i in range(3):
        one = norms_of(lambda p, x: conv.apply({"params": p}, x), {"kernel": kernels[i]}, [x[i]])
        np.testing.assert_allclose(
            np.broadcast_to(found[i], (3, 2, 4)),
            np.broadcast_to(one["kernel"], (3, 2, 4)),
            rtol=1e-6,
        )


def test_what_has_no_norms_is_named():
    params = {"table": jnp.ones((5, 3)), "kernel": jnp.ones((3, 2)), "tied": jnp.ones((3, 3))}

    def model(p, ids):
        h = p["table"][ids]
        return jnp.tanh(h @ p["tied"]) @ p["tied"].T @ p["kernel"]

    batches = [np.arange(4)]
    with pytest.raises(ValueError, match="no input norms for table: its rows are looked up"):
        evidence.input_norms(model, params, batches, paths=["table", "kernel"])
    with pytest.raises(ValueError, match="tied#2: used in several ways"):
        evidence.input_norms(model, params, batches, paths="tied")
    with pytest.raises(ValueError, match=r"table: .*; .*tied#2: .*: name the leaves .* paths="):
        evidence.input_norms(model, params, batches)
    assert list(evidence.input_norms(model, params, batches, paths="ker*")) == ["kernel"]
    with pytest.raises(ValueError, match="pattern 'nothing' matches no leaf"):
        evidence.input_norms(model, params, batches, paths="nothing")
