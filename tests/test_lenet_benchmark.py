"""The benchmark of the smallest files goes on after a kill, and believes nothing but the file."""

import importlib
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

import jaxcomp

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
# A module of its own, so that a process which is killed and this one run the same.
NOISE = """
import pathlib, sys
import numpy as np
from jaxcomp import identity, quantize
from jaxcomp.demo.data import Dataset
from lenet_models import Network
from lenet_runs import Stage, trained

generator = np.random.default_rng(0)
images, labels = generator.random((64, 4, 4, 1), np.float32), np.arange(64, dtype=np.int32) % 10
data = Dataset("noise", images, labels, images, labels)
network = Network("tiny", {"dense1": (16, 8), "dense2": (8, 8), "dense3": (8, 10)})
quantized = quantize.train(quantize.Format(4))
stages = [
    Stage("dense", lambda steps: identity(), 2, 1e-2, (0.1, 0.1), 16),
    Stage("quantized", lambda steps: quantized, 40, 1e-2, (0.0, 0.1), 16),
]


def run(directory):
    done = -stages[0].epochs

    def tick(epochs):
        nonlocal done
        done += epochs
        print(f"epochs of the last stage: {done}", flush=True)

    return trained(pathlib.Path(directory), network, stages, data, 0, tick)


if __name__ == "__main__":
    run(sys.argv[1])
"""


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_killed_run_comes_to_the_same_file(benchmark, tmp_path, monkeypatch):
    (tmp_path / "lenet_noise.py").write_text(NOISE)
    paths = os.pathsep.join([str(BENCHMARKS), str(tmp_path), str(BENCHMARKS.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "lenet_noise", str(tmp_path / "killed")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        # Dozens of epochs would follow.
        for line in process.stdout:
            if line == "epochs of the last stage: 3\n":
                process.send_signal(signal.SIGKILL)
                break
    assert list((tmp_path / "killed").glob("tiny-quantized-*.progress.npz"))
    assert not list((tmp_path / "killed").glob("tiny-quantized-*.jxc"))
    monkeypatch.syspath_prepend(str(tmp_path))
    noise = benchmark("lenet_noise")
    files = [noise.run(tmp_path / directory).file for directory in ("killed", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not list((tmp_path / "killed").glob("*.progress.npz"))


def test_another_process_finds_the_error_of_a_file(benchmark, tmp_path):
    lenet, models = benchmark("lenet"), benchmark("lenet_models")
    generator = np.random.default_rng(0)
    for stem, count in (("train", 20), ("t10k", 50)):
        images = generator.integers(0, 256, (count, 28, 28), np.uint8)
        labels = generator.integers(0, 10, count, np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / f"{stem}-{name}-ubyte").write_bytes(head + array.tobytes())
    network = models.Network("tiny", {"dense1": (784, 4), "dense2": (4, 4), "dense3": (4, 10)})
    params = models.initial(network, 0)
    file = tmp_path / "tiny.jxc"
    jaxcomp.save(file, models.to_ship(params))
    data = lenet.images_lib.load("mnist", str(tmp_path))
    assert lenet.verify([file], str(tmp_path)) == [pytest.approx(models.error(params, data))]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="another process could not evaluate"):
        lenet.verify([file], str(tmp_path))


def test_files_of_other_settings_are_other_files(benchmark, tmp_path):
    recipes, runs = benchmark("lenet_recipes"), benchmark("lenet_runs")
    network = benchmark("lenet_models").NETWORKS["lenet-5"]
    data = type("Data", (), {"name": "mnist"})
    records = [recipes.Record(1e-6, 2), recipes.Record(2e-6, 2), recipes.Record(1e-6, 3)]
    files = {
        runs.finished(tmp_path, network, recipes.record(network, how), data, 0) for how in records
    }
    assert len(files) == 3
