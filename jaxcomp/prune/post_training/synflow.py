"""SynFlow: pruning before training, without data, in many small rounds."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_count, check_function, choose
from jaxcomp.kernels.threshold import removal_count_exact, smallest_masks, sortable_bits
from jaxcomp.prune import scores
from jaxcomp.prune.masks import zero_out
from jaxcomp.prune.schedules import check_sparsity


def synaptic_flow(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    sparsity: float,
    rounds: int = 100,
    paths: str | Sequence[str] | None = None,
) -> tree_lib.Leaves:
    """Masks that keep the weights which carry most of the flow from inputs to outputs.

    The flow ``R`` is the sum of the outputs for inputs of ones, with every floating parameter
    replaced by its absolute value. In each round the weights with the lowest ``|w · ∂R/∂w|`` go, of
    all leaves together; ``(1 − sparsity)^(r/n)`` of them are left after round ``r`` of ``n``. In a
    network of ReLUs every layer holds the same total score, so many rounds never empty a layer,
    which one round can. All rounds are one compiled loop.

    Made for networks whose activations are positive where their inputs are. A LayerNorm takes away
    the mean, and with it the meaning of the flow.

    Args:
        apply_fn: a function of ``(params, *inputs)``; a normalization must use running statistics.
        params: any tree, as initialised.
        *inputs: of the shapes that the model takes. Floating ones are replaced by ones; others
            (token ids) are used as they are.
        sparsity: fraction removed of all chosen weights together, in [0, 1).
        rounds: how many.
        paths: patterns of the leaves to prune; if None, all that are compressed by default (see
            :func:`jaxcomp.tree.is_weight`).

    Returns:
        Masks by path, True where kept, for :func:`jaxcomp.prune.apply_masks`.

    Raises:
        ValueError: sparsity outside of [0, 1), no rounds, a pattern that matches no leaf; the flow
            is zero, NaN or infinite (in float32 it may overflow in networks deeper than some 20
            layers: enable float64 and cast ``params``); a leaf would be left with nothing.
        TypeError: ``apply_fn`` is no function, ``rounds`` no whole number, a leaf no array.

    Example:
        >>> params = {"up": jnp.array([[1.0, -3.0]]), "down": jnp.array([[2.0], [1.0]])}
        >>> def model(params, x):
        ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
        >>> synaptic_flow(model, params, jnp.ones((1, 1)), sparsity=0.5)
        {'down': Array([[False],
               [ True]], dtype=bool), 'up': Array([[False,  True]], dtype=bool)}

    Source:
        Tanaka et al. 2020, *Pruning neural networks without any data by iteratively conserving
        synaptic flow*, section 6, algorithm 1.
    """
    check_sparsity("sparsity", sparsity)
    check_count("rounds", rounds)
    check_function("apply_fn", apply_fn, "(params, *inputs)")
    chosen = tuple(choose(params, paths))
    sizes = [leaf.size for leaf in tree_lib.take(params, chosen).values()]
    counts = [
        removal_count_exact(1 - (1 - sparsity) ** (turn / rounds), sum(sizes))
        for turn in range(1, rounds + 1)
    ]
    ones = jax.tree.map(_one, inputs)
    prune = jax.jit(functools.partial(_prune, apply_fn, chosen))
    masks, flows = prune(params, ones, jnp.asarray(counts, jnp.uint32))
    flows = np.asarray(flows)
    if not np.all(np.isfinite(flows) & (flows != 0)):
        bad = int(np.argmin(np.isfinite(flows) & (flows != 0)))
        raise ValueError(
            f"round {bad}: the flow is {flows[bad]}, so no weight has a score: where it overflows, "
            "enable float64 and cast params; where it is zero, no path leads from the inputs to "
            "the outputs, or a normalization takes its mean away"
        )
    empty = [path for path, mask in masks.items() if not bool(jnp.any(mask))]
    if empty:
        raise ValueError(
            f"{empty[0]}: all {masks[empty[0]].size} weights would be removed and nothing would "
            "pass: ask for a lower sparsity or more rounds; where no flow depends on a leaf (keys "
            "and queries, behind their softmax), leave it out with paths="
        )
    return masks


def _prune(
    apply_fn: Callable[..., Any], chosen: tuple[str, ...], params: Any, ones: Any, counts: Any
) -> tuple[tree_lib.Leaves, Any]:
    positive = jax.tree.map(_positive, params)
    weights = tree_lib.take(positive, chosen)

    def flow(weights: Any) -> Any:
        outputs = jax.tree.leaves(apply_fn(tree_lib.replace(positive, weights), *ones))
        floats = [leaf for leaf in outputs if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum((jnp.sum(leaf) for leaf in floats), jnp.zeros(()))

    def turn(masks: Any, count: Any) -> Any:
        held = jax.tree.map(zero_out, weights, masks)
        total, pull = jax.vjp(flow, held)
        # Shares of the flow, not the flow itself: the order is the same and nothing overflows on
        # the way back.
        (slopes,) = pull(1 / jnp.abs(total))
        shares = jax.tree.map(scores.synaptic_flow, held, slopes)
        # Zero is below the key of every score, so what is removed stays removed.
        keys = [
            jnp.where(mask, sortable_bits(share.astype(jnp.float32)), jnp.uint32(0))
            for mask, share in zip(masks.values(), shares.values(), strict=True)
        ]
        return tree_lib.Leaves(zip(masks, smallest_masks(keys, count), strict=True)), total

    start = jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), weights)
    return jax.lax.scan(turn, start, counts)


def _positive(leaf: Any) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return jnp.abs(leaf).astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _one(x: Any) -> Any:
    dtype = jnp.asarray(x).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return x
    return jnp.ones_like(x, dtype=jnp.promote_types(dtype, jnp.float32))
