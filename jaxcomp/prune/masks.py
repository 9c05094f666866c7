"""The mask engine: from scores to masks at exact counts, in any structure, for any allocation.

Of equal scores those that come first in the array go first, so a mask never depends on the device,
the sharding or chance. Thresholds are found by counting, not by sorting.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxcomp import tree as tree_lib
from jaxcomp.kernels.threshold import (
    removal_count,
    smallest_masks,
    sortable_bits,
)
from jaxcomp.prune.allocation import Allocation, Part, uniform
from jaxcomp.prune.schedules import Schedule, check_sparsity
from jaxcomp.prune.structures import (
    NM,
    Element,
    Structure,
    check_structure,
    group_size,
    is_local,
    local_masks,
    pool,
    spread,
    units_shape,
)

Structures = Structure | Mapping[str, Structure]


def masks(
    scores: Any,
    sparsity: float | None = None,
    structure: Structures = Element(),  # noqa: B008
    allocation: Allocation = uniform,
) -> Any:
    """Masks that remove the units with the lowest scores, exactly as many as asked.

    Args:
        scores: tree of floating arrays, such as ``jax.tree.map(scores.magnitude, params)``, or a
            selection (:class:`~jaxcomp.tree.Leaves`), all of whose leaves are then meant.
        sparsity: fraction removed, in [0, 1), resolved to 1e-7; of ``n`` units
            ``round(sparsity * n)`` go. None where structure or allocation say it themselves:
            :class:`~jaxcomp.prune.structures.NM`, :func:`~jaxcomp.prune.allocation.fixed`.
        structure: what goes together; one for all leaves, or one by path pattern (a leaf that no
            pattern matches loses single weights).
        allocation: how the sparsity is spread over the leaves.

    Returns:
        A tree of booleans, True where a weight is kept. Leaves that are not weights (biases, norms)
        are kept whole.

    Raises:
        ValueError: sparsity outside [0, 1) or missing, NaN or infinite scores, no weights, a
            structure that does not fit a leaf, a leaf that would be left with nothing.

    Example:
        >>> masks({"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}, sparsity=0.5)
        {'kernel': Array([[ True, False],
               [False,  True]], dtype=bool)}
    """
    if sparsity is not None:
        check_sparsity("sparsity", sparsity)
    chosen = tree_lib.select(scores).items()
    leaves = tree_lib.Leaves((path, jnp.asarray(leaf)) for path, leaf in chosen)
    structures = resolve(structure, leaves)
    _check_runs(_foreseen(leaves, sparsity, structures, allocation), sparsity, structures)
    kept = _compiled(leaves, sparsity, tuple(structures.items()), allocation)
    check_kept(kept)
    everything = {
        path: jnp.ones(leaf.shape, bool) for path, leaf in tree_lib.flatten(scores).items()
    }
    return tree_lib.replace(scores, everything | kept)


@partial(jax.jit, static_argnames=("structures", "allocation"))
def _compiled(
    leaves: tree_lib.Leaves, sparsity: Any, structures: Any, allocation: Allocation
) -> dict[str, Any]:
    # One program for all leaves, instead of one for every operation on every shape.
    return renew(leaves, sparsity, dict(structures), allocation)


def apply_masks(params: Any, masks: Any) -> Any:
    """The weights, zero where a mask is False.

    Args:
        params: any pytree of arrays.
        masks: what :func:`masks` returned for it: a tree of the same structure, or a selection of
            leaves by path; leaves that it does not name stay.

    Returns:
        A tree of the same structure, shapes and dtypes.

    Raises:
        TypeError: a mask is None where the leaf is not, or not an array of booleans.
        ValueError: a mask has no leaf in ``params``, or another shape than its leaf; a tree of
            masks lacks a leaf of ``params``.

    Example:
        >>> apply_masks({"kernel": jnp.ones((1, 2))}, {"kernel": jnp.array([[True, False]])})
        {'kernel': Array([[1., 0.]], dtype=float32)}
    """
    if masks is None:
        raise TypeError("masks is None: pass what prune.masks(scores, ...) returned")
    is_none = lambda leaf: leaf is None
    leaves = tree_lib.flatten(params)
    # What is no array has no mask: partitioned Equinox modules are None there, and so are theirs.
    absent = {p for p, leaf in tree_lib.flatten(params, is_leaf=is_none).items() if leaf is None}
    chosen = tree_lib.flatten(masks, is_leaf=is_none)
    chosen = {path: m for path, m in chosen.items() if not (m is None and path in absent)}
    for path, mask in chosen.items():
        if path not in leaves:
            raise ValueError(
                f"{path}: a mask, but params have no such leaf; {tree_lib.nearest(path, leaves)}"
            )
        if mask is None:
            raise TypeError(
                f"{path}: the mask is None: leave the path out of a selection of masks, or give "
                "jnp.ones(shape, bool) to keep the whole leaf"
            )
        if getattr(mask, "dtype", None) != np.bool_:
            kind = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(f"{path}: a mask must be booleans, True where kept, not {kind}")
        if mask.shape != leaves[path].shape:
            raise ValueError(
                f"{path}: a mask of shape {mask.shape} does not fit weights of "
                f"{leaves[path].shape}: make masks from scores of these params"
            )
    missing = [path for path in leaves if path not in chosen]
    if missing and not isinstance(masks, tree_lib.Leaves):
        raise ValueError(
            f"{missing[0]}: no mask for this leaf: give a tree like params, or a selection, "
            "jaxcomp.tree.Leaves({path: mask})"
        )
    zeroed = {path: zero_out(leaves[path], mask) for path, mask in chosen.items()}
    return tree_lib.replace(params, zeroed)


def zero_out(leaf: Any, mask: Any) -> Any:
    """One leaf, zero where its mask is False; NaN does not survive there.

    Example:
        >>> zero_out(jnp.array([2.0, jnp.nan]), jnp.array([True, False]))
        Array([2., 0.], dtype=float32)
    """
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def resolve(structure: Structures, leaves: Mapping[str, Any]) -> dict[str, Structure]:
    """The structure of each leaf, checked against its shape.

    Args:
        structure: one, or by path pattern.
        leaves: by path.

    Raises:
        TypeError: no structure.
        ValueError: one that does not fit, or a pattern that matches no leaf.

    Example:
        >>> resolve({"a*": NM(2, 4)}, {"a": jnp.ones((4, 4)), "b": jnp.ones((3, 3))})
        {'a': NM(n=2, m=4, axis=-2), 'b': Element(within=None)}
    """
    if isinstance(structure, Mapping):
        chosen = tree_lib.assign(structure, leaves)
        found = {p: structure[chosen[p]] if p in chosen else Element() for p in leaves}
    else:
        found = dict.fromkeys(leaves, structure)
    for path, each in found.items():
        check_structure(path, each, tuple(leaves[path].shape))
    return {path: _hashable(each) for path, each in found.items()}


def _hashable(structure: Any) -> Structure:
    """The same with tuples for lists, for ``jit`` to tell structures apart by."""
    parts = (tuple(part) if isinstance(part, list) else part for part in structure)
    return type(structure)(*parts)


def renew(
    scores: Mapping[str, Array],
    sparsity: Any,
    structures: Mapping[str, Structure],
    allocation: Allocation,
    kept: Mapping[str, Bool[Array, "..."]] | None = None,
) -> dict[str, Bool[Array, "..."]]:
    """Masks at a sparsity, inside ``jit`` or out of it; :func:`masks` without its checks.

    Args:
        scores: by path.
        sparsity: fraction removed, traced or not; None as in :func:`masks`.
        structures: by path, from :func:`resolve`.
        allocation: how the sparsity is spread.
        kept: earlier masks, or None. What they removed goes first, so it stays removed, even if
            that is more than the sparsity asks for.

    Returns:
        Masks by path.

    Example:
        >>> renew({"a": jnp.array([3.0, 1.0])}, 0.5, {"a": Element()}, uniform)
        {'a': Array([ True, False], dtype=bool)}
    """
    parts, keys = {}, {}
    for path, leaf in scores.items():
        units = pool(structures[path], leaf)
        keys[path] = sortable_bits(units)
        if kept is not None:
            gone = pool(structures[path], kept[path]) == 0
            # Zero is below the key of every score.
            keys[path] = jnp.where(gone, jnp.uint32(0), keys[path])
            units = jnp.where(gone, 0.0, units)
        read = units if allocation.reads_scores else None
        parts[path] = Part(tuple(leaf.shape), units.size, read)
    counts = _counts(parts, sparsity, structures, allocation)
    news = _masks_of_units(keys, counts, sparsity, structures)
    spreads = {path: spread(structures[path], news[path], leaf) for path, leaf in scores.items()}
    return spreads if kept is None else {path: m & kept[path] for path, m in spreads.items()}


def _counts(
    parts: Mapping[str, Part],
    sparsity: Any,
    structures: Mapping[str, Structure],
    allocation: Allocation,
) -> dict[str, Any]:
    """How many units each leaf loses, or each group of a local structure.

    Leaves that share one threshold are left out.
    """
    if sparsity is None and allocation.needs_sparsity:
        for path in parts:
            if not isinstance(structures[path], NM):
                raise ValueError(
                    f"{path}: {structures[path]} needs a sparsity: pass one in [0, 1), or spread "
                    "it with allocation.fixed({pattern: sparsity})"
                )
        return {path: _at_most(structures[path]) for path in parts}
    each: dict[str, Any] = {}
    if allocation.counts is not None:
        each = dict(zip(parts, allocation.counts(parts, sparsity), strict=True))
    for path, part in parts.items():
        if not is_local(structures[path]):
            continue
        size = group_size(structures[path], part.shape)
        if allocation.counts is None or allocation is uniform:
            # Rounded once: the leaf's count, shared out, might be rounded to another side.
            (each[path],) = removal_count(jnp.asarray(sparsity, jnp.float32), (size,))
        else:
            groups = part.units // size
            whole, rest = each[path] // groups, each[path] % groups
            each[path] = whole + (rest >= (groups + 1) // 2).astype(jnp.uint32)
    return each


def _at_most(structure: Any) -> int:
    """How many of a run of :class:`NM` go."""
    return structure.m - structure.n


def _masks_of_units(
    keys: Mapping[str, Array],
    counts: Mapping[str, Any],
    sparsity: Any,
    structures: Mapping[str, Structure],
) -> dict[str, Array]:
    news = {}
    for path, count in counts.items():
        structure = structures[path]
        if is_local(structure):
            if isinstance(structure, NM):
                count = jnp.minimum(count, _at_most(structure))
            news[path] = local_masks(structure, keys[path], count)
        else:
            (news[path],) = smallest_masks((keys[path],), count)
    joint = {path: key for path, key in keys.items() if path not in counts}
    if joint:
        (total,) = removal_count(sparsity, (sum(key.size for key in joint.values()),))
        found = smallest_masks(tuple(joint.values()), total)
        news.update(zip(joint, found, strict=True))
    return news


def check_kept(masks: Mapping[str, Bool[Array, "..."]]) -> None:
    """Raise where known masks leave nothing of a leaf.

    Args:
        masks: by path; traced ones are not looked at.

    Raises:
        ValueError: a leaf would be empty.

    Example:
        >>> check_kept({"head/kernel": jnp.zeros((2, 2), bool)})
        Traceback (most recent call last):
        ...
        ValueError: head/kernel: all 4 weights would be removed and nothing would pass: ask for ...
    """
    for path, mask in masks.items():
        if not isinstance(mask, jax.core.Tracer) and not bool(jnp.any(mask)):
            raise ValueError(
                f"{path}: all {mask.size} weights would be removed and nothing would pass: ask for "
                "a lower sparsity, spread it otherwise (allocation.uniform, lamp), or leave this "
                "leaf out"
            )


def check_ends(
    schedule: Schedule,
    leaves: Mapping[str, Any],
    structures: Mapping[str, Structure],
    allocation: Allocation,
) -> None:
    """Raise where the sparsity that a schedule ends with is none, or cannot be reached.

    Args:
        schedule: function of the step to the sparsity.
        leaves: by path.
        structures: by path.
        allocation: one that reads the scores, or ranks all leaves together, cannot be foreseen.

    Raises:
        ValueError: a sparsity outside [0, 1), or more than :class:`NM` removes; a leaf would be
            empty.
    """
    with jax.ensure_compile_time_eval():
        final = float(schedule(jnp.iinfo(jnp.int32).max - 1))
    if not 0 <= final < 1:
        raise ValueError(
            f"the schedule ends with a sparsity of {final:.4g}: it is the fraction of weights "
            "removed, in [0, 1)"
        )
    counts = _foreseen(leaves, final, structures, allocation)
    _check_runs(counts, final, structures)
    for path, count in counts.items():
        structure, shape = structures[path], tuple(leaves[path].shape)
        local = is_local(structure)
        most = group_size(structure, shape) if local else math.prod(units_shape(structure, shape))
        if count >= most:
            raise ValueError(
                f"{path}: all {most} units{' of each group' if local else ''} would be removed at "
                f"the end of the schedule, at a sparsity of {final:.4g}: ask for less, or leave "
                "this leaf out"
            )


def _foreseen(
    leaves: Mapping[str, Any],
    sparsity: Any,
    structures: Mapping[str, Structure],
    allocation: Any,
) -> dict[str, int]:
    """What :func:`_counts` will be, as far as it does not hang on scores."""
    if not isinstance(allocation, Allocation):
        raise TypeError(
            "allocation must be one of prune.allocation, such as allocation.lamp, not "
            f"{allocation!r:.60}"
        )
    if allocation.reads_scores:
        return {}
    parts = {}
    for path, leaf in leaves.items():
        shape = tuple(leaf.shape)
        parts[path] = Part(shape, math.prod(units_shape(structures[path], shape)))
    with jax.ensure_compile_time_eval():
        counts = _counts(parts, sparsity, structures, allocation)
        return {path: int(count) for path, count in counts.items()}


def _check_runs(
    counts: Mapping[str, int], sparsity: float | None, structures: Mapping[str, Structure]
) -> None:
    for path, count in counts.items():
        structure = structures[path]
        if isinstance(structure, NM) and count > _at_most(structure):
            asked = (
                "its allocation asks for more" if sparsity is None else f"sparsity is {sparsity}"
            )
            raise ValueError(
                f"{path}: {structure} removes at most {1 - structure.n / structure.m:.3g}, and "
                f"{asked}, so that {count} of {structure.m} would go: ask for less, spread it "
                f"otherwise, or keep fewer of {structure.m}"
            )
