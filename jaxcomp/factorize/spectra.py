"""What every rank of every weight would be worth, from one walk over the model."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import LowRankArray, nbytes
from jaxcomp.checks import as_patterns, check_amount, check_count, check_function
from jaxcomp.factorize.leaf import factorize_leaf
from jaxcomp.factorize.rules import LowRank, to_sides
from jaxcomp.factorize.svd_matrix import largest_saving_rank, singular_values
from jaxcomp.factorize.tasks import Task, described, plan
from jaxcomp.model.batches import peek, rereadable, spread
from jaxcomp.model.layerwise import WalkFiles, moment_of, moments, walk
from jaxcomp.model.trace import trace


class Spectrum(NamedTuple):
    """A leaf at every rank that saves something.

    Attributes:
        shape: of the leaf.
        features: rows of its matrix.
        outputs: columns.
        values: singular values, ``(stack, values)``, float32; with batches, of what the leaf makes
            of its inputs.
        low_rank: at the largest rank that saves; :func:`truncated` has the smaller ones. None where
            none does.
        nbytes: of the leaf.
        flops: of the products that read it, on one batch; 0 where that is not known.
    """

    shape: tuple[int, ...]
    features: int
    outputs: int
    values: np.ndarray
    low_rank: LowRankArray | None
    nbytes: int
    flops: int

    @property
    def most(self) -> int:
        """The largest rank that saves numbers; 0 if none does."""
        return largest_saving_rank(self.features, self.outputs)


class Spectra(NamedTuple):
    """A model at every rank.

    Attributes:
        params: the dense tree.
        leaves: by path.
        left: the leaves that were asked for and are no single matrix, and why.
        totals: ``"bytes"``, ``"parameters"`` and, where the model was read, ``"flops"`` of all.
    """

    params: Any
    leaves: Mapping[str, Spectrum]
    left: Mapping[str, str]
    totals: Mapping[str, int]


def spectra(
    apply_fn: Callable[..., Any] | None,
    params: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None,
    paths: Any = None,
    *,
    at_once: int = 1,
    damping: float = 1e-6,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Spectra:
    """Take every weight apart once; ranks are chosen afterwards, at no further cost.

    The factors of one rank are the first columns of those of a larger one. So a single walk, each
    leaf with the inputs that the dense model gives it, serves :func:`allocate`,
    :func:`truncated` and :func:`to_accuracy`.

    Args:
        apply_fn: a function of ``(params, *inputs)``; may be None without batches.
        params: any tree.
        batches: as for :func:`svd`.
        paths: patterns of the weights; None: all that are compressed by default.
        at_once: leaves a pass over the batches.
        damping: as for :func:`svd`.
        directory: where finished leaves are kept, in files ``spectra*.jxc``; the same call goes on
            after them.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        Singular values and factors; about the bytes of the model.

    Raises:
        ValueError: a pattern matches nothing; NaN or infinite weights or inputs; no leaf is a
            matrix; the directory holds files of another call.
        TypeError: ``batches`` can be read only once; something is no function or number.
        CheckpointError: a file is damaged.

    Example:
        >>> import jax.numpy as jnp
        >>> found = spectra(None, {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}, None)
        >>> found.leaves["w"].values, found.leaves["w"].low_rank
        (array([[3., 2., 1.]], dtype=float32), LowRankArray(shape=(3, 3), ..., rank 1, 24 bytes))
    """
    check_count("at_once", at_once)
    check_amount("damping", damping)
    if batches is not None:
        check_function("apply_fn", apply_fn, "(params, *inputs) -> outputs")
    again: Callable[[], Iterable[Any]] = tuple if batches is None else rereadable(batches)
    inputs = None if batches is None else spread(peek(again())[0])
    rules = dict.fromkeys(as_patterns(paths), LowRank(1)) if paths is not None else LowRank(1)
    tasks = plan(apply_fn, params, inputs, rules)
    left = {path: task.note for path, task in tasks.items() if task.factoring is None}
    tasks = {path: task for path, task in tasks.items() if task.factoring is not None}
    if not tasks:
        reasons = "; ".join(f"{path}: {why}" for path, why in left.items())
        raise ValueError(f"there is no weight to factorize: {reasons}")
    files = None
    if directory is not None:
        call = {
            "batches": "none" if batches is None else "given",
            "rules": described(tasks),
            "at_once": str(at_once),
            "damping": str(float(damping)),
        }
        files = WalkFiles.open(directory, "spectra", call, params)

    def work(path: str, leaf: Any, uses: tuple[Any, ...]) -> tuple[Any, ...]:
        return _taken_apart(tasks[path], leaf, moment_of(uses) if uses else None, damping)

    groups = [list(tasks)[i : i + at_once] for i in range(0, len(tasks), at_once)]
    finished = walk(
        apply_fn or _no_model,
        params,
        again,
        groups,
        moments(),
        work,
        looked_up=frozenset(path for path, task in tasks.items() if task.form is None),
        sequential=False,
        files=files,
        words="taking apart",
        progress=progress,
    )
    counted = {} if inputs is None else _flops(apply_fn, params, inputs)
    dense = tree_lib.flatten(params)
    leaves = {}
    for path, (new, values) in finished:
        factoring = tasks[path].factoring
        assert factoring is not None
        features, outputs = factoring.sizes
        low = new if isinstance(new, LowRankArray) else None
        numbers = np.asarray(values, np.float32)
        flops = counted.get(path, 0)
        leaves[path] = Spectrum(
            factoring.shape, features, outputs, numbers, low, nbytes(dense[path]), flops
        )
    sizes = [math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(params)]
    totals = {"bytes": nbytes(params), "parameters": sum(sizes)}
    totals |= {"flops": counted[""]} if counted else {}
    return Spectra(params, leaves, left, totals)


def truncated(found: Any, ranks: Mapping[str, int | None]) -> Any:
    """The model at chosen ranks.

    Args:
        found: from :func:`spectra`.
        ranks: by path; None, or a path that is not there: dense. :func:`allocate` gives them.

    Returns:
        The tree with low-rank leaves; the others are the very same objects.

    Raises:
        ValueError: no such leaf, or a rank that saves nothing.
        TypeError: no spectra, or a rank is no whole number.

    Example:
        >>> import jax.numpy as jnp
        >>> found = spectra(None, {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}, None)
        >>> truncated(found, {"w": 1})["w"]
        LowRankArray(shape=(3, 3), dtype=float32, rank 1, 24 bytes)
    """
    if not isinstance(found, Spectra):
        raise TypeError(f"found must come from factorize.spectra, not {found!r:.60}")
    news = tree_lib.Leaves()
    for path, rank in ranks.items():
        if path not in found.leaves:
            raise ValueError(f"no leaf '{path}'; {tree_lib.nearest(path, found.leaves)}")
        if rank is None:
            continue
        check_count(f"{path}: rank", rank)
        spectrum = found.leaves[path]
        if spectrum.low_rank is None or rank > spectrum.most:
            raise ValueError(f"{path}: rank {rank} saves nothing, {spectrum.most} is the largest")
        left, right = spectrum.low_rank.factors
        # The rank is the last axis of the left factor, and as long on the right one.
        axis = spectrum.low_rank.equation.split("->")[0].split(",")[1].index("r")
        axis += right.ndim - len(spectrum.low_rank.equation.split("->")[0].split(",")[1])
        cut = (slice(None),) * axis + (slice(rank),)
        news[path] = dataclasses.replace(spectrum.low_rank, factors=(left[..., :rank], right[cut]))
    return tree_lib.replace(found.params, news)


def _no_model(*arguments: Any) -> Any:
    raise TypeError("there is no model to run: give apply_fn")


def _taken_apart(task: Task, leaf: Any, moment: Any, damping: float) -> tuple[Any, ...]:
    factoring = task.factoring
    assert factoring is not None
    seen = None if moment is None else moment.reshape(-1, *moment.shape[-2:])
    values = np.asarray(singular_values(to_sides(factoring, leaf), seen, damping))
    most = largest_saving_rank(*factoring.sizes)
    if most == 0:
        return leaf, values
    return factorize_leaf(factoring, leaf, most, moment, damping), values


def _flops(apply_fn: Any, params: Any, inputs: Any) -> dict[str, int]:
    """The FLOPs of the products that read each leaf; those of the model under ''."""
    traced = trace(apply_fn, params, *inputs)
    found = {"": traced.total.flops}
    for path, leaf in traced.leaves.items():
        found[path] = sum(u.cost.flops for u in leaf.uses if u.use.kind in ("dot", "conv"))
    return found
