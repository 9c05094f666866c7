"""Uniform quantization as the formulas of the literature, and what scale and zero point they mean.

``Q(x) = floor(x * multiplier + offset)`` and ``Q(x) = round(x * multiplier)`` give integers without
limits. A code stands for a cell of numbers; its inverse is the middle of that cell, which is what
:class:`Format` decodes it to, so that both are the same quantizer in other words.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.quantize.formats import Format
from jaxcomp.quantize.steps import Scales


class FloorForm(NamedTuple):
    """``Q(x) = floor(x * multiplier + offset)``.

    Attributes:
        multiplier: codes per unit of ``x``, positive; broadcasts against ``x``.
        offset: of zero, in codes; likewise.
    """

    multiplier: Any
    offset: Any

    def codes(self, x: Float[Array, "..."]) -> Int[Array, "..."]:
        """Codes, ``int32``, not limited.

        Example:
            >>> FloorForm(2.0, 0.5).codes(jnp.array([-0.3, 0.2, 0.25]))
            Array([-1,  0,  1], dtype=int32)
        """
        return jnp.floor(x * self.multiplier + self.offset).astype(jnp.int32)

    def values(self, codes: Int[Array, "..."]) -> Float[Array, "..."]:
        """The middle of each code's cell: ``(code + 1/2 - offset) / multiplier``.

        The cell holds the ``x`` with ``code <= x * multiplier + offset < code + 1``, so that
        nothing in it is further off than half a step, ``1 / (2 * multiplier)``.

        Example:
            >>> FloorForm(2.0, 0.5).values(jnp.array([-1, 0, 1]))
            Array([-0.5,  0. ,  0.5], dtype=float32)
        """
        return (codes.astype(jnp.float32) + 0.5 - self.offset) / self.multiplier


class RoundForm(NamedTuple):
    """``Q(x) = round(x * multiplier)``, ties to even.

    Attributes:
        multiplier: codes per unit of ``x``, positive; broadcasts against ``x``.
    """

    multiplier: Any

    def codes(self, x: Float[Array, "..."]) -> Int[Array, "..."]:
        """Codes, ``int32``, not limited, signed around zero.

        Example:
            >>> RoundForm(2.0).codes(jnp.array([-0.3, 0.2, 0.25]))
            Array([-1,  0,  0], dtype=int32)
        """
        return jnp.round(x * self.multiplier).astype(jnp.int32)

    def values(self, codes: Int[Array, "..."]) -> Float[Array, "..."]:
        """The middle of each code's cell: ``code / multiplier``.

        Example:
            >>> RoundForm(2.0).values(jnp.array([-1, 0, 1]))
            Array([-0.5,  0. ,  0.5], dtype=float32)
        """
        return codes.astype(jnp.float32) / self.multiplier


def floor_form(scales: Scales, format: Format) -> FloorForm:
    """The floor form of a format: its unsigned codes, before they are limited, but at ties.

    ``multiplier = 1 / scale`` and ``offset = zero_point + 1/2``, where a symmetric format has its
    zero at code ``2**(bits-1)``. Without zero, where the scale is half a step, ``multiplier = 1 /
    (2 * scale)`` and ``offset = 2**(bits-1)``, ties included.

    Args:
        scales: of the format.
        format: a uniform one.

    Example:
        >>> floor_form(Scales(jnp.array(0.5)), Format(4)).offset
        Array(8.5, dtype=float32)
    """
    scale, middle = jnp.asarray(scales.scale, jnp.float32), 1 << (format.bits - 1)
    if not format.zero:
        return FloorForm(0.5 / scale, jnp.full(scale.shape, middle, jnp.float32))
    zero = middle if scales.zero_point is None else scales.zero_point
    return FloorForm(1 / scale, jnp.broadcast_to(jnp.asarray(zero, jnp.float32) + 0.5, scale.shape))


def round_form(scales: Scales, format: Format) -> RoundForm:
    """The round form of a symmetric format: ``multiplier = 1 / scale``, codes signed around zero.

    Raises:
        ValueError: the format is affine or has no zero: its form is a floor form.

    Example:
        >>> round_form(Scales(jnp.array(0.5)), Format(4)).multiplier
        Array(2., dtype=float32)
    """
    if not format.symmetric or not format.zero:
        raise ValueError(f"{format} is not round(x * multiplier): use floor_form")
    return RoundForm(1 / jnp.asarray(scales.scale, jnp.float32))


def scales_of_form(form: FloorForm | RoundForm, format: Format) -> Scales:
    """The scale and zero point of a form, to be used with a format: undoes the functions above.

    Args:
        form: a round form for a symmetric format, a floor form for any.
        format: a uniform one.

    Returns:
        Scales by which :func:`encode`'s codes are those of the form, limited to the format's.

    Raises:
        ValueError: the form is not of this format: no level where the format has its zero, or a
            round form of a format that has none. Offsets are looked at, so they must be known.

    Example:
        >>> scales_of_form(FloorForm(2.0, 3.5), Format(4, symmetric=False))
        Scales(scale=Array(0.5, dtype=float32), zero_point=Array(3, dtype=uint8), tensor_scale=None)
    """
    multiplier = jnp.asarray(form.multiplier, jnp.float32)
    if isinstance(form, RoundForm):
        if not format.symmetric or not format.zero:
            raise ValueError(f"round(x * multiplier) is symmetric around zero, {format} is not")
        return Scales(1 / multiplier)
    offset, middle = np.asarray(form.offset, np.float64), 1 << (format.bits - 1)
    shape = jnp.broadcast_shapes(multiplier.shape, offset.shape)
    multiplier, offset = jnp.broadcast_to(multiplier, shape), np.broadcast_to(offset, shape)
    if not format.zero:
        if np.any(offset != middle):
            raise ValueError(f"the offset of {format} is {middle}, not {form.offset}")
        return Scales(0.5 / multiplier)
    zero = offset - 0.5
    if format.symmetric:
        if np.any(zero != middle):
            raise ValueError(f"the offset of {format} is {middle + 0.5}, not {form.offset}")
        return Scales(1 / multiplier)
    top = format.code_range[1]
    if np.any((zero != np.round(zero)) | (zero < 0) | (zero > top)):
        raise ValueError(
            f"the offset of {format} is half above a code from 0 to {top}, not {form.offset}: "
            "otherwise zero is no level"
        )
    return Scales(1 / multiplier, jnp.asarray(zero, jnp.uint8))
