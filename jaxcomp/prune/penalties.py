"""Penalties that make weights small, or whole units zero, as terms of the user's loss.

A gradient step with a penalty brings weights near zero, never to it: for exact zeros put the
transformation of the same name in :mod:`jaxcomp.prune.proximal` into the optimizer instead.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import is_compressed
from jaxcomp.prune.masks import Structures, resolve
from jaxcomp.prune.structures import NM, Element, Structure, pool, units_shape

Where = Callable[[str, Any], bool]


def l1(params: Any, where: Where = tree_lib.is_weight) -> Float[Array, ""]:
    """The sum of the absolute values of the weights.

    Args:
        params: parameter tree, or a selection (:class:`~jaxcomp.tree.Leaves`), all of whose leaves
            are then meant.
        where: which leaves of a tree are weights; by default no biases and norms.

    Returns:
        A scalar, summed in float32. Its gradient is the sign, and 0 at 0.

    Raises:
        ValueError: no weights.
        TypeError: a chosen leaf is not a floating array.

    Example:
        >>> l1({"kernel": jnp.array([[-2.0, 1.0]]), "bias": jnp.array([5.0])})
        Array(3., dtype=float32)

    Source: Tibshirani, "Regression shrinkage and selection via the lasso", 1996, (1).
    """
    return _total(lambda path, leaf: jnp.sum(_absolute(leaf)), _chosen(params, where))


def l2(params: Any, where: Where = tree_lib.is_weight) -> Float[Array, ""]:
    """The sum of the squares of the weights.

    Args:
        params: as in :func:`l1`.
        where: as in :func:`l1`.

    Returns:
        A scalar, summed in float32; its gradient is twice the weight.

    Raises:
        ValueError: no weights.
        TypeError: a chosen leaf is not a floating array.

    Example:
        >>> l2({"kernel": jnp.array([[-2.0, 1.0]])})
        Array(5., dtype=float32)
    """
    return _total(lambda path, leaf: jnp.sum(jnp.square(leaf)), _chosen(params, where))


def group_lasso(
    params: Any, structure: Structures, where: Where = tree_lib.is_weight
) -> Float[Array, ""]:
    """The sum over units of ``sqrt(size) * norm``: units leave as a whole.

    Args:
        params: as in :func:`l1`.
        structure: what makes a unit (``Channel``, ``Block``, ``Kernel``; of ``Element`` it is
            :func:`l1`): one for all weights, or one by path pattern (a leaf that no pattern matches
            counts single weights).
        where: as in :func:`l1`.

    Returns:
        A scalar, summed in float32. Its gradient is ``sqrt(size) * weight / norm``, and 0 at a unit
        that is all zero.

    Raises:
        ValueError: no weights, a structure that does not fit a leaf, ``NM``, a pattern that matches
            no weight.
        TypeError: a chosen leaf is not a floating array, or the structure is none.

    Example:
        >>> from jaxcomp.prune.structures import Channel
        >>> kernel = jnp.array([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        >>> group_lasso({"kernel": kernel}, Channel(-1))
        Array(10., dtype=float32)

    Source: Yuan & Lin, "Model selection and estimation in regression with grouped variables", 2006,
    (2.1) with the kernel of section 2: the identity times the size of the group.
    """
    leaves = _chosen(params, where)
    structures = unit_structures(structure, leaves)

    def of_leaf(path: str, leaf: Array) -> Array:
        size = unit_size(structures[path], leaf.shape)
        return size * jnp.sum(root_mean_squares(structures[path], leaf))

    return _total(of_leaf, leaves)


def unit_structures(structure: Structures, leaves: tree_lib.Leaves) -> dict[str, Structure]:
    """The structure of each leaf, all of them of disjoint units.

    Raises:
        TypeError: as :func:`jaxcomp.prune.masks.resolve`.
        ValueError: so too, or a structure is ``NM``, whose weights compete but do not go together.

    Example:
        >>> unit_structures(NM(2, 4), tree_lib.Leaves(kernel=jnp.ones((4, 4))))
        Traceback (most recent call last):
        ...
        ValueError: kernel: NM(n=2, m=4, axis=-2) has no units that leave together: use ...
    """
    found = resolve(structure, leaves)
    for path, each in found.items():
        if isinstance(each, NM):
            raise ValueError(
                f"{path}: {each} has no units that leave together: use Element() for single "
                "weights, or Block, Channel or Kernel"
            )
    return found


def unit_size(structure: Structure, shape: tuple[int, ...]) -> int:
    """How many weights a unit has.

    Example:
        >>> from jaxcomp.prune.structures import Channel
        >>> unit_size(Channel(-1), (3, 4, 8))
        12
    """
    return math.prod(shape) // max(math.prod(units_shape(structure, shape)), 1)


def root_mean_squares(structure: Structure, leaf: Float[Array, "..."]) -> Float[Array, "..."]:
    """The norm of each unit over the square root of its size; differentiable at zero too.

    Args:
        structure: one that fits the leaf.
        leaf: weights.

    Returns:
        float32 of :func:`~jaxcomp.prune.structures.units_shape`. The gradient at an all-zero unit
        is 0.

    Example:
        >>> from jaxcomp.prune.structures import Channel
        >>> jax.grad(lambda w: jnp.sum(root_mean_squares(Channel(-1), w)))(jnp.zeros((2, 2)))
        Array([[0., 0.],
               [0., 0.]], dtype=float32)
    """
    if isinstance(structure, Element):
        return _absolute(leaf.astype(jnp.float32))
    leaf = leaf.astype(jnp.float32)
    # Scaled by the largest weight, so that no square over- or underflows that matters beside it.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(leaf), initial=0))
    largest = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    mean = pool(structure, jnp.square(leaf / largest))
    # The inner select keeps the infinite slope of the root at zero out of the gradient.
    root = jnp.where(mean > 0, jnp.sqrt(jnp.where(mean > 0, mean, 1)), mean)
    return largest * root


def _absolute(x: Array) -> Array:
    # The derivative of `jnp.abs` at 0 is 1, which would drive removed weights away from zero.
    return x * jax.lax.stop_gradient(jnp.sign(x))


def _chosen(params: Any, where: Where) -> tree_lib.Leaves:
    # NaN is not looked for: a loss term must cost nothing, and NaN shows in the loss itself.
    leaves = tree_lib.select(params, where, check=False)
    for path, leaf in leaves.items():
        kind = getattr(leaf, "dtype", None)
        if kind is None or is_compressed(leaf) or not jnp.issubdtype(kind, jnp.floating):
            kind = repr(leaf) if kind is None or is_compressed(leaf) else kind
            raise TypeError(f"{path}: {kind} is not a floating array: leave it out of `where`")
    return leaves


def _total(of_leaf: Callable[[str, Array], Array], leaves: tree_lib.Leaves) -> Array:
    total = jnp.zeros((), jnp.float32)
    for path, leaf in leaves.items():
        total = total + of_leaf(path, jnp.asarray(leaf).astype(jnp.float32))
    return total
