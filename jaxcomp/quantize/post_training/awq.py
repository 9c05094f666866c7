"""AWQ on a whole model: each leaf's channels scaled by what they are multiplied with."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxcomp.arrays import CompressedArray
from jaxcomp.arrays.rescaled import RescaledArray, spread_runs
from jaxcomp.checks import check_count
from jaxcomp.model.matrices import MatrixForm, from_stack, to_stack
from jaxcomp.model.second_moments import output_errors
from jaxcomp.quantize.affine import encode, find_codes, from_codes, leaf_of
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.post_training.awq_matrix import (
    MULTIPLIER_DTYPE,
    parts,
    search_clipping,
    search_exponents,
)
from jaxcomp.quantize.post_training.layout import by_group, like_scale, scale_layout
from jaxcomp.quantize.post_training.walk import Quantized, Task, quantize_leaves
from jaxcomp.quantize.scales import Scales, find_scales, spread_scales
from jaxcomp.sharding import automatic


def awq(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    rules: Any,
    *,
    exponents: int = 20,
    clippings: int = 20,
    sequential: bool = True,
    at_once: int = 1,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Quantized:
    """Make the weights finer that large inputs meet, and clip ranges where that helps the outputs.

    Each input channel of a leaf is multiplied by a power of the root mean square of its inputs
    before it is rounded, and divided by it after: the divisors stay in the leaf, two bytes a
    channel, so that no layer before it must take them up. The positions of a convolution's window
    share them. Power and ranges are chosen from a grid by the error of the outputs, on the second
    moments of the inputs. A leaf that no scales help, or that no product reads, becomes what the
    format makes of it; none loses more on the batches than rounded to nearest.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        batches: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`.
        rules: see :func:`~jaxcomp.quantize.post_training.tasks.plan`.
        exponents: powers to try, from 0 in steps of ``1 / exponents``; 1: none but 0.
        clippings: parts of a range to try, from all of it towards one half (with 1 or 2 bits,
            towards a tenth), for all weights that share a scale together; 1: all of it only.
        sequential: whether a pass runs the model with all earlier leaves as they became, or else
            the dense one.
        at_once: leaves a pass over the batches, and second moments held.
        directory: where finished leaves are kept; the same call goes on after them.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        The quantized tree and a report.

    Raises:
        ValueError: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`; a count below
            1.
        TypeError: likewise.
        CheckpointError: a file is damaged.

    Example:
        >>> from jaxcomp.quantize.formats import Format
        >>> params = {"w": jnp.array([[0.9, 0.7], [7.0, -6.8]])}
        >>> batches = [jnp.array([[10.0, 0.1], [-9.0, 0.3]])]
        >>> found = awq(lambda p, x: x @ p["w"], params, batches, Format(bits=4))
        >>> found.params["w"].decode().round(1).tolist()
        [[0.9..., 0.6...], [7.0..., -6.9...]]
        >>> found.leaves[0].form
        'int4 symmetric, 2 scales, rescaled by 2'

    Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration", 2023, section 3.2.
    """
    check_count("exponents", exponents)
    check_count("clippings", clippings)
    return quantize_leaves(
        "awq",
        apply_fn,
        params,
        batches,
        rules,
        lambda task, leaf, moment: awq_leaf(task, leaf, moment, exponents, clippings),
        sequential=sequential,
        at_once=at_once,
        directory=directory,
        progress=progress,
        call={"exponents": str(exponents), "clippings": str(clippings)},
    )


def awq_leaf(
    task: Task, leaf: Any, moment: Any, exponents: int = 20, clippings: int = 20
) -> CompressedArray:
    """One leaf by :func:`awq`.

    Args:
        task: what to do with it.
        leaf: the weights.
        moment: ``(*groups, features, features)``, the mean of x xᵀ; None where there is none.
        exponents: powers to try.
        clippings: parts of a range to try.

    Returns:
        A :class:`~jaxcomp.arrays.rescaled.RescaledArray`; without scales, what the format makes.
    """
    plain = encode(leaf, task.format)
    if task.form is None or moment is None:
        return plain
    form, format = task.form, task.format
    clip = automatic(partial(_clip, form, format, clippings))

    def clipped(dtype: Any, *multiplier: Array) -> CompressedArray:
        codes, scales = clip(leaf, moment, *multiplier)
        return leaf_of(codes, scales, format, dtype)

    made = [plain, clipped(leaf.dtype)]
    multiplier = automatic(partial(_find_multiplier, form, format, exponents))(leaf, moment)
    if np.any(np.asarray(multiplier) != 1):
        made.append(RescaledArray(clipped(jnp.float32, multiplier), multiplier, leaf.dtype))
    values = [each.decode() for each in made]
    errors = automatic(partial(_total_errors, form))(leaf, moment, *values)
    # Among equals the first, which is the smallest.
    return made[int(np.argmin(errors))]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _find_multiplier(
    form: MatrixForm, format: AnyFormat, count: int, leaf: Array, moment: Array
) -> Array:
    """The multiplier of a leaf, as it is stored."""

    def rounded(matrices: Array) -> Array:
        x = from_stack(form, matrices)
        scales = find_scales(x, format)
        codes, _ = find_codes(x, scales, format)
        return _to_matrices(form, from_codes(codes, scales, format, jnp.float32))

    weights, moments = _to_matrices(form, leaf), _squares(form, moment)
    found = search_exponents(weights, moments, rounded, _channels(form), count)
    full = from_stack(form, jnp.broadcast_to(found.multiplier[:, :, None], weights.shape))
    steps = [n // kept for n, kept in zip(form.shape, multiplier_shape(form), strict=True)]
    return full[tuple(slice(None, None, step) for step in steps)].astype(MULTIPLIER_DTYPE)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _clip(
    form: MatrixForm,
    format: AnyFormat,
    count: int,
    leaf: Array,
    moment: Array,
    multiplier: Array | None = None,
) -> tuple[Array, Scales]:
    """Codes and scales of a leaf divided by its multiplier, ranges clipped."""
    x, moments = leaf, _squares(form, moment)
    if multiplier is not None:
        full = jnp.broadcast_to(spread_runs(multiplier, form.shape), form.shape)
        full = full.astype(jnp.float32)
        x = leaf.astype(jnp.float32) / full
        # Errors count once they are multiplied back.
        back = _to_matrices(form, full)[:, :, 0]
        moments = moments * back[:, :, None] * back[:, None, :]
    scales, layout = find_scales(x, format), scale_layout(form, format)

    def candidate(part: Array) -> tuple[Array, Array | None]:
        spread = spread_scales(_shrunk(scales, part), form.shape, format)
        scale, zero_point = spread.scale, spread.zero_point
        zero_point = None if zero_point is None else by_group(form, layout, zero_point)
        return by_group(form, layout, scale), zero_point

    tried = parts(count, format.bits)
    candidates, zero_points = lax.map(candidate, tried)
    zero_point = None if zero_points is None else zero_points[0]
    weights = _to_matrices(form, x)
    chosen = search_clipping(weights, moments, candidates, zero_point, layout, format)
    scales = _shrunk(scales, like_scale(form, format, layout, tried[chosen], scales.scale))
    return find_codes(x, scales, format)[0], scales


def _shrunk(scales: Scales, part: Array) -> Scales:
    """Scales times a part of 1, as they are stored; a zero point is as far along the codes."""
    dtype = scales.scale.dtype
    less = (scales.scale.astype(jnp.float32) * part).astype(dtype)
    return scales._replace(scale=jnp.where(less > 0, less, scales.scale))


@partial(jax.jit, static_argnums=0)
def _total_errors(form: MatrixForm, leaf: Array, moment: Array, *values: Array) -> Array:
    weights, moments = _to_matrices(form, leaf), _squares(form, moment)
    errors = [output_errors(weights - _to_matrices(form, x), moments) for x in values]
    return jnp.stack([jnp.sum(each) for each in errors])


def _to_matrices(form: MatrixForm, leaf: Array) -> Array:
    return to_stack(form, leaf).astype(jnp.float32)


def _squares(form: MatrixForm, moment: Array) -> Array:
    return moment.reshape(-1, form.features, form.features)


def _channels(form: MatrixForm) -> np.ndarray:
    """The channel of each feature: positions of a convolution's window have one together."""
    sizes = [form.shape[axis] for axis in form.input_axes]
    of_channel = [1 if axis in form.kernel_axes else form.shape[axis] for axis in form.input_axes]
    numbers = np.arange(np.prod(of_channel, dtype=int)).reshape(of_channel)
    return np.broadcast_to(numbers, sizes).ravel()


def multiplier_shape(form: MatrixForm) -> tuple[int, ...]:
    """The smallest shape that holds a number for each channel of each matrix of a leaf.

    Args:
        form: of the leaf.

    Returns:
        For each axis of the leaf, by how many numbers; each is for a run of neighbours.

    Example:
        >>> grouped = MatrixForm((3, 3, 4, 6), (0, 1, 2), (3,), inner=2, kernel_axes=(0, 1))
        >>> multiplier_shape(grouped)
        (1, 1, 4, 2)
    """
    shape = [1 if axis in form.kernel_axes else n for axis, n in enumerate(form.shape)]
    inner = np.repeat(np.arange(form.inner), form.outputs)
    if form.columns is not None:
        inner = inner[np.argsort(form.columns)]
    inner = inner.reshape([form.shape[axis] for axis in form.output_axes])
    for place, axis in enumerate(form.output_axes):
        n = form.shape[axis]
        shape[axis] = next(
            count
            for count in range(1, n + 1)
            if n % count == 0
            and np.array_equal(inner.take(np.arange(n) * count // n * (n // count), place), inner)
        )
    return tuple(shape)
