"""Training for the file: weights, steps and a density of the codes, under one price of bits."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxcomp import tree as tree_lib
from jaxcomp.checks import is_number
from jaxcomp.compression import Compression, Params, State
from jaxcomp.model.trace import ModelTrace
from jaxcomp.quantize.checks import check_quantizable, traced_format
from jaxcomp.quantize.formats import Format, PerTensor
from jaxcomp.quantize.rate.density import CodeDensity, code_bits, initial_density, prior_bits
from jaxcomp.quantize.scales import Scales, find_scales, spread_scales
from jaxcomp.quantize.training.leafwise import check_uniform, encode_given, stages_of
from jaxcomp.quantize.training.learned_scale import used_step
from jaxcomp.quantize.training.step_gradient import fake_quant_learned
from jaxcomp.sharding import automatic, spec_like

_FORMAT = Format(bits=5, granularity=PerTensor())
# Where all weights of a leaf are zero (biases that have not been trained) there is nothing to see.
_STEP_OF_ZEROS = 0.05


class Coded(NamedTuple):
    """What is learned about a leaf.

    Attributes:
        log_step: logarithms of the step sizes to base 2, straight lines between powers of two, so
            that every platform makes the same bits of them; see :func:`step_of`.
        density: of the codes.
    """

    log_step: Float[Array, "..."]
    density: CodeDensity


@struct.dataclass
class RateBuffers:
    """Buffers of :func:`rate_distortion`.

    Attributes:
        step: ``int32``, updates so far.
        leaves: path, shape and format of each leaf (static).
    """

    step: Any
    leaves: tuple[tuple[str, tuple[int, ...], Format], ...] = struct.field(pytree_node=False)


def rate_distortion(
    penalty: float | Callable[[Any], Any],
    format: Format = _FORMAT,
    begin: int = 0,
    trace: ModelTrace | None = None,
    step: float | None = None,
) -> Compression:
    """Train ``loss + penalty * bits``, the bits being those that the file's coder will need.

    The forward pass sees weights rounded to codes (LSQ's straight-through gradient, step sizes
    learned). Each leaf has a learned density of its codes, :class:`CodeDensity`, that knows rows
    and columns from each other; its bits pull weights to cheaper codes, steps to coarser ones, and
    rows and columns that are nearly empty to zero. The gradients of ``penalty * bits`` are added to
    those of the loss when the optimizer asks for them: your loss stays as it is.

    The density appears in the bits alone, so its own gradient is that of the mean bits a weight,
    whatever the penalty, also while this is zero. It moves with the optimizer's rate: some
    thousand steps of Adam at 1e-3. Let the rate fall to nearly zero: codes settle.

    Args:
        penalty: what a bit costs in units of the loss, or a function of the step that says it
            (warm it up: a dense start finds better weights). For a loss that is a mean over ``n``
            examples, ``log(2) / n`` is minimum description length; less keeps more accuracy.
        format: uniform and symmetric with a level at zero. More bits than needed cost nothing in
            the file.
        begin: the step from which on the forward pass is rounded and bits cost; dense before.
        trace: of the model; says what the channels of ``PerChannel()`` are, as for :func:`train`.
        step: all step sizes at the beginning; None: half of the root mean square of the weights
            that share one (0.05 where these are all zero, so that biases may grow).

    Returns:
        A method; it packs to :class:`QuantizedArray` from step ``begin`` on.
        ``state.learned`` holds a :class:`Coded` a leaf. :func:`estimated_bits` tells the bits.
        Biases are aimed at by ``partition({"*": ...}, where=lambda path, leaf: True)``.

    Raises:
        TypeError: an argument of another type; from ``init``: a leaf that is no floating array.
        ValueError: a penalty or step that is negative, zero or not finite where it must not be; a
            format that is affine, has no zero or a range to find; from ``init``: a format that does
            not fit a leaf.

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
        return State(learn(leaves, formats), RateBuffers(jnp.zeros((), jnp.int32), told))

    def apply(params: Params, state: State) -> Params:
        now = state.buffers.step
        cost = jnp.asarray(price(now), jnp.float32)
        news = {}
        for path, (leaf, form) in _leaves(params, state).items():
            seen = _seen(leaf, state.learned[path], form, cost)
            news[path] = jnp.where(now >= begin, seen, leaf) if begin else seen
        return tree_lib.replace(params, news)

    def update(params: Params, state: State, grads: Params) -> State:
        del grads
        now, learned = jnp.asarray(optax.safe_increment(state.buffers.step)), state.learned
        if begin:
            leaves = {path: leaf for path, (leaf, _) in _leaves(params, state).items()}
            formats = {path: form for path, _, form in state.buffers.leaves}
            learned = jax.lax.cond(
                now == begin, lambda x, _: learn(x, formats), lambda _, old: old, leaves, learned
            )
        return State(learned, state.buffers.replace(step=now))

    def pack(params: Params, state: State) -> Any:
        if int(state.buffers.step) < begin:
            return params
        news = {}
        for path, (leaf, form) in _leaves(params, state).items():
            tree_lib.check_weight(path, leaf)
            scale = used_step(step_of(state.learned[path].log_step), form, leaf.dtype)
            news[path] = encode_given(leaf, scale, form)
        return tree_lib.replace(params, news)

    return Compression(init, apply, update, pack)


