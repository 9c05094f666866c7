"""What a call is given, looked at before anything is computed: messages name the argument."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.dtypes
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcomp import tree as tree_lib


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise unless a value is a whole number of at least ``least``.

    Args:
        name: of the argument.
        value: what was given.
        least: the smallest that will do.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is too small.

    Example:
        >>> check_count("rounds", 0)
        Traceback (most recent call last):
        ...
        ValueError: rounds is 0: at least 1 is needed
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a whole number, not {value!r:.60}")
    if value < least:
        raise ValueError(f"{name} is {value}: at least {least} is needed")


def check_amount(name: str, value: Any) -> None:
    """Raise unless a value is a finite real number of at least 0.

    Args:
        name: of the argument.
        value: what was given.

    Raises:
        TypeError: it is no real number.
        ValueError: it is negative, NaN or infinite.

    Example:
        >>> check_amount("damping", -0.01)
        Traceback (most recent call last):
        ...
        ValueError: damping is -0.01, but must be a finite number of at least 0
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number of at least 0, not {value!r:.60}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}, but must be a finite number of at least 0")


def is_number(value: Any) -> bool:
    """Whether a value is one real number: Python's, NumPy's, or a known array without axes.

    Example:
        >>> is_number(1), is_number(jnp.float32(0.5)), is_number("1"), is_number(True)
        (True, True, False, False)
    """
    if isinstance(value, (bool, np.bool_, Tracer)):
        return False
    if isinstance(value, (jax.Array, np.ndarray)):
        return value.shape == () and value.dtype.kind in "iuf"
    return isinstance(value, (int, float, np.integer, np.floating))


def check_arrays(**values: Any) -> None:
    """Raise ``TypeError`` unless all values, by the names of their arguments, are arrays.

    Example:
        >>> check_arrays(x=[1.0, 2.0])
        Traceback (most recent call last):
        ...
        TypeError: x must be an array, not a list: give jnp.asarray(x)
    """
    for name, value in values.items():
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise TypeError(
                f"{name} must be an array, not a {type(value).__name__}: give jnp.asarray({name})"
            )


def check_flag(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless a value is True or False, known before anything is traced.

    Example:
        >>> check_flag("dense_gradient", "no")
        Traceback (most recent call last):
        ...
        TypeError: dense_gradient must be True or False, not 'no'
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def check_function(name: str, value: Any, words: str) -> None:
    """Raise unless a value can be called.

    Args:
        name: of the argument.
        value: what was given.
        words: what it should be.

    Raises:
        TypeError: it cannot.

    Example:
        >>> check_function("loss", None, "(params, *batch) that returns one number")
        Traceback (most recent call last):
        ...
        TypeError: loss must be a function of (params, *batch) that returns one number, not None
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function of {words}, not {value!r:.60}")


def as_patterns(paths: Any) -> tuple[str, ...]:
    """Path patterns, of which a single one may be given as it is.

    Raises:
        TypeError: they are no patterns.
        ValueError: there are none.

    Example:
        >>> as_patterns("*/kernel"), as_patterns(["up/*", "down/*"])
        (('*/kernel',), ('up/*', 'down/*'))
    """
    patterns = (paths,) if isinstance(paths, str) else paths
    patterns = tuple(patterns) if isinstance(patterns, Iterable) else None
    if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"paths must be patterns, such as ['*/kernel'], not {paths!r:.60}")
    if not patterns:
        raise ValueError("paths is empty: give patterns of weights, or None for all of them")
    return patterns


def check_leaves(params: Any) -> None:
    """Raise unless every leaf can be an argument of a compiled function.

    Args:
        params: any tree.

    Raises:
        TypeError: a leaf is no array and no number.

    Example:
        >>> check_leaves({"act": max})
        Traceback (most recent call last):
        ...
        TypeError: act: builtin_function_or_method is no array: give the arrays of the model only...
    """
    for path, leaf in tree_lib.flatten(params).items():
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            raise TypeError(
                f"{path}: {type(leaf).__name__} is no array: give the arrays of the model only, "
                "such as eqx.partition(model, eqx.is_array)[0]"
            )


def choose(params: Any, paths: str | Sequence[str] | None) -> tree_lib.Leaves:
    """The leaves that patterns name; all that are compressed by default if there are none.

    Args:
        params: any tree.
        paths: patterns, see :func:`jaxcomp.tree.matching`.

    Returns:
        A selection, in the order of the tree.

    Raises:
        ValueError: a pattern matches no leaf, or there is none; there is no weight; a leaf is not
            finite.
        TypeError: a leaf is no array, or a chosen one not of floats; ``paths`` are no patterns.

    Example:
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> list(choose(params, None)), list(choose(params, "b*"))
        (['kernel'], ['bias'])
    """
    check_leaves(params)
    if paths is None:
        return tree_lib.select(params)
    leaves = tree_lib.flatten(params)
    named = tree_lib.assign(as_patterns(paths), leaves)
    return tree_lib.select(tree_lib.Leaves((p, leaf) for p, leaf in leaves.items() if p in named))


def one_number(value: Any) -> Any:
    """What a loss gives, if it can be differentiated.

    Args:
        value: what it returned, while it was traced.

    Returns:
        The value.

    Raises:
        TypeError: it is no floating scalar that JAX computed.

    Example:
        >>> one_number(0.5)
        Traceback (most recent call last):
        ...
        TypeError: loss must return one floating number, a jax scalar that it computes from ...
    """
    # A Python number has left the trace: its gradient would be zero everywhere, unnoticed.
    fine = isinstance(value, jax.Array) and value.shape == ()
    if not fine or not jnp.issubdtype(value.dtype, jnp.floating):
        what = f"{value.dtype} {value.shape}" if isinstance(value, jax.Array) else f"{value!r}"
        raise TypeError(
            "loss must return one floating number, a jax scalar that it computes from params, not "
            f"{what:.60}: take the mean over examples, and leave other outputs out"
        )
    return value


def check_key(key: Any) -> None:
    """Raise unless a value is one PRNG key, of the new kind or the old.

    Args:
        key: what was given.

    Raises:
        TypeError: it is not.

    Example:
        >>> check_key(0)
        Traceback (most recent call last):
        ...
        TypeError: key must be one PRNG key, such as jax.random.key(0), not 0
    """
    if isinstance(key, (jax.Array, np.ndarray)):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return
        if key.dtype == np.uint32 and key.ndim == 1:
            return
        what = f"an array of shape {key.shape} and dtype {key.dtype}"
    else:
        what = f"{key!r:.60}"
    raise TypeError(f"key must be one PRNG key, such as jax.random.key(0), not {what}")
