"""A study's file: one line of JSON for each thing that happened, added and never changed.

The first line says which study it is. A line ``{"asked": [point, …]}`` is written before these
points are evaluated, and a line for each trial as it finishes, in the same order. So a search that
was killed between any two bytes knows what was finished and what was under way. There is no code
in the file, and every line of it is checked when it is read.
"""

import contextlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxcomp.search.trials import Point, Trial

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes from one file
    fcntl = None

FORMAT = 1
_STATUSES = ("finished", "failed", "stopped")
_BINARY = getattr(os, "O_BINARY", 0)


class Kept(NamedTuple):
    """What a file holds.

    Attributes:
        trials: in the order of their numbers.
        pending: points that were asked for after the last of them and are not yet evaluated.
        told: how many trials there were when these were asked for.
        size: bytes of whole lines; what comes after them was torn off by a kill.
    """

    trials: tuple[Trial, ...] = ()
    pending: tuple[Point, ...] = ()
    told: int = 0
    size: int = 0


class Log(NamedTuple):
    """An open file, or none.

    Attributes:
        path: of the file; None: nothing is kept.
        handle: of the open file.
        kept: what earlier runs left in it.
    """

    path: str | None
    handle: int | None
    kept: Kept

    def asked(self, points: list[Point]) -> None:
        """Keep what is about to be evaluated."""
        self._add({"asked": points})

    def finished(self, trial: Trial) -> None:
        """Keep a trial; it is on the disk when this returns."""
        self._add(trial._asdict())

    def _add(self, line: Mapping[str, Any]) -> None:
        if self.handle is not None:
            _write(self.handle, line)


@contextlib.contextmanager
def opened(file: Any, header: Mapping[str, Any], check: Callable[[Point], Any]) -> Iterator[Log]:
    """Open a study's file to go on with it, or begin it.

    The file is locked for as long (``flock``; not on Windows, and on network drives only where
    those lock): a second process that opens it is refused.

    Args:
        file: a path; None: nothing is kept.
        header: which study it is: names and what JSON can hold.
        check: raises a ``ValueError`` or ``TypeError`` for a point that is not of the space.

    Yields:
        The log.

    Raises:
        TypeError: ``file`` is no path.
        FileNotFoundError: its directory does not exist.
        BlockingIOError: another process has it open.
        ValueError: it is of another study, damaged, or something else; it is then left as it is.
    """
    if file is None:
        yield Log(None, None, Kept())
        return
    path = _path(file)
    handle, is_new = _open(path)
    try:
        _lock(handle, path)
        kept = _kept(path, _read(handle, path), header, check)
        if not kept.size:
            os.ftruncate(handle, 0)
            _write(handle, header)
            if is_new:
                _sync_directory(path)
        elif kept.size < os.fstat(handle).st_size:
            os.ftruncate(handle, kept.size)
        yield Log(path, handle, kept)
    finally:
        os.close(handle)


def read(
    file: Any, check_header: Callable[[dict[str, Any]], Any], check: Callable[[Point], Any]
) -> tuple[dict[str, Any], Kept]:
    """What is in a study's file, which is left as it is; also while a search writes it.

    Args:
        file: a path.
        check_header: raises a ``ValueError`` for a header of another study.
        check: likewise for a point that is not of the space.

    Returns:
        The header and the rest.

    Raises:
        TypeError: ``file`` is no path.
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no study's file.
    """
    path = _path(file)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    try:
        text = _read(handle, path)
    finally:
        os.close(handle)
    lines = _lines(path, text)
    if not lines:
        raise ValueError(f"{path}: not a study: it has no first line that says which one")
    _check_header(path, lines[0])
    check_header(lines[0])
    return lines[0], _body(path, lines, check, _whole(text))


def header_of(**names: Any) -> dict[str, Any]:
    """The first line of a file: that it is a study, and which.

    Example:
        >>> header_of(strategy="random()")
        {'study': 'jaxcomp.search', 'format': 1, 'strategy': 'random()'}
    """
    return {"study": "jaxcomp.search", "format": FORMAT, **names}


def _path(file: Any) -> str:
    if not isinstance(file, (str, os.PathLike)):
        raise TypeError(f"file must be a path, not {file!r:.60}")
    return os.fspath(file)


def _open(path: str) -> tuple[int, bool]:
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
        raise FileNotFoundError(f"{directory}: no such directory: create it before searching")
    is_new = not os.path.exists(path)
    if not is_new and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: not a regular file: name another one")
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | _BINARY
    return os.open(path, flags, 0o666), is_new


def _lock(handle: int, path: str) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            f"{path}: another search is writing this study: wait for it, or name another file; "
            "for several machines use strategies.optuna(storage=...), with a file for each"
        ) from None


def _read(handle: int, path: str) -> bytes:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise ValueError(f"{path}: not a regular file: name another one")
    with os.fdopen(os.dup(handle), "rb") as file:
        file.seek(0)
        return file.read()


