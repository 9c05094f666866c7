"""What scores read beside the weights: gradients, curvature and input norms, over batches.

Every function takes the batches one at a time and adds up in float32, in place. What belongs to a
sharded leaf is sharded as it is. A loss is called as ``loss(params, *batch)``: a plain tuple is
spread over its arguments, and any other batch (an array, a dict) is the one argument. Every batch
counts the same, whatever its size::

    found = evidence.gradients(loss, params, batches)
    masks = prune.masks(jax.tree.map(scores.taylor, params, found), sparsity=0.5)
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import is_compressed
from jaxcomp.checks import (
    check_count,
    check_function,
    check_key,
    check_leaves,
    one_number,
)
from jaxcomp.model.batches import checked
from jaxcomp.prune.post_training.input_norms import input_norms
from jaxcomp.prune.post_training.sums import add_up
from jaxcomp.prune.widened import wide, wide_zeros

__all__ = [
    "gradients",
    "hessian_diagonal",
    "hessian_times_gradient",
    "input_norms",
    "squared_gradients",
]

Loss = Callable[..., Any]


def gradients(
    loss: Loss, params: Any, batches: Iterable[Any], *, progress: bool | None = None
) -> Any:
    """The gradient of the loss, its mean over batches.

    For :func:`~jaxcomp.prune.scores.gradient`, ``taylor`` and ``snip``.

    Args:
        loss: ``loss(params, *batch) -> scalar``.
        params: any tree; leaves that are no floating arrays get zeros.
        batches: an iterable.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        A tree like ``params``, at least float32.

    Raises:
        ValueError: there are no batches, or a gradient is NaN or infinite; names leaf and batch.
        TypeError: ``batches`` is one array, or no iterable; a leaf is compressed, complex
            or no array; the loss is no function, or returns something else than one number.

    Example:
        >>> loss = lambda params, x: jnp.sum(params["kernel"] * x)
        >>> gradients(loss, {"kernel": jnp.ones(2)}, [jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])])
        {'kernel': Array([2., 3.], dtype=float32)}
    """
    floats = _floats(loss, params)

    def term(params: Any, number: Any, *batch: Any) -> Any:
        return (jax.grad(_of_floats(loss, params, batch))(tree_lib.take(params, floats)),)

    (total,), count = add_up(term, (floats,), params, batches, "gradients", progress)
    return _like(params, total, count)


def squared_gradients(
    loss: Loss, params: Any, batches: Iterable[Any], *, progress: bool | None = None
) -> Any:
    """The square of each batch's gradient, its mean over batches: the empirical Fisher's diagonal.

    For :func:`~jaxcomp.prune.scores.fisher` and ``fisher_weighted``. The Fisher information is that
    of single examples: give batches of one, or as small as there is time for, because the examples
    of a batch cancel each other before they are squared.

    Args:
        loss: ``loss(params, *batch) -> scalar``.
        params: any tree; leaves that are no floating arrays get zeros.
        batches: an iterable.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        A tree like ``params``, at least float32.

    Raises:
        ValueError: there are no batches, or a gradient is NaN or infinite; names leaf and batch.
        TypeError: ``batches`` is one array, or no iterable; a leaf is compressed, complex
            or no array; the loss is no function, or returns something else than one number.

    Example:
        >>> loss = lambda params, x: jnp.sum(params["kernel"] * x)
        >>> params, batches = {"kernel": jnp.ones(1)}, [jnp.ones(1), jnp.full(1, -3.0)]
        >>> squared_gradients(loss, params, batches)
        {'kernel': Array([5.], dtype=float32)}
    """
    floats = _floats(loss, params)

    def term(params: Any, number: Any, *batch: Any) -> Any:
        found = jax.grad(_of_floats(loss, params, batch))(tree_lib.take(params, floats))
        return (jax.tree.map(lambda g: jnp.square(wide(g)), found),)

    (total,), count = add_up(term, (floats,), params, batches, "squared gradients", progress)
    return _like(params, total, count)


def hessian_diagonal(
    loss: Loss,
    params: Any,
    batches: Iterable[Any],
    key: Any,
    samples: int = 1,
    *,
    progress: bool | None = None,
) -> Any:
    """The diagonal of the loss's Hessian, estimated without bias, its mean over batches.

    For :func:`~jaxcomp.prune.scores.obd`. The mean of ``v ⊙ (H v)`` over random signs ``v``, which
    are drawn anew for each batch and sample. Where the Hessian is diagonal one sample is exact;
    otherwise the variance at a weight is the sum of the squares of the rest of its row, divided by
    the number of samples and batches.

    Args:
        loss: ``loss(params, *batch) -> scalar``, twice differentiable.
        params: any tree; leaves that are no floating arrays get zeros.
        batches: an iterable.
        key: from ``jax.random.key``.
        samples: of ``v`` for each batch; each costs about two gradients.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        A tree like ``params``, at least float32.

    Raises:
        ValueError: there are no batches or samples, or a product is NaN or infinite; names leaf and
            batch.
        TypeError: ``batches`` is one array, or no iterable; a leaf is compressed, complex
            or no array; the loss is no function, or returns something else than one number.

    Example:
        >>> loss = lambda params, x: jnp.sum(x * params["kernel"] ** 2)
        >>> params, batches = {"kernel": jnp.ones(2)}, [jnp.array([1.0, 2.0])]
        >>> hessian_diagonal(loss, params, batches, jax.random.key(0))["kernel"]
        Array([2., 4.], dtype=float32)

    Source:
        Bekas, Kokiopoulou and Saad 2007, *An estimator for the diagonal of a matrix*, section 2;
        the estimator of the trace is Hutchinson's, 1990.
    """
    check_count("samples", samples)
    check_key(key)
    floats = _floats(loss, params)

    def term(params: Any, number: Any, *batch: Any) -> Any:
        slope = jax.grad(_of_floats(loss, params, batch))
        point = tree_lib.take(params, floats)

        def sample(total: Any, key: Any) -> Any:
            keys = jax.random.split(key, len(point))
            signs = tree_lib.Leaves(
                (path, jax.random.rademacher(one, leaf.shape, leaf.dtype))
                for (path, leaf), one in zip(point.items(), keys, strict=True)
            )
            product = jax.jvp(slope, (point,), (signs,))[1]
            news = jax.tree.map(lambda v, hv: wide(v) * wide(hv) / samples, signs, product)
            return jax.tree.map(jnp.add, total, news), None

        keys = jax.random.split(jax.random.fold_in(key, number), samples)
        zeros = jax.tree.map(wide_zeros, point)
        return (jax.lax.scan(sample, zeros, keys)[0],)

    (total,), count = add_up(term, (floats,), params, batches, "Hessian diagonal", progress)
    return _like(params, total, count)


def hessian_times_gradient(
    loss: Loss, params: Any, batches: Iterable[Any], *, progress: bool | None = None
) -> Any:
    """The Hessian of the mean loss times the gradient of the mean loss, both over all batches.

    For :func:`~jaxcomp.prune.scores.grasp`. The batches are read twice: the gradient is needed
    whole before it can be multiplied.

    Args:
        loss: ``loss(params, *batch) -> scalar``, twice differentiable.
        params: any tree; leaves that are no floating arrays get zeros.
        batches: an iterable that gives the same batches again, such as a list; no generator.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        A tree like ``params``, at least float32.

    Raises:
        ValueError: there are no batches, or a product is NaN or infinite; names leaf and batch.
        TypeError: ``batches`` is an array, a generator or no iterable; a leaf is compressed or
            complex.

    Example:
        >>> loss = lambda params, x: jnp.sum(x * params["kernel"] ** 2)
        >>> params, batches = {"kernel": jnp.ones(2)}, [jnp.array([1.0, 2.0])]
        >>> hessian_times_gradient(loss, params, batches)["kernel"]
        Array([ 4., 16.], dtype=float32)
    """
    if iter(checked(batches)) is batches:
        raise TypeError("batches is read twice: give a list, or an iterable that starts anew")
    floats = _floats(loss, params)
    mean = tree_lib.take(gradients(loss, params, batches, progress=progress), floats)
    direction = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), mean, floats)

    def term(given: Any, number: Any, *batch: Any) -> Any:
        params, direction = given
        slope = jax.grad(_of_floats(loss, params, batch))
        return (jax.jvp(slope, (tree_lib.take(params, floats),), (direction,))[1],)

    words = "Hessian times gradient"
    (total,), count = add_up(term, (floats,), (params, direction), batches, words, progress)
    return _like(params, total, count)


def _floats(loss: Loss, params: Any) -> tree_lib.Leaves:
    """The leaves that have gradients."""
    check_function("loss", loss, "(params, *batch) that returns one number")
    check_leaves(params)
    found = tree_lib.Leaves()
    for path, leaf in tree_lib.flatten(params).items():
        if is_compressed(leaf):
            raise TypeError(f"{path}: already compressed ({leaf!r}): decode it first")
        dtype = getattr(leaf, "dtype", np.dtype(type(leaf)))
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"{path}: {dtype} has no gradient that scores can read")
        if hasattr(leaf, "dtype") and jnp.issubdtype(dtype, jnp.floating):
            found[path] = leaf
    if not found:
        raise ValueError("the tree has no floating leaf: there is nothing to differentiate")
    return found


def _of_floats(loss: Loss, params: Any, batch: tuple[Any, ...]) -> Callable[[Any], Any]:
    return lambda floats: one_number(loss(tree_lib.replace(params, floats), *batch))


def _like(params: Any, totals: tree_lib.Leaves, count: int) -> Any:
    """Means in the tree of the parameters."""
    leaves = {path: total / count for path, total in totals.items()}
    for path, leaf in tree_lib.flatten(params).items():
        if path not in leaves:
            leaves[path] = jnp.zeros(np.shape(leaf), jnp.float32)
    return tree_lib.replace(params, leaves)
