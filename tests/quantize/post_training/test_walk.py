"""The walk that methods after training share: rules, groups along inputs, files, report."""

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

import jaxcomp
from jaxcomp import tree as tree_lib
from jaxcomp.arrays import is_compressed
from jaxcomp.checkpoint import CheckpointError
from jaxcomp.model.trace import trace
from jaxcomp.quantize.affine import encode
from jaxcomp.quantize.checks import traced_format
from jaxcomp.quantize.formats import Format, GridFormat, PerBlock, PerChannel, PerGroup, PerTensor
from jaxcomp.quantize.post_training.round_to_nearest import round_to_nearest
from jaxcomp.quantize.post_training.tasks import plan
from jaxcomp.quantize.post_training.walk import quantize_leaves


def normal(*shape, seed=0):
    return jax.device_put(
        np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)
    )


PARAMS = {"w0": normal(6, 8), "b0": normal(8), "w1": normal(8, 6, seed=1), "w2": normal(6, 3)}
BATCHES = [normal(20, 6), normal(20, 6, seed=1)]
FORMAT = Format(4)


def mlp(p, x):
    return jnp.sin(jax.nn.relu(x @ p["w0"] + p["b0"]) @ p["w1"]) @ p["w2"]


def nearest(task, leaf, moment):
    return encode(leaf, task.format)


def assert_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def rounded():
    return round_to_nearest(mlp, PARAMS, BATCHES, FORMAT)


# What comes out.


def test_every_weight_is_what_encode_makes_of_it(rounded):
    for path in ("w0", "w1", "w2"):
        assert_bits(rounded.params[path], encode(PARAMS[path], FORMAT))
    assert rounded.params["b0"] is PARAMS["b0"]
    without = round_to_nearest(mlp, PARAMS, None, FORMAT)
    assert_bits(without.params, rounded.params)
    assert [np.isnan(leaf.output_error) for leaf in without.leaves] == [True] * 3
    assert "not measured" in str(without)


@pytest.mark.parametrize("sequential", [True, False])
def test_the_report_is_that_of_the_weights_and_the_outputs(sequential, rounded):
    found = rounded
    if not sequential:
        found = round_to_nearest(mlp, PARAMS, BATCHES, FORMAT, sequential=False, at_once=1)
    else:
        found = round_to_nearest(mlp, PARAMS, BATCHES, FORMAT, at_once=1)
    x = np.concatenate(BATCHES).astype(np.float64)
    dense = {path: np.asarray(leaf, np.float64) for path, leaf in PARAMS.items()}
    codes = {p: np.asarray(rounded.params[p], np.float64) for p in ("w0", "w1", "w2")}
    seen = codes if sequential else dense
    inputs = {"w0": x, "w1": np.maximum(x @ seen["w0"] + dense["b0"], 0)}
    inputs["w2"] = np.sin(inputs["w1"] @ seen["w1"])
    assert [leaf.path for leaf in found.leaves] == ["w0", "w1", "w2"]
    for leaf in found.leaves:
        w, q, x = dense[leaf.path], codes[leaf.path], inputs[leaf.path]
        np.testing.assert_allclose(leaf.weight_error, np.sum((w - q) ** 2) / np.sum(w**2), 1e-5)
        output = np.sum((x @ w - x @ q) ** 2) / np.sum((x @ w) ** 2)
        np.testing.assert_allclose(leaf.output_error, output, 1e-4)
        assert leaf.nbytes == found.params[leaf.path].nbytes
        assert leaf.bits == leaf.nbytes * 8 / w.size


def test_the_table(rounded):
    lines = str(rounded).splitlines()
    assert lines[0].split()[:5] == ["leaf", "shape", "form", "bits", "bytes"]
    assert "int4 symmetric, 8 scales" in lines[1]
    size = sum(leaf.nbytes for leaf in rounded.leaves)
    assert lines[-2] == f"total: 114 weights, {size} bytes, {size * 8 / 114:.2f} bits a weight"
    assert lines[-1] == "other leaves: 32 bytes"


