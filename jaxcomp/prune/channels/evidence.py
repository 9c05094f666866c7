"""What a channel score reads beside the weights: gradients and activations over batches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_function, one_number
from jaxcomp.model.batches import spread
from jaxcomp.model.observe import observe
from jaxcomp.model.statistics import mean_square
from jaxcomp.model.trace import trace
from jaxcomp.prune.channels.groups import Need
from jaxcomp.prune.post_training.sums import add_up


class Evidence(NamedTuple):
    """What scores are computed from, by path of the leaf.

    Attributes:
        gradients: the gradient of the loss, summed over batches.
        squared_gradients: squared gradients of each batch, summed over batches.
        activations: by (path, axis) of a weight, the mean square of what it reads there.
        key: a PRNG key.
    """

    gradients: Mapping[str, Any] | None = None
    squared_gradients: Mapping[str, Any] | None = None
    activations: Mapping[tuple[str, int], Any] | None = None
    key: Any = None


def gather_evidence(
    needs: frozenset[Need],
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: tuple[Any, ...],
    *,
    loss: Callable[..., Any] | None,
    batches: Iterable[Any] | None,
    key: Any,
    progress: bool | None = None,
) -> Evidence:
    """Compute what a score needs, and nothing else.

    Args:
        needs: which fields of :class:`Evidence`.
        apply_fn: the model.
        params: its parameters.
        inputs: inputs of the model, of which only the number counts here.
        loss: ``loss(params, *batch) -> scalar``, for gradients.
        batches: tuples; the loss takes all of one, the model its first ``len(inputs)`` items.
        key: a PRNG key, for scores that are random.
        progress: whether to show a progress bar; None: on a terminal, if it takes long.

    Returns:
        The evidence.

    Raises:
        TypeError: the loss is no function, or gives something else than one floating number.
        ValueError: something is needed and was not given, or given and not needed.
    """
    gradients = needs & {"gradients", "squared_gradients"}
    observes = "activations" in needs
    if gradients and loss is None:
        raise ValueError("this score reads gradients: pass loss, a function of (params, *batch)")
    if loss is not None:
        check_function("loss", loss, "(params, *batch) that returns one number")
    if (gradients or observes) and batches is None:
        raise ValueError("this score reads data: pass batches, an iterable of tuples")
    if "key" in needs and key is None:
        raise ValueError("this score is random: pass key, such as jax.random.key(0)")
    if loss is not None and not gradients:
        raise ValueError("this score reads no gradients: leave loss out")
    if batches is not None and not (gradients or observes):
        raise ValueError("this score reads no data: leave batches out")
    if gradients and observes:
        batches = list(batches or ())
    sums = squares = activations = None
    if gradients:
        assert loss is not None
        sums, squares = _gradients(loss, params, batches or (), progress)
    if observes:
        taken = (spread(batch)[: len(inputs)] for batch in batches or ())
        activations = _activations(apply_fn, params, inputs, taken, progress)
    return Evidence(sums, squares, activations, key)


def _gradients(
    loss: Callable[..., Any], params: Any, batches: Iterable[Any], progress: bool | None
) -> tuple[tree_lib.Leaves, ...]:
    """Sums of the gradients and of their squares, over batches."""

    def flatten(tree: Any) -> tree_lib.Leaves:
        leaves = tree_lib.flatten(tree, is_leaf=lambda _: False).items()
        return tree_lib.Leaves((p, x) for p, x in leaves if jnp.issubdtype(x.dtype, jnp.inexact))

    def term(params: Any, number: Any, *batch: Any) -> Any:
        number_of = lambda params: one_number(loss(params, *batch))
        gradient = flatten(jax.grad(number_of, allow_int=True)(params))
        wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), gradient)
        return wide, jax.tree.map(lambda x: jnp.abs(x) ** 2, wide)

    leaves = flatten(params)
    reals = jax.tree.map(jnp.real, leaves)
    return add_up(term, (leaves, reals), params, batches, "gradients", progress)[0]


def _activations(
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: tuple[Any, ...],
    batches: Iterable[Any],
    progress: bool | None,
) -> dict[tuple[str, int], Any]:
    """Mean squares of what each weight reads, along each of its input axes."""
    observed = observe(apply_fn, params, batches, mean_square(), progress=progress)
    traced = trace(apply_fn, params, *inputs)
    found = {}
    for path, value in observed.items():
        if path not in traced.leaves:
            continue  # a second use, under `path#2`
        shape = traced.leaves[path].shape
        axes = traced.input_axes(path)
        sizes = [shape[axis] for axis in axes]
        if int(np.prod(sizes)) != value.shape[-1]:
            continue
        # Layers of a stack, experts and groups of a convolution share their channels.
        grid = jnp.mean(value, tuple(range(value.ndim - 1))).reshape(sizes)
        for i, axis in enumerate(axes):
            others = tuple(j for j in range(len(axes)) if j != i)
            found[path, axis] = jnp.mean(grid, others)
    return found
