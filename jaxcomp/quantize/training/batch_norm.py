"""BatchNorm out of the way of quantized training: folded into the weights before it, frozen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcomp import tree as tree_lib
from jaxcomp.checks import check_amount
from jaxcomp.quantize.training.find_norms import Norm, find_norms


class Folded(NamedTuple):
    """Result of :func:`fold_batch_norm`.

    Attributes:
        variables: of the structure, shapes and dtypes that were given.
        folded: path of each norm that was folded, and of the kernel that it went into.
        kept: path of each norm that was not, and why.
    """

    variables: Any
    folded: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{norm} → {kernel}" for norm, kernel in self.folded]
        return "\n".join(lines + [f"{norm} stays: {reason}" for norm, reason in self.kept])


def fold_batch_norm(
    apply_fn: Callable[..., Any], variables: Any, *inputs: Any, tolerance: float = 1e-4
) -> Folded:
    """Multiply what each BatchNorm does into the convolution or dense layer before it.

    The unchanged model computes the same function of the new variables, in inference mode: kernel
    (and bias) of the layer are multiplied by ``scale / sqrt(var + epsilon)``, and the norm is left
    as an identity and a shift: ``mean`` 0, ``var`` ``1 - epsilon``, ``scale`` 1, and the rest in
    its ``bias`` (in ``mean``, where it has no bias). This is checked on the inputs.

    Deployed networks fold, so what is rounded should be the folded weights. That makes a difference
    where weights of several channels share a scale: per tensor, in groups or blocks of output
    channels. With a scale for each output channel, found from the weights, folding multiplies
    weights and scales alike, and quantized values are what they would be without it. The usual
    recipe (Krishnamoorthi, 2018, section 3.2.2): train in float, fold, and train on quantized with
    the norms in inference mode. Norms in training mode would normalize anew what is folded already;
    :func:`freeze_batch_norm` stops that at a step.

    Args:
        apply_fn: a pure function of the variables and inputs, in inference mode, such as
            ``lambda variables, x: model.apply(variables, x, train=False)``; of Linen, NNX (its
            state), Haiku or anything else that normalizes by leaves of ``variables``.
        variables: parameters and running statistics, any tree.
        *inputs: real ones; the function is compared on them.
        tolerance: how far outputs may move, in proportion to the largest; more in 16 bits.

    Returns:
        The new variables, and what became of each norm. Norms stay where what they normalize is no
        single layer's output (behind an activation, an addition, a pooling, in a loop), where that
        output or the kernel is used elsewhere too, or where the outputs would move.

    Raises:
        TypeError: ``apply_fn`` is not callable, a leaf is not an array, or ``tolerance`` no number.
        ValueError: nothing is normalized by leaves of ``variables``; outputs that are not finite; a
            negative tolerance.

    Example:
        >>> def apply_fn(variables, x):
        ...     norm = variables["norm"]
        ...     y = x @ variables["kernel"] - norm["mean"]
        ...     return y * (jax.lax.rsqrt(norm["var"] + 1e-5) * norm["scale"]) + norm["bias"]
        >>> norm = {"mean": 1.0, "var": 4.0, "scale": 6.0, "bias": 0.5}
        >>> norm = {name: jnp.full(3, value) for name, value in norm.items()}
        >>> result = fold_batch_norm(
        ...     apply_fn, {"kernel": jnp.ones((2, 3)), "norm": norm}, jnp.ones((5, 2)))
        >>> print(result)
        norm → kernel
        >>> result.variables["kernel"][0], result.variables["norm"]["bias"]
        (Array([2.9999962, 2.9999962, 2.9999962], dtype=float32),
         Array([-2.4999962, -2.4999962, -2.4999962], dtype=float32))

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-
    arithmetic-only inference", 2018, section 3.2.
    """
    check_amount("tolerance", tolerance)
    norms, kept = find_norms(apply_fn, variables, *inputs)
    run = jax.jit(apply_fn)
    before = jax.tree.leaves(run(variables, *inputs))
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in before):
        raise ValueError("the outputs are not finite: give the trained variables and real inputs")

    def moved(tree: Any) -> float:
        pairs = zip(before, jax.tree.leaves(run(tree, *inputs)), strict=True)
        return max((_difference(a, b) for a, b in pairs), default=0.0)

    folded = _fold(variables, norms)
    # NaN is no small difference.
    if not moved(folded) <= tolerance:
        # Which of them it is, one at a time.
        alone = [(norm, moved(_fold(variables, [norm]))) for norm in norms]
        norms = [norm for norm, by in alone if by <= tolerance]
        kept = kept + [
            (norm.path, f"the outputs would move by {by:.1e}: {norm.kernel} is not used as it is")
            for norm, by in alone
            if not by <= tolerance
        ]
        folded = _fold(variables, norms)
        if not (by := moved(folded)) <= tolerance:
            raise ValueError(f"folded together, outputs move by {by:.1e}: raise tolerance")
    return Folded(folded, tuple((n.path, n.kernel) for n in norms), tuple(kept))


def freeze_batch_norm(old: Any, new: Any, step: Any, begin: int) -> Any:
    """Running statistics that stay what they were from a step on, inside a jitted train step.

    Late in quantized training, statistics of single batches disturb more than they adapt: the usual
    recipe freezes them after most of the steps. This stops the running averages. What the forward
    pass normalizes by is the model's affair; it uses them in inference mode::

        def forward(params, stats, x, train): ...  # logits, statistics

        train = functools.partial(forward, train=True)
        frozen = functools.partial(forward, train=False)
        logits, new = jax.lax.cond(step < begin, train, frozen, params, stats, x)
        stats = quantize.freeze_batch_norm(stats, new, step, begin)

    Args:
        old: statistics before the step, such as ``state.batch_stats``; any tree.
        new: after it, of the same structure.
        step: the number of the step, a Python int or an integer array.
        begin: the first step that leaves the statistics as they are.

    Returns:
        ``new`` before ``begin`` and ``old`` from it on.

    Example:
        >>> old, new = {"mean": jnp.zeros(2)}, {"mean": jnp.ones(2)}
        >>> [float(freeze_batch_norm(old, new, step, 5)["mean"][0]) for step in (4, 5, 6)]
        [1.0, 0.0, 0.0]

    Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018,
    section 3.2.2.
    """
    frozen = jnp.asarray(step) >= begin
    return jax.tree.map(lambda a, b: jnp.where(frozen, a, b), old, new)


def _fold(variables: Any, norms: list[Norm]) -> Any:
    leaves, news = tree_lib.flatten(variables), {}

    def write(path: str, values: np.ndarray) -> None:
        # Leaves that hosts know stay theirs; the rest go to the device.
        news[path] = jnp.asarray(values).astype(leaves[path].dtype)

    for norm in norms:
        factor = norm.factor
        for leaf in (norm.kernel_leaf, *norm.biases):
            write(leaf.path, _wide(leaves[leaf.path]) * leaf.along(factor))
        shift = _wide(leaves[norm.mean.path]) * norm.mean.along(factor)
        ones = np.ones(leaves[norm.var.path].shape)
        write(norm.var.path, ones - norm.epsilon)
        if norm.scale is not None:
            write(norm.scale.path, np.ones(leaves[norm.scale.path].shape))
        if norm.bias is None:
            write(norm.mean.path, shift)
            continue
        write(norm.mean.path, np.zeros(shift.shape))
        moved = norm.bias.along(norm.mean.vector(shift))
        write(norm.bias.path, _wide(leaves[norm.bias.path]) - moved)
    return tree_lib.replace(variables, news)


def _wide(leaf: Any) -> np.ndarray:
    return np.asarray(leaf).astype(np.float64)


def _difference(a: Array, b: Array) -> float:
    """By how much outputs moved, in proportion to the largest of them."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(a)), 1e-30))
