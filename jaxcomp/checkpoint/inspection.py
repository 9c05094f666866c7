"""What is in a file: a row of figures for each leaf."""

import dataclasses
import os
from typing import Any

import numpy as np

from jaxcomp.arrays import CompressedArray
from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.checkpoint.leaves import LeafSpec
from jaxcomp.checkpoint.loading import Plan, blame, leaf_bytes, make_plan, read_leaf
from jaxcomp.checkpoint.manifest import show


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """One array of a file.

    Attributes:
        path: its path, joined by ``/``.
        form: ``dense``, or what the compressed leaf says of itself.
        shape: of the dense array.
        dtype: name of the dense array's dtype.
        parameters: elements of the dense array.
        bytes: of the file that hold the leaf, with checksums of its own; the manifest not.
        bits_per_weight: ``8 * bytes / parameters``; 0 for an empty array.
        sparsity: fraction of the dense elements that are exactly zero; 0 for an empty array.
    """

    path: str
    form: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes: int
    bits_per_weight: float
    sparsity: float


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What is in a file.

    Attributes:
        path: the file.
        file_bytes: bytes of the file.
        version: of its format.
        metadata: what was given to :func:`save`.
        leaves: its arrays, in order; None and Python scalars stand in the manifest only.
        overhead_bytes: bytes that belong to no leaf: header, manifest, padding. With the bytes of
            all leaves they make ``file_bytes``.
    """

    path: str
    file_bytes: int
    version: int
    metadata: dict[str, Any]
    leaves: tuple[LeafInfo, ...]
    overhead_bytes: int


def inspect(path: str | os.PathLike, *, max_bytes: int | None = None) -> Inspection:
    """Say what is in a file, leaf by leaf; holds one decoded leaf in memory at a time.

    Args:
        path: the file.
        max_bytes: as in :func:`load`; one dense array may not take more either.

    Returns:
        Figures of the file and of every leaf.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, hostile, written by a newer jaxcomp, or too large.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> from jaxcomp.checkpoint import save
        >>> path = tempfile.mkdtemp() + "/model.jxc"
        >>> _ = save(path, {"bias": jnp.array([0.0, 1.0])}, metadata={"accuracy": 0.5})
        >>> found = inspect(path)
        >>> found.metadata, found.leaves[0].sparsity, found.leaves[0].bytes
        ({'accuracy': 0.5}, 0.5, 8)
    """
    with blame(path):
        plan = make_plan(path, max_bytes)
        leaves = tuple(_describe(plan, spec) for spec in plan.leaves)
    return Inspection(
        path=os.fspath(path),
        file_bytes=plan.file_bytes,
        version=plan.container.version,
        metadata=plan.metadata,
        leaves=leaves,
        overhead_bytes=plan.file_bytes - sum(leaf.bytes for leaf in leaves),
    )


def _describe(plan: Plan, spec: LeafSpec) -> LeafInfo:
    leaf = read_leaf(plan, spec)
    parameters, dtype = int(leaf.size), np.dtype(leaf.dtype)
    if parameters * dtype.itemsize > plan.limit:
        raise CheckpointError(
            f"{show(spec.path)}: the dense array would take {parameters * dtype.itemsize} bytes, "
            f"more than max_bytes = {plan.limit}: pass a larger max_bytes"
        )
    size = leaf_bytes(plan, spec)
    return LeafInfo(
        path=show(spec.path),
        form=leaf.form() if isinstance(leaf, CompressedArray) else "dense",
        shape=tuple(leaf.shape),
        dtype=dtype.name,
        parameters=parameters,
        bytes=size,
        bits_per_weight=8 * size / parameters if parameters else 0.0,
        sparsity=_sparsity(spec, leaf) if parameters else 0.0,
    )


def _sparsity(spec: LeafSpec, leaf: Any) -> float:
    try:
        dense = np.asarray(leaf.decode() if isinstance(leaf, CompressedArray) else leaf)
    except Exception as error:
        # Whatever a leaf's class makes of parts that lie, the file is at fault.
        raise CheckpointError(f"{show(spec.path)}: cannot be decoded: {error}") from error
    if dense.dtype.kind == "V":
        dense = dense.astype(np.float32)
    return 1.0 - int(np.count_nonzero(dense)) / dense.size
