"""What to do with each leaf of a model: how its axes are split, and whether data can say more."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_leaves
from jaxcomp.factorize.rules import (
    Factoring,
    LowRank,
    chosen_rules,
    factoring_of,
    flax_form,
)
from jaxcomp.model.matrices import MatrixForm, matrix_forms
from jaxcomp.model.program import Program, read
from jaxcomp.model.uses import find_uses


class Task(NamedTuple):
    """What to do with a leaf; static, so it may be closed over.

    Attributes:
        path: of the leaf.
        rule: the rank that was asked for.
        factoring: how its axes lie in the factors; None: it stays dense.
        form: the matrix that its inputs are multiplied with; None where there is none.
        note: why it stays dense, or has no inputs.
    """

    path: str
    rule: LowRank
    factoring: Factoring | None
    form: MatrixForm | None
    note: str = ""


def plan(
    apply_fn: Callable[..., Any] | None, params: Any, inputs: Sequence[Any] | None, rules: Any
) -> dict[str, Task]:
    """What to do with each leaf, in the order of the program; all checks that need no data.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        inputs: those of one batch, for their shapes; None: leaves are taken for Flax's layouts.
        rules: see :func:`~jaxcomp.factorize.rules.chosen_rules`.

    Returns:
        By path.

    Raises:
        ValueError: a pattern matches nothing; NaN or infinite weights.
        TypeError: a rule is none, or a leaf no floating array.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"q": jnp.ones((6, 2, 4))}
        >>> model = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["q"])
        >>> plan(model, params, [jnp.ones((1, 6))], LowRank(2))["q"].factoring.equation
        'ar,rbc->abc'
        >>> plan(None, params, None, LowRank(2))["q"].note
        'its 3 axes do not tell inputs from outputs: give batches'
    """
    check_leaves(params)
    chosen = chosen_rules(params, rules)
    leaves = tree_lib.flatten(params)
    if inputs is None:
        return {path: _without_program(path, rule, leaves[path]) for path, rule in chosen.items()}
    assert apply_fn is not None
    program = read(apply_fn, params, *inputs)
    uses: dict[str, list[Any]] = {}
    for use in find_uses(program):
        if use.path in chosen:
            uses.setdefault(use.path, []).append(use)
    order = [*uses, *(path for path in chosen if path not in uses)]
    return {path: _task(program, path, chosen[path], uses.get(path, [])) for path in order}


def _without_program(path: str, rule: LowRank, leaf: Any) -> Task:
    form = flax_form(tuple(leaf.shape))
    if form is None:
        words = f"its {leaf.ndim} axes do not tell inputs from outputs: give batches"
        return Task(path, rule, None, None, words)
    return Task(path, rule, factoring_of(form, rule.split), None)


def _task(program: Program, path: str, rule: LowRank, uses: Sequence[Any]) -> Task:
    try:
        form = matrix_forms(program, [path])[path]
    except ValueError as error:
        shape = tuple(program.leaves[path].shape)
        words = str(error).removeprefix(f"{path}: ").partition(":")[0]
        if uses and len(shape) == 2 and all(use.kind in ("gather", "dot") for use in uses):
            # An embedding has the rank that it has, whatever reads it.
            return Task(path, rule, factoring_of(MatrixForm(shape, (0,), (1,)), "matrix"), None)
        return Task(path, rule, None, None, words)
    if form.inner > 1:
        return Task(path, rule, None, None, f"a convolution of {form.inner} groups")
    return Task(path, rule, factoring_of(form, rule.split), form)


def read_forms(apply_fn: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, MatrixForm]:
    """What the axes of each weight are for, read from the traced model.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree of arrays, or of ``jax.ShapeDtypeStruct``.
        *inputs: examples of the other inputs; ``jax.ShapeDtypeStruct`` will do.

    Returns:
        By path, for :func:`~jaxcomp.factorize.train`; leaves that are no matrices there are left
        out.

    Raises:
        TypeError: ``apply_fn`` is no function, or a leaf no array.
        ValueError: there is no weight.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"q": jnp.ones((6, 2, 4))}
        >>> model = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["q"])
        >>> read_forms(model, params, jnp.ones((1, 6)))["q"].output_axes
        (1, 2)
    """
    program = read(apply_fn, params, *inputs)
    forms = {}
    for path in tree_lib.select(params, check=False):
        try:
            forms[path] = matrix_forms(program, [path])[path]
        except ValueError:
            # Looked up, changed on the way or read in several ways: two axes are a matrix yet.
            shape = tuple(program.leaves[path].shape)
            if len(shape) == 2:
                forms[path] = MatrixForm(shape, (0,), (1,))
    return forms


def described(tasks: Mapping[str, Task]) -> str:
    """The rules of all leaves, to tell calls apart."""
    return str([(path, task.rule) for path, task in tasks.items()])
