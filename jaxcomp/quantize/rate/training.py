"""Training for the file: weights, steps and a density of the codes, under one price of bits."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_count, is_number
from jaxcomp.compression import Compression, Params, State
from jaxcomp.model.trace import ModelTrace
from jaxcomp.quantize.checks import check_quantizable, traced_format
from jaxcomp.quantize.formats import Format, PerTensor
from jaxcomp.quantize.rate.coded import Coded, begin_coded, leaf_bits, priced, step_of
from jaxcomp.quantize.rate.settling import margins_of, nothing_known, remember, shrink
from jaxcomp.quantize.training.leafwise import check_uniform, encode_given, stages_of
from jaxcomp.quantize.training.learned_scale import used_step

# A weight beyond the last code is clipped, and the loss moves it no more, however its step moves;
# codes that nobody uses cost nothing in the file.
_FORMAT = Format(bits=8, granularity=PerTensor())


@struct.dataclass
class RateBuffers:
    """Buffers of :func:`rate_distortion`.

    Attributes:
        step: ``int32``, updates so far.
        second_order: by path, where codes settle: the mean square of the gradient until then; from
            then on by how much a weight is moved towards zero before it is rounded. Else empty.
        settle: the step from which on that is done, or None (static).
        leaves: path, shape and format of each leaf (static).
    """

    step: Any
    second_order: Any
    settle: int | None = struct.field(pytree_node=False)
    leaves: tuple[tuple[str, tuple[int, ...], Format], ...] = struct.field(pytree_node=False)


def rate_distortion(
    penalty: Any,
    format: Any = _FORMAT,
    begin: int = 0,
    trace: ModelTrace | None = None,
    step: Any = None,
    settle: Any = None,
    examples: Any = 1,
) -> Compression:
    """Train ``loss + penalty * bits``, the bits being those that the file's coder will need.

    The forward pass sees weights rounded to codes (LSQ's straight-through gradient, step sizes
    learned). Each leaf has a learned density of its codes, :class:`CodeDensity`, that knows rows
    and columns from each other; its bits pull weights to cheaper codes, steps to coarser ones, and
    rows and columns that are nearly empty to zero. The gradients of ``penalty * bits`` are added to
    those of the loss when the optimizer asks for them: your loss stays as it is.

    The density appears in the bits alone, so its own gradient is that of the mean bits a weight,
    whatever the penalty, also while this is zero. It moves with the optimizer's rate: some
    thousand steps of Adam at 1e-3. Let the rate fall to nearly zero, so that codes come to rest.

    Where the loss is nearly zero already, nothing holds against the price: Adam, which divides by
    the size of gradients, then moves all weights and steps at its full rate, until all is zero.
    Begin with such weights at a lower rate, with dropout or augmentation, or begin from scratch.

    With ``settle``, rounding itself becomes rate-distortion optimal, to second order: from that
    step on a weight goes up from one code to the next only where this is worth the bits, that is
    ``price * (bits of ±1 - bits of 0) / (curvature * step)`` later than half way. The curvature of
    the loss is the diagonal of the empirical Fisher information, ``examples`` times the mean
    square of the gradients until then. It takes weights one by one, though many change at once:
    the loss jumps, and what is left of the training has to make up for it. Compare with a higher
    penalty at equal bytes before you use it; a gain over that has not been shown here.

    Args:
        penalty: what a bit costs in units of the loss, or a function of the step that says it
            (warm it up: a dense start finds better weights). For a loss that is a mean over ``n``
            examples, ``log(2) / n`` is minimum description length; less keeps more accuracy.
        format: uniform and symmetric with a level at zero. More bits than needed cost nothing in
            the file, while too few hold weights down: the loss has no say over those that are
            clipped at the last code.
        begin: the step from which on the forward pass is rounded and bits cost; dense before.
        trace: of the model; says what the channels of ``PerChannel()`` are, as for :func:`train`.
        step: all step sizes at the beginning; None: half of the root mean square of the weights
            that share one (0.05 where these are all zero, so that biases may grow).
        settle: the step from which on rounding weighs bits against the curvature of the loss,
            after ``begin``; None: codes are always the nearest. Costs one array a leaf.
        examples: how many examples the loss is the mean of; for ``settle``.

    Returns:
        A method; it packs to :class:`QuantizedArray` from step ``begin`` on.
        ``state.learned`` holds a :class:`Coded` a leaf. :func:`estimated_bits` tells the bits.
        Biases are aimed at by ``partition({"*": ...}, where=lambda path, leaf: True)``.

    Raises:
        TypeError: an argument of another type; from ``init``: a leaf that is no floating array.
        ValueError: a penalty or step that is negative, zero or not finite where it must not be;
            ``settle`` not after ``begin``; a format that is affine, has no zero or a range to
            find; from ``init``: a format that does not fit a leaf.

    Example:
        >>> method = rate_distortion(1e-6, step=0.5)
        >>> params = {"kernel": jnp.array([[-1.1, 0.2], [0.6, 0.0]])}
        >>> state = method.init(params)
        >>> method.apply(params, state)["kernel"]
        Array([[-1. ,  0. ],
               [ 0.5,  0. ]], dtype=float32)
        >>> estimated_bits(params, state)  # 1 + 1 + 2; 1; 1 + 1 + 1; 1
        {'kernel': Array(9., dtype=float32)}

    Source: Oktay et al., "Scalable model compression by entropy penalized reparameterization",
    ICLR 2020, section 2; steps as Esser et al., ICLR 2020; zeros by rows and columns are ours.
    """
    price = _price(penalty)
    _check(format, step)
    begin = stages_of(format, begin, trace, None)[0].begin
    _check_settling(begin, settle, examples)

    def learn(leaves: Mapping[str, Any], formats: Mapping[str, Any]) -> dict[str, Coded]:
        return _learn(dict(leaves), tuple(formats.items()), step)

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        formats: dict[str, Any] = {
            path: traced_format(path, x, format, trace) for path, x in leaves.items()
        }
        for path, leaf in leaves.items():
            check_quantizable(path, leaf, formats[path])
        told = tuple((path, tuple(leaves[path].shape), formats[path]) for path in leaves)
        kept = {} if settle is None else jax.tree.map(nothing_known, dict(leaves))
        return State(
            learn(leaves, formats), RateBuffers(jnp.zeros((), jnp.int32), kept, settle, told)
        )

    def apply(params: Params, state: State) -> Params:
        now = state.buffers.step
        cost = jnp.asarray(price(now), jnp.float32)
        news = {}
        for path, (leaf, form) in _leaves(params, state).items():
            seen = priced(_settled(path, leaf, state.buffers), state.learned[path], form, cost)
            news[path] = jnp.where(now >= begin, seen, leaf) if begin else seen
        return tree_lib.replace(params, news)

    def update(params: Params, state: State, grads: Params) -> State:
        now, learned = jnp.asarray(optax.safe_increment(state.buffers.step)), state.learned
        kept, formats = state.buffers.second_order, {p: form for p, _, form in state.buffers.leaves}
        if settle is not None:
            if grads is None:
                raise ValueError("settle needs gradients: update(params, state, grads)")
            cost, seen = price(now), tree_lib.take(grads, kept)

            def margins(path: str) -> Callable[[Array], Array]:
                return lambda x: margins_of(x, learned[path], formats[path], cost, examples)

            kept = {p: remember(x, seen[p], now, settle, margins(p)) for p, x in kept.items()}
        if begin:
            leaves = {path: leaf for path, (leaf, _) in _leaves(params, state).items()}
            learned = jax.lax.cond(
                now == begin, lambda x, _: learn(x, formats), lambda _, old: old, leaves, learned
            )
        return State(learned, state.buffers.replace(step=now, second_order=kept))

    def pack(params: Params, state: State) -> Any:
        if int(state.buffers.step) < begin:
            return params
        news = {}
        for path, (leaf, form) in _leaves(params, state).items():
            tree_lib.check_weight(path, leaf)
            leaf = _settled(path, leaf, state.buffers)
            scale = used_step(step_of(state.learned[path].log_step), form, leaf.dtype)
            news[path] = encode_given(leaf, scale, form)
        return tree_lib.replace(params, news)

    return Compression(init, apply, update, pack)


def estimated_bits(params: Params, state: Any) -> dict[str, Float[Array, ""]]:
    """The bits that each leaf's codes will take in the file; differentiable.

    The container, the scales and what the coder pays to learn the density are not in them.

    Args:
        params: the weights as the method gets them: in a chain, what the methods before it made.
        state: of :func:`rate_distortion`, alone or in :func:`jaxcomp.chain` or
            :func:`jaxcomp.partition`; of a wrapped optimizer ``opt_state.compression``.

    Returns:
        Bits by path, float32, as if rounding had begun. Gradients go to the weights, straight
        through, and to what is learned.

    Raises:
        TypeError: ``state`` is none, such as that of a whole optimizer.
        ValueError: no leaf has a density in this state, or a leaf is missing or of another shape.

    Example:
        >>> params = {"kernel": jnp.array([[4.0, 1.0]])}
        >>> state = rate_distortion(0.0, step=1.0).init(params)
        >>> estimated_bits(params, state)
        {'kernel': Array(9., dtype=float32)}
    """
    if not isinstance(state, State):
        raise TypeError(f"state must be that of a method, not {state!r:.60}")
    found = {}
    for path, learned in state.learned.items():
        for node in jax.tree.leaves(learned, is_leaf=lambda node: isinstance(node, Coded)):
            if isinstance(node, Coded):
                found[path] = node
    formats = _told(state.buffers)
    if not found:
        raise ValueError("no leaf of this state was trained by rate_distortion: pass its own state")
    shapes = {p: jax.ShapeDtypeStruct(formats[p][0], jnp.float32) for p in found}
    leaves = tree_lib.take_like(params, shapes)
    bits = {}
    for path, learned in found.items():
        _, form, buffers = formats[path]
        bits[path] = leaf_bits(_settled(path, leaves[path], buffers), learned, form)
    return bits


# Outside `jit` one program, instead of one for every operation on every shape.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _learn(
    leaves: dict[str, Any], formats: tuple[tuple[str, Format], ...], step: float | None
) -> dict[str, Coded]:
    return {path: begin_coded(leaves[path], format, step) for path, format in formats}


def _leaves(params: Params, state: State) -> dict[str, tuple[Any, Format]]:
    """The leaves that a state was made for, of the shapes that it was made for."""
    told = state.buffers.leaves
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape, _ in told}
    found = tree_lib.take_like(params, shapes)
    return {path: (found[path], format) for path, _, format in told}


def _settled(path: str, leaf: Array, buffers: RateBuffers) -> Array:
    if buffers.settle is None:
        return leaf
    return shrink(leaf, buffers.second_order[path], buffers.step >= buffers.settle)


def _told(buffers: Any) -> dict[str, tuple[tuple[int, ...], Format, RateBuffers]]:
    """Shape, format and buffers of each leaf, of this method or of one around it."""
    ours = lambda node: isinstance(node, RateBuffers)
    nodes = [node for node in jax.tree.leaves(buffers, is_leaf=ours) if ours(node)]
    return {path: (shape, form, node) for node in nodes for path, shape, form in node.leaves}


def _price(penalty: Any) -> Callable[[Any], Any]:
    if callable(penalty):
        return penalty
    if not is_number(penalty):
        raise TypeError(f"penalty must be a number or a function of the step, not {penalty!r:.60}")
    if not (math.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"penalty must be finite and not negative, such as 1e-6, not {penalty}")
    return lambda step: penalty


def _check_settling(begin: int, settle: Any, examples: Any) -> None:
    check_count("examples", examples)
    if settle is not None:
        check_count("settle", settle, begin + 1)


def check_signed(format: Any) -> None:
    """Raise unless codes are signed integers around zero, the form that a density is learned of.

    Args:
        format: what to quantize to.

    Raises:
        TypeError: not a uniform format.
        ValueError: it is affine, has no level at zero, or says how to find its range.

    Example:
        >>> check_signed(Format(4, zero=False))
        Traceback (most recent call last):
        ...
        ValueError: Format(bits=4, ...) has no level at zero, which most weights are to have
    """
    check_uniform(format)
    if not format.zero:
        raise ValueError(f"{format} has no level at zero, which most weights are to have")


def _check(format: Any, step: Any) -> None:
    check_signed(format)
    if step is None:
        return
    if not is_number(step):
        raise TypeError(f"step must be a number or None, not {step!r:.60}")
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"step must be positive and finite, such as 0.05, not {step}")
