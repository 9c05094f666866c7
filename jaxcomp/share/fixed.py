"""Sharing from a step on with assignments that stay: what such methods have in common."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_count
from jaxcomp.compression import Compression, Params, State
from jaxcomp.sharding import placed_like


class SharingRule(NamedTuple):
    """How one leaf shares; all but ``check`` and ``encode`` run inside ``jit``.

    Attributes:
        check: ``check(path, leaf)`` raises for a leaf that cannot.
        fit: ``fit(path, leaf) -> (learned, codes)``: what gradients train from then on, and what
            stays; any pytrees of arrays. Weights that are zero need not be fitted.
        show: ``show(leaf, learned, codes)``, the shared weights, of the leaf's shape and dtype.
        encode: ``encode(leaf, learned, codes, keep)``, a compressed leaf that decodes to that;
            where ``keep``, booleans or None, is False it decodes to zero.
    """

    check: Callable[[str, Any], None]
    fit: Callable[[str, Any], tuple[Any, Any]]
    show: Callable[[Any, Any, Any], Any]
    encode: Callable[[Any, Any, Any, Any], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedBuffers:
    """Buffers of a method with fixed assignments.

    Attributes:
        step: updates so far.
        codes: by path, what the rule keeps of each leaf; zeros until it shares.
        shapes: ``(path, shape)`` of each leaf.
    """

    step: Any
    codes: dict[str, Any]
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(metadata={"static": True})


def fixed_sharing(rule: SharingRule, begin: int) -> Compression:
    """A method that shares every leaf by a rule from a step on.

    Args:
        rule: how.
        begin: the step from which on weights are shared; dense before.

    Returns:
        A method. A weight that is zero in its input is zero in its output.

    Raises:
        TypeError: ``begin`` is no whole number.
        ValueError: it is negative.
    """
    check_count("begin", begin, 0)

    def fit(leaves: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        found = {path: rule.fit(path, leaf) for path, leaf in leaves.items()}
        return {p: pair[0] for p, pair in found.items()}, {p: pair[1] for p, pair in found.items()}

    fit_now = jax.jit(fit)

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        for path, leaf in leaves.items():
            rule.check(path, leaf)
        shapes = tuple((path, tuple(leaf.shape)) for path, leaf in leaves.items())
        if begin == 0:
            learned, codes = fit_now(leaves)
        else:
            zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
            learned, codes = jax.tree.map(zeros, jax.eval_shape(fit, leaves))
        return State(learned, FixedBuffers(jnp.zeros((), jnp.int32), codes, shapes))

    def apply(params: Params, state: State) -> Params:
        news, buffers = {}, state.buffers
        for path, leaf in _leaves(params, state).items():
            shared = rule.show(leaf, state.learned[path], buffers.codes[path])
            shared = jnp.where(leaf == 0, jnp.zeros((), leaf.dtype), shared)
            # A static `begin` of 0 spares the select.
            news[path] = jnp.where(buffers.step >= begin, shared, leaf) if begin else shared
        return tree_lib.replace(params, news)

    @jax.jit
    def advance(leaves: Any, learned: Any, buffers: FixedBuffers) -> State:
        step, codes = buffers.step, buffers.codes
        if begin:
            old = learned, codes
            # Both branches must lie alike on explicit meshes.
            fitted = lambda: jax.tree.map(placed_like, fit(leaves), old)
            learned, codes = jax.lax.cond(step + 1 == begin, fitted, lambda: old)
        step = jnp.asarray(optax.safe_increment(step))
        return State(learned, dataclasses.replace(buffers, step=step, codes=codes))

    def update(params: Params, state: State, grads: Params) -> State:
        del grads
        return advance(_leaves(params, state), state.learned, state.buffers)

    def pack(params: Params, state: State) -> Any:
        if int(state.buffers.step) < begin:
            return params
        news = {}
        for path, leaf in _leaves(params, state).items():
            # NumPy's float64 is a dtype that JAX may not have, and no file with it could be loaded.
            leaf = jnp.asarray(leaf)
            parts = leaf, state.learned[path], state.buffers.codes[path]
            lost = (leaf == 0) & (rule.show(*parts) != 0)
            keep = leaf != 0 if bool(jnp.any(lost)) else None
            news[path] = rule.encode(*parts, keep)
        return tree_lib.replace(params, news)

    return Compression(init, apply, update, pack)


def _leaves(params: Params, state: State) -> tree_lib.Leaves:
    shapes = dict(state.buffers.shapes)
    like = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    return tree_lib.take_like(params, like)
