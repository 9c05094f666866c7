"""Quantization-aware training as a method of the protocol."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxcomp import tree as tree_lib
from jaxcomp.compression import Compression, Params, State
from jaxcomp.model.trace import ModelTrace
from jaxcomp.quantize.affine import encode, fake_quant
from jaxcomp.quantize.checks import check_quantizable, traced_format
from jaxcomp.quantize.formats import Format

_LAST_STEP = int(jnp.iinfo(jnp.int32).max)


@struct.dataclass
class QuantizeBuffers:
    """Buffers of :func:`train`.

    Attributes:
        step: ``int32``, updates so far.
        shapes: path and shape of each leaf that ``init`` saw (static: no data, the same under
            ``jit``, ``vmap`` and in a checkpoint); without any, every tree is accepted.
    """

    step: Any
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = struct.field(pytree_node=False, default=())


def train(format: Format, begin: int = 0, trace: ModelTrace | None = None) -> Compression:
    """Train weights that are quantized in the forward pass, with straight-through gradients.

    The range follows the weights (the largest magnitude of each tensor, channel or group), so there
    is nothing to learn beside them. Needs the dense weight: the stored weights stay unrounded.

    Args:
        format: bits, symmetry and granularity.
        begin: the step from which on the forward pass is quantized; dense before.
        trace: of the model, as a function of the same parameter tree. With it, ``PerChannel()``
            means the axes that the model takes for output channels, whatever the layout: each
            head's too, each layer's of a stack and each model's of a batch. A leaf that is only
            used element-wise keeps the last axis. Axes that the format names itself stay.

    Returns:
        A method; it packs to :class:`QuantizedArray` from step ``begin`` on. Its ``init`` raises
        ``ValueError`` where the format does not fit a leaf, or the trace does not know its
        channels: no such leaf, no use, uses that disagree (a tied embedding). Its ``apply`` and
        ``pack`` raise ``ValueError`` for a tree with other leaves or shapes than ``init`` saw.

    Raises:
        TypeError: ``format`` is not a :class:`Format`, ``begin`` not an int, or ``trace`` neither a
            :class:`ModelTrace` nor None.
        ValueError: ``begin`` is negative, or beyond what an ``int32`` counter reaches.

    Example:
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
    if not isinstance(format, Format):
        raise TypeError(f"format must be a quantize.Format, such as Format(bits=4), not {format!r}")
    if isinstance(begin, bool) or not isinstance(begin, int):
        raise TypeError(f"begin must be an int, the step from which to quantize, not {begin!r}")
    if not 0 <= begin <= _LAST_STEP:
        raise ValueError(f"begin must be a step from 0 to {_LAST_STEP}, not {begin}")
    if trace is not None and not isinstance(trace, ModelTrace):
        raise TypeError(f"trace must come from jaxcomp.model.trace, not {trace!r}")

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        for path, leaf in leaves.items():
            check_quantizable(path, leaf, traced_format(path, leaf, format, trace))
        shapes = tuple((path, tuple(leaf.shape)) for path, leaf in leaves.items())
        return State({}, QuantizeBuffers(jnp.zeros((), jnp.int32), shapes))

    def apply(params: Params, state: State) -> Params:
        news = {}
        for path, leaf in _leaves(params, state).items():
            rounded = fake_quant(leaf, traced_format(path, leaf, format, trace))
            # A static `begin` of 0 spares the select.
            news[path] = jnp.where(state.buffers.step >= begin, rounded, leaf) if begin else rounded
        return tree_lib.replace(params, news)

    def update(params: Params, state: State, grads: Params) -> State:
        del params, grads
        step = jnp.asarray(optax.safe_increment(state.buffers.step))
        return State({}, state.buffers.replace(step=step))

    def pack(params: Params, state: State) -> Any:
        leaves = _leaves(params, state)
        if int(state.buffers.step) < begin:
            return params
        news = {}
        for path, leaf in leaves.items():
            leaf_format = traced_format(path, leaf, format, trace)
            tree_lib.check_weight(path, leaf)
            check_quantizable(path, leaf, leaf_format)
            news[path] = encode(leaf, leaf_format)
        return tree_lib.replace(params, news)

    return Compression(init, apply, update, pack)


def _leaves(params: Params, state: State) -> tree_lib.Leaves:
    """The leaves that a state was made for, of the shapes that it was made for."""
    if not state.buffers.shapes:
        return tree_lib.select(params, check=False)
    shapes = {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in state.buffers.shapes}
    return tree_lib.take_like(params, shapes)
