"""Formats by the names that papers and standards give them."""

from jaxcomp.quantize.formats import Format, Granularity, GridFormat, PerChannel, PerGroup
from jaxcomp.quantize.ranges import MeanSquare

_CHANNELS = PerChannel()
_FP8 = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


def binary(granularity: Granularity = _CHANNELS) -> Format:
    """One bit: minus or plus a scale, the mean magnitude of what shares it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.quantize import PerTensor, encode
        >>> encode(jnp.array([1.0, -2.0, 3.0]), binary(PerTensor())).decode()
        Array([ 2., -2.,  2.], dtype=float32)

    Source: Rastegari et al., 2016, XNOR-Net, section 3.1.
    """
    return Format(1, granularity=granularity, zero=False, range=MeanSquare())


def ternary(granularity: Granularity = _CHANNELS) -> Format:
    """Two bits: minus a scale, zero or plus it, where the mean square error is least.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.quantize import PerTensor, encode
        >>> encode(jnp.array([1.0, -0.1, -1.0, 0.2]), ternary(PerTensor())).decode()
        Array([ 1.,  0., -1.,  0.], dtype=float32)

    Source: Li et al., 2016, Ternary weight networks, section 2; solved exactly.
    """
    return Format(2, granularity=granularity, range=MeanSquare())


def power_of_two(bits: int, granularity: Granularity = _CHANNELS) -> GridFormat:
    """Zero, and plus and minus powers of two: ``2**(bits-1) - 1`` of them, down from the scale.

    Raises:
        ValueError: ``bits`` outside 2 to 7.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.quantize import PerTensor, encode
        >>> encode(jnp.array([8.0, 3.1, -0.9, 2.9]), power_of_two(4, PerTensor())).decode()
        Array([ 8.,  4., -1.,  2.], dtype=float32)

    Source: Miyashita et al., 2016, section 3; to the nearest in value, not in the logarithm.
    """
    return GridFormat(f"power_of_two_{bits}", granularity)


def nf4(group: int = 64) -> GridFormat:
    """Sixteen levels at quantiles of the normal distribution, a scale for each group of inputs.

    Example:
        >>> nf4().granularity
        PerGroup(size=64, axis=-2)

    Source: Dettmers et al., 2023, QLoRA, section 3.
    """
    return GridFormat("nf4", PerGroup(group))


def fp8(kind: str = "e4m3", granularity: Granularity = _CHANNELS) -> GridFormat:
    """Eight-bit floats: ``e4m3`` (largest 448, no infinity) or ``e5m2``, with float32 scales.

    Raises:
        ValueError: another kind.

    Example:
        >>> fp8("e5m2").element
        'float8_e5m2'

    Source: Micikevicius et al., 2022, section 3.
    """
    return GridFormat(_element(kind), granularity)


def mxfp8(kind: str = "e4m3", axis: int = -2) -> GridFormat:
    """Eight-bit floats that share a power of two in blocks of 32 along an axis.

    Raises:
        ValueError: another kind than ``e4m3`` and ``e5m2``.

    Example:
        >>> mxfp8().scale_dtype
        'float8_e8m0fnu'

    Source: OCP Microscaling Formats (MX) specification, version 1.0, section 5.
    """
    return GridFormat(_element(kind), PerGroup(32, axis), scale_dtype="float8_e8m0fnu")


def mxfp4(axis: int = -2) -> GridFormat:
    """Four-bit floats that share a power of two in blocks of 32 along an axis.

    Example:
        >>> mxfp4().bits
        4

    Source: OCP Microscaling Formats (MX) specification, version 1.0, section 5.
    """
    return GridFormat("float4_e2m1fn", PerGroup(32, axis), scale_dtype="float8_e8m0fnu")


def nvfp4(axis: int = -2) -> GridFormat:
    """Four-bit floats that share an e4m3 scale in blocks of 16, and a float32 scale in all.

    Example:
        >>> nvfp4().granularity
        PerGroup(size=16, axis=-2)

    Source: NVIDIA, 2025, Pretraining large language models with NVFP4, appendix on quantization.
    """
    return GridFormat(
        "float4_e2m1fn", PerGroup(16, axis), scale_dtype="float8_e4m3fn", tensor_scale=True
    )


def _element(kind: str) -> str:
    if kind not in _FP8:
        raise ValueError(f"kind must be e4m3 or e5m2, not {kind!r}")
    return _FP8[kind]
