"""A weight as the matrix, or the stack of matrices, that its inputs are multiplied with.

A dot and a convolution each hold a leaf in their own layout. Here every leaf becomes ``(*groups,
features, outputs)``, with groups and features as :func:`jaxcomp.model.observe` gives them for
:func:`~jaxcomp.model.statistics.second_moment`: what the operation computes is, up to the layout of
its result, ``samples @ matrix``. Solvers that need data (SparseGPT, GPTQ) work on this form alone.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxcomp import tree as tree_lib
from jaxcomp.model import samples as samples_lib
from jaxcomp.model import tapped
from jaxcomp.model.program import Program
from jaxcomp.model.samples import Unobservable
from jaxcomp.model.uses import Use, find_uses


class MatrixForm(NamedTuple):
    """How the axes of a leaf make up a stack of matrices; static, so it may be closed over.

    Attributes:
        shape: of the leaf.
        input_axes: the axes of the leaf that are its features, joined in this order.
        output_axes: the axes that are its outputs, of all inner groups together.
        outer_axes: the axes that have a matrix for each position: those of stacked layers, then
            those of experts or other batches.
        inner: groups of a grouped convolution for each position of these; 1 without.
        columns: the joined outputs sorted by inner group; None where they are so already.
        kernel_axes: those of ``input_axes`` that are a convolution's window.
    """

    shape: tuple[int, ...]
    input_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    outer_axes: tuple[int, ...] = ()
    inner: int = 1
    columns: tuple[int, ...] | None = None
    kernel_axes: tuple[int, ...] = ()

    @property
    def groups(self) -> tuple[int, ...]:
        """The leading axes of the stack; empty for a single matrix."""
        outer = tuple(self.shape[axis] for axis in self.outer_axes)
        return (*outer, self.inner) if self.inner > 1 else outer

    @property
    def features(self) -> int:
        """Rows of a matrix."""
        return math.prod(self.shape[axis] for axis in self.input_axes)

    @property
    def outputs(self) -> int:
        """Columns of a matrix."""
        return math.prod(self.shape[axis] for axis in self.output_axes) // self.inner


def to_matrix(form: MatrixForm, leaf: Shaped[Any, "..."]) -> Shaped[Array, "..."]:
    """A leaf (or anything of its shape, such as a mask) as matrices.

    Args:
        form: of the leaf.
        leaf: an array of shape ``form.shape``.

    Returns:
        ``(*groups, features, outputs)``, of the same dtype.

    Raises:
        ValueError: the array has another shape.

    Example:
        >>> form = MatrixForm((2, 3, 4), input_axes=(0, 1), output_axes=(2,))
        >>> to_matrix(form, jnp.ones((2, 3, 4))).shape
        (6, 4)
    """
    if tuple(leaf.shape) != form.shape:
        raise ValueError(f"the form is of shape {form.shape}, the array of {tuple(leaf.shape)}")
    order = (*form.outer_axes, *form.input_axes, *form.output_axes)
    outer = [form.shape[axis] for axis in form.outer_axes]
    matrix = jnp.transpose(leaf, order).reshape(*outer, form.features, form.inner * form.outputs)
    if form.columns is not None:
        matrix = jnp.take(matrix, np.array(form.columns), axis=-1)
    if form.inner > 1:
        matrix = matrix.reshape(*outer, form.features, form.inner, form.outputs)
        matrix = jnp.moveaxis(matrix, -2, -3)
    return matrix


def from_matrix(form: MatrixForm, matrix: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The inverse of :func:`to_matrix`.

    Args:
        form: of the leaf.
        matrix: ``(*groups, features, outputs)``.

    Returns:
        An array of shape ``form.shape``, of the same dtype.

    Raises:
        ValueError: the matrices have another shape.

    Example:
        >>> form = MatrixForm((4, 3), input_axes=(1,), output_axes=(0,))
        >>> leaf = jnp.arange(12.0).reshape(4, 3)
        >>> bool(jnp.all(from_matrix(form, to_matrix(form, leaf)) == leaf))
        True
    """
    expected = (*form.groups, form.features, form.outputs)
    if tuple(matrix.shape) != expected:
        raise ValueError(f"the form has matrices {expected}, the array is {tuple(matrix.shape)}")
    outer = [form.shape[axis] for axis in form.outer_axes]
    if form.inner > 1:
        matrix = jnp.moveaxis(matrix, -3, -2)
        matrix = matrix.reshape(*outer, form.features, form.inner * form.outputs)
    if form.columns is not None:
        matrix = jnp.take(matrix, np.argsort(form.columns), axis=-1)
    order = (*form.outer_axes, *form.input_axes, *form.output_axes)
    matrix = matrix.reshape([form.shape[axis] for axis in order])
    return jnp.transpose(matrix, np.argsort(order).tolist())


def to_stack(
    form: MatrixForm, leaf: Shaped[Any, "..."]
) -> Shaped[Array, "matrices features outputs"]:
    """A leaf as matrices in a row, all its groups on one axis; a single matrix is a row of one.

    Args:
        form: of the leaf.
        leaf: an array of shape ``form.shape``.

    Example:
        >>> form = MatrixForm((5, 3, 4), input_axes=(1,), output_axes=(2,), outer_axes=(0,))
        >>> to_stack(form, jnp.ones((5, 3, 4))).shape
        (5, 3, 4)
    """
    return to_matrix(form, leaf).reshape(-1, form.features, form.outputs)


