"""Candidates of one structure as one: their numbers become arrays with a leading axis."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import checks
from jaxcomp import tree as tree_lib

_NUMBERS = (bool, int, float, complex, np.generic)


class Group(NamedTuple):
    """Candidates that one program can evaluate.

    Attributes:
        indices: their places among all candidates.
        static: what they have in common and the program is made for, by path.
        structure: of a candidate.
    """

    indices: tuple[int, ...]
    static: dict[str, Any]
    structure: Any


def stack(candidates: Any) -> Any:
    """Candidates side by side: a tree of arrays whose first axis counts them.

    Args:
        candidates: trees of one structure, of numbers, arrays and PRNG keys.

    Returns:
        The same structure; Python's integers as int32, floats as float32 (wider ones where JAX
        allows them), bools as bool.

    Raises:
        TypeError: they are no list; a leaf is no number and no array, such as a string: see
            :func:`groups`.
        ValueError: there are no candidates; two differ in structure, or in the shape of a leaf; an
            integer is out of range.

    Example:
        >>> stack([{"rate": 0.5, "width": 8}, {"rate": 1, "width": 16}])
        {'rate': Array([0.5, 1. ], dtype=float32), 'width': Array([ 8, 16], dtype=int32)}
        >>> stack([{"act": "relu"}, {"act": "gelu"}])
        Traceback (most recent call last):
        ...
        TypeError: act: a candidate has 'relu' here, which no array can hold: group by it with ...
    """
    _check_list(candidates)
    if len(candidates) == 0:
        raise ValueError("candidates is empty: their structure is not known")
    structure = jax.tree.structure(candidates[0])
    rows = [tree_lib.flatten(candidate, is_leaf=lambda _: False) for candidate in candidates]
    for index, (candidate, row) in enumerate(zip(candidates, rows, strict=True)):
        if jax.tree.structure(candidate) != structure:
            raise ValueError(_difference(index, rows[0], row))
    columns = [_column(path, [row[path] for row in rows]) for path in rows[0]]
    return jax.tree.unflatten(structure, columns)


def groups(candidates: Any, static: Any = ()) -> list[Group]:
    """The candidates that share one structure and all static parts.

    Candidates of several depths have several structures, and so need several programs.

    Args:
        candidates: trees of numbers, arrays, strings, functions.
        static: patterns of the numbers that a program is made for, such as ``"*/width"`` where
            widths are the shapes of arrays; parts that only some candidates have may be named too.
            What is no number and no array is static anyway.

    Returns:
        Groups in the order of their first candidates.

    Raises:
        TypeError: candidates are no list; a static part is an array, or cannot be compared with
            others (no hash).

    Example:
        >>> acts = ("relu", "tanh", "relu")
        >>> found = groups([{"act": act, "rate": 0.1 * i} for i, act in enumerate(acts)])
        >>> [(group.indices, group.static) for group in found]
        [((0, 2), {'act': 'relu'}), ((1,), {'act': 'tanh'})]
    """
    _check_list(candidates)
    patterns = checks.as_patterns(static) if static not in ((), []) else ()
    found: dict[Any, Group] = {}
    for index, candidate in enumerate(candidates):
        leaves = tree_lib.flatten(candidate, is_leaf=lambda _: False)
        chosen = {path for pattern in patterns for path in tree_lib.matching(pattern, leaves)}
        fixed = {
            path: _hashable(path, leaf)
            for path, leaf in leaves.items()
            if path in chosen or not is_array(leaf)
        }
        structure = jax.tree.structure(candidate)
        # The type too: 1, 1.0 and True are equal, and make different programs.
        identity = structure, tuple((path, type(value), value) for path, value in fixed.items())
        group = found.get(identity, Group((), fixed, structure))
        found[identity] = group._replace(indices=(*group.indices, index))
    return list(found.values())


def numbers(candidate: Any, static: dict[str, Any]) -> tree_lib.Leaves:
    """What is left of a candidate beside its static parts, by path.

    Example:
        >>> numbers({"act": "relu", "a": 1}, {"act": "relu"})
        {'a': 1}
    """
    leaves = tree_lib.flatten(candidate, is_leaf=lambda _: False)
    return tree_lib.Leaves((path, leaf) for path, leaf in leaves.items() if path not in static)


def whole(group: Group, found: Mapping[str, Any]) -> Any:
    """A candidate of a group from its :func:`numbers`.

    Example:
        >>> (group,) = groups([{"act": "relu", "a": 1}])
        >>> whole(group, {"a": 5})
        {'a': 5, 'act': 'relu'}
    """
    places = jax.tree.unflatten(group.structure, range(group.structure.num_leaves))
    given = {**group.static, **found}
    paths = tree_lib.flatten(places, is_leaf=lambda _: False)
    return jax.tree.unflatten(group.structure, [given[path] for path in paths])


def is_array(leaf: Any) -> bool:
    """Whether a leaf can be part of an array: a number, an array or a PRNG key.

    Example:
        >>> is_array(0.5), is_array(np.zeros(2)), is_array("relu")
        (True, True, False)
    """
    return isinstance(leaf, (*_NUMBERS, np.ndarray, jax.Array))


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of new-style PRNG keys.

    Example:
        >>> is_key(jax.random.key(0)), is_key(0)
        (True, False)
    """
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def data_of(leaf: Any) -> np.ndarray:
    """A leaf on the host, where any number of rows is taken without a program; keys as numbers.

    Example:
        >>> data_of(jax.random.key(5))
        array([0, 5], dtype=uint32)
    """
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def as_key(like: Any, data: Any) -> Any:
    """What :func:`data_of` gave, as keys where the leaf had keys.

    Example:
        >>> as_key(jax.random.key(5), np.array([0, 7], np.uint32))
        Array((), dtype=key<fry>) overlaying:
        [0 7]
    """
    if not is_key(like):
        return data
    return jax.random.wrap_key_data(jax.device_put(data), impl=jax.random.key_impl(like))


