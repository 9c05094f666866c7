"""AdaRound on a whole model: for each weight, up or down, by what its leaf's inputs make of it."""

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
from jaxcomp.quantize.affine import encode, leaf_of
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.post_training.adaround_matrix import adaround_matrix
from jaxcomp.quantize.post_training.walk import Quantized, Task, quantize_leaves
from jaxcomp.quantize.scales import Scales, find_scales, spread_scales
from jaxcomp.sharding import automatic


def adaround(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    rules: Any,
    *,
    steps: int = 500,
    learning_rate: float = 0.03,
    penalty: float = 0.3,
    sequential: bool = True,
    at_once: int = 1,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Quantized:
    """Learn for each weight whether it is rounded up or down, by the error of the outputs.

    Scales are those of the format, and each weight becomes one of its two neighbouring levels. The
    error is measured on the second moments of the inputs, so that no step reads data. An output
    that did not gain keeps its weights rounded to nearest, and so does a leaf that no product
    reads; none loses more on the batches than rounded to nearest. GPTQ, which may move a weight by
    more than a step, costs less time and usually comes further.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        batches: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`.
        rules: see :func:`~jaxcomp.quantize.post_training.tasks.plan`.
        steps: of Adam, for each leaf; 0: single weights only move where that alone helps.
        learning_rate: of Adam.
        penalty: weight of the regularizer that drives weights to their levels, in units of what a
            step of a weight alone does to its output; 0: as ``steps=0``.
        sequential: whether a pass runs the model with all earlier leaves as they became, or else
            the dense one.
        at_once: leaves a pass over the batches, and second moments held.
        directory: where finished leaves are kept; the same call goes on after them.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        The quantized tree and a report.

    Raises:
        ValueError: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`; a number below
            0.
        TypeError: likewise.
        CheckpointError: a file is damaged.

    Example:
        >>> from jaxcomp.quantize.formats import Format
        >>> params = {"w": jnp.array([[0.4], [0.4], [7.0]])}
        >>> batches = [jnp.array([[1.0, 1.1, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])]
        >>> found = adaround(lambda p, x: x @ p["w"], params, batches, Format(bits=4))
        >>> found.params["w"].decode()[:, 0].sum()
        Array(8., dtype=float32)

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
    section 3.2.
    """
    check_count("steps", steps, least=0)
    check_amount("learning_rate", learning_rate)
    check_amount("penalty", penalty)
    return quantize_leaves(
        "adaround",
        apply_fn,
        params,
        batches,
        rules,
        lambda task, leaf, moment: adaround_leaf(task, leaf, moment, steps, learning_rate, penalty),
        sequential=sequential,
        at_once=at_once,
        directory=directory,
        progress=progress,
        call={
            "steps": str(steps),
            "learning_rate": str(float(learning_rate)),
            "penalty": str(float(penalty)),
        },
    )


def adaround_leaf(
    task: Task,
    leaf: Any,
    moment: Any,
    steps: int = 500,
    learning_rate: float = 0.03,
    penalty: float = 0.3,
) -> CompressedArray:
    """One leaf by :func:`adaround`.

    Args:
        task: what to do with it.
        leaf: the weights.
        moment: ``(*groups, features, features)``, the mean of x xᵀ; None where there is none.
        steps: of Adam.
        learning_rate: of Adam.
        penalty: weight of the regularizer.

    Returns:
        What the format makes, with other codes.
    """
    if task.form is None or moment is None:
        return encode(leaf, task.format)
    work = partial(_round, task.form, task.format, steps)
    codes, scales = automatic(work)(leaf, moment, learning_rate, penalty)
    return leaf_of(codes, scales, task.format, leaf.dtype)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _round(
    form: MatrixForm,
    format: AnyFormat,
    steps: int,
    leaf: Array,
    moment: Array,
    learning_rate: Any,
    penalty: Any,
) -> tuple[Array, Scales]:
    scales = find_scales(leaf, format)
    spread = spread_scales(scales, form.shape, format)

    given = {
        "weights": to_stack(form, leaf).astype(jnp.float32),
        "moment": moment.reshape(-1, form.features, form.features),
        "scale": to_stack(form, spread.scale),
        "zero_point": None if spread.zero_point is None else to_stack(form, spread.zero_point),
    }
    # One matrix at a time: a stack takes no more memory than its largest.
    codes = lax.map(
        lambda each: adaround_matrix(
            **each, format=format, steps=steps, learning_rate=learning_rate, penalty=penalty
        ),
        given,
    )
    return from_stack(form, codes), scales
