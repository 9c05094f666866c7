"""The context coder: exact for every layout, smaller where there is structure, refusing lies."""

import math

import numpy as np
import pytest

from jaxcomp.checkpoint import CheckpointError, coder, contexts, decisions, entropy, layout
from jaxcomp.checkpoint.layout import Cell, Layout
from jaxcomp.checkpoint.log_odds import LIMIT, SCALE, log_odds, probability


def entropy_bytes(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / values.size)).sum()) / 8


def pruned(rng, rows=90, columns=40, alphabet=16, spread=1.5):
    """Codes of a pruned layer whose inputs and outputs are dead to different degrees."""
    odds = rng.normal(-2.5, spread, (rows, 1)) + rng.normal(0, 0.7, (1, columns))
    keep = rng.random((rows, columns)) < 1 / (1 + np.exp(-odds))
    wide = np.exp(rng.normal(0, 0.5, (rows, 1)))
    steps = np.clip(np.round(rng.laplace(0, 2, (rows, columns)) * wide), 1 - alphabet // 2, None)
    middle = alphabet // 2
    return np.where(keep, np.clip(steps + middle, 0, alphabet - 1), middle).astype(np.uint8)


def check(values: np.ndarray, alphabet: int) -> bytes:
    data = contexts.encode(values.astype(coder.symbol_dtype(alphabet)), alphabet)
    assert data is not None
    got = contexts.decode(data, values.shape, alphabet)
    assert got.dtype == coder.symbol_dtype(alphabet)
    np.testing.assert_array_equal(got, values)
    return data


def test_rows_and_columns_shorten_pruned_layers():
    values = pruned(np.random.default_rng(0))
    name, data = coder.encode(values, 16)
    assert name == "context"
    assert len(check(values, 16)) == len(data) < 0.97 * entropy_bytes(values)


def test_without_structure_it_costs_what_the_entropy_is():
    rng = np.random.default_rng(0)
    values = np.clip(np.round(rng.normal(8, 2, (100, 80))), 0, 15).astype(np.uint8)
    assert len(coder.encode(values, 16)[1]) < 1.01 * entropy_bytes(values)
    mask = (rng.random((100, 80)) < 0.1).astype(np.uint8)
    assert len(coder.encode(mask, 2)[1]) < 1.01 * entropy_bytes(mask)


def test_receptive_fields_are_found_in_both_orientations():
    rng = np.random.default_rng(0)
    place = rng.integers(0, 144, 24)
    y, x = np.divmod(np.arange(144), 12)
    away = np.maximum(abs(y[:, None] - place // 12), abs(x[:, None] - place % 12))
    values = (rng.random((144, 24)) < np.where(away < 3, 0.8, 0.02)).astype(np.uint8)
    rows_alone = entropy_bytes(values)
    for matrix in (values, values.T, values.T.reshape(24, 12, 12)):
        assert len(check(np.ascontiguousarray(matrix), 2)) < 0.8 * rows_alone


@pytest.mark.parametrize("shape", [(16,), (4, 4), (1, 40), (40, 1), (3, 3, 2, 5), (2, 0, 3), ()])
@pytest.mark.parametrize("alphabet", [2, 3, 256, 257, 65536])
def test_every_shape_and_alphabet(shape, alphabet):
    rng = np.random.default_rng(alphabet)
    values = rng.integers(0, alphabet, shape).astype(coder.symbol_dtype(alphabet))
    if math.prod(shape) < contexts.MIN_SIZE or not shape:
        assert contexts.encode(values, alphabet) is None
        return
    values.reshape(-1)[:2] = 0, alphabet - 1
    check(values, alphabet)


@pytest.mark.parametrize(
    "chosen",
    [
        Layout(False, 8, 0, 15, 0),
        Layout(True, 3, 1, 14, 0, True, (1, 12, 24), (Cell(3, 4, 3, True), Cell(3, 2, 1, False))),
        Layout(False, 0, 0, 15, 2, False, (5,), ()),
        Layout(True, 15, 0, 15, 1, True, (70, 1), (Cell(2, 6, 1, True),)),
    ],
    ids=str,
)
def test_every_layout_is_exact(chosen):
    values = np.clip(pruned(np.random.default_rng(1), 12, 12), max(chosen.low, 1), chosen.high)
    rows, columns = chosen.matrix(values.shape)
    matrix = values.T if chosen.transposed else values
    known = matrix.reshape(-1).astype(np.int32) - chosen.centre
    write, finish = entropy.answer_writer()

    def exchange(yes, truth):
        answers = truth.astype(np.int32)
        write(answers, yes)
        return answers

    contexts.walk(chosen, values.shape, exchange, known)
    head = layout.write(chosen, 16, columns)
    assert layout.read(head, values.shape, 16) == (chosen, len(head))
    assert rows * columns == values.size
    np.testing.assert_array_equal(contexts.decode(head + finish(), values.shape, 16), values)


def test_bytes_do_not_change_between_versions_and_platforms():
    # Made without a random generator, whose streams may change.
    at = np.arange(16 * 12)
    values = np.where(at * at * 7 % 11 < 3, at * 5 % 13, 6).reshape(16, 12).astype(np.uint8)
    chosen = Layout(False, 6, 0, 12, 1, True, (12, 1, 24), (Cell(4, 2, 2, True),))
    known = values.reshape(-1).astype(np.int32) - 6
    write, finish = entropy.answer_writer()

    def exchange(yes, truth):
        write(truth, yes)
        return truth.astype(np.int32)

    contexts.walk(chosen, values.shape, exchange, known)
    assert (layout.write(chosen, 16, 12) + finish()).hex() == GOLDEN
    np.testing.assert_array_equal(contexts.decode(bytes.fromhex(GOLDEN), (16, 12), 16), values)


GOLDEN = (
    "1e0606062b020304040205c3b1d2f56bec6d745843240fc48b26526dd42c4c4bc3e813eacdd5"
    "ee50fd1bc57cb3196b758ab911144aed2a"
)


def test_log_odds_and_probabilities_are_close_to_the_exact_ones():
    ratio = np.geomspace(1e-6, 1e6, 1001)
    exact = np.clip(SCALE * np.log2(ratio), -LIMIT, LIMIT)
    assert np.abs(log_odds(ratio) - exact).max() < 0.55
    odds = np.arange(-2 * LIMIT, 2 * LIMIT + 1.0)
    exact = 1 / (1 + 2 ** -(np.clip(odds, -LIMIT, LIMIT) / SCALE))
    assert np.abs(probability(odds) * 2.0**-24 - exact).max() < 2e-7
    assert probability(odds).min() == 2**24 - probability(odds).max() == 256


def test_a_decision_learns_its_frequency_and_what_a_context_tells():
    rng = np.random.default_rng(0)
    known, total = decisions.begin([2, 5]), 0.0
    for _ in range(40):
        first, second = rng.integers(0, 2, 50), rng.integers(0, 5, 50)
        keys = decisions.join([first, second], [2, 5], 50)
        answers = (rng.random(50) < np.where(first, 0.9, 0.1)).astype(np.int32)
        made = decisions.forecast(known, keys, 50)
        chance = made.yes * 2.0**-24
        total -= np.log2(np.where(answers, chance, 1 - chance)).sum()
        known = decisions.learn(known, keys, made, answers)
    entropy_bits = 2000 * -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    assert total < 1.04 * entropy_bits


@pytest.mark.parametrize(
    ("data", "shape", "alphabet", "message"),
    [
        (b"", (4, 4), 16, "cut short"),
        (b"\x02", (4, 4), 16, "cut short"),
        (b"\x02\x10", (4, 4), 16, "out of range"),
        (b"\x04\x09\x07", (4, 4), 16, "out of range"),
        (b"\x00", (8, 8), 64, "out of range"),
        (b"\x04\x80\x80\x80\x80\x80\x01", (4, 4), 16, "too large"),
        (b"\x08\x07", (4, 4), 16, "more lags"),
        (b"\x08\x40", (4, 4), 16, "more lags"),
        (b"\x08\x01\x00", (4, 4), 16, "lag"),
        (b"\x08\x01\x08", (4, 4), 16, "lag"),
        (b"\x08\x08\x00\x01\x02", (4, 4), 16, "partition"),
        (b"\x08\x08\x01\x01\x03", (4, 4), 16, "partition"),
        (b"\x00", (3,), 16, "no context-coded stream"),
        (b"\x00", (1 << 16, 1 << 16), 16, "no context-coded stream"),
        (b"\x00", (0, 4), 16, "no context-coded stream"),
    ],
)
def test_heads_that_lie_are_refused(data, shape, alphabet, message):
    with pytest.raises(CheckpointError, match=message):
        contexts.decode(data, shape, alphabet)


def test_damaged_streams_are_refused_or_give_symbols_of_the_alphabet():
    rng = np.random.default_rng(0)
    values = pruned(rng, 20, 15)
    sound = check(values, 16)
    for _ in range(25):
        damaged = bytearray(sound)
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        shape = [(20, 15), (15, 20), (300,)][rng.integers(3)]
        try:
            got = contexts.decode(bytes(damaged), shape, 16)
        except CheckpointError:
            continue
        assert got.shape == shape
        assert int(got.max()) < 16


def test_large_leaves_without_structure_are_left_to_the_static_model():
    rng = np.random.default_rng(0)
    values = rng.binomial(15, 0.5, (1100, 1000)).astype(np.uint8)
    assert contexts.encode(values, 16) is None
    assert contexts.encode(values.reshape(-1), 16) is None
