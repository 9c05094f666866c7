"""The examples run as they are; those that wrap an optimizer hold only two changed lines each."""

import importlib.util
import pathlib
import re
from typing import Any

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["linen_train_state", "nnx_loop"])
def test_example(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = load(name)
    assert module.main() > 0.97
    assert "bytes of float32" in capsys.readouterr().out
    lines = pathlib.Path(module.__file__).read_text().splitlines()
    assert len([line for line in lines if "# changed" in line]) == 2


def test_shrunken_resnet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = load("shrink_resnet")
    # A third of the training, which is enough to tell a network that learns from one that does not.
    monkeypatch.setattr(module, "EPOCHS", 3)
    monkeypatch.setattr(module, "FINE_TUNING_EPOCHS", 1)
    accuracies = module.main()
    printed = capsys.readouterr().out
    flops = re.search(r"FLOPs: ([\d,]+) → ([\d,]+)", printed)
    assert flops is not None
    before, after = (int(number.replace(",", "")) for number in flops.groups())
    assert 0.4 * before < after <= before / 2
    assert accuracies["half, trained on"] > 0.95
    sizes = [int(size.replace(",", "")) for size in re.findall(r"ms, ([\d,]+) bytes", printed)]
    assert sizes[2] == sizes[3] < 0.6 * sizes[0]


def test_pruned_after_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    accuracies = load("prune_trained").main()
    printed = capsys.readouterr().out
    dense = accuracies["dense"]
    assert dense > 0.9
    found = next(name for name in accuracies if name.endswith("%, global"))
    assert accuracies[found] >= dense - 0.01
    assert float(found.split("%")[0]) >= 50
    assert accuracies["2:4, repaired"] >= accuracies["2:4, magnitude"]
    assert accuracies["60%, by sensitivity"] >= dense - 0.02
    for path in ("Conv_1/kernel", "Dense_0/kernel"):
        assert len(re.findall(f"{path} ", printed)) == 2


def test_quantized_while_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    accuracies = load("quantize_aware").main()
    assert accuracies["3-bit weights"] > 0.88
    assert accuracies["3-bit weights and activations"] > 0.88
    printed = capsys.readouterr().out
    for path in ("Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel"):
        assert len(re.findall(f"^{path} .*3 bits, affine", printed, re.MULTILINE)) == 1
    # 9,968 weights of 3 bits, and what is not quantized.
    assert (tmp_path / "quantized.jxc").stat().st_size < 9968 * 4 / 5


def test_a_taught_student(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    accuracies = load("teach_student").main()
    assert accuracies["teacher"] > 0.9
    assert accuracies["by the teacher"] > accuracies["by 200 labels"] + 0.03
    # 3,402 weights at 3 bits and 80% zeros, and 74 biases in float32.
    assert (tmp_path / "student.jxc").stat().st_size < 1500
    assert "by the teacher" in capsys.readouterr().out


def test_a_tuned_schedule_and_activation(capsys):
    rows = load("tune_schedule_and_activation").main()
    assert len(rows) == 54
    held_out = [row[1] for row in rows]
    assert held_out == sorted(held_out, reverse=True)
    # What was chosen on held-out images is good on others too, and the grid has bad choices.
    assert rows[0][2] > 0.93
    assert held_out[-1] < 0.8
    assert "54 candidates" in capsys.readouterr().out


def test_deep_compression(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = load("deep_compression").main(["--epochs", "6", "8", "2"])
    size, error = found["shared"]
    assert error < 15
    assert 20 * size < found["dense"][0]
    assert size < found["pruned"][0]
    assert size == (tmp_path / "deep_compression.jxc").stat().st_size
    assert f"{size:,} bytes" in capsys.readouterr().out
