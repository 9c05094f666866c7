"""Quantize in a rotated basis, where weights have no outliers."""

import math
import os
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxcomp.arrays import CompressedArray, decode
from jaxcomp.arrays.rotated import RotatedArray, flips_of, pack_flips, rotate_values
from jaxcomp.checks import check_function, check_key
from jaxcomp.kernels.hadamard import block_size
from jaxcomp.model.matrices import MatrixForm, to_matrix
from jaxcomp.model.second_moments import output_errors
from jaxcomp.quantize.affine import encode
from jaxcomp.quantize.post_training.walk import Quantized, Solve, Task, quantize_leaves
from jaxcomp.sharding import automatic, spec_like


def nearest(task: Task, leaf: Any, moment: Any) -> CompressedArray:
    """Round to nearest: the solver of :func:`rotate` if no other is given.

    Example:
        >>> from jaxcomp.quantize.formats import Format
        >>> nearest(Task("w", None, Format(4)), jnp.array([[7.0], [1.2]]), None).decode().ravel()
        Array([7., 1.], dtype=float32)
    """
    del moment
    return encode(leaf, task.format)


def rotate(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    rules: Any,
    *,
    key: Any = None,
    solve: Solve = nearest,
    sequential: bool = True,
    at_once: int = 1,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Quantized:
    """Quantize each weight as it is and rotated along its inputs, and keep what loses less.

    The input axes of a kernel are multiplied by an orthonormal Hadamard matrix (with random flips
    of signs before it, if there is a key), so that a few large weights, or inputs to which a few
    matter most, are spread over many. What is quantized is a matrix with smaller scales. The leaf
    decodes to the weights in their own basis, so the model does not change; decoding costs
    additions, ``log2`` of the inputs for each weight. Only runs of the largest power of two that
    divides an axis are mixed, and an odd axis is not. Leaves that lose more when they are rotated,
    and those that no product reads, stay as ``solve`` makes them.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        batches: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`; the error that
            decides is that of the outputs of a leaf's products on them.
        rules: see :func:`~jaxcomp.quantize.post_training.tasks.plan`.
        key: a PRNG key for the flips of signs; None: no sign is flipped.
        solve: how to round, in either basis: ``solve(task, leaf, moment)`` as for
            :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`, such as
            :func:`~jaxcomp.quantize.post_training.gptq.gptq_leaf`; rotated leaves come in float32,
            with the second moment of the rotated inputs.
        sequential: whether a pass runs the model with all earlier leaves as they became.
        at_once: leaves a pass over the batches.
        directory: where finished leaves are kept, in files ``rotate*.jxc``. The same call goes on
            after them; what ``apply_fn``, ``batches`` and ``solve`` do is not in the files, and
            must be the same.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        The quantized tree and a report; the form of a leaf says whether it was rotated.

    Raises:
        ValueError: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`.
        TypeError: likewise; ``key`` is no key, or ``solve`` no function.
        CheckpointError: a file is damaged.

    Example:
        >>> from jaxcomp.quantize.formats import Format
        >>> params = {"w": jnp.array([[40.0], [1.0], [-1.0], [1.0]])}
        >>> batches = [jnp.eye(4)]
        >>> print(rotate(lambda p, x: x @ p["w"], params, batches, Format(bits=4)))
        leaf  shape   form                               bits  bytes  weight error  output error
        w     (4, 1)  int4 symmetric, 1 scale, rotated  16.00      8      ...
        total: 4 weights, 8 bytes, 16.00 bits a weight

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, section
    3; Chee et al., "QuIP: 2-Bit Quantization of Large Language Models With Guarantees", 2023,
    section 4.
    """
    if key is not None:
        check_key(key)
    check_function("solve", solve, "(task, leaf, moment) that returns a compressed leaf")
    return quantize_leaves(
        "rotate",
        apply_fn,
        params,
        batches,
        rules,
        lambda task, leaf, moment: rotate_leaf(task, leaf, moment, key, solve),
        sequential=sequential,
        at_once=at_once,
        directory=directory,
        progress=progress,
        call={"key": "none" if key is None else str(jax.random.key_data(key).tolist())},
    )


def rotate_leaf(
    task: Task, leaf: Any, moment: Any, key: Any = None, solve: Solve = nearest
) -> CompressedArray:
    """One leaf by :func:`rotate`.

    Args:
        task: what to do with it.
        leaf: the weights.
        moment: ``(*groups, features, features)``, the mean of x xᵀ; None where there is none: the
            error of the weights decides.
        key: as there.
        solve: as there.

    Returns:
        A :class:`~jaxcomp.arrays.rotated.RotatedArray`, or what ``solve`` made of the leaf itself.
    """
    plain = solve(task, leaf, moment)
    axes = () if task.form is None else rotated_axes(task.form)
    if not axes or task.form is None:
        return plain
    leaf = jnp.asarray(leaf)
    signs = None if key is None else _signs(task, axes, key)
    turned, seen = automatic(partial(_turn, task.form, axes), _specs(leaf, moment))(
        leaf, moment, signs
    )
    inner = solve(task, turned, seen)
    rotated = RotatedArray(inner, signs, axes, leaf.dtype)
    before, after = (
        automatic(partial(_loss, task.form))(leaf, decode(new), moment) for new in (plain, rotated)
    )
    return rotated if float(after) < float(before) else plain


def rotated_axes(form: MatrixForm) -> tuple[int, ...]:
    """The input axes of a kernel that a rotation mixes, negative; not those of its window.

    Example:
        >>> rotated_axes(MatrixForm((3, 3, 8, 5), (0, 1, 2), (3,), kernel_axes=(0, 1)))
        (-2,)
    """
    axes = [axis for axis in sorted(form.input_axes) if axis not in form.kernel_axes]
    return tuple(axis - len(form.shape) for axis in axes if block_size(form.shape[axis]) > 1)


def _signs(task: Task, axes: tuple[int, ...], key: Any) -> Array:
    """Random signs of a leaf's features, packed; the same for all layers of a stack."""
    form = task.form
    assert form is not None
    shape = form.shape
    own = jax.random.fold_in(key, zlib.crc32(task.path.encode()))
    flips = jax.random.bernoulli(own, shape=(math.prod(shape[axis] for axis in axes),))
    # Stacked layers are taken apart along their own axes, signs and all.
    leading = [size if axis in form.outer_axes else 1 for axis, size in enumerate(shape[: axes[0]])]
    return pack_flips(jnp.broadcast_to(flips, (*leading, flips.size)))


def _specs(leaf: Array, moment: Any) -> tuple[PartitionSpec, PartitionSpec]:
    whole = PartitionSpec()
    return spec_like(leaf, leaf.shape), whole if moment is None else spec_like(moment, moment.shape)


@partial(jax.jit, static_argnums=(0, 1))
def _turn(
    form: MatrixForm, axes: tuple[int, ...], leaf: Array, moment: Any, signs: Any
) -> tuple[Array, Any]:
    """A leaf and the second moment of its inputs in the rotated basis."""
    flips = flips_of(signs, leaf.shape, axes)
    turned = rotate_values(leaf.astype(jnp.float32), axes, flips)
    return turned, None if moment is None else _turn_moment(form, axes, moment, flips)


def _turn_moment(form: MatrixForm, axes: tuple[int, ...], moment: Array, flips: Any) -> Array:
    """The second moment of the rotated inputs: both of its sides are rotated."""
    sizes = [form.shape[axis] for axis in form.input_axes]
    count, rank = len(sizes), len(form.shape)
    mixed = [where for where, axis in enumerate(form.input_axes) if axis - rank in axes]
    if flips is not None:
        # With the axes of the inputs alone, in the order in which they are joined.
        picked = flips[tuple(slice(None) if a - rank in axes else 0 for a in range(rank))]
        order = sorted(form.input_axes[where] for where in mixed)
        picked = jnp.transpose(picked, [order.index(form.input_axes[where]) for where in mixed])
        flips = picked.reshape([n if i in mixed else 1 for i, n in enumerate(sizes)])
    split = moment.reshape(*moment.shape[:-2], *sizes, *sizes)
    for side in (-2 * count, -count):
        places = [side + where for where in mixed]
        turns = None
        if flips is not None:
            turns = flips.reshape(*flips.shape, *[1] * (-side - count))
        split = rotate_values(split, places, turns)
    return split.reshape(moment.shape)


@partial(jax.jit, static_argnums=0)
def _loss(form: MatrixForm, leaf: Array, values: Array, moment: Any) -> Array:
    """What the outputs move by, or the weights where nothing is measured."""
    change = values.astype(jnp.float32) - leaf.astype(jnp.float32)
    if moment is None:
        return jnp.sum(change * change)
    return jnp.sum(output_errors(to_matrix(form, change), moment))