def test_later_passes_see_what_earlier_leaves_became():
    met = {}

    def solve(task, leaf, moment):
        met[task.path] = np.asarray(moment)
        return encode(leaf, task.format)

    rules = {"w0": Format(2), "*": FORMAT}
    found = quantize_leaves("test", mlp, PARAMS, BATCHES, rules, solve)
    x = np.concatenate(BATCHES)
    hidden = np.maximum(x @ np.asarray(found.params["w0"]) + np.asarray(PARAMS["b0"]), 0)
    np.testing.assert_allclose(met["w1"], hidden.T @ hidden / len(x), rtol=1e-4, atol=1e-5)
    dense = np.maximum(x @ np.asarray(PARAMS["w0"]) + np.asarray(PARAMS["b0"]), 0)
    assert np.max(np.abs(met["w1"] - dense.T @ dense / len(x))) > 1e-2


def test_a_pass_holds_the_moments_of_its_own_leaf_only():
    held = []

    def batches():
        yield x
        held.append({a.shape for a in jax.live_arrays()} & {(11, 11), (13, 13)})
        yield x

    params, x = {"w0": normal(11, 13), "w1": normal(13, 2)}, normal(20, 11)
    model = lambda p, x: x @ p["w0"] @ p["w1"]
    quantize_leaves("test", model, params, batches, FORMAT, nearest)
    assert held == [{(11, 11)}, {(13, 13)}]


# Rules.


def test_the_first_rule_that_matches_decides():
    rules = {"w1": None, "w[12]": Format(2), "w0": Format(8, symmetric=False)}
    found = round_to_nearest(mlp, PARAMS, BATCHES, rules)
    assert found.params["w1"] is PARAMS["w1"]
    assert [found.params[path].bits for path in ("w0", "w2")] == [8, 2]
    assert [leaf.path for leaf in found.leaves] == ["w0", "w2"]
    only = round_to_nearest(mlp, PARAMS, BATCHES, {"w2": FORMAT})
    assert [path for path, leaf in only.params.items() if is_compressed(leaf)] == ["w2"]


def test_what_is_left_dense_may_be_anything():
    params = PARAMS | {"w1": jnp.full((8, 6), jnp.nan), "spare": normal(3, 3)}
    found = round_to_nearest(mlp, params, None, {"w1": None, "spare": None, "*": FORMAT})
    assert found.params["w1"] is params["w1"]
    model = lambda p, x: x @ p["w0"]
    found = round_to_nearest(model, params, BATCHES, {"w0": FORMAT})
    assert is_compressed(found.params["w0"])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rules": {"w9": FORMAT}}, ValueError, "pattern 'w9' matches no leaf; nearest: w"),
        ({"rules": {"b*": FORMAT}}, ValueError, r"pattern 'b\*' .*not compressed by default \(b0"),
        ({"rules": {}}, ValueError, "rules is empty"),
        ({"rules": {"*": None}}, ValueError, "nothing to quantize"),
        ({"rules": 4}, TypeError, r"rules must be a format, or .*not 4"),
        ({"rules": {"w0": 4}}, TypeError, r"rule 'w0' must be a format or None.*not 4"),
        ({"rules": Format(4, granularity=PerGroup(5))}, ValueError, "w0: groups of 5 .*3 or 6"),
        ({"rules": Format(4, granularity=PerGroup(5, -1))}, ValueError, "w0: groups of 5"),
        ({"at_once": 0}, ValueError, "at_once is 0"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": iter(BATCHES)}, TypeError, "list_iterator can be read only once"),
        ({"batches": BATCHES[0]}, TypeError, "one array"),
        ({"batches": [BATCHES[0].at[0, 0].set(jnp.nan)]}, ValueError, "batch 0: w0 .*NaN"),
        ({"params": PARAMS | {"w1": jnp.full((8, 6), jnp.inf)}}, ValueError, "w1: 48 of 48"),
        ({"params": PARAMS | {"x": normal(2, 2)}}, ValueError, "x: no output depends on it"),
        ({"params": PARAMS | {"f": max}}, TypeError, "f: builtin_function"),
    ],
)
def test_bad_calls(change, error, words):
    call = {"params": PARAMS, "batches": BATCHES, "rules": FORMAT} | change
    params, batches, rules = (call.pop(name) for name in ("params", "batches", "rules"))
    with pytest.raises(error, match=words):
        round_to_nearest(mlp, params, batches, rules, **call)


def test_a_method_that_learns_from_data_says_so():
    with pytest.raises(TypeError, match="batches is None: this method learns from"):
        quantize_leaves("test", mlp, PARAMS, None, FORMAT, nearest)


