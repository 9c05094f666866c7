"""Content that lies under right checksums gives CheckpointError, in bounded memory."""

import json
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from jxc_forge import quantized, refused, seal, sealed, with_manifest

from jaxcomp.checkpoint import coder, container, inspect, load, save

ONE = np.float32(1).tobytes()
RAW = ["raw", "float32", [1]]


def forged(path, tree, *parts: bytes, tensors=None, **rest) -> str:
    data = seal({"tree": tree, **rest}, [sealed(part) for part in parts], tensors)
    message = refused(path, data)
    refused(path, data, inspect)
    return message


def q(**changes):
    """A sound quantized leaf of four codes, changed."""
    entry = {
        "kind": "quantized",
        "static": {"bits": 4, "blocks": [], "zero": True, "dtype": "float32"},
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
    (["nm_sparse", {}, {"values": RAW}, {"patterns": ["constant", 6, [1], 0]}], "not make a nm_sp"),
    (["nm_sparse", {"n": 1, "m": 2, "axis": -1}, {"values": RAW},
      {"patterns": ["constant", 2, [2], 0]}], "do not fit 1:2 patterns"),
    (["nm_sparse", {"n": 1, "m": 2, "axis": -1}, {"values": RAW},
      {"patterns": ["constant", 2, [10**12], 0]}], "max_bytes"),
    (["nm_sparse", {"n": 1, "m": 2, "axis": 0}, {"values": RAW},
      {"patterns": ["constant", 2, [1], 0]}], "axis must be"),
    (["nm_sparse", {"n": 1, "m": 10**9, "axis": -1}, {"values": RAW},
      {"patterns": ["constant", 2, [1], 0]}], "m must be"),
    (["nm_sparse", {"n": 1, "m": 4, "axis": -1}, {"values": RAW},
      {"patterns": ["constant", 2, [1], 0]}], "alphabet of patterns"),
    (["block_sparse", {}, {"values": RAW}, {"mask": ["constant", 2, [1], 0]}], "not make a block"),
    (["block_sparse", {"block_shape": [2]}, {"values": RAW}, {"mask": ["constant", 2, [1], 0]}],
     "do not fit blocks"),
    (["block_sparse", {"block_shape": [10**9]}, {"values": ["raw", "float32", [0, 10**9]]},
      {"mask": ["constant", 2, [10**6], 0]}], "parts take|too many"),
    (["block_sparse", {"block_shape": [1]}, {"values": ["raw", "float32", [1, 1]]},
      {"mask": ["constant", 2, [10**12], 0]}], "max_bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "message"), LIES, ids=lambda value: str(value)[:60])
def test_lies_in_the_manifest(tmp_path, tree, message):
    assert re.search(message, forged(tmp_path / "lie", tree, ONE))


@pytest.mark.parametrize(
    "changes",
    [
        {"static": {}},
        {"static": {"bits": 9, "blocks": [], "zero": True, "dtype": "float32"}},
        {"static": {"bits": 4.0, "blocks": [], "zero": True, "dtype": "float32"}},
        {"static": {"bits": True, "blocks": [], "zero": True, "dtype": "float32"}},
        {"static": {"bits": 3, "blocks": [], "zero": True, "dtype": "float32"}},
        {"static": {"bits": 4, "blocks": [[3, -1]], "zero": True, "dtype": "float32"}},
        {"static": {"bits": 4, "blocks": [[0, -1]], "zero": True, "dtype": "float32"}},
        {"static": {"bits": 4, "blocks": [[2, 0]], "zero": True, "dtype": "float32"}},
        {"static": {"bits": 4, "blocks": "ab", "zero": True, "dtype": "float32"}},
        {"static": {"bits": 4, "blocks": [[2]], "zero": True, "dtype": "float32"}},
        {"static": {"bits": 4, "blocks": [], "zero": True, "dtype": "object"}},
        {"static": {"bits": 4, "blocks": [], "zero": True, "dtype": "int32"}},
        {"static": {"bits": 4, "blocks": [], "zero": True, "dtype": "O" * 10_000}},
        {"static": {"bits": 4, "blocks": [], "zero": True, "dtype": ["float32"]}},
        {"static": {"bits": 4, "blocks": [], "zero": True, "dtype": {"__reduce__": "os.system"}}},
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
    # Written by hand: not every version of the library can write them.
    sound = seal({"tree": 1}, [])
    length = struct.unpack_from("<Q", sound)[0]
    head, blob = json.loads(sound[8 : 8 + length]), sound[8 + length :]
    end = len(blob)
    head["a"] = {"dtype": "C64", "shape": [2], "data_offsets": [end, end + 16]}
    text = json.dumps(head).encode()
    body = blob[:4] + bytes(4) + blob[8:]
    message = refused(tmp_path / "a", struct.pack("<Q", len(text)) + text + body + bytes(16))
    assert "checksum does not match" in message or "not a sound safetensors" in message


def test_wrong_checksums_are_found_before_decoding(tmp_path, monkeypatch):
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
    monkeypatch.setattr(container, "MANIFEST_LIMIT", 1 << 30)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=container.DICTIONARY_1)
    for text, message in (
        ('{"tree":"é"}'.encode(), "not ASCII"),
        ('{"tree":1}'.encode("utf-16"), "not ASCII"),
        (b'{"tree":1}\xff', "not ASCII"),
    ):
        again = packer.copy()
        blob = again.compress(text) + again.flush()
        assert message in refused(tmp_path / "a", with_manifest(blob))


def test_a_manifest_that_explodes(tmp_path):
    for filler in (b" ", b"[", b"0,"):
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(filler * 9_000_000)
        packed += packer.flush()
        assert "grows beyond" in refused(tmp_path / "a", with_manifest(packed))
    assert "deflated data" in refused(tmp_path / "a", with_manifest(b"\xff\xff\xff"))
    assert "deflated data" in refused(tmp_path / "a", with_manifest(b""))


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
        "blocks": (
            ["block_sparse", {"block_shape": [2**30]}, {"values": ["raw", "float32", [0, 2**30]]},
             {"mask": ["constant", 2, [2**20], 0]}],
            [],
        ),
        "coded": (q(symbols={"codes": ["ans", 16, [2**40], 2]}), [ONE, b"!C"]),
        "deflated": (q(symbols={"codes": ["deflate", 16, [2**40], 2]}), [ONE, b"!C"]),
        "packed": (q(symbols={"codes": ["packed", 16, [2**40], 2]}), [ONE, b"!C"]),
    }  # fmt: skip
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
