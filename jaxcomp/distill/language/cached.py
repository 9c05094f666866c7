"""What a teacher says, kept in a file: run it once, learn from it for many epochs.

Batches are written one after the other as they come, in bounded memory; a run that is killed goes
on where it was. They are read in any order, from a file that is mapped and not loaded. Bytes per
token at 32 of 50,257 tokens, beside the 201,028 of all logits in float32: 196 in float32 (1,026
times less), 130 in float16 (1,546 times), 99 in uint8 (2,031 times).
"""

import contextlib
import dataclasses
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import numpy as np

from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.checkpoint.files import resolve_target, write_file
from jaxcomp.checks import check_function
from jaxcomp.distill.language import records
from jaxcomp.distill.language.rows import LARGEST_VOCABULARY, Dtype, Layout, decode, encode
from jaxcomp.distill.language.top_logits import TopLogits


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TeacherFile:
    """A sequence of batches in a file: ``len(file)``, ``file[7]``, ``for top in file``.

    Nothing of a batch is read before it is asked for. It comes as a :class:`TopLogits` of NumPy
    arrays, whose largest logit at each position (or its rest) is 0.

    Attributes:
        path: the file.
        layout: of all its positions: ``vocabulary``, ``kept``, ``dtype``, ``rest`` (whether there
            is one) and its ``temperature``.
        about: what :func:`write_teacher` was told of it.
        torn: bytes at the end that are not a whole batch: a run was killed there, or is at work.
            :func:`write_teacher` drops them and goes on.
    """

    path: str
    layout: Layout
    about: Mapping[str, str]
    torn: int
    data: Any
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: Any) -> TopLogits:
        number = operator.index(number)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.path} has no batch {number}: it holds {len(self)}.")
        with _naming(self.path):
            at = self.starts[number]
            payload, shape = records.read_payload(self.data, at, self.layout)
            return decode(payload, shape, self.layout)

    def __iter__(self) -> Iterator[TopLogits]:
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        torn = f", {self.torn} bytes torn" if self.torn else ""
        return f"TeacherFile({self.path!r}, {len(self)} batches, {self.layout}{torn})"


