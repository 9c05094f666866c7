"""Quantization-aware training as a method of the protocol."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxcomp import tree as tree_lib
from jaxcomp.compression import Compression, Params, State
from jaxcomp.quantize.affine import encode, fake_quant
from jaxcomp.quantize.checks import check_quantizable
from jaxcomp.quantize.formats import Format

_LAST_STEP = int(jnp.iinfo(jnp.int32).max)


class QuantizeBuffers(NamedTuple):
    """Buffers of :func:`train`.

    Attributes:
        step: updates so far.
    """

    step: Int32[Array, "..."]


def train(format: Format, begin: int = 0) -> Compression:
    """Train weights that are quantized in the forward pass, with straight-through gradients.

    The range follows the weights (the largest magnitude of each tensor, channel or group), so there
    is nothing to learn beside them. Needs the dense weight: the stored weights stay unrounded.

    Args:
        format: bits, symmetry and granularity.
        begin: the step from which on the forward pass is quantized; dense before.

    Returns:
        A method; it packs to :class:`QuantizedArray` from step ``begin`` on. Its ``init`` raises
        ``ValueError`` where the format does not fit a leaf.

    Raises:
        TypeError: ``format`` is not a :class:`Format`, or ``begin`` not an int.
        ValueError: ``begin`` is negative, or beyond what an ``int32`` counter reaches.

    Example:
        >>> method = train(Format(bits=4))
        >>> params = {"kernel": jnp.array([[-1.0, 0.2], [0.5, 7.0]])}
        >>> method.pack(params, method.init(params))["kernel"]
        QuantizedArray(shape=(2, 2), dtype=float32, int4 symmetric, 2 scales, 10 bytes)
    """
    if not isinstance(format, Format):
        raise TypeError(f"format must be a quantize.Format, such as Format(bits=4), not {format!r}")
    if isinstance(begin, bool) or not isinstance(begin, int):
        raise TypeError(f"begin must be an int, the step from which to quantize, not {begin!r}")
    if not 0 <= begin <= _LAST_STEP:
        raise ValueError(f"begin must be a step from 0 to {_LAST_STEP}, not {begin}")

    def init(params: Params) -> State:
        for path, leaf in tree_lib.select(params).items():
            check_quantizable(path, leaf, format)
        return State({}, QuantizeBuffers(jnp.zeros((), jnp.int32)))

    def apply(params: Params, state: State) -> Params:
        news = {}
        for path, leaf in tree_lib.select(params, check=False).items():
            rounded = fake_quant(leaf, format)
            # A static `begin` of 0 spares the select.
            news[path] = jnp.where(state.buffers.step >= begin, rounded, leaf) if begin else rounded
        return tree_lib.replace(params, news)

    def update(params: Params, state: State, grads: Params) -> State:
        del params, grads
        step = jnp.asarray(optax.safe_increment(state.buffers.step))
        return State({}, QuantizeBuffers(step))

    def pack(params: Params, state: State) -> Any:
        if int(state.buffers.step) < begin:
            return params
        leaves = tree_lib.select(params)
        for path, leaf in leaves.items():
            check_quantizable(path, leaf, format)
        news = {path: encode(leaf, format) for path, leaf in leaves.items()}
        return tree_lib.replace(params, news)

    return Compression(init, apply, update, pack)
