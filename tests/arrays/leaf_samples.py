"""Compressed leaves of every form, and what they must decode to, written without the package."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.arrays import (
    BlockSparseArray,
    CodebookArray,
    GridArray,
    HashedArray,
    LowRankArray,
    LowRankSumArray,
    NMSparseArray,
    Parts,
    QuantizedArray,
    SparseArray,
    Symbols,
    VectorCodebookArray,
)
from jaxcomp.arrays.codebook import index_bits


def pack_reference(codes, bits):
    """One Python string of bits a row, least significant bit first."""
    rows = np.asarray(codes).reshape(math.prod(codes.shape[:-1]), codes.shape[-1])
    packed = []
    for row in rows:
        text = "".join(format(int(code), f"0{bits}b")[::-1] for code in row)
        text += "0" * (-len(text) % 8)
        packed.append([int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8)])
    width = (codes.shape[-1] * bits + 7) // 8
    return np.array(packed, np.uint8).reshape(*codes.shape[:-1], width)


def unpack_reference(packed, bits, length):
    flat = np.unpackbits(np.asarray(packed), axis=-1, bitorder="little")[..., : length * bits]
    weights = 1 << np.arange(bits)
    return (flat.reshape(*flat.shape[:-1], length, bits) * weights).sum(-1)


def reference(leaf):
    """The dense array as NumPy computes it from the fields, in the leaf's dtype."""
    if isinstance(leaf, SparseArray):
        keep = unpack_reference(leaf.mask, 1, leaf.length).astype(bool)
        values = np.asarray(leaf.values)
        dense = np.zeros(keep.shape, values.dtype)
        for at in np.ndindex(*values.shape[:-1]):
            dense[at][keep[at]] = values[at][: keep[at].sum()]
        return dense
    if isinstance(leaf, NMSparseArray):
        return nm_reference(leaf)
    if isinstance(leaf, BlockSparseArray):
        return block_reference(leaf)
    if isinstance(leaf, CodebookArray):
        book = np.asarray(leaf.codebook)
        indices = unpack_reference(leaf.indices, index_bits(book.shape[-1]), leaf.length)
        if leaf.axis is not None:
            size = indices.shape[leaf.axis] // book.shape[-2]
            book = np.repeat(book, size, -2)
            whole = np.moveaxis(indices, leaf.axis, book.ndim - 2)
            dense = np.empty(whole.shape, book.dtype)
            for at in np.ndindex(*book.shape[:-1]):
                dense[at] = book[at][whole[at]]
            return np.moveaxis(dense, book.ndim - 2, leaf.axis).astype(leaf.dtype)
        dense = np.empty(indices.shape, book.dtype)
        for at in np.ndindex(*book.shape[:-1]):
            dense[at] = book[at][indices[at]]
        return dense.astype(leaf.dtype)
    if isinstance(leaf, GridArray):
        return grid_reference(leaf)
    if isinstance(leaf, LowRankArray):
        return low_rank_reference(leaf)
    if isinstance(leaf, LowRankSumArray):
        both = [reference(part).astype(np.float32) for part in (leaf.low_rank, leaf.inner)]
        return sum(both).astype(leaf.dtype)
    if isinstance(leaf, VectorCodebookArray):
        return vectors_reference(leaf)
    if isinstance(leaf, HashedArray):
        return hashed_reference(leaf)
    codes = unpack_reference(leaf.codes, leaf.bits, leaf.length).astype(np.float64)
    scale = np.asarray(leaf.scale)
    if not leaf.zero:
        codes, zero = 2 * codes, np.float64((1 << leaf.bits) - 1)
    elif leaf.zero_point is None:
        zero = np.float64(1 << (leaf.bits - 1))
    else:
        zero = np.asarray(leaf.zero_point, np.float64)
    shape = codes.shape
    codes = cut(codes, leaf.blocks)
    # A code has 8 bits at most, so the float64 product is exact: the one rounding is to float32.
    product = ((codes - zero) * scale.astype(np.float64)).astype(np.float32)
    return product.reshape(shape).astype(leaf.dtype)


def grid_levels(element):
    """What each code stands for, by ml_dtypes and by the words of the documentation."""
    if element == "nf4":
        from jaxcomp.arrays.elements import ELEMENTS

        return np.array(ELEMENTS["nf4"].levels, np.float32)
    if element.startswith("power_of_two_"):
        half = 1 << (int(element[-1]) - 1)
        levels = [0.0, *(2.0 ** (code - half + 1) for code in range(1, half))]
        return np.array([*levels, *(-level for level in levels)], np.float32)
    dtype = jnp.dtype(element)
    return np.arange(1 << jnp.finfo(dtype).bits, dtype=np.uint8).view(dtype).astype(np.float32)


