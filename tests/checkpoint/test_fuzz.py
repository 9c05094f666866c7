"""Fuzzing: any outcome but a tree or CheckpointError fails."""

import copy
import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jxc_forge import Forged, put, seal, sealed, take_apart, with_manifest

from jaxcomp.checkpoint import CheckpointError, inspect, load


def survives(path, data: bytes) -> bool:
    """Whether the file loads; anything but CheckpointError escapes."""
    put(path, data)
    try:
        load(path)
    except CheckpointError:
        return False
    inspect(path)
    return True


POISON = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 3, 255, 256, 65536, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30,
     0.0, 1.5, -0.0, 1e308, "", "raw", "tensor", "list", "dict", "tuple", "float", "quantized",
     "codebook", "sparse", "nm_sparse", "block_sparse", "grid", "rescaled", "rotated",
     "float32", "int4", "bool", "float64", "object", "range", "ans", "packed", "deflate",
     "constant", "\ud800", "x" * 300, [], {}, [[]], [0], [-1], [2**40], [1] * 33,
     [1] * 65, ["raw", "float32", [1]], ["list"], ["dict"], {"": None},
     ["constant", 2, [2**30], 0], ["constant", 2, [10**12], 0], ["raw", "int8", [0]]]
)  # fmt: skip


def places(node, found=None):
    """Every (container, key) of JSON values."""
    found = [] if found is None else found
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in items:
        found.append((node, key))
        if isinstance(child, dict | list):
            places(child, found)
    return found


@st.composite
def mutations(draw):
    """Steps that change JSON values: replace, delete, duplicate, swap, nudge."""
    kind = st.sampled_from(["replace", "delete", "duplicate", "swap", "nudge", "rename"])
    step = st.tuples(kind, st.integers(0, 10**6), st.integers(0, 10**6), POISON)
    return draw(st.lists(step, min_size=1, max_size=3))


def mutate(manifest, steps):
    for kind, where, other, poison in steps:
        all_places = places(manifest)
        if not all_places:
            continue
        node, key = all_places[where % len(all_places)]
        if kind == "delete":
            del node[key]
        elif kind == "duplicate" and isinstance(node, list):
            node.insert(other % (len(node) + 1), copy.deepcopy(node[key]))
        elif kind == "swap":
            there, its = all_places[other % len(all_places)]
            value = copy.deepcopy(there[its])
            there[its] = copy.deepcopy(node[key])
            node[key] = value
        elif kind == "nudge" and type(node[key]) is int:
            node[key] += (1, -1, 8, -8, 1000)[other % 5]
        elif kind == "rename" and isinstance(node, dict):
            node[str(poison)[:20]] = node.pop(key)
        else:
            node[key] = copy.deepcopy(poison)
    return manifest


def fuzz_manifests(tmp_path, examples: int) -> tuple[int, int]:
    """Mutated manifests under right checksums: how many were tried, and how many loaded."""
    base = take_apart(tmp_path / "sound.jxc")
    count = [0, 0]

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(steps=mutations())
    def run(steps):
        text = json.dumps(mutate(copy.deepcopy(base.manifest), steps), allow_nan=True)
        count[0] += 1
        count[1] += survives(tmp_path / "f", seal(text, base.parts, base.tensors))

    run()
    return count[0], count[1]


def fuzz_parts(tmp_path, examples: int, seed: int = 0) -> tuple[int, int]:
    """Mutated parts under right checksums and right sizes."""
    base: Forged = take_apart(tmp_path / "sound.jxc")
    rng, loaded = np.random.default_rng(seed), 0
    for _ in range(examples):
        parts = list(base.parts)
        for _ in range(int(rng.integers(1, 4))):
            which = int(rng.integers(len(parts)))
            payload = bytearray(parts[which][:-4])
            if not payload:
                continue
            if rng.random() < 0.5:
                payload[rng.integers(len(payload))] ^= 1 << int(rng.integers(8))
            else:
                payload[:] = rng.bytes(len(payload))
            parts[which] = sealed(bytes(payload))
        loaded += survives(tmp_path / "f", seal(base.manifest, parts, base.tensors))
    return examples, loaded


def fuzz_bytes(tmp_path, examples: int, seed: int = 0) -> tuple[int, int]:
    """Random bytes, alone, behind a sound beginning, and as manifest under a right checksum."""
    sound, rng, loaded = (tmp_path / "sound.jxc").read_bytes(), np.random.default_rng(seed), 0
    for i in range(examples):
        noise = rng.bytes(int(rng.integers(0, 400)))
        if i % 4 == 1:
            noise = struct.pack("<Q", int(rng.integers(0, 500))) + b"{" + noise
        elif i % 4 == 2:
            noise = sound[: int(rng.integers(len(sound)))] + noise
        elif i % 4 == 3:
            noise = with_manifest(noise, rng.bytes(20))
        loaded += survives(tmp_path / "f", noise)
    return examples, loaded


def test_fuzz(tmp_path, sound):
    manifests = fuzz_manifests(tmp_path, 1000)
    parts = fuzz_parts(tmp_path, 300)
    noise = fuzz_bytes(tmp_path, 2000)
    assert manifests[0] >= 950
    assert parts[0] == 300
    assert noise == (2000, 0)
    # Some changes are harmless, most are not: else the fuzz would not reach the decoders.
    assert 0 < manifests[1] < 0.5 * manifests[0]
    assert parts[1] > 0


@pytest.mark.slow
def test_fuzz_at_length(tmp_path, sound):
    assert fuzz_manifests(tmp_path, 20_000)[0] >= 19_000
    assert fuzz_parts(tmp_path, 10_000, seed=1)[0] == 10_000
    assert fuzz_bytes(tmp_path, 100_000, seed=1) == (100_000, 0)
