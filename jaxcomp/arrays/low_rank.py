"""Low-rank leaves: a few small factors in the place of a weight."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxcomp.arrays.base import CompressedArray
from jaxcomp.arrays.bits import (
    pack_bits,
    pack_bits_host,
    unpack_bits,
    unpack_bits_host,
)
from jaxcomp.arrays.blocks import narrow
from jaxcomp.arrays.parts import (
    Parts,
    Symbols,
    check_names,
    read_dtype,
    read_floats,
    read_symbols,
    to_device,
)
from jaxcomp.sharding import automatic, explicit_axes, spec_like

_EQUATION = re.compile(r"[A-Za-z]{1,24}(,[A-Za-z]{1,24}){1,7}->[A-Za-z]{1,24}")
_MOST_ELEMENTS = 1 << 44


def terms_of(equation: str) -> tuple[tuple[str, ...], str]:
    """The letters of each factor, and those of the dense array.

    Args:
        equation: as ``jnp.einsum`` has it, without leading axes: ``"ia,ao->io"``.

    Returns:
        Terms of the factors, and the term of the result.

    Example:
        >>> terms_of("hwia,ao->hwio")
        (('hwia', 'ao'), 'hwio')
    """
    factors, result = equation.split("->")
    return tuple(factors.split(",")), result


def multiply_factors(
    equation: str, factors: tuple[Any, ...], dtype: Any, out: Any = None
) -> Float[Array, "..."]:
    """The dense array that factors stand for.

    Args:
        equation: see :class:`LowRankArray`.
        factors: floating, with equal leading axes.
        dtype: of the result; sums are taken in float32 at least and rounded once. What is beyond it
            becomes its largest.
        out: the ``PartitionSpec`` of the result where mesh axes are explicit; None: as the factors
            lie.

    Returns:
        The sum of products, ``jnp.einsum`` of the equation.

    Example:
        >>> multiply_factors("ia,ao->io", (jnp.ones((2, 1)), jnp.ones((1, 3))), jnp.float32)
        Array([[1., 1., 1.],
               [1., 1., 1.]], dtype=float32)
    """
    wide = jnp.promote_types(jnp.result_type(*factors), jnp.float32)
    terms, result = terms_of(equation)
    full = f"{','.join('...' + term for term in terms)}->...{result}"

    def dense(*factors: Array) -> Array:
        values = jnp.einsum(
            full,
            *(factor.astype(wide) for factor in factors),
            optimize="optimal",
            precision=lax.Precision.HIGHEST,
        )
        return narrow(values, jnp.dtype(dtype), clipped=True)

    spec = _spec_of(equation, factors) if out is None else out
    return automatic(dense, out=spec)(*factors)


def _spec_of(equation: str, factors: tuple[Any, ...]) -> PartitionSpec:
    """Where the dense array lies: each axis as in the first factor that has it, each name once."""
    if not explicit_axes(*factors):
        return PartitionSpec()
    terms, result = terms_of(equation)
    taken: set[str] = set()

    def place(factor: Any, axis: int) -> Any:
        names = jax.typeof(factor).sharding.spec[axis]
        each = (names,) if isinstance(names, str) else names or ()
        if taken.intersection(each):
            return None
        taken.update(each)
        return names

    batch = factors[0].ndim - len(terms[0])
    entries = [place(factors[0], axis) for axis in range(batch)]
    for letter in result:
        at = next(i for i, term in enumerate(terms) if letter in term)
        entries.append(place(factors[at], factors[at].ndim + _axis(terms[at], letter)))
    return PartitionSpec(*entries)


def _axis(term: str, letter: str) -> int:
    return term.index(letter) - len(term)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class LowRankArray(CompressedArray):
    """A weight as a product of small factors: of two matrices, or of the parts of a tensor.

    A letter that the result lacks is a rank: the factors that have it are summed over it. With
    the weights of a dense layer ``"ia,ao->io"`` is a singular value decomposition; with those of a
    convolution ``"hwia,ao->hwio"`` is a narrow convolution and a 1 × 1 one, ``"hia,awo->hwio"`` two
    convolutions of a column and a row, ``"ia,hwab,bo->hwio"`` Tucker's decomposition of both
    channel axes, ``"ha,wa,ia,ao->hwio"`` the canonical one. ``decode()`` multiplies the factors;
    :func:`jaxcomp.factorize.low_rank_apply` runs a model on them as they are. Made by
    :mod:`jaxcomp.factorize`.

    Attributes:
        factors: floating, each ``(*batch, sizes of its letters)``; ``batch`` are stacked leading
            axes.
        equation: which axes of the factors are which of the dense array's, without ``batch``.
        dense_dtype: dtype of the dense array.
        mask: ``uint8`` of shape ``(*shape[:-1], ceil(shape[-1] / 8))``, a bit a weight, 0 where the
            dense array is zero whatever the factors say; None: it is nowhere.
    """

    factors: Any
    equation: str = dataclasses.field(metadata={"static": True})
    dense_dtype: Any = dataclasses.field(metadata={"static": True})
    mask: Any = None

    def __post_init__(self) -> None:
        # One spelling of each dtype, or equal forms would be compiled twice.
        object.__setattr__(self, "dense_dtype", jnp.dtype(self.dense_dtype))

    @classmethod
    def from_factors(
        cls, factors: Any, equation: str, dtype: Any, mask: Any = None
    ) -> "LowRankArray":
        """A leaf of factors that fit.

        Args:
            factors: arrays, see the class.
            equation: which axes are which.
            dtype: dtype of the dense array.
            mask: booleans of the dense array's shape, False where it is zero; or None.

        Raises:
            ValueError: factors that do not fit the equation or each other.

        Example:
            >>> LowRankArray.from_factors(
            ...     (jnp.ones((64, 2)), jnp.ones((2, 32))), "ia,ao->io", jnp.float32
            ... )
            LowRankArray(shape=(64, 32), dtype=float32, rank 2, 768 bytes)
        """
        factors = tuple(factors)
        _check(equation, [tuple(factor.shape) for factor in factors])
        leaf = cls(factors, equation, dtype)
        if mask is None:
            return leaf
        if tuple(mask.shape) != leaf.shape:
            raise ValueError(f"a mask of shape {mask.shape} does not fit weights of {leaf.shape}")
        packed = pack_bits(jnp.asarray(mask).astype(jnp.uint8), 1)
        return cls(factors, equation, dtype, packed)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        terms, result = terms_of(self.equation)
        sizes = self._sizes()
        first = self.factors[0].shape
        return (*first[: len(first) - len(terms[0])], *(sizes[letter] for letter in result))

    @property
    def ranks(self) -> dict[str, int]:
        """The size of each axis that is summed over, by its letter."""
        _, result = terms_of(self.equation)
        return {letter: n for letter, n in self._sizes().items() if letter not in result}

    def _sizes(self) -> dict[str, int]:
        terms, _ = terms_of(self.equation)
        return {
            letter: factor.shape[_axis(term, letter)]
            for term, factor in zip(terms, self.factors, strict=True)
            for letter in term
        }

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dense array."""
        return self.dense_dtype

    def decode(self) -> jax.Array:
        """The dense array, the product of the factors."""
        return _decode(self)

    def form(self) -> str:
        """Such as ``rank 8``, or ``ranks 4 and 6, masked``."""
        ranks = " and ".join(map(str, self.ranks.values()))
        masked = "" if self.mask is None else ", masked"
        return f"rank{'s' if len(self.ranks) > 1 else ''} {ranks}{masked}"

    def to_parts(self) -> Parts:
        """Take the leaf apart; a mask goes to the entropy coder."""
        symbols = {}
        if self.mask is not None:
            bits = unpack_bits_host(np.asarray(self.mask), 1, self.shape[-1])
            symbols["mask"] = Symbols(bits, 2)
        arrays = {f"factor{i}": np.asarray(factor) for i, factor in enumerate(self.factors)}
        return Parts({"dtype": self.dense_dtype.name, "equation": self.equation}, symbols, arrays)

    @classmethod
    def from_parts(cls, parts: Parts) -> "LowRankArray":
        """Put a leaf together again; raises ``ValueError`` for parts that do not fit."""
        equation = parts.static.get("equation") if isinstance(parts.static, dict) else None
        masked = isinstance(parts.symbols, dict) and "mask" in parts.symbols
        names = factor_names(equation)
        check_names(
            parts,
            static={"dtype", "equation"},
            symbols={"mask"} if masked else set(),
            arrays=set(names),
        )
        factors = [read_floats(parts, name) for name in names]
        assert isinstance(equation, str)
        _check(equation, [factor.shape for factor in factors])
        dtype = read_dtype(parts.static["dtype"])
        leaf = cls(tuple(map(to_device, factors)), equation, dtype)
        if not masked:
            return leaf
        bits = read_symbols(parts, "mask", 2)
        if bits.shape != leaf.shape:
            raise ValueError(f"a mask of shape {bits.shape} does not fit weights of {leaf.shape}")
        return dataclasses.replace(leaf, mask=to_device(pack_bits_host(bits, 1)))


