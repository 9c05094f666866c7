"""Both versions of the format: what either writes, and that every bit is covered."""

import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from jxc_forge import assert_same, codebook, quantized, refused

import jaxcomp
from jaxcomp.arrays import CompressedArray
from jaxcomp.checkpoint import coder, container, inspect, load, save

FILES = pathlib.Path(__file__).parent / "files"


def small(rng):
    return {"w": quantized(rng, (8, 9)), "c": codebook(rng, (5, 4), 3), "b": jnp.arange(3.0)}


def test_a_file_of_version_1_loads_bit_for_bit():
    tree = load(FILES / "version1.jxc")
    assert tree.pop("list") == [1, (2.5, None)]
    with np.load(FILES / "version1.npz") as dense:
        assert tree.keys() == set(dense)
        for name in dense:
            found = tree[name]
            found = jaxcomp.decode(found) if isinstance(found, CompressedArray) else found
            np.testing.assert_array_equal(np.asarray(found), dense[name])
    assert inspect(FILES / "version1.jxc").metadata == {"about": "format version 1"}


def test_small_files_have_one_checksum_and_large_ones_many(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a"
    save(path, small(rng))
    assert container.read(path.read_bytes()).version == container.SEALED_WHOLE
    found = inspect(path)
    assert sum(leaf.bytes for leaf in found.leaves) + found.overhead_bytes == os.path.getsize(path)
    for tree in ({"w": np.zeros(2000, np.float32)}, {"w": np.zeros(1 << 18, bool)}):
        save(path, {**small(rng), **tree, "x": [np.ones(900, np.float32)] * 20})
        assert container.read(path.read_bytes()).version == container.SEALED_PARTS
        assert_same(load(path)["b"], jnp.arange(3.0))


def test_every_single_bit_of_a_small_file_is_covered(tmp_path, monkeypatch):
    path = tmp_path / "a"
    save(path, small(np.random.default_rng(0)))
    sound = path.read_bytes()
    assert len(sound) < 400
    monkeypatch.setattr(coder, "decode", lambda *args: pytest.fail("decoded a damaged stream"))
    for at in range(len(sound)):
        for bit in range(8):
            flipped = bytearray(sound)
            flipped[at] ^= 1 << bit
            refused(path, bytes(flipped))
    for length in range(len(sound)):
        refused(path, sound[:length])


def test_a_small_file_may_not_hold_tensors_that_nothing_covers(tmp_path):
    tensor = {"a": np.ones(3, np.float32)}
    manifest = '{"tree":{"a":["tensor","float32",[3]]}}'
    data = b"".join(container.build(manifest, b"", tensor, container.SEALED_WHOLE))
    assert "no checksum covers" in refused(tmp_path / "a", data)
