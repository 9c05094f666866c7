"""What is saved comes back: structure, names, dtypes and every bit."""

import math
import os
import pathlib
import subprocess
import sys
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from hypothesis import HealthCheck, given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jxc_forge import (
    assert_same,
    assert_same_bits,
    block_sparse,
    codebook,
    grow,
    nm_sparse,
    quantized,
    random_bits,
    sparse,
    trees,
)

import jaxcomp
from jaxcomp.arrays import NMSparseArray
from jaxcomp.checkpoint import inspect, load, raw, save

RNG = np.random.default_rng(0)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.jxc"


def round_trip(file, tree):
    size = save(file, tree)
    assert size == os.path.getsize(file)
    return load(file)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=trees())
def test_any_tree_comes_back_bit_for_bit(file, recipe):
    tree = grow(recipe)
    assert_same(tree, round_trip(file, tree))


@pytest.mark.parametrize("dtype", raw.DTYPES)
def test_every_dtype_and_shape(file, dtype):
    shapes = [(), (0,), (3, 0, 2), (7,), (3, 5, 2), (70, 70)]
    tree = [random_bits(np.random.default_rng(1), dtype, shape) for shape in shapes]
    got = round_trip(file, tree)
    assert all(isinstance(x, jax.Array if raw.in_jax(dtype) else np.ndarray) for x in got)
    assert_same(tree, got)
    if not raw.in_jax(dtype):
        assert all(x.flags.writeable for x in got)


def test_nan_payloads_signed_zeros_and_denormals_survive(file):
    bits = np.array([0x7FC00001, 0x7F800001, 0xFFC12345, 0x80000000, 1, 0x7F800000], np.uint32)
    for array in (bits.view(np.float32), jnp.asarray(bits.view(np.float32))):
        got = np.asarray(round_trip(file, array))
        assert got.view(np.uint32).tolist() == bits.tolist()


def test_64_bit_arrays_come_as_numpy_or_as_jax_with_x64(file):
    tree = {"d": np.array([1e-300]), "i": np.array([2**62]), "c": np.array([1e-300j])}
    got = round_trip(file, tree)
    assert all(type(leaf) is np.ndarray for leaf in got.values())
    assert_same(tree, got)
    got["d"][0] = 1.0
    with jax.enable_x64(True):
        again = load(file)
        assert all(isinstance(leaf, jax.Array) for leaf in again.values())
        for key, leaf in tree.items():
            assert_same_bits(leaf, again[key])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 4])
def test_quantized_leaves(file, bits, group):
    leaf = quantized(RNG, (3, 8), bits, group)
    got = round_trip(file, [leaf])[0]
    assert_same(leaf, got)
    assert_same_bits(leaf.decode(), got.decode())


@pytest.mark.parametrize("clusters", [1, 2, 3, 16, 256, 257, 65536])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codebook_leaves(file, clusters, dtype):
    leaf = codebook(RNG, (4, 9), clusters, dtype)
    assert_same(leaf, round_trip(file, (leaf,))[0])


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_sparse_leaves(file, density):
    leaf = sparse(RNG, (40, 70), density)
    assert_same(leaf, round_trip(file, {"w": leaf})["w"])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (4, 8), (8, 16), (16, 32)])
