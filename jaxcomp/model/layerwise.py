"""A walk over a model: a few leaves at a time, from statistics of what they are multiplied by.

What a solver makes of a leaf takes its place before the next pass, so that later leaves see what
they will be given. Finished leaves can be kept in files, and the same call goes on after them.
"""

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import CompressedArray, decode
from jaxcomp.checkpoint import CheckpointError, load, save
from jaxcomp.checkpoint.resuming import check_call, describe, file_in
from jaxcomp.model.observe import Observed, observe
from jaxcomp.model.progress import watched
from jaxcomp.model.statistics import Statistic, second_moment

# What became of a leaf: its new form first, then whatever else is to be kept of it.
Finished = tuple[Any, ...]


class WalkFiles(NamedTuple):
    """The files of one call.

    Attributes:
        start: their common path, without number and ending.
        call: a digest of what tells the call from others.
    """

    start: str
    call: str

    @staticmethod
    def open(
        directory: str | os.PathLike, name: str, call: Mapping[str, str], params: Any
    ) -> "WalkFiles":
        """The files of a call in a directory, which is made if it is not there.

        Args:
            directory: the directory.
            name: of the method; the files begin with it.
            call: what tells the call from others, beside the parameters.
            params: that it begins with.

        Returns:
            The files.

        Raises:
            ValueError: another call wrote files there.
            TypeError: a leaf that a file cannot hold.
            CheckpointError: the file of the call is damaged.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> where = tempfile.mkdtemp()
            >>> files = WalkFiles.open(where, "gptq", {"damping": "0.01"}, {"w": np.ones(2)})
            >>> WalkFiles.open(where, "gptq", {"damping": "0.1"}, {"w": np.ones(2)})
            Traceback (most recent call last):
            ...
            ValueError: ...written by a call with another damping: 0.01, now 0.1: pass another ...
        """
        path = file_in(directory, f"{name}.jxc")
        lines = {**call, **describe("params", params)}
        if os.path.exists(path):
            check_call(path, load(path), lines)
        else:
            save(path, lines)
        text = repr(sorted(lines.items()))
        return WalkFiles(path.removesuffix(".jxc"), hashlib.sha256(text.encode()).hexdigest())

    def path(self, number: int) -> str:
        """The file of a group of leaves."""
        return f"{self.start}-{number:05d}.jxc"

    def write(self, number: int, finished: Mapping[str, Finished]) -> None:
        """Keep a finished group.

        Args:
            number: of the group.
            finished: by path; arrays, compressed leaves and lists of numbers.

        Raises:
            OSError: the file cannot be written.
        """
        leaves = [[path, *jax.device_get(parts)] for path, parts in finished.items()]
        save(self.path(number), {"call": self.call, "leaves": leaves})

    def read(
        self, number: int, group: Sequence[str], check: Callable[[str, Finished], None]
    ) -> dict[str, Finished] | None:
        """A finished group, or None if it is not there.

        Args:
            number: of the group.
            group: the paths that it must hold.
            check: ``check(path, parts)`` raises ``ValueError`` for parts that do not fit.

        Returns:
            By path, as they were written.

        Raises:
            ValueError: another call wrote the file.
            CheckpointError: it is damaged, or holds something else.
        """
        path = self.path(number)
        if not os.path.exists(path):
            return None
        tree = load(path)
        if not isinstance(tree, dict) or tree.keys() != {"call", "leaves"}:
            raise CheckpointError(f"{path}: not a file of finished leaves")
        if tree["call"] != self.call:
            raise ValueError(
                f"{path}: written by another call: pass another directory, or remove the file"
            )
        try:
            found = {name: tuple(parts) for name, *parts in tree["leaves"]}
            if list(found) != list(group):
                raise ValueError(f"leaves {list(found)}, not {list(group)}")
            for name, parts in found.items():
                check(name, parts)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: does not fit this call: {error}") from error
        return found


