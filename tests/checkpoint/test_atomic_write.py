"""Whatever fails while writing, the old file stays and no temporary one is left."""

import errno
import os
import signal
import stat
import subprocess
import sys

import jax.numpy as jnp
import pytest

from jaxcomp.checkpoint import CheckpointError, files, load, save


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.jxc"
    save(path, {"old": 1})
    return path


def assert_untouched(file):
    assert load(file) == {"old": 1}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod", "stat"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failing_call_leaves_the_old_file(file, monkeypatch, call, error):
    real = getattr(os, call)

    def fail(path, *args, **kwargs):
        if call == "stat" and "model" not in str(path):
            return real(path, *args, **kwargs)
        raise error

    target = files.resolve_target(file)
    pieces = [b"new"]
    with monkeypatch.context() as patched:
        patched.setattr(files.os, call, fail)
        with pytest.raises(type(error)):
            files.write_file(target, pieces)
    assert_untouched(file)


def test_a_failing_write_leaves_the_old_file(file, monkeypatch):
    real = os.fdopen

    class Full:
        def __init__(self, inner):
            self.inner = inner
            self.written = 0

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.inner.close()

        def write(self, piece):
            if self.written > 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.written += self.inner.write(piece)
            return self.written

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fdopen", lambda fd, mode: Full(real(fd, mode)))
        with pytest.raises(OSError, match="No space left"):
            save(file, {"w": jnp.ones(5000)})
    assert_untouched(file)


def test_the_file_is_synced_before_it_is_renamed_and_the_directory_after(file, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        calls.append("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def replaced(source, target):
        calls.append("rename")
        assert os.path.dirname(source) == os.path.dirname(target)
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", replaced)
    save(file, {"new": 1})
    assert calls == ["file", "rename", "directory"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_cannot_sync_directories(file, monkeypatch, code):
    fsync = os.fsync

    def synced(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, "no")
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", synced)
    save(file, {"new": 1})
    assert load(file) == {"new": 1}


def test_a_killed_process_leaves_the_old_file(file):
    script = (
        "import os, signal, sys\n"
        "from jaxcomp.checkpoint import files\n"
        "def die(handle): os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.fsync = die\n"
        "files.write_file(files.resolve_target(sys.argv[1]), [b'half'] * 1000)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(file)],
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
    )
    assert out.returncode == -signal.SIGKILL
    assert load(file) == {"old": 1}
    left = [path.name for path in file.parent.iterdir() if path != file]
    assert len(left) == 1
    assert left[0].startswith(".jxc-")
    assert left[0].endswith(".tmp")
    save(file, {"new": 2})
    assert load(file) == {"new": 2}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_open_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        save(tmp_path / "a", {})
        with open(tmp_path / "b", "w"):
            pass
    finally:
        os.umask(before)
    assert os.stat(tmp_path / "a").st_mode == os.stat(tmp_path / "b").st_mode


def test_an_old_file_keeps_its_mode(file):
    os.chmod(file, 0o640)
    save(file, {"new": 1})
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o640


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "a.jxc"
    link = tmp_path / "link.jxc"
    link.symlink_to(target)
    save(link, {"a": 1})
    assert link.is_symlink()
    assert not target.is_symlink()
    assert load(target) == load(link) == {"a": 1}


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("a.jxc", {"a": 1})
    assert load("a.jxc") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.jxc"]


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="create it before saving"):
        save(tmp_path / "missing" / "a.jxc", {})
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        save(tmp_path, {})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        save(tmp_path / "pipe", {})


def test_the_place_is_looked_at_before_anything_is_encoded(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "missing" / "a.jxc", {"w": print})


def test_places_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file to load"):
        load(tmp_path / "missing.jxc")
    with pytest.raises(CheckpointError, match="directory"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load("/dev/zero")
