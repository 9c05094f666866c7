"""GPTQ on a whole model: leaf after leaf, in the order of its program."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxcomp.arrays import CompressedArray
from jaxcomp.checks import check_amount, check_count
from jaxcomp.model.matrices import MatrixForm, from_stack, to_stack
from jaxcomp.model.second_moments import output_errors
from jaxcomp.quantize.affine import encode, find_codes, leaf_of
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.post_training.gptq_matrix import round_matrix
from jaxcomp.quantize.post_training.walk import Quantized, Task, quantize_leaves
from jaxcomp.quantize.rounding import element_values
from jaxcomp.quantize.scales import Scales, find_scales, spread_scales
from jaxcomp.sharding import automatic


def gptq(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    rules: Any,
    *,
    order: bool = True,
    sequential: bool = True,
    at_once: int = 1,
    block_size: int = 128,
    damping: float = 0.01,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Quantized:
    """Round weights so that each makes up for the errors of those before it, as the inputs allow.

    For a few leaves at a time, a pass over the batches gathers the second moments of what they are
    multiplied by; :func:`~jaxcomp.quantize.post_training.gptq_matrix.gptq_matrix` rounds them.
    Dense layers in any layout, attention kernels, convolutions (grouped too), stacked layers and
    experts are the matrices that :mod:`jaxcomp.model.matrices` makes of them. Scales are those that
    the format finds for the weights as they were, so any granularity and range will do: at 2 or 3
    bits ``range=MeanSquare()``, which clips, loses clearly less than one that holds all weights.

    An output that no correction helps on the batches is rounded to nearest, as is what no product
    reads. A weight that is looked up besides (a tied embedding) is solved for its product.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        batches: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`. Of a convolution
            a pass holds the input of one batch as often as its window has places.
        rules: see :func:`~jaxcomp.quantize.post_training.tasks.plan`.
        order: whether features with the largest inputs are rounded first, while there are many
            left to make up for them; or else as they stand.
        sequential: whether a pass runs the model with all earlier leaves as they became, or else
            the dense one.
        at_once: leaves a pass. More are faster and take more memory; those of one pass do not see
            each other rounded.
        block_size: features whose corrections are made together. Changes the time only.
        damping: what is added to a second moment, in means of its diagonal; more, where it takes
            more to invert it.
        directory: where finished leaves are kept, in files ``gptq*.jxc``. The same call goes on
            after them and comes to the same result bit for bit; what ``apply_fn`` and ``batches``
            do is not in the files, and must be the same.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        The quantized tree and a report.

    Raises:
        ValueError: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`; a damping
            below 0, a count below 1.
        TypeError: likewise.
        CheckpointError: a file is damaged.

    Example:
        >>> from jaxcomp.quantize.formats import Format
        >>> params = {"w": jnp.array([[7.0, 0.4], [0.4, -3.5], [0.4, 2.4]])}
        >>> batches = [jnp.array([[2.0, 1.0, 1.0], [-1.0, 1.1, 0.9]])]
        >>> found = gptq(lambda p, x: x @ p["w"], params, batches, Format(bits=4))
        >>> found.params["w"].decode()
        Array([[ 7. ,  0.5],
               [ 0. , -3.5],
               [ 1. ,  2.5]], dtype=float32)

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022, Algorithm 1.
    """
    check_count("block_size", block_size)
    check_amount("damping", damping)
    if not isinstance(order, bool):
        raise TypeError(f"order must be True or False, not {order!r:.60}")
    return quantize_leaves(
        "gptq",
        apply_fn,
        params,
        batches,
        rules,
        lambda task, leaf, moment: gptq_leaf(task, leaf, moment, order, block_size, damping),
        sequential=sequential,
        at_once=at_once,
        directory=directory,
        progress=progress,
        call={
            "order": str(order),
            "block_size": str(block_size),
            "damping": str(float(damping)),
        },
    )


def gptq_leaf(
    task: Task,
    leaf: Any,
    moment: Any,
    order: bool = True,
    block_size: int = 128,
    damping: Any = 0.01,
) -> CompressedArray:
    """One leaf by :func:`gptq`.

    Args:
        task: what to do with it.
        leaf: the weights.
        moment: ``(*groups, features, features)``, the mean of x xᵀ; None where there is none.
        order: as there.
        block_size: as there.
        damping: as there.

    Returns:
        What the format makes of it, with other codes.
    """
    if task.form is None or moment is None:
        return encode(leaf, task.format)
    leaf = jnp.asarray(leaf)
    work = automatic(partial(_round_leaf, task.form, task.format, order, block_size))
    codes, scales = work(leaf, moment, damping)
    return leaf_of(codes, scales, task.format, leaf.dtype)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _round_leaf(
    form: MatrixForm,
    format: AnyFormat,
    order: bool,
    block_size: int,
    leaf: Array,
    moment: Array,
    damping: Any,
) -> tuple[Array, Scales]:
    scales = find_scales(leaf, format)
    nearest, _ = find_codes(leaf, scales, format)
    scale, zero_point, _ = spread_scales(scales, form.shape, format)

    def solve(each: Any) -> Array:
        weight, moment, scale, zero_point, nearest = each
        codes = round_matrix(weight, moment, scale, zero_point, damping, format, order, block_size)
        error, error_of_nearest = (
            output_errors(element_values(c, scale, zero_point, format) - weight, moment)
            for c in (codes, nearest)
        )
        return jnp.where(error < error_of_nearest, codes, nearest)

    parts = (
        to_stack(form, leaf).astype(jnp.float32),
        moment.reshape(-1, form.features, form.features),
        to_stack(form, scale),
        None if zero_point is None else to_stack(form, zero_point),
        to_stack(form, nearest),
    )
    # One matrix at a time: a stack takes no more memory than its largest.
    codes = lax.map(solve, parts)
    return from_stack(form, codes), scales
