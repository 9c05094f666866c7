"""A mask of a matrix with one bit a weight, laid out so that a kernel unpacks it in registers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

# Rows that share their bytes; the largest that divides a matrix is taken.
_BLOCKS = (1024, 512, 256)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PackedMask:
    """Which weights of a matrix are kept, a bit each.

    Rows are cut into blocks of ``block``. Byte ``r`` of a column's block holds rows ``r``,
    ``r + block / 8``, ``r + 2 * block / 8`` and so on in its bits, the lowest first: the rows of
    one bit lie together, and nothing has to change places when it is unpacked.

    Attributes:
        bits: uint8, ``(*batch, ceil(rows / block) * block / 8, columns)``.
        rows: of the matrix.
        block: a multiple of 8.
    """

    bits: Any
    rows: int = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the mask, unpacked."""
        return (*self.bits.shape[:-2], self.rows, self.bits.shape[-1])

    def unpack(self) -> Bool[Array, "*batch rows columns"]:
        """The mask as booleans.

        Example:
            >>> pack_mask(jnp.array([[True, False], [False, False]])).unpack()
            Array([[ True, False],
                   [False, False]], dtype=bool)
        """
        *batch, _, columns = self.bits.shape
        count = self.bits.shape[-2] * 8 // self.block
        blocks = self.bits.reshape(*batch, count, 1, self.block // 8, columns)
        # Each bit is tested where it lies: shifts of bytes are wider in some compilers.
        tests = (1 << jnp.arange(8, dtype=jnp.uint8)).astype(jnp.uint8)[:, None, None]
        kept = (blocks & tests) != 0
        return kept.reshape(*batch, 8 * self.bits.shape[-2], columns)[..., : self.rows, :]


def check_mask(mask: Any) -> None:
    """Raise ``TypeError`` unless it is an array of booleans.

    Example:
        >>> check_mask(jnp.ones((2, 2)))
        Traceback (most recent call last):
        ...
        TypeError: mask is float32: give booleans, such as w != 0
    """
    if getattr(mask, "dtype", None) != jnp.bool_:
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"mask is {kind}: give booleans, such as w != 0")


def pack_mask(mask: Any, block: Any = None) -> PackedMask:
    """Pack a mask.

    Args:
        mask: booleans, ``(*batch, rows, columns)``; True keeps.
        block: rows that share their bytes, a multiple of 8; None for the largest of 1024, 512 and
            256 that divides the rows. A matrix whose rows lie on several devices needs one that
            divides each device's part.

    Returns:
        The mask in 1/8 of its bytes, more where ``block`` does not divide the rows.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: fewer than two axes, or a block that is no multiple of 8.

    Example:
        >>> pack_mask(jnp.ones((1024, 16), bool)).bits.nbytes
        2048
    """
    check_mask(mask)
    if mask.ndim < 2:
        raise ValueError(f"a mask of shape {mask.shape} is no matrix: give it rows and columns")
    *batch, rows, columns = mask.shape
    if block is None:
        block = next((size for size in _BLOCKS if rows % size == 0), _BLOCKS[-1])
    if not isinstance(block, int) or block < 8 or block % 8:
        raise ValueError(f"block must be a multiple of 8, not {block!r}")
    padding = [(0, 0)] * len(batch) + [(0, -rows % block), (0, 0)]
    count = -(-rows // block)
    planes = jnp.pad(mask, padding).reshape(*batch, count, 8, block // 8, columns)
    weights = (1 << jnp.arange(8, dtype=jnp.uint8)).astype(jnp.uint8)[:, None, None]
    bits = jnp.sum(jnp.where(planes, weights, 0), axis=-3, dtype=jnp.uint8)
    return PackedMask(bits.reshape(*batch, count * block // 8, columns), rows, block)
