"""How much a channel matters: the scores of the literature, summed over a group of coupled slices.

Each takes a :class:`~jaxcomp.prune.channels.groups.ScoredGroup` and gives one number a unit; the
units with the lowest go first. A leaf that a group takes along two of its axes, such as the square
kernel of a recurrent layer, is two slices and counts once in each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.prune.channels.groups import ScoredGroup, needs

# Names that Linen, NNX, Haiku, Equinox and hand-written models give to a normalization's scale.
# `weight` is also what Equinox calls a matrix, so there it takes a leaf of one axis.
_SCALES = frozenset({"scale", "gamma"})
_ONE_AXIS_SCALES = frozenset({"weight", "g"})


def l1(group: ScoredGroup) -> Float[Array, " units"]:
    """The sum of absolute weights over the whole group.

    Source: Li et al., "Pruning filters for efficient ConvNets", ICLR 2017, section 3.1, which sums
    over a filter; here over all slices that go with it.

    Args:
        group: the group.

    Example:
        >>> l1(ScoredGroup("kernel[1]", 2, {("kernel", 1): jnp.array([[1.0, -2.0], [0.0, 1.0]])}))
        Array([3., 1.], dtype=float32)
    """
    return _total(jnp.abs(weight) for weight in group.weights.values())


def l2(group: ScoredGroup) -> Float[Array, " units"]:
    """The Euclidean norm of all weights of a unit, over the whole group.

    Args:
        group: the group.

    Example:
        >>> l2(ScoredGroup("kernel[1]", 2, {("kernel", 1): jnp.array([[3.0, -4.0], [0.0, 1.0]])}))
        Array([5., 1.], dtype=float32)
    """
    return jnp.sqrt(_total(jnp.abs(weight) ** 2 for weight in group.weights.values()))


def batch_norm_scale(group: ScoredGroup) -> Float[Array, " units"]:
    """The sum of the absolute scales of the group's normalizations.

    A scale is known by its name: ``scale`` or ``gamma``, and ``weight`` or ``g`` where the leaf has
    one axis.

    Source: Liu et al., "Learning efficient convolutional networks through network slimming", ICCV
    2017, section 3.

    Args:
        group: the group.

    Raises:
        ValueError: the group has no such scale.

    Example:
        >>> norm = {("kernel", 1): jnp.ones((2, 3)), ("norm/scale", 0): jnp.array([[-2.0], [1.0]])}
        >>> batch_norm_scale(ScoredGroup("kernel[1]", 2, norm))
        Array([2., 1.], dtype=float32)
    """

    def is_scale(path: str) -> bool:
        name = path.rsplit("/", 1)[-1]
        one_axis = group.shapes is not None and len(group.shapes[path]) == 1
        return name in _SCALES or (name in _ONE_AXIS_SCALES and one_axis)

    scales = [weight for (path, _), weight in group.weights.items() if is_scale(path)]
    if not scales:
        paths = ", ".join(f"{path}[{axis}]" for path, axis in group.weights)
        raise ValueError(
            f"{group.name}: no normalization scale among {paths}: score this network with l1, "
            "or `keep` this group"
        )
    return _total(jnp.abs(scale) for scale in scales)


@needs("gradients")
def taylor(group: ScoredGroup) -> Float[Array, " units"]:
    """The absolute sum of gradient times weight over the whole group.

    To first order, what the loss changes by when the unit goes. Its square, which the source takes,
    puts units in the same order.

    Source: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019,
    equation 9 (the contribution of a set of weights as one).

    Args:
        group: the group, with gradients.

    Example:
        >>> weights = {("kernel", 1): jnp.array([[1.0, -2.0], [3.0, 1.0]])}
        >>> taylor(ScoredGroup("kernel[1]", 2, weights, gradients=weights))
        Array([ 5., 10.], dtype=float32)
    """
    assert group.gradients is not None
    return jnp.abs(_total(_times(g, group.weights[at]) for at, g in group.gradients.items()))


@needs("squared_gradients")
def fisher(group: ScoredGroup) -> Float[Array, " units"]:
    """Half the sum, over the whole group, of squared gradient times squared weight.

    To second order, what the loss grows by when the unit goes, with the sum of squared gradients
    over batches in place of the diagonal of the Hessian.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018,
    section 2.1.

    Args:
        group: the group, with squared gradients.

    Example:
        >>> weights = {("kernel", 1): jnp.array([[1.0, -2.0], [3.0, 1.0]])}
        >>> squared = {("kernel", 1): jnp.full((2, 2), 2.0)}
        >>> fisher(ScoredGroup("kernel[1]", 2, weights, squared_gradients=squared))
        Array([ 5., 10.], dtype=float32)
    """
    assert group.squared_gradients is not None
    squared = group.squared_gradients.items()
    return _total(square * jnp.abs(group.weights[at]) ** 2 for at, square in squared) / 2


@needs("activations")
def activation_norm(group: ScoredGroup) -> Float[Array, " units"]:
    """The root of the mean square of what the group's readers see of a unit, summed over them.

    Args:
        group: the group, with activations.

    Raises:
        ValueError: no weight that reads these channels was observed.

    Example:
        >>> seen = {("next/kernel", 0): jnp.array([[4.0], [9.0]])}
        >>> activation_norm(ScoredGroup("kernel[1]", 2, {}, activations=seen))
        Array([2., 3.], dtype=float32)
    """
    if not group.activations:
        raise ValueError(
            f"{group.name}: no weight that reads these channels was observed: score it otherwise "
            "or `keep` this group"
        )
    return _total(jnp.sqrt(jnp.sum(a, axis=1, keepdims=True)) for a in group.activations.values())


@needs("key")
def random(group: ScoredGroup) -> Float[Array, " units"]:
    """Uniform noise: what every other score is to be compared with.

    Args:
        group: the group, with a key.

    Example:
        >>> random(ScoredGroup("kernel[1]", 3, {}, key=jax.random.key(0))).shape
        (3,)
    """
    return jax.random.uniform(group.key, (group.size,))


def _times(gradient: Array, weight: Array) -> Array:
    # JAX's gradient of a complex weight is the conjugate of the direction of descent.
    return jnp.real(gradient * weight)


def _total(terms: Any) -> Array:
    """Sum every term over its elements, and over terms."""
    sums = [jnp.sum(term, axis=1) for term in terms]
    return sum(sums[1:], sums[0])
