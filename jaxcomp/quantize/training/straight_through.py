"""Quantization with ranges that follow the weights, and straight-through gradients."""

from collections.abc import Mapping

from jaxcomp.compression import Compression
from jaxcomp.model.trace import ModelTrace
from jaxcomp.quantize.affine import encode, fake_quant
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.training.leafwise import LeafRule, leafwise, stages_of


def train(
    format: AnyFormat,
    begin: int = 0,
    trace: ModelTrace | None = None,
    bits: Mapping[int, int] | None = None,
) -> Compression:
    """Train weights that are quantized in the forward pass, with straight-through gradients.

    The range follows the weights (with the default, the largest magnitude of all that share a
    scale), so there is nothing to learn beside them. Needs the dense weight: the stored weights
    stay unrounded.

    Args:
        format: what to quantize to.
        begin: the step from which on the forward pass is quantized; dense before.
        trace: of the model, as a function of the same parameter tree. With it, ``PerChannel()``
            means the axes that the model takes for output channels, whatever the layout: each
            head's too, each layer's of a stack and each model's of a batch. A leaf that is only
            used element-wise keeps the last axis. Axes that the format names itself stay.
        bits: by step, how many bits there are from then on, such as ``{0: 8, 1000: 6, 2000: 4}``;
            those of ``format`` before the first of them, and always if None. Everything else stays
            as in ``format``. Weights that were rounded little learn to bear being rounded more.

    Returns:
        A method; it packs to what :func:`encode` makes from step ``begin`` on. Its ``init`` raises
        ``ValueError`` where the format does not fit a leaf, or the trace does not know its
        channels: no such leaf, no use, uses that disagree (a tied embedding). Its ``apply`` and
        ``pack`` raise ``ValueError`` for a tree with other leaves or shapes than ``init`` saw.

    Raises:
        TypeError: ``format`` is not one, ``begin`` not an int, ``trace`` neither a
            :class:`ModelTrace` nor None, or ``bits`` not a mapping of ints.
        ValueError: ``begin`` or a step in ``bits`` is negative, or beyond what an ``int32`` counter
            reaches; ``bits`` is empty, or has a number of bits that ``format`` cannot have.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.quantize import Format
        >>> method = train(Format(bits=4))
        >>> params = {"kernel": jnp.array([[-1.0, 0.2], [0.5, 7.0]])}
        >>> method.pack(params, method.init(params))["kernel"]
        QuantizedArray(shape=(2, 2), dtype=float32, int4 symmetric, 2 scales, 10 bytes)

        A kernel stored as (output, input), with a scale for each output:

        >>> from jaxcomp.model.trace import trace
        >>> params = {"kernel": jnp.ones((3, 2))}
        >>> seen = trace(lambda p, x: x @ p["kernel"].T, params, jnp.ones((5, 2)))
        >>> method = train(Format(bits=4), trace=seen)
        >>> method.pack(params, method.init(params))["kernel"].scale.shape
        (3, 1)
    """
    rule = LeafRule(
        apply=lambda leaf, _, format: fake_quant(leaf, format),
        encode=lambda leaf, _, format: encode(leaf, format),
    )
    return leafwise(rule, stages_of(format, begin, trace, bits), trace)
