"""Quantization with step sizes that are learned beside the weights (LSQ)."""

from collections.abc import Mapping
from typing import Any

from jaxcomp.compression import Compression
from jaxcomp.model.trace import ModelTrace
from jaxcomp.quantize.formats import Format
from jaxcomp.quantize.training.leafwise import (
    LeafRule,
    check_uniform,
    encode_given,
    leafwise,
    stages_of,
)
from jaxcomp.quantize.training.step_gradient import fake_quant_learned, initial_step, used_step


def learned_step(
    format: Format,
    begin: int = 0,
    trace: ModelTrace | None = None,
    bits: Mapping[int, int] | None = None,
) -> Compression:
    """Train weights and their step sizes together (LSQ, learned step size quantization).

    Each tensor, channel, group or block has a step of its own, which begins at
    ``2 * mean(|w|) / sqrt(high)`` of the weights of step ``begin``, ``high`` being the last code,
    and is trained by the user's optimizer with the gradient of :func:`fake_quant_learned`. Unlike
    with :func:`train` the range does not hold all weights: it finds what is best to clip.

    The paper decays weights and steps alike, as its SGD does. An optimizer that adapts its rate
    (Adam) undoes the gradient's scale, and moves a step by about the learning rate, whatever its
    size: choose a rate that is small beside the steps.

    Args:
        format: a uniform one, symmetric. The paper has one step a tensor, ``PerTensor()``.
        begin: the step from which on the forward pass is quantized; dense before.
        trace: of the model; says what the channels of ``PerChannel()`` are, as for :func:`train`.
        bits: by step, how many bits there are from then on, as for :func:`train`. Where they
            change, the step sizes begin anew.

    Returns:
        A method; it packs to :class:`QuantizedArray` from step ``begin`` on. ``state.learned``
        holds the steps of each leaf; their magnitude counts, so that an optimizer that oversteps
        zero does no harm. Its functions raise as those of :func:`train`.

    Raises:
        TypeError: as :func:`train`.
        ValueError: likewise; the format is affine, or says how to find its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.quantize import PerTensor
        >>> method = learned_step(Format(bits=2, granularity=PerTensor()))
        >>> params = {"kernel": jnp.array([[-1.0, 0.25], [0.5, 0.25]])}
        >>> state = method.init(params)
        >>> state.learned["kernel"]  # 2 * 0.5 / sqrt(1)
        Array([[1.]], dtype=float32)
        >>> method.apply(params, state)["kernel"]
        Array([[-1.,  0.],
               [ 0.,  0.]], dtype=float32)

    Source: Esser et al., "Learned step size quantization", ICLR 2020, section 2.
    """
    check_uniform(format)
    stages = stages_of(format, begin, trace, bits)
    return leafwise(LeafRule(fake_quant_learned, _encode, initial_step), stages, trace)


def _encode(leaf: Any, learned: Any, format: Format) -> Any:
    return encode_given(leaf, used_step(learned, format, leaf.dtype), format)
