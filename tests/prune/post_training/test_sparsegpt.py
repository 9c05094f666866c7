"""SparseGPT over whole models: the right moments reach the right matrices, in the right order."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp import tree as tree_lib
from jaxcomp.checkpoint import CheckpointError
from jaxcomp.prune import scores
from jaxcomp.prune.masks import apply_masks, masks
from jaxcomp.prune.post_training.column_walk import sparsegpt_matrix
from jaxcomp.prune.post_training.sparsegpt import sparsegpt
from jaxcomp.prune.structures import NM, Channel, Element


def normal(*shape, seed=0):
    return jax.device_put(
        np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)
    )


def correlated(samples, features, seed=0):
    mix = normal(features, features, seed=99) / features**0.5
    return normal(samples, features, seed=seed) @ mix


def moment(x):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return jnp.asarray(x.T @ x / len(x), jnp.float32)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)


PARAMS = {"w0": normal(6, 8), "b0": normal(8), "w1": normal(8, 6, seed=1), "w2": normal(6, 3)}
BATCHES = [correlated(20, 6), correlated(20, 6, seed=1)]


def mlp(p, x):
    return jnp.sin(jax.nn.relu(x @ p["w0"] + p["b0"]) @ p["w1"]) @ p["w2"]


@pytest.fixture(scope="module")
def pruned():
    return sparsegpt(mlp, PARAMS, BATCHES, 0.4)


@pytest.mark.parametrize("sequential", [True, False])
def test_each_layer_is_pruned_by_what_it_sees(sequential, pruned):
    found = pruned if sequential else sparsegpt(mlp, PARAMS, BATCHES, 0.4, sequential=False)
    x = jnp.concatenate(BATCHES)
    first = sparsegpt_matrix(PARAMS["w0"], moment(x), 0.4)
    hidden = jax.nn.relu(x @ (first.weight if sequential else PARAMS["w0"]) + PARAMS["b0"])
    second = sparsegpt_matrix(PARAMS["w1"], moment(hidden), 0.4)
    for path, core in (("w0", first), ("w1", second)):
        np.testing.assert_array_equal(found.masks[path], core.mask)
        close(found.params[path], core.weight)
    assert found.params["b0"] is PARAMS["b0"]
    assert list(found.masks) == [leaf.path for leaf in found.leaves] == ["w0", "w1", "w2"]


def test_the_report_is_that_of_the_outputs(pruned):
    report = pruned.leaves[0]
    x = np.concatenate(BATCHES).astype(np.float64)
    out = lambda w: x @ np.asarray(w, np.float64)
    size = np.sum(out(PARAMS["w0"]) ** 2)
    masked = np.where(pruned.masks["w0"], PARAMS["w0"], 0)
    moved = [np.sum((out(PARAMS["w0"]) - out(w)) ** 2) for w in (masked, pruned.params["w0"])]
    np.testing.assert_allclose(report[3:], np.array(moved) / size, rtol=1e-4)
    assert report[:2] == ("w0", (6, 8))
    np.testing.assert_allclose(report.sparsity, 19 / 48)
    lines = str(pruned).splitlines()
    assert lines[1].split()[:5] == ["w0", "(6,", "8)", "39.6%", f"{100 * moved[0] / size:.1f}%"]
    assert len({len(line) for line in lines}) == 1


class Net(nn.Module):
    """A grouped convolution, attention and dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, feature_group_count=2, name="conv")(x))
        x = x.reshape(x.shape[0], -1, 8)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="mix")(nn.LayerNorm()(x))
        return nn.Dense(3, name="head")(x.mean(1))


