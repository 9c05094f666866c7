"""WANDA: pruning after training by weight times input norm, compared output by output."""

import glob
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxcomp import tree as tree_lib
from jaxcomp.checks import choose
from jaxcomp.model.batches import peek, spread
from jaxcomp.model.trace import ModelTrace, trace
from jaxcomp.prune import scores
from jaxcomp.prune.masks import masks, resolve
from jaxcomp.prune.post_training.input_norms import input_norms
from jaxcomp.prune.schedules import check_sparsity
from jaxcomp.prune.structures import NM, Element, Structure


def wanda(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    sparsity: float | None = None,
    structure: NM | None = None,
    *,
    paths: str | Sequence[str] | None = None,
    progress: bool | None = None,
) -> tree_lib.Leaves:
    """Masks that remove, at each output, the weights of the lowest ``|w| · ‖x‖₂``.

    Which axes of a leaf are inputs and which are outputs is read from what the model does with it,
    so transposed kernels, attention heads, convolutions, experts and stacks of layers are compared
    as the matrices that they are. Every output loses the same number of weights. All norms are
    those of the dense model: one pass over the batches serves all layers, where the paper observes
    each block behind the pruned blocks before it.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        batches: an iterable of inputs; a plain tuple is spread over ``inputs``.
        sparsity: fraction removed in each output's group; None with ``structure=NM(...)``.
        structure: None, or :class:`~jaxcomp.prune.structures.NM` for runs of neighbouring inputs.
            They lie along the leaf's own (last) input axis, whatever ``axis`` says.
        paths: patterns of the leaves to prune; if None, all that are compressed by default (see
            :func:`jaxcomp.tree.is_weight`). Embeddings are looked up, not multiplied: leave them
            out.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        Masks by path, True where kept, for :func:`jaxcomp.prune.apply_masks`.

    Raises:
        ValueError: sparsity outside of [0, 1) or missing; a chosen leaf has no input norms, or uses
            that disagree on its outputs (the message names it); runs that do not fit; no batches.
        TypeError: ``batches`` is one array, or no iterable; another structure.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[1.0, -3.0], [2.0, 2.0]])}
        >>> batches = [jnp.array([[3.0, 1.0]])]
        >>> wanda(lambda p, x: x @ p["kernel"], params, batches, sparsity=0.5)["kernel"]
        Array([[ True,  True],
               [False, False]], dtype=bool)

    Source:
        Sun et al. 2023, *A Simple and Effective Pruning Approach for Large Language Models*,
        section 3.
    """
    if structure is not None and not isinstance(structure, NM):
        raise TypeError(
            f"structure must be NM(n, m), or None to compare all inputs of each output, not "
            f"{structure!r:.60}: prune.masks with scores.wanda and evidence.input_norms takes any"
        )
    if sparsity is None and structure is None:
        raise ValueError("pass sparsity, such as 0.5, or structure=NM(2, 4)")
    if sparsity is not None:
        check_sparsity("sparsity", sparsity)
    first, batches = peek(batches)
    weights = choose(params, paths)
    traced = trace(apply_fn, params, *spread(first))
    structures = {
        glob.escape(path): _structure(traced, path, leaf.ndim, structure)
        for path, leaf in weights.items()
    }
    resolve(structures, weights)
    names = list(structures)
    norms = input_norms(apply_fn, params, batches, paths=names, progress=progress)
    scored = tree_lib.Leaves((p, scores.wanda(leaf, norms[p])) for p, leaf in weights.items())
    return masks(scored, sparsity, structures)


def _structure(traced: ModelTrace, path: str, ndim: int, runs: NM | None) -> Structure:
    """What competes in a leaf: all inputs of each output, or runs of neighbouring inputs."""
    try:
        inputs = traced.input_axes(path)
    except ValueError as error:
        reason = str(error).partition("; name the axes")[0]
        raise ValueError(f"{reason}: name the leaves that are meant with paths=") from error
    if not inputs:
        raise ValueError(
            f"{path}: the model contracts nothing with it, so it has no inputs: name the leaves "
            "that are meant with paths="
        )
    if runs is not None:
        return runs._replace(axis=inputs[-1])
    within = tuple(
        axis for axis in range(ndim) if axis not in (*inputs, *traced.axes(path, "kernel"))
    )
    return Element(within or None)
