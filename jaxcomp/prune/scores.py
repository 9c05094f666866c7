"""How much a weight matters: pure functions of a weight and some evidence; the lowest go first.

A score takes one leaf and what is known about it, of the same shape or broadcastable to it, and
gives one number a weight. It may be negative. To try another, write one, for training and for one
shot alike::

    def taylor(weight, gradient):
        return jnp.abs(weight * gradient)

    method = prune.gradual(taylor, prune.cubic(0.9, begin=0, end=1000))
    scores = jax.tree.map(taylor, params, evidence.gradients(loss, params, batches))

In training the evidence is the gradient of the step, so :func:`magnitude`, :func:`l2`,
:func:`gradient`, :func:`taylor` and :func:`snip` can be used there. The others read what
:mod:`jaxcomp.prune.evidence` computes: :func:`fisher` and :func:`fisher_weighted` squared
gradients, :func:`obd` the Hessian's diagonal, :func:`grasp` its product with the gradient,
:func:`wanda` the norms of the inputs, :func:`synaptic_flow` a gradient that needs no data.

A score that remembers earlier steps is three functions, a :class:`RunningScore`. What it keeps is
an ordinary pytree that lives in the method's state, through ``jit`` and checkpoints::

    def mean_gradient(decay):
        return RunningScore(
            init=lambda path, weight: jnp.zeros(weight.shape),
            accumulate=lambda kept, weight, g: decay * kept + (1 - decay) * g,
            score=lambda weight, kept: jnp.abs(weight * kept),
        )

Scores of half-precision leaves are float32, because squares and products leave the range and the
resolution of half precision; only :func:`magnitude`, which is exact, keeps the leaf's dtype.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from jaxcomp.prune.running_scores import RunningScore, movement, random, running_fisher
from jaxcomp.prune.widened import check_leaf, wide, wide_evidence

__all__ = [
    "RunningScore",
    "Score",
    "fisher",
    "fisher_weighted",
    "gradient",
    "grasp",
    "l2",
    "magnitude",
    "movement",
    "obd",
    "random",
    "running_fisher",
    "snip",
    "synaptic_flow",
    "taylor",
    "wanda",
]

Score = Callable[[Any, Any], Array]

Scores = Real[Array, " *dims"]
Leaf = Scores | Real[np.ndarray, " *dims"]
Evidence = Leaf | None


def magnitude(weight: Leaf, gradient: Evidence = None) -> Scores:
    """The absolute value ``|w|``; its mean over a unit orders units by their L1 norm.

    Args:
        weight: one leaf.
        gradient: not used.

    Returns:
        Scores of the leaf's shape and dtype.

    Example:
        >>> magnitude(jnp.array([-2.0, 1.0]))
        Array([2., 1.], dtype=float32)

    Source:
        Han et al. 2015, *Learning both Weights and Connections*, section 3.
    """
    del gradient
    check_leaf(weight)
    return jnp.abs(weight)


def l2(weight: Leaf, gradient: Evidence = None) -> Scores:
    """The square ``w²``; its mean over a unit orders units by their Euclidean norm.

    For single weights the order is that of :func:`magnitude`, except that squares of float32
    weights below 1e-23 are all zero.

    Args:
        weight: one leaf.
        gradient: not used.

    Returns:
        Scores of the leaf's shape, at least float32.

    Example:
        >>> l2(jnp.array([-2.0, 1.0]))
        Array([4., 1.], dtype=float32)
    """
    del gradient
    return wide(weight) ** 2


def gradient(weight: Leaf, gradient: Evidence = None) -> Scores:
    """The absolute gradient ``|∂L/∂w|``: weights that the loss does not feel go first.

    Args:
        weight: one leaf.
        gradient: of the loss, with respect to it.

    Returns:
        Scores of the leaf's shape, at least float32.

    Raises:
        ValueError: there is no gradient.

    Example:
        >>> gradient(jnp.array([-2.0, 1.0]), jnp.array([0.5, -3.0]))
        Array([0.5, 3. ], dtype=float32)
    """
    return jnp.abs(wide_evidence(weight, gradient, "gradient", "a gradient"))


def taylor(weight: Leaf, gradient: Evidence = None) -> Scores:
    """The loss's change to first order if the weight goes: ``|w · ∂L/∂w|``.

    Args:
        weight: one leaf.
        gradient: of the loss, with respect to it.

    Returns:
        Scores of the leaf's shape, at least float32.

    Raises:
        ValueError: there is no gradient.

    Example:
        >>> taylor(jnp.array([-2.0, 1.0]), jnp.array([0.5, -3.0]))
        Array([1., 3.], dtype=float32)

    Source:
        Molchanov et al. 2019, *Importance Estimation for Neural Network Pruning*, equation 8,
        which squares it: the same order of single weights.
    """
    return jnp.abs(wide(weight) * wide_evidence(weight, gradient, "taylor", "a gradient"))


def snip(weight: Leaf, gradient: Evidence = None) -> Scores:
    """Connection sensitivity ``|∂L/∂c|`` of a gate ``c = 1`` on each weight: ``|w · ∂L/∂w|``.

    These are the numbers of :func:`taylor`: SNIP is where it is read, once, at initialisation,
    before any training, with all leaves competing. The paper divides by the sum over the network,
    which changes no order.

    Args:
        weight: one leaf, as initialised.
        gradient: of the loss, with respect to it.

    Returns:
        Scores of the leaf's shape, at least float32.

    Raises:
        ValueError: there is no gradient.

    Example:
        >>> snip(jnp.array([-2.0, 1.0]), jnp.array([0.5, -3.0]))
        Array([1., 3.], dtype=float32)

    Source:
        Lee et al. 2019, *SNIP: Single-shot Network Pruning based on Connection Sensitivity*,
        equations 5 and 6.
    """
    return jnp.abs(wide(weight) * wide_evidence(weight, gradient, "snip", "a gradient"))


def grasp(weight: Leaf, hessian_gradient: Evidence = None) -> Scores:
    """Half of what the squared gradient norm loses if the weight goes: ``w · (H g)``, signed.

    Removing the weights of the lowest, most negative scores raises the norm of the gradient most.
    The paper's score is this with the other sign, and the highest go there.

    Args:
        weight: one leaf, as initialised.
        hessian_gradient: the Hessian times the gradient, from
            :func:`jaxcomp.prune.post_training.evidence.hessian_times_gradient`.

    Returns:
        Scores of the leaf's shape, at least float32; negative ones too.

    Raises:
        ValueError: there is no evidence.

    Example:
        >>> grasp(jnp.array([-2.0, 1.0]), jnp.array([0.5, 3.0]))
        Array([-1.,  3.], dtype=float32)

    Source:
        Wang et al. 2020, *Picking Winning Tickets Before Training by Preserving Gradient Flow*,
        equation 8 and algorithm 1.
    """
    needed = wide_evidence(weight, hessian_gradient, "grasp", "the Hessian times the gradient")
    return wide(weight) * needed


def synaptic_flow(weight: Leaf, flow: Evidence = None) -> Scores:
    """The weight's share of all paths through the network: ``|w · ∂R/∂w|``.

    ``R`` is the sum of the outputs of the network with all weights replaced by their absolute
    values, for an input of ones. :func:`jaxcomp.prune.post_training.synaptic_flow` computes it and
    prunes in rounds, as the paper does.

    Args:
        weight: one leaf.
        flow: the derivative of ``R``, with respect to the weight or to its absolute value.

    Returns:
        Scores of the leaf's shape, at least float32.

    Raises:
        ValueError: there is no evidence.

    Example:
        >>> synaptic_flow(jnp.array([-2.0, 1.0]), jnp.array([0.5, 3.0]))
        Array([1., 3.], dtype=float32)

    Source:
        Tanaka et al. 2020, *Pruning neural networks without any data by iteratively conserving
        synaptic flow*, section 6.
    """
    return jnp.abs(
        wide(weight) * wide_evidence(weight, flow, "synaptic_flow", "the derivative of R")
    )


def wanda(weight: Leaf, input_norm: Any = None) -> Scores:
    """The weight's magnitude times the norm of what it is multiplied by: ``|w| · ‖x‖₂``.

    Meant to be compared among the weights of one output only, as
    :func:`jaxcomp.prune.post_training.wanda` does.

    Args:
        weight: one leaf.
        input_norm: the norm of each input feature, broadcastable against the leaf, from
            :func:`jaxcomp.prune.post_training.evidence.input_norms`.

    Returns:
        Scores of the leaf's shape, at least float32.

    Raises:
        ValueError: there is no evidence, or it does not fit the leaf.

    Example:
        >>> wanda(jnp.array([[-2.0, 1.0], [1.0, 1.0]]), jnp.array([[0.5], [3.0]]))
        Array([[1. , 0.5],
               [3. , 3. ]], dtype=float32)

    Source:
        Sun et al. 2023, *A Simple and Effective Pruning Approach for Large Language Models*,
        equation 1.
    """
    return jnp.abs(wide(weight)) * wide_evidence(
        weight, input_norm, "wanda", "the norms of the inputs"
    )


def obd(weight: Leaf, curvature: Evidence = None) -> Scores:
    """Optimal brain damage: the loss's change to second order if the weight goes, ``h w² / 2``.

    A negative curvature, which the paper takes to be absent, gives a negative score: to second
    order the loss falls without that weight, so it goes first.

    Args:
        weight: one leaf, of a trained network.
        curvature: the diagonal of the Hessian, from
            :func:`jaxcomp.prune.post_training.evidence.hessian_diagonal`.

    Returns:
        Scores of the leaf's shape, at least float32; negative ones too.

    Raises:
        ValueError: there is no evidence.

    Example:
        >>> obd(jnp.array([-2.0, 1.0]), jnp.array([0.5, 3.0]))
        Array([1. , 1.5], dtype=float32)

    Source:
        LeCun, Denker and Solla 1990, *Optimal Brain Damage*, section 2.2.
    """
    return (
        0.5 * wide(weight) ** 2 * wide_evidence(weight, curvature, "obd", "the Hessian's diagonal")
    )


def fisher(weight: Leaf, squared_gradient: Evidence = None) -> Scores:
    """The diagonal of the empirical Fisher information, as given: the mean of ``(∂L/∂w)²``.

    Args:
        weight: one leaf, of which only the shape counts.
        squared_gradient: from :func:`jaxcomp.prune.evidence.squared_gradients`. For sums
            that grow during training see :func:`running_fisher`.

    Returns:
        Scores of the leaf's shape, at least float32.

    Raises:
        ValueError: there is no evidence.

    Example:
        >>> fisher(jnp.array([-2.0, 1.0]), jnp.array([0.5, 3.0]))
        Array([0.5, 3. ], dtype=float32)
    """
    return wide_evidence(weight, squared_gradient, "fisher", "squared gradients")


def fisher_weighted(weight: Leaf, squared_gradient: Evidence = None) -> Scores:
    """The loss's change to second order, with the Fisher for the Hessian: ``w² · F``.

    Args:
        weight: one leaf.
        squared_gradient: from :func:`jaxcomp.prune.evidence.squared_gradients`. For sums
            that grow during training see :func:`running_fisher`.

    Returns:
        Scores of the leaf's shape, at least float32.

    Raises:
        ValueError: there is no evidence.

    Example:
        >>> fisher_weighted(jnp.array([-2.0, 1.0]), jnp.array([0.5, 3.0]))
        Array([2., 3.], dtype=float32)

    Source:
        Theis et al. 2018, *Faster gaze prediction with dense networks and Fisher pruning*,
        section 2.1, which halves it: the same order.
    """
    needed = wide_evidence(weight, squared_gradient, "fisher_weighted", "squared gradients")
    return wide(weight) ** 2 * needed