def grid_reference(leaf):
    codes = unpack_reference(leaf.codes, leaf.bits, leaf.length)
    shape = codes.shape
    scale = np.asarray(leaf.scale).astype(np.float32)
    if leaf.tensor_scale is not None:
        scale = scale * np.asarray(leaf.tensor_scale)
    # Both fit float64: the one rounding is to float32.
    product = grid_levels(leaf.element)[cut(codes, leaf.blocks)].astype(np.float64) * scale
    return product.astype(np.float32).reshape(shape).astype(leaf.dtype)


def nm_reference(leaf):
    """Value by value."""
    values = np.asarray(leaf.values)
    bits = max(1, math.ceil(math.log2(leaf.m)))
    positions = unpack_reference(leaf.positions, bits, values.shape[-1])
    shape = list(values.shape)
    shape[leaf.axis] = shape[leaf.axis] * leaf.m // leaf.n
    dense = np.zeros(shape, values.dtype)
    for index in np.ndindex(*values.shape):
        place = list(index)
        place[leaf.axis] = index[leaf.axis] // leaf.n * leaf.m + positions[index]
        dense[tuple(place)] = values[index]
    return dense


def block_reference(leaf):
    """Block by block, counted anew in each batch entry."""
    keep = unpack_reference(leaf.mask, 1, leaf.length).astype(bool)
    values, block = np.asarray(leaf.values), leaf.block_shape
    sizes = (1,) * (keep.ndim - len(block)) + block
    dense = np.zeros(np.multiply(keep.shape, sizes), values.dtype)
    batch = values.shape[: values.ndim - len(block) - 1]
    for at in np.ndindex(*batch):
        for count, place in enumerate(np.argwhere(keep[at])):
            corner = zip(at + tuple(place), sizes, strict=True)
            tile = tuple(slice(i * size, (i + 1) * size) for i, size in corner)
            dense[tile] = values[at][count].reshape(dense[tile].shape)
    return dense


def low_rank_reference(leaf):
    """Component by component, in float64: exact for the factors of `low_rank`."""
    terms, result = leaf.equation.split("->")
    terms = ",".join("..." + term for term in terms.split(","))
    wide = [np.asarray(factor).astype(np.float64) for factor in leaf.factors]
    dense = np.einsum(f"{terms}->...{result}", *wide)
    if leaf.mask is not None:
        dense = np.where(unpack_reference(leaf.mask, 1, dense.shape[-1]), dense, 0)
    return dense.astype(np.float32).astype(leaf.dtype)


def vectors_reference(leaf):
    """Vector by vector; stages are added in float32, in their order."""
    book = np.asarray(leaf.codebook)
    indices = unpack_reference(leaf.indices, index_bits(book.shape[-2]), leaf.length)
    dense = np.zeros(leaf.shape, np.float32)
    lead = book.ndim - 4
    sizes = [1] * (dense.ndim - lead)
    for size, axis in leaf.blocks:
        sizes[axis] = size
    for at in np.ndindex(*indices.shape):
        batch, stage, grid = at[:lead], at[lead], at[lead + 1 :]
        space = 0
        for _, axis in leaf.blocks:
            space = space * indices.shape[axis] + grid[axis]
        vector = book[batch][stage, space if book.shape[-3] > 1 else 0, indices[at]]
        tile = tuple(slice(i * n, (i + 1) * n) for i, n in zip(grid, sizes, strict=True))
        dense[batch][tile] += vector.astype(np.float32).reshape(sizes)
    if leaf.mask is not None:
        dense = np.where(unpack_reference(leaf.mask, 1, dense.shape[-1]), dense, 0)
    return dense.astype(leaf.dtype)


