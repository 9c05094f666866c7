"""What the losses take features for: maps over positions, or one row an example.

Under a mesh with explicit axes an example is gathered to one device, and so is what all examples
are compared with; under automatic axes XLA decides.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcomp.distill.inputs import as_floats, as_mask, check_axis, check_same_batch


def as_maps(axis: int, where: Any, **arrays: Any) -> tuple[list[Array], list[Array]]:
    """Feature maps with their channels last, zero where they do not count.

    Args:
        axis: the channel axis.
        where: None, or boolean: (batch,) or (batch, *positions).
        **arrays: by the name of the argument; they share the batch.

    Returns:
        The maps, (batch, *positions, channels) in one float dtype; and a mask for each, of its
        shape without channels.

    Raises:
        TypeError: arrays that are not floating point, a mask that is not boolean.
        ValueError: arrays without positions, of different batches, a mask that does not fit.

    Example:
        >>> maps, masks = as_maps(1, None, student=jnp.ones((2, 16, 8, 8)))
        >>> maps[0].shape, masks[0].shape
        ((2, 8, 8, 16), (2, 8, 8))
    """
    made = dict(zip(arrays, as_floats(**arrays), strict=True))
    check_same_batch(**made)
    maps, masks = [], []
    for name, x in made.items():
        at = check_axis(name, x, axis)
        if at == 0 or x.ndim < 3 or 0 in x.shape:
            message = f"{name} {x.shape} must be (batch, *positions, channels)"
            raise ValueError(f"{message}, with something on each axis: pass the right axis=.")
        x = jnp.moveaxis(gathered(x, 1), at, -1)
        keep = jnp.broadcast_to(as_mask(where, x.shape[:1], x.shape[:-1]), x.shape[:-1])
        maps.append(jnp.where(keep[..., None], x, 0))
        masks.append(keep)
    return maps, masks


def check_same_positions(**maps: Array) -> None:
    """Raise unless two maps, channels last, have one resolution.

    Raises:
        ValueError: they do not.

    Example:
        >>> check_same_positions(student=jnp.ones((1, 4, 4, 2)), teacher=jnp.ones((1, 8, 8, 2)))
        Traceback (most recent call last):
        ...
        ValueError: student and teacher have positions (4, 4) and (8, 8): resize one.
    """
    (first, a), (second, b) = maps.items()
    if a.shape[:-1] != b.shape[:-1]:
        positions = f"{a.shape[1:-1]} and {b.shape[1:-1]}"
        raise ValueError(f"{first} and {second} have positions {positions}: resize one.")


def as_rows(student: Any, teacher: Any, where: Any) -> tuple[Array, Array, Array]:
    """Examples as rows, zero where they do not count.

    Args:
        student: float array, batch first.
        teacher: float array of the same batch; the rest of its shape may differ.
        where: None, or boolean (batch,).

    Returns:
        student (batch, features), teacher (batch, its features), and a mask (batch,).

    Raises:
        TypeError: arrays that are not floating point, a mask that is not boolean.
        ValueError: arrays of different batches or without features, a mask that does not fit.

    Example:
        >>> rows = as_rows(jnp.ones((2, 4, 4, 3)), jnp.ones((2, 5)), None)
        >>> [array.shape for array in rows]
        [(2, 48), (2, 5), (2,)]
    """
    s, t = as_floats(student=student, teacher=teacher)
    check_same_batch(student=s, teacher=t)
    for name, x in (("student", s), ("teacher", t)):
        if x.ndim < 2 or 0 in x.shape:
            raise ValueError(f"{name} {x.shape} must be (batch, ...), with features an example.")
    batch = len(s)
    keep = laid_as(jnp.broadcast_to(as_mask(where, (batch,)), (batch,)), s)
    s, t = (gathered(x, 1).reshape(batch, -1) for x in (s, t))
    s, t = (jnp.where(keep[:, None], x, 0) for x in (s, t))
    return s, t, keep


def laid_as(mask: Array, rows: Array) -> Array:
    """A mask (batch,) sharded as the first axis of rows is, where a mesh has explicit axes.

    Example:
        >>> laid_as(jnp.ones(2, bool), jnp.ones((2, 3))).shape
        (2,)
    """
    sharding = jax.typeof(rows).sharding
    spec = jax.P(*sharding.spec[:1])
    if jax.typeof(mask).sharding.spec == spec:
        return mask
    return jax.sharding.reshard(mask, jax.NamedSharding(sharding.mesh, spec))


def pairs(keep: Array) -> Array:
    """(batch, batch): the pairs of two different examples that both count.

    Example:
        >>> print(pairs(jnp.array([True, True, False])).astype(int))
        [[0 1 0]
         [1 0 0]
         [0 0 0]]
    """
    return all_pairs(keep) & ~jnp.eye(len(keep), dtype=bool)


def all_pairs(keep: Array) -> Array:
    """(batch, batch): the pairs of examples that both count, each with itself too.

    Example:
        >>> print(all_pairs(jnp.array([True, False])).astype(int))
        [[1 0]
         [0 0]]
    """
    return keep[:, None] & gathered(keep)[None, :]


def products(x: Array) -> Array:
    """(batch, batch): inner products of rows, in full precision on every device.

    Example:
        >>> print(products(jnp.array([[1.0, 2.0], [3.0, 4.0]])))
        [[ 5. 11.]
         [11. 25.]]
    """
    return jnp.matmul(x, gathered(x).T, precision=jax.lax.Precision.HIGHEST)


def gathered(x: Array, kept: int = 0) -> Array:
    """The array with only its first axes sharded; as it is, unless a mesh has explicit axes.

    Args:
        x: any array.
        kept: how many axes stay sharded.

    Example:
        >>> mesh = jax.make_mesh((len(jax.devices()),), ("batch",))
        >>> rows = jax.NamedSharding(mesh, jax.P("batch"))
        >>> x = jax.device_put(jnp.ones(len(jax.devices())), rows)
        >>> tuple(jax.typeof(gathered(x)).sharding.spec)
        (None,)
    """
    sharding = jax.typeof(x).sharding
    spec = jax.P(*sharding.spec[:kept], *[None] * (x.ndim - kept))
    if spec == sharding.spec:
        return x
    return jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, spec))


def scaled(x: Array) -> Array:
    """Rows over the largest magnitude among them, for losses to which the scale is nothing.

    Example:
        >>> print(scaled(jnp.array([[3e30, -4e30]])))
        [[ 0.75 -1.  ]]
    """
    top = jnp.max(jnp.abs(x))
    # A derivative in the scale would be zero: it cancels.
    return x / jax.lax.stop_gradient(jnp.where(top == 0, 1, top))
