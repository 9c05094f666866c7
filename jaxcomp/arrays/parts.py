"""A compressed leaf taken apart for a file, and the checks that putting it together makes."""

import math
from collections.abc import Set
from typing import Any, NamedTuple

import jax
import jax.dtypes
import jax.numpy as jnp
import numpy as np

_LARGEST_EMPTY = 1 << 31
_MOST_AXES = 60  # NumPy has 64 at most, and packing splits some


class Symbols(NamedTuple):
    """Small unsigned integers that an entropy coder may shorten.

    Attributes:
        values: unsigned integers below ``alphabet``, one a weight or one a group or block of them.
        alphabet: how many symbols there are.
    """

    values: np.ndarray
    alphabet: int


class Parts(NamedTuple):
    """A compressed leaf taken apart for a file: nothing but names, numbers and arrays.

    Attributes:
        static: JSON-able facts (ints, strings, booleans, None, lists of them).
        symbols: what is worth entropy-coding.
        arrays: what is stored as it is.
    """

    static: dict[str, Any]
    symbols: dict[str, Symbols]
    arrays: dict[str, np.ndarray]


def check_names(
    parts: Parts,
    *,
    static: Set[str],
    symbols: Set[str],
    arrays: Set[str],
    optional: Set[str] = frozenset(),
) -> None:
    """Raise ``ValueError`` unless ``parts`` has exactly these names (and perhaps ``optional``).

    Args:
        parts: what a file claims to be a leaf.
        static: names wanted in ``parts.static``.
        symbols: names wanted in ``parts.symbols``.
        arrays: names wanted in ``parts.arrays``.
        optional: names that ``parts.arrays`` may have besides.

    Example:
        >>> check_names(Parts({}, {}, {}), static={"bits"}, symbols=set(), arrays=set())
        Traceback (most recent call last):
        ...
        ValueError: static must hold 'bits', not nothing
    """
    for kind, wanted, allowed in (
        ("static", static, static),
        ("symbols", symbols, symbols),
        ("arrays", arrays, arrays | optional),
    ):
        there = getattr(parts, kind)
        if not isinstance(there, dict):
            raise ValueError(f"{kind} must be a dict, not {type(there).__name__}")
        if not wanted <= there.keys() <= allowed:
            listed = ", ".join(sorted(map(repr, there))) or "nothing"
            raise ValueError(
                f"{kind} must hold {', '.join(sorted(map(repr, wanted))) or 'nothing'}, "
                f"not {listed[:200]}"
            )