# Layouts: who shares a scale.


def granularity(model, leaf, format, *inputs):
    (task,) = plan(model, {"w": leaf}, inputs, format).values()
    return task.format.granularity


LAYOUTS = {
    "dense": (lambda p, x: x @ p["w"], (8, 6), (5, 8)),
    "transposed": (lambda p, x: x @ p["w"].T, (6, 8), (5, 8)),
    "heads": (lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]), (2, 4, 3), (5, 2, 4)),
    "query": (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), (8, 2, 3), (5, 8)),
    "hwio": (lambda p, x: conv(x, p["w"], ("NHWC", "HWIO", "NHWC")), (3, 3, 4, 5), (2, 5, 5, 4)),
    "oihw": (lambda p, x: conv(x, p["w"], ("NCHW", "OIHW", "NCHW")), (5, 4, 3, 3), (2, 4, 5, 5)),
    "experts": (lambda p, x: jnp.einsum("bei,eio->beo", x, p["w"]), (2, 8, 3), (5, 2, 8)),
    "stack": (lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0], (3, 4, 4), (5, 4)),
    "lookup": (lambda p, x: jnp.sin(p["w"][x]), (9, 4), None),
}


def conv(x, w, layout):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)


def example(name):
    model, shape, inputs = LAYOUTS[name]
    return model, normal(*shape), jnp.arange(3) if inputs is None else normal(*inputs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_channels_are_those_that_training_takes(name):
    model, leaf, x = example(name)
    found = granularity(model, leaf, Format(4), x)
    traced = traced_format("w", leaf, Format(4), trace(model, {"w": leaf}, x))
    assert found == traced.granularity
    own = Format(4, granularity=PerTensor())
    assert granularity(model, leaf, own, x) == PerTensor()


GROUPS = {
    "dense": (4, PerGroup(4, -2)),
    "transposed": (4, PerGroup(4, -1)),
    "heads": (8, PerBlock((2, 4, 1))),
    "query": (4, PerGroup(4, -3)),
    "hwio": (12, PerBlock((3, 4, 1))),
    "oihw": (2, PerGroup(2, -3)),
    "experts": (4, PerGroup(4, -2)),
    "stack": (2, PerGroup(2, -2)),
    "lookup": (2, PerGroup(2, -1)),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_lie_along_what_is_summed_over(name):
    model, leaf, x = example(name)
    size, expected = GROUPS[name]
    assert granularity(model, leaf, Format(4, granularity=PerGroup(size)), x) == expected
    named = Format(4, granularity=PerGroup(1, -1))
    assert granularity(model, leaf, named, x) == named.granularity


def test_a_group_of_every_input_is_a_channel():
    """By values: all inputs of an output in one group are what PerChannel() shares."""
    for name in ("heads", "hwio", "oihw", "transposed"):
        model, leaf, x = example(name)
        inputs = leaf.size // [leaf.shape[0], leaf.shape[-1]][name in ("heads", "hwio")]
        whole = Format(3, granularity=PerGroup(inputs))
        found = round_to_nearest(model, {"w": leaf}, [x], whole)
        channels = round_to_nearest(model, {"w": leaf}, [x], Format(3))
        np.testing.assert_array_equal(found.params["w"].decode(), channels.params["w"].decode())


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("heads", 3, r"w: groups of 3 do not divide its inputs, of sizes 2 × 4: 2 or 4 would"),
        ("heads", 16, r"w: groups of 16 .*: 8 would, or PerChannel"),
        ("hwio", 8, r"w: groups of 8 .*of sizes 3 × 3 × 4: 4 or 12 would"),
        ("lookup", 3, r"w: groups of 3 .*of sizes 4: 2 or 4 would"),
    ],
)
def test_groups_that_do_not_fit(name, size, words):
    model, leaf, x = example(name)
    with pytest.raises(ValueError, match=words):
        granularity(model, leaf, Format(4, granularity=PerGroup(size)), x)


# Leaves that no product reads, or not only.