def test_a_model_with_convolution_and_attention():
    images = lambda seed: correlated(16 * 36, 4, seed).reshape(16, 6, 6, 4)
    model = Net()
    shapes = jax.eval_shape(model.init, jax.random.key(0), images(0))
    params = jax.tree.map(lambda leaf: normal(*leaf.shape) / leaf.shape[0] ** 0.5, shapes)
    structure = {"*/mix/*": NM(2, 4)}
    found = sparsegpt(model.apply, params, [images(0), images(1)], 0.5, structure, at_once=3)
    assert [leaf.path.split("/")[-2] for leaf in found.leaves][-2:] == ["out", "head"]
    assert len(found.leaves) == 6
    for path, mask in found.masks.items():
        leaf = tree_lib.flatten(found.params)[path]
        assert leaf.shape == mask.shape == tree_lib.flatten(params)[path].shape
        assert np.sum(~mask) == mask.size // 2
        assert not np.any(np.where(mask, 0, leaf))
        if "/mix/" in path:
            # Query, key and value contract axis 0; the last kernel (heads, head size) joined.
            axis = 1 if "/out/" in path else 0
            runs = np.moveaxis(np.asarray(mask), axis, -1).reshape(-1, 4)
            assert (runs.sum(1) == 2).all()
    assert all(leaf.error < leaf.masked_error for leaf in found.leaves)
    held = images(7)
    apply = jax.jit(model.apply)
    goal = apply(params, held)
    error = lambda p: float(jnp.mean((apply(p, held) - goal) ** 2))
    selected = tree_lib.select(params)
    plain = masks(jax.tree.map(jnp.abs, selected), 0.5)
    by_magnitude = error(apply_masks(params, plain))
    assert error(found.params) < 0.7 * by_magnitude


def test_stacks_and_experts():
    params = {"stack": normal(3, 4, 4), "experts": normal(4, 2, 4)}

    def model(p, x):
        x = lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, p["stack"])[0]
        return jnp.einsum("bi,ieo->beo", x, p["experts"])

    x = correlated(30, 4)
    found = sparsegpt(model, params, [x], 0.3, Element(), sequential=False, at_once=2)
    hidden = [x]
    for w in params["stack"]:
        hidden.append(jnp.sin(hidden[-1] @ w))
    # 14.4 of 48: 14 of all layers together, 5 of the first (14.4 / 3 = 4.8), 5 and 4.
    assert np.sum(~found.masks["stack"], (1, 2)).tolist() == [5, 5, 4]
    for i in range(3):
        core = sparsegpt_matrix(params["stack"][i], moment(hidden[i]), [0.3, 0.3, 0.25][i])
        np.testing.assert_array_equal(found.masks["stack"][i], core.mask)
        close(found.params["stack"][i], core.weight)
    for i in range(2):
        matrix = params["experts"][:, i]
        share = np.sum(~found.masks["experts"][:, i]) / matrix.size
        core = sparsegpt_matrix(matrix, moment(hidden[3]), float(share))
        np.testing.assert_array_equal(found.masks["experts"][:, i], core.mask)
        close(found.params["experts"][:, i], core.weight)


def test_runs_lie_along_the_input_channels_and_outputs_lose_the_same():
    kernel, x = normal(5, 4, 3, 3), normal(2, 4, 6, 6)  # OIHW
    conv = lambda p, x: lax.conv_general_dilated(x, p["k"], (1, 1), "VALID")
    found = sparsegpt(conv, {"k": kernel}, [x], structure=NM(2, 4))
    assert (np.sum(found.masks["k"], 1) == 2).all()
    assert found.leaves[0].error < 0.7 * found.leaves[0].masked_error
    each = sparsegpt(conv, {"k": kernel}, [x], 0.5, Element(within=0))
    assert (np.sum(each.masks["k"], (1, 2, 3)) == 18).all()
    with pytest.raises(ValueError, match=r"^k: .*not say.*Element\(within=\(0,\)\)"):
        sparsegpt(conv, {"k": kernel}, [x], 0.5, Element(within=-1))


def test_a_pass_holds_the_moments_of_its_own_leaf_only():
    held = []

    def batches():
        yield x
        shapes = {a.shape for a in jax.live_arrays()}
        held.append(shapes & {(11, 11), (13, 13)})
        yield x

    params = {"w0": normal(11, 13), "w1": normal(13, 2)}
    x = normal(20, 11)
    sparsegpt(lambda p, x: x @ p["w0"] @ p["w1"], params, batches, 0.5)
    assert held == [{(11, 11)}, {(13, 13)}]


