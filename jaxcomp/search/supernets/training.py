"""Train all sub-networks at once: the sandwich rule and in-place distillation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp import checks
from jaxcomp import tree as tree_lib
from jaxcomp.model.batches import checked
from jaxcomp.search.supernets.checks import check_candidate
from jaxcomp.search.supernets.net import Supernet


class Sandwich(NamedTuple):
    """What a step of the sandwich rule tells.

    Attributes:
        largest: the largest network's loss.
        others: (1 + randoms,): how far the smallest network and the random ones are from it, or
            their own losses where nothing is distilled.
        candidates: the random ones, as traced numbers.
        aux: what the forward pass of the largest network returned beside its outputs.
    """

    largest: Any
    others: Any
    candidates: tuple[Any, ...]
    aux: Any


def soft_cross_entropy(logits: Any, teacher_logits: Any) -> Any:
    """The cross-entropy of predictions with a teacher's, mean over the leading axes.

    Args:
        logits: (..., classes).
        teacher_logits: the same of the teacher, who does not learn from it.

    Returns:
        A scalar, float32 at least.

    Example:
        >>> import numpy as np
        >>> teacher = np.log(np.array([[0.5, 0.5]]))
        >>> print(f"{soft_cross_entropy(jnp.zeros((1, 2)), teacher):.4f}")
        0.6931
    """
    teacher = jax.lax.stop_gradient(jnp.asarray(teacher_logits))
    soft = jax.nn.softmax(_wide(teacher))
    # Classes that are ruled out by logits of -inf have no part in it.
    terms = jnp.where(soft > 0, soft * jax.nn.log_softmax(_wide(jnp.asarray(logits))), 0.0)
    return -jnp.mean(jnp.sum(terms, -1))


def _wide(logits: Any) -> Any:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def sandwich(
    net: Any,
    forward: Any,
    loss: Any,
    *,
    randoms: int = 2,
    distance: Any = soft_cross_entropy,
    has_aux: bool = False,
    always: Any = (),
) -> Callable[..., tuple[Any, Sandwich]]:
    """A loss that trains all sub-networks of a supernet.

    Each step the largest network learns from the labels, and the smallest and some random ones from
    what the largest says: the performance of all lies between these two.

    Args:
        net: the supernet.
        forward: ``forward(params, batch) -> outputs``, such as logits, as it is in training; with
            ``has_aux``, outputs and anything else, such as batch statistics.
        loss: ``loss(outputs, batch) -> scalar``.
        randoms: how many random sub-networks a step.
        distance: ``distance(outputs, teacher_outputs) -> scalar``; None: all learn from the labels.
        has_aux: whether ``forward`` returns a pair; the largest network's second part is told.
            Statistics of sub-networks are not kept: see :func:`recalibrate`.
        always: further candidates of every step.

    Returns:
        ``function(params, key, batch) -> (scalar, Sandwich)``, the sum over all networks; a pure
        function for ``jax.value_and_grad(function, has_aux=True)``.

    Raises:
        TypeError: ``net`` is no supernet, a function is none, or ``randoms`` is no whole number;
            ``forward`` does not return a pair where it should.
        ValueError: ``randoms`` is negative, or a candidate does not fit the space.

    Example:
        >>> from jaxcomp.search.supernets import supernet
        >>> def mlp(p, x):
        ...     return jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
        >>> net = supernet(mlp, params, jnp.ones((1, 3)), width={"up": (0.25, 0.5, 1.0)})
        >>> function = sandwich(
        ...     net,
        ...     lambda p, batch: mlp(p, batch["x"]),
        ...     lambda logits, batch: jnp.mean(logits**2),
        ...     randoms=1,
        ... )
        >>> batch = {"x": jnp.ones((4, 3))}
        >>> grads, told = jax.grad(function, has_aux=True)(params, jax.random.key(0), batch)
        >>> told.largest, told.others.shape
        (Array(576., dtype=float32), (2,))

    Yu and Huang, Universally Slimmable Networks (2019), algorithm 1; Cai, Gan, Wang, Zhang and Han,
    Once-for-All (2020), section 3.
    """
    if not isinstance(net, Supernet):
        raise TypeError(f"net must be of search.supernet, not {net!r:.60}")
    checks.check_function("forward", forward, "(params, batch)")
    checks.check_function("loss", loss, "(outputs, batch)")
    if distance is not None:
        checks.check_function("distance", distance, "(outputs, teacher_outputs)")
    checks.check_count("randoms", randoms, 0)
    if not isinstance(always, (list, tuple)):
        raise TypeError(f"always must be a list of candidates, not {always!r:.60}")
    for candidate in always:
        check_candidate(net, candidate)

    def outputs_of(params: Any, candidate: Any, batch: Any) -> Any:
        made = forward(net.masked(params, candidate), batch)
        if not has_aux:
            return made, None
        # Two rows of logits would be taken apart without a word.
        if not isinstance(made, tuple) or len(made) != 2:
            raise TypeError(
                f"forward must return (outputs, aux) with has_aux=True, not {type(made).__name__}"
            )
        return made

    def function(params: Any, key: Any, batch: Any) -> tuple[Any, Sandwich]:
        checks.check_key(key)
        teacher, aux = outputs_of(params, net.largest, batch)
        largest = checks.one_number(loss(teacher, batch))
        drawn = tuple(net.random(each) for each in jax.random.split(key, randoms))
        others = []
        for candidate in (net.smallest, *always, *drawn):
            made, _ = outputs_of(params, candidate, batch)
            soft = loss(made, batch) if distance is None else distance(made, _constant(teacher))
            others.append(checks.one_number(soft))
        total = largest + sum(others)
        return total, Sandwich(largest, jnp.stack(others), drawn, aux)

    return function


def _constant(tree: Any) -> Any:
    return jax.tree.map(jax.lax.stop_gradient, tree)


def recalibrate(update: Any, params: Any, batches: Any, *, tolerance: float = 1e-3) -> Any:
    """Give a sub-network running statistics of its own.

    Those of the supernet are of another network's activations. The statistics of each batch are
    read off what the model itself makes of running ones: it moves them from ``s`` to
    ``m s + (1 - m) batch``, so two passes, from 0 and from 1, give both ``m`` and ``batch``. What
    comes back is the plain mean over all batches, whatever the momentum ``m`` is.

    Args:
        update: ``update(params, batch) -> tree`` of the statistics as a training step moves them,
            by the same paths as in ``params``: ``model.apply(..., mutable=["batch_stats"])[1]`` for
            all of Linen's variables. What it computes must not depend on the old ones.
        params: masked or extracted parameters, with statistics.
        batches: whose statistics are taken; each as large as in training.
        tolerance: by how much the two passes may differ from a moving average.

    Returns:
        ``params`` with other statistics.

    Raises:
        TypeError: ``update`` is no function, or a statistic is not floating.
        ValueError: there are no batches or no statistics, a path is not in ``params`` or of another
            shape there, or a statistic is no moving average.

    Example:
        >>> params = {"mean": jnp.zeros(2)}
        >>> def update(p, x):
        ...     return {"mean": 0.9 * p["mean"] + 0.1 * x.mean(0)}
        >>> recalibrate(update, params, [jnp.ones((4, 2)), 3 * jnp.ones((4, 2))])["mean"].round(4)
        Array([2., 2.], dtype=float32)

    Cai, Gan, Wang, Zhang and Han, Once-for-All (2020), section 3, as its published code does it.
    """
    checks.check_function("update", update, "(params, batch)")
    sums: dict[str, Any] = {}
    count, read = 0, jax.jit(lambda params, batch: _statistics(update, params, batch))
    for batch in checked(batches):
        found, momenta = read(params, batch)
        if count == 0:
            _check_momenta(momenta, tolerance)
        sums = {path: sums.get(path, 0.0) + value for path, value in found.items()}
        count += 1
    if count == 0:
        raise ValueError("batches: there are none to take statistics of: give at least one")
    leaves = tree_lib.flatten(params)
    news = {path: (each / count).astype(leaves[path].dtype) for path, each in sums.items()}
    return tree_lib.replace(params, news)


def _statistics(update: Callable[..., Any], params: Any, batch: Any) -> Any:
    """The statistics of a batch by path, and the momenta that running ones move with."""
    leaves = tree_lib.flatten(params)
    paths = tree_lib.flatten(jax.eval_shape(update, params, batch))
    if not paths:
        raise ValueError("update returned no statistics: return those that a training step moves")
    for path, leaf in paths.items():
        if path not in leaves:
            raise ValueError(
                f"update returned '{path}', which is not in params; "
                f"{tree_lib.nearest(path, leaves)}: return the statistics at their own paths, such "
                "as {'batch_stats': ...}"
            )
        if leaf.shape != jnp.shape(leaves[path]):
            raise ValueError(
                f"{path}: update returned shape {leaf.shape}, but params have "
                f"{jnp.shape(leaves[path])}: return the statistic itself"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{path}: {leaf.dtype} is no statistic: return floating ones only")

    def moved(value: float) -> Any:
        old = {path: jnp.full_like(leaves[path], value) for path in paths}
        return tree_lib.flatten(update(tree_lib.replace(params, old), batch))

    low, high = moved(0.0), moved(1.0)
    momenta = {path: high[path] - low[path] for path in paths}
    return {path: low[path] / (1 - momenta[path]) for path in paths}, momenta


def _check_momenta(momenta: Any, tolerance: float) -> None:
    for path, momentum in momenta.items():
        least, most = float(momentum.min()), float(momentum.max())
        if not (-tolerance <= least and most < 1 and most - least <= tolerance):
            raise ValueError(
                f"{path}: is no moving average: from 0 and from 1 it moves to values that differ "
                f"by {least:.3g} to {most:.3g}: return averages only, of a pass in training"
            )