def walk(
    apply_fn: Callable[..., Any],
    params: Any,
    again: Callable[[], Iterable[Any]],
    groups: Sequence[Sequence[str]],
    statistic: Statistic,
    solve: Callable[[str, Any, tuple[Any, ...]], Finished],
    *,
    looked_up: frozenset[str] = frozenset(),
    also_looked_up: frozenset[str] = frozenset(),
    sequential: bool = True,
    files: WalkFiles | None = None,
    check: Callable[[str, Finished], None] = lambda path, parts: None,
    words: str = "walking",
    progress: bool | None = None,
) -> Iterator[tuple[str, Finished]]:
    """Every leaf of every group, solved from a statistic of what it is multiplied by.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        again: returns the batches from their beginning, see
            :func:`jaxcomp.model.batches.rereadable`.
        groups: paths of leaves that one pass over the batches serves, in the order of the walk.
        statistic: from :mod:`jaxcomp.model.statistics`.
        solve: ``solve(path, leaf, evidence)``, with the stored leaf and the statistic of each of
            its uses; what it returns first takes the leaf's place.
        looked_up: paths that no product reads; they are solved without evidence, ``()``.
        also_looked_up: paths of which other uses than products need no statistic.
        sequential: whether a pass runs the model with all earlier leaves as they became.
        files: where finished groups are kept, or None.
        check: for parts read from files: raises ``ValueError`` if they do not fit.
        words: for the progress bar.
        progress: whether to show it on stderr; None: on a terminal, if it takes long.

    Yields:
        Path and parts, in order.

    Raises:
        ValueError: no batches; the statistic of a leaf cannot be had (the message says why); NaN or
            infinite inputs.
        CheckpointError: a file is damaged.

    Example:
        >>> from jaxcomp.model.statistics import absmax
        >>> batches = lambda: [jnp.array([[1.0, 2.0]])]
        >>> solve = lambda path, leaf, evidence: (leaf / evidence[0].max(),)
        >>> model = lambda p, x: x @ p["w"]
        >>> dict(walk(model, {"w": jnp.ones((2, 1))}, batches, [["w"]], absmax(), solve))
        {'w': (Array([[0.5],
               [0.5]], dtype=float32),)}
    """
    leaves, news = tree_lib.flatten(params), tree_lib.Leaves()
    for number, group in enumerate(watched(groups, words, progress)):
        done = None if files is None else files.read(number, group, check)
        if done is None:
            seen = tree_lib.replace(params, news) if sequential else params
            read = [path for path in group if path not in looked_up]
            evidence = {}
            if read:
                evidence = _gather(apply_fn, seen, again(), statistic, read, also_looked_up)
            # Nothing of this pass is held while the next one runs.
            done = {path: solve(path, leaves[path], evidence.pop(path, ())) for path in group}
            del seen
            if files is not None:
                files.write(number, done)
        for path, (new, *rest) in done.items():
            new = _placed(new, leaves[path])
            # The next passes read it many times: decoded once.
            news[path] = _placed(decode(new), leaves[path])
            yield path, (new, *rest)


def _gather(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    statistic: Statistic,
    paths: Sequence[str],
    also_looked_up: frozenset[str],
) -> dict[str, tuple[Any, ...]]:
    """By path, the statistic of each of its uses."""
    patterns = [glob.escape(path) for path in paths]
    found = observe(apply_fn, params, batches, statistic, paths=patterns, progress=False)
    enough = [path for path in also_looked_up.intersection(paths) if uses_of(found, path)]
    missing = {
        key: reason
        for key, reason in found.unobserved.items()
        if not any(_is_use(key, path) for path in enough)
    }
    if missing:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in missing.items())
        words = statistic.name.replace("_", " ")
        raise ValueError(
            f"no {words} of {reasons}: leave these leaves out, with paths= or a rule of None"
        )
    return {path: tuple(value for _, value in uses_of(found, path)) for path in paths}


def uses_of(found: Observed, path: str) -> list[tuple[str, Any]]:
    """The entries of a leaf: ``path`` and ``path#2`` and so on."""
    return [(key, value) for key, value in found.items() if _is_use(key, path)]


def _is_use(key: str, path: str) -> bool:
    return key == path or key.startswith(f"{path}#")


def _placed(new: Any, like: Any) -> Any:
    """An array where the leaf that it replaces lies; a compressed leaf stays where it was made."""
    if isinstance(new, CompressedArray):
        return new
    sharding = getattr(like, "sharding", None)
    new = jnp.asarray(new)
    return jax.device_put(new, sharding) if isinstance(sharding, NamedSharding) else new


def moments() -> Statistic:
    """Second moments, and how many samples they are of: what :func:`moment_of` reads."""
    base = second_moment()
    return base._replace(
        finish=lambda state: (base.finish(state), state.samples.high + state.samples.low)
    )


def moment_of(uses: Sequence[tuple[Array, Array]]) -> Array:
    """The second moment of a leaf over all its uses.

    Args:
        uses: by :func:`moments`: ``(..., features, features)`` and the number of samples.

    Returns:
        The mean, weighted by the number of samples.

    Example:
        >>> uses = [(jnp.array([[1.0]]), jnp.array(1.0)), (jnp.array([[4.0]]), jnp.array(2.0))]
        >>> moment_of(uses)
        Array([[3.]], dtype=float32)
    """
    if len(uses) == 1:
        return uses[0][0]
    total = jnp.sum(jnp.stack([samples for _, samples in uses]), 0)
    parts = [moment * (samples / total)[..., None, None] for moment, samples in uses]
    return jnp.sum(jnp.stack(parts), 0)
