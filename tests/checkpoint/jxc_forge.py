"""Helpers: random trees, exact comparison, and files whose checksums are right but content lies."""

import json
import math
import os
import struct
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxcomp.arrays import (
    BlockSparseArray,
    CodebookArray,
    CompressedArray,
    GridArray,
    HashedArray,
    LowRankArray,
    LowRankSumArray,
    NMSparseArray,
    Parts,
    QuantizedArray,
    RescaledArray,
    RotatedArray,
    SparseArray,
    Symbols,
    VectorCodebookArray,
)
from jaxcomp.checkpoint import CheckpointError, container, load, loading, raw, save
from jaxcomp.checkpoint.manifest import dumps, loads

SUB_BYTE = {"bool": 1, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}


def random_bits(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Every bit pattern that the dtype has, NaNs with payloads included."""
    codes = rng.integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), dtype=np.uint8)
    if dtype in SUB_BYTE:
        codes &= np.uint8((1 << SUB_BYTE[dtype]) - 1)
    return np.ascontiguousarray(codes).view(jnp.dtype(dtype)).reshape(shape)


def quantized(rng: np.random.Generator, shape=(6, 5), bits=4, group=None) -> QuantizedArray:
    codes = np.clip(rng.normal(1 << (bits - 1), 1 << (bits - 2), shape), 0, (1 << bits) - 1)
    scales = [1] * len(shape)
    if group is not None:
        scales[-1:] = [shape[-1] // group, 1]
    blocks = [] if group is None else [[group, -1]]
    return QuantizedArray.from_parts(
        Parts(
            {"bits": bits, "blocks": blocks, "zero": True, "dtype": "float32"},
            {"codes": Symbols(codes.astype(np.uint8), 1 << bits)},
            {"scale": rng.uniform(0.5, 1, scales).astype(np.float32)},
        )
    )


def grid(rng: np.random.Generator, shape=(6, 5), element="nf4", tensor_scale=False) -> GridArray:
    arrays = {"scale": rng.uniform(0.5, 1, (*shape[:-1], 1)).astype(np.float32)}
    if tensor_scale:
        arrays["tensor_scale"] = np.full((1,) * len(shape), 0.5, np.float32)
    return GridArray.from_parts(
        Parts(
            {"element": element, "blocks": [], "dtype": "float32"},
            {"codes": Symbols(rng.integers(0, 16, shape), 16)},
            arrays,
        )
    )


def rescaled(rng: np.random.Generator, shape=(6, 5)) -> RescaledArray:
    multiplier = rng.uniform(0.5, 2, (*shape[:-1], 1)).astype(np.float32)
    return RescaledArray(quantized(rng, shape), jnp.asarray(multiplier), "float32")


def rotated(rng: np.random.Generator, shape=(4, 5)) -> RotatedArray:
    return RotatedArray(quantized(rng, shape), None, (-1,), "float32")


def low_rank(rng: np.random.Generator, shape=(6, 5)) -> LowRankArray:
    sizes = ((*shape[:-1], 2), (*shape[:-2], 2, shape[-1]))
    factors = [jnp.asarray(rng.normal(size=size).astype(np.float32)) for size in sizes]
    return LowRankArray.from_factors(factors, "ar,rb->ab", "float32")


def low_rank_sum(rng: np.random.Generator, shape=(6, 5)) -> LowRankSumArray:
    return LowRankSumArray(low_rank(rng, shape), quantized(rng, shape), "float32")


def vectors(rng: np.random.Generator, shape=(6, 4), clusters=5) -> VectorCodebookArray:
    indices = rng.integers(0, clusters, (*shape[:-2], 1, shape[-2] // 2, shape[-1]))
    book = rng.normal(size=(*shape[:-2], 1, 1, clusters, 2)).astype(np.float32)
    return VectorCodebookArray.from_indices(
        jnp.asarray(indices, jnp.uint8), jnp.asarray(book), ((2, -2),), "float32"
    )


def hashed(rng: np.random.Generator, shape=(6, 5), buckets=3) -> HashedArray:
    values = rng.normal(size=(*shape[:-2], buckets)).astype(np.float32)
    return HashedArray.from_buckets(jnp.asarray(values), shape[-2:], 7, "float32")


def codebook(rng: np.random.Generator, shape=(6, 5), clusters=5, dtype="float32") -> CodebookArray:
    return CodebookArray.from_parts(
        Parts(
            {"dtype": dtype},
            {"indices": Symbols(rng.integers(0, clusters, shape), clusters)},
            {"codebook": rng.normal(size=clusters).astype(jnp.dtype(dtype))},
        )
    )


def sparse(rng: np.random.Generator, shape=(6, 5), density=0.2) -> SparseArray:
    keep = rng.random(shape) < density
    values = rng.normal(size=int(keep.sum())).astype(np.float32)
    mask = Symbols(keep.astype(np.uint8), 2)
    return SparseArray.from_parts(Parts({}, {"mask": mask}, {"values": values}))


def nm_sparse(rng: np.random.Generator, shape=(6, 5), n=2, m=4) -> NMSparseArray:
    """n:m along the last axis but one; ``shape`` is that of the values."""
    groups = (*shape[:-2], shape[-2] // n, shape[-1])
    patterns = math.comb(m, n)
    return NMSparseArray.from_parts(
        Parts(
            {"n": n, "m": m, "axis": -2},
            {"patterns": Symbols(rng.integers(0, patterns, groups), patterns)},
            {"values": rng.normal(size=shape).astype(np.float32)},
        )
    )


def block_sparse(rng: np.random.Generator, grid=(3, 5), block=(2, 3)) -> BlockSparseArray:
    keep = (rng.random(grid) < 0.4).astype(np.uint8)
    values = rng.normal(size=(int(keep.sum()), *block)).astype(np.float32)
    return BlockSparseArray.from_parts(
        Parts({"block_shape": list(block)}, {"mask": Symbols(keep, 2)}, {"values": values})
    )


class Recipe(NamedTuple):
    """A leaf that is not made yet: JAX is not to run while hypothesis draws."""

    kind: str
    seed: int
    shape: tuple[int, ...]
    dtype: str
    bits: int
    on_device: bool


def grow(tree: Any) -> Any:
    """Replace recipes by leaves."""
    if isinstance(tree, Recipe):
        return _leaf(tree)
    if isinstance(tree, dict):
        return {key: grow(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(grow, tree))
    return tree


def _leaf(recipe: Recipe) -> Any:
    rng, shape = np.random.default_rng(recipe.seed), recipe.shape
    if recipe.kind == "quantized":
        return quantized(rng, (*shape, 4), recipe.bits, 2 if recipe.on_device else None)
    if recipe.kind == "codebook":
        return codebook(rng, (*shape, 3), rng.integers(1, 1 << recipe.bits, endpoint=True).item())
    if recipe.kind == "sparse":
        return sparse(rng, (*shape, 7))
    if recipe.kind == "nm_sparse":
        return nm_sparse(rng, (*shape, recipe.bits * 2, 3), 2, 2 + recipe.bits)
    if recipe.kind == "grid":
        return grid(rng, (*shape, 4), "nf4" if recipe.on_device else "float4_e2m1fn")
    if recipe.kind == "rescaled":
        return rescaled(rng, (*shape, 3))
    if recipe.kind == "rotated":
        return rotated(rng, (*shape, 4))
    if recipe.kind == "low_rank":
        return low_rank(rng, (*shape, 4, 3))
    if recipe.kind == "low_rank_sum":
        return low_rank_sum(rng, (*shape, 4, 3))
    if recipe.kind == "vector_codebook":
        return vectors(rng, (*shape, 4, 3), recipe.bits)
    if recipe.kind == "hashed":
        return hashed(rng, (*shape, 4, 3))
    if recipe.kind == "block_sparse":
        return block_sparse(rng, (*shape, 3), (recipe.bits,) if recipe.on_device else (1,))
    array = random_bits(rng, recipe.dtype, shape)
    return jnp.asarray(array) if raw.in_jax(recipe.dtype) and recipe.on_device else array


KINDS = (
    "array",
    "array",
    "quantized",
    "grid",
    "codebook",
    "sparse",
    "nm_sparse",
    "block_sparse",
    "rescaled",
    "rotated",
    "low_rank",
    "low_rank_sum",
    "vector_codebook",
    "hashed",
)


def recipes(kinds: tuple[str, ...] = KINDS):
    return st.builds(
        Recipe,
        st.sampled_from(kinds),
        st.integers(0, 2**32),
        st.lists(st.sampled_from([0, 1, 2, 3, 17]), max_size=3).map(tuple),
        st.sampled_from(raw.DTYPES),
        st.integers(2, 8),
        st.booleans(),
    )


def scalars():
    floats = st.floats(allow_nan=True, allow_infinity=True)
    return st.one_of(st.none(), st.booleans(), st.integers(), floats, st.text())


def trees():
    """Trees of recipes."""
    keys = st.one_of(
        st.text(max_size=5), st.sampled_from(["kernel", "a/b", "a.b", "", "é", "list"])
    )
    return st.recursive(
        st.one_of(recipes(), scalars()),
        lambda children: st.one_of(
            st.dictionaries(keys, children, max_size=4),
            st.dictionaries(st.one_of(keys, st.integers()), children, max_size=3),
            st.lists(children, max_size=3),
            st.lists(children, max_size=3).map(tuple),
        ),
        max_leaves=8,
    )


def assert_same(a: Any, b: Any) -> None:
    """Same structure, same types, same bits."""
    if isinstance(a, dict):
        assert type(b) is dict
        assert list(a) == list(b)
        assert [type(key) for key in a] == [type(key) for key in b]
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, CompressedArray):
        assert type(a) is type(b)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert_same_bits(x, y)
    elif isinstance(a, jax.Array | np.ndarray | np.generic):
        assert isinstance(b, jax.Array if raw.in_jax(a.dtype.name) else np.ndarray)
        assert_same_bits(a, b)
    elif isinstance(a, float):
        assert type(b) is float
        assert np.float64(a).tobytes() == np.float64(b).tobytes()
    else:
        assert type(a) is type(b)
        assert a == b


def assert_same_bits(a: Any, b: Any) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


class Forged(NamedTuple):
    """A file taken apart, to be changed and sealed again."""

    manifest: Any
    parts: list[bytes]
    tensors: dict[str, np.ndarray]


def take_apart(path: str | os.PathLike) -> Forged:
    plan = loading.make_plan(path, None)
    parts, offset = [], 0
    for spec in plan.leaves:
        for name, part in spec.parts():
            if isinstance(part, loading.Same):
                continue
            data = bytes(plan.container.body[offset : offset + part.part_bytes])
            if isinstance(part, loading.ArraySpec) and part.where == "tensor":
                data = bytes(plan.container.tensors[loading.tensor_name(spec.path, name)].data)
                parts.append(container.checksum(data))
                offset += 4
            else:
                parts.append(data + container.checksum(data))
                offset += len(parts[-1] if plan.container.version == 1 else data)
    tensors = {
        name: np.frombuffer(t.data, jnp.dtype(t.dtype)).reshape(t.shape)
        for name, t in plan.container.tensors.items()
    }
    return Forged(loads(plan.container.manifest), parts, tensors)


def seal(manifest: Any, parts: list[bytes], tensors: dict[str, np.ndarray] | None = None) -> bytes:
    """The bytes of a file with this manifest (JSON values, or text) and these sealed parts."""
    text = manifest if isinstance(manifest, str) else dumps(manifest)
    return b"".join(container.build(text, b"".join(parts), tensors or {}))


def sealed(data: bytes) -> bytes:
    return data + container.checksum(data)


def outer(blob: bytes, dtype: str = "U8", shape: list | None = None) -> bytes:
    shape = [len(blob)] if shape is None else shape
    head = {"jxc": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(blob)]}}
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + blob


def with_manifest(packed: bytes, body: bytes = b"") -> bytes:
    """A file with right checksums around any bytes as its deflated manifest."""
    start, rest = b"JXC\x01", len(packed).to_bytes(3, "little") + packed
    data = outer(start + bytes(4) + rest + body)
    header = data[: 8 + struct.unpack_from("<Q", data)[0]]
    check = struct.pack("<I", zlib.crc32(header + start + rest))
    return header + start + check + rest + body


def sample(tmp_path) -> bytes:
    """A file with every kind of leaf, of codec, of container, and an ordinary tensor."""
    rng = np.random.default_rng(0)
    tree = {
        "q": quantized(rng, (8, 9)),
        "c": [codebook(rng, (5, 4), 3), (sparse(rng, (6, 6)), None)],
        "n": [nm_sparse(rng, (4, 3)), block_sparse(rng, (2, 3), (1, 2))],
        "w": [grid(rng, (1, 3)), rescaled(rng, (2, 3)), rotated(rng, (1, 4))],
        "s": [low_rank(rng, (1, 2)), low_rank_sum(rng, (2, 1))],
        "v": [vectors(rng, (2, 3), 2), hashed(rng, (2, 2))],
        "b": jnp.arange(3, dtype=jnp.bfloat16),
        "flags": np.array([True, False]),
        "big": np.arange(12, dtype=np.int16),
        7: {"f": float("nan"), "s": "x"},
    }
    save(tmp_path / "sound.jxc", tree, metadata={"accuracy": 0.5})
    return (tmp_path / "sound.jxc").read_bytes()


def put(path, data: bytes) -> None:
    """Overwrite in place: opening thousands of new files takes longer than loading them."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(handle, data, 0)
    os.ftruncate(handle, len(data))
    os.close(handle)


def refused(path, data: bytes, read=load) -> str:
    put(path, data)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)