def write_teacher(
    path: str | os.PathLike,
    batches: Callable[[int], Iterable[TopLogits]],
    *,
    dtype: Dtype = "float16",
    about: Mapping[str, str] | None = None,
) -> int:
    """Write what a teacher says to a file, batch by batch; go on where an earlier run was killed.

    The file only grows: each batch is handed to the operating system as it comes, and all are
    synced at the end. What a killed run has left of a batch is dropped and written anew. One
    process writes at a time.

    Args:
        path: the file; made if it is not there.
        batches: called with the number of batches that the file holds already; gives those that
            follow, in the same order in every run. Positions may have any shape (mostly
            ``(batch, length)``), another one in each batch, but the same count, vocabulary and
            temperature. For a teacher of which no rest is known:
            ``TopLogits(values, indices, None, vocabulary)``.
        dtype: of the values: ``"float32"`` as they are, ``"float16"`` (an error of about 1e-7 nats
            in the KL), or ``"uint8"`` (about 1e-5, at most 1e-4).
        about: what tells the teacher and its data from others, e.g. the checkpoint's name and the
            tokenizer's; must be the same in every run that writes to the file.

    Returns:
        How many batches the file holds in the end.

    Raises:
        TypeError: ``batches`` is no function, or a batch is no ``TopLogits``.
        CheckpointError: the file that is there is damaged, or something else.
        ValueError: the file that is there was written with other options or of another kind of
            batches; a batch of another kind, without positions, or with NaN.
        OSError: writing failed.

    Example:
        >>> import os, tempfile
        >>> import jax.numpy as jnp
        >>> from jaxcomp.distill.language.top_logits import top_logits
        >>> path = os.path.join(tempfile.mkdtemp(), "teacher.jxt")
        >>> texts = [jnp.eye(4), 2 * jnp.eye(4), 3 * jnp.eye(4)]
        >>> def batches(done):
        ...     return (top_logits(x, 2) for x in texts[done:])
        >>> write_teacher(path, batches)
        3
        >>> write_teacher(path, batches)  # nothing is left to do
        3
        >>> print(open_teacher(path)[2].values[0])
        [ 0. -3.]
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype {dtype!r} must be one of {', '.join(get_args(Dtype))}.")
    check_function("batches", batches, "a function of the number of batches that are there")
    told = {name: str(word) for name, word in (about or {}).items()}
    target = resolve_target(path)
    with _naming(target):
        done, layout = _resume(target, dtype, told)
    number = done
    with contextlib.ExitStack() as stack:
        file = None
        for top in batches(done):
            if not isinstance(top, TopLogits):
                kind = type(top).__name__
                raise TypeError(f"batch {number} must be TopLogits, not {kind}: top_logits.")
            made = _layout_of(top, dtype)
            _check_same(f"batch {number}", made, "those before it", layout or made)
            payload, shape = encode(top, made), np.shape(top.indices)[:-1]
            if layout is None:
                write_file(target, [records.header_bytes(made, told)])
                layout = made
            file = file or stack.enter_context(open(target, "ab"))
            file.write(records.record_head(payload, number, shape))
            file.write(payload)
            file.flush()
            number += 1
        if file is not None:
            os.fsync(file.fileno())
    return number


def open_teacher(path: str | os.PathLike) -> TeacherFile:
    """Open a file of teacher outputs, to be read batch by batch in any order.

    Only what says where the batches are is read: 56 bytes of each.

    Args:
        path: the file.

    Returns:
        A sequence of batches.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is something else, was written by a newer version, or is damaged. The
            values of a batch are checked when it is read.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "teacher.jxt")
        >>> batch = TopLogits(np.array([[2.0, 1.0]]), np.array([[4, 0]]), None, vocabulary=9)
        >>> write_teacher(path, lambda done: [batch] * 3)
        3
        >>> file = open_teacher(path)
        >>> order = np.random.default_rng(0).permutation(len(file))
        >>> [file[i].values.shape for i in order]
        [(1, 2), (1, 2), (1, 2)]
    """
    name = os.fspath(path)
    with _naming(name):
        data = records.map_file(name)
        layout, about, begin = records.read_header(data)
        starts, end = records.scan(data, begin, layout)
    return TeacherFile(name, layout, about, len(data) - end, data, starts)


class _Left(NamedTuple):
    """What earlier runs have left."""

    done: int
    layout: Layout | None


def _resume(target: str, dtype: str, about: Mapping[str, str]) -> _Left:
    """Drop what is torn off the end of a file, and say what is in it."""
    if not os.path.exists(target):
        return _Left(0, None)
    file = open_teacher(target)
    _check_same("this call", {"dtype": dtype, **about}, "the file", _told(file))
    starts, end = file.starts, len(file.data) - file.torn
    if starts:
        try:
            records.read_payload(file.data, starts[-1], file.layout)
        except CheckpointError:  # A power cut: the size was written, but not all of the data.
            starts, end = starts[:-1], starts[-1]
    layout, size = file.layout, len(file.data)
    del file  # Some systems do not cut a file that is mapped.
    if end < size:
        os.truncate(target, end)
    return _Left(len(starts), layout)


def _told(file: TeacherFile) -> dict[str, Any]:
    return {"dtype": file.layout.dtype, **file.about}


def _layout_of(top: TopLogits, dtype: str) -> Layout:
    """The layout of a batch, which is checked first."""
    values, indices = np.shape(top.values), np.shape(top.indices)
    if values != indices or not 2 <= len(values) <= records.AXES + 1 or 0 in values:
        raise ValueError(
            f"a batch with values {values} and indices {indices}: both must be (..., count), with "
            f"1 to {records.AXES} axes of positions, and none of them empty."
        )
    if top.rest is not None and np.shape(top.rest) != values[:-1]:
        raise ValueError(
            f"a batch with a rest {np.shape(top.rest)} and values {values}: it must be one number "
            "for each position, or None."
        )
    if not values[-1] <= top.vocabulary <= LARGEST_VOCABULARY:
        raise ValueError(f"vocabulary {top.vocabulary} must be {values[-1]} to 2**31.")
    # What does not depend on the temperature must not differ by it.
    temperature = float(top.temperature) if top.rest is not None else 1.0
    return Layout(int(top.vocabulary), values[-1], dtype, top.rest is not None, temperature)


def _check_same(what: str, new: Any, where: str, old: Any) -> None:
    new = new if isinstance(new, dict) else new._asdict()
    old = old if isinstance(old, dict) else old._asdict()
    for name in dict.fromkeys([*new, *old]):
        now, before = new.get(name, "absent"), old.get(name, "absent")
        if now != before:
            raise ValueError(
                f"{what} has {name} {now}, {where} {before}: a file holds one kind only; pass what "
                "fits, or another path."
            )


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Put the path before what is wrong with the file."""
    try:
        yield
    except CheckpointError as error:
        if str(error).startswith(path):
            raise
        raise CheckpointError(f"{path}: {error}") from error
