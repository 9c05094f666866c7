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
:mod:`jaxcomp.prune.one_shot.evidence` computes: :func:`fisher` and :func:`fisher_weighted` squared
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

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

Score = Callable[[Any, Any], Array]

Scores = Real[Array, " *dims"]
Leaf = Scores | Real[np.ndarray, " *dims"]
Evidence = Leaf | None


class RunningScore(NamedTuple):
    """A score that remembers earlier steps.

    Attributes:
        init: ``init(path, weight) -> kept``, any pytree of arrays.
        accumulate: ``accumulate(kept, weight, gradient) -> kept``, once every train step.
        score: ``score(weight, kept) -> scores`` of the leaf's shape, where masks are updated.

    Example:
        >>> count = RunningScore(
        ...     init=lambda path, weight: jnp.zeros(weight.shape),
        ...     accumulate=lambda kept, weight, gradient: kept + (gradient != 0),
        ...     score=lambda weight, kept: kept,
        ... )
        >>> weight = jnp.ones(2)
        >>> kept = count.accumulate(count.init("kernel", weight), weight, jnp.array([0.0, 0.5]))
        >>> count.score(weight, kept)
        Array([0., 1.], dtype=float32)
    """

    init: Callable[[str, Any], Any]
    accumulate: Callable[[Any, Any, Any], Any]
    score: Callable[[Any, Any], Array]


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
    return _wide(weight) ** 2


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
    return jnp.abs(_needed(weight, gradient, "gradient", "a gradient"))


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
    return jnp.abs(_wide(weight) * _needed(weight, gradient, "taylor", "a gradient"))


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
    return jnp.abs(_wide(weight) * _needed(weight, gradient, "snip", "a gradient"))


def grasp(weight: Leaf, hessian_gradient: Evidence = None) -> Scores:
    """Half of what the squared gradient norm loses if the weight goes: ``w · (H g)``, signed.

    Removing the weights of the lowest, most negative scores raises the norm of the gradient most.
    The paper's score is this with the other sign, and the highest go there.

    Args:
        weight: one leaf, as initialised.
        hessian_gradient: the Hessian times the gradient, from
            :func:`jaxcomp.prune.one_shot.evidence.hessian_times_gradient`.

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
    needed = _needed(weight, hessian_gradient, "grasp", "the Hessian times the gradient")
    return _wide(weight) * needed


def synaptic_flow(weight: Leaf, flow: Evidence = None) -> Scores:
    """The weight's share of all paths through the network: ``|w · ∂R/∂w|``.

    ``R`` is the sum of the outputs of the network with all weights replaced by their absolute
    values, for an input of ones. :func:`jaxcomp.prune.one_shot.synaptic_flow` computes it and
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
    return jnp.abs(_wide(weight) * _needed(weight, flow, "synaptic_flow", "the derivative of R"))


def wanda(weight: Leaf, input_norm: Any = None) -> Scores:
    """The weight's magnitude times the norm of what it is multiplied by: ``|w| · ‖x‖₂``.

    Meant to be compared among the weights of one output only, as
    :func:`jaxcomp.prune.one_shot.wanda` does.

    Args:
        weight: one leaf.
        input_norm: the norm of each input feature, broadcastable against the leaf, from
            :func:`jaxcomp.prune.one_shot.evidence.input_norms`.

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
    return jnp.abs(_wide(weight)) * _needed(weight, input_norm, "wanda", "the norms of the inputs")


def obd(weight: Leaf, curvature: Evidence = None) -> Scores:
    """Optimal brain damage: the loss's change to second order if the weight goes, ``h w² / 2``.

    A negative curvature, which the paper takes to be absent, gives a negative score: to second
    order the loss falls without that weight, so it goes first.

    Args:
        weight: one leaf, of a trained network.
        curvature: the diagonal of the Hessian, from
            :func:`jaxcomp.prune.one_shot.evidence.hessian_diagonal`.

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
    return 0.5 * _wide(weight) ** 2 * _needed(weight, curvature, "obd", "the Hessian's diagonal")


def fisher(weight: Leaf, squared_gradient: Evidence = None) -> Scores:
    """The diagonal of the empirical Fisher information, as given: the mean of ``(∂L/∂w)²``.

    Args:
        weight: one leaf, of which only the shape counts.
        squared_gradient: from :func:`jaxcomp.prune.one_shot.evidence.squared_gradients`. For sums
            that grow during training see :func:`running_fisher`.

    Returns:
        Scores of the leaf's shape, at least float32.

    Raises:
        ValueError: there is no evidence.

    Example:
        >>> fisher(jnp.array([-2.0, 1.0]), jnp.array([0.5, 3.0]))
        Array([0.5, 3. ], dtype=float32)
    """
    return _needed(weight, squared_gradient, "fisher", "squared gradients")


