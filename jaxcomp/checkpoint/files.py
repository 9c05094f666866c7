"""Reading a file whole, and writing one so that a crash leaves the old one."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Sequence

from jaxcomp.checkpoint.errors import CheckpointError


def read_file(path: str | os.PathLike, limit: int | None = None) -> bytes:
    """Read a regular file.

    Args:
        path: where it is.
        limit: most bytes that it may have; None for any number.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is not a regular file, or longer than ``limit``.
    """
    name = os.fspath(path)
    try:
        # Without O_NONBLOCK, opening a pipe would wait for someone to write into it.
        handle = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: there is no such file to load") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "something else"
            raise CheckpointError(f"{kind}, not a regular file")
        if limit is not None and status.st_size > limit:
            raise CheckpointError(
                f"{status.st_size} bytes are much more than max_bytes allows: raise max_bytes if "
                "the file is to be trusted"
            )
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(status.st_size + 1)
    finally:
        os.close(handle)


def resolve_target(path: str | os.PathLike) -> str:
    """The absolute path that a file is to be written to; a symbolic link is followed.

    Raises:
        FileNotFoundError: the directory does not exist.
        IsADirectoryError: the path is a directory.
        OSError: the path is something else that is not a file.
    """
    target = os.path.realpath(os.fspath(path))
    directory = os.path.dirname(target)
    if not os.path.isdir(directory):
        raise FileNotFoundError(f"{directory}: no such directory, create it before saving into it")
    if os.path.isdir(target):
        raise IsADirectoryError(f"{target}: a directory, name a file in it")
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError(f"{target}: not a regular file, which cannot be replaced")
    return target


def write_file(target: str, pieces: Sequence[bytes | memoryview]) -> int:
    """Write a file under a temporary name in the same directory, sync it, then rename it.

    Whatever fails, the old file stays as it was and the temporary one is removed (a process that
    is killed leaves it: ``.jxc-*.tmp``). Permissions are those of the old file, or of a new one.

    Args:
        target: absolute path from :func:`resolve_target`.
        pieces: the file's bytes.

    Returns:
        How many bytes were written.

    Raises:
        OSError: writing failed.
    """
    directory = os.path.dirname(target)
    temporary = os.path.join(directory, f".jxc-{uuid.uuid4().hex}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY
    handle = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            size = sum(file.write(piece) for piece in pieces)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_directory(directory)
    return size


_BINARY = getattr(os, "O_BINARY", 0)


def _sync_directory(directory: str) -> None:
    """Make the rename durable, where the file system lets directories be synced."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
