"""Bias correction: means restored, behind which products, and what is said of the rest."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import decode, is_compressed
from jaxcomp.checkpoint import CheckpointError
from jaxcomp.model.program import read
from jaxcomp.quantize import Format, PerTensor, encode
from jaxcomp.quantize.post_training.bias_correction import correct_bias
from jaxcomp.quantize.post_training.bias_places import bias_places


def normal(*shape, seed=0, mean=0.0):
    values = np.random.default_rng((seed, *shape)).normal(mean, size=shape)
    return jax.device_put(values.astype(np.float32))


def rounded(params, paths, bits=3):
    leaves = tree_lib.flatten(params)
    news = {path: encode(leaves[path], Format(bits)) for path in paths}
    return tree_lib.replace(params, tree_lib.Leaves(news))


def wide(x):
    return np.asarray(x, np.float64)


def mlp(p, x):
    return jax.nn.relu(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]


PARAMS = {"w0": normal(6, 8), "b0": normal(8), "w1": normal(8, 3, seed=1), "b1": normal(3)}
QUANTIZED = rounded(PARAMS, ["w0", "w1"])
BATCHES = [normal(20, 6, mean=1.0), normal(7, 6, seed=1, mean=-0.5)]


@pytest.fixture(scope="module")
def corrected():
    return correct_bias(mlp, PARAMS, QUANTIZED, BATCHES)


def test_every_bias_takes_the_shift_that_earlier_ones_leave(corrected):
    x = wide(np.concatenate(BATCHES))
    old, new = jax.tree.map(wide, PARAMS), jax.tree.map(wide, decode(QUANTIZED))
    b0 = old["b0"] + x.mean(0) @ (old["w0"] - new["w0"])
    np.testing.assert_allclose(corrected.params["b0"], b0, rtol=1e-4, atol=1e-5)
    hidden = np.maximum(x @ old["w0"] + old["b0"], 0)
    seen = np.maximum(x @ new["w0"] + b0, 0)
    b1 = old["b1"] + (hidden @ old["w1"]).mean(0) - (seen @ new["w1"]).mean(0)
    np.testing.assert_allclose(corrected.params["b1"], b1, rtol=1e-4, atol=1e-5)
    for path in ("w0", "w1"):
        assert corrected.params[path] is QUANTIZED[path]
    assert corrected.uncorrected == {}


def test_means_of_the_outputs_come_back(corrected):
    x = jnp.concatenate(BATCHES)
    means = [wide(mlp(decode(p), x)).mean(0) for p in (PARAMS, QUANTIZED, corrected.params)]
    np.testing.assert_allclose(means[2], means[0], atol=1e-5)
    assert np.abs(means[1] - means[0]).max() > 0.05


def test_the_report_is_that_of_the_shifts(corrected):
    assert [leaf.path for leaf in corrected.leaves] == ["b0", "b1"]
    first = corrected.leaves[0]
    x = wide(np.concatenate(BATCHES))
    shift = x.mean(0) @ (wide(PARAMS["w0"]) - wide(QUANTIZED["w0"].decode()))
    size = np.mean((x @ wide(PARAMS["w0"])) ** 2)
    np.testing.assert_allclose(first.before, np.sqrt(np.mean(shift**2) / size), rtol=1e-4)
    assert all(leaf.after < 1e-5 for leaf in corrected.leaves)
    assert first.weights == ("w0",)
    lines = str(corrected).splitlines()
    assert lines[0].split() == ["bias", "weights", "shift", "before", "after"]
    assert lines[1].split() == ["b0", "w0", f"{100 * first.before:.1f}%", "0.0%"]


def test_all_at_once_is_another_pass_and_leaves_more(corrected):
    together = correct_bias(mlp, PARAMS, QUANTIZED, BATCHES, at_once=2)
    np.testing.assert_array_equal(together.params["b0"], corrected.params["b0"])
    assert together.leaves[1].after > 10 * corrected.leaves[1].after


def test_a_linear_model_is_exact_in_one_pass():
    def linear(p, x):
        return x @ p["w0"] + p["b0"]

    params = {key: PARAMS[key] for key in ("w0", "b0")}
    found = correct_bias(linear, params, rounded(params, ["w0"]), BATCHES)
    x = jnp.concatenate(BATCHES)
    means = [wide(linear(decode(p), x)).mean(0) for p in (params, found.params)]
    np.testing.assert_allclose(*means, atol=1e-6)


def test_what_was_not_changed_is_not_moved():
    exact = {**PARAMS, "w0": jnp.round(PARAMS["w0"] * 2).at[0].set(7.0)}
    found = correct_bias(mlp, exact, rounded(exact, ["w0"], bits=4), BATCHES)
    np.testing.assert_array_equal(found.params["b0"], exact["b0"])
    assert found.params["b1"] is exact["b1"]


class Vision(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=2)(x))
        x = nn.LayerNorm()(nn.Dense(4, use_bias=False)(x))
        x = x.reshape(*x.shape[:1], -1, 4)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
        return nn.Dense(3)(x.mean(1))


def test_linen_layers_and_what_has_no_bias():
    x = normal(3, 4, 4, 2, mean=0.5)
    variables = jax.jit(Vision().init)(jax.random.key(0), x)
    stats = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])

    def model(params, x):
        return Vision().apply({"params": params, "batch_stats": stats}, x)

    params = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])
    kernels = [path for path in tree_lib.flatten(params) if path.endswith("kernel")]
    quantized = rounded(params, kernels)
    found = correct_bias(model, params, quantized, [x])
    assert found.uncorrected == {
        "Dense_0/kernel": "no bias behind it: its outputs go to 3 operations"
    }
    pairs = {leaf.weights[0]: leaf.path for leaf in found.leaves}
    assert pairs["Conv_0/kernel"] == "BatchNorm_0/bias"
    assert pairs["Conv_1/kernel"] == "Conv_1/bias"
    assert len(pairs) == 7
    assert all(leaf.after < 1e-4 < leaf.before for leaf in found.leaves)
    old, new = (
        Vision().apply({"params": p, "batch_stats": stats}, x)
        for p in (params, decode(found.params))
    )
    np.testing.assert_allclose(old.mean(0), new.mean(0), atol=1e-4)
    assert "not corrected: Dense_0/kernel: no bias behind it" in str(found)


def test_nnx_and_scanned_layers():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.linear(x))

    @nnx.vmap(in_axes=0)
    def stack(key):
        return Block(nnx.Rngs(key))

    blocks = stack(jax.random.split(jax.random.key(0), 3))
    graph, state = nnx.split(blocks)
    state = jax.tree.map(lambda leaf: leaf + 0.1, state)

    def model(state, x):
        def turn(x, layer):
            return nnx.merge(graph, layer)(x), None

        return jax.lax.scan(turn, x, state)[0]

    kernel = next(path for path in tree_lib.flatten(state) if "kernel" in path)
    quantized = rounded(state, [kernel])
    x = normal(9, 4, mean=0.5)
    found = correct_bias(model, state, quantized, [x])
    (leaf,) = found.leaves
    assert leaf.path == "linear/bias" or leaf.path.startswith("linear/bias")
    old, now = tree_lib.flatten(state), tree_lib.flatten(decode(quantized))
    hidden, seen, expected = wide(x), wide(x), []
    for i in range(3):
        w, v, b = wide(old[kernel][i]), wide(now[kernel][i]), wide(old[leaf.path][i])
        expected.append(b + (hidden @ w).mean(0) - (seen @ v).mean(0))
        hidden, seen = np.maximum(hidden @ w + b, 0), np.maximum(seen @ v + b, 0)
    new = tree_lib.flatten(found.params)[leaf.path]
    np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-5)


def places_of(model, params, *inputs, weights=("w",)):
    return bias_places(read(model, params, *inputs), list(weights))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda p, x: jnp.sin(x @ p["w"]) + p["b"], "go to sin first"),
        (lambda p, x: (x @ p["w"]) * x.sum() + p["b"], "go to mul first"),
        (lambda p, x: x @ p["w"] + jnp.exp(p["b"]), "goes through exp"),
        (lambda p, x: (x @ p["w"] + p["b"]) * p["b"], "also used by mul"),
        (lambda p, x: p["b"] + (y := x @ p["w"]) + y, "go to 2 operations"),
        (lambda p, x: x @ p["w"] + jnp.tile(p["b"][:2], 2), "its bias b"),
        (lambda p, x: x.sum() * p["b"] + jnp.cos(p["w"]), "no product reads it"),
        (lambda p, x: 1 / (x @ p["w"]) + p["b"], "go to div first"),
    ],
)
def test_why_a_weight_has_no_bias(model, reason):
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    places, _, without = places_of(model, params, jnp.ones((4, 4)))
    assert not places
    assert reason in without["w"]


@pytest.mark.parametrize(
    "model",
    [
        lambda p, x: p["b"] + x @ p["w"],
        lambda p, x: (x @ p["w"]).astype(jnp.bfloat16) + p["b"].astype(jnp.bfloat16),
        lambda p, x: ((x @ p["w"]) - p["w"][0]) / jnp.exp(p["w"][1]) + p["b"],
        lambda p, x: (x @ p["w"] + x) + p["b"],
        lambda p, x: (x @ p["w"]).T.reshape(2, 2, -1) + p["b"].reshape(2, 2, 1),
    ],
)
def test_a_bias_is_found_behind_what_keeps_a_shift(model):
    params = {"w": normal(4, 4), "b": jnp.ones(4)}
    x = normal(4, 4, mean=1)
    places, weights, _ = places_of(model, params, x)
    assert weights == {"b": ("w",)}
    (place,) = places["b"]
    outputs = normal(*place.op.inputs[place.operand].shape)
    entries = place.entries(outputs)
    assert entries.shape == (4,)
    # By a probe: which outputs does each entry of the bias reach?
    reach = jax.jacobian(lambda b: model({**params, "b": b}, x).astype(jnp.float32))(params["b"])
    reach = wide(reach).reshape(outputs.size, 4)
    expected = wide(outputs).ravel() @ reach / reach.sum(0)
    np.testing.assert_allclose(entries, expected, rtol=1e-2, atol=1e-3)


def test_it_goes_on_where_it_was_broken_off(tmp_path, corrected):
    calls = []

    def batches():
        calls.append(len(calls))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return BATCHES

    # peek, dense, before, then one pass for each bias after the first.
    with pytest.raises(KeyboardInterrupt):
        correct_bias(mlp, PARAMS, QUANTIZED, batches, directory=tmp_path)
    calls[:] = [0] * 5
    found = correct_bias(mlp, PARAMS, QUANTIZED, batches, directory=tmp_path)
    for path in ("b0", "b1"):
        np.testing.assert_array_equal(found.params[path], corrected.params[path])
    with pytest.raises(ValueError, match="another at_once"):
        correct_bias(mlp, PARAMS, QUANTIZED, BATCHES, directory=tmp_path, at_once=2)
    file = sorted(tmp_path.glob("bias_correction-*.jxc"))[0]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        correct_bias(mlp, PARAMS, QUANTIZED, BATCHES, directory=tmp_path)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches_give_the_same(kind, corrected):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    x = jnp.concatenate(BATCHES)[:24]
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    everywhere = lambda tree: jax.tree.map(lambda leaf: place(leaf, P()), tree)
    found = correct_bias(
        mlp, everywhere(PARAMS), everywhere(QUANTIZED), [place(x, P("data"))], at_once=2
    )
    expected = correct_bias(mlp, PARAMS, QUANTIZED, [x], at_once=2)
    for path in ("b0", "b1"):
        np.testing.assert_allclose(found.params[path], expected.params[path], rtol=1e-5, atol=1e-6)


def test_biases_of_half_precision_keep_their_dtype():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    found = correct_bias(mlp, half, rounded(half, ["w0"]), [BATCHES[0].astype(jnp.bfloat16)])
    assert found.params["b0"].dtype == jnp.bfloat16
    assert is_compressed(found.params["w0"])


def test_what_cannot_be_corrected_is_refused():
    with pytest.raises(ValueError, match="no compressed leaf"):
        correct_bias(mlp, PARAMS, PARAMS, BATCHES)
    with pytest.raises(ValueError, match="hold other leaves: b1"):
        correct_bias(mlp, PARAMS, {k: v for k, v in QUANTIZED.items() if k != "b1"}, BATCHES)
    with pytest.raises(ValueError, match="b1: float32"):
        correct_bias(mlp, PARAMS, {**QUANTIZED, "b1": jnp.ones(4)}, BATCHES)
    w = {"w": PARAMS["w0"]}
    with pytest.raises(ValueError, match="w: no bias behind it"):
        correct_bias(lambda p, x: x @ p["w"], w, rounded(w, ["w"]), BATCHES)
    with pytest.raises(ValueError, match="b0: added to NaN or infinite"):
        correct_bias(mlp, PARAMS, QUANTIZED, [jnp.full((2, 6), jnp.nan)])
    with pytest.raises(ValueError, match="batches is empty"):
        correct_bias(mlp, PARAMS, QUANTIZED, [])
    with pytest.raises(TypeError, match="only once"):
        correct_bias(mlp, PARAMS, QUANTIZED, iter(BATCHES))
    boxed = {**QUANTIZED, "b0": encode(PARAMS["b0"], Format(8, granularity=PerTensor()))}
    found = correct_bias(mlp, PARAMS, boxed, BATCHES[:1])
    assert "its bias b0 is compressed" in found.uncorrected["w0"]
    assert [leaf.path for leaf in found.leaves] == ["b1"]
