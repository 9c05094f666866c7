"""Files that are damaged, or that lie under right checksums, give CheckpointError and no more."""

import copy
import json
import os
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jxc_forge import Forged, assert_same, codebook, quantized, seal, sealed, sparse, take_apart

from jaxcomp.checkpoint import CheckpointError, container, inspect, leaves, load, save

ONE = np.float32(1).tobytes()
RAW = ["raw", "float32", [1]]


def sample(tmp_path) -> bytes:
    """A file with every kind of leaf, of codec, of container, and an ordinary tensor."""
    rng = np.random.default_rng(0)
    tree = {
        "q": quantized(rng, (8, 9)),
        "c": [codebook(rng, (5, 4), 3), (sparse(rng, (6, 6)), None)],
        "b": jnp.arange(3, dtype=jnp.bfloat16),
        "flags": np.array([True, False]),
        "big": np.arange(12, dtype=np.int16),
        7: {"f": float("nan"), "s": "x"},
    }
    save(tmp_path / "sound.jxc", tree, metadata={"accuracy": 0.5})
    return (tmp_path / "sound.jxc").read_bytes()


@pytest.fixture
def small_tensors(monkeypatch):
    monkeypatch.setattr(leaves, "TENSOR_BYTES", 20)


@pytest.fixture
def sound(tmp_path, small_tensors):
    return sample(tmp_path)


