"""How a sparsity is spread over the leaves: the same everywhere, by shape, by rank, or as given."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcomp import tree as tree_lib
from jaxcomp.kernels.threshold import (
    removal_count,
    removal_count_exact,
    smallest_masks,
    sortable_bits,
)
from jaxcomp.prune.schedules import check_sparsity
from jaxcomp.sharding import automatic


class Part(NamedTuple):
    """What an allocation is told of a leaf.

    Attributes:
        shape: of the leaf.
        units: how many units the leaf has; single weights, unless a structure makes it fewer.
        scores: float32, one a unit; None where the allocation does not read them.
    """

    shape: tuple[int, ...]
    units: int
    scores: Any = None


class Allocation(NamedTuple):
    """A way of spreading a sparsity over leaves.

    Attributes:
        name: for messages.
        counts: ``counts(parts, sparsity) -> uint32 (leaves,)``: from parts by path and the overall
            sparsity (a number, traced or not) to how many units each leaf loses. None: one
            threshold over all leaves together decides.
        reads_scores: whether ``counts`` reads the scores; it is told none otherwise.
        needs_sparsity: whether the overall sparsity must be given; ``counts`` takes None otherwise.
    """

    name: str
    counts: Callable[[Mapping[str, Part], Any], Array] | None
    reads_scores: bool = False
    needs_sparsity: bool = True


def _uniform(parts: Mapping[str, Part], sparsity: Any) -> Array:
    return removal_count(sparsity, tuple(part.units for part in parts.values()))


uniform = Allocation("uniform", _uniform)
"""Each leaf loses the same fraction: of ``n`` units, ``round(sparsity * n)``."""

global_threshold = Allocation("global_threshold", None)
"""The lowest scores of all leaves together go, wherever they are."""


def _erdos_renyi_kernel(parts: Mapping[str, Part], sparsity: Any) -> Array:
    density = np.array([sum(part.shape) / math.prod(part.shape) for part in parts.values()])
    sizes = jnp.array([part.units for part in parts.values()], jnp.uint32)
    kept = _share(parts, 1 - jnp.asarray(sparsity, jnp.float32), density)
    return _exact(sizes - kept, sizes, _total(parts, sparsity))


erdos_renyi_kernel = Allocation("erdos_renyi_kernel", _erdos_renyi_kernel)
"""Densities in proportion to the sum of a leaf's sizes over their product (ERK).

Small leaves stay dense, large ones pay. A leaf whose share would pass 1 is dense, and the others
make up for it; the total is exact.

Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science", Nature Communications 2018; for kernels: Evci et al.,
"Rigging the lottery", ICML 2020, section 3, (1).
"""


def _lamp(parts: Mapping[str, Part], sparsity: Any) -> Array:
    keys = [automatic(_lamp_keys)(part.scores) for part in parts.values()]
    kept = smallest_masks(keys, _total(parts, sparsity))
    return jnp.stack([jnp.sum(~mask, dtype=jnp.uint32) for mask in kept])


def _lamp_keys(scores: Array) -> Array:
    """LAMP's scores of one leaf in rising order, as keys."""
    ordered = jnp.sort(jnp.ravel(scores))
    # Scaled, so that no square under- or overflows that matters beside the largest.
    largest = jnp.maximum(jnp.max(ordered), jnp.finfo(jnp.float32).tiny)
    squares = jnp.square(ordered / largest)
    rest = jnp.cumsum(squares[::-1])[::-1]
    return sortable_bits(jnp.where(squares > 0, squares / rest, 0))


lamp = Allocation("lamp", _lamp, reads_scores=True)
"""A global threshold over scores relative to the leaf's own: no leaf is starved for being small.

A unit's score squared is divided by the sum of the squares of those in its leaf that are no lower.
Made for magnitudes; any scores that are not negative will do. It sorts each leaf, and gathers it
for that where it is sharded.

Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021, (4).
"""