def hashed_reference(leaf):
    """Weight by weight, with Python's integers."""
    mask32, golden = (1 << 32) - 1, 0x9E3779B9

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask32
        return x ^ (x >> 16)

    start, values = mix((leaf.seed + golden) & mask32), np.asarray(leaf.buckets)
    dense = np.zeros((*values.shape[:-1], math.prod(leaf.dims)), values.dtype)
    for place in range(math.prod(leaf.dims)):
        hashed = mix(place ^ start)
        sign = -1 if mix(hashed ^ golden) & 1 else 1
        dense[..., place] = values[..., hashed % values.shape[-1]] * sign
    dense = dense.reshape(leaf.shape)
    if leaf.mask is not None:
        dense = np.where(unpack_reference(leaf.mask, 1, dense.shape[-1]), dense, 0)
    return dense.astype(leaf.dtype)


def cut(x, blocks):
    """Each axis that is cut becomes two, in the order of the axes."""
    shape = []
    sizes = {x.ndim + axis: size for size, axis in blocks}
    for at, n in enumerate(x.shape):
        shape += [n // sizes[at], sizes[at]] if at in sizes else [n]
    return x.reshape(shape)


def quantized(
    x,
    bits=4,
    blocks=(),
    affine=False,
    batch_axes=0,
    per_channel=True,
    scale_dtype="float32",
    zero=True,
):
    """Round to nearest on a grid per last-axis channel (or block, or batch entry)."""
    x = np.asarray(x)
    wide = x.astype(np.float64)
    if blocks:
        wide = cut(wide, blocks)
        reduced = tuple(x.ndim + axis + 1 + count for count, (_, axis) in enumerate(blocks))
    elif per_channel and x.ndim > batch_axes + 1:
        reduced = tuple(range(batch_axes, x.ndim - 1))
    else:
        reduced = tuple(range(batch_axes, x.ndim))
    low = np.minimum(wide.min(reduced, keepdims=True, initial=0), -1e-6)
    high = np.maximum(wide.max(reduced, keepdims=True, initial=0), 1e-6)
    top = (1 << bits) - 1
    if affine:
        scale = (high - low) / top
        middle = np.clip(np.round(-low / scale), 0, top)
    else:
        scale = np.maximum(-low, high) / max(top // 2, 1)
        middle = np.float64(1 << (bits - 1))
    codes = np.clip(np.round(wide / scale) + middle, 0, top).astype(np.uint8).reshape(x.shape)
    return QuantizedArray(
        codes=jnp.asarray(pack_reference(codes, bits)),
        scale=jnp.asarray(scale, scale_dtype),
        zero_point=jnp.asarray(middle, jnp.uint8) if affine else None,
        bits=bits,
        length=x.shape[-1],
        blocks=blocks,
        dense_dtype=x.dtype,
        zero=zero,
    )


def grid(x, element, blocks=(), scale_dtype="float32", tensor_scale=False, batch_axes=0):
    """The nearest level, by trying all of them."""
    x = np.asarray(x)
    wide = cut(x.astype(np.float64), blocks)
    reduced = tuple(x.ndim + axis + 1 + count for count, (_, axis) in enumerate(blocks))
    reduced = reduced or tuple(range(batch_axes, wide.ndim - 1))
    levels = grid_levels(element).astype(np.float64)
    levels = np.where(np.isfinite(levels), levels, 0)
    scale = np.abs(wide).max(reduced, keepdims=True, initial=1e-3) / levels.max()
    whole = np.ones((*x.shape[:batch_axes], *(1,) * (wide.ndim - batch_axes)), np.float32)
    whole = whole * np.float32(0.25)
    scale = (scale * 4 if tensor_scale else scale).astype(jnp.dtype(scale_dtype))
    steps = scale.astype(np.float64) * (whole if tensor_scale else 1)
    codes = np.abs((wide / steps)[..., None] - levels).argmin(-1).reshape(x.shape)
    return GridArray(
        codes=jnp.asarray(pack_reference(codes, len(levels).bit_length() - 1)),
        scale=jnp.asarray(scale),
        tensor_scale=jnp.asarray(whole) if tensor_scale else None,
        element=element,
        length=x.shape[-1],
        blocks=blocks,
        dense_dtype=x.dtype,
    )


def shared(x, clusters=16, batch_axes=0):
    """Indices of the nearest of evenly spaced values."""
    x = np.asarray(x)
    batch = x.shape[:batch_axes]
    book = np.zeros((*batch, clusters), np.float32)
    indices = np.zeros(x.shape, np.uint8 if clusters <= 256 else np.uint16)
    for at in np.ndindex(*batch):
        part = x[at].astype(np.float64)
        book[at] = np.linspace(part.min(initial=-1), part.max(initial=1), clusters)
        indices[at] = np.abs(part[..., None] - book[at]).argmin(-1)
    return CodebookArray.from_indices(jnp.asarray(indices), jnp.asarray(book), x.dtype)


def shared_in_groups(x, clusters=4, axis=-1, batch_axes=0):
    """Two groups of channels; each has every second value of a codebook twice as large."""
    leaf = shared(x, 2 * clusters, batch_axes)
    book = np.asarray(leaf.codebook)
    indices = unpack_reference(leaf.indices, index_bits(2 * clusters), leaf.length) // 2
    books = jnp.asarray(np.stack([book[..., ::2], book[..., 1::2]], -2))
    return CodebookArray.from_indices(
        jnp.asarray(indices.astype(np.uint8)), books, np.asarray(x).dtype, axis
    )


def sparse(x, sparsity=0.6, batch_axes=0):
    """The largest magnitudes of each batch entry, so that their counts differ a little."""
    x = np.array(x)
    for count, at in enumerate(np.ndindex(*x.shape[:batch_axes])):
        part = np.abs(x[at].astype(np.float64))
        threshold = np.quantile(part, min(sparsity + 0.05 * count, 1)) if part.size else 0
        x[at] = np.where(part >= threshold, x[at], 0)
    return SparseArray.encode(jnp.asarray(x), batch_axes=batch_axes)


def nm_sparse(x, n, m, axis=-2):
    """The n largest magnitudes of each group, by sorting; the first group may keep fewer."""
    x = np.array(x)
    rows = np.moveaxis(x, axis, -1).copy()
    groups = rows.reshape(*rows.shape[:-1], rows.shape[-1] // m, m)
    order = np.argsort(np.abs(groups.astype(np.float64)), axis=-1)
    np.put_along_axis(groups, order[..., : m - n], 0, -1)
    groups.reshape(-1)[:1] = 0
    x = np.moveaxis(groups.reshape(rows.shape), -1, axis)
    return NMSparseArray.encode(jnp.asarray(x), n, m, axis)


def block_sparse(x, block=(2, 2), batch_axes=0, density=0.5):
    """Random blocks, a different number in each batch entry."""
    x = np.array(x)
    grid = [size // part for size, part in zip(x.shape[-len(block) :], block, strict=True)]
    keep = np.random.default_rng(x.size).random((*x.shape[: -len(block)], *grid)) < density
    for axis, size in enumerate(block, -len(block)):
        keep = keep.repeat(size, axis)
    return BlockSparseArray.encode(jnp.asarray(np.where(keep, x, 0)), block, batch_axes=batch_axes)


def low_rank(x, batch_axes=0, rank=2, mask=False):
    """Multiples of 1/8, whose sums of products are exact in any order."""
    x = np.asarray(x)
    rows, columns = "abcdefg"[: x.ndim - batch_axes - 1], "z"
    sizes = ((*x.shape[:-1], rank), (*x.shape[:batch_axes], rank, x.shape[-1]))
    factors = [np.round(weights(size, seed=x.size) * 8) / 8 for size in sizes]
    keep = jnp.asarray(np.asarray(x, np.float32) > 0) if mask else None
    equation = f"{rows}r,r{columns}->{rows}{columns}"
    return LowRankArray.from_factors(map(jnp.asarray, factors), equation, x.dtype, keep)


def low_rank_sum(x, batch_axes=0):
    """With a residual of multiples of 1/4."""
    inner = quantized(weights(np.shape(x)), 4, batch_axes=batch_axes)
    inner = dataclasses.replace(inner, scale=jnp.full_like(inner.scale, 0.25))
    low = dataclasses.replace(low_rank(x, batch_axes), dense_dtype=jnp.float32)
    return LowRankSumArray(low, inner, np.asarray(x).dtype)


def shared_vectors(x, batch_axes=0, stages=1, clusters=5, spaces=False, mask=False):
    """Random indices into random vectors, along the last axis but one."""
    x, length = np.asarray(x), 2
    grid = list(x.shape[batch_axes:])
    grid[-2] //= length
    rng = np.random.default_rng(x.size)
    lead = (*x.shape[:batch_axes], stages)
    indices = rng.integers(clusters, size=(*lead, *grid)).astype(np.uint8)
    book = rng.normal(size=(*lead, max(grid[-2], 1) if spaces else 1, clusters, length))
    keep = np.asarray(x, np.float32) > 0 if mask else None
    return VectorCodebookArray.from_indices(
        jnp.asarray(indices), jnp.asarray(book, jnp.float32), ((length, -2),), x.dtype, keep
    )


def hashed(x, batch_axes=0, mask=False):
    """Random buckets."""
    x = np.asarray(x)
    buckets = np.random.default_rng(x.size).normal(size=(*x.shape[:batch_axes], 5))
    keep = np.asarray(x, np.float32) > 0 if mask else None
    return HashedArray.from_buckets(
        jnp.asarray(buckets, jnp.float32), x.shape[batch_axes:], 7, x.dtype, keep
    )


def fit_nm(x, batch_axes=0):
    """2:4 along the input axis, or 1:2 where it is too short."""
    m = 4 if x.shape[-2] % 4 == 0 else 2
    return nm_sparse(x, m // 2, m)


FORMS = {
    "int1": lambda x, batch_axes=0: quantized(x, 1, batch_axes=batch_axes, zero=False),
    "int3-affine": lambda x, batch_axes=0: quantized(x, 3, affine=True, batch_axes=batch_axes),
    "int4": lambda x, batch_axes=0: quantized(x, 4, batch_axes=batch_axes),
    "int4-tensor": lambda x, batch_axes=0: quantized(
        x, 4, batch_axes=batch_axes, per_channel=False
    ),
    "int5-groups-last": lambda x, batch_axes=0: quantized(x, 5, blocks=((2, -1),)),
    "int8-groups-first": lambda x, batch_axes=0: quantized(x, 8, blocks=((2, -2),), affine=True),
    "mxfp4": lambda x, batch_axes=0: grid(x, "float4_e2m1fn", ((2, -2),), "float8_e8m0fnu"),
    "e4m3-tiles": lambda x, batch_axes=0: grid(
        x, "float8_e4m3fn", ((2, -2), (2, -1)), "float8_e4m3fn", True, batch_axes
    ),
    "codebook16": lambda x, batch_axes=0: shared(x, 16, batch_axes),
    "codebook5": lambda x, batch_axes=0: shared(x, 5, batch_axes),
    "codebook4-groups-last": lambda x, batch_axes=0: shared_in_groups(x, 4, -1, batch_axes),
    "codebook4-groups-first": lambda x, batch_axes=0: shared_in_groups(x, 4, -2, batch_axes),
    "sparse": lambda x, batch_axes=0: sparse(x, batch_axes=batch_axes),
    "2:4": fit_nm,
    "1:all": lambda x, batch_axes=0: nm_sparse(x, 1, x.shape[-1], -1),
    "blocks": lambda x, batch_axes=0: block_sparse(x, batch_axes=batch_axes),
    "low-rank": lambda x, batch_axes=0: low_rank(x, batch_axes),
    "low-rank-masked": lambda x, batch_axes=0: low_rank(x, batch_axes, 1, mask=True),
    "low-rank+int4": lambda x, batch_axes=0: low_rank_sum(x, batch_axes),
    "vectors": lambda x, batch_axes=0: shared_vectors(x, batch_axes),
    "vectors-added": lambda x, batch_axes=0: shared_vectors(x, batch_axes, 2, 2, True, True),
    "hashed": lambda x, batch_axes=0: hashed(x, batch_axes, mask=True),
}


def weights(shape, dtype="float32", seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return x.astype(jnp.dtype(dtype))


def compress(tree, form, batch_axes=0):
    """Compress every leaf that has two axes beside its batch axes, of even sizes."""

    def one(leaf):
        if leaf.ndim < 2 + batch_axes or leaf.shape[-1] % 2 or leaf.shape[-2] % 2:
            return leaf
        return FORMS[form](leaf, batch_axes=batch_axes)

    return jax.tree.map(one, tree)


def nm_parts(patterns=(0, 5), shape=(2, 6), alphabet=6, values=(4, 6), **static):
    """2:4 on axis -2 of a leaf of shape (8, 6)."""
    symbols = Symbols(np.resize(np.array(patterns, np.int64), shape), alphabet)
    return Parts(
        {"n": 2, "m": 4, "axis": -2, **static},
        {"patterns": symbols},
        {"values": np.ones(values, np.float32)},
    )


def block_parts(mask, values, block=(2, 2), alphabet=2):
    return Parts(
        {"block_shape": list(block) if isinstance(block, tuple) else block},
        {"mask": Symbols(np.asarray(mask), alphabet)},
        {"values": np.ones(values, np.float32)},
    )
