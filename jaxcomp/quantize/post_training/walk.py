"""The walk that every method after training is a solver of: leaf after leaf, from its inputs.

A method says what to make of one leaf and the second moment of what it is multiplied with. All
else is here: rules, order, passes over the batches, files to go on from, and the report.
"""

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
from jaxcomp.arrays import CompressedArray, decode, nbytes
from jaxcomp.checks import check_count
from jaxcomp.model.batches import peek, rereadable, spread
from jaxcomp.model.layerwise import WalkFiles, moment_of, moments, walk
from jaxcomp.model.matrices import MatrixForm, to_matrix
from jaxcomp.quantize.affine import encode
from jaxcomp.quantize.post_training.tasks import ALSO_LOOKED_UP, Task, plan
from jaxcomp.sharding import automatic

__all__ = ["Quantized", "QuantizedLeaf", "Solve", "Task", "plan", "quantize_leaves"]

Solve = Callable[[Task, Any, Any], CompressedArray]


class QuantizedLeaf(NamedTuple):
    """What quantization did to a leaf.

    Attributes:
        path: of the leaf.
        shape: of the leaf.
        form: in words; how it was rounded where its inputs had no say.
        bits: stored bits a weight, scales included.
        nbytes: of the compressed leaf.
        weight_error: mean square of what the weights changed by, over their mean square.
        output_error: the same of the outputs of its products, on the batches; NaN where that was
            not measured.
    """

    path: str
    shape: tuple[int, ...]
    form: str
    bits: float
    nbytes: int
    weight_error: float
    output_error: float


class Quantized(NamedTuple):
    """A quantized model; ``print`` it for a table.

    Attributes:
        params: the tree with compressed leaves; the others are the very same objects.
        leaves: what became of each, in the order of the program.
    """

    params: Any
    leaves: tuple[QuantizedLeaf, ...]

    def __str__(self) -> str:
        return _table(self)


def quantize_leaves(
    name: str,
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None,
    rules: Any,
    solve: Solve,
    *,
    sequential: bool = True,
    at_once: int = 1,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
    call: Mapping[str, str] | None = None,
    needs_data: bool = True,
) -> Quantized:
    """Quantize the leaves that rules name, in the order of the program.

    Memory beside the model: second moments of ``at_once`` leaves, features × features float32 a
    matrix.

    Args:
        name: of the method; its files begin with it.
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        batches: a list or another iterable that starts over, or a function that returns one. A
            plain tuple is spread over ``inputs``. None: nothing is measured.
        rules: see :func:`~jaxcomp.quantize.post_training.tasks.plan`.
        solve: ``solve(task, leaf, moment)`` returns the compressed leaf. The moment is the mean of
            x xᵀ, float32 ``(*groups, features, features)`` as ``task.form`` has them; None where no
            product reads the leaf, or nothing is measured.
        sequential: whether a pass runs the model with all earlier leaves as they became.
        at_once: leaves a pass over the batches.
        directory: where finished leaves are kept, in files that begin with ``name``. The same call
            goes on after them.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.
        call: what tells a call from others, beside parameters and rules.
        needs_data: whether every product must be measured.

    Returns:
        The quantized tree and a report.

    Raises:
        ValueError: see :func:`~jaxcomp.quantize.post_training.tasks.plan`; no batches; NaN or
            infinite inputs; the directory holds files of another call.
        TypeError: ``batches`` is missing or can be read only once; something is no number.
        CheckpointError: a file is damaged.

    Example:
        >>> from jaxcomp.quantize.formats import Format
        >>> model = lambda p, x: x @ p["w"]
        >>> params = {"w": jnp.array([[7.0, 1.0], [0.4, 3.0]])}
        >>> nearest = lambda task, leaf, moment: encode(leaf, task.format)
        >>> found = quantize_leaves("rtn", model, params, [jnp.ones((1, 2))], Format(4), nearest)
        >>> print(found)
        leaf  shape   form                       bits  bytes  weight error  output error
        w     (2, 2)  int4 symmetric, 2 scales  20.00     10        0.305%        0.255%
        total: 4 weights, 10 bytes, 20.00 bits a weight
    """
    _check(batches, sequential, at_once, needs_data)
    again: Callable[[], Iterable[Any]] = tuple if batches is None else rereadable(batches)
    inputs = None if batches is None else spread(peek(again())[0])
    tasks = plan(apply_fn, params, inputs, rules, needs_data=needs_data)
    files = None
    if directory is not None:
        formats = str([(path, task.format) for path, task in tasks.items()])
        lines = {
            "batches": "none" if batches is None else "given",
            "formats": formats,
            "sequential": str(sequential),
            "at_once": str(at_once),
        }
        files = WalkFiles.open(directory, name, {**lines, **(call or {})}, params)
    dense = tree_lib.flatten(params)

    def work(path: str, leaf: Any, uses: tuple[Any, ...]) -> tuple[Any, list[float]]:
        moment = moment_of(uses) if uses else None
        new = placed(solve(tasks[path], leaf, moment), leaf)
        return new, _errors(tasks[path].form, leaf, new, moment)

    groups = [list(tasks)[i : i + at_once] for i in range(0, len(tasks), at_once)]
    finished = walk(
        apply_fn,
        params,
        again,
        groups,
        moments(),
        work,
        looked_up=frozenset(path for path, task in tasks.items() if task.form is None),
        also_looked_up=frozenset(p for p, task in tasks.items() if task.note == ALSO_LOOKED_UP),
        sequential=sequential,
        files=files,
        check=lambda path, parts: _check_parts(parts, dense[path], tasks[path]),
        words="quantizing",
        progress=progress,
    )
    news, reports = tree_lib.Leaves(), []
    for path, (new, numbers) in finished:
        news[path] = placed(new, dense[path])
        reports.append(_report(tasks[path], news[path], numbers))
    return Quantized(tree_lib.replace(params, news), tuple(reports))