def read_int(value: Any, name: str, low: int, high: int) -> int:
    """``value`` if it is an int (a bool is none) from ``low`` to ``high``, else ``ValueError``.

    Example:
        >>> read_int(4, "bits", 1, 8)
        4
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be an int from {low} to {high}, not {value!r:.60}")
    return value


def read_dtype(value: Any) -> np.dtype:
    """The floating dtype of this name, else ``ValueError``.

    Example:
        >>> read_dtype("bfloat16")
        dtype(bfloat16)
    """
    try:
        dtype = jnp.dtype(value) if isinstance(value, str) else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.name != value or not _is_float(dtype):
        hint = "; float64 needs jax_enable_x64" if value == "float64" else ""
        raise ValueError(f"dtype must name a floating dtype that JAX has, not {value!r:.60}{hint}")
    return dtype


def read_floats(parts: Parts, name: str) -> np.ndarray:
    """``parts.arrays[name]`` if its dtype is floating and JAX has it, else ``ValueError``.

    Example:
        >>> read_floats(Parts({}, {}, {"scale": np.ones(1, np.float32)}), "scale")
        array([1.], dtype=float32)
    """
    array = read_array(parts.arrays[name], name)
    if not _is_float(array.dtype):
        raise ValueError(f"{name} must be floating in a dtype that JAX has, not {array.dtype}")
    return array


def read_symbols(parts: Parts, name: str, alphabet: int) -> np.ndarray:
    """``parts.symbols[name]`` if all are in ``[0, alphabet)``, else ``ValueError``.

    Args:
        parts: what a file claims to be a leaf.
        name: which symbols.
        alphabet: how many symbols the rest of the leaf allows, at most 65,536.

    Returns:
        The symbols as ``uint8`` (up to 256 symbols) or ``uint16``; at least one axis.

    Example:
        >>> read_symbols(Parts({}, {"mask": Symbols(np.array([0, 1]), 2)}, {}), "mask", 2)
        array([0, 1], dtype=uint8)
    """
    symbols = parts.symbols[name]
    if not isinstance(symbols, Symbols):
        raise ValueError(f"{name} must be Symbols, not {type(symbols).__name__}")
    read_int(symbols.alphabet, f"the alphabet of {name}", alphabet, alphabet)
    values = read_array(symbols.values, name)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be integers, not {values.dtype}")
    if values.ndim == 0:
        raise ValueError(f"{name} must have at least one axis")
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < alphabet:
        raise ValueError(
            f"{name} must be in [0, {alphabet}), not from {values.min()} to {values.max()}"
        )
    return values.astype(np.uint8 if alphabet <= 256 else np.uint16)


def read_array(array: Any, name: str) -> np.ndarray:
    """``array`` if it is one, in this machine's byte order, with sane axes; else ``ValueError``.

    Example:
        >>> read_array(np.zeros(2, ">f4"), "scale")
        Traceback (most recent call last):
        ...
        ValueError: scale must be in this machine's byte order, not >f4
    """
    if not isinstance(array, np.ndarray | jax.Array):
        raise ValueError(f"{name} must be an array, not {type(array).__name__}")
    array = np.asarray(array)
    if not array.dtype.isnative:
        raise ValueError(f"{name} must be in this machine's byte order, not {array.dtype}")
    # An array without elements costs a liar nothing, whatever its other axes: (0, 2**62).
    empty = 0 in array.shape and math.prod(max(n, 1) for n in array.shape) > _LARGEST_EMPTY
    if empty or array.ndim > _MOST_AXES:
        raise ValueError(f"{name} has an impossible shape: {array.ndim} axes, {array.shape[:8]}")
    return array


def which_kept(dense: np.ndarray, mask: Any = None) -> np.ndarray:
    """Which weights a sparse leaf keeps: those of a mask, or else those that are not zero.

    Args:
        dense: the weights.
        mask: True where a weight is kept, or None.

    Returns:
        Booleans of the weights' shape.

    Raises:
        ValueError: the mask has another shape, or a weight outside of it is not zero.

    Example:
        >>> which_kept(np.ones(2), np.array([True, False]))
        Traceback (most recent call last):
        ...
        ValueError: the weight at [1] is outside the mask and not zero: multiply by the mask first
    """
    keep = dense != 0 if mask is None else np.asarray(mask, bool)
    if keep.shape != dense.shape:
        raise ValueError(f"a mask of shape {keep.shape} does not fit weights of {dense.shape}")
    lost = (dense != 0) & ~keep
    if np.any(lost):
        raise ValueError(
            f"the weight at {np.argwhere(lost)[0].tolist()} is outside the mask and not zero: "
            "multiply by the mask first"
        )
    return keep


def to_device(array: np.ndarray) -> jax.Array:
    """A copy of ``array`` on the default device, with nothing compiled.

    Example:
        >>> to_device(np.zeros(2, np.float32))
        Array([0., 0.], dtype=float32)
    """
    # `jnp.asarray` compiles anew for every shape; `device_put` may share the caller's memory.
    return jax.device_put(np.array(array))


def _is_float(dtype: np.dtype) -> bool:
    # NumPy also has a float128, which JAX passes as canonical and then refuses.
    return (
        jnp.issubdtype(dtype, jnp.floating)
        and dtype.itemsize <= 8
        and jax.dtypes.canonicalize_dtype(dtype) == dtype
    )
