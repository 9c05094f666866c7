"""What cannot be quantized is refused here, before anything changes; which axes are channels."""

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxcomp.arrays import is_compressed
from jaxcomp.arrays.blocks import split_shape
from jaxcomp.model.trace import ModelTrace
from jaxcomp.quantize.formats import AnyFormat, Format, PerChannel
from jaxcomp.tree import check_weight, nearest


def check_quantizable(path: str, x: Any, format: AnyFormat) -> None:
    """Raise unless a format fits the shape and dtype of a leaf; values are not looked at.

    Args:
        path: for the message.
        x: the leaf; anything with ``shape`` and ``dtype``.
        format: what to quantize to.

    Raises:
        TypeError: not a float16, bfloat16 or float32 array (or a narrower floating one).
        ValueError: no elements, or a format that does not fit the shape.

    Example:
        >>> from jaxcomp.quantize import PerGroup
        >>> check_quantizable("kernel", jnp.ones((3, 4)), Format(granularity=PerGroup(2)))
        Traceback (most recent call last):
        ...
        ValueError: kernel: groups of 2 do not divide axis -2 of shape (3, 4): choose ...
    """
    _check_array(path, x)
    format.reduced_axes(x.shape, path)


def traced_format(path: str, x: Any, format: AnyFormat, trace: ModelTrace | None) -> AnyFormat:
    """The format of one leaf: its channel axes are those that the model takes for channels.

    Args:
        path: of the leaf, in the trace too.
        x: the leaf; anything with a ``shape``.
        format: as the user gave it.
        trace: of the model, or None.

    Returns:
        The same format where it names its axes or there is no trace; otherwise one with a scale for
        each index of the output axes, and of the axes that stack layers or models.

    Raises:
        ValueError: the trace has no such leaf, another shape of it, no use of it, uses that
            disagree, or a product in which no axis of it is an output.

    Example:
        >>> from jaxcomp.model.trace import trace
        >>> found = trace(lambda w, x: x @ w.T, {"w": jnp.ones((3, 2))}["w"], jnp.ones((5, 2)))
        >>> traced_format("", jnp.ones((3, 2)), Format(4), found).granularity
        PerChannel(axis=(0,))
    """
    if trace is None or format.granularity != PerChannel():
        return format
    if path not in trace.leaves:
        raise ValueError(
            f"{path}: not in the trace ({nearest(path, trace.leaves)}): trace a function of the "
            "same tree, such as lambda params, x: model.apply({'params': params}, x)"
        )
    leaf = trace.leaves[path]
    if leaf.shape != tuple(x.shape):
        raise ValueError(f"{path}: shape {x.shape}, but {leaf.shape} in the trace: trace this tree")
    if leaf.uses and all(use.kind == "elementwise" for use, _ in leaf.uses):
        return format
    axes = trace.output_axes(path)
    if not axes:
        told = "; ".join(f"{use.op}: {' '.join(use.roles)}" for use, _ in leaf.uses)
        raise ValueError(
            f"{path}: no axis of it is an output channel ({told}): name one with "
            "PerChannel(axis), or use PerTensor() for this leaf"
        )
    kept = sorted({*axes, *trace.axes(path, "stack"), *trace.axes(path, "batch")})
    return dataclasses.replace(format, granularity=PerChannel(tuple(kept)))


def _check_array(path: str, x: Any) -> None:
    known = hasattr(x, "shape") and hasattr(x, "dtype") and not is_compressed(x)
    check_weight(path, jax.ShapeDtypeStruct(x.shape, x.dtype) if known else x)
    if jnp.finfo(x.dtype).bits > 32:
        raise TypeError(f"{path}: {x.dtype} is wider than the float32 scales: cast it to float32")
    if x.ndim == 0:
        raise ValueError(f"{path}: a scalar cannot be quantized: leave it out with a None rule")


def check_scales(x: Any, format: AnyFormat, scale: Any, zero_point: Any) -> None:
    """Raise unless given scales and zero points fit an array and a format.

    Who shares a scale is then for the scale's shape to say, only groups for the format.

    Args:
        x: the array that they are for.
        format: what to quantize to.
        scale: step sizes; values are looked at where they are known.
        zero_point: codes of zero, or None if symmetric; likewise.

    Raises:
        TypeError: ``x`` as for :func:`check_quantizable`; scale not floating, or zero point not
            unsigned.
        ValueError: ``x`` as for :func:`check_quantizable`; a zero point missing or too many, a
            shape that does not broadcast, or values that cannot be used.

    Example:
        >>> check_scales(jnp.ones((2, 3)), Format(4), jnp.zeros(3), None)
        Traceback (most recent call last):
        ...
        ValueError: scale must be positive and finite everywhere: clamp it from below
    """
    _check_array("x", x)
    symmetric = not isinstance(format, Format) or format.symmetric
    if (zero_point is None) != symmetric:
        wanted = "no zero_point" if symmetric else "a zero_point"
        raise ValueError(f"{format} takes {wanted} beside scale")
    _check_given("scale", scale, jnp.floating, x, format)
    if not _hidden(scale):
        # NumPy compares the narrowest floats wrongly.
        wide = np.asarray(scale).astype(np.float64)
        if not np.all((wide > 0) & np.isfinite(wide)):
            raise ValueError("scale must be positive and finite everywhere: clamp it from below")
    if zero_point is None or not isinstance(format, Format):
        return
    _check_given("zero_point", zero_point, jnp.unsignedinteger, x, format)
    top = format.code_range[1]
    if not _hidden(zero_point) and np.any(np.asarray(zero_point) > top):
        raise ValueError(f"zero_point must be a code from 0 to {top} in {format}: clip it")


def _check_given(name: str, given: Any, kind: type, x: Any, format: AnyFormat) -> None:
    if not hasattr(given, "dtype") or not jnp.issubdtype(given.dtype, kind):
        raise TypeError(f"{name} must be a {kind.__name__} array, not {given!r}: cast it")
    shape = split_shape(x.shape, format.blocks(x.shape))
    behind = shape[len(shape) - given.ndim :]
    if given.ndim > len(shape) or any(
        a not in (1, b) for a, b in zip(given.shape, behind, strict=True)
    ):
        raise ValueError(
            f"{name} of shape {given.shape} does not broadcast to {shape}: give one number, or one "
            "for each index of the axes that have their own"
        )


def _hidden(x: Any) -> bool:
    """Whether the values are not to be seen: traced, or on another host."""
    return isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True)