def test_nm_sparse_leaves(file, n, m):
    """A pattern costs no more bits than its number has, a mask where it has too many."""
    mask = np.argsort(np.argsort(RNG.random((m * 32, 96 // m, m)))) < n
    dense = np.where(mask, RNG.normal(size=mask.shape), 0).reshape(m * 32, 96 // m * m)
    leaf = NMSparseArray.encode(jnp.asarray(dense, jnp.bfloat16), n, m, -1)
    save(file, {"w": leaf})
    assert_same({"w": leaf}, load(file))
    assert_same_bits(leaf.decode(), load(file)["w"].decode())
    (info,) = inspect(file).leaves
    groups, patterns = dense.size // m, math.comb(m, n)
    bits = math.ceil(math.log2(patterns)) if patterns > 6 else math.log2(patterns) + 0.01
    bits = bits if patterns <= 65536 else m
    assert info.bytes <= 2 * groups * n + groups * bits / 8 + 40


def test_block_sparse_leaves(file):
    for grid, block in [((40, 70), (2, 2)), ((3, 4, 5), (4, 1)), ((0, 3), (2,)), ((7,), (1,))]:
        leaf = block_sparse(RNG, grid, block)
        assert_same({"w": leaf}, round_trip(file, {"w": leaf}))
        assert_same_bits(leaf.decode(), load(file)["w"].decode())


def test_large_values_of_a_compressed_leaf_are_a_tensor(file):
    leaf = sparse(RNG, (100, 70), 0.5)
    assert_same({"w": leaf}, round_trip(file, {"w": leaf}))
    from safetensors.numpy import load_file

    assert_same_bits(load_file(file)["w.values"], leaf.values)


@pytest.mark.parametrize(
    "key", ["a/b", "a.b", "", " ", "/", "é", "\U0001f600", "\ud800", "\x00", "list", "jxc",
            "__metadata__", "conv/~/w", 0, -1, 2**70, '"\\']
)  # fmt: skip
@pytest.mark.parametrize("size", [3, 2000])
def test_keys(file, key, size):
    tree = {key: jnp.arange(size, dtype=jnp.float32), "x": {key: np.zeros(size, np.int32)}}
    assert_same(tree, round_trip(file, tree))


def test_paths_that_join_alike_do_not_meet(file):
    big = [np.full(2000, i, np.float32) for i in range(6)]
    tree = {
        "a": {"b": big[0], "b.values": big[1], 0: big[2], "0": big[3]},
        "a/b": big[4],
        "a/b.values": big[5],
    }
    assert_same(tree, round_trip(file, tree))


def test_int_and_string_keys_stay_apart(file):
    tree = {0: jnp.zeros(1), "0": jnp.ones(1), 10: {}, 9: [], "z": ()}
    assert_same(tree, round_trip(file, tree))


@pytest.mark.parametrize(
    "tree", [None, {}, [], (), {"a": None}, [None, (None,)], "s", 1, 0.5, True, [[[]], {}, ({},)]]
)
def test_trees_without_arrays(file, tree):
    assert_same(tree, round_trip(file, tree))


@pytest.mark.parametrize(
    "value",
    [0, -1, 2**63, -(2**63) - 1, 2**1024 - 1, 0.1, -0.0, 5e-324, 1.7976931348623157e308,
     float("inf"), float("-inf"), float("nan"), -float("nan"), True, False, "", "a\ud800", "é"],
)  # fmt: skip
def test_python_scalars_are_exact(file, value):
    assert_same({"v": value}, round_trip(file, {"v": value}))


def test_numpy_scalars_come_back_as_arrays(file):
    got = round_trip(file, {"f": np.float32(0.1), "d": np.float64(0.1), "b": np.bool_(True)})
    assert got["f"].shape == ()
    assert got["f"].dtype == jnp.float32
    assert_same_bits(np.float64(0.1), got["d"])
    assert got["b"].dtype == bool


def test_other_mappings_load_as_dicts(file):
    tree = {"params": {"kernel": jnp.ones((2, 2))}}
    assert_same(tree, round_trip(file, freeze(tree)))
    ordered = OrderedDict(b=OrderedDict(z=1, a=2), a=jnp.ones(1))
    assert_same({"b": {"z": 1, "a": 2}, "a": ordered["a"]}, round_trip(file, ordered))


def test_nnx_state_loads_as_its_pure_dict(file):
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    graph, state = nnx.split(model)
    leaf = codebook(RNG, (3, 4))
    state["layers"][0]["kernel"] = state["layers"][0]["kernel"].replace(leaf)
    got = round_trip(file, state)
    assert_same(nnx.to_pure_dict(state), got)
    assert type(next(iter(got["layers"]))) is int
    x = jnp.ones((1, 3))
    nnx.replace_by_pure_dict(state, got)
    assert_same_bits(nnx.merge(graph, state)(x), nnx.merge(graph, state)(x))
    assert_same(leaf, round_trip(file, {"p": nnx.Param(leaf)})["p"])


def test_a_linen_model_computes_the_same_on_the_loaded_tree(file):
    model = nn.Dense(5)
    x = jnp.asarray(RNG.normal(size=(2, 6)), jnp.float32)
    params = {"params": {"kernel": quantized(RNG), "bias": jnp.ones(5)}}
    got = round_trip(file, params)
    assert_same_bits(model.apply(params, x), model.apply(got, x))
    assert_same_bits(jaxcomp.decode(got)["params"]["kernel"], params["params"]["kernel"].decode())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_are_gathered(file, kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    place = NamedSharding(mesh, PartitionSpec("d"))
    tree = {
        "big": jax.device_put(jnp.arange(8192.0), place),
        "small": jax.device_put(jnp.arange(16, dtype=jnp.int8), place),
        "leaf": jax.device_put(
            codebook(RNG, (8, 4)),
            codebook(RNG, (8, 4)).__class__(place, NamedSharding(mesh, PartitionSpec()), 4,
                                            jnp.dtype("float32")),
        ),
    }  # fmt: skip
    got = round_trip(file, tree)
    on_host = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)
    assert_same({name: on_host[name] for name in tree}, got)


def test_strided_reversed_and_byte_swapped_arrays(file):
    base = np.arange(12000, dtype=np.float32).reshape(100, 120)
    tree = {"t": base.T, "r": base[::-1, ::2], "s": base[:3, :3].T, "f": np.asfortranarray(base)}
    for name, got in round_trip(file, tree).items():
        assert_same_bits(np.ascontiguousarray(tree[name]), got)
    swapped = round_trip(file, {"x": base.astype(">f4"), "y": np.arange(3, dtype=">i2")})
    assert_same_bits(base, swapped["x"])
    assert swapped["y"].tolist() == [0, 1, 2]


def test_the_deepest_tree_and_one_deeper(file):
    def nested(depth):
        tree = jnp.ones(1)
        for i in range(depth):
            tree = [tree] if i % 2 else {"k": tree}
        return tree

    assert_same(nested(64), round_trip(file, nested(64)))
    with pytest.raises(ValueError, match="64 levels"):
        save(file, nested(65))


def test_saving_twice_gives_the_same_bytes(file):
    tree = {"w": quantized(RNG), "b": jnp.ones(3)}
    save(file, tree)
    first = file.read_bytes()
    save(file, load(file))
    assert file.read_bytes() == first


def test_safetensors_reads_what_is_large_and_raw(file):
    from safetensors.numpy import load_file

    tree = {"params": {"Dense_0": {"kernel": jnp.arange(2048.0).reshape(32, 64)}}, "s": np.ones(9)}
    save(file, tree)
    tensors = load_file(file)
    assert sorted(tensors) == ["jxc", "params/Dense_0/kernel"]
    assert_same_bits(tensors["params/Dense_0/kernel"], tree["params"]["Dense_0"]["kernel"])


def test_path_may_be_a_string_or_path_like(tmp_path):
    for path in (str(tmp_path / "a.jxc"), tmp_path / "b.jxc", pathlib.PurePath(tmp_path, "c.jxc")):
        assert save(path, {"a": 1}) > 0
        assert load(path) == {"a": 1}


def test_small_files_carry_little_overhead(file):
    assert save(file, {}) < 100
    tree = {
        "params": {
            f"{kind}_{i}": {
                "kernel": codebook(np.random.default_rng(i), (3 * i + 3, 8), 16),
                "bias": jnp.zeros(8),
            }
            for kind in ("Conv", "Dense")
            for i in range(4)
        }
    }
    save(file, tree)
    found = inspect(file)
    leaves = len(found.leaves)
    checksums = 4 * (3 * leaves // 2)
    assert leaves == 16
    assert found.overhead_bytes + checksums < 150 + 20 * leaves


def test_a_new_process_loads_it_and_imports_no_unpickler(file):
    tree = {
        "w": codebook(RNG, (16, 16), 16),
        "m": sparse(RNG),
        "q": quantized(RNG),
        "n": [nm_sparse(RNG), block_sparse(RNG)],
        "b": np.ones(3),
    }
    save(file, tree)
    script = (
        "import sys, pickle, builtins, marshal\n"
        "def refuse(*args, **kwargs): raise SystemExit('evaluated something')\n"
        "import jaxcomp.checkpoint, safetensors, constriction, numpy as np\n"
        "import jax, jax.numpy as jnp\n"
        "(jax.device_put(np.zeros(3, np.uint8)) + 1).astype(jnp.float32)\n"
        "pickle.load = pickle.loads = pickle.Unpickler = np.load = refuse\n"
        "builtins.eval = marshal.loads = refuse\n"
        "tree = jaxcomp.checkpoint.load(sys.argv[1])\n"
        "import hashlib, jax\n"
        "data = b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))\n"
        "print(hashlib.sha256(data).hexdigest())\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(file)],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    import hashlib

    data = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))
    assert out.stdout.strip() == hashlib.sha256(data).hexdigest()


def test_importing_the_package_does_not_import_the_coder():
    script = (
        "import jaxcomp.checkpoint, sys; print({'constriction', 'safetensors'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert out.stdout.strip() == "set()", out.stderr
