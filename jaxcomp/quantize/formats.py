"""What a quantized weight looks like: its levels, and who shares a scale."""

import dataclasses

from jaxcomp.arrays.blocks import Blocks
from jaxcomp.arrays.elements import ELEMENTS, SmallFloat
from jaxcomp.quantize.ranges import AbsMax, Range

_ABS_MAX = AbsMax()
SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole leaf."""


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale for each index of an axis.

    Attributes:
        axis: the channel axis or axes; the default is the output axis of Flax's kernels. Leaves
            that stack layers name the layer axis too: ``PerChannel((0, -1))``.

    Raises:
        TypeError: ``axis`` is neither an int nor a tuple of ints.
        ValueError: ``axis`` is an empty tuple.
    """

    axis: int | tuple[int, ...] = -1

    def __post_init__(self) -> None:
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        if not all(_is_int(axis) for axis in axes):
            raise TypeError(f"axis must be an int or a tuple of ints, not {self.axis!r}")
        if not axes:
            raise ValueError("axis must name an axis, not (): use PerTensor() for a single scale")


@dataclasses.dataclass(frozen=True)
class PerGroup:
    """One scale for every ``size`` neighbours along an axis, at each index of the other axes.

    Attributes:
        size: weights that share a scale; must divide the axis.
        axis: the axis that is cut into groups; the default is the input axis of Flax's kernels.

    Raises:
        TypeError: ``size`` or ``axis`` is not an int.
        ValueError: ``size`` is below 1.
    """

    size: int
    axis: int = -2

    def __post_init__(self) -> None:
        for name in ("size", "axis"):
            if not _is_int(getattr(self, name)):
                raise TypeError(f"{name} must be an int, not {getattr(self, name)!r}")
        if self.size < 1:
            raise ValueError(f"size must be at least 1 weight a group, not {self.size}")


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """One scale for every tile of the last axes, at each index of the axes before them.

    Attributes:
        shape: weights of a tile along each of the last axes; must divide them.

    Raises:
        TypeError: ``shape`` is not a tuple of ints.
        ValueError: ``shape`` is empty or has a size below 1.

    Example:
        >>> Format(4, granularity=PerBlock((16, 16))).blocks((64, 32))
        ((16, -2), (16, -1))
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple) or not all(map(_is_int, self.shape)):
            raise TypeError(f"shape must be a tuple of ints, not {self.shape!r}")
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape must hold sizes of at least 1, not {self.shape!r}")


Granularity = PerTensor | PerChannel | PerGroup | PerBlock


class _Shared:
    """What formats have in common: who shares a scale."""

    granularity: Granularity

    def blocks(self, shape: tuple[int, ...], path: str = "x") -> Blocks:
        """``(size, negative axis)`` of each axis that is cut into blocks, in the order of the axes.

        Raises:
            ValueError: the leaf lacks such an axis, or the size does not divide it.
        """
        granularity = self.granularity
        if isinstance(granularity, PerGroup):
            sizes = {negative_axis(granularity.axis, shape, path): granularity.size}
        elif isinstance(granularity, PerBlock):
            if len(granularity.shape) > len(shape):
                raise ValueError(
                    f"{path}: blocks of {granularity.shape} have more axes than shape {shape}: aim "
                    "the format by a pattern"
                )
            sizes = dict(zip(range(-len(granularity.shape), 0), granularity.shape, strict=True))
        else:
            return ()
        for axis, size in sizes.items():
            if shape[axis] % size:
                kind = "groups" if isinstance(granularity, PerGroup) else "blocks"
                raise ValueError(
                    f"{path}: {kind} of {size} do not divide axis {axis} of shape {shape}: "
                    f"choose a divisor of {shape[axis]}, or PerChannel() for this leaf"
                )
        return tuple((size, axis) for axis, size in sizes.items())

    def reduced_axes(self, shape: tuple[int, ...], path: str = "x") -> tuple[int, ...]:
        """Axes (negative) over which a scale is shared, after blocks have been split off.

        Raises:
            ValueError: the leaf is a scalar, lacks an axis that the format names, or has no other
                axes than those, so that every weight would get a scale of its own.
        """
        if not shape:
            raise ValueError(f"{path}: a scalar cannot be quantized: leave it out with a None rule")
        everything = tuple(range(-len(shape), 0))
        if isinstance(self.granularity, PerTensor):
            return everything
        if isinstance(self.granularity, PerGroup | PerBlock):
            # The members lie right behind their axis, and each later split moves them by one.
            blocks = self.blocks(shape, path)
            later = range(len(blocks) - 1, -1, -1)
            return tuple(axis - count for (_, axis), count in zip(blocks, later, strict=True))
        axes = self.granularity.axis
        kept = {
            negative_axis(axis, shape, path)
            for axis in (axes if isinstance(axes, tuple) else (axes,))
        }
        if len(kept) == len(shape):
            raise ValueError(
                f"{path}: {self.granularity} names every axis of shape {shape}, a scale for each "
                "weight: use PerTensor() for this leaf, or leave it out with a None rule"
            )
        return tuple(axis for axis in everything if axis not in kept)


@dataclasses.dataclass(frozen=True)
class Format(_Shared):
    """A uniform format of 1 to 8 bits: evenly spaced levels.

    Attributes:
        bits: bits per code.
        symmetric: codes from ``-(2**(bits-1) - 1)`` to ``2**(bits-1) - 1`` around zero; otherwise
            affine: codes from 0 to ``2**bits - 1`` with an integer zero point.
        granularity: who shares a scale (and a zero point).
        zero: whether zero is a level, exactly. Without it, which needs ``symmetric``, the
            ``2**bits`` levels are the odd multiples of the scale, which is half a step then: all
            that 1 bit leaves, and what DoReFa trains.
        range: how the range is found.
        scale_dtype: in which the scales are stored: float32, bfloat16, float16, float8_e4m3fn or
            float8_e8m0fnu (powers of two). Scales that cover all values are rounded up, so that
            nothing is clipped, as far as the dtype reaches.

    Raises:
        ValueError: bits outside 1 to 8, 1 bit of which a symmetric format can make no more than
            zero, or an affine format without zero.
        TypeError: a field of another type.

    Example:
        >>> Format(bits=4, granularity=PerGroup(32)).code_range
        (-7, 7)
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = PerChannel()
    zero: bool = True
    range: Range = _ABS_MAX
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not _is_int(self.bits):
            raise TypeError(f"bits must be an int from 1 to 8, not {self.bits!r}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, not {self.bits}")
        for name in ("symmetric", "zero"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not self.zero and not self.symmetric:
            raise ValueError("zero=False needs symmetric=True: an affine format has a zero point")
        if self.bits == 1 and self.symmetric and self.zero:
            raise ValueError(
                "1 bit around zero has no level but zero: use zero=False (-1 and 1) or "
                "symmetric=False (two levels, one of them zero)"
            )
        _check_fields(self.granularity, self.range, self.scale_dtype)

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code, as a signed integer if symmetric around the level zero."""
        if self.symmetric and self.zero:
            return -(2 ** (self.bits - 1) - 1), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1


@dataclasses.dataclass(frozen=True)
class GridFormat(_Shared):
    """Levels that are not evenly spaced: those of a small floating or tabled number, scaled.

    Attributes:
        element: whose levels: ``float8_e4m3fn``, ``float8_e5m2``, ``float4_e2m1fn``, ``nf4``, or
            ``power_of_two_2`` to ``power_of_two_7``.
        granularity: who shares a scale.
        range: how the range is found.
        scale_dtype: in which the scales are stored, as for :class:`Format`; float8_e8m0fnu with a
            floating element makes a microscaling (MX) format, whose scales follow its rule.
        tensor_scale: one more scale, float32, for the whole leaf; needs scales in float8_e4m3fn.

    Raises:
        ValueError: an unknown element, or a tensor scale without scales in float8_e4m3fn.
        TypeError: a field of another type.

    Example:
        >>> GridFormat("nf4", PerGroup(64)).bits
        4
    """

    element: str
    granularity: Granularity = PerChannel()
    range: Range = _ABS_MAX
    scale_dtype: str = "float32"
    tensor_scale: bool = False

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise ValueError(f"element must be one of {', '.join(ELEMENTS)}, not {self.element!r}")
        _check_fields(self.granularity, self.range, self.scale_dtype)
        if not isinstance(self.tensor_scale, bool):
            raise TypeError(f"tensor_scale must be True or False, not {self.tensor_scale!r}")
        if self.tensor_scale and self.scale_dtype != "float8_e4m3fn":
            raise ValueError(
                f"tensor_scale needs scale_dtype='float8_e4m3fn', not {self.scale_dtype!r}, which "
                "reaches far enough without"
            )

    @property
    def bits(self) -> int:
        """Bits per code."""
        return ELEMENTS[self.element].bits

    @property
    def is_microscaling(self) -> bool:
        """Whether it is an MX format: scales are powers of two, elements small floats."""
        element = ELEMENTS[self.element]
        floating = isinstance(element, SmallFloat) and element.mantissa_bits > 0
        return floating and self.scale_dtype == "float8_e8m0fnu"


AnyFormat = Format | GridFormat


def _check_fields(granularity: object, range: object, scale_dtype: object) -> None:
    if not isinstance(granularity, Granularity):
        raise TypeError(
            "granularity must be PerTensor(), PerChannel(axis), PerGroup(size, axis) or "
            f"PerBlock(shape), not {granularity!r}"
        )
    if not isinstance(range, Range):
        raise TypeError(
            "range must be AbsMax(), Percentile(percent), MeanSquare(), Entropy() or "
            f"HalfQuadratic(), not {range!r}"
        )
    if scale_dtype not in SCALE_DTYPES:
        known = ", ".join(SCALE_DTYPES)
        raise ValueError(f"scale_dtype must be one of {known}, not {scale_dtype!r}")


def negative_axis(axis: int, shape: tuple[int, ...], path: str) -> int:
    """An axis counted from the end, so that stacked leading axes do not move it.

    Example:
        >>> negative_axis(0, (3, 4), "kernel")
        -2
    """
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{path}: shape {shape} has no axis {axis}: aim the format by a pattern")
    return axis - len(shape) if axis >= 0 else axis
