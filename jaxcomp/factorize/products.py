"""A dot or a convolution with a weight in factors, one factor after the other."""

import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxcomp.arrays.low_rank import terms_of
from jaxcomp.model.program import Op


class Unfit(Exception):
    """A product cannot be computed on factors; the message says why."""


class Placed(NamedTuple):
    """Where a weight's axes lie in a product; static.

    Attributes:
        op: a dot or a convolution.
        operand: which of its inputs is the weight.
        letters: for each axis of that input, the letter of the weight's axis; of a convolution's
            window also letters that no factor has, for axes of one position.
        equation: of the weight, see :class:`~jaxcomp.arrays.LowRankArray`.
    """

    op: Op
    operand: int
    letters: str
    equation: str


def multiply(placed: Placed, x: Array, factors: tuple[Array, ...]) -> Array:
    """What the operation gives, without the weight ever being made.

    Args:
        placed: where the weight lies.
        x: the other input.
        factors: of the weight, without leading axes.

    Returns:
        The result, of the operation's dtype, to the rounding of other sums.

    Raises:
        Unfit: the factors do not follow one after the other in a convolution.

    Example:
        >>> from jaxcomp.model.program import read
        >>> (op,) = read(lambda w, x: x @ w, jnp.ones((3, 4)), jnp.ones((2, 3))).block.ops
        >>> placed = Placed(op, 1, "io", "ia,ao->io")
        >>> multiply(placed, jnp.ones((2, 3)), (jnp.ones((3, 1)), 2 * jnp.ones((1, 4))))
        Array([[6., 6., 6., 6.],
               [6., 6., 6., 6.]], dtype=float32)
    """
    kind = placed.op.inputs[placed.operand].dtype
    factors = tuple(factor.astype(kind) for factor in factors)
    product = _dot if placed.op.name == "dot_general" else _convolution
    return product(placed, x, factors).astype(placed.op.outputs[0].dtype)


def _dot(placed: Placed, x: Array, factors: tuple[Array, ...]) -> Array:
    """One sum of products; the order that takes the fewest is found for the sizes at hand."""
    params, operand = placed.op.params, placed.operand
    contracted, batch = params["dimension_numbers"]
    terms, _ = terms_of(placed.equation)
    free = iter(letter for letter in string.ascii_letters if letter not in placed.equation)
    mine = {axis: letter for axis, letter in enumerate(placed.letters)}
    other = 1 - operand
    pairs = {
        **dict(zip(contracted[other], contracted[operand], strict=True)),
        **dict(zip(batch[other], batch[operand], strict=True)),
    }
    data = [mine[pairs[axis]] if axis in pairs else next(free) for axis in range(x.ndim)]
    shared = [mine[axis] for axis in batch[operand]]
    kept = {
        other: [data[axis] for axis in range(x.ndim) if axis not in pairs],
        operand: [
            letter
            for axis, letter in mine.items()
            if axis not in (*contracted[operand], *batch[operand])
        ],
    }
    equation = f"{''.join(data)},{','.join(terms)}->{''.join([*shared, *kept[0], *kept[1]])}"
    return jnp.einsum(
        equation,
        x,
        *factors,
        optimize="optimal",
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )


class _Step(NamedTuple):
    """One convolution: a factor, the letters of its channels, whether each channel is alone."""

    factor: int
    inputs: str
    outputs: str
    depthwise: bool


def _steps(placed: Placed) -> list[_Step]:
    """The factors in the order in which data passes them."""
    terms, _ = terms_of(placed.equation)
    out, current, *window = (placed.letters[axis] for axis in _kernel_axes(placed.op))
    left = dict(enumerate(terms))
    steps = []
    while left:
        here = {at: set(term) - set(window) for at, term in left.items() if current in term}
        alone = [at for at, channels in here.items() if len(channels) == 1]
        # What keeps each channel by itself comes before what mixes them.
        at = next(iter([*alone, *here]), None)
        if at is None or len(here[at]) > 2:
            raise Unfit(f"the factors of {placed.equation} do not follow one after the other")
        after = current if at in alone else (here[at] - {current}).pop()
        del left[at]
        steps.append(_Step(at, current, after, at in alone))
        if after != current and any(current in term for term in left.values()):
            raise Unfit(f"the factors of {placed.equation} do not follow one after the other")
        current = after
    if current != out:
        raise Unfit(f"the factors of {placed.equation} do not end in its outputs")
    return steps


def _kernel_axes(op: Op) -> tuple[int, ...]:
    """The kernel's axes: outputs, inputs, window."""
    return tuple(op.params["dimension_numbers"].rhs_spec)


def _convolution(placed: Placed, x: Array, factors: tuple[Array, ...]) -> Array:
    params = placed.op.params
    terms, _ = terms_of(placed.equation)
    window = [placed.letters[axis] for axis in _kernel_axes(placed.op)[2:]]
    steps = _steps(placed)
    numbers = params["dimension_numbers"]
    for step in steps:
        term, factor = terms[step.factor], factors[step.factor]
        # A window that no factor has is of one position, and passed at once.
        once = [w for w in window if w not in placed.equation and step is steps[0]]
        here = [letter for letter in window if letter in term]
        channels = step.outputs if step.depthwise else step.outputs + step.inputs
        kernel = jnp.transpose(factor, [term.index(letter) for letter in [*channels, *here]])
        sizes = [factor.shape[term.index(w)] if w in here else 1 for w in window]
        here += once
        first = kernel.shape[0]
        kernel = kernel.reshape(first, 1 if step.depthwise else kernel.shape[1], *sizes)

        def at_window(values: Any, nothing: Any, here: list[str] = here) -> list[Any]:
            pairs = zip(window, values, strict=True)
            return [value if letter in here else nothing for letter, value in pairs]

        last = step is steps[-1]
        x = lax.conv_general_dilated(
            x,
            kernel,
            window_strides=at_window(params["window_strides"], 1),
            padding=at_window(params["padding"], (0, 0)),
            lhs_dilation=at_window(params["lhs_dilation"], 1),
            rhs_dilation=at_window(params["rhs_dilation"], 1),
            dimension_numbers=lax.ConvDimensionNumbers(
                numbers.lhs_spec,
                tuple(range(len(window) + 2)),
                numbers.out_spec if last else numbers.lhs_spec,
            ),
            feature_group_count=first if step.depthwise else 1,
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
    return x


def check_product(placed: Placed) -> None:
    """Raise :class:`Unfit` unless :func:`multiply` can do it.

    Args:
        placed: where the weight lies.
    """
    params = placed.op.params
    if placed.op.name == "dot_general":
        if params.get("out_sharding") is not None:
            raise Unfit("the model says where the result of its product is to lie")
        return
    if placed.op.name != "conv_general_dilated":
        raise Unfit(f"{placed.op.name} is neither a dot nor a convolution")
    if placed.operand != 1:
        raise Unfit("it is the data of a convolution, not its kernel")
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise Unfit("its convolution is grouped")
    _steps(placed)


def shapes_of(factors: tuple[Any, ...], skip: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Factors of one of a stack, as shapes.

    Args:
        factors: with ``skip`` leading axes.
        skip: how many.

    Example:
        >>> shapes_of((jnp.ones((5, 3, 2)),), 1)[0].shape
        (3, 2)
    """
    return tuple(jax.ShapeDtypeStruct(f.shape[skip:], f.dtype) for f in factors)