def fixed(sparsities: Mapping[str, float]) -> Allocation:
    """Sparsities by leaf, as given; or in proportion to these, to reach another in all.

    Args:
        sparsities: fractions in [0, 1) by path pattern; the first that matches a leaf has it, and a
            leaf that none matches loses nothing.

    Returns:
        An allocation. Where the overall sparsity is None it is taken as it stands; otherwise every
        fraction is scaled alike, at most to the whole leaf, until the total is right.

    Raises:
        TypeError: no dict of numbers.
        ValueError: a fraction outside [0, 1), or all are 0; when used: a pattern matches no leaf.

    Example:
        >>> from jaxcomp.prune.masks import masks
        >>> scores = {"body": jnp.array([[1.0, 2.0]]), "head": jnp.array([[1.0, 2.0]])}
        >>> masks(scores, allocation=fixed({"body": 0.5}))
        {'body': Array([[False,  True]], dtype=bool), 'head': Array([[ True,  True]], dtype=bool)}
    """
    if not isinstance(sparsities, Mapping):
        raise TypeError(f"sparsities must be a dict of fractions by path, not {sparsities!r:.60}")
    for pattern, sparsity in sparsities.items():
        check_sparsity(f"{pattern}: sparsity", sparsity)
    if not any(sparsities.values()):
        raise ValueError("every sparsity is 0: nothing would be removed")

    def counts(parts: Mapping[str, Part], sparsity: Any) -> Array:
        chosen = tree_lib.assign(sparsities, parts)
        each = [sparsities[chosen[path]] if path in chosen else 0.0 for path in parts]
        if sparsity is None:
            exact = zip(each, parts.values(), strict=True)
            return jnp.array([removal_count_exact(s, part.units) for s, part in exact], jnp.uint32)
        # Here what goes is in proportion, and above it was what stays.
        removed = _share(parts, sparsity, np.array(each))
        sizes = [part.units if s else 0 for s, part in zip(each, parts.values(), strict=True)]
        return _exact(removed, jnp.array(sizes, jnp.uint32), _total(parts, sparsity))

    return Allocation("fixed", counts, needs_sparsity=False)


def _total(parts: Mapping[str, Part], sparsity: Any) -> Array:
    return removal_count(sparsity, (sum(part.units for part in parts.values()),))[0]


def _share(parts: Mapping[str, Part], fraction: Any, weights: Any) -> Array:
    """Units of each leaf: a fraction of all, shared in proportion to ``weights``, none above 1."""
    sizes = np.array([part.units for part in parts.values()], np.float64)
    order = np.argsort(-weights, kind="stable")
    wanted = jnp.asarray(fraction, jnp.float32) * jnp.float32(sizes.sum())
    # The leaves with the largest weights reach 1 first. With `full` of them whole, the others share
    # what is left; the first number of whole leaves that leaves nobody above 1 is right.
    ordered_sizes, ordered_weights = sizes[order], weights[order]
    whole = np.concatenate([[0.0], np.cumsum(ordered_sizes)])[:-1]
    mass = np.cumsum((ordered_sizes * ordered_weights)[::-1])[::-1]
    safe = np.where(mass > 0, mass, np.inf)
    scale = (wanted - jnp.asarray(whole, jnp.float32)) / jnp.asarray(safe, jnp.float32)
    fits = scale * jnp.asarray(ordered_weights, jnp.float32) <= 1
    first = jnp.argmax(fits)
    fractions = jnp.clip(scale[first] * jnp.asarray(weights, jnp.float32), 0, 1)
    rank = np.argsort(order)
    fractions = jnp.where((jnp.asarray(rank) < first) | ~jnp.any(fits), 1.0, fractions)
    fractions = jnp.where(jnp.asarray(weights) > 0, fractions, 0.0)
    counts = jnp.floor(fractions * jnp.asarray(sizes, jnp.float32)).astype(jnp.uint32)
    # Beyond 2**24 a size in float32 may be rounded up.
    return jnp.minimum(counts, jnp.asarray(sizes.astype(np.uint32)))


def _exact(removed: Array, most: Array, total: Array) -> Array:
    """Counts near ``removed``, each at most ``most``, that add up to ``total``."""
    missing = (total - jnp.sum(removed, dtype=jnp.uint32)).astype(jnp.int32)
    room = jnp.where(missing >= 0, most - removed, removed).astype(jnp.int32)
    # Whoever has least room is asked first, so that the last can always take what is left.
    order = jnp.argsort(room)

    def ask(missing: Array, leaf: tuple[Array, Array]) -> tuple[Array, Array]:
        room, waiting = leaf
        share = jnp.minimum(jnp.abs(missing) // waiting, room) * jnp.sign(missing)
        return missing - share, share

    waiting = jnp.arange(len(removed), 0, -1, dtype=jnp.int32)
    _, shares = jax.lax.scan(ask, missing, (room[order], waiting))
    return (removed.astype(jnp.int32).at[order].add(shares)).astype(jnp.uint32)
