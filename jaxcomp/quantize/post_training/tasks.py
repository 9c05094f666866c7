"""What to do with each leaf: its format, and the matrix that its inputs are multiplied with.

Rules name formats by path. The program says what each leaf's axes are for, so that scales lie
along what is summed over, whatever the layout.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_leaves
from jaxcomp.model.matrices import MatrixForm, matrix_form, matrix_forms
from jaxcomp.model.program import Program, read
from jaxcomp.model.samples import Unobservable
from jaxcomp.model.trace import trace
from jaxcomp.model.uses import Use, find_uses
from jaxcomp.quantize.checks import check_quantizable, traced_format
from jaxcomp.quantize.formats import AnyFormat, PerBlock, PerChannel, PerGroup

ALSO_LOOKED_UP = "also looked up"
_DEFAULT_AXIS = PerGroup(1).axis


class Task(NamedTuple):
    """What to do with a leaf; static, so it may be closed over.

    Attributes:
        path: of the leaf.
        form: the matrix that its inputs are multiplied with; None where no product reads it: it is
            looked up or used element by element, and rounding to nearest is the best there is.
        format: with concrete axes.
        note: for the report: why there is no matrix, or that it is looked up besides.
    """

    path: str
    form: MatrixForm | None
    format: AnyFormat
    note: str = ""


def plan(
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any] | None,
    rules: Any,
    *,
    needs_data: bool = True,
) -> dict[str, Task]:
    """What to do with each leaf, in the order of the program; all checks that need no data.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        inputs: those of one batch, for their shapes; None: the program is not read, formats are
            taken for Flax's layouts, and the order is that of the tree.
        rules: one format for all leaves that are compressed by default (see
            :func:`jaxcomp.tree.is_weight`), or ``{path pattern: format or None}``: the first
            pattern that matches decides; None, or no match, leaves a leaf as it is.
            ``PerChannel()`` gives each output its scale; ``PerGroup(size)`` cuts the inputs that
            are summed over, the last of the leaf's axes fastest and the positions of a
            convolution's window slowest; for a leaf that no product reads it cuts the last axis.
        needs_data: whether a product must be one that second moments can be had of.

    Returns:
        By path.

    Raises:
        ValueError: a pattern matches nothing; a format does not fit; no output depends on a leaf;
            what reads it cannot be observed; NaN or infinite weights. Leaves are named.
        TypeError: a rule is no format, or a leaf no floating array.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.quantize.formats import Format
        >>> params = {"out": jnp.ones((4, 8, 6))}
        >>> model = lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["out"])
        >>> rules = {"*": Format(4, granularity=PerGroup(16))}
        >>> plan(model, params, [jnp.ones((1, 4, 8))], rules)["out"].format.granularity
        PerBlock(shape=(2, 8, 1))
    """
    check_leaves(params)
    leaves, formats = _chosen(params, rules)
    if inputs is None:
        tasks = [_checked(Task(path, None, formats[path]), leaves[path]) for path in formats]
        return {task.path: task for task in tasks}
    program = read(apply_fn, params, *inputs)
    uses: dict[str, list[Use]] = {}
    for use in find_uses(program):
        if use.path in formats:
            uses.setdefault(use.path, []).append(use)
    for path in formats:
        if path not in uses:
            raise ValueError(f"{path}: no output depends on it: leave it out with a rule of None")
    forms = _forms(program, uses, needs_data)
    traced = None
    tasks = {}
    for path, (form, note) in forms.items():
        format = grouped_format(path, leaves[path].shape, form, formats[path])
        if format.granularity == PerChannel():
            if form is not None:
                kept = tuple(sorted((*form.outer_axes, *form.output_axes)))
                format = dataclasses.replace(format, granularity=PerChannel(kept))
            else:
                traced = traced or trace(apply_fn, params, *inputs)
                format = traced_format(path, leaves[path], format, traced)
        tasks[path] = _checked(Task(path, form, format, note), leaves[path])
    return tasks


def _chosen(params: Any, rules: Any) -> tuple[tree_lib.Leaves, dict[str, AnyFormat]]:
    """The leaves that rules name and the format of each, in the order of the tree."""
    weights = tree_lib.select(params, check=False)
    if isinstance(rules, Mapping):
        if not rules:
            raise ValueError("rules is empty: {'*': format} is for every weight")
        everything = tree_lib.flatten(params)
        for pattern, format in rules.items():
            _check_format(f"rule '{pattern}'", format, optional=True)
            named = tree_lib.matching(pattern, everything)
            if named and not tree_lib.matching(pattern, weights):
                raise ValueError(
                    f"pattern '{pattern}' matches only leaves that are not compressed by default "
                    f"({named[0]}): aim it at matrices, kernels or embeddings"
                )
        assigned = tree_lib.assign(rules, weights)
        formats = {path: rules[assigned[path]] for path in weights if path in assigned}
    else:
        _check_format("rules", rules, optional=False)
        formats = dict.fromkeys(weights, rules)
    formats = {path: format for path, format in formats.items() if format is not None}
    if not formats:
        raise ValueError("every rule is None: there is nothing to quantize")
    for path in formats:
        tree_lib.check_weight(path, weights[path])
    return weights, formats


def _check_format(name: str, format: Any, *, optional: bool) -> None:
    if isinstance(format, AnyFormat) or (optional and format is None):
        return
    what = "a format or None" if optional else "a format, or {path pattern: format or None}"
    raise TypeError(f"{name} must be {what}, such as Format(bits=4), not {format!r:.60}")


def _checked(task: Task, leaf: Any) -> Task:
    check_quantizable(task.path, leaf, task.format)
    return task


def _forms(
    program: Program, uses: Mapping[str, Sequence[Use]], needs_data: bool
) -> dict[str, tuple[MatrixForm | None, str]]:
    """The matrix form of each leaf, or None and why there is none."""
    multiplied = [path for path, found in uses.items() if any(map(_is_product, found))]
    try:
        known = matrix_forms(program, multiplied)
    except ValueError:
        known = {}
    forms: dict[str, tuple[MatrixForm | None, str]] = {}
    reasons = []
    for path, found in uses.items():
        if path in known:
            forms[path] = known[path], ""
        elif path not in multiplied:
            forms[path] = None, _without_product(found)
        else:
            try:
                forms[path] = _difficult(program, path, found)
            except ValueError as error:
                reasons.append(str(error))
                # Scales and rounding need no matrix.
                forms[path] = None, str(error).removeprefix(f"{path}: ").partition(":")[0]
    if reasons and needs_data:
        raise ValueError(f"{'; '.join(reasons)} (with a rule of None), or round to nearest")
    return forms


def _is_product(use: Use) -> bool:
    return use.kind in ("dot", "conv")


def _without_product(uses: Sequence[Use]) -> str:
    return "looked up" if any(use.kind == "gather" for use in uses) else "no product"


def _difficult(program: Program, path: str, uses: Sequence[Use]) -> tuple[MatrixForm | None, str]:
    """The form of a leaf that may be looked up besides (a tied embedding): of its products."""
    products = [use for use in uses if _is_product(use)]
    if not all(_is_product(use) or use.kind == "gather" for use in uses) or products == [*uses]:
        return matrix_forms(program, [path])[path], ""
    shape = program.leaves[path].shape
    try:
        found = {matrix_form(use, shape) for use in products}
    except Unobservable as error:
        raise ValueError(f"{path}: {error}: leave it out") from error
    if len(found) > 1:
        raise ValueError(f"{path}: its products disagree on the axes: leave it out")
    return found.pop(), ALSO_LOOKED_UP


def grouped_format(
    path: str, shape: Sequence[int], form: MatrixForm | None, format: AnyFormat
) -> AnyFormat:
    """A format whose groups of the default axis lie along the inputs that are summed over.

    Args:
        path: for the message.
        shape: of the leaf.
        form: how the leaf is multiplied; None: its last axis is cut.
        format: as the user gave it.

    Returns:
        The same format where it has no such groups.

    Raises:
        ValueError: a group is no box of the joined input axes; names sizes that would be.

    Example:
        >>> from jaxcomp.quantize.formats import Format
        >>> form = MatrixForm((8, 16, 3, 3), (1, 2, 3), (0,), kernel_axes=(2, 3))
        >>> grouped_format("kernel", form.shape, form, Format(4, granularity=PerGroup(16)))
        Format(bits=4, symmetric=True, granularity=PerGroup(size=16, axis=-3), ...)
    """
    granularity = format.granularity
    if not isinstance(granularity, PerGroup) or granularity.axis != _DEFAULT_AXIS:
        return format
    if form is None:
        axes = [len(shape) - 1]
    else:
        channels = [axis for axis in form.input_axes if axis not in form.kernel_axes]
        axes = [*reversed(channels), *reversed(form.kernel_axes)]
    blocks, left = {}, granularity.size
    for axis in axes:
        block = math.gcd(left, shape[axis])
        if block not in (left, shape[axis]):
            break
        blocks[axis], left = block, left // block
    if left > 1:
        sizes = [shape[axis] for axis in axes]
        raise ValueError(
            f"{path}: groups of {granularity.size} do not divide its inputs, of sizes "
            f"{' × '.join(map(str, reversed(sizes)))}: {_fitting(granularity.size, sizes)} would, "
            "or PerChannel() for this leaf"
        )
    cut = [axis for axis, block in blocks.items() if block > 1] or axes[:1]
    if len(cut) == 1:
        new: Any = PerGroup(granularity.size, cut[0] - len(shape))
    else:
        new = PerBlock(tuple(blocks.get(axis, 1) for axis in range(min(cut), len(shape))))
    return dataclasses.replace(format, granularity=new)


def _fitting(size: int, sizes: Sequence[int]) -> str:
    """The group sizes next to one that does not fit axes of some sizes, fastest first."""
    fit, whole = {1}, 1
    for n in sizes:
        fit |= {whole * d for d in range(1, n + 1) if n % d == 0}
        whole *= n
    below, above = [n for n in fit if n < size], [n for n in fit if n > size]
    return " or ".join(str(n) for n in (max(below, default=0), min(above, default=0)) if n)
