"""Branches that can be left out: what leaves to name so that a branch adds nothing."""

from collections.abc import Mapping
from typing import Any

from jaxcomp import checks
from jaxcomp import tree as tree_lib
from jaxcomp.model.program import Op, Program, Value
from jaxcomp.model.reach import reached
from jaxcomp.search.supernets.edit import edit, needed


def matched(patterns: Any, leaves: Mapping[str, Any], branch: str) -> tuple[str, ...]:
    """The leaves that a branch names.

    Args:
        patterns: one, or several.
        leaves: of the model, by path.
        branch: its name, for messages.

    Returns:
        Paths.

    Raises:
        TypeError: they are no patterns.
        ValueError: a pattern matches no leaf.
    """
    try:
        return tuple(tree_lib.assign(checks.as_patterns(patterns), leaves))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{branch}: {error}") from None


def check_branch(program: Program, gone: tuple[str, ...], branch: str) -> None:
    """Raise unless a branch adds nothing where its leaves are zero.

    Zeros are followed from the leaves to where they are added to what depends on the data, or stand
    beside it in a concatenation. There the branch has ended, and nothing of it is left.

    Args:
        program: the model, without rematerialization.
        gone: paths of the leaves.
        branch: its name, for messages.

    Raises:
        ValueError: the leaves are not read, all outputs become zero, or something is left of the
            branch, which is named.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.model.program import read
        >>> def model(p, x):
        ...     return x + (x @ p["kernel"] + p["shift"])
        >>> params = {"kernel": jnp.ones((2, 2)), "shift": jnp.ones(2)}
        >>> program = read(model, params, jnp.ones((1, 2)))
        >>> check_branch(program, ("kernel", "shift"), "block")
        >>> check_branch(program, ("kernel",), "block")
        Traceback (most recent call last):
        ...
        ValueError: block: with kernel zero, the branch still hands on shift: name it too
    """
    edited = edit(program, {}, gone)
    leaves = ", ".join(gone)
    data = reached(program, program.inputs)
    if needed(program).isdisjoint(gone):
        raise ValueError(f"{branch}: the outputs do not depend on {leaves}: name other leaves")
    if all(value.constant is not None for value in edited.program.block.outputs):
        raise ValueError(f"{branch}: with {leaves} zero, every output is: name a branch beside it")
    for op, other in edited.joins:
        if other not in data:
            raise ValueError(f"{branch}: with {leaves} zero, {_left(program, op, other)}")
    for op in edited.reads:
        if op.name != "concatenate":
            raise ValueError(
                f"{branch}: with {leaves} zero, {op} still makes something of the branch: name "
                "leaves whose zeros are added to what goes around it"
            )
    if not edited.joins and not edited.reads:
        raise ValueError(
            f"{branch}: with {leaves} zero, no addition is left out: nothing goes around the branch"
        )


def _left(program: Program, op: Op, other: Value) -> str:
    paths = [path for path, leaf in program.leaves.items() if other in reached(program, [leaf])]
    if not paths:
        return f"the branch still hands on a constant of {op}, which no leaf holds"
    return f"the branch still hands on {', '.join(paths)}: name it too"
