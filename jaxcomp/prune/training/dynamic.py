"""Sparse from the first step to the last: weights are dropped and others grown as training goes.

The number of weights never changes. Every so many steps the smallest are dropped and as many others
begin, at zero, with an optimizer that remembers nothing of them.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int32

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_key
from jaxcomp.compression import Compression, Params, State
from jaxcomp.kernels.threshold import smallest_masks, sortable_bits
from jaxcomp.prune import scores
from jaxcomp.prune.allocation import Allocation, erdos_renyi_kernel
from jaxcomp.prune.masks import Structures, check_ends, renew, resolve
from jaxcomp.prune.schedules import Schedule, constant
from jaxcomp.prune.structures import Element, Structure, is_local, pool, spread
from jaxcomp.prune.training import masked
from jaxcomp.sharding import placed_like

_HIGHEST = np.uint32(0xFFFFFFFF)

Grow = Callable[[str, Array, Any, Array], Array]


class DynamicBuffers(NamedTuple):
    """Buffers of :func:`rigl` and :func:`sparse_evolution`.

    Attributes:
        step: updates so far.
        masks: by path; True where a weight is there. All are until the first update.
    """

    step: Int32[Array, "..."]
    masks: dict[str, Bool[Array, "..."]]


def rigl(
    sparsity: float,
    end: int,
    *,
    key: Any,
    every: int = 100,
    fraction: float = 0.3,
    allocation: Allocation = erdos_renyi_kernel,
    structure: Structures = Element(),  # noqa: B008
) -> Compression:
    """Drop the smallest weights, grow those whose gradient is largest (RigL).

    The first update makes random masks. Then, every ``every`` steps before ``end``, a fraction of
    the weights that are there, falling as a cosine from ``fraction`` to 0, changes place. The
    gradient of absent weights costs nothing extra: they are zeros in the forward pass, and its
    gradient is taken with respect to them all the same. A state that is resumed with another
    ``sparsity`` or ``key`` keeps the masks that it has, and so their number.

    Args:
        sparsity: fraction absent, in [0, 1).
        end: step from which on the masks stand still; about three quarters of training is usual.
        key: a PRNG key, for the first masks.
        every: steps between changes.
        fraction: of the weights there that the first change replaces.
        allocation: how the sparsity is spread; one that needs no scores.
        structure: what comes and goes together; not N:M and not within groups.

    Returns:
        A method that lives in the weights.

    Raises:
        TypeError: ``key`` is no PRNG key.
        ValueError: a sparsity or fraction outside [0, 1), ``every`` or ``end`` below 1, an
            allocation that reads scores; from ``init``: a structure that does not fit a leaf.

    Example:
        >>> method = rigl(0.5, end=1000, key=jax.random.key(0))
        >>> params = {"kernel": jnp.ones((4, 4))}
        >>> state = method.update(params, method.init(params), params)
        >>> int(jnp.sum(method.apply(params, state)["kernel"]))
        8

    Source: Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020, section 3.
    """
    _check_fraction(fraction)
    if end < 1:
        raise ValueError(f"end must be at least 1 step, not {end}")

    def falling(step: Any) -> Any:
        return fraction / 2 * (1 + jnp.cos(jnp.pi * jnp.minimum(step, end) / end))

    def grow(path: str, leaf: Array, gradient: Any, step: Array) -> Array:
        del leaf, step
        if gradient is None:
            raise ValueError(f"{path}: RigL grows by gradients: pass grads to update")
        return jnp.abs(gradient)

    return _dynamic(sparsity, falling, grow, end, key, every, allocation, structure)


def sparse_evolution(
    sparsity: float,
    *,
    key: Any,
    every: int = 100,
    fraction: float = 0.3,
    end: int | None = None,
    allocation: Allocation = erdos_renyi_kernel,
    structure: Structures = Element(),  # noqa: B008
) -> Compression:
    """Drop the smallest weights, grow others at random (SET).

    The source drops the smallest positive and the largest negative weights, a fraction of each;
    here those of the smallest magnitude go, whatever their sign.

    Args:
        sparsity: fraction absent, in [0, 1).
        key: a PRNG key, for the first masks and for what grows.
        every: steps between changes.
        fraction: of the weights there that each change replaces.
        end: step from which on the masks stand still; None: they never do.
        allocation: how the sparsity is spread; one that needs no scores.
        structure: what comes and goes together; not N:M and not within groups.

    Returns:
        A method that lives in the weights.

    Raises:
        TypeError: ``key`` is no PRNG key.
        ValueError: as :func:`rigl`.

    Example:
        >>> method = sparse_evolution(0.5, key=jax.random.key(0))
        >>> params = {"kernel": jnp.ones((4, 4))}
        >>> state = method.update(params, method.init(params), params)
        >>> int(jnp.sum(method.apply(params, state)["kernel"]))
        8

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science", Nature Communications 2018, methods.
    """
    _check_fraction(fraction)
    if end is not None and end < 1:
        raise ValueError(f"end must be at least 1 step or None, not {end}")

    def grow(path: str, leaf: Array, gradient: Any, step: Array) -> Array:
        del gradient
        return _noise(jax.random.fold_in(key, step + 1), path, leaf)

    last = int(jnp.iinfo(jnp.int32).max) if end is None else end
    return _dynamic(
        sparsity, lambda step: jnp.float32(fraction), grow, last, key, every, allocation, structure
    )


def _dynamic(
    sparsity: float,
    fraction: Schedule,
    grow: Grow,
    end: int,
    key: Any,
    every: int,
    allocation: Allocation,
    structure: Structures,
) -> Compression:
    masked.check_every(every)
    schedule = constant(sparsity)
    check_key(key)
    if allocation.counts is None or allocation.reads_scores:
        raise ValueError(
            f"allocation.{allocation.name} ranks scores, and weights that are not there have none: "
            "give uniform, erdos_renyi_kernel or fixed"
        )

    def init(params: Params) -> State:
        leaves = tree_lib.select(params)
        structures = resolve(structure, leaves)
        for path, each in structures.items():
            if is_local(each):
                raise ValueError(f"{path}: {each} cannot grow and drop: give units of the leaf")
        check_ends(schedule, leaves, structures, allocation)
        everything = masked.keep_all(leaves)
        return State({}, DynamicBuffers(jnp.zeros((), jnp.int32), everything))

    def advance(leaves: Any, gradients: Any, buffers: DynamicBuffers) -> DynamicBuffers:
        step, masks = buffers
        structures = resolve(structure, leaves)

        def start() -> dict[str, Array]:
            noise = {path: _noise(key, path, leaf) for path, leaf in leaves.items()}
            return renew(noise, sparsity, structures, allocation)

        def change() -> dict[str, Array]:
            news = {}
            for path, leaf in leaves.items():
                gradient = None if gradients is None else gradients[path]
                wanted = grow(path, leaf, gradient, step)
                replaced = fraction(step)
                news[path] = _exchange(leaf, wanted, masks[path], replaced, structures[path])
            return news

        due = (step % every == 0) & (step < end)
        branch = jnp.where(step == 0, 0, jnp.where(due, 1, 2))
        masks = jax.lax.switch(branch, [start, change, lambda: masks])
        return DynamicBuffers(jnp.asarray(optax.safe_increment(step)), masks)

    method = masked.masked_method(init, masked.update_of(advance), structure)
    return method._replace(restart=masked.changed)


def _exchange(
    leaf: Array, wanted: Array, mask: Array, fraction: Any, structure: Structure
) -> Array:
    """Drop a fraction of the units that are there, and grow as many."""
    there = pool(structure, mask) > 0
    present = jnp.sum(there, dtype=jnp.uint32)
    drop = jnp.round(fraction * present.astype(jnp.float32)).astype(jnp.uint32)
    size = sortable_bits(pool(structure, scores.magnitude(leaf)))
    (left,) = smallest_masks((jnp.where(there, size, _HIGHEST),), drop)
    left &= there
    # Whoever is left stays; of the rest, also the dropped, the most wanted make up the number.
    rank = jnp.where(left, _HIGHEST, sortable_bits(pool(structure, wanted)))
    (new,) = smallest_masks((rank,), jnp.uint32(there.size) - present)
    return spread(structure, new, leaf)


def _noise(key: Any, path: str, leaf: Array) -> Array:
    """Uniform numbers, other ones for each leaf."""
    noise = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape)
    return placed_like(noise, leaf)


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction is that of the weights replaced, in [0, 1), not {fraction}")
