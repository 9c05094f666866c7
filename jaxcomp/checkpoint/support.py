"""What a file can hold: every leaf is looked at before anything is encoded or written."""

import math
from typing import Any

import jax
import jax.core
import jax.dtypes
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jaxcomp.arrays import CompressedArray
from jaxcomp.checkpoint.leaves import KINDS
from jaxcomp.checkpoint.manifest import Path, show
from jaxcomp.checkpoint.raw import DTYPES


def check_leaf(path: Path, leaf: Any) -> None:
    """Raise unless the leaf can be stored.

    Args:
        path: its path in the tree.
        leaf: a JAX or NumPy array or scalar, or a compressed leaf.

    Raises:
        TypeError: the leaf is of a type or dtype that has no place in a file.
        ValueError: its values are not here: deleted, or on another process.

    Example:
        >>> check_leaf(("apply_fn",), print)
        Traceback (most recent call last):
        ...
        TypeError: apply_fn: builtin_function_or_method cannot be stored: save arrays, compressed
        leaves and Python scalars only
    """
    if not isinstance(leaf, CompressedArray):
        _check_array(show(path), leaf)
        return
    if type(leaf) not in KINDS.values():
        raise TypeError(
            f"{show(path)}: {type(leaf).__name__} has no place in a file; store its dense array, "
            "jaxcomp.decode(leaf)"
        )
    for field in jax.tree.leaves(leaf):
        _check_array(show(path), field)


def _check_array(name: str, leaf: Any) -> None:
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError(f"{name}: a traced value; call save outside jit, grad, vmap and scan")
    if isinstance(leaf, jax.Array):
        _check_jax(name, leaf)
    elif type(leaf) not in (np.ndarray, np.memmap) and not isinstance(leaf, np.generic):
        raise TypeError(f"{name}: {type(leaf).__name__} cannot be stored: {_remedy(leaf)}")
    if leaf.dtype.name not in DTYPES:
        raise TypeError(
            f"{name}: dtype {leaf.dtype} cannot be stored; convert the array to a numeric dtype"
        )
    if leaf.ndim and math.prod(n for n in leaf.shape if n) >= 1 << 62:
        raise ValueError(f"{name}: shape {leaf.shape} is too large to be stored")


def _check_jax(name: str, leaf: jax.Array) -> None:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(
            f"{name}: a PRNG key cannot be stored; store jax.random.key_data(key) and rebuild it "
            "with jax.random.wrap_key_data, or save only the parameters"
        )
    if leaf.is_deleted():
        raise ValueError(f"{name}: the array was deleted or donated; save what replaced it")
    if not leaf.is_fully_addressable:
        raise ValueError(
            f"{name}: parts of the array are on devices of other processes; gather it first with "
            "jax.experimental.multihost_utils.process_allgather, and save on one process"
        )


def _remedy(leaf: Any) -> str:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "it has a shape but no values"
    if isinstance(leaf, meta.AxisMetadata):
        return "take it out of its box with flax.core.meta.unbox"
    if isinstance(leaf, tuple) and hasattr(leaf, "_asdict"):
        return "store it as a dict, value._asdict()"
    if isinstance(leaf, np.ndarray):
        return "convert it with numpy.asarray"
    if isinstance(leaf, complex | bytes):
        return "wrap it in a NumPy array"
    if isinstance(leaf, dict | list | tuple | int | float | str):
        return "convert it to the plain Python type"
    if not jax.tree_util.all_leaves([leaf]):
        return "it is a pytree node of its own; store its fields as a dict"
    return "save arrays, compressed leaves and Python scalars only"
