"""What a quantized weight looks like: bits, symmetry, and who shares a scale."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole leaf."""


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale for each index of an axis.

    Attributes:
        axis: the channel axis or axes; the default is the output axis of Flax's kernels. Leaves
            that stack layers name the layer axis too: ``PerChannel((0, -1))``.
    """

    axis: int | tuple[int, ...] = -1


@dataclasses.dataclass(frozen=True)
class PerGroup:
    """One scale for every ``size`` neighbours along an axis, at each index of the other axes.

    Attributes:
        size: weights that share a scale; must divide the axis.
        axis: the axis that is cut into groups; the default is the input axis of Flax's kernels.
    """

    size: int
    axis: int = -2


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
        ValueError: bits outside 2 to 8, or a group size below 1.
        TypeError: a field of another type.

    Example:
        >>> Format(bits=4, granularity=PerGroup(32))
        Format(bits=4, symmetric=True, granularity=PerGroup(size=32, axis=-2))
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = PerChannel()

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise TypeError(f"bits must be an int from 2 to 8, not {self.bits!r}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if not isinstance(self.granularity, Granularity):
            raise TypeError(
                f"granularity must be PerTensor(), PerChannel(axis) or PerGroup(size, axis), "
                f"not {self.granularity!r}"
            )
        if isinstance(self.granularity, PerGroup) and self.granularity.size < 1:
            raise ValueError(f"group size must be at least 1, not {self.granularity.size}")

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
            ValueError: the leaf is a scalar, or lacks an axis that the format names.
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
            for axis in ((axes,) if isinstance(axes, int) else axes)
        }
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
