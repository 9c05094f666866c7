"""Reduce an array to sorted, weighted points that stand for its values.

A float orders like its bits, so that a radix histogram makes the points of a large array in two
passes: the first counts coarse bins of leading bits, the second splits each of them as finely as
its weights ask for, wherever they lie and however heavy their tails. Bins keep counts and integer
sums of positions. Integers add up exactly: the points depend neither on the order of the weights
nor on their sharding, and no sum drifts. Small arrays are sorted instead, which loses nothing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jaxcomp.sharding import automatic

# The largest magnitude is scaled to 2^30, so that sums cannot overflow nor products underflow.
TOP = 30
_SORTED = 1 << 14  # Up to this many weights are sorted; more are counted,
_LOW = 17  # in coarse bins that ignore this many trailing bits, and in twice as many fine ones.
_IN_BOUNDS = "promise_in_bounds"
_SHARES = 30  # Importance is counted in parts of 2^-30 of its sum.


class WeightedPoints(NamedTuple):
    """Distinct values in ascending order, and sums over all points before each.

    Attributes:
        values: times 2^(157 - exponent), so that the largest lies in [2^30, 2^31); padded with inf.
            What is 2^156 times smaller than the largest is 0 in here.
        distinct: how many there are before the padding.
        counts_before: the number of weights before point i, up to ``counts_before[distinct]``; of
            importance, where that is given, about 2^30 in all.
        sum_before: the sum of these weights, scaled as the values.
        sum_before_low: what float32 left out of ``sum_before``: with it a difference of two sums
            keeps the digits that a small cluster needs.
        zeros: exact zeros in the array, also if they are left out of the points.
        exponent: biased exponent of the largest magnitude; 255 if there is a NaN or infinity.
    """

    values: Float32[Array, " points"]
    distinct: Int32[Array, ""]
    counts_before: Int32[Array, " points_plus_one"]
    sum_before: Float32[Array, " points_plus_one"]
    sum_before_low: Float32[Array, " points_plus_one"]
    zeros: Int32[Array, ""]
    exponent: Int32[Array, ""]


def weighted_points(
    x: Float[Array, "..."] | Sequence[Float[Array, "..."]],
    *,
    keep_zeros: bool = True,
    drop: int | None = None,
    importance: Any = None,
) -> WeightedPoints:
    """Reduce arrays to their distinct values, or to the means of bins that follow their values.

    Up to 2^14 elements the points are the distinct values; above, the means of at most 2^16 bins
    whose width is a small part of the distance between neighbours of any good codebook.

    Args:
        x: weights, any floating dtype and shape, or several such arrays that are taken together;
            read as float32. May be sharded: counts are summed over shards, and above 2^14 elements
            nothing is gathered.
        keep_zeros: whether exact zeros are a point like others or left out; static.
        drop: positions within a bin are summed as int32, in units of 2^drop floats; None chooses
            the finest that cannot overflow: 0 up to 2^26 elements.
        importance: what each weight counts, in the shapes of ``x``, from 0 on; None for 1 each.
            Only ratios matter. A point that is worth anything is worth 2^-30 of all, and weights
            worth nothing make no point, unless all are worth nothing: then all count alike. The
            mean of a bin stays that of its weights, as bins are narrow.

    Returns:
        The points.

    Raises:
        ValueError: if ``x`` is empty or has 2^31 elements or more.

    Example:
        >>> points = weighted_points(jnp.array([3.0, 0.0, 1.0, 3.0]), keep_zeros=False)
        >>> points.values[: points.distinct] / 2.0**30 * 2
        Array([1., 3.], dtype=float32)
        >>> points.counts_before[: points.distinct + 1]
        Array([0, 1, 3], dtype=int32)
    """
    arrays = tuple(x) if isinstance(x, Sequence) else (x,)
    size = sum(array.size for array in arrays)
    if not 0 < size < 1 << 31:
        shape = arrays[0].shape if len(arrays) == 1 else f"of {len(arrays)} arrays"
        raise ValueError(f"x has {size} elements (shape {shape}): pass blocks of 1 to 2^31 - 1")
    shares = None
    if importance is not None:
        shares = tuple(importance) if isinstance(importance, Sequence) else (importance,)
        if [share.shape for share in shares] != [array.shape for array in arrays]:
            raise ValueError(
                f"importance of shapes {[share.shape for share in shares]} does not fit weights of "
                f"{[array.shape for array in arrays]}: give one number a weight"
            )
        shares = _scaled(shares)
    # The parts are compiled apart, so that a new shape costs only those that read the array.
    if size <= _SORTED:
        units = None if shares is None else _padded_units(shares)
        return _sorted_points(_padded_keys(arrays), units, size, keep_zeros)
    # A coarse bin's share of the bins bounds the sums of positions by 8 times the size.
    drop = max(0, (8 * size).bit_length() - 30) if drop is None else drop
    coarse = _added([_count_coarse(array) for array in arrays])
    table = _split(coarse)
    fine = _added([_count_fine(array, table, drop) for array in arrays])
    units = None
    if shares is not None:
        # The bits below the unit are summed apart, as many as cannot overflow.
        bits = 31 - size.bit_length()
        pairs = zip(arrays, shares, strict=True)
        units = _units(*_added([_count_shares(a, b, table, bits) for a, b in pairs]), bits)
    return _binned_points(coarse, table, *fine, units, size, keep_zeros)


def _added(counts: list[Any]) -> Any:
    return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *counts)


@jax.jit
def _scaled(importance: tuple[Array, ...]) -> tuple[Array, ...]:
    """Importance with a sum of 2^30; all alike if there is none."""

    def most(*parts: Array) -> Array:
        return jnp.stack([jnp.max(part, initial=0.0) for part in parts]).max()

    def total(*parts: Array) -> Array:
        return jnp.stack([jnp.sum(part) for part in parts]).sum()

    wide = [jnp.maximum(part.astype(jnp.float32), 0.0) for part in importance]
    largest = automatic(most)(*wide)
    wide = [jnp.where(largest > 0, part / largest, 1.0) for part in wide]
    factor = (1 << _SHARES) / automatic(total)(*wide)
    return tuple(part * factor for part in wide)


@jax.jit
def _padded_keys(arrays: tuple[Array, ...]) -> Array:
    """Keys in the order of the values, in one of few lengths."""
    return automatic(lambda *x: _padded([ordered(a) for a in x], jnp.iinfo(jnp.int32).max))(*arrays)


@jax.jit
def _padded_units(shares: tuple[Array, ...]) -> Array:
    """Whole units of importance, at least one where there is any."""
    return automatic(lambda *x: _padded([jnp.ceil(a).astype(jnp.int32) for a in x], 0))(*shares)


def _padded(arrays: list[Array], fill: int) -> Array:
    size = sum(array.size for array in arrays)
    flat = jnp.concatenate([array.ravel() for array in arrays])
    padding = max(512, 1 << (size - 1).bit_length()) - size
    return jnp.pad(flat, (0, padding), constant_values=fill)


@partial(jax.jit, static_argnames=("keep_zeros",))
def _sorted_points(
    key: Array, units: Array | None, size: Array | int, keep_zeros: bool
) -> WeightedPoints:
    """A point for the last of each run of equal keys, which is worth most of them."""
    if units is None:
        key, worth = jnp.sort(key), 1
    else:
        key, worth = lax.sort((key, units), num_keys=2)
    inside = jnp.arange(key.shape[0]) < size
    counts = (inside & ((key != 0) | keep_zeros)).astype(jnp.int32) * worth
    last = jnp.append((key[1:] != key[:-1]) | ~inside[1:], True)
    zeros = jnp.sum(inside & (key == 0), dtype=jnp.int32)
    return _condensed(key, jnp.zeros_like(key, jnp.float32), counts, last & (counts > 0), zeros)


@jax.jit
def _count_coarse(x: Array) -> Array:
    """How many weights that are not zero share each pattern of the leading bits."""

    def count(x: Array) -> Array:
        key = ordered(x)
        counts = jnp.zeros(1 << (32 - _LOW), jnp.int32)
        return counts.at[cell(key, _LOW)].add((key != 0).astype(jnp.int32), mode=_IN_BOUNDS)

    return automatic(count)(x)


@partial(jax.jit, static_argnames=("drop",))
def _count_fine(x: Array, table: Array, drop: int) -> tuple[Array, Array]:
    """The counts of the bins, and the sums of positions relative to the bins' centres."""

    def count(x: Array, table: Array) -> tuple[Array, Array]:
        key = ordered(x)
        entry = table.at[cell(key, _LOW)].get(mode=_IN_BOUNDS)
        shift = entry & 31
        within = key & ((1 << _LOW) - 1)
        index = (entry >> 5) + (within >> shift)
        position = (within & ((1 << shift) - 1)) - ((1 << shift) >> 1) + ((1 << drop) >> 1)
        nonzero = (key != 0).astype(jnp.int32)
        bins = jnp.zeros(2 * table.shape[0], jnp.int32)
        sums = bins.at[index].add((position >> drop) * nonzero, mode=_IN_BOUNDS)
        return bins.at[index].add(nonzero, mode=_IN_BOUNDS), sums.astype(jnp.float32) * (1 << drop)

    return automatic(count)(x, table)