def test_what_is_looked_up_or_added_is_rounded_to_nearest():
    params = {"embed": normal(9, 4), "place": normal(3, 4), "head": normal(4, 2)}
    model = lambda p, i: jnp.tanh(p["embed"][i] + p["place"]) @ p["head"]
    met = []

    def solve(task, leaf, moment):
        met.append((task.path, moment is None))
        return encode(leaf, task.format)

    batches = [jnp.array([1, 2, 3])]
    found = quantize_leaves("test", model, params, batches, FORMAT, solve)
    assert met == [("embed", True), ("place", True), ("head", False)]
    forms = {leaf.path: leaf.form for leaf in found.leaves}
    assert forms["embed"] == "int4 symmetric, 4 scales; to nearest: looked up"
    assert forms["place"] == "int4 symmetric, 4 scales; to nearest: no product"
    assert forms["head"] == "int4 symmetric, 2 scales"
    assert np.isnan([leaf.output_error for leaf in found.leaves]).tolist() == [True, True, False]


def test_a_tied_embedding_is_solved_by_its_product():
    params = {"embed": normal(9, 4)}
    model = lambda p, i: jnp.tanh(p["embed"][i]) @ p["embed"].T
    met = []

    def solve(task, leaf, moment):
        met.append(np.asarray(moment))
        return encode(leaf, task.format)

    ids = jnp.array([1, 2, 3, 3])
    found = quantize_leaves("test", model, params, [ids], FORMAT, solve)
    hidden = np.tanh(np.asarray(params["embed"])[np.asarray(ids)])
    np.testing.assert_allclose(met[0], hidden.T @ hidden / 4, rtol=1e-5, atol=1e-6)
    assert found.params["embed"].scale.shape == (9, 1)
    assert found.leaves[0].form.endswith("; also looked up")


def test_products_without_a_matrix_need_a_rule_only_where_data_is_needed():
    params = {"w": normal(4, 4), "v": normal(4, 4)}
    model = lambda p, x: x @ p["w"] @ p["w"].T @ p["v"]
    with pytest.raises(ValueError, match=r"^w: its uses disagree.*rule of None.*round to nearest"):
        quantize_leaves("test", model, params, [normal(3, 4)], FORMAT, nearest)
    rules = {"w": Format(4, granularity=PerTensor()), "v": FORMAT}
    found = round_to_nearest(model, params, [normal(3, 4)], rules)
    assert "to nearest: its uses disagree" in found.leaves[0].form


def test_a_branch_that_is_never_taken_is_named():
    params = {"left": normal(6, 4), "right": normal(6, 4)}
    model = lambda p, x: lax.cond(x[0, 0] > 100, lambda: x @ p["left"], lambda: x @ p["right"])
    with pytest.raises(ValueError, match=r"left: no batch led to.*rule of None"):
        round_to_nearest(model, params, BATCHES, FORMAT)


# Trees.


