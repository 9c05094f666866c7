"""The examples run as they are, and hold only two changed lines each."""

import importlib.util
import pathlib

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["linen_train_state", "nnx_loop"])
def test_example(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() > 0.97
    assert "bytes of float32" in capsys.readouterr().out
    changed = [line for line in path.read_text().splitlines() if "# changed" in line]
    assert len(changed) == 2
