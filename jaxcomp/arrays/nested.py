"""A leaf within a leaf, taken apart for a file: what leaves that wrap another one share."""

from collections.abc import Mapping, Set
from typing import Any

from jaxcomp.arrays.base import CompressedArray
from jaxcomp.arrays.block_sparse import BlockSparseArray
from jaxcomp.arrays.codebook import CodebookArray
from jaxcomp.arrays.grid import GridArray
from jaxcomp.arrays.hashed import HashedArray
from jaxcomp.arrays.low_rank import LowRankArray
from jaxcomp.arrays.nm_sparse import NMSparseArray
from jaxcomp.arrays.parts import Parts, check_names
from jaxcomp.arrays.quantized import QuantizedArray
from jaxcomp.arrays.sparse import SparseArray
from jaxcomp.arrays.vector_codebook import VectorCodebookArray

Kinds = Mapping[str, type[CompressedArray]]

# Leaves that hold no other leaf, by the names that files have for them.
PLAIN_KINDS: Kinds = {
    "quantized": QuantizedArray,
    "grid": GridArray,
    "codebook": CodebookArray,
    "sparse": SparseArray,
    "nm_sparse": NMSparseArray,
    "block_sparse": BlockSparseArray,
    "low_rank": LowRankArray,
    "vector_codebook": VectorCodebookArray,
    "hashed": HashedArray,
}

_INNER = "inner"
_PREFIX = "inner."


def nest(own: Parts, inner: Any, kinds: Kinds) -> Parts:
    """The parts of a leaf and of the one that it wraps, as those of one leaf.

    The inner leaf's names begin with ``inner.``, and the number ``inner`` is the name of its kind.

    Args:
        own: the wrapping leaf's parts.
        inner: the leaf within.
        kinds: what may lie within, by name.

    Returns:
        All parts; JSON-able facts, symbols and arrays as before.

    Raises:
        ValueError: a leaf of this kind cannot lie within, or its fields do not fit each other.

    Example:
        >>> import jax.numpy as jnp
        >>> leaf, kinds = SparseArray.encode(jnp.eye(2)), {"s": SparseArray}
        >>> parts = nest(Parts({"a": 1}, {}, {}), leaf, kinds)
        >>> parts.static, list(parts.symbols), list(parts.arrays)
        ({'a': 1, 'inner': 's'}, ['inner.mask'], ['inner.values'])
    """
    kind = next((name for name, known in kinds.items() if known is type(inner)), None)
    if kind is None:
        raise ValueError(
            f"a {type(inner).__name__} cannot lie within another leaf of this kind, only "
            f"{', '.join(known.__name__ for known in kinds.values())}"
        )
    static, symbols, arrays = (
        {_PREFIX + name: part for name, part in section.items()} for section in inner.to_parts()
    )
    static = {**own.static, _INNER: kind, **static}
    return Parts(static, {**own.symbols, **symbols}, {**own.arrays, **arrays})


def unnest(
    parts: Parts, kinds: Kinds, *, static: Set[str] = frozenset(), arrays: Set[str] = frozenset()
) -> tuple[Parts, CompressedArray]:
    """Undo :func:`nest`.

    Args:
        parts: what a file claims to be such a leaf.
        kinds: what may lie within, by name.
        static: names that the wrapping leaf has in ``parts.static``.
        arrays: names that it has in ``parts.arrays``.

    Returns:
        The wrapping leaf's own parts, which have exactly these names, and the leaf within.

    Raises:
        ValueError: other names, an unknown kind, or parts that do not make a leaf of it.

    Example:
        >>> unnest(Parts({"inner": "unheard"}, {}, {}), {})
        Traceback (most recent call last):
        ...
        ValueError: inner must name a kind of leaf that can lie within (), not 'unheard'
    """
    own, inner = zip(*map(_split, parts), strict=True)
    mine = Parts(*own)
    check_names(mine, static={_INNER, *static}, symbols=set(), arrays=arrays)
    kind = mine.static[_INNER]
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"{_INNER} must name a kind of leaf that can lie within ({', '.join(kinds)}), "
            f"not {kind!r:.60}"
        )
    try:
        return mine, kinds[kind].from_parts(Parts(*inner))
    except ValueError as error:
        raise ValueError(f"the leaf within: {error}") from error


def _split(section: Any) -> tuple[Any, Any]:
    """The wrapping leaf's names, and those of the leaf within as it knows them."""
    if not isinstance(section, dict):
        return section, {}

    def within(name: Any) -> bool:
        return isinstance(name, str) and name.startswith(_PREFIX)

    return (
        {name: part for name, part in section.items() if not within(name)},
        {name[len(_PREFIX) :]: part for name, part in section.items() if within(name)},
    )