def fisher_weighted(weight: Leaf, squared_gradient: Evidence = None) -> Scores:
    """The loss's change to second order, with the Fisher for the Hessian: ``w² · F``.

    Args:
        weight: one leaf.
        squared_gradient: from :func:`jaxcomp.prune.one_shot.evidence.squared_gradients`. For sums
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
    needed = _needed(weight, squared_gradient, "fisher_weighted", "squared gradients")
    return _wide(weight) ** 2 * needed


def running_fisher(decay: float | None = None, *, weighted: bool = False) -> RunningScore:
    """Squared gradients of all steps so far, optionally times the squared weight of today.

    Args:
        decay: None for the plain sum; a number in [0, 1) for the moving average
            ``F ← decay F + (1 − decay) g²``, which forgets early training.
        weighted: whether the score is ``w² F`` instead of ``F``.

    Returns:
        A running score that keeps one float32 array a leaf.

    Raises:
        ValueError: the decay is outside of [0, 1).

    Example:
        >>> score, weight = running_fisher(weighted=True), jnp.array([-2.0, 1.0])
        >>> kept = score.init("kernel", weight)
        >>> kept = score.accumulate(kept, weight, jnp.array([0.5, 1.0]))
        >>> kept = score.accumulate(kept, weight, jnp.array([0.5, 2.0]))
        >>> score.score(weight, kept)
        Array([2., 5.], dtype=float32)
    """
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}: give a number in [0, 1), or None for the plain sum")

    def accumulate(kept: Any, weight: Any, gradient: Any) -> Any:
        square = _needed(weight, gradient, "running_fisher", "a gradient") ** 2
        return kept + square if decay is None else decay * kept + (1 - decay) * square

    score: Score = fisher_weighted if weighted else fisher
    return RunningScore(_zeros, accumulate, score)


def movement() -> RunningScore:
    """Whether training moves the weight away from zero: ``−Σ w · ∂L/∂w`` over all steps so far.

    A weight that each step makes larger in magnitude has a growing score and is kept, however small
    it is; one that shrinks goes.

    Returns:
        A running score that keeps one float32 array a leaf; scores may be negative.

    Example:
        >>> score, weight = movement(), jnp.array([-2.0, 1.0])
        >>> kept = score.accumulate(score.init("kernel", weight), weight, jnp.array([0.5, 1.0]))
        >>> score.score(weight, kept)
        Array([ 1., -1.], dtype=float32)

    Source:
        Sanh et al. 2020, *Movement Pruning: Adaptive Sparsity by Fine-Tuning*, section 3, the
        accumulated score without its learning rate.
    """

    def accumulate(kept: Any, weight: Any, gradient: Any) -> Any:
        return kept - _wide(weight) * _needed(weight, gradient, "movement", "a gradient")

    return RunningScore(_zeros, accumulate, lambda weight, kept: kept)


def random(key: Any) -> RunningScore:
    """A uniform random number a weight: the baseline that every score has to beat.

    A weight's number depends on the key and on its leaf's path alone, so it stays the same from one
    mask update to the next, and pruning only ever adds to what is removed. Leaves are independent.

    Args:
        key: from ``jax.random.key``.

    Returns:
        A running score that keeps one integer a leaf.

    Example:
        >>> score, weight = random(jax.random.key(0)), jnp.ones(1000)
        >>> scores = score.score(weight, score.init("kernel", weight))
        >>> scores.shape, bool(jnp.all((scores >= 0) & (scores < 1)))
        ((1000,), True)
    """

    def init(path: str, weight: Any) -> Any:
        del weight
        # Python's own hash of a string changes from one process to the next.
        return jnp.asarray(zlib.crc32(path.encode()), jnp.uint32)

    def score(weight: Any, kept: Any) -> Any:
        return jax.random.uniform(jax.random.fold_in(key, kept), weight.shape)

    return RunningScore(init, lambda kept, weight, gradient: kept, score)


def _wide(x: Any) -> Any:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _zeros(path: str, weight: Any) -> Any:
    del path
    return jnp.zeros_like(weight, dtype=jnp.promote_types(weight.dtype, jnp.float32))


def _needed(weight: Any, evidence: Any, score: str, what: str) -> Any:
    """The evidence, at least float32, if it is there and fits the leaf."""
    if evidence is None:
        raise ValueError(f"{score} reads {what} of each leaf, and got None: pass it")
    shape = tuple(evidence.shape)
    missing = len(weight.shape) - len(shape)
    if missing < 0 or any(
        size not in (1, full) for size, full in zip(shape, weight.shape[missing:], strict=True)
    ):
        raise ValueError(f"{score}: evidence of shape {shape} for a leaf of shape {weight.shape}")
    return _wide(evidence)