def test_uses_that_see_different_data_count_by_their_samples():
    """A weight walked by a loop, and by a loop inside that loop: two sets of samples."""

    def model(w, x):
        again = lambda h, w: (jnp.sin(h @ w), None)
        layer = lambda h, w: (lax.scan(again, jnp.cos(h @ w), stack)[0], None)
        stack = w["w"]
        return lax.scan(layer, x, stack)[0]

    params, x = {"w": normal(2, 4, 4)}, correlated(30, 4)
    h, seen = x, [[], []]
    for i, w in enumerate(params["w"]):
        seen[i].append(h)
        h = jnp.cos(h @ w)
        for j, v in enumerate(params["w"]):
            seen[j].append(h)
            h = jnp.sin(h @ v)
    found = sparsegpt(model, params, [x], 0.5)
    for i in range(2):
        core = sparsegpt_matrix(params["w"][i], moment(jnp.concatenate(seen[i])), 0.5)
        np.testing.assert_array_equal(found.masks["w"][i], core.mask)
        close(found.params["w"][i], core.weight)


def test_nnx_and_bfloat16():
    class Layer(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.linear(x)

    graph, state = nnx.split(Layer())
    found = sparsegpt(lambda s, x: nnx.merge(graph, s)(x), state, BATCHES, 0.5)
    assert jax.tree.structure(found.params) == jax.tree.structure(state)
    weight = tree_lib.flatten(found.params)["linear/kernel"]
    assert weight.dtype == jnp.bfloat16
    assert np.sum(~found.masks["linear/kernel"]) == 24
    assert nnx.merge(graph, found.params)(BATCHES[0]).shape == (20, 8)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights_and_batches(kind, pruned):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    params = {
        "w0": jax.device_put(PARAMS["w0"], NamedSharding(mesh, P(None, "d"))),
        "b0": jax.device_put(PARAMS["b0"], NamedSharding(mesh, P("d"))),
    }
    batches = [jax.device_put(x, NamedSharding(mesh, P("d"))) for x in BATCHES]

    def model(p, x):
        if kind == AxisType.Explicit:
            p = {path: jax.sharding.reshard(leaf, P()) for path, leaf in p.items()}
        return jax.nn.relu(x @ p["w0"] + p["b0"])

    with jax.set_mesh(mesh):
        found = sparsegpt(model, params, batches, 0.4)
    np.testing.assert_array_equal(found.masks["w0"], pruned.masks["w0"])
    close(found.params["w0"], pruned.params["w0"])
    assert found.params["w0"].sharding == params["w0"].sharding == found.masks["w0"].sharding


# Killed and started again.


class Killed(Exception):
    pass


def killed_after(passes):
    """Batches that can be read so often, then no more."""
    left = [passes]

    def batches():
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return iter(BATCHES)

    return batches


def assert_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_killed_walk_goes_on(tmp_path, pruned):
    where = tmp_path / "walk"
    with pytest.raises(Killed):
        sparsegpt(mlp, PARAMS, killed_after(3), 0.4, directory=where)
    assert sorted(os.listdir(where)) == [
        "sparsegpt-00000.jxc",
        "sparsegpt-00001.jxc",
        "sparsegpt.jxc",
    ]
    # Two reads are left to do: a look at the shapes, and the last leaf's.
    resumed = sparsegpt(mlp, PARAMS, killed_after(2), 0.4, directory=where)
    assert_bits(resumed.params, pruned.params)
    assert_bits(resumed.masks, pruned.masks)
    assert resumed.leaves == pruned.leaves
    again = sparsegpt(mlp, PARAMS, killed_after(1), 0.4, directory=where)
    assert_bits(again.params, pruned.params)

    call = {"sparsity": 0.4, "directory": where}
    for change, words in [
        ({"sparsity": 0.3}, "another counts and structures"),
        ({"sequential": False}, "another sequential: True, now False"),
        ({"at_once": 2}, "another at_once"),
        ({"damping": 0.1}, "another damping: 0.01, now 0.1"),
        ({"paths": "w1"}, "another counts and structures"),
    ]:
        with pytest.raises(ValueError, match=rf"{words}.*pass another directory"):
            sparsegpt(mlp, PARAMS, BATCHES, **call | change)
    other = PARAMS | {"w1": PARAMS["w1"].at[0, 0].add(1)}
    with pytest.raises(ValueError, match="another params/w1"):
        sparsegpt(mlp, other, BATCHES, **call)

    path = where / "sparsegpt-00001.jxc"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        sparsegpt(mlp, PARAMS, BATCHES, **call)
    os.replace(where / "sparsegpt-00000.jxc", path)
    os.remove(path.with_name("sparsegpt-00002.jxc"))
    with pytest.raises(CheckpointError, match=r"leaves \['w0'\], not \['w1'\]"):
        sparsegpt(mlp, PARAMS, BATCHES, **call)


def test_a_file_of_another_call_is_refused(tmp_path):
    with pytest.raises(Killed):
        sparsegpt(mlp, PARAMS, killed_after(2), 0.4, directory=tmp_path)
    os.remove(tmp_path / "sparsegpt.jxc")
    with pytest.raises(ValueError, match=r"sparsegpt-00000.jxc: written by another call"):
        sparsegpt(mlp, PARAMS, BATCHES, 0.5, directory=tmp_path)


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sparsity": None}, ValueError, "needs a sparsity"),
        ({"sparsity": 1.0}, ValueError, r"\[0, 1\)"),
        ({"sparsity": 0.995}, ValueError, "w0: all 48 weights would be removed"),
        ({"structure": Channel()}, ValueError, r"w0: Channel.*single weights"),
        ({"structure": NM(2, 5), "sparsity": None}, ValueError, "w0: .*divisible by 5"),
        ({"structure": {"w9": NM(2, 4)}}, ValueError, "pattern 'w9' matches no leaf"),
        ({"paths": "w9"}, ValueError, "pattern 'w9' matches no leaf"),
        ({"paths": ["w0", "b0"]}, ValueError, "b0: add contracts nothing.*paths="),
        ({"at_once": 0}, ValueError, "at_once is 0"),
        ({"block_size": 0}, ValueError, "block_size is 0"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": iter(BATCHES)}, TypeError, "list_iterator can be read only once"),
        ({"batches": BATCHES[0]}, TypeError, "one array"),
        ({"batches": [BATCHES[0].at[0, 0].set(jnp.nan)]}, ValueError, "batch 0: w0 .*NaN"),
        ({"params": PARAMS | {"w1": jnp.full((8, 6), jnp.inf)}}, ValueError, "w1: 48 of 48"),
    ],
)
def test_bad_calls(change, error, words):
    call = {"params": PARAMS, "batches": BATCHES, "sparsity": 0.5} | change
    with pytest.raises(error, match=words):
        sparsegpt(mlp, call.pop("params"), call.pop("batches"), **call)


