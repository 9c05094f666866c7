"""The examples run as they are; those that wrap an optimizer hold only two changed lines each."""

import importlib.util
import pathlib
import re
import shutil
from typing import Any

import jax
import numpy as np
import pytest

import jaxcomp
from jaxcomp import arrays

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


def test_searched_bits_and_sparsity(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = load("search_bits_and_sparsity")
    # One hidden layer, and so few settings that the search sees them all.
    small = {"WIDTHS": (24,), "SPARSITIES": (0.5, 0.8), "BITS": (2, 4), "BUDGET": 900}
    steps = {"STEPS": 300, "FINE_TUNING_STEPS": 100, "EVALUATIONS": 16, "POPULATION": 8}
    for name, value in (small | steps).items():
        monkeypatch.setattr(module, name, value)
    settings, front, uniform, shipped = module.main()
    data = module.make_data()

    def accuracy(params, part):
        x = np.asarray(part[0])
        layers = [{k: np.asarray(v) for k, v in y.items()} for y in jaxcomp.decode(params).values()]
        hidden = np.maximum(x @ layers[0]["kernel"] + layers[0]["bias"], 0)
        logits = hidden @ layers[1]["kernel"] + layers[1]["bias"]
        return np.mean(logits.argmax(-1) == np.asarray(part[1]))

    one_image = 1.01 / len(data.held_out[1])
    for found in front:
        pairs = {path: (rule["sparsity"], rule["bits"]) for path, rule in found.candidate.items()}
        packed = module.assembled(settings.packed, pairs)
        assert jaxcomp.save("fresh.jxc", packed) == found.bytes <= 900
        fresh = accuracy(jaxcomp.load("fresh.jxc"), data.held_out)
        assert found.accuracy == pytest.approx(fresh, abs=one_image)
    # All were seen: nothing uniform is better; bytes by leaf add up to the file's but for a few.
    assert len(uniform) > 1
    for each in uniform:
        rivals = [found.accuracy for found in front if found.bytes <= each.bytes + 8]
        assert max(rivals) >= each.accuracy - one_image
    for name, each in shipped.items():
        assert (tmp_path / f"{name}.jxc").stat().st_size == each.bytes <= 900
        loaded = jaxcomp.load(f"{name}.jxc")
        assert each.test == pytest.approx(accuracy(loaded, data.test), abs=one_image)
        assert each.held_out > each.found.accuracy
        for path, rule in each.found.candidate.items():
            kernel = loaded[path.split("/")[0]]["kernel"]
            assert kernel.bits == rule["bits"]
            assert np.mean(np.asarray(kernel.decode()) == 0) >= rule["sparsity"] - 1e-3
    assert "16 of 16 candidates evaluated, one program" in capsys.readouterr().out


def test_deep_compression(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = load("deep_compression").main(["--epochs", "6", "8", "2"])
    size, error = found["shared"]
    assert error < 15
    assert 20 * size < found["dense"][0]
    assert size < found["pruned"][0]
    assert size == (tmp_path / "deep_compression.jxc").stat().st_size
    assert f"{size:,} bytes" in capsys.readouterr().out


def killed_and_resumed(module, monkeypatch, arguments, name, steps):
    """What a run gives whose training was killed after some steps, and was started again."""

    def until_killed(items, words, progress):
        for count, item in enumerate(items):
            if words == name and count == steps:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(module, "watched", until_killed)
        with pytest.raises(KeyboardInterrupt):
            module.main(arguments)
    return module.main(arguments)


def assert_identical(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def losses(printed, name):
    return [float(loss) for loss in re.findall(rf"^{name} \d+: loss ([\d.]+)", printed, re.M)]


def test_a_resnet_trained_on_a_mesh(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = load("train_resnet")
    tiny = module.Size(pixels=8, classes=4, width=16, blocks=(1, 1), bottleneck=False)
    monkeypatch.setitem(module.SIZES, "cifar", tiny)
    # The rate and the schedule know where a run ends, so that every one of them has as many steps.
    steps = ["--steps", "24", "--every", "9", "--log", "6", "--rate", "0.01"]
    # Half of the devices: each may wait for two exchanges at once, and the CPU backend's threads
    # are as many as all devices.
    steps += ["--mesh", "2", "2"]
    found = module.main([*steps, "--checkpoints", "one"])
    printed = capsys.readouterr().out
    assert losses(printed, "teacher")[-1] < 0.2 < losses(printed, "teacher")[0]
    assert found["teacher"] > 0.9
    assert found["packed"] == found["trained"] > 0.8
    assert found["bytes"] == (tmp_path / "resnet.jxc").stat().st_size
    assert f"{found['bytes']:,} bytes" in printed

    state, loaded = found["state"], jaxcomp.load("resnet.jxc")["params"]
    assert_identical(jaxcomp.decode(loaded), jaxcomp.compressed(state.params, state.opt_state))
    kernels = {path: leaf for path, leaf in flat(loaded).items() if path.endswith("kernel")}
    bits = {path: leaf.bits for path, leaf in kernels.items()}
    assert {path for path, each in bits.items() if each == 8} == {"Conv_0/kernel", "Dense_0/kernel"}
    body = [np.asarray(leaf.decode()) for path, leaf in kernels.items() if bits[path] == 4]
    size = sum(leaf.size for leaf in body)
    assert sum(np.sum(leaf == 0) for leaf in body) >= round(0.8 * size)
    # A bit and a half a weight of the body, a byte of the others, and floats for the rest.
    ends = sum(kernels[path].size for path, each in bits.items() if each == 8)
    total = sum(leaf.size for leaf in jax.tree.leaves(found["state"].params))
    statistics = sum(leaf.size for leaf in jax.tree.leaves(found["state"].batch_stats))
    rest = 4 * (total - size - ends + statistics)
    assert found["bytes"] < 1.5 * size / 8 + ends + 1.2 * rest + 600

    shutil.copytree("one/teacher", "two/teacher")
    again = ["--checkpoints", "two", "--out", "two.jxc"]
    resumed = killed_and_resumed(module, monkeypatch, steps + again, "student", 14)
    assert_identical(resumed["state"], state)
    assert (tmp_path / "two.jxc").read_bytes() == (tmp_path / "resnet.jxc").read_bytes()


def test_a_language_model_trained_on_a_mesh(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = load("train_lm")
    monkeypatch.setitem(module.SIZES, "small", module.Size(1, 32, 2, 16))
    (tmp_path / "text").write_bytes(b"What is said once is said again. " * 30)
    steps = ["--steps", "60", "--every", "25", "--log", "10", "--rate", "0.01", "--data", "text"]
    steps += ["--mesh", "2", "2"]
    found = module.main([*steps, "--checkpoints", "one"])
    printed = capsys.readouterr().out
    # The first loss is above that of guessing all bytes alike.
    assert losses(printed, "step")[-1] < 1 < 5 < losses(printed, "step")[0]
    assert found["packed"] == pytest.approx(found["trained"], abs=0.01)
    assert found["packed"] < 1.5
    assert found["bytes"] == (tmp_path / "lm.jxc").stat().st_size
    assert f"{found['bytes']:,} in the file" in printed

    state, loaded = found["state"], jaxcomp.load("lm.jxc")
    effective = jaxcomp.compressed(state.params, state.opt_state)
    assert_identical(jaxcomp.decode(loaded), effective)
    for path, leaf in flat(loaded).items():
        dense = "up/" not in path and "down/" not in path
        assert path.endswith("scale") or leaf.bits == (8 if dense else 4), path
        if not dense:
            runs = np.asarray(leaf.decode()).reshape(-1, 4, leaf.shape[-1])
            assert np.max(np.sum(runs != 0, 1)) <= 2
    # Three bits a weight that is 2:4 and in 4 bits, and a scale for 32; a byte for all others.
    feed_forward = 2 * 32 * 128
    others = sum(leaf.size for leaf in jax.tree.leaves(state.params)) - feed_forward
    assert found["bytes"] < (3 + 1) * feed_forward / 8 + 1.2 * others + 1500

    again = ["--checkpoints", "two", "--out", "two.jxc"]
    resumed = killed_and_resumed(module, monkeypatch, steps + again, "training", 33)
    assert_identical(resumed["state"], state)
    assert (tmp_path / "two.jxc").read_bytes() == (tmp_path / "lm.jxc").read_bytes()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train_lm", ["--steps", "1"], "--steps must be at least 2"),
        ("train_resnet", ["--log", "0"], "--log must be at least 1"),
        ("train_lm", ["--mesh", "64", "1"], "--mesh 64 1: there are 8 devices"),
        ("train_resnet", ["--mesh", "0", "1"], "--mesh 0 1: there are 8 devices"),
        ("train_lm", ["--batch", "12"], "--batch 12 must be a multiple of 8"),
        ("train_resnet", ["--batch", "3", "--mesh", "2", "2"], "--batch 3 must be a multiple of 2"),
        ("train_lm", ["--data", "short"], "short: 3 bytes are too few"),
        ("train_resnet", ["--data", "wrong.npz"], "must be (20, 32, 32, 3), ten at least"),
        ("train_resnet", ["--data", "labels.npz"], "labels 0 to 9"),
    ],
)
def test_what_a_run_cannot_begin_with_is_named(
    tmp_path, monkeypatch, capsys, name, arguments, message
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("short").write_bytes(b"abc")
    np.savez("wrong.npz", images=np.zeros((20, 28, 28, 3)), labels=np.zeros(20))
    np.savez("labels.npz", images=np.zeros((20, 32, 32, 3)), labels=np.full(20, 10))
    with pytest.raises(SystemExit) as stopped:
        load(name).main(arguments)
    assert message in f"{stopped.value}{capsys.readouterr().err}"


def flat(tree):
    return jaxcomp.tree.flatten(tree, is_leaf=arrays.is_compressed)
