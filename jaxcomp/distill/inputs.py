"""What the losses do with their inputs first: check them, choose a dtype, leave padding out.

Shapes and dtypes are always checked. Values are checked where they are known; inside ``jit`` they
are not. Everything is computed in float32, or in float64 where an array is: a loss in bfloat16 has
three digits. What a mask leaves out is replaced by zero *before* anything is computed from it, so
that NaN and infinity there reach neither a loss nor a gradient.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array


def as_floats(**arrays: Any) -> tuple[Array, ...]:
    """Arrays in the dtype that is computed in; gradients return in the dtype of each argument.

    Args:
        **arrays: by the name of the argument.

    Returns:
        The arrays in float32, or all in float64 where one of them is, in the order given.

    Raises:
        TypeError: an array is not floating point.

    Example:
        >>> student, teacher = as_floats(student=jnp.ones(2, jnp.bfloat16), teacher=jnp.ones(2))
        >>> student.dtype
        dtype('float32')
    """
    made = [jnp.asarray(array) for array in arrays.values()]
    check_floating(**dict(zip(arrays, made, strict=True)))
    dtype = computing_dtype(*made)
    return tuple(array.astype(dtype) for array in made)


def check_floating(**arrays: Array) -> None:
    """Raise unless all arrays are floating point.

    Raises:
        TypeError: one is not.

    Example:
        >>> check_floating(logits=jnp.arange(3))
        Traceback (most recent call last):
        ...
        TypeError: logits must be floating point, got int32: cast it.
    """
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {array.dtype}: cast it.")


def computing_dtype(*arrays: Array) -> Any:
    """float64 where an array is, else float32.

    Example:
        >>> computing_dtype(jnp.ones(2, jnp.bfloat16)).dtype
        dtype('float32')
    """
    return jnp.float64 if jnp.float64 in [array.dtype for array in arrays] else jnp.float32


def check_same_shape(remedy: str, **arrays: Array) -> None:
    """Raise unless two arrays have one shape.

    Args:
        remedy: what to do, ending the message.
        **arrays: two arrays by the name of the argument.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> check_same_shape("project one.", student=jnp.ones((2, 3)), teacher=jnp.ones((2, 4)))
        Traceback (most recent call last):
        ...
        ValueError: student (2, 3) and teacher (2, 4) must have one shape: project one.
    """
    (first, a), (second, b) = arrays.items()
    if a.shape != b.shape:
        raise ValueError(f"{first} {a.shape} and {second} {b.shape} must have one shape: {remedy}")


def check_same_batch(**arrays: Array) -> None:
    """Raise unless all arrays have a first axis, of one size above 0.

    Raises:
        ValueError: they do not.

    Example:
        >>> check_same_batch(student=jnp.ones((2, 3)), teacher=jnp.ones((3, 3)))
        Traceback (most recent call last):
        ...
        ValueError: student (2, 3) and teacher (3, 3) must hold the same examples on axis 0
    """
    sizes = {array.shape[:1] for array in arrays.values()}
    told = " and ".join(f"{name} {array.shape}" for name, array in arrays.items())
    if len(sizes) > 1 or () in sizes:
        raise ValueError(f"{told} must hold the same examples on axis 0")
    if (0,) in sizes:
        raise ValueError(f"{told} hold no example on axis 0: at least one is needed.")


def check_axis(name: str, array: Any, axis: int) -> int:
    """An axis of an array, or of a ``jax.ShapeDtypeStruct``, counted from the front.

    Raises:
        TypeError: no array.
        ValueError: the array lacks it, or it is empty.

    Example:
        >>> check_axis("student", jnp.ones((2, 3)), -1)
        1
    """
    if not hasattr(array, "shape"):
        kind = type(array).__name__
        raise TypeError(f"{name} must be an array or a jax.ShapeDtypeStruct, not a {kind}.")
    shape = array.shape
    if not -len(shape) <= axis < len(shape) or shape[axis] == 0:
        raise ValueError(f"{name} {shape} has nothing on axis {axis}: pass the right axis=.")
    return axis % len(shape)


def as_mask(where: Any, *shapes: Sequence[int]) -> Array:
    """A boolean mask that spans the first axes of a shape, as one that broadcasts against it.

    Args:
        where: None (everything counts), or boolean: of a shape of ``shapes``, or of its first axes,
            with size 1 on axes that it spans.
        *shapes: what the mask may mask, the same array's without and with further axes; the last
            is the one that the result broadcasts against.

    Returns:
        A boolean array with as many axes as the last shape.

    Raises:
        TypeError: it is not boolean.
        ValueError: it fits none of the shapes.

    Example:
        >>> as_mask(jnp.array([True, False]), (2,), (2, 5, 3)).shape
        (2, 1, 1)
    """
    full = tuple(shapes[-1])
    if where is None:
        return jnp.ones((1,) * len(full), bool)
    keep = jnp.asarray(where)
    if keep.dtype != bool:
        raise TypeError(f"where must be boolean, got {keep.dtype}: pass where != 0.")
    for shape in map(tuple, shapes):
        if spans(keep, shape) and full[: len(shape)] == shape:
            return keep.reshape(keep.shape + (1,) * (len(full) - keep.ndim))
    wanted = " or ".join(str(tuple(shape)) for shape in shapes)
    raise ValueError(f"where {keep.shape} must have the shape {wanted}, or size 1 on some axes.")


def spans(mask: Array, shape: Sequence[int]) -> bool:
    """Whether a mask has a shape, or size 1 where that has more.

    Example:
        >>> spans(jnp.ones((2, 1), bool), (2, 5)), spans(jnp.ones(2, bool), (2, 5))
        (True, False)
    """
    sizes = zip(mask.shape, shape, strict=False)
    return mask.ndim == len(shape) and all(a in (1, b) for a, b in sizes)


def masked_shapes(shape: Sequence[int], axis: int) -> tuple[tuple[int, ...], ...]:
    """What a mask of positions may span, for :func:`as_mask`: all of them, or whole examples.

    Args:
        shape: of the features.
        axis: of their channels, from the front.

    Example:
        >>> masked_shapes((2, 5, 3), 2)
        ((2,), (2, 5))
    """
    positions = (*shape[:axis], *shape[axis + 1 :])
    return (positions[:1], positions) if axis and len(positions) > 1 else (positions,)


def masked_mean(x: Array, keep: Array, axis: int | Sequence[int] | None = None) -> Array:
    """Mean of the elements that count; 0 where none does.

    Args:
        x: any float array; it must be finite where ``keep`` is false, or have been replaced there.
        keep: boolean, broadcasts against ``x``.
        axis: the axes to reduce.

    Example:
        >>> print(masked_mean(jnp.array([1.0, 3.0, 100.0]), jnp.array([True, True, False])))
        2.0
    """
    axes = tuple(range(x.ndim)) if axis is None else axis
    axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    keep = keep.reshape((1,) * (x.ndim - keep.ndim) + keep.shape)
    count = jnp.squeeze(count_kept(keep, x.shape, axes, x.dtype), axes)
    return jnp.sum(jnp.where(keep, x, 0), axes) / jnp.maximum(count, 1)


def count_kept(keep: Array, shape: Sequence[int], axes: Sequence[int], dtype: Any) -> Array:
    """How many elements count along axes of a shape that a mask broadcasts to; the axes stay.

    The mask is counted as it is: spread out, one that is constant is folded when the program is
    compiled, which takes longer the larger the arrays are.

    Args:
        keep: boolean, with as many axes as the shape.
        shape: what it broadcasts to.
        axes: to be counted along, with size 1 in the result.
        dtype: of the result.

    Example:
        >>> print(count_kept(jnp.array([[True], [False]]), (2, 3), [1], jnp.float32))
        [[3.]
         [0.]]
    """
    times = math.prod(shape[axis] for axis in axes if keep.shape[axis] == 1)
    return jnp.sum(keep, tuple(axes), keepdims=True, dtype=dtype) * times


def normalized(x: Array, axis: int | Sequence[int] = -1) -> Array:
    """``x`` over its Euclidean norm; a zero vector stays zero, with gradient zero.

    Nothing under- or overflows: the largest magnitude is divided out first.

    Args:
        x: float array, finite.
        axis: the axes of a vector.

    Example:
        >>> print(normalized(jnp.array([[3e30, 4e30], [0.0, 0.0]])))
        [[0.6 0.8]
         [0.  0. ]]
    """
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    scaled, top = _over_largest(x, axes)
    square = jnp.sum(jnp.square(scaled), axes, keepdims=True)
    return jnp.where(top != 0, scaled / jnp.sqrt(jnp.where(top != 0, square, 1)), 0)


def norm(x: Array, axis: int | Sequence[int] = -1) -> Array:
    """Euclidean norm, with gradient zero at zero; nothing under- or overflows.

    Args:
        x: float array, finite.
        axis: the axes of a vector.

    Example:
        >>> print(norm(jnp.array([[3e30, 4e30], [0.0, 0.0]])))
        [5.e+30 0.e+00]
    """
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    scaled, top = _over_largest(x, axes)
    square = jnp.sum(jnp.square(scaled), axes, keepdims=True)
    return jnp.squeeze(jnp.where(top != 0, top * jnp.sqrt(jnp.where(top != 0, square, 1)), 0), axes)


def _over_largest(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """``x`` over its largest magnitude, and that: 0 where all is 0, NaN where something is.

    The derivative in the magnitude is left out: in a norm, or what is divided by one, it cancels.
    """
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axes, keepdims=True))
    # XLA may multiply by the reciprocal, and flush that to zero where it is subnormal.
    shrink = jnp.where(top > 1, 0.0625, 1).astype(x.dtype)
    return (x * shrink) / jnp.where(top != 0, top * shrink, 1), top


def known(value: Any) -> np.ndarray | None:
    """The value as a NumPy array; None if it is traced or lies on other hosts.

    Example:
        >>> known(2.0)
        array(2.)
    """
    if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
        return None
    return np.asarray(value)


def check_scalar(name: str, value: Any, low: Any, high: Any, remedy: str) -> Array:
    """A scalar as an array, in a range where it is known.

    Args:
        name: of the argument.
        value: a number, or an array without axes, possibly traced.
        low: the smallest that will do.
        high: the largest that will do.
        remedy: what it must be, ending the message.

    Raises:
        ValueError: it has axes, or is out of range or NaN.

    Example:
        >>> check_scalar("weight", 2.0, 0, 1, "must be in [0, 1]")
        Traceback (most recent call last):
        ...
        ValueError: weight 2.0 must be in [0, 1].
    """
    array, value = jnp.asarray(value), known(value)
    if array.ndim:
        raise ValueError(f"{name} {array.shape} must be a scalar: use jax.vmap for one an example.")
    if value is not None and not float(low) <= float(value) <= float(high):
        raise ValueError(f"{name} {value} {remedy}.")
    return array


def check_positive(name: str, value: Any, dtype: Any, usual: str = "") -> Array:
    """A scalar above 0 as an array, in its own dtype.

    Args:
        name: of the argument.
        value: a number, or an array without axes, possibly traced.
        dtype: that must hold it as a normal number.
        usual: what to try, ending the message.

    Raises:
        ValueError: it has axes, or is not positive and finite.

    Example:
        >>> check_positive("gamma", 0.0, jnp.float32)
        Traceback (most recent call last):
        ...
        ValueError: gamma 0.0 must be positive and finite.
    """
    info, remedy = jnp.finfo(dtype), "must be positive and finite"
    return check_scalar(name, value, info.tiny, info.max, f"{remedy}: {usual}" if usual else remedy)