def test_embeddings_are_named():
    params = {"embed": normal(9, 4), "head": normal(4, 9)}
    model = lambda p, i: p["embed"][i] @ p["head"]
    batches = [jnp.arange(9)]
    with pytest.raises(ValueError, match=r"^embed: its rows are looked up by gather.*paths="):
        sparsegpt(model, params, batches, 0.5)
    assert list(sparsegpt(model, params, batches, 0.5, paths="head").masks) == ["head"]


def test_a_branch_that_is_never_taken_is_named():
    params = {"left": normal(6, 4), "right": normal(6, 4)}
    model = lambda p, x: lax.cond(x[0, 0] > 100, lambda: x @ p["left"], lambda: x @ p["right"])
    with pytest.raises(ValueError, match=r"left: no batch led to.*paths="):
        sparsegpt(model, params, BATCHES, 0.5, at_once=2)


def test_magnitude_is_what_no_data_would_tell():
    """White inputs: nothing can be corrected, and the least weights of each block go."""
    x = jnp.sqrt(6.0) * jnp.eye(6)
    found = sparsegpt(lambda p, x: x @ p["w0"], {"w0": PARAMS["w0"]}, [x], 0.5)
    by_magnitude = masks({"w0": scores.magnitude(PARAMS["w0"], None)}, 0.5)["w0"]
    np.testing.assert_array_equal(found.masks["w0"], by_magnitude)
    np.testing.assert_allclose(found.params["w0"], PARAMS["w0"] * by_magnitude, rtol=1e-5)
