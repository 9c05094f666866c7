"""What is equal is stored once, and comes back as arrays of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jxc_forge import quantized, random_bits, refused, seal, sealed

from jaxcomp import share
from jaxcomp.checkpoint import CheckpointError, inspect, load, save

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(64, 64)).astype(np.float32)


def test_the_codebook_of_a_whole_model_is_stored_once(tmp_path):
    params = {name: {"kernel": jnp.asarray(WEIGHTS[i : i + 20])} for i, name in enumerate("abc")}
    shared = share.codebooks(params, clusters=256, scope="model")
    save(tmp_path / "m", shared)
    apart = sum(save(tmp_path / name, leaf) for name, leaf in shared.items())
    assert (tmp_path / "m").stat().st_size < apart - 2 * 1024
    loaded = load(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, loaded, shared)
    first, second, _ = inspect(tmp_path / "m").leaves
    assert first.bytes > second.bytes + 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "int4", "int32"])
def test_tied_arrays_come_back_bit_for_bit(tmp_path, dtype):
    array = random_bits(RNG, dtype, (80, 80))
    once = save(tmp_path / "m", {"a": array})
    assert save(tmp_path / "m", {"a": array, "b": [array.copy()]}) < once + 40
    loaded = load(tmp_path / "m")
    for found in (loaded["a"], loaded["b"][0]):
        assert np.asarray(found).dtype == array.dtype
        assert np.asarray(found).tobytes() == array.tobytes()
    inspect(tmp_path / "m")


def test_tied_codes_are_coded_once(tmp_path):
    leaf = quantized(RNG, (50, 60))
    once = save(tmp_path / "m", {"a": leaf})
    assert save(tmp_path / "m", {"a": leaf, "b": leaf}) < once + 60
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "m"), {"a": leaf, "b": leaf})


@pytest.mark.parametrize(
    "other",
    [WEIGHTS.view(np.int32), WEIGHTS.reshape(-1), -WEIGHTS, np.nextafter(WEIGHTS, np.float32(9))],
)
def test_other_types_shapes_and_bits_are_other_arrays(tmp_path, other):
    assert save(tmp_path / "m", {"a": WEIGHTS, "b": other}) > 2 * WEIGHTS.nbytes
    loaded = load(tmp_path / "m")
    assert np.asarray(loaded["b"]).tobytes() == other.tobytes()


def test_zeros_of_two_signs_are_two_arrays(tmp_path):
    zeros = np.zeros(40, np.float32)
    save(tmp_path / "m", [zeros, -zeros])
    assert np.signbit(load(tmp_path / "m")[1]).all()


def test_the_limit_counts_each_use(tmp_path):
    save(tmp_path / "m", [WEIGHTS] * 4)
    with pytest.raises(CheckpointError, match=f"would take {4 * WEIGHTS.nbytes} bytes"):
        load(tmp_path / "m", max_bytes=2 * WEIGHTS.nbytes)


def test_damage_to_what_is_used_twice_is_noticed(tmp_path):
    save(tmp_path / "m", [WEIGHTS] * 2)
    data = bytearray((tmp_path / "m").read_bytes())
    data[data.index(WEIGHTS.tobytes()) + 100] ^= 1
    assert "damaged" in refused(tmp_path / "m", bytes(data))


ONE = sealed(np.float32(1).tobytes())
RAW = ["raw", "float32", [1]]
CODES = {"codes": ["packed", 16, [4], 2]}
STATIC = {"bits": 4, "blocks": [], "zero": True, "dtype": "float32"}


@pytest.mark.parametrize("number", [1, 2, -1, True, 0.0, "0", None, [0], 10**30])
def test_the_same_as_no_part_before_it(tmp_path, number):
    data = seal({"tree": {"a": RAW, "b": ["same", number], "c": RAW}}, [ONE, ONE])
    assert "does not stand before" in refused(tmp_path / "m", data)


@pytest.mark.parametrize("entry", [["same"], ["same", 0, 0], ["same", 0, "float32", [1]]])
def test_entries_that_say_more_or_less(tmp_path, entry):
    data = seal({"tree": [*["list"], RAW, entry]}, [ONE])
    assert "does not stand before" in refused(tmp_path / "m", data)


@pytest.mark.parametrize(
    ("arrays", "symbols", "sealed_parts"),
    [
        ({"scale": ["same", 1]}, CODES, []),  # codes are not a scale
        ({"scale": ["same", 0]}, {"codes": ["same", 0]}, []),  # a scale is not codes
    ],
)
def test_the_same_as_a_part_of_another_kind(tmp_path, arrays, symbols, sealed_parts):
    first = ["quantized", STATIC, {"scale": RAW}, CODES]
    tree = ["list", first, ["quantized", STATIC, arrays, symbols]]
    data = seal({"tree": tree}, [ONE, sealed(b"\x21\x43"), *sealed_parts])
    assert "another kind" in refused(tmp_path / "m", data)


def test_a_forged_file_that_is_sound(tmp_path):
    first = ["quantized", STATIC, {"scale": RAW}, CODES]
    again = ["quantized", STATIC, {"scale": ["same", 0]}, {"codes": ["same", 1]}]
    (tmp_path / "m").write_bytes(
        seal({"tree": ["list", first, again, ["same", 0]]}, [ONE, sealed(b"\x21\x43")])
    )
    a, b, scale = load(tmp_path / "m")
    np.testing.assert_array_equal(a.decode(), b.decode())
    assert scale == 1


def test_shapes_that_do_not_fit_are_still_refused(tmp_path):
    again = ["quantized", STATIC, {"scale": ["same", 0]}, {"codes": ["packed", 16, [4], 2]}]
    tree = ["list", ["raw", "float32", [3]], again]
    parts = [sealed(np.ones(3, np.float32).tobytes()), sealed(b"\x21\x43")]
    assert "do not make a quantized leaf" in refused(tmp_path / "m", seal({"tree": tree}, parts))
