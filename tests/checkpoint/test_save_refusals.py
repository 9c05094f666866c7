"""What a file cannot hold is named, with a remedy, before any file is touched."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, struct
from jxc_forge import codebook, quantized

from jaxcomp.arrays import (
    BlockSparseArray,
    CodebookArray,
    CompressedArray,
    NMSparseArray,
    QuantizedArray,
    SparseArray,
)
from jaxcomp.checkpoint import container, load, save
from jaxcomp.checkpoint.leaves import KINDS
from jaxcomp.checkpoint.manifest import check_metadata

Point = collections.namedtuple("Point", "x y")


@struct.dataclass
class Node:
    w: jax.Array


class Other(CodebookArray):
    """A compressed leaf of someone else's."""


def deleted():
    array = jnp.ones(3)
    array.delete()
    return array


RNG = np.random.default_rng(0)
REFUSED = {
    "object array": (np.array([None, 1]), TypeError, "dtype object"),
    "strings": (np.array(["a"]), TypeError, "dtype <U1"),
    "dates": (np.array(["2020"], "M8[Y]"), TypeError, "dtype datetime64"),
    "records": (np.zeros(2, [("a", "f4")]), TypeError, "numeric dtype"),
    "longdouble": (np.zeros(2, np.longdouble), TypeError, "numeric dtype"),
    "float6": (np.zeros(2, "float6_e2m3fn"), TypeError, "numeric dtype"),
    "masked": (np.ma.masked_array([1.0], [True]), TypeError, r"numpy\.asarray"),
    "function": (print, TypeError, "save arrays"),
    "class": (Node, TypeError, "save arrays"),
    "bytes": (b"abc", TypeError, "NumPy array"),
    "complex": (1j, TypeError, "NumPy array"),
    "set": ({1}, TypeError, "save arrays"),
    "named tuple": (Point(jnp.ones(1), 2), TypeError, r"_asdict\(\)"),
    "optax state": (optax.ScaleState(), TypeError, r"_asdict\(\)"),
    "custom node": (Node(jnp.ones(2)), TypeError, "pytree node"),
    "defaultdict": (collections.defaultdict(list), TypeError, "plain Python type"),
    "box": (nn.Partitioned(jnp.ones(2), ("a",)), TypeError, "unbox"),
    "key": (jax.random.key(0), TypeError, "key_data"),
    "shape": (jax.ShapeDtypeStruct((2,), jnp.float32), TypeError, "no values"),
    "deleted": (deleted(), ValueError, "deleted or donated"),
    "int": (2**1024, ValueError, "1024 bits"),
    "other leaf": (
        Other(jnp.zeros((2, 1), jnp.uint8), jnp.ones(2), 4, jnp.dtype("float32")),
        TypeError,
        r"jaxcomp\.decode",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_leaf_that_cannot_be_stored_is_named_before_any_file_is_touched(tmp_path, case):
    value, error, message = REFUSED[case]
    file = tmp_path / "model.jxc"
    tree = {"params": {"fine": jnp.ones(2), "layers": [1, value]}}
    with pytest.raises(error, match=f"params/layers/1.*{message}"):
        save(file, tree)
    assert list(tmp_path.iterdir()) == []
    save(file, {"old": 1})
    with pytest.raises(error, match=message):
        save(file, tree)
    assert load(file) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_the_path_of_a_nested_nnx_key_is_named(tmp_path):
    state = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"rngs/key: a PRNG key.*only the parameters"):
        save(tmp_path / "a", state)


@pytest.mark.parametrize("key", [1.5, None, (1,), b"a", True, np.int64(1), frozenset()])
def test_keys_that_are_no_strings_or_ints(tmp_path, key):
    with pytest.raises(TypeError, match=r"params: key .* must be str or int"):
        save(tmp_path / "a", {"params": {key: jnp.ones(1)}})
    assert list(tmp_path.iterdir()) == []


def test_keys_that_are_too_long_ints(tmp_path):
    with pytest.raises(ValueError, match="1024 bits"):
        save(tmp_path / "a", {2**1024: 1})


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
def test_traced_values(tmp_path, transform):
    def inside(x):
        save(tmp_path / "a", {"params": x})
        return x.sum()

    with pytest.raises(TypeError, match="params: a traced value; call save outside jit"):
        transform(inside)(jnp.ones(2))
    with pytest.raises(TypeError, match="params: a traced value"):
        jax.jit(lambda leaf: inside(leaf))(codebook(RNG))
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_other_processes(tmp_path, monkeypatch):
    array = jnp.ones(2)
    monkeypatch.setattr(type(array), "is_fully_addressable", False)
    with pytest.raises(ValueError, match=r"w: .*process_allgather"):
        save(tmp_path / "a", {"w": array})


def test_a_compressed_leaf_whose_fields_do_not_fit(tmp_path):
    leaf = quantized(RNG)
    broken = {
        "scale": QuantizedArray(leaf.codes, jnp.ones((3, 1)), None, 4, 5, (), leaf.dtype),
        "codebook": CodebookArray(jnp.full((2, 1), 255, jnp.uint8), jnp.ones(3), 2, leaf.dtype),
        "values": SparseArray(jnp.full((2, 1), 255, jnp.uint8), jnp.ones(3), 8),
        "patterns": NMSparseArray(jnp.ones((2, 1)), jnp.zeros((2, 1), jnp.uint8), 2, 4, -2),
        "positions": NMSparseArray(jnp.ones((2, 9)), jnp.zeros((2, 1), jnp.uint8), 2, 4, -2),
        "blocks": BlockSparseArray(jnp.full((2, 1), 255, jnp.uint8), jnp.ones((3, 1)), (1,), 8),
    }
    for name, value in broken.items():
        with pytest.raises(ValueError, match=f"^{name}: "):
            save(tmp_path / "a", {name: value})
    with pytest.raises(TypeError, match="w: ShapeDtypeStruct"):
        save(tmp_path / "a", {"w": jax.eval_shape(lambda: leaf)})
    assert list(tmp_path.iterdir()) == []


def test_64_bit_fields_of_a_compressed_leaf_need_x64(tmp_path):
    with jax.enable_x64(True):
        leaf = CodebookArray.from_indices(jnp.zeros(3, jnp.uint8), jnp.ones(2), jnp.float64)
        assert leaf.codebook.dtype == jnp.float64
        save(tmp_path / "a", leaf)
        assert load(tmp_path / "a").codebook.dtype == jnp.float64
    with pytest.raises(ValueError, match="jax_enable_x64"):
        load(tmp_path / "a")


def test_every_kind_of_compressed_leaf_has_a_name():
    assert set(KINDS.values()) == set(CompressedArray.__subclasses__()) - {Other}
    assert len(set(KINDS)) == len(KINDS)


def test_cycles_end(tmp_path):
    loop: list = []
    loop.append(loop)
    with pytest.raises(ValueError, match="64 levels"):
        save(tmp_path / "a", loop)


METADATA = {
    "accuracy": 0.98,
    "n": 3,
    "none": None,
    "flag": True,
    "é": ["x", {"y": [1, 2.5, -0.0]}],
    "big": 2**900,
}


def test_metadata_comes_back(tmp_path):
    from jaxcomp.checkpoint import inspect

    save(tmp_path / "a", {}, metadata=METADATA)
    assert inspect(tmp_path / "a").metadata == METADATA
    save(tmp_path / "a", {})
    assert inspect(tmp_path / "a").metadata == {}


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"a": {"b": (1,)}}, TypeError, "a/b: tuple"),
        ({"a": float("nan")}, TypeError, "a: float nan"),
        ({"a": np.float64(1)}, TypeError, "a: float64"),
        ({"a": jnp.ones(1)}, TypeError, "a: ArrayImpl"),
        ({"a": 2**1024}, TypeError, "a: int"),
        ({"a": "x" * 2_000_000}, ValueError, "more than 1048576"),
    ],
)
def test_metadata_that_json_cannot_say(tmp_path, metadata, error, message):
    with pytest.raises(error, match=message):
        save(tmp_path / "a", {}, metadata=metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "message"), [([1], "must be a dict, not list"), ({1: 2}, "is not JSON")]
)
def test_metadata_that_is_no_dict_with_names(metadata, message):
    with pytest.raises(TypeError, match=message):
        check_metadata(metadata)


def test_metadata_that_is_too_deep(tmp_path):
    deep: list = []
    for _ in range(70):
        deep = [deep]
    with pytest.raises(ValueError, match="64 levels"):
        save(tmp_path / "a", {}, metadata={"a": deep})


def test_a_structure_that_is_too_large_is_refused(tmp_path, monkeypatch):
    assert container.MANIFEST_LIMIT == 8 << 20
    monkeypatch.setattr(container, "MANIFEST_LIMIT", 1000)
    with pytest.raises(ValueError, match=r"structure takes .* stack layers"):
        save(tmp_path / "a", [""] * 400)
    assert list(tmp_path.iterdir()) == []