@partial(jax.jit, static_argnames=("bits",))
def _count_shares(x: Array, share: Array, table: Array, bits: int) -> tuple[Array, ...]:
    """The importance in each bin, in units and 2^-bits of them, and that of zero; exact sums."""

    def count(x: Array, share: Array, table: Array) -> tuple[Array, ...]:
        key = ordered(x)
        entry = table.at[cell(key, _LOW)].get(mode=_IN_BOUNDS)
        index = (entry >> 5) + ((key & ((1 << _LOW) - 1)) >> (entry & 31))
        whole = jnp.floor(share)
        parts = whole.astype(jnp.int32), jnp.ceil((share - whole) * (1 << bits)).astype(jnp.int32)
        bins = jnp.zeros(2 * table.shape[0], jnp.int32)
        nonzero = (key != 0).astype(jnp.int32)
        sums = [bins.at[index].add(part * nonzero, mode=_IN_BOUNDS) for part in parts]
        return *sums, *(jnp.sum(part * (1 - nonzero), dtype=jnp.int32) for part in parts)

    return automatic(count)(x, share, table)


@partial(jax.jit, static_argnames=("bits",))
def _units(
    whole: Array, rest: Array, zero_whole: Array, zero_rest: Array, bits: int
) -> tuple[Array, Array]:
    """Whole units of importance in each bin and of zero, at least one where there is any."""
    round_up = lambda rest: (rest >> bits) + ((rest & ((1 << bits) - 1)) > 0)
    return whole + round_up(rest), zero_whole + round_up(zero_rest)


