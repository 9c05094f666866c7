"""Every bit of a file is covered; what is damaged, cut or no file at all is refused."""

import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from jxc_forge import assert_same, codebook, outer, quantized, refused

from jaxcomp.checkpoint import CheckpointError, container, inspect, load, save
from jaxcomp.checkpoint.leaves import KINDS


def test_the_sample_has_everything_and_loads(tmp_path, sound):
    text = container.read(sound).manifest
    for word in (*KINDS, "raw", "tensor", "list", "tuple", "float"):
        assert f'"{word}"' in text
    # Every bit of it is flipped: it must stay small.
    assert len(sound) < 1280
    assert_same(load(tmp_path / "sound.jxc"), load(tmp_path / "sound.jxc"))


def test_every_single_bit_is_covered(tmp_path, sound):
    path, tried = tmp_path / "flipped.jxc", 0
    for at in range(len(sound)):
        for bit in range(8):
            flipped = bytearray(sound)
            flipped[at] ^= 1 << bit
            refused(path, bytes(flipped))
            tried += 1
    assert tried == 8 * len(sound) > 4000


def test_every_truncation_and_many_extensions(tmp_path, sound):
    path = tmp_path / "cut.jxc"
    for length in range(len(sound)):
        refused(path, sound[:length])
    for more in (b"\0", b" ", b"\0" * 8, b"\xff" * 100, sound):
        assert "safetensors" in refused(path, sound + more)
    for at in range(0, len(sound), 3):
        refused(path, sound[:at] + sound[at + 1 :])
        refused(path, sound[:at] + b"\0" + sound[at:])


def test_bursts_and_shuffles(tmp_path, sound):
    rng, path = np.random.default_rng(0), tmp_path / "burst.jxc"
    for _ in range(300):
        damaged = bytearray(sound)
        start, length = int(rng.integers(len(sound))), int(rng.integers(1, 60))
        damaged[start : start + length] = rng.bytes(len(damaged[start : start + length]))
        if rng.random() < 0.3:
            damaged = bytearray(rng.permutation(damaged))
        if bytes(damaged) != sound:
            refused(path, bytes(damaged))


@pytest.mark.parametrize("read", [load, inspect])
def test_files_that_are_none(tmp_path, read):
    path = tmp_path / "none"
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    other = struct.pack("<Q", len(header)) + header + b"x"
    for data in (b"", b"\0", b"x" * 7, b"PK\x03\x04", b"\x80\x04\x95" + b"x" * 100, b"[" * 100_000):
        assert "not a sound safetensors file" in refused(path, data, read)
    assert "without tensor 'jxc'" in refused(path, other, read)


def test_blobs_that_are_none(tmp_path):
    path = tmp_path / "blob"
    assert "not of its kind" in refused(path, outer(b"JXC\x01"))
    assert "not of its kind" in refused(path, outer(b"x" * 16, shape=[4, 4]))
    assert "not of its kind" in refused(path, outer(b"x" * 16, dtype="F32", shape=[4]))
    assert "does not begin with" in refused(path, outer(b"x" * 16))
    assert "checksum" in refused(path, outer(b"JXC\x01" + b"\xff" * 40))


def test_a_newer_format_is_told_from_damage(tmp_path, sound):
    at = sound.index(b"JXC") + 3
    for version in (0, 3, 255):
        changed = sound[:at] + bytes([version]) + sound[at + 1 :]
        assert "newer jaxcomp" in refused(tmp_path / "v", changed)


def test_max_bytes(tmp_path):
    path = tmp_path / "a"
    save(path, {"a": jnp.zeros(1000), "b": quantized(np.random.default_rng(0), (10, 10))})
    need = 4000 + 4 + 100
    assert load(path, max_bytes=need)["a"].shape == (1000,)
    with pytest.raises(CheckpointError, match=f"would take {need} bytes, more than max_bytes"):
        load(path, max_bytes=need - 1)
    with pytest.raises(ValueError, match="negative"):
        load(path, max_bytes=-1)
    with open(path, "ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="much more than max_bytes"):
        load(path, max_bytes=1 << 20)


def test_a_constant_leaf_within_the_limit_loads(tmp_path):
    save(tmp_path / "a", codebook(np.random.default_rng(0), (300, 1000), 1))
    assert os.path.getsize(tmp_path / "a") < 150
    assert load(tmp_path / "a").shape == (300, 1000)
