"""SmoothQuant: activations with wide channels are narrowed, the weights that read them widened."""

import glob
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcomp import tree as tree_lib
from jaxcomp.checks import choose, is_number
from jaxcomp.model.batches import peek, spread
from jaxcomp.model.degrees.relate import relate
from jaxcomp.model.degrees.space import Space, solve
from jaxcomp.model.degrees.walk import Unknown
from jaxcomp.model.dims import Dim
from jaxcomp.model.layerwise import uses_of
from jaxcomp.model.matrices import MatrixForm
from jaxcomp.model.observe import Observed, observe
from jaxcomp.model.statistics import absmax
from jaxcomp.quantize.post_training.rescaling import rescaler
from jaxcomp.quantize.post_training.rescaling.rescaler import (
    Direction,
    Model,
    Rescaled,
    RescaledGroup,
)
from jaxcomp.sharding import automatic


class _Reader(NamedTuple):
    """A kernel that reads channels: where it holds them; all of it static.

    Attributes:
        path: of the kernel.
        power: of the scale that it is multiplied by.
        axes: those of the kernel that hold the channels.
        channel: the channel at each of their joined positions.
    """

    path: str
    power: float
    axes: tuple[int, ...]
    channel: np.ndarray


def smooth(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    strength: float = 0.5,
    paths: str | Sequence[str] | None = None,
    progress: bool | None = None,
) -> Rescaled:
    """Move the width of activations' channels into the weights that read them; same function.

    Channel ``j`` of what a kernel reads is divided by ``s_j = max|x_j|**a / max|w_j|**(1 - a)``,
    and the kernel's inputs are multiplied by it. What divides is folded into the leaves that make
    the channels: the scale and bias of a norm where there is one, otherwise the kernel and bias of
    the layer before. Kernels that read the same channels (query, key and value) share one ``s``,
    from the largest of their maxima. What to fold into, and whether that is exact, is worked out
    from the traced function and then tried with random powers of two on the first batch; where
    nothing can take the scales (a GELU lies between, or a residual sum that reads the channels too)
    the kernel is left alone and named.

    Quantize weights and activations afterwards, as of any model.

    Args:
        apply_fn: the inference function of ``(params, *inputs)``.
        params: any tree.
        batches: an iterable of batches; a plain tuple is spread over ``inputs``.
        strength: ``a`` in [0, 1]: 0 evens out the weights alone, 1 the activations alone.
        paths: patterns of the kernels that read; if None, all that are compressed by default (see
            :func:`jaxcomp.tree.is_weight`) and that some product reads.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        Parameters that compute the same function, and what was and was not rescaled; ``before`` and
        ``after`` are of the activations.

    Raises:
        ValueError: ``strength`` outside [0, 1]; a pattern matches nothing; no batches; NaN or
            infinite weights or inputs.
        TypeError: ``batches`` is one array; a leaf is compressed already.

    Example:
        >>> def model(p, x):
        ...     return (x * p["scale"]) @ p["w"]
        >>> params = {"scale": jnp.array([1.0, 16.0]), "w": jnp.ones((2, 1))}
        >>> found = smooth(model, params, [jnp.ones((1, 2))])
        >>> found.params["scale"], found.params["w"].ravel()
        (Array([1., 4.], dtype=float32), Array([1., 4.], dtype=float32))
        >>> print(found)
        divided  multiplied  channels  widest  after
        scale    w                  2   4.00x  2.00x

    Source: Xiao, Lin, Seznec, Wu, Demouth & Han, "SmoothQuant: Accurate and Efficient Post-Training
    Quantization for Large Language Models", 2023, equation 4.
    """
    if not is_number(strength) or not 0 <= strength <= 1:
        raise ValueError(f"strength must be a number from 0 to 1, not {strength!r:.60}")
    weights = choose(params, paths)
    first, batches = peek(batches)
    model = rescaler.read_model(apply_fn, params, spread(first))
    forms, kept = rescaler.forms_of(model, weights)
    directions, fixed = _foldable(model, forms)
    kept += fixed
    if not directions:
        return Rescaled(params, tuple(kept))
    rescale = rescaler.rescaler(model, directions)
    failed = rescaler.broken(model, directions, rescale)
    readers = [_readers(model, direction, forms) for direction in directions]
    patterns = [glob.escape(path) for path in forms]
    found = observe(apply_fn, params, batches, absmax(), paths=patterns, progress=progress)
    leaves = tree_lib.flatten(params)
    scales: list[Any] = [np.ones(direction.size) for direction in directions]
    done = []
    for number, (direction, each) in enumerate(zip(directions, readers, strict=True)):
        name, words = direction.paths(1)[0], (direction.paths(-1), direction.paths(1))
        unseen = [
            f"{reader.path}: {why}" for reader in each if (why := _unseen(found, reader.path))
        ]
        reason = failed.get(number) or "; ".join(unseen)
        if reason:
            kept.append(RescaledGroup(name, direction.size, kept=reason))
            continue
        inputs = [_inputs(forms[reader.path], found, reader.path) for reader in each]
        kernels = [jnp.asarray(leaves[reader.path]) for reader in each]
        run = partial(_scales, each, direction.size, float(strength))
        scales[number], before, after = jax.jit(automatic(run))(kernels, inputs)
        done.append(RescaledGroup(name, direction.size, *words, float(before), float(after)))
    return Rescaled(rescale(scales), (*done, *kept))