def _write(handle: int, line: Mapping[str, Any]) -> None:
    data = _encoded(line)
    while data:
        data = data[os.write(handle, data) :]
    os.fsync(handle)


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def _sync_directory(path: str) -> None:
    # A new file's name is in its directory, which Windows cannot sync.
    if os.name == "posix":
        handle = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _whole(text: bytes) -> int:
    """Bytes up to the end of the last whole line."""
    return text.rfind(b"\n") + 1


def _lines(path: str, text: bytes) -> list[Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of a study")

    lines = []
    for i, line in enumerate(text[: _whole(text)].split(b"\n")[:-1], 1):
        try:
            found = json.loads(line, parse_constant=refuse)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {i}: not what a search wrote: {error!s:.80}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path}: line {i}: not what a search wrote: {line[:40]!r}")
        lines.append(found)
    return lines


def _kept(path: str, text: bytes, header: Mapping[str, Any], check: Callable[[Point], Any]) -> Kept:
    lines = _lines(path, text)
    if not lines:
        # A kill may have torn the first line; anything else is somebody's file.
        if not _encoded(header).startswith(text):
            raise ValueError(f"{path}: not a study, and not empty: name another file")
        return Kept()
    _check_header(path, lines[0])
    for name in dict.fromkeys([*header, *lines[0]]):
        before, now = lines[0].get(name), json.loads(json.dumps(header.get(name)))
        if name == "space" and lines[0].get("digest") == header.get("digest"):
            continue  # it is told in other words than it was: the digest tells spaces apart
        if json.dumps(before) != json.dumps(now):  # as dicts they would be equal in any order
            raise ValueError(
                f"{path}: of another study: {name}: {_difference(before, now)}: name another file, "
                "or remove this one to start anew"
            )
    return _body(path, lines, check, _whole(text))


def _check_header(path: str, header: Mapping[str, Any]) -> None:
    if header.get("study") != "jaxcomp.search":
        raise ValueError(f"{path}: not a study: its first line does not say which one")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: of format {header.get('format')!r:.20}, not {FORMAT}: of another version"
        )


def _difference(before: Any, now: Any) -> str:
    """What was and what is, cut to the first line that differs where they are long."""
    if isinstance(before, list) and isinstance(now, list):
        differ = [i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b]
        i = differ[0] if differ else min(len(before), len(now))
        before, now = (lines[i] if i < len(lines) else "absent" for lines in (before, now))
    return f"{before!r:.100}, now {now!r:.100}"


def _body(path: str, lines: list[Any], check: Callable[[Point], Any], size: int) -> Kept:
    trials: list[Trial] = []
    pending: list[Point] = []
    told = 0
    objectives = len(_named(path, 1, lines[0].get("objectives")))
    for i, line in enumerate(lines[1:], 2):
        try:
            if line.keys() == {"asked"}:
                if pending:
                    raise ValueError("points are asked for before those asked earlier are done")
                pending, told = _points(line["asked"], check), len(trials)
                continue
            trial = _trial(line, objectives)
            if trial.number != len(trials):
                raise ValueError(f"trial {trial.number} where {len(trials)} comes next")
            if not pending or pending[0] != trial.point:
                raise ValueError(f"trial {trial.number} was not asked for")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: line {i}: {error}") from None
        trials.append(trial)
        pending = pending[1:]
    return Kept(tuple(trials), tuple(pending), told if pending else len(trials), size)


def _named(path: str, i: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path}: line {i}: names no objectives")
    return value


def _points(asked: Any, check: Callable[[Point], Any]) -> list[Point]:
    if not isinstance(asked, list) or not asked:
        raise ValueError("no list of points is asked for")
    for point in asked:
        if not isinstance(point, dict):
            raise ValueError(f"{point!r:.60} is no point")
        check(point)
    return asked


def _trial(line: Mapping[str, Any], objectives: int) -> Trial:
    if line.keys() != set(Trial._fields):
        raise ValueError("neither a trial nor points that are asked for")
    trial = Trial(**line)
    if type(trial.number) is not int or trial.number < 0:
        raise ValueError(f"a trial's number is {trial.number!r:.40}")
    name = f"trial {trial.number}"
    if trial.status not in _STATUSES:
        raise ValueError(f"{name}: status {trial.status!r:.40} is none of {', '.join(_STATUSES)}")
    if not _is_finite(trial.seconds) or trial.seconds < 0:
        raise ValueError(f"{name}: seconds are {trial.seconds!r:.40}")
    if not isinstance(trial.told, dict):
        raise ValueError(f"{name}: told is {trial.told!r:.40}")
    beyond = trial.told.get("violation", 0)
    if not _is_finite(beyond) or beyond < 0:
        raise ValueError(f"{name}: violation is {beyond!r:.40}")
    if trial.values is None:
        if trial.status == "finished":
            raise ValueError(f"{name}: finished, but has no values")
        return trial
    values = trial.values
    if trial.status == "failed" or not isinstance(values, list) or len(values) != objectives:
        raise ValueError(
            f"{name}: values {values!r:.40} of {objectives} objectives, {trial.status}"
        )
    if not all(map(_is_finite, values)):
        raise ValueError(f"{name}: a value is no finite number: {values!r:.60}")
    return trial._replace(values=tuple(map(float, values)), seconds=float(trial.seconds))


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