def factor_names(equation: Any) -> tuple[str, ...]:
    """The names that the factors of an equation have in a file.

    Raises:
        ValueError: it is no equation.

    Example:
        >>> factor_names("ia,ao->io")
        ('factor0', 'factor1')
    """
    if not isinstance(equation, str) or not _EQUATION.fullmatch(equation):
        raise ValueError(f"equation must be such as 'ia,ao->io', not {equation!r:.60}")
    return tuple(f"factor{i}" for i in range(len(terms_of(equation)[0])))


@jax.jit
def _decode(leaf: LowRankArray) -> jax.Array:
    dense = multiply_factors(leaf.equation, leaf.factors, leaf.dense_dtype)
    if leaf.mask is None:
        return dense
    keep = unpack_bits(leaf.mask, 1, dense.shape[-1])
    return automatic(_masked, out=spec_like(dense, dense.shape))(dense, keep)


def _masked(dense: jax.Array, keep: jax.Array) -> jax.Array:
    return jnp.where(keep == 0, jnp.zeros((), dense.dtype), dense)


def _check(equation: Any, shapes: list[tuple[int, ...]]) -> None:
    """Raise ``ValueError`` unless factors of these shapes make a dense array."""
    names = factor_names(equation)
    terms, result = terms_of(equation)
    letters = [letter for term in terms for letter in term]
    if any(len(set(term)) < len(term) for term in (*terms, result)):
        raise ValueError(f"equation {equation} repeats a letter within one term")
    if set(result) - set(letters):
        raise ValueError(f"equation {equation} has letters in its result that no factor has")
    ranks = set(letters) - set(result)
    if not ranks or any(letters.count(letter) < 2 for letter in ranks):
        raise ValueError(f"equation {equation} must sum over letters of two factors or more")
    if len(shapes) != len(names):
        raise ValueError(f"equation {equation} has {len(names)} factors, not {len(shapes)}")
    sizes: dict[str, int] = {}
    batches = set()
    for term, shape in zip(terms, shapes, strict=True):
        if len(shape) < len(term):
            raise ValueError(f"a factor of shape {shape} does not fit the axes {term}")
        batches.add(shape[: len(shape) - len(term)])
        for letter, size in zip(term, shape[len(shape) - len(term) :], strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"axis {letter} of {equation} is of {sizes[letter]} and of {size}")
    if len(batches) != 1:
        raise ValueError(f"factors have different leading axes: {sorted(batches)}")
    if any(sizes[letter] < 1 for letter in ranks):
        raise ValueError("a rank of 0: at least 1 is needed")
    count = 1
    for size in (*batches.pop(), *(sizes[letter] for letter in result)):
        # Sizes of an empty array are bounded too.
        count *= max(size, 1)
    if count > _MOST_ELEMENTS:
        raise ValueError(f"factors of {count} weights: no array is that large")