def count(stacked: Any) -> int:
    """How many candidates stand side by side.

    Raises:
        TypeError: a leaf is no array.
        ValueError: there is no leaf; one has no first axis, or another number of candidates.

    Example:
        >>> count({"a": np.zeros((3, 2)), "b": np.zeros(4)})
        Traceback (most recent call last):
        ...
        ValueError: b: 4 candidates, but 3 elsewhere: the first axis of every leaf counts them
    """
    found = None
    for path, leaf in tree_lib.flatten(stacked, is_leaf=lambda _: False).items():
        if not is_array(leaf):
            raise TypeError(
                f"{path or 'candidates'}: {leaf!r:.40} is no array: use search.stack(candidates)"
            )
        shape = np.shape(leaf)
        if len(shape) == 0:
            raise ValueError(f"{path or 'candidates'}: no first axis: use search.stack(candidates)")
        if found is not None and shape[0] != found:
            raise ValueError(
                f"{path}: {shape[0]} candidates, but {found} elsewhere: the first axis of every "
                "leaf counts them"
            )
        found = shape[0]
    if found is None:
        raise ValueError("candidates have no leaves: there is nothing to count")
    return found


def _check_list(candidates: Any) -> None:
    if not isinstance(candidates, (list, tuple)):
        raise TypeError(f"candidates must be a list of them, not {type(candidates).__name__}")


def _column(path: str, values: list[Any]) -> Any:
    name = path or "candidates"
    for value in values:
        if not is_array(value):
            raise TypeError(
                f"{name}: a candidate has {value!r:.40} here, which no array can hold: group by it "
                "with search.groups, or choose by number"
            )
    shapes = dict.fromkeys(np.shape(value) for value in values)
    if len(shapes) > 1:
        kinds = " and ".join(map(str, list(shapes)[:2]))
        raise ValueError(f"{name}: shapes {kinds}: candidates side by side need one")
    if any(isinstance(value, jax.Array) for value in values):
        return jnp.stack(jax.device_put(values))
    dtype = jnp.result_type(*values)
    # NumPy would wrap them around without a word.
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        for value in values:
            if np.size(value) and not (limits.min <= np.min(value) and np.max(value) <= limits.max):
                raise ValueError(f"{name}: {value!r:.40} is beyond {dtype}: use a float")
    return jax.device_put(np.stack([np.asarray(value).astype(dtype) for value in values]))


def _difference(index: int, first: Any, other: Any) -> str:
    extra = [path for path in other if path not in first]
    lacking = [path for path in first if path not in other]
    if lacking:
        words = f"candidate {index} lacks '{lacking[0]}', which candidate 0 has"
    elif extra:
        words = f"candidate {index} has '{extra[0]}', which candidate 0 lacks"
    else:
        words = f"candidate {index} is nested otherwise than candidate 0"
    return f"candidates: {words}: see search.groups for those of several structures"


def _hashable(path: str, value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        kind = "an array" if hasattr(value, "shape") else type(value).__name__
        raise TypeError(f"{path}: {kind} cannot be static: numbers and strings can") from None
    return value