def test_linen_and_nnx_models_run_on_what_comes_out():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x)).mean((1, 2))
            return nn.Dense(3, param_dtype=jnp.bfloat16, name="head")(x)

    x = normal(2, 5, 5, 3)
    model = Net()
    params = model.init(jax.random.key(0), x)
    found = round_to_nearest(model.apply, params, [x], FORMAT)
    np.testing.assert_array_equal(
        jax.jit(model.apply)(found.params, x),
        jax.jit(model.apply)(jaxcomp.decode(found.params), x),
    )
    assert found.params["params"]["head"]["kernel"].dtype == jnp.bfloat16

    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    apply = lambda state, x: nnx.merge(graph, state)(x)
    found = round_to_nearest(apply, state, BATCHES, GridFormat("nf4", PerGroup(6)))
    kernel = tree_lib.flatten(found.params)["kernel"]
    expected = BATCHES[0] @ kernel.decode() + layer.bias[...]
    np.testing.assert_allclose(apply(found.params, BATCHES[0]), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights_and_batches(kind, rounded, tmp_path):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    params = {
        "w0": jax.device_put(PARAMS["w0"], NamedSharding(mesh, P("d"))),
        "b0": jax.device_put(PARAMS["b0"], NamedSharding(mesh, P("d"))),
    }
    batches = [jax.device_put(x, NamedSharding(mesh, P("d"))) for x in BATCHES]

    def model(p, x):
        if kind == AxisType.Explicit:
            p = {path: jax.sharding.reshard(leaf, P()) for path, leaf in p.items()}
        return jax.nn.relu(x @ p["w0"] + p["b0"])

    with jax.set_mesh(mesh):
        found = round_to_nearest(model, params, batches, FORMAT, directory=tmp_path)
        read = round_to_nearest(model, params, batches, FORMAT, directory=tmp_path)
        assert_bits(found.params["w0"].decode(), rounded.params["w0"].decode())
    for each in (found, read):
        assert_bits(each.params["w0"], rounded.params["w0"])
        assert each.params["w0"].codes.sharding == NamedSharding(mesh, P("d", None))
        # Columns have a scale each, rows none: they lie on every device.
        assert each.params["w0"].scale.sharding.is_fully_replicated
    np.testing.assert_allclose(found.leaves[0].output_error, rounded.leaves[0].output_error, 1e-5)


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


@pytest.mark.parametrize("format", [Format(3, symmetric=False), GridFormat("nf4", PerGroup(2))])
def test_a_killed_walk_goes_on(tmp_path, format):
    where = {"directory": tmp_path / "walk", "at_once": 1}
    whole = round_to_nearest(mlp, PARAMS, BATCHES, format, at_once=1)
    with pytest.raises(Killed):
        round_to_nearest(mlp, PARAMS, killed_after(3), format, **where)
    assert len(os.listdir(tmp_path / "walk")) == 3
    # Two reads are left to do: a look at the shapes, and the last leaf's.
    resumed = round_to_nearest(mlp, PARAMS, killed_after(2), format, **where)
    assert_bits(resumed.params, whole.params)
    assert resumed.leaves == whole.leaves
    again = round_to_nearest(mlp, PARAMS, killed_after(1), format, **where)
    assert_bits(again.params, whole.params)


def test_files_of_other_calls_are_refused(tmp_path):
    round_to_nearest(mlp, PARAMS, BATCHES, FORMAT, directory=tmp_path)
    for change, words in [
        ({"rules": Format(3)}, "another formats: .*bits=4.*now .*bits=3"),
        ({"rules": {"w0": FORMAT}}, "another formats"),
        ({"sequential": False}, "another sequential: True, now False"),
        ({"at_once": 2}, "another at_once: 8, now 2"),
        ({"batches": None}, "another batches: given, now none"),
        ({"params": PARAMS | {"w1": PARAMS["w1"].at[0, 0].add(1)}}, "another params/w1"),
    ]:
        call = {"params": PARAMS, "batches": BATCHES, "rules": FORMAT} | change
        with pytest.raises(ValueError, match=rf"{words}.*pass another directory"):
            round_to_nearest(mlp, directory=tmp_path, **call)


def test_files_that_hold_something_else_are_refused(tmp_path):
    call = {"directory": tmp_path, "at_once": 1}
    round_to_nearest(mlp, PARAMS, BATCHES, FORMAT, **call)
    path = tmp_path / "round_to_nearest-00000.jxc"
    tree = jaxcomp.load(path)
    ((name, leaf, numbers),) = tree["leaves"]
    for parts, words in [
        ((PARAMS["w0"], numbers), "is no compressed leaf"),
        ((encode(PARAMS["w1"], FORMAT), numbers), r"float32 \(8, 6\), not float32 \(6, 8\)"),
        ((encode(PARAMS["w0"], Format(3)), numbers), "is not of Format"),
        ((encode(PARAMS["w0"], Format(4, symmetric=False)), numbers), "is not of Format"),
        ((leaf, numbers[:1]), "are not two numbers"),
        ((leaf, ["a", "b"]), "are not two numbers"),
    ]:
        jaxcomp.save(path, {**tree, "leaves": [[name, *parts]]})
        with pytest.raises(CheckpointError, match=rf"does not fit this call: .*{words}"):
            round_to_nearest(mlp, PARAMS, BATCHES, FORMAT, **call)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        round_to_nearest(mlp, PARAMS, BATCHES, FORMAT, **call)


def test_unmeasured_leaves_survive_a_file(tmp_path):
    found = [
        round_to_nearest(mlp, PARAMS, None, FORMAT, directory=tmp_path).leaves for _ in range(2)
    ]
    assert str(found[0]) == str(found[1])
    assert np.isnan(found[1][0].output_error)


def test_channels_named_by_hand_stay():
    own = Format(4, granularity=PerChannel((0,)))
    found = round_to_nearest(mlp, PARAMS, BATCHES, {"w0": own})
    assert found.params["w0"].scale.shape == (6, 1)
