"""SparseGPT on a whole model: leaf after leaf, in the order of its program."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxcomp import columns
from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_amount, check_count, choose
from jaxcomp.model.batches import peek, rereadable, spread
from jaxcomp.model.layerwise import WalkFiles, moment_of, moments, walk
from jaxcomp.model.matrices import MatrixForm, from_stack, matrix_forms, to_stack
from jaxcomp.model.program import read
from jaxcomp.prune.post_training.column_walk import block_counts, prune_in_blocks
from jaxcomp.prune.post_training.obs import PER_OUTPUT, output_error
from jaxcomp.prune.schedules import check_sparsity
from jaxcomp.prune.structures import NM, Element, check_structure
from jaxcomp.sharding import automatic, spec_like


class PrunedLeaf(NamedTuple):
    """What pruning did to a leaf.

    Attributes:
        path: of the leaf.
        shape: of the leaf.
        sparsity: fraction removed.
        masked_error: mean square by which the outputs of the leaf's operation would move if the
            same weights were removed and nothing corrected, over the mean square of these outputs.
        error: the same with the corrected weights.
    """

    path: str
    shape: tuple[int, ...]
    sparsity: float
    masked_error: float
    error: float


class Repaired(NamedTuple):
    """A pruned model; ``print`` it for a table.

    Attributes:
        params: the corrected parameters, zero where removed; dtypes and placement as before.
        masks: booleans of the pruned leaves by path, True where kept.
        leaves: what it did to each, in the order of the program.
    """

    params: Any
    masks: tree_lib.Leaves
    leaves: tuple[PrunedLeaf, ...]

    def __str__(self) -> str:
        return _table(self.leaves)


class _Task(NamedTuple):
    """What to do with a leaf; all but the counts is static."""

    form: MatrixForm
    structure: Element | NM
    counts: np.ndarray


def sparsegpt(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    sparsity: float | None = None,
    structure: Any = Element(),  # noqa: B008
    *,
    paths: str | Sequence[str] | None = None,
    sequential: bool = True,
    at_once: int = 1,
    block_size: int = 128,
    damping: float = 0.01,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Repaired:
    """Remove weights after training, and let those that stay make up for them, layer by layer.

    For a few leaves at a time, a pass over the batches gathers the second moments of what they are
    multiplied by; :func:`~jaxcomp.prune.post_training.column_walk.sparsegpt_matrix` prunes them.
    Dense layers in any layout, attention kernels, convolutions (grouped too), stacked layers and
    experts are the matrices that :mod:`jaxcomp.model.matrices` makes of them. The layers of one
    stack are pruned together, each from the moments that it had before.

    Memory beside the model: for each of ``at_once`` leaves features × features float32 a matrix.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        batches: a list or another iterable that starts over, or a function that returns one: every
            pass reads them. A plain tuple is spread over ``inputs``. Of a convolution a pass holds
            the input of one batch as often as its window has places.
        sparsity: fraction removed of each leaf, in [0, 1); None where ``structure`` is N:M.
        structure: ``Element()``: the weights of a leaf compete, in blocks of features;
            ``Element(within=...)`` with the leaf's output axes: those of each output;
            ``NM(n, m)``: runs along the leaf's own (last) input axis, whatever ``axis`` says. One
            for all, or one by path pattern (a leaf that no pattern matches: ``Element()``).
        paths: patterns of the leaves to prune; if None, all that are compressed by default (see
            :func:`jaxcomp.tree.is_weight`). Embeddings are looked up, not multiplied: leave them
            out.
        sequential: whether a pass runs the model with all earlier leaves pruned, as it will be; or
            else the dense one.
        at_once: leaves a pass. More are faster and take more memory; those of one pass do not see
            each other pruned.
        block_size: features that share a choice.
        damping: what is added to a second moment, in means of its diagonal.
        directory: where finished leaves are kept, in files ``sparsegpt*.jxc``. The same call goes
            on after them and comes to the same result bit for bit; what ``apply_fn`` and
            ``batches`` do is not in the files, and must be the same.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        Parameters, masks and a report.

    Raises:
        ValueError: sparsity outside [0, 1) or missing; a structure that does not fit; a leaf that
            is no matrix to its inputs (looked up, unused), that would lose all weights, or whose
            operation no batch led to; NaN or infinite weights or inputs; no batches; a damping
            below 0; the directory holds files of another call.
        TypeError: ``batches`` can be read only once, or is one array; something is no number.
        CheckpointError: a file is damaged.

    Example:
        >>> def model(p, x):
        ...     return jax.nn.relu(x @ p["w0"]) @ p["w1"]
        >>> params = {"w0": jnp.eye(4), "w1": jnp.ones((4, 2))}
        >>> batches = [jnp.array([[1.0, 1.0, 0.0, 2.0], [2.0, 2.0, 3.0, 0.0]])]
        >>> found = sparsegpt(model, params, batches, structure=NM(2, 4), paths="w1")
        >>> found.params["w1"].round(1)[:, 0]
        Array([0. , 0. , 2.3, 2. ], dtype=float32)
        >>> print(found)
        leaf  shape   sparsity  masked error  error
        w1    (4, 2)     50.0%         30.8%   0.0%

    Source: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot", 2023.
    """
    _check_numbers(sparsity, sequential, at_once, block_size, damping)
    again = rereadable(batches)
    tasks = _plan(apply_fn, params, again, sparsity, structure, paths, block_size)
    groups = [list(tasks)[i : i + at_once] for i in range(0, len(tasks), at_once)]
    files = None
    if directory is not None:
        call = _identify(tasks, sequential, at_once, block_size, damping)
        files = WalkFiles.open(directory, "sparsegpt", call, params)
    dense = tree_lib.flatten(params)
    weights, masks, reports = tree_lib.Leaves(), {}, []
    finished = walk(
        apply_fn,
        params,
        again,
        groups,
        moments(),
        lambda path, leaf, uses: _solve(tasks[path], leaf, uses, block_size, damping),
        sequential=sequential,
        files=files,
        check=lambda path, parts: _check_parts(path, parts, dense[path]),
        words="pruning",
        progress=progress,
    )
    for path, (weight, mask, numbers) in finished:
        weights[path], masks[path] = weight, _place(mask, dense[path])
        reports.append(PrunedLeaf(path, tuple(mask.shape), *numbers))
    ordered = tree_lib.Leaves((path, masks[path]) for path in dense if path in masks)
    return Repaired(tree_lib.replace(params, weights), ordered, tuple(reports))


def _check_numbers(
    sparsity: Any, sequential: Any, at_once: Any, block_size: Any, damping: Any
) -> None:
    if sparsity is not None:
        check_sparsity("sparsity", sparsity)
    if not isinstance(sequential, bool):
        raise TypeError(f"sequential must be True or False, not {sequential!r:.60}")
    check_count("at_once", at_once)
    check_count("block_size", block_size)
    check_amount("damping", damping)


def _identify(
    tasks: Mapping[str, _Task], sequential: bool, at_once: int, block_size: int, damping: float
) -> dict[str, str]:
    """What tells a call from others, beside the parameters."""
    parts = [(path, task.structure, task.counts.tolist()) for path, task in tasks.items()]
    return {
        "counts and structures": str(parts),
        "sequential": str(sequential),
        "at_once": str(at_once),
        "block_size": str(block_size),
        "damping": str(float(damping)),
    }


def _plan(
    apply_fn: Callable[..., Any],
    params: Any,
    again: Callable[[], Iterable[Any]],
    sparsity: float | None,
    structure: Any,
    paths: str | Sequence[str] | None,
    block_size: int,
) -> dict[str, _Task]:
    """What to do with each leaf, in the order of the program; all checks that need no data."""
    first, _ = peek(again())
    weights = choose(params, paths)
    structures = dict.fromkeys(weights, structure)
    if isinstance(structure, Mapping):
        chosen = tree_lib.assign(structure, weights)
        structures = {p: structure[chosen[p]] if p in chosen else Element() for p in weights}
    try:
        forms = matrix_forms(read(apply_fn, params, *spread(first)), weights)
    except ValueError as error:
        raise ValueError(f"{error}: name the leaves that are meant with paths=") from error
    tasks = {}
    for path, form in forms.items():
        rule = _rule(path, structures[path], form)
        matrices = math.prod(form.groups)
        try:
            counts = block_counts(sparsity, rule, form.features, form.outputs, block_size, matrices)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        lost = int(np.sum(np.asarray(counts, np.int64), dtype=np.int64))
        size = matrices * form.features * (1 if rule in PER_OUTPUT else form.outputs)
        if not isinstance(rule, NM) and lost == size:
            raise ValueError(
                f"{path}: all {math.prod(form.shape)} weights would be removed and nothing would "
                "pass: ask for a lower sparsity, or leave this leaf out with paths="
            )
        tasks[path] = _Task(form, rule, np.asarray(counts))
    return tasks


def _rule(path: str, structure: Any, form: MatrixForm) -> Element | NM:
    """A leaf's structure as one of its matrices."""
    if isinstance(structure, NM):
        check_structure(path, structure._replace(axis=_run_axis(form)), form.shape)
        return structure._replace(axis=0)
    check_structure(path, structure, form.shape)
    if structure == Element():
        return structure
    if isinstance(structure, Element):
        within = structure.within
        named = (within,) if isinstance(within, int) else within or ()
        axes = tuple(sorted((*form.outer_axes, *form.output_axes)))
        if {axis % len(form.shape) for axis in named} == set(axes):
            return PER_OUTPUT[0]
        raise ValueError(
            f"{path}: {structure} does not say that the weights of each output compete, which is "
            f"Element(within={axes}) here; give that, or Element()"
        )
    raise ValueError(
        f"{path}: {structure} goes together, but single weights are removed here: give Element(), "
        "Element(within=...) with the output axes, or NM(n, m)"
    )


