"""A point between two steps of channel removal, in a file: where to go on after a kill.

The file says which call wrote it, see :mod:`jaxcomp.checkpoint.resuming`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxcomp import tree as tree_lib
from jaxcomp.checkpoint import CheckpointError, load, save
from jaxcomp.checkpoint.resuming import SCALARS, check_call, take_apart
from jaxcomp.prune.channels.selection import Kept

FILE = "channels.jxc"
_FORMAT = 1
_NAMES = {"format", "call", "done", "units", "notes", "params", "state"}


class Point(NamedTuple):
    """What one step leaves for the next.

    Attributes:
        done: steps finished.
        units: by group, which units stay.
        notes: of the last cut.
        params: the smaller parameters, fine-tuned.
        state: the user's, of the same size.
    """

    done: int
    units: Kept
    notes: tuple[str, ...]
    params: Any
    state: Any


def write_point(path: str, call: Mapping[str, str], point: Point) -> None:
    """Replace the file of an earlier point by this one.

    Args:
        path: the file.
        call: what tells the call that writes it from others.
        point: the point.

    Raises:
        TypeError: a leaf of the state that a file cannot hold.
        OSError: the file cannot be written.
    """
    tree = {
        "format": _FORMAT,
        "call": dict(call),
        "done": point.done,
        "units": dict(point.units),
        "notes": list(point.notes),
        "params": take_apart("params", point.params),
        "state": take_apart("state", point.state),
    }
    save(path, tree)


def read_point(
    path: str,
    call: Mapping[str, str],
    steps: int,
    sizes: Mapping[str, int],
    shrunk: Callable[[Kept], tuple[Any, Any]],
) -> Point:
    """Read what :func:`write_point` wrote.

    Args:
        path: the file.
        call: what tells this call from others.
        steps: how many there are.
        sizes: by group that may lose units, how many it has.
        shrunk: by which units stay, the parameters and the state that the call began with, cut:
            they give the structure, and where sharded leaves lie.

    Returns:
        The point.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another call wrote the file.
        CheckpointError: the file is damaged, or holds something else.
    """
    tree = load(path)
    if not isinstance(tree, dict) or tree.keys() != _NAMES or tree["format"] != _FORMAT:
        raise CheckpointError(f"{path}: not a file that this version wrote between two steps")
    check_call(path, tree["call"], call)
    try:
        done = tree["done"]
        if type(done) is not int or not 1 <= done <= steps:
            raise ValueError(f"{done!r:.60} of {steps} steps are finished")
        units = {name: np.array(mask) for name, mask in tree["units"].items()}
        for name, mask in units.items():
            if mask.dtype != bool or mask.shape != (sizes[name],) or not mask.any():
                raise ValueError(f"units of {name}: {mask.dtype} of shape {mask.shape}")
        params, state = shrunk(units)
        point = Point(
            done,
            units,
            tuple(map(str, tree["notes"])),
            _restored("params", tree["params"], params),
            _restored("state", tree["state"], state),
        )
        _check_shapes(point.params, params)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit this call: {error}") from error
    return point


def _restored(name: str, stored: list[list[Any]], like: Any) -> Any:
    """A tree in the structure of another."""
    leaves = tree_lib.flatten(like, is_leaf=lambda _: False)
    paths = ["/".join(part for part in (name, path) if part) for path in leaves]
    if [path for path, _, _ in stored] != paths:
        raise ValueError(f"{name}: other leaves than those that the call began with")
    news = [
        _put_together(path, kind, value, leaf)
        for (path, kind, value), leaf in zip(stored, leaves.values(), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), news)


def _put_together(path: str, kind: str, value: Any, like: Any) -> Any:
    if kind == "python" and type(value) in SCALARS:
        return value
    if kind in ("numpy", "scalar"):
        array = np.array(value)
        return array[()] if kind == "scalar" else array
    if not isinstance(value, jax.Array):
        raise ValueError(
            f"{path}: {value.dtype}, which JAX would narrow: call "
            "jax.config.update('jax_enable_x64', True) first"
        )
    if kind.startswith("key "):
        value = jax.random.wrap_key_data(value, impl=kind.removeprefix("key "))
    elif kind == "weak":
        # A weak type decides what the array is promoted to; a file holds none.
        zeros = jnp.full(value.shape, np.zeros((), value.dtype).item())
        value = zeros.at[...].set(value) if zeros.dtype == value.dtype else value
    elif kind != "jax":
        raise ValueError(f"{path}: a leaf of kind {kind!r:.60}")
    sharding = getattr(like, "sharding", None)
    placed = isinstance(sharding, NamedSharding) and like.shape == value.shape
    return jax.device_put(value, sharding) if placed else value


def _check_shapes(params: Any, like: Any) -> None:
    expected = tree_lib.flatten(like, is_leaf=lambda _: False)
    for path, leaf in tree_lib.flatten(params, is_leaf=lambda _: False).items():
        goal = expected[path]
        if (leaf.shape, leaf.dtype) != (goal.shape, goal.dtype):
            raise ValueError(
                f"{path}: {leaf.dtype} {leaf.shape}, not the {goal.dtype} {goal.shape} of the cut"
            )
