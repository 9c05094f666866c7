"""Which call wrote a file, and where files may lie."""

import pytest

from jaxcomp.checkpoint import CheckpointError
from jaxcomp.checkpoint.resuming import check_call, file_in


def test_the_first_difference_is_named():
    call = {"damping": "0.01", "params/w": "ones"}
    check_call("f.jxc", dict(call), call)
    with pytest.raises(ValueError, match=r"^f\.jxc: .* another params/w: zeros, now ones"):
        check_call("f.jxc", call | {"params/w": "zeros"}, call)
    with pytest.raises(ValueError, match=r"another at_once: absent, now 1: pass another directory"):
        check_call("f.jxc", call, call | {"at_once": "1"})
    with pytest.raises(ValueError, match=r"another at_once: 1, now absent"):
        check_call("f.jxc", call | {"at_once": "1"}, call)
    with pytest.raises(CheckpointError, match=r"f\.jxc: does not say which call"):
        check_call("f.jxc", [["damping", "0.01"]], call)


def test_a_directory_is_made_and_nothing_else_will_do(tmp_path):
    path = file_in(tmp_path / "new" / "one", "a.jxc")
    assert path == str(tmp_path / "new" / "one" / "a.jxc")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"directory: .*file is a file: name a directory"):
        file_in(tmp_path / "file", "a.jxc")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(TypeError, match="directory must be a path, not 3"):
        file_in(3, "a.jxc")
