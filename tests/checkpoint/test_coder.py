"""Codecs: exact round trips, closeness to entropy, and damaged streams."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp.checkpoint import CheckpointError, coder, entropy, frequencies, packing


def entropy_bytes(values: np.ndarray) -> float:
    """First-order entropy by the textbook formula."""
    counts = np.unique(values, return_counts=True)[1] / values.size
    return float(-(counts * np.log2(counts)).sum() * values.size / 8)


def bell(rng, size, alphabet, width):
    middle = rng.normal(alphabet / 2, width, size)
    return np.clip(np.round(middle), 0, alphabet - 1).astype(np.uint16)


def check(values: np.ndarray, alphabet: int) -> tuple[str, bytes]:
    name, data = coder.encode(values, alphabet)
    got = coder.decode(name, data, values.shape, alphabet)
    assert got.dtype == coder.symbol_dtype(alphabet)
    assert got.shape == values.shape
    np.testing.assert_array_equal(got, values)
    return name, data


@st.composite
def streams(draw):
    alphabet = draw(st.sampled_from([1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 4096, 65535, 65536]))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["uniform", "bell", "spike", "rows", "few"]))
    if kind == "uniform":
        values = rng.integers(0, alphabet, shape)
    elif kind == "bell":
        values = bell(rng, shape, alphabet, max(alphabet / 16, 0.6))
    elif kind == "spike":
        values = np.where(rng.random(shape) < 0.95, alphabet // 2, rng.integers(0, alphabet, shape))
    elif kind == "rows":
        values = np.broadcast_to(rng.integers(0, alphabet, shape[-1:]), shape)
    else:
        values = rng.choice(rng.integers(0, alphabet, 3), shape)
    return np.asarray(values), alphabet


@settings(max_examples=200)
@given(streams())
def test_whatever_codec_wins_the_symbols_come_back(stream):
    values, alphabet = stream
    name, data = check(values, alphabet)
    packed = math.ceil(values.size * max(1, (alphabet - 1).bit_length()) / 8)
    assert len(data) <= packed
    assert name in coder.CODECS


@settings(max_examples=100)
@given(streams())
def test_every_codec_that_applies_is_exact(stream):
    values, alphabet = stream
    narrow = values.astype(coder.symbol_dtype(alphabet))
    applied = []
    for name, codec in coder.CODECS.items():
        data = codec.encode(narrow, alphabet)
        if data is not None:
            applied.append(name)
            np.testing.assert_array_equal(codec.decode(data, values.shape, alphabet), values)
    assert "packed" in applied


@pytest.mark.parametrize(
    ("alphabet", "values"),
    [
        (2, np.random.default_rng(0).random(1_000_000) < 0.1),
        (2, np.random.default_rng(0).random(1_000_000) < 0.001),
        (16, bell(np.random.default_rng(0), 1_000_000, 16, 2.5)),
        (256, bell(np.random.default_rng(0), 1_000_000, 256, 30)),
        (32, np.random.default_rng(0).zipf(1.5, 1_000_000) % 32),
        (256, np.random.default_rng(0).geometric(0.02, 1_000_000) % 256),
    ],
    ids=["mask 90%", "mask 99.9%", "int4", "int8", "zipf", "geometric"],
)
def test_large_streams_are_within_a_thousandth_of_entropy(alphabet, values):
    values = values.astype(np.uint8)
    name, data = check(values, alphabet)
    assert name == "ans"
    # Half a logarithm for each parameter of the model (Rissanen, 1984), and the coder's end.
    parameters = len(np.unique(values)) - 1
    model_bytes = parameters * math.log2(values.size) / 2 / 8
    assert len(data) <= 1.0001 * entropy_bytes(values) + model_bytes + 8


@pytest.mark.parametrize("size", [60, 300, 1000, 5000])
@pytest.mark.parametrize(
    ("alphabet", "width", "spike"), [(2, 0.4, 0), (8, 1.2, 0), (16, 2.5, 0), (16, 3, 0.9)]
)
def test_small_streams_pay_little_for_their_model(size, alphabet, width, spike):
    rng = np.random.default_rng(size)
    values = bell(rng, size, alphabet, width)
    values[rng.random(size) < spike] = alphabet // 2
    _, data = check(values, alphabet)
    used = len(np.unique(values))
    # The parameters of such a model cost about half a logarithm each (Rissanen, 1984).
    model_bytes = (used - 1) * math.log2(size) / 2 / 8
    assert len(data) <= entropy_bytes(values) + 1.3 * model_bytes + 4


def test_a_binary_mask_needs_three_bytes_of_model():
    counts = np.array([900_000, 100_000])
    assert len(frequencies.fit(counts)[1]) <= 3


def test_a_constant_stream_takes_no_more_than_its_symbol():
    assert coder.encode(np.zeros((1000, 1000), np.uint8), 16) == ("constant", b"")
    assert coder.encode(np.full(5, 300), 65536) == ("constant", b"\x2c\x01")
    assert coder.encode(np.zeros((0, 7), np.uint8), 2) == ("constant", b"")
    check(np.full((3, 4), 65535), 65536)


@pytest.mark.parametrize("size", [entropy.SHORT, entropy.SHORT + 1])
def test_range_coding_hands_over_to_numeral_systems(size):
    values = (np.random.default_rng(0).random(size) < 0.02).astype(np.uint8)
    name, data = check(values, 2)
    assert name == ("range" if size == entropy.SHORT else "ans")
    assert len(data) <= entropy_bytes(values) + 8


def test_long_streams_cross_chunk_borders():
    for size in (packing.CHUNK - 1, packing.CHUNK, packing.CHUNK + 1, 2 * packing.CHUNK + 7):
        values = bell(np.random.default_rng(0), size, 5, 1)
        for codec in (coder.CODECS["ans"], coder.CODECS["packed"]):
            data = codec.encode(values.astype(np.uint8), 5)
            assert data is not None
            np.testing.assert_array_equal(codec.decode(data, (size,), 5), values)


def test_patterns_are_deflated():
    values = np.tile(np.random.default_rng(0).integers(0, 16, 64), 1000)
    assert check(values, 16)[0] == "deflate"
    values = np.tile(np.random.default_rng(0).integers(0, 16, 64), 10_000)
    assert check(values, 16)[0] == "deflate"


def test_short_uniform_streams_are_packed():
    values = np.arange(16)
    assert check(values, 16) == ("packed", packing.pack(values.astype(np.uint8), 4))


def test_large_alphabets():
    rng = np.random.default_rng(0)
    wide = bell(rng, 1_000_000, 65536, 3000)
    name, data = check(wide, 65536)
    assert name == "ans"
    assert len(data) < 1.006 * entropy_bytes(wide)
    check(np.arange(65536).reshape(256, 256), 65536)
    few = rng.choice(rng.integers(0, 65536, 40), 4000)
    name, data = check(few, 65536)
    assert name == "range"
    assert len(data) < entropy_bytes(few) + 40 * 4


def test_ten_million_symbols_in_seconds():
    values = bell(np.random.default_rng(0), 10_000_000, 16, 2.5).astype(np.uint8)
    start = time.perf_counter()
    name, data = coder.encode(values, 16)
    got = coder.decode(name, data, values.shape, 16)
    seconds = time.perf_counter() - start
    assert np.array_equal(got, values)
    assert seconds < 10  # one to two on an idle core; a Python loop takes minutes


def test_bytes_do_not_change_between_versions_and_platforms():
    values = np.array([3, 3, 1, 3, 0, 3, 3, 5, 3, 3, 3, 1, 3, 3, 3, 3, 2, 3, 3, 3] * 10, np.uint8)
    model, description = frequencies.fit(np.bincount(values, minlength=8))
    assert int(model.frequencies.sum()) == 1 << 24
    assert (model.present.tolist(), model.frequencies.tolist()) == GOLDEN_MODEL
    assert description.hex() == GOLDEN_DESCRIPTION
    data = coder.CODECS["range"].encode(values, 8)
    assert data is not None
    assert data.hex() == GOLDEN_STREAM
    np.testing.assert_array_equal(
        coder.decode("range", bytes.fromhex(GOLDEN_STREAM), values.shape, 8), values
    )


GOLDEN_MODEL = ([0, 1, 2, 3, 5], [671089, 1342177, 671089, 13421772, 671089])
GOLDEN_DESCRIPTION = "0088b73235"
GOLDEN_STREAM = "0088b7323552c30c1ee1c97a572bc16ad8b8d58f1de253168d1b6733559c424e95dd24696d"


@given(
    st.integers(2, 400).flatmap(
        lambda n: hnp.arrays(
            np.int64, n, elements=st.sampled_from([0, 1, 2, 7, 1000, 2**37 // 400])
        )
    )
)
def test_frequency_models_read_back(counts):
    if np.count_nonzero(counts) < 2:
        return
    model, description = frequencies.fit(counts)
    assert model.present.tolist() == np.flatnonzero(counts).tolist()
    assert int(model.frequencies.sum()) == 1 << frequencies.PRECISION
    assert int(model.frequencies.min()) >= 1
    again, read = frequencies.parse(description + b"\xff" * 9, len(counts), int(counts.sum()))
    assert read == len(description)
    np.testing.assert_array_equal(again.present, model.present)
    np.testing.assert_array_equal(again.frequencies, model.frequencies)


def test_the_coder_uses_exactly_the_model_s_frequencies():
    # Code lengths of single symbols, added up, must be those of the integer frequencies.
    frequency = np.array([1, 2**24 - 5, 3, 1])
    model = frequencies.Model(np.arange(4), frequency)
    for symbol in range(4):
        data = entropy.range_words(np.full(4000, symbol, np.int32), model)
        bits = 4000 * (24 - math.log2(frequency[symbol]))
        assert abs(8 * len(data) - bits) <= 32


def test_streams_with_symbols_to_spare_are_refused():
    values = bell(np.random.default_rng(0), 70_000, 16, 3).astype(np.uint8)
    data = coder.CODECS["ans"].encode(values, 16)
    assert data is not None
    for size, more in ((69_900, b""), (70_000, b"\x01" * 8)):
        with pytest.raises(CheckpointError, match="do not end"):
            coder.decode("ans", data + more, (size,), 16)
    with pytest.raises(CheckpointError, match="end in a zero"):
        coder.decode("ans", data + b"\0", (70_000,), 16)


@pytest.mark.parametrize(
    ("values", "alphabet", "message"),
    [
        (np.array([4]), 4, "outside its alphabet"),
        (np.array([-1]), 4, "outside its alphabet"),
        (np.array([0.0]), 4, "integers"),
        (np.array([0]), 0, "1 to 65536"),
        (np.array([0]), 65537, "1 to 65536"),
    ],
)
def test_symbols_that_are_none_are_refused(values, alphabet, message):
    with pytest.raises(ValueError, match=message):
        coder.encode(values, alphabet)


@pytest.mark.parametrize(
    ("name", "data", "shape", "alphabet", "message"),
    [
        ("constant", b"\x04", (3,), 4, "no symbol"),
        ("constant", b"\x00\x00\x00", (3,), 4, "no symbol"),
        ("packed", b"\x00", (3,), 16, "do not fill"),
        ("packed", b"\x00\x00\x00", (3,), 16, "do not fill"),
        ("packed", b"\x00\x10", (3,), 16, "padding"),
        ("packed", b"\xff\x0f", (3,), 15, "outside its alphabet"),
        ("deflate", b"", (3,), 16, "does not end"),
        ("deflate", b"\xff\xff", (3,), 16, "damaged"),
        ("range", b"", (3,), 16, "cut short"),
        ("range", b"\x00\x00", (1,), 16, "1 symbols"),
        ("range", b"\x00\x00", (0,), 16, "0 symbols"),
        ("range", b"\xff" * 20, (3,), 16, "mantissa"),
        ("range", b"\x01\x00\x00", (3,), 1, "fewer than two"),
        ("range", b"\x00" * 40, (3,), 16, "cut short"),
        ("ans", b"", (3,), 16, "cut short"),
        ("cabac", b"", (3,), 16, "newer jaxcomp"),
    ],
)
def test_damaged_streams_are_refused(name, data, shape, alphabet, message):
    with pytest.raises(CheckpointError, match=message):
        coder.decode(name, data, shape, alphabet)


def test_a_deflate_bomb_stops_at_its_shape():
    bomb = coder._deflate(np.zeros(10_000_000, np.uint8))
    with pytest.raises(CheckpointError, match="grows beyond 100 bytes"):
        coder.decode("deflate", bomb, (100,), 16)


FUZZED = 6000


def test_random_and_mutated_streams_never_escape():
    rng = np.random.default_rng(0)
    tried = refused = 0
    sound = {}
    for name, codec in coder.CODECS.items():
        size = {"constant": 0, "ans": entropy.SHORT + 1}.get(name, 50)
        values = bell(rng, size, 16, 2)
        sound[name] = codec.encode(values.astype(np.uint8), 16)
    names = list(sound)
    while tried < FUZZED:
        name = names[tried % len(names)]
        if rng.random() < 0.4:
            data = rng.bytes(int(rng.integers(0, 40)))
        else:
            damaged = bytearray(sound[name] or b"\0")
            for _ in range(int(rng.integers(1, 4))):
                damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
            data = bytes(damaged[: int(rng.integers(len(damaged) + 1))] or damaged)
        alphabet = int(rng.choice([1, 2, 15, 16, 300, 65536]))
        shape = tuple(int(n) for n in rng.choice([0, 1, 7, 50, 256], int(rng.integers(0, 3))))
        tried += 1
        try:
            got = coder.decode(name, data, shape, alphabet)
        except CheckpointError:
            refused += 1
        else:
            assert got.shape == shape
            assert got.dtype == coder.symbol_dtype(alphabet)
            assert got.size == 0 or int(got.max()) < alphabet
    assert tried == FUZZED
    assert 0 < refused < tried
