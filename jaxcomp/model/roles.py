"""What an operation takes each axis of a weight for."""

from typing import Any

from jaxcomp.model import trails as trail_lib
from jaxcomp.model.cost import ELEMENTWISE
from jaxcomp.model.program import Op
from jaxcomp.model.trails import Trail


def kind_and_roles(op: Op, operand: int, trail: Trail) -> tuple[str, tuple[str, ...]]:
    """The kind of a use, and a word for each axis of the leaf.

    Args:
        op: the operation.
        operand: which of its inputs holds the weight.
        trail: where the leaf's axes are in that input.

    Returns:
        The kind and the roles, as in :class:`jaxcomp.model.uses.Use`.
    """
    kind, words = _operand_roles(op, operand, len(trail.axes))
    found: list[set[str]] = [set() for _ in trail.shape]
    for where, digits in enumerate(trail.axes):
        for axis in trail_lib.leaf_axes(digits):
            found[axis].add(words[where])
    if kind == "conv" and operand == 1:
        _mark_batch(op, trail, found)
    for _, digits in trail.stacked:
        for axis in trail_lib.leaf_axes(digits):
            found[axis].add("stack")
    return kind, tuple(
        next(iter(words)) if len(words) == 1 and axis not in trail.lost else "other"
        for axis, words in enumerate(found)
    )


def _operand_roles(op: Op, operand: int, rank: int) -> tuple[str, list[str]]:
    words = ["output"] * rank
    if op.name == "dot_general":
        contracted, batch = op.params["dimension_numbers"]
        return "dot", _named(words, input=contracted[operand], batch=batch[operand])
    if op.name == "conv_general_dilated" and operand < 2:
        numbers = op.params["dimension_numbers"]
        spec = (numbers.lhs_spec, numbers.rhs_spec)[operand]
        return "conv", _named(words, input=spec[1:2], kernel=spec[2:])
    if op.name == "gather" and operand == 0:
        numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
        whole = op.inputs[0].shape
        looked_up = [a for a in numbers.start_index_map if sizes[a] < whole[a] or sizes[a] == 1]
        return "gather", _named(words, input=looked_up, batch=numbers.operand_batching_dims)
    if op.name == "dynamic_slice" and operand == 0:
        sizes, whole = op.params["slice_sizes"], op.inputs[0].shape
        looked_up = [axis for axis in range(rank) if sizes[axis] < whole[axis]]
        return "gather", _named(words, input=looked_up)
    if op.name.startswith("ragged_dot") and operand == 1:
        return "other", _ragged(op, words)
    return ("elementwise", words) if op.name in ELEMENTWISE else ("other", ["other"] * rank)


def _ragged(op: Op, words: list[str]) -> list[str]:
    numbers = op.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    return _named(words, input=contracted, batch=(*batch, *numbers.rhs_group_dimensions))


def _named(words: list[str], **axes: Any) -> list[str]:
    words = list(words)
    for word, where in axes.items():
        for axis in where:
            words[axis] = word
    return words


def _mark_batch(op: Op, trail: Trail, found: list[set[str]]) -> None:
    """A vmapped convolution keeps its batch in the groups; the innermost leaf axis is channels."""
    groups = max(op.params["feature_group_count"], op.params["batch_group_count"])
    out = op.params["dimension_numbers"].rhs_spec[0]
    digits = [digit for digit in trail.axes[out] if digit.axis >= 0]
    outside = 1
    for digit in trail.axes[out]:
        outside *= digit.size
        if digit.axis < 0 or digit.axis == digits[-1].axis or groups % outside:
            break
        if found[digit.axis] == {"output"}:
            found[digit.axis] = {"batch"}
