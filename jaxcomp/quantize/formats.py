"""What a quantized weight looks like: bits, symmetry, and who shares a scale."""

import dataclasses


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


Granularity = PerTensor | PerChannel | PerGroup


@dataclasses.dataclass(frozen=True)
class Format:
    """A uniform format of 2 to 8 bits. Zero is always represented exactly.

    Attributes:
        bits: bits per code.
        symmetric: codes from ``-(2**(bits-1) - 1)`` to ``2**(bits-1) - 1`` around zero; otherwise
            affine: codes from 0 to ``2**bits - 1`` with an integer zero point.
        granularity: who shares a scale (and a zero point).

    Raises:
        ValueError: bits outside 2 to 8.
        TypeError: a field of another type.

    Example:
        >>> Format(bits=4, granularity=PerGroup(32))
        Format(bits=4, symmetric=True, granularity=PerGroup(size=32, axis=-2))
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = PerChannel()

    def __post_init__(self) -> None:
        if not _is_int(self.bits):
            raise TypeError(f"bits must be an int from 2 to 8, not {self.bits!r}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric must be True or False, not {self.symmetric!r}")
        if not isinstance(self.granularity, Granularity):
            raise TypeError(
                f"granularity must be PerTensor(), PerChannel(axis) or PerGroup(size, axis), "
                f"not {self.granularity!r}"
            )

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code, as a signed integer if symmetric."""
        if self.symmetric:
            return -(2 ** (self.bits - 1) - 1), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    def group(self, shape: tuple[int, ...], path: str = "x") -> tuple[int, int] | None:
        """``(size, negative axis)`` of the groups in a leaf of ``shape``; None without groups.

        Raises:
            ValueError: the leaf has no such axis, or the size does not divide it.
        """
        if not isinstance(self.granularity, PerGroup):
            return None
        axis = negative_axis(self.granularity.axis, shape, path)
        size = self.granularity.size
        if shape[axis] % size:
            raise ValueError(
                f"{path}: groups of {size} do not divide axis {self.granularity.axis} of shape "
                f"{shape}: choose a divisor of {shape[axis]}, or PerChannel() for this leaf"
            )
        return size, axis

    def reduced_axes(self, shape: tuple[int, ...], path: str = "x") -> tuple[int, ...]:
        """Axes (negative) over which a scale is shared, after groups have been split off.

        Raises:
            ValueError: the leaf is a scalar, lacks an axis that the format names, or has no other
                axes than those, so that every weight would get a scale of its own.
        """
        if not shape:
            raise ValueError(f"{path}: a scalar cannot be quantized: leave it out with a None rule")
        everything = tuple(range(-len(shape), 0))
        if isinstance(self.granularity, PerTensor):
            return everything
        if isinstance(self.granularity, PerGroup):
            # Splitting puts the members of a group right behind their axis, one axis more.
            _, axis = self.group(shape, path) or (0, 0)
            return (axis,)
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


def negative_axis(axis: int, shape: tuple[int, ...], path: str) -> int:
    """An axis counted from the end, so that stacked leading axes do not move it.

    Example:
        >>> negative_axis(0, (3, 4), "kernel")
        -2
    """
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{path}: shape {shape} has no axis {axis}: aim the format by a pattern")
    return axis - len(shape) if axis >= 0 else axis