def _check(batches: Any, sequential: Any, at_once: Any, needs_data: bool) -> None:
    if batches is None and needs_data:
        raise TypeError("batches is None: this method learns from the model's inputs, give some")
    if not isinstance(sequential, bool):
        raise TypeError(f"sequential must be True or False, not {sequential!r:.60}")
    check_count("at_once", at_once)


def placed(new: CompressedArray, like: Any) -> CompressedArray:
    """A compressed leaf laid out over a mesh as the leaf is that it replaces.

    Args:
        new: the compressed leaf.
        like: the dense one.

    Returns:
        The same leaf. Where the dense one lies on a mesh, axes that a field has as the leaf does
        lie as there, as far as their sizes allow; the others are whole on each device.

    Example:
        >>> from jaxcomp.quantize.formats import Format
        >>> leaf = encode(jnp.ones((2, 2)), Format(4))
        >>> placed(leaf, jnp.ones((2, 2))) is leaf
        True
    """
    sharding = getattr(like, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return new
    named = list(sharding.spec) + [None] * (like.ndim - len(sharding.spec))

    def place(field: Any) -> Any:
        spec = PartitionSpec()
        if field.ndim == like.ndim:
            spec = PartitionSpec(
                *(
                    names if size % _parts(sharding, names) == 0 else None
                    for names, size in zip(named, field.shape, strict=True)
                )
            )
        return jax.device_put(field, NamedSharding(sharding.mesh, spec))

    return jax.tree.map(place, new)


def _parts(sharding: NamedSharding, names: Any) -> int:
    axes = (names,) if isinstance(names, str) else names or ()
    return math.prod(sharding.mesh.shape[name] for name in axes)


def _errors(form: MatrixForm | None, leaf: Any, new: CompressedArray, moment: Any) -> list[float]:
    """What the weights and the outputs changed by, over what they were, in mean squares."""
    values = decode(new)
    shape = jnp.shape(leaf)
    if tuple(values.shape) != shape:
        raise ValueError(f"the solver made {values.shape} of a leaf of shape {shape}")
    numbers = automatic(partial(_errors_jit, form))(jnp.asarray(leaf), values, moment)
    return np.asarray(numbers).tolist()


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


def _check_parts(parts: tuple[Any, ...], like: Any, task: Task) -> None:
    """Raise ``ValueError`` unless parts of a file are such as this leaf and format would have."""
    new, numbers = parts
    if not isinstance(new, CompressedArray):
        raise ValueError(f"{type(new).__name__} is no compressed leaf")
    if tuple(new.shape) != tuple(like.shape) or new.dtype != like.dtype:
        raise ValueError(f"{new.dtype} {new.shape}, not {like.dtype} {like.shape}")
    plain = jax.eval_shape(
        lambda x: encode(x, task.format), jax.ShapeDtypeStruct(like.shape, like.dtype)
    )
    if isinstance(new, type(plain)) and _described(new) != _described(plain):
        raise ValueError(f"{new!r} is not of {task.format}")
    if len(numbers) != 2 or not all(isinstance(number, float) for number in numbers):
        raise ValueError(f"{numbers!r:.60} are not two numbers")


def _described(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves]


def _report(task: Task, new: CompressedArray, numbers: Sequence[float]) -> QuantizedLeaf:
    form = new.form()
    if task.note:
        how = "" if task.form is not None else "to nearest: "
        form = f"{form}; {how}{task.note}"
    bits = new.nbytes * 8 / max(new.size, 1)
    return QuantizedLeaf(task.path, tuple(new.shape), form, bits, new.nbytes, *numbers)


def _table(found: Quantized) -> str:
    titles = ("leaf", "shape", "form", "bits", "bytes", "weight error", "output error")
    rows: list[tuple[str, ...]] = [titles]
    for leaf in found.leaves:
        shape = f"({', '.join(map(str, leaf.shape))})"
        errors = (_percent(leaf.weight_error), _percent(leaf.output_error))
        numbers = (f"{leaf.bits:.2f}", f"{leaf.nbytes:,}", *errors)
        rows.append((leaf.path, shape, leaf.form, *numbers))
    weights = sum(math.prod(leaf.shape) for leaf in found.leaves)
    size = sum(leaf.nbytes for leaf in found.leaves)
    bits = 8 * size / max(weights, 1)
    total = f"total: {weights:,} weights, {size:,} bytes, {bits:.2f} bits a weight"
    others = nbytes(found.params) - size
    lines = [columns.table(rows, left=3), total]
    return "\n".join([*lines, f"other leaves: {others:,} bytes"] if others else lines)


def _percent(number: float) -> str:
    return "not measured" if math.isnan(number) else f"{100 * number:.3g}%"