def estimated_bits(params: Params, state: State) -> dict[str, Float[Array, ""]]:
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
        ValueError: no leaf has a density in this state, or a leaf is missing or of another shape.

    Example:
        >>> params = {"kernel": jnp.array([[4.0, 1.0]])}
        >>> state = rate_distortion(0.0, step=1.0).init(params)
        >>> estimated_bits(params, state)
        {'kernel': Array(9., dtype=float32)}
    """
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
    return {path: _bits(leaves[path], found[path], formats[path][1]) for path in found}


def step_of(log_step: Float[Array, "..."]) -> Float[Array, "..."]:
    """Step sizes: powers of two, and straight lines between them.

    Args:
        log_step: as learned.

    Returns:
        ``2**floor(x) * (1 + x - floor(x))``, exact but for one rounding.

    Example:
        >>> step_of(jnp.array([-1.0, 0.5, 1.0]))
        Array([0.5, 1.5, 2. ], dtype=float32)
        >>> jax.grad(step_of)(1.5)
        Array(2., dtype=float32, weak_type=True)
    """
    whole = jax.lax.stop_gradient(jnp.clip(jnp.floor(log_step), -126, 126))
    # A float's bits are its exponent and what is behind 1: no platform's exp has a say.
    power = jax.lax.bitcast_convert_type((whole.astype(jnp.int32) + 127) << 23, jnp.float32)
    return power * (1 + (log_step - whole))


def _log_step(step: Array) -> Array:
    """Undo :func:`step_of`."""
    fraction, exponent = jnp.frexp(step)
    return (exponent - 1).astype(jnp.float32) + (2 * fraction - 1)


# Outside `jit` one program, instead of one for every operation on every shape.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _learn(
    leaves: dict[str, Any], formats: tuple[tuple[str, Format], ...], step: float | None
) -> dict[str, Coded]:
    return {path: _begin(leaves[path], format, step) for path, format in formats}


def _begin(leaf: Array, format: Format, step: float | None) -> Coded:
    def size(leaf: Array) -> Array:
        wide = jax.lax.stop_gradient(leaf).astype(jnp.float32)
        shape = jax.eval_shape(lambda x: find_scales(x, format).scale, wide).shape
        spread = lambda field: spread_scales(Scales(field), wide.shape, format).scale
        (total,) = jax.linear_transpose(spread, jnp.zeros(shape))(wide * wide)
        mean = jnp.sqrt(total / (wide.size // math.prod(shape)))
        given = jnp.full(shape, _STEP_OF_ZEROS if step is None else step, jnp.float32)
        return _log_step(given if step is not None else jnp.where(mean > 0, mean / 2, given))

    return Coded(automatic(size)(leaf), initial_density(leaf.shape, format.code_range[1]))


def _seen(leaf: Array, learned: Coded, format: Format, price: Array) -> Array:
    """The rounded weights, whose backward pass adds what the bits cost."""
    stopped = jax.lax.stop_gradient((leaf, learned))
    out = (spec_like(leaf, leaf.shape), PartitionSpec(), PartitionSpec())
    costs = automatic(functools.partial(_costs, format), out=out)(*stopped, price)
    leaf, step = _charge(leaf, step_of(learned.log_step), learned.density, costs)
    return fake_quant_learned(leaf, step, format)


def _costs(format: Format, leaf: Array, learned: Coded, price: Array) -> tuple[Any, Any, Any]:
    """The gradients of what the bits cost: to weights, steps and density."""
    step = used_step(step_of(learned.log_step), format, jnp.float32)
    wide = leaf.astype(jnp.float32)
    total = lambda leaf, step, density: jnp.sum(_leaf_bits(leaf, step, density, format))
    weights, steps, density = jax.grad(total, argnums=(0, 1, 2))(wide, step, learned.density)
    prior = jax.grad(prior_bits)(learned.density)
    # As fake_quant_learned scales the gradient of the loss, so that both stay of one kind.
    factor = 1 / math.sqrt(leaf.size // step.size * format.code_range[1])
    mean = jax.tree.map(lambda a, b: (a + b) / leaf.size, density, prior)
    return (price * weights).astype(leaf.dtype), price * factor * steps, mean


@jax.custom_vjp
def _charge(leaf: Array, step: Array, density: CodeDensity, costs: Any) -> tuple[Array, Array]:
    """Leaf and step, whose backward pass adds gradients of costs that the loss never sees."""
    del density, costs
    return leaf, step


def _charge_back(costs: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    leaf, step = cotangents
    return leaf + costs[0], step + costs[1], costs[2], None


_charge.defvjp(
    lambda leaf, step, density, costs: (_charge(leaf, step, density, costs), costs), _charge_back
)


def _leaf_bits(leaf: Array, step: Array, density: CodeDensity, format: Format) -> Array:
    spread = spread_scales(Scales(step), leaf.shape, format).scale
    return code_bits(leaf.astype(jnp.float32) / spread, density)


# Outside `jit` one program, instead of one for every operation on every shape.
@functools.partial(jax.jit, static_argnums=2)
def _bits(leaf: Array, learned: Coded, format: Format) -> Array:
    def bits(leaf: Array, learned: Coded) -> Array:
        step = used_step(step_of(learned.log_step), format, jnp.float32)
        return jnp.sum(_leaf_bits(leaf, step, learned.density, format))

    return automatic(bits)(leaf, learned)


def _leaves(params: Params, state: State) -> dict[str, tuple[Any, Format]]:
    """The leaves that a state was made for, of the shapes that it was made for."""
    told = state.buffers.leaves
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape, _ in told}
    found = tree_lib.take_like(params, shapes)
    return {path: (found[path], format) for path, _, format in told}


def _told(buffers: Any) -> dict[str, tuple[tuple[int, ...], Format]]:
    """Shape and format of each leaf, from the buffers of this method or of one around it."""
    ours = lambda node: isinstance(node, RateBuffers)
    nodes = [node for node in jax.tree.leaves(buffers, is_leaf=ours) if ours(node)]
    return {path: (shape, format) for node in nodes for path, shape, format in node.leaves}


def _price(penalty: Any) -> Callable[[Any], Any]:
    if callable(penalty):
        return penalty
    if not is_number(penalty):
        raise TypeError(f"penalty must be a number or a function of the step, not {penalty!r:.60}")
    if not (math.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"penalty must be finite and not negative, such as 1e-6, not {penalty}")
    return lambda step: penalty


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