def _run_axis(form: MatrixForm) -> int:
    return [axis for axis in form.input_axes if axis not in form.kernel_axes][-1]


def _solve(
    task: _Task, leaf: Array, uses: tuple[Any, ...], block_size: int, damping: float
) -> tuple[Array, Array, list[float]]:
    """New weight, mask and numbers of a leaf."""
    work = partial(_prune_leaf, task.form, task.structure, block_size)
    spec = spec_like(leaf, leaf.shape)
    out = (spec, spec, PartitionSpec())
    weight, mask, numbers = automatic(work, out)(leaf, moment_of(uses), task.counts, damping)
    return _place(weight, leaf), _place(mask, leaf), np.asarray(numbers).tolist()


def _check_parts(path: str, parts: tuple[Any, ...], like: Any) -> None:
    weight, mask, numbers = parts
    for array, dtype in ((weight, like.dtype), (mask, bool)):
        if array.shape != like.shape or array.dtype != dtype:
            raise ValueError(f"{path}: {array.dtype} {array.shape}, not {dtype} {like.shape}")
    if len(numbers) != 3 or not all(isinstance(number, float) for number in numbers):
        raise ValueError(f"{path}: {numbers!r:.60} are not three numbers")


def _place(array: Array, like: Any) -> Array:
    sharding = getattr(like, "sharding", None)
    return jax.device_put(array, sharding) if isinstance(sharding, NamedSharding) else array


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prune_leaf(
    form: MatrixForm,
    structure: Element | NM,
    block_size: int,
    leaf: Array,
    moment: Array,
    counts: Array,
    damping: Any,
) -> tuple[Array, Array, Array]:
    matrices = to_stack(form, leaf).astype(jnp.float32)
    moments = moment.reshape(-1, form.features, form.features)
    order = _run_order(form) if isinstance(structure, NM) else np.arange(form.features)
    matrices, moments = matrices[:, order], moments[:, order][:, :, order]
    # One matrix at a time: a stack takes no more memory than its largest.
    new, mask = lax.map(
        lambda each: prune_in_blocks(*each, structure, block_size, damping),
        (matrices, moments, counts),
    )
    new = new.astype(leaf.dtype)
    size = output_error(matrices, jnp.zeros_like(matrices), moments)
    errors = [output_error(matrices, x, moments) for x in (jnp.where(mask, matrices, 0), new)]
    relative = [jnp.where(size > 0, error / size, 0) for error in errors]

    def back(array: Array) -> Array:
        return from_stack(form, array[:, np.argsort(order)])

    numbers = jnp.stack([jnp.mean(~mask, dtype=jnp.float32), *relative])
    return back(new), back(mask), numbers


def _run_order(form: MatrixForm) -> np.ndarray:
    """The features in an order in which neighbours on the last input axis are neighbours."""
    sizes = [form.shape[axis] for axis in form.input_axes]
    places = np.arange(form.features).reshape(sizes)
    return np.moveaxis(places, form.input_axes.index(_run_axis(form)), -1).ravel()


def _table(leaves: Sequence[PrunedLeaf]) -> str:
    rows: list[tuple[str, ...]] = [("leaf", "shape", "sparsity", "masked error", "error")]
    for leaf in leaves:
        shape = f"({', '.join(map(str, leaf.shape))})"
        numbers = (leaf.sparsity, leaf.masked_error, leaf.error)
        rows.append((leaf.path, shape, *(f"{100 * number:.1f}%" for number in numbers)))
    return columns.table(rows, left=2)
