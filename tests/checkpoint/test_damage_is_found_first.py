"""Damage anywhere is found before anything is decoded, which can take minutes."""

import jax
import jax.numpy as jnp
import pytest

from jaxcomp.checkpoint import CheckpointError, inspect, load, loading, save


@pytest.mark.parametrize("read", [load, inspect])
def test_the_last_part_is_checked_before_the_first_is_decoded(tmp_path, monkeypatch, read):
    path = tmp_path / "model.jxc"
    save(path, {"a": jax.random.normal(jax.random.key(0), (20_000,)), "z": jnp.arange(3.0)})
    data = bytearray(path.read_bytes())
    data[data.rindex(jnp.float32(2.0).tobytes())] ^= 1
    path.write_bytes(bytes(data))
    decoded = []
    monkeypatch.setattr(loading, "read_array", lambda *given: decoded.append(given))
    with pytest.raises(CheckpointError, match="z is damaged: its checksum does not match"):
        read(path)
    assert decoded == []
