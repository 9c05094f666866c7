"""A convolution as kernels of ours see it: static, with its two gradients, each by itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.kernels.placed import Axes


class Convolution(NamedTuple):
    """How a kernel moves over its inputs; static, and hashable.

    Attributes:
        strides: steps between outputs, one a spatial axis.
        padding: zeros before and after each.
        input_dilation: steps between inputs.
        kernel_dilation: steps between the kernel's positions.
        layout: ``(inputs, kernel, outputs)``: for each the axes of (batch, features, *space), of a
            kernel (outputs, inputs, *space).
        groups: of channels that do not see each other.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    layout: tuple[tuple[int, ...], ...]
    groups: int

    def is_product(self, kernel: tuple[int, ...]) -> bool:
        """Whether it is a product with a matrix: a kernel of one position, channels last."""
        inputs, _, outputs = self.layout
        positions = {kernel[axis] for axis in self.matrix_axes()[:-2]}
        plain = {*self.strides, *self.input_dilation, *positions, self.groups} == {1}
        last = inputs[1] == outputs[1] == len(inputs) - 1 and inputs == outputs
        return plain and last and set(self.padding) <= {(0, 0)}

    def matrix_axes(self) -> tuple[int, ...]:
        """The axes of the kernel in the order (*space, inputs, outputs)."""
        outputs, inputs, *space = self.layout[1]
        return (*space, inputs, outputs)


def convolution(
    x: Any,
    w: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
) -> Convolution:
    """The arguments of :func:`jax.lax.conv_general_dilated`, resolved.

    Raises:
        ValueError: they do not fit each other; what is wrong is said as JAX says it.

    Example:
        >>> x, w = jnp.ones((2, 8, 3)), jnp.ones((3, 3, 4))
        >>> convolution(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")).padding
        ((1, 1),)
    """
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, dimension_numbers)
    space = [x.shape[axis] for axis in numbers.lhs_spec[2:]]
    kernel = [w.shape[axis] for axis in numbers.rhs_spec[2:]]
    ones = (1,) * len(space)
    lhs, rhs = tuple(lhs_dilation or ones), tuple(rhs_dilation or ones)
    if isinstance(padding, str):
        if lhs != ones:
            raise ValueError(f"padding {padding!r} with lhs_dilation {lhs}: give numbers")
        reach = [(size - 1) * step + 1 for size, step in zip(kernel, rhs, strict=True)]
        try:
            padding = lax.padtype_to_pads(space, reach, window_strides, padding)
        except RuntimeError as error:
            raise ValueError(f"padding {padding!r}: {error}") from None
    pads = tuple((int(before), int(after)) for before, after in padding)
    layout = tuple(tuple(spec) for spec in numbers)
    found = Convolution(tuple(window_strides), pads, lhs, rhs, layout, feature_group_count)
    dtype = jnp.result_type(x, w)
    shapes = (jax.ShapeDtypeStruct(each.shape, dtype) for each in (x, w))
    try:
        jax.eval_shape(lambda x, w: convolve(found, x, w), *shapes)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return found


def convolve(how: Convolution, x: jax.Array, w: jax.Array) -> jax.Array:
    """The convolution, in the dtype that both promote to.

    Example:
        >>> x, w = jnp.ones((1, 4, 1)), jnp.ones((3, 1, 1))
        >>> how = convolution(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        >>> convolve(how, x, w).ravel()
        Array([2., 3., 3., 2.], dtype=float32)
    """
    dtype = jnp.result_type(x, w)
    return lax.conv_general_dilated(
        x.astype(dtype),
        w.astype(dtype),
        how.strides,
        how.padding,
        how.input_dilation,
        how.kernel_dilation,
        lax.ConvDimensionNumbers(*how.layout),
        how.groups,
    )


def convolve_to_input(how: Convolution, dy: jax.Array, w: jax.Array, like: Any) -> jax.Array:
    """The gradient of the inputs, which are like ``like``.

    Example:
        >>> x, w = jnp.ones((1, 4, 1)), jnp.ones((3, 1, 1))
        >>> how = convolution(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        >>> convolve_to_input(how, jnp.ones((1, 4, 1)), w, x).ravel()
        Array([2., 3., 3., 2.], dtype=float32)
    """
    shape = jax.ShapeDtypeStruct(like.shape, dy.dtype)
    (dx,) = jax.linear_transpose(lambda x: convolve(how, x, w.astype(dy.dtype)), shape)(dy)
    return dx.astype(like.dtype)


def convolve_to_weight(how: Convolution, x: jax.Array, dy: jax.Array, like: Any) -> jax.Array:
    """The gradient of the kernel, which is like ``like``.

    Example:
        >>> x, w = jnp.ones((1, 4, 1)), jnp.ones((3, 1, 1))
        >>> how = convolution(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        >>> convolve_to_weight(how, x, jnp.ones((1, 4, 1)), w).ravel()
        Array([3., 4., 3.], dtype=float32)
    """
    shape = jax.ShapeDtypeStruct(like.shape, dy.dtype)
    (dw,) = jax.linear_transpose(lambda w: convolve(how, x.astype(dy.dtype), w), shape)(dy)
    return dw.astype(like.dtype)


def convolution_axes(how: Convolution) -> tuple[tuple[str, ...], ...]:
    """Names of the axes of (inputs, kernel, outputs), for :class:`Axes`.

    Batches and features may lie on a mesh; features of groups, and space, are the compiler's.

    Example:
        >>> x, w = jnp.ones((1, 4, 1)), jnp.ones((3, 1, 1))
        >>> how = convolution(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        >>> convolution_axes(how)
        (('r', 'sa', 'i'), ('ka', 'i', 'o'), ('r', 'ta', 'o'))
    """
    space = "abcdefgh"[: len(how.strides)]
    of = lambda name: [name + each for each in space]
    inputs, outputs = ("i", "o") if how.groups == 1 else ("m", "o")
    named = (
        ("r", inputs, *of("s")),
        (outputs, "i", *of("k")),
        ("r", outputs, *of("t")),
    )
    found = []
    for names, spec in zip(named, how.layout, strict=True):
        placed = dict(zip(spec, names, strict=True))
        found.append(tuple(placed[axis] for axis in range(len(spec))))
    return tuple(found)


def axes_of(how: Convolution, kind: str, *others: tuple[str, ...]) -> Axes:
    """The axes of a convolution or of a gradient, ``"forward"``, ``"to_input"``, ``"to_weight"``.

    Args:
        how: the convolution.
        kind: which.
        others: names of the axes of further arrays.

    Example:
        >>> x, w = jnp.ones((1, 4, 1)), jnp.ones((3, 1, 1))
        >>> how = convolution(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        >>> axes_of(how, "to_weight").result
        ('ka', 'i', 'o')
    """
    inputs, kernel, outputs = convolution_axes(how)
    return {
        "forward": Axes((inputs, kernel, *others), outputs),
        "to_input": Axes((outputs, kernel, *others), inputs),
        "to_weight": Axes((inputs, outputs, *others), kernel),
    }[kind]
