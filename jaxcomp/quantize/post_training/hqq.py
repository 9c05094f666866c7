"""HQQ: ranges that suit most weights, found without data."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxcomp.quantize.affine import encode
from jaxcomp.quantize.formats import AnyFormat
from jaxcomp.quantize.post_training.walk import Quantized, quantize_leaves
from jaxcomp.quantize.ranges import HalfQuadratic


def hqq(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None,
    rules: Any,
    *,
    range: Any = HalfQuadratic(),  # noqa: B008
    sequential: bool = True,
    at_once: int = 8,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Quantized:
    """Round to nearest, with ranges that leave outliers to themselves.

    :func:`~jaxcomp.quantize.post_training.round_to_nearest.round_to_nearest` of the same formats
    with the range :class:`~jaxcomp.quantize.ranges.HalfQuadratic`.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        batches: as there: they say which axes are summed over and measure output errors, and may
            be None for models in Flax's layouts.
        rules: see :func:`~jaxcomp.quantize.post_training.tasks.plan`; the formats' own ranges are
            not used.
        range: a :class:`~jaxcomp.quantize.ranges.HalfQuadratic`.
        sequential: as there.
        at_once: as there.
        directory: where finished leaves are kept; the same call goes on after them.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        The quantized tree and a report.

    Raises:
        ValueError: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`.
        TypeError: likewise; ``range`` is another one.
        CheckpointError: a file is damaged.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.quantize.formats import Format
        >>> from jaxcomp.quantize.post_training.round_to_nearest import round_to_nearest
        >>> params = {"w": jnp.array([[1.0], [-0.9], [0.8], [-1.1], [1.2], [-0.7], [0.9], [3.4]])}
        >>> model = lambda p, x: x @ p["w"]
        >>> found = hqq(model, params, None, Format(bits=2, symmetric=False))
        >>> nearest = round_to_nearest(model, params, None, Format(bits=2, symmetric=False))
        >>> found.leaves[0].weight_error < nearest.leaves[0].weight_error
        True

    Source: Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023.
    """
    if not isinstance(range, HalfQuadratic):
        raise TypeError(
            f"range must be a HalfQuadratic(...), not {range!r}: formats keep theirs in "
            "round_to_nearest"
        )

    def ranged(format: Any) -> Any:
        # What is no format is named by the walk.
        return dataclasses.replace(format, range=range) if isinstance(format, AnyFormat) else format

    if isinstance(rules, Mapping):
        rules = {pattern: ranged(format) for pattern, format in rules.items()}
    else:
        rules = ranged(rules)
    return quantize_leaves(
        "hqq",
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