def put(path, data: bytes) -> None:
    """Overwrite in place: opening thousands of new files takes longer than loading them."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(handle, data, 0)
    os.ftruncate(handle, len(data))
    os.close(handle)


def refused(path, data: bytes, read=load) -> str:
    put(path, data)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_sample_has_everything_and_loads(tmp_path, sound):
    text = container.read(sound).manifest
    for word in ("quantized", "codebook", "sparse", "raw", "tensor", "list", "tuple", "float"):
        assert f'"{word}"' in text
    assert len(sound) < 800
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


def outer(blob: bytes, dtype: str = "U8", shape: list | None = None) -> bytes:
    shape = [len(blob)] if shape is None else shape
    head = {"jxc": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(blob)]}}
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + blob


def test_blobs_that_are_none(tmp_path):
    path = tmp_path / "blob"
    assert "not of its kind" in refused(path, outer(b"JXC\x01"))
    assert "not of its kind" in refused(path, outer(b"x" * 16, shape=[4, 4]))
    assert "not of its kind" in refused(path, outer(b"x" * 16, dtype="F32", shape=[4]))
    assert "does not begin with" in refused(path, outer(b"x" * 16))
    assert "checksum" in refused(path, outer(b"JXC\x01" + b"\xff" * 40))


def test_a_newer_format_is_told_from_damage(tmp_path, sound):
    at = sound.index(b"JXC") + 3
    for version in (0, 2, 255):
        changed = sound[:at] + bytes([version]) + sound[at + 1 :]
        assert "newer jaxcomp" in refused(tmp_path / "v", changed)


def forged(path, tree, *parts: bytes, tensors=None, **rest) -> str:
    data = seal({"tree": tree, **rest}, [sealed(part) for part in parts], tensors)
    message = refused(path, data)
    refused(path, data, inspect)
    return message


def q(**changes):
    """A sound quantized leaf of four codes, changed."""
    entry = {
        "kind": "quantized",
        "static": {"bits": 4, "group": None, "dtype": "float32"},
        "arrays": {"scale": RAW},
        "symbols": {"codes": ["packed", 16, [4], 2]},
    }
    return list({**entry, **changes}.values())


def test_the_forger_can_make_a_sound_file(tmp_path):
    (tmp_path / "a").write_bytes(seal({"tree": q()}, [sealed(ONE), sealed(b"\x21\x43")]))
    assert load(tmp_path / "a").decode().tolist() == [-7.0, -6.0, -5.0, -4.0]


HUGE = 2**62
LIES = [
    # shapes
    (["raw", "float32", [10**12]], "max_bytes"),
    (["raw", "float32", [10**9, 10**9]], "max_bytes|impossible"),
    (["raw", "float32", [2**40, 2**40, 0]], "impossible"),
    (["raw", "float32", [2**40, 2**40]], "impossible"),
    (["raw", "float32", [-1]], "natural number"),
    (["raw", "float32", [-1, -1]], "natural number"),
    (["raw", "float32", [True]], "natural number"),
    (["raw", "float32", [1.0]], "natural number"),
    (["raw", "float32", ["1"]], "natural number"),
    (["raw", "float32", [None]], "natural number"),
    (["raw", "float32", [[1]]], "natural number"),
    (["raw", "float32", 1], "no shape"),
    (["raw", "float32", None], "no shape"),
    (["raw", "float32", {"0": 1}], "no shape"),
    (["raw", "float32", "11"], "no shape"),
    (["raw", "float32", [1] * 65], "no shape"),
    (["raw", "float32", [2]], "the parts take 12 bytes"),
    (["raw", "float32", [0]], "the parts take 0 bytes"),
    # dtypes
    (["raw", "object", [1]], "unknown dtype"),
    (["raw", "O", [1]], "unknown dtype"),
    (["raw", "float31", [1]], "unknown dtype"),
    (["raw", "str", [1]], "unknown dtype"),
    (["raw", 4, [1]], "unknown dtype"),
    (["raw", None, [1]], "unknown dtype"),
    (["raw", ["float32"], [1]], "unknown dtype"),
    # entries
    (["raw"], "not the entry"),
    (["raw", "float32"], "not the entry"),
    (["raw", "float32", [1], 0], "not the entry"),
    (["tensor", "float32", [1]], "missing"),
    (["tensor", "int4", [1]], "never stored as a tensor"),
    (["pickle", "float32", [1]], "kind 'pickle'.*newer jaxcomp"),
    (["lowrank", {}, {}, {}], "kind 'lowrank'.*newer jaxcomp"),
    ([], "without a kind"),
    ([1], "without a kind"),
    ([None, "raw"], "without a kind"),
    ([["raw", "float32", [1]]], "without a kind"),
    ({"a": []}, "a: .*without a kind"),
    ([RAW], "without a kind"),
    (["list", RAW, RAW], "the parts take 16 bytes"),
    (["dict", "a"], "keys and values"),
    (["dict", None, 1], "keys and values"),
    (["dict", 1.5, 1], "keys and values"),
    (["dict", True, 1], "keys and values"),
    (["dict", ["x"], 1], "keys and values"),
    (["dict", "a", RAW, "a", 1], "twice"),
    (["dict", 1, RAW, 1, 1], "twice"),
    (["float", "7ff8"], "bytes of a float"),
    (["float", 1], "bytes of a float"),
    (["float"], "bytes of a float"),
    (["float", "7ff800000000000 "], "bytes of a float"),
    (["float", "7FF8000000000000"], "bytes of a float"),
    (2**1025, "1024 bits"),
    # compressed leaves
    (["quantized"], "entry of a compressed leaf"),
    (["quantized", {}, {}], "entry of a compressed leaf"),
    (["quantized", [], {}, {}], "entry of a compressed leaf"),
    (["quantized", {}, [], {}], "entry of a compressed leaf"),
    (["quantized", {}, {"scale": ["raw", "float32", [1]]}, {}], "do not make a quantized leaf"),
    (["codebook", {}, {"scale": ["raw", "float32", [1]]}, {}], "do not make a codebook leaf"),
    (["sparse", {}, {"values": ["raw", "float32", [1]]}, {}], "do not make a sparse leaf"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", 2, [10**12], 0]}], "max_bytes"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", 2, [2**31], 0]}], "max_bytes"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", 2, [0, 2**50], 0]}], "not make"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", 2, [], 0]}], "not make a sparse"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", 3, [2], 0]}], "not make a sparse"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", True, [2], 0]}], "size of an alphabet"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", 0, [2], 0]}], "size of an alphabet"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", 65537, [2], 0]}], "size of an alphabet"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", 2.0, [2], 0]}], "size of an alphabet"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", 2, [2], -1]}], "number of bytes"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", 2, [2], HUGE]}], "number of bytes"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", 2, [2], 1]}], "parts take"),
    (["sparse", {}, {"values": RAW}, {"mask": ["constant", 2, [2]]}], "entry of coded symbols"),
    (["sparse", {}, {"values": RAW}, {"mask": [1, 2, [2], 0]}], "entry of coded symbols"),
    (["sparse", {}, {"values": RAW}, {"mask": "constant"}], "entry of coded symbols"),
    (["sparse", {}, {"values": RAW}, {"mask": ["lzma", 2, [2], 0]}], "'lzma'.*newer jaxcomp"),
    (["sparse", {}, {"values": "raw"}, {}], "entry of an array"),
    (["sparse", {}, {"values": RAW, "x": ["raw", "int8", [0]]}, {"mask": ["constant", 2, [2], 0]}],
     "not make a sparse"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "message"), LIES, ids=lambda value: str(value)[:60])
def test_lies_in_the_manifest(tmp_path, tree, message):
    import re

    assert re.search(message, forged(tmp_path / "lie", tree, ONE))


@pytest.mark.parametrize(
    "changes",
    [
        {"static": {}},
        {"static": {"bits": 9, "group": None, "dtype": "float32"}},
        {"static": {"bits": 4.0, "group": None, "dtype": "float32"}},
        {"static": {"bits": True, "group": None, "dtype": "float32"}},
        {"static": {"bits": 3, "group": None, "dtype": "float32"}},
        {"static": {"bits": 4, "group": [3, -1], "dtype": "float32"}},
        {"static": {"bits": 4, "group": [0, -1], "dtype": "float32"}},
        {"static": {"bits": 4, "group": [2, 0], "dtype": "float32"}},
        {"static": {"bits": 4, "group": "ab", "dtype": "float32"}},
        {"static": {"bits": 4, "group": [2], "dtype": "float32"}},
        {"static": {"bits": 4, "group": None, "dtype": "object"}},
        {"static": {"bits": 4, "group": None, "dtype": "int32"}},
        {"static": {"bits": 4, "group": None, "dtype": "O" * 10_000}},
        {"static": {"bits": 4, "group": None, "dtype": ["float32"]}},
        {"static": {"bits": 4, "group": None, "dtype": {"__reduce__": "os.system"}}},
        {"arrays": {"scale": ["raw", "int32", [1]]}},
        {"arrays": {"scale": ["raw", "uint8", [4]]}},
        {"arrays": {"scale": ["raw", "float32", []]}},
        {"arrays": {"scale": ["raw", "float32", [1, 1]]}},
        {"arrays": {"scale": ["raw", "float16", [2]]}},
        {"arrays": {"steps": ["raw", "float32", [1]]}},
        {"symbols": {"codes": ["packed", 16, [2, 2, 1], 2]}},
        {"symbols": {"codes": ["packed", 15, [4], 2]}},
        {"symbols": {"codes": ["packed", 256, [2], 2]}},
        {"symbols": {"code": ["packed", 16, [4], 2]}},
        {"symbols": {"codes": ["packed", 16, [3], 2]}},
        {"symbols": {"codes": ["range", 16, [4], 2]}},
        {"symbols": {"codes": ["deflate", 16, [4], 2]}},
        {"symbols": {"codes": ["constant", 16, [4], 2]}},
    ],
    ids=str,
)  # fmt: skip
def test_lies_about_a_compressed_leaf(tmp_path, changes):
    forged(tmp_path / "lie", q(**changes), ONE, b"\x21\x43")


def test_lies_about_tensors(tmp_path):
    path, tensor = tmp_path / "lie", np.ones(3, np.float32)
    check = container.checksum(tensor.tobytes())
    entry = {"a": ["tensor", "float32", [3]]}

    def message(tree, parts=(check,), tensors=None):
        return refused(path, seal({"tree": tree}, list(parts), tensors or {"a": tensor}))

    path.write_bytes(seal({"tree": entry}, [check], {"a": tensor}))
    assert load(path)["a"].tolist() == [1, 1, 1]
    assert "a is damaged" in message(entry, [b"\0\0\0\0"])
    assert "belongs to no leaf" in message({}, [])
    assert "belongs to no leaf" in message(entry, tensors={"a": tensor, "b": tensor})
    assert "missing" in message({"b": entry["a"]})
    twice = ["dict", "0", entry["a"], 0, entry["a"]]
    assert "used twice" in message(twice, [check, check], {"0": tensor})
    assert "the manifest says" in message({"a": ["tensor", "float32", [1, 3]]})
    assert "the manifest says" in message({"a": ["tensor", "int32", [3]]})
    assert "the manifest says" in message({"a": ["tensor", "float32", [4]]})
    flags = np.array([2, 1], np.uint8).view(bool)
    check = container.checksum(flags.tobytes())
    assert "neither 0 nor 1" in message({"a": ["tensor", "bool", [2]]}, [check], {"a": flags})


def test_tensors_of_foreign_dtypes(tmp_path):
    tensor = np.ones(2, np.complex64)
    data = seal({"tree": {}}, [], {"a": tensor})
    assert "belongs to no leaf" in refused(tmp_path / "a", data)


def test_wrong_checksums_are_found_before_decoding(tmp_path, monkeypatch):
    from jaxcomp.checkpoint import coder

    parts = [sealed(ONE), b"\x21\x43" + b"\0\0\0\0"]
    monkeypatch.setattr(coder, "decode", lambda *args: pytest.fail("decoded damaged symbols"))
    message = refused(tmp_path / "a", seal({"tree": {"w": q()}}, parts))
    assert "w.codes is damaged: its checksum does not match" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not sound JSON"),
        ("{", "not sound JSON"),
        ("[]", "holds no tree"),
        ("{}", "holds no tree"),
        ("null", "holds no tree"),
        ('{"tree":1,"tree":2}', "names 'tree' twice"),
        ('{"tree":{"a":1,"a":1}}', "names 'a' twice"),
        ('{"tree":1,"more":2}', "says more than this version knows"),
        ('{"tree":1,"metadata":[]}', "metadata is not a dict"),
        ('{"tree":NaN}', "number that JSON has not"),
        ('{"tree":-Infinity}', "number that JSON has not"),
        ('{"tree":1e999}', "out of range"),
        ('{"tree":' + "9" * 5000 + "}", "not sound JSON"),
        ('{"tree":' + '["list",' * 100_000, "nested too deeply"),
        ('{"tree":' + '{"a":' * 100_000, "nested too deeply"),
        ('{"tree":' + "[" * 500 + "]" * 500 + "}", "without a kind"),
        ('{"tree":' + '["list",' * 70 + "1" + "]" * 70 + "}", "64 levels"),
        ('{"tree":' + '{"a":' * 70 + "1" + "}" * 70 + "}", "64 levels"),
        ('{"tree":' + '["dict",1,' * 70 + "1" + "]" * 70 + "}", "64 levels"),
        ('{"tree":["quantized",' + '{"a":' * 400 + "1" + "}" * 400 + ",{},{}]}", "not make"),
        ('{"tree":1,"metadata":{"a":' + "[" * 100_000 + "}", "nested too deeply"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_manifests_that_are_none(tmp_path, text, message):
    assert message in refused(tmp_path / "a", seal(text, []))


def test_a_manifest_that_is_not_ascii(tmp_path, monkeypatch):
    import zlib

    monkeypatch.setattr(container, "MANIFEST_LIMIT", 1 << 30)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=container.DICTIONARY)
    for text, message in (
        ('{"tree":"é"}'.encode(), "not ASCII"),
        ('{"tree":1}'.encode("utf-16"), "not ASCII"),
        (b'{"tree":1}\xff', "not ASCII"),
    ):
        again = packer.copy()
        blob = again.compress(text) + again.flush()
        assert message in refused(tmp_path / "a", with_manifest(blob))


def with_manifest(packed: bytes, body: bytes = b"") -> bytes:
    """A file with right checksums around any bytes as its deflated manifest."""
    import zlib

    start, rest = b"JXC\x01", len(packed).to_bytes(3, "little") + packed
    data = outer(start + bytes(4) + rest + body)
    header = data[: 8 + struct.unpack_from("<Q", data)[0]]
    check = struct.pack("<I", zlib.crc32(header + start + rest))
    return header + start + check + rest + body


def test_a_manifest_that_explodes(tmp_path):
    import zlib

    for filler in (b" ", b"[", b"0,"):
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(filler * 300_000_000 if filler == b" " else filler * 9_000_000)
        packed += packer.flush()
        assert "grows beyond" in refused(tmp_path / "a", with_manifest(packed))
    assert "deflated data" in refused(tmp_path / "a", with_manifest(b"\xff\xff\xff"))
    assert "deflated data" in refused(tmp_path / "a", with_manifest(b""))


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


# Fuzzing: any outcome but a tree or CheckpointError fails.


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
     "codebook", "sparse", "float32", "int4", "bool", "float64", "object", "range", "ans", "packed",
     "deflate", "constant", "\ud800", "x" * 300, [], {}, [[]], [0], [-1], [2**40], [1] * 33,
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
    assert fuzz_manifests(tmp_path, 60_000)[0] >= 50_000
    assert fuzz_parts(tmp_path, 20_000, seed=1)[0] == 20_000
    assert fuzz_bytes(tmp_path, 100_000, seed=1) == (100_000, 0)


def test_claims_beyond_the_limit_take_no_memory(tmp_path):
    """In a process that may not grow by 200 MB, each lie is told by its own message."""
    entries = {
        "raw": (["raw", "float32", [10**12]], []),
        "constant": (
            ["sparse", {}, {"values": RAW}, {"mask": ["constant", 2, [10**12], 0]}],
            [ONE],
        ),
        "empty": (
            ["sparse", {}, {"values": RAW}, {"mask": ["constant", 2, [0, 10**12], 0]}],
            [ONE],
        ),
        "coded": (q(symbols={"codes": ["ans", 16, [2**40], 2]}), [ONE, b"!C"]),
        "deflated": (q(symbols={"codes": ["deflate", 16, [2**40], 2]}), [ONE, b"!C"]),
        "packed": (q(symbols={"codes": ["packed", 16, [2**40], 2]}), [ONE, b"!C"]),
    }
    for name, (entry, parts) in entries.items():
        data = seal({"tree": entry}, [sealed(part) for part in parts])
        (tmp_path / f"{name}.jxc").write_bytes(data)
    save(tmp_path / "fine", quantized(np.random.default_rng(0)))
    script = (
        "import resource, sys, time\n"
        "from jaxcomp.checkpoint import CheckpointError, inspect, load\n"
        "inspect(sys.argv[1])\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 200_000_000,) * 2)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[2:]:\n"
        "    for read in (load, inspect):\n"
        "        start = time.perf_counter()\n"
        "        try: read(path)\n"
        "        except CheckpointError as error: assert 'Memory' not in str(error), error\n"
        "        else: raise SystemExit(f'{path} was loaded')\n"
        "        assert time.perf_counter() - start < 5\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "assert grown < 20_000, grown\n"
        "print('done')\n"
    )
    files = [str(tmp_path / "fine"), *(str(tmp_path / f"{name}.jxc") for name in entries)]
    out = subprocess.run(
        [sys.executable, "-c", script, *files], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert out.stdout.strip() == "done", out.stderr
