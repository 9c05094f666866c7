"""How the range of a format is found: which values it holds, and which are clipped for the rest.

Each is data; :func:`jaxcomp.quantize.scales.find_scales` does what they say, for every tensor,
channel, group or block on its own, inside ``jit``.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """The range holds every value: nothing is clipped, and the largest decides the step.

    The default, and what training uses: it costs one reduction (Jacob et al., 2018, section 3).
    """


@dataclasses.dataclass(frozen=True)
class Percentile:
    """The range holds ``percent`` of the values; an affine one loses as many at either end.

    For activations, of which a few are far out (McKinstry et al., 2019, section 3).

    Attributes:
        percent: of the values of each unit, by nearest rank: a value that occurs.

    Raises:
        TypeError: ``percent`` is no number.
        ValueError: it is above 100, or below 1 (a fraction, by the look of it).
    """

    percent: float = 99.9

    def __post_init__(self) -> None:
        if not _is_number(self.percent):
            raise TypeError(f"percent must be a number, not {self.percent!r}")
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent must be above 0 and at most 100, not {self.percent}")
        if self.percent < 1:
            raise ValueError(
                f"percent is {self.percent}, by which nearly all values are clipped: "
                f"{self.percent:.3%} is Percentile({100 * self.percent:g})"
            )


@dataclasses.dataclass(frozen=True)
class MeanSquare:
    """The range by which the mean square error is least, and never larger than of :class:`AbsMax`.

    Exact for one bit without zero (the mean magnitude: Rastegari et al., 2016, XNOR-Net, section
    3.1) and for two bits with it (by sorting). Otherwise the best of ``candidates`` ranges that
    shrink by equal factors, then of as many between its neighbours, improved by least squares.

    Attributes:
        candidates: ranges tried in each of the rounds; one pass over the weights each.

    Raises:
        TypeError: ``candidates`` is not an int.
        ValueError: it is below 2.
    """

    candidates: int = 32

    def __post_init__(self) -> None:
        _check_count("candidates", self.candidates, 2)


@dataclasses.dataclass(frozen=True)
class Entropy:
    """The range by which the histogram of the values loses the least information.

    The Kullback-Leibler divergence from the histogram, with what is clipped in its last bins, to
    the histogram of the levels, each spread over the bins that it stands for (Migacz, 2017, 8-bit
    inference with TensorRT). For activations of a whole tensor: needs many values in a unit.

    Attributes:
        bins: of the histogram: of magnitudes, or of values for an affine range.
        candidates: ranges tried, from the one that holds all down to a bin a level.

    Raises:
        TypeError: either is not an int.
        ValueError: ``bins`` below 16 or ``candidates`` below 2.
    """

    bins: int = 2048
    candidates: int = 128

    def __post_init__(self) -> None:
        _check_count("bins", self.bins, 16)
        _check_count("candidates", self.candidates, 2)


@dataclasses.dataclass(frozen=True)
class HalfQuadratic:
    """The range by which the sum of ``|error|**norm`` is least: it lets a few weights err a lot.

    For weights, without data: half-quadratic splitting, in which large errors are set aside and the
    scale and zero point are fitted to the rest by least squares (Badri and Shaji, 2023, HQQ). There
    the zero point is a real number and the scale stays; here, where it is a code, both are fitted.
    Errors are counted in steps of the first scale, so that the scale of the weights does not
    matter. Begins at :class:`AbsMax` and keeps the best that it meets.

    Attributes:
        norm: above 0 and at most 1; smaller minds outliers less.
        iterations: one pass over the weights each.
        beta: weight of the quadratic part, 1 / step squared.
        growth: what ``beta`` is multiplied by in each iteration.

    Raises:
        TypeError: a field of another type.
        ValueError: a field out of range.
    """

    norm: float = 0.7
    iterations: int = 20
    beta: float = 10.0
    growth: float = 1.01

    def __post_init__(self) -> None:
        for name in ("norm", "beta", "growth"):
            if not _is_number(getattr(self, name)):
                raise TypeError(f"{name} must be a number, not {getattr(self, name)!r}")
        if not 0 < self.norm <= 1:
            raise ValueError(f"norm must be above 0 and at most 1, not {self.norm}")
        if not self.beta > 0 or not self.growth >= 1:
            raise ValueError(
                f"beta must be above 0 and growth at least 1, not {self.beta} and {self.growth}"
            )
        _check_count("iterations", self.iterations, 1)


Range = AbsMax | Percentile | MeanSquare | Entropy | HalfQuadratic


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