def from_stack(
    form: MatrixForm, stack: Shaped[Array, "matrices features outputs"]
) -> Shaped[Array, "..."]:
    """The inverse of :func:`to_stack`.

    Args:
        form: of the leaf.
        stack: its matrices in a row.

    Example:
        >>> form = MatrixForm((4, 3), input_axes=(1,), output_axes=(0,))
        >>> from_stack(form, jnp.ones((1, 3, 4))).shape
        (4, 3)
    """
    return from_matrix(form, stack.reshape(*form.groups, form.features, form.outputs))


def matrix_forms(program: Program, paths: Iterable[str]) -> dict[str, MatrixForm]:
    """The matrix forms of some leaves, in the order in which the program first uses them.

    Where a leaf is scaled, masked or normalized before its use, the matrix is that of the leaf as
    it is stored, not of what comes out of that.

    Args:
        program: from :func:`jaxcomp.model.program.read`.
        paths: of the leaves.

    Returns:
        Forms by path.

    Raises:
        ValueError: a path is no leaf, or a leaf has no such form: it is looked up, multiplied
            element by element, returned, unused, or its uses disagree. All such are named.

    Example:
        >>> from jaxcomp.model.program import read
        >>> params = {"embedding": jnp.ones((9, 4)), "kernel": jnp.ones((4, 2))}
        >>> def model(p, tokens):
        ...     return p["embedding"][tokens] @ p["kernel"]
        >>> program = read(model, params, np.zeros(3, int))
        >>> matrix_forms(program, ["kernel"])["kernel"].input_axes
        (0,)
        >>> matrix_forms(program, params)
        Traceback (most recent call last):
        ...
        ValueError: embedding: its rows are looked up by gather, not multiplied: ...
    """
    wanted = list(paths)
    for path in wanted:
        if path not in program.leaves:
            raise ValueError(f"no leaf '{path}'; {tree_lib.nearest(path, program.leaves)}")
    uses: dict[str, list[Use]] = {}
    for use in find_uses(program):
        uses.setdefault(use.path, []).append(use)
    outside = dict(tapped.around(program))
    forms, reasons = {}, []
    for path in (*uses, *(path for path in wanted if path not in uses)):
        if path not in wanted:
            continue
        try:
            for use in uses.get(path, ()):
                reason = tapped.obstacle(outside.get(use.op, ()))
                if reason is not None:
                    raise Unobservable(reason)
            forms[path] = _agreed(uses.get(path, ()), program.leaves[path].shape)
        except Unobservable as error:
            reasons.append(f"{path}: {error}")
    if reasons:
        raise ValueError(
            f"{'; '.join(reasons)}: no matrix meets data there, so leave out what is named"
        )
    return forms


def _agreed(uses: Sequence[Use], shape: tuple[int, ...]) -> MatrixForm:
    """The one form that all uses of a leaf have."""
    found: dict[MatrixForm, Use] = {}
    faults: list[tuple[Use, Unobservable]] = []
    for use in uses:
        try:
            found.setdefault(matrix_form(use, shape), use)
        except Unobservable as error:
            faults.append((use, error))
    # A weight divided by its own norm meets its data twice at one place: once is enough.
    places = {use.op for use in found.values()}
    for use, error in faults:
        if use.op not in places:
            raise error
    if not found:
        raise Unobservable("no output depends on it")
    if len(found) > 1:
        views = ", ".join(f"{use.op} contracts axes {f.input_axes}" for f, use in found.items())
        raise Unobservable(f"its uses disagree: {views}")
    return next(iter(found))


def matrix_form(use: Use, shape: Sequence[int]) -> MatrixForm:
    """The matrix form of a leaf by one of its uses.

    Args:
        use: from :func:`jaxcomp.model.uses.find_uses`.
        shape: of the leaf.

    Returns:
        The form.

    Raises:
        Unobservable: the use is no product with a matrix; the message says why.

    Example:
        >>> from jaxcomp.model.program import read
        >>> program = read(lambda w, x: x @ w.T, jnp.ones((4, 3)), jnp.ones((5, 3)))
        >>> (use,) = find_uses(program)
        >>> matrix_form(use, (4, 3))[1:3]
        ((1,), (0,))
    """
    samples = samples_lib.of_use(use, shape, patches=True)
    if samples.rows:
        raise Unobservable(f"its rows are looked up by {use.op}, not multiplied")

    def axes(*roles: str) -> tuple[int, ...]:
        return tuple(axis for axis, role in enumerate(use.roles) if role in roles)

    stack, batch, outputs = axes("stack"), axes("batch"), axes("output")
    features = axes("input", "kernel")
    # What of_use adds after the leaf's batch axes are the groups inside each of them.
    inner = math.prod(samples.groups) // math.prod(shape[axis] for axis in batch)
    columns = _columns(use, shape, outputs, inner) if inner > 1 else None
    outer, kernel = (*stack, *batch), axes("kernel")
    return MatrixForm(tuple(shape), features, outputs, outer, inner, columns, kernel)


def _columns(
    use: Use, shape: Sequence[int], outputs: tuple[int, ...], inner: int
) -> tuple[int, ...] | None:
    """The joined outputs of a grouped convolution sorted by group, or None if they are."""
    out = use.op.params["dimension_numbers"].rhs_spec[0]
    width = use.op.inputs[1].shape[out] // use.op.params["feature_group_count"]
    where, sizes = samples_lib.positions(use, shape, outputs)
    groups = where.get(out, np.zeros(sizes, int)).ravel() // width
    if not np.array_equal(np.sort(groups), np.repeat(np.arange(inner), groups.size // inner)):
        raise Unobservable(f"{use.op} reads its groups padded, repeated or mixed with other axes")
    order = np.argsort(groups, kind="stable")
    return None if np.array_equal(order, np.arange(order.size)) else tuple(order.tolist())
