"""What searches over pruned parameters share: their scores, their values, their names."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.checkpoint.resuming import describe
from jaxcomp.checks import as_patterns, check_function
from jaxcomp.prune import scores as scores_lib
from jaxcomp.prune.scores import RunningScore, Score


def identify(params: Any, scores: tree_lib.Leaves, **words: Any) -> dict[str, str]:
    """What tells one call from another: parameters, scores, and what is said of the rest.

    The values of the scores stand for the score and the evidence that they were made from.

    Args:
        params: the dense parameters; leaves that are no arrays or numbers by their name.
        scores: by path.
        **words: other things, by what they are called.

    Returns:
        By name, one line each.

    Example:
        >>> leaves = tree_lib.Leaves(kernel=jnp.ones(2))
        >>> list(identify(leaves, leaves, structure="Element()"))
        ['structure', 'params/kernel', 'scores/kernel']
    """
    lines = {name.replace("_", " "): str(value) for name, value in words.items()}
    for path, leaf in tree_lib.flatten(params, is_leaf=lambda _: False).items():
        name = f"params/{path}"
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, str)):
            (lines[name],) = describe("", leaf).values()
        else:
            lines[name] = getattr(leaf, "__qualname__", type(leaf).__qualname__)
    return lines | describe("scores", scores)


def score_leaves(
    params: Any, score: Score, evidence: Any, paths: str | Iterable[str] | None
) -> tree_lib.Leaves:
    """The scores of the weights that are to be pruned.

    Args:
        params: a parameter tree, or a selection.
        score: function of a leaf and its evidence.
        evidence: a tree like ``params``, or a selection of anything by path; None where the score
            needs none.
        paths: patterns of the weights that are meant; None: all.

    Returns:
        Scores by path.

    Raises:
        TypeError: the score is no function of a leaf and its evidence, or gives something else
            than floating numbers.
        ValueError: no weights, a pattern that matches none, no evidence for a leaf or for nothing,
            scores of another shape than the leaf's, NaN or infinite weights or scores.

    Example:
        >>> params = {"kernel": jnp.array([[-2.0, 1.0]]), "bias": jnp.ones(2)}
        >>> score_leaves(params, lambda weight, evidence: abs(weight), None, None)
        {'kernel': Array([[2., 1.]], dtype=float32)}
    """
    _check_score(score, evidence)
    leaves = tree_lib.select(params)
    if paths is not None:
        chosen = tree_lib.assign(as_patterns(paths), leaves)
        leaves = tree_lib.Leaves((path, leaves[path]) for path in leaves if path in chosen)
    known = _by_path(evidence)
    return tree_lib.Leaves(
        (path, _scored(path, leaf, score, known)) for path, leaf in leaves.items()
    )


def _check_score(score: Any, evidence: Any) -> None:
    if isinstance(score, RunningScore):
        raise TypeError(
            "score remembers train steps, and there are none here: give a function of a leaf and "
            "its evidence, such as scores.magnitude"
        )
    check_function("score", score, "a leaf and its evidence, such as scores.magnitude")
    if evidence is not None and score in (scores_lib.magnitude, scores_lib.l2):
        raise ValueError(
            f"scores.{score.__name__} reads no evidence: give a score that does, such as "
            "score=scores.taylor, or leave evidence out"
        )


def _scored(path: str, leaf: Any, score: Score, known: Mapping[str, Any] | None) -> Any:
    if known is not None and path not in known:
        raise ValueError(
            f"{path}: no evidence for this leaf; give a tree like params, or a selection by path; "
            f"{tree_lib.nearest(path, known)}"
        )
    try:
        scores = score(leaf, None if known is None else known[path])
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path}: {error}") from error
    if getattr(scores, "shape", None) != leaf.shape:
        raise ValueError(
            f"{path}: the score gave {getattr(scores, 'shape', scores)!s:.60}, but must give one "
            f"number for each weight: {tuple(leaf.shape)}"
        )
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"{path}: the score gave {scores.dtype}, but must give floating numbers")
    bad = int(jnp.sum(~jnp.isfinite(scores)))
    if bad:
        raise ValueError(
            f"{path}: {bad} of {scores.size} scores are NaN or infinite: mend the score, or the "
            "evidence"
        )
    return scores


def _by_path(evidence: Any) -> Mapping[str, Any] | None:
    if evidence is None or isinstance(evidence, tree_lib.Leaves):
        return evidence
    return tree_lib.flatten(evidence)


def check_value(value: Any) -> float:
    """What ``evaluate`` returned, as a float.

    Args:
        value: a real number or an array of one, without axes.

    Returns:
        The number.

    Raises:
        TypeError: it is something else.

    Example:
        >>> check_value(jnp.float32(0.5))
        0.5
    """
    array = np.asarray(value) if isinstance(value, (int, float, np.generic, np.ndarray)) else value
    number = isinstance(array, (np.ndarray, jax.Array)) and is_real_scalar(array)
    if not number or isinstance(value, bool):
        shape = getattr(value, "shape", ())
        what = f"an array of shape {shape}" if shape else f"{value!r:.60}"
        raise TypeError(
            f"evaluate must return one real number, higher is better, not {what}: for a loss, "
            "lambda params: -loss(params)"
        )
    return float(array)


def is_real_scalar(array: Any) -> bool:
    """Whether an array, or its shape and dtype, is one integer or floating number.

    Example:
        >>> is_real_scalar(jnp.ones(())), is_real_scalar(jnp.ones(1)), is_real_scalar(np.bool_(1))
        (True, False, False)
    """
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    return real and array.shape == ()
