"""Round to nearest: what every other method is measured against."""

import os
from collections.abc import Callable, Iterable
from typing import Any

from jaxcomp.quantize.affine import encode
from jaxcomp.quantize.post_training.walk import Quantized, quantize_leaves


def round_to_nearest(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None,
    rules: Any,
    *,
    sequential: bool = True,
    at_once: int = 8,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Quantized:
    """Quantize each weight to the level next to it; the range is the format's.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        batches: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`. They say
            which axes are summed over, and measure output errors; their values change no code.
            None: formats are taken for Flax's layouts (other frameworks' kernels have their outputs
            first: give batches, or name the axes), and output errors are NaN.
        rules: see :func:`~jaxcomp.quantize.post_training.tasks.plan`.
        sequential: whether output errors are measured on what the quantized model makes of the
            batches, or the dense one.
        at_once: leaves a pass over the batches, and second moments held.
        directory: where finished leaves are kept; the same call goes on after them.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        The quantized tree and a report.

    Raises:
        ValueError: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`.
        TypeError: likewise.
        CheckpointError: a file is damaged.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.quantize.formats import Format
        >>> params = {"w": jnp.array([[7.0, -3.0], [0.6, 1.4]])}
        >>> found = round_to_nearest(lambda p, x: x @ p["w"], params, None, Format(bits=4))
        >>> found.params["w"].decode().round(2)
        Array([[ 7.  , -3.  ],
               [ 1.  ,  1.29]], dtype=float32)
    """
    return quantize_leaves(
        "round_to_nearest",
        apply_fn,
        params,
        batches,
        rules,
        lambda task, leaf, moment: encode(leaf, task.format),
        sequential=sequential,
        at_once=at_once,
        directory=directory,
        progress=progress,
        needs_data=False,
    )
