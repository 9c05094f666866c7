"""Low rank while training: the factors are what gradients train."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.core import Tracer

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import LowRankArray
from jaxcomp.arrays.low_rank import multiply_factors
from jaxcomp.checks import check_count
from jaxcomp.compression import Compression, Params, State
from jaxcomp.factorize.leaf import factors_of, obstacle_to, rank_of
from jaxcomp.factorize.rules import Factoring, LowRank, factoring_of, flax_form
from jaxcomp.model.matrices import MatrixForm
from jaxcomp.sharding import automatic, spec_like


@struct.dataclass
class LowRankBuffers:
    """Buffers of :func:`train`.

    Attributes:
        step: ``int32``, updates so far.
        shapes: path and shape of each leaf in factors (static: no data, the same under ``jit``,
            ``vmap`` and in a checkpoint).
    """

    step: Any
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = struct.field(pytree_node=False, default=())


def train(rule: Any, begin: Any = 0, forms: Mapping[str, MatrixForm] | None = None) -> Compression:
    """Train the factors of weights from a step on.

    At step ``begin`` every leaf is taken apart. From then on the forward pass sees the product of
    its factors, and they are what the user's optimizer trains; the stored weights stay as they are.
    A weight that is zero in this method's input (removed by one before it in the chain) is zero in
    its output, whenever it was removed: a mask is then packed beside the factors.

    A leaf whose factors would hold no fewer numbers than it does, or whose axes do not tell, is
    handed on as it is, and ``init`` warns of it. What the model computes with is the product; to
    compute with the factors themselves is for :func:`~jaxcomp.factorize.low_rank_apply`.

    Args:
        rule: a :class:`LowRank`: the rank, and how kernels are split. By energy, it is measured by
            ``init``, and so needs ``begin=0`` and weights that are known there.
        begin: the step from which on weights are in low rank; dense before.
        forms: from :func:`~jaxcomp.factorize.read_forms`, what the axes of each leaf are for. None:
            leaves are taken for Flax's layouts, and those of three axes left alone.

    Returns:
        A method; it packs to :class:`~jaxcomp.arrays.LowRankArray` from step ``begin`` on.
        ``state.learned`` holds the factors of each leaf, float32. Its ``init`` raises
        ``ValueError`` where no leaf is left to factorize.

    Raises:
        TypeError: ``rule`` is none, ``begin`` no step, ``forms`` no mapping.
        ValueError: ``begin`` is negative, or not 0 with an energy.

    Example:
        >>> method = train(LowRank(1))
        >>> params = {"kernel": jnp.diag(jnp.array([4.0, 1.0, 0.5]))}
        >>> state = method.init(params)
        >>> jnp.abs(state.learned["kernel"][1]).round(3)
        Array([[2., 0., 0.]], dtype=float32)
        >>> method.pack(params, state)["kernel"]
        LowRankArray(shape=(3, 3), dtype=float32, rank 1, masked, 27 bytes)

    Source: Tai et al., "Convolutional neural networks with low-rank regularization", 2016, section
    3, for training what a decomposition begins.
    """
    _check(rule, begin, forms)

    def factoring(path: str, shape: tuple[int, ...]) -> Factoring | None:
        form = flax_form(shape) if forms is None else forms.get(path)
        if form is None or form.inner > 1:
            return None
        # A member of a stack that is mapped over has fewer axes than the form was read from.
        return factoring_of(form, rule.split) if form.shape == shape else None

    def init(params: Params) -> State:
        found, reasons = {}, []
        for path, leaf in tree_lib.select(params).items():
            split = factoring(path, tuple(leaf.shape))
            if split is None:
                reasons.append(f"{path}: the axes of {tuple(leaf.shape)} do not tell: give forms")
                continue
            rank = _rank(path, rule, split, leaf)
            reason = obstacle_to(split, rank)
            if reason is not None:
                reasons.append(f"{path}: {reason}")
                continue
            fit = automatic(partial(_fit, split, rank))
            found[path] = fit(leaf) if begin == 0 else _zeros(fit, leaf)
        if not found:
            raise ValueError(f"there is no weight to factorize: {'; '.join(reasons)}")
        if reasons:
            words = "leave them out with a None rule, or choose a smaller rank"
            warnings.warn(f"left dense: {'; '.join(reasons)}: {words}", stacklevel=2)
        leaves = tree_lib.take(params, found)
        shapes = tuple((path, tuple(leaf.shape)) for path, leaf in leaves.items())
        return State(found, LowRankBuffers(jnp.zeros((), jnp.int32), shapes))

    def split_of(path: str, leaf: Any) -> Factoring:
        split = factoring(path, tuple(leaf.shape))
        assert split is not None
        return split

    def apply(params: Params, state: State) -> Params:
        news = {}
        for path, leaf in _leaves(params, state).items():
            seen = _effective(split_of(path, leaf).equation, leaf, state.learned[path])
            # A static `begin` of 0 spares the select.
            news[path] = jnp.where(state.buffers.step >= begin, seen, leaf) if begin else seen
        return tree_lib.replace(params, news)

    def refit(leaves: Any, old: Any) -> Any:
        return {
            path: automatic(
                partial(_fit, split_of(path, leaf), _known_rank(split_of(path, leaf), old[path]))
            )(leaf)
            for path, leaf in leaves.items()
        }

    @jax.jit
    def advance(leaves: Any, learned: Any, step: Any) -> tuple[Any, Any]:
        step = jnp.asarray(optax.safe_increment(step))
        if begin:
            learned = jax.lax.cond(
                step == begin, refit, lambda leaves, old: old, dict(leaves), learned
            )
        return learned, step

    def update(params: Params, state: State, grads: Params) -> State:
        del grads
        leaves = _leaves(params, state)
        learned, step = advance(leaves, state.learned, state.buffers.step)
        return State(learned, state.buffers.replace(step=step))

    def pack(params: Params, state: State) -> Any:
        if int(state.buffers.step) < begin:
            return params
        news = {
            path: _packed(split_of(path, leaf).equation, leaf, state.learned[path])
            for path, leaf in _leaves(params, state).items()
        }
        return tree_lib.replace(params, news)

    return Compression(init, apply, update, pack)


def _check(rule: Any, begin: Any, forms: Any) -> None:
    if not isinstance(rule, LowRank):
        raise TypeError(f"rule must be a LowRank, such as LowRank(rank=8), not {rule!r:.60}")
    check_count("begin", begin, least=0)
    if forms is not None and not isinstance(forms, Mapping):
        raise TypeError(f"forms must come from factorize.read_forms, not {forms!r:.60}")
    if rule.energy is not None and begin:
        raise ValueError(
            f"an energy says nothing of weights that are not there yet, at step {begin}: give a "
            "rank, or begin=0"
        )


def _rank(path: str, rule: LowRank, factoring: Factoring, leaf: Any) -> Any:
    if rule.energy is not None and isinstance(leaf, Tracer):
        raise TypeError(
            f"{path}: its energy is not known inside a transformation: call init outside of it, or "
            "give a rank"
        )
    return rank_of(rule, factoring, leaf)


def _known_rank(factoring: Factoring, factors: Any) -> Any:
    """The rank of factors that are there already."""
    last = factors[-1].shape[len(factoring.outer)]
    if factoring.split != "tucker":
        return last
    return (factors[0].shape[-1], last)


def _fit(factoring: Factoring, rank: Any, leaf: Any) -> tuple[Any, ...]:
    return factors_of(factoring, leaf, rank)


def _zeros(fit: Any, leaf: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fit, leaf))


@partial(jax.jit, static_argnums=0)
def _effective(equation: str, leaf: Any, factors: Any) -> Any:
    # Rounded to what is packed, and multiplied in float32 all the same.
    factors = tuple(factor.astype(leaf.dtype) for factor in factors)
    dense = multiply_factors(equation, factors, leaf.dtype, spec_like(leaf, leaf.shape))
    return jnp.where(leaf == 0, jnp.zeros((), leaf.dtype), dense)


def _packed(equation: str, leaf: Any, factors: Any) -> LowRankArray:
    # NumPy's float64 is a dtype that JAX may not have, and no file with it could be loaded.
    leaf = jnp.asarray(leaf)
    factors = tuple(factor.astype(leaf.dtype) for factor in factors)
    keep = leaf != 0
    return LowRankArray.from_factors(
        factors, equation, leaf.dtype, None if bool(jnp.all(keep)) else keep
    )


def _leaves(params: Params, state: State) -> tree_lib.Leaves:
    """The leaves that a state was made for, of the shapes that it was made for."""
    shapes = {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in state.buffers.shapes}
    return tree_lib.take_like(params, shapes)
