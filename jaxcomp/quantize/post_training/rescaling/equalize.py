"""Cross-layer equalisation: channels that a layer makes and the next reads get ranges alike."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_amount, check_count, choose
from jaxcomp.model.batches import peek, spread
from jaxcomp.model.degrees.relate import relate
from jaxcomp.model.degrees.space import Space, Span, solve
from jaxcomp.model.matrices import MatrixForm
from jaxcomp.quantize.post_training.rescaling import rescaler
from jaxcomp.quantize.post_training.rescaling.rescaler import (
    Direction,
    Model,
    Rescaled,
    RescaledGroup,
)
from jaxcomp.sharding import automatic


class _Pair(NamedTuple):
    """A direction, with where its kernels hold the channels; all of it static.

    Attributes:
        size: how many channels.
        slots: path, power, axes and index (see :func:`~.rescaler.units`) of each kernel.
    """

    size: int
    slots: tuple[tuple[str, float, tuple[int, ...], np.ndarray], ...]


def equalize(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    paths: str | Sequence[str] | None = None,
    most_rounds: int = 100,
    tolerance: float = 1e-3,
) -> Rescaled:
    r"""Rescale channels between layers so that no tensor has a few channels much wider than others.

    A channel that one kernel makes and another reads may be divided by ``s`` in the first and
    multiplied by ``s`` in the second, wherever all between is positively homogeneous: ReLU,
    pooling, residual sums (all that is added and all that reads goes along), an inference BatchNorm
    (its mean and bias go along), attention's values, the up-projection of a SwiGLU. Which leaves go
    along, and by which power, is worked out from the traced function and then tried with random
    powers of two on the first batch. With ``s = sqrt(range made / range read)`` both kernels have
    the same range in each channel; this is repeated over all channels until it settles.

    A kernel with a scale a channel gains nothing; one with a scale a tensor does. Fold BatchNorm
    before, if it is to be folded: what is equalised is the kernel as it is quantized.

    Args:
        apply_fn: the inference function of ``(params, *inputs)``.
        params: its parameters, and statistics such as ``batch_stats`` if it takes them.
        batches: an iterable of inputs; a plain tuple is spread over ``inputs``. Rescalings are
            tried on the first, and no other is read: ranges are those of the weights.
        paths: patterns of the kernels whose ranges count; if None, all that are compressed by
            default (see :func:`jaxcomp.tree.is_weight`) and that some product reads. Others may go
            along.
        most_rounds: passes over all channels at most.
        tolerance: stop where no scale moves by a larger factor than ``1 + tolerance`` in a pass.

    Returns:
        Parameters that compute the same function, and what was and was not rescaled.

    Raises:
        ValueError: a pattern matches nothing, weights are NaN or infinite, or there are no batches.
        TypeError: a leaf is compressed already, or no array; ``batches`` is one array.

    Example:
        >>> def mlp(p, x):
        ...     return jax.nn.relu(x @ p["w0"]) @ p["w1"]
        >>> params = {"w0": jnp.array([[1.0, 16.0]]), "w1": jnp.array([[1.0], [1.0]])}
        >>> found = equalize(mlp, params, [jnp.ones((1, 1))])
        >>> found.params["w0"], found.params["w1"].ravel()
        (Array([[1., 4.]], dtype=float32), Array([1., 4.], dtype=float32))
        >>> print(found)
        divided  multiplied  channels  widest  after
        w0       w1                 2   4.00x  2.00x

    Source: Nagel, van Baalen, Blankevoort & Welling, "Data-Free Quantization Through Weight
    Equalization and Bias Correction", 2019, section 4.1.
    """
    check_count("most_rounds", most_rounds)
    check_amount("tolerance", tolerance)
    weights = choose(params, paths)
    model = rescaler.read_model(apply_fn, params, spread(peek(batches)[0]))
    forms, kept = rescaler.forms_of(model, weights)
    directions, fixed = _pairs(model, forms)
    kept += fixed
    if not directions:
        return Rescaled(params, tuple(kept))
    rescale = rescaler.rescaler(model, directions)
    failed = rescaler.broken(model, directions, rescale)
    good = [number for number in range(len(directions)) if number not in failed]
    kept += [_refused(directions[number], reason) for number, reason in failed.items()]
    pairs = [_pair(model, directions[number], forms) for number in good]
    scales = [np.ones(direction.size) for direction in directions]
    done = []
    if pairs:
        leaves = tree_lib.flatten(params)
        kernels = {path: jnp.asarray(leaves[path]) for pair in pairs for path, *_ in pair.slots}
        run = partial(_settle, pairs, most_rounds, tolerance)
        logs, before, after = jax.jit(automatic(run))(kernels)
        for number, log, *spreads in zip(good, logs, before, after, strict=True):
            scales[number] = np.exp(np.asarray(log))
            done.append(_report(directions[number], *map(float, spreads)))
    return Rescaled(rescale(scales), (*done, *kept))


def _report(direction: Direction, before: float, after: float) -> RescaledGroup:
    divided, multiplied = direction.paths(-1), direction.paths(1)
    return RescaledGroup(multiplied[0], direction.size, divided, multiplied, before, after)


def _refused(direction: Direction, reason: str) -> RescaledGroup:
    return RescaledGroup(direction.paths(1)[0], direction.size, kept=reason)


def _pairs(
    model: Model, forms: dict[str, MatrixForm]
) -> tuple[list[Direction], list[RescaledGroup]]:
    """Directions from kernels that make channels to kernels that read them; what has none."""
    tried: dict[frozenset[Any], tuple[Any, ...]] = {}
    for path, form in forms.items():
        inputs = [axis for axis in form.input_axes if axis not in form.kernel_axes]
        for axes in (inputs, form.output_axes):
            for bundle in rescaler.bundles(model, path, (*form.outer_axes, *axes)):
                for channels in rescaler.narrower(bundle):
                    tried.setdefault(frozenset(channels), channels)
    directions: list[Direction] = []
    reasons: dict[str, tuple[int, str]] = {}
    # Those with the most scales first: what they do, fewer scales need not do again.
    for channels in sorted(tried.values(), key=len, reverse=True):
        directions += _between(model, channels, forms, directions, reasons)
    moved = {(u.path, axis) for d in directions for u in d.powers for axis, _ in u.slot}
    kept = [
        RescaledGroup(path, size, kept=reason)
        for path, (size, reason) in reasons.items()
        if not any((path, axis) in moved for axis in _read_axes(forms[path]))
    ]
    return directions, kept


def _read_axes(form: MatrixForm) -> tuple[int, ...]:
    return (*form.input_axes, *(form.output_axes if form.inner > 1 else ()))


def _between(
    model: Model,
    channels: tuple[Any, ...],
    forms: dict[str, MatrixForm],
    known: Sequence[Direction],
    reasons: dict[str, tuple[int, str]],
) -> Iterator[Direction]:
    """Independent directions of some channels, each between two kernels, the nearest first."""
    degrees = relate(model.program, model.flow, channels)
    space = Space(degrees.relations)
    order = {path: number for number, path in enumerate(forms)}
    kernels = [unknown for unknown in degrees.unknowns if unknown.path in forms]
    kernels.sort(key=lambda unknown: order[unknown.path])
    leave = [*kernels, *(unknown for unknown in degrees.unknowns if unknown.path not in forms)]
    free = [unknown for unknown in kernels if unknown not in space.causes]
    for unknown in kernels:
        # Of a depthwise kernel the channels that it reads are on the axis of those that it makes.
        if any(axis in _read_axes(forms[unknown.path]) for axis, _ in unknown.slot):
            size = math.prod(atom.size for atom in channels)
            reason = space.causes.get(unknown, "no other kernel makes these channels")
            reasons.setdefault(unknown.path, (size, reason))
    span = Span()
    for maker, reader in sorted(
        combinations(free, 2), key=lambda pair: order[pair[1].path] - order[pair[0].path]
    ):
        if any({maker, reader} <= rescaler.narrowed(d, channels) for d in known):
            continue
        powers = solve(space, {maker: -1, reader: 1}, leave)
        # If the maker can do without the reader, the two only happen to be of one width.
        if powers is None or solve(space, {maker: -1, reader: 0}, leave, set(powers)):
            continue
        if span.widen(powers):
            yield Direction(channels, powers)


def _pair(model: Model, direction: Direction, forms: dict[str, MatrixForm]) -> _Pair:
    slots = []
    for unknown, power in direction.powers.items():
        if unknown.path in forms:
            axes, index = rescaler.units(model, direction.channels, unknown)
            slots.append((unknown.path, float(power), axes, index))
    return _Pair(direction.size, tuple(slots))


def _ranges(pair: _Pair, kernels: dict[str, Array], sign: int) -> list[Array]:
    return [
        rescaler.largest(kernels[path], axes, index, pair.size)
        for path, power, axes, index in pair.slots
        if power * sign > 0
    ]


def _settle(
    pairs: Sequence[_Pair], most_rounds: int, tolerance: float, kernels: dict[str, Array]
) -> tuple[list[Array], list[Array], list[Array]]:
    """The logarithms of all scales once they have settled, and how even ranges were and are."""

    def use(kernels: dict[str, Array]) -> list[Array]:
        each = (_ranges(pair, kernels, 1) + _ranges(pair, kernels, -1) for pair in pairs)
        return [rescaler.spread(ranges) for ranges in each]

    def turn(carry: Any) -> Any:
        number, _, kernels, logs = carry
        kernels, moved = dict(kernels), []
        for pair in pairs:
            made, seen = (jnp.stack(_ranges(pair, kernels, sign)).max(0) for sign in (-1, 1))
            good = (made > 0) & (seen > 0)
            ratio = jnp.log(jnp.where(good, made, 1)) - jnp.log(jnp.where(good, seen, 1))
            log = ratio / 2
            for path, power, axes, index in pair.slots:
                kernels[path] = rescaler.multiplied(kernels[path], jnp.exp(log), power, axes, index)
            moved.append(log)
        logs = [a + b for a, b in zip(logs, moved, strict=True)]
        most = jnp.max(jnp.stack([jnp.max(jnp.abs(log)) for log in moved]))
        return number + 1, most, kernels, logs

    wide = {path: leaf.astype(jnp.float32) for path, leaf in kernels.items()}
    start = (0, jnp.inf, wide, [jnp.zeros(pair.size, jnp.float32) for pair in pairs])
    _, _, settled, logs = lax.while_loop(
        lambda carry: (carry[0] < most_rounds) & (carry[1] > np.log1p(tolerance)), turn, start
    )
    return logs, use(wide), use(settled)
