"""The exact mask of the smallest entries of one array or many, found without sorting.

A float orders like an unsigned integer made of its bits (:func:`sortable_bits`), so the threshold
is the answer to a search over 32-bit integers: which is the largest ``t`` with no more than
``count`` keys below it? One pass reads every key once and counts how many lie below three pivots;
the pivots surround the place where linear interpolation between the known counts expects the
answer. A pass also reports the extreme keys still inside the bracket, so that arrays of few
distinct values (zeros, quantized or constant weights) finish early. Weights of any common
distribution take about eight passes, and the worst about 32, because a pass that did not quarter
the bracket is followed by one with pivots at its quarters. Then the same search over the positions
of the tied keys decides which of them go; two or three passes mostly, and none without ties.

Chosen over its rivals by measurement (``benchmarks/threshold.py``): a sort is some hundred times
slower; a radix histogram (two scatter-adds into 65,536 bins) takes more than twice as long and two
temporaries of the array's size, where this needs none. A pass is a plain reduction: sharded
arrays exchange a few scalars a pass, on meshes with automatic and with explicit axes alike.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer, Shaped, UInt32

_LARGEST = np.uint32(0xFFFFFFFF)
_RESOLUTION = 10_000_000  # Sparsity counts in steps of 1e-7, about what a float32 near 1 resolves.

Key = Callable[[Array], Array]


def sortable_bits(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Unsigned integers that order like the floats they are made from.

    Args:
        x: real floats of at most 32 bits, any shape. Narrower ones are cast to float32 first.

    Returns:
        Keys with ``key(a) < key(b)`` exactly when ``a < b``, denormals and infinities included;
        ``-0.0`` and ``0.0`` have the same key, and every NaN has the highest.

    Raises:
        TypeError: ``x`` is float64, whose order does not fit in 32 bits.

    Example:
        >>> import jax.numpy as jnp
        >>> keys = sortable_bits(jnp.array([-1.0, -0.0, 0.0, 1e-45, jnp.inf, jnp.nan]))
        >>> [hex(key) for key in keys]
        ['0x40800000', '0x80000000', '0x80000000', '0x80000001', '0xff800000', '0xffffffff']
    """
    bits = _float_bits(x)
    magnitude = bits & 0x7FFFFFFF
    # Negating the magnitude, not flipping all bits, is what makes both zeros equal.
    ordered = jnp.where(bits == magnitude, magnitude, -magnitude) + jnp.uint32(0x80000000)
    return jnp.where(magnitude > 0x7F800000, _LARGEST, ordered)


