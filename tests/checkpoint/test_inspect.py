"""What inspect says of a file is what the file holds."""

import dataclasses
import os

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from jxc_forge import (
    Recipe,
    block_sparse,
    codebook,
    grow,
    nm_sparse,
    quantized,
    recipes,
    sparse,
)

from jaxcomp.arrays import BlockSparseArray, CompressedArray, SparseArray
from jaxcomp.checkpoint import CheckpointError, inspect, raw, save

RNG = np.random.default_rng(0)


def test_the_figures_of_a_model(tmp_path):
    file = tmp_path / "model.jxc"
    kernel = SparseArray.encode(jnp.asarray([[0.0, 1.0, 0.0, 2.0]] * 100))
    tree = {
        "params": {
            "Dense_0": {"kernel": kernel, "bias": jnp.zeros(4, jnp.bfloat16)},
            "big": np.ones((50, 50), np.float64),
            "steps": 7,
        }
    }
    size = save(file, tree, metadata={"accuracy": 0.5})
    found = inspect(file)
    assert found.path == str(file)
    assert found.version == 1
    assert found.metadata == {"accuracy": 0.5}
    assert found.file_bytes == size == os.path.getsize(file)
    assert found.overhead_bytes + sum(leaf.bytes for leaf in found.leaves) == size
    sparse_leaf, bias, big = found.leaves
    assert sparse_leaf.path == "params/Dense_0/kernel"
    assert sparse_leaf.form == "50.0% sparse"
    assert sparse_leaf.shape == (100, 4)
    assert sparse_leaf.parameters == 400
    assert sparse_leaf.sparsity == 0.5
    assert sparse_leaf.bytes >= 200 * 4 + 4
    assert sparse_leaf.bits_per_weight == 8 * sparse_leaf.bytes / 400
    assert bias == type(bias)(
        "params/Dense_0/bias", "dense", (4,), "bfloat16", 4, 4 * 2 + 4, 24.0, 1.0
    )
    assert (big.dtype, big.bytes, big.sparsity) == ("float64", 2500 * 8 + 4, 0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.version = 2


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=recipes())
def test_sparsity_and_sizes_by_the_definition(tmp_path, recipe: Recipe):
    leaf = grow(recipe)
    file = tmp_path / "leaf.jxc"
    size = save(file, {"x": leaf})
    found = inspect(file)
    (info,) = found.leaves
    dense = np.asarray(leaf.decode() if isinstance(leaf, CompressedArray) else leaf)
    assert info.shape == dense.shape
    assert info.dtype == dense.dtype.name
    assert info.parameters == dense.size
    assert info.bytes + found.overhead_bytes == size
    if dense.dtype.name == "float8_e8m0fnu":  # has no zero
        expected = 0.0
    else:
        zero = np.zeros((), dense.dtype)
        expected = float(np.mean(dense == zero)) if dense.size else 0.0
    assert info.sparsity == pytest.approx(expected)
    if not dense.size:
        assert info.bits_per_weight == 0.0


@pytest.mark.parametrize("dtype", raw.DTYPES)
def test_sparsity_of_every_dtype(tmp_path, dtype):
    array = np.arange(8).astype(jnp.dtype(dtype)) if dtype != "float8_e8m0fnu" else None
    if array is None:
        array = np.ones(8, jnp.dtype(dtype))
    save(tmp_path / "a", array)
    expected = np.mean([complex(x) == 0 for x in array.astype(np.complex64)])
    assert inspect(tmp_path / "a").leaves[0].sparsity == expected


def test_forms(tmp_path):
    tree = {"c": codebook(RNG), "q": quantized(RNG, (4, 8), group=4), "s": sparse(RNG)}
    tree |= {"n": nm_sparse(RNG), "b": block_sparse(RNG)}
    save(tmp_path / "a", tree)
    forms = [leaf.form for leaf in inspect(tmp_path / "a").leaves]
    assert forms == [leaf.form() for leaf in tree.values()]


def test_a_root_leaf_and_no_leaf(tmp_path):
    save(tmp_path / "a", jnp.ones(2))
    assert [leaf.path for leaf in inspect(tmp_path / "a").leaves] == ["the tree itself"]
    save(tmp_path / "a", {"x": 1, "y": None})
    assert inspect(tmp_path / "a").leaves == ()


def test_limits_and_errors_are_those_of_load(tmp_path):
    file = tmp_path / "a"
    save(file, quantized(RNG, (10, 10)))
    with pytest.raises(CheckpointError, match=r"dense array would take 400 bytes.*200"):
        inspect(file, max_bytes=200)
    assert inspect(file, max_bytes=400).leaves[0].parameters == 100
    # Removed blocks take no bytes of the file, but as many as any of the dense array.
    save(tmp_path / "b", BlockSparseArray.encode(jnp.zeros((64, 64)), (32, 32)))
    with pytest.raises(CheckpointError, match=r"dense array would take 16384 bytes.*2000"):
        inspect(tmp_path / "b", max_bytes=2000)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=str(file)):
        inspect(file)
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "missing")
