"""Cut channels of a network at random, and compare what zeroing and removing them give."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.model import ChannelGroup, couple, rewrite


class Pair(NamedTuple):
    """One network twice: with channels zeroed, and without them."""

    groups: tuple[ChannelGroup, ...]
    kept: dict[str, tuple[np.ndarray, ...]]
    masked: Any
    small: Any
    smaller: Any


def cut_units(groups: Any, units: dict[str, np.ndarray], params: Any) -> dict[str, Any]:
    """What stays of each leaf's axes when each group loses some units."""
    leaves = tree_lib.flatten(params, is_leaf=lambda _: False)
    stays = {path: [np.ones(n, bool) for n in leaf.shape] for path, leaf in leaves.items()}
    for group in groups:
        for part in group.slices if group.name in units else ():
            stays[part.path][part.axis][part.positions[units[group.name]].ravel()] = False
    return {path: tuple(np.flatnonzero(s) for s in axes) for path, axes in stays.items()}


def cut(apply_fn: Any, params: Any, inputs: Any, seed: int = 0, renormalize: bool = False) -> Pair:
    """Remove a random number of random units of every group that can be cut."""
    rng = np.random.default_rng(seed)
    groups = couple(apply_fn, params, *inputs, renormalize=renormalize)
    units = {
        group.name: rng.permutation(group.size)[: rng.integers(1, group.size)]
        for group in groups
        if group.fixed is None
    }
    kept = cut_units(groups, units, params)
    leaves = tree_lib.flatten(params, is_leaf=lambda _: False)
    masked, small = {}, {}
    for path, leaf in leaves.items():
        mask = np.zeros(leaf.shape, bool)
        mask[np.ix_(*kept[path])] = True
        # Written without the package's own code for this, which is what is tested.
        # In NumPy, since indexing with JAX compiles a program for every shape.
        whole = np.asarray(leaf)
        masked[path] = leaf if leaf.ndim == 0 else jax.device_put(np.where(mask, whole, whole * 0))
        small[path] = leaf if leaf.ndim == 0 else jax.device_put(whole[np.ix_(*kept[path])])
    structure = jax.tree.structure(params)
    return Pair(
        groups,
        kept,
        jax.tree.unflatten(structure, [masked[path] for path in leaves]),
        jax.tree.unflatten(structure, [small[path] for path in leaves]),
        rewrite(apply_fn, params, kept, renormalize),
    )


def difference(first: Any, second: Any) -> float:
    """The greatest difference of two trees, relative to the greatest value of each array."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        worst = max(worst, float(np.abs(a - b).max(initial=0) / (np.abs(a).max(initial=0) + 1e-30)))
    return worst
