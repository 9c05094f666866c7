"""A training method out of what it does to one leaf: when it begins, its bits, what it packs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import CompressedArray
from jaxcomp.compression import Compression, Params, State
from jaxcomp.model.trace import ModelTrace
from jaxcomp.quantize.affine import find_codes, leaf_of
from jaxcomp.quantize.checks import check_quantizable, traced_format
from jaxcomp.quantize.formats import AnyFormat, Format
from jaxcomp.quantize.ranges import AbsMax
from jaxcomp.quantize.scales import Scales
from jaxcomp.sharding import automatic, spec_like

_LAST_STEP = int(jnp.iinfo(jnp.int32).max)


class LeafRule(NamedTuple):
    """What a method does to one leaf in one format.

    Attributes:
        apply: ``(leaf, learned, format) -> values``, of the leaf's shape and dtype; differentiable.
        encode: ``(leaf, learned, format) -> compressed leaf`` that decodes to them, bit for bit.
        learn: ``(leaf, format) -> learned``, what is trained beside the leaf when the format comes
            into force; None where nothing is (``learned`` is then None above).
        relearn: whether what was learned in one format is found anew for the next.
    """

    apply: Callable[[Any, Any, Any], Any]
    encode: Callable[[Any, Any, Any], Any]
    learn: Callable[[Any, Any], Any] | None = None
    relearn: bool = True


@struct.dataclass
class QuantizeBuffers:
    """Buffers of the methods made here.

    Attributes:
        step: ``int32``, updates so far.
        shapes: path and shape of each leaf that ``init`` saw (static: no data, the same under
            ``jit``, ``vmap`` and in a checkpoint); without any, every tree is accepted.
    """

    step: Any
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = struct.field(pytree_node=False, default=())


class Stage(NamedTuple):
    """The format from a step on, until the next stage."""

    begin: int
    format: AnyFormat


def stages_of(
    format: AnyFormat, begin: int, trace: ModelTrace | None, bits: Mapping[int, int] | None
) -> tuple[Stage, ...]:
    """The formats that come into force one after the other; raises for options that do not fit.

    Args:
        format: of a leaf.
        begin: the step from which on the forward pass is quantized.
        trace: of the model, or None; only looked at.
        bits: by step, how many bits there are from then on; None for those of the format.

    Returns:
        The first stage begins at ``begin``.

    Raises:
        TypeError: an argument of another type.
        ValueError: a step below 0 or beyond what an ``int32`` counter reaches; no bits at all, or
            bits that the format cannot have.

    Example:
        >>> [(s.begin, s.format.bits) for s in stages_of(Format(4), 10, None, {0: 8, 20: 4})]
        [(10, 8), (20, 4)]
    """
    if not isinstance(format, AnyFormat):
        raise TypeError(f"format must be a quantize.Format, such as Format(bits=4), not {format!r}")
    _check_step("begin must be an int, the step from which to quantize", begin)
    if trace is not None and not isinstance(trace, ModelTrace):
        raise TypeError(f"trace must come from jaxcomp.model.trace, not {trace!r}")
    if bits is None:
        return (Stage(begin, format),)
    if not isinstance(bits, Mapping):
        raise TypeError(f"bits must map steps to bits, such as {{0: 8, 1000: 4}}, not {bits!r}")
    if not bits:
        raise ValueError("bits is empty: name a step, such as {0: 8, 1000: 4}, or leave it out")
    if not isinstance(format, Format):
        raise ValueError(f"bits change a uniform quantize.Format, {format} has those of its levels")
    found = {begin: format}
    for step in sorted(bits):
        _check_step("a key of bits must be an int, the step from which they are in force", step)
        found[max(step, begin)] = dataclasses.replace(format, bits=bits[step])
    return tuple(Stage(step, found[step]) for step in sorted(found))


def leafwise(rule: LeafRule, stages: tuple[Stage, ...], trace: ModelTrace | None) -> Compression:
    """A method that does the same to each leaf.

    Args:
        rule: what it does.
        stages: from :func:`stages_of`.
        trace: of the model, or None; see :func:`jaxcomp.quantize.train`.

    Returns:
        A method; dense before its first stage.
    """
    begin = stages[0].begin
    # Learned anew where weights are first quantized, and where their format changes.
    turns = tuple(s.begin for s in (stages if rule.relearn else stages[:1]) if s.begin > 0)

    def format_of(path: str, leaf: Any, stage: int) -> Any:
        return traced_format(path, leaf, stages[stage].format, trace)

    def stage_at(step: Any) -> Any:
        return sum((step >= stage.begin for stage in stages[1:]), jnp.zeros((), jnp.int32))

    @jax.jit
    def learn(leaves: tree_lib.Leaves, step: Any) -> dict[str, Any]:
        begun: Any = rule.learn
        options = [
            lambda leaves, i=i: {
                path: begun(leaf, format_of(path, leaf, i)) for path, leaf in leaves.items()
            }
            for i in range(len(stages) if rule.relearn else 1)
        ]
        index = jnp.minimum(stage_at(step), len(options) - 1)
        return options[0](leaves) if len(options) == 1 else jax.lax.switch(index, options, leaves)

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        for path, leaf in leaves.items():
            for stage in range(len(stages)):
                check_quantizable(path, leaf, format_of(path, leaf, stage))
        shapes = tuple((path, tuple(leaf.shape)) for path, leaf in leaves.items())
        step = jnp.zeros((), jnp.int32)
        return State(learn(leaves, step) if rule.learn else {}, QuantizeBuffers(step, shapes))

    def apply(params: Params, state: State) -> Params:
        news, step = {}, state.buffers.step
        for path, leaf in _leaves(params, state).items():
            formats = [format_of(path, leaf, stage) for stage in range(len(stages))]
            options = [functools.partial(_apply, rule, format) for format in formats]
            arguments = (leaf, state.learned.get(path))
            if len(options) == 1:
                seen = options[0](*arguments)
            else:
                seen = jax.lax.switch(stage_at(step), options, *arguments)
            # A static `begin` of 0 spares the select.
            news[path] = jnp.where(step >= begin, seen, leaf) if begin else seen
        return tree_lib.replace(params, news)

    def update(params: Params, state: State, grads: Params) -> State:
        del grads
        step = jnp.asarray(optax.safe_increment(state.buffers.step))
        learned = state.learned
        if rule.learn and turns:
            leaves = _leaves(params, state)
            turning = jnp.any(step == jnp.asarray(turns))
            learned = jax.lax.cond(
                turning, lambda leaves, _: learn(leaves, step), lambda _, old: old, leaves, learned
            )
        return State(learned, state.buffers.replace(step=step))

    def pack(params: Params, state: State) -> Any:
        leaves, step = _leaves(params, state), int(state.buffers.step)
        if step < begin:
            return params
        stage = max(i for i, stage in enumerate(stages) if step >= stage.begin)
        news = {}
        for path, leaf in leaves.items():
            leaf_format = format_of(path, leaf, stage)
            tree_lib.check_weight(path, leaf)
            check_quantizable(path, leaf, leaf_format)
            news[path] = rule.encode(leaf, state.learned.get(path), leaf_format)
        return tree_lib.replace(params, news)

    return Compression(init, apply, update, pack)


def _apply(rule: LeafRule, format: Any, leaf: Any, learned: Any) -> Any:
    return rule.apply(leaf, learned, format)


def encode_given(x: Any, scale: Any, format: Format) -> CompressedArray:
    """Quantize an array by given step sizes, and pack its codes.

    Args:
        x: weights.
        scale: in the format's ``scale_dtype``, shaped as :func:`find_scales` gives it; positive.
        format: what to quantize to; not affine.

    Returns:
        A leaf that decodes to ``fake_quant(x, format, scale)``, bit for bit.

    Example:
        >>> encode_given(jnp.array([[0.4, 9.0]]), jnp.array([[0.5]]), Format(4)).decode()
        Array([[0.5, 3.5]], dtype=float32)
    """
    find = lambda x, scale: _codes(x, scale, format)
    codes = automatic(find, out=spec_like(x, x.shape))(x, scale)
    return leaf_of(codes, Scales(scale), format, x.dtype)


# Outside `jit` one program, instead of one for every operation on every shape.
@functools.partial(jax.jit, static_argnums=2)
def _codes(x: jax.Array, scale: jax.Array, format: Format) -> jax.Array:
    return find_codes(x, Scales(scale), format)[0]


def check_uniform(format: AnyFormat) -> None:
    """Raise unless a format is uniform and around zero, and leaves its range to be learned.

    Args:
        format: what to quantize to.

    Raises:
        TypeError: not a :class:`Format`.
        ValueError: an affine one, or one with a way to find its range.

    Example:
        >>> check_uniform(Format(4, symmetric=False))
        Traceback (most recent call last):
        ...
        ValueError: an affine format has zero points, which are not learned: use symmetric=True
    """
    if not isinstance(format, Format):
        raise TypeError(f"format must be a uniform quantize.Format, not {format!r}")
    if not format.symmetric:
        raise ValueError(
            "an affine format has zero points, which are not learned: use symmetric=True"
        )
    if not isinstance(format.range, AbsMax):
        raise ValueError(f"the range is learned here, not found by {format.range}: leave it out")


def _check_step(words: str, step: Any) -> None:
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"{words}, not {step!r}")
    if not 0 <= step <= _LAST_STEP:
        name = words.split(" ", maxsplit=1)[0]
        raise ValueError(f"{name} must be a step from 0 to {_LAST_STEP}, not {step}")


def _leaves(params: Params, state: State) -> tree_lib.Leaves:
    """The leaves that a state was made for, of the shapes that it was made for."""
    if not state.buffers.shapes:
        return tree_lib.select(params, check=False)
    shapes = {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in state.buffers.shapes}
    return tree_lib.take_like(params, shapes)