def magnitude_bits(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Unsigned integers that order like the absolute values: ``sortable_bits(abs(x))``, cheaper.

    Args:
        x: real floats of at most 32 bits, any shape.

    Returns:
        Keys in the order of ``abs(x)``; every NaN has the highest. They order among themselves
        only: do not mix them with those of :func:`sortable_bits`.

    Raises:
        TypeError: ``x`` is float64.

    Example:
        >>> import jax.numpy as jnp
        >>> keys = magnitude_bits(jnp.array([-1.0, 1.0, -0.0, 0.5]))
        >>> keys[0] == keys[1], keys[2], keys[3] < keys[1]
        (Array(True, dtype=bool), Array(0, dtype=uint32), Array(True, dtype=bool))
    """
    return jnp.minimum(_float_bits(x) & 0x7FFFFFFF, jnp.uint32(0x7F800001))


def _float_bits(x: Array) -> Array:
    if x.dtype.itemsize > 4:
        raise TypeError(
            f"keys of {x.dtype} do not fit in 32 bits; cast first: x.astype(jnp.float32)"
        )
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def removal_count(sparsity: ArrayLike, sizes: tuple[int, ...]) -> UInt32[Array, "n"]:
    """How many entries a sparsity removes from arrays of the given sizes, exactly.

    The sparsity is taken to the nearest 1e-7 in float32, and the count is rounded half up in
    integer arithmetic: 0.9 of 25,000,000 is 22,500,000, though ``float32(0.9) * 25e6`` is not.

    Args:
        sparsity: fraction to remove, a scalar in [0, 1); may be traced, and is then clipped to
            this range (NaN to 0).
        sizes: number of entries of each array, each below 2**32.

    Returns:
        One count for each size.

    Raises:
        ValueError: the sparsity is known and outside [0, 1), or a size is not in [0, 2**32).

    Example:
        >>> removal_count(0.9, (25_000_000, 15, 0))
        Array([22500000,       14,        0], dtype=uint32)
    """
    for size in sizes:
        _check_size(size)
    if not isinstance(sparsity, Tracer):
        _check_sparsity(float(np.asarray(sparsity)))
    product = jnp.asarray(sparsity, jnp.float32) * jnp.float32(_RESOLUTION)
    steps = jnp.round(jnp.where(product > 0, product, 0))
    steps = jnp.minimum(steps, _RESOLUTION - 1).astype(jnp.uint32)
    whole, rest = np.divmod(np.asarray(sizes, np.uint64), np.uint64(_RESOLUTION))
    rest = jnp.asarray(rest.astype(np.uint32))
    # Long division of steps * rest, six bits of steps at a time, so that nothing passes 32 bits.
    quotient, remainder = jnp.zeros_like(rest), jnp.zeros_like(rest)
    for shift in (18, 12, 6, 0):
        partial_product = remainder * 64 + ((steps >> shift) & 63) * rest
        quotient = quotient * 64 + partial_product // _RESOLUTION
        remainder = partial_product % _RESOLUTION
    half_up = (remainder >= _RESOLUTION // 2).astype(jnp.uint32)
    return steps * jnp.asarray(whole.astype(np.uint32)) + quotient + half_up


def removal_count_exact(sparsity: float, size: int) -> int:
    """:func:`removal_count` of one size in Python integers, for use outside traced code.

    Args:
        sparsity: fraction to remove, in [0, 1).
        size: number of entries, below 2**32.

    Returns:
        The same count as :func:`removal_count`.

    Raises:
        ValueError: the sparsity is outside [0, 1), or the size is not in [0, 2**32).

    Example:
        >>> removal_count_exact(0.9, 25_000_000)
        22500000
    """
    _check_size(size)
    _check_sparsity(sparsity)
    steps = min(int(np.round(np.float32(sparsity) * np.float32(_RESOLUTION))), _RESOLUTION - 1)
    return (steps * size + _RESOLUTION // 2) // _RESOLUTION


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity is {sparsity}, but it is the fraction removed and must lie in [0, 1)"
        )


def _check_size(size: int) -> None:
    if not 0 <= size < 2**32:
        raise ValueError(
            f"{size} entries: positions are counted in 32 bits, so at most {2**32 - 1} entries "
            "can share one threshold; split them into several scopes"
        )


def smallest_masks(
    keys: Sequence[Shaped[Array, "..."]],
    count: int | np.integer | Integer[Array, ""],
    key: Key | None = None,
) -> tuple[Bool[Array, "..."], ...]:
    """Masks that drop exactly the ``count`` smallest entries of all arrays together.

    Equal keys are dropped in the order of the arrays, then of the row-major position, so that the
    result never depends on the device, the sharding or chance.

    Args:
        keys: uint32 arrays of any shapes; with ``key``, arrays of any dtype.
        count: how many entries to drop, an integer scalar; may be traced, and is then clipped to
            [0, number of entries].
        key: an element-wise function from an array to its uint32 keys, such as
            :func:`magnitude_bits`. It is computed anew in every pass instead of stored, which
            saves the memory, and most of the time, that an array of keys costs.

    Returns:
        One boolean array for each of ``keys``, of its shape and sharding: True where kept.

    Raises:
        TypeError: the keys, or what ``key`` returns, are not uint32 of the array's shape.
        ValueError: 2**32 entries or more, or a known ``count`` outside [0, entries].

    Example:
        >>> import jax.numpy as jnp
        >>> weights = jnp.array([0.3, -0.1, 0.1, -0.5])
        >>> smallest_masks([weights], 2, key=magnitude_bits)
        (Array([ True, False, False,  True], dtype=bool),)
    """
    arrays = tuple(keys)
    _check_size(sum(array.size for array in arrays))
    for index, array in enumerate(arrays):
        made = jax.eval_shape(key, array) if key else jax.typeof(array)
        if made.dtype != jnp.uint32 or made.shape != array.shape:
            raise TypeError(
                f"keys[{index}] is {array.dtype}{list(array.shape)} and gives keys "
                f"{made.dtype}{list(made.shape)}, but they must be uint32 of the array's shape: "
                "for floats pass key=sortable_bits"
            )
    total = sum(array.size for array in arrays)
    if isinstance(count, Tracer):
        count = jnp.maximum(count, 0)
    elif not 0 <= int(count) <= total:
        raise ValueError(f"count is {count}, but there are {total} entries to drop from")
    return _masks(lax.stop_gradient(arrays), jnp.asarray(count, jnp.uint32), key or _itself)


def _itself(x: Array) -> Array:
    return x


@partial(jax.jit, static_argnames="key")
def _masks(arrays: tuple[Array, ...], count: Array, key: Key) -> tuple[Array, ...]:
    total = np.uint32(sum(array.size for array in arrays))
    places = tuple(map(_place, arrays, accumulate((array.size for array in arrays), initial=0)))

    def all_keys(held: tuple[tuple[Array, Array], ...]) -> list[Array]:
        return [key(array) for array, _ in held]

    def tied_positions(held: tuple[tuple[Array, Array], ...]) -> list[Array]:
        return [
            jnp.where(key(array) == threshold, _positions(array.shape, place), _LARGEST)
            for array, place in held
        ]

    operands = tuple(zip(arrays, places, strict=True))
    found = _search(operands, all_keys, count, _LARGEST, total)
    threshold = found.low
    # Positions tell tied keys apart, so that this search ends with exactly the ties to drop.
    first_kept = _search(
        operands,
        tied_positions,
        count - found.below_low,
        total,
        found.below_high - found.below_low,
    ).low
    everything = count >= total
    threshold = jnp.where(everything, _LARGEST, threshold)
    first_kept = jnp.where(everything, total, first_kept)

    def mask(array: Array, place: Array) -> Array:
        ordered, position = key(array), _positions(array.shape, place)
        return (ordered > threshold) | ((ordered == threshold) & (position >= first_kept))

    return tuple(map(mask, arrays, places))


def _place(array: Array, start: int) -> Array:
    """The position of an array's first entry, then the distance to the next along each axis."""
    strides = (np.prod(array.shape[axis + 1 :], dtype=np.int64) for axis in range(array.ndim))
    return jnp.asarray(np.asarray([start, *strides], np.uint32))


def _positions(shape: tuple[int, ...], place: Array) -> Array:
    """Row-major positions, as a sum of iotas: it shards without a gather."""
    position = jnp.full(shape, place[0])
    for axis in range(len(shape)):
        position += lax.broadcasted_iota(jnp.uint32, shape, axis) * place[axis + 1]
    return position


class _Bracket(NamedTuple):
    """What is known: the threshold lies in [low, high]."""

    low: Array
    high: Array
    below_low: Array  # How many values are below low; never more than count.
    below_high: Array  # How many values are at most high; more than count.
    stalled: Array  # Whether the last pass left more than a quarter of the bracket.


def _search(
    operands: tuple[tuple[Array, Array], ...],
    values: Callable[[tuple[tuple[Array, Array], ...]], list[Array]],
    count: Array,
    high: ArrayLike,
    total: ArrayLike,
) -> _Bracket:
    """Find the largest ``low`` with at most ``count`` values below it, or one with exactly so many.

    ``total`` values are at most ``high``. Any pivots find the same; good ones find it sooner.
    """

    def unfinished(bracket: _Bracket) -> Array:
        return (bracket.low < bracket.high) & (bracket.below_low != count)

    def narrow(bracket: _Bracket) -> _Bracket:
        # The barrier ties the operands to the loop: without it the compiler computes the values
        # once, before the loop, and keeps an array of them.
        held, bracket = lax.optimization_barrier((operands, bracket))
        pivots = _pivots(bracket, count)
        below, smallest, largest = _survey(values(held), pivots, bracket)
        up = below <= count
        low = jnp.maximum(bracket.low, jnp.max(pivots, where=up, initial=0))
        high = jnp.minimum(bracket.high, jnp.min(pivots - 1, where=~up, initial=_LARGEST))
        below_low = jnp.maximum(bracket.below_low, jnp.max(below, where=up, initial=0))
        below_high = jnp.minimum(bracket.below_high, jnp.min(below, where=~up, initial=_LARGEST))
        # The extremes were taken inside the old bracket and may lie outside the new one.
        snapped_low = jnp.where(smallest <= high, jnp.maximum(low, smallest), low)
        snapped_high = jnp.where(largest >= low, jnp.minimum(high, largest), high)
        stalled = snapped_high - snapped_low > (bracket.high - bracket.low) >> 2
        return _Bracket(snapped_low, snapped_high, below_low, below_high, stalled)

    zero = jnp.zeros_like(count)
    start = _Bracket(zero, zero + high, zero, zero + total, zero == 0)
    return lax.while_loop(unfinished, narrow, start)


def _pivots(bracket: _Bracket, count: Array) -> Array:
    """Three pivots in (low, high]: where interpolation expects the answer, and on both sides."""
    width = bracket.high - bracket.low
    breadth = width.astype(jnp.float32)
    inside = (bracket.below_high - bracket.below_low).astype(jnp.float32)
    expected = (count - bracket.below_low).astype(jnp.float32) / inside
    # Chance moves the answer by a standard deviation of a binomial count; the bend of the
    # distribution by more, the more of an octave (2**23 keys) the bracket spans.
    deviation = jnp.sqrt(jnp.maximum(expected * (1 - expected), 1 / inside) / inside)
    margin = jnp.maximum(deviation, breadth * 2**-25)
    margin = jnp.where(bracket.stalled, 0.25, jnp.minimum(margin, 0.25))
    expected = jnp.where(bracket.stalled, 0.5, expected)
    before = jnp.maximum(expected - margin, expected / 2)
    after = jnp.minimum(expected + margin, (1 + expected) / 2)
    # The largest float32 below 2**32 is the limit, as a full-width product may round up to 2**32.
    distance = jnp.minimum(breadth * jnp.stack([before, expected, after]), 4294967040.0)
    return bracket.low + 1 + jnp.minimum(distance.astype(jnp.uint32), width - 1)


def _survey(
    values: Sequence[Array], pivots: Array, bracket: _Bracket
) -> tuple[Array, Array, Array]:
    """One read of all values: how many are below each pivot; the extremes inside the bracket."""

    def merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        counts = (x + y for x, y in zip(a[:-2], b[:-2], strict=True))
        return (*counts, jnp.minimum(a[-2], b[-2]), jnp.maximum(a[-1], b[-1]))

    zero = jnp.uint32(0)
    initial = (zero, zero, zero, jnp.uint32(_LARGEST), zero)
    result = initial
    for value in values:
        # One reduction of several operands: XLA's CPU backend writes the operands of separate
        # sums to memory first, at nine times the cost.
        operands = (
            *((value < pivot).astype(jnp.uint32) for pivot in pivots),
            jnp.where(value >= bracket.low, value, _LARGEST),
            jnp.where(value <= bracket.high, value, zero),
        )
        result = merge(result, lax.reduce(operands, initial, merge, range(value.ndim)))
    return jnp.stack(result[:-2]), result[-2], result[-1]
