"""Small numbers whose levels are not evenly spaced: what each code stands for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


class SmallFloat(NamedTuple):
    """Sign, exponent and mantissa in a few bits.

    Attributes:
        bits: of a code; the first is the sign.
        mantissa_bits: of them; none: powers of two.
        exponent: of the smallest normal number; below it lie the subnormal ones and zero.
        top: the largest magnitude's code.
        infinity: the code of infinity, or None.
        nan: a code that is no number, or None.
    """

    bits: int
    mantissa_bits: int
    exponent: int
    top: int
    infinity: int | None = None
    nan: int | None = None


class Table(NamedTuple):
    """Levels by name.

    Attributes:
        bits: of a code.
        levels: what each code stands for, rising.
    """

    bits: int
    levels: tuple[float, ...]


# Dettmers et al., 2023, QLoRA, appendix E.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

Element = SmallFloat | Table
# A new element is a new line here; files that hold none of it stay readable without it.
ELEMENTS: dict[str, Element] = {
    # Micikevicius et al., 2022, FP8 formats for deep learning, table 1.
    "float8_e4m3fn": SmallFloat(8, 3, -6, 0x7E, nan=0x7F),
    "float8_e5m2": SmallFloat(8, 2, -14, 0x7B, infinity=0x7C, nan=0x7E),
    # OCP Microscaling Formats (MX) specification, version 1.0, section 5.3.3.
    "float4_e2m1fn": SmallFloat(4, 1, 0, 7),
    "nf4": Table(4, _NF4),
    # The largest level is 1 (Miyashita et al., 2016, section 3).
    **{
        f"power_of_two_{bits}": SmallFloat(bits, 0, 2 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
        for bits in range(2, 8)
    },
}


def levels(element: Element) -> np.ndarray:
    """What each code stands for, float32, exactly.

    Example:
        >>> levels(ELEMENTS["power_of_two_3"]).tolist()
        [0.0, 0.25, 0.5, 1.0, -0.0, -0.25, -0.5, -1.0]
    """
    if isinstance(element, Table):
        return np.array(element.levels, np.float32)
    size = element.mantissa_bits
    codes = np.arange(1 << (element.bits - 1))
    exponent = np.maximum(codes >> size, 1) + element.exponent - 1
    mantissa = (codes & ((1 << size) - 1)) + np.where(codes >> size, 1 << size, 0)
    values = np.ldexp(mantissa.astype(np.float32), exponent - size)
    values[codes > element.top] = np.nan
    if element.infinity is not None:
        values[element.infinity] = np.inf
    return np.concatenate([values, -values])


def largest(element: Element) -> float:
    """The largest level.

    Example:
        >>> largest(ELEMENTS["float8_e4m3fn"])
        448.0
    """
    return float(np.nanmax(np.where(np.isinf(levels(element)), 0, levels(element))))


def element_levels(codes: UInt8[Array, "..."], element: Element) -> Float[Array, "..."]:
    """What codes stand for, float32, exactly; a table in words of the accelerator's own bits.

    Args:
        codes: of ``element.bits`` bits each.
        element: one of :data:`ELEMENTS`.

    Example:
        >>> element_levels(jnp.array([0, 7, 15], jnp.uint8), ELEMENTS["float4_e2m1fn"])
        Array([ 0.,  6., -6.], dtype=float32)
    """
    if isinstance(element, Table):
        # XLA's partitioner aborts the process on a sharded gather with narrow unsigned indices.
        return jnp.take(jnp.asarray(levels(element)), codes.astype(jnp.int32), mode="clip")
    size, wide = element.mantissa_bits, codes.astype(jnp.int32)
    magnitude = wide & ((1 << (element.bits - 1)) - 1)
    # The exponent moved to where float32 has it.
    bits = (magnitude << (23 - size)) + ((126 + element.exponent) << 23)
    normal = jax.lax.bitcast_convert_type(bits, jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * 2.0 ** (element.exponent - size)
    values = jnp.where(magnitude < 1 << size, subnormal, normal)
    if element.nan is not None:
        values = jnp.where(magnitude > element.top, jnp.float32(jnp.nan), values)
    if element.infinity is not None:
        values = jnp.where(magnitude == element.infinity, jnp.float32(jnp.inf), values)
    return jnp.where(wide >> (element.bits - 1) == 1, -values, values)
