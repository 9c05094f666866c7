"""A trained model in low rank, in one call: leaf after leaf, from the inputs that they meet."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxcomp import columns
from jaxcomp import tree as tree_lib
from jaxcomp.arrays import decode, is_compressed, nbytes
from jaxcomp.checks import check_amount, check_count, check_function
from jaxcomp.factorize.leaf import Encoder, factorize_leaf, obstacle_to, rank_of, with_residual
from jaxcomp.factorize.tasks import Task, described, plan
from jaxcomp.model.batches import peek, rereadable, spread
from jaxcomp.model.layerwise import WalkFiles, moment_of, moments, walk
from jaxcomp.model.matrices import MatrixForm, to_matrix


class FactorizedLeaf(NamedTuple):
    """What became of a leaf.

    Attributes:
        path: of the leaf.
        shape: of the leaf.
        form: in words, such as ``rank 8``; why it stayed dense.
        nbytes: of what is stored.
        dense_nbytes: of the leaf as it was.
        weight_error: mean square of what the weights changed by, over their mean square.
        output_error: the same of the outputs of its products, on the batches; NaN where that was
            not measured.
    """

    path: str
    shape: tuple[int, ...]
    form: str
    nbytes: int
    dense_nbytes: int
    weight_error: float
    output_error: float


class Factorized(NamedTuple):
    """A model in low rank; ``print`` it for a table.

    Attributes:
        params: the tree with low-rank leaves; the others are the very same objects.
        leaves: what became of each that a rule named, in the order of the program.
    """

    params: Any
    leaves: tuple[FactorizedLeaf, ...]

    def __str__(self) -> str:
        return _table(self)


def svd(
    apply_fn: Callable[..., Any] | None,
    params: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None,
    rules: Any,
    *,
    activation_aware: bool = True,
    residual: Encoder | None = None,
    iterations: Any = 5,
    sequential: bool = True,
    at_once: int = 1,
    damping: float = 1e-6,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Factorized:
    """Replace weights by products of small factors.

    With batches, the inputs of each leaf decide which matrix of a rank is best: the one whose
    outputs are nearest (:func:`whitened_svd_matrix`). They also tell what a leaf's axes are for,
    in any framework's layout. A leaf whose factors would take no fewer bytes stays as it is and is
    named in the table; so does one that is no matrix or single convolution.

    Args:
        apply_fn: a function of ``(params, *inputs)``; may be None without batches.
        params: any tree.
        batches: a list or another iterable that starts over, or a function that returns one. A
            plain tuple is spread over ``inputs``. None: leaves are taken for Flax's layouts, their
            own error decides, and no outputs are measured.
        rules: one :class:`LowRank` for all weights, or ``{path pattern: LowRank or None}``; such as
            :func:`~jaxcomp.factorize.allocate` gives.
        activation_aware: whether inputs decide; or else batches only measure. Where a convolution
            is split otherwise than ``"matrix"`` they never do.
        residual: ``residual(array) -> compressed leaf`` for what the factors leave over, such as
            ``lambda x: quantize.encode(x, format)`` or :func:`largest_weights`; the leaf is then
            their sum, each found in turn for what the other leaves over.
        iterations: turns of that.
        sequential: whether a pass runs the model with all earlier leaves as they became.
        at_once: leaves a pass over the batches.
        damping: what is added to a second moment, in means of its diagonal.
        directory: where finished leaves are kept, in files ``svd*.jxc``. The same call goes on
            after them; what ``apply_fn``, ``batches`` and ``residual`` do must be the same.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        The tree and a report.

    Raises:
        ValueError: a pattern matches nothing; NaN or infinite weights or inputs; no batches; the
            directory holds files of another call; a number out of range.
        TypeError: a rule is no :class:`LowRank`; ``batches`` can be read only once; something is
            no function or number.
        CheckpointError: a file is damaged.

    Example:
        >>> from jaxcomp.factorize.rules import LowRank
        >>> params = {"w": jnp.diag(jnp.array([1.0, 5.0, 2.0, 0.1]))}
        >>> batches = [jnp.array([[1.0, 0.0, 0.1, 0.0], [-1.0, 0.0, 0.1, 0.0]])]
        >>> found = svd(lambda p, x: x @ p["w"], params, batches, LowRank(1))
        >>> print(found)
        leaf  shape   form    bytes  dense  weight error  output error
        w     (4, 4)  rank 1     32     64         96.7%         3.85%
        total: 32 bytes, dense 64 (50.0%)

    Source: Yuan et al., "ASVD: Activation-aware Singular Value Decomposition for Compressing Large
    Language Models", 2023; Wang et al., "SVD-LLM", 2024, section 3.1.
    """
    _check(batches, residual, activation_aware, sequential)
    check_count("at_once", at_once)
    check_count("iterations", iterations)
    check_amount("damping", damping)
    if batches is not None:
        check_function("apply_fn", apply_fn, "(params, *inputs) -> outputs")
    again: Callable[[], Iterable[Any]] = tuple if batches is None else rereadable(batches)
    inputs = None if batches is None else spread(peek(again())[0])
    tasks = plan(apply_fn, params, inputs, rules)
    dense = tree_lib.flatten(params)
    files = None
    if directory is not None:
        call = {
            "batches": "none" if batches is None else "given",
            "rules": described(tasks),
            "activation_aware": str(activation_aware),
            "residual": "none" if residual is None else "given",
            "iterations": str(iterations),
            "sequential": str(sequential),
            "at_once": str(at_once),
            "damping": str(float(damping)),
        }
        files = WalkFiles.open(directory, "svd", call, params)

    def work(path: str, leaf: Any, uses: tuple[Any, ...]) -> tuple[Any, list[float]]:
        moment = moment_of(uses) if uses else None
        aware = moment if activation_aware else None
        new = _solved(tasks[path], leaf, aware, residual, iterations, damping)
        return new, _errors(tasks[path].form, leaf, new, moment)

    groups = [list(tasks)[i : i + at_once] for i in range(0, len(tasks), at_once)]
    finished = walk(
        apply_fn or _no_model,
        params,
        again,
        groups,
        moments(),
        work,
        looked_up=frozenset(path for path, task in tasks.items() if task.form is None),
        sequential=sequential,
        files=files,
        check=lambda path, parts: _check_parts(parts, dense[path]),
        words="factorizing",
        progress=progress,
    )
    news, reports = tree_lib.Leaves(), []
    for path, (new, numbers) in finished:
        if is_compressed(new):
            news[path] = new
        reports.append(_report(tasks[path], dense[path], new, numbers))
    return Factorized(tree_lib.replace(params, news), tuple(reports))


def _no_model(*arguments: Any) -> Any:
    raise TypeError("there is no model to run: give apply_fn")


def _solved(
    task: Task, leaf: Any, moment: Any, residual: Encoder | None, iterations: int, damping: float
) -> Any:
    """The leaf in factors; itself where they save nothing."""
    factoring = task.factoring
    if factoring is None:
        return leaf
    seen = moment if factoring.split == "matrix" else None
    rank = rank_of(task.rule, factoring, leaf, seen, damping)
    if obstacle_to(factoring, rank) is not None:
        return leaf
    if residual is None:
        return factorize_leaf(factoring, leaf, rank, seen, damping)
    both = with_residual(factoring, leaf, rank, residual, iterations, seen, damping)
    return both if both.nbytes < nbytes(leaf) else leaf


def _errors(form: MatrixForm | None, leaf: Any, new: Any, moment: Any) -> list[float]:
    """What the weights and the outputs changed by, over what they were, in mean squares."""
    return np.asarray(_errors_jit(form, jnp.asarray(leaf), decode(new), moment)).tolist()


@partial(jax.jit, static_argnums=0)
def _errors_jit(form: MatrixForm | None, leaf: Array, values: Array, moment: Any) -> Array:
    old = leaf.astype(jnp.float32)
    change = values.astype(jnp.float32) - old
    weights = _ratio(jnp.sum(change * change), jnp.sum(old * old))
    if form is None or moment is None:
        return jnp.stack([weights, jnp.float32(jnp.nan)])

    def energy(weight: Array) -> Array:
        matrix = to_matrix(form, weight)
        product = jnp.matmul(moment, matrix, precision=lax.Precision.HIGHEST)
        return jnp.maximum(jnp.sum(matrix * product), 0)

    return jnp.stack([weights, _ratio(energy(change), energy(old))])


def _ratio(change: Array, size: Array) -> Array:
    return jnp.where(size > 0, change / jnp.where(size > 0, size, 1), 0)


def _check(batches: Any, residual: Any, activation_aware: Any, sequential: Any) -> None:
    for name, value in (("activation_aware", activation_aware), ("sequential", sequential)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {value!r:.60}")
    if residual is not None:
        check_function("residual", residual, "an array that returns a compressed leaf")
    if batches is not None and isinstance(batches, str):
        raise TypeError(f"batches must be batches of inputs, not {batches!r:.60}")


def _check_parts(parts: tuple[Any, ...], like: Any) -> None:
    new, numbers = parts
    if tuple(new.shape) != tuple(like.shape) or new.dtype != like.dtype:
        raise ValueError(f"{new.dtype} {new.shape}, not {like.dtype} {like.shape}")
    if len(numbers) != 2 or not all(isinstance(number, float) for number in numbers):
        raise ValueError(f"{numbers!r:.60} are not two numbers")


def _report(task: Task, leaf: Any, new: Any, numbers: Sequence[float]) -> FactorizedLeaf:
    size = nbytes(leaf)
    shape = tuple(leaf.shape)
    if is_compressed(new):
        return FactorizedLeaf(task.path, shape, new.form(), new.nbytes, size, *numbers)
    if task.factoring is None:
        why = task.note
    elif task.rule.rank is not None:
        why = obstacle_to(task.factoring, rank_of(task.rule, task.factoring, leaf))
    else:
        why = f"energy {task.rule.energy:g} saves nothing"
    words = f"dense: {why or 'the residual takes as many bytes'}"
    return FactorizedLeaf(task.path, shape, words, size, size, *numbers)


def _table(found: Factorized) -> str:
    rows = [("leaf", "shape", "form", "bytes", "dense", "weight error", "output error")]
    for leaf in found.leaves:
        shape = f"({', '.join(map(str, leaf.shape))})"
        errors = (_percent(leaf.weight_error), _percent(leaf.output_error))
        sizes = (f"{leaf.nbytes:,}", f"{leaf.dense_nbytes:,}")
        rows.append((leaf.path, shape, leaf.form, *sizes, *errors))
    size = sum(leaf.nbytes for leaf in found.leaves)
    dense = sum(leaf.dense_nbytes for leaf in found.leaves)
    total = f"total: {size:,} bytes, dense {dense:,} ({size / max(dense, 1):.1%})"
    others = nbytes(found.params) - size
    lines = [columns.table(rows, left=3), total]
    return "\n".join([*lines, f"other leaves: {others:,} bytes"] if others else lines)


def _percent(number: float) -> str:
    return "not measured" if math.isnan(number) else f"{100 * number:.3g}%"