def _foldable(
    model: Model, forms: dict[str, MatrixForm]
) -> tuple[list[Direction], list[RescaledGroup]]:
    """For each kernel, directions that multiply its inputs and leave other kernels alone."""
    directions: list[Direction] = []
    kept = []
    for path, form in forms.items():
        if form.inner > 1:
            reason = "a grouped convolution reads its inputs apart"
            kept.append(RescaledGroup(path, form.inner * form.features, kept=reason))
            continue
        inputs = {axis for axis in form.input_axes if axis not in form.kernel_axes}
        for bundle in rescaler.bundles(model, path, (*form.outer_axes, *sorted(inputs))):
            reasons = []
            for channels in rescaler.narrower(bundle):
                found = _fold(model, path, inputs, channels, forms)
                new = [one for one in found if isinstance(one, Direction)]
                directions += [one for one in new if not _known(one, path, inputs, directions)]
                if new:
                    break
                reasons += found
            else:
                size = math.prod(atom.size for atom in bundle)
                kept.append(RescaledGroup(path, size, kept=str(reasons[0]) if reasons else "?"))
    return directions, kept


def _fold(
    model: Model,
    path: str,
    inputs: set[int],
    channels: tuple[Dim, ...],
    forms: dict[str, MatrixForm],
) -> list[Direction | str]:
    """A direction for each place where a kernel reads some channels, or why there is none."""
    degrees = relate(model.program, model.flow, channels)
    space = Space(degrees.relations)
    # What can be folded into a norm leaves all kernels before it as they are.
    leave = sorted(degrees.unknowns, key=lambda unknown: unknown.path not in forms)
    found: list[Direction | str] = []
    for unknown in degrees.unknowns:
        if unknown.path != path or not _reads(unknown, inputs, forms[path]):
            continue
        powers = solve(space, {unknown: 1}, leave)
        if powers is None:
            found.append(space.causes.get(unknown, "nothing else can take the scales"))
        else:
            found.append(Direction(channels, powers))
    return found


def _reads(unknown: Unknown, inputs: set[int], form: MatrixForm) -> bool:
    """Whether a slot is on a kernel's inputs, and on nothing else but stacked axes."""
    axes = {axis for axis, _ in unknown.slot}
    return bool(axes & inputs) and axes <= {*inputs, *form.outer_axes}


def _known(
    direction: Direction, path: str, inputs: set[int], directions: Sequence[Direction]
) -> bool:
    """Whether an earlier kernel has this direction too: they read the same channels."""
    mine = {unknown for unknown in direction.powers if unknown.path == path}
    return any(
        set(direction.channels) == set(other.channels)
        and any(
            other.powers.get(unknown, 0) > 0 and {axis for axis, _ in unknown.slot} & inputs
            for unknown in mine
        )
        for other in directions
    )


def _readers(
    model: Model, direction: Direction, forms: dict[str, MatrixForm]
) -> tuple[_Reader, ...]:
    readers = []
    for unknown, power in direction.powers.items():
        form = forms.get(unknown.path)
        if form is None or power <= 0 or not _reads(unknown, set(form.input_axes), form):
            continue
        axes, index = rescaler.units(model, direction.channels, unknown)
        readers.append(_Reader(unknown.path, float(power), axes, index))
    return tuple(readers)


def _unseen(found: Observed, path: str) -> str | None:
    """Why what a kernel reads was not observed, at one of its uses or all."""
    return next((why for key, why in found.unobserved.items() if key.split("#")[0] == path), None)


def _inputs(form: MatrixForm, found: Observed, path: str) -> Array:
    """The largest magnitudes that a kernel reads, with its axes; of size 1 where there are none."""
    order = [*form.outer_axes, *(a for a in form.input_axes if a not in form.kernel_axes)]
    sizes = [form.shape[axis] for axis in order]
    seen = jnp.max(jnp.stack([value.reshape(sizes) for _, value in uses_of(found, path)]), 0)
    seen = jnp.transpose(seen, np.argsort(order).tolist())
    return seen.reshape([n if axis in order else 1 for axis, n in enumerate(form.shape)])


def _scales(
    readers: Sequence[_Reader],
    size: int,
    strength: float,
    kernels: Sequence[Array],
    inputs: Sequence[Array],
) -> tuple[Array, Array, Array]:
    """The scales, and how wide the widest channel that is read was and is."""

    def most(arrays: Sequence[Array]) -> Array:
        pairs = zip(readers, arrays, strict=True)
        each = [rescaler.largest(x, reader.axes, reader.channel, size) for reader, x in pairs]
        return jnp.max(jnp.stack(each), 0)

    x, w = most(inputs), most(kernels)
    good = (x > 0) & (w > 0)
    x, w = jnp.where(good, x, 1), jnp.where(good, w, 1)
    scale = x**strength / w ** (1 - strength)
    seen = jnp.where(good, x, 0)
    return scale, rescaler.spread([seen]), rescaler.spread([seen / scale])