@jax.jit
def _split(coarse: Array) -> Array:
    """Place the pieces of coarse bins: 32 times the first piece plus the bits within one."""
    keys = _coarse_keys()
    weights = coarse.astype(jnp.float32)
    exponent = jnp.where(coarse > 0, _exponent(keys), 0)
    width = power_of_two(exponent - exponent.max())
    mass = jnp.cbrt(weights * width * width)
    # Each bin that is not empty has one piece. Half of the others go by count, which bounds the
    # integer sums; half by the mass of density^(1/3), which is where the centroids will be. 64 are
    # kept back for the zero and for the rounding of the shares.
    share = weights / jnp.maximum(weights.sum(), 1.0) + mass / jnp.maximum(mass.sum(), 1e-30)
    spare = (2 * coarse.shape[0] - 64 - jnp.sum(coarse > 0)).astype(jnp.float32)
    log_pieces = materialized(31 - lax.clz(1 + (share * (spare / 2)).astype(jnp.int32)))
    pieces = jnp.where(coarse > 0, 1 << log_pieces, 0)
    first = running(jnp.add, pieces) - pieces + (keys >= 0)
    return materialized((first << 5) | (_LOW - log_pieces))


@partial(jax.jit, static_argnames=("keep_zeros",))
def _binned_points(
    coarse: Array,
    table: Array,
    counts: Array,
    positions: Array,
    units: tuple[Array, Array] | None,
    size: Array | int,
    keep_zeros: bool,
) -> WeightedPoints:
    """A point for each bin that holds a weight."""
    bins, keys = counts.shape[0], _coarse_keys()
    mark = jnp.where(coarse > 0, table >> 5, bins)
    owner = jnp.arange(keys.size, dtype=jnp.int32)
    owner = jnp.zeros(bins, jnp.int32).at[mark].set(owner, mode="drop")
    owner = running(jnp.maximum, owner)
    piece, shift = np.arange(bins, dtype=np.int32) - (table[owner] >> 5), table[owner] & 31
    centre = keys[owner] + (piece << shift) + ((1 << shift) >> 1)
    zeros, zero_bin = size - coarse.sum(dtype=jnp.int32), (table[keys.size // 2] >> 5) - 1
    mean = positions / jnp.maximum(counts, 1).astype(jnp.float32)
    counts, zero_count = (counts, zeros) if units is None else units
    counts = counts.at[zero_bin].set(zero_count if keep_zeros else 0)
    centre = centre.at[zero_bin].set(0)
    return _condensed(centre, mean, counts, counts > 0, zeros)


def _condensed(
    key: Array, part: Array, counts: Array, occupied: Array, zeros: Array
) -> WeightedPoints:
    """Points at ``part`` floats from where keys are, of which those that are occupied count."""
    # The floats are counted in integers as subnormals would flush.
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    exponent = jnp.max(jnp.where(counts > 0, _exponent(key), 0))
    whole = (bits & 0x7FFFFF) | jnp.where((bits & 0x7F800000) > 0, 1 << 23, 0)
    whole = jnp.where(bits < 0, -whole, whole).astype(jnp.float32)
    values = (whole + part) * power_of_two(_exponent(key) - exponent + TOP - 23)
    mass = jnp.where(counts > 0, values * counts.astype(jnp.float32), 0.0)
    rank = running(jnp.add, occupied.astype(jnp.int32))
    place = jnp.where(occupied, rank - 1, key.shape[0])
    sums = (running(jnp.add, counts), *running(_add_exactly, (mass, jnp.zeros_like(mass))))
    before = (jnp.zeros(a.size + 1, a.dtype).at[place + 1].set(a, mode="drop") for a in sums)
    values = jnp.full_like(values, jnp.inf).at[place].set(values, mode="drop")
    return WeightedPoints(values, rank[-1], *before, zeros=zeros, exponent=exponent)


def ordered(x: Array) -> Array:
    """The bits of float32 values as integers in the same order, exact also where floats flush."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key + (key == -1)  # -0.0 equals 0.0


def cell(key: Array, low: int) -> Array:
    """Which of the bins that ignore ``low`` trailing bits a key is in."""
    return (key >> low) + (1 << (31 - low))


def _coarse_keys() -> Array:
    """The least key of each coarse bin."""
    return jnp.arange(-(1 << (31 - _LOW)), 1 << (31 - _LOW), dtype=jnp.int32) << _LOW


def _exponent(key: Array) -> Array:
    """The biased exponent, as for 1 if subnormal."""
    return jnp.maximum(((key ^ (key >> 31)) >> 23) & 0xFF, 1)


def power_of_two(k: Array) -> Array:
    """2^k exactly, and 0 where that is below the normal numbers."""
    power = lax.bitcast_convert_type((jnp.clip(k, -126, 127) + 127) << 23, jnp.float32)
    return jnp.where(k < -126, 0.0, power)


def running(combine: Callable[[Any, Any], Any], values: Any) -> Any:
    """Inclusive scan of 1-D arrays by an operation with neutral element 0."""
    # Doubling in a loop, over rows and then over their totals, runs several times faster on CPU
    # than jnp.cumsum and compiles ten times faster than lax.associative_scan.
    (size,) = jax.tree.leaves(values)[0].shape

    def doubling(values: Any) -> Any:
        n = jax.tree.leaves(values)[0].shape[-1]

        def double(i: Array, values: Any) -> Any:
            padded = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (n, 0))), values)
            begin = (0, n - (1 << i))
            shifted = jax.tree.map(lambda a: lax.dynamic_slice(a, begin, (a.shape[0], n)), padded)
            return combine(shifted, values)

        return lax.fori_loop(0, (n - 1).bit_length(), double, values)

    rows = doubling(jax.tree.map(lambda a: jnp.pad(a, (0, -size % 256)).reshape(-1, 256), values))
    totals = doubling(jax.tree.map(lambda a: a[None, :-1, -1], rows))
    before = jax.tree.map(lambda a: jnp.pad(a[0], (1, 0))[:, None], totals)
    return jax.tree.map(lambda a: a.ravel()[:size], combine(before, rows))


def materialized(table: Array) -> Array:
    """The table itself, computed once rather than in every lookup."""
    # XLA on CPU fuses what makes a table into the lookups. It removes optimization barriers before
    # it fuses, but does not fuse a scatter.
    return jnp.zeros_like(table).at[jnp.arange(table.shape[0])].set(table, unique_indices=True)


def _add_exactly(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Add numbers held as high and low parts, for twice the digits (Knuth's two-sum)."""
    total = a[0] + b[0]
    part = total - a[0]
    low = (a[0] - (total - part)) + (b[0] - part) + (a[1] + b[1])
    high = total + low
    return high, low - (high - total)
