"""What benchmarks/sparsity.py concludes, and that it tests on text that no training has seen."""

import importlib
import pathlib

import numpy as np
import pytest


@pytest.fixture
def sparsity(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("sparsity")


def test_an_ordering_that_fails_is_said_to_fail(sparsity):
    claim = sparsity.Claim("new", "old")

    def results(new, old):
        return {
            "new": [sparsity.Quality(loss, 1 - loss) for loss in new],
            "old": [sparsity.Quality(loss, 1 - loss) for loss in old],
        }

    good = sparsity.verdict(claim, results([0.1, 0.5], [0.4, 0.3]), by_accuracy=False)
    assert good == "new ≤ old in loss: holds, in 1 of 2 seeds"
    bad = sparsity.verdict(claim, results([0.1, 0.5], [0.1, 0.3]), by_accuracy=False)
    assert bad == "new ≤ old in loss: DOES NOT HOLD, in 1 of 2 seeds"
    by_accuracy = sparsity.verdict(claim, results([0.1, 0.2], [0.2, 0.3]), by_accuracy=True)
    assert by_accuracy == "new ≥ old in accuracy: holds, in 2 of 2 seeds"


def test_the_language_model_is_tested_on_text_it_never_trains_on(sparsity, tmp_path):
    # Each twentieth of this text has a character of its own.
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(ord("a") + i) * 500 for i in range(20)))
    task = sparsity.models.text_task(str(file), length=4, steps=1)
    generator = np.random.default_rng(0)
    trained = {
        int(c) for _ in range(200) for array in task.batch(generator, 64) for c in array.flat
    }
    tested = {int(c) for arrays in task.held_out for array in arrays for c in array.flat}
    assert len(trained) == 18
    assert len(tested) == 2
    assert not trained & tested


def test_labels_are_the_next_characters(sparsity):
    tokens, symbols = sparsity.models.encode("abracadabra")
    assert symbols == 5
    inputs, labels = sparsity.models.windows(tokens, np.array([0, 3]), 4)
    np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
    np.testing.assert_array_equal(labels[1], tokens[4:8])


def test_the_rarest_characters_share_one_symbol(sparsity):
    text = "".join(chr(1000 + i) * (300 - i) for i in range(200))
    tokens, symbols = sparsity.models.encode(text)
    assert symbols == sparsity.models.MAX_SYMBOLS
    assert (tokens == symbols - 1).sum() == sum(300 - i for i in range(127, 200))
