"""The norm of what each weight is multiplied by, laid along the weight's own axes."""

import glob
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.checks import choose
from jaxcomp.model.batches import peek, spread
from jaxcomp.model.observe import observe
from jaxcomp.model.statistics import Statistic, mean_square
from jaxcomp.model.trace import trace
from jaxcomp.model.uses import Use


def input_norms(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    paths: str | Sequence[str] | None = None,
    progress: bool | None = None,
) -> tree_lib.Leaves:
    """The Euclidean norm of everything that each weight is multiplied by, over all batches.

    For :func:`~jaxcomp.prune.scores.wanda`. A dense kernel has one norm for each input feature; a
    convolution one for each input channel and place in its window, padding and strides included. A
    stack of layers, experts and the groups of a convolution have norms of their own. See
    :func:`jaxcomp.model.observe`, which watches the model. For a convolution it holds the input of
    one batch as often as the window has places.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        batches: an iterable of inputs; a plain tuple is spread over ``inputs``.
        paths: patterns of the leaves to observe; if None, all that are compressed by default (see
            :func:`jaxcomp.tree.is_weight`).
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        By path, float32 that broadcasts against the leaf: full along its input and window axes (and
        its stacked and batch axes), 1 elsewhere.

    Raises:
        ValueError: there are no batches; a pattern matches no leaf; a chosen leaf is not multiplied
            by anything, or in ways that have no one norm (the message says which leaves, and why);
            a weight met NaN or infinite values.
        TypeError: ``batches`` is one array, or no iterable.

    Example:
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> batches = [jnp.array([[3.0, 1.0]]), jnp.array([[4.0, 0.0]])]
        >>> input_norms(lambda p, x: x @ p["kernel"] + p["bias"], params, batches)
        {'kernel': Array([[5.],
               [1.]], dtype=float32)}
    """
    first, batches = peek(batches)
    chosen = choose(params, paths)
    patterns = [glob.escape(path) for path in chosen]
    observed = observe(apply_fn, params, batches, _norm(), paths=patterns, progress=progress)
    traced = trace(apply_fn, params, *spread(first))
    found, reasons = tree_lib.Leaves(), dict(observed.unobserved)
    for key, value in observed.items():
        if key not in chosen:
            reasons[key] = f"used in several ways, of which {key} is one"
            continue
        uses = [costed.use for costed in traced.leaves[key].uses]
        use = next(use for use in uses if use.kind in ("dot", "conv"))
        try:
            found[key] = _laid_along(value, use, chosen[key].shape)
        except ValueError as reason:
            reasons[key] = str(reason)
    if reasons:
        listed = "; ".join(f"{key}: {reason}" for key, reason in reasons.items())
        raise ValueError(f"no input norms for {listed}: name the leaves that are meant with paths=")
    return tree_lib.Leaves((path, found[path]) for path in chosen)


def _norm() -> Statistic:
    # The sum is kept as two float32 numbers, so a million batches add up as well as one.
    return mean_square()._replace(
        name="the norm of inputs",
        finish=lambda state: jnp.sqrt(state.total.high + state.total.low),
        patches=True,
        measure_rows=None,
    )


def _laid_along(value: Any, use: Use, shape: tuple[int, ...]) -> Any:
    """A value of (stack, batch, groups, features) with one axis for each axis of the leaf."""

    def axes(*words: str) -> list[int]:
        return [axis for axis, role in enumerate(use.roles) if role in words]

    front = [*axes("stack"), *axes("batch")]
    inside = axes("input", "kernel") if use.kind == "conv" else axes("input")
    sizes = lambda which: tuple(shape[axis] for axis in which)
    groups = value.size // math.prod(sizes([*front, *inside]))
    outputs: list[int] = []
    if groups > 1:
        outputs = axes("output")
        value = value.reshape(*sizes(front), groups, *sizes(inside))
        value = jnp.take(value, _groups_of_outputs(use, outputs, groups), axis=len(front))
    order = [*front, *outputs, *inside]
    value = value.reshape(sizes(order)).transpose(np.argsort(order))
    return value.reshape([size if axis in order else 1 for axis, size in enumerate(shape)])


def _groups_of_outputs(use: Use, outputs: list[int], groups: int) -> np.ndarray:
    """For each output of a grouped convolution: whose inputs it reads."""
    axis_map = use.axes[outputs[0]] if len(outputs) == 1 else None
    params = use.op.params
    out = params["dimension_numbers"].rhs_spec[0]
    if axis_map is None:
        raise ValueError(f"the groups of {use.op} do not lie along one of its axes")
    held, places = axis_map.positions()
    width = use.op.inputs[1].shape[out] // params["feature_group_count"]
    place = places.get(out, np.zeros(held.size, int))[np.argsort(held)]
    return place // width % groups
